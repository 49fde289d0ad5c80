"""Generate answers, keep them on the disk, and score them."""
