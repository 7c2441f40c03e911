"""train.py as several processes on one machine (gloo): the same weights, and runs that nothing destroys.

What takes seconds to import, and only a job needs, is imported there: its processes have it from their start.
"""

import dataclasses
import errno
import faulthandler
import functools
import gc
import itertools
import json
import math
import multiprocessing.forkserver
import os
import re
import resource
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_model
from safetensors import safe_open
from safetensors.torch import load_file
from test_train import TINY, stopped, write_packed
from torch.nn.parallel import DistributedDataParallel
from torch.torch_version import TorchVersion

import data
import train
import zoo
from data.sudoku import prepare
from rcd import Residual, Sampler
from zoo.files import load
from zoo.tokenizer import bytes_tokenizer
from zoo.tools import budget, checks, command, distributed, models, training
from zoo.tools.evaluate import Setting, evaluate

ROOT = Path(__file__).resolve().parents[1]
SHORT = ["--base_steps=2", "--steps=4", "--eval_every=4", "--batch_size=8", "--eval_items=0",
         "--test_items=0", "--lr=1e-4"]  # fmt: skip


@pytest.fixture(scope="module")
def data_sets(tmp_path_factory):
    """Sudoku, and packed rows of which the last in every three has no answer."""
    folder = tmp_path_factory.mktemp("data")
    prepare.main([f"--out={folder}/sudoku", "--given=20", "--train=64", "--val=16", "--test=16"])
    sizes = (("train", 60), ("val", 12), ("test", 6))
    documents = {split: [([97 + i % 26] * (8 + i % 5), [i % 3 < 2 and j > 3 for j in range(8 + i % 5)])
                         for i in range(n)] for split, n in sizes}  # fmt: skip
    write_packed(folder / "packed", bytes_tokenizer(["<eos>", "<mask>"]), 257, 256, documents, 16)
    return folder


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def for_its_own_rows(dataset, split: str, length: int) -> Callable:
    """training.batches, but a process that trains says which rows it reads."""
    draw = training.batches(dataset, split, length)

    def told(rows: int, generator: torch.Generator, mine: slice | np.ndarray = slice(None)) -> training.Batch:
        everything = mine == slice(None) if isinstance(mine, slice) else len(mine) == rows
        assert split != "train" or not everything
        return draw(rows, generator, mine)

    return told


def child(number: int, n: int, ports: list[int], jobs: list) -> None:
    """A process as torchrun starts it. A job is a function, or options of train.py. One that hangs says
    where."""
    faulthandler.dump_traceback_later(300, exit=True)
    gc.freeze()  # every job collects garbage at its end: not among what was imported before
    os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(n),
                   "LOCAL_WORLD_SIZE": str(n), "MASTER_ADDR": "127.0.0.1"}  # fmt: skip
    # What takes long and decides no weight.
    train.matmul_rate = lambda *_: 1e12
    train.validate = lambda *given: training.validate(*given[:5], 1 << 14, given[6])
    budget.kept_by_layer = lambda *_: 1 << 20
    if n > 1:
        train.batches = for_its_own_rows
    for port, work in zip(ports, jobs):
        os.environ["MASTER_PORT"] = str(port)
        if isinstance(work, list):
            sys.argv = ["train.py", *TINY, *SHORT, *work]
            work = train.main
        command.run(distributed.together(work))


def forkserver() -> multiprocessing.context.ForkServerContext:
    """Starts processes as forks of one that has imported much and done nothing: what earlier tests left here,
    such as threads, could hold a lock that is never given back in a fork."""
    fork = multiprocessing.get_context("forkserver")
    fork.set_forkserver_preload([__name__, "torch._dynamo", "torch.distributed.fsdp",
                                 "torch.distributed.checkpoint"])  # fmt: skip
    with pytest.MonkeyPatch.context() as m:  # Python 3.11 looks elsewhere, and tells nobody
        m.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        multiprocessing.forkserver.ensure_running()
    return fork


def run(n: int, *jobs: list[str] | Callable[[], None]) -> list[int]:
    """The exit codes of n processes that do the jobs one after the other."""
    ports, fork = [free_port() for _ in jobs], forkserver()
    started = [fork.Process(target=child, args=(i, n, ports, jobs)) for i in range(n)]
    for process in started:
        process.start()
    for process in started:
        process.join(400)
    return [process.exitcode for process in started]


