"""zoo/rivals/coupled_grpo: the estimate and the objective against literal loops, and a model that learns."""

import json
import math
import sys

import pytest
import torch
from safetensors.torch import load_file

import data
import zoo
from data.sudoku import prepare
from rcd import Residual
from zoo import files
from zoo.card import card
from zoo.recipes import earlier_context
from zoo.rivals import carries
from zoo.rivals.coupled_grpo import __main__ as command
from zoo.rivals.coupled_grpo import advantages, draws, grpo_loss, log_probability

MASK = 11  # of the tiny models


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def batch(seed: int = 0, B: int = 4, T: int = 9):
    g = seeded(seed)
    return torch.randint(MASK, (B, T), generator=g), torch.rand(B, T, generator=g) < 0.7, g


def test_the_estimate_is_three_forwards_by_hand(tiny):
    model, (tokens, response, g) = tiny(), batch()
    d, seen = draws(tokens, g), []
    model.embed_tokens.register_forward_hook(lambda module, args, out: seen.append(args[0]))
    with torch.no_grad():
        found = log_probability(model, tokens, response, d)
        everything, first, rest = (x == MASK for x in seen)
        assert torch.equal(everything, response) and torch.equal(first ^ rest, response)
        assert 0.1 < first[response].float().mean() < 0.9 and bool(((0.2 <= d.r) & (d.r <= 0.8)).all())
        hidden = [model(model.embed_tokens(x), torch.arange(9)[None]).flatten(0, 1) for x in seen[:3]]
        log_p = [model.logits(z).log_softmax(-1) for z in hidden]
    for b in range(4):
        for i in range(9):
            l_0, l_1, l_2 = (z.view(4, 9, -1)[b, i, tokens[b, i]].item() for z in log_p)
            r = d.r[b].item()
            expected = (l_0 + (l_1 / r if d.noise[b, i] < r else l_2 / (1 - r))) / 2
            assert found[b, i].item() == pytest.approx(expected * response[b, i].item(), rel=1e-4, abs=1e-6)


def test_policies_that_share_draws_read_the_same_masks(tiny):
    model, (tokens, response, g) = tiny(), batch()
    d = draws(tokens, g)
    with torch.no_grad():
        a, b = (log_probability(model, tokens, response, d) for _ in range(2))
        other = log_probability(model, tokens, response, draws(tokens, g))
    assert torch.equal(a, b) and not torch.allclose(a, other)


def test_a_residual_changes_the_estimate_and_a_weight_of_zero_does_not(tiny):
    model, (tokens, response, g) = tiny(), batch()
    d = draws(tokens, g)
    with torch.no_grad():
        plain, none, half = (
            log_probability(model, tokens, response, d, context)
            for context in (None, *(earlier_context(Residual(weight="fixed", fixed=a)) for a in (0.0, 0.5)))
        )
    torch.testing.assert_close(plain, none)
    assert not torch.allclose(plain[response], half[response]) and not half[~response].any()


def test_advantages_leave_one_out():
    rewards = torch.tensor([[1.0, 0, 0, 1], [1, 1, 1, 1], [0, 0, 0, 1]])
    found = advantages(rewards)
    for row, got in zip(rewards.tolist(), found.tolist()):
        for i, reward in enumerate(row):
            others = row[:i] + row[i + 1 :]
            assert got[i] == pytest.approx(reward - sum(others) / len(others))
    with pytest.raises(ValueError, match="at least 2"):
        advantages(torch.ones(3, 1))


def test_the_objective_is_its_formula():
    g = seeded()
    new, old, reference = -torch.rand(3, 2, 5, generator=g)
    advantage, response = torch.tensor([1.5, -0.5]), torch.rand(2, 5, generator=g) < 0.6
    total = 0.0
    for b, i in response.nonzero().tolist():
        rho, A = math.exp(new[b, i] - old[b, i]), advantage[b].item()
        away = reference[b, i].item() - new[b, i].item()
        gain = min(rho * A, min(max(rho, 0.9), 1.1) * A)
        total += -gain + 0.3 * (math.exp(away) - 1 - away)
    loss = grpo_loss(new, old, reference, advantage, response, clip=0.1, beta=0.3)
    assert loss.item() == pytest.approx(total / response.sum().item(), rel=1e-5)


def test_what_is_clipped_gives_no_gradient():
    """A ratio above 1.5 is not raised further by a good reward, but lowered by a bad one."""
    new = torch.tensor([[0.0], [0.0]], requires_grad=True)
    old, response = torch.full((2, 1), -1.0), torch.ones(2, 1, dtype=torch.bool)  # rho = e
    grpo_loss(new, old, new.detach(), torch.tensor([1.0, -1.0]), response).backward()
    assert new.grad[0] == 0 and new.grad[1].item() == pytest.approx(math.e / 2)


