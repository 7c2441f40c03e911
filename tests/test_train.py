"""train.py on tiny models: a run's files, resuming to the bit, trajectories, memory and FLOPs, errors."""

import functools
import json
import math
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import data
import rcd
import train
from data.common import write_dataset
from data.sudoku import prepare
from rcd import Config, Residual, Transformer, diffusion_loss
from zoo import recipes, speed
from zoo.experts import Experts
from zoo.files import load
from zoo.recipes import Trajectories, init_weights
from zoo.tokenizer import Tokenizer, bytes_tokenizer
from zoo.tools import budget, checks, command, distributed, models, training

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
TINY = ["--base_steps=4", "--steps=6", "--batch_size=6", "--n_layer=1", "--n_head=1", "--d_model=32",
        "--eval_every=2", "--eval_items=2", "--test_items=3", "--device=cpu", "--dtype=float32"]  # fmt: skip


@pytest.fixture(scope="module")
def puzzles(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "sudoku"
    prepare.main([f"--out={folder}", "--given=20", "--train=64", "--val=16", "--test=16"])
    return folder


def write_packed(folder: Path, tokenizer: Tokenizer, mask_id: int, pad_id: int, documents: dict[str, list],
                 length: int) -> Path:  # fmt: skip
    """A data set of packed rows: documents one after the other, cut into rows between two of them.

    A document is its ids, and of each of them whether it is an answer's.
    """
    splits = {}
    for split, texts in documents.items():
        rows = [[]]
        for ids, answer in texts:
            if sum(len(d[0]) for d in rows[-1]) + len(ids) > length:
                rows.append([])
            rows[-1].append((ids, answer))
        tokens, response = np.full((len(rows), length), pad_id), np.zeros((len(rows), length), bool)
        numbers = np.zeros((len(rows), length), np.uint16)
        for r, row in enumerate(rows):
            at = 0
            for k, (ids, answer) in enumerate(row, 1):
                place = r, slice(at, at + len(ids))
                tokens[place], response[place], numbers[place] = ids, answer, k
                at += len(ids)
        splits[split] = tokens, response, numbers
    counts = {split: len(texts) for split, texts in documents.items()}
    facts = {"template": None, "packed": list(splits), "block": 1, "documents": counts}
    write_dataset(folder, "gsm8k", tokenizer, splits, mask_id=mask_id, eos_id=pad_id, source="this test",
                  licence="none", argv=[], facts=facts)  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """Questions and answers of 6 to 19 bytes in rows of 40, every row with padding at its end or none."""
    draw, documents = np.random.default_rng(0), {}
    for split, count in (("train", 60), ("val", 12), ("test", 12)):
        sizes = draw.integers([4, 2], [12, 8], (count, 2)).tolist()
        documents[split] = [(draw.integers(97, 123, q + a).tolist(), [False] * q + [True] * a)
                            for q, a in sizes]  # fmt: skip
    folder = tmp_path_factory.mktemp("packed") / "data"
    return write_packed(folder, bytes_tokenizer(["<eos>", "<mask>"]), 257, 256, documents, 40)


@pytest.fixture
def run_in_full(monkeypatch, tmp_path, puzzles):
    """run_in_full(*options): train.py in an empty folder, its options typed after the tiny ones."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "matmul_rate", lambda device, dtype: 1e12)  # takes 0.2 s
    trace, traced = budget.kept_by_layer, {}  # takes 0.3 s, and every stage asks for the same

    def kept(model, *given):
        key = str(model.config), *given
        traced[key] = traced[key] if key in traced else trace(model, *given)
        return traced[key]

    monkeypatch.setattr(budget, "kept_by_layer", kept)

    def call(*options: str) -> None:
        monkeypatch.setattr(sys, "argv", ["train.py", f"--data={puzzles}", *TINY, *options])
        train.main()

    return call


@pytest.fixture
def run(monkeypatch, run_in_full):
    """The same without what takes longest and decides no weight.

    A validation takes 4 x 4 canvases and not 4 x 256, and none to fill. No layer is traced for its memory.
    """
    monkeypatch.setattr(train, "validate", lambda *given: training.validate(*given[:5], 1 << 14, given[6]))
    monkeypatch.setattr(budget, "kept_by_layer", lambda *_: 1 << 20)
    return functools.partial(run_in_full, "--eval_items=0", "--test_items=0")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same(a: Path, b: Path) -> bool:
    a, b = weights(a), weights(b)
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def log_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def meta_of(folder: Path) -> dict:
    return json.loads((folder / "train.json").read_text())


def test_the_main_job(run_in_full, capsys, monkeypatch):
    validation, residuals = train.accuracy, []
    monkeypatch.setattr(train, "accuracy", lambda *given: residuals.append(given[-2]) or validation(*given))
    run_in_full("--name=job", "--eval_every=3")
    out, job = capsys.readouterr().out, Path("out/job")
    for stage in train.STAGES:
        folder, steps = job / stage, 4 if stage == "base" else 6
        meta, log = meta_of(folder), log_of(folder)
        assert (meta["stage"], meta["step"], meta["tokens"]) == (stage, steps, steps * 6 * 36)
        assert [e["step"] for e in log] == list(range(1, steps + 1))
        assert all(e["mfu"] == e["tflops"] > 0 for e in log)
        validated = [e for e in log if "val_loss" in e]
        assert [e["step"] for e in validated] == [3, steps]
        assert all("val_accuracy" in e for e in validated)
        assert not (folder / "state.safetensors").exists() and (folder / "tokenizer.json").exists()
        assert load(folder).config.mask_id == 6
    assert {r.weight for r in residuals} == {"entropy"} == {meta_of(job / "target")["residual"]["weight"]}
    # The reference and the target start from the base, and are no longer it, nor each other.
    pairs = (("base", "reference"), ("base", "target"), ("reference", "target"))
    assert not any(same(job / a, job / b) for a, b in pairs)
    rows = json.loads((job / "table.json").read_text())["rows"]
    assert {r["label"] for r in rows} == {"SeqD", "RCD (cold)", "RCD (self)"}
    assert all(len(r["correct"]) == 3 for r in rows)
    assert out.count("\n| SeqD") == sum(r["label"] == "SeqD" for r in rows)
    assert "peak memory" in out and "device cpu (asked for)" in out


def stopped(run, monkeypatch, sent: int, at: int, *options: str) -> None:
    """run(*options), with this signal inside step `at` of the stage that comes to it first."""
    inner = train.learning_rate

    def stops(o, step, steps):
        if step == at:
            signal.raise_signal(sent)
        return inner(o, step, steps)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "learning_rate", stops)
        run(*options)


@pytest.mark.parametrize("at, options", [
    ((2,), ["--buffer=2", "--steps=4"]),
    ((2,), ["--buffer=1", "--steps=4", "--grow"]),
    ((2,), ["--recipe=paper", "--ema=0.9"]),
    ((0, 2), ["--buffer=2", "--steps=4", "--accumulate=2", "--ema=0.5", "--adam=bfloat16"]),
    ((2,), ["packed", "--accumulate=4", "--ema=0.5", "--block_size=4"]),
    ((2,), ["packed", "--recipe=paper", "--remat", "--block_size=4", "--t_per=block"]),
])  # fmt: skip
def test_an_interrupted_run_resumes_to_the_same_bits(run, capsys, monkeypatch, packed, options, at):
    """Ctrl-C, a real signal, inside these steps of every stage."""
    options = [f"--data={packed}" if o == "packed" else o for o in options]
    run("--name=whole", *options)
    for stage in train.STAGES:
        for step in at:
            capsys.readouterr()
            stopped(run, monkeypatch, signal.SIGINT, step, "--name=cut", "--resume", *options)
            told = capsys.readouterr().err
            assert f"{stage}: stopped at step {step + 1} of" in told and "--resume" in told
            assert (Path("out/cut") / stage / "state.safetensors").exists()
    run("--name=cut", "--resume", *options)
    for stage in train.STAGES:
        whole, cut = Path("out/whole") / stage, Path("out/cut") / stage
        assert same(whole, cut), stage
        assert meta_of(whole)["val_loss"] == meta_of(cut)["val_loss"]


def test_weighting_reaches_both_stages_and_not_the_base(run):
    for name, weighting in (("a", "1/t"), ("b", "1")):
        run(f"--name={name}", f"--weighting={weighting}", "--buffer=1")
    assert [same(Path("out/a") / s, Path("out/b") / s) for s in train.STAGES] == [True, False, False]
    more = ["--recipe=earlier", "--stage=target", "--init_from=a/base", "--weighting=complementary"]
    run("--name=c", *more)
    run("--name=d", *more[:-1])
    assert not same(Path("out/c/target"), Path("out/d/target"))
    assert meta_of(Path("out/b/target"))["options"]["weighting"] == "1"


def test_grow_reaches_the_target_alone(run):
    for name, more in (("a", []), ("b", ["--grow"])):
        run(f"--name={name}", "--buffer=1", *more)
    assert [same(Path("out/a") / s, Path("out/b") / s) for s in train.STAGES] == [True, True, False]


def test_a_killed_run_resumes_from_its_last_save_to_the_same_bits(run, monkeypatch):
    run("--name=whole", "--stage=base")
    inner, calls = training.LOSSES["1/t"], []

    def dies(*args, **options):
        calls.append(1)
        if len(calls) == 4:  # after the save at step 2
            raise MemoryError
        return inner(*args, **options)

    monkeypatch.setitem(training.LOSSES, "1/t", dies)
    with pytest.raises(MemoryError):
        run("--name=dead", "--stage=base")
    monkeypatch.setitem(training.LOSSES, "1/t", inner)
    run("--name=dead", "--stage=base", "--resume")
    assert same(Path("out/whole/base"), Path("out/dead/base"))
    assert [e["step"] for e in log_of(Path("out/dead/base"))] == [1, 2, 3, 4]


def test_tensorboard_holds_what_the_log_holds(run, monkeypatch):
    """After a kill and a resumption too: no point is missing, and none is there twice."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    inner = training.LOSSES["1/t"]

    def dies(*args, **options):
        if len(log_of(Path("out/x/base"))) == 3:  # a step after the save at step 2
            raise MemoryError
        return inner(*args, **options)

    options = ["--name=x", "--stage=base", "--log=tensorboard"]
    monkeypatch.setitem(training.LOSSES, "1/t", dies)
    with pytest.raises(MemoryError):
        run(*options)
    monkeypatch.setitem(training.LOSSES, "1/t", inner)
    run(*options, "--resume")
    log, events = log_of(Path("out/x/base")), Path("out/x/base/tensorboard")
    expected = [(name, e["step"], value) for e in log for name, value in e.items() if name != "step"]
    found = []
    for file in events.iterdir():
        reader = accumulator.EventAccumulator(str(file)).Reload()
        found += [(name, s.step, s.value) for name in reader.Tags()["scalars"] for s in reader.Scalars(name)]
    assert [e["step"] for e in log] == [1, 2, 3, 4] and "val_loss" in log[1]
    for a, b in zip(sorted(found), sorted(expected), strict=True):
        assert a[:2] == b[:2] and a[2] == pytest.approx(b[2], rel=1e-6)


class FakeWandb:
    """As much of the package as a sink uses. A run is found by its id, and takes no step twice."""

    Error = RuntimeError

    def __init__(self):
        self.runs, self.configs = {}, {}

    def init(self, *, project, name, id, dir, config, resume, reinit):
        assert (project, resume, reinit) == ("rcd", "allow", "finish_previous") and Path(dir).is_dir()
        points, self.configs[id] = self.runs.setdefault((name, id), []), config

        def log(values, *, step, commit):
            assert commit and step >= run.step
            run.step = step + 1
            points.append({"step": step, **values})

        run = SimpleNamespace(step=points[-1]["step"] + 1 if points else 0, log=log)
        return run


def test_wandb_gets_each_entry_once(run, monkeypatch):
    """A resumed stage goes on in its run, also if that is ahead. A stage that starts anew gets another."""
    fake, options = FakeWandb(), ["--name=x", "--stage=base", "--log=wandb"]
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr(checks, "find_spec", lambda name: name)
    stopped(run, monkeypatch, signal.SIGINT, 1, *options)
    (first,) = fake.runs
    assert first[0] == "x/base" and fake.configs[first[1]]["batch_size"] == 6
    ahead = {"step": 3, "loss": 0.0}  # of a process that was killed after its last save
    fake.runs[first].append(ahead)
    run(*options, "--resume")
    log = log_of(Path("out/x/base"))
    assert fake.runs[first] == [*log[:2], ahead, log[3]]
    run(*options, "--overwrite")
    assert len(fake.runs) == 2 and list(fake.runs.values())[1] == log_of(Path("out/x/base"))

    def refuse(**_):
        raise fake.Error("no login")

    monkeypatch.setattr(fake, "init", refuse)
    with pytest.raises(ValueError, match="^--log=wandb: no login; type `wandb login` first"):
        run(*options, "--overwrite")


def test_a_log_without_its_package_is_one_line(run, monkeypatch):
    monkeypatch.setattr(checks, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"^--log=wandb needs .* pip install -e '.\[wandb\]'$"):
        run("--log=wandb")
    with pytest.raises(ValueError, match="^log='paper': choose from tensorboard, wandb$"):
        run("--log=paper")
    assert not Path("out").exists()


def test_options_of_an_earlier_run(run, monkeypatch, capsys):
    """All are given back but those that are typed. Those of earlier versions get today's names."""
    run("--name=a", "--stage=base", "--lr=0.02", "--seed=3", "--schedule=constant")
    file = Path("out/a/base/train.json")
    meta = meta_of(file.parent)
    meta["options"] |= {"pool": meta["options"].pop("buffer"), "given": 0.0, "overwrite": True, "warmup": 0}
    file.write_text(json.dumps(meta))

    def again(*typed: str) -> dict:
        monkeypatch.setattr(sys, "argv", ["train.py", "--options=a/base", *typed])
        train.main()
        return meta_of(Path("out/b/base"))["options"]

    with pytest.raises(ValueError, match="out/a already holds base"):  # --overwrite is not given back
        again()
    capsys.readouterr()
    options = again("--name=b")
    told = [line.split(": ", 1)[1] for line in capsys.readouterr().err.splitlines() if "train.json" in line]
    assert told == ["pool is now buffer", "no option of this version, left out: given=0.0"]
    new = {"name": "b", "buffer": 8, "options": "a/base", "overwrite": False}
    old = {k: v for k, v in meta["options"].items() if k not in ("pool", "given")}
    assert options == old | new
    assert again("--name=b", "--overwrite", "--lr=0.5")["lr"] == 0.5
    for wrong, says in (({"lr": "fast"}, "lr='fast' is no float"), ({"remat": 1}, "remat=1 is no bool")):
        file.write_text(json.dumps(meta | {"options": meta["options"] | wrong}))
        with pytest.raises(ValueError, match=f"^out/a/base/train.json is damaged: {says}$"):
            again("--name=c")
    for text, says in (("{}", "holds no options"), ("[]", "holds no JSON object")):
        file.write_text(text)
        with pytest.raises(ValueError, match=says):
            again("--name=c")
    file.unlink()
    with pytest.raises(FileNotFoundError, match="has no train.json"):
        again("--name=c")


def test_resuming_under_other_options_is_refused(run, monkeypatch):
    stopped(run, monkeypatch, signal.SIGTERM, 2, "--name=x", "--stage=base")  # as schedulers do
    with pytest.raises(ValueError, match=r"was trained with other options: lr=0.001 \(now 0.5\)"):
        run("--name=x", "--stage=base", "--resume", "--lr=0.5")
    # What is shown may change, and what only later stages read.
    run("--name=x", "--stage=base", "--resume", "--eval_every=1", "--grow", "--weight=one")


def test_resuming_a_finished_stage_under_other_options_is_refused(run, capsys):
    """Only under those that decide it: a base may get another target."""
    run("--name=x", "--stage=base", "--recipe=earlier")
    for more in (["--recipe=trajectory"], ["--steps=3"], ["--lora=2"], ["--eval_every=1"]):
        run("--name=x", "--stage=base", "--recipe=earlier", "--resume", *more)
    assert "base: already there" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"out/x/base was trained with other options: seed=1337 \(now 1\);"):
        run("--name=x", "--stage=base", "--resume", "--seed=1")
    run("--name=x", "--stage=target", "--recipe=earlier")
    run("--name=x", "--stage=target", "--recipe=earlier", "--resume")
    with pytest.raises(ValueError, match=r"recipe=earlier \(now trajectory\), absent=0.3 \(now 0.0\)"):
        run("--name=x", "--stage=target", "--recipe=trajectory", "--resume")
    file = Path("out/x/target/train.json")
    meta = meta_of(file.parent)
    file.write_text(json.dumps(meta | {"options": {k: v for k, v in meta["options"].items() if k != "lora"}}))
    again = "--name=x", "--stage=target", "--recipe=earlier", "--resume"
    run(*again, f"--dtype={meta['dtype']}")
    for typed, says in (("--lora=2", r"lora=0 \(now 2\)"), ("--dtype=bfloat16", r"\(now bfloat16\)")):
        with pytest.raises(ValueError, match=says):
            run(*again, typed)


