"""Lightning: the callback, the mixin, and their requirements on a Trainer."""
