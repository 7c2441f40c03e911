"""LoopMDM (arXiv 2605.26106): early-middle layers are applied twice in every pass. In kind.

    x = layers before;   x <- f(x),   x <- x + g (f(x) - x);   layers after

f is layer n/4 to n/2 of n. So a pass is deeper and has no new matrix; nothing is handed on from step to step,
and the loss is the plain one. The paper trains so from the first step, with no gate. Here the gate g (D,)
starts at zero, so that a trained model can be given its loop: at first nothing changes. A loop leaves a carry
its place: with --recipe=loop-trajectory the same deeper passes hand p.E on, as RCD does. We know the paper's
abstract only, so which layers, and how often, is a guess. The memory estimate and mfu of train.py count them
once.
"""

import copy
from functools import partial

import torch
from torch import Tensor, nn

from rcd import Config, KVCache, Transformer


class Loop(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.layers = slice(config.n_layer // 4, config.n_layer // 2 + 1)
        self.gate = nn.Parameter(torch.zeros(config.d_model))
        self.hook = None

    def join(self, model: Transformer) -> None:
        """Make the model's own forward run the loop, until self.hook is removed."""
        looped = [*model.layers][self.layers]
        self.hook = looped[-1].register_forward_hook(partial(self.again, looped))

    def again(self, looped: list[nn.Module], last: nn.Module, args: tuple, x: Tensor) -> Tensor:
        """What the last of these layers returns, x (B, T, D), after all of them were applied again."""
        *rest, cache = args[1:]
        y, own = x, None if cache is None else second(cache, self.layers.stop)
        for layer in looped:
            y = layer.forward(y, *rest, own)  # not a call, which would come back to this hook
        return x + self.gate * (y - x)


def second(cache: KVCache, layers: int) -> KVCache:
    """The cache of the second time: keys and values of its own, for so many layers; rows, positions and stop
    of the first."""
    if not hasattr(cache, "second"):
        cache.second = copy.copy(cache)
        cache.second.k, cache.second.v = (torch.zeros_like(x[:layers]) for x in (cache.k, cache.v))
    cache.second.at(cache.rows, cache.positions, cache.stop)
    return cache.second
