"""Hydra configs, shipped as ``lightning_muonclip.conf`` (``pkg://lightning_muonclip.conf``)."""
