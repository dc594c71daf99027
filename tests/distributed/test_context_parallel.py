"""Context parallelism: the largest logit over all ranks is that of one process, or is refused.

Torch splits SDPA over ranks only for kernels of a GPU. Here its ring calls the CPU's kernel, by a stand-in for what
dispatches it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracles import brute_max_logits, causal, normal
from processes import on_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from lightning_muonclip import Attention, QKClip
from lightning_muonclip.kernels.context_parallel import ContextParallelError

experimental = pytest.importorskip("torch.distributed.tensor.experimental._attention")
HEADS, DIM, WIDTH, BATCH = 4, 4, 16, 2
KERNEL = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


class Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv = nn.Linear(WIDTH, 3 * HEADS * DIM)
        with torch.no_grad():
            self.qkv.weight.mul_(4)

    def parts(self, x: Tensor) -> Tensor:
        return self.qkv(x).unflatten(-1, (3, HEADS, DIM)).permute(2, 0, 3, 1, 4)

    def forward(self, x: Tensor, is_causal: bool = True) -> Tensor:
        query, key, value = self.parts(x)
        return F.scaled_dot_product_attention(query, key, value, is_causal=is_causal)

    @torch.no_grad()
    def expected(self, x: Tensor) -> Tensor:
        query, key, _ = self.parts(x)
        return brute_max_logits(query, key, DIM**-0.5, causal(x.shape[1])).float()


class Inner(nn.Module):
    def forward(self, query: Tensor, key: Tensor, value: Tensor, block_mask: Any = None) -> Tensor:
        return flex_attention(query, key, value, block_mask=block_mask)


class Flex(Attends):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Inner()

    def forward(self, x: Tensor, block_mask: Any) -> Tensor:  # type: ignore[override]
        return self.inner(*self.parts(x), block_mask=block_mask)


def _ring(operator: Any, args: Any, kwargs: Any) -> Any:
    mesh, locals_ = args[0].device_mesh, [x.to_local() for x in args[:3]]
    outs = experimental._templated_ring_attention(
        mesh.get_group(), 2, KERNEL, *locals_, is_causal=len(args) > 4 and args[4], dropout_p=0.0
    )
    return tuple(DTensor.from_local(x, mesh, [Shard(2)], run_check=False) for x in outs[:2])


@contextmanager
def ring_on_cpu() -> Iterator[None]:
    handlers = sys.modules[experimental._templated_ring_attention.__module__].custom_ops
    handlers[KERNEL.default] = _ring
    try:
        yield
    finally:
        del handlers[KERNEL.default]


def _ring_attention(count: int) -> None:
    mesh = init_device_mesh("cpu", (count,))
    x = normal((BATCH, 4 * count, WIDTH), 1)
    exact = Attends().expected(x)
    function = F.scaled_dot_product_attention
    for rotate in ("allgather", "alltoall"):
        experimental.set_rotate_method(rotate)
        for is_known_before in (False, True):
            model = Attends()
            with QKClip(model, threshold=1.0) as qk_clip:
                if is_known_before:
                    model(x[:, :3])
                    qk_clip.observer.discard()
                for _ in range(2):
                    shard = x.clone()
                    with ring_on_cpu(), experimental.context_parallel(mesh, buffers=[shard], buffer_seq_dims=[1]):
                        model(shard.clone())
                    own = qk_clip.max_logits[0].clone()
                    torch.testing.assert_close(qk_clip.step().max_logits[0], exact)
                    assert (own <= exact * 1.0001).all()
                    torch.testing.assert_close(model.expected(x), exact.clamp_max(1.0))
                    with torch.no_grad():
                        model.load_state_dict(Attends().state_dict())
                model.eval()(x)  # outside, nothing is split
            assert F.scaled_dot_product_attention is function


def _refusals(count: int) -> None:
    mesh = init_device_mesh("cpu", (count,))
    for model, backend, error in (
        (Attends(), SDPBackend.MATH, "no kernel that returns its log-sum-exp"),
        (Attention(WIDTH, HEADS), SDPBackend.FLASH_ATTENTION, "do not measure logits under context_parallel"),
    ):
        module = sys.modules[experimental._templated_ring_attention.__module__]
        module._cp_options.enable_load_balance = False
        shard = normal((BATCH, 4 * count, WIDTH), 1)
        split = experimental.context_parallel(mesh, buffers=[shard], buffer_seq_dims=[1])
        with QKClip(model), sdpa_kernel(backend), split, pytest.raises(ContextParallelError, match=error):
            model(shard.clone(), **({"is_causal": False} if isinstance(model, Attends) else {}))


def _flex(count: int) -> None:
    mesh = init_device_mesh("cpu", (count,))
    length = 128 * count  # whole blocks
    x = normal((BATCH, length, WIDTH), 1)
    mask = create_block_mask(lambda b, h, i, j: i >= j, BATCH, 1, length, length, "cpu")
    model = Flex()
    exact = model.expected(x)
    style = experimental._ContextParallel
    parallelize_module(model.inner, mesh, style(seq_dim=2, attention_type=style.AttentionType.FLEX))
    torch.compiler.set_stance("force_eager")  # or a mask takes seconds
    for balancer in (None, experimental._HeadTailLoadBalancer(length, count, "cpu")):
        shard, own_mask = experimental._context_parallel_shard(mesh, [x.clone(), mask], [1, 2], balancer)
        with QKClip(model, threshold=None) as qk_clip, torch.no_grad():  # it cannot train on a CPU
            model(shard, own_mask)
            torch.testing.assert_close(qk_clip.step().max_logits[0], exact)


def _all(count: int) -> None:
    if hasattr(sys.modules[experimental._templated_ring_attention.__module__], "custom_ops"):
        _ring_attention(count)
    if hasattr(experimental, "_HeadTailLoadBalancer"):
        _flex(count)
    if count == 2:
        _refusals(count)


@pytest.mark.parametrize("count", [2, 4])
def test_largest_logit_is_that_of_one_process(count: int) -> None:
    on_ranks(count, _all, count)
