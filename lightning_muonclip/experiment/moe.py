"""A mixture of experts in place of the MLP, with the weights of all experts in stacks, as Hugging Face has them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MixtureOfExperts(nn.Module):
    """Sends every token to a few experts, SwiGLU MLPs each, and sums their outputs weighted by the router.

    Experts are kept equally busy by a bias on the choice alone, which rises for those that had too few tokens (Wang et al.,
    arXiv 2408.15664), so that the loss needs no further term.

    Args:
        hidden_size: Width of the residual stream.
        intermediate_size: Width of an expert.
        num_experts: Number of experts.
        num_experts_per_token: How many of them a token goes to.
        balancing_rate: By how much the bias of an expert changes at a forward in training.

    Raises:
        ValueError: If a token is to go to more experts than there are, or to none.
    """

    choice_bias: Tensor

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int = 8,
        num_experts_per_token: int = 2,
        balancing_rate: float = 1e-3,
    ) -> None:
        super().__init__()
        if not 1 <= num_experts_per_token <= num_experts:
            raise ValueError(
                f"num_experts_per_token must be between 1 and num_experts={num_experts}, got {num_experts_per_token}"
            )
        self.num_experts_per_token = num_experts_per_token
        self.balancing_rate = balancing_rate
        self.router = nn.Linear(hidden_size, num_experts, bias=False)
        self.gate_up_proj = nn.Parameter(torch.randn(num_experts, 2 * intermediate_size, hidden_size) * 0.02)
        self.down_proj = nn.Parameter(torch.randn(num_experts, hidden_size, intermediate_size) * 0.02)
        self.register_buffer("choice_bias", torch.zeros(num_experts))

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``(..., hidden_size)`` to the same."""
        tokens = x.flatten(0, -2)
        scores = self.router(tokens).to(torch.promote_types(x.dtype, torch.float32)).sigmoid()
        chosen = (scores + self.choice_bias).topk(self.num_experts_per_token, dim=-1).indices
        weights = scores.gather(-1, chosen)
        weights = (weights / weights.sum(-1, keepdim=True)).to(x.dtype)
        if self.training:
            self._balance(chosen)
        out = torch.zeros_like(tokens)
        for expert, (gate_up, down) in enumerate(zip(self.gate_up_proj, self.down_proj)):
            token, place = (chosen == expert).nonzero(as_tuple=True)
            gate, up = F.linear(tokens[token], gate_up).chunk(2, dim=-1)
            own = F.linear(F.silu(gate) * up, down) * weights[token, place, None]
            out = out.index_add(0, token, own.to(out.dtype))
        return out.view_as(x)

    @torch.no_grad()
    def _balance(self, chosen: Tensor) -> None:
        load = torch.bincount(chosen.flatten(), minlength=len(self.choice_bias)).to(self.choice_bias)
        self.choice_bias += self.balancing_rate * (load.mean() - load).sign()
