"""Answers for others: a base with its adapters, conversations, and how answers are streamed."""
