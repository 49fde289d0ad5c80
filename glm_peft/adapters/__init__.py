"""Make, load, check, attach and save an adapter."""
