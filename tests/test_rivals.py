"""zoo/rivals: each method against its paper written out in loops, one row and one number at a time.

The loops below know nothing of batches, caches or notes: they forward one canvas, and look at lists.
"""

import copy
import itertools
import math
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from test_train import log_of, meta_of, puzzles, run, run_in_full, same, weights  # noqa: F401 (fixtures)

import rcd
import zoo
from rcd import Candidates, Residual, Sampler, denoise, diffusion_loss
from zoo import files
from zoo.decoding import Carry, Decoding
from zoo.recipes import Trajectories, sometimes_absent
from zoo.rivals import RECIPES, carries, r2
from zoo.rivals.policy import Act, Policy, grpo_loss, reward
from zoo.rivals.policy import load as load_policy
from zoo.rivals.remix import jensen_shannon, remix
from zoo.rivals.rules import Klass, divergence, factor
from zoo.rivals.softmask import SoftMask
from zoo.rivals.policy import __main__ as trainer
from zoo.tools.command import arguments
from zoo.tools.evaluate import sweep

sys.path.insert(0, str(Path(__file__).parent / "evidence"))
import experiment  # noqa: E402

MASK, PAD = 11, 0  # of the tiny models
FIXED = Residual(weight="fixed", fixed=0.5)
CANVASES = [
    [3, 1, 4] + [MASK] * 9 + [7, 2] + [MASK] * 6,
    [5, MASK, MASK, 2, MASK, MASK, MASK, 9, MASK, MASK, MASK, MASK, 1],
    [MASK, MASK, 2] + [MASK] * 12 + [8, 1],
]


