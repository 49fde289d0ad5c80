"""The model card: written from what an adapter's folder holds, and from nothing else."""
