"""The experiments: their commands exist, cells are made once, figures are right."""

import functools
import importlib
import json
import os
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import data
import train
from data.sums import prepare
from zoo.decoding import Carry, Decoding
from zoo.tools import budget
from zoo.tools.command import arguments, pick_device
from zoo.tools.command import run as run_script

sys.path.insert(0, str(Path(__file__).parent / "evidence"))
import experiment


@pytest.mark.parametrize("name", experiment.EXPERIMENTS)
def test_every_experiment_names_runs_and_options_that_exist(name):
    cells = experiment.Cells(name, 1)
    e = cells.e
    for run in e.runs:
        program, *options = cells.command(run)
        earlier = [cells.folder(r) for r in list(e.runs)[: list(e.runs).index(run)]]
        if program == "-m":
            (o,) = arguments("", importlib.import_module(f"{options[0]}.__main__").Train, argv=options[1:])
            assert o.model in earlier and f"{o.name}/{o.model.split('/')[-1]}" == cells.folder(run)
            continue
        assert program == "train.py"
        o, shape, _ = arguments("", train.Train, train.Shape, Carry, argv=options,
                                presets=lambda _: {"recipe": "trajectory"})  # fmt: skip
        assert {o.init_from, o.reference} - {""} <= set(earlier)  # runs that are made before this one
        train.checked(o, shape, pick_device("cpu", "")[0])
    for c in e.curves:
        assert {c.run, c.reference} - {""} <= set(e.runs)
        Decoding(**c.sampler), Carry(**c.residual)
        for value in c.fit[1] if c.fit else ():
            Carry(**{c.fit[0]: value})
    labels = [re.sub("[^a-zA-Z0-9.]+", "-", c.label) for c in e.curves]
    assert len(set(labels)) == len(labels)  # each curve has a file of its own


def test_experiments_that_share_a_folder_mean_the_same_runs_by_the_same_names():
    commands = {}
    for name in experiment.EXPERIMENTS:
        cells = experiment.Cells(name, 1)
        for run in cells.e.runs:
            assert commands.setdefault((cells.name, run), cells.command(run)) == cells.command(run)


@pytest.mark.parametrize("name, label, runs, policies", [
    ("rivals", "gemma", ["base", "gemma"], []),
    ("policies", "RCD, policy", ["base", "rcd"], ["policy-1"]),
    ("reference", "larger, warm", ["base", "large-base", "large", "letter-large"], []),
    ("text", "SeqD", ["base", "judge", "seqd"], []),
    ("rewards", "RCD, rewards", ["base", "rcd", "rcd-grpo"], []),
])  # fmt: skip
def test_a_part_has_the_runs_that_its_curves_need(name, label, runs, policies):
    whole = experiment.EXPERIMENTS[name]
    one = experiment.part(whole, [label])
    assert [c.label for c in one.curves] == [label] and [*one.runs] == runs and [*one.policies] == policies
    assert {*one.runs.items()} <= {*whole.runs.items()} and one.folder == whole.folder


def row(accuracy: float, nfe: float, label: str = "x") -> dict:
    """A row of 100 test items."""
    return {"label": label, "rule": "static", "value": 1, "accuracy": accuracy, "nfe": nfe,
            "correct": [i < accuracy * 100 for i in range(100)]}  # fmt: skip


def test_the_mean_over_seeds_and_an_interval_that_covers_both_sources_of_chance():
    (same,) = experiment.merge([[row(0.5, 4.0)]] * 4)
    (apart,) = experiment.merge([[row(a, 4.0)] for a in (0.2, 0.4, 0.6, 0.8)])
    assert same["accuracy"] == apart["accuracy"] == 0.5 and apart["by_seed"] == [0.2, 0.4, 0.6, 0.8]
    half = 1.96 * np.sqrt(0.25 / 400)  # equal seeds: only items differ, the mean of 400 Bernoulli draws
    assert np.allclose(same["interval"], (0.5 - half, 0.5 + half), atol=0.012)
    low, high = apart["interval"]
    # Seeds differ: the variance of a mean of 4 seeds comes on top.
    half = 1.96 * np.sqrt(0.05 / 4 + np.mean([0.16, 0.24, 0.24, 0.16]) / 400)
    assert np.allclose((low, high), (0.5 - half, 0.5 + half), atol=0.02)
    assert experiment.merge([[row(1.0, 1.0)]] * 3)[0]["interval"] == (1.0, 1.0)


