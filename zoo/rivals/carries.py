"""Carries with parameters of their own: where those live, how they are trained, how a sampler reads them.

A learned carry is a module, attached to the model as `carry`, in a dict under its name. Its tensors are
carry.NAME.*, so AdamW, the moving average and the checkpoint see them like any others. It maps what a pass
predicts to what the next one reads, at masked cells:

    carry(hidden (N, D), model, logits (N, V) or None) -> alpha (N,), Delta (N, D), which Eq. 2 mixes

Training takes two passes (own_context): the first reads the same x_t plainly, the second what is carried.
Or, to tell what a carry is worth from what its training is, it takes the own trajectories by which RCD's
target learns by default (trajectory_step): --recipe=NAME-trajectory, in which nothing but the carry differs.
Sampling takes one: the reader Carrying keeps what the last pass left and hands on what the model's carry
makes of it, in place of the loop's residual. So a Decoding needs no option for it.

`loop` has parameters, too, and hands nothing on: it makes a pass deeper. It trains as SeqD does, so without a
residual, or as RCD does (loop-trajectory), and then its passes hand p.E on as RCD's do.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

import rcd
from rcd import (CHUNK, Context, Noised, Reader, Residual, Sampler, Transformer, by_rows, check,
                 denoiser_hidden, mask_tokens, mix, predict, residual_of, token_losses)  # fmt: skip
from zoo.recipes import earlier_context
from zoo.rivals.gemma import SelfConditioning
from zoo.rivals.looped import Loop
from zoo.rivals.loopholing import Loopholing, Relay
from zoo.rivals.rules import Notes
from zoo.rivals.softmask import SoftMask

OWN: dict[str, type[nn.Module]] = {
    "soft-mask": SoftMask, "loopholing": Loopholing, "relay": Relay, "gemma": SelfConditioning,
}  # fmt: skip
LEARNED = OWN | {"loop": Loop}  # all that is attached to a model


def shaped(model: Transformer, name: str) -> Transformer:
    """The model with a carry of this name, not initialised. Raises ValueError for an unknown name."""
    check(name in LEARNED, f"a carry {name!r} is not known here: there are {', '.join(LEARNED)}")
    model.carry = nn.ModuleDict({name: LEARNED[name](model.config)})
    if name == "loop":
        model.carry[name].join(model)
    return model


def name_of(recipe: str) -> str:
    """The carry that a recipe trains: loopholing, in two passes or on trajectories."""
    return recipe.removesuffix("-trajectory")


def on_trajectories(recipe: str) -> bool:
    """Whether a recipe learns on the model's own denoising steps: trajectory and NAME-trajectory."""
    return recipe.endswith("trajectory")


def named_by(tensors: dict[str, Tensor]) -> list[str]:
    """The carries whose tensors these are: carry.NAME.*"""
    return sorted({name.split(".")[1] for name in tensors if name.startswith("carry.")})


def of(model: Transformer) -> nn.Module | None:
    """The model's own carry, if it has one. A loop is none."""
    (name,) = getattr(model, "carry", ("",))
    return model.carry[name] if name in OWN else None


def label(model: Transformer) -> str:
    """What tables call a model that reads what was carried: RCD, or the name of what is attached to it."""
    return next(iter(model.carry)) if hasattr(model, "carry") else "RCD"


def attach(model: Transformer, name: str, seed: int) -> Transformer:
    """Give the model the carry `name`, unless it has it; any other name takes away the one it has.

    At first a new carry changes nothing: what it adds is multiplied by zero, or nearly so.
    """
    if hasattr(model, "carry") and name not in model.carry:
        if "loop" in model.carry:
            model.carry["loop"].hook.remove()
        del model.carry
    if name in LEARNED and not hasattr(model, "carry"):
        shaped(model, name).carry.to(model.embedding.device, model.embedding.dtype)
        generator = torch.Generator().manual_seed(seed)
        for tensor, p in model.carry.named_parameters():
            if p.dim() == 2:
                drawn = torch.empty(p.shape).normal_(std=0.02, generator=generator)
                p.data.copy_(torch.zeros(p.shape) if tensor.endswith("down_proj.weight") else drawn)
    return model


