"""Attention modules that report their largest logits: MHA, GQA, MQA and latent attention. Plain PyTorch."""
