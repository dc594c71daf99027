"""The few operations whose speed decides everything, each a function of tensors only."""
