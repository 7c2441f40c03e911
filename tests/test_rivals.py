"""zoo/rivals: each method against its paper written out in loops, one row and one number at a time.

The loops below know nothing of batches, caches or notes: they forward one canvas, and look at lists.
"""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import rcd
from rcd import Candidates, Residual, Sampler, denoise
from zoo.decoding import Decoding
from zoo.rivals import r2
from zoo.rivals.rules import Klass, divergence, factor

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


@pytest.mark.parametrize("carries", [False, True])
@pytest.mark.parametrize("block_size,b", [(0, 0), (0, 5), (4, 0)])
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
            run = [i for i in group if masked[row, i]]
            best = max(run, key=lambda i: confidence[row, i], default=None)
            if len(run) >= 2 and confidence[row, best] > 0.75:
                surest_of_run.add((row, best))
    for got, expected in ((r2.spatial(masked, confidence, inside, 0.75), marked),
                          (r2.agreement(masked, confidence, token, 0.75), surest_of_run)):  # fmt: skip
        assert {tuple(cell) for cell in got.nonzero().tolist()} == expected


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
    (dict(guidance=1.0), {}, "guidance"), ({}, dict(block_size=4), "bidirectional"),
    ({}, dict(logit_shift=True), "logit shift"),
])  # fmt: skip
def test_wino_says_what_it_cannot_do(tiny, options, model_options, words):
    with pytest.raises(ValueError, match=words):
        next(denoise(tiny(**model_options), torch.tensor([CANVASES[1]]), Decoding(rule="wino", **options)))
