"""Attention modules that report their maximum logits: MHA, GQA, MQA and latent attention."""
