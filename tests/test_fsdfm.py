"""zoo/rivals/fsdfm: scalar, jump and losses against hand-computed values, matrix exponentials and literal
loops; the sampler against an enumerable truth; the commands on a tiny text."""

import itertools
import json
import math
import os
import signal
import sys
from shutil import copyfile

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import data
from data.shakespeare_char import prepare
from zoo.files import save as save_run
from zoo.rivals import fsdfm
from zoo.rivals.fsdfm import __main__ as command
from zoo.rivals.fsdfm.dit import DiT, DiTConfig, init_weights, load, save, student_of
from zoo.tools import checks, training

MASK = 2  # in the middle of the vocabulary: no code may take it for the last
UNIFORM, MASKS = DiTConfig(5, MASK), DiTConfig(5, MASK, source="mask")
TOKENS = [0, 1, 3, 4]  # all but the mask
P = torch.tensor([0.1, 0.2, 0.0, 0.3, 0.4])  # a posterior


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def log(p: torch.Tensor) -> torch.Tensor:
    return p.log().clamp(min=-1e30)


def number(value: float) -> torch.Tensor:
    return torch.tensor([value], dtype=torch.float64)


def tiny_dit(seed: int = 0, **options) -> DiT:
    """A random network: nothing is zero that init_weights leaves at zero."""
    model = DiT(DiTConfig(**{**dict(vocab_size=5, mask_id=MASK, n_layer=2, n_head=2, d_model=16, d_cond=8),
                             **options}))  # fmt: skip
    generator = seeded(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.4, generator=generator)
    return model


def close_to(counts: torch.Tensor, p: torch.Tensor) -> bool:
    """Whether counts could come from p: no count is 5 standard deviations away, none is where p is 0."""
    n = counts.sum()
    return bool(((counts - n * p).abs() <= 5 * (n * p * (1 - p)).sqrt() + 1e-6).all())


# ---- The scalar


@pytest.mark.parametrize("S,t,gbar,moves,too_few", [
    (8, 0.0, 1.0683, 0.1250, 0.1175), (8, 0.5, 2.3015, 0.2500, 0.2212), (8, 0.75, 5.5452, 0.5000, 0.3935),
    (2, 0.0, 1.3863, 0.5000, 0.3935),
])  # fmt: skip
def test_scalar_and_jump_probability_by_hand(S, t, gbar, moves, too_few):
    t, h = number(t), number(1 / S)
    assert fsdfm.cumulative(t, h).item() == pytest.approx(gbar, abs=5e-5)
    for name, expected in (("cumulative", moves), ("instantaneous", too_few), ("one", 1 - math.exp(-1))):
        assert 1 - math.exp(-h * fsdfm.RATES[name](t, h)) == pytest.approx(expected, abs=5e-5)


@settings(max_examples=50)
@given(st.floats(0, 0.95), st.floats(0.001, 0.999))
def test_the_cumulative_scalar_is_the_mean_of_g(t, share):
    h = (1 - t) * share
    s = t + h * (np.arange(20_000) + 0.5) / 20_000  # midpoints
    mean = fsdfm.instantaneous(torch.from_numpy(s), number(h)).mean().item()
    assert fsdfm.cumulative(number(t), number(h)).item() == pytest.approx(mean, rel=1e-3)


def test_scalars_at_the_ends():
    assert fsdfm.cumulative(number(0.3), number(1e-7)).item() == pytest.approx(1 / 0.7, rel=1e-5)
    whole = fsdfm.cumulative(torch.tensor([0.0, 0.5]), torch.tensor([1.0, 0.5]))  # to t = 1, in float32
    assert whole.isfinite().all() and bool((whole * torch.tensor([1.0, 0.5]) > 15).all())


# ---- The path and the jump


def test_the_path_keeps_a_token_with_probability_t():
    x_1, t = torch.full((2, 40_000), 3), torch.tensor([0.25, 0.8])
    for c, others in ((UNIFORM, TOKENS), (MASKS, [MASK])):
        x = fsdfm.path(c, x_1, t, seeded())
        for row, kept in zip(x, t):
            p = torch.zeros(5)
            p[others] += (1 - kept) / len(others)
            p[3] += kept
            assert close_to(row.bincount(minlength=5), p)


