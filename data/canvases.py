"""What is to be filled: test examples, a file of puzzles or a typed prompt, as canvases of token ids."""

import contextlib
import importlib
import io
import re
import shlex
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import data
from data.common import read_text
from rcd import canvas_for
from zoo import Loaded
from zoo.templates import encode_chat
from zoo.tokenizer import CharTokenizer


def task_of(loaded: Loaded) -> data.Dataset:
    """How the canvases of a model are laid out and checked: its data set without the files, or plain text."""
    c, name = loaded.model.config, loaded.meta.get("data", "")
    prepare = importlib.import_module(f"data.{name}.prepare") if name in data.names() else None
    meta = {"name": name, "mask_id": c.mask_id, "eos_id": c.eos_ids[0] if c.eos_ids else None}
    check, layout = getattr(prepare, "check", None), getattr(prepare, "layout", str)
    return data.Dataset(loaded.folder, meta, loaded.tokenizer, check, layout)


def canvases(loaded: Loaded, task: data.Dataset, prompt: str, infill: str, count: int, max_new: int,
             block_size: int, seed: int) -> tuple[Tensor, Tensor, np.ndarray | None]:  # fmt: skip
    """`count` canvases: tokens with masks (N, T), lengths (N,) and, for test examples, the solutions (N, T).

    Without a prompt: test examples of the task, drawn with the seed, or masks alone. With one: so many times
    the prompt, to be completed where it has masks (see encode), else continued by max_new tokens (0 = as many
    as there is room for, at most 256). Raises ValueError for a prompt that does not fit the model.
    """
    if not prompt and task.check:
        tokens, response = examples(loaded, task.name, count, seed)
        lengths = torch.full((len(tokens),), tokens.shape[1])
        return torch.from_numpy(np.where(response, loaded.model.config.mask_id, tokens)), lengths, tokens
    ids, _ = canvas_of(read_prompt(prompt), loaded, task, infill, max_new, block_size)
    return torch.tensor([ids] * count), torch.full((count,), len(ids)), None


def canvas_of(text: str, loaded: Loaded, task: data.Dataset, infill: str, max_new: int,
              block_size: int) -> tuple[list[int], int | None]:  # fmt: skip
    """The canvas (T,) of a prompt, and where its response begins; None if the prompt itself has masks.

    max_new and ValueError: see canvases().
    """
    c, grid = loaded.model.config, task.layout is not str
    ids, length = encode(text, loaded, infill), loaded.meta.get("length") or c.max_len
    if not ids and (grid or c.logit_shift or loaded.template):
        given = "--prompt=TEXT, a file, or - for stdin"
        raise ValueError(f"the prompt is empty, and this model needs one: {given}")
    if grid and (len(ids) != length or c.mask_id not in ids):
        cells = f"{len(ids)} cells, {ids.count(c.mask_id)} to fill (_)"
        raise ValueError(f"the prompt has {cells}: a canvas of this model has {length}")
    if c.mask_id in ids:
        return ids, None
    if loaded.template:
        ids = encode_chat(loaded.tokenizer, loaded.template, [{"role": "user", "content": text}])
    block = (block_size or c.block_size) if c.block_size else 1
    room = length // block * block - len(ids)
    if room < max(max_new, 1):
        left = f"a prompt of {len(ids)} tokens leaves room for {max(room, 0)} in a canvas of {length}"
        raise ValueError(f"{left}: shorten it, or --max_new")
    canvas, _ = canvas_for(c, [ids], max_new or min(room, 256), block_size)
    return canvas[0].tolist(), len(ids)


