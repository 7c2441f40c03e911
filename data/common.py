"""What the prepare.py files share: the command line, reading a source, drawing examples into disjoint splits, and writing without halves.

meta.json is removed before the first array is written and comes back last, so an interrupted preparation leaves nothing that loads."""
import argparse
import hashlib
import json
import shlex
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data import FORMAT, SPLITS, load
from zoo.files import write_atomic
from zoo.tokenizer import ORIGINALS, Tokenizer


def options(doc: str, file: str) -> argparse.ArgumentParser:
    """A parser whose --help teaches: the module's docstring, then every option with its default."""
    style = type("Help", (argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter), {})
    parser = argparse.ArgumentParser(description=doc, formatter_class=style, allow_abbrev=False)
    parser.add_argument("--out", type=Path, default=Path(file).resolve().parent, help="folder to write to (load() takes its path)")
    return parser


def sizes(parser: argparse.ArgumentParser, train: int, val: int = 1000, test: int = 1000) -> None:
    """Options of a generated data set."""
    for split, count in zip(SPLITS, (train, val, test)):
        parser.add_argument(f"--{split}", type=int, default=count, help=f"examples in {split}.npy")
    parser.add_argument("--seed", type=int, default=1337, help="same seed, same files")


def run(main: Callable[[list[str]], None]) -> None:
    """Entry point of a script: a user's mistake is one line on stderr and exit code 2."""
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as error:
        sys.exit(print(f"error: {error}", file=sys.stderr) or 2)
    except KeyboardInterrupt:
        sys.exit(print("interrupted: the data set is not prepared", file=sys.stderr) or 130)


def read_text(source: str, what: str) -> str:
    """The UTF-8 text of a file or an http(s) address, whole or not at all. Raises one-line ValueError or OSError."""
    raw = _download(source) if source.startswith(("http://", "https://")) else Path(source).read_bytes()
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{source}: byte {error.start:,} is not UTF-8; expected {what}") from error
    if not text.strip() or "\0" in text:
        raise ValueError(f"{source}: {'binary' if text.strip() else 'empty'}; expected {what}")
    if text.lstrip()[:9].lower().startswith(("<!doctype", "<html")):
        raise ValueError(f"{source}: line 1 is an HTML page, perhaps an error message; expected {what}")
    return text


def _download(url: str) -> bytes:
    raw = bytearray()
    try:
        with urllib.request.urlopen(url, timeout=30) as reply:
            size = int(reply.headers.get("Content-Length") or 0)
            with tqdm(total=size or None, unit="B", unit_scale=True, desc=url.rsplit("/", 1)[-1]) as bar:
                while chunk := reply.read(1 << 16):
                    raw += chunk
                    bar.update(len(chunk))
    except OSError as error:
        raise ValueError(f"cannot download {url} ({error}): fetch it another way and pass --source") from error
    if len(raw) < size:
        raise ValueError(f"the download of {url} broke off at {len(raw):,} of {size:,} bytes: try again")
    return bytes(raw)


def split_of(key: str) -> str:
    """"train" (90 %), "val" (5 %) or "test" (5 %), decided by the hash of what makes a problem the same problem. No seed enters, so the
    training set of one seed and the test set of another are disjoint too."""
    part = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=4).digest(), "big") / 2**32
    return "test" if part < 0.05 else "val" if part < 0.10 else "train"


Examples = tuple[np.ndarray, np.ndarray]  # tokens (N, L), response (N, L) bool


