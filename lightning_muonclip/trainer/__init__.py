"""Lightning: the callback, the mixin, and what they ask of a Trainer."""
