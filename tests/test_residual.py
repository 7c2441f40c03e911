"""Equations 1 to 3 against numbers worked out by hand and against plain Python loops."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import rcd
import zoo
from rcd import WEIGHTS, Residual, mix
from zoo.decoding import Carry, carry_options, likeliest

INF = math.inf

# A vocabulary of four, D = 2. E[3] is [MASK].
E = torch.tensor([[4.0, 0.0], [0.0, 8.0], [-4.0, 4.0], [1.0, -1.0]])
# p = (1/2, 1/4, 1/4, 0):  H = 1/2 ln 2 + 2 * 1/4 ln 4 = 3/2 ln 2,  ln V = 2 ln 2,  alpha = 3/4
#                          Delta = (2, 0) + (0, 2) + (-1, 1) = (1, 3)
#                          e = 1/4 (1, -1) + 3/4 (1, 3) = (1, 2)
FEWER = {}, {"residual_top_k": 2}, {"residual_epsilon": 0.3}
HALVES = torch.tensor([[math.log(2), 0.0, 0.0, -INF]])


def test_equations_by_hand():
    alpha, delta = Residual()(HALVES, E)
    torch.testing.assert_close(alpha, torch.tensor([0.75]))
    torch.testing.assert_close(delta, torch.tensor([[1.0, 3.0]]))
    x = torch.zeros(2, 3, 2)
    mixed = mix(x, (torch.tensor([1]), torch.tensor([2])), alpha, delta, E[3])
    torch.testing.assert_close(mixed[1, 2], torch.tensor([1.0, 2.0]))
    mixed[1, 2] = 0
    assert not mixed.any() and not x.any()  # no other cell, and not in place


# At T_res = 1/2 p is squared and normalised: (4, 1, 1, 0) / 6.
#     H = 2/3 ln(3/2) + 2 * 1/6 ln 6 = ln 6 - 2/3 ln 4 = 0.8675632;  alpha = 0.8675632 / 1.3862944 = 0.6258145
#     Delta with that p: (16/6, 0) + (0, 8/6) + (-4/6, 4/6) = (2, 2)
@pytest.mark.parametrize("options, alpha, delta", [
    (dict(), 0.75, (1, 3)),
    (dict(weight="1-entropy"), 0.25, (1, 3)),
    (dict(weight="confidence"), 0.5, (1, 3)),
    (dict(weight="1-confidence"), 0.5, (1, 3)),
    (dict(weight="fixed"), 0.3, (1, 3)),
    (dict(weight="fixed", fixed=0.7), 0.7, (1, 3)),
    (dict(weight="one"), 1.0, (1, 3)),
    (dict(weight="top-1"), 1.0, (4, 0)),
    (dict(t_res=0.5), 0.6258145, (1, 3)),
    (dict(t_res=0.5, temper_delta=True), 0.6258145, (2, 2)),
    (dict(t_res=0.5, weight="1-entropy"), 1 - 0.6258145, (1, 3)),
    (dict(t_res=0.5, weight="confidence"), 4 / 6, (1, 3)),
    (dict(t_res=0.5, weight="1-confidence", temper_delta=True), 2 / 6, (2, 2)),
    (dict(t_res=0.5, weight="one", temper_delta=True), 1.0, (2, 2)),
    (dict(temper_delta=True), 0.75, (1, 3)),
])  # fmt: skip
def test_every_weight_by_hand(options, alpha, delta):
    of_the_method = {"weight", "fixed", "t_res"}.issuperset(options)
    of_the_method &= options.get("weight", "entropy") in ("entropy", "confidence", "fixed")
    for kind in (Residual, Carry) if of_the_method else (Carry,):
        a, d = kind(**options)(HALVES, E)
        assert a.item() == pytest.approx(alpha, abs=1e-6)
        assert d[0].tolist() == pytest.approx(delta, abs=1e-6)


def test_a_weight_with_a_delta_of_its_own_is_none_of_the_method():
    """top-1 is no p.E: rcd.Residual does not take it, whoever has imported zoo."""
    with pytest.raises(ValueError, match="weight='top-1': choose from"):
        Residual(weight="top-1")


def by_loops(logits: list[float], table: list[list[float]], r: Carry) -> tuple[float, list[float]]:
    """One position, one number at a time."""

    def softmax(temperature):
        top = max(logits)
        weights = [math.exp((z - top) / temperature) for z in logits]
        return [w / sum(weights) for w in weights]

    p, tempered = softmax(1.0), softmax(r.t_res)
    entropy = 0.0
    for q in tempered:
        if q > 0:
            entropy -= q * math.log(q)
    entropy /= math.log(len(logits))
    alpha = {"entropy": entropy, "1-entropy": 1 - entropy, "fixed": r.fixed, "one": 1.0, "top-1": 1.0,
             "confidence": max(tempered), "1-confidence": 1 - max(tempered)}[r.weight]  # fmt: skip
    if r.temper_delta:
        p = tempered
    if r.weight == "top-1":
        p = [float(j == p.index(max(p))) for j in range(len(p))]
    delta = [0.0] * len(table[0])
    for j, q in enumerate(p):
        for d in range(len(delta)):
            delta[d] += q * table[j][d]
    return alpha, delta


# Rows at a time: all, one (never less), two, and tiles of one in chunks of four.
@pytest.mark.parametrize("chunk, tile", [(1 << 25, 1 << 19), (9, 9), (20, 20), (40, 1)])
@pytest.mark.parametrize("weight", [*WEIGHTS, "top-1"])
def test_loops_over_positions_and_vocabulary(weight, chunk, tile, monkeypatch):
    monkeypatch.setattr(rcd, "CHUNK", chunk)
    monkeypatch.setattr(rcd, "TILE", tile)
    generator = torch.Generator().manual_seed(5)
    logits, table = 3 * torch.randn(7, 10, generator=generator), torch.randn(10, 4, generator=generator)
    logits[:, 9] = -INF  # as the model's own: [MASK] is never predicted
    logits[3, :8] = -INF  # one-hot
    for t_res in (0.6, 1.0, 2.5):
        for temper_delta in (False, True):
            r = Carry(weight=weight, fixed=0.2, t_res=t_res, temper_delta=temper_delta)
            alpha, delta = r(logits, table)
            assert alpha.shape == (7,) and delta.shape == (7, 4)
            for i in range(7):
                a, d = by_loops(logits[i].tolist(), table.tolist(), r)
                assert alpha[i].item() == pytest.approx(a, abs=1e-5)
                assert delta[i].tolist() == pytest.approx(d, abs=1e-4)


def test_rows_are_taken_in_chunks_that_cover_them_once():
    for n in range(12):
        for rows in (0, 1, 2, 5, 12, 50):
            numbers, seen = torch.arange(n), []

            def f(a, b):
                seen.append(len(a))  # noqa: B023
                return a / 2, b

            halved, twice = rcd.by_rows(f, rows, numbers, numbers)
            assert torch.equal(halved, numbers / 2) and torch.equal(twice, numbers)
            assert max(seen) <= max(1, rows) and sum(seen) == n


finite = st.floats(-30, 30, width=32)


@st.composite
def tables(draw):
    V, D = draw(st.integers(2, 8)), draw(st.integers(1, 3))
    row = st.lists(st.one_of(finite, st.just(-INF)), min_size=V, max_size=V).filter(lambda z: max(z) > -INF)
    logits = draw(st.lists(row, min_size=1, max_size=4))
    embedding = st.lists(st.floats(-5, 5, width=32), min_size=D, max_size=D)
    return torch.tensor(logits), torch.tensor(draw(st.lists(embedding, min_size=V, max_size=V)))


@settings(max_examples=100)
@given(tables(), st.sampled_from([*WEIGHTS, "top-1"]), st.floats(0.1, 10), st.booleans(), st.floats(0, 1))
def test_alpha_is_a_share_and_delta_an_average(both, weight, t_res, temper_delta, fixed):
    logits, table = both
    alpha, delta = Carry(weight, fixed, t_res, temper_delta)(logits, table)
    assert bool((alpha >= -1e-6).all() and (alpha <= 1 + 1e-6).all())
    # In the convex hull of the embeddings that have any probability: within their extent in every direction.
    directions = torch.randn(table.shape[1], 20, generator=torch.Generator().manual_seed(0))
    for z, d in zip(logits, delta):
        reach, along = table[z > -INF] @ directions, d @ directions  # (n, 20), (20,)
        assert bool((reach.amin(0) - 1e-3 <= along).all() and (along <= reach.amax(0) + 1e-3).all())
    mask, N = table[-1], len(alpha)
    cells = torch.zeros(N, dtype=torch.long), torch.arange(N)
    e = mix(torch.zeros(1, N, table.shape[1]), cells, alpha, delta, mask)[0]
    # Between E[MASK] and Delta: an interpolation, and no sum.
    low, high = torch.minimum(delta, mask), torch.maximum(delta, mask)
    assert bool((e >= low - 1e-4).all() and (e <= high + 1e-4).all())


def test_extremes_of_the_entropy():
    V = 8
    one_hot = torch.full((1, V), -INF)
    one_hot[0, 2] = 5.0
    table = torch.randn(V, 3, generator=torch.Generator().manual_seed(0))
    alpha, delta = Residual()(one_hot, table)
    assert alpha.item() == 0 and torch.equal(delta[0], table[2])
    e = mix(torch.zeros(1, 1, 3), (torch.tensor([0]), torch.tensor([0])), alpha, delta, table[7])
    assert torch.equal(e[0, 0], table[7])  # certain: the plain [MASK] embedding
    alpha, delta = Residual()(torch.zeros(1, V), table)
    assert alpha.item() == pytest.approx(1, abs=1e-6)
    torch.testing.assert_close(delta[0], table.mean(0))
    without_mask = torch.zeros(1, V)
    without_mask[0, 7] = -INF
    alpha, _ = Residual()(without_mask, table)  # the most that a model reaches: log V counts the whole table
    assert alpha.item() == pytest.approx(math.log(V - 1) / math.log(V), abs=1e-6)
    sharp, blunt = Residual(t_res=0.5)(HALVES, E)[0], Residual(t_res=2.0)(HALVES, E)[0]
    assert sharp < 0.75 < blunt  # T_res below 1 injects less


def test_a_vocabulary_of_the_real_size_in_chunks(monkeypatch):
    """SDAR's 151,936. Peaked rows stay exact. Ten equal alternatives at confidence 1/2: alpha is 0.155."""
    V = 151_936
    logits = torch.full((2, V), -INF)
    logits[0, :11] = torch.tensor([0.5] + [0.05] * 10).log()
    logits[1] = 0
    table = torch.zeros(V, 1)
    table[0] = 1
    monkeypatch.setattr(rcd, "CHUNK", V)
    alpha, delta = Residual()(logits, table)
    by_hand = (0.5 * math.log(2) + 0.5 * math.log(20)) / math.log(V)
    assert alpha.tolist() == pytest.approx([by_hand, 1], abs=1e-5)
    assert round(alpha[0].item(), 3) == 0.155
    assert delta[:, 0].tolist() == pytest.approx([0.5, 1 / V], rel=1e-4)


