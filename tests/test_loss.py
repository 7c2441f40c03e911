"""The forward process, the attention masks and the loss against direct computation and against exact enumeration."""

import functools
import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import flex_attention

import rcd
from rcd import Residual, attention_mask, diffusion_loss, mask_tokens, noisy_clean, reference_context, sample_t

MASK = 11  # of the tiny models


def random_tokens(B: int, T: int, seed: int = 0, vocab: int = MASK) -> torch.Tensor:
    return torch.randint(vocab, (B, T), generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------------------------------------------------------------------------------
# The forward process


def test_masking_rate_is_t_and_the_prompt_is_never_masked():
    B, T = 400, 500
    g = torch.Generator().manual_seed(0)
    tokens, response = random_tokens(B, T), torch.rand(B, T, generator=g) < 0.7
    t = torch.rand(B, 1, generator=g)
    x, masked = mask_tokens(tokens, response, t, torch.rand(B, T, generator=g), MASK)
    assert not masked[~response].any() and torch.equal(x == MASK, masked) and torch.equal(x[~masked], tokens[~masked])
    n = response.sum(1)
    z = (masked.sum(1) - t[:, 0] * n) / (t[:, 0] * (1 - t[:, 0]) * n).sqrt()  # standard normal if every cell is masked with probability t
    assert abs(z.mean()) < 4 / math.sqrt(B) and 0.85 < z.std() < 1.15
    assert mask_tokens(tokens, response, torch.ones(B, 1), torch.rand(B, T, generator=g), MASK)[1].equal(response)  # t = 1: all
    left = masked.float()[:, ::2], masked.float()[:, 1::2]  # cells are masked on their own: neighbours are uncorrelated given t
    both = response[:, ::2] & response[:, 1::2]
    covariance = ((left[0] - t) * (left[1] - t))[both]
    assert abs(covariance.mean()) < 4 * covariance.std() / math.sqrt(len(covariance))


@given(st.integers(0, 10_000), st.floats(0, 1), st.floats(0, 1))
def test_more_noise_masks_a_superset(seed, a, b):
    g = torch.Generator().manual_seed(seed)
    tokens, response, noise = random_tokens(2, 9, seed), torch.rand(2, 9, generator=g) < 0.7, torch.rand(2, 9, generator=g)
    less, more = (mask_tokens(tokens, response, torch.full((2, 1), t), noise, MASK)[1] for t in sorted((a, b)))
    assert not (less & ~more).any()


def test_t_of_every_cell_can_be_its_own():
    t = torch.tensor([[0.0, 1.0, 0.5]])
    x, masked = mask_tokens(torch.tensor([[1, 2, 3]]), torch.ones(1, 3, dtype=torch.bool), t, torch.tensor([[0.0, 0.99, 0.5]]), MASK)
    assert masked.tolist() == [[False, True, False]] and x.tolist() == [[1, MASK, 3]]  # probability t: noise < t, strictly


def test_t_is_stratified_over_the_batch_and_uniform_in_every_row():
    g = torch.Generator().manual_seed(0)
    draws = torch.stack([sample_t(8, g, t_min=0.0)[:, 0] for _ in range(2000)])  # (2000, 8)
    assert sample_t(8, g).shape == (8, 1)
    strata = ((draws - draws[:, :1] % 0.125) / 0.125).round().long().sort(dim=1).values  # one offset for the whole batch
    assert torch.equal(strata, torch.arange(8).expand(2000, 8))
    for row in draws.T:  # Kolmogorov-Smirnov: 1.95 / sqrt(n) is the 0.1 % point
        row = row.sort().values
        steps = torch.arange(2001) / 2000
        distance = torch.maximum((steps[1:] - row).max(), (row - steps[:-1]).max())
        assert distance < 1.95 / math.sqrt(2000)
    apart = ((draws[:, 1] - draws[:, 0]) * 8).round().long() % 8  # the strata come in any order
    assert set(apart.tolist()) == set(range(1, 8)) and torch.bincount(apart)[1:].min() > 200
    bounded = torch.cat([sample_t(50, g) for _ in range(100)])
    assert 1e-3 <= bounded.min() < 2e-3 and 0.999 < bounded.max() <= 1
    bounded = torch.cat([sample_t(50, g, t_min=0.4) for _ in range(100)])
    assert 0.4 <= bounded.min() < 0.401 and abs(bounded.mean() - 0.7) < 0.01


def groups_by_hand(segments: list[int], block_size: int) -> list[int]:
    """Which cells of a row share a t: those of one document, or of one block of it, counted from the document's first token."""
    out, group, position = [], -1, 0
    for j, number in enumerate(segments):
        new = j == 0 or number != segments[j - 1]
        position = 0 if new else position + 1
        group += new or bool(block_size and position % block_size == 0)
        out.append(group)
    return out


@given(st.lists(st.lists(st.integers(0, 3), min_size=7, max_size=7), min_size=1, max_size=4), st.sampled_from([0, 1, 2, 3, 9]), st.integers(0, 99))
def test_t_is_one_per_document_or_per_block_of_it(rows, block_size, seed):
    """Cells of a group share a t, and the t of all groups of the batch are stratified draws: one in each n-th of the interval, up to an offset."""
    t = rcd.noise_levels(torch.zeros(len(rows), 7), torch.tensor(rows), block_size, torch.Generator().manual_seed(seed))
    drawn = []
    for values, row in zip(t.tolist(), rows):
        groups = groups_by_hand(row, block_size)
        for g in range(groups[-1] + 1):
            of_group = {v for v, other in zip(values, groups) if other == g}
            assert len(of_group) == 1
            drawn += of_group
    u = (torch.tensor(drawn).double().sort().values - 1e-3) / (1 - 1e-3) * len(drawn)
    assert ((u - u[0]) - torch.arange(len(drawn))).abs().max() < 1e-3


@pytest.mark.parametrize("block_size", [0, 2])
def test_t_of_every_document_and_block_is_uniform(block_size):
    segments, g = torch.tensor([[1, 1, 1, 2, 2, 0], [1] * 6]), torch.Generator().manual_seed(0)
    draws = torch.stack([rcd.noise_levels(torch.zeros(2, 6), segments, block_size, g) for _ in range(2000)])  # (2000, 2, 6)
    for b, j in ((0, 0), (0, 2), (0, 4), (1, 0), (1, 3), (1, 5)):
        row = draws[:, b, j].sort().values
        steps = torch.arange(2001) / 2000
        assert torch.maximum((steps[1:] - row).max(), (row - steps[:-1]).max()) < 1.95 / math.sqrt(2000)  # Kolmogorov-Smirnov, 0.1 %
    same = (draws[:, 0, 0] == draws[:, 0, 2]).all(), (draws[:, 0, 0] == draws[:, 0, 3]).any(), (draws[:, 1, 0] == draws[:, 1, 5]).all()
    assert same == (not block_size, False, not block_size)  # a document's third cell is in a block of its own


def test_the_loss_draws_t_as_it_is_told(tiny):
    segments = torch.tensor([[1, 1, 1, 1, 1, 2, 2, 2, 0]])
    for t_per, of_block in (("document", 0), ("block", 3)):
        seen = []
        context = lambda model, n, seen=seen: (seen.append(n), torch.zeros(len(n.where[0])), torch.zeros(len(n.where[0]), 16))[1:]  # noqa: E731
        model = tiny(block_size=3)
        diffusion_loss(model, random_tokens(1, 9), None, segments, context=context, t_per=t_per, generator=torch.Generator().manual_seed(1))
        assert torch.equal(seen[0].t, rcd.noise_levels(torch.zeros(1, 9), segments, of_block, torch.Generator().manual_seed(1)))
    for model, t_per in ((tiny(), "block"), (tiny(block_size=3), "token")):
        with pytest.raises(ValueError, match="t_per=.*: choose from document, block; block needs a block-causal model"):
            diffusion_loss(model, random_tokens(1, 9), t_per=t_per)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=9))