def padded(rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Canvases side by side, and their lengths."""
    T = max(map(len, rows))
    lengths = torch.tensor([len(row) for row in rows])
    return torch.tensor([row + [PAD] * (T - len(row)) for row in rows]), lengths


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ---- The sampling loop, one row; a rule is a function of lists


@torch.no_grad()
def p_of(model, tokens, soft, stop):
    """p (stop, V) in float64 by one forward on one canvas. soft: cell -> what is read there."""
    c = model.config
    T = stop if c.block_size else len(tokens)
    x = torch.stack([soft.get(i, model.embedding[token]) for i, token in enumerate(tokens[:T])])
    b = c.block_size or T
    seen = torch.tensor([[k // b <= q // b for k in range(T)] for q in range(T)])
    return model.logits(model(x[None], torch.arange(T)[None], seen[None, None])[0]).double().softmax(-1)


@torch.no_grad()
def by_hand(model, tokens, rule, b=0, carries=False):
    """-> (cells committed, canvas) after each pass. rule(notes, block, masks, p) -> cells; notes: a dict that
    lives as long as the canvas; block: its cells; p: cell -> list."""
    tokens, notes, records = list(tokens), {}, []
    fill = [i for i, token in enumerate(tokens) if token == MASK]
    b, E = b or model.config.block_size or len(tokens), model.embedding
    origin = fill[0] if b < len(tokens) and not model.config.block_size else 0
    for first in range(origin, len(tokens), b):
        block = list(range(first, min(first + b, len(tokens))))
        masks, soft = [i for i in block if i in fill], {}
        while masks:
            p = p_of(model, tokens, soft, block[-1] + 1)
            chosen = rule(notes, block, masks, {i: p[i].tolist() for i in masks})
            for i in chosen:
                tokens[i] = int(p[i].argmax())
            masks = [i for i in masks if i not in chosen]
            soft = {i: 0.5 * E[MASK] + 0.5 * p[i].float() @ E for i in masks} if carries else {}
            records.append((sorted(chosen), list(tokens)))
    return records


def ours(model, rows, s, **options):
    """The same of the sampler, for every row."""
    canvas, lengths = padded(rows)
    records = [[] for _ in rows]
    for step in itertools.islice(denoise(model, canvas, s, FIXED, lengths=lengths, **options), 200):
        for record, chosen, tokens, length in zip(records, step.committed, step.tokens, lengths):
            if chosen.any():
                record.append((chosen.nonzero()[:, 0].tolist(), tokens[:length].tolist()))
    return records


def confidence(p):
    return {i: max(q) for i, q in p.items()}


def surest(masks, c, k=1):
    return set(sorted(masks, key=lambda i: -c[i])[:k])


def token_of(q):
    return q.index(max(q))


# ---- The rules, literally


def literal_factor(f):
    def rule(notes, block, masks, p):
        c = confidence(p)
        order = sorted(masks, key=lambda i: -c[i])
        n = max([n for n in range(1, len(order) + 1) if (n + 1) * (1 - c[order[n - 1]]) < f], default=1)
        return set(order[:n])

    return rule


def literal_klass(threshold, bound):
    def rule(notes, block, masks, p):
        c, ready = confidence(p), set()
        for i in masks:
            history = notes.setdefault(i, [])  # every p of the cell so far
            history.append(p[i])
            kls = []
            for now, before in zip(history[1:], history):
                kls.append(sum(a * math.log(a / b) for a, b in zip(now, before) if a > 0))
            if len(kls) >= 2 and kls[-1] < bound and kls[-2] < bound and c[i] > threshold:
                ready.add(i)
        return ready or surest(masks, c)

    return rule


def literal_r2(threshold, rescue, in_space=True, in_time=True, seen=None):
    seen = {} if seen is None else seen  # how many cells each rule committed

    def rule(notes, block, masks, p):
        c, token = confidence(p), {i: token_of(p[i]) for i in masks}
        chosen = {i for i in masks if c[i] >= threshold} | surest(masks, c)
        if in_space:
            marked = set()
            for start in range(len(block) - 2):
                window = block[start : start + 3]
                inside = [i for i in window if i in masks and i not in chosen]
                if 3 - len(inside) <= 1 and sum(c[i] for i in inside) / len(inside) >= rescue:
                    marked |= set(inside)
            seen["spatial"] = seen.get("spatial", 0) + len(marked)
            chosen |= marked
            left, runs = [i for i in masks if i not in chosen], []
            for i in left:
                if runs and i == runs[-1][-1] + 1 and token[i] == token[i - 1]:
                    runs[-1].append(i)
                else:
                    runs.append([i])
            for run in runs:
                best = max(run, key=lambda i: c[i])
                if len(run) >= 2 and c[best] > rescue:
                    chosen.add(best)
                    seen["agreement"] = seen.get("agreement", 0) + 1
        if in_time:
            for i in masks:
                if i in chosen:
                    continue
                streak, before = notes.get(i, (0, None))
                notes[i] = (streak + 1 if token[i] == before else 1, token[i])
                if notes[i][0] >= 3 and c[i] >= rescue:
                    chosen.add(i)
                    seen["temporal"] = seen.get("temporal", 0) + 1
        return chosen

    return rule


R2 = dict(threshold=0.9, rescue=0.6)
LITERAL = {  # rule: seed of a model whose canvases need all of it, options, the rule in loops
    "factor": (2, dict(factor=1.6), literal_factor(1.6)),
    "klass": (2, dict(threshold=0.4, kl_bound=0.2), literal_klass(0.4, 0.2)),
    "r2": (3, R2, literal_r2(**R2)),
    "r2-spatial": (3, R2, literal_r2(**R2, in_time=False)),
    "r2-temporal": (3, R2, literal_r2(**R2, in_space=False)),
}


@pytest.mark.parametrize("block_size,b,carries", [(0, 0, False), (0, 5, True), (4, 0, True)])
@pytest.mark.parametrize("rule", LITERAL)
def test_a_rule_commits_what_its_paper_says(tiny, rule, block_size, b, carries):
    seed, options, literal = LITERAL[rule]
    model = tiny(seed=seed, block_size=block_size)
    s = Decoding(rule=rule, block_size=b, carry="residual" if carries else "none", **options)
    for row, record in zip(CANVASES, ours(model, CANVASES, s)):
        assert record == by_hand(model, row, literal, b, carries)


def test_those_canvases_need_every_rule(tiny):
    """Else the test above would not test them."""
    for seed, _, literal in LITERAL.values():
        sizes = [len(cells) for row in CANVASES for cells, _ in by_hand(tiny(seed=seed), row, literal)]
        assert max(sizes) > 1 == min(sizes)
    seen = {}
    for row in CANVASES:
        by_hand(tiny(seed=3), row, literal_r2(**R2, seen=seen))
    assert min(seen.pop(rule) for rule in ("spatial", "agreement", "temporal")) > 0


def candidates(rows, quota=1, logits=None):
    """Candidates with these confidences, a list per row; columns from 0."""
    cells = [(r, column) for r, row in enumerate(rows) for column in range(len(row))]
    confidences = torch.tensor([c for row in rows for c in row])
    return Candidates(*torch.tensor(cells).T, confidences, torch.full((len(rows),), quota), logits, None)


def test_factor_by_hand():
    # (n + 1)(1 - c): .02 2 -> .04, .1 3 -> .3, .2 4 -> .8, .25 5 -> 1.25: three of them, at factor 1.
    c = candidates([[0.8, 0.98, 0.75, 0.9], [0.2, 0.3, 0.1, 0.25]])
    assert factor(c, Decoding(rule="factor")).tolist() == [True, True, False, True, False, True, False, False]
    # The last cell alone fails, (4)(1 - .7) = 1.2: the authors' loop would commit it too.
    c = candidates([[0.99, 0.7, 0.95]])
    assert factor(c, Decoding(rule="factor")).tolist() == [True, False, True]


@given(st.lists(st.lists(st.floats(0.01, 1), min_size=1, max_size=12), min_size=1, max_size=4),
       st.floats(0, 3), st.floats(0, 3))  # fmt: skip
@settings(max_examples=100)
def test_factor_commits_the_surest_and_more_of_them_for_a_larger_factor(rows, low, high):
    low, high = sorted((low, high))
    c = candidates(rows)
    few, many = (factor(c, Decoding(rule="factor", factor=f)) for f in (low, high))
    assert (few <= many).all() and (few.long().new_zeros(len(rows)).index_add(0, c.row, few.long()) > 0).all()
    for r in range(len(rows)):  # no cell is left that is surer than one that is taken
        of_row, taken = c.confidence[c.row == r], few[c.row == r]
        assert taken.all() or of_row[~taken].max() <= of_row[taken].min()


def test_klass_waits_for_two_calm_passes(tiny):
    """The same p at every pass, sure at 9 of 10 cells: two passes commit one, the third all sure ones."""

    class Still(rcd.Reader):
        def __call__(self, begin, end, cells, alpha, delta):
            sure = torch.where(cells[:, 1] == 5, 0.85, 0.95)
            p = ((1 - sure) / 10)[:, None].repeat(1, 12)
            p[:, MASK], p[:, 3] = 0, sure
            return p.log()

    class Calm(Decoding):
        def reader(self, model, tokens, lengths, b, fill):
            return Klass(Still(model, tokens, lengths, b), self)

    def sizes(**options):
        s = Calm(rule="klass", carry="none", **options)
        steps = denoise(tiny(), torch.tensor([[1] + [MASK] * 10]), s)
        return [int(step.committed.sum()) for step in steps]

    assert sizes(threshold=0.9) == [1, 1, 7, 1] and sizes(threshold=0.96) == [1] * 10
    assert sizes(threshold=0.8) == [1, 1, 8] and sizes(threshold=0.8, kl_bound=0) == [1] * 10


def test_divergence_by_hand():
    p = torch.tensor([[0.5, 0.5, 0.0], [0.2, 0.3, 0.5]])
    q = torch.tensor([[0.25, 0.75, 0.0], [0.2, 0.3, 0.5]])
    expected = torch.tensor([0.5 * math.log(2) + 0.5 * math.log(2 / 3), 0.0])
    torch.testing.assert_close(divergence(p.log(), q.log()), expected)


def on_row(rule, confidences, *more, filled=()):
    """The cells that an R2 rule commits on one row."""
    masked = torch.tensor([[i not in filled for i in range(len(confidences))]])
    return rule(masked, torch.tensor([confidences]), *more, 0.8)[0].nonzero()[:, 0].tolist()


def test_spatial_by_hand():
    inside = torch.ones(1, 4, dtype=torch.bool)
    assert on_row(r2.spatial, [0.85, 0.85, 0.71, 0.3], inside) == [0, 1, 2]  # mean .803
    assert on_row(r2.spatial, [0.85, 0.85, 0.69, 0.3], inside) == []  # .797, and .613
    assert on_row(r2.spatial, [0.89, 0.72, 0.5, 0.1], inside, filled=[2]) == [0, 1]  # .805, one is filled
    assert on_row(r2.spatial, [0.89, 0.9, 0.5, 0.1], inside, filled=[0, 2]) == []  # two are
    outside = torch.tensor([[False, True, True, True]])  # no window begins before the block
    assert on_row(r2.spatial, [0.5, 0.89, 0.72, 0.1], outside, filled=[0]) == []
    assert on_row(r2.spatial, [0.9, 0.9], inside[:, :2]) == []  # shorter than a window


def test_agreement_by_hand():
    token = torch.tensor([[4, 4, 4, 5, 5, 5]])
    assert on_row(r2.agreement, [0.5, 0.85, 0.8, 0.6, 0.7, 0.8], token) == [1]  # .8 is not above .8
    assert on_row(r2.agreement, [0.85, 0.85, 0.8, 0.81, 0.7, 0.85], token) == [0, 5]  # of equals the first
    assert on_row(r2.agreement, [0.85, 0.85, 0.8, 0.81, 0.7, 0.85], token, filled=[1, 4]) == []  # no run


@given(st.data(), st.integers(1, 3), st.integers(1, 9))
@settings(max_examples=150)
def test_both_on_any_canvas(data, B, T):
    """Against loops over windows and runs, on confidences that collide."""
    def grid(of):
        return torch.tensor(data.draw(st.lists(st.lists(of, min_size=T, max_size=T), min_size=B, max_size=B)))

    confidence, token = grid(st.sampled_from([0.5, 0.75, 0.875, 1.0])), grid(st.integers(0, 1))
    begin, end = sorted((data.draw(st.integers(0, T)), data.draw(st.integers(0, T))))
    inside = ((torch.arange(T) >= begin) & (torch.arange(T) < end)).expand(B, T)
    masked = grid(st.booleans()) & inside
    marked, surest_of_run = set(), set()
    for row in range(B):
        for start in range(begin, end - 2):
            window = [i for i in range(start, start + 3) if masked[row, i]]
            if len(window) >= 2 and sum(confidence[row, i].item() for i in window) / len(window) >= 0.75:
                marked |= {(row, i) for i in window}
        kinds = list(zip(masked[row].tolist(), token[row].tolist()))
        for _, group in itertools.groupby(range(T), kinds.__getitem__):
            cells = [i for i in group if masked[row, i]]
            best = max(cells, key=lambda i: confidence[row, i], default=None)
            if len(cells) >= 2 and confidence[row, best] > 0.75:
                surest_of_run.add((row, best))
    for got, expected in ((r2.spatial(masked, confidence, inside, 0.75), marked),
                          (r2.agreement(masked, confidence, token, 0.75), surest_of_run)):  # fmt: skip
        assert {tuple(cell) for cell in got.nonzero().tolist()} == expected


@pytest.mark.parametrize("rule", ["factor", "klass", "r2", "r2-spatial", "r2-temporal"])
def test_every_pass_commits_in_every_row(tiny, rule):
    """Nothing is good enough for these bars, so each pass commits the quota, and no more."""
    nothing = dict(threshold=1.0, factor=0.0, kl_bound=0.0, rescue=1.1)
    canvas, lengths = padded(CANVASES)
    for steps, most in ((0, 15), (5, 5)):
        s = Decoding(rule=rule, steps=steps, **nothing)
        records = list(denoise(tiny(seed=2), canvas, s, FIXED, lengths=lengths))
        assert len(records) == most and (records[-1].tokens != MASK).all()
        for step in records:
            assert (step.committed.any(1) == (step.confidence > 0).any(1)).all()


@given(st.integers(0, 10**6), st.floats(0, 1), st.floats(0, 1))
@settings(max_examples=60)
def test_a_lower_bar_lets_more_through(seed, low, high):
    low, high = sorted((low, high))
    generator = seeded(seed)
    masked = torch.rand(3, 9, generator=generator) < 0.8
    confidence, inside = torch.rand(3, 9, generator=generator), torch.ones(3, 9, dtype=torch.bool)
    token = torch.randint(2, (3, 9), generator=generator)
    for rule, given_too in ((r2.spatial, inside), (r2.agreement, token)):
        few, many = (rule(masked, confidence, given_too, bar) for bar in (high, low))
        assert (few <= many).all() and (many <= masked).all()


def test_settings_of_the_papers_are_the_defaults():
    s = Decoding()
    assert (s.factor, s.kl_bound, s.rescue, s.revoke) == (1.0, 0.01, 0.8, 0.9)
    assert (r2.WIDTH, r2.FILLED, r2.STREAK) == (3, 1, 3)


def test_a_rule_that_looks_back_needs_a_reader_with_notes(tiny):
    with pytest.raises(ValueError, match="zoo.decoding.Decoding"):
        next(denoise(tiny(), torch.tensor([CANVASES[2]]), Sampler(rule="klass")))


# ---- WINO


@torch.no_grad()
def wino_by_hand(model, tokens, threshold, least, b=0, carries=False):
    """-> the canvas after each pass of a row, and how many cells were revoked."""
    tokens, records, revoked = list(tokens), [], 0
    fill, T, E = [i for i, token in enumerate(tokens) if token == MASK], len(tokens), model.embedding
    b = b or T
    origin = fill[0] if b < T else 0
    for first in range(origin, T, b):
        block, last, soft = range(first, min(first + b, T)), 30, {}
        cells = [i for i in block if i in fill]
        while any(tokens[i] == MASK for i in cells):
            masks = [i for i in cells if tokens[i] == MASK]
            filled = [i for i in cells if tokens[i] != MASK]
            at = list(range(T)) + list(block)
            canvas = [soft.get(i, E[token]) for i, token in enumerate(tokens)]
            x = torch.stack(canvas + [E[MASK]] * len(block))
            seen = torch.zeros(len(at), len(at), dtype=torch.bool)
            for q, k in itertools.product(range(len(at)), repeat=2):
                seen[q, k] = at[q] != at[k] or k >= T if q >= T else k < T  # q >= T: a shadow
            z = model.logits(model(x[None], torch.tensor(at)[None], seen[None, None])[0]).double()
            p = {i: z[i].softmax(-1) for i in masks} | {i: z[T + i - first].softmax(-1) for i in filled}
            c = {i: p[i].max().item() for i in masks}
            most = min(max(int(0.7 * len(masks)), 5), 20)
            accepted = [i for i in surest(masks, c, most) if c[i] > threshold]
            accepted = accepted or list(surest(masks, c))
            doubtful = [i for i in filled if p[i][tokens[i]] < least] if len(accepted) > 1 else []
            doubtful = sorted(doubtful, key=lambda i: p[i][tokens[i]])[: last - 1]
            for i in accepted:
                tokens[i] = int(p[i].argmax())
            for i in doubtful:
                tokens[i] = MASK
            last, revoked = len(accepted), revoked + len(doubtful)
            left = [i for i in cells if tokens[i] == MASK] if carries else []
            soft = {i: 0.5 * E[MASK] + 0.5 * p[i].float() @ E for i in left}
            records.append(list(tokens))
    return records, revoked


class Watched(Decoding):
    """A sampler whose readers can be looked at."""

    reads = []

    def reader(self, *args):
        self.reads.append(super().reader(*args))
        return self.reads[-1]


@pytest.mark.parametrize("carries", [False, True])
@pytest.mark.parametrize("b", [0, 7])
def test_wino_drafts_and_revokes_as_its_paper_says(tiny, b, carries):
    total = 0
    for seed in (2, 3):
        model = tiny(seed=seed)
        s = Decoding(rule="wino", threshold=0.4, revoke=0.6, block_size=b,
                     carry="residual" if carries else "none")  # fmt: skip
        watched, (canvas, lengths) = Watched(**vars(s)), padded(CANVASES)
        drafts, before = [[] for _ in CANVASES], torch.zeros(3)
        for step in denoise(model, canvas, watched, FIXED, lengths=lengths):
            for row, draft in enumerate(drafts):
                if step.nfe[row] > before[row]:
                    draft.append(Watched.reads[-1].draft[row, : lengths[row]].tolist())
            before = step.nfe
        for row, draft, final, length in zip(CANVASES, drafts, step.tokens, lengths):
            records, revoked = wino_by_hand(model, row, 0.4, 0.6, b, carries)
            assert draft == records and final[:length].tolist() == records[-1]
            total += revoked
    assert total > 0


def test_a_wino_that_doubts_everything_still_ends(tiny):
    """revoke=1.0 doubts every filled cell at every pass: a pass gains a cell at least, all the same."""
    canvas, lengths = padded(CANVASES)
    s = Decoding(rule="wino", threshold=0.1, revoke=1.0)
    *_, last = denoise(tiny(seed=2), canvas, s, lengths=lengths)
    masks = (canvas == MASK).sum(1)
    assert (last.tokens != MASK).all() and (last.nfe <= masks).all() and (last.nfe > 2).all()


@pytest.mark.parametrize("options,model_options,words", [
    (dict(temperature=0.7), {}, "temperature=0"), (dict(cache="dual", block_size=4), {}, "bidirectional"),
    (dict(guidance=1.0), {}, "guidance"),
    (dict(start="self"), {}, "start=self"), ({}, dict(block_size=4), "bidirectional"),
    ({}, dict(logit_shift=True), "logit shift"),
])  # fmt: skip
def test_wino_says_what_it_cannot_do(tiny, options, model_options, words):
    with pytest.raises(ValueError, match=words):
        next(denoise(tiny(**model_options), torch.tensor([CANVASES[1]]), Decoding(rule="wino", **options)))


# ---- Carries


HANDING_ON = [*carries.OWN, "loop"]  # which hands p.E on, if it was trained as loop-trajectory


def with_carry(tiny, name: str, seed: int = 2, **options) -> rcd.Transformer:
    """A tiny model with this carry, whose parameters are drawn: what it hands on is not nothing."""
    model = carries.attach(tiny(seed=seed, **options), name, 0)
    generator = seeded(9)
    for p in model.carry.parameters():
        p.data.copy_(0.3 * torch.randn(p.shape, generator=generator))
    if name == "soft-mask":  # omega_s .9, omega_a 2, omega_b -1.3
        model.carry[name].omega.data = torch.tensor([math.log(9), math.log(math.expm1(2)), -1.3]) / 100
    return model


def alpha_of(p) -> float:
    """Eq. 3 for p (V,)."""
    return -sum(q * math.log(q) for q in p.tolist() if q > 0) / math.log(len(p))


@torch.no_grad()
def carried(model, name: str, hidden, p) -> torch.Tensor:
    """What a masked cell reads (D,) after a pass that left hidden (D,) and p (V,), by the paper's formula."""
    E, own = model.embedding, carries.of(model)
    if name == "loop":
        return (1 - alpha_of(p)) * E[MASK] + alpha_of(p) * p @ E
    mask, D = E[MASK], len(hidden)
    if name == "soft-mask":
        entropy = -sum(q * math.log(q) for q in p.tolist() if q > 0)
        weight = 0.9 / (1 + math.exp(-2 * (-entropy + 1.3)))
        likeliest = sorted(range(len(p)), key=lambda j: -p[j])[:3]
        mass = sum(p[j] for j in likeliest)
        return (1 - weight) * mask + weight * sum(p[j] / mass * E[j] for j in likeliest)
    if name == "loopholing":
        centred = hidden - hidden.mean()
        return mask + centred / (centred.pow(2).mean() + 1e-5).sqrt() * own.norm.weight + own.norm.bias
    if name == "relay":
        return mask + hidden / (hidden.pow(2).mean() + 1e-6).sqrt() * own.norm.weight
    soft = sum(p[j] * E[j] for j in range(len(p)))
    soft = soft / (soft.pow(2).sum() / D + 1e-6).sqrt() * own.norm.weight
    gate = own.mlp.gate_proj.weight @ soft
    return mask + own.mlp.down_proj.weight @ (gate * gate.sigmoid() * (own.mlp.up_proj.weight @ soft))


@torch.no_grad()
def pass_by_hand(model, tokens, soft, stop):
    """Hidden states (T, D) and p (T, V) of one forward on one canvas. soft: cell -> what is read there."""
    b = model.config.block_size or len(tokens)
    T = stop if model.config.block_size else len(tokens)
    x = torch.stack([soft.get(i, model.embedding[token]) for i, token in enumerate(tokens[:T])])
    seen = torch.tensor([[k // b <= q // b for k in range(T)] for q in range(T)])
    hidden = model(x[None], torch.arange(T)[None], seen[None, None])[0]
    return hidden, model.logits(hidden).softmax(-1)


@pytest.mark.parametrize("block_size", [0, 4])
@pytest.mark.parametrize("name", HANDING_ON)
def test_a_learned_carry_hands_on_what_its_formula_says(tiny, name, block_size):
    """One token a step, a batch of unequal rows; every confidence is that of a forward by hand."""
    model, (canvas, lengths) = with_carry(tiny, name, block_size=block_size), padded(CANVASES[:2])
    steps = list(denoise(model, canvas, Decoding(), Carry(**RECIPES[f"{name}-trajectory"]), lengths=lengths))
    differs = 0.0
    for row, length in enumerate(lengths.tolist()):
        tokens, soft, b = canvas[row, :length].tolist(), {}, block_size or length
        for step in steps:
            cells = (step.confidence[row] > 0).nonzero()[:, 0].tolist()
            if not cells:
                continue
            stop = min(cells[0] // b * b + b, length)
            soft = {i: e for i, e in soft.items() if i in cells}  # empty in a new block
            hidden, p = pass_by_hand(model, tokens, soft, stop)
            close = dict(rtol=1e-3, atol=2e-4)  # rounding is carried on, too
            torch.testing.assert_close(step.confidence[row, cells], p[cells].amax(-1), **close)
            if not row:
                differs = max(differs, (p - pass_by_hand(model, tokens, {}, stop)[1]).abs().max().item())
            tokens = step.tokens[row, :length].tolist()
            left = [i for i in cells if tokens[i] == MASK]
            soft = {i: carried(model, name, hidden[i], p[i]) for i in left}
            alpha = [alpha_of(p[i]) if name == "loop" else 1.0 for i in left]
            torch.testing.assert_close(step.alpha[row, left], torch.tensor(alpha), **close)
    assert differs > 0.05  # the carry matters


@pytest.mark.parametrize("name", carries.OWN)
def test_training_reads_it_in_a_second_pass(tiny, name, monkeypatch):
    """The loss by hand, and whether the gradient goes through the first pass: only Relay's does."""
    monkeypatch.setattr(torch.Tensor, "float", lambda x: x)  # all in float64, for differences
    model = with_carry(tiny, name).double()
    tokens = torch.randint(MASK, (3, 10), generator=seeded(0))
    seen = []

    def context(model, n):
        seen.append(n)
        return carries.own_context(model, n)

    loss = diffusion_loss(model, tokens, context=context, generator=seeded(1))
    loss.backward()
    (n,) = seen
    assert all(p.grad.abs().sum() > 0 for p in model.carry.parameters())

    def by_hand(first):
        """The loss if the first pass is by the model `first`."""
        t = n.t + (1 - n.t) * n.uniform[:, :1] if name == "relay" else n.t
        x, total = torch.where(n.noise < t, MASK, n.tokens), 0.0
        for row in range(3):
            ids = n.x[row].tolist()
            hidden, p = pass_by_hand(first, x[row].tolist(), {}, 10)
            soft = {i: carried(model, name, hidden[i], p[i]) for i in range(10) if ids[i] == MASK}
            _, p = pass_by_hand(model, ids, soft, 10)
            total -= sum(p[i, n.tokens[row, i]].log() / n.t[row, 0] for i in soft)
        return total.item() / 30

    assert loss.item() == pytest.approx(by_hand(model))
    # The derivative by a weight of the first layer, by central differences.
    other, h, slopes = with_carry(tiny, name).double(), 1e-5, []
    for first in (model, other):  # `other` keeps its weights: the first pass does not move
        p = model.layers[0].mlp.up_proj.weight
        values = []
        for shift in (h, -2 * h):
            p.data[0, 0] += shift
            values.append(by_hand(first))
        p.data[0, 0] += h
        slopes.append((values[0] - values[1]) / (2 * h))
    through, around = slopes
    assert abs(through - around) > 1e-6  # so the two can be told apart
    slope = model.layers[0].mlp.up_proj.weight.grad[0, 0].item()
    assert slope == pytest.approx(through if name == "relay" else around, abs=1e-7, rel=1e-4)


@pytest.mark.parametrize("block_size", [0, 4])
@pytest.mark.parametrize("name", HANDING_ON)
def test_a_trajectory_trains_on_what_sampling_hands_on(tiny, name, block_size):
    """The loss of every step by hand, with the carry's formula: what it reads are its own hidden states of
    the step before, cold at first. The carry learns; no gradient goes through an earlier step."""
    model, T = with_carry(tiny, name, block_size=block_size), 8
    tokens = torch.randint(MASK, (1, T), generator=seeded(0))
    recipe = f"{name}-trajectory"
    trajectories = Trajectories(model.config, 1, T, advance=carries.step_of(recipe))
    trajectories.draws = lambda *_: torch.tensor([[0.0], [1.0], [0.0]])  # one token a step in each block
    whole = torch.ones(1, T, dtype=torch.bool)
    s, soft, differs = trajectories.state, {}, 0.0
    for number in range(3):
        masked, own, kept = (s["masked"] if number else whole)[0].tolist(), 0.0, {}
        loss = trajectories.loss(model, lambda n: (tokens, whole, None), Carry(**RECIPES[recipe]), seeded(0))
        for start in range(0, T, block_size or T):  # the blocks side by side, each after the true ones
            stop = start + (block_size or T)
            ids = [MASK if start <= i < stop and masked[i] else int(tokens[0, i]) for i in range(T)]
            here = [i for i in range(start, stop) if masked[i]]
            hidden, p = pass_by_hand(model, ids, {i: soft[i] for i in here if i in soft}, stop)
            plain = pass_by_hand(model, ids, {}, stop)[1]
            differs = max([differs, *((p[i] - plain[i]).abs().max().item() for i in here)])
            own -= sum(p[i, tokens[0, i]].log().item() for i in here)
            kept |= {i: (hidden[i], p[i]) for i in here}
        assert loss.item() == pytest.approx(own / sum(masked), rel=1e-3)  # 1/t and T tokens: per masked token
        model.zero_grad()
        loss.backward()
        learned = [bool(p.grad is not None and p.grad.abs().sum() > 0) for p in model.carry.parameters()]
        assert any(learned) == (number > 0 or name == "loop")  # a carry has nothing to read at first
        assert not any(v.requires_grad for v in s.values())
        soft = {i: carried(model, name, *kept[i]) for i in kept if s["masked"][0, i]}
    assert differs > 0.05  # the carry matters


@pytest.mark.parametrize("name", carries.LEARNED)
def test_a_new_carry_changes_nothing_is_saved_and_comes_back(tiny, name, tmp_path):
    model, tokens = tiny(seed=2), torch.randint(MASK, (4, 12), generator=seeded(0))
    plain = diffusion_loss(model, tokens, generator=seeded(1))
    carries.attach(model, name, seed=5)
    again = diffusion_loss(model, tokens, context=carries.context_of(name, None), generator=seeded(1))
    torch.testing.assert_close(plain, again)
    files.save(model, tmp_path)
    loaded = files.load(tmp_path)
    assert loaded.state_dict().keys() == model.state_dict().keys() > tiny(seed=2).state_dict().keys()
    assert all(torch.equal(p, loaded.get_parameter(n)) for n, p in model.named_parameters())
    twin = carries.attach(tiny(seed=2), name, seed=5)
    assert all(torch.equal(p, twin.get_parameter(n)) for n, p in model.named_parameters())
    kept = model.carry
    assert carries.attach(model, name, seed=6).carry is kept  # it keeps the one it has
    assert not hasattr(carries.attach(model, "trajectory", seed=6), "carry")  # another recipe takes it away
    assert not any(layer._forward_hooks for layer in model.layers)
    assert model.state_dict().keys() == tiny(seed=2).state_dict().keys()


@torch.no_grad()
def test_a_loop_applies_the_early_middle_layers_twice(tiny):
    """Four layers by hand: the second and the third come again, and the gate says how much of it counts."""
    model, plain = with_carry(tiny, "loop", n_layer=4), tiny(seed=2, n_layer=4)
    x, at = torch.randn(2, 9, 16, generator=seeded(0)), torch.arange(9)[None]
    angles = at[:, None, :, None] * 10000.0 ** (-torch.arange(3) / 3)  # head_dim 6
    rest = angles.cos(), angles.sin(), None, None
    a, b, c, d = plain.layers
    y = b(a(x, *rest), *rest)
    y = c(y, *rest)
    y = y + model.carry["loop"].gate * (c(b(y, *rest), *rest) - y)
    torch.testing.assert_close(model(x, at), plain.norm(d(y, *rest)))
    assert (model(x, at) - plain(x, at)).abs().max() > 0.1
    twin, before = copy.deepcopy(model), model(x, at)  # it has a loop of its own
    model.carry["loop"].gate.zero_()
    assert torch.equal(twin(x, at), before) and torch.equal(model(x, at), plain(x, at))


@pytest.mark.parametrize("block_size", [0, 4])
def test_a_loop_in_sampling_has_keys_of_its_own(tiny, block_size):
    """Every confidence is that of a forward without a cache, and nothing is handed on."""
    model, (canvas, lengths) = with_carry(tiny, "loop", block_size=block_size), padded(CANVASES[:2])
    for s in (Decoding(), Decoding(carry="none")):
        before = canvas
        for step in denoise(model, canvas, s, Carry(**RECIPES["loop"]), lengths=lengths):
            for row, length in enumerate(lengths.tolist()):
                cells, b = (step.confidence[row] > 0).nonzero()[:, 0].tolist(), block_size or length
                if cells:
                    stop = min(cells[0] // b * b + b, length)
                    _, p = pass_by_hand(model, before[row, :length].tolist(), {}, stop)
                    close = dict(rtol=1e-4, atol=1e-5)
                    torch.testing.assert_close(step.confidence[row, cells], p[cells].amax(-1), **close)
            assert not step.alpha.any()
            before = step.tokens


def test_a_carry_of_another_version_is_one_line(tiny, tmp_path):
    model = carries.attach(tiny(), "loopholing", 0)
    model.carry = torch.nn.ModuleDict({"telepathy": model.carry["loopholing"]})
    files.save(model, tmp_path)
    with pytest.raises(ValueError, match="'telepathy' is not known here: there are soft-mask"):
        files.load(tmp_path)


def test_soft_mask_weights():
    carry, entropy = SoftMask(rcd.Config()), torch.linspace(0, 4, 50)
    first = carry.weights(entropy)
    assert (first > 0).all() and first.max() < 1.1e-6  # at first nothing is fed back
    with torch.no_grad():
        carry.omega[0] = 0.0  # omega_s = sigmoid(0)
    weight = carry.weights(entropy)
    assert (weight.diff() < 0).all()  # the surer, the more: the opposite of Eq. 3
    torch.testing.assert_close(carry.weights(torch.tensor([0.75])), torch.tensor([0.25]))  # at H = -omega_b
    torch.testing.assert_close(weight[0], torch.tensor(0.5 / (1 + math.exp(-6.66 * 0.75))))


def test_own_p_at_the_same_noise_level(tiny):
    """The recipe scmdm, by hand: alpha and Delta of a plain pass on the same x_t, on half of the rows."""
    model, tokens = tiny(seed=3), torch.randint(MASK, (400, 6), generator=seeded(0))
    seen = []

    def watched(model, n):
        seen.append((n, *sometimes_absent(carries.context_of("scmdm", FIXED), 0.5)(model, n)))
        return seen[0][1:]

    diffusion_loss(model, tokens, context=watched, generator=seeded(1))
    ((n, alpha, delta),) = seen
    for k in range(0, len(alpha), 97):
        row, column = n.cells[0][k].item(), n.cells[1][k].item()
        _, p = pass_by_hand(model, n.x[row].tolist(), {}, 6)
        torch.testing.assert_close(delta[k], p[column] @ model.embedding)
    assert alpha.unique().tolist() == [0.0, 0.5] and 0.4 < (alpha > 0).float().mean() < 0.6


def test_remix_by_hand():
    E = torch.randn(6, 3, generator=seeded(0))
    p = torch.tensor([[0.5, 0.3, 0.1, 0.06, 0.04, 0.0],  # clip(2 x .5) = .9: .5, .3 and .1 hold .9
                      [0.3, 0.3, 0.2, 0.1, 0.1, 0.0],  # .6: .3 and .3, of which the first ...
                      [0.04, 0.05, 0.01, 0.0, 0.9, 0.0]])  # .9: the likeliest alone
    alpha, delta = remix(p.log(), E)
    for k, nucleus in enumerate(([0, 1, 2], [0, 1], [4])):
        if k == 1:  # .3 + .3 against .6: a matter of rounding, so the third may be in
            nucleus = nucleus if alpha[k] < 0.31 else [0, 1, 2]
        soft = sum(p[k, j] * E[j] for j in nucleus)
        mass = sum(p[k, j].item() for j in nucleus)
        mask = torch.ones(3)  # (1 - beta) E[M] + beta (soft + (1 - mass) E[M])
        paper = 0.5 * mask + 0.5 * (soft + (1 - mass) * mask)
        torch.testing.assert_close((1 - alpha[k]) * mask + alpha[k] * delta[k], paper)


def test_jensen_shannon_by_hand():
    p = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [0.2, 0.3, 0.5]])
    q = torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.2, 0.3, 0.5]])
    half = 0.5 * (0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)) + 0.5 * math.log(1 / 0.75)
    torch.testing.assert_close(jensen_shannon(p.log(), q.log()), torch.tensor([math.log(2), half, 0.0]))