def test_a_typed_recipe_brings_its_own_residual(run, monkeypatch):
    """Not the one of --options. Another option that is typed leaves that as it was."""
    run("--name=a", "--stage=base", "--recipe=earlier", "--fixed=0.25")

    def again(*typed: str) -> tuple:
        monkeypatch.setattr(sys, "argv", ["train.py", "--options=a/base", "--overwrite", "--name=b", *typed])
        train.main()
        o = meta_of(Path("out/b/base"))["options"]
        return o["recipe"], o["weight"], o["fixed"], o["absent"]

    assert again("--lr=0.5") == ("earlier", "fixed", 0.25, 0.3)
    assert again("--recipe=earlier") == ("earlier", "fixed", 0.25, 0.3)
    assert again("--recipe=trajectory") == ("trajectory", "entropy", 0.3, 0.0)
    assert again("--recipe=paper")[:2] == ("paper", "entropy")
    assert again("--recipe=paper", "--weight=one")[:2] == ("paper", "one")
    assert again("--reference=b/base")[:2] == ("paper", "entropy")
    run("--name=c", "--stage=base", "--residual_top_k=3")
    monkeypatch.setattr(sys, "argv", ["train.py", "--options=c/base", "--name=d", "--recipe=loopholing"])
    train.main()
    assert meta_of(Path("out/d/base"))["options"]["residual_top_k"] == 0


