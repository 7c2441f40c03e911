"""AdamW with moments in bfloat16, against torch.optim.AdamW and against what chance does to a mean."""

import pytest
import torch

from zoo.adam import AdamW, rounded


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pair(lr: float = 1e-2) -> list[tuple]:
    """(parameters, optimizer) of ours and of torch, from the same weights and with the same options."""
    found = []
    for kind in (AdamW, torch.optim.AdamW):
        shapes = ((7, 5), (5,), (0, 3))  # a process may hold no row
        weights = [torch.randn(shape, generator=seeded(0)).requires_grad_() for shape in shapes]
        groups = [{"params": weights[:1], "weight_decay": 0.1}, {"params": weights[1:], "weight_decay": 0.0}]
        found.append((weights, kind(groups, lr=lr, betas=(0.9, 0.98))))
    return found


def step(parameters: list, optimizer: torch.optim.Optimizer, seed: int) -> None:
    for p in parameters:
        p.grad = torch.randn(p.shape, generator=seeded(seed)) * 10 ** (seed % 3 - 1)
    optimizer.step()


def test_steps_are_those_of_torch_within_the_rounding_of_the_moments():
    """The first is the same but for the order of its products: no moment was stored before it."""
    ours, theirs = pair()
    for i in range(40):
        before = [p.detach().clone() for p in theirs[0]]
        for some in (ours, theirs):
            step(*some, i)
        for mine, p, old in zip(ours[0], theirs[0], before):
            moved = float((p - old).detach().abs().max()) if len(p) else 0.0
            torch.testing.assert_close(mine, p, atol=1e-6 if i == 0 else 0.02 * (i + 1) * moved, rtol=0)
    assert {x.dtype for s in ours[1].state.values() for k, x in s.items() if k != "step"} == {torch.bfloat16}
    for mine, p in zip(ours[0][:2], theirs[0][:2]):
        a, b = (o[1].state[x]["exp_avg_sq"].float() for o, x in ((ours, mine), (theirs, p)))
        torch.testing.assert_close(a, b, rtol=0.05, atol=0)


def test_a_parameter_without_a_gradient_stays():
    (parameters, optimizer), _ = pair()
    before = parameters[1].detach().clone()
    parameters[0].grad = torch.ones(7, 5)
    optimizer.step()
    assert torch.equal(parameters[1], before) and not optimizer.state[parameters[1]]


def test_rounding_is_right_in_the_mean_and_never_further_than_the_next_number():
    x = torch.tensor([1.0, 1.0 + 2**-9, 1.0 + 2**-8, 3.3e-9, 0.0, 7.77e20])
    drawn = torch.stack([rounded(x, seed).float() for seed in range(4000)])
    exact = torch.tensor([True, False, False, False, True, False])
    assert torch.equal(drawn.mean(0)[exact], x[exact]) and torch.equal(rounded(x, 3), rounded(x, 3))
    torch.testing.assert_close(drawn.double().mean(0), x.double(), rtol=4e-4, atol=0)
    assert ((drawn - x).abs() < 2**-7 * x + (x == 0)).all() and (drawn.unique(dim=0).size(0) > 2)
    halves = [rounded(torch.full((4000,), 1 + 2**-8), s).float() for s in (0, 1)]  # each element by itself
    assert all(0.45 < float((h > 1).float().mean()) < 0.55 for h in halves) and not torch.equal(*halves)


@pytest.mark.parametrize("square", [1.2, 0.8])
def test_changes_below_the_next_number_arrive(square):
    """A second moment of 1 on its way to `square`, by a fiftieth of the rest a step, the first of them half a
    bfloat16 apart: it comes there."""
    p = torch.zeros(2000, requires_grad=True)
    optimizer = AdamW([p], lr=0.0, betas=(0.9, 0.98))
    optimizer.state[p] = {"step": torch.tensor(5.0), "exp_avg": torch.zeros(2000, dtype=torch.bfloat16),
                          "exp_avg_sq": torch.ones(2000, dtype=torch.bfloat16)}  # fmt: skip
    for _ in range(300):
        p.grad = torch.full((2000,), square**0.5)
        optimizer.step()
    assert float(optimizer.state[p]["exp_avg_sq"].float().mean()) == pytest.approx(square, abs=2e-3)
    nearest = torch.ones((), dtype=torch.bfloat16)
    for _ in range(300):
        nearest = (0.98 * nearest.float() + 0.02 * square).bfloat16()
    assert abs(float(nearest) - square) > 0.05  # where rounding to the nearest gets stuck
