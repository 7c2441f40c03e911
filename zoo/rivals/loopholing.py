"""Loopholing (arXiv 2510.19304, ICLR 2026) and Relay (arXiv 2605.22967): the hidden state is carried on.

    e_i = E[x_i] + LayerNorm(h_i),   h_i: the last hidden state of the step before, 0 at first

So what is handed on is not squeezed through a distribution over tokens. The gain of the norm starts at zero
(as in PUMBA, Apple, 2026): at first nothing changes. Loopholing trains in two passes on the same x_t, with
no gradient through the first. Relay lets the gradient flow back through two steps, and has RMSNorm.

One liberty: h enters at masked cells only. A cell that is filled reads its token, as everywhere here. In the
papers h enters at every cell. Of Relay no formula is public but these: it is Relay in kind.
"""

from torch import Tensor, nn

from rcd import Config, RMSNorm, Transformer


class Loopholing(nn.Module):
    differentiable = False

    def __init__(self, config: Config):
        super().__init__()
        self.norm = nn.LayerNorm(config.d_model)
        nn.init.zeros_(self.norm.weight)

    def forward(self, hidden: Tensor, model: Transformer, logits: Tensor | None) -> tuple[Tensor, Tensor]:
        """alpha = 1 (N,), Delta = E[MASK] + norm(h) (N, D)."""
        mask = model.embedding[model.config.mask_id]
        return hidden.new_ones(len(hidden)), mask + self.norm(hidden).to(mask.dtype)


class Relay(Loopholing):
    differentiable = True

    def __init__(self, config: Config):
        super().__init__(config)
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        nn.init.zeros_(self.norm.weight)