def test_the_blocks_of_a_model_that_is_converted_are_its_own(run):
    run("--name=x", "--stage=base", "--block_size=4")
    run("--name=y", "--stage=reference", "--init_from=x/base", "--block_size=4")
    with pytest.raises(ValueError, match="block_size=6, but the model to start from has 4: leave it out"):
        run("--name=z", "--stage=reference", "--init_from=x/base", "--block_size=6")
    with pytest.raises(ValueError, match="block_size=6, but the model to start from has 4: leave it out"):
        run("--name=x", "--stage=reference", "--block_size=6")


def test_a_state_of_an_earlier_version_resumes_to_the_same_bits(run, monkeypatch, packed):
    """It has two options by other names, and the documents of trajectories by number, not by position."""
    options = [f"--data={packed}", "--recipe=trajectory", "--buffer=2"]
    run("--name=x", "--stage=base", *options)
    run("--name=whole", "--stage=target", "--init_from=out/x/base", *options)
    options += ["--name=cut", "--stage=target", "--init_from=out/x/base"]
    stopped(run, monkeypatch, signal.SIGINT, 3, *options)
    path = Path("out/cut/target/state.safetensors")
    with safe_open(path, "pt") as f:
        saved = f.metadata()
    saved |= {"pool": saved.pop("buffer"), "terms": saved.pop("residual_top_k")}
    del saved["residual_epsilon"]  # earlier versions had no such option
    tensors = load_file(path)
    for i in range(2):
        positions = tensors.pop(f"trajectory{i}.positions")
        tensors[f"trajectory{i}.segments"] = (positions == 0).long().cumsum(1)
    save_file(tensors, path, metadata=saved)
    run("--resume", *options)
    assert same(Path("out/whole/target"), Path("out/cut/target"))