@pytest.mark.parametrize("rate", fsdfm.RATES)
@pytest.mark.parametrize("z", TOKENS)
def test_a_jump_is_a_chain_that_stops_after_its_first_jump(z, rate):
    """The transition matrix by a matrix exponential: row z has the velocity's rates, other states absorb."""
    t, h, n = torch.tensor([0.4]), torch.tensor([0.25]), 60_000
    x = torch.full((1, n), z)
    new = fsdfm.jump(UNIFORM, log(P).expand(1, n, 5), x, t, h, seeded(z), rate)
    mean = {"cumulative": math.log(0.6 / 0.35) / 0.25, "instantaneous": 1 / 0.6, "one": 4.0}[rate]
    Q = torch.zeros(5, 5)
    Q[z] = P
    Q[z, z] = -(P.sum() - P[z])
    assert close_to(new.flatten().bincount(minlength=5), torch.linalg.matrix_exp(0.25 * mean * Q)[z])


def test_many_jumps_are_the_chain_of_the_velocity():
    """With a frozen posterior, 64 jumps from t = 0.2 to 0.8 are the whole CTMC of the integral of g."""
    n, S, z = 20_000, 64, 0
    x, h = torch.full((1, n), z), torch.tensor([0.6 / S])
    for s in range(S):
        x = fsdfm.jump(UNIFORM, log(P).expand(1, n, 5), x, 0.2 + s * h, h, seeded(s))
    whole = math.log(0.8 / 0.2)  # the integral of g
    Q = P.expand(5, 5) - torch.eye(5)
    assert close_to(x.flatten().bincount(minlength=5), torch.linalg.matrix_exp(whole * Q)[z])


def test_rows_have_times_and_steps_of_their_own():
    """No chance to move at h = 0, none to stay where the whole posterior is another token and t + h = 1."""
    t, h = torch.tensor([0.5, 0.5]), torch.tensor([1e-9, 0.5])
    logits = log(torch.tensor([0.0, 1, 0, 0, 0])).expand(2, 1000, 5)
    x = fsdfm.jump(UNIFORM, logits, torch.zeros(2, 1000, dtype=torch.long), t, h, seeded())
    assert (x[0] == 0).all() and (x[1] == 1).all()


@pytest.mark.parametrize("t,h", [(0.0, 0.125), (0.5, 0.125), (0.75, 0.125), (0.3, 0.01), (0.5, 0.5)])
def test_from_masks_it_is_ancestral_unmasking(t, h):
    """MDLM unmasks with probability (t' - t) / (1 - t), to a draw of p; what is unmasked stays."""
    x = torch.full((1, 40_000), MASK)
    x[:, ::2] = 1
    logits = log(P).expand(1, 40_000, 5)
    new = fsdfm.jump(MASKS, logits, x, torch.tensor([t]), torch.tensor([h]), seeded())
    assert (new[:, ::2] == 1).all()
    expected = P * h / (1 - t)
    expected[MASK] = 1 - h / (1 - t)
    assert close_to(new[0, 1::2].bincount(minlength=5), expected)


def test_a_certain_token_never_leaves():
    logits = log(torch.tensor([0.0, 0, 0, 1, 0])).expand(1, 500, 5)
    x = torch.full((1, 500), 3)
    assert torch.equal(fsdfm.jump(UNIFORM, logits, x, torch.tensor([0.5]), torch.tensor([0.5]), seeded()), x)


# ---- The losses


