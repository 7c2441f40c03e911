"""Questions and answers from parquet files or JSON lines, as the hub keeps them: read row by row, written
as a data set to train on or to evaluate with.

Nothing is held in memory but some rows of the source, and those that are being packed. Columns are taken by
name, in any of the spellings in use.
"""
import argparse
import contextlib
import functools
import itertools
import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from data import SPLITS
from data.answers import boxed
from data.common import (Documents, Encoder, claimed, document_options, options, split_of,
                         write_dataset)  # fmt: skip
from data.store import Encoded, Store, chunked, in_order
from zoo.progress import download_bars, progress
from zoo.tools.command import number, whole

GOES_ON = "type the same command to go on"  # what Ctrl-C says of a training set
CHUNK = 512  # rows of a source that are encoded together

Columns = dict[str, tuple[str, ...]]  # our name of a column -> its spellings
Pair = tuple[list[str], list[str]]  # a problem, [] if it is null, and its right answers


def parser_of(doc: str, file: str, length: int, train: bool) -> argparse.ArgumentParser:
    parser = options(doc, file)
    parser.add_argument("--source", type=Path, nargs="+",
                        help="a folder, or files, of parquet or JSON lines; without it, from the hub")
    parser.add_argument("--instruction", default="",
                        help=r"put behind every question, e.g. 'Put your final answer within \boxed{}.'")
    if train:
        parser.add_argument("--samples", type=whole(0), default=0,
                            help="examples to take, the first; 0 = all")
        parser.add_argument("--held", type=number, default=0.005,
                            help="share of the problems in val.npy, and again in test.npy")
        parser.add_argument("--seed", type=whole(0), default=1337, help="of the order of the examples")
        parser.add_argument("--workers", type=whole(0, 1024), default=0,
                            help="processes that encode; 0 = as many as there are cores")
        document_options(parser, length)
    else:
        explained = "tokens of a row: the question and the room for an answer"
        document_options(parser, length, pack=False, explained=explained)
    return parser


def source_files(source: list[Path] | None, repo: str, patterns: list[str]) -> list[Path]:
    """The files to read: those given, those of a folder (the named ones, or else all parquet, or else all
    JSON lines in it), or the hub's.

    Raises FileNotFoundError in one line."""
    if source is None:
        from huggingface_hub import snapshot_download

        from zoo.hub import one_line

        try:
            bars = download_bars()
            folder = snapshot_download(repo, repo_type="dataset", allow_patterns=patterns, tqdm_class=bars)
        except Exception as error:  # of the network, the hub, its client or the disk: many kinds
            reason = f"cannot get {repo} from the hub ({one_line(error)})"
            raise FileNotFoundError(f"{reason}: fetch it another way and pass --source") from None
        source = [Path(folder)]
    files = []
    for path in source:
        if path.is_dir():
            found = [file for pattern in patterns for file in sorted(path.glob(pattern))]
            found = found or sorted(path.glob("*.parquet"))
            found = found or sorted([*path.glob("*.jsonl"), *path.glob("*.json")])
            if not found:
                wanted = f"{' or '.join(patterns)}, and no other .parquet or .jsonl file"
                raise FileNotFoundError(f"{path} holds no {wanted}")
            files += found
        else:
            files.append(path)
    return files


def records(files: list[Path], columns: Columns, optional: tuple[str, ...] = (),
            done: int = 0) -> Iterator[tuple[str, dict]]:  # fmt: skip
    """(place, record) of every row but the first `done`: `place` for a message, `record` with our names of
    the columns; those in `optional` may be absent: None.

    Raises ValueError or OSError in one line."""
    sizes = [_parquet(file).metadata.num_rows if file.suffix == ".parquet" else None for file in files]
    with progress(None if None in sizes else sum(sizes), "prepare", "examples", initial=done) as bar:
        for file in files:
            read = functools.partial(_parquet_rows, columns) if file.suffix == ".parquet" else _json_rows
            for number, row, there in read(file, done):
                if done:
                    done -= 1
                    continue
                names = {name: next((s for s in columns[name] if s in there), None) for name in columns}
                missing = [name for name in columns if names[name] is None and name not in optional]
                if missing:
                    wanted, has = " or ".join(columns[missing[0]]), ", ".join(there) or "none"
                    raise ValueError(f"{file} has no column {wanted}; it has {has}")
                yield f"{file}, row {number:,}", {name: row.get(spelling) for name, spelling in names.items()}
                bar.update()


