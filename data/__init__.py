"""Data sets: `data/<name>/prepare.py` writes token files once, `load(name)` opens them.

A prepared folder holds train.npy, val.npy and test.npy (uint16, or uint32 above 65,536 tokens),
tokenizer.json and meta.json. Two kinds:
- "stream": 1-D (T,), a running text from which the trainer cuts windows;
- "examples": 2-D (N, L), one canvas per row, and beside it <split>_response.npy (bool, same shape): True
  where the model must fill the position (it may be masked), False where it is shown (the prompt, given
  cells). Padding with <eos> belongs to the response. A packed split (`prepare.py --pack`, never test) has
  several documents in a row and <split>_segments.npy (uint16, same shape): the number of the document in
  its row, from 1, and 0 for padding, which is no response.
A set that is for evaluation only has nothing but test.npy; its meta.json lists no other split.

A task with a right answer defines `check(filled, solution, given) -> bool` in its prepare.py. All three are
decoded canvases of L tokens: `filled` is what the model produced, `solution` the reference, `given` the
reference with "_" at every position the model had to fill. Special tokens appear by name ("<eos>").
`Dataset.correct` makes the three from token ids.
"""
import contextlib
import importlib
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from zoo import tokenizer as tokenizers

HERE, FORMAT, SPLITS = Path(__file__).resolve().parent, 1, ("train", "val", "test")


@dataclass(frozen=True)
class Dataset:
    folder: Path
    meta: dict
    tokenizer: tokenizers.Tokenizer
    check: Callable[[str, str, str], bool] | None  # None: the text has no right answer
    layout: Callable[[str], str]                   # a canvas as a person wants to see it, e.g. as a grid

    name = property(lambda self: self.meta["name"])
    mask_id = property(lambda self: self.meta["mask_id"])
    eos_id = property(lambda self: self.meta["eos_id"])

    def tokens(self, split: str) -> np.memmap:
        """(N, L) examples or a (T,) stream, read-only. Raises ValueError if the set has no such split."""
        self._expect(split)
        return _open(self.folder / f"{split}.npy")

    def response(self, split: str) -> np.memmap | None:
        """(N, L) bool, True = to be filled by the model; None for a stream."""
        self._expect(split)
        return _open(self.folder / f"{split}_response.npy") if self.meta["kind"] == "examples" else None

    def segments(self, split: str) -> np.memmap | None:
        """(N, L) uint16, number of the document in its row from 1, 0 = padding; None if not packed."""
        return _open(self.folder / f"{split}_segments.npy") if self.packed(split) else None

    def packed(self, split: str) -> bool:
        """Whether a row of this split can hold several documents."""
        self._expect(split)
        return split in self.meta.get("packed", ())

    def _expect(self, split: str) -> None:
        if split not in self.meta["splits"]:
            there = ", ".join(self.meta["splits"])
            raise ValueError(f"the data set {self.name} has no {split} split, only {there}")

    def text(self, ids, mask: str = "_") -> str:
        """The canvas (L,) as one string, as `check` takes it."""
        runs = [[]]  # of tokens between masks; a plain model's mask is no token of its tokenizer
        for i in map(int, ids):
            runs.append([]) if i == self.mask_id else runs[-1].append(i)
        return mask.join(map(self.tokenizer.decode, runs))

    def show(self, ids, mask: str = "_") -> str:
        """The canvas (L,) for a reader: laid out by the task, without the <eos> padding at its end."""
        ids = [int(i) for i in ids]
        while ids and ids[-1] == self.eos_id:
            ids.pop()
        return self.layout(self.text(ids, mask))

    def correct(self, filled, solution, response) -> bool:
        """`check` on token ids, each (L,): the model's canvas, the reference, where the model had to fill."""
        given = np.where(np.asarray(response), self.mask_id, np.asarray(solution))
        return self.check(self.text(filled), self.text(solution), self.text(given))


def trained_on(meta: dict) -> str:
    """The data set of a model's train.json: its folder, if that is there, else its name."""
    folder = str(meta.get("options", {}).get("data") or "")
    return folder if folder and (Path(folder) / "meta.json").is_file() else meta.get("data", "")


