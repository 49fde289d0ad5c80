"""The training loop: batches, loss, checkpoints, resuming, curves."""