def test_the_path_loss_is_its_formula():
    generator = seeded()
    logits, t = torch.randn(3, 7, 5, generator=generator), torch.tensor([0.0, 0.5, 0.9])
    logits[..., MASK] = -1e30
    x_1, x = (torch.tensor(TOKENS)[torch.randint(4, (3, 7), generator=generator)] for _ in range(2))
    x[2] = x_1[2]
    loss = fsdfm.path_loss(logits, x, x_1, t)
    for b in range(3):
        total = 0.0
        for i in range(7):
            weights = [math.exp(z) for z in logits[b, i].tolist()]
            p, same = [w / sum(weights) for w in weights], float(x[b, i] == x_1[b, i])
            inner = p[x[b, i]] - same + (1 - same) * math.log(p[x_1[b, i]])
            total -= inner / (1 - t[b].item())
        assert loss[b].item() == pytest.approx(total / 7, rel=1e-5)
    assert loss[2] > 0  # x_t = x_1 everywhere: -g (p - 1), what is left of a rate that should be 0


# The truth: texts of two tokens, which depend on each other.
PAIRS = list(itertools.product(TOKENS, TOKENS))
JOINT = torch.softmax(2 * torch.randn(len(PAIRS), generator=seeded(3), dtype=torch.double), 0)


def posterior(c: DiTConfig, x: torch.Tensor, t: float) -> torch.Tensor:
    """P(x_1^i | x_t = x) (2, V) by enumeration, x (2,). And P(x_t = x)."""
    p = torch.zeros(2, 5, dtype=torch.double)
    for pair, q in zip(PAIRS, JOINT):
        for i in (0, 1):
            noise = 1 / 4 if c.source == "uniform" else float(x[i] == MASK)
            q = q * (t * (x[i] == pair[i]) + (1 - t) * noise)
        p[0, pair[0]] += q
        p[1, pair[1]] += q
    return p / p.sum(-1, keepdim=True), p[0].sum()


@pytest.mark.parametrize("c", [UNIFORM, MASKS], ids=["uniform", "mask"])
def test_the_path_loss_is_least_at_the_posterior(c):
    t, states = 0.4, TOKENS if c.source == "uniform" else [*TOKENS, MASK]
    rows, weights, optimum = [], [], []
    for x in itertools.product(states, states):
        p, _ = posterior(c, torch.tensor(x), t)
        optimum.append(log(p))
        for pair, q in zip(PAIRS, JOINT):
            for i in (0, 1):
                noise = 1 / 4 if c.source == "uniform" else float(x[i] == MASK)
                q = q * (t * (x[i] == pair[i]) + (1 - t) * noise)
            rows.append((len(optimum) - 1, x, pair))
            weights.append(q)
    index, x, x_1 = (torch.tensor(column) for column in zip(*rows))
    weights = torch.stack(weights)
    assert weights.sum().item() == pytest.approx(1)

    def expected(logits: torch.Tensor) -> torch.Tensor:
        return (weights * fsdfm.path_loss(logits[index], x, x_1, torch.full((len(x),), t))).sum()

    best = torch.stack(optimum).requires_grad_()
    least = expected(best)
    (gradient,) = torch.autograd.grad(least, best)
    assert gradient.abs().max() < 1e-7
    for seed in range(5):
        for size in (0.1, 1.0):
            noise = size * torch.randn(best.shape, generator=seeded(seed), dtype=torch.double)
            assert expected(best.detach() + noise) > least


def literal_jump(logits, x, t, h, generator):
    """The same draws, position by position."""
    u = torch.rand(x.shape, generator=generator, dtype=torch.double)
    e = torch.empty(logits.shape, dtype=torch.double).exponential_(generator=generator)
    new = x.clone()
    for b, i in itertools.product(*map(range, x.shape)):
        p = logits[b, i].double().softmax(-1)
        kept = ((1 - t[b] - h[b]).clamp(min=1e-8) / (1 - t[b])).item() ** (1 - p[x[b, i]].item())
        if u[b, i] < 1 - kept:
            p[x[b, i]] = 0
            new[b, i] = (p / p.sum() / e[b, i]).argmax()
    return new