@settings(max_examples=100)
@given(tables(), st.integers(1, 9), st.floats(0.3, 3), st.booleans())
def test_delta_of_the_likeliest_tokens_and_its_bound(both, k, t_res, temper_delta):
    """Against an explicit sum over the k likeliest tokens. Off the exact Delta by no more than
    2 (1 - m) max |E_j|, where m is their mass."""
    logits, table = both
    alpha, delta = Carry(t_res=t_res, temper_delta=temper_delta, residual_top_k=k)(logits, table)
    exact_alpha, exact = Carry(t_res=t_res, temper_delta=temper_delta)(logits, table)
    assert torch.equal(alpha, exact_alpha)  # alpha never is an approximation
    if k >= logits.shape[1]:
        assert torch.equal(delta, exact)
    p = (logits.double() / (t_res if temper_delta else 1)).softmax(-1)
    longest = table.double().norm(dim=1).max()
    for i, row in enumerate(p.tolist()):
        order = sorted(range(len(row)), key=lambda j: -row[j])
        mass = sum(row[j] for j in order[:k])
        assert (delta[i] - exact[i]).norm() <= 2 * (1 - mass) * longest + 1e-5
        if k >= len(row) or row[order[k - 1]] > row[order[k]]:  # either of two equals may be left out
            expected = sum(row[j] / mass * table[j].double() for j in order[:k])
            torch.testing.assert_close(delta[i].double(), expected, atol=1e-4, rtol=1e-4)


