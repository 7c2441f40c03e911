"""zoo/recipes.py: what the model reads in stage 2 beyond Algorithm 1, noise levels, and initial weights."""

import itertools
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import data
import rcd
import train
from data.common import write_dataset
from rcd import Config, Noised, Residual, Transformer
from zoo.decoding import Carry
from zoo.recipes import (Trajectories, document_positions, earlier_context, init_weights, noise_levels,
                         sometimes_absent)  # fmt: skip
from zoo.tokenizer import CharTokenizer
from zoo.tools import checks
from zoo.tools.training import State, draw_t

MASK = 11  # of the tiny models


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ---- Contexts


def noised(B: int = 6, T: int = 10, t: float = 0.4, seed: int = 0, everything: bool = False) -> Noised:
    g = seeded(seed)
    tokens = torch.randint(MASK, (B, T), generator=g)
    response = (torch.rand(B, T, generator=g) < 0.8) | everything
    noise, level = torch.rand(B, T, generator=g), torch.full((B, 1), t)
    x, masked = rcd.mask_tokens(tokens, response, level, noise, MASK)
    uniform = torch.rand(B, 2, generator=g)
    return Noised(tokens, response, None, level, noise, x, masked.nonzero(as_tuple=True), uniform)


def read_by(model: Transformer) -> list[torch.Tensor]:
    """The ids that the model embeds from now on."""
    seen = []
    model.embed_tokens.register_forward_hook(lambda module, args, out: seen.append(args[0]))
    return seen


@pytest.mark.parametrize("block_size", [0, 5])
def test_the_earlier_state_is_more_masked_and_read_without_a_residual(tiny, block_size):
    model, n = tiny(block_size=block_size), noised()
    seen = read_by(model)
    alpha, delta = earlier_context(Residual(weight="fixed", fixed=0.5))(model, n)
    x, now = seen[0], n.x == MASK
    earlier = x == MASK
    assert (now <= earlier).all() and (earlier <= n.response).all() and earlier.sum() > now.sum()
    assert torch.equal(x[~earlier], n.tokens[~earlier]) and not delta.requires_grad
    # By hand: an ordinary forward on those ids, softmax, expectation, at the cells that are masked now.
    with torch.no_grad():
        hidden = rcd.denoiser_hidden(model, model.embed_tokens(x), n.tokens)
        p = model.logits(hidden[now]).softmax(-1)
    torch.testing.assert_close(delta, p @ model.embedding.detach())
    assert alpha.tolist() == [0.5] * int(now.sum())


def test_how_much_earlier_is_uniform_between_now_and_all_masked(tiny):
    model, n = tiny(n_layer=1), noised(B=4000, T=20, t=0.25, everything=True)
    seen = read_by(model)
    earlier_context(Residual())(model, n)
    # The share of masks at t' = 0.25 + 0.75 u: mean 0.625, variance 0.75^2 / 12 + E[t' (1 - t')] / 20.
    share = (seen[0] == MASK).float().mean(1)
    variance = 0.75**2 / 12 + (0.625 - 0.625**2 - 0.75**2 / 12) / 20
    assert abs(share.mean() - 0.625) < 0.015 and abs(share.var() - variance) < 0.006


def test_absent_rows_have_no_residual_and_the_others_keep_theirs():
    n = noised(B=8000)
    row, N = n.cells[0], len(n.cells[0])
    context = sometimes_absent(lambda model, n: (torch.full((N,), 0.5), torch.ones(N, 3)), 0.3)
    alpha, delta = context(None, n)
    assert alpha.unique().tolist() == [0.0, 0.5] and delta.eq(1).all()
    masks = row.bincount(minlength=8000)
    absent = row[alpha == 0].bincount(minlength=8000)
    assert ((absent == 0) | (absent == masks)).all()  # all of a row or nothing of it
    assert abs((absent > 0)[masks > 0].float().mean() - 0.3) < 0.02


# ---- Trajectories: a window of steps


def truth(n: int) -> tuple[torch.Tensor, torch.Tensor, None]:
    """The same canvases each time: at most 3, of 8 tokens."""
    tokens = torch.randint(MASK, (3, 8), generator=seeded(2))
    return tokens[:n], torch.ones(n, 8, dtype=torch.bool), None