def test_seed_decides(run):
    run("--name=a", "--stage=base", "--seed=1")
    run("--name=b", "--stage=base", "--seed=1")
    run("--name=c", "--stage=base", "--seed=2")
    assert same(Path("out/a/base"), Path("out/b/base")) and not same(Path("out/a/base"), Path("out/c/base"))


@pytest.mark.parametrize("data", ["sudoku", "packed"])
def test_checkpointed_activations_change_no_bit(run, packed, data):
    options = ["--stage=base", *([f"--data={packed}", "--block_size=4"] if data == "packed" else [])]
    run("--name=a", *options)
    run("--name=b", *options, "--remat")
    assert same(Path("out/a/base"), Path("out/b/base"))


@pytest.mark.parametrize("shift", [False, True])
def test_accumulated_pieces_are_the_whole_batch(run, packed, monkeypatch, shift):
    """Rows hold different numbers of answer tokens, and every token counts alike.

    With t = 1 everything is masked and nothing is random.
    """
    monkeypatch.setattr(recipes, "sample_t", lambda rows, *_: torch.ones(rows, 1))
    inner = Config.__init__
    shifted = {"logit_shift": shift}
    monkeypatch.setattr(Config, "__init__", lambda self, **given: inner(self, **given | shifted))
    options = [f"--data={packed}", "--stage=base", "--base_steps=2", "--warmup=0", "--lr=0.01", "--clip=0"]
    losses = []
    for pieces in (1, 2, 5):
        run(f"--name={pieces}", f"--accumulate={pieces}", *options)
        whole, folder = weights(Path("out/1/base")), Path(f"out/{pieces}/base")
        for name, value in weights(folder).items():
            torch.testing.assert_close(value, whole[name], atol=2e-4, rtol=0)
        losses.append([e["loss"] for e in log_of(folder)])
    assert losses[1] == pytest.approx(losses[0], abs=2e-5) and losses[2] == pytest.approx(losses[0], abs=2e-5)


def test_a_batch_is_rows_of_the_files(packed):
    """Tokens, response and positions of the same row, in the dtypes that the loss takes."""
    dataset, generator = data.load(packed), torch.Generator().manual_seed(0)
    tokens, response, positions = training.batches(dataset, "train", 40)(200, generator)
    files = (np.asarray(f("train")) for f in (dataset.tokens, dataset.response, dataset.segments))
    rows = {t.tobytes(): (r, s) for t, r, s in zip(*files)}
    assert tokens.dtype == positions.dtype == torch.int64 and response.dtype == torch.bool
    numbers = []
    for t, r, p in zip(tokens, response, positions):
        expected, segments = rows[t.numpy().astype(np.uint16).tobytes()]
        assert (r.numpy() == expected).all()
        assert p.tolist() == [i for d in documents_of(segments) for i in range(len(d))]
        numbers.append(segments)
    numbers = np.stack(numbers)
    assert (numbers == 0).any() and (numbers == 2).any() and not response.numpy()[numbers == 0].any()


@pytest.mark.parametrize("kind", ["packed", "stream"])
def test_processes_read_the_tokens_of_their_own_rows(kind, packed, monkeypatch):
    """Together all of a batch, each row once. Of the others they know where answers and documents lie."""
    dataset, pieces = data.load(packed), [5, 3, 4]
    if kind == "stream":
        monkeypatch.setattr(data.Dataset, "response", lambda *_: None)
        monkeypatch.setattr(data.Dataset, "segments", lambda *_: None)
        monkeypatch.setattr(data.Dataset, "tokens", lambda *_: np.arange(1, 5000, dtype=np.uint16))
    read, tokens = [], np.asarray(dataset.tokens("train"))

    class Noted:
        """The file of tokens, which notes the rows that are asked for."""

        def __len__(self) -> int:
            return len(tokens)

        def __getitem__(self, rows: np.ndarray) -> np.ndarray:
            read.append(len(rows))
            return tokens[rows]

    monkeypatch.setattr(data.Dataset, "tokens", lambda *_: Noted())
    draw, whole, seen = training.batches(dataset, "train", 40), None, []
    for size in (1, 3):
        monkeypatch.setattr(distributed, "processes", lambda size=size: size)
        for rank in range(size):
            monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
            mine = distributed.rows_of(pieces)
            x, response, positions = draw(12, torch.Generator().manual_seed(3), mine)
            whole = (x, response, positions) if size == 1 else whole
            others = np.setdiff1d(np.arange(12), mine)
            assert torch.equal(x[mine], whole[0][mine]) and not x[others].any() and whole[0].any(1).all()
            assert torch.equal(response, whole[1])
            assert positions is whole[2] is None or torch.equal(positions, whole[2])
            # What own() keeps of each piece, with the same share.
            kept = [rows[distributed.share(len(rows))] for rows in torch.arange(12).split(pieces)]
            assert mine.tolist() == torch.cat(kept).tolist() and read.pop() == len(mine) and not read
            seen += mine.tolist() if size > 1 else []
    assert sorted(seen) == list(range(12))


