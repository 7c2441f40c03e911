"""The forward process, the training masks and the loss, against direct computation and exact enumeration."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import rcd
from rcd import (WEIGHTS, Residual, attention_mask, denoiser_hidden, diffusion_loss, mask_tokens,
                 reference_context, sample_t, training_mask)  # fmt: skip
from zoo.decoding import Carry
from zoo.recipes import document_positions

MASK = 11  # of the tiny models


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_tokens(B: int, T: int, seed: int = 0, vocab: int = MASK) -> torch.Tensor:
    return torch.randint(vocab, (B, T), generator=seeded(seed))


# ---- The forward process


def test_masking_rate_is_t_and_the_prompt_is_never_masked():
    B, T = 400, 500
    g = seeded(0)
    tokens, response = random_tokens(B, T), torch.rand(B, T, generator=g) < 0.7
    t = torch.rand(B, 1, generator=g)
    x, masked = mask_tokens(tokens, response, t, torch.rand(B, T, generator=g), MASK)
    assert not masked[~response].any() and torch.equal(x == MASK, masked)
    assert torch.equal(x[~masked], tokens[~masked])
    n = response.sum(1)
    z = (masked.sum(1) - t[:, 0] * n) / (t[:, 0] * (1 - t[:, 0]) * n).sqrt()  # standard normal: rate t
    assert abs(z.mean()) < 4 / math.sqrt(B) and 0.85 < z.std() < 1.15
    everything = mask_tokens(tokens, response, torch.ones(B, 1), torch.rand(B, T, generator=g), MASK)[1]
    assert torch.equal(everything, response)  # t = 1
    # Each cell is masked independently: given t, neighbours are uncorrelated.
    left, right = masked.float()[:, ::2], masked.float()[:, 1::2]
    covariance = ((left - t) * (right - t))[response[:, ::2] & response[:, 1::2]]
    assert abs(covariance.mean()) < 4 * covariance.std() / math.sqrt(len(covariance))


@settings(max_examples=25)
@given(st.integers(0, 10_000), st.floats(0, 1), st.floats(0, 1))
def test_more_noise_masks_a_superset(seed, a, b):
    g = seeded(seed)
    tokens, response = random_tokens(2, 9, seed), torch.rand(2, 9, generator=g) < 0.7
    noise, levels = torch.rand(2, 9, generator=g), [torch.full((2, 1), t) for t in sorted((a, b))]
    less, more = (mask_tokens(tokens, response, t, noise, MASK)[1] for t in levels)
    assert not (less & ~more).any()


def test_t_of_every_cell_can_be_its_own():
    t, noise = torch.tensor([[0.0, 1.0, 0.5]]), torch.tensor([[0.0, 0.99, 0.5]])
    response = torch.ones(1, 3, dtype=torch.bool)
    x, masked = mask_tokens(torch.tensor([[1, 2, 3]]), response, t, noise, MASK)
    assert masked.tolist() == [[False, True, False]]  # probability t: noise < t, strictly
    assert x.tolist() == [[1, MASK, 3]]


def test_t_is_stratified_over_the_batch_and_uniform_in_every_row():
    g = seeded(0)
    assert sample_t(8, g).shape == (8, 1)
    t = torch.stack([sample_t(8, g)[:, 0] for _ in range(2000)])  # (2000, 8)
    assert 1e-3 <= t.min() < 2e-3 and 0.999 < t.max() <= 1
    draws = (t.double() - 1e-3) / (1 - 1e-3)  # from (0.001, 1) to (0, 1)
    strata = ((draws - draws[:, :1] % 0.125) / 0.125).round().long().sort(dim=1).values  # one offset a batch
    assert torch.equal(strata % 8, torch.arange(8).expand(2000, 8))
    for row in draws.T:  # Kolmogorov-Smirnov: 1.95 / sqrt(n) is the 0.1 % point
        row, steps = row.sort().values, torch.arange(2001) / 2000
        distance = torch.maximum((steps[1:] - row).max(), (row - steps[:-1]).max())
        assert distance < 1.95 / math.sqrt(2000)
    apart = ((draws[:, 1] - draws[:, 0]) * 8).round().long() % 8  # the strata come in any order
    assert set(apart.tolist()) == set(range(1, 8)) and torch.bincount(apart)[1:].min() > 200


# ---- Masks


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


@settings(max_examples=50)
@given(st.lists(st.integers(1, 7), min_size=1, max_size=4), st.integers(0, 6))
def test_training_mask_by_four_cases_in_every_document(lengths, b):
    """Two rows packed with documents of these lengths, in this order and reversed. b = 0: bidirectional."""
    rows = [[(d, i) for d, n in enumerate(order) for i in range(n)] for order in (lengths, lengths[::-1])]
    positions = torch.tensor([[i for _, i in row] for row in rows])
    halves = ("noisy", "clean") if b else (None,)
    size = len(halves) * len(rows[0])
    mask = attention_mask(training_mask(positions, b), 2, size, "cpu")
    assert mask.dtype == torch.bool and mask.shape == (2, 1, size, size)
    for got, row in zip(mask[:, 0].tolist(), rows):
        cells = [(half, *cell) for half in halves for cell in row]
        for i, (q_half, q_document, q) in enumerate(cells):
            for j, (k_half, k_document, k) in enumerate(cells):
                in_reach = may_attend(q_half, q // b, k_half, k // b) if b else True
                assert got[i][j] == (q_document == k_document and in_reach)


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

    names = [f"{half} {block}  " for half in "nc" for block in "aabbcc"]
    mask = attention_mask(training_mask(torch.arange(6)[None], 2), 1, 12, "cpu")[0, 0].tolist()
    lines = [name + show(row) for name, row in zip(names, mask)]
    heads = ["", "     noisy   clean", "     aabbcc  aabbcc"]
    assert "\n".join([*heads, *lines[:6], "", *lines[6:], ""]) == PICTURE


# ---- The noisy half against a model that reads one block at a time


def block_by_block(model: rcd.Transformer, x: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Hidden states (T, D) of one noisy row x (T, D) that predict its cells. Each block has a forward of its
    own: [clean prefix | this block's noisy input]. Row i is what predicts cell i. Under logit_shift that is
    the state one position earlier, in the same forward."""
    T, b = len(tokens), model.config.block_size or len(tokens)
    out = []
    for begin in range(0, T, b):
        end = min(begin + b, T)
        canvas = torch.cat([model.embed_tokens(tokens[:begin]), x[begin:end]])[None]  # (1, end, D)
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
    total, count = 0.0, 0
    for b in range(len(tokens)):
        cells = range(tokens.shape[1])
        masked = [bool(response[b, i]) and noise[b, i].item() < t[b, i].item() for i in cells]
        ids = torch.tensor([MASK if m else int(token) for m, token in zip(masked, tokens[b])])
        x = model.embed_tokens(ids)  # (T, D)
        if reference is not None:
            h = block_by_block(reference, reference.embed_tokens(ids), tokens[b])
            for i, m in enumerate(masked):
                if m:
                    logits = reference.logits(h[i : i + 1])[0].double()
                    p, tempered = logits.softmax(-1), logits.div(residual.t_res).softmax(-1)
                    alpha = -sum(q * math.log(q) for q in tempered.tolist() if q > 0) / math.log(len(p))
                    delta = sum(q * model.embedding[j].detach().double() for j, q in enumerate(p.tolist()))
                    soft = (1 - alpha) * model.embedding[MASK].double() + alpha * delta
                    x = torch.cat([x[:i], soft[None].float(), x[i + 1 :]])
        h = block_by_block(model, x, tokens[b])
        for i, m in enumerate(masked):
            count += bool(response[b, i])
            if m:
                total = total - model.logits(h[i : i + 1])[0].log_softmax(-1)[tokens[b, i]] / t[b, i]
    return total / count


