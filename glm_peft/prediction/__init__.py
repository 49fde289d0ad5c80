"""Answers: generated, kept, scored."""
