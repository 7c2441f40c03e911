"""zoo/fastdllm.py: the loss of two complementary copies, beside cross_entropy over both."""

import pytest
import torch
import torch.nn.functional as F

import rcd
import zoo.recipes
from zoo.fastdllm import complementary_loss
from zoo.recipes import document_positions, noise_levels


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", [{}, {"block_size": 4}, {"block_size": 4, "logit_shift": True}])
def test_it_is_the_mean_over_the_masked_labels_of_both_copies(tiny, kind, packed):
    """As in transformers: labels of -100 where nothing is masked, and the mean over all the others."""
    model, g, T = tiny(**kind), torch.Generator().manual_seed(1), 12
    tokens, response = torch.randint(11, (5, T), generator=g), torch.rand(5, T, generator=g) < 0.8
    positions = document_positions(torch.tensor([[1] * 8 + [2] * 4] * 5)) if packed else None
    column = torch.arange(T).expand(5, T) if positions is None else positions
    t = noise_levels(column, 4, g)
    masked = torch.rand(5, T, generator=torch.Generator().manual_seed(2)) < t
    learned = response & (column > 0) if "logit_shift" in kind else response
    logits, labels = [], []
    for copy in (masked, ~masked):
        x = torch.where(copy & learned, model.config.mask_id, tokens)
        hidden = rcd.denoiser_hidden(model, model.embed_tokens(x), tokens, positions)
        if "logit_shift" in kind:
            hidden = hidden.roll(1, dims=1)  # row i - 1 predicts token i
        logits.append(model.logits(hidden.flatten(0, 1)))
        labels.append(torch.where(copy & learned, tokens, -100).flatten())
    labels = torch.cat(labels)
    assert (labels != -100).sum() == learned.sum()  # each token once
    expected = F.cross_entropy(torch.cat(logits), labels)
    given = dict(t=t, generator=torch.Generator().manual_seed(2))
    loss = complementary_loss(model, tokens, response, positions, **given)
    draws = torch.rand(5, T, generator=torch.Generator().manual_seed(2)), torch.rand(5, 2, generator=g)
    assert complementary_loss(model, tokens, response, positions, t=t, draws=draws).item() == loss.item()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    a, b = (torch.autograd.grad(x, model.layers[0].mlp.up_proj.weight)[0] for x in (loss, expected))
    assert torch.allclose(a, b, rtol=1e-3, atol=1e-6)


def test_a_context_reads_both_copies(tiny):
    model, tokens = tiny(), torch.randint(11, (3, 8), generator=torch.Generator().manual_seed(1))
    seen = []

    def context(model, n):
        seen.append(n)
        return rcd.reference_context(model, rcd.Residual())(model, n)

    complementary_loss(model, tokens, torch.ones_like(tokens, dtype=torch.bool), t=torch.full((3, 1), 0.3),
                       context=context, generator=torch.Generator().manual_seed(2))  # fmt: skip
    (noised,) = seen
    first, second = (noised.x == 11).chunk(2)
    assert torch.equal(first, ~second) and first.any() and second.any()


@pytest.mark.parametrize("t", [0.2, 0.5, 0.8])
def test_an_earlier_state_of_either_copy_masks_half_of_what_is_shown(tiny, t, monkeypatch):
    """At u = 1/2: what is masked at t, and half of the rest."""
    model, shape = tiny(max_len=400), (8, 400)
    g = torch.Generator().manual_seed(3)
    tokens, response = torch.randint(11, shape, generator=g), torch.ones(shape, dtype=torch.bool)
    seen = []

    def residual_of(target, x, n, residual, E):
        seen.append((n.x == 11, x == 11))
        return torch.zeros(len(n.cells[0])), torch.zeros(len(n.cells[0]), 16)

    monkeypatch.setattr(zoo.recipes, "residual_of", residual_of)
    draws = torch.rand(shape, generator=g), torch.full((8, 2), 0.5)
    complementary_loss(model, tokens, response, t=torch.full((8, 1), t), draws=draws,
                       context=zoo.recipes.earlier_context(rcd.Residual()))  # fmt: skip
    ((now, earlier),) = seen
    for masked, before in zip(now.chunk(2), earlier.chunk(2)):
        assert (masked <= before).all()  # nothing that was shown is masked later
        assert before[~masked].float().mean().item() == pytest.approx(0.5, abs=0.07)