def collect(args: argparse.Namespace, draws: Callable[[np.random.Generator], Iterator[tuple[list[str], np.ndarray, np.ndarray]]]
            ) -> dict[str, Examples]:
    """Take batches (keys, tokens (n, L), response (n, L)) from `draws(rng)` until every split has its number of distinct examples.

    Examples with equal keys fall into the same split (`split_of`). Raises ValueError when the task has too few problems."""
    wanted = {split: getattr(args, split) for split in SPLITS}
    if min(wanted.values()) < 1:
        raise ValueError("--train, --val and --test must be at least 1")
    batches = draws(np.random.default_rng(args.seed))
    seen, rows, idle = set(), {split: [] for split in SPLITS}, 0
    with tqdm(total=sum(wanted.values()), desc="examples", unit="") as bar:
        while any(len(rows[split]) < wanted[split] for split in SPLITS):
            before = bar.n
            for key, tokens, response in zip(*next(batches)):
                split, example = split_of(key), tokens.tobytes() + response.tobytes()
                if len(rows[split]) < wanted[split] and example not in seen:
                    seen.add(example)
                    rows[split].append((tokens, response))
                    bar.update()
            idle = idle + 1 if bar.n == before else 0
            if idle == 20:
                short = next(split for split in SPLITS if len(rows[split]) < wanted[split])
                raise ValueError(f"found only {len(rows[short])} distinct examples for --{short}: ask for fewer, or for larger problems")
    return {split: (np.stack([t for t, _ in pairs]), np.stack([r for _, r in pairs])) for split, pairs in rows.items()}


def write_array(path: Path, array: np.ndarray) -> None:
    """`array` as path (.npy), whole or not at all."""
    def write(temporary: Path) -> None:
        with open(temporary, "wb") as file:  # np.save would append .npy to a temporary name
            np.save(file, array, allow_pickle=False)

    write_atomic(path, write)


def write_dataset(folder: Path, name: str, tokenizer: Tokenizer, splits: dict[str, np.ndarray | Examples], *,
                  mask_id: int, eos_id: int | None, source: str, licence: str, argv: list[str], facts: dict) -> None:
    """Write arrays, tokenizer and, last, meta.json; then print what was made. `facts` are further entries of meta.json."""
    examples = isinstance(splits["train"], tuple)
    counts = {split: len(splits[split][0] if examples else splits[split]) for split in SPLITS}
    if min(counts.values()) == 0:
        raise ValueError(f"nothing is left for {min(counts, key=counts.get)}: the source is too small, or too much was dropped")
    folder.mkdir(parents=True, exist_ok=True)
    for old in ("meta.json", *ORIGINALS):  # a tokenizer of an earlier preparation may consist of other files
        (folder / old).unlink(missing_ok=True)
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    for split in SPLITS:
        tokens, response = splits[split] if examples else (splits[split], None)
        write_array(folder / f"{split}.npy", tokens.astype(dtype))
        if examples:
            write_array(folder / f"{split}_response.npy", response.astype(bool))
    tokenizer.save(folder)
    meta = {"name": name, "kind": "examples" if examples else "stream", "length": tokens.shape[1] if examples else None,
            "vocab_size": tokenizer.vocab_size, "mask_id": mask_id, "eos_id": eos_id, "tokenizer": tokenizer.fingerprint, "splits": counts,
            "source": source, "licence": licence, "command": shlex.join(["python", f"data/{name}/prepare.py", *argv]), **facts,
            "format": FORMAT}
    write_atomic(folder / "meta.json", lambda path: path.write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8"))
    summary(folder)


def summary(folder: Path) -> None:
    """Five facts about the data set as it now lies on the disk, the last one an example."""
    data = load(folder)
    meta, counts = data.meta, ", ".join(f"{split} {count:,}" for split, count in data.meta["splits"].items())
    print(f"{data.name}: {meta['kind']} in {folder}")
    print(f"  {counts} {'tokens' if meta['kind'] == 'stream' else 'examples of ' + str(meta['length']) + ' tokens'}")
    print(f"  vocabulary {meta['vocab_size']:,}, <mask> = {data.mask_id}, <eos> = {data.eos_id}")
    print(f"  source: {meta['source']}; licence: {meta['licence']}")
    if meta["kind"] == "stream":
        shown = data.show(data.tokens("val")[:80])
    else:
        shown = data.show(data.tokens("test")[0])
        if data.layout is not str:  # a grid does not show by itself what was given
            shown = data.show(np.where(data.response("test")[0], data.mask_id, data.tokens("test")[0])) + "\nsolved:\n" + shown
    print("  for example:\n" + "\n".join("    " + line for line in shown.splitlines()))