def drawn(generator: torch.Generator, response: torch.Tensor):
    """New canvases each time. response (B, T)."""
    T = response.shape[1]
    return lambda n: (torch.randint(MASK, (n, T), generator=generator), response[:n], None)


def numeric(loss, p: torch.Tensor, index: tuple[int, int], h: float = 1e-3) -> float:
    """The derivative of loss() by p[index], by central differences."""
    with torch.no_grad():
        p[index] += h
        above = loss().item()
        p[index] -= 2 * h
        below = loss().item()
        p[index] += h
    return (above - below) / (2 * h)


def test_the_gradient_of_a_window_is_that_of_its_loss(tiny):
    """By finite differences. It flows through Delta, and never through alpha, which is fixed here. What is
    committed stays the same. Without a window the gradient is another one."""
    model, residual = tiny().double(), Residual(weight="fixed", fixed=0.5)

    def trajectories(window: int) -> Trajectories:
        t = Trajectories(model.config, 3, 8, window=window)
        t.state["delta"] = t.state["delta"].double()
        return t

    def loss() -> torch.Tensor:
        return trajectories(2).loss(model, truth, residual, seeded(0))

    loss().backward()
    for name, p in model.named_parameters():
        if name.endswith(("down_proj.weight", "embed_tokens.weight")):
            i = tuple(int(v) for v in p.grad.abs().eq(p.grad.abs().max()).nonzero()[0])
            assert p.grad[i].item() == pytest.approx(numeric(loss, p.data, i), rel=2e-2)
    through = model.layers[0].mlp.down_proj.weight.grad.clone()
    model.zero_grad()
    single, g = trajectories(1), seeded(0)
    for _ in range(2):  # the same two steps, one at a time
        (single.loss(model, truth, residual, g) / 2).backward()
    cut = model.layers[0].mlp.down_proj.weight.grad
    # What is missing flows from the second loss through Delta to the first step.
    assert not torch.allclose(through, cut, rtol=1e-2)


def test_a_trajectory_may_end_within_a_window(tiny):
    """A block-causal model embeds the clean tokens. New ones must not overwrite those that backward needs."""
    model, g = tiny(block_size=2), seeded(0)
    t = Trajectories(model.config, 3, 8, window=6)  # a block of two masks is full after two steps at most
    t.loss(model, drawn(g, torch.ones(3, 8, dtype=torch.bool)), Residual(), g).backward()
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters())


@pytest.mark.parametrize("residual", [
    Residual(weight="fixed", fixed=0.5), Residual(), Carry(weight="1-confidence", residual_top_k=3),
])  # fmt: skip
@pytest.mark.parametrize("window", [1, 3])
def test_chunks_change_no_step_of_a_trajectory(tiny, monkeypatch, window, residual):
    """What a step commits and carries is read from the logits of its loss, chunk by chunk. In backward it is
    not read again without need: a window of one carries no gradient on."""
    results, calls, predict = [], [], rcd.predict
    response = (torch.arange(6) > 1).expand(4, 6)  # two given tokens: on an empty canvas all cells are alike
    monkeypatch.setattr(rcd, "predict", lambda *a: (calls.append(1), predict(*a))[1])
    for chunk, tile in ((1 << 25, 1 << 19), (1, 1) if window == 1 else (40, 12)):
        monkeypatch.setattr(rcd, "CHUNK", chunk)
        monkeypatch.setattr(rcd, "TILE", tile)
        model, g = tiny(seed=3), seeded(0)
        t = Trajectories(model.config, 4, 6, window=window)
        for _ in range(3):
            loss = t.loss(model, drawn(g, response), residual, g)
            before = len(calls)
            loss.backward()
            assert before and (window > 1 or len(calls) == before)
        results.append([loss.detach(), *t.state.values(), *(p.grad for p in model.parameters())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_a_window_hands_its_last_residual_on_without_history(tiny):
    t = Trajectories(tiny().config, 3, 8, window=2)
    t.loss(tiny(), truth, Residual(weight="fixed"), seeded(0))
    assert not any(v.requires_grad for v in t.state.values()) and t.state["delta"].abs().sum() > 0


# ---- Packed rows and noise levels


@settings(max_examples=50)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=9))
def test_positions_restart_with_every_document(row):
    expected = [i for _, document in itertools.groupby(row) for i, _ in enumerate(document)]
    assert document_positions(torch.tensor([row, row])).tolist() == [expected, expected]