@pytest.mark.parametrize("carry", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_equal_the_literal_computation(tiny, kind, carry):
    """Of a block-causal model this also says: training on [noisy | clean] is training on each block behind
    its clean prefix."""
    model = tiny(seed=1, tied=False, **KINDS[kind])
    reference = tiny(seed=2, d_model=8, n_layer=1, **KINDS[kind])
    tokens = random_tokens(3, 8, seed=3)
    response = torch.rand(3, 8, generator=seeded(4)) < 0.7
    response[:, 0] = False  # a shifted model is given its first token
    residual = Residual(t_res=0.8)
    context = reference_context(reference, residual) if carry else None
    for t in (torch.tensor([[0.3], [0.9], [0.6]]), torch.rand(3, 8, generator=seeded(6)) * 0.9 + 0.1):
        noise = torch.rand(3, 8, generator=seeded(5))  # the first draw when t is given
        model.zero_grad()
        loss = diffusion_loss(model, tokens, response, context=context, t=t, generator=seeded(5))
        loss.backward()
        grads = {name: p.grad.clone() for name, p in model.named_parameters()}
        model.zero_grad()
        used = reference if carry else None
        expected = literal_loss(model, tokens, response, t.expand(3, 8), noise, used, residual)
        expected.backward()
        torch.testing.assert_close(loss, expected.float(), atol=1e-5, rtol=1e-5)
        for name, p in model.named_parameters():
            torch.testing.assert_close(grads[name], p.grad, atol=2e-4, rtol=1e-3, msg=f"gradient of {name}")


def test_without_1_over_t_every_masked_token_weighs_alike(tiny):
    """By single rows and single masks: what each adds is -log p of its token, and no t."""
    model, tokens, t = tiny(), random_tokens(4, 6, seed=3), torch.tensor([[0.2], [0.5], [0.7], [1.0]])
    noise, uniform = torch.rand(4, 6, generator=seeded(5)), torch.zeros(4, 2)
    loss = diffusion_loss(model, tokens, t=t, draws=(noise, uniform), bound=False)
    total = 0.0
    for ids, row, level in zip(tokens, noise, t):
        masked = row < level
        x = model.embed_tokens(torch.where(masked, MASK, ids))[None]
        logits = model.logits(model(x, torch.arange(6)[None])[0])
        total += sum(-logits[i].log_softmax(-1)[ids[i]].item() for i in masked.nonzero()[:, 0])
    assert loss.item() == pytest.approx(total / tokens.numel(), rel=1e-5)


def test_t_is_drawn_stratified_when_it_is_not_given(tiny):
    model, tokens, seen = tiny(), random_tokens(6, 5), []

    def spy(model, n):
        seen.append(n)
        return torch.zeros(len(n.cells[0])), torch.zeros(len(n.cells[0]), 16)

    plain = diffusion_loss(model, tokens, generator=seeded(7))
    spied = diffusion_loss(model, tokens, context=spy, generator=seeded(7))
    torch.testing.assert_close(plain, spied)  # an absent residual is the plain pass: a cold start
    (n,) = seen
    g = seeded(7)
    assert torch.equal(n.t, sample_t(6, g)) and torch.equal(n.noise, torch.rand(6, 5, generator=g))
    assert torch.equal(n.uniform, torch.rand(6, 2, generator=g))
    assert torch.equal(n.x == MASK, n.noise < n.t)
    assert torch.equal(torch.stack(n.cells, 1), (n.x == MASK).nonzero())
    assert torch.equal(n.tokens, tokens) and bool(n.response.all()) and n.positions is None


def test_the_draws_left_to_a_context_are_uniform_and_independent(tiny):
    """Of how much earlier a residual is, and of its absence: of each other, of t and of the masks."""
    seen, B = [], 4000

    def watch(model, n):
        seen.append(n)
        return torch.zeros(len(n.cells[0])), torch.zeros(len(n.cells[0]), 16)

    tokens = torch.zeros(B, 6, dtype=torch.long)
    diffusion_loss(tiny(n_layer=1), tokens, context=watch, generator=seeded(0))
    uniform = seen[0].uniform
    assert uniform.shape == (B, 2)
    assert ((torch.histc(uniform, 10, 0, 1) / (2 * B) - 0.1).abs() < 0.014).all()
    together = torch.stack([*uniform.T, seen[0].t[:, 0], *seen[0].noise.T])
    assert (torch.corrcoef(together)[:2] - torch.eye(9)[:2]).abs().max() < 0.07  # 4.4 standard deviations


def test_divided_by_maskable_tokens_and_not_by_masks(tiny):
    """Half of the tokens are prompt, and at t = 1/2 about half of the others are masked. The factors are 1/t
    and 1/maskable, nothing else."""
    model, tokens = tiny(), random_tokens(4, 10)
    response = torch.arange(10).expand(4, 10) >= 5
    masked = response & (torch.rand(4, 10, generator=seeded(0)) < 0.5)
    assert masked.sum() not in (0, 20)
    loss = diffusion_loss(model, tokens, response, t=torch.full((4, 1), 0.5), generator=seeded(0))
    x = tokens.masked_fill(masked, MASK)
    z = model.logits(model(model.embed_tokens(x), torch.arange(10)[None])[masked])
    nll = torch.nn.functional.cross_entropy(z, tokens[masked], reduction="sum")
    torch.testing.assert_close(loss, nll / 0.5 / 20)


# ---- The bound


def enumerated(model, tokens: tuple) -> dict[tuple, float]:
    """The exact sum of -log p over the masked cells, for each of the 2^L masks but the empty one. t is 1
    where a cell is masked and 0 elsewhere."""
    L, out = len(tokens), {}
    for mask in itertools.product((False, True), repeat=L):
        if any(mask):
            with torch.no_grad():
                loss = diffusion_loss(model, torch.tensor([tokens]), t=torch.tensor([mask]).float())
            out[mask] = L * loss.item()
    return out


def integral(k: int, n: int, low: float) -> float:
    """Integral over t in (low, 1) of t^(k-1) (1-t)^(n-k), by the binomial theorem."""
    signed = [(-1) ** i * math.comb(n - k, i) for i in range(n - k + 1)]
    return sum(c * (1 - low ** (k + i)) / (k + i) for i, c in enumerate(signed))


@pytest.mark.parametrize("kind", KINDS)
def test_monte_carlo_mean_is_the_exact_expectation(tiny, kind):
    """L = 3 tokens of V = 3 (+ [MASK]): the expectation over t ~ U(0.001, 1) and all 2^3 masks, exactly,
    against the mean of the loss."""
    blocks = {"block_size": 2} if "blocks" in kind else {}
    model = tiny(seed=3, vocab_size=4, mask_id=3, n_layer=1, **(KINDS[kind] | blocks))
    tokens, L, low = (2, 0, 1), 3, 1e-3
    nll = enumerated(model, tokens)
    exact = sum(value * integral(sum(mask), L, low) / (1 - low) for mask, value in nll.items()) / L
    with torch.no_grad():
        g, batch = seeded(0), torch.tensor([tokens]).repeat(1000, 1)
        means = torch.stack([diffusion_loss(model, batch, generator=g) for _ in range(24)]).double()
    error = means.std().item() / math.sqrt(len(means))
    assert abs(means.mean().item() - exact) < 4 * error and error < 0.02 * exact


def test_it_is_the_mean_over_unmasking_orders_and_at_least_the_entropy_of_the_data(tiny):
    """As t_min -> 0 a mask of k in L has the weight 1 / (k C(L, k)). This makes the bound -log p averaged
    over all L! orders of unmasking. Each order is a proper distribution. So by Jensen the bound is above the
    -log likelihood of their mixture, and its mean is above the entropy of the data."""
    model = tiny(seed=5, vocab_size=4, mask_id=3, gain=0.8)
    L, everything = 3, list(itertools.product(range(3), repeat=3))
    canvases = list(itertools.product(range(4), repeat=L))
    with torch.no_grad():
        hidden = model(model.embed_tokens(torch.tensor(canvases)), torch.arange(L)[None])  # (64, L, D)
        log_p = model.logits(hidden.flatten(0, 1)).log_softmax(-1).view(64, L, 4)
    log_p = dict(zip(canvases, log_p.tolist()))
    bounds, mixtures = {}, {}
    for tokens in everything:
        nll = enumerated(model, tokens)
        bounds[tokens] = sum(value / (sum(mask) * math.comb(L, sum(mask))) for mask, value in nll.items())
        orders = []
        for order in itertools.permutations(range(L)):
            x, total = [3] * L, 0.0
            for i in order:  # reveal one token at a time
                total += log_p[tuple(x)][i][tokens[i]]
                x[i] = tokens[i]
            orders.append(total)
        assert bounds[tokens] == pytest.approx(-sum(orders) / len(orders), rel=1e-5)
        mixtures[tokens] = sum(math.exp(o) for o in orders) / len(orders)
        assert bounds[tokens] >= -math.log(mixtures[tokens]) - 1e-6
    assert sum(mixtures.values()) == pytest.approx(1, abs=1e-5)  # the likelihood of a distribution
    weights = torch.rand(27, generator=seeded(0)) ** 4
    data = dict(zip(everything, (weights / weights.sum()).tolist()))
    entropy = -sum(p * math.log(p) for p in data.values())
    assert sum(p * bounds[x] for x, p in data.items()) > entropy


def test_a_model_that_knows_nothing_pays_log_v_and_one_that_knows_pays_nothing(tiny):
    model = tiny(vocab_size=9, mask_id=8, tied=False)
    model.lm_head.weight.data.zero_()
    tokens, half = random_tokens(4000, 5, vocab=8), torch.full((4000, 1), 0.5)
    with torch.no_grad():
        loss = diffusion_loss(model, tokens, generator=seeded(0), t=half)
        assert loss.item() == pytest.approx(math.log(8), rel=0.03)  # masked / t is 1 in the mean; no [MASK]
        loss = diffusion_loss(model, tokens, t=torch.ones(4000, 1))
        assert loss.item() == pytest.approx(math.log(8), abs=1e-5)
        model.layers = torch.nn.ModuleList()
        model.lm_head.weight.data[2] = 100 * model.norm(model.embedding[8:]).squeeze()
        assert diffusion_loss(model, torch.full((4, 5), 2), t=torch.ones(4, 1)).item() < 1e-5


# ---- Chunks and gradients


@pytest.mark.parametrize("carry", [False, True])
def test_chunks_change_neither_value_nor_gradients(tiny, monkeypatch, carry):
    """The head runs on the masked cells only, and on a chunk of them at a time."""
    tokens, results = random_tokens(3, 9), []
    masks = int((torch.rand(3, 9, generator=seeded(1)) < 0.7).sum())
    for chunk, tile in ((1 << 25, 1 << 19), (12 * 4, 1 << 19), (12 * 4, 1), (1, 1)):
        monkeypatch.setattr(rcd, "CHUNK", chunk)
        monkeypatch.setattr(rcd, "TILE", tile)
        model, reference = tiny(seed=0, tied=False), tiny(seed=1)
        sizes, reference_sizes = [], []
        for m, seen in ((model, sizes), (reference, reference_sizes)):
            m.logits = lambda h, m=m, seen=seen: (seen.append(len(h)), rcd.Transformer.logits(m, h))[1]
        context = reference_context(reference, Residual()) if carry else None
        loss = diffusion_loss(model, tokens, context=context, t=torch.full((3, 1), 0.7), generator=seeded(1))
        assert sum(sizes) == masks and sum(reference_sizes) == (masks if carry else 0)
        loss.backward()
        results.append((loss.detach(), [p.grad for p in model.parameters()]))
        assert max(sizes + reference_sizes) <= max(1, chunk // 12)
    for loss, grads in results[1:]:
        torch.testing.assert_close(loss, results[0][0])
        for a, b in zip(grads, results[0][1]):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_gradients_of_the_second_stage(tiny):
    tokens, t, recorded = random_tokens(4, 8), torch.full((4, 1), 0.6), []

    def grads(residual):
        model, reference = tiny(seed=0, tied=False), tiny(seed=1, tied=False)
        reference.norm.register_forward_hook(lambda module, args, out: recorded.append(out.requires_grad))
        context = reference_context(reference, residual)
        diffusion_loss(model, tokens, t=t, context=context, generator=seeded(0)).backward()
        assert all(p.grad is None for p in reference.parameters())  # frozen
        assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())
        return model.embed_tokens.weight.grad

    x = tokens.masked_fill(torch.rand(4, 8, generator=seeded(0)) < 0.6, MASK)
    present = torch.zeros(12, dtype=torch.bool)
    present[x.unique()] = True
    assert present[MASK] and not present.all()
    g = grads(Residual())
    assert torch.equal(g.abs().sum(1) > 0, present)  # of the visible tokens and of [MASK]; none through Delta
    assert not grads(Carry(weight="one"))[MASK].any()  # alpha = 1: the mask embedding is not in the input
    small, large = (grads(Residual(weight="fixed", fixed=alpha))[MASK].norm() for alpha in (0.9, 0.0))
    assert 0 < small < large
    assert len(recorded) == 4 and not any(recorded)  # its forward keeps nothing for a backward


def test_a_reference_that_is_certain_gives_finite_gradients(tiny):
    """Entropy has an infinite slope at p = 0: a one-hot reference must not turn the weights to NaN."""
    model, reference = tiny(seed=0), tiny(seed=1, tied=False)
    reference.lm_head.weight.data *= 1e4
    context, t = reference_context(reference, Residual()), torch.full((4, 1), 0.6)
    diffusion_loss(model, random_tokens(4, 8), t=t, context=context, generator=seeded(0)).backward()
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters())