def _parquet(file: Path):
    """pyarrow's ParquetFile, opened."""
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise ValueError(f'{file}: parquet files need pyarrow: pip install -e ".[data]"') from None
    try:
        return parquet.ParquetFile(file, buffer_size=1 << 20)  # else a column of a row group is read at once
    except FileNotFoundError:
        raise
    except (ArrowException, OSError) as error:
        raise ValueError(f"{file} is damaged, or no parquet file: {str(error).splitlines()[0]}") from None


def _parquet_rows(columns: Columns, file: Path, done: int) -> Iterator[tuple[int, dict, list[str]]]:
    """(number, row, names of the columns in the file). Row groups within the first `done` are not read."""
    opened = _parquet(file)
    sizes = [opened.metadata.row_group(i).num_rows for i in range(opened.num_row_groups)]
    ends = [*itertools.accumulate(sizes)]
    skipped = sum(end <= done for end in ends)
    number, there = ends[skipped - 1] if skipped else 0, opened.schema_arrow.names
    yield from ((k, {}, there) for k in range(1, number + 1))
    if skipped == len(ends):
        return
    wanted = [name for name in there if any(name in spellings for spellings in columns.values())]
    groups = range(skipped, len(ends))
    batches = opened.iter_batches(batch_size=256, row_groups=groups, columns=wanted or None)
    while True:
        try:
            batch = next(batches, None)
        except (ValueError, OSError) as error:  # pyarrow's ArrowInvalid is a ValueError
            reason = str(error).splitlines()[0]
            raise ValueError(f"{file} is damaged after row {number:,}: {reason}") from None
        if batch is None:
            return
        for row in batch.to_pylist():
            number += 1
            yield number, row, there


def _json_rows(file: Path, done: int) -> Iterator[tuple[int, dict, list[str]]]:
    """As _parquet_rows(); the first `done` are not parsed."""
    with open(file, "rb") as lines:  # bytes: only \n ends a line, texts may hold U+2028
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            if done:
                done -= 1
                yield number, {}, []
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:  # not JSON, or not UTF-8
                reason = f"not JSON ({str(error)[:100]}); is the file truncated?"
                raise ValueError(f"{file}, line {number:,}: {reason}") from None
            if not isinstance(row, dict):
                raise ValueError(f"{file}, line {number:,}: expected JSON lines, with an object on each")
            yield number, row, list(row)


def texts(place: str, values: list) -> list[str]:
    """The values without those that are null, stripped. Raises ValueError if one is no text."""
    values = [value for value in values if value is not None]
    others = [value for value in values if not isinstance(value, str)]
    if others:
        raise ValueError(f"{place}: expected text, not {str(others[0])[:40]}")
    return [value.strip() for value in values]


def encoded(encoder: Encoder, instruction: str, held: float, pairs: list[Pair]) -> list[Encoded]:
    """What each pair becomes: the problem with the first of its answers that fits into a row."""
    found = []
    for problem, answers in pairs:
        answers = [answer for answer in answers if boxed(answer)]
        if not problem or not problem[0] or not answers:
            found.append(None)
            continue
        split, question = split_of(problem[0], held), with_instruction(problem[0], instruction)
        tried = (encoder.encode(question, answer) for answer in answers)
        ids, response = next(((i, r) for i, r in tried if encoder.fits(i)), (None, None))
        too_long = ids is None
        found.append((split, None, 0) if too_long else (split, np.array(ids), response.index(True)))
    return found