RECIPES = {  # stage 1 or 2 from the same base, on one data set or the other
    "masked": ["packed", "--stage=reference", "--accumulate=2", "--clip=0.1"],
    "paper": ["packed", "--reference=packed/base", "--t_per=block", "--accumulate=2", "--ema=0.5"],
    "earlier": ["sudoku", "--recipe=earlier"],
    "trajectory": ["sudoku", "--recipe=trajectory", "--buffer=2", "--window=2", "--accumulate=2", "--remat",
                   "--grow"],
    "packed": ["packed", "--recipe=trajectory", "--buffer=1", "--steps=8", "--adam=bfloat16"],
}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def log_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


WAYS = {"1": (1, []), "2": (2, []), "4": (4, []), "shards": (2, ["--shard=full"])}
SHARDED = pytest.mark.skipif(torch.__version__ < (2, 9), reason="torch 2.9 writes shards")
if torch.__version__ < (2, 9):
    del WAYS["shards"]


@pytest.fixture(scope="module")
def runs(data_sets, tmp_path_factory):
    """Every recipe in each of these ways, in folders of their names."""
    folder = tmp_path_factory.mktemp("runs")
    os.chdir(folder)
    for name, more in (("sudoku", []), ("packed", ["--block_size=4"])):
        assert run(1, [f"--data={data_sets / name}", "--stage=base", f"--name={name}", *more]) == [0]
    for way, (n, more) in WAYS.items():
        jobs = [[f"--data={data_sets / data}", f"--init_from={folder}/out/{data}/base", "--stage=target",
                 f"--name={way}/{recipe}", *options, *more]
                for recipe, (data, *options) in RECIPES.items()]  # fmt: skip
        assert run(n, *jobs) == [0] * n
    return folder / "out"


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("way", [*WAYS][1:])
def test_several_processes_take_the_steps_of_one(runs, recipe, way):
    stage = "reference" if recipe == "masked" else "target"
    one, many = (runs / k / recipe / stage for k in ("1", way))
    expected = tensors(one)
    worst = max(float((value - expected[name]).abs().max()) for name, value in tensors(many).items())
    assert worst < 1e-5
    a, b = log_of(one), log_of(many)
    assert [e["step"] for e in a] == [e["step"] for e in b]
    for key in ("loss", "val_loss"):
        of = [[e[key] for e in log if key in e] for log in (a, b)]
        assert of[0] == pytest.approx(of[1], abs=2e-5), key


def seven(folder: Path) -> None:
    """A job: evaluate seven canvases, and write the rows to a file named by processes and rank."""
    dataset = data.load(folder)
    model = tiny_model(vocab_size=7, mask_id=6)
    dataset = dataclasses.replace(dataset, check=lambda filled, truth, given: filled[1] < truth[1])
    settings = [Setting("x", model, None, Sampler(steps=k), Residual()) for k in (1, 3)]
    rows = evaluate(settings, dataset, "test", 7, 4, torch.float32)
    Path(f"{distributed.processes()}.{distributed.rank()}").write_text(
        json.dumps([{k: v for k, v in row.items() if k != "seconds"} for row in rows]))  # fmt: skip


def test_evaluation_is_shared_and_complete(data_sets, tmp_path, monkeypatch):
    """7 canvases in batches of 2 or less: each process fills some, both know all the results."""
    monkeypatch.chdir(tmp_path)
    work = functools.partial(seven, data_sets / "sudoku")
    work()
    assert run(2, work) == [0, 0]
    one = Path("1.0").read_text()
    assert one == Path("2.0").read_text() == Path("2.1").read_text()
    assert {*sum((row["correct"] for row in json.loads(one)), [])} == {True, False}


# ---- A model in shards


def stops(times: int, steps: list[int], *options: str) -> None:
    """A job: train.py, to which SIGTERM comes so many times in a step: which, each process is told."""
    inner = train.learning_rate

    def rate(o, at, whole):
        for _ in range(times if at == steps[distributed.rank()] else 0):
            signal.raise_signal(signal.SIGTERM)
        return inner(o, at, whole)

    destroy = torch.distributed.destroy_process_group

    def destroy_last() -> None:
        """A model that outlives its process group can hang: its end waits for threads that wait for it."""
        if any(type(x) is DistributedDataParallel for x in gc.get_objects()):
            os._exit(3)
        destroy()

    torch.distributed.destroy_process_group = destroy_last
    train.learning_rate, sys.argv = rate, ["train.py", *TINY, *SHORT, *options]
    if distributed.rank() == 0:
        sys.stderr = open("told", "w", buffering=1)
    train.main()