def test_the_bound_can_be_met():
    """All that is left out points the other way: the error is 2 (1 - m) max |E_j|. No smaller bound holds."""
    p, table = torch.tensor([[0.5, 0.25, 0.15, 0.1]]), torch.tensor([[3.0], [3.0], [-3.0], [-3.0]])
    gap = Carry(residual_top_k=2)(p.log(), table)[1] - Residual()(p.log(), table)[1]
    assert gap.item() == pytest.approx(2 * 0.25 * 3)


@settings(max_examples=100)
@given(tables(), st.floats(1e-3, 0.9), st.floats(0.3, 3), st.booleans(), st.sampled_from([1, 2, 3, 256]),
       st.sampled_from([2, 3, 32]))  # fmt: skip
def test_delta_of_the_fewest_tokens_and_its_bound(both, epsilon, t_res, temper_delta, depth, group):
    """Against an explicit sum over the fewest tokens that hold 1 - epsilon of p. Where `depth` of them hold
    less, Delta is the exact product."""
    logits, table = both
    carry = Carry(t_res=t_res, temper_delta=temper_delta, residual_epsilon=epsilon)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zoo.decoding, "DEPTH", depth)
        patch.setattr(zoo.decoding, "GROUP", group)
        alpha, delta = carry(logits, table)
    exact_alpha, exact = Carry(t_res=t_res, temper_delta=temper_delta)(logits, table)
    assert torch.equal(alpha, exact_alpha)  # alpha never is an approximation
    assert carry.bound(table) == pytest.approx(2 * epsilon * table.double().norm(dim=1).max().item())
    assert (delta - exact).norm(dim=1).max() <= carry.bound(table) + 1e-5
    p = (logits.double() / (t_res if temper_delta else 1)).softmax(-1)
    for i, row in enumerate(p.tolist()):
        order, mass, chosen = sorted(range(len(row)), key=lambda j: -row[j]), 0, []
        for j in order:
            if mass >= 1 - epsilon:
                break
            chosen, mass = [*chosen, j], mass + row[j]
        near = abs(mass - 1 + epsilon) < 1e-5 or abs(mass - row[chosen[-1]] - 1 + epsilon) < 1e-5
        equal = len(chosen) < len(row) and row[chosen[-1]] - row[order[len(chosen)]] < 1e-6
        if near or equal:  # rounding may take one more or one fewer, or another of two equals
            continue
        expected = sum(row[j] / mass * table[j].double() for j in chosen)
        expected = exact[i].double() if len(chosen) > depth else expected
        torch.testing.assert_close(delta[i].double(), expected, atol=1e-4, rtol=1e-4)


