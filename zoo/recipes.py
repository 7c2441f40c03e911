"""How stage 2 can be trained beyond Algorithm 1: where the target gets the residual that it learns to read.

In Algorithm 1 (rcd.reference_context) the target sees a reference's p at the *same* x_t. Sampling feeds it
its own p, of the step before, which has not seen the newest tokens. `earlier_context` and `Trajectories`
train on what sampling will feed. None of this is in the paper. Below it: initial weights, and packed rows.
"""

import math
from collections.abc import Callable

import torch
from torch import Generator, Tensor, nn

from rcd import (RULES, Candidates, Config, Context, Noised, Residual, Sampler, Transformer, mask_tokens,
                 maskable, residual_of, sample_t, trajectory_step)  # fmt: skip


def earlier_context(residual: Residual) -> Context:
    """The residual is the target's own, from one plain pass over an earlier canvas, with more masks."""

    def context(target: Transformer, n: Noised) -> tuple[Tensor, Tensor]:
        t = n.t + (1 - n.t) * n.uniform[:, :1]  # between t and 1
        x, _ = mask_tokens(n.tokens, n.response, t, n.noise, target.config.mask_id)
        return residual_of(target, x, n, residual, target.embedding)

    return context


def sometimes_absent(context: Context, probability: float) -> Context:
    """A context that is absent from a row with this probability, so that a cold start is trained too."""

    def thinned(model: Transformer, n: Noised) -> tuple[Tensor, Tensor]:
        alpha, delta = context(model, n)
        return alpha * (n.uniform[n.cells[0], 1] >= probability), delta

    return thinned


# n, and which of these rows are read (default: all) -> tokens, response, positions (n, T).
Fresh = Callable[..., tuple[Tensor, Tensor, Tensor | None]]


