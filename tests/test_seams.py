"""The four seams of rcd.py. An example of each, which the README shows too, decides what comes out.

Each example stands between a line `# example` and a line `# end`, to be copied as it is.
"""

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import rcd

README = Path(__file__).resolve().parents[1] / "README.md"
MASK = 11  # of the tiny models
CANVAS = torch.tensor([[3, 1, 4] + [MASK] * 9])


@pytest.fixture(autouse=True)
def tables():
    """What an example adds to a table is gone after its test."""
    tables = rcd.WEIGHTS, rcd.RULES
    kept = [dict(table) for table in tables]
    yield
    for table, before in zip(tables, kept):
        table.clear()
        table.update(before)


@torch.no_grad()
def logits_of(model, canvas, soft=None):
    """Logits (T, V) of one forward on the canvas (1, T). soft (T, D): what it reads at the masks."""
    x = model.embed_tokens(canvas)
    x = x if soft is None else torch.where((canvas == MASK)[..., None], soft, x)
    return model.logits(model(x, torch.arange(canvas.shape[1])[None])[0])


def test_a_weight(tiny):
    # example
    # A weight: p (n, V) -> alpha (n,). The closer the two likeliest tokens, the more residual.
    def margin(z, p, residual):
        first, second = p.topk(2).values.unbind(-1)
        return 1 - (first - second)

    rcd.WEIGHTS["margin"] = margin  # Residual(weight="margin")
    # end
    residual, p = rcd.Residual(weight="margin"), torch.tensor([[0.6, 0.1, 0.3], [0.5, 0.5, 0.0]])
    torch.testing.assert_close(residual(p.log(), torch.eye(3)), (torch.tensor([0.7, 1.0]), p))
    step = next(rcd.denoise(tiny(), CANVAS, residual=residual))
    two = logits_of(tiny(), CANVAS).softmax(-1).topk(2).values
    torch.testing.assert_close(step.alpha[0], (1 - two[:, 0] + two[:, 1]) * (step.tokens[0] == MASK))


def test_a_commit_rule(tiny):
    # example
    # A commit rule: masked cells -> which to fix now, (N,) bool. Low entropy, and always the lowest.
    def entropy_below(cells, sampler):
        entropy = rcd.entropy_of(*rcd.softmax(cells.logits)).to(cells.row.device)  # (N,) in nats
        return (entropy < 0.5) | cells.best(-entropy)

    rcd.RULES["entropy-below"] = entropy_below  # Sampler(rule="entropy-below")
    # end
    model, canvas, below = tiny(seed=1), CANVAS, []
    for step in rcd.denoise(model, canvas, rcd.Sampler(rule="entropy-below", carry="none")):
        entropy = torch.special.entr(logits_of(model, canvas).softmax(-1)).sum(-1)
        entropy = entropy.masked_fill(canvas[0] != MASK, torch.inf)
        below.append(int((entropy < 0.5).sum()))
        assert torch.equal(step.committed[0], (entropy < 0.5) | (entropy == entropy.min()))
        canvas = step.tokens
    assert 0 in below and max(below) > 1  # both halves of the rule were needed


@torch.no_grad()
def test_a_carry_is_asked_only_where_a_mask_is_left(tiny):
    """Not for the tokens that a step commits, nor at all after a block's last step."""
    rows = []

    def counting(logits, E, grad=False):
        rows.append(len(logits))
        return rcd.Residual()(logits, E)

    canvas = torch.tensor([[1] + [tiny().config.mask_id] * 5])
    steps = list(rcd.denoise(tiny(), canvas, rcd.Sampler(steps=3), counting))
    assert rows == [3, 1] and [int((step.alpha > 0).sum()) for step in steps] == [3, 1, 0]


