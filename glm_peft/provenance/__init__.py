"""Record a run: its arguments, the base, the data, the hardware."""
