"""Describes which channels of which weights belong to which head."""
