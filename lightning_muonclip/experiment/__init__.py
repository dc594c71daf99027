"""The example application: a byte-level GPT trained by ``muonclip-train``."""
