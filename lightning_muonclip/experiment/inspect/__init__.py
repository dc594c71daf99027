"""``muonclip-inspect``: what a run would do with a model, before it trains."""
