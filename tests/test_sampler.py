"""The sampler against a slow transcription of Algorithm 2, and what holds for any canvas and choice.

The transcription and the checks that use it also serve test_decoding.py, with the options of zoo.decoding.
"""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import rcd
from rcd import RULES, WEIGHTS, Candidates, Residual, Sampler, Transformer, denoise, generate
from zoo import rivals
from zoo.decoding import Carry, Decoding

MASK, PAD = 11, 0  # of the tiny models
_ = MASK  # canvases below are written with it


def drain(*args, **options) -> list[rcd.Step]:
    """Every record of a run, at most 100: a sampler that commits nothing fails and does not run for ever."""
    return list(itertools.islice(denoise(*args, **options), 100))


def decoding(s: Sampler, **changes) -> Decoding:
    """The sampler s with options that only Decoding has."""
    return Decoding(**{**vars(s), **changes})


# ---- Algorithm 2, one row, one number at a time, everything recomputed at every step


def soft_embeddings(model: Transformer, rows: list[list[int]], at, soft: dict[int, torch.Tensor]):
    """(N, T, D): what the cells `at` of these rows are read as. soft: cell -> its input embedding."""
    return torch.stack([soft[i] if i in soft else model.embedding[row[i]] for row in rows for i in at]
                       ).unflatten(0, (len(rows), -1))  # fmt: skip


