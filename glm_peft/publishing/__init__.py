"""Publish an adapter: write its card, collect its files, send them from training."""