@torch.no_grad()
def test_a_cell_whose_prediction_jumps_reads_the_bare_mask(tiny):
    model, limit, resets = tiny(seed=4), 0.02, 0
    canvas = torch.tensor([CANVASES[0]])
    tokens, soft, before = CANVASES[0], {}, {}
    for step in denoise(model, canvas, Decoding(js_reset=limit), Carry(weight="remix")):
        _, p = pass_by_hand(model, tokens, soft, 20)
        cells = [i for i in range(20) if tokens[i] == MASK]
        torch.testing.assert_close(step.confidence[0, cells], p[cells].amax(-1))
        tokens = step.tokens[0].tolist()
        soft = {}
        for i in (i for i in cells if tokens[i] == MASK):
            jumped = i in before and jensen_shannon(p[i][None].log(), before[i][None].log()).item() > limit
            alpha, delta = remix(p[i][None].log(), model.embedding)
            soft[i] = model.embedding[MASK].lerp(delta[0], 0.0 if jumped else alpha[0])
            resets += jumped
        before = {i: p[i] for i in soft}
    assert 0 < resets < 100


@pytest.mark.parametrize("options,words", [(dict(guidance=1.0), "without guidance"),
                                           (dict(start="dirichlet"), "cold or self"),
                                           (dict(js_reset=0.3), "a carry of its own")])  # fmt: skip
