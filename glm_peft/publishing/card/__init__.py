"""The model card of an adapter."""
