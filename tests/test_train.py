"""train.py end to end on a tiny configuration: files, resuming to the bit, the trajectory recipe against a literal transcription, bad input."""

import json
import math
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import train
from data.sudoku import prepare
from rcd import Config, Residual, Trajectories, Transformer, diffusion_loss
from zoo.files import load

ROOT = Path(__file__).resolve().parents[1]
TINY = ["--base_steps=4", "--steps=6", "--batch_size=6", "--n_layer=1", "--n_head=1", "--d_model=32", "--eval_every=2", "--eval_items=2",
        "--test_items=3", "--device=cpu", "--dtype=float32"]  # fmt: skip


@pytest.fixture(scope="module")
def puzzles(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "sudoku"
    prepare.main([f"--out={folder}", "--train=64", "--val=16", "--test=16"])
    return folder


@pytest.fixture
def run(monkeypatch, tmp_path, puzzles):
    """run(*options): train.py in an empty folder, its options typed after the tiny ones."""
    monkeypatch.chdir(tmp_path)

    def call(*options: str) -> None:
        monkeypatch.setattr(sys, "argv", ["train.py", f"--data={puzzles}", *TINY, *options])
        train.main()

    return call


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same(a: Path, b: Path) -> bool:
    a, b = weights(a), weights(b)
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_the_main_job(run, capsys):
    run("--name=job")
    out = capsys.readouterr().out
    for stage in train.STAGES:
        folder = Path("out/job") / stage
        meta = json.loads((folder / "train.json").read_text())
        steps = 4 if stage == "base" else 6
        assert meta["stage"] == stage and meta["step"] == steps and meta["tokens"] == steps * 6 * 36
        log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        assert [e["step"] for e in log] == list(range(1, steps + 1))
        assert [e["step"] for e in log if "val_loss" in e] == list(range(2, steps + 1, 2)) and all("val_accuracy" in e for e in log if "val_loss" in e)
        assert not (folder / "state.safetensors").exists() and (folder / "tokenizer.json").exists()
        assert load(folder).config.mask_id == 6
    # the reference and the target start from the base, and are no longer it, nor each other
    assert not any(same(Path("out/job") / a, Path("out/job") / b) for a, b in (("base", "reference"), ("base", "target"), ("reference", "target")))
    rows = json.loads(Path("out/job/table.json").read_text())["rows"]
    assert {r["label"] for r in rows} == {"SeqD", "RCD (cold)"} and all(len(r["correct"]) == 3 for r in rows)
    assert out.count("\n| SeqD") == sum(r["label"] == "SeqD" for r in rows) and "peak memory" in out and "device cpu (asked for)" in out


@pytest.mark.parametrize("options", [[], ["--recipe=paper", "--ema=0.9"], ["--accumulate=2", "--ema=0.5"]], ids=["trajectory", "paper", "accumulate"])
@pytest.mark.parametrize("at", [0, 2])
def test_an_interrupted_run_resumes_to_the_same_bits(run, capsys, monkeypatch, options, at):
    run("--name=whole", "--test_items=0", *options)
    inner, interrupted = train.learning_rate, []

    def interrupts(o, step, steps):  # Ctrl-C inside step `at` of every stage: a real signal
        if step == at and not interrupted:
            interrupted.append(step)
            signal.raise_signal(signal.SIGINT)
        return inner(o, step, steps)

    for stage in train.STAGES:
        interrupted.clear()
        monkeypatch.setattr(train, "learning_rate", interrupts)
        with pytest.raises(KeyboardInterrupt):
            run("--name=cut", "--test_items=0", "--resume", *options)
        told = capsys.readouterr().err
        assert f"{stage}: stopped at step {at + 1} of" in told and "--resume" in told and (Path("out/cut") / stage / "state.safetensors").exists()
        monkeypatch.setattr(train, "learning_rate", inner)
        run("--name=cut", "--test_items=0", "--resume", f"--stage={stage}", *options)
    for stage in train.STAGES:
        assert same(Path("out/whole") / stage, Path("out/cut") / stage), stage
        whole, cut = (json.loads((Path("out") / n / stage / "train.json").read_text())["val_loss"] for n in ("whole", "cut"))
        assert whole == cut


def test_a_killed_run_resumes_from_its_last_save_to_the_same_bits(run, monkeypatch):
    run("--name=whole", "--stage=base")
    inner, calls = train.diffusion_loss, {"n": 0}

    def dies(*args, **kwargs):
        calls["n"] += torch.is_grad_enabled()
        if calls["n"] == 4:  # after the save at step 2
            raise MemoryError
        return inner(*args, **kwargs)

    monkeypatch.setattr(train, "diffusion_loss", dies)
    with pytest.raises(MemoryError):
        run("--name=dead", "--stage=base")
    monkeypatch.setattr(train, "diffusion_loss", inner)
    run("--name=dead", "--stage=base", "--resume")
    assert same(Path("out/whole/base"), Path("out/dead/base"))
    steps = [json.loads(line)["step"] for line in Path("out/dead/base/log.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4]


def test_resuming_under_other_options_is_refused(run, monkeypatch):
    inner = train.learning_rate
    monkeypatch.setattr(train, "learning_rate", lambda o, step, steps: (step == 2 and stop()) or inner(o, step, steps))
    sent = []

    def stop():  # SIGTERM is what a scheduler sends; the rate is asked for twice a step, a second signal would interrupt at once
        if not sent:
            sent.append(signal.raise_signal(signal.SIGTERM))

    with pytest.raises(KeyboardInterrupt):
        run("--name=x", "--stage=base")
    with pytest.raises(ValueError, match=r"was trained with other options: lr=0.001 \(now 0.5\)"):
        run("--name=x", "--stage=base", "--resume", "--lr=0.5")
    run("--name=x", "--stage=base", "--resume", "--eval_every=1")  # what is shown may change


def test_seed_decides(run):
    run("--name=a", "--stage=base", "--seed=1")
    run("--name=b", "--stage=base", "--seed=1")
    run("--name=c", "--stage=base", "--seed=2")
    assert same(Path("out/a/base"), Path("out/b/base")) and not same(Path("out/a/base"), Path("out/c/base"))


def test_checkpointed_activations_change_no_bit(run):
    run("--name=a", "--stage=base")
    run("--name=b", "--stage=base", "--remat")
    assert same(Path("out/a/base"), Path("out/b/base"))


def test_conversion_of_another_model(run):
    """--init_from replaces the base; --reference may be another, smaller model (small-to-large)."""
    run("--name=small", "--stage=base")
    run("--name=big", "--stage=base", "--d_model=64", "--n_head=2")
    run("--name=big", "--stage=target", "--init_from=out/big/base", "--recipe=paper", "--reference=small/base", "--d_model=64", "--n_head=2")
    assert load("out/big/target").config.d_model == 64
    assert json.loads(Path("out/big/target/train.json").read_text())["reference"] == "small/base"


def test_learning_rate_by_hand():
    o = train.Train(lr=1.0, warmup=0.1, schedule="cosine")
    assert [train.learning_rate(o, i, 100) for i in (0, 9, 10)] == [0.1, 1.0, 1.0]
    assert train.learning_rate(o, 55, 100) == pytest.approx(0.1 + 0.9 / 2)  # half-way down the cosine
    assert train.learning_rate(o, 100, 100) == pytest.approx(0.1)
    o.schedule = "constant"
    assert train.learning_rate(o, 99, 100) == 1.0


# The trajectory recipe: one denoising step of every trajectory, written out cell by cell.


PACKED = torch.tensor([[1, 1, 1, 1, 1, 2, 2, 2], [1] * 8, [1, 1, 2, 2, 2, 2, 0, 0]])  # 0 = padding


def documents_of(row: torch.Tensor) -> list[range]:
    """Where each document of a row lies, padding included."""
    cuts = [0, *(j for j in range(1, len(row)) if row[j] != row[j - 1]), len(row)]
    return [range(a, b) for a, b in zip(cuts, cuts[1:])]


@pytest.mark.parametrize("segments", [None, PACKED], ids=["", "packed"])
@pytest.mark.parametrize("block_size", [0, 4])
def test_trajectories_against_a_literal_transcription(block_size, segments):
    T, B, c = 8, 3, Config(vocab_size=9, mask_id=8, n_layer=2, n_head=2, n_kv_head=1, head_dim=8, d_model=16, d_ff=24, block_size=block_size)
    model = Transformer(c).init_weights(torch.Generator().manual_seed(0))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(4 if p.dim() == 2 else 1)
    generator, residual = torch.Generator().manual_seed(1), Residual()
    tokens = torch.randint(0, 8, (B, T), generator=generator)
    response = torch.ones(B, T, dtype=torch.bool)
    response[0, :3] = response[1, 5] = False
    if segments is not None:
        response &= segments > 0
    documents = [documents_of(row) for row in (torch.ones(B, T) if segments is None else segments)]
    for i, ranges in enumerate(documents):
        response[i, [d[0] for d in ranges]] = False  # a first block that is all masks predicts the same everywhere: ties
    trajectories = Trajectories(c, B, T, packed=segments is not None)
    asked = []
    masked, carried, left = response.clone(), {}, None
    for step in range(4):
        loss = trajectories.loss(model, lambda n: asked.append(n) or (tokens, response, segments), residual, generator)
        left = trajectories.state["left"] + 1 if step == 0 else left  # budgets are drawn inside; from here on they count down
        # the input: the truth, [MASK], or the mix of the residual that the step before left
        x = model.embed(tokens.masked_fill(masked, c.mask_id)).clone()
        for (row, column), (alpha, delta) in carried.items():
            x[row, column] = (1 - alpha) * model.embedding[c.mask_id] + alpha * delta
        logits = torch.zeros(B, T, 9)
        expected = 0.0
        for i in range(B):
            for d in documents[i]:
                d = list(d)
                logits[i, d] = literal_logits(model, x[i : i + 1, d], tokens[i : i + 1, d])[0]
                for j in d:
                    if masked[i, j]:
                        level = masked[i, d].sum() / response[i, d].sum()  # how noisy this document still is
                        expected = expected - logits[i, j].log_softmax(-1)[tokens[i, j]] / level
        assert loss.item() == pytest.approx(float(expected / response.sum()), rel=1e-4)
        loss.backward()
        if left is None or (left < 1).any():
            break
        # commit: per block, the surest of those still masked, as many as keep the budget; carry the rest
        confidence, now = logits.softmax(-1).amax(-1), masked.clone()
        for i in range(B):
            tau = float(trajectories.state["threshold"][i])
            for columns in (d[k : k + (block_size or T)] for d in documents[i] for k in range(0, len(d), block_size or T)):
                open_cells = sorted((j for j in columns if masked[i, j]), key=lambda j: -confidence[i, j].item())
                for j in open_cells[: math.ceil(len(open_cells) / max(int(left[i]), 1))]:
                    now[i, j] = False
                for j in open_cells:
                    now[i, j] &= bool(confidence[i, j] <= tau)
        p = logits.softmax(-1)
        carried = {}
        for i, j in now.nonzero().tolist():
            alpha = -sum(float(q) * math.log(float(q)) for q in p[i, j] if q > 0) / math.log(9)
            carried[i, j] = (alpha, p[i, j] @ model.embedding)
        masked, left = now, left - 1
        assert torch.equal(trajectories.state["masked"], masked)
        if not masked.any(dim=1).all():
            break
    assert asked == [B] and step >= 1
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def literal_logits(model: Transformer, x: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Logits at every cell of one document; a block-causal model reads each block after clean blocks, one block at a time."""
    b, T = model.config.block_size, x.shape[1]
    positions = torch.arange(T)[None]
    if not b:
        hidden = model(x, positions)
    else:
        parts = []
        for k in range(0, T, b):
            seen = torch.cat([model.embed(tokens[:, :k]), x[:, k : k + b]], dim=1)
            n = seen.shape[1]
            mask = (torch.arange(n)[None, :] // b <= torch.arange(n)[:, None] // b)[None, None]
            parts.append(model(seen, positions[:, :n], mask)[:, k:])
        hidden = torch.cat(parts, dim=1)
    return model.logits(hidden.reshape(-1, hidden.shape[-1])).view(*x.shape[:2], -1).detach()


@pytest.mark.parametrize("block_size, packed, most", [(0, False, (5, 8, 4)), (0, True, (3, 8, 4)), (4, False, (4, 4, 4)), (4, True, (3, 4, 4))])
def test_the_budget_of_a_trajectory_lies_between_two_steps_and_one_token_a_step_of_its_largest_block(block_size, packed, most):
    c = Config(vocab_size=9, mask_id=8, n_layer=1, n_head=1, n_kv_head=1, head_dim=8, d_model=16, d_ff=24, block_size=block_size)
    model = Transformer(c).init_weights(torch.Generator().manual_seed(0))
    response = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1], [1] * 8, [1, 1, 1, 1, 0, 0, 0, 0]]).bool()
    segments = torch.tensor([[1, 1, 1, 1, 1, 2, 2, 2], [1] * 8, [1] * 6 + [0] * 2]) if packed else None
    budgets, generator = [], torch.Generator().manual_seed(0)
    for _ in range(200):
        trajectories = Trajectories(c, 3, 8, packed=packed)
        trajectories.loss(model, lambda n: (torch.zeros(3, 8, dtype=torch.long), response, segments), Residual(), generator)
        budgets.append(trajectories.state["left"] + 1)  # the first step is done
    budgets = torch.stack(budgets)
    assert tuple(budgets.amin(0).tolist()) == (2, 2, 2) and tuple(budgets.amax(0).tolist()) == most


def test_trajectories_start_cold_and_end_full():
    c = Config(vocab_size=9, mask_id=8, n_layer=1, n_head=1, n_kv_head=1, head_dim=8, d_model=16, d_ff=24)
    model, generator = Transformer(c).init_weights(torch.Generator().manual_seed(0)), torch.Generator().manual_seed(1)
    response = torch.ones(4, 10, dtype=torch.bool)
    trajectories, fresh = Trajectories(c, 4, 10), []

    def draw(n):
        fresh.append(n)
        return torch.randint(0, 8, (n, 10), generator=generator), response[:n], None

    seen = []
    for _ in range(40):
        before = trajectories.state["masked"].clone()
        trajectories.loss(model, draw, Residual(), generator)
        after = trajectories.state["masked"]
        running = before.any(dim=1)
        assert ((after & ~before).sum(1)[running] == 0).all()  # nothing committed is ever masked again
        assert (after.sum(1)[running] < before.sum(1)[running]).all()  # every step commits
        seen.append(after.sum().item())
    assert fresh[0] == 4 and sum(fresh) > 8 and min(fresh[1:]) < 4  # rows are replaced one by one, as they fill
    cold = Trajectories(c, 4, 10)
    loss = cold.loss(model, lambda n: (torch.zeros(4, 10, dtype=torch.long), response, None), Residual(), generator)
    plain = diffusion_loss(model, torch.zeros(4, 10, dtype=torch.long), response, t=torch.ones(4, 1))
    assert loss.item() == pytest.approx(plain.item(), rel=1e-5)  # the first step is an ordinary pass at t = 1


@pytest.mark.parametrize(
    "options, words",
    [
        (["--stpes=3"], "unrecognized arguments: --stpes=3"),
        (["--steps=many"], "invalid int value: 'many'"),
        (["--recipe=letter"], "recipe='letter': choose from trajectory, paper"),
        (["--stage=middle"], "stage='middle': choose from"),
        (["--preset=tpu"], "preset='tpu': choose from cpu, gpu"),
        (["--data=nowhere"], "no data set 'nowhere'"),
        (["--device=warp"], "device='warp' is not available here"),
        (["--dtype=float16"], "dtype=float16 would need loss scaling"),
        (["--dtype=int4"], "dtype='int4': choose from"),
        (["--lr=-1"], "lr=-1.0 must not be negative"),
        (["--stage=target"], "base is not trained yet"),
        (["--init_from=nothing-here"], "no model 'nothing-here'"),
        (["--accumulate=9", "--batch_size=4"], "accumulate=9 must lie between 1 and batch_size=4"),
        (["--weight=heavy"], "weight='heavy': choose from entropy"),
        (["--reference=out/x"], "--reference is read by --recipe=paper"),
        (["--init_from=x", "--stage=base"], "--stage=base trains a base from scratch"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(options, words, puzzles, tmp_path):
    given = options if any(o.startswith("--data") for o in options) else [f"--data={puzzles}", *options]
    done = subprocess.run([sys.executable, ROOT / "train.py", *given], cwd=tmp_path, capture_output=True, text=True)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 2 and words in last and "Traceback" not in done.stderr
    assert re.match(r"(train\.py: )?error: ", last)
    assert not list(tmp_path.glob("out/*/*/*.safetensors"))


def test_a_run_is_not_overwritten_by_accident(run):
    run("--name=kept", "--stage=base")
    with pytest.raises(ValueError, match="already holds base: --resume goes on, --overwrite starts again"):
        run("--name=kept", "--stage=base")
    before = weights(Path("out/kept/base"))
    run("--name=kept", "--stage=base", "--overwrite", "--seed=5")
    assert any(not torch.equal(before[k], v) for k, v in weights(Path("out/kept/base")).items())


def test_a_loss_that_is_not_a_number_stops_the_run(run):
    with pytest.raises(ValueError, match="the loss became .* lower --lr"):
        run("--name=nan", "--stage=base", "--lr=1e30", "--clip=0", "--base_steps=8")
