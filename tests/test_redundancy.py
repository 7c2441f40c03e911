"""zoo/rivals/redundancy: which answers are kept, what the data set holds, and that train.py reads it."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from test_train import TINY

import data
import train
import zoo
from data.sudoku import prepare
from rcd import denoise
from zoo.decoding import Decoding
from zoo.tokenizer import CharTokenizer
from zoo.rivals.redundancy import __main__ as answering
from zoo.tools import budget, command, training


@pytest.fixture(scope="module")
def puzzles(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "puzzles"
    prepare.main([f"--out={folder}", "--given=20", "--train=32", "--val=8", "--test=8"])
    return folder


@pytest.fixture
def sudoku(puzzles, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("puzzles").symlink_to(puzzles)
    return data.load("puzzles")


def make(monkeypatch, *options: str) -> None:
    monkeypatch.setattr(sys, "argv", ["redundancy", "--data=puzzles", "--device=cpu", *options])
    answering.main()


def test_the_answers_of_fewest_passes_are_kept(sudoku, monkeypatch, capsys):
    """Each canvas is answered by itself here, not in a batch."""
    make(monkeypatch, "--items=16", "--keep=0.25", "--batch=10", "--dtype=float32")
    model, own = zoo.load("sudoku/reference").model, data.load("out/redundancy")
    tokens, response = sudoku.tokens("train").astype("int64"), sudoku.response("train").copy()
    tokens, response = torch.from_numpy(tokens), torch.from_numpy(response)
    answered, scores = [], []
    for x, fill in zip(tokens[:16], response[:16]):
        canvas = x.masked_fill(fill, model.config.mask_id)[None]
        *_, last = denoise(model, canvas, Decoding(rule="r2", threshold=0.9, rescue=0.8, carry="none"))
        answered.append(last.tokens[0].tolist())
        scores.append(last.nfe.item() / int(fill.sum()))
    kept = own.tokens("train").tolist()
    rows = [answered.index(row) for row in kept]
    assert len(kept) == 4 and rows == sorted(rows)
    assert rows == sorted(sorted(range(16), key=lambda i: scores[i])[:4])
    assert np.array_equal(own.response("train"), response.numpy()[rows])
    for split in ("val", "test"):
        assert np.array_equal(own.tokens(split), sudoku.tokens(split))
    assert own.meta["splits"] == {"train": 4, "val": 8, "test": 8}
    mean = sum(scores) / 16
    assert f"4 of 16 answers -> out/redundancy ({mean:.3f} passes per token" in capsys.readouterr().out


def test_the_files_of_a_hub_tokenizer_are_kept(sudoku, monkeypatch):
    """Such as merges.txt, without which vocab.json is no tokenizer."""
    Path("more.txt").write_text("of the tokenizer")
    monkeypatch.setattr(CharTokenizer, "originals", (Path("more.txt"),))
    make(monkeypatch, "--items=4", "--keep=1")
    assert Path("out/redundancy/more.txt").is_file()


def test_train_learns_from_them(sudoku, monkeypatch):
    make(monkeypatch, "--items=12", "--dtype=float32")
    monkeypatch.setattr(train, "matmul_rate", lambda *_: 1e12)  # these three take long and decide no weight
    monkeypatch.setattr(train, "validate", lambda *given: training.validate(*given[:5], 1 << 14, given[6]))
    monkeypatch.setattr(budget, "kept_by_layer", lambda *_: 1 << 20)
    options = ["--data=out/redundancy", "--stage=reference", "--init_from=sudoku/reference", "--steps=2",
               "--weighting=complementary", "--batch_size=4", "--test_items=0", "--eval_items=0", "--name=x"]
    monkeypatch.setattr(sys, "argv", ["train.py", *TINY, *options])
    train.main()
    before, after = (zoo.load(f"{name}/reference").model.embedding for name in ("sudoku", "x"))
    assert not torch.equal(before, after)
    assert json.loads(Path("out/x/reference/train.json").read_text())["options"]["data"] == "out/redundancy"


@pytest.mark.parametrize("options,message", [
    (["--keep=0"], "keep=0.0 should be above 0 and at most 1"),
    (["--items=0"], "items=0, batch=250: at least 1 each"),
    (["--out=puzzles"], "--out=puzzles is the data set that is read"),
    (["--data=nothing"], "no data set 'nothing'"),
    (["--data=letters"], "data set sudoku is not in the tokens of sudoku/reference"),
])  # fmt: skip
def test_mistakes_are_one_line(sudoku, monkeypatch, capsys, options, message):
    if options == ["--data=letters"]:
        prepare.main(["--out=letters", "--pairs", "--train=8", "--val=4", "--test=4"])
        capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["redundancy", "--data=puzzles", *options])
    with pytest.raises(SystemExit):
        command.run(answering.main)
    told = capsys.readouterr().err.strip()
    assert message in told and "\n" not in told
