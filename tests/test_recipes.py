"""The recipes beside the paper's: what the model reads in stage 2, against direct computation."""

import numpy as np
import pytest
import torch

import data
import rcd
import train
from data.common import write_dataset
from rcd import Noised, Residual, earlier_context, sometimes_absent
from zoo.tokenizer import CharTokenizer

MASK = 11  # of the tiny models


def noised(B: int = 6, T: int = 10, t: float = 0.4, seed: int = 0) -> Noised:
    g = torch.Generator().manual_seed(seed)
    tokens, response = torch.randint(MASK, (B, T), generator=g), torch.rand(B, T, generator=g) < 0.8
    noise, level = torch.rand(B, T, generator=g), torch.full((B, 1), t)
    x, masked = rcd.mask_tokens(tokens, response, level, noise, MASK)
    return Noised(tokens, response, level, noise, x, masked.nonzero(as_tuple=True), None, torch.rand(B, 2, generator=g))


def test_the_coins_of_a_batch_are_uniform_and_know_nothing_of_each_other_or_of_the_masks(tiny):
    """A residual's absence must not decide from how much earlier a state the others come: each has a draw of its own."""
    seen, model, B = [], tiny(n_layer=1), 4000

    def watch(model, n):
        seen.append(n)
        return torch.zeros(len(n.where[0])), torch.zeros(len(n.where[0]), 16)

    rcd.diffusion_loss(model, torch.zeros(B, 6, dtype=torch.long), context=watch, generator=torch.Generator().manual_seed(0))
    coins = seen[0].coins
    assert coins.shape == (B, 2) and ((torch.histc(coins, 10, 0, 1) / (2 * B) - 0.1).abs() < 0.014).all()
    together = torch.stack([*coins.T, seen[0].t[:, 0], *seen[0].noise.T])
    assert (torch.corrcoef(together)[:2] - torch.eye(9)[:2]).abs().max() < 0.07  # 4.4 standard deviations


@pytest.mark.parametrize("block_size", [0, 5])
def test_the_earlier_state_is_more_masked_and_read_without_a_residual(tiny, block_size):
    model, n, residual = tiny(block_size=block_size), noised(), Residual(weight="fixed", fixed=0.5)
    seen = []

    def watch(x: torch.Tensor) -> torch.Tensor:
        seen.append(x)
        return rcd.Transformer.embed(model, x)

    model.embed = watch
    alpha, delta = earlier_context(residual)(model, n)
    earlier, now = seen[0] == MASK, n.x == MASK
    assert (now <= earlier).all() and (earlier <= n.response).all() and (earlier.sum() > now.sum()).item()
    assert torch.equal(seen[0][~earlier], n.tokens[~earlier]) and not delta.requires_grad
    # by hand: an ordinary forward on those ids, softmax, expectation, at the cells that are masked now
    del model.embed
    with torch.no_grad():
        hidden = rcd.denoiser_hidden(model, model.embed(seen[0]), n.tokens)
        p = model.logits(hidden[now]).softmax(-1)
    torch.testing.assert_close(delta, p @ model.embedding.detach())
    assert alpha.tolist() == [0.5] * int(now.sum())


def test_how_much_earlier_is_uniform_between_now_and_all_masked(tiny):
    n = noised(B=4000, T=20, t=0.25)
    n = n._replace(response=torch.ones_like(n.response))
    seen = []
    model = tiny(n_layer=1)
    model.embed = lambda x: (seen.append(x), rcd.Transformer.embed(model, x))[1]
    earlier_context(Residual())(model, n)
    share = (seen[0] == MASK).float().mean(1)  # of t' = 0.25 + 0.75 u: mean 0.625, variance 0.75^2 / 12 + E[t' (1 - t')] / 20
    variance = 0.75**2 / 12 + (0.625 - 0.625**2 - 0.75**2 / 12) / 20
    assert abs(share.mean() - 0.625) < 0.015 and abs(share.var() - variance) < 0.006


def test_absent_rows_have_no_residual_and_the_others_keep_theirs():
    n = noised(B=8000)
    N = len(n.where[0])
    alpha, delta = sometimes_absent(lambda model, n: (torch.full((N,), 0.5), torch.ones(N, 3)), 0.3)(None, n)
    assert alpha.unique().tolist() == pytest.approx([0.0, 0.5]) and delta.eq(1).all()
    absent = torch.zeros(8000).index_put((n.where[0],), (alpha == 0).float())  # by row: all of a row or nothing of it
    assert all(len(set((alpha[n.where[0] == row] == 0).tolist())) <= 1 for row in range(200))
    has = torch.zeros(8000).index_put((n.where[0],), torch.ones(N)) > 0
    assert abs(absent[has].mean() - 0.3) < 0.02


# ---------------------------------------------------------------------------------------------------------------------------------------
# Trajectories: a window of steps


def truth(B: int = 3, T: int = 8) -> tuple[torch.Tensor, torch.Tensor, None]:
    return torch.randint(MASK, (B, T), generator=torch.Generator().manual_seed(2)), torch.ones(B, T, dtype=torch.bool), None


def numeric(loss, p: torch.Tensor, index: tuple[int, int], h: float = 1e-3) -> float:
    with torch.no_grad():
        p[index] += h
        above = loss().item()
        p[index] -= 2 * h
        below = loss().item()
        p[index] += h
    return (above - below) / (2 * h)


