"""What is recorded of a run, its base and its data."""
