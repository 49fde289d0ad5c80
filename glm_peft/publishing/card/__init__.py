"""Write the model card of an adapter."""
