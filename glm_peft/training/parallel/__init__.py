"""What several processes of one training run share."""