def test_the_gradient_of_a_window_is_that_of_its_loss_and_without_one_a_part_is_missing(tiny):
    """By finite differences: through Delta, never through alpha (fixed), what is committed stays the same."""
    model, residual = tiny().double(), Residual(weight="fixed", fixed=0.5)

    def trajectories(window: int) -> rcd.Trajectories:
        t = rcd.Trajectories(model.config, 3, 8, window=window)
        t.state["delta"] = t.state["delta"].double()
        return t

    def loss() -> torch.Tensor:
        return trajectories(2).loss(model, lambda n: tuple(v if v is None else v[:n] for v in truth()), residual, torch.Generator().manual_seed(0))

    loss().backward()
    for name, p in model.named_parameters():
        if name.endswith(("down_proj.weight", "embed_tokens.weight")):
            i = tuple(int(v) for v in p.grad.abs().eq(p.grad.abs().max()).nonzero()[0])
            assert p.grad[i].item() == pytest.approx(numeric(loss, p.data, i), rel=2e-2)
    through = model.layers[0].mlp.down_proj.weight.grad.clone()
    model.zero_grad()
    alone, g = trajectories(1), torch.Generator().manual_seed(0)
    for _ in range(2):  # the same two steps, one at a time
        (alone.loss(model, lambda n: tuple(v if v is None else v[:n] for v in truth()), residual, g) / 2).backward()
    cut = model.layers[0].mlp.down_proj.weight.grad
    assert not torch.allclose(through, cut, rtol=1e-2)  # the part that flows from the second loss through Delta to the first step


def test_a_trajectory_may_end_within_a_window(tiny):
    """A block-causal model embeds the clean tokens: new ones must not overwrite those that backward still needs."""
    model, g = tiny(block_size=2), torch.Generator().manual_seed(0)
    t = rcd.Trajectories(model.config, 3, 8, window=6)  # a block of two masks is full after two steps at most
    t.loss(model, lambda n: (torch.randint(MASK, (n, 8), generator=g), torch.ones(n, 8, dtype=torch.bool), None), Residual(), g).backward()
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters())


@pytest.mark.parametrize("residual", [Residual(weight="fixed", fixed=0.5), Residual(), Residual(weight="1-confidence", terms=3)])
@pytest.mark.parametrize("window", [1, 3])
def test_chunks_change_no_step_of_a_trajectory(tiny, monkeypatch, window, residual):
    """What a step commits and carries is read from the logits of its loss, chunk by chunk; in backward nothing is read again without need."""
    results, calls, response = [], [], (torch.arange(8) > 1).expand(4, 8)  # two given tokens: on an empty canvas all cells are alike
    for chunk, tile in ((1 << 25, 1 << 19), (40, 12), (1, 1)):
        monkeypatch.setattr(rcd, "CHUNK", chunk)
        monkeypatch.setattr(rcd, "TILE", tile)
        model, g = tiny(seed=3), torch.Generator().manual_seed(0)
        t = rcd.Trajectories(model.config, 4, 8, window=window)
        for _ in range(4):
            loss = t.loss(model, lambda n, g=g: (torch.randint(MASK, (n, 8), generator=g), response[:n], None), residual, g)
            read, plain = [], rcd.draw
            monkeypatch.setattr(rcd, "draw", lambda *a, read=read, plain=plain, **k: (read.append(1), plain(*a, **k))[1])
            loss.backward()
            monkeypatch.setattr(rcd, "draw", plain)
            calls.append(len(read))
        results.append([loss.detach(), *t.state.values(), *(p.grad for p in model.parameters())])
    assert window > 1 or not any(calls)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_a_window_hands_its_last_residual_on_without_history(tiny):
    t = rcd.Trajectories(tiny().config, 3, 8, window=2)
    t.loss(tiny(), lambda n: tuple(v if v is None else v[:n] for v in truth()), Residual(weight="fixed"), torch.Generator().manual_seed(0))
    assert not any(v.requires_grad for v in t.state.values()) and t.state["delta"].abs().sum() > 0


def test_the_recipe_that_is_not_named(tmp_path):
    tokenizer = CharTokenizer("ab", ["<eos>", "<mask>"])
    stream = {split: np.zeros(200, np.uint16) for split in ("train", "val", "test")}
    rows = {"short": 63, "long": 64}
    examples = {n: {s: (np.zeros((2, 80), np.uint16), np.arange(80) < np.full((2, 1), k)) for s in stream} for n, k in rows.items()}
    for name, splits in {"stream": stream, **examples}.items():
        source = "shakespeare_char" if name == "stream" else "gsm8k"
        write_dataset(tmp_path / name, source, tokenizer, splits, mask_id=3, eos_id=2, source="", licence="", argv=[], facts={})
    for name, recipe in {"short": "trajectory", "long": "earlier", "stream": "earlier"}.items():
        got = train.implied({}, data.load(tmp_path / name))
        assert (got["recipe"], got["weight"], got["absent"]) == (recipe, "fixed", 0.3 if recipe == "earlier" else 0.0)
    assert train.implied({"reference": "x"}, data.load(tmp_path / "short")) == {"recipe": "paper", "weight": "entropy", "absent": 0.0, "test_items": 500}
    assert train.implied({"recipe": "paper"}, data.load(tmp_path / "long")) == {"recipe": "paper", "weight": "entropy", "absent": 0.0, "test_items": 16}