def test_the_shortcut_teachers_are_algorithm_1():
    generator, model = seeded(1), tiny_dit(step_aware=True)
    x = torch.tensor(TOKENS)[torch.randint(4, (3, 8), generator=generator)]
    t, h, seen = torch.tensor([0.0, 0.5, 0.75]), torch.tensor([1.0, 0.5, 0.125]), []

    def teacher(x, t, h):
        seen.append((x, t.tolist(), h.tolist()))
        return model(x, t, h)

    with torch.no_grad():
        z = fsdfm.rk4(model.config, teacher, x, t, h, seeded(5))
        (x_0, *first), (x_1, *second), (x_2, *third), (x_3, *fourth) = seen
        half, middle = [0.5, 0.25, 0.0625], [0.5, 0.75, 0.8125]
        assert first == [t.tolist(), half] and fourth == [[1.0, 1.0, 0.875], half]
        assert second == third == [middle, half]
        g, h_2, t_m = seeded(5), torch.tensor(half), torch.tensor(middle)
        z_1 = model(x, t, h_2)
        expected_1 = literal_jump(z_1, x, t, h_2, g)
        z_2 = model(expected_1, t_m, h_2)
        expected_2 = literal_jump(z_2, expected_1, t_m, h_2, g)
        z_3 = model(expected_2, t_m, h_2)
        expected_3 = literal_jump(z_3, expected_2, t_m, h_2, g)
        z_4 = model(expected_3, t + h, h_2)
        for got, expected in zip((x_0, x_1, x_2, x_3), (x, expected_1, expected_2, expected_3)):
            assert torch.equal(got, expected)
        assert not torch.equal(x_0, x_1) and not torch.equal(x_1, x_2)  # the stages move
        torch.testing.assert_close(z, z_1 / 6 + z_2 / 3 + z_3 / 3 + z_4 / 6)

        seen.clear()
        z = fsdfm.rk2(model.config, teacher, x, t, h, seeded(5))
        assert [s[1:] for s in seen] == [(t.tolist(), half), (middle, half)]
        assert torch.equal(seen[1][0], expected_1)
        torch.testing.assert_close(z, (z_1 + z_2) / 2)


def test_step_sizes_and_times():
    h, t = fsdfm.step_sizes(200_000, 0.0, seeded())
    k = -h.log2()
    assert torch.equal(k, k.round()) and k.min() >= 0 and k.max() == 10
    assert close_to(k.long().bincount(minlength=11), 2.0 ** torch.arange(11) / 2047)
    assert torch.equal(t * 1024, (t * 1024).round()) and (t >= 0).all() and (t + h <= 1).all()
    for size in (0.25, 1 / 1024):
        times = (t[h == size] * 1024).long()
        assert times.max() <= 1024 - 1024 * size
        assert (t[h == size] <= (1 - size) / 2).float().mean().item() == pytest.approx(0.5, abs=0.06)
    assert (fsdfm.step_sizes(50_000, 0.0, seeded())[1][h[:50_000] == 1 / 1024] == 1023 / 1024).any()
    h, _ = fsdfm.step_sizes(50_000, 0.35, seeded())  # doubled three times: the last four weigh alike
    weight = torch.tensor([8.0, 16, 32, 64, 128, 256, 512, 1024, 1024, 1024, 1024])
    assert close_to((-h.log2()).long().bincount(minlength=11), weight / weight.sum())
    h, _ = fsdfm.step_sizes(50_000, 1.0, seeded())
    assert close_to((-h.log2()).long().bincount(minlength=11), torch.full((11,), 1 / 11))


