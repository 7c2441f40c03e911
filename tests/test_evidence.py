"""The experiment harness: its commands are commands of train.py, its cells are made once, its figures are right."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import rcd
import sample
import train

sys.path.insert(0, str(Path(__file__).parent / "evidence"))
import experiment


@pytest.mark.parametrize("name", experiment.EXPERIMENTS)
def test_every_experiment_names_runs_and_options_that_exist(name):
    cells = experiment.Cells(name, 1)
    e = cells.e
    for run in e.runs:
        o, shape, residual = sample.arguments("", train.Train, train.Shape, rcd.Residual, argv=cells.command(run), presets=lambda _: {"recipe": "trajectory"})
        earlier = [cells.folder(r) for r in list(e.runs)[: list(e.runs).index(run)]]
        assert {o.init_from, o.reference} - {""} <= set(earlier)  # a run stands on runs that were made before it
        train.checked(o, shape, sample.pick_device("cpu", "")[0])
    for c in e.curves:
        assert {c.run, c.reference} - {""} <= set(e.runs)
        rcd.Sampler(**c.sampler), rcd.Residual(**c.residual)
    labels = [re.sub("[^a-zA-Z0-9.]+", "-", c.label) for c in e.curves]
    assert len(set(labels)) == len(labels)  # each curve has a file of its own


def test_experiments_that_share_a_folder_mean_the_same_runs_by_the_same_names():
    commands = {}
    for name in experiment.EXPERIMENTS:
        cells = experiment.Cells(name, 1)
        for run in cells.e.runs:
            assert commands.setdefault((cells.name, run), cells.command(run)) == cells.command(run)


def row(accuracy: float, nfe: float, rule: str = "static", value: float = 1, n: int = 100, label: str = "x") -> dict:
    return {"label": label, "rule": rule, "value": value, "accuracy": accuracy, "nfe": nfe, "correct": [i < accuracy * n for i in range(n)]}


def test_the_mean_over_seeds_and_an_interval_that_covers_both_sources_of_chance():
    same, apart = experiment.merge([[row(0.5, 4.0)]] * 4)[0], experiment.merge([[row(a, 4.0)] for a in (0.2, 0.4, 0.6, 0.8)])[0]
    assert same["accuracy"] == apart["accuracy"] == 0.5 and apart["by_seed"] == [0.2, 0.4, 0.6, 0.8]
    half = 1.96 * np.sqrt(0.25 / 400)  # equal seeds: items alone, a mean of 400 coins
    assert np.allclose(same["interval"], (0.5 - half, 0.5 + half), atol=0.012)
    low, high = apart["interval"]
    half = 1.96 * np.sqrt(0.05 / 4 + np.mean([0.16, 0.24, 0.24, 0.16]) / 400)  # seeds differ: the variance of a mean of 4 seeds comes on top
    assert np.allclose((low, high), (0.5 - half, 0.5 + half), atol=0.02)
    assert experiment.merge([[row(1.0, 1.0)]] * 3)[0]["interval"] == (1.0, 1.0)


def test_the_summary_by_hand():
    seqd = [row(0.2, 2, label="SeqD"), row(0.6, 5, label="SeqD"), row(0.9, 20, label="SeqD"), row(0.9, 26, label="SeqD")]
    ours = [row(0.1, 2, label="RCD"), row(0.7, 4, label="RCD"), row(0.92, 5, label="RCD"), row(0.91, 9, label="RCD")]
    never = [row(0.3, 1, label="bad")]
    lines = experiment.summary([seqd, ours, never], (3, 4, 5, 6, 8))
    assert lines[2] == "| SeqD | 90.0% | 20.00 | 20.00 (1.0x fewer) | 20.0% | 20.0% | 60.0% | 60.0% | 60.0% |"
    assert lines[3] == "| RCD | 92.0% | 5.00 | 5.00 (4.0x fewer) | 10.0% | 70.0% | 92.0% | 92.0% | 92.0% |"
    assert lines[4] == "| bad | 30.0% | 1.00 | never | 30.0% | 30.0% | 30.0% | 30.0% | 30.0% |"


@pytest.fixture
def tiny_experiment(tmp_path, monkeypatch):
    """A whole experiment in seconds: ten puzzles, two steps a stage."""
    data_folder = tmp_path / "puzzles"
    from data.latin import prepare

    prepare.main(["--train=40", "--val=10", f"--test={500 + 6}", f"--out={data_folder}"])
    monkeypatch.setattr(experiment, "ROOT", tmp_path)
    monkeypatch.setattr(experiment, "HERE", tmp_path)
    monkeypatch.setattr(train, "OUT", tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    size = f"--data={data_folder} --batch_size=4 --n_layer=1 --n_head=1 --d_model=32 --base_steps=2 --steps=2 --device=cpu --dtype=float32"
    trial = experiment.EXPERIMENTS["sudoku"]
    trial = dataclasses.replace(trial, options=size, steps=(1, 2), thresholds=(0.5,), items=6, curves=[dataclasses.replace(c, more=()) for c in trial.curves[:2]], runs={k: trial.runs[k] for k in ("base", "seqd", "rcd")})
    fitted = experiment.Curve("fitted", "rcd", fit=("t_res", (0.5, 2.0)))
    monkeypatch.setitem(experiment.EXPERIMENTS, "trial", dataclasses.replace(trial, curves=[*trial.curves, fitted]))
    calls = []

    def in_process(command, cwd, check, stdout):
        calls.append(command[2:])
        monkeypatch.setattr(sys, "argv", command[1:])
        train.main()
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(experiment.subprocess, "run", in_process)

    def go(*argv: str) -> int:
        monkeypatch.setattr(sys, "argv", ["experiment.py", *argv])
        calls.clear()
        experiment.main()
        return len(calls)

    return go, tmp_path, calls


def test_one_command_makes_the_cells_once_and_writes_table_and_figures(tiny_experiment, capsys):
    go, folder, calls = tiny_experiment
    assert go("trial", "--seeds=1,2", "--cells") == 6 and not (folder / "trial.json").exists()
    assert go("trial", "--seeds=1,2") == 0  # nothing is made twice
    result = json.loads((folder / "trial.json").read_text())
    assert len(result["commands"]) == 6 and result["commands"][2].startswith("python train.py --data=")
    assert [c[0]["label"] for c in result["curves"]] == ["SeqD", "RCD", "fitted"] and all(len(c) == 3 for c in result["curves"])
    assert all(len(r["by_seed"]) == 2 and len(r["interval"]) == 2 for c in result["curves"] for r in c)
    assert (folder / "trial.png").read_bytes()[:4] == b"\x89PNG" and (folder / "trial.md").read_text().count("\n|") >= 8
    assert all(len(r["fitted"]) == 2 and {*r["fitted"][0]} == {"t_res"} for r in result["curves"][2])
    # the test items are those behind the first 500
    cell = json.loads(next((folder / "out/trial").glob("SeqD-1.json")).read_text())
    assert all(len(r["correct"]) == 6 for r in cell["rows"])
    # other settings: the curves are made again, the runs are not
    experiment.EXPERIMENTS["trial"] = dataclasses.replace(experiment.EXPERIMENTS["trial"], steps=(3,))
    assert go("trial", "--seeds=1") == 0 and len(json.loads((folder / "trial.json").read_text())["curves"][0]) == 2


@pytest.mark.parametrize("argv, words", [(("nonsense",), "no experiment"), (("sudoku", "--seeds=1;2"), "numbers with commas")])
def test_a_mistake_is_one_line(argv, words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["experiment.py", *argv])
    with pytest.raises(SystemExit) as stop:
        sample.run(experiment.main)
    assert stop.value.code == 2 and words in capsys.readouterr().err
