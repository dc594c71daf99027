"""QK-Clip: which weights make which logits, how large the logits are, and the clip. Plain PyTorch."""
