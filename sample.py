"""Fill the masks of a canvas and watch it: `python sample.py --steps 8`.

What is filled: --prompt is continued, or completed where it has masks. "_" and "." stand for one mask each in a vocabulary of characters
that has no such character (so a puzzle is typed cell by cell, white space does not matter), elsewhere what --infill names does. Without
--prompt, a model that was trained on examples gets new ones from its data set, drawn with --seed, and its answers are checked.

What is seen: tokens in the colour of the step that committed them, the newest inverted; masks shaded by alpha, the weight of the residual
that they carry. Where stdout is no terminal (or with --plain, or NO_COLOR) it is one line of text per step. The answer of a chat model, or
of any that was not trained here, is text that appears as its blocks fill, with the numbers on stderr; --no-stream shows its steps instead.

--eval measures accuracy against forward passes instead, on --eval=NAME (a data set) or on --eval=FILE (a puzzle per line: the canvas with
"_" for the cells to fill, white space, its solution).
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # see train.py
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # huge pages (Linux): a step's (N, V) temporaries cost half of their time in page faults

import argparse
import codecs
import contextlib
import importlib
import inspect
import io
import itertools
import json
import math
import re
import shlex
import shutil
import sys
import tempfile
import time
import typing
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import data
import zoo
from data.common import read_text
from rcd import Residual, Sampler, Step, Transformer, canvas_for, denoise
from zoo.files import write_atomic
from zoo.templates import encode_chat
from zoo.tokenizer import CharTokenizer

# ---------------------------------------------------------------------------------------------------------------------------------------
# What train.py and sample.py share: the command line, the choice of device and dtype, evaluation


def arguments(doc: str, *groups: type, argv: list[str] | None = None, presets: Callable[[dict], dict] | None = None) -> list:
    """An instance of every dataclass in groups, filled from the command line; the comment behind a field is its help.

    Options are spelt --name=value (or --name for a bool); an unknown or misspelt one is an error. presets, if given, maps the options
    that were typed to defaults for those that were not.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.error = lambda message: parser.exit(2, f"error: {message} (--help lists the options)\n")
    for cls in groups:
        section = parser.add_argument_group(inspect.getdoc(cls).splitlines()[0])
        notes = dict(re.findall(r"^    (\w+):.*?  # (.*)$", inspect.getsource(cls), re.M))
        for f in fields(cls):
            kind = typing.get_type_hints(cls)[f.name]
            note = notes[f.name].replace("%", "%%") + ("" if f.default in ("", None) else f" [{f.default}]")
            how = {"action": argparse.BooleanOptionalAction} if kind is bool else {"type": kind, "metavar": kind.__name__.upper()}
            section.add_argument(f"--{f.name}", default=argparse.SUPPRESS, help=note, **how)
    typed = vars(parser.parse_args(argv))
    values = {**(presets(typed) if presets else {}), **typed}
    try:
        return [cls(**{f.name: values[f.name] for f in fields(cls) if f.name in values}) for cls in groups]
    except ValueError as error:
        parser.exit(2, f"error: {error}\n")


def run(main: Callable[[], None]) -> None:
    """Entry point: a user's mistake is one line on stderr and exit code 2, Ctrl-C is 130, neither a traceback."""
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read our output, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError) as error:
        sys.exit(print(f"error: {error}", file=sys.stderr) or 2)
    except KeyboardInterrupt:
        sys.exit(print("interrupted", file=sys.stderr) or 130)


def pick_device(device: str, dtype: str) -> tuple[torch.device, torch.dtype, str]:
    """(device, dtype, the reason in words). An empty name means: detect. Raises ValueError for one that is not here."""
    have = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if device and not have.get(device.split(":")[0]):
        raise ValueError(f"device={device!r} is not available here; available: {', '.join(d for d, ok in have.items() if ok)}")
    name = device or next(d for d, ok in have.items() if ok)
    dtypes = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
    if dtype and dtype not in dtypes:
        raise ValueError(f"dtype={dtype!r}: choose from {', '.join(dtypes)}")
    reason = f"device {name} ({'asked for' if device else 'the best one found'})"
    if name.startswith("cuda"):
        bf16, why = torch.cuda.is_bf16_supported(), torch.cuda.get_device_name(name)
    elif name == "mps":
        bf16, why = False, "bfloat16 autocast is young on mps"
    else:
        bf16, why = torch.cpu._is_avx512_bf16_supported(), "the processor multiplies bfloat16 natively"
        bf16, why = (True, why) if bf16 else (False, "the processor has no native bfloat16")
    chosen = dtypes[dtype] if dtype else (torch.bfloat16 if bf16 else torch.float32)
    return torch.device(name), chosen, f"{reason}; dtype {str(chosen)[6:]} ({'asked for' if dtype else why})"


def autocast(device: torch.device, dtype: torch.dtype) -> contextlib.AbstractContextManager:
    """Matmuls in dtype over float32 weights; nothing at all for float32."""
    return contextlib.nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


class Setting(typing.NamedTuple):
    """One row of an evaluation."""

    label: str
    model: Transformer
    reference: Transformer | None
    sampler: Sampler
    residual: Residual