def test_conversion_of_another_model(run):
    """--init_from replaces the base; --reference may be another, smaller model (small-to-large)."""
    run("--name=small", "--stage=base")
    large = ["--name=big", "--d_model=64", "--n_head=2"]
    run(*large, "--stage=base")
    run(*large, "--stage=target", "--init_from=out/big/base", "--recipe=paper", "--reference=small/base")
    assert load("out/big/target").config.d_model == 64
    assert meta_of(Path("out/big/target"))["reference"] == "small/base"


def test_learning_rate_by_hand():
    o = train.Train(lr=1.0, warmup=0.1, schedule="cosine")
    assert [training.learning_rate(o, i, 100) for i in (0, 9, 10)] == [0.1, 1.0, 1.0]
    assert training.learning_rate(o, 55, 100) == pytest.approx(0.1 + 0.9 / 2)  # half-way down the cosine
    assert training.learning_rate(o, 100, 100) == pytest.approx(0.1)
    o.schedule = "constant"
    assert training.learning_rate(o, 99, 100) == 1.0


# ---- The trajectory recipe: one denoising step of every trajectory, written out cell by cell

SMALL = dict(vocab_size=9, mask_id=8, n_head=1, n_kv_head=1, head_dim=8, d_model=16, d_ff=24)
PACKED = torch.tensor([[1, 1, 1, 1, 1, 2, 2, 2], [1] * 8, [1, 1, 1, 2, 2, 2, 0, 0]])  # 0 = padding


def documents_of(row: torch.Tensor | np.ndarray) -> list[range]:
    """Where each document of a row lies, padding included."""
    cuts = [0, *(j for j in range(1, len(row)) if row[j] != row[j - 1]), len(row)]
    return [range(a, b) for a, b in zip(cuts, cuts[1:])]


def positions_of(segments: torch.Tensor | None) -> torch.Tensor | None:
    """The position of each token in its document, document by document."""
    if segments is None:
        return None
    return torch.tensor([[i for d in documents_of(row) for i in range(len(d))] for row in segments])


@pytest.mark.parametrize("segments", [None, PACKED], ids=["", "packed"])
@pytest.mark.parametrize("block_size, bound", [(0, True), (4, True), (4, False)])
def test_trajectories_against_a_literal_transcription(block_size, bound, segments):
    T, B = 8, 3
    c = Config(**SMALL | dict(n_layer=2, n_head=2, block_size=block_size))
    model = init_weights(Transformer(c), torch.Generator().manual_seed(0))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(4 if p.dim() == 2 else 1)
    generator, residual = torch.Generator().manual_seed(1), Residual()
    tokens = torch.randint(0, 8, (B, T), generator=generator)
    response = torch.ones(B, T, dtype=torch.bool)
    response[0, :3] = response[1, 5] = False
    documents = [documents_of(row) for row in (torch.ones(B, T) if segments is None else segments)]
    for i in range(B):  # one given token in a document: cells that see only masks would be equally sure
        for d in documents[i]:
            response[i, d[0]] = False
    if segments is not None:
        response &= segments > 0
    trajectories = Trajectories(c, B, T, packed=segments is not None, bound=bound)
    asked, positions = [], positions_of(segments)

    def fresh(n: int):
        asked.append(n)
        return tokens, response, positions

    masked, carried, left = response.clone(), {}, None
    for step in range(4):
        loss = trajectories.loss(model, fresh, residual, generator)
        if step == 0:
            left = trajectories.state["left"] + 1  # budgets are drawn inside; from here on they count down
        # The input: the truth, [MASK], or the mix of the residual that the step before left.
        x = model.embed_tokens(tokens.masked_fill(masked, c.mask_id)).clone()
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
                        level = level if bound else 1.0
                        expected = expected - logits[i, j].log_softmax(-1)[tokens[i, j]] / level
        assert loss.item() == pytest.approx(float(expected / response.sum()), rel=1e-4)
        loss.backward()
        if (left < 1).any():
            break
        # Commit, per block, the surest of those still masked, as many as keep the budget. Carry the rest.
        confidence, now = logits.softmax(-1).amax(-1), masked.clone()
        for i in range(B):
            tau, b = float(trajectories.state["threshold"][i]), block_size or T
            for columns in (d[k : k + b] for d in documents[i] for k in range(0, len(d), b)):
                still = [j for j in columns if masked[i, j]]
                surest = sorted(still, key=lambda j: -confidence[i, j].item())
                for j in surest[: math.ceil(len(still) / max(int(left[i]), 1))]:
                    now[i, j] = False
                for j in still:
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
    """Logits at every cell of one document. A block-causal model reads block by block, after clean blocks."""
    b, T = model.config.block_size, x.shape[1]
    positions = torch.arange(T)[None]
    if not b:
        hidden = model(x, positions)
    else:
        blocks = []
        for k in range(0, T, b):
            read = torch.cat([model.embed_tokens(tokens[:, :k]), x[:, k : k + b]], dim=1)
            n = read.shape[1]
            mask = (torch.arange(n)[None, :] // b <= torch.arange(n)[:, None] // b)[None, None]
            blocks.append(model(read, positions[:, :n], mask)[:, k:])
        hidden = torch.cat(blocks, dim=1)
    return model.logits(hidden.reshape(-1, hidden.shape[-1])).view(*x.shape[:2], -1).detach()


@pytest.mark.parametrize("block_size, packed, budget, progress, most", [
    (0, False, 0, 1, (5, 8, 4)), (0, True, 0, 1, (3, 8, 4)), (4, False, 0, 1, (4, 4, 4)),
    (4, True, 0, 1, (3, 4, 4)), (0, False, 5, 1, (5, 5, 4)), (4, True, 2, 1, (2, 2, 2)),
    (0, False, 0, 0.5, (3, 4, 3)), (0, False, 5, 0.5, (3, 3, 3)), (0, False, 0, 0, (2, 2, 2)),  # 2 sqrt(8/2)
])  # fmt: skip
def test_budgets_lie_between_two_steps_and_one_token_a_step_of_the_largest_block(
        block_size, packed, budget, progress, most):  # fmt: skip
    """Or --budget; and with --grow, so long as training goes on, less."""
    c = Config(**SMALL, n_layer=1, block_size=block_size)
    model = init_weights(Transformer(c), torch.Generator().manual_seed(0))
    response = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1], [1] * 8, [1, 1, 1, 1, 0, 0, 0, 0]]).bool()
    segments = torch.tensor([[1, 1, 1, 1, 1, 2, 2, 2], [1] * 8, [1] * 6 + [0] * 2]) if packed else None
    batch = torch.zeros(3, 8, dtype=torch.long), response, positions_of(segments)
    many = tuple(x if x is None else x.repeat(200, 1) for x in batch)
    trajectories = Trajectories(c, 600, 8, packed=packed, budget=budget)
    with torch.no_grad():
        given = lambda n: many, Residual(), torch.Generator().manual_seed(0)
        trajectories.loss(model, *given, progress)
    budgets = (trajectories.state["left"] + 1).view(200, 3)  # the first step is done
    assert tuple(budgets.amin(0).tolist()) == (2, 2, 2) and tuple(budgets.amax(0).tolist()) == most