def test_a_learned_carry_says_what_it_cannot_do(tiny, options, words):
    with pytest.raises(ValueError, match=words):
        next(denoise(with_carry(tiny, "gemma"), torch.tensor([CANVASES[1]]), Decoding(**options)))


def test_tables_call_a_model_by_its_carry_and_start_it_as_it_can(tiny):
    plain, model = tiny(seed=3), with_carry(tiny, "loopholing")
    for target, starts in ((plain, ["RCD (cold)", "RCD (warm)"]), (model, ["loopholing (cold)"])):
        settings = sweep(plain, target, plain, Decoding(), Carry(), 9.0, steps=[3], thresholds=[0.9])
        assert [*dict.fromkeys(s.label for s in settings)] == ["SeqD", *starts]
        for s in settings:
            given = torch.tensor(CANVASES[:1])
            list(denoise(s.model, given, s.sampler, s.residual, reference=s.reference))


def test_rules_and_carries_compose(tiny):
    """Every rule with every carry ends with a full canvas, and carry=none reads as if there were none."""
    canvas = torch.tensor([CANVASES[1]])
    for name in carries.LEARNED:
        model, plain = with_carry(tiny, name), tiny(seed=2)
        for rule in ("threshold", "factor", "klass", "r2"):
            *_, last = denoise(model, canvas, Decoding(rule=rule), Carry(weight="learned"))
            assert (last.tokens != MASK).all()
        if name == "loop":  # which is there in every pass
            continue
        with_none, without = (list(denoise(m, canvas, Decoding(carry="none"))) for m in (model, plain))
        assert all(torch.equal(a.confidence, b.confidence) for a, b in zip(with_none, without))