def write_training_set(args: argparse.Namespace, argv: list[str], name: str, repo: str, patterns: list[str],
                       pairs: Callable[[list[Path], int], Iterator[Pair]], licence: str) -> None:  # fmt: skip
    """Write (problem, its right answers) pairs, each with the first answer that fits into a row. Problems
    decide the split, --seed the order. pairs(files, done): those of all rows but the first `done`.

    Dropped and counted: too long ones, and those without a problem or a right answer that boxes its result:
    the test of every example. A preparation that was killed goes on: see data/store.py.
    """
    if not 0 < args.held < 0.5:
        raise ValueError("--held is a share of the problems, above 0 and below 0.5")
    encoder, files = Encoder(args), source_files(args.source, repo, patterns)
    decide = {k: str(v) for k, v in vars(args).items() if k not in ("out", "workers", "seed")}
    stamps = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    decide |= {"data": name, "tokens": encoder.tokenizer.fingerprint, "files": stamps}
    most, workers = args.samples or math.inf, args.workers or os.cpu_count() or 1
    work = functools.partial(encoded, encoder, args.instruction, args.held)
    with claimed(args.out), Store(args.out, decide, encoder.dtype) as store:
        rows = chunked(pairs(files, store.rows), CHUNK)
        with contextlib.closing(in_order(work, rows, workers)) as chunks:
            for chunk in chunks:
                store.add(chunk, most)
                if store.documents >= most:
                    break
        store.record()
        documents = Documents(encoder, args.out)
        with progress(store.documents, "shuffle", "examples") as bar:
            for split, ids, shown in store.shuffled(args.seed):
                documents.add(split, ids, [False] * shown + [True] * (len(ids) - shown))
                bar.update()
        facts = {"tokenizer_name": args.tokenizer, "seed": args.seed, "unusable": store.count["unusable"],
                 "dropped": {split: store.count[split] for split in SPLITS}}  # fmt: skip
        write_dataset(args.out, name, encoder.tokenizer, documents.splits(), mask_id=encoder.mask_id,
                      eos_id=encoder.end_id, argv=argv, facts=facts | documents.facts(),
                      source=source_name(args, repo),
                      licence="as its source" if args.source else licence)  # fmt: skip


def write_benchmark(args: argparse.Namespace, argv: list[str], name: str, repo: str, patterns: list[str],
                    licence: str) -> None:  # fmt: skip
    """Write problems with their final answers as a set of nothing but test examples: the question, and room
    with the answer in a box.

    No problem is dropped, or the benchmark were another one: raises ValueError with the length that would
    do."""
    encoder, longest = Encoder(args), 0
    documents = Documents(encoder, args.out)
    columns = {"problem": ("problem", "question"), "answer": ("answer", "expected_answer")}
    columns["solution"] = ("solution",)
    for place, record in records(source_files(args.source, repo, patterns), columns, ("answer", "solution")):
        answer = record["answer"] if isinstance(record["answer"], str | None) else str(record["answer"])
        known = [*texts(place, [answer]), *filter(None, map(boxed, texts(place, [record["solution"]])))]
        problem = texts(place, [record["problem"]])
        if not known or not problem:
            raise ValueError(f"{place}: no problem, or no answer to it")
        question = with_instruction(problem[0], args.instruction)
        ids, response = encoder.encode(question, rf"\boxed{{{known[0]}}}")
        longest = max(longest, len(ids))
        documents.add("test", ids, response)
    if documents.dropped["test"]:
        dropped = f"{documents.dropped['test']} problems do not fit into --length {encoder.length}"
        raise ValueError(f"{dropped}: the longest needs {longest}")
    licence = licence if args.source is None else "as its source"
    with claimed(args.out):
        write_dataset(args.out, name, encoder.tokenizer, documents.splits(), mask_id=encoder.mask_id,
                      eos_id=encoder.end_id, argv=argv, source=source_name(args, repo), licence=licence,
                      wanted=("test",), facts={"tokenizer_name": args.tokenizer, **documents.facts()})


def with_instruction(problem: str, instruction: str) -> str:
    return f"{problem}\n{instruction}" if instruction else problem


def source_name(args: argparse.Namespace, repo: str) -> str:
    return " ".join(map(str, args.source)) if args.source else f"https://huggingface.co/datasets/{repo}"