class Trajectories:
    """Stage 2 on the sampler's own trajectories: no reference, no forward beyond the one that learns.

    A batch is B trajectories under way. A training step is one denoising step of each. It reads the canvas
    with the residual carried so far, takes the loss on all that is masked, commits where the sampler would,
    and carries the new residual on. But what it commits is the true token. A trajectory starts cold, so the
    cold start is trained too. One that is full makes room for a new canvas. A block-causal model denoises all
    blocks side by side; the documents of a packed row are canvases side by side.

    window: so many steps of each trajectory make one training step, and the gradient flows back through Delta
    within it; 1 = not at all. bound: a masked token weighs 1/t, so that each state of a canvas has the same
    weight; else all masked tokens have. advance: what a step reads and hands on (zoo/rivals/carries.py has
    another). budget: a canvas is full after 2 to so many steps, 0 = to one a token. Fewer steps show more
    canvases. progress of loss(), the share of the training that is done: the most steps grow with it, from 2.
    """

    def __init__(self, config: Config, rows: int, length: int, device: torch.device | str = "cpu",
                 packed: bool = False, window: int = 1, bound: bool = True,
                 advance: Callable = trajectory_step, budget: int = 0):  # fmt: skip
        self.window, self.bound, self.advance, self.budget = window, bound, advance, budget
        self.state = {
            "tokens": torch.zeros(rows, length, dtype=torch.long, device=device),  # the truth
            "response": torch.zeros(rows, length, dtype=torch.bool, device=device),
            "masked": torch.zeros(rows, length, dtype=torch.bool, device=device),
            "alpha": torch.zeros(rows, length, device=device),  # the residual that masked positions carry
            "delta": torch.zeros(rows, length, config.d_model, device=device),
            "left": torch.ones(rows, dtype=torch.long, device=device),  # steps until everything is committed
            "threshold": torch.ones(rows, device=device),  # half of them commit all above theirs, too
        }
        if packed:
            self.state["positions"] = torch.zeros(rows, length, dtype=torch.long, device=device)

    def loss(self, model: Transformer, fresh: Fresh, residual: Residual, generator: Generator,
             progress: float = 1.0) -> Tensor:  # fmt: skip
        """A window of every trajectory, in nats per token."""
        given = model, fresh, residual, generator, progress
        loss = sum(self.step(*given) for _ in range(self.window)) / self.window
        self.state["delta"] = self.state["delta"].detach()
        return loss

    def draws(self, n: int, generator: Generator) -> Tensor:
        """What decides the budgets and thresholds of n new canvases: uniform, (3, n)."""
        return torch.rand(3, n, generator=generator, device=self.state["tokens"].device)

    def size(self) -> Tensor:
        """How many response tokens the batch holds: the loss is divided by it."""
        return self.state["response"].sum()

    def step(self, model: Transformer, fresh: Fresh, residual: Residual, generator: Generator,
             progress: float) -> Tensor:  # fmt: skip
        """One denoising step of every trajectory, and its loss."""
        s, c, device = self.state, model.config, self.state["tokens"].device
        B, T = s["tokens"].shape
        empty = (~s["masked"].any(dim=1)).nonzero()[:, 0]
        if len(empty):
            tokens, response, positions = fresh(len(empty))
            if positions is not None:
                s["positions"][empty] = positions
            s["tokens"] = s["tokens"].index_put((empty,), tokens)  # backward of a window needs the old ones
            s["response"][empty] = maskable(c, response, positions)
            s["masked"][empty], s["alpha"][empty] = s["response"][empty], 0.0

        # Documents and blocks are named by their first cell, counted through the batch: (B, T) each.
        cell = torch.arange(B * T, device=device).view(B, T)
        positions = s["positions"] if "positions" in s else torch.arange(T, device=device).expand(B, T)
        document = cell - positions
        block = cell - positions % c.block_size if c.block_size else document

        def count(cells: Tensor, group: Tensor) -> Tensor:
            """How many of cells (B, T) each group holds -> (B * T,)."""
            zeros = torch.zeros(B * T, dtype=torch.long, device=device)
            return zeros.index_add_(0, group.flatten(), cells.flatten().long())

        if len(empty):
            most = count(s["masked"], block).view(B, T).amax(1)[empty]  # of the largest block
            most = most.clamp(max=self.budget or T).clamp(min=2)
            u, v, w = self.draws(len(empty), generator)
            s["left"][empty] = (2 * (most / 2) ** (v * progress)).round().long()  # log-uniform, from 2 up
            s["threshold"][empty] = torch.where(u < 0.5, 1.0, 1 - 0.3 * w**2)  # 0.7 to 1, more of them near 1
        masked = s["masked"]
        given = s["tokens"], masked, s["alpha"], s["delta"], residual, s.get("positions")
        cells, nll, alpha, delta, confidence = self.advance(model, *given, grad=self.window > 1)
        t = count(masked, document) / count(s["response"], document)  # (B * T,) noise level of each document
        loss = (nll / t[document[cells]] if self.bound else nll).sum() / self.size()

        for name, value in (("alpha", alpha), ("delta", delta)):
            s[name] = s[name].index_put(cells, value.to(s[name].dtype))
        with torch.no_grad():
            quota = -(-count(masked, block) // s["left"].repeat_interleave(T))  # a budget for every block
            candidates = Candidates(block[cells], cells[1], confidence, quota, None, generator)
            commit = RULES["static"](candidates, Sampler()) | (confidence > s["threshold"][cells[0]])
            s["masked"] = masked.index_put(cells, ~commit)
            s["left"] = (s["left"] - 1).clamp(min=1)
        return loss


def init_weights(model: Transformer, generator: Generator | None = None) -> Transformer:
    """Normal(0, 0.02), over sqrt(2 n_layer) where a projection writes into the residual stream (GPT-2)."""
    for name, p in model.named_parameters():
        if p.dim() == 2:
            depth = 2 * model.config.n_layer if name.endswith(("o_proj.weight", "down_proj.weight")) else 1
            nn.init.normal_(p, std=0.02 / math.sqrt(depth), generator=generator)
        else:
            nn.init.constant_(p, float(name.endswith("norm.weight")))  # norms 1, biases 0
    return model


def document_positions(segments: Tensor) -> Tensor:
    """Position of each token in its own document (B, T). segments (B, T): the number of that document."""
    column = torch.arange(segments.shape[1], device=segments.device)[None]  # (1, T)
    first = torch.ones_like(segments, dtype=torch.bool)
    first[:, 1:] = segments[:, 1:] != segments[:, :-1]
    return column - torch.where(first, column, 0).cummax(dim=1).values


def noise_levels(positions: Tensor, block_size: int, generator: Generator | None) -> Tensor:
    """t of each token (B, T), by sample_t: one for every document (LLaDA, SDAR), or if block_size > 0 one for
    every block (Fast-dLLM v2). positions (B, T) restart at 0 with each document."""
    first = positions % block_size == 0 if block_size else positions == 0
    group = first.flatten().cumsum(0) - 1  # (B * T,) documents, or blocks, numbered through the batch
    return sample_t(int(group[-1]) + 1, generator, positions.device)[group, 0].view(positions.shape)
