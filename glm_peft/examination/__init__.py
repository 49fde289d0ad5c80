"""What the doctor and the inspection of an adapter look at."""