def groups_by_hand(segments: list[int], block_size: int) -> list[int]:
    """Which cells of a row share a t: those of a document, or of a block of it, counted from the document's
    first token."""
    out, group, position = [], -1, 0
    for j, number in enumerate(segments):
        new = j == 0 or number != segments[j - 1]
        position = 0 if new else position + 1
        group += new or bool(block_size and position % block_size == 0)
        out.append(group)
    return out


rows_of_7 = st.lists(st.lists(st.integers(0, 3), min_size=7, max_size=7), min_size=1, max_size=4)


@settings(max_examples=50)
@given(rows_of_7, st.sampled_from([0, 1, 2, 3, 9]), st.integers(0, 99))
def test_t_is_one_per_document_or_per_block_of_it(rows, block_size, seed):
    """Cells of a group share a t. The t of all groups of the batch are stratified draws: one in each n-th of
    the interval, up to an offset."""
    t = noise_levels(document_positions(torch.tensor(rows)), block_size, seeded(seed))
    levels = []
    for values, row in zip(t.tolist(), rows):
        groups = groups_by_hand(row, block_size)
        for g in range(groups[-1] + 1):
            of_group = {v for v, other in zip(values, groups) if other == g}
            assert len(of_group) == 1
            levels += of_group
    u = (torch.tensor(levels).double().sort().values - 1e-3) / (1 - 1e-3) * len(levels)
    assert ((u - u[0]) - torch.arange(len(levels))).abs().max() < 1e-3


@pytest.mark.parametrize("block_size", [0, 2])
def test_t_of_every_document_and_block_is_uniform(block_size):
    positions, g = torch.tensor([[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 5]]), seeded(0)
    draws = torch.stack([noise_levels(positions, block_size, g) for _ in range(2000)])  # (2000, 2, 6)
    for b, j in ((0, 0), (0, 2), (0, 4), (1, 0), (1, 3), (1, 5)):
        row, steps = draws[:, b, j].sort().values, torch.arange(2001) / 2000
        distance = torch.maximum((steps[1:] - row).max(), (row - steps[:-1]).max())
        assert distance < 1.95 / math.sqrt(2000)  # Kolmogorov-Smirnov, 0.1 %
    assert not (draws[:, 0, 0] == draws[:, 0, 3]).any()  # another document
    # The third and the last cell of a document are in blocks of their own.
    for b, j in ((0, 2), (1, 5)):
        assert bool((draws[:, b, 0] == draws[:, b, j]).all()) == (block_size == 0)


def test_training_draws_t_as_it_is_told():
    tokens, whole = torch.zeros(2, 9, dtype=torch.long), torch.arange(9).expand(2, 9)
    packed = document_positions(torch.tensor([[1, 1, 1, 1, 1, 2, 2, 2, 0]] * 2))
    for positions, used in ((packed, packed), (None, whole)):  # not packed: each row is a document
        for t_per, of_block in (("document", 0), ("block", 3)):
            t = draw_t(tokens, positions, t_per, 3, seeded(1))
            assert torch.equal(t, noise_levels(used, of_block, seeded(1)))
    needs = "t_per='block': choose from document, block; block needs a block-causal model"
    with pytest.raises(ValueError, match=needs):
        draw_t(tokens, None, "block", 0, seeded(1))


# ---- Initial weights, and the recipe of a data set


def test_initial_weights_follow_gpt2():
    c = Config(vocab_size=400, mask_id=0, n_layer=8, n_head=4, n_kv_head=4, head_dim=32, d_model=128,
               d_ff=300, qkv_bias=True, tied=False)  # fmt: skip
    model = init_weights(Transformer(c), seeded(0))
    for name, p in model.named_parameters():
        if name.endswith("norm.weight"):
            assert bool((p == 1).all()), name
        elif name.endswith("bias"):
            assert bool((p == 0).all()), name
        else:
            # sqrt(2 * 8 layers) = 4
            std = 0.02 / 4 if "o_proj" in name or "down_proj" in name else 0.02
            assert abs(p.std().item() / std - 1) < 0.05 and abs(p.mean().item()) < 0.05 * std, name
    again, other = (init_weights(Transformer(c), seeded(seed)) for seed in (0, 1))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))
    assert not torch.equal(model.embedding, other.embedding)