def test_a_model_learns_what_is_rewarded(tiny):
    """The reward of a completion: how many of its tokens are 3. Their probability rises within 25 steps."""
    model, g = tiny(gain=0.5, n_layer=1), seeded(1)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    response = torch.ones(24, 6, dtype=torch.bool)
    masks, positions = torch.full((24, 6), MASK), torch.arange(6)[None]

    def chance() -> torch.Tensor:
        with torch.no_grad():
            return model.logits(model(model.embed_tokens(masks), positions).flatten(0, 1)).softmax(-1)

    before = chance()[:, 3].mean().item()
    for _ in range(25):
        tokens = torch.multinomial(chance(), 1, generator=g).view(24, 6)
        advantage = advantages((tokens == 3).float().mean(1).view(2, 12)).flatten()
        d = draws(tokens, g)
        with torch.no_grad():
            old = log_probability(model, tokens, response, d)
        for _ in range(2):
            new = log_probability(model, tokens, response, d)
            grpo_loss(new, old, old, advantage, response).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert chance()[:, 3].mean().item() > 2 * before


@pytest.fixture(scope="module")
def puzzles(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "sudoku"
    prepare.main([f"--out={folder}", "--given=14", "--train=16", "--val=4", "--test=4"])
    return folder


def test_the_data_that_a_model_was_trained_on(puzzles, tmp_path):
    """Its folder, if it is there: the name alone says the default data set of that name."""
    assert data.trained_on({"data": "sudoku", "options": {"data": str(puzzles)}}) == str(puzzles)
    assert data.trained_on({"data": "sudoku", "options": {"data": str(tmp_path / "gone")}}) == "sudoku"
    assert data.trained_on({"data": "sudoku"}) == "sudoku" and data.trained_on({}) == ""


@pytest.mark.parametrize("start,more", [("target", ["--context"]), ("reference", [])])
def test_the_command_trains_a_run_that_loads(puzzles, start, more, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    argv = ["grpo", f"--model=sudoku/{start}", f"--data={puzzles}", "--steps=2", "--canvases=2", "--group=3",
            "--passes=2", "--lr=1e-3", "--weight_decay=0", "--sync=1", "--device=cpu", "--dtype=float32",
            *more]  # fmt: skip
    monkeypatch.setattr(sys, "argv", argv)
    command.main()
    loaded, origin = zoo.load(f"grpo/{start}"), zoo.load(f"sudoku/{start}")
    assert loaded.model.config == origin.model.config and loaded.meta["grpo"]["group"] == 3
    assert (loaded.meta["step"], loaded.meta["tokens"], loaded.meta["val_loss"]) == (2, None, None)
    told = card(loaded.folder, "you/name", "mit")
    assert "| training | 2 steps on rewards |" in told and "| validation bound | not measured |" in told
    weights = (load_file(x.folder / "model.safetensors") for x in (loaded, origin))
    assert any(not torch.equal(a, b) for a, b in zip(*(dict(sorted(w.items())).values() for w in weights)))
    assert "2 steps; mean reward" in capsys.readouterr().out
    with pytest.raises(ValueError, match="already there"):
        command.main()


def test_a_model_with_its_own_carry_completes_with_it(puzzles, tmp_path, monkeypatch):
    """So the sampler is a Decoding, whose reader puts that carry in the place of the residual."""
    monkeypatch.chdir(tmp_path)
    loaded, read, context = zoo.load("sudoku/target"), [], []
    files.save(carries.attach(loaded.model.float(), "loopholing", 0), tmp_path / "own")
    loaded.tokenizer.save(tmp_path / "own")
    meta = {"stage": "target", "residual": {"weight": "learned"}}
    (tmp_path / "own/train.json").write_text(json.dumps(meta))
    inner, estimate = carries.Carrying.__call__, command.log_probability
    monkeypatch.setattr(carries.Carrying, "__call__", lambda *a: read.append(1) or inner(*a))
    monkeypatch.setattr(command, "log_probability", lambda *a: context.append(a[-1]) or estimate(*a))
    argv = ["grpo", "--model=own", f"--data={puzzles}", "--steps=1", "--canvases=1", "--group=2", "--context",
            "--passes=2", "--device=cpu", "--dtype=float32"]  # fmt: skip
    monkeypatch.setattr(sys, "argv", argv)
    command.main()
    assert len(read) == 2 and {*context} == {carries.own_context}


def test_a_gradient_that_is_not_a_number_is_not_saved(puzzles, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "grpo_loss", lambda new, *_: new.sum() * math.nan)
    argv = ["grpo", "--model=sudoku/target", f"--data={puzzles}", "--steps=1", "--canvases=1", "--group=2",
            "--passes=2", "--device=cpu", "--dtype=float32"]  # fmt: skip
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(ValueError, match="the gradient became nan at step 0: lower lr="):
        command.main()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("option,message", [
    ("--group=1", "at least 2"), ("--steps=0", "at least 1"), ("--clip=-1", "must not be negative"),
    ("--lr=2", "at most 1"), ("--dtype=float16", "loss scaling"),
])  # fmt: skip
def test_mistakes_are_one_line(option, message, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["grpo", option])
    with pytest.raises(ValueError, match=message) as error:
        command.main()
    assert "\n" not in str(error.value)