def test_trajectories_start_cold_and_end_full():
    c = Config(**SMALL, n_layer=1)
    model = init_weights(Transformer(c), torch.Generator().manual_seed(0))
    generator, response = torch.Generator().manual_seed(1), torch.ones(4, 10, dtype=torch.bool)
    trajectories, fresh = Trajectories(c, 4, 10), []

    def draw(n):
        fresh.append(n)
        return torch.randint(0, 8, (n, 10), generator=generator), response[:n], None

    for _ in range(40):
        before = trajectories.state["masked"].clone()
        trajectories.loss(model, draw, Residual(), generator)
        after = trajectories.state["masked"]
        running = before.any(dim=1)
        assert ((after & ~before).sum(1)[running] == 0).all()  # nothing committed is ever masked again
        assert (after.sum(1)[running] < before.sum(1)[running]).all()  # every step commits
    assert fresh[0] == 4 and sum(fresh) > 8 and min(fresh[1:]) < 4  # rows are replaced one by one
    cold, tokens = Trajectories(c, 4, 10), torch.zeros(4, 10, dtype=torch.long)
    loss = cold.loss(model, lambda n: (tokens, response, None), Residual(), generator)
    plain = diffusion_loss(model, tokens, response, t=torch.ones(4, 1))
    assert loss.item() == pytest.approx(plain.item(), rel=1e-5)  # the first step is an ordinary pass at t = 1


# ---- What is said before the start: memory, FLOPs and the rate of matmuls


def on_meta(config: Config) -> Transformer:
    with torch.device("meta"):
        return Transformer(config)


