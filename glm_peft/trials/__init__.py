"""Search for hyper-parameters: the space of values, the Optuna study, one trial, and the report."""
