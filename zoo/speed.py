"""What makes the code of rcd.py faster on some machines and changes none of its results.

    prepare        training masks by flex_attention on CUDA, which skips the tiles where nothing is seen. Of
                   [noisy | clean] these are three quarters
    remat          activation checkpointing: less memory for a third more compute
    fixed_shapes   a reader whose forwards come in a few shapes, so that CUDA graphs can hold them
"""

import functools
import importlib.util
import os
import shutil
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.utils.checkpoint import checkpoint

from rcd import Reader, Transformer, check

FLEX = ("cuda",) if importlib.util.find_spec("triton") else ()  # devices where flex_attention is compiled
compiled = functools.cache(torch.compile)  # of a function, at its first use


class FlexAttention:
    """A mask that attends by itself, see rcd.Attention: q (B, H, T, K), k, v (B, G, T, K) -> y as q."""

    def __init__(self, block_mask: BlockMask):
        self.block_mask = block_mask

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        flex = flex_attention if torch.compiler.is_compiling() else compiled(flex_attention)
        return flex(q, k, v, block_mask=self.block_mask, enable_gqa=q.shape[1] != k.shape[1])


def flex_mask(may_attend: Callable, rows: int, length: int, device: torch.device) -> FlexAttention:
    """rcd.attention_mask for flex_attention. rows = 1: all rows of the batch are alike."""
    rows = None if rows == 1 else rows
    return FlexAttention(compiled(create_block_mask)(may_attend, rows, None, length, length, device=device))


def prepare(model: Transformer, device: torch.device) -> Transformer:
    """Training masks for flex_attention where it runs; elsewhere they stay dense."""
    if torch.device(device).type in FLEX:
        model.attention_mask = flex_mask
    return model


def check_compiler(device: torch.device) -> None:
    """Raises ValueError if torch.compile finds no C++ compiler, which it needs on a CPU."""
    here = "there is no g++ here: install it, or name another in the variable CXX"
    found = device.type != "cpu" or shutil.which(os.environ.get("CXX", "g++"))
    check(bool(found), f"--compile needs a C++ compiler, and {here}")


def remat(model: Transformer) -> Transformer:
    """Each layer keeps its input alone and is computed again in backward."""
    for layer in model.layers:
        layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)
    return model


@functools.cache
def fixed_shapes(kind: type[Reader]) -> type[Reader]:
    """A reader like `kind` whose forwards come in few shapes, so that a compiled model needs few graphs.

    Rows and keys are always all there are, and a window is a power of two of blocks. Rows without a mask take
    part with nothing in their windows.
    """

    class FixedShapes(kind):
        def __init__(self, *args):
            super().__init__(*args)
            if self.cache and self.cache.k.is_cuda:  # a CUDA graph may write to tensors that stay in place
                for store in (self.cache.k, self.cache.v):  # a guard would compile anew for each new cache
                    torch._dynamo.mark_static_address(store, guard=False)

        def frame(self, begin: Tensor, end: Tensor, cells: Tensor):
            rows, _, oldest, stop, _, _ = super().frame(begin, end, cells)
            oldest, stop = (end.index_copy(0, rows, x) for x in (oldest, stop))  # (B,)
            width, T = int((stop - oldest).max()), self.tokens.shape[1]
            if self.cache:  # and under logit_shift the token before
                shift, whole = int(self.model.config.logit_shift), -(-T // self.b)
                blocks = -(-(width - shift) // self.b)
                width = min(1 << (blocks - 1).bit_length(), whole) * self.b + shift
            return torch.arange(len(self.tokens)), cells[:, 0], oldest, stop, width, T

    return FixedShapes
