"""train.py as several processes on one machine (gloo): the same weights, and runs that nothing destroys."""

import json
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_train import TINY, write_packed

import train
from data.sudoku import prepare
from zoo.tokenizer import bytes_tokenizer
from zoo.tools import budget, command, distributed, training

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def data_sets(tmp_path_factory):
    """Sudoku, and packed rows of which the last in every three has no answer."""
    folder = tmp_path_factory.mktemp("data")
    prepare.main([f"--out={folder}/sudoku", "--train=64", "--val=16", "--test=16"])
    documents = {split: [([97 + i % 26] * (8 + i % 5), [i % 3 < 2 and j > 3 for j in range(8 + i % 5)])
                         for i in range(n)] for split, n in (("train", 60), ("val", 12), ("test", 6))}  # fmt: skip
    write_packed(folder / "packed", bytes_tokenizer(["<eos>", "<mask>"]), 257, 256, documents, 16)
    return folder


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def child(number: int, n: int, ports: list[int], commands: list[list[str]]) -> None:
    """A process as torchrun starts it, which runs train.py once for each command."""
    os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(n),
                   "LOCAL_WORLD_SIZE": str(n), "MASTER_ADDR": "127.0.0.1"}  # fmt: skip
    # What takes long and decides no weight.
    train.matmul_rate = lambda *_: 1e12
    train.validate = lambda *given: training.validate(*given[:5], 1 << 14, given[6])
    budget.kept_by_layer = lambda *_: 1 << 20
    for port, options in zip(ports, commands):
        os.environ["MASTER_PORT"] = str(port)
        sys.argv = ["train.py", *TINY, "--batch_size=8", "--eval_items=0", "--test_items=0", *options]
        command.run(train.main)


def run(n: int, *commands: list[str]) -> list[int]:
    """The exit codes of n processes."""
    ports, fork = [free_port() for _ in commands], multiprocessing.get_context("fork")
    started = [fork.Process(target=child, args=(i, n, ports, commands)) for i in range(n)]
    for process in started:
        process.start()
    for process in started:
        process.join(60)
    return [process.exitcode for process in started]


RECIPES = {
    "paper": ["sudoku", "--recipe=paper", "--absent=0.2", "--ema=0.5"],
    "earlier": ["sudoku", "--recipe=earlier", "--accumulate=2", "--clip=0.1"],
    "trajectory": ["sudoku", "--recipe=trajectory", "--buffer=2", "--window=2", "--accumulate=2", "--remat"],
    "packed": ["packed", "--recipe=trajectory", "--buffer=1", "--block_size=4", "--steps=12"],
    "noise": ["packed", "--recipe=paper", "--block_size=4", "--t_per=block", "--accumulate=2"],
}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def log_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def runs(data_sets, tmp_path_factory):
    """Every recipe by 1, 2 and 4 processes, in folders of these names."""
    folder = tmp_path_factory.mktemp("runs")
    for n in (1, 2, 4):
        (folder / str(n)).mkdir()
        os.chdir(folder / str(n))
        commands = [[f"--data={data_sets}/{options[0]}", f"--name={name}", *options[1:]]
                    for name, options in RECIPES.items()]  # fmt: skip
        assert run(n, *commands) == [0] * n
    return folder


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("n", [2, 4])
def test_several_processes_take_the_steps_of_one(runs, recipe, n):
    for stage in train.STAGES:
        one, many = (runs / str(k) / "out" / recipe / stage for k in (1, n))
        expected = tensors(one)
        worst = max(float((value - expected[name]).abs().max()) for name, value in tensors(many).items())
        assert worst < 1e-5, f"{stage}: {worst}"
        a, b = log_of(one), log_of(many)
        assert [e["step"] for e in a] == [e["step"] for e in b]
        for key in ("loss", "val_loss"):
            of = [[e[key] for e in log if key in e] for log in (a, b)]
            assert of[0] == pytest.approx(of[1], abs=2e-5), (stage, key)