def names() -> list[str]:
    """The data sets there are, prepared or not."""
    return sorted(path.parent.name for path in HERE.glob("*/prepare.py"))


def load(name: str | Path) -> Dataset:
    """A data set by its name, or by its folder (`prepare.py --out`). A generated one is made if it is absent.

    Raises FileNotFoundError (with the command to type) for one that must be downloaded, ValueError for an
    unknown name or damaged files."""
    named = str(name) in names()
    folder = HERE / name if named else Path(name)
    if not (folder / "meta.json").is_file():
        if not named:
            known = f"choose one of {', '.join(names())}, or a folder with a meta.json"
            raise ValueError(f"no data set {str(name)!r}: {known}")
        prepare, command = importlib.import_module(f"data.{name}.prepare"), f"`python data/{name}/prepare.py`"
        if prepare.SOURCE != "generated":
            raise FileNotFoundError(f"data set {name} is not prepared: run {command} first")
        print(f"data set {name} is not prepared yet: running {command}", file=sys.stderr)
        with contextlib.redirect_stdout(sys.stderr):  # a caller's own output stays clean
            prepare.main([])
    try:
        return _checked(folder)
    except (ValueError, KeyError, TypeError, OSError) as error:
        reason = f"no entry {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"the data set in {folder} is damaged ({reason}): prepare it again") from error


def _checked(folder: Path) -> Dataset:
    """The data set, if its files agree with each other."""
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    if meta["format"] != FORMAT or meta["name"] not in names():
        known = f"format {FORMAT} of {', '.join(names())}"
        found = f"format {meta['format']}, task {meta['name']!r}"
        raise ValueError(f"meta.json is of {found}; this version reads {known}")
    prepare = importlib.import_module(f"data.{meta['name']}.prepare")
    dataset = Dataset(folder, meta, tokenizers.load(folder), prepare.check, getattr(prepare, "layout", str))
    if dataset.tokenizer.fingerprint != meta["tokenizer"]:
        raise ValueError("tokenizer.json is not the one that wrote the tokens")
    if not meta["splits"] or not {*meta["splits"]} <= {*SPLITS}:
        raise ValueError(f"meta.json must list one or more of the splits {', '.join(SPLITS)}")
    for split, count in meta["splits"].items():
        tokens, response, segments = dataset.tokens(split), dataset.response(split), dataset.segments(split)
        shape = (count,) if response is None else (count, meta["length"])
        other = response is not None and (response.shape != shape or response.dtype != bool)
        if tokens.shape != shape or other:
            arrays = f"{split}.npy or {split}_response.npy"
            raise ValueError(f"{split}: meta.json says {shape}, {arrays} is something else")
        if tokens.dtype.kind != "u" or tokens.max() >= meta["vocab_size"]:
            raise ValueError(f"{split}.npy has ids outside the vocabulary of {meta['vocab_size']}")
        if segments is not None:
            if response is None or segments.shape != shape or segments.dtype != np.uint16:
                raise ValueError(f"{split}_segments.npy does not fit {split}.npy")
            _check_segments(split, segments, response)
    return dataset


def _check_segments(split: str, segments: np.ndarray, response: np.ndarray) -> None:
    """Rows must read 1 .. 1, 2 .. 2, ..., 0 .. 0, with no response at 0. Raises ValueError."""
    # in parts: a split may be larger than memory
    for start in range(0, len(segments), 64):
        part, filled = segments[start : start + 64].astype(np.int32), response[start : start + 64]
        step = np.diff(part, axis=1)  # (n, L - 1)
        counts = (step == 0) | (step == 1) & (part[:, :-1] > 0) | (part[:, 1:] == 0)
        if (part[:, 0] != 1).any() or not counts.all() or (filled & (part == 0)).any():
            wrong = "does not count the documents of a row from 1, or has a response in padding"
            raise ValueError(f"{split}_segments.npy {wrong}")


def _open(path: Path) -> np.memmap:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path.name}: {error}") from error
