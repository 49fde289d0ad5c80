"""The OpenAI API over HTTP: requests are read and guarded, answers streamed, and what happens is counted."""
