"""``muonclip-study``: a table of configurations, each at its own best learning rate, over seeds, and its report."""
