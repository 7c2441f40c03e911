"""Large sources: killed preparations, several processes and memory, against uninterrupted plain ones."""
import itertools
import json
import multiprocessing
import os
import signal
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from data import SPLITS, common, hub, store
from data import load as load_data
from data.openmathinstruct2 import prepare as openmath
from data.sums import prepare as sums


def write_rows(path: Path, count: int, filler: int = 0) -> Path:
    """JSON lines in the columns of the hub: some of no use, some too long. Some lines are blank."""
    with open(path, "w", encoding="utf-8") as file:
        for i in range(count):
            solution = "no box" if i % 7 == 3 else f"{'so ' * (i % 5 + filler)}\\boxed{{{i}}}"
            solution += " and on" * (40 * (i % 11 == 5))
            file.write(json.dumps({"problem": f"Problem {i}?", "generated_solution": solution}) + "\n")
            file.write("\n" * (i % 13 == 0))
    return path


def prepare(source: Path, out: Path, *options: str) -> None:
    usual = ["--tokenizer=bytes", "--length=96", "--held=0.1", "--workers=1"]
    openmath.main([*usual, f"--source={source}", f"--out={out}", *options])


def prepared(source: Path, out: Path, *options: str) -> dict[str, bytes]:
    """The files of the data set."""
    prepare(source, out, *options)
    return {p.name: p.read_bytes() for p in out.iterdir() if p.name != "meta.json"}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(hub, "CHUNK", 16)
    monkeypatch.setattr(store, "SECONDS", 0)  # every chunk is recorded


class Killer:
    """Ends this process, without a word, at the n-th call of what it wraps, before or after it."""

    def __init__(self, n: int):
        self.left = n

    def wrap(self, function):
        def call(*args):
            self.tick()
            result = function(*args)
            self.tick()
            return result
        return call

    def tick(self) -> None:
        self.left -= 1
        if self.left < 0:
            os._exit(9)


