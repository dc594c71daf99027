"""The operations that dominate run time, as functions of tensors only."""