def own_context(model: Transformer, n: Noised) -> tuple[Tensor, Tensor]:
    """Where the second pass gets its alpha and Delta: from the model's own carry after a first, plain pass.

    It reads the same x_t, and no gradient goes through it. If carry.differentiable, it reads an earlier
    state of the canvas, between t and 1, as zoo.recipes.earlier_context does, and the gradient goes through
    both passes.
    """
    carry, x = of(model), n.x
    if carry.differentiable:
        t = n.t + (1 - n.t) * n.uniform[:, :1]
        x, _ = mask_tokens(n.tokens, n.response, t, n.noise, model.config.mask_id)
    with torch.set_grad_enabled(carry.differentiable and torch.is_grad_enabled()):
        hidden = denoiser_hidden(model, model.embed_tokens(x), n.tokens, n.positions)  # (B, T, D)
        hidden = model.predicting(hidden, n.cells)  # (N, D)
    return by_rows(lambda h: carry(h, model, None), CHUNK // model.config.vocab_size, hidden)


def residual_context(model: Transformer, residual: Residual) -> Context:
    """Where a loss outside train.py gets its residual: the model's own carry, else its p at more masks."""
    return own_context if of(model) else earlier_context(residual)


def trajectory_step(model: Transformer, tokens: Tensor, masked: Tensor, alpha: Tensor, delta: Tensor,
                    residual: Residual, positions: Tensor | None = None, grad: bool = False):  # fmt: skip
    """rcd.trajectory_step for a model with its own carry. A step hands its hidden states on, as delta
    (B, T, D), with alpha = 1. The carry makes of them what is mixed when they are read, and so it learns."""
    cells, E = masked.nonzero(as_tuple=True), model.embedding
    rows = CHUNK // model.config.vocab_size
    own, soft = by_rows(lambda h: of(model)(h, model, None), rows, delta[cells].to(E.dtype))
    x = model.embed_tokens(tokens.masked_fill(masked, model.config.mask_id))  # (B, T, D)
    x = mix(x, cells, alpha[cells] * own, soft, E[model.config.mask_id])
    hidden = model.predicting(denoiser_hidden(model, x, tokens, positions), cells)  # (N, D)
    confidence = lambda logits: (predict(logits.detach(), Sampler(), None)[1],)  # noqa: E731
    nll, confidence = token_losses(model, hidden, tokens[cells], confidence)
    return cells, nll, torch.ones_like(confidence), hidden if grad else hidden.detach(), confidence


def step_of(recipe: str) -> Callable:
    """What a recipe on trajectories does in a step: RCD's, or that of a carry with parameters."""
    return trajectory_step if name_of(recipe) in OWN else rcd.trajectory_step


class Carrying(Notes):
    """A reader for a model with its own carry. What the loop hands on is only asked whether it is there."""

    def __init__(self, read: Reader, s: Sampler):
        """s: a Decoding. Raises ValueError for what a model with its own carry has not learned."""
        super().__init__(read, s)
        check(isinstance(read, Reader), "a model with its own carry is read without guidance")
        check(s.start in ("cold", "self"), f"start={s.start}: a model with its own carry starts cold or self")
        check(not s.js_reset, "js_reset drops a residual, and this model has a carry of its own")
        self.kept = None  # hidden (N, D) and logits (N, V) of the pass before

    def __call__(self, begin: Tensor, end: Tensor, cells: Tensor, alpha: Tensor | None, delta: Tensor | None):
        before = self.last(*cells.unbind(1))
        if alpha is not None:  # the first pass of a block has nothing to read
            hidden, logits = (x[before.to(x.device)] for x in self.kept)
            rows = CHUNK // self.model.config.vocab_size
            alpha, delta = by_rows(lambda h, z: of(self.model)(h, self.model, z), rows, hidden, logits)
        logits = super().__call__(begin, end, cells, alpha, delta)
        self.hidden = self.read.hidden
        self.kept = self.hidden, logits
        return logits


def learned(logits: Tensor, E: Tensor) -> tuple[Tensor, Tensor]:
    """Carry.weight=learned: a stand-in for the loop. The reader puts the model's own carry in its place."""
    return torch.ones(len(logits), device=E.device), E.new_zeros(len(logits), E.shape[1])


def context_of(recipe: str, residual: Residual) -> Context | None:
    """Where stage 2 gets alpha and Delta under a recipe of zoo.rivals: the model's own carry or, in scmdm,
    the residual of its own p at the same x_t; nowhere in loop. zoo.recipes.sometimes_absent leaves rows
    out."""
    if recipe == "loop":
        return None
    if recipe in OWN:
        return own_context
    return lambda model, n: residual_of(model, n.x, n, residual, model.embedding)
