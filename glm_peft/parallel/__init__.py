"""Several processes: the engines, what they hold in parts and share, and how they fail."""