def evaluate(settings: list[Setting], dataset: "data.Dataset", split: str, limit: int, batch: int, dtype: torch.dtype,
             seed: int = 0) -> list[dict]:  # fmt: skip
    """Accuracy against forward passes: fill the first `limit` canvases of a split under every setting, one dict per setting.

    A dict holds label, rule, value (steps or threshold), accuracy (by the data set's own check), nfe (mean forward passes of a canvas),
    tokens_per_step, correct (list of bool, for confidence intervals) and seconds.
    """
    if dataset.check is None:
        raise ValueError(f"data set {dataset.name} has no right answers to check; evaluate its validation bound with train.py instead")
    solutions = torch.from_numpy(dataset.tokens(split)[:limit].astype("int64"))  # (N, L)
    response = torch.from_numpy(dataset.response(split)[:limit].copy())  # (N, L)
    rows = []
    bar = tqdm(total=len(settings) * len(solutions), desc="evaluate", unit="canvas", disable=None, leave=False)
    for label, model, reference, sampler, residual in settings:
        device, begin, correct, nfe = model.embedding.device, time.perf_counter(), [], []
        generator = torch.Generator(device).manual_seed(seed)
        for i in range(0, len(solutions), batch):
            tokens, fill = solutions[i : i + batch], response[i : i + batch]
            canvas = tokens.masked_fill(fill, model.config.mask_id)
            with autocast(device, dtype):
                for step in denoise(model, canvas, sampler, residual, reference=reference, generator=generator):  # noqa: B007
                    pass
            correct += [dataset.correct(f, s, r) for f, s, r in zip(step.tokens.tolist(), tokens.tolist(), fill.tolist())]
            nfe += step.nfe.tolist()
            bar.update(len(tokens))
        rows.append({
            "label": label, "rule": sampler.rule, "value": sampler.threshold if sampler.rule == "threshold" else sampler.steps,
            "accuracy": sum(correct) / len(correct), "nfe": sum(nfe) / len(nfe), "tokens_per_step": int(response.sum()) / sum(nfe),
            "correct": correct, "seconds": time.perf_counter() - begin,
        })  # fmt: skip
    bar.close()
    return rows


