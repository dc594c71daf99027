"""MuonClip for PyTorch Lightning: transformers that do not blow up."""

from lightning_muonclip import attention_specs as _attention_specs  # noqa: F401  registers the modules of this package
from lightning_muonclip import mup
from lightning_muonclip.attention.attention import Attention
from lightning_muonclip.attention.latent import MultiheadLatentAttention
from lightning_muonclip.attention.masks import AttentionMask
from lightning_muonclip.metrics import MaxLogits
from lightning_muonclip.muonclip import MuonClip
from lightning_muonclip.optim.muon import Muon
from lightning_muonclip.optim.orthogonalize import orthogonalize
from lightning_muonclip.optim.routing import split_params
from lightning_muonclip.optim.schedules import GroupScheduler, decay_to_zero, momentum_warmup
from lightning_muonclip.qk_clip.clip import QKClip
from lightning_muonclip.qk_clip.describe.declared import register_attention
from lightning_muonclip.qk_clip.describe.spec import AttentionSpec, Projection
from lightning_muonclip.qk_clip.intercept.registered import register_max_logits
from lightning_muonclip.qk_clip.rule import muonclip_qk_clip, qk_clip_gamma
from lightning_muonclip.trainer.callback import MuonClipCallback
from lightning_muonclip.trainer.fsdp2 import FSDP2Strategy
from lightning_muonclip.trainer.mixin import MaxLogitsMixin

__version__ = "0.1.0"

__all__ = [
    "Attention",
    "AttentionMask",
    "AttentionSpec",
    "FSDP2Strategy",
    "GroupScheduler",
    "MaxLogits",
    "MaxLogitsMixin",
    "MultiheadLatentAttention",
    "Muon",
    "MuonClip",
    "MuonClipCallback",
    "Projection",
    "QKClip",
    "decay_to_zero",
    "momentum_warmup",
    "muonclip_qk_clip",
    "mup",
    "orthogonalize",
    "qk_clip_gamma",
    "register_attention",
    "register_max_logits",
    "split_params",
]
