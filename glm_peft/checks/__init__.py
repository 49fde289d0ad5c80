"""What can be said of data, model and memory before training, for `glm_peft.doctor` and for training itself."""