def test_positions_restart_with_every_document(row):
    expected = [len(list(itertools.takewhile(lambda k, j=j: row[k] == row[j], range(j, -1, -1)))) - 1 for j in range(len(row))]
    assert rcd.document_positions(torch.zeros(1, len(row)), torch.tensor([row])).tolist() == [expected]


# ---------------------------------------------------------------------------------------------------------------------------------------
# Masks


def may_attend(q_half: str, q_block: int, k_half: str, k_block: int) -> bool:
    """SDAR's training mask as it is described, case by case."""
    if q_half == "noisy" and k_half == "noisy":
        return q_block == k_block  # its own block
    if q_half == "noisy" and k_half == "clean":
        return k_block < q_block  # strictly earlier blocks
    if q_half == "clean" and k_half == "clean":
        return k_block <= q_block  # block-causal
    if q_half == "clean" and k_half == "noisy":
        return False
    raise AssertionError


@given(st.lists(st.integers(0, 12), min_size=1, max_size=9), st.integers(1, 6))
def test_noisy_clean_mask_by_four_cases(positions, b):
    mask = attention_mask(noisy_clean(torch.tensor([positions, positions[::-1]]), b), 2, 2 * len(positions), "cpu")[:, 0]
    assert mask.dtype == torch.bool and mask.shape == (2, 2 * len(positions), 2 * len(positions))
    for row, at in zip(mask.tolist(), (positions, positions[::-1])):
        halves = [("noisy", p) for p in at] + [("clean", p) for p in at]
        for i, (q_half, q) in enumerate(halves):
            for j, (k_half, k) in enumerate(halves):
                assert row[i][j] == may_attend(q_half, q // b, k_half, k // b)


PICTURE = """
     noisy   clean
     aabbcc  aabbcc
n a  ##....  ......
n a  ##....  ......
n b  ..##..  ##....
n b  ..##..  ##....
n c  ....##  ####..
n c  ....##  ####..

c a  ......  ##....
c a  ......  ##....
c b  ......  ####..
c b  ......  ####..
c c  ......  ######
c c  ......  ######
"""  # six tokens, blocks a b c of two; a row is a query, # = it sees that key


def test_the_training_mask_looks_like_this():
    def show(row):
        return "".join(".#"[seen] for seen in row[:6]) + "  " + "".join(".#"[seen] for seen in row[6:])

    rows = [f"{half} {block}  " for half in "nc" for block in "aabbcc"]
    lines = [name + show(row) for name, row in zip(rows, attention_mask(noisy_clean(torch.arange(6)[None], 2), 1, 12, "cpu")[0, 0].tolist())]
    assert "\n".join(["", "     noisy   clean", "     aabbcc  aabbcc", *lines[:6], "", *lines[6:], ""]) == PICTURE


@pytest.mark.parametrize("backend, remat", [(None, False), ("aot_eager", False), ("aot_eager", True)])
@pytest.mark.parametrize("block_size, packed", [(0, True), (4, False), (4, True)])
def test_flex_attention_learns_what_the_boolean_mask_does(tiny, monkeypatch, block_size, packed, backend, remat):
    """The mask as on CUDA, here on a CPU: the same loss, and compiled the same gradients; one graph of each function serves all batches of a
    size. (torch refuses the backward pass on a CPU for want of a kernel; the decomposition that aot_eager runs has none to miss.)"""
    model, graphs = tiny(block_size=block_size, n_head=4, n_kv_head=2, head_dim=16), []
    model.remat = remat

    def counting(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    monkeypatch.setattr(rcd, "compiled", functools.cache(lambda f: torch.compile(f, backend=counting) if backend else f))
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *_: None)
    torch._dynamo.reset()
    for seed in range(3):
        g = torch.Generator().manual_seed(seed)
        tokens = torch.randint(model.config.mask_id, (3, 40), generator=g)
        segments = torch.randint(2, (3, 40), generator=g).cumsum(1) // 4 if packed else None

        def learn(device, seed=seed, tokens=tokens, segments=segments):
            monkeypatch.setattr(rcd, "FLEX", device)
            with torch.set_grad_enabled(backend is not None):
                loss = diffusion_loss(model, tokens, segments=segments, generator=torch.Generator().manual_seed(seed))
            return [loss, *(torch.autograd.grad(loss, list(model.parameters())) if backend else ())]

        for one, other in zip(learn(("cpu",)), learn(()), strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
    assert len(graphs) == (2 if backend else 0)


# ---------------------------------------------------------------------------------------------------------------------------------------
# The noisy half against the model that sees no more than it should


def alone(model: rcd.Transformer, x: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Hidden states (T, D) of one noisy row x (T, D) that predict its cells, block by block: [clean prefix | this block's noisy input].

    Row i is what predicts cell i: under logit_shift that is the state one position earlier, in the same forward.
    """
    T, b = len(tokens), model.config.block_size or len(tokens)
    out = []
    for begin in range(0, T, b):
        end = min(begin + b, T)
        canvas = torch.cat([model.embed(tokens[:begin]), x[begin:end]])[None]  # (1, end, D)
        allowed = torch.tensor([[k // b <= q // b for k in range(end)] for q in range(end)])
        hidden = model(canvas, torch.arange(end)[None], allowed[None, None])[0]
        for i in range(begin, end):
            out.append(hidden[max(i - 1, 0) if model.config.logit_shift else i])
    return torch.stack(out)


KINDS = {
    "full": dict(),
    "full shifted": dict(logit_shift=True),
    "blocks": dict(block_size=3),
    "blocks shifted": dict(block_size=3, logit_shift=True),
}


def literal_loss(model, tokens, response, t, noise, reference=None, residual=None):
    """Algorithm 1 row by row and position by position; t (B, T)."""
    total, maskable = 0.0, 0
    for b in range(len(tokens)):
        masked = [bool(response[b, i]) and noise[b, i].item() < t[b, i].item() for i in range(tokens.shape[1])]
        ids = torch.tensor([MASK if m else int(token) for m, token in zip(masked, tokens[b])])
        x = model.embed(ids)  # (T, D)
        if reference is not None:
            h = alone(reference, reference.embed(ids), tokens[b])
            for i, m in enumerate(masked):
                if m:
                    p = reference.logits(h[i : i + 1])[0].double().softmax(-1)
                    tempered = reference.logits(h[i : i + 1])[0].double().div(residual.t_res).softmax(-1)
                    alpha = -sum(q * math.log(q) for q in tempered.tolist() if q > 0) / math.log(len(p))
                    delta = sum(q * model.embedding[j].detach().double() for j, q in enumerate(p.tolist()))
                    soft = (1 - alpha) * model.embedding[MASK].double() + alpha * delta
                    x = torch.cat([x[:i], soft[None].float(), x[i + 1 :]])
        h = alone(model, x, tokens[b])
        for i, m in enumerate(masked):
            maskable += bool(response[b, i])
            if m:
                total = total - model.logits(h[i : i + 1])[0].log_softmax(-1)[tokens[b, i]] / t[b, i]
    return total / maskable


@pytest.mark.parametrize("carry", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_equal_the_literal_computation(tiny, kind, carry):
    """With b tokens a block this also says: training on [noisy | clean] is training on every block alone behind its clean prefix."""
    model, reference = tiny(seed=1, tied=False, **KINDS[kind]), tiny(seed=2, d_model=8, n_layer=1, **KINDS[kind])
    tokens = random_tokens(3, 8, seed=3)
    response = torch.rand(3, 8, generator=torch.Generator().manual_seed(4)) < 0.7
    response[:, 0] = False  # a shifted model is given its first token
    residual = Residual(t_res=0.8)
    for t in (torch.tensor([[0.3], [0.9], [0.6]]), torch.rand(3, 8, generator=torch.Generator().manual_seed(6)) * 0.9 + 0.1):
        noise = torch.rand(3, 8, generator=torch.Generator().manual_seed(5))  # the first draw when t is given
        context = reference_context(reference, residual) if carry else None
        model.zero_grad()
        loss = diffusion_loss(model, tokens, response, context=context, t=t, generator=torch.Generator().manual_seed(5))
        loss.backward()
        grads = {name: p.grad.clone() for name, p in model.named_parameters()}
        model.zero_grad()
        expected = literal_loss(model, tokens, response, t.expand(3, 8), noise, reference if carry else None, residual)
        expected.backward()
        torch.testing.assert_close(loss, expected.float(), atol=1e-5, rtol=1e-5)
        for name, p in model.named_parameters():
            torch.testing.assert_close(grads[name], p.grad, atol=2e-4, rtol=1e-3, msg=f"gradient of {name}")


def test_t_is_drawn_stratified_when_it_is_not_given(tiny):
    model, tokens, seen = tiny(), random_tokens(6, 5), []

    def spy(model, n):
        seen.append(n)
        return torch.zeros(len(n.where[0])), torch.zeros(len(n.where[0]), 16)

    plain = diffusion_loss(model, tokens, generator=torch.Generator().manual_seed(7))
    spied = diffusion_loss(model, tokens, context=spy, generator=torch.Generator().manual_seed(7))
    torch.testing.assert_close(plain, spied)  # an absent residual is the plain pass: a cold start
    n = seen[0]
    g = torch.Generator().manual_seed(7)
    assert torch.equal(n.t, sample_t(6, g).expand(6, 5)) and torch.equal(n.noise, torch.rand(6, 5, generator=g))
    assert torch.equal(n.x == MASK, n.noise < n.t) and torch.equal(n.x[n.where], torch.full_like(n.where[0], MASK))
    assert torch.equal(n.tokens, tokens) and bool(n.response.all()) and n.segments is None and int((n.x == MASK).sum()) == len(n.where[0])


def test_divided_by_maskable_tokens_and_not_by_masks(tiny):
    """Half of the tokens are prompt; at t = 1/2 about half of the others are masked: 1/t and 1/maskable, nothing else."""
    model, tokens = tiny(), random_tokens(4, 10)
    response = torch.arange(10).expand(4, 10) >= 5
    t = torch.full((4, 1), 0.5)
    noise = torch.rand(4, 10, generator=torch.Generator().manual_seed(0))
    masked = response & (noise < 0.5)
    assert masked.sum() not in (0, 20)
    loss = diffusion_loss(model, tokens, response, t=t, generator=torch.Generator().manual_seed(0))
    x = tokens.masked_fill(masked, MASK)
    z = model.logits(model(model.embed(x), torch.arange(10)[None])[masked])
    nll = torch.nn.functional.cross_entropy(z, tokens[masked], reduction="sum")
    torch.testing.assert_close(loss, nll / 0.5 / 20)


# ---------------------------------------------------------------------------------------------------------------------------------------
# The bound


def enumerated(model, tokens: tuple, context=None) -> dict[tuple, float]:
    """Exact sum of -log p over the masked cells of every one of the 2^L masks: t is 1 where masked and 0 elsewhere."""
    L = len(tokens)
    out = {}
    for mask in itertools.product((False, True), repeat=L):
        if any(mask):
            t = torch.tensor([mask]).float()
            with torch.no_grad():
                out[mask] = L * diffusion_loss(model, torch.tensor([tokens]), t=t, context=context).item()
    return out


def integral(k: int, n: int, low: float) -> float:
    """Integral over t in (low, 1) of t^(k-1) (1-t)^(n-k), term by term."""
    terms = [math.comb(n - k, i) * (-1) ** i / (k + i) * (1 - low ** (k + i)) for i in range(n - k + 1)]
    return sum(terms)


@pytest.mark.parametrize("kind", KINDS)
def test_monte_carlo_mean_is_the_exact_expectation(tiny, kind):
    """L = 3 tokens of V = 3 (+ [MASK]): E over t ~ U(t_min, 1) and all 2^3 masks, exactly, against the mean of the loss."""
    model = tiny(seed=3, vocab_size=4, mask_id=3, **(KINDS[kind] | ({"block_size": 2} if "blocks" in kind else {})))
    tokens, L, low = (2, 0, 1), 3, 1e-3
    nll = enumerated(model, tokens)
    exact = sum(value * integral(sum(mask), L, low) / (1 - low) for mask, value in nll.items()) / L
    with torch.no_grad():
        g = torch.Generator().manual_seed(0)
        batch = torch.tensor([tokens]).repeat(1000, 1)
        means = torch.stack([diffusion_loss(model, batch, generator=g) for _ in range(40)]).double()
    error = means.std().item() / math.sqrt(len(means))
    assert abs(means.mean().item() - exact) < 4 * error and error < 0.02 * exact


def test_it_is_the_mean_over_unmasking_orders_and_at_least_the_entropy_of_the_data(tiny):
    """For t_min -> 0 a mask of k in L weighs 1 / (k C(L, k)), which makes the bound -log p averaged over all L! orders. Every order is a
    proper distribution, so by Jensen the bound is above the -log likelihood of their mixture, and in the mean above the data's entropy."""
    model = tiny(seed=5, vocab_size=4, mask_id=3, gain=0.8)
    L, everything = 3, list(itertools.product(range(3), repeat=3))
    bounds, mixtures = {}, {}
    for tokens in everything:
        nll = enumerated(model, tokens)
        bounds[tokens] = sum(value / (sum(mask) * math.comb(L, sum(mask))) for mask, value in nll.items())
        orders = []
        for order in itertools.permutations(range(L)):
            x, log_p = [3] * L, 0.0
            for i in order:  # reveal one token at a time
                with torch.no_grad():
                    h = model(model.embed(torch.tensor([x])), torch.arange(L)[None])[0, i : i + 1]
                    log_p += model.logits(h)[0].log_softmax(-1)[tokens[i]].item()
                x[i] = tokens[i]
            orders.append(log_p)
        assert bounds[tokens] == pytest.approx(-sum(orders) / len(orders), rel=1e-5)
        mixtures[tokens] = sum(math.exp(o) for o in orders) / len(orders)
        assert bounds[tokens] >= -math.log(mixtures[tokens]) - 1e-6
    assert sum(mixtures.values()) == pytest.approx(1, abs=1e-5)  # the likelihood of a distribution
    weights = torch.rand(27, generator=torch.Generator().manual_seed(0)) ** 4
    data = dict(zip(everything, (weights / weights.sum()).tolist()))
    entropy = -sum(p * math.log(p) for p in data.values())
    assert sum(p * bounds[x] for x, p in data.items()) > entropy


def test_a_model_that_knows_nothing_pays_log_v_and_one_that_knows_pays_nothing(tiny):
    model = tiny(vocab_size=9, mask_id=8, tied=False)
    model.lm_head.weight.data.zero_()
    tokens = random_tokens(4000, 5, vocab=8)
    with torch.no_grad():
        loss = diffusion_loss(model, tokens, generator=torch.Generator().manual_seed(0), t=torch.full((4000, 1), 0.5))
        assert loss.item() == pytest.approx(math.log(8), rel=0.03)  # the mean over cells of masked / t is 1; [MASK] has no share
        model.norm.weight.data.zero_()
        assert diffusion_loss(model, tokens, t=torch.ones(4000, 1)).item() == pytest.approx(math.log(8), abs=1e-5)
        constant = torch.full((4, 5), 2)
        model.norm.weight.data.fill_(1)
        model.layers = torch.nn.ModuleList()
        model.lm_head.weight.data[2] = 100 * model.norm(model.embedding[8:]).squeeze()
        assert diffusion_loss(model, constant, t=torch.ones(4, 1)).item() < 1e-5


# ---------------------------------------------------------------------------------------------------------------------------------------
# Chunks, gradients, packing


@pytest.mark.parametrize("carry", [False, True])
def test_chunks_change_neither_value_nor_gradients(tiny, monkeypatch, carry):
    tokens, results = random_tokens(3, 9), []
    for chunk, tile in ((1 << 25, 1 << 19), (12 * 4, 1 << 19), (12 * 4, 1), (1, 1)):
        monkeypatch.setattr(rcd, "CHUNK", chunk)
        monkeypatch.setattr(rcd, "TILE", tile)
        model, reference = tiny(seed=0, tied=False), tiny(seed=1)
        sizes = {"model": [], "reference": []}
        for m, seen in ((model, sizes["model"]), (reference, sizes["reference"])):
            m.logits = lambda rows, m=m, seen=seen: (seen.append(len(rows)), rcd.Transformer.logits(m, rows))[1]
        context = reference_context(reference, Residual()) if carry else None
        loss = diffusion_loss(model, tokens, context=context, t=torch.full((3, 1), 0.7), generator=torch.Generator().manual_seed(1))
        masks = sum(sizes["model"])  # the head ran on the masked rows alone, and on no more than a chunk of them at once
        loss.backward()
        results.append((loss.detach(), masks, [p.grad for p in model.parameters()]))
        assert max(sizes["model"] + sizes["reference"]) <= max(1, chunk // 12)
        assert sum(sizes["reference"]) == (masks if carry else 0)
    noise = torch.rand(3, 9, generator=torch.Generator().manual_seed(1))
    assert {masks for _, masks, _ in results} == {int((noise < 0.7).sum())}
    for loss, _, grads in results[1:]:
        torch.testing.assert_close(loss, results[0][0])
        for a, b in zip(grads, results[0][2]):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_gradients_of_the_second_stage(tiny):
    tokens, t, recorded = random_tokens(4, 8), torch.full((4, 1), 0.6), []

    def grads(residual, **options):
        model, reference = tiny(seed=0, tied=False, **options), tiny(seed=1, tied=False, **options)
        reference.norm.register_forward_hook(lambda module, args, out: recorded.append(out.requires_grad))
        diffusion_loss(
            model, tokens, t=t, context=reference_context(reference, residual), generator=torch.Generator().manual_seed(0)
        ).backward()
        assert all(p.grad is None for p in reference.parameters())  # frozen
        assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())
        return model.embed_tokens.weight.grad

    x = tokens.masked_fill(torch.rand(4, 8, generator=torch.Generator().manual_seed(0)) < 0.6, MASK)
    present = torch.zeros(12, dtype=torch.bool)
    present[x.unique()] = True
    assert present[MASK] and not present.all()
    g = grads(Residual())
    assert torch.equal(g.abs().sum(1) > 0, present)  # of the visible tokens and of [MASK]; none through Delta
    assert not grads(Residual(weight="one"))[MASK].any()  # alpha = 1: the mask embedding is not in the input
    small, large = grads(Residual(weight="fixed", fixed=0.9))[MASK].norm(), grads(Residual(weight="fixed", fixed=0.0))[MASK].norm()
    assert 0 < small < large
    assert len(recorded) == 4 and not any(recorded)  # its forward keeps nothing for a backward


def test_a_reference_that_is_certain_gives_finite_gradients(tiny):
    """Entropy has an infinite slope at p = 0: a one-hot reference must not turn the weights to NaN."""
    model, reference = tiny(seed=0), tiny(seed=1, tied=False)
    reference.lm_head.weight.data *= 1e4
    diffusion_loss(model, random_tokens(4, 8), t=torch.full((4, 1), 0.6), context=reference_context(reference, Residual())).backward()
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters())


@pytest.mark.parametrize("carry", [False, True])
def test_a_batch_in_which_nothing_is_masked_costs_nothing(tiny, carry):
    """A short response at a small t: it happens in every long run."""
    model, reference = tiny(seed=0), tiny(seed=1)
    context = reference_context(reference, Residual()) if carry else None
    loss = diffusion_loss(model, random_tokens(2, 5), t=torch.zeros(2, 1), context=context)
    loss.backward()
    assert loss.item() == 0 and all(bool((p.grad == 0).all()) for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("options", [dict(vocab_size=13), dict(mask_id=5)])
def test_a_reference_with_another_vocabulary_is_an_error(tiny, options):
    with pytest.raises(ValueError, match="reference"):
        diffusion_loss(tiny(), random_tokens(2, 5), context=reference_context(tiny(**options), Residual()))


@pytest.mark.parametrize("block_size", [0, 2])
def test_a_shifted_model_never_predicts_the_first_token_of_a_document(tiny, block_size):
    """There is no row before it; in a packed row there is one, but it belongs to the neighbour."""
    model, tokens, t = tiny(seed=1, logit_shift=True, block_size=block_size), random_tokens(1, 6), torch.ones(1, 1)
    packed = diffusion_loss(model, tokens, t=t, segments=torch.tensor([[0, 0, 0, 1, 1, 1]]))
    alone = [diffusion_loss(model, part, t=t) for part in tokens.split(3, dim=1)]
    assert packed.item() == pytest.approx(sum(alone).item() / 2, rel=1e-5)  # two tokens of each count
    given = torch.tensor([[False, True, True]])
    assert alone[0].item() == pytest.approx(diffusion_loss(model, tokens[:, :3], given, t=t).item(), rel=1e-6)


def test_nothing_to_learn_is_an_error(tiny):
    with pytest.raises(ValueError, match="nothing to learn"):
        diffusion_loss(tiny(), random_tokens(2, 5), torch.zeros(2, 5, dtype=torch.bool))


@pytest.mark.parametrize("carry", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_packed_row_is_its_documents_alone(tiny, kind, carry):
    """Three documents in one row and a remainder in a second: every one as if it were alone, whatever its neighbours."""
    model, reference = tiny(seed=1, tied=False, **KINDS[kind]), tiny(seed=2, **KINDS[kind])
    documents = [random_tokens(1, n, seed=n) for n in (4, 7, 2, 13)]
    tokens = torch.stack([torch.cat([d[0] for d in documents[:3]]), documents[3][0]])  # (2, 13)
    segments = torch.tensor([[0] * 4 + [1] * 7 + [2] * 2, [0] * 13])
    first = torch.cat([torch.ones(2, 1, dtype=torch.bool), segments[:, 1:] != segments[:, :-1]], 1)
    response = ~first if model.config.logit_shift else torch.ones_like(first)  # a shifted model is given the first token of a document
    t = (torch.rand(2, 13, generator=torch.Generator().manual_seed(3)) < 0.6).float()  # 1 = masked, 0 = not, no chance left
    context = reference_context(reference, Residual()) if carry else None
    with torch.no_grad():
        packed = diffusion_loss(model, tokens, response, t=t, context=context, segments=segments).item() * int(response.sum())
        total = 0.0
        for row, begin, end in ((0, 0, 4), (0, 4, 11), (0, 11, 13), (1, 0, 13)):
            part = slice(row, row + 1), slice(begin, end)
            total += diffusion_loss(model, tokens[part], response[part], t=t[part], context=context).item() * int(response[part].sum())
        blind = diffusion_loss(model, tokens, response, t=t, context=context).item() * int(response.sum())
    assert packed == pytest.approx(total, rel=1e-5)
    assert abs(blind - packed) > 1e-3 * packed  # without segments they would see each other


@pytest.mark.parametrize("carry", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_padding_changes_nothing_and_is_never_an_empty_row_of_attention(tiny, kind, carry):
    """Two documents with two and with seven padded cells behind them, one of padding alone: the documents' loss, finite gradients."""
    model, reference = tiny(seed=1, tied=False, **KINDS[kind]), tiny(seed=2, **KINDS[kind])
    segments = torch.tensor([[1] * 7 + [0] * 2, [1] * 2 + [0] * 7, [0] * 9])
    tokens, context = random_tokens(3, 9), reference_context(reference, Residual()) if carry else None
    t = (torch.rand(3, 9, generator=torch.Generator().manual_seed(3)) < 0.6).float()
    loss = diffusion_loss(model, tokens, segments > 0, segments, t=t, context=context)
    loss.backward()
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters())
    tokens[segments == 0] = 5  # whatever stands there
    assert diffusion_loss(model, tokens, segments > 0, segments, t=t, context=context).item() == pytest.approx(loss.item(), rel=1e-6)
    parts = [diffusion_loss(model, tokens[i : i + 1, :n], t=t[i : i + 1, :n], context=context).item() for i, n in ((0, 7), (1, 2))]
    counts = (6, 1) if model.config.logit_shift else (7, 2)  # a shifted model is given a document's first token
    assert loss.item() == pytest.approx(sum(a * n for a, n in zip(parts, counts)) / sum(counts), rel=1e-5)
    with torch.no_grad():
        assert bool(rcd.denoiser_hidden(model, model.embed(tokens), tokens, segments).isfinite().all())


@pytest.mark.parametrize("kind", ["full", "blocks"])
def test_hidden_states_of_a_packed_row(tiny, kind):
    model = tiny(**KINDS[kind])
    tokens, segments = random_tokens(1, 9), torch.tensor([[5, 5, 5, 5, 5, 2, 2, 5, 5]])  # a number may come again
    x = torch.randn(1, 9, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        packed = rcd.denoiser_hidden(model, x, tokens, segments)
        torch.testing.assert_close(packed[:, 5:7], rcd.denoiser_hidden(model, x[:, 5:7], tokens[:, 5:7]), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(rcd.denoiser_hidden(model, x, tokens)[0], alone(model, x[0], tokens[0]), atol=1e-5, rtol=1e-5)


@settings(max_examples=20)
@given(st.integers(0, 1000), st.sampled_from(sorted(KINDS)), st.sampled_from(rcd.WEIGHTS))
def test_tokens_that_are_not_to_be_seen_are_not_seen(tiny, seed, kind, weight):
    """What hides behind a mask changes the target of the loss and, block-causal, later blocks: never the prediction itself."""
    model, reference = tiny(seed=1, **KINDS[kind]), tiny(seed=2, **KINDS[kind])
    g = torch.Generator().manual_seed(seed)
    tokens = random_tokens(1, 9, seed)
    other = tokens.clone()
    b = model.config.block_size or 9
    block = int(torch.randint(9 // b, (1,), generator=g))
    inside = torch.arange(9) // b == block
    masked = inside & (torch.rand(9, generator=g) < 0.5)
    masked[block * b + 1] = True  # at least one
    later = torch.arange(9) >= (block + 1) * b
    other[0, masked | later] = random_tokens(1, 9, seed + 1)[0, masked | later]

    def predictions(clean):
        x = clean.masked_fill(masked[None], MASK)
        where = masked[None].nonzero(as_tuple=True)
        n = SimpleNamespace(x=x, tokens=clean, where=where, segments=None)
        alpha, delta = reference_context(reference, Residual(weight))(model, n)
        e = rcd.mix(model.embed(x), where, alpha, delta, model.embedding[MASK])
        return model.rows(rcd.denoiser_hidden(model, e, clean), where)

    with torch.no_grad():
        assert torch.equal(predictions(tokens), predictions(other))
