"""QK-Clip: describes attention weights, observes their logits, and clips them."""
