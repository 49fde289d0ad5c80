"""Examine a run before it is started, and an adapter: the parts of the doctor and of the inspection."""
