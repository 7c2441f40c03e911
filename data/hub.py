"""Questions and answers from parquet files or JSON lines, as the hub keeps them: read row by row, written
as a data set to train on or to evaluate with.

Nothing is held in memory but one row group, and the rows that are being packed. Columns are taken by name,
in any of the spellings in use.
"""
import argparse
import itertools
import json
from collections.abc import Iterator
from pathlib import Path

from data.answers import boxed
from data.common import Documents, document_options, options, split_of, write_dataset
from zoo.progress import download_bars, progress
from zoo.tools.command import number, whole

Columns = dict[str, tuple[str, ...]]  # our name of a column -> its spellings


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


def records(files: list[Path], columns: Columns,
            optional: tuple[str, ...] = ()) -> Iterator[tuple[str, dict]]:  # fmt: skip
    """(place, record) of every row: `place` for a message, `record` with our names of the columns; those in
    `optional` may be absent: None.

    Raises ValueError or OSError in one line."""
    sizes = [_parquet(file).metadata.num_rows if file.suffix == ".parquet" else None for file in files]
    with progress(None if None in sizes else sum(sizes), "prepare", "examples") as bar:
        for file in files:
            rows = _parquet_rows(file, columns) if file.suffix == ".parquet" else _json_rows(file)
            for number, row, there in rows:
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
        return parquet.ParquetFile(file)
    except FileNotFoundError:
        raise
    except (ArrowException, OSError) as error:
        raise ValueError(f"{file} is damaged, or no parquet file: {str(error).splitlines()[0]}") from None


def _parquet_rows(file: Path, columns: Columns) -> Iterator[tuple[int, dict, list[str]]]:
    """(number, row, names of the columns in the file)."""
    opened, number = _parquet(file), 0
    there = opened.schema_arrow.names
    wanted = [name for name in there if any(name in spellings for spellings in columns.values())]
    batches = opened.iter_batches(batch_size=256, columns=wanted or None)
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


def _json_rows(file: Path) -> Iterator[tuple[int, dict, list[str]]]:
    with open(file, "rb") as lines:  # bytes: only \n ends a line, texts may hold U+2028
        for number, line in enumerate(lines, 1):
            if not line.strip():
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


def write_training_set(args: argparse.Namespace, argv: list[str], name: str, *, source: str, licence: str,
                       pairs: Iterator[tuple[list[str], list[str]]]) -> None:  # fmt: skip
    """Write (problem, its right answers) pairs, each with the first answer that fits into a row. Problems
    decide the split.

    Dropped and counted: too long ones, and those without a problem or a right answer that boxes its result:
    the test of every example."""
    if not 0 < args.held < 0.5:
        raise ValueError("--held is a share of the problems, above 0 and below 0.5")
    documents, unusable = Documents(args), 0
    for problem, answers in pairs:
        answers = [answer for answer in answers if boxed(answer)]
        if not problem or not problem[0] or not answers:
            unusable += 1
            continue
        tried = (documents.encode(_question(problem[0], args), answer) for answer in answers)
        first = next(tried)
        fitting = (document for document in itertools.chain([first], tried) if documents.fits(document[0]))
        documents.add(split_of(problem[0], args.held), *next(fitting, first))
        if sum(documents.written.values()) == args.samples:
            break
    facts = {"tokenizer_name": args.tokenizer, "dropped": documents.dropped, "unusable": unusable}
    write_dataset(args.out, name, documents.tokenizer, documents.splits(), mask_id=documents.mask_id,
                  eos_id=documents.end_id, argv=argv, facts=facts | documents.facts(), source=source,
                  licence=licence)  # fmt: skip


def write_benchmark(args: argparse.Namespace, argv: list[str], name: str, repo: str, patterns: list[str],
                    licence: str) -> None:  # fmt: skip
    """Write problems with their final answers as a set of nothing but test examples: the question, and room
    with the answer in a box.

    No problem is dropped, or the benchmark were another one: raises ValueError with the length that would
    do."""
    documents, longest = Documents(args), 0
    columns = {"problem": ("problem", "question"), "answer": ("answer", "expected_answer")}
    columns["solution"] = ("solution",)
    for place, record in records(source_files(args.source, repo, patterns), columns, ("answer", "solution")):
        answer = record["answer"] if isinstance(record["answer"], str | None) else str(record["answer"])
        known = [*texts(place, [answer]), *filter(None, map(boxed, texts(place, [record["solution"]])))]
        problem = texts(place, [record["problem"]])
        if not known or not problem:
            raise ValueError(f"{place}: no problem, or no answer to it")
        ids, response = documents.encode(_question(problem[0], args), rf"\boxed{{{known[0]}}}")
        longest = max(longest, len(ids))
        documents.add("test", ids, response)
    if documents.dropped["test"]:
        dropped = f"{documents.dropped['test']} problems do not fit into --length {documents.length}"
        raise ValueError(f"{dropped}: the longest needs {longest}")
    licence = licence if args.source is None else "as its source"
    write_dataset(args.out, name, documents.tokenizer, documents.splits(), mask_id=documents.mask_id,
                  eos_id=documents.end_id, argv=argv, source=source_name(args, repo), licence=licence,
                  wanted=("test",), facts={"tokenizer_name": args.tokenizer, **documents.facts()})


def _question(problem: str, args: argparse.Namespace) -> str:
    return f"{problem}\n{args.instruction}" if args.instruction else problem


def source_name(args: argparse.Namespace, repo: str) -> str:
    return " ".join(map(str, args.source)) if args.source else f"https://huggingface.co/datasets/{repo}"
