"""Mixture of experts, as one plain module that stands in for a layer's SwiGLU.

A router scores the experts for each token. The best k process it, and their outputs are added, each times its
score. There are two routers:

    softmax   s = softmax(W x), the k largest. SDAR-30B-A3B renormalises them to sum 1, LLaDA-MoE does not.
    sigmoid   s = sigmoid(W x). Experts come in groups, and only the groups with the largest sum of their two
              best are kept. The choice is by s + bias; the bias balances the load and scales no output. The k
              scores are renormalised and scaled. A shared expert sees every token. (LLaDA2.0, as in Ling 2.0
              and DeepSeek-V3, arXiv 2412.19437)

The router computes in float32: a bfloat16 score makes ties that the original does not have.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rcd import SwiGLU


class Router(nn.Module):
    """W (X, D), X experts, and with a bias (X,) the grouped sigmoid router."""

    def __init__(self, d_model: int, n_experts: int, biased: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_experts, d_model))
        if biased:
            self.register_buffer("expert_bias", torch.empty(n_experts, dtype=torch.float32))


class Experts(nn.Module):
    """x (B, T, D) -> (B, T, D), by the best top_k of n_experts SwiGLUs of hidden width d_ff.

    sigmoid: the grouped router, which keeps kept_groups of groups. normalise: the k scores sum to 1, before
    scale multiplies them. shared: hidden width of the shared expert, 0 = none. Raises ValueError if the kept
    groups do not have top_k experts.
    """

    def __init__(self, d_model: int, d_ff: int, n_experts: int, top_k: int, *, normalise: bool,
                 sigmoid: bool = False, groups: int = 1, kept_groups: int = 1, scale: float = 1.0,
                 shared: int = 0):  # fmt: skip
        super().__init__()
        if not 1 <= top_k <= n_experts // groups * kept_groups or n_experts % groups:
            where = f"{kept_groups} of {groups} groups"
            raise ValueError(f"cannot choose {top_k} of {n_experts} experts in {where}")
        self.top_k, self.normalise, self.sigmoid, self.scale = top_k, normalise, sigmoid, scale
        self.groups, self.kept_groups = groups, kept_groups
        self.gate = Router(d_model, n_experts, sigmoid)
        self.experts = nn.ModuleList(SwiGLU(d_model, d_ff) for _ in range(n_experts))
        if shared:
            self.shared_experts = SwiGLU(d_model, shared)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (N, D) -> weights (N, k) in float32 and expert numbers (N, k)."""
        with torch.autocast(x.device.type, enabled=False):
            scores = F.linear(x.float(), self.gate.weight.float())  # (N, E)
        if not self.sigmoid:
            weights, chosen = scores.softmax(-1).topk(self.top_k)
        else:
            scores = scores.sigmoid()
            ranked = (scores + self.gate.expert_bias).view(len(x), self.groups, -1)  # (N, G, E / G)
            best = ranked.topk(min(2, ranked.shape[-1]))[0].sum(-1).topk(self.kept_groups)[1]  # (N, kept)
            kept = torch.zeros_like(ranked[..., 0], dtype=torch.bool).scatter_(1, best, True)  # (N, G)
            chosen = ranked.masked_fill(~kept[..., None], -torch.inf).flatten(1).topk(self.top_k)[1]
            weights = scores.gather(1, chosen)
        if self.normalise:
            weights = weights / weights.sum(-1, keepdim=True)
        return weights * self.scale, chosen

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, -2)  # (N, D)
        weights, chosen = self.route(flat)
        out = torch.zeros_like(flat)
        for e in chosen.unique().tolist():
            row, rank = (chosen == e).nonzero(as_tuple=True)
            y = self.experts[e](flat[row]) * weights[row, rank, None]  # (n, D)
            out = out.index_add(0, row, y.to(out.dtype))
        out = out.view_as(x)
        return out + self.shared_experts(x) if hasattr(self, "shared_experts") else out
