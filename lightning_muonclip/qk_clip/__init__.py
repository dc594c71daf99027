"""QK-Clip: layouts, recognition of attention modules, observation of logits, and the clip. Plain PyTorch."""
