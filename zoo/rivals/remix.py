"""ReMix (arXiv 2602.22868, CVPR 2026): soft inputs without training, dropped where a prediction jumps.

    e_i  = (1 - beta) E[MASK] + beta soft_i,   beta = 0.5
    soft = sum over the nucleus of p_j E_j + (the mass outside it) E[MASK]

The nucleus are the likeliest tokens that hold the mass clip(2 max p, 0.2, 0.9), at most 50. In the terms of
Eq. 2 that is alpha = beta m and Delta = sum p_j E_j / m, if they hold m. A cell whose p has moved since the
pass before, JS(p_t, p_(t-1)) > js_reset (0.3, in nats), reads the bare mask: the reader Reset. Both compose
with all else: --weight=remix, and --js_reset for any carry. The authors commit by a threshold of 0.9, and at
most min(max(0.7 masks, 5), 20) cells a pass; that cap is not built.
"""

import math

import torch
from torch import Tensor

from rcd import Reader, Sampler, by_rows, softmax, tile
from zoo.rivals.rules import Notes

BETA, MOST = 0.5, 50


def remix(logits: Tensor, E: Tensor) -> tuple[Tensor, Tensor]:
    """The carry, Carry.weight=remix: logits (N, V), E (V, D) -> alpha (N,), Delta (N, D)."""

    def rows(logits: Tensor) -> tuple[Tensor, Tensor]:
        top, ids = softmax(logits)[1].topk(min(MOST, logits.shape[1]))  # (n, k), the likeliest first
        nucleus = (2 * top[:, :1]).clamp(0.2, 0.9)
        top = top * (top.cumsum(-1) - top < nucleus)  # tokens before which the mass is not there yet
        mass = top.sum(-1)
        weights = (top / mass[:, None]).to(E.dtype)
        return BETA * mass, (weights[..., None] * E[ids]).sum(1)

    with torch.no_grad():
        return by_rows(rows, tile(logits), logits)


def jensen_shannon(logits: Tensor, others: Tensor) -> Tensor:
    """JS (N,) in nats, between 0 and log 2, of softmax(logits) and softmax(others), both (N, V)."""

    def rows(logits: Tensor, others: Tensor) -> tuple[Tensor]:
        (_, p), (_, q) = softmax(logits), softmax(others)
        entropy = [torch.special.entr(x).sum(-1) for x in (p, q, (p + q) / 2)]
        return ((entropy[2] - (entropy[0] + entropy[1]) / 2).clamp(0, math.log(2)),)

    return by_rows(rows, tile(logits), logits, others)[0]


class Reset(Notes):
    """A reader that drops the residual of a cell whose p has moved too far between the last two passes."""

    def __init__(self, read: Reader, s: Sampler):
        super().__init__(read, s)
        self.most, self.kept = s.js_reset, None  # logits (N, V) of the pass before, and what moved in it (N,)

    def __call__(self, begin: Tensor, end: Tensor, cells: Tensor, alpha: Tensor | None, delta: Tensor | None):
        before = self.last(*cells.unbind(1))
        known = before >= 0  # (N,) all of them or, in a new block, none
        if alpha is not None and known.all():
            alpha = alpha.masked_fill(self.moved[before.to(alpha.device)], 0.0)
        logits = super().__call__(begin, end, cells, alpha, delta)
        self.moved = torch.zeros(len(cells), dtype=torch.bool, device=logits.device)
        if known.all():
            self.moved = jensen_shannon(logits, self.kept[before.to(logits.device)]) > self.most
        self.kept = logits
        return logits
