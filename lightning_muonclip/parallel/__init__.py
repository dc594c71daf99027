"""Sharded tensors: which rank holds which part, and which rank does which work."""