def sweep(seqd: Transformer | None, target: Transformer, reference: Transformer | None, sampler: Sampler, residual: Residual, tokens: float,
          steps: list[int] | None = None, thresholds: list[float] | None = None, blocks: int | None = None) -> list[Setting]:  # fmt: skip
    """The settings of an accuracy-against-NFE table: SeqD (None leaves it out), RCD from a cold start and, given a reference, a warm one.

    Each over step budgets (default: a few low ones, and 8, 5, 3, 2, 1 of the `tokens` to fill per step) and over thresholds. No budget is
    below `blocks`, the most blocks that a canvas can have (default: what fits into the longest canvas).
    """
    block = sampler.block_size or target.config.block_size
    least, most = blocks or (-(-target.config.max_len // block) if block else 1), math.ceil(tokens)
    steps = steps or sorted({max(least, min(k, most)) for k in (1, 2, 4, *(math.ceil(tokens / n) for n in (8, 5, 3, 2, 1)))})
    rule = sampler.rule if sampler.rule in ("random", "left-to-right") else "static"
    ways = [replace(sampler, rule=rule, steps=k, sub_block=0) for k in steps]  # a budget is shared out over whole blocks
    ways += [replace(sampler, rule="threshold", threshold=t, steps=0) for t in thresholds or (0.3, 0.5, 0.7, 0.85, 0.95)]
    starts = dict.fromkeys(["cold", *(["warm"] if reference else []), sampler.start])
    settings = [Setting("SeqD", seqd, None, replace(way, carry="none"), residual) for way in ways if seqd is not None]
    return settings + [Setting(f"RCD ({start})", target, reference, replace(way, carry="residual", start=start), residual)
                       for start in starts for way in ways]  # fmt: skip


def interval(correct: list[bool]) -> tuple[float, float]:
    """95 % bootstrap interval of an accuracy. Of n items drawn with replacement Binomial(n, accuracy) are right; that is drawn."""
    draws = np.random.default_rng(0).binomial(len(correct), np.mean(correct), 10_000) / len(correct)
    return tuple(np.percentile(draws, (2.5, 97.5)))


def table(rows: list[dict]) -> str:
    """The rows of evaluate() as an aligned table, which is Markdown too."""
    cells = [("model", "rule", "accuracy (95 % interval)", "NFE", "tokens per step")]
    for r in rows:
        rule = f"threshold {r['value']:g}" if r["rule"] == "threshold" else f"{r['rule']}, {r['value']} step{'s' * (r['value'] != 1)}"
        accuracy = "{:6.1%} ({:.1%} to {:.1%})".format(r["accuracy"], *interval(r["correct"]))
        cells.append((r["label"], rule, accuracy, f"{r['nfe']:.2f}", f"{r['tokens_per_step']:.2f}"))
    widths = [max(map(len, column)) for column in zip(*cells)]
    cells.insert(1, tuple("-" * (w - right) + ":" * right for w, right in zip(widths, (0, 0, 0, 1, 1))))  # two columns aligned on the right
    rows = [[c.ljust(w) if i < 3 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths))] for row in cells]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def plot(rows: list[dict], path: str | Path, title: str) -> None:
    """Accuracy against NFE as a picture, a curve per label and rule. Without matplotlib one line says how to get it."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return print('no plot, matplotlib is not installed: pip install -e ".[plot]"', file=sys.stderr)
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes, labels = figure.subplots(), list(dict.fromkeys(r["label"] for r in rows))
    for label, rule in dict.fromkeys((r["label"], r["rule"]) for r in rows):
        curve = sorted((r for r in rows if (r["label"], r["rule"]) == (label, rule)), key=lambda r: r["nfe"])
        x, y = np.array([(r["nfe"], 100 * r["accuracy"]) for r in curve]).T
        error = np.abs(100 * np.array([interval(r["correct"]) for r in curve]).T - y)  # (2, n)
        style = dict(marker="o", linestyle="-") if rule == "threshold" else dict(marker="s", linestyle="--", markerfacecolor="none")
        axes.errorbar(x, y, error, color=f"C{labels.index(label)}", capsize=2, label=f"{label}, {rule}", **style)
    axes.set(title=title, xlabel="forward passes per canvas (NFE)", ylabel="accuracy in %, with 95 % bootstrap interval")
    axes.grid(alpha=0.3)
    axes.legend()
    write_atomic(Path(path), lambda temporary: figure.savefig(temporary, format=Path(path).suffix[1:] or "png", dpi=150))


# ---------------------------------------------------------------------------------------------------------------------------------------
# What is filled, and by which model

MODEL = "sudoku/target"  # what `python sample.py` samples from


@dataclass
class Options:
    """what is filled, by which model, and how it is shown"""

    model: str = MODEL  # run folder, name of a run under out/ or of a model in zoo/, or id on the Hugging Face hub
    prompt: str = ""  # a text, a file, or - for stdin
    infill: str = ""  # a character of the prompt that stands for one masked token
    max_new: int = 0  # tokens to add to a prompt without masks; 0 = as many as the canvas holds, at most 256
    num_samples: int = 1  # how many canvases
    batch_size: int = 16  # canvases that are filled at once (--eval: eight times as many)
    reference: str = ""  # the model of --start=warm and of --compare; default: the one that the model's train.json names
    compare: bool = False  # SeqD and RCD side by side on the same canvas
    html: str = ""  # also write the run to this file, a page with a step slider
    plain: bool = False  # one line of text per step, no colours
    stream: bool = True  # of chat models and of those not trained here: the answer as text, block by block, instead of its steps
    eval: str = ""  # instead of sampling: a table of accuracy against forward passes, on a data set's test split or a file of puzzles
    limit: int = 200  # with --eval: the first so many canvases
    plot: str = ""  # with --eval: also draw the table into this file (PNG, SVG or PDF)
    seed: int = 1337  # of the examples and of every random draw
    compile: bool = False  # torch.compile the models: a minute or so first, then quicker steps; on CUDA implies --fixed_shapes and captures CUDA graphs
    device: str = ""  # cuda | mps | cpu; default: the best one found
    dtype: str = ""  # bfloat16 | float16 | float32, of the matmuls; default: bfloat16 where the processor has it

    def __post_init__(self):
        for name, least in (("num_samples", 1), ("batch_size", 1), ("limit", 1), ("max_new", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}")
        if len(self.infill) > 1:
            raise ValueError(f"infill={self.infill!r} must be one character")
        for path in (self.html, self.plot):
            if path and not Path(path).parent.is_dir():
                raise ValueError(f"cannot write {path}: there is no folder {Path(path).parent}")


def recommended(loaded: zoo.Loaded, typed: dict) -> dict:
    """Defaults for what was not typed: what the model's makers recommend, and the rule that a typed budget or threshold implies."""
    values = {"carry": "residual" if loaded.meta.get("stage") == "target" else "none", **loaded.meta.get("residual", {}), **loaded.defaults}
    rules = {"threshold": "threshold", "entropy_bound": "entropy", "steps": "static", "certainty": "static"}
    implied = [rule for name, rule in rules.items() if name in typed]
    return {**values, "steps": 0, "rule": implied[0]} if implied else values


def reference_of(loaded: zoo.Loaded, typed: str, device: torch.device, dtype: torch.dtype | None) -> zoo.Loaded | None:
    """The model that --reference names, else the one that train.json names: a place seen from the run folder, or a name."""
    named = typed or loaded.meta.get("reference") or ""
    place = Path(os.path.normpath(named if typed else loaded.folder / named))
    if not named or named.startswith("..") and not place.is_dir():
        return None
    reference = zoo.load(place if place.is_dir() else named, device, dtype)
    if reference.tokenizer.fingerprint != loaded.tokenizer.fingerprint:
        raise ValueError(f"the reference {reference.folder} has another tokenizer than the model {loaded.folder}")
    return reference


def task_of(loaded: zoo.Loaded) -> data.Dataset:
    """The data set that the model was trained on, without its files: how a canvas is laid out and checked. Others: running text."""
    c, name = loaded.model.config, loaded.meta.get("data", "")
    prepare = importlib.import_module(f"data.{name}.prepare") if name in data.names() else None
    meta = {"name": name, "mask_id": c.mask_id, "eos_id": c.eos_ids[0] if c.eos_ids else None}
    return data.Dataset(loaded.folder, meta, loaded.tokenizer, getattr(prepare, "check", None), getattr(prepare, "layout", str))


