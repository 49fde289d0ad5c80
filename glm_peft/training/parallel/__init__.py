"""Share a training run among several processes."""