def test_the_summary_by_hand():
    seqd = [row(*point, "SeqD") for point in ((0.2, 2), (0.6, 5), (0.9, 20), (0.9, 26))]
    ours = [row(*point, "RCD") for point in ((0.1, 2), (0.7, 4), (0.92, 5), (0.91, 9))]
    never = [row(0.3, 1, "bad")]
    lines = experiment.summary([seqd, ours, never], (3, 4, 5, 6, 8))
    assert lines[2] == "| SeqD | 90.0% | 20.00 | 20.00 (1.0x) | 20.0% | 20.0% | 60.0% | 60.0% | 60.0% |"
    assert lines[3] == "| RCD | 92.0% | 5.00 | 5.00 (4.0x) | 10.0% | 70.0% | 92.0% | 92.0% | 92.0% |"
    assert lines[4] == "| bad | 30.0% | 1.00 | never | 30.0% | 30.0% | 30.0% | 30.0% | 30.0% |"


def test_a_command_runs_in_the_repository_without_its_output_and_tells_whether_it_succeeded(tmp_path, capfd):
    names_its_folder = f"import os; print('unseen'); open({str(tmp_path / 'cwd')!r}, 'w').write(os.getcwd())"
    assert experiment.succeeds([sys.executable, "-c", names_its_folder])
    assert os.path.samefile((tmp_path / "cwd").read_text(), experiment.ROOT)
    assert not experiment.succeeds([sys.executable, "-c", "raise SystemExit(3)"])
    assert capfd.readouterr() == ("", "")


def test_an_interrupted_run_goes_on_and_one_that_fails_ends_the_experiment(tmp_path, monkeypatch):
    monkeypatch.setattr(experiment, "ROOT", tmp_path)
    commands = []
    monkeypatch.setattr(experiment, "succeeds", commands.append)  # returns None, so every run fails
    cells = experiment.Cells("sudoku", 1)
    state = tmp_path / "out" / cells.folder("base") / "state.safetensors"
    for _ in range(2):
        with pytest.raises(ValueError, match="base of seed 1 did not finish"):
            cells.train("base")
        state.parent.mkdir(parents=True, exist_ok=True)
        state.touch()
    assert [command[-1] == "--resume" for command in commands] == [False, True]


@pytest.fixture
def trial(tmp_path, monkeypatch):
    """A whole experiment in seconds: forty sums, two steps a stage, trained in this process.

    Returns a function that runs the command with these options and tells how many runs it trained, and the
    folder that everything is written to.
    """
    prepare.main(["--train=40", "--val=10", "--test=506", f"--out={tmp_path / 'sums'}"])
    (tmp_path / "sums" / "prepare.py").touch()  # the mark of a data set
    monkeypatch.setattr(data, "HERE", tmp_path)
    monkeypatch.setattr(experiment, "ROOT", tmp_path)
    monkeypatch.setattr(experiment, "HERE", tmp_path)
    # Intervals of 2,000 draws are for the tests above.
    monkeypatch.setattr(experiment, "bootstrap", functools.partial(experiment.bootstrap, draws=50))
    monkeypatch.setattr(train, "OUT", tmp_path / "out")
    monkeypatch.setattr(train, "matmul_rate", lambda *_: 1e12)  # this and the next take seconds a run
    monkeypatch.setattr(budget, "kept_by_layer", lambda *_: 1 << 20)
    monkeypatch.chdir(tmp_path)
    small = ("--data=sums --batch_size=4 --n_layer=1 --n_head=1 --d_model=32 --base_steps=2 --steps=2 "
             "--device=cpu --dtype=float32")  # fmt: skip
    runs = {name: experiment.EXPERIMENTS["sums"].runs[name] for name in ("base", "seqd", "rcd")}
    curves = [experiment.SEQD, experiment.RCD, experiment.Curve("fitted", "rcd", fit=("t_res", (0.5, 2.0)))]
    tiny = experiment.Experiment("a trial", small, runs, curves, (1, 2), (0.5,), items=10)
    monkeypatch.setitem(experiment.EXPERIMENTS, "trial", tiny)
    trained = []

    def in_process(command: list[str]) -> bool:
        trained.append(command)
        monkeypatch.setattr(sys, "argv", command[1:])
        train.main()
        return True

    monkeypatch.setattr(experiment, "succeeds", in_process)

    def go(*options: str) -> int:
        monkeypatch.setattr(sys, "argv", ["experiment.py", "trial", *options])
        trained.clear()
        experiment.main()
        return len(trained)

    return go, tmp_path