def test_the_recipe_that_is_not_named(tmp_path):
    tokenizer, splits = CharTokenizer("ab", ["<eos>", "<mask>"]), ("train", "val", "test")

    def opened(name: str, source: str, values) -> data.Dataset:
        write_dataset(tmp_path / name, source, tokenizer, dict.fromkeys(splits, values), mask_id=3, eos_id=2,
                      source="", licence="", argv=[], facts={})  # fmt: skip
        return data.load(tmp_path / name)

    def examples(answer: int) -> tuple[np.ndarray, np.ndarray]:
        return np.zeros((2, 80), np.uint16), np.arange(80) < np.full((2, 1), answer)

    short, long = (opened(str(n), "gsm8k", examples(n)) for n in (63, 64))
    stream = opened("stream", "shakespeare_char", np.zeros(200, np.uint16))
    trajectory = {"recipe": "trajectory", "weight": "entropy", "absent": 0.0}
    earlier = {"recipe": "earlier", "weight": "fixed", "fixed": 0.5, "absent": 0.3}
    paper = {"recipe": "paper", "weight": "entropy", "absent": 0.0}
    for typed, dataset, expected, budget, test_items in (
        ({}, short, trajectory, 8, 500), ({}, long, earlier, 0, 16), ({}, stream, earlier, 0, 16),
        ({"reference": "x"}, short, paper, 0, 500), ({"recipe": "paper"}, long, paper, 0, 16),
        ({"recipe": "trajectory"}, stream, trajectory, 8, 16),
    ):  # fmt: skip
        assert checks.implied(typed, dataset) == {**expected, "budget": budget, "test_items": test_items}

    (tmp_path / "train.json").write_text(json.dumps({"options": {"recipe": "trajectory", "weight": "fixed"}}))
    again = checks.defaults((train.Train, Carry), lambda name: short, {"options": str(tmp_path)})
    assert again["budget"] == 0 and again["weight"] == "fixed"  # a version without --budget had no limit
    assert again["grow"] is False


def test_experts_that_few_batches_reach_resume_to_the_same_bits(tmp_path):
    """Two layers in place of experts: one has a gradient at every other step, one has none at all."""
    options = SimpleNamespace(lr=1e-2, beta2=0.98, weight_decay=0.1, ema=0.5)

    def begin() -> State:
        config = Config(vocab_size=12, mask_id=MASK, n_layer=3)
        return State(init_weights(Transformer(config), seeded(0)), options, [])

    def go(state: State, until: int) -> State:
        while state.step < until:
            for name, p in state.trained.items():
                reached = "layers.2" not in name and ("layers.1" not in name or state.step % 2)
                p.grad = torch.randn(p.shape, generator=seeded(state.step)) if reached else None
            state.optimizer.step()
            state.average()
            state.step += 1
        return state

    whole, cut = go(begin(), 8), go(begin(), 5)
    tmp_path.joinpath("x").mkdir()
    cut.save(tmp_path / "x", {})
    again = begin()
    again.restore(tmp_path / "x", {})
    for name, value in go(again, 8).tensors().items():
        assert torch.equal(value, whole.tensors()[name]), name
    assert again.tensors().keys() == whole.tensors().keys()


# ---- The moving average of the weights


@pytest.mark.parametrize("decay", [0.99, 0.5, 0.0])
def test_the_saved_weights_are_a_weighted_mean_of_the_weights_of_every_step(decay):
    """By hand: w_0 ... w_n in the proportions that decays min(decay, (1 + i) / (10 + i)) leave to each."""
    model = init_weights(Transformer(Config(vocab_size=12, mask_id=MASK, n_layer=1)), seeded(0))
    options = SimpleNamespace(lr=1e-3, beta2=0.98, weight_decay=0.0, ema=decay)
    state, seen, weight = State(model, options, []), [], [1.0]
    seen.append(model.embedding.detach().clone())
    for i in range(30):
        with torch.no_grad():
            model.embedding.normal_(generator=seeded(i + 1))
        state.average()
        state.step += 1
        seen.append(model.embedding.detach().clone())
        kept = min(decay, (1 + i) / (10 + i))
        weight = [w * kept for w in weight] + [1 - kept]
    state.finish()
    assert sum(weight) == pytest.approx(1) and (decay == 0 or weight[0] < 1e-4)
    expected = sum(w * x for w, x in zip(weight, seen)) if decay else seen[-1]
    torch.testing.assert_close(model.embedding, expected)