@settings(max_examples=100)
@given(st.integers(1, 70), st.integers(1, 5), st.integers(2, 5), st.floats(0.1, 10), st.floats(0, 0.5))
def test_the_likeliest_tokens_by_groups_are_those_of_a_sort(V, k, group, scale, epsilon):
    """A row that is left out holds less than 1 - epsilon in its k likeliest tokens."""
    logits = scale * torch.randn(4, V, generator=torch.Generator().manual_seed(V))
    p = logits.masked_fill(torch.arange(V) % 4 > 1, -INF).softmax(-1)  # half of them have none
    expected = p.sort(descending=True).values[:, :k]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zoo.decoding, "GROUP", group)
        values, ids, rows = likeliest(p, k, epsilon)
    assert torch.equal(values, expected[rows]) and torch.equal(p[rows].gather(1, ids), values)  # no id >= V
    left_out = [i for i in range(4) if i not in rows.tolist()]
    assert not left_out or expected[left_out].sum(-1).max() < 1 - epsilon + 1e-6


def test_padding_is_not_among_the_likeliest_tokens(monkeypatch):
    """25 tokens in groups of 8, of which the last alone has a p: the others tie with what fills its group."""
    monkeypatch.setattr(zoo.decoding, "GROUP", 8)
    values, ids, _rows = likeliest(torch.eye(25)[24:], 3, 0.5)
    assert values.tolist() == [[1, 0, 0]] and ids[0, 0] == 24 and ids.max() < 25