@pytest.mark.parametrize("recipe, absent", [
    ("loopholing", 0.3), ("soft-mask", 0.2), ("loop", 0.0), ("gemma-trajectory", 0.0),
    ("loop-trajectory", 0.0),
])  # fmt: skip
def test_train_py_trains_saves_and_resumes_a_learned_carry(run, monkeypatch, recipe, absent):  # noqa: F811
    """With a moving average. The resumed run ends at the same bits; the carry has moved."""
    options = [f"--recipe={recipe}", "--ema=0.5", "--name=whole"]
    run(*options)
    target = zoo.load("whole/target")
    assert meta_of(target.folder)["residual"]["weight"] == RECIPES[recipe]["weight"]
    assert meta_of(target.folder)["options"]["absent"] == absent
    new = carries.attach(zoo.load("whole/base").model, carries.name_of(recipe), 1337).carry.state_dict()
    moved = {n: p for n, p in weights(target.folder).items() if n.startswith("carry.")}
    assert len(moved) == len(new) and any(not torch.equal(p, moved[f"carry.{n}"]) for n, p in new.items())
    for stage in ("base", "reference"):
        shutil.copytree(f"out/whole/{stage}", f"out/cut/{stage}")

    def stop_at_4(*given):  # after step 3 is saved at 2
        if given[1] >= 4:
            raise KeyboardInterrupt
        return rate(*given)

    import train

    rate = train.learning_rate
    monkeypatch.setattr(train, "learning_rate", stop_at_4)
    with pytest.raises(KeyboardInterrupt):
        run("--name=cut", "--stage=target", *options[:2])
    monkeypatch.setattr(train, "learning_rate", rate)
    run("--name=cut", "--stage=target", "--resume", *options[:2])
    assert same(target.folder, target.folder.parents[1] / "cut" / "target")