@pytest.mark.parametrize("carry", [False, True])
def test_a_batch_in_which_nothing_is_masked_costs_nothing(tiny, carry):
    """A short response at a small t: it happens in every long run."""
    model, reference = tiny(seed=0), tiny(seed=1)
    context = reference_context(reference, Residual()) if carry else None
    loss = diffusion_loss(model, random_tokens(2, 5), t=torch.zeros(2, 1), context=context)
    loss.backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert loss.item() == 0 and all(bool((g == 0).all()) for g in grads)


@pytest.mark.parametrize("options, pair", [(dict(vocab_size=13), "13, 11"), (dict(mask_id=5), "12, 5")])
def test_a_reference_with_another_vocabulary_is_an_error(tiny, options, pair):
    with pytest.raises(ValueError) as error:
        diffusion_loss(tiny(), random_tokens(2, 5), context=reference_context(tiny(**options), Residual()))
    what = "the reference has another vocabulary: (vocab_size, mask_id) is"
    assert str(error.value) == f"{what} ({pair}), not (12, 11)"


def test_nothing_to_learn_is_an_error(tiny):
    with pytest.raises(ValueError, match="nothing to learn"):
        diffusion_loss(tiny(), random_tokens(2, 5), torch.zeros(2, 5, dtype=torch.bool))