def killed(n: int, source: Path, out: Path, *options: str) -> bool:
    """Prepare in a process of its own that is killed at its n-th step. False: it had fewer."""
    child = os.fork()
    if not child:
        killer = Killer(n)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        store.Store.add = killer.wrap(store.Store.add)
        for module in (store, common):
            module.write_atomic = killer.wrap(module.write_atomic)
        os.fsync = killer.wrap(os.fsync)
        try:
            prepare(source, out, *options)
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the processes that are killed are forks")
@pytest.mark.parametrize("options", [["--pack", "--block=4"], ["--samples=75"]])
def test_a_killed_preparation_goes_on_to_the_same_bytes(options, tmp_path, capsys):
    source, went_on = write_rows(tmp_path / "in.jsonl", 150), 0
    whole = prepared(source, tmp_path / "whole", *options)
    capsys.readouterr()
    for n in itertools.count(0, 13):
        out = tmp_path / str(n)
        if not killed(n, source, out, *options):
            break
        for name in ("tokens", "index"):  # the kernel may have written more than was recorded
            with open(tmp_path / f"{n}.unfinished" / name, "ab") as file:
                file.write(b"torn")
        killed(n // 2, source, out, *options)  # and the next one, too, unless it has less to do
        assert prepared(source, out, *options) == whole
        went_on += "going on after row" in capsys.readouterr().err
        assert not (tmp_path / f"{n}.unfinished").exists()
    assert n > 50 and went_on > 3


def test_other_options_start_over(tmp_path, capsys):
    """Also where the files of one attempt lie beside the record of another."""
    source, out = write_rows(tmp_path / "in.jsonl", 150), tmp_path / "out"
    plain, other = (prepared(source, tmp_path / f"whole{i}", f"--instruction={i}") for i in "12")
    assert plain != other
    assert killed(30, source, out, "--instruction=1") and killed(4, source, out, "--instruction=2")
    capsys.readouterr()
    assert prepared(source, out, "--instruction=1") == plain
    assert "going on" not in capsys.readouterr().err
    assert killed(30, source, out, "--instruction=2")
    write_rows(source, 160)
    assert prepared(source, out, "--instruction=2") != other


@pytest.mark.parametrize("record", ["", "{", "[]", "{}", '{"count": 3, "decide": {}}'])
def test_a_damaged_record_starts_over(record, tmp_path, capsys):
    source, out = write_rows(tmp_path / "in.jsonl", 60), tmp_path / "out"
    assert killed(20, source, out)
    (tmp_path / "out.unfinished" / "progress.json").write_text(record)
    capsys.readouterr()
    assert prepared(source, out) == prepared(source, tmp_path / "whole")
    assert "going on" not in capsys.readouterr().err


def test_a_mistake_leaves_nothing_behind(tmp_path):
    source = write_rows(tmp_path / "in.jsonl", 60)
    with open(source, "a") as file:
        file.write("{")
    with pytest.raises(ValueError, match="not JSON"):
        prepare(source, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["in.jsonl"]


def test_as_many_processes_as_one_likes(tmp_path):
    source = write_rows(tmp_path / "in.jsonl", 150)
    alone = prepared(source, tmp_path / "1", "--pack")
    assert prepared(source, tmp_path / "3", "--pack", "--workers=3") == alone


def dies(chunk: list) -> list:
    os._exit(9)


@pytest.mark.parametrize("work,words", [(dies, "was killed.*--workers"), (max, "empty")])
def test_what_goes_wrong_in_a_process_is_told_here(work, words):
    """The largest of nothing is a ValueError. Python's own functions need no import of this file there."""
    with pytest.raises((ValueError, OSError), match=words) as error:
        [*store.in_order(work, [[], [1], [2]], 2)]
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("count", [0, 1, 2, 7])
def test_results_come_in_order(count):
    chunks = [[i] for i in range(count)]
    assert [*store.in_order(list, iter(chunks), 3)] == chunks


def test_the_seed_decides_the_order_of_all_documents(tmp_path):
    source = write_rows(tmp_path / "in.jsonl", 150)
    folders = [tmp_path / name for name in "abc"]
    for folder, seed in zip(folders, ("1", "1", "2")):
        prepare(source, folder, f"--seed={seed}")
    rows = [[r.tobytes() for split in SPLITS for r in load_data(f).tokens(split)] for f in folders]
    assert rows[0] == rows[1] != rows[2] and sorted(rows[0]) == sorted(rows[2])
    firsts = [load_data(f).text(load_data(f).tokens("train")[0]) for f in folders[1:]]
    assert firsts[0] != firsts[1]


def test_memory_does_not_grow_with_the_rows(tmp_path):
    """What Python and numpy hold at most; pages of files that the kernel maps come and go."""
    peaks, sizes = [], []
    for count in (200, 200, 1000):  # the first one is for what is loaded once
        source = write_rows(tmp_path / f"{count}.jsonl", count, filler=60)
        tracemalloc.start()
        prepare(source, tmp_path / "out", "--length=512")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        sizes.append(sum(p.stat().st_size for p in (tmp_path / "out").iterdir()))
    assert sizes[2] - sizes[1] > 900_000 and peaks[2] - peaks[1] < 50_000


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_rows_that_are_done_are_skipped(kind, tmp_path, monkeypatch):
    """As dropping them from the whole; a row group that is done is not read."""
    lines = write_rows(tmp_path / "a.jsonl", 50).read_text().split()
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines() if line]
    assert len(lines) > len(rows) == 50
    files = [tmp_path / f"{name}.{kind}" for name in "ab"]
    read = []
    if kind == "parquet":
        parquet, arrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
        for file in files:
            parquet.write_table(arrow.Table.from_pylist(rows), file, row_group_size=20)
        batches = parquet.ParquetFile.iter_batches
        monkeypatch.setattr(parquet.ParquetFile, "iter_batches",
                            lambda self, **k: read.append(list(k["row_groups"])) or batches(self, **k))
    else:
        write_rows(files[1], 50)
    columns = {"problem": ("problem",)}
    whole = [*hub.records(files, columns)]
    assert len(whole) == 100
    for done in (0, 1, 19, 20, 21, 50, 51, 77, 99, 100):
        read.clear()
        assert [*hub.records(files, columns, done=done)] == whole[done:]
        groups = [list(range(min(done, 50) // 20, 3)), list(range(max(0, done - 50) // 20, 3))]
        groups = [g for g, full in zip(groups, (done >= 50, done >= 100)) if not full]
        assert kind == "jsonl" or read == groups


def test_a_document_is_what_was_added(tmp_path):
    added = [("train", np.array([7, 8, 9]), 1), None, ("val", None, 0), ("test", np.array([70_000]), 0)]
    with store.Store(tmp_path / "x", {}, np.uint32) as documents:
        documents.add(added, 99)
        documents.record()
        found = sorted(documents.shuffled(0))
    assert found == [("test", [70_000], 0), ("train", [7, 8, 9], 1)]
    wanted = {"rows": 4, "documents": 2, "tokens": 4, "unusable": 1, "train": 0, "val": 1, "test": 0}
    assert documents.count == wanted and not [*tmp_path.iterdir()]


def begin(work: str, source: Path, out: Path) -> None:
    if work == "digits":
        sums.main([f"--out={out}", "--train=8", "--val=4", "--test=4"])
    else:
        prepare(source, out)


def stays(ready, *task) -> None:
    """begin(*task) in a process of its own, which never comes further than to its first array."""

    def wait(*_) -> None:
        ready.set()
        signal.pause()

    sys.argv, common.write_array = ["prepare.py", "--out=out"], wait
    begin(*task)


@pytest.mark.parametrize("work", ["training set", "digits"])
def test_a_folder_belongs_to_one_preparation(work, tmp_path):
    """Another process holds it, in the middle of its work; and is killed, so that it tidies nothing up."""
    source, spawn = write_rows(tmp_path / "in.jsonl", 60), multiprocessing.get_context("spawn")
    ready = spawn.Event()
    other = spawn.Process(target=stays, args=(ready, work, source, tmp_path / "out"))
    other.start()
    assert ready.wait(120)
    words = rf"out is in use by process {other.pid} on .*: python prepare.py --out=out; wait for it, or"
    with pytest.raises(ValueError, match=words):
        begin(work, source, tmp_path / "out")
    begin(work, source, tmp_path / "other")
    other.kill()
    other.join()
    begin(work, source, tmp_path / "out")
    made = [{p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("other", "out")]
    commands = [json.loads(files.pop("meta.json"))["command"] for files in made]
    assert made[0] == made[1] and ".lock" not in made[0] and commands[0] != commands[1]