def test_a_flat_row_is_left_out_of_the_search():
    """Of 12 equal tokens in groups of 3 two hold a sixth. By the maxima of the two other groups there is a
    sixth outside, so with 0.1 to spare no second look is needed; with 0.2 there is one."""
    p = torch.full((1, 12), 1 / 12)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zoo.decoding, "GROUP", 3)
        assert [len(likeliest(p, 2, spare)[2]) for spare in (0.1, 0.2)] == [0, 1]


def test_the_fewest_tokens_by_hand():
    """p = 1/2, 1/4, 1/4: one token holds a half, two hold three quarters, and all three the rest."""
    for epsilon, expected in ((0.5, E[0]), (0.4, (2 * E[0] + E[1]) / 3), (0.1, (2 * E[0] + E[1] + E[2]) / 4)):
        _alpha, delta = Carry(residual_epsilon=epsilon)(HALVES, E)
        torch.testing.assert_close(delta[0], expected)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("k", [0, 40])
def test_delta_in_half_precision_is_summed_in_float32(k, autocast):
    """Thousands of equal contributions. A sum in bfloat16 would stop growing at 2^8 times the size of one."""
    V = 4000
    logits, table = torch.full((3, V), -INF), torch.ones(V, 2)
    logits[:, : k or 3000] = 0
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        alpha, delta = Carry(residual_top_k=k)(logits, table if autocast else table.bfloat16())
    torch.testing.assert_close(delta.float(), torch.ones(3, 2), atol=0.005, rtol=0)
    assert alpha.tolist() == pytest.approx([math.log(k or 3000) / math.log(V)] * 3, abs=1e-6)


@settings(max_examples=100)
@given(tables(), st.floats(0.01, 50))
def test_entropy_against_its_definition(both, scale):
    logits = both[0] * scale  # up to one-hot, and over a thousand
    z, p = rcd.softmax(logits)
    assert z.isfinite().all() and torch.equal(p, logits.softmax(-1))
    close = 2e-6 * max(1, logits[logits > -INF].abs().max().item())
    for row, entropy in zip(logits.double().softmax(-1).tolist(), rcd.entropy_of(z, p).tolist()):
        expected = -sum(q * math.log(q) for q in row if q > 0)
        assert entropy >= 0 and entropy == pytest.approx(expected, abs=close)


def test_an_entropy_is_never_negative():
    # Rounding alone would go below 0.
    z, p = rcd.softmax(30 * torch.randn(1000, 1000, generator=torch.Generator().manual_seed(0)))
    entropy, exact = rcd.entropy_of(z, p), torch.special.entr(z.double().softmax(-1)).sum(-1)
    assert (entropy >= 0).all() and (entropy - exact).abs().max() < 1e-4


