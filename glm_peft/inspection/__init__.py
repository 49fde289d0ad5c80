"""What is to be seen in an adapter, for `glm_peft.inspect_adapter`."""