# ---- Packed rows


@pytest.mark.parametrize("block_size", [0, 2])
def test_a_shifted_model_never_predicts_the_first_token_of_a_document(tiny, block_size):
    """There is no row before it. In a packed row there is one, but it belongs to the neighbour."""
    model, tokens = tiny(seed=1, logit_shift=True, block_size=block_size), random_tokens(1, 6)
    t, positions = torch.ones(1, 1), torch.tensor([[0, 1, 2, 0, 1, 2]])
    packed = diffusion_loss(model, tokens, t=t, positions=positions)
    first, second = (diffusion_loss(model, document, t=t) for document in tokens.split(3, dim=1))
    assert packed.item() == pytest.approx((first + second).item() / 2, rel=1e-5)  # two tokens of each count
    given = torch.tensor([[False, True, True]])
    assert first.item() == pytest.approx(diffusion_loss(model, tokens[:, :3], given, t=t).item(), rel=1e-6)


@pytest.mark.parametrize("carry", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_packed_row_has_the_loss_of_its_documents(tiny, kind, carry):
    """Three documents in one row, and a fourth in a row of its own: neighbours change nothing."""
    model, reference = tiny(seed=1, tied=False, **KINDS[kind]), tiny(seed=2, **KINDS[kind])
    documents = [random_tokens(1, n, seed=n) for n in (4, 7, 2, 13)]
    tokens = torch.cat([torch.cat(documents[:3], dim=1), documents[3]])  # (2, 13)
    positions = torch.tensor([[*range(4), *range(7), *range(2)], [*range(13)]])
    # A shifted model is given the first token of each document.
    response = positions > 0 if model.config.logit_shift else torch.ones_like(positions, dtype=torch.bool)
    t = (torch.rand(2, 13, generator=seeded(3)) < 0.6).float()  # 1 = masked, 0 = not: no chance is left
    context = reference_context(reference, Residual()) if carry else None

    def loss(*cells, positions=None) -> float:
        """Summed over the response."""
        part = response[cells]
        mean = diffusion_loss(model, tokens[cells], part, positions, t=t[cells], context=context)
        return mean.item() * int(part.sum())

    everything = slice(None), slice(None)
    with torch.no_grad():
        packed, blind = loss(*everything, positions=positions), loss(*everything)
        spans = (0, 0, 4), (0, 4, 11), (0, 11, 13), (1, 0, 13)
        total = sum(loss(slice(row, row + 1), slice(begin, end)) for row, begin, end in spans)
    assert packed == pytest.approx(total, rel=1e-5)
    assert abs(blind - packed) > 1e-3 * packed  # without positions they would see each other


@pytest.mark.parametrize("carry", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_padding_changes_nothing_and_is_never_an_empty_row_of_attention(tiny, kind, carry):
    """Two documents with two and with seven cells of padding behind them, and a row of padding: the loss of
    the documents, and finite gradients."""
    model, reference = tiny(seed=1, tied=False, **KINDS[kind]), tiny(seed=2, **KINDS[kind])
    segments = torch.tensor([[1] * 7 + [0] * 2, [1] * 2 + [0] * 7, [0] * 9])
    positions, response, tokens = document_positions(segments), segments > 0, random_tokens(3, 9)
    context = reference_context(reference, Residual()) if carry else None
    t = (torch.rand(3, 9, generator=seeded(3)) < 0.6).float()
    loss = diffusion_loss(model, tokens, response, positions, t=t, context=context)
    loss.backward()
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters())
    tokens[segments == 0] = 5  # whatever stands there
    again = diffusion_loss(model, tokens, response, positions, t=t, context=context)
    assert again.item() == pytest.approx(loss.item(), rel=1e-6)
    documents = ((0, 6), (1, 1)) if model.config.logit_shift else ((0, 7), (1, 2))  # row, tokens that count
    total = 0.0
    for (row, count), n in zip(documents, (7, 2)):
        cells = slice(row, row + 1), slice(n)
        total += count * diffusion_loss(model, tokens[cells], t=t[cells], context=context).item()
    assert loss.item() == pytest.approx(total / sum(count for _, count in documents), rel=1e-5)
    with torch.no_grad():
        hidden = denoiser_hidden(model, model.embed_tokens(tokens), tokens, positions)
    assert bool(hidden.isfinite().all())


@pytest.mark.parametrize("kind", ["full", "blocks"])
@torch.no_grad()
def test_hidden_states_of_a_packed_row(tiny, kind):
    model, tokens = tiny(**KINDS[kind]), random_tokens(1, 9)
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 0, 1]])
    x = torch.randn(1, 9, 16, generator=seeded(0))
    packed = denoiser_hidden(model, x, tokens, positions)
    for document in (slice(0, 5), slice(5, 7), slice(7, 9)):
        expected = block_by_block(model, x[0, document], tokens[0, document])
        torch.testing.assert_close(packed[0, document], expected, atol=1e-5, rtol=1e-5)