@SHARDED
def test_shards_resume_in_any_number_of_processes(data_sets, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = [f"--data={data_sets}/sudoku", "--recipe=trajectory", "--buffer=2", "--ema=0.5", "--steps=5"]
    assert run(1, [*options, "--name=whole"]) == [0]
    options += ["--stage=target", "--init_from=out/whole/base"]
    assert run(1, [*options, "--name=one"]) == [0]
    assert run(2, functools.partial(stops, 1, [2, 2], *options, "--name=2", "--shard=full")) == [130, 130]
    for name in ("1", "3", "cut"):
        shutil.copytree("out/2", f"out/{name}")
    state = Path("out/2/target") / checks.SHARDS
    assert [*checks.states(Path("out/2/target"))] == [state] and len([*state.glob("*.safetensors")]) == 3
    assert run(1, [*options, "--name=1", "--resume"]) == [0]
    assert run(3, [*options, "--name=3", "--resume", "--shard=full"]) == [0] * 3
    for name in ("1", "3"):
        many = tensors(Path(f"out/{name}/target"))
        for key, value in tensors(Path("out/one/target")).items():
            torch.testing.assert_close(many[key], value, atol=1e-5, rtol=0)
        assert not checks.states(Path(f"out/{name}/target"))
    shard = next((Path("out/cut/target") / checks.SHARDS).glob("shard*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1])
    assert run(1, [*options, "--name=cut", "--resume"]) == [2]


def slow(*options: str) -> None:
    """A job: train.py, whose first state is not written before its third step. Process 0 keeps a copy."""
    from torch.distributed.checkpoint import HuggingFaceStorageWriter

    inner, write, go = train.learning_rate, HuggingFaceStorageWriter.write_data, threading.Event()

    def rate(o, at, whole):
        if at == 3:
            assert not Path("out/slow/target", checks.SHARDS).exists()
            go.set()
        if at == 3 and distributed.rank() == 0:
            while not Path("out/slow/target", checks.SHARDS).exists():
                time.sleep(0.01)
            shutil.copytree("out/slow/target", "out/kept/target")
        return inner(o, at, whole)

    def write_data(*given):
        assert go.wait(100)
        return write(*given)

    train.learning_rate, HuggingFaceStorageWriter.write_data = rate, write_data
    sys.argv = ["train.py", *TINY, *SHORT, *options]
    train.main()


def full(*options: str) -> None:
    """A job: train.py, but a process other than 0 finds its disk full when it writes its second state."""
    from torch.distributed.checkpoint import HuggingFaceStorageWriter

    write, count = HuggingFaceStorageWriter.write_data, itertools.count(1)

    def write_data(*given):
        if distributed.rank() and next(count) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(*given)

    HuggingFaceStorageWriter.write_data, sys.argv = write_data, ["train.py", *TINY, *SHORT, *options]
    sys.__stderr__ = open("told", "a", buffering=1)
    if distributed.rank() == 0:
        sys.stderr = sys.__stderr__
    train.main()


@SHARDED
def test_shards_are_written_while_training_goes_on(data_sets, tmp_path, monkeypatch):
    """The state on the disk is of the step in which it was saved, not of those taken since."""
    monkeypatch.chdir(tmp_path)
    options = [f"--data={data_sets}/sudoku", "--recipe=trajectory", "--buffer=2", "--ema=0.5", "--steps=5",
               "--eval_every=2"]  # fmt: skip
    assert run(1, [*options, "--name=one"]) == [0]
    options += ["--stage=target", "--init_from=out/one/base", "--shard=full"]
    assert run(2, functools.partial(slow, *options, "--name=slow")) == [0, 0]
    assert run(2, [*options, "--name=kept", "--resume"]) == [0, 0]
    expected = tensors(Path("out/one/target"))
    for name in ("slow", "kept"):
        for key, value in tensors(Path(f"out/{name}/target")).items():
            torch.testing.assert_close(expected[key], value, atol=1e-5, rtol=0)
    assert run(2, functools.partial(full, *options, "--name=full")) == [2, 2]
    (line,) = [line for line in Path("told").read_text().splitlines() if line.startswith("error: ")]
    assert "No space left on device" in line
    assert distributed.facts_of_shards(Path("out/full/target") / checks.SHARDS)["step"] == "2"


def on_the_host(steps: list[int], *options: str) -> None:
    """A job: stops(), and FSDP2 is told to keep every part of the model on the host, and nothing else."""
    import torch.distributed.fsdp as fsdp

    inner, told = fsdp.fully_shard, []

    def shard(part, *, offload_policy, **named):
        told.append(offload_policy)
        return inner(part, offload_policy=offload_policy, **named)

    fsdp.fully_shard = shard
    try:
        stops(1, steps, *options)
    finally:
        assert told == [fsdp.CPUOffloadPolicy(pin_memory=False)] * 2  # the layer, and what is in none


@SHARDED
def test_shards_that_wait_on_the_host(data_sets, tmp_path, monkeypatch):
    """The gradient is clipped, the weights are averaged, and a run is resumed: the steps of one process."""
    monkeypatch.chdir(tmp_path)
    options = [f"--data={data_sets}/sudoku", "--recipe=earlier", "--clip=0.1", "--ema=0.5", "--base_steps=1",
               "--adam=bfloat16"]  # fmt: skip
    assert run(1, [*options, "--name=one"]) == [0]
    options += ["--stage=target", "--init_from=out/one/base", "--name=two", "--shard=full", "--offload"]
    jobs = [functools.partial(on_the_host, at, *options) for at in ([2, 2], [9, 9])]
    jobs[1] = functools.partial(jobs[1], "--resume")
    assert run(2, jobs[0]) == [130, 130] and checks.states(Path("out/two/target"))
    assert run(2, jobs[1]) == [0, 0]
    two = tensors(Path("out/two/target"))
    for key, value in tensors(Path("out/one/target")).items():
        torch.testing.assert_close(two[key], value, atol=1e-5, rtol=0)


def too_large(options: list[str]) -> None:
    """A job: train.py on a machine where a model does not fit into a process."""
    models.available = lambda device: 1 << 20
    sys.argv = ["train.py", *TINY, *SHORT, *options]
    if distributed.rank() == 0:
        sys.stdout = open("told", "w", buffering=1)
    train.main()


def test_an_older_torch_says_that_it_writes_no_shards(data_sets, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.6.0+cu124"))
    monkeypatch.setattr(distributed, "processes", lambda: 2)
    monkeypatch.setattr(distributed, "anyone", bool)
    options = [f"--data={data_sets / 'sudoku'}", "--stage=base", "--shard=full"]
    monkeypatch.setattr(sys, "argv", ["train.py", *TINY, *SHORT, *options])
    with pytest.raises(ValueError, match=r"shards needs torch 2.9 or newer, not 2.6.0\+cu124: update"):
        train.main()


@SHARDED
def test_a_pretrained_model_in_shards_is_saved_whole_in_its_layout(data_sets, tmp_path, monkeypatch):
    """Target and reference are read shard by shard, the reference in the bfloat16 that it is stored in."""
    from test_conversion import write_folder

    monkeypatch.chdir(tmp_path)
    for name, dtype in (("model", torch.float32), ("small", torch.bfloat16)):
        model = tiny_model(vocab_size=258, mask_id=257, tied=False, n_layer=1 + (name == "model")).to(dtype)
        folder = write_folder(tmp_path / name, model, model_type="sdar", mask_token_id=257, eos_token_id=256)
        bytes_tokenizer(["<eos>", "<mask>"]).save(folder)
    options = [f"--data={data_sets}/packed", "--init_from=model", "--reference=small", "--stage=target"]
    assert run(1, [*options, "--name=one"]) == [0]
    assert run(2, functools.partial(too_large, [*options, "--name=two"])) == [0, 0]
    why = r"^2 processes, shard full \(a process would need .* of 0.5 MiB\)$"
    assert re.search(why, Path("told").read_text(), re.M)
    one, two = (tensors(Path(f"out/{name}/target")) for name in ("one", "two"))
    assert one.keys() == two.keys()
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, atol=1e-5, rtol=0)
    names = [{path.name for path in Path(f"out/{name}/target").iterdir()} for name in ("one", "two")]
    assert names[0] == names[1] and zoo.load("out/two/target").meta["recipe"] == "paper"


# ---- Nothing is lost


@pytest.fixture
def one(data_sets, tmp_path, monkeypatch):
    """one(*options): train.py as one process in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "matmul_rate", lambda *_: 1e12)
    monkeypatch.setattr(train, "validate", lambda *_: 1.0)
    monkeypatch.setattr(budget, "kept_by_layer", lambda *_: 1 << 20)
    fast = ["--eval_items=0", "--test_items=0", "--stage=base", "--name=x"]

    def call(*options: str) -> None:
        monkeypatch.setattr(sys, "argv", ["train.py", f"--data={data_sets}/sudoku", *TINY, *fast, *options])
        train.main()

    return call


def test_a_state_that_is_cut_anywhere_gives_way_to_the_one_before(one, monkeypatch, capsys, tmp_path):
    one("--name=whole")
    stopped(one, monkeypatch, signal.SIGINT, 2)  # saved at step 2, and again at step 3
    folder = Path("out/x/base")
    state = (folder / checks.STATE).read_bytes()
    options = checks.frozen({}, torch.float32, ())
    model = load("out/whole/base")
    header = 8 + int.from_bytes(state[:8], "little")
    for at in (0, 1, 7, 8, 9, header // 2, header - 1, header, header + 1, len(state) // 2, len(state) - 1):
        (folder / checks.STATE).write_bytes(state[:at])
        found = training.State(model, train.Train(), [])
        capsys.readouterr()
        found.restore(folder, options)
        told = capsys.readouterr().err
        assert found.step == 2 and "is damaged" in told and "from the state before it, of step 2" in told, at
    one("--resume")
    whole, cut = tensors(Path("out/whole/base")), tensors(folder)
    assert all(torch.equal(value, cut[name]) for name, value in whole.items())
    assert [e["step"] for e in log_of(folder)] == [1, 2, 3, 4] and not checks.states(folder)


def test_a_process_killed_between_two_renames_has_a_state(one, monkeypatch, capsys):
    stopped(one, monkeypatch, signal.SIGINT, 2)
    folder = Path("out/x/base")
    (folder / checks.STATE).unlink()
    (folder / f"{checks.STATE}.abc").write_text("half")  # which it was writing
    with pytest.raises(ValueError, match="already holds base"):
        one()
    one("--resume")
    assert "going on from the state before it, of step 2" in capsys.readouterr().err
    assert not [*folder.glob("*state*")]


def test_no_state_that_is_whole(one, monkeypatch):
    stopped(one, monkeypatch, signal.SIGINT, 2)
    for path in checks.states(Path("out/x/base")):
        path.write_bytes(path.read_bytes()[:99])
    with pytest.raises(ValueError, match="no state in out/x/base is whole: --overwrite starts"):
        one("--resume")


def test_a_run_folder_belongs_to_one_run(one, tmp_path):
    """Another process holds it; and is killed, so that nothing can be tidied up."""
    fork, ready = multiprocessing.get_context("fork"), multiprocessing.get_context("fork").Event()

    def hold() -> None:
        with checks.claimed(Path("out/x")):
            ready.set()
            time.sleep(60)

    other = fork.Process(target=hold)
    other.start()
    assert ready.wait(20)
    with pytest.raises(ValueError, match=f"out/x is in use by process {other.pid} on .*choose --name=NAME"):
        one()
    os.kill(other.pid, signal.SIGKILL)
    other.join()
    one()
    assert tensors(Path("out/x/base"))


@pytest.mark.parametrize("recipe", ["earlier", "trajectory"])
def test_what_made_the_loss_infinite_is_kept(one, monkeypatch, recipe, data_sets):
    """The loss of step 4 is made so. The state of step 2 stays, and the batch is that of step 4."""
    one("--base_steps=2", "--name=b")
    options = [f"--recipe={recipe}", "--init_from=out/b/base", "--stage=target", "--buffer=2"]
    read, inner = [], (training.LOSSES["1/t"], train.SharedTrajectories.loss)

    def loss(model, tokens, *given, **named):
        read.append(tokens.clone())
        return inner[0](model, tokens, *given, **named) * (math.inf if len(read) == 4 else 1)

    def of_trajectories(self, *given):
        found = inner[1](self, *given)
        read.append(self.state["tokens"].clone())
        return found * (math.nan if len(read) == 4 else 1)

    monkeypatch.setitem(training.LOSSES, "1/t", loss)
    monkeypatch.setattr(train.SharedTrajectories, "loss", of_trajectories)
    with pytest.raises(ValueError, match=r"the loss became .* at step 4: its batch is in out/x/target/not-f"):
        one(*options)
    kept = load_file("out/x/target/not-finite.safetensors")
    assert torch.equal(kept["tokens"], read[3]) and kept["response"].dtype == torch.bool
    (state,) = checks.states(Path("out/x/target"))
    with safe_open(state, "pt") as f:
        assert f.metadata()["step"] == "2"


def test_a_gradient_that_is_infinite_changes_no_weight(one, monkeypatch):
    """The loss is finite, as it is where the backward pass overflows."""
    inner, calls = torch.nn.utils.clip_grad_norm_, []

    def clip(parameters, most):
        calls.append(1)
        return inner(parameters, most) if len(calls) < 4 else torch.tensor(math.inf)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip)
    with pytest.raises(ValueError, match="the gradient became infinite, or no number, at step 4"):
        one()


def without_room(options: list[str]) -> None:
    """A job: train.py, where no file may grow beyond 64 KB, by a limit of the kernel: less than a state."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, resource.RLIM_INFINITY))
    sys.stdout = sys.stderr = open("told", "w", buffering=1)
    sys.argv = ["train.py", *options]
    train.main()


def test_a_full_disk_is_one_line_and_the_last_state_stays(one, monkeypatch):
    stopped(one, monkeypatch, signal.SIGINT, 2)
    folder = Path("out/x/base")
    before = {path.name: path.read_bytes() for path in checks.states(folder)}
    assert run(1, functools.partial(without_room, [*sys.argv[1:], "--resume"])) == [2]
    *_, last = Path("told").read_text().splitlines()
    assert re.match(r"error: cannot write to out/x: .*File too large", last)
    assert last.endswith("--resume") and not [*folder.glob("*.safetensors.*")]
    assert before == {path.name: path.read_bytes() for path in checks.states(folder)}


def test_a_folder_that_cannot_be_made(one):
    Path("out").write_text("a file")
    with pytest.raises(OSError, match="cannot write to out/x: .*go on with: python train.py"):
        one()


def test_a_scheduler_ends_all_processes_with_the_same_step_saved(data_sets, tmp_path, monkeypatch):
    """SIGTERM comes to each at a moment of its own; to the second a second time, as torchrun sends it."""
    monkeypatch.chdir(tmp_path)

    options = [f"--data={data_sets}/sudoku", "--base_steps=50", "--stage=base", "--name=x"]
    assert run(2, functools.partial(stops, 2, [2, 5], *options)) == [130, 130]
    told = Path("told").read_text()
    assert told.count("base: stopped at step 3 of 50, saved; go on with: torchrun --nproc_per_node=2 tr") == 1
    with safe_open(Path("out/x/base") / checks.STATE, "pt") as f:
        assert f.metadata()["step"] == "3"


def torchrun(folder: Path, *words: str) -> None:
    """A process that is torchrun, in this folder, with its errors in the file `told`. The processes that it
    starts are forks: they have torch from their start, as it has."""
    from torch.distributed.run import main

    faulthandler.dump_traceback_later(300, exit=True)
    os.chdir(folder)
    os.dup2(os.open("told", os.O_WRONLY | os.O_CREAT), 2)
    main(["--run_path", "--start_method=fork", *words])


def test_torchrun_ends_in_one_line_if_a_process_is_killed(data_sets, tmp_path, one):
    """Two processes until then, and then one goes on."""
    options = [f"--data={data_sets}/sudoku", *TINY, "--stage=base", "--batch_size=8", "--base_steps=60",
               "--eval_every=5", "--eval_items=0", "--name=x"]  # fmt: skip
    words = ["--nproc_per_node=2", f"--master_port={free_port()}", str(ROOT / "train.py"), *options]
    process = forkserver().Process(target=torchrun, args=(tmp_path, *words))
    process.start()
    lock, state = tmp_path / "out/x/.lock", tmp_path / "out/x/base" / checks.STATE
    end = time.monotonic() + 200
    try:
        while not state.exists() and time.monotonic() < end:
            time.sleep(0.02)
        os.kill(int(lock.read_text().split()[1]), signal.SIGKILL)  # process 0
        process.join(100)
    finally:
        process.terminate()  # SIGTERM: torchrun ends those that it has started
    lines = [line for line in (tmp_path / "told").read_text().splitlines() if line.startswith("error: ")]
    assert process.exitcode not in (None, 0) and len(lines) == 1
    go_on = "error: another process of this run has ended; go on with: torchrun --nproc_per_node=2 train.py "
    assert lines[0].startswith(go_on) and lines[0].endswith(" --resume")
    one(*options, "--resume")
    assert [e["step"] for e in log_of(tmp_path / "out/x/base")] == list(range(1, 61))