def test_a_carry(tiny):
    # example
    # A carry: logits (N, V), E (V, D) -> alpha (N,), Delta (N, D). The likeliest token, weighted by its p.
    def top_1(logits, E, grad=False):
        confidence, token = logits.float().softmax(-1).max(-1)
        return confidence, E[token]

    # denoise(model, canvas, residual=top_1), and in training: reference_context(reference, top_1)
    # end
    model, reference, tokens = tiny(seed=3), tiny(seed=4), CANVAS.clamp(max=9)
    first, second, *_ = rcd.denoise(model, CANVAS, residual=top_1)
    (p, token), E = logits_of(model, CANVAS).softmax(-1).max(-1), model.embedding.detach()
    soft, masks = (1 - p)[:, None] * E[MASK] + p[:, None] * E[token], first.tokens[0] == MASK  # Eq. 2
    confidence = logits_of(model, first.tokens, soft).softmax(-1).amax(-1)
    torch.testing.assert_close((first.alpha[0], second.confidence[0]), (p * masks, confidence * masks))

    def by_hand(target, noised):
        p, token = logits_of(reference, noised.x)[noised.cells[1]].softmax(-1).max(-1)
        return p, target.embedding[token]

    by_seam, expected = (
        rcd.diffusion_loss(model, tokens, context=context, generator=torch.Generator().manual_seed(0))
        for context in (rcd.reference_context(reference, top_1), by_hand)
    )
    torch.testing.assert_close(by_seam, expected)


def test_a_reader(tiny):
    model, other = tiny(seed=3), tiny(seed=4)

    # example
    # A reader: canvas -> logits (N, V) at the masked cells. The mean of two models: `other` is the second.
    class Mean(rcd.Reader):
        passes = 2  # forward passes of a call, counted as NFE

        def __init__(self, model, tokens, lengths, b, fill):
            super().__init__(model, tokens, lengths, b)
            self.second = rcd.Reader(other, tokens, lengths, b)

        def __call__(self, *block):
            return (super().__call__(*block) + self.second(*block)) / 2

    class TwoModels(rcd.Sampler):  # denoise(model, canvas, TwoModels(carry="none")): a Delta is of one E
        reader = Mean

    # end
    canvas = CANVAS
    for step in rcd.denoise(model, canvas, TwoModels(carry="none")):
        p = ((logits_of(model, canvas) + logits_of(other, canvas)) / 2).softmax(-1)
        torch.testing.assert_close(step.confidence[0], p.amax(-1) * (canvas[0] == MASK))
        canvas = step.tokens
    assert step.nfe.item() == 18 and torch.equal(canvas[step.committed], p[step.committed[0]].argmax(-1))
    model = other = tiny(seed=3, block_size=4)  # each reader keeps a cache of its own
    plain, twice = (list(rcd.denoise(model, CANVAS, kind())) for kind in (rcd.Sampler, TwoModels))
    torch.testing.assert_close([s.confidence for s in twice], [s.confidence for s in plain])


def test_a_rule_finds_its_reader_and_the_hidden_states_behind_the_logits(tiny):
    """What a rule or a carry that looks back needs. Two runs side by side have a reader each."""
    model, seen = tiny(seed=3), ([], [])

    def watching(number):
        def rule(cells, sampler):
            seen[number].append(cells.read)
            torch.testing.assert_close(model.logits(cells.read.hidden), cells.logits)
            return cells.best(cells.confidence)

        return rule

    rcd.RULES |= {"first": watching(0), "second": watching(1)}
    for _ in zip(*(rcd.denoise(model, CANVAS, rcd.Sampler(rule=rule)) for rule in ("first", "second"))):
        pass
    (first,), (second,) = map(set, seen)
    assert first is not second and torch.equal(first.tokens, second.tokens) and len(seen[0]) == 9


def test_the_readme_solves_a_sudoku_in_ten_lines(tmp_path):
    (code,) = re.findall(r"## From Python\n\n```python\n(.+?)```", README.read_text(), flags=re.DOTALL)
    assert len(code.splitlines()) <= 12
    env = {**os.environ, "PYTHONPATH": str(README.parent)}  # elsewhere, there is no out/
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    lines = [line.split() for line in run.stdout.splitlines()]
    assert [nfe for nfe, _ in lines] == [str(k) for k in range(1, 9)], run.stderr
    assert lines[0][1].count("<mask>") == 22 and lines[-1][1] == "134562562341216453345126651234423615"


def test_the_readme_shows_these_examples():
    here, readme = Path(__file__).read_text(), README.read_text()
    examples = re.findall(r"    # example\n(.+?)    # end\n", here, flags=re.DOTALL)
    assert len(examples) == 4
    for example in examples:
        example = textwrap.dedent(example).strip()
        assert example in readme and len(re.findall(r"^ *[^ #\n]", example, flags=re.MULTILINE)) < 10