def forward(model: Transformer, rows: list[list[int]], soft: dict[int, torch.Tensor], stop: int):
    """Logits (N, stop, V) in float64 of the cells [:stop] of rows of one length, which differ in given tokens
    only. soft: cell -> its input embedding."""
    c = model.config
    T = stop if c.block_size else len(rows[0])  # block-causal: what is not yet reached is not there
    x, b = soft_embeddings(model, rows, range(T), soft), c.block_size or T
    allowed = torch.tensor([[k // b <= q // b for k in range(T)] for q in range(T)])
    hidden = model(x, torch.arange(T).expand(len(rows), T), allowed[None, None])
    z = hidden.double() @ model.head.double().T
    if c.logit_shift:
        z = torch.cat([z[:, :1], z[:, :-1]], 1)
    z[..., c.mask_id] = -math.inf
    z[..., c.real_vocab or c.vocab_size :] = -math.inf
    return z


def cached_forward(model: Transformer, rows: list[list[int]], soft: dict, store: dict, window: range):
    """forward() of a bidirectional model that reads the cells of the window only. Every layer sees the keys
    and values that the store (layer -> (N, T, G, K) of each) holds of the others. An empty store is filled by
    reading everything."""
    c, T = model.config, len(rows[0])
    at = list(window) if store else list(range(T))
    x = soft_embeddings(model, rows, at, soft)  # (N, W, D)
    half = c.head_dim // 2
    angles = torch.tensor(at)[:, None] * c.rope_theta ** (-torch.arange(half) / half)  # (W, K/2)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    for number, layer in enumerate(model.layers):
        a, h = layer.self_attn, layer.input_layernorm(x)
        q, k, v = (f(h).unflatten(2, (-1, c.head_dim)) for f in (a.q_proj, a.k_proj, a.v_proj))
        q, k = (a.q_norm(q), a.k_norm(k)) if c.qk_norm else (q, k)  # (N, W, H or G, K)
        pairs = [(y[..., :half], y[..., half:]) for y in (q, k)]
        q, k = (torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], -1) for x1, x2 in pairs)
        keys, values = store.setdefault(number, (k.clone(), v.clone()))
        keys[:, at], values[:, at] = k, v
        groups = c.n_head // c.n_kv_head
        keys, values = (y.repeat_interleave(groups, dim=2) for y in (keys, values))  # (N, T, H, K)
        p = (torch.einsum("nqhd,nkhd->nhqk", q, keys) / math.sqrt(c.head_dim)).softmax(-1)
        x = x + a.o_proj(torch.einsum("nhqk,nkhd->nqhd", p, values).flatten(2))
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    z = torch.full((len(rows), T, c.vocab_size), math.nan, dtype=torch.double)
    read = model.norm(x).double() @ model.head.double().T
    for k, i in enumerate(at):
        if i + c.logit_shift < T:
            z[:, i + c.logit_shift] = read[:, k]
    z[..., c.mask_id] = -math.inf
    return z


def algorithm_2(model, canvas, s, r, reference=None, shares=None):
    """-> list of (tokens, committed cells, confidence by cell, alpha by cell, NFE) after each forward pass,
    and the margin: by how much the closest decision was taken. Below CLOSE it is a tie for float32, and no
    test. Greedy. shares: steps of each block."""
    s = decoding(s)
    c, tokens, T = model.config, list(canvas), len(canvas)
    fill = [i for i in range(T) if canvas[i] == c.mask_id]
    nfe, records, margin, E = 0, [], 1.0, model.embedding.double()
    b = s.block_size or c.block_size or T
    # A bidirectional model counts its blocks from the first mask.
    origin = fill[0] if fill and s.block_size and not c.block_size else 0
    blocks = [[i for i in fill if (i - origin) // b == j] for j in range(-(-(T - origin) // b))]
    blocks = [(cells, min(origin + (cells[0] - origin) // b * b + b, T)) for cells in blocks if cells]
    ended = False

    def predict(model, soft, stop):
        """Logits (stop, V). With guidance the prompt is also hidden: both go through the model at once."""
        guided = s.guidance and model is not reference
        rows = [tokens]
        if guided:
            rows.append([c.mask_id if i not in fill else token for i, token in enumerate(tokens)])
        # Everything once a block, then the block. A shifted model reads the cell before it, too.
        if s.cache != "exact" and model is not reference:
            begin = max(0, origin + (cells[0] - origin) // b * b - c.logit_shift)
            window = range(begin, stop if s.cache == "dual" else T)
            z = cached_forward(model, rows, soft, store, window)
        else:
            z = forward(model, rows, soft, stop)
        if guided:
            z, u = z
            z = u + (s.guidance + 1) * (z - u)
            z[z.isnan()] = -math.inf
            return z
        return z[0]

    def residual(z):  # Eq. 1 and 3
        p, tempered = z.softmax(-1).tolist(), (z / r.t_res).softmax(-1).tolist()
        alpha = -sum(q * math.log(q) for q in tempered if q > 0) / math.log(len(p))
        p = tempered if getattr(r, "temper_delta", False) else p
        return alpha, sum(q * E[j] for j, q in enumerate(p))

    for number, (cells, stop) in enumerate(blocks):
        if ended:
            for i in cells:
                tokens[i] = c.pad_id
            records[-1] = (list(tokens), *records[-1][1:])
            continue
        store = {}  # keys and values of this block: prompt seen and, with guidance, prompt hidden
        state = {}  # cell -> (alpha, Delta): the residual stream, cold
        if s.carry == "residual" and s.start == "warm":
            z, nfe = predict(reference, {}, stop), nfe + 1
            state = {i: residual(z[i]) for i in cells}
        if s.carry == "residual" and s.start == "self":
            for _ in range(s.self_passes):
                soft = {i: ((1 - a) * E[c.mask_id] + a * d).float() for i, (a, d) in state.items()}
                z, nfe = predict(model, soft, stop), nfe + (2 if s.guidance else 1)
                state = {i: residual(z[i]) for i in cells}
        left, step = list(cells), 0
        while left:
            soft = {}
            for i in left:
                alpha, delta = state.get(i, (0.0, torch.zeros(E.shape[1], dtype=torch.double)))
                soft[i] = ((1 - alpha) * E[c.mask_id] + alpha * delta).float()  # Eq. 2
            z, nfe = predict(model, soft, stop), nfe + (2 if s.guidance else 1)
            p = z.softmax(-1)
            confidence = {i: p[i].max().item() for i in left}
            entropy = {i: -sum(q * math.log(q) for q in p[i].tolist() if q > 0) for i in left}
            m = math.ceil(len(left) / max(shares[number] - step, 1)) if s.steps else 1
            best = sorted(left, key=lambda i: -confidence[i])
            gaps = [first - second for first, second in p[left].topk(2).values.tolist()]
            if s.rule in ("static", "threshold") and m < len(best):
                gaps.append(confidence[best[m - 1]] - confidence[best[m]])
            if s.rule == "static":
                commit = best[:m]
            elif s.rule == "threshold":
                commit = [i for k, i in enumerate(best) if k < m or confidence[i] > s.threshold]
                gaps += [abs(confidence[i] - s.threshold) for i in left]
            elif s.rule == "left-to-right":
                commit = left[:m]
            elif s.rule in ("lowest-entropy", "margin"):
                two = {i: p[i].topk(2).values.tolist() for i in left}
                low = entropy if s.rule == "lowest-entropy" else {i: two[i][1] - two[i][0] for i in left}
                surest = sorted(left, key=lambda i: low[i])  # noqa: B023
                gaps += [low[j] - low[i] for i, j in zip(surest[m - 1 : m], surest[m : m + 1])]
                commit = surest[:m]
            elif s.rule == "entropy-bounded":  # the largest k with H_1 + ... + H_(k-1) <= bound
                surest = sorted(left, key=lambda i: entropy[i])  # noqa: B023
                before = [sum(entropy[i] for i in surest[:k]) for k in range(len(surest))]  # the k-th cell
                gaps += [abs(total - s.entropy_bound) for total in before]
                gaps += [entropy[j] - entropy[i] for i, j in zip(surest, surest[1:])]
                k = max(k for k, total in enumerate(before, 1) if total <= s.entropy_bound)
                commit = surest[: max(k, m)]
            margin = min(margin, *gaps)
            for i in commit:
                tokens[i] = int(p[i].argmax())
            left = [i for i in left if i not in commit]
            state = {i: residual(z[i]) for i in left} if s.carry == "residual" else {}
            alpha = {i: a for i, (a, _delta) in state.items()}
            records.append((list(tokens), sorted(commit), confidence, alpha, nfe))
            step += 1
        ended = any(tokens[i] in c.eos_ids for i in cells)
    return records, margin


CLOSE = 1e-4


def same(steps, records, row=0):
    """A run of denoise() on one row is the transcription's, step for step."""
    assert len(steps) == len(records)
    for step, (tokens, committed, confidence, alpha, nfe) in zip(steps, records):
        T = len(tokens)
        assert step.committed[row].nonzero()[:, 0].tolist() == committed
        assert step.tokens[row, :T].tolist() == tokens
        for got, expected in ((step.confidence, confidence), (step.alpha, alpha)):
            assert got[row, :T].tolist() == pytest.approx([expected.get(i, 0.0) for i in range(T)], abs=5e-4)
        assert step.nfe[row].item() == nfe


# Given tokens in front, within and behind; whole given blocks.
CANVASES = {
    "prompt": [3, 1, 4, 1, 5, _, _, _, _, _, _, _, _],
    "scattered": [2, _, _, 7, _, 1, 8, 2, 8, 1, _, 4, _, _, 9],
}
KINDS = {
    "full": dict(), "full shifted": dict(logit_shift=True, qk_norm=False, qkv_bias=True),
    "blocks": dict(block_size=4), "blocks shifted": dict(block_size=4, logit_shift=True, tied=False),
}  # fmt: skip
CHOICES = {
    "seqd": (Sampler(carry="none"), Residual()),
    "rcd": (Sampler(), Residual()),
    "threshold": (Sampler(rule="threshold", threshold=0.5), Residual()),
    "threshold, seqd": (Sampler(rule="threshold", threshold=0.7, carry="none"), Residual()),
    "warm": (Sampler(rule="threshold", threshold=0.6, start="warm"), Residual()),
    "t_res": (Sampler(start="warm"), Residual(t_res=0.7)),
    "other blocks": (Sampler(block_size=3), Residual()),  # than the model's own
}  # fmt: skip


@torch.no_grad()
def follows_algorithm_2(tiny, kind: str, s: Sampler, r: Residual) -> None:
    options = KINDS[kind] | ({"block_size": 3} if s.block_size and "blocks" in kind else {})
    model, reference = tiny(seed=24, **options), tiny(seed=44, d_model=8, n_layer=1, **options)
    steps, drawn = [], set()
    for canvas in CANVASES.values():
        expected, margin = algorithm_2(model, canvas, s, r, reference)
        assert margin > CLOSE  # or choose another seed
        same(drain(model, torch.tensor([canvas]), s, r, reference=reference), expected)
        steps.append(len(expected))
        drawn |= {token for token, given_ in zip(expected[-1][0], canvas) if given_ == MASK}
    assert max(steps) > 2 and len(drawn) > 2  # not all at once, not all the same


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("kind", KINDS)
def test_algorithm_2(tiny, kind, choice):
    follows_algorithm_2(tiny, kind, *CHOICES[choice])


BUDGETS = [  # kind, steps, the steps of each block
    # Blocks of 4 over "prompt": 5 prompt tokens leave 3 + 4 + 1 masks. From the first mask on: 4 + 4.
    ("blocks", 5, [2, 2, 1]), ("blocks", 3, [1, 1, 1]), ("blocks", 8, [3, 4, 1]), ("blocks", 99, [3, 4, 1]),
    ("full", 5, [2, 3]), ("full", 2, [1, 1]), ("full", 6, [3, 3]),
]  # fmt: skip


@torch.no_grad()
def follows_a_budget(tiny, kind: str, s: Sampler, shares: list[int]) -> None:
    model = tiny(seed=3, **KINDS[kind])
    got = drain(model, torch.tensor([CANVASES["prompt"]]), s)
    expected, margin = algorithm_2(model, CANVASES["prompt"], s, Residual(), shares=shares)
    assert margin > CLOSE
    same(got, expected)
    assert got[-1].nfe.item() <= s.steps
    if s.rule not in ("threshold", "entropy-bounded"):  # these may be quicker
        assert got[-1].nfe.item() == min(s.steps, 8)


@pytest.mark.parametrize("rule", ["static", "threshold"])
@pytest.mark.parametrize("kind, steps, shares", BUDGETS)
def test_algorithm_2_on_a_step_budget(tiny, rule, kind, steps, shares):
    follows_a_budget(tiny, kind, Sampler(rule=rule, steps=steps, block_size=4, threshold=0.7), shares)


@torch.no_grad()
def rows_are_independent(tiny, kind: str, s: Sampler, r: Residual, block_sizes: tuple[int, ...]) -> None:
    """Rows of every length and fill, in some order, each as the transcription does it by itself. Lengths are
    below, at and above one, two and three blocks of 4. End tokens come by chance."""
    g = torch.Generator().manual_seed(7)
    rows = []
    for n in (1, 3, 4, 5, 8, 11, 15):
        row = torch.randint(MASK, (n,), generator=g)
        row[torch.rand(n, generator=g) < 0.6] = MASK
        row[0] = 2  # a shifted model is given its first token
        rows.append(row.tolist())
    rows += [[1] + [_] * 8, [1, 2, 3, 4] + [_] * 8, [1] * 9, [1] * 9 + [_]]
    lengths = torch.tensor([len(row) for row in rows])
    canvas = torch.full((len(rows), int(lengths.max())), MASK)  # what follows a row's end may be anything
    for i, row in enumerate(rows):
        canvas[i, : len(row)] = torch.tensor(row)
    endings = compared = runs = 0
    model = tiny(seed=4, eos_ids=(3, 7), pad_id=9, **KINDS[kind])
    reference = tiny(seed=5, n_layer=1, **KINDS[kind])
    for block_size in block_sizes:
        s = replace(s, block_size=block_size)
        order = torch.randperm(len(rows), generator=g).tolist()
        runs += len(rows)
        steps = drain(model, canvas[order], s, r, lengths=lengths[order], reference=reference)
        for i, j in enumerate(order):
            expected, margin = algorithm_2(model, rows[j], s, r, reference)
            if margin < CLOSE:
                continue
            compared += 1
            final = expected[-1][0] if expected else rows[j]
            assert steps[-1].tokens[i, : len(rows[j])].tolist() == final
            assert (steps[-1].tokens[i, len(rows[j]) :] == 9).all()
            assert steps[-1].nfe[i].item() == (expected[-1][4] if expected else 0)
            seen = [step for step in steps if step.committed[i].any()]
            committed = [step.committed[i].nonzero()[:, 0].tolist() for step in seen]
            assert committed == [record[1] for record in expected]
            for step, (_tokens, _committed, _confidence, alpha, nfe) in zip(seen, expected):
                assert step.nfe[i].item() == nfe
                alpha = [alpha.get(k, 0) for k in range(canvas.shape[1])]
                assert step.alpha[i].tolist() == pytest.approx(alpha, abs=5e-4)
            endings += 9 in final
    assert endings > 0 and compared > 0.8 * runs


@pytest.mark.parametrize("choice", ["rcd", "threshold, seqd", "warm"])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_independent(tiny, kind, choice):
    rows_are_independent(tiny, kind, *CHOICES[choice], (0,) if "blocks" in kind else (0, 4))


@settings(max_examples=30)
@given(st.data())
@torch.no_grad()
def test_the_cache_changes_nothing(tiny, data):
    """Prompts of many lengths against the block, given cells anywhere, whole given blocks in the middle."""
    b = data.draw(st.integers(1, 6), "block")
    shift = data.draw(st.booleans(), "shift")
    cell = st.one_of(st.just(MASK), st.just(MASK), st.integers(0, MASK - 1))
    row = st.lists(cell, min_size=1, max_size=18).map(lambda row: [1] + row)
    rows = data.draw(st.lists(row, min_size=1, max_size=3), "rows")
    model = tiny(seed=6, block_size=b, logit_shift=shift, n_layer=2)
    s = Sampler(rule="threshold", threshold=0.6)
    lengths = torch.tensor([len(row) for row in rows])
    canvas = torch.full((len(rows), int(lengths.max())), 5)
    for i, row in enumerate(rows):
        canvas[i, : len(row)] = torch.tensor(row)
    steps = drain(model, canvas, s, lengths=lengths)
    for i, row in enumerate(rows):
        expected, margin = algorithm_2(model, row, s, Residual())
        if expected and margin > CLOSE:
            assert steps[-1].tokens[i, : len(row)].tolist() == expected[-1][0]
            assert steps[-1].nfe[i].item() == expected[-1][4]
            last = [step for step in steps if step.committed[i].any()][-1].confidence[i, : len(row)].tolist()
            assert last == pytest.approx([expected[-1][2].get(k, 0) for k in range(len(row))], abs=5e-4)


@torch.no_grad()
def test_a_cached_forward_reads_no_more_than_the_open_blocks(tiny):
    """The prompt costs no forward of its own. A finished block is read once more, with the next block's first
    step, and never again."""
    model, widths = tiny(seed=1, block_size=4), []
    model.register_forward_pre_hook(lambda _model, inputs: widths.append(inputs[0].shape[1]))
    drain(model, torch.tensor([[1] * 9 + [_] * 11]), Sampler(steps=7))  # blocks of 3 + 4 + 4 masks
    assert widths[0] == 12 and widths.count(8) == 2 and widths.count(4) == 4 and len(widths) == 7


def work_does_not_grow(tiny, kind: str, s: Sampler, monkeypatch) -> None:
    """Tokens through the layers and rows through the head, per forward: the block's, however long the canvas.
    The forwards are the NFE. A bidirectional model with a dual cache reads everything once a block."""
    model, b = tiny(seed=1, max_len=200, **KINDS[kind]), 4
    head, seen = Transformer.logits, []
    model.register_forward_pre_hook(lambda _m, inputs: seen.append([inputs[0].shape[0] * inputs[0].shape[1]]))
    count = lambda m, hidden: (seen[-1].append(len(hidden)), head(m, hidden))[1]  # noqa: E731
    monkeypatch.setattr(Transformer, "logits", count)
    for n in (6, 12, 40):  # blocks
        seen.clear()
        steps = drain(model, torch.tensor([[_] * (n * b)]), replace(s, block_size=b, steps=2 * n))
        assert len(steps) == len(seen) == steps[-1].nfe.item() == 2 * n
        assert [rows for _tokens, rows in seen] == [4, 2] * n
        first, later = [tokens for tokens, _rows in seen[::2]], [tokens for tokens, _rows in seen[1::2]]
        assert later == [b] * n and first == ([b] + [2 * b] * (n - 1) if kind == "blocks" else [n * b] * n)


def test_work_does_not_grow_with_the_canvas(tiny, monkeypatch):
    work_does_not_grow(tiny, "blocks", Sampler(), monkeypatch)


def host_waits_once_a_step(tiny, kind: str, s: Sampler, r: Residual, monkeypatch) -> None:
    """On a device that holds no numbers, whatever asks for one raises: nonzero(), unique(), bool(), tolist(),
    a boolean index. Token and confidence are brought over, for some rules a score of the logits, and nothing
    else. Their numbers come from here."""
    model, reference = (tiny(n_layer=1, **KINDS[kind]).to("meta") for _i in range(2))
    asked, g, cpu, to = [], torch.Generator().manual_seed(0), torch.Tensor.cpu, torch.Tensor.to

    def numbers(x):
        asked.append(x)
        if x.dtype == torch.long:
            return torch.randint(MASK, x.shape, generator=g)
        return torch.rand(x.shape, generator=g)

    def moved(x, *where, **how):
        return numbers(x) if x.is_meta and torch.device("cpu") in where else to(x, *where, **how)

    monkeypatch.setattr(torch.Tensor, "cpu", lambda x: numbers(x) if x.is_meta else cpu(x))
    monkeypatch.setattr(torch.Tensor, "to", moved)
    rows = [CANVASES["prompt"][:10], CANVASES["scattered"][:10]]
    steps = drain(model, torch.tensor(rows), s, r, reference=reference, lengths=torch.tensor([10, 7]))
    of_a_step = 3 if s.rule in ("entropy-bounded", "margin") else 2
    assert len(steps) > 2 and len(asked) == of_a_step * len(steps) and not (steps[-1].tokens == MASK).any()


@pytest.mark.parametrize("s, r", [
    (Sampler(), Residual()),
    (Sampler(rule="threshold", start="warm"), Residual(t_res=0.8, weight="confidence")),
])  # fmt: skip
@pytest.mark.parametrize("kind", ["full shifted", "blocks shifted"])
def test_the_host_waits_once_a_step(tiny, kind, s, r, monkeypatch):
    host_waits_once_a_step(tiny, kind, s, r, monkeypatch)


@torch.no_grad()
def positions_are_written_once(tiny, block_size: int, s: Sampler, monkeypatch) -> None:
    """By one forward. Rows whose windows differ in width are padded on the left: that goes to position -1."""
    seen, plain = [], rcd.KVCache.update
    update = lambda cache, *new: (seen.append(cache.positions), plain(cache, *new))[1]  # noqa: E731
    monkeypatch.setattr(rcd.KVCache, "update", update)
    model, canvas = tiny(logit_shift=True, block_size=block_size), [[1] * 9 + [_] * 3, [1] + [_] * 11]
    drain(model, torch.tensor(canvas), s)
    assert any((at < 0).any() for at in seen)
    for row in [row for at in seen for row in at]:
        real = row[row >= 0]
        assert len(real) == len(real.unique()) and (row >= -1).all()


def test_a_position_is_written_once_by_a_forward(tiny, monkeypatch):
    positions_are_written_once(tiny, 4, Sampler(), monkeypatch)


@pytest.mark.parametrize("options", [dict(), dict(block_size=4)])
@torch.no_grad()
def test_reference_of_another_kind(tiny, options):
    """Full attention for a block-causal target and the other way round: each reads as it was trained."""
    model, reference = tiny(seed=1, **options), tiny(seed=2, block_size=0 if options else 4)
    s = Sampler(start="warm", block_size=4)
    canvas = [5, 1, 2, 3] + [_] * 8
    steps = drain(model, torch.tensor([canvas]), s, reference=reference)
    [first] = forward(reference, [canvas], {}, 8)  # what the reference says of the first block
    E = model.embedding.double()
    p = first[4:8].softmax(-1)
    soft = {}
    for i in range(4):
        alpha = -(p[i][p[i] > 0].log() * p[i][p[i] > 0]).sum() / math.log(12)
        soft[4 + i] = ((1 - alpha) * E[MASK] + alpha * p[i] @ E).float()
    confidence = forward(model, [canvas], soft, 8)[0, 4:8].softmax(-1).amax(-1)
    assert steps[0].confidence[0, 4:8].tolist() == pytest.approx(confidence.tolist(), abs=1e-4)
    assert steps[-1].nfe.tolist() == [8 + 2]


# ---- What holds for everything


@st.composite
def runs(draw):
    """A random model, canvas, lengths and choice of everything."""
    kind = draw(st.sampled_from(sorted(KINDS)))
    options = KINDS[kind] | dict(
        real_vocab=draw(st.sampled_from([0, 9])),
        eos_ids=draw(st.sampled_from([(), (3,), (3, 5, 7)])),
        pad_id=2,
    )
    cell = st.one_of(st.just(MASK), st.just(MASK), st.integers(0, 8))
    row = st.lists(cell, min_size=1, max_size=12).map(lambda row: [1] + row)
    rows = draw(st.lists(row, min_size=1, max_size=3))
    rule = draw(st.sampled_from(sorted(set(RULES) - set(rivals.RULES))))
    # At least as many blocks as any counting gives.
    blocks = [len({k // 4 for k, token in enumerate(row) if token == MASK}) for row in rows]
    steps = draw(st.one_of(st.just(0), st.integers(max(*blocks, 1) + 1, 14)))
    s = Decoding(
        rule=rule, steps=steps, threshold=draw(st.floats(0, 1)), entropy_bound=draw(st.floats(0, 3)),
        block_size=0 if "blocks" in kind else draw(st.sampled_from([0, 4])),
        carry=draw(st.sampled_from(["residual", "none"])), start=draw(st.sampled_from(Decoding.starts)),
        temperature=draw(st.sampled_from([0.0, 1e-3, 0.7, 1.0, 5.0])),
        top_k=draw(st.sampled_from([0, 1, 3, 50])), top_p=draw(st.sampled_from([1.0, 0.9, 0.3, 1e-6])),
        guidance=draw(st.sampled_from([0.0, 0.0, 0.7])),
        self_passes=draw(st.sampled_from([1, 1, 3])),
        sub_block=0 if steps else draw(st.sampled_from([0, 0, 3])),
        cache="exact" if "blocks" in kind else draw(st.sampled_from(["exact", "prefix", "dual"])),
    )  # fmt: skip
    weight, t_res = draw(st.sampled_from([*WEIGHTS, "top-1"])), draw(st.sampled_from([0.5, 1.0, 2.0]))
    r = Carry(weight, 0.3, t_res, draw(st.booleans()), residual_top_k=draw(st.sampled_from([0, 0, 3])))
    return options, rows, s, r, draw(st.integers(0, 5))


@settings(max_examples=50)
@given(runs())
@torch.no_grad()
def test_invariants(tiny, run):
    options, rows, s, r, seed = run
    model, reference = tiny(seed=seed, **options), tiny(seed=seed + 1, n_layer=1, **options)
    lengths = torch.tensor([len(row) for row in rows])
    canvas = torch.full((len(rows), int(lengths.max())), MASK)
    for i, row in enumerate(rows):
        canvas[i, : len(row)] = torch.tensor(row)
    original = canvas.clone()
    inside = torch.arange(canvas.shape[1]) < lengths[:, None]
    fill = inside & (canvas == MASK)

    passed = torch.zeros(1, dtype=torch.long)  # rows that went through a forward of either model
    plain = Transformer.forward

    def counting(self, x, *rest):
        passed.add_(len(x))
        return plain(self, x, *rest)

    g = torch.Generator().manual_seed(seed)
    before, done, tokens = torch.zeros_like(fill), [], torch.where(inside, canvas, 2)
    nfe = torch.zeros(len(rows), dtype=torch.long)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Transformer, "forward", counting)
        run = denoise(model, canvas, s, r, lengths=lengths, reference=reference, generator=g)
        for step in itertools.islice(run, 100):
            done.append(step)
            fixed = step.committed
            assert not (fixed & (before | ~fill)).any()  # only what was masked, only once
            assert (tokens[fixed] == MASK).all() and (step.tokens[fixed] != MASK).all()
            assert (step.tokens[fixed] < (options["real_vocab"] or MASK)).all()  # padded rows are never drawn
            before = before | fixed
            # Given tokens and padding never change, nor do committed ones.
            assert torch.equal(step.tokens[~fill], torch.where(inside, original, 2)[~fill])
            assert torch.equal(step.tokens[before & ~fixed], tokens[before & ~fixed])
            looked = step.confidence > 0
            assert not (fixed & ~looked).any() and not (looked & (~fill | (before & ~fixed))).any()
            assert (step.confidence <= 1 + 1e-6).all()
            assert ((step.alpha >= 0) & (step.alpha <= 1 + 1e-6)).all()
            carrying = (step.tokens == MASK) & looked  # only what is masked and was read carries anything
            assert not (step.alpha > 0)[~carrying].any()
            if s.carry == "none":
                assert not step.alpha.any()
            working = looked.any(1)
            assert torch.equal(working, fixed.any(1))  # at least one of every row that paid
            spent = step.nfe - nfe
            assert (spent[~working] == 0).all()  # a row that is done costs nothing more
            cost = 2 if s.guidance else 1
            opening = s.carry == "residual" and {"warm": 1, "self": s.self_passes * cost}.get(s.start, 0)
            assert all(spend in (cost, cost + opening) for spend in spent[working].tolist())
            nfe, tokens = step.nfe, step.tokens
    assert torch.equal(canvas, original)  # the caller's tensor is the caller's
    assert int(nfe.sum()) == int(passed)  # every forward of every row is counted, and none is wasted
    if not fill.any():
        assert not done
        return
    final = done[-1].tokens
    assert not (final == MASK).any()
    skipped = fill & ~before
    assert (final[skipped] == 2).all()
    for i in range(len(rows)):
        ends = [k for k in range(int(lengths[i])) if before[i, k] and int(final[i, k]) in options["eos_ids"]]
        # Only behind an end are masks left unfilled.
        assert not skipped[i].any() or (ends and skipped[i].nonzero().min() > ends[0])
        if s.steps and not (s.carry == "residual" and s.start in ("warm", "self")):
            assert int(nfe[i]) <= s.steps * (2 if s.guidance else 1)
    if seed > 2:
        return
    g = torch.Generator().manual_seed(seed)  # the seed decides
    again = drain(model, canvas, s, r, lengths=lengths, reference=reference, generator=g)
    assert all(torch.equal(a, b) for x, y in zip(done, again) for a, b in zip(x[1:], y[1:]))


@pytest.mark.parametrize("how", ["weights", "autocast"])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_half_precision(tiny, kind, how):
    model, reference = tiny(seed=1, **KINDS[kind]), tiny(seed=2, **KINDS[kind])
    if how == "weights":
        model, reference = model.bfloat16(), reference.bfloat16()
    canvas = torch.tensor([CANVASES["prompt"], CANVASES["scattered"][:13]])
    drawn = Decoding(start="dirichlet", rule="entropy-bounded", temperature=0.7, top_p=0.9, guidance=0.5)
    for s in (Sampler(start="warm"), drawn):
        with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
            steps = drain(model, canvas, s, reference=reference, generator=torch.Generator().manual_seed(0))
        assert not (steps[-1].tokens == MASK).any()
        assert torch.equal(steps[-1].tokens[canvas != MASK], canvas[canvas != MASK])
        assert all(step.confidence.dtype == step.alpha.dtype == torch.float32 for step in steps)
        assert all(bool(step.alpha.isfinite().all()) and step.confidence.max() <= 1 for step in steps)


@settings(max_examples=300)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=6), st.integers(0, 40))
@example([1, 9, 9], 3)  # a share below one half
@example([9, 9, 1], 3)
@example([4, 4, 4], 6)
def test_step_budget(masks, steps):
    blocks = sum(m > 0 for m in masks)
    if 0 < steps < blocks:
        with pytest.raises(ValueError, match=f"steps={steps} is fewer than the {blocks} blocks"):
            rcd.step_budget(masks, steps)
        return
    shares = rcd.step_budget(masks, steps)
    total = sum(masks)
    assert sum(shares) == min(steps or total, total)
    assert all(min(1, m) <= share <= m for m, share in zip(masks, shares))
    if steps and len(set(masks)) == 1 and masks[0] and steps % blocks == 0 and steps <= total:
        assert shares == [steps // blocks] * blocks  # what LLaDA asks for: equal blocks, equal steps
    # In proportion, to the nearest step or the one after it.
    if 0 < steps <= total and all(steps * m >= total for m in masks):
        assert all(abs(share - steps * m / total) < 1.5 for m, share in zip(masks, shares))


# ---- The draw


def logits_of(p: list[float], rows: int = 1) -> torch.Tensor:
    return torch.tensor([p]).log().repeat(rows, 1)


P = [0.05, 0.4, 0.0, 0.25, 0.1, 0.2]


def frequencies(s: Sampler, n: int = 20_000) -> torch.Tensor:
    token, confidence = rcd.predict(logits_of(P, n), s, torch.Generator().manual_seed(0))
    torch.testing.assert_close(confidence, torch.tensor(P)[token])  # untempered, unfiltered
    return torch.bincount(token, minlength=6) / n


def test_greedy_tokens_and_their_confidence(monkeypatch):
    monkeypatch.setattr(rcd, "TILE", 8)
    z = torch.cat([logits_of(P), logits_of([0.5, 0.5, 0, 0, 0, 0]), logits_of([0, 0, 0, 0, 0, 1.0])])
    token, confidence = rcd.predict(z, Sampler(), None)
    assert token.tolist() in ([1, 0, 5], [1, 1, 5]) and confidence.tolist() == pytest.approx([0.4, 0.5, 1])


@pytest.mark.parametrize("chunk", [1 << 25, 600])
@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
def test_frequencies_are_the_tempered_distribution(temperature, chunk, monkeypatch):
    monkeypatch.setattr(rcd, "TILE", chunk)
    n = 20_000
    expected = torch.tensor([p ** (1 / temperature) for p in P])
    expected /= expected.sum()
    seen = frequencies(Sampler(temperature=temperature), n)
    assert seen[2] == 0  # what has no probability is never drawn
    chi2 = ((seen - expected)[expected > 0].square() / expected[expected > 0]).sum() * n
    assert chi2 < 18.5  # the 0.1 % point at 4 degrees of freedom


# ---- The commit rules


def choose(s: Sampler, cells: list, confidence, quota: list, logits=None, generator=None) -> list[bool]:
    """What the rule of s commits: a bool for each cell (row, column)."""
    row, column = torch.tensor(cells).unbind(1)
    c = Candidates(row, column, confidence, torch.tensor(quota), logits, generator)
    return RULES[s.rule](c, s).tolist()


def test_a_threshold_is_strict_and_the_best_cell_goes_always():
    cells, confidence = [(0, 0), (0, 1), (0, 2)], torch.tensor([0.5, 0.75, 1.0])
    for threshold, expected in ((0.5, [False, True, True]), (0.75, [False, False, True]),
                                (1.0, [False, False, True])):  # fmt: skip
        assert choose(Sampler(rule="threshold", threshold=threshold), cells, confidence, [1]) == expected


# ---- Models with a plan


class Scripted(Transformer):
    """Predicts what its script says for a position, whatever it reads."""

    def __init__(self, script: list[int], **options):
        size = dict(vocab_size=12, mask_id=MASK, d_model=12, n_layer=1, d_ff=4, tied=False, max_len=64)
        super().__init__(rcd.Config(**{**size, **options}))
        self.lm_head.weight.data = torch.eye(12)
        self.table = 9.0 * self.lm_head.weight.data[script]  # (T, D): hidden states that are the logits
        self.reads = 0

    def forward(self, x, positions, mask=None, cache=None):
        self.reads += len(x)
        return self.table[positions].expand(len(x), -1, -1)


SCRIPT = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10] * 2


@pytest.mark.parametrize("options, block", [(dict(block_size=4), 0), (dict(), 4)])
@pytest.mark.parametrize("steps, per_block", [(0, 4), (4, 2)])
def test_an_end_token_ends_its_row_at_its_blocks_end(options, block, steps, per_block):
    """7 and 3 are ends. Row 0 draws 7 at position 6, row 1 draws none, row 2 was *given* both, row 3 draws 3
    at position 2."""
    model = Scripted(SCRIPT[:12], eos_ids=(7, 3), pad_id=0, **options)
    rows = [
        [1, 2, 9, 4, _, _, _, _, _, _, _, _],
        [1, 2, 9, 4, _, _, 5, 5, _, _, _, _],
        [1, 2, 3, 4, _, _, 7, _, _, _, _, _],
        [1, 2, _, _, _, _, _, _, _, _, _, _],  # blocks of a bidirectional model begin at the first mask
    ]
    expected = [
        [1, 2, 9, 4, 5, 6, 7, 8, 0, 0, 0, 0],  # the block is finished, what follows is padding
        [1, 2, 9, 4, 5, 6, 5, 5, 9, 10, 1, 2],
        [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 1, 2],  # a given end is part of the question
        [1, 2, 3, 4, 0, 0, 0, 0, 0, 0, 0, 0] if options else [1, 2, 3, 4, 5, 6, 0, 0, 0, 0, 0, 0],
    ]
    s = Sampler(block_size=block, steps=steps)
    last = drain(model, torch.tensor(rows), s)[-1]
    assert last.tokens.tolist() == expected
    assert last.nfe[0] == per_block  # nothing more
    assert model.reads == int(last.nfe.sum())
    for row, tokens, nfe in zip(rows, expected, last.nfe.tolist()):
        last = drain(model, torch.tensor([row]), s)[-1]
        assert last.tokens[0].tolist() == tokens and last.nfe.tolist() == [nfe]


def test_responses_are_cut_at_the_first_end():
    model = Scripted(SCRIPT, eos_ids=(7, 9), block_size=4)
    responses, nfe = generate(model, [[1, 1, 1], [1, 1, 1, 1, 1, 1, 1], [7, 1], [1] * 16], 6)
    assert responses[0] == [4, 5, 6]  # 3 prompt tokens; 7 at position 6
    assert responses[1] == [8]  # 9 at position 8, in the second block that it opened
    assert responses[2] == [3, 4, 5, 6]
    assert responses[3] == []  # an end at once is an empty response
    assert nfe == [1 + 4, 1 + 4, 2 + 4, 4]
    model = Scripted(SCRIPT)
    assert generate(model, [[1, 1], [3, 3, 3, 3]], 3) == ([[3, 4, 5], [5, 6, 7]], [3, 3])


def test_block_causal_canvases_are_whole_blocks():
    model = Scripted(SCRIPT, block_size=4)
    responses, nfe = generate(model, [[1, 1], [3, 3, 3, 3], [1, 1, 1]], 3)
    assert [len(r) for r in responses] == [6, 4, 5] and nfe == [6, 4, 5]
    canvas, lengths = rcd.canvas_for(model.config, [[5], [6] * 9], 3)
    assert lengths.tolist() == [4, 12] and canvas.shape == (2, 12) and canvas[1].tolist() == [6] * 9 + [_] * 3
    assert canvas[0, :4].tolist() == [5, _, _, _]
    canvas, lengths = rcd.canvas_for(model.config, [[5], [6] * 9], 3, block_size=5)
    assert lengths.tolist() == [5, 15]
    canvas, lengths = rcd.canvas_for(Scripted(SCRIPT).config, [[5], [6] * 9], 3, block_size=5)
    assert lengths.tolist() == [4, 12]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("block_size", [0, 3])
def test_a_model_that_always_prefers_the_mask_fills_everything(tiny, block_size, temperature):
    model = tiny(seed=1, tied=False, block_size=block_size, real_vocab=10)
    with torch.no_grad():
        for layer in model.layers:  # hidden = norm(embedding), whose first number is always large
            layer.self_attn.o_proj.weight.zero_(), layer.mlp.down_proj.weight.zero_()
        model.embed_tokens.weight[:, 0] = 20
        model.norm.weight.fill_(1)
        model.lm_head.weight[MASK], model.lm_head.weight[10] = 0, 0
        model.lm_head.weight[MASK, 0] = 100
        model.lm_head.weight[10, 0] = 90  # a padded row of the table comes second
        h = model(model.embed_tokens(torch.tensor([[3, _, 4, _]])), torch.arange(4)[None])
        assert ((h @ model.head.T).argsort(-1, descending=True)[..., :2] == torch.tensor([MASK, 10])).all()
    for s in (
        Sampler(),
        Decoding(rule="threshold", threshold=0.5, guidance=0.5),
        Decoding(start="self", steps=5),
        Decoding(start="dirichlet", top_k=3),
    ):
        s = replace(s, temperature=temperature)
        canvas, generator = torch.tensor([[3, _, 4, _, _, _, _, 2, _]]), torch.Generator().manual_seed(0)
        *_x, last = denoise(model, canvas, s, generator=generator)
        assert (last.tokens < 10).all()


def test_nothing_to_fill_yields_nothing(tiny):
    for options in KINDS.values():
        model = tiny(**options)
        assert drain(model, torch.tensor([[1, 2, 3], [4, 5, 6]])) == []
        padded = torch.tensor([[1, 2, _], [4, 5, _]])
        assert drain(model, padded, lengths=torch.tensor([2, 2])) == []  # padding is not to be filled
        assert drain(model, torch.tensor([[1, 2, 3]]), Decoding(steps=4, start="self")) == []
        steps = drain(model, torch.tensor([[1, 2, 3], [4, _, 6]]))
        assert len(steps) == 1 and steps[0].nfe.tolist() == [0, 1]


@pytest.mark.parametrize("kind", KINDS)
def test_generate_is_denoise(tiny, kind):
    model = tiny(seed=2, eos_ids=(4,), **KINDS[kind])
    prompts = [[1, 2, 3], [5], [6, 7, 8, 9, 10, 0, 1]]
    s = Sampler(rule="threshold", threshold=0.4, block_size=0 if "blocks" in kind else 3)
    responses, nfe = generate(model, prompts, 7, s)
    for prompt, response, n in zip(prompts, responses, nfe):
        length = len(prompt) + 7
        length = -(-length // 4) * 4 if "blocks" in kind else length
        with torch.no_grad():
            expected, margin = algorithm_2(model, prompt + [_] * (length - len(prompt)), s, Residual())
        assert margin > CLOSE
        row = expected[-1][0][len(prompt) :]
        assert response == list(itertools.takewhile(lambda token: token != 4, row)) and n == expected[-1][4]


def test_a_record_is_a_snapshot(tiny):
    steps = drain(tiny(seed=1), torch.tensor([CANVASES["prompt"]]))
    assert [int((step.tokens == MASK).sum()) for step in steps] == list(range(7, -1, -1))
    assert [step.nfe.item() for step in steps] == list(range(1, 9))
    steps = drain(tiny(seed=1, block_size=4), torch.tensor([CANVASES["prompt"]]))
    assert [step.block for step in steps] == [0] * 3 + [1] * 4 + [2]


# ---- Mistakes


@pytest.mark.parametrize("options, says", [
    (dict(rule="best"), "rule='best': choose from static, threshold"),
    (dict(carry="all"), "carry='all': choose from residual, none"),
    (dict(start="hot"), "start='hot': choose from cold, warm"),
    (dict(temperature=-1.0), "temperature=-1.0 must be finite and not negative"),
    (dict(block_size=-1), "block_size=-1 must be finite and not negative"),
    (dict(steps=math.inf), "steps=inf must be finite and not negative"),
])  # fmt: skip
@pytest.mark.parametrize("kind", [Sampler, Decoding])
def test_bad_choices(kind, options, says):
    with pytest.raises(ValueError, match=says) as error:
        kind(**options)
    assert "\n" not in str(error.value)


def test_what_does_not_fit_the_model(tiny):
    def refused(says, model, canvas, s=None, **more):
        with pytest.raises(ValueError, match=says) as error:
            next(denoise(model, torch.tensor(canvas), s or Sampler(), **more))
        assert "\n" not in str(error.value)

    refused("max_len=8", tiny(max_len=8), [[_] * 9])
    refused("max_len=8", tiny(), [[_] * 9], Sampler(start="warm"), reference=tiny(max_len=8))
    refused("start=warm needs the reference", tiny(), [[_] * 9], Sampler(start="warm"))
    refused("steps=2 is fewer than the 3 blocks", tiny(block_size=3), [[_] * 9], Sampler(steps=2))
    refused("first token", tiny(logit_shift=True), [[1, 2], [_, 2]])
    for other in (tiny(vocab_size=13), tiny(mask_id=5)):  # they must share a tokenizer
        refused("reference", tiny(), [[_] * 9], Sampler(start="warm"), reference=other)
    refused("a canvas is ids", tiny(), [_] * 9)
    refused("a canvas is ids", tiny(), [[float(_)] * 9])
    refused("a canvas is ids", tiny(), [[]])
    refused("lengths", tiny(block_size=4), [[_] * 9], lengths=torch.tensor([10]))
    with pytest.raises(ValueError, match="0 prompts"):
        generate(tiny(), [], 3)
    next(denoise(tiny(), torch.tensor([[_] * 9]), Sampler(start="warm", carry="none")))  # nothing to warm
    with pytest.raises(ValueError, match="max_new=0"):
        generate(tiny(), [[1]], 0)
    with pytest.raises(ValueError, match="mask token"):
        generate(tiny(), [[1], [1, MASK]], 3)