def examples(loaded: zoo.Loaded, name: str, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Test examples of a data set: tokens (N, L), response (N, L). A generated one makes just these, which takes a moment."""
    prepare = importlib.import_module(f"data.{name}.prepare")
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        generated = prepare.SOURCE == "generated"
        if generated:
            asked = shlex.split(loaded.meta.get("data_command", ""))[2:]  # the options it was prepared with, e.g. --size=9
            prepare.main([*asked, f"--out={folder}", "--train=1", "--val=1", f"--test={count}", f"--seed={seed}"])
        source = data.load(folder if generated else name)
        tokens, response = source.tokens("test"), source.response("test")
        pick = np.random.default_rng(seed).permutation(len(tokens))[:count]
        tokens, response = tokens[pick].astype(np.int64), response[pick]
    if source.tokenizer.fingerprint != loaded.tokenizer.fingerprint or tokens.shape[1] > loaded.model.config.max_len:
        raise ValueError(f"data set {name} is prepared in another way than it was for this model: give a --prompt")
    return tokens, response


@dataclass(frozen=True)
class Puzzles(data.Dataset):
    """A file with a canvas and its solution on every line; there are no splits."""

    rows: np.ndarray  # (2, N, L): canvases, solutions

    def tokens(self, split: str) -> np.ndarray:
        return self.rows[1]

    def response(self, split: str) -> np.ndarray:
        return self.rows[0] == self.mask_id

    @classmethod
    def read(cls, path: str, loaded: zoo.Loaded, task: data.Dataset) -> "Puzzles":
        """Raises ValueError that names the first line which is no such pair."""
        rows, mask = [], task.mask_id
        for number, line in enumerate(read_text(path, "puzzles").splitlines(), 1):
            pair = [encode(part, loaded) for part in line.split()]
            rows += [pair] if pair else []
            fits = len(pair) == 2 and len({len(ids) for ids in (*pair, *rows[0])}) == 1
            if pair and not (fits and all(s != mask and g in (mask, s) for g, s in zip(*pair))):
                raise ValueError(f"{path}, line {number}: expected a canvas with _ for the cells to fill, a space, and its solution")
        return cls(task.folder, task.meta, task.tokenizer, task.check, task.layout, np.array(rows).transpose(1, 0, 2))


def read_prompt(prompt: str) -> str:
    """The text itself, or that of a file or of stdin."""
    if prompt == "-":
        try:
            return sys.stdin.buffer.read().decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"stdin: byte {error.start:,} is not UTF-8; expected a prompt") from None
    named = len(prompt) < 256 and "\0" not in prompt and (prompt.endswith(".txt") or Path(prompt).is_file())
    return read_text(prompt, "a prompt") if named else prompt


def encode(text: str, loaded: zoo.Loaded, infill: str = "") -> list[int]:
    """Ids of a typed text, masks included. Raises ValueError that names a character which the vocabulary does not have."""
    tokenizer, marks = loaded.tokenizer, infill
    if isinstance(tokenizer, CharTokenizer):
        marks = infill or "".join({*"_."} - {*tokenizer.chars})
        text = text if any(c.isspace() for c in tokenizer.chars) else "".join(text.split())
    parts = re.split(f"([{re.escape(marks)}])", text) if marks else [text]  # text, mark, text, mark, ..., text
    return [i for k, part in enumerate(parts) for i in ([loaded.model.config.mask_id] if k % 2 else tokenizer.encode(part))]


def canvases(o: Options, loaded: zoo.Loaded, task: data.Dataset, block_size: int) -> tuple[Tensor, Tensor, np.ndarray | None]:
    """What to fill: canvas (N, T), lengths (N,) and, for examples of the data set, their solutions (N, T)."""
    c, grid = loaded.model.config, task.layout is not str
    if not o.prompt and task.check:
        tokens, response = examples(loaded, task.name, o.num_samples, o.seed)
        return torch.from_numpy(np.where(response, c.mask_id, tokens)), torch.full((len(tokens),), tokens.shape[1]), tokens
    text = read_prompt(o.prompt)
    ids, length = encode(text, loaded, o.infill), loaded.meta.get("length") or c.max_len
    if not ids and (grid or c.logit_shift or loaded.template):
        raise ValueError("the prompt is empty, and this model needs one: --prompt=TEXT, a file, or - for stdin")
    if grid and (len(ids) != length or c.mask_id not in ids):
        raise ValueError(f"the prompt has {len(ids)} cells, {ids.count(c.mask_id)} to fill (_): a canvas of this model has {length}")
    if c.mask_id in ids:
        return torch.tensor([ids] * o.num_samples), torch.full((o.num_samples,), len(ids)), None
    if loaded.template:
        ids = encode_chat(loaded.tokenizer, loaded.template, [{"role": "user", "content": text}])
    block = (block_size or c.block_size) if c.block_size else 1
    room = length // block * block - len(ids)
    if room < max(o.max_new, 1):
        raise ValueError(f"a prompt of {len(ids)} tokens leaves room for {max(room, 0)} in a canvas of {length}: shorten it, or --max_new")
    return *canvas_for(c, [ids] * o.num_samples, o.max_new or min(room, 256), block_size), None


# ---------------------------------------------------------------------------------------------------------------------------------------
# What is seen

RAMP = (26, 32, 31, 30, 29, 64, 100, 136, 166, 160, 161, 127)  # first to last step: xterm colours that are readable on black and on white
SHADES, GREY = "·░▒▓", "38;5;244"  # a mask: no residual, then alpha up to 1/3, 2/3, 1
CELL = 0xF0000  # from here on private characters stand for the positions of a canvas, so that a task can lay them out like any others


class Trace:
    """One row of a canvas under one setting, as the viewers read it: what each position holds, since which step, what every step saw."""

    def __init__(self, label: str, loaded: zoo.Loaded, ids: list[int]):
        self.label, self.tokenizer, self.nfe = label, loaded.tokenizer, 0
        self.ends, self.mask_id = loaded.model.config.eos_ids, loaded.model.config.mask_id
        self.ids, self.open = ids, [i == self.mask_id for i in ids]  # open: to be filled
        self.born, self.alpha = [0] * len(ids), [0.0] * len(ids)  # the step that committed a position, and its last alpha
        self.steps: list[list[tuple[int, float, float]]] = []  # of each step: (position, confidence, alpha) wherever it looked

    def add(self, step: Step, row: int) -> None:
        committed, confidence, alpha = (x[row, : len(self.ids)].tolist() for x in (step.committed, step.confidence, step.alpha))
        looked = [i for i, c in enumerate(confidence) if c or committed[i]]
        if looked:  # else this row had ended before
            self.ids, self.nfe = step.tokens[row, : len(self.ids)].tolist(), int(step.nfe[row])
            self.steps.append([(i, confidence[i], alpha[i]) for i in looked])
            for i in looked:
                self.born[i], self.alpha[i] = len(self.steps) * committed[i], alpha[i]

    def pieces(self) -> list[str]:
        """The text of each position, "" where nothing is committed. A character that is spread over several tokens goes to the last one."""
        decoder, out = codecs.getincrementaldecoder("utf-8")("replace"), [""]
        for i, born, to_fill in zip(self.ids, self.born, self.open):
            nothing, end = to_fill and not born, to_fill and i in self.ends
            out[-1] += decoder.decode(b"", True) if nothing or end else ""
            out.append("" if nothing else "∎" if end else decoder.decode(self.tokenizer.tokens.get(i, b"?")))
        out[-1] += decoder.decode(b"", True)
        return out[1:]


def glyphs(text: str, newline: str) -> list[str]:
    """What can be sent to a terminal, a string per character: combining marks join the one before, whatever could steer it is replaced."""
    out = []
    for c in text:
        if c == "\n":
            out += newline
        elif unicodedata.category(c) not in ("Mn", "Me"):
            out.append(c if c.isprintable() else " " if c.isspace() else chr(0x2400 + ord(c)) if c < " " else "\ufffd")
        elif out and out[-1] != "\n":
            out[-1] += c
        else:
            out.append("◌" + c)
    return out


class Terminal:
    """The live view, traces side by side: a line per step where a canvas fits into one, else one picture that is drawn over and over."""

    def __init__(self, traces: list[Trace], layout: Callable[[str], str], plain: bool, budget: int):
        (columns, self.rows), cells = shutil.get_terminal_size(), len(traces[0].ids)
        self.traces, self.plain, self.height, self.drawn = traces, plain, 0, 0.0
        self.budget = min(budget, sum(traces[0].open))
        self.width = max(8, (columns - 4 - 3 * (len(traces) - 1)) // len(traces))  # of a panel
        self.flat = "".join(map(chr, range(CELL, CELL + cells)))
        self.layout, self.scroll = layout(self.flat), plain or layout is str and cells <= self.width
        self.pause = 0 if plain else min(0.12, 5 / cells)  # a step's least seconds: small models are too quick to be watched
        if not plain:
            ramp = "".join(f"\x1b[38;5;{colour}m█" for colour in RAMP)
            print(f"committed at the first {ramp}\x1b[0m last step; masks: {SHADES[0]} no residual, {SHADES[1:]} alpha")
        if len(traces) > 1 and self.scroll:
            print("    " + " | ".join(f"{t.label:{cells}}" for t in traces).rstrip())
        self.show()

    def lines(self, trace: Trace, template: str, newline: str, width: int = 0) -> list[str]:
        """The trace as lines padded to `width` columns (0 = as long as they are), with colours unless plain."""
        pieces, last, out, used = trace.pieces(), max(self.budget or len(RAMP), len(trace.steps)) - 1, [""], 0
        for c in template:
            i = ord(c) - CELL
            if i < 0 or not trace.open[i]:
                cell, style = c if i < 0 else glyphs(pieces[i], newline), ""
            elif trace.ids[i] == trace.mask_id:
                cell, style = "_" if self.plain else SHADES[min(3, 1 + int(3 * trace.alpha[i])) if trace.alpha[i] else 0], GREY
            else:  # the newest inverted
                colour = RAMP[(trace.born[i] - 1) * (len(RAMP) - 1) // max(1, last)]
                cell, style = glyphs(pieces[i], newline), f"{7 * (trace.born[i] == len(trace.steps))};38;5;{colour}"
            for glyph in cell:
                columns = 2 if unicodedata.east_asian_width(glyph[0]) in "WF" else 1
                if glyph == "\n" or width and used + columns > width:
                    out[-1] += " " * (width - used)
                    out, used = [*out, ""], 0
                if glyph != "\n":
                    out[-1] += glyph if self.plain or not style else f"\x1b[{style}m{glyph}\x1b[0m"
                    used += columns
        return [*out[:-1], out[-1] + " " * (width - used)]

    def show(self, last: bool = False) -> None:
        """Draw the traces as they are now: called before the first step, after every step and, with last=True, at the end."""
        time.sleep(max(0, self.drawn + self.pause - time.perf_counter()))
        self.drawn, step = time.perf_counter(), max(len(t.steps) for t in self.traces)
        if self.scroll:
            return None if last else print(f"{step:3} " + " | ".join(self.lines(t, self.flat, "↵")[0] for t in self.traces), flush=True)
        panels = [self.lines(t, self.layout, "↵\n", self.width) for t in self.traces]
        body, room = [" │ ".join(lines) for lines in itertools.zip_longest(*panels, fillvalue=" " * self.width)], self.rows - 4
        if len(body) > room and not last:  # too high for the screen: show where the first mask is
            masked = next((i for i, line in enumerate(body) if GREY in line), len(body))
            body = body[max(0, min(masked - room // 2, len(body) - room)) :][:room]
        status = [f"{t.label} step {len(t.steps)}, {t.ids.count(t.mask_id)} left"[: self.width] for t in self.traces]
        body += ["", " │ ".join(text.ljust(self.width) for text in status)]
        print((f"\x1b[{self.height}F" if self.height else "") + "\n".join(f"    {line}\x1b[K" for line in body) + "\x1b[J", flush=True)
        self.height = len(body)

    def text(self, trace: Trace) -> str:
        """A finished canvas by itself, up to its end token."""
        ends = [i for i, token in enumerate(trace.ids) if trace.open[i] and token in trace.ends]
        return "\n".join(self.lines(trace, self.flat[: ends[0]] if ends else self.layout, "\n"))


class Stream:
    """An answer as it grows: all before the first mask is there to stay, so it is printed. Several answers: a bar until all are done."""

    def __init__(self, traces: list[Trace], alone: bool):
        self.traces, self.scroll, self.shown = traces if alone else [], False, 0  # traces: those that are seen live
        self.all, self.masks = traces, sum(sum(t.open) for t in traces)
        self.bar = tqdm(total=self.masks, unit="token", desc="sample", disable=alone or None, leave=False)

    def show(self, last: bool = False) -> None:
        for trace in self.traces:
            text = self.text(trace, last)
            print(text[self.shown :], end="\n" if last else "", flush=True)
            self.shown = len(text)
        self.bar.update(self.masks - sum(t.ids.count(t.mask_id) for t in self.all) - self.bar.n)
        if last:
            self.bar.close()

    def text(self, trace: Trace, last: bool = True) -> str:
        """The answer up to its first mask or end token. A character is held back until all its bytes are there, or nothing follows."""
        ids = itertools.takewhile(lambda i: i != trace.mask_id and i not in trace.ends, trace.ids[trace.open.index(True) :])
        text = codecs.getincrementaldecoder("utf-8")("replace").decode(b"".join(trace.tokenizer.tokens.get(i, b"?") for i in ids), last)
        return "\t".join("".join(glyphs(part, "\n")) for part in text.split("\t"))


PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>Residual Context Diffusion, step by step</title>
<style>
body { --ink: #1c1f23; --paper: #f7f7f5; --card: #fff; --line: #d9dce0; --quiet: #646b73; --l: 48%; --none: 91%; --all: 52% }
@media (prefers-color-scheme: dark) {
  body { --ink: #e6e8ea; --paper: #15171a; --card: #1d2024; --line: #363b41; --quiet: #98a0a8; --l: 78%; --none: 34%; --all: 70% }
}
:root { color-scheme: light dark }
body { margin: 0 auto; max-width: 72rem; padding: 1.5rem; background: var(--paper); color: var(--ink); font: 15px/1.5 sans-serif }
h1, h2 { font-size: 1.05rem; margin: 0 } p { margin: .3rem 0; color: var(--quiet) }
header { position: sticky; top: 0; padding: .75rem 0; background: var(--paper); display: flex; flex-wrap: wrap; gap: 1rem }
header > * { align-self: center }
button, section { border: 1px solid var(--line); border-radius: .5rem; background: var(--card); color: inherit; font: inherit }
button { width: 5.5rem; padding: .3rem } section { padding: 1rem 1.25rem }
input { flex: 1 } #ramp { display: inline-block; width: 7rem; height: .7em; border-radius: .3em } #info { min-height: 1.5em }
main { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); gap: 1rem }
.canvas { margin-top: .75rem; font: 16px/1.7 ui-monospace, Consolas, monospace; white-space: pre-wrap; overflow-wrap: anywhere }
.grid { font-size: 1.4rem } .grid b, .grid i { display: inline-block; width: 1.8em; margin: .1em; text-align: center }
b, i { font-style: normal; font-weight: inherit; border-radius: .2em } b:hover, i:hover { outline: 2px solid var(--quiet) }
b.done { color: oklch(var(--l) .16 var(--hue)); font-weight: 600 } b.new { background: color-mix(in srgb, currentColor 25%, #0000) }
i { background: oklch(calc(var(--none) + var(--alpha) * (var(--all) - var(--none))) .01 250); color: transparent; margin: 0 1px }
</style>
<header><h1>Residual Context Diffusion, step by step</h1>
<button></button><input type="range" min="0" aria-label="step"><output></output></header>
<p>Committed at the first <span id="ramp"></span> last step, just now if on a tint. Masks stand out the more, the more residual they
carry (alpha). Point at a position to see its numbers.</p><p id="info"></p><main></main>
<script>
const data = /*DATA*/, last = Math.max(...data.map(p => p.steps.length)), hue = f => 265 * (1 - f);
const $ = name => document.querySelector(name), slider = $("input");
const add = (to, tag, text, name = "") => Object.assign(to.appendChild(document.createElement(tag)), {textContent: text, className: name});
let timer = 0;
$("#ramp").style.background = `linear-gradient(90deg, ${[...Array(12).keys()].map(k => `oklch(var(--l) .16 ${hue(k / 11)})`)})`;
for (const p of data) {
  const box = add($("main"), "section", "");
  add(box, "h2", p.label);
  [p.status, p.canvas] = [add(box, "p", ""), add(box, "div", "", p.grid ? "canvas grid" : "canvas")];
}
function show(step) {
  for (const p of data) {
    const total = p.steps.length, now = Math.min(step, total), seen = {};
    p.steps.slice(0, now).forEach((cells, j) => cells.forEach(([i, confidence, alpha]) => seen[i] = [j + 1, confidence, alpha]));
    p.status.textContent = `step ${now} of ${total}` + (now == total ? `: ${p.stats}` : "");
    p.canvas.textContent = "";
    for (const i of p.layout) {
      const born = p.born[i], masked = p.open[i] && !(born && born <= now), [j, confidence, alpha] = seen[i] || [0, 0, 0];
      if (typeof i == "string") { p.canvas.append(i); continue; }
      if (masked && !born && now == total) continue; // behind the end
      const kind = !p.open[i] || masked ? "" : born == now ? "done new" : "done";
      const cell = add(p.canvas, masked ? "i" : "b", masked ? "0" : p.text[i], kind);
      cell.style.setProperty("--alpha", alpha);
      cell.style.setProperty("--hue", hue((born - 1) / Math.max(1, total - 1)));
      cell.title = !p.open[i] ? "given" : !j ? "masked" : masked ? `masked: confidence ${confidence} at step ${j}, alpha ${alpha}`
        : `committed at step ${born}, confidence ${confidence}`;
      cell.onmouseenter = cell.onclick = () => $("#info").textContent = `${p.label}, position ${i}: ${cell.title}`;
    }
  }
  slider.value = step;
  $("output").textContent = `step ${step} of ${last}`;
  history.replaceState(null, "", `#step=${step}`);
}
function play(on) {
  clearInterval(timer);
  const tick = () => { show(+slider.value + 1); if (+slider.value == last) play(0); };
  timer = on && setInterval(tick, Math.min(600, Math.max(60, 9000 / last)));
  $("button").textContent = on ? "Pause" : "Play";
}
$("button").onclick = () => { if (!timer && +slider.value == last) show(0); play(!timer); };
slider.max = last; slider.oninput = () => { play(0); show(+slider.value); };
onhashchange = () => show(Math.min(last, +(location.hash.match(/step=([0-9]+)/) || [0, last])[1]));
play(0); onhashchange();
</script></html>
"""


def page(traces: list[Trace], stats: list[str], layout: Callable[[str], str]) -> str:
    """The run as a page that needs nothing else. What a model or a user wrote travels as JSON and is shown as text, never read as HTML."""
    panels = []
    for t, numbers in zip(traces, stats):
        placed = layout("".join(map(chr, range(CELL, CELL + len(t.ids)))))
        placed = placed if layout is str else placed.replace(" ", "")  # the page spaces a grid's cells by itself
        panels.append({
            "label": t.label, "stats": numbers, "grid": layout is not str, "born": t.born, "open": t.open,
            "text": ["".join(glyphs(piece, "↵\n")) for piece in t.pieces()],
            "layout": [c if c < chr(CELL) else ord(c) - CELL for c in placed],
            "steps": [[(i, round(c, 3), round(a, 3)) for i, c, a in step] for step in t.steps],
        })  # fmt: skip
    return PAGE.replace("/*DATA*/", json.dumps(panels).replace("<", "\\u003c"))


# ---------------------------------------------------------------------------------------------------------------------------------------
# The command


def watch(o: Options, settings: list[Setting], loaded: zoo.Loaded, task: data.Dataset, device: torch.device, dtype: torch.dtype) -> None:
    """Fill the canvases under every setting, a step of each in turn; show them, write the page, and end with the numbers."""
    canvas, lengths, solutions = canvases(o, loaded, task, settings[0].sampler.block_size)
    plain = o.plain or not sys.stdout.isatty() or bool(os.environ.get("NO_COLOR")) or os.environ.get("TERM") == "dumb"
    stream = o.stream and bool(o.prompt) and not o.infill and not o.compare and bool(loaded.template or not loaded.meta)
    numbers = sys.stderr if stream else sys.stdout
    traces, seconds = [], [0.0] * len(settings)
    for s in settings:
        names = [f"{s.label} {i + 1}" if len(canvas) > 1 else s.label for i in range(len(canvas))]
        traces.append([Trace(name, loaded, ids[:n]) for name, ids, n in zip(names, canvas.tolist(), lengths.tolist())])
    for start in range(0, len(canvas), o.batch_size):
        rows = slice(start, start + o.batch_size)
        runs = [denoise(s.model, canvas[rows], s.sampler, s.residual, lengths=lengths[rows], reference=s.reference,
                        generator=torch.Generator(device).manual_seed(o.seed + start)) for s in settings]  # fmt: skip
        view = (Stream(traces[0][rows], len(canvas) == 1) if stream else
                Terminal([t[start] for t in traces], task.layout, plain, settings[0].sampler.steps))  # fmt: skip
        while any(runs):
            for k, run in ((k, run) for k, run in enumerate(runs) if run):
                begin = time.perf_counter()
                with autocast(device, dtype):
                    step = next(run, None)
                seconds[k] += time.perf_counter() - begin
                runs[k] = run if step else None
                for row, trace in enumerate(traces[k][rows] if step else ()):
                    trace.add(step, row)
            view.show(last=not any(runs))
        for trace in (t for batch in zip(*(t[rows] for t in traces)) for t in batch):
            text = view.text(trace)
            if trace not in view.traces or view.scroll and "\n" in text:  # it was not to be seen as it is
                print(f"\n{trace.label}:\n{text}" if len(settings) * len(canvas) > 1 else f"\n{text}")
    print(file=numbers)
    stats = []
    for s, row, took in zip(settings, traces, seconds):
        tokens, nfe = sum(b > 0 for t in row for b in t.born), sum(t.nfe for t in row)
        right = [] if solutions is None else [task.correct(t.ids, solution, t.open) for t, solution in zip(row, solutions)]
        stats.append(f"{tokens} tokens, {nfe} NFE, {tokens / nfe:.2f} tokens/step, {tokens / took:,.0f} tokens/s"
                     + (f", {sum(right)}/{len(right)} right" if right else ""))  # fmt: skip
        print(f"{s.label}: {stats[-1]}" if o.compare else stats[-1], file=numbers)
    if o.html:
        text = page([t for batch in zip(*traces) for t in batch], stats * len(canvas), task.layout)
        write_atomic(Path(o.html), lambda path: path.write_text(text, encoding="utf-8"))


def main() -> None:
    sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a character shows a question mark
    o, _, _ = arguments(__doc__, Options, Sampler, Residual)
    device, dtype, reason = pick_device(o.device, o.dtype)
    stored = torch.float32 if o.dtype == "float32" else None
    loaded = zoo.load(o.model, device, stored)
    o, sampler, residual = arguments(__doc__, Options, Sampler, Residual, presets=lambda typed: recommended(loaded, typed))
    task, rcd = task_of(loaded), sampler.carry == "residual"
    print(f"{loaded.folder}: {sum(p.numel() for p in loaded.model.parameters()):,} parameters\n{reason}", file=sys.stderr)
    reference = reference_of(loaded, o.reference, device, stored) if o.compare or o.eval or rcd and sampler.start == "warm" else None
    # SeqD's honest weights are those that had as much training without a residual: the reference, if it is of the model's shape.
    control = reference if reference and reference.model.config == loaded.model.config else loaded
    if o.compare or o.eval:
        which = "the model's own weights, no reference of its shape is there" if control is loaded else f"the reference, {reference.folder}"
        print(f"SeqD runs on {which}", file=sys.stderr)
    warm = reference and reference.model
    if o.compile:
        sampler = replace(sampler, fixed_shapes=sampler.fixed_shapes or device.type == "cuda")
        if device.type == "cpu" and not shutil.which(os.environ.get("CXX", "g++")):
            raise ValueError("--compile needs a C++ compiler, and there is no g++ here: install it, or name another in the variable CXX")
        for model in {loaded.model, control.model, warm} - {None}:
            torch._dynamo.config.cache_size_limit = 64  # graphs of one function, by all models and shapes together; 8 are too few
            # Rows and windows vary from step to step: one graph for all of them. A CUDA graph has one shape: few shapes, a graph for each.
            model.compile(dynamic=not sampler.fixed_shapes, mode="reduce-overhead" if device.type == "cuda" else None)

    if o.eval:
        dataset = Puzzles.read(o.eval, loaded, task) if Path(o.eval).is_file() else data.load(o.eval)
        if dataset.tokenizer.fingerprint != loaded.tokenizer.fingerprint:
            raise ValueError(f"data set {o.eval} is not in the tokens of {loaded.folder}")
        if dataset.check is None:
            raise ValueError(f"data set {o.eval} has no right answers to count")
        response, block = dataset.response("test")[: o.limit], sampler.block_size or loaded.model.config.block_size
        tokens, blocks = float(response.sum(1).mean()), -(-response.shape[1] // block) if block else 1
        settings = sweep(control.model, loaded.model, warm, sampler, residual, tokens, blocks=blocks)
        rows = evaluate(settings, dataset, "test", o.limit, 8 * o.batch_size, dtype, o.seed)
        print(table(rows))
        if o.plot:
            plot(rows, o.plot, f"{o.model} on {o.eval}")
    elif o.compare:
        label = f"SeqD ({'same weights' if control is loaded else 'reference'})"
        settings = [Setting(label, control.model, None, replace(sampler, carry="none"), residual),
                    Setting("RCD", loaded.model, warm, replace(sampler, carry="residual"), residual)]  # fmt: skip
        watch(o, settings, loaded, task, device, dtype)
    else:
        watch(o, [Setting("RCD" if rcd else "SeqD", loaded.model, warm, sampler, residual)], loaded, task, device, dtype)


if __name__ == "__main__":
    run(main)
