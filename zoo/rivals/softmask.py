"""Soft-masked diffusion (arXiv 2510.17206, ICLR 2026): a masked cell reads [MASK] and its top tokens, mixed.

    e_i    = (1 - lambda_i) E[MASK] + lambda_i sum over the k likeliest of pi_ij E_j,   pi: p renormalised
    lambda = omega_s sigmoid(omega_a (-H(p) - omega_b))                                 three learned numbers

Low entropy, much feedback: the opposite of RCD's weight. Trained in two passes on four fifths of the rows.
"""

import math

import torch
from torch import Tensor, nn

from rcd import Config, Transformer, by_rows, entropy_of, softmax, tile

TOP_K = 3
SCALE, STEEPNESS, OFFSET = 1e-6, 6.66, -0.75  # omega_s, omega_a, omega_b at first: nothing is fed back
QUICKER = 100  # AdamW moves every parameter by the same step; these three learn that much quicker


class SoftMask(nn.Module):
    """omega_s = sigmoid(100 a), omega_a = softplus(100 b), omega_b = 100 c. In the authors' code the three
    numbers have a learning rate of their own; the factor does the same for them here."""

    differentiable = False

    def __init__(self, config: Config):
        super().__init__()
        first = math.log(SCALE / (1 - SCALE)), math.log(math.expm1(STEEPNESS)), OFFSET
        self.omega = nn.Parameter(torch.tensor(first) / QUICKER)  # (3,)

    def weights(self, entropy: Tensor) -> Tensor:
        """lambda (N,) of the entropies (N,) in nats."""
        scale, steepness, offset = (QUICKER * self.omega.float()).unbind()
        return scale.sigmoid() * (nn.functional.softplus(steepness) * (-entropy - offset)).sigmoid()

    def forward(self, hidden: Tensor, model: Transformer, logits: Tensor | None) -> tuple[Tensor, Tensor]:
        """lambda (N,), Delta (N, D). hidden (N, D); logits (N, V), None = not computed yet."""
        with torch.no_grad():
            logits = model.logits(hidden) if logits is None else logits

            def rows(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
                z, p = softmax(logits)
                return entropy_of(z, p), *p.topk(min(TOP_K, p.shape[1]))

            entropy, top, ids = by_rows(rows, tile(logits), logits)  # (N,), (N, k), (N, k)
            pi = (top / top.sum(-1, keepdim=True)).to(model.embedding.dtype)
        return self.weights(entropy), (pi[..., None] * model.embedding[ids]).sum(1)
