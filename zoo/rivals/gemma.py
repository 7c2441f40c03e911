"""Self-conditioning as DiffusionGemma has it (arXiv 2608.00146): p.E through a feed-forward layer.

    e_i = E[MASK] + FFN(norm(sum_j p_ij E_j)),   p of the step before

Trained in two passes on half of the rows. The last matrix of the FFN starts at zero, so at first nothing
changes. Theirs scales p by a temperature (not public; here 1) and starts from uniform noise, not from masks.
"""

import torch
from torch import Tensor, nn

from rcd import Config, Residual, RMSNorm, SwiGLU, Transformer

EXPECTED = Residual(weight="fixed", fixed=1.0)  # Delta = p.E, Eq. 1


class SelfConditioning(nn.Module):
    differentiable = False

    def __init__(self, config: Config):
        super().__init__()
        self.norm, self.mlp = RMSNorm(config.d_model, config.norm_eps), SwiGLU(config.d_model, config.d_ff)

    def forward(self, hidden: Tensor, model: Transformer, logits: Tensor | None) -> tuple[Tensor, Tensor]:
        """alpha = 1 (N,), Delta = E[MASK] + FFN(norm(p.E)) (N, D)."""
        with torch.no_grad():
            alpha, soft = EXPECTED(model.logits(hidden) if logits is None else logits, model.embedding)
        mask = model.embedding[model.config.mask_id]
        return alpha, mask + self.mlp(self.norm(soft)).to(mask.dtype)