def test_the_few_step_loss_is_kl_and_at_the_least_step_the_path_loss():
    """A student and a teacher that ignore what they read: the KL is that of two categoricals."""
    student = torch.nn.Parameter(log(torch.tensor([0.3, 0.3, 0, 0.2, 0.2])))
    theirs = log(P).clone().requires_grad_()

    class Constant(torch.nn.Module):
        config = UNIFORM

        def forward(self, x, t, h):
            return student.expand(*x.shape, 5)

    x_1, least = torch.tensor([[0, 1, 3, 4, 4, 4]]), set()
    kl = torch.distributions.kl_divergence(*(torch.distributions.Categorical(logits=z[TOKENS].double())
                                             for z in (theirs, student)))  # fmt: skip
    for seed in range(12):
        loss = fsdfm.few_step_loss(Constant(), lambda x, t, h: theirs.expand(*x.shape, 5), x_1, seeded(seed))
        g = seeded(seed)
        h, t = fsdfm.step_sizes(1, 0.0, g)
        x = fsdfm.path(UNIFORM, x_1, t, g)
        least.add(h.item() < 1 / 512)
        expected = fsdfm.path_loss(student.expand(1, 6, 5), x, x_1, t)[0] if h.item() < 1 / 512 else kl
        assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
        loss.backward()
    assert least == {True, False} and theirs.grad is None and student.grad is not None


@pytest.mark.parametrize("rule", fsdfm.TEACHERS)
def test_a_batch_may_have_least_steps_only_or_none(rule):
    """Batches of one row: the teacher reads an empty batch, or the path loss does."""
    model, least = tiny_dit(step_aware=True), set()
    for seed in range(12):
        least.add(fsdfm.step_sizes(1, 0.0, seeded(seed))[0].item() < 1 / 512)
        x_1 = torch.tensor([[0, 1, 3, 4]])
        loss = fsdfm.few_step_loss(model, model, x_1, seeded(seed), rule=rule)
        loss.backward()
        assert loss.isfinite() and all(p.grad.isfinite().all() for p in model.parameters())
    assert least == {True, False}


# ---- Sampling


class Truth:
    """The network that knows the posterior of JOINT."""

    def __init__(self, c: DiTConfig):
        self.c, self.calls, self.known = c, [], {}

    def __call__(self, x, t, h):
        self.calls.append((t[0].item(), h[0].item()))
        code, key = x[:, 0] * 5 + x[:, 1], round(t[0].item(), 9)
        if key not in self.known:
            table = torch.full((25, 2, 5), -1e30, dtype=torch.double)
            for a, b in itertools.product([*TOKENS, MASK], repeat=2):
                p, reached = posterior(self.c, torch.tensor([a, b]), t[0].item())
                if reached > 0:
                    table[a * 5 + b] = log(p)
            self.known[key] = table
        return self.known[key][code]


def frequencies(x: torch.Tensor) -> torch.Tensor:
    counts = (x[:, 0] * 5 + x[:, 1]).bincount(minlength=25).double()
    return torch.tensor([counts[a * 5 + b] for a, b in PAIRS])


@pytest.mark.parametrize("c", [UNIFORM, MASKS], ids=["uniform", "mask"])
def test_the_true_posterior_writes_the_truth_in_many_steps_and_independent_tokens_in_one(c):
    truth, canvas = Truth(c), torch.full((20_000, 2), MASK)
    *_, x = fsdfm.sample(truth, c, canvas, 16, seeded())
    assert truth.calls == [(s / 16, 1 / 16) for s in range(16)]
    wrong = (frequencies(x) / len(x) - JOINT).abs().sum().item()
    truth.calls.clear()
    (x,) = fsdfm.sample(truth, c, canvas, 1, seeded())
    assert truth.calls == [(0.0, 1.0)]  # one forward pass, at the noise
    square = JOINT.view(4, 4)
    independent = (square.sum(1, keepdim=True) * square.sum(0)).flatten()
    assert close_to(frequencies(x), independent)
    assert wrong < 0.1 < 0.3 < (independent - JOINT).abs().sum()


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_the_last_step_draws_every_token_anew(steps):
    """A posterior that ignores x: after the last step the tokens are draws of it, whatever they were."""
    canvas = torch.full((1, 40_000), MASK)
    *_, x = fsdfm.sample(lambda x, t, h: log(P).expand(*x.shape, 5), UNIFORM, canvas, steps, seeded())
    assert close_to(x[0].bincount(minlength=5), P)