# ---- A learned policy


def policy(seed: int = 0, scale: float = 0.3) -> Policy:
    """A policy whose weights are drawn: not the soft threshold that a new one is."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # of nn.Linear's own weights
        net, generator = Policy(), seeded(seed)
    for p in (net.out.weight, net.modulation.weight):
        p.data.copy_(scale * torch.randn(p.shape, generator=generator))
    return net


def test_a_new_policy_is_a_soft_threshold_and_small():
    net = Policy()
    assert sum(p.numel() for p in net.parameters()) <= 300_000
    confidence = torch.rand(3, 5, generator=seeded(0))
    logits = net(confidence, torch.ones(3, 5, dtype=torch.bool), torch.tensor([0.0, 0.3, 1.0]))
    torch.testing.assert_close(logits, 40 * (confidence - 0.9))


def test_the_policy_sees_confidence_masks_and_time():
    net, c, masked = policy(), torch.rand(2, 6, generator=seeded(1)), torch.ones(2, 6).bool()
    time = torch.zeros(2)
    base = net(c, masked, time)
    other, some = c.clone(), masked.clone()
    other[:, 3], some[:, 3] = 0.1, False
    for changed in (net(other, masked, time), net(c, some, time), net(c, masked, time + 0.5)):
        assert (changed - base)[:, 0].abs().min() > 1e-4  # even of another cell
    torch.testing.assert_close(net(c[:1], masked[:1], time[:1]), base[:1])  # rows are independent


def test_reward_by_hand():
    right, passes = torch.tensor([True, True, False, True]), torch.tensor([1, 5, 1, 10])
    most = torch.tensor([10] * 4)
    torch.testing.assert_close(reward(right, passes, most, 2.0), torch.tensor([0.81, 0.25, 0.0, 0.0]))
    torch.testing.assert_close(reward(right, passes, most, 0.0), torch.tensor([1.0, 1.0, 0.0, 1.0]))


CELLS = {(True, True): [0.93, 0.88], (True, False): [0.91, 0.0], (False, True): [0.0, 0.86]}


def two_cells(net: Policy):
    """Every rollout of a canvas of two masks whose confidences are those of CELLS -> (its chance, with a
    gradient; its acts; its passes; which cells went first)."""
    def steps(masked, count):
        if not any(masked):
            yield torch.ones(()), [], 0, ()
            return
        c, mask = torch.tensor([CELLS[masked]]), torch.tensor([masked])
        time = torch.tensor([count / 2])
        s = net(c, mask, time).sigmoid()[0]
        for u in itertools.product([False, True], repeat=sum(masked)):
            action = [False, False]
            for cell, chosen in zip([i for i in (0, 1) if masked[i]], u):
                action[cell] = chosen
            chance = torch.ones(())
            for cell in (0, 1):
                if masked[cell]:
                    chance = chance * (s[cell] if action[cell] else 1 - s[cell])
            done = list(action)
            if not any(action):  # the fallback: the cell of largest s
                done[max((i for i in (0, 1) if masked[i]), key=lambda i: s[i])] = True
            left = tuple(m and not d for m, d in zip(masked, done))
            act = Act(torch.tensor([0]), c, mask, time, torch.tensor([action]))
            for later, acts, passes, _ in steps(left, count + 1):
                yield chance * later, [act, *acts], passes + 1, tuple(done)

    return list(steps((True, True), 0))


def test_the_policy_gradient_is_that_of_the_expected_reward():
    """On two cells, where every rollout can be counted: J = sum of chance x R, and its gradient by autograd.
    The mean of the estimate over all groups of two rollouts is half of it: the mean of a group holds the
    rollout itself, (G - 1) / G."""
    net = policy()
    rollouts = two_cells(net)
    assert sum(chance for chance, *_ in rollouts).item() == pytest.approx(1)
    def worth(passes, first):  # right if the second cell did not go first
        return (1.0 if first != (False, True) else 0.0) * (1 - passes / 2.5) ** 0.7

    J = sum(chance * worth(passes, first) for chance, _, passes, first in rollouts)
    expected = torch.autograd.grad(J, [*net.parameters()])
    total = [torch.zeros_like(p) for p in net.parameters()]
    for a, b in itertools.product(rollouts, repeat=2):
        acts = [act._replace(rows=torch.tensor([row])) for row in (0, 1) for act in (a, b)[row][1]]
        rewards = torch.tensor([worth(*rollout[2:]) for rollout in (a, b)])
        loss = grpo_loss(net, acts, rewards, 2)
        if loss.requires_grad:
            weight = (a[0] * b[0]).item()
            for sum_, g in zip(total, torch.autograd.grad(loss, [*net.parameters()])):
                sum_ -= weight * g
    for estimate, true in zip(total, expected):
        torch.testing.assert_close(2 * estimate, true, rtol=1e-3, atol=1e-6)
    assert max(g.abs().max() for g in expected) > 1e-3


def test_a_rollout_is_a_run_of_the_sampler_and_its_acts_say_what_happened(tiny):
    model, net = tiny(seed=2), policy(1)
    solutions = torch.randint(MASK, (40, 9), generator=seeded(3))
    fill = torch.rand(40, 9, generator=seeded(4)) < 0.7
    fill[:, 0] = True
    s = Decoding(rule="policy")
    acts, filled, passes = trainer.rollout(model, net, solutions, fill, s, FIXED, seeded(5))
    again = trainer.rollout(model, net, solutions, fill, s, FIXED, seeded(5))
    assert torch.equal(passes, again[2]) and all(torch.equal(a.u, b.u) for a, b in zip(acts, again[0]))
    masked, count, most = fill.clone(), torch.zeros(40), fill.sum(1)
    fallbacks = chosen = expected = 0
    for act in acts:
        assert torch.equal(act.masked, masked[act.rows]) and torch.equal(act.time, (count / most)[act.rows])
        assert (act.u <= act.masked).all() and ((act.confidence > 0) == act.masked).all()
        s_i = net(act.confidence, act.masked, act.time).sigmoid().detach() * act.masked
        chosen, expected = chosen + int(act.u.sum()), expected + s_i.sum().item()
        done = act.u.clone()
        none = ~act.u.any(1)
        done[none, s_i[none].argmax(1)] = True
        masked[act.rows] = act.masked & ~done
        count[act.rows] += 1
        fallbacks += int(none.sum())
    assert not masked.any() and torch.equal(count.long(), passes) and fallbacks > 0
    assert abs(chosen - expected) < 4 * math.sqrt(expected)  # as often as the policy says
    assert (filled != MASK).all() and torch.equal(filled[~fill], solutions[~fill])


def test_speed_scales_the_chances(tiny):
    solutions, fill = torch.randint(MASK, (60, 12), generator=seeded(3)), torch.ones(60, 12, dtype=torch.bool)
    fill[:, ::5] = False
    net = policy(1)
    net.out.bias.data += 20.0  # the tiny model is never sure
    samplers = [Decoding(rule="policy", policy_speed=speed) for speed in (0.0, 0.3, 1.0, 1e9)]
    runs = [trainer.rollout(tiny(seed=2), net, solutions, fill, s, FIXED, seeded(0)) for s in samplers]
    passes = [passes.float().mean().item() for _, _, passes in runs]
    assert passes[0] == fill[0].sum() > passes[1] > passes[2] > passes[3] == 1


def test_a_policy_is_trained_from_the_command_line(tmp_path, monkeypatch, capsys, puzzles):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    options = ["--steps=2", "--puzzles=2", "--group=3", "--items=4", "--device=cpu", "--dtype=float32"]
    monkeypatch.setattr(sys, "argv", ["policy", f"--data={puzzles}", "--out=p.safetensors", *options])
    trainer.main()
    table = capsys.readouterr().out
    assert table.count("| policy ") == 3 and table.count("| threshold ") == 5 and table.count("| RCD ") == 8
    net = load_policy("p.safetensors")
    torch.manual_seed(1337)
    start = [*Policy().parameters()]  # as the command's own seed draws it
    assert any(not torch.equal(p, q) for p, q in zip(net.parameters(), start))
    # All answers are right, and only that counts: no rollout is better than another, so nothing is learned.
    again = [*options, "--power=0", "--items=0", "--out=same.safetensors"]
    monkeypatch.setattr(sys, "argv", ["policy", f"--data={puzzles}", *again])
    trainer.main()
    assert all(torch.equal(p, q) for p, q in zip(load_policy("same.safetensors").parameters(), start))
    loaded = zoo.load("sudoku/target")
    solutions, fill = (torch.from_numpy(np.load(puzzles / f"test{x}.npy")[:4]) for x in ("", "_response"))
    solutions = solutions.long()
    canvas = solutions.masked_fill(fill, loaded.model.config.mask_id)
    s = Decoding(rule="policy", policy="p.safetensors")
    *_, last = denoise(loaded.model.float(), canvas, s, FIXED, generator=seeded(0))
    assert (last.tokens != loaded.model.config.mask_id).all() and (last.nfe < fill.sum(1)).all()


def test_policies_that_are_none(tiny, tmp_path, monkeypatch, capsys):
    save_file({"x": torch.zeros(2)}, tmp_path / "other.safetensors")
    (tmp_path / "text.safetensors").write_text("hello")
    for path, words in (("", "--policy=FILE"), ("nowhere", "no policy nowhere"),
                        (tmp_path / "other.safetensors", "no policy of this version"),
                        (tmp_path / "text.safetensors", "no policy of this version")):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            next(denoise(tiny(), torch.tensor([CANVASES[1]]), Decoding(rule="policy", policy=str(path))))
    monkeypatch.setattr(sys, "argv", ["policy", f"--data={tmp_path}"])
    with pytest.raises(ValueError, match="no data set .*: choose one of"):
        trainer.main()
    monkeypatch.setattr(sys, "argv", ["policy", "--group=1"])
    with pytest.raises(SystemExit, match="2"):
        trainer.main()
    assert "group=1 must be at least 2" in capsys.readouterr().err


# ---- The experiments


def test_an_experiment_sweeps_any_rule_and_trains_its_policies_once(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(experiment, "ROOT", tmp_path)
    commands = []
    monkeypatch.setattr(experiment, "succeeds", lambda command: commands.append(command) or True)
    cells = experiment.Cells("rules", 7)
    loaded = zoo.load("sudoku/target")
    cells.models = {"seqd": loaded, "rcd": loaded}
    for name in cells.e.policies:
        (o,) = arguments("", trainer.Options, argv=cells.policy_command(name))
        assert o.seed == 7 and o.model.startswith("sudoku/") and Path(o.out).parent == Path("out/sudoku")
        cells.train_policy(name)
        cells.policy(name).parent.mkdir(parents=True, exist_ok=True)
        cells.policy(name).touch()
        cells.train_policy(name)  # it is there
    assert [command[1:3] for command in commands] == [["-m", "zoo.rivals.policy"]] * len(cells.e.policies)
    for c in cells.e.curves:
        samplers = [setting.sampler for setting in cells.settings(c, {})]
        assert len(samplers) == 6 and {s.carry for s in samplers} == {c.sampler.get("carry", "residual")}
        for s, fields in zip(samplers, c.sweep):
            assert all(getattr(s, name) == value for name, value in fields.items())
            assert Path(s.policy).is_file() if s.rule == "policy" else not s.policy
    papers = {(s["rule"], s["threshold"], s["rescue"]) for s in experiment.SWEEPS["R2"]}
    assert ("r2", 0.9, 0.8) in papers


def test_a_table_names_the_rules_where_they_differ():
    def rows(rule, *values):
        fixed = {"accuracy": 0.5, "nfe": 3.0, "interval": (0.4, 0.6)}
        return [{"label": rule, "rule": rule, "value": value, **fixed} for value in values]

    alike = experiment.table_by_curve([rows("static", 4, 8), rows("static", 4, 8)])
    assert "4 steps" in alike[0] and alike[2] == "| static | 50.0 (40-60) @ 3.0 | 50.0 (40-60) @ 3.0 |"
    mixed = experiment.table_by_curve([rows("factor", 0.5), rows("threshold", 0.9)])
    assert mixed[2:] == ["| factor | factor 0.5: 50.0 (40-60) @ 3.0 |",
                         "| threshold | threshold 0.9: 50.0 (40-60) @ 3.0 |"]  # fmt: skip
