"""Many prompts: a file of them becomes a file of records, and a run that was killed goes on where it was.

A line of the first file is a JSON object: {"prompt": "..."}, perhaps with a "seed" and with fields of your
own, which are copied. A record has these fields, and

    line, sample      which line of the file, from 1, and which of its samples, from 1
    response, seed    what the model wrote, and the seed that decided it
    nfe, tokens       forward passes of this canvas, and tokens that were filled in them
    tokens_per_step   tokens / nfe
    seconds           the time of its batch, divided by the canvases of the batch
    settings          what else the response depends on

What shares a batch. If nothing is drawn at random, rows of a batch do not depend on each other: canvases of
like length share one, the longest first. If something is drawn, one generator serves the whole batch, so only
samples of the same line share one, and its generator is seeded with that line's seed. Either way a response
does not depend on the other lines, but for the rounding of matrix products of another shape.

Records are appended batch by batch and flushed to the disk. A run that starts on an unfinished file cuts off
a half-written last line and does what is missing. At the end the records stand in the order of the prompts.
"""

import itertools
import json
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from rcd import Sampler, denoise
from zoo.files import write_atomic
from zoo.progress import progress
from zoo.tokenizer import Tokenizer
from zoo.tools.command import autocast
from zoo.tools.evaluate import Setting

HEAD = b'{"line": '  # every record begins so
WRITTEN = ("line", "sample", "response", "nfe", "tokens", "tokens_per_step", "seconds", "settings")


class Line(NamedTuple):
    """A line of the prompt file, ready to be filled."""

    given: dict  # the JSON object
    canvas: list[int]  # (T,) ids with masks
    begin: int | None  # where the response begins; None = it is the whole canvas
    seed: int


class Filled(NamedTuple):
    """A canvas that was filled, and what it cost."""

    canvas: list[int]  # (T,)
    nfe: int
    tokens: int  # so many were filled
    seconds: float


def draws(s: Sampler) -> bool:
    """Whether a sampler draws anything at random."""
    return s.temperature > 0 or s.rule in ("random", "policy") or s.start == "dirichlet"