@pytest.mark.parametrize("c", [UNIFORM, MASKS], ids=["uniform", "mask"])
def test_given_tokens_stay_and_no_mask_is_left(c):
    model, canvas = tiny_dit(source=c.source), torch.full((6, 10), MASK)
    canvas[:, 3:6] = torch.tensor([4, 0, 1])
    first, again, other = (list(fsdfm.sample(model, c, canvas, 4, seeded(seed))) for seed in (0, 0, 1))
    assert len(first) == 4 and not (first[-1] == MASK).any()
    for x in first:
        assert torch.equal(x[:, 3:6], canvas[:, 3:6])
        assert c.source == "mask" or not (x == MASK).any()
    assert torch.equal(first[-1], again[-1]) and not torch.equal(first[-1], other[-1])


def test_a_temperature_raises_p_to_its_inverse():
    """The last draw is from p^(1/T), normalised. Jumps are those of a network with logits / T."""
    z, canvas = log(P), torch.full((1, 40_000), MASK)
    flatter, same = (lambda x, t, h, s=s: (z / s).expand(*x.shape, 5) for s in (2.0, 1.0))
    runs = [list(fsdfm.sample(same, UNIFORM, canvas, 3, seeded(), temperature=2.0))]
    runs += [list(fsdfm.sample(network, UNIFORM, canvas, 3, seeded())) for network in (flatter, same)]
    assert all(torch.equal(a, b) for a, b in zip(*runs[:2], strict=True))
    assert not torch.equal(runs[0][0], runs[2][0])
    assert close_to(runs[0][-1][0].bincount(minlength=5), P.sqrt() / P.sqrt().sum())


@pytest.mark.parametrize("steps", [0, 1025])
def test_steps_that_were_not_trained_are_refused(steps):
    with pytest.raises(ValueError, match="between 1 and 1024"):
        next(fsdfm.sample(tiny_dit(), UNIFORM, torch.full((1, 4), MASK), steps))


# ---- The network


def test_a_new_network_is_uniform_and_a_student_begins_as_its_teacher():
    x, t = torch.tensor([[0, 1, 3, 4]]), torch.tensor([0.3])
    new = init_weights(DiT(DiTConfig(5, MASK, n_layer=1, n_head=2, d_model=16, d_cond=8)), seeded())
    p = new(x, t, t).softmax(-1)
    torch.testing.assert_close(p, torch.tensor([0.25, 0.25, 0, 0.25, 0.25]).expand_as(p))
    model = tiny_dit()
    student = student_of(model, seeded())
    for h in (1.0, 0.125, 1 / 1024):
        h = torch.tensor([h])
        torch.testing.assert_close(student(x, t, h), model(x, t, h), rtol=0, atol=0)
    aware = tiny_dit(step_aware=True)
    logits = [aware(x, *at) for at in itertools.product((t, t + 0.01), (torch.tensor([1 / 1024]), t))]
    assert all(not torch.allclose(a, b) for a, b in itertools.combinations(logits, 2))


def test_attention_sees_both_sides_and_distances_only():
    model, x, t = tiny_dit(), torch.tensor([[0, 1, 3, 4, 1, 0]]), torch.tensor([0.3])
    before, changed = model(x, t, t), x.clone()
    changed[0, 5] = 3
    assert (model(changed, t, t) - before)[0, 0].abs().max() > 1e-4  # the first reads the last
    changed = x[:, [1, 0, 2, 3, 4, 5]]
    assert (model(changed, t, t) - before)[0, 3].abs().max() > 1e-4  # order matters


def test_saved_and_loaded(tmp_path):
    model = tiny_dit(step_aware=True, source="mask")
    save(model, tmp_path)
    again = load(tmp_path)
    assert again.config == model.config
    for (name, a), (_, b) in zip(model.state_dict().items(), again.state_dict().items()):
        assert torch.equal(a, b), name
    values = json.loads((tmp_path / "config.json").read_text())
    for wrong, message in (({"n_layer": 3}, "missing blocks.2"), ({"source": "x"}, "choose from uniform"),
                           ({"n_head": 3}, "multiple"), ({"more": 1}, "damaged"),
                           ({"model_type": "rcd"}, "no FS-DFM")):  # fmt: skip
        (tmp_path / "config.json").write_text(json.dumps(values | wrong))
        with pytest.raises(ValueError, match=message):
            load(tmp_path)


