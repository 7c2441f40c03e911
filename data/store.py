"""Large sources: documents are encoded in several processes and kept on the disk until all are there, so that
a killed preparation goes on.

    rows of the source, in order -> chunks, each encoded by some process -> in the same order again into files
    -> read in an order that a seed decides -> rows of a data set (data/common.py)

While the folder FOLDER is prepared, FOLDER.unfinished/ lies beside it. In it, `tokens` holds the ids of one
document behind the other, `index` where each begins and ends, and progress.json how much of both counts, and
for how many rows of the source. Files only grow, and progress.json is replaced last. What a killed run wrote
beyond it is cut off by the next, which goes on with the next row: the bytes are those of an uninterrupted
run. It starts over if the options, the tokenizer or the files of the source are others. No more is in memory
than a chunk for every process, and 4 bytes a document for the order.
"""
import contextlib
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from data import SPLITS
from zoo import read_json
from zoo.files import write_atomic

SECONDS = 10.0  # between two records of the progress: a killed run has no more to do again
INDEX = np.dtype([("start", "<u8"), ("length", "<u4"), ("shown", "<u4"), ("split", "u1")])

# A row of the source: None if it is of no use, (split, None, 0) if it is too long, else (split, ids, shown),
# of which the first `shown` ids are the prompt.
Encoded = tuple[str, np.ndarray | None, int] | None


class Store:
    """The documents of a data set under way. `decide`: whatever decides them; with other values it starts
    over. Left by success or by a ValueError, a mistake of the user's, it takes its files away."""

    def __init__(self, folder: Path, decide: dict, dtype: type):
        self.folder = folder.absolute().with_name(folder.absolute().name + ".unfinished")
        self.decide, self.dtype = json.loads(json.dumps(decide)), np.dtype(dtype)
        self.count = {"rows": 0, "documents": 0, "tokens": 0, "unusable": 0, **dict.fromkeys(SPLITS, 0)}

    def __enter__(self) -> "Store":
        self.folder.mkdir(parents=True, exist_ok=True)
        if saved := self._saved():
            self.count = saved
            print(f"going on after row {self.rows:,}, where a preparation stopped", file=sys.stderr)
        else:  # what it counts is gone from now on
            (self.folder / "progress.json").unlink(missing_ok=True)
        self.files = {name: open(self.folder / name, "ab") for name in ("tokens", "index")}
        for name, count in (("tokens", self.count["tokens"]), ("index", self.documents)):
            self.files[name].truncate(count * self._bytes(name))
        self.recorded = time.monotonic()
        return self

    def __exit__(self, kind: type | None, *_) -> None:
        for file in self.files.values():
            file.close()
        if kind is None or issubclass(kind, ValueError) or not (self.folder / "progress.json").exists():
            shutil.rmtree(self.folder)

    def _saved(self) -> dict | None:
        """The counts to go on from; None if there are none, or those of other options."""
        try:
            saved = read_json(self.folder / "progress.json")
            counts = {"tokens": saved["count"]["tokens"], "index": saved["count"]["documents"]}
            there = all((self.folder / n).stat().st_size >= k * self._bytes(n) for n, k in counts.items())
            return saved["count"] if there and saved["decide"] == self.decide else None
        except (OSError, ValueError, KeyError, TypeError):  # no file, or not a whole one
            return None

    def _bytes(self, name: str) -> int:
        return self.dtype.itemsize if name == "tokens" else INDEX.itemsize

    rows = property(lambda self: self.count["rows"], doc="of the source, that are done")
    documents = property(lambda self: self.count["documents"])

    def add(self, chunk: list[Encoded], most: float) -> None:
        """Append what some rows of the source became, up to so many documents in all."""
        for found in chunk:
            if self.documents >= most:
                break
            self.count["rows"] += 1
            if found is None:
                self.count["unusable"] += 1
            elif found[1] is None:
                self.count[found[0]] += 1
            else:
                split, ids, shown = found
                entry = (self.count["tokens"], len(ids), shown, SPLITS.index(split))
                self.files["tokens"].write(ids.astype(self.dtype).tobytes())
                self.files["index"].write(np.array(entry, INDEX).tobytes())
                self.count["documents"] += 1
                self.count["tokens"] += len(ids)
        if time.monotonic() - self.recorded >= SECONDS:
            self.record()

    def record(self) -> None:
        """From here the next run goes on."""
        for file in self.files.values():
            file.flush()
            os.fsync(file.fileno())
        text = json.dumps({"count": self.count, "decide": self.decide}, indent=1)
        write_atomic(self.folder / "progress.json", lambda path: path.write_text(text, encoding="utf-8"))
        self.recorded = time.monotonic()

    def shuffled(self, seed: int) -> Iterator[tuple[str, list[int], int]]:
        """(split, ids, shown) of every document, in the order that the seed decides."""
        if not self.documents:
            return
        index = np.memmap(self.folder / "index", INDEX, "r", shape=(self.documents,))
        order = np.random.default_rng(seed).permutation(np.arange(self.documents, dtype=np.uint32))
        with open(self.folder / "tokens", "rb") as file:
            for i in order:
                start, length, shown, split = index[i].item()
                file.seek(start * self.dtype.itemsize)
                yield SPLITS[split], np.fromfile(file, self.dtype, length).tolist(), shown


def chunked(rows: Iterable, size: int) -> Iterator[list]:
    """Lists of so many rows, the last perhaps of fewer."""
    rows = iter(rows)
    return iter(lambda: list(itertools.islice(rows, size)), [])


def in_order(work: Callable[[list], list], chunks: Iterable[list], workers: int) -> Iterator[list]:
    """work(chunk) of every chunk, in order, from so many processes. A single chunk needs none.

    Each process has one chunk at a time and gets the next when its result was taken, so neither chunks nor
    results pile up. It ends when this one is gone. Raises what work raises.
    """
    chunks = iter(chunks)
    first = list(itertools.islice(chunks, 2))
    if workers == 1 or len(first) < 2:
        yield from map(work, itertools.chain(first, chunks))
        return
    spawn, running, sent = multiprocessing.get_context("spawn"), [], 0
    try:
        for sent, chunk in enumerate(itertools.chain(first, chunks)):  # noqa: B007 (read below)
            if sent < workers:
                running.append(start(spawn, work))
            else:
                yield receive(running[sent % workers][1])
            send(running[sent % workers][1], chunk)
        for k in range(max(0, sent + 1 - workers), sent + 1):
            yield receive(running[k % workers][1])
    finally:
        for process, pipe in running:
            pipe.close()
            process.terminate()


def start(spawn, work: Callable[[list], list]) -> tuple:
    """(process, pipe to it). Ctrl-C is for this process alone: the new one inherits that it ignores it."""
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=serve, args=(work, theirs), daemon=True)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        process.start()
    finally:
        signal.signal(signal.SIGINT, before)
    theirs.close()
    return process, ours


def serve(work: Callable[[list], list], pipe: Connection) -> None:
    """What a process of in_order() does, until nobody is at the other end."""
    with contextlib.suppress(EOFError, OSError):
        while True:
            chunk = pipe.recv()
            try:
                result = work(chunk)
            except Exception as error:
                result = error
            pipe.send(result)


def send(pipe: Connection, chunk: list) -> None:
    with contextlib.suppress(OSError):  # nobody is at the other end: receive() says so
        pipe.send(chunk)


def receive(pipe: Connection) -> list:
    try:
        result = pipe.recv()
    except (EOFError, OSError):
        raise OSError("a process that encodes was killed, perhaps for want of memory: --workers") from None
    if isinstance(result, Exception):
        raise result
    return result