def by_length(lengths: list[int], size: int) -> list[list[int]]:
    """Indices in batches of at most `size`, the longest first: little padding, and a canvas that does not fit
    into memory fails at once."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    return [order[i : i + size] for i in range(0, len(order), size)]


def fill(s: Setting, canvases: list[list[int]], dtype: torch.dtype, *seeds: int) -> list[Filled]:
    """Fill canvases of any lengths in one batch. The seeds, not negative, make the one generator of all."""
    device, begin = s.model.embedding.device, time.perf_counter()
    seed = int(np.random.SeedSequence(seeds).generate_state(1, np.uint64)[0] >> 1)
    lengths = torch.tensor([len(ids) for ids in canvases])
    canvas = torch.zeros(len(canvases), int(lengths.max()), dtype=torch.long)
    for row, ids in zip(canvas, canvases):
        row[: len(ids)] = torch.tensor(ids)
    tokens = torch.zeros_like(lengths)
    with autocast(device, dtype):
        for step in denoise(s.model, canvas, s.sampler, s.residual, lengths=lengths, reference=s.reference,
                            generator=torch.Generator(device).manual_seed(seed)):  # fmt: skip
            tokens += step.committed.sum(1)
    each = (time.perf_counter() - begin) / len(canvases)
    rows = zip(step.tokens.tolist(), lengths.tolist(), step.nfe.tolist(), tokens.tolist())
    return [Filled(ids[:length], nfe, count, each) for ids, length, nfe, count in rows]


def read_prompts(path: str) -> list[dict]:
    """The objects of a prompt file. Raises ValueError that names the first line which is none."""
    prompts = []
    for number, line in enumerate(Path(path).read_bytes().splitlines(), 1):
        place = f"{path}, line {number}"
        try:
            given = json.loads(line)
            json.dumps(given, ensure_ascii=False).encode()
        except ValueError:  # no JSON, or text that is no UTF-8
            given = None
        if not isinstance(given, dict) or not isinstance(given.get("prompt"), str):
            raise ValueError(f'{place}: expected a JSON object like {{"prompt": "2 + 2 ="}}')
        seed = given.get("seed", 0)
        if type(seed) is not int or seed < 0:
            raise ValueError(f"{place}: seed={seed!r} must be a whole number from 0 on")
        if taken := sorted(given.keys() & {*WRITTEN}):
            raise ValueError(f"{place}: a record has a {taken[0]!r} of its own, give that field another name")
        prompts.append(given)
    if not prompts:
        raise ValueError(f"{path} holds no prompt")
    return prompts


def recover(out: Path, lines: list[Line], samples: int, settings: dict) -> list[dict]:
    """The records of an earlier run on the same prompts and settings. A half-written last line is cut off.

    Raises ValueError, and leaves the file alone, if it is anything else.
    """
    if not out.exists():
        return []
    content = out.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    half = content[len(whole) :]
    try:
        records = [json.loads(line) for line in whole.splitlines()]
        places = {(r["line"], r["sample"]) for r in records}
        ours = len(places) == len(records) and all(i >= 1 and 1 <= k <= samples for i, k in places)
        for r in records:
            line = lines[r["line"] - 1]
            ours &= {**line.given, "seed": line.seed}.items() <= r.items() and isinstance(r["settings"], dict)
    except (ValueError, LookupError, TypeError, AttributeError):
        ours = False
    if not ours or half[: len(HEAD)] != HEAD[: len(half)]:
        raise ValueError(f"{out} is no unfinished file of these prompts and seeds: name another with --out")
    for name in settings:
        before = {json.dumps(r["settings"].get(name)) for r in records} - {json.dumps(settings[name])}
        if before:
            was = f"{name}={before.pop()}, now it is {json.dumps(settings[name])}"
            raise ValueError(f"{out} was begun with {was}: name another with --out")
    os.truncate(out, len(whole))
    return records


def run_file(s: Setting, lines: list[Line], samples: int, size: int, dtype: torch.dtype, tokenizer: Tokenizer,
             settings: dict, out: Path) -> list[dict]:  # fmt: skip
    """Fill every line so many times, in batches of at most `size`, and write a record of each to `out`.

    settings: what a response depends on besides its line. Returns the records in order. Raises ValueError for
    samples that would all be the same, and as recover() does.
    """
    chance = draws(s.sampler)
    if samples > 1 and not chance:
        drawn = "nothing is drawn at random: give a --temperature"
        raise ValueError(f"num_samples={samples} would be {samples} times the same, {drawn}")
    if chance:
        settings = {**settings, "num_samples": samples, "batch_size": size}
    records = {(r["line"], r["sample"]): r for r in recover(out, lines, samples, settings)}
    numbers = range(1, len(lines) + 1)
    if chance:  # a batch: samples of one line
        ranges = [range(first, min(first + size, samples + 1)) for first in range(1, samples + 1, size)]
        batches = [[(n, k) for k in some] for n in numbers for some in ranges]
    else:
        left = [(n, 1) for n in numbers if (n, 1) not in records]
        order = by_length([len(lines[n - 1].canvas) for n, _ in left], size)
        batches = [[left[i] for i in batch] for batch in order]

    def record(n: int, k: int, filled: Filled) -> dict:
        given, _, begin, seed = lines[n - 1]
        ids = filled.canvas[begin or 0 :]
        if begin is not None:
            ids = [*itertools.takewhile(lambda token: token not in s.model.config.eos_ids, ids)]
        return {"line": n, "sample": k, **given, "response": tokenizer.decode(ids), "seed": seed,
                "nfe": filled.nfe, "tokens": filled.tokens,
                "tokens_per_step": round(filled.tokens / filled.nfe, 3), "seconds": round(filled.seconds, 4),
                "settings": settings}  # fmt: skip

    def text(some: Iterable[dict]) -> str:
        return "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in some)

    with progress(len(lines) * samples, "sample", "responses", initial=len(records)) as bar:
        for batch in batches:
            missing = {*batch} - records.keys()
            if not missing:
                continue
            n, first = batch[0]
            seeds = (lines[n - 1].seed, first) if chance else (0,)
            filled = zip(batch, fill(s, [lines[n - 1].canvas for n, _ in batch], dtype, *seeds))
            new = {place: record(*place, canvas) for place, canvas in filled if place in missing}
            with open(out, "a", encoding="utf-8") as f:
                f.write(text(new.values()))
                f.flush()
                os.fsync(f.fileno())
            records |= new
            bar.update(len(new))
    ordered = [records[place] for place in sorted(records)]
    write_atomic(out, lambda path: path.write_text(text(ordered), encoding="utf-8"))
    return ordered
