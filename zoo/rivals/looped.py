"""LoopMDM (arXiv 2605.26106): early-middle layers are applied twice in every pass. In kind.

    x = layers before;   x <- f(x),   x <- x + g (f(x) - x);   layers after

f is layer n/4 to n/2 of n. So a pass is deeper and has no new matrix; nothing is handed on from step to step,
and the loss is the plain one. The paper trains so from the first step, with no gate. Here the gate g (D,)
starts at zero, so that a trained model can be given its loop: at first nothing changes. Which layers, and how
often, is not public; both are a guess. The memory estimate and mfu of train.py count them once.
"""

import copy
from functools import partial

import torch
from torch import Tensor, nn

from rcd import Config, KVCache, Transformer


class Loop(nn.Module):
    differentiable = False

    def __init__(self, config: Config):
        super().__init__()
        self.layers = slice(config.n_layer // 4, config.n_layer // 2 + 1)
        self.gate = nn.Parameter(torch.zeros(config.d_model))
        self.hook = None

    def forward(self, hidden: Tensor, model: Transformer, logits: Tensor | None) -> tuple[Tensor, Tensor]:
        """alpha = 0 (N,), Delta = 0 (N, D): the next step reads a plain [MASK]."""
        return hidden.new_zeros(len(hidden)), torch.zeros_like(hidden)

    def join(self, model: Transformer) -> None:
        """Make the model's own forward run the loop, until self.hook is removed."""
        looped = [*model.layers][self.layers]
        self.hook = looped[-1].register_forward_hook(partial(self.again, looped))

    def again(self, looped: list[nn.Module], last: nn.Module, args: tuple, x: Tensor) -> Tensor:
        """What the last of these layers returns, x (B, T, D), after all of them were applied again."""
        *rest, cache = args[1:]
        y = x
        for layer in looped:
            y = layer.forward(y, *rest, second(cache))  # not a call, which would come back to this hook
        return x + self.gate * (y - x)


def second(cache: KVCache | None) -> KVCache | None:
    """The cache of the second time: keys and values of its own, rows and positions of the first."""
    if cache is None:
        return None
    if not hasattr(cache, "second"):
        cache.second = copy.copy(cache)
        cache.second.k, cache.second.v = torch.zeros_like(cache.k), torch.zeros_like(cache.v)
    own = cache.second.k, cache.second.v
    vars(cache.second).update(vars(cache))
    cache.second.k, cache.second.v = own
    return cache.second
