"""Run the training loop: batches, loss, checkpoints, resuming, curves."""