def test_one_command_makes_the_cells_once_and_writes_table_and_figures(trial):
    go, folder = trial
    assert go("--seeds=1", "--cells", "--only=SeqD") == 2
    assert go("--seeds=1,2", "--cells") == 4 and not (folder / "trial.json").exists()
    assert go("--seeds=1,2") == 0  # nothing is made twice
    result = json.loads((folder / "trial.json").read_text())
    assert len(result["commands"]) == 6 and result["commands"][2].startswith("python train.py --data=sums")
    assert [curve[0]["label"] for curve in result["curves"]] == ["SeqD", "RCD", "fitted"]
    assert all(len(curve) == 3 for curve in result["curves"])
    assert all(len(r["by_seed"]) == 2 and len(r["interval"]) == 2 for c in result["curves"] for r in c)
    assert all(len(r["fitted"]) == 2 and {*r["fitted"][0]} == {"t_res"} for r in result["curves"][2])
    assert (folder / "trial.png").read_bytes()[:4] == b"\x89PNG"
    assert (folder / "trial.md").read_text().count("\n|") >= 8
    cell = json.loads((folder / "out/trial/SeqD-1.json").read_text())
    assert all(len(r["correct"]) == 6 for r in cell["rows"])  # of 506 test items, those behind the first 500
    # Other settings: the curves are made again, the runs are not.
    experiment.EXPERIMENTS["trial"] = replace(experiment.EXPERIMENTS["trial"], steps=(3,), factors=(2.0,))
    assert go("--seeds=1") == 0
    rows = json.loads((folder / "trial.json").read_text())["curves"][0]
    rules = "static", "threshold", "factor"
    assert [(r["rule"], r["value"]) for r in rows] == [*zip(rules, (3, 0.5, 2.0))]
    # Other options of the runs, or other defaults of train.py: what is there is no cell of this table.
    e = experiment.EXPERIMENTS["trial"]
    experiment.EXPERIMENTS["trial"] = replace(e, options=f"{e.options} --lr=0.5")
    with pytest.raises(ValueError, match=r"was trained with other options: lr=0.001 \(now 0.5\)"):
        go("--seeds=1")


def test_data_that_another_command_made_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(experiment, "ROOT", tmp_path)
    cells = experiment.Cells("squares", 1)
    made = "python data/sudoku/prepare.py --no_boxes --given=11 --out=out/squares/data"
    (tmp_path / cells.data).mkdir(parents=True)
    (tmp_path / cells.data / "meta.json").write_text(json.dumps({"command": made}))
    with pytest.raises(ValueError, match="out/squares/data was made by .* --given=11 .*: remove it"):
        cells.prepare()


@pytest.mark.parametrize("argv, words", [
    (("nonsense",), "no experiment"), (("sudoku", "--seeds=1;2"), "numbers with commas"),
    (("rivals", "--only=SeqD;RDC"), "no curve 'RDC': choose from SeqD; RCD; ReMix, untrained; "),
])  # fmt: skip
def test_a_mistake_is_one_line(argv, words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["experiment.py", *argv])
    with pytest.raises(SystemExit) as stop:
        run_script(experiment.main)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and words in error and error.count("\n") == 1
