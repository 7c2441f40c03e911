"""Fast-dLLM v2 (Efficient-Large-Model), 1.5B and 7B, and the caches of v1 for bidirectional models.

v2 is Qwen2.5-Instruct made block-causal. Blocks of 32; logits stay shifted. A block is filled in sub-blocks
of 8, left to right, and before them its first token by itself: the row before it is clean, so that is the
autoregressive prediction. A prompt that ends inside a block gives the head of that block, first token
included. Threshold 0.9 is the model card's; the code's default, 1, is one token a step. The 1.5B model ties
its head. Its files disagree about the padding id; padding is never read.

At temperature 0 the tokens are those of the authors' loop. Three things differ. The last sub-block of an
answer is finished after an end token (the text is the same). Above temperature 0 the first token of a block
is drawn like the others (theirs stays argmax). A prompt of exactly 32 tokens is read (theirs is not).

Training: v2 draws t per block (train.py --t_per=block), sees every batch twice with complementary masks, and
weighs all masks alike. The last two are complementary_loss below (train.py --weighting=complementary). It has
no 1/t, so it is no bound on -log p.
"""

import torch
from torch import Generator, Tensor

from rcd import Config, Context, Reader, Transformer, diffusion_loss
from zoo.family import Family, Plan, Settings, Source, standard_config, standard_name


class PrefixCache(Reader):
    """Approximate cache of a bidirectional model (Fast-dLLM v1, arXiv 2505.22618).

    The first forward of a block reads the whole canvas. The others read the block and all that follows, and
    keep the keys and values of what stands before it.
    """

    keep_suffix = False

    def __init__(self, model: Transformer, tokens: Tensor, lengths: Tensor, b: int):
        super().__init__(model, tokens, lengths, b, cached=True)

    def window(self, rows: Tensor, begin: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
        first = self.last_begin[rows] != begin
        self.last_begin[rows] = begin
        oldest = (begin - int(self.model.config.logit_shift)).masked_fill(first, 0).clamp(min=0)
        return oldest, torch.where(first | (not self.keep_suffix), self.tokens.shape[1], end)


class DualCache(PrefixCache):
    """The others read the block alone, and keep the keys and values of all the rest."""

    keep_suffix = True


def sub_blocks(at: Tensor, b: int, size: int, c: Config) -> tuple[Tensor, int]:
    """Places at (B, T) in blocks of b -> the turn (B, T) in which each is filled, and turns per block.

    A block is filled in sub-blocks of `size`, left to right. Before them, a block-causal model with shifted
    logits fills the first token of the block by itself.
    """
    size, first = min(size, b), int(c.block_size > 0 and c.logit_shift)
    per_block = -(-b // size) + first
    return at // b * per_block + at % b // size + first * (at % b > 0), per_block


def complementary_loss(model: Transformer, tokens: Tensor, response: Tensor, positions: Tensor | None = None,
                       *, t: Tensor, context: Context | None = None, generator: Generator | None = None,
                       draws: tuple = ()) -> Tensor:  # fmt: skip
    """Fast-dLLM v2's loss (arXiv 2509.26328): the batch and, beside it, a copy in which exactly the other
    response tokens are masked, but for rounding. So each is predicted once: the mean of all -log p, in nats
    per response token.

    Arguments as in rcd.diffusion_loss; t (B, 1) or (B, T), from zoo.recipes.noise_levels for one per block.
    """
    shapes = tokens.shape, (len(tokens), 2)
    noise, uniform = draws or (torch.rand(s, generator=generator, device=tokens.device) for s in shapes)
    both = [x if x is None else x.repeat(2, 1) for x in (tokens, response, positions)]  # (2B, T) each
    # noise < t in the first copy, 1 - noise < 1 - t in the other: uniform in both, so that a context may ask
    # for an earlier state of either.
    t, twice = torch.cat([t, 1 - t]), (torch.cat([noise, 1 - noise]), uniform.repeat(2, 1))
    return 2 * diffusion_loss(model, *both, context=context, bound=False, t=t, draws=twice)


def plan(s: Settings, source: Source) -> Plan:
    config = standard_config(s, source, block_size=s.integer("bd_size", 32), mask_id=151665,
                             eos_ids=(151645, 151643), pad_id=151643, qkv_bias=True,
                             logit_shift=True)  # fmt: skip
    defaults = {"rule": "threshold", "threshold": 0.9, "sub_block": 8, "carry": "none"}
    return Plan("Fast-dLLM v2", config, standard_name, "qwen2.5", defaults)


FAMILY = Family("Fast-dLLM v2", ("fast_dllm_qwen",), plan, {
    "Efficient-Large-Model/Fast_dLLM_v2_1.5B": ("1.5B", "32", "151665"),
    "Efficient-Large-Model/Fast_dLLM_v2_7B": ("7.6B", "32", "151665"),
})  # fmt: skip
