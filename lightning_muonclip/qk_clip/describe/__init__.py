"""Which channels of which weights belong to which head."""