def test_memory_by_hand(monkeypatch):
    c = Config(vocab_size=10, mask_id=9, n_layer=2, n_head=2, n_kv_head=1, head_dim=4, d_model=8, d_ff=12)
    layer = 8 * 8 + 2 * 4 * 8 + 8 * 8 + 3 * 8 * 12  # q, k and v, o, SwiGLU
    matrices = 10 * 8 + 2 * layer
    parameters = matrices + 2 * (2 * 4 + 2 * 8) + 8  # and the norms: q and k, two of the stream, the last
    monkeypatch.setattr(budget, "kept_by_layer", lambda *_: 1000)

    def need(rows: int = 3, remat: bool = False, **changes):
        usual = dict(length=5, batch_size=3, device=CPU, dtype=torch.float32, ema=True, reference=77)
        found = budget.memory(on_meta(c), rows, remat, **usual | changes)
        return {k: v for k, v in found.items() if v}

    x = 3 * 5 * 8 * 4  # a hidden state of every token in float32
    always = {"weights": 4 * parameters, "AdamW": 8 * parameters, "average": 4 * parameters, "reference": 77}
    # The end of the backward pass needs more.
    assert need(remat=True) == always | {"gradients": 4 * parameters, "activations": x + 1000}
    assert "average" not in need(ema=False) and "reference" not in need(reference=0)
    monkeypatch.setattr(budget, "kept_by_layer", lambda *_: 9000)
    logits = 3 * 15 * 10 * 4 + 10 * 8 * 4  # three of (15, 10) in float32, and the gradient of the table
    start = always | {"activations": 2 * (x + 9000), "logits": logits}
    assert need() == start
    assert need(dtype=torch.bfloat16) == start | {"bfloat16 copies": 2 * matrices}
    monkeypatch.setattr(budget, "CHUNK", 45)  # four rows of logits at once
    assert need()["logits"] == 3 * 4 * 10 * 4 + 10 * 8 * 4
    piece = need(rows=1)  # gradients of the piece before are there already
    assert piece["gradients"] == 4 * parameters and piece["activations"] == 2 * (x // 3 + 9000)
    assert need(packed=True)["attention mask"] == 3 * 5 * 5
    c.block_size = 4  # [noisy | clean]
    assert need()["attention mask"] == 3 * 10 * 10 and need()["activations"] == 2 * (2 * x + 9000)
    # A buffer of 8 batches: token, response, masked, alpha, Delta of a cell; left, threshold of a row.
    state = 8 * 3 * (5 * (8 + 1 + 1 + 4 + 8 * 4) + 8 + 4)
    # A window: backward needs the activations of its steps together. Logits come chunk by chunk.
    one, many = need(buffer=8), need(buffer=8, window=3)
    assert many["activations"] == 3 * one["activations"] and many["logits"] == one["logits"]
    assert one["trajectories"] == state
    assert need(buffer=8, packed=True)["trajectories"] == state + 8 * 3 * 5 * 8  # and positions
    monkeypatch.setattr(budget, "CHUNK", 1 << 25)  # logits of a single chunk are kept
    assert need(buffer=8, window=3)["logits"] == 3 * 3 * 15 * 10 * 4 + 10 * 8 * 4


SHAPES = {
    "float32": (dict(n_layer=4), 8, 64, torch.float32, False),
    "blocks in bfloat16": (dict(n_layer=2, block_size=4), 4, 64, torch.bfloat16, False),
    "remat": (dict(n_layer=6), 16, 64, torch.float32, True),
    "many tokens": (dict(vocab_size=20_000, n_layer=1), 2, 64, torch.bfloat16, False),
    "large for its batch": (dict(n_layer=3, d_model=256, d_ff=688), 1, 32, torch.float32, False),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_memory_against_what_torch_allocates(shape, monkeypatch):
    """The peak of the allocator's own record over two training steps, within a fifth."""
    options, rows, length, dtype, remat = SHAPES[shape]
    monkeypatch.setattr(rcd, "CHUNK", 1 << 20)  # several chunks of logits
    monkeypatch.setattr(budget, "CHUNK", 1 << 20)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        model = init_weights(Transformer(Config(**options)), torch.Generator().manual_seed(0))
        if remat:
            speed.remat(model)
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        for _ in range(2):
            with command.autocast(CPU, dtype):
                tokens = torch.zeros(rows, length, dtype=torch.long)
                loss = diffusion_loss(model, tokens, t=torch.ones(rows, 1))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    events = record.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    peak = max(np.cumsum([n for _, n in changes]))
    run = dict(length=length, batch_size=rows, device=CPU, dtype=dtype)
    estimate = sum(budget.memory(on_meta(model.config), rows, remat, **run).values())
    assert 0.8 < estimate / peak < 1.2


def test_memory_of_experts_is_that_of_the_chosen():
    """A token meets two experts of width 12 and a shared one of 8: as much as one SwiGLU of 32."""
    dense, sparse, less = (on_meta(Config(d_ff=width, n_layer=1)) for width in (32, 344, 31))
    sparse.layers[0].mlp = Experts(128, 12, 6, 2, normalise=True, shared=8)
    models = (dense, sparse, less)
    kept = [budget.kept_by_layer(m, 2, 16, False, CPU, torch.float32) for m in models]
    assert kept[0] == kept[1] > kept[2]


def test_advice_when_memory_is_short(capsys):
    def need(rows: int, remat: bool) -> dict[str, int]:
        return {"weights": 10 << 30, "activations": rows * (1 if remat else 4) << 30, "reference": 3 << 30}

    def told(have: int, accumulate: int = 1, remat: bool = False) -> tuple[str, str]:
        budget.report_memory(need, have << 30, 8, accumulate, remat)
        return capsys.readouterr()

    out, err = told(50)  # 13 + 8 * 4
    assert out == ("memory: about 45.00 GiB of 50.00 GiB free, 21.00 GiB with --remat; "
                   "weights 10.00 GiB, activations 32.00 GiB, reference 3.00 GiB\n")  # fmt: skip
    assert err == "" and told(0)[1] == "" and "of unknown free" in told(0)[0]
    assert told(44, remat=True)[1] == ""
    warning = "WARNING: this will probably run out of memory: "
    smaller = "a smaller model, or shorter canvases, or a smaller --reference than 3.00 GiB"
    for have, options, advice in (
        (44, {}, "1.00 GiB too much; --remat needs 21.00 GiB"),
        (20, {}, "25.00 GiB too much; --remat --accumulate=2 needs 17.00 GiB"),
        (20, {"remat": True}, "1.00 GiB too much; --accumulate=2 needs 17.00 GiB"),
        (22, {"accumulate": 2}, "7.00 GiB too much; --remat needs 17.00 GiB"),
        (13, {}, f"32.00 GiB too much; even --remat --accumulate=8 needs 14.00 GiB: {smaller}"),
    ):
        assert told(have, **options)[1] == f"{warning}{advice}\n"


def test_a_plan_by_hand(run, capsys, monkeypatch):
    """A card of 10 GiB, of which 9 are counted, 4 canvases in one process."""

    def need(rows: int, remat: bool, shards: int, rank: int, offload: bool) -> dict[str, int]:
        weights = 1 if offload else (8 if rank == 0 else 4) // shards
        return {"weights": weights << 30, "activations": rows * (1 if remat else 2) << 30}

    assert budget.cards("10:2") == (2, 9 << 30) and budget.cards("H100")[0] == 1
    assert budget.plan(need, 2, 9 << 30, 4) == [
        "  too much    10.00 GiB  --shard=none --accumulate=4",
        "  fits         9.00 GiB  --shard=none --remat --accumulate=4",
        "  fits         8.00 GiB  --shard=full --accumulate=2",
        "  fits         8.00 GiB  --shard=full --remat",
        "  fits         9.00 GiB  --shard=full --offload",
        "  fits         5.00 GiB  --shard=full --offload --remat",
        "  fits         8.00 GiB  --shard=none --lora=16 --accumulate=2",
        "  fits         8.00 GiB  --shard=none --lora=16 --remat",
    ]
    run("--name=x", "--plan=H100:2")
    told = capsys.readouterr().out
    assert "fits" in told and not Path("out").exists()
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    run("--name=x", "--plan=H100:2")  # the card's dtype, not that of the machine where it is asked
    fits = [line for line in told.splitlines() if "GiB  --" in line or "MiB  --" in line]
    assert fits and all(line in capsys.readouterr().out for line in fits[:1])
    for wrong in ("H100:0", "H100:x", "card:1", ""):
        with pytest.raises(ValueError, match="give a card and how many, as in H100:8"):
            budget.cards(wrong)


def test_a_run_that_will_not_fit_is_told_so_and_goes_on(run, capsys, monkeypatch):
    monkeypatch.setattr(models, "available", lambda device: 1 << 10)
    with pytest.raises(ValueError, match="is more than ten times the 0.0 MiB that are free: .* or --force"):
        run("--name=x", "--stage=base")
    capsys.readouterr()
    run("--name=x", "--stage=base", "--force")
    told = capsys.readouterr()
    assert "WARNING: this will probably run out of memory" in told.err
    assert "memory: about " in told.out and load("out/x/base")


@pytest.mark.parametrize("kind", ["full", "blocks", "experts"])
def test_flops_are_those_that_torch_counts(tiny, kind):
    model = tiny(block_size=3 if kind == "blocks" else 0, tied=False)
    if kind == "experts":
        for layer in model.layers:
            layer.mlp = Experts(16, 12, 6, 2, normalise=True, shared=8).requires_grad_(False)
            for p in layer.mlp.parameters():
                torch.nn.init.normal_(p, generator=torch.Generator().manual_seed(0))
    tokens, T = torch.zeros(2, 9, dtype=torch.long), 9
    math_only = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    with math_only, FlopCounterMode(display=False) as counter, torch.no_grad():
        diffusion_loss(model, tokens, t=torch.ones(2, 1))
    attention = 4 * 2 * T * 24 * T  # 2 layers of 4 heads of 6 over T keys, for each of T tokens
    # Blocks are computed densely, 2T tokens over 2T keys, of which half is counted.
    surplus = 2 * attention if kind == "blocks" else 0
    assert 2 * budget.forward_flops(model, T, predicted=T) == counter.get_total_flops() - 2 * surplus
    head = 5 * 2 * 12 * 16  # V by D, of five tokens
    assert budget.forward_flops(model, T, 9) - budget.forward_flops(model, T, 4) == head


def test_the_rate_of_matmuls_is_that_of_the_clock(monkeypatch):
    clock = iter(x / 10 for x in range(1000))  # every look at the clock takes 0.1 s
    monkeypatch.setattr(budget.time, "perf_counter", lambda: next(clock))
    assert budget.matmul_rate(CPU, torch.float32) == pytest.approx(2 * 1024**3 / 0.1)


# ---- What goes wrong


@pytest.mark.parametrize("options, words", [
    (["--stpes=3"], "unrecognized arguments: --stpes=3"),
    (["--steps=many"], "argument --steps: 'many' is no whole number"),
    (["--recipe=letter"], "recipe='letter': choose from trajectory, paper"),
    (["--stage=middle"], "stage='middle': choose from"),
    (["--preset=tpu"], "preset='tpu': choose from cpu, gpu"),
    (["--data=nowhere"], "no data set 'nowhere'"),
    (["--device=warp"], "device='warp' is not available here"),
    (["--dtype=float16"], "dtype=float16 would need loss scaling"),
    (["--adam=float16"], "adam='float16': choose from float32, bfloat16"),
    (["--offload"], "--offload keeps each process's part of a model on the host: it goes with --shard=full"),
    (["--dtype=int4"], "dtype='int4': choose from"),
    (["--lr=-1"], "lr=-1.0 must not be negative"),
    (["--stage=target"], "base is not trained yet"),
    (["--init_from=nothing-here"], "no model 'nothing-here'"),
    (["--accumulate=9", "--batch_size=4"], "accumulate=9 must lie between 1 and batch_size=4"),
    (["--weight=heavy"], "weight='heavy': choose from entropy"),
    (["--weight=learned"], "weight=learned is for recipes that train a carry, not trajectory"),
    (["--recipe=relay", "--weight=entropy"], "recipe=relay trains its own carry: leave --weight out"),
    (["--weight=remix", "--window=2"], "weight=remix passes no gradient on: it goes with --window=1"),
    (["--recipe=loop", "--absent=0.5"], "--absent does nothing for recipe=loop, which reads no residual"),
    (["--absent=0.5"], "--absent does nothing for recipe=trajectory, which starts without a residual"),
    (["--weighting=t"], "weighting='t': choose from 1/t, 1, complementary"),
    (["--weighting=complementary"], "masks canvases twice, a trajectory is one: choose another --recipe"),
    (["--t_per=token"], "t_per='token': choose from document, block"),
    (["--reference=out/x", "--recipe=earlier"], "--reference is read by --recipe=paper"),
    (["--reference=nothing-here"], "no model 'nothing-here'"),  # before two stages are trained, not after
    (["--grow", "--recipe=earlier"], "--grow is read by recipes on trajectories, not by earlier"),
    (["--grow", "--budget=2"], "--budget=2 leaves nothing to grow to"),
    (["--buffer=0"], "window=1 and buffer=0 must be at least 1"),
    (["--budget=1"], "budget=1: a trajectory has at least 2 steps"),
    (["--budget=8", "--recipe=paper"], "--budget is read by recipes on trajectories, not by paper"),
    (["--init_from=x", "--stage=base"], "--stage=base trains a base from scratch"),
])  # fmt: skip
def test_bad_input_is_one_line_and_exit_code_2(options, words, puzzles, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "matmul_rate", lambda device, dtype: 1e12)  # takes 0.2 s
    monkeypatch.setattr(sys, "argv", ["train.py", f"--data={puzzles}", *options])
    with pytest.raises(SystemExit) as end:
        command.run(train.main)
    told = capsys.readouterr().err
    last = told.strip().splitlines()[-1]
    assert end.value.code == 2 and words in last and "Traceback" not in told
    assert re.match(r"(train\.py: )?error: ", last)
    assert not list(tmp_path.glob("out/*/*/*.safetensors"))


def test_the_script_itself_ends_so(tmp_path):
    line = [sys.executable, ROOT / "train.py", "--data=nowhere"]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and not done.stdout
    assert re.fullmatch(r"error: no data set 'nowhere'.*\n", done.stderr)


def test_the_last_line_names_a_command_that_works(run, packed, capsys):
    run("--name=x", "--stage=base", "--base_steps=1")
    # Text: no examples to draw, and more blocks than 8.
    run(f"--data={packed}", "--name=y", "--stage=base", "--base_steps=1")
    lines = capsys.readouterr().out.splitlines()
    told = [line.partition("try: ")[2] for line in lines if "try: " in line]
    assert told == ["python sample.py --model=out/x/base --steps=8",
                    "python sample.py --model=out/y/base --prompt=TEXT"]  # fmt: skip


def test_a_run_is_not_overwritten_by_accident(run):
    run("--name=kept", "--stage=base")
    with pytest.raises(ValueError, match="already holds base: --resume goes on, --overwrite starts again"):
        run("--name=kept", "--stage=base")
    before = weights(Path("out/kept/base"))
    run("--name=kept", "--stage=base", "--overwrite", "--seed=5")
    assert any(not torch.equal(before[k], v) for k, v in weights(Path("out/kept/base")).items())


def test_a_base_is_not_overwritten_under_its_targets(run):
    run("--name=kept")
    with pytest.raises(ValueError, match="kept holds reference, target, trained from what --overwrite"):
        run("--name=kept", "--stage=base", "--overwrite")
    before = weights(Path("out/kept/base"))
    run("--name=kept", "--stage=target", "--overwrite")
    assert all(torch.equal(before[k], v) for k, v in weights(Path("out/kept/base")).items())


def test_what_is_overwritten_is_resumed_in_full(run, monkeypatch):
    """After Ctrl-C in the new base, --resume goes on with it, and trains the later stages anew."""
    run("--name=old"), run("--name=new", "--seed=5")
    stopped(run, monkeypatch, signal.SIGINT, 3, "--name=old", "--overwrite", "--seed=5")
    run("--name=old", "--resume", "--seed=5")
    for stage in train.STAGES:
        old, new = weights(Path("out/old") / stage), weights(Path("out/new") / stage)
        assert all(torch.equal(old[k], v) for k, v in new.items())


def test_a_loss_that_is_not_a_number_stops_the_run(run):
    with pytest.raises(ValueError, match="the (loss|gradient) became .* lower --lr"):
        run("--name=nan", "--stage=base", "--lr=1e30", "--clip=0", "--base_steps=8")
