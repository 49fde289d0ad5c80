"""Distil a document into a prefix: conversations about it, what the model says that reads it, and what was kept."""