# ---- The commands


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    (folder / "text.txt").write_text("to be or not to be, that is the question.\n" * 60)
    prepare.main([f"--source={folder / 'text.txt'}", f"--out={folder / 'data'}"])
    return folder / "data"


def call(monkeypatch, folder, *argv: str) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["fsdfm", *argv])
    command.main()


def options(text) -> list[str]:
    return ["train", f"--data={text}", "--steps=6", "--few_steps=6", "--batch_size=4", "--n_layer=1",
            "--n_head=2", "--d_model=16", "--d_cond=8", "--length=12", "--save_every=2", "--device=cpu",
            "--dtype=float32"]  # fmt: skip


def test_train_resume_and_sample(text, tmp_path, monkeypatch, capsys):
    argv = options(text)
    call(monkeypatch, tmp_path, *argv)
    learning_rate, calls = training.learning_rate, []

    def interrupted(o, step, steps):
        calls.append(step)  # of each of the two groups of weights
        if len(calls) in (7, 19):  # once in each stage
            os.kill(os.getpid(), signal.SIGINT)
        return learning_rate(o, step, steps)

    monkeypatch.setattr(training, "learning_rate", interrupted)
    for extra in ([], ["--resume"]):
        with pytest.raises(KeyboardInterrupt):
            call(monkeypatch, tmp_path, *argv, "--name=cut", *extra)
    with pytest.raises(ValueError, match="other options"):
        call(monkeypatch, tmp_path, *argv, "--name=cut", "--resume", "--few_lr=1")
    with pytest.raises(ValueError, match=r"cut/dfm was trained with other options: seed=1337 \(now 1\)"):
        call(monkeypatch, tmp_path, *argv, "--name=cut", "--resume", "--seed=1")
    call(monkeypatch, tmp_path, *argv, "--name=cut", "--resume")
    assert calls[::2] == calls[1::2] == [*range(6), *range(6)]
    for stage in ("dfm", "few"):
        files = (tmp_path / f"out/{run}/{stage}/model.safetensors" for run in ("fsdfm", "cut"))
        whole, cut = map(load_file, files)
        assert whole.keys() == cut.keys() and all(torch.equal(whole[n], cut[n]) for n in whole)
        assert not [*(tmp_path / f"out/cut/{stage}").glob("state*")]
    assert any(n.startswith("embed_h") for n in whole) and whole["embed_h.out.weight"].abs().max() > 0
    with pytest.raises(ValueError, match="already holds dfm, few"):
        call(monkeypatch, tmp_path, *argv)
    with checks.claimed(tmp_path / "out/fsdfm"), pytest.raises(ValueError, match="out/fsdfm is in use by"):
        call(monkeypatch, tmp_path, *argv, "--overwrite")
    call(monkeypatch, tmp_path, *argv, "--name=free", "--clip=0", "--stage=dfm")
    assert load_file(tmp_path / "out/free/dfm/model.safetensors")["head.weight"].abs().max() > 0
    copyfile(tmp_path / "out/fsdfm/few/model.safetensors", tmp_path / "out/cut/few/state.safetensors")
    with pytest.raises(ValueError, match="cut holds few, trained from what --overwrite replaces"):
        call(monkeypatch, tmp_path, *argv, "--name=cut", "--overwrite", "--stage=dfm")
    calls.clear()  # a new flow model, interrupted: the old student is no student of it
    with pytest.raises(KeyboardInterrupt):
        call(monkeypatch, tmp_path, *argv, "--name=cut", "--overwrite", "--seed=1")
    monkeypatch.setattr(training, "learning_rate", learning_rate)
    call(monkeypatch, tmp_path, *argv, "--name=cut", "--resume", "--seed=1")
    assert json.loads((tmp_path / "out/cut/few/train.json").read_text())["options"]["seed"] == 1
    capsys.readouterr()
    call(monkeypatch, tmp_path, "sample", "--steps=1,4", "--count=2", "--prompt=to be", "--device=cpu")
    shown = capsys.readouterr().out.split("---- ")[1:]
    assert [s.partition("\n")[0] for s in shown] == ["1 steps"] * 2 + ["4 steps"] * 2
    assert all(s.partition("\n")[2].startswith("to be") and len(s.partition("\n")[2]) == 13 for s in shown)