def examples(loaded: Loaded, name: str, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Test examples of a data set: tokens (N, L), response (N, L) bool. Generated sets are generated anew."""
    prepare = importlib.import_module(f"data.{name}.prepare")
    quiet = contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO())
    with tempfile.TemporaryDirectory() as folder, quiet[0], quiet[1]:
        generated = prepare.SOURCE == "generated"
        if generated:
            options = shlex.split(loaded.meta.get("data_command", ""))[2:]  # as prepared then, e.g. --size=9
            splits = ["--train=1", "--val=1", f"--test={count}", f"--seed={seed}"]
            try:
                prepare.main([*options, *splits, f"--out={folder}"])
            except SystemExit:  # its message went to the stderr that is not shown
                raise ValueError(f"{loaded.folder}/train.json: no data_command: {options}") from None
        source = data.load(folder if generated else data.trained_on(loaded.meta) or name)
        tokens, response = source.tokens("test"), source.response("test")
        chosen = np.random.default_rng(seed).permutation(len(tokens))[:count]
        tokens, response = tokens[chosen].astype(np.int64), response[chosen]
    same = source.tokenizer.fingerprint == loaded.tokenizer.fingerprint
    if not same or tokens.shape[1] > loaded.model.config.max_len:
        now = f"data set {name} is prepared in another way than it was for this model"
        raise ValueError(f"{now}: give a --prompt")
    return tokens, response


def read_prompt(prompt: str) -> str:
    """The text itself, or that of a file, or of stdin ("-")."""
    if prompt == "-":
        try:
            return sys.stdin.buffer.read().decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"stdin: byte {error.start:,} is not UTF-8; expected a prompt") from None
    named = len(prompt) < 256 and "\0" not in prompt and (prompt.endswith(".txt") or Path(prompt).is_file())
    return read_text(prompt, "a prompt") if named else prompt


def encode(text: str, loaded: Loaded, infill: str = "") -> list[int]:
    """Ids of a typed text, in which every character `infill` is a mask.

    In a vocabulary of characters "_" and "." are masks by default if it lacks them, and white space is left
    out if it has none. Raises ValueError that names a character which the vocabulary does not have.
    """
    tokenizer, marks = loaded.tokenizer, infill
    if isinstance(tokenizer, CharTokenizer):
        marks = infill or "".join({*"_."} - {*tokenizer.chars})
        text = text if any(c.isspace() for c in tokenizer.chars) else "".join(text.split())
    pieces = re.split(f"([{re.escape(marks)}])", text) if marks else [text]  # text, mark, text, ...
    mask = [loaded.model.config.mask_id]
    return [i for k, piece in enumerate(pieces) for i in (mask if k % 2 else tokenizer.encode(piece))]


@dataclass(frozen=True)
class Puzzles(data.Dataset):
    """A file with a canvas and its solution on every line, as a data set whose splits are all the same."""

    rows: np.ndarray  # (2, N, L): canvases, solutions

    def tokens(self, split: str) -> np.ndarray:
        return self.rows[1]

    def response(self, split: str) -> np.ndarray:
        return self.rows[0] == self.mask_id

    @classmethod
    def read(cls, path: str, loaded: Loaded, task: data.Dataset) -> "Puzzles":
        """Raises ValueError that names the first line which is no such pair."""
        rows, mask, grid = [], task.mask_id, task.layout is not str
        for number, line in enumerate(read_text(path, "puzzles").splitlines(), 1):
            try:
                pair = [encode(part, loaded) for part in line.split()]
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from None
            if not pair:
                continue
            rows.append(pair)
            cells = grid and loaded.meta.get("length") or len(rows[0][0])  # a grid is whole, as in canvas_of
            fits = len(pair) == 2 and all(len(ids) == cells for ids in pair)
            fits = fits and mask in pair[0] and all(s != mask and g in (mask, s) for g, s in zip(*pair))
            if not fits:
                wanted = f"a canvas of {cells} tokens with _ for those to fill, a space, and its solution"
                raise ValueError(f"{path}, line {number}: expected {wanted}")
        pairs = np.array(rows).transpose(1, 0, 2)
        return cls(task.folder, task.meta, task.tokenizer, task.check, task.layout, pairs)
