"""Observes the logits of training forwards and keeps their maxima."""