def test_the_table_of_a_judge(text, tmp_path, monkeypatch, tiny, capsys):
    """Its lines: the real text, then every budget. A judge that is not autoregressive is refused."""
    call(monkeypatch, tmp_path, *options(text), "--stage=dfm")
    dataset = data.load(text)
    for name, block_size in (("judge", 1), ("other", 0)):
        judge = tiny(vocab_size=dataset.meta["vocab_size"], mask_id=dataset.mask_id, block_size=block_size)
        save_run(judge, tmp_path / name)
        dataset.tokenizer.save(tmp_path / name)
    argv = ["sample", "--model=out/fsdfm/dfm", "--steps=1,3", "--count=5", "--device=cpu"]
    capsys.readouterr()
    call(monkeypatch, tmp_path, *argv, "--judge=judge")
    head, *rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert head == ["steps", "perplexity", "entropy"] and [row[0] for row in rows] == ["real", "1", "3"]
    assert all(float(row[1]) > 1 and 0 < float(row[2]) <= math.log2(12) for row in rows)
    with pytest.raises(ValueError, match="not autoregressive"):
        call(monkeypatch, tmp_path, *argv, "--judge=other")


@pytest.mark.parametrize("argv,message", [
    (["train", "--d_cond=0"], "d_cond=0 must be at least 1"), (["train", "--n_layer=-1"], "n_layer=-1 must"),
    (["train", "--teacher=x"], "choose from rk4, rk2"), (["train", "--steps=0"], "at least 1"),
    (["train", "--steps=-1"], "steps=-1 must not be negative"),
    (["train", "--clip=-1"], "clip=-1.0 must not be"), (["train", "--dtype=float16"], "loss scaling"),
    (["sample", "--steps=8,x"], "should be numbers"), (["sample", "--count=0"], "at least 1"),
    (["sample", "--temperature=0"], "must be above 0"),
    (["x"], "not x"), ([], "train or sample"), (["sample", "--model=none"], "no model 'none'"),
    (["sample"], "no model 'fsdfm/few': python -m"),
])  # fmt: skip
def test_mistakes_are_one_line(argv, message, tmp_path, monkeypatch):
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        call(monkeypatch, tmp_path, *argv)
    assert "\n" not in str(error.value)


def test_the_judge_reads_from_left_to_right(tiny):
    """Its perplexity by hand: a causal forward for each token, of those before it and a mask."""
    judge, texts = tiny(block_size=1), torch.tensor([[1, 2, 1, 1], [3, 4, 5, 6]])
    perplexities = []
    for row in texts:
        nats = 0.0
        for i, token in enumerate(row):
            ids = torch.cat([row[:i], torch.tensor([judge.config.mask_id])])[None]
            causal = torch.ones(i + 1, i + 1, dtype=torch.bool).tril()[None, None]
            with torch.no_grad():
                hidden = judge(judge.embed_tokens(ids), torch.arange(i + 1)[None], causal)
                nats -= judge.logits(hidden[0, -1:]).log_softmax(-1)[0, token].item()
        perplexities.append(math.exp(nats / 4))
    with torch.no_grad():
        perplexity, entropy = map(float, command.judged(judge, texts).split())
    assert perplexity == pytest.approx(sum(perplexities) / 2, abs=0.01)
    bits = -(0.75 * math.log2(0.75) + 0.25 * math.log2(0.25))
    assert entropy == pytest.approx((bits + 2.0) / 2, abs=0.001)  # the second row: four tokens, 2 bits
