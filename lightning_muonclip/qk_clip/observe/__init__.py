"""Where the logits of a forward pass are seen and kept."""