@settings(max_examples=20)
@given(st.integers(0, 1000), st.sampled_from(sorted(KINDS)), st.sampled_from(sorted(WEIGHTS)))
def test_tokens_that_are_not_to_be_seen_are_not_seen(tiny, seed, kind, weight):
    """A prediction reads nothing that is behind a mask or, in a block-causal model, in later blocks."""
    model, reference = tiny(seed=1, **KINDS[kind]), tiny(seed=2, **KINDS[kind])
    g, tokens, b = seeded(seed), random_tokens(1, 9, seed), model.config.block_size or 9
    block = int(torch.randint(9 // b, (1,), generator=g))
    masked = (torch.arange(9) // b == block) & (torch.rand(9, generator=g) < 0.5)
    masked[block * b + 1] = True  # at least one
    hidden = masked | (torch.arange(9) >= (block + 1) * b)
    other = torch.where(hidden, random_tokens(1, 9, seed + 1), tokens)

    def predictions(clean):
        x, cells = clean.masked_fill(masked[None], MASK), masked[None].nonzero(as_tuple=True)
        n = SimpleNamespace(x=x, tokens=clean, cells=cells, positions=None)
        alpha, delta = reference_context(reference, Carry(weight))(model, n)
        e = rcd.mix(model.embed_tokens(x), cells, alpha, delta, model.embedding[MASK])
        return model.predicting(denoiser_hidden(model, e, clean), cells)

    with torch.no_grad():
        assert torch.equal(predictions(tokens), predictions(other))
