"""What the hyper-parameter search is made of: its space, its study, one trial, and what it shows."""