def test_half_precision_tables_and_logits():
    generator = torch.Generator().manual_seed(1)
    logits, table = 2 * torch.randn(5, 9, generator=generator), torch.randn(9, 4, generator=generator)
    exact_alpha, exact_delta = Residual()(logits.bfloat16().double().float(), table.bfloat16().float())
    alpha, delta = Residual()(logits.bfloat16(), table.bfloat16())
    assert alpha.dtype == torch.float32 and delta.dtype == torch.bfloat16
    torch.testing.assert_close(alpha, exact_alpha, atol=1e-6, rtol=1e-6)  # softmax and entropy are in float32
    torch.testing.assert_close(delta.float(), exact_delta, atol=0.03, rtol=0.03)
    x = torch.zeros(1, 5, 4, dtype=torch.bfloat16)
    e = mix(x, (torch.zeros(5, dtype=torch.long), torch.arange(5)), alpha, delta, table[0].bfloat16())
    assert e.dtype == torch.bfloat16
    expected = (1 - exact_alpha[:, None]) * table[0] + exact_alpha[:, None] * exact_delta
    torch.testing.assert_close(e[0].float(), expected, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("weight, few", [*itertools.product(WEIGHTS, FEWER), ("top-1", {})])
def test_a_gradient_flows_through_delta_alone_and_only_if_asked_for(weight, few):
    logits, table = torch.randn(3, 5, requires_grad=True), torch.randn(5, 2, requires_grad=True)
    alpha, delta = Carry(weight, **few)(logits, table)
    assert not alpha.requires_grad and not delta.requires_grad
    alpha, delta = Carry(weight, **few)(logits, table, grad=True)
    assert not alpha.requires_grad and delta.requires_grad


def test_gradient_of_delta():
    """d Delta / d z_j = p_j (E_j - Delta)."""
    logits = HALVES.clone().requires_grad_()
    _alpha, delta = Residual()(logits, E, grad=True)
    delta[0, 1].backward()  # (1, 3)[1] = 3
    assert logits.grad[0].tolist() == pytest.approx([0.5 * (0 - 3), 0.25 * (8 - 3), 0.25 * (4 - 3), 0])


@pytest.mark.parametrize("depth", [1, 256])
def test_gradient_of_delta_of_the_fewest_tokens(depth, monkeypatch):
    """That of the exact sum, where all tokens are taken: by one bag, or with rows that take the product."""
    monkeypatch.setattr(zoo.decoding, "DEPTH", depth)
    logits = torch.tensor([[0.3, -0.2, 0.1, 1.0], [40.0, 0, 0, 0]])
    found = []
    for carry in (Residual(), Carry(residual_epsilon=1e-6)):
        z, table = logits.clone().requires_grad_(), E.clone().requires_grad_()
        (carry(z, table, grad=True)[1] * torch.arange(1.0, 5).view(2, 2)).sum().backward()
        found.append((z.grad, table.grad))
    for exact, ours in zip(*found):
        torch.testing.assert_close(ours, exact)


def test_gradient_of_the_mix():
    """d e / d E[MASK] = 1 - alpha, d e / d x = 1 at the cells that keep x and 0 where it is replaced."""
    x, mask = torch.zeros(1, 3, 2, requires_grad=True), torch.tensor([1.0, 2.0], requires_grad=True)
    cells = torch.tensor([0, 0]), torch.tensor([0, 2])
    mix(x, cells, torch.tensor([0.25, 0.5]), torch.ones(2, 2), mask).sum().backward()
    assert x.grad[0].tolist() == [[0, 0], [1, 1], [0, 0]]
    assert mask.grad.tolist() == [1.25, 1.25]


@pytest.mark.parametrize("options, says", [
    (dict(weight="entropie"), "weight='entropie': choose from entropy, confidence"),
    (dict(t_res=0), "t_res=0"), (dict(t_res=-1.0), "t_res=-1.0"), (dict(t_res=math.nan), "t_res=nan"),
    (dict(t_res=INF), "t_res=inf"), (dict(residual_top_k=-1), "residual_top_k=-1"),
    (dict(residual_epsilon=1.0), "residual_epsilon=1.0"),
    (dict(residual_epsilon=math.nan), "residual_epsilon=nan"),
    (dict(weight="top-1", residual_top_k=3), "weight=top-1 brings its own Delta"),
    (dict(residual_top_k=3, residual_epsilon=0.1), "choose one of residual_top_k and residual_epsilon"),
    (dict(fixed=-0.1), "fixed=-0.1"), (dict(fixed=1.1), "fixed=1.1"), (dict(fixed=math.nan), "fixed=nan"),
])  # fmt: skip
def test_bad_choices(options, says):
    for kind in (Carry,) if any(name.startswith("residual_") for name in options) else (Residual, Carry):
        with pytest.raises(ValueError, match=says) as error:
            kind(**options)
        assert "\n" not in str(error.value)


def test_options_of_earlier_runs_have_todays_names():
    assert Carry(**carry_options({"weight": "fixed", "terms": 3})) == Carry("fixed", residual_top_k=3)
    assert carry_options({"residual_top_k": 2}) == {"residual_top_k": 2}
