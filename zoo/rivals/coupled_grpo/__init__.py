"""Coupled-GRPO (DiffuCoder, arXiv 2506.20639): a masked-diffusion model learns from rewards, as stage three.

A canvas is completed G times, and each completion gets a reward. GRPO makes those likelier that did better
than the others of their group. It needs the log-probability of every token of a completion, which a masked
model does not have. Coupled sampling estimates it by three forwards, in which each token is masked twice:

    all tokens masked; a random share r ~ U(0.2, 0.8) of them masked; the complement masked
    log p(token) = 1/2 (l_0 + l_1 / r),         if the second forward has masked it
                   1/2 (l_0 + l_2 / (1 - r)),   if the third has

where l_k is the log-probability of the token in forward k. That is the 1/t of the diffusion loss. The masks
of a completion are drawn once. The new, the old and the reference policy read the same ones.

    A    = reward - mean reward of the others of the group                       (leave-one-out advantage)
    rho  = p_new / p_old                                                         (per token)
    loss = mean over tokens of  -min(rho A, clip(rho, 1 - 0.5, 1 + 0.5) A) + 0.01 KL(p_new, p_ref)

KL is estimated by p_ref / p_new - 1 - log(p_ref / p_new). A residual (RCD) is a context, as in
diffusion_loss.

`python -m zoo.rivals.coupled_grpo` is in __main__.py.
"""

from typing import NamedTuple

import torch
from torch import Generator, Tensor

from rcd import Context, Noised, Transformer, check, denoiser_hidden, maskable, mix, token_losses


class Draws(NamedTuple):
    """The randomness of an estimate, which the policies share."""

    r: Tensor  # (B, 1) share of tokens that the second forward masks, U(0.2, 0.8)
    noise: Tensor  # (B, T) in [0, 1): it masks a token where this is below r
    uniform: Tensor  # (B, 2) for the context


def draws(tokens: Tensor, generator: Generator | None) -> Draws:
    """Draws for tokens (B, T)."""
    (B, T), device = tokens.shape, tokens.device
    r, noise, uniform = (torch.rand(B, n, generator=generator, device=device) for n in (1, T, 2))
    return Draws(0.2 + 0.6 * r, noise, uniform)


def log_probability(model: Transformer, tokens: Tensor, response: Tensor, d: Draws,
                    context: Context | None = None) -> Tensor:  # fmt: skip
    """The coupled estimate of log p of each completion token, (B, T), 0 elsewhere.

    tokens (B, T): canvas and completion. response (B, T) bool: which of them the model has completed.
    context: where a residual comes from, as in rcd.diffusion_loss; None = plain masks.
    """
    c, response = model.config, maskable(model.config, response)
    first, total = response & (d.noise < d.r), 0.0
    for masked, t, noise in (
        (response, torch.ones_like(d.r), d.noise), (first, d.r, d.noise),
        (response & ~first, 1 - d.r, 1 - d.noise),
    ):  # fmt: skip
        x, cells = tokens.masked_fill(masked, c.mask_id), masked.nonzero(as_tuple=True)  # N cells
        e = model.embed_tokens(x)
        if context is not None:
            alpha, delta = context(model, Noised(tokens, response, None, t, noise, x, cells, d.uniform))
            e = mix(e, cells, alpha, delta, model.embedding[c.mask_id])
        hidden = model.predicting(denoiser_hidden(model, e, tokens), cells)  # (N, D)
        (nll,) = token_losses(model, hidden, tokens[cells])  # (N,)
        weighted = -nll / (2 * t.expand_as(tokens)[cells])
        total = total + torch.zeros(tokens.shape, device=e.device).index_put(cells, weighted.float())
    return total


def advantages(rewards: Tensor) -> Tensor:
    """rewards (P, G), of G completions for each of P canvases -> reward minus the others' mean, (P, G)."""
    G = rewards.shape[1]
    check(G > 1, f"a group of {G} has no others to compare with: at least 2")
    return (rewards - rewards.mean(1, keepdim=True)) * (G / (G - 1))


def grpo_loss(new: Tensor, old: Tensor, reference: Tensor, advantage: Tensor, response: Tensor,
              clip: float = 0.5, beta: float = 0.01) -> Tensor:  # fmt: skip
    """The clipped objective with its KL, a mean over the completion tokens of the batch.

    new, old, reference (B, T): log-probabilities; advantage (B,); response (B, T) bool.
    """
    ratio, A = (new - old).exp(), advantage[:, None]
    gain = torch.minimum(ratio * A, ratio.clamp(1 - clip, 1 + clip) * A)
    away = reference - new
    kl = away.exp() - 1 - away
    return ((beta * kl - gain) * response).sum() / response.sum()
