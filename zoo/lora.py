"""LoRA (arXiv 2106.09685): train two thin matrices beside each frozen one, for cards with less memory.

    y = W x + B A x        W (out, in) is frozen; A (r, in) is random, B (out, r) is zero at first

Gradients and AdamW's moments are those of A and B alone. merge() writes W + B A: a model like any other.
"""

import math

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from rcd import Transformer


class LoRA(nn.Linear):
    """A linear map whose own weights are frozen, with A = self.down and B = self.up in float32."""

    def __init__(self, linear: nn.Linear, rank: int, generator: Generator):
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        self.weight, self.bias, device = linear.weight, linear.bias, linear.weight.device
        down = torch.randn(rank, self.in_features, generator=generator) / math.sqrt(self.in_features)
        self.down = nn.Parameter(down.to(device))
        self.up = nn.Parameter(torch.zeros(self.out_features, rank, device=device))

    def forward(self, x: Tensor) -> Tensor:
        low = F.linear(F.linear(x.to(self.down.dtype), self.down), self.up)
        return super().forward(x) + low.to(x.dtype)


def adapt(model: Transformer, rank: int, seed: int) -> Transformer:
    """Freeze the model, and put a LoRA in place of every linear map of its layers."""
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for module in [*model.layers.modules()]:
        for name, child in module.named_children():
            if type(child) is nn.Linear:
                setattr(module, name, LoRA(child, rank, generator))
    return model


def merge(model: Transformer) -> Transformer:
    """The model with W + B A in place of every LoRA, rounded once to the dtype of W."""
    for module in [*model.modules()]:
        for name, child in module.named_children():
            if isinstance(child, LoRA):
                linear = nn.Linear(child.in_features, child.out_features, device="meta")
                change = (child.up @ child.down).detach()
                linear.weight = nn.Parameter((child.weight + change).to(child.weight.dtype))
                linear.bias = child.bias
                setattr(module, name, linear)
    return model


def parameters(model: Transformer, rank: int) -> int:
    """How many numbers adapt() would train."""
    linear = [m for m in model.layers.modules() if type(m) is nn.Linear]
    return sum(rank * (m.in_features + m.out_features) for m in linear)
