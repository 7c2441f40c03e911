"""What the prepare.py files share: the command line, reading a source, drawing examples into disjoint
splits, questions and answers as documents (chat formatting, packing), and writing without halves.

meta.json is removed before the first array is written and comes back last, so an interrupted preparation
leaves nothing that loads.

A document is a question, shown, and its answer with the end token, to be filled in. Unpacked, it has a row
of its own, and the end token fills the row: it belongs to the response, so a model learns where to stop, as
LLaDA does. Packed, documents that fit share a row, none is split; <split>_segments.npy (N, L) numbers them
from 1, and the rest of a row is padding, number 0, that nobody learns. A block-causal model fills whole
blocks: --block=b pads every document with the end token, as response, to a multiple of b, so each starts on
a block's boundary.
"""
import argparse
import contextlib
import hashlib
import json
import re
import shlex
import sys
import tempfile
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from tiktoken_ext import openai_public

from data import FORMAT, SPLITS, load
from zoo import read_json
from zoo import tokenizer as tokenizers
from zoo.files import locked, write_atomic
from zoo.progress import progress
from zoo.templates import TEMPLATES, encode_answers
from zoo.tokenizer import ORIGINALS, Tokenizer
from zoo.tools import command

SPECIALS = ["<eos>", "<mask>"]  # of the tokenizers that have none of their own
OPEN_ROWS = 64  # rows that wait for a document that fits


def options(doc: str, file: str) -> command.Parser:
    """A parser whose --help teaches: the module's docstring, then every option with its default."""
    style = type("Help", (argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter), {})
    parser = command.Parser(doc, style)
    folder = Path(file).resolve().parent
    parser.add_argument("--out", type=Path, default=folder, help="folder to write to (load() takes its path)")
    return parser


def sizes(parser: argparse.ArgumentParser, train: int, val: int = 1000, test: int = 1000) -> None:
    """Options of a generated data set. Its examples are drawn in memory: ten millions are several GiB."""
    for split, count in zip(SPLITS, (train, val, test)):
        kind = command.whole(1, 10_000_000)
        parser.add_argument(f"--{split}", type=kind, default=count, help=f"examples in {split}.npy")
    parser.add_argument("--seed", type=command.whole(0), default=1337, help="same seed, same files")


def run(main: Callable[[list[str]], None], interrupted: str = "the data set is not prepared") -> None:
    """Entry point of a prepare.py: main(the command line), and a user's mistake is one line on stderr."""
    command.run(lambda: main(sys.argv[1:]), interrupted=f"interrupted: {interrupted}")


@contextlib.contextmanager
def claimed(folder: Path):
    """The folder of --out, for this preparation alone. Raises ValueError if another one writes there.

    No trace is left of it, nor of a new folder if nothing came to be in it."""
    new = not folder.exists()
    with locked(folder, shlex.join(["python", *sys.argv]), "choose another --out"):
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # not empty
                (folder / ".lock").unlink()
                if new:
                    folder.rmdir()


def read_text(source: str, what: str) -> str:
    """The UTF-8 text of a file or an http(s) address. Raises ValueError or OSError in one line."""
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
            with progress(size or None, url.rsplit("/", 1)[-1], "B") as bar:
                while chunk := reply.read(1 << 16):
                    raw += chunk
                    bar.update(len(chunk))
    except OSError as error:
        instead = "fetch it another way and pass --source"
        raise ValueError(f"cannot download {url} ({error}): {instead}") from error
    if len(raw) < size:
        raise ValueError(f"the download of {url} broke off at {len(raw):,} of {size:,} bytes: try again")
    return bytes(raw)


def split_of(key: str, share: float = 0.05) -> str:
    """"val" or "test" (a `share` each) or "train", decided by the hash of what makes a problem the same
    problem. No seed enters, so the training set of one seed and the test set of another are disjoint
    too."""
    part = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=4).digest(), "big") / 2**32
    return "test" if part < share else "val" if part < 2 * share else "train"


Examples = tuple[np.ndarray, ...]  # tokens (N, L), response (N, L) bool and, if packed, segments (N, L)
Drawn = Iterator[tuple[list[str], np.ndarray, np.ndarray]]  # keys (n), tokens (n, L), response (n, L)


def collect(args: argparse.Namespace, draws: Callable[[np.random.Generator], Drawn]) -> dict[str, Examples]:
    """Take batches (keys, tokens (n, L), response (n, L)) from `draws(rng)` until every split has its
    number of distinct examples.

    Examples with equal keys fall into the same split (`split_of`). Raises ValueError when the task has too
    few problems."""
    wanted = {split: getattr(args, split) for split in SPLITS}
    batches = draws(np.random.default_rng(args.seed))
    seen, rows, idle = set(), {split: [] for split in SPLITS}, 0
    with progress(sum(wanted.values()), "prepare", "examples") as bar:
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
                found = f"found only {len(rows[short])} distinct examples for --{short}"
                raise ValueError(f"{found}: ask for fewer, or for larger problems")
    return {split: tuple(np.stack(arrays) for arrays in zip(*pairs)) for split, pairs in rows.items()}


# ---- documents: questions and answers in tokens, one per row or packed

def document_options(parser: argparse.ArgumentParser, length: int, *, pack: bool = True,
                     explained: str = "tokens of a row; longer examples are dropped") -> None:  # fmt: skip
    """What `Documents` reads. pack=False: of a set that is for evaluation only."""
    parser.add_argument("--tokenizer", default="gpt2", help="gpt2, bytes, or a folder with a hub tokenizer")
    parser.add_argument("--vocab_size", type=command.whole(0), default=0,
                        help="keep this many tokens of a BPE, in merge order; 0 = all")
    parser.add_argument("--length", type=command.whole(0, 1 << 20), default=length, help=explained)
    templates = f"{', '.join(TEMPLATES)}, or auto = that of the folder's model"
    parser.add_argument("--chat", default="", help=f"chat template: {templates}")
    if pack:
        parser.add_argument("--pack", action="store_true",
                            help="several whole documents in a row of train.npy and val.npy")
        parser.add_argument("--block", type=command.whole(1), default=1,
                            help="with --pack: documents start at multiples of it, a model's block_size")


def tokenizer_of(name: str, size: int) -> tuple[Tokenizer, int, int]:
    """The tokenizer, its mask id and its eos id. `size` > 0 keeps that many tokens in merge order."""
    if Path(name).is_dir():
        tokenizer = tokenizers.load(name)
        if not size:  # the folder's own ids, for a model that has them
            config = Path(name, "tokenizer_config.json")
            eos = "<eos>"
            if config.is_file():
                eos = json.loads(config.read_text(encoding="utf-8")).get("eos_token")
            eos = eos["content"] if isinstance(eos, dict) else eos
            masks = [i for s, i in tokenizer.specials.items() if re.search("(?<!g)mask", s.lower())]
            if not masks and Path(name, "config.json").is_file():  # a plain model: a row that no token uses
                from zoo.checkpoint import plan_for  # imports torch

                masks = [plan_for(Path(name), tokenizer).config.mask_id]
            if not masks or eos not in tokenizer.specials:
                lacks = "has no mask or no end token of its own: pass --vocab_size to add them"
                raise ValueError(f"the tokenizer in {name} {lacks}")
            return tokenizer, masks[0], tokenizer.specials[eos]
        if not isinstance(tokenizer, tokenizers.BPETokenizer):
            raise ValueError(f"the tokenizer in {name} is not a BPE: leave --vocab_size away")
    elif name == "bytes":
        tokenizer, size = tokenizers.bytes_tokenizer(SPECIALS), size or 256
    elif name == "gpt2":
        try:
            ranks = openai_public.gpt2()["mergeable_ranks"]
        except (OSError, ValueError) as error:
            reason = type(error).__name__
            print(f"tiktoken cannot fetch its gpt2 files ({reason}): using bytes instead", file=sys.stderr)
            return tokenizer_of("bytes", 0)
        merged = dict(sorted(ranks.items(), key=lambda item: item[1]))
        tokenizer, size = tokenizers.BPETokenizer(merged, [tokenizers.GPT2], {}), size or len(merged)
    else:
        raise ValueError(f"--tokenizer {name}: expected gpt2, bytes, or a folder with a hub tokenizer")
    tokenizer = tokenizers.truncated(tokenizer, size, SPECIALS)
    return tokenizer, tokenizer.specials["<mask>"], tokenizer.specials["<eos>"]


def template_of(folder: str, tokenizer: Tokenizer) -> str:
    """The chat template of the model in a folder: its family's, or that of the model it was trained from."""
    if not Path(folder).is_dir():
        asked = f"--chat auto asks the model in the folder --tokenizer, {folder} is none"
        raise ValueError(f"{asked}: choose one of {', '.join(TEMPLATES)}")
    if read_json(Path(folder, "config.json")).get("model_type") == "rcd":
        template = read_json(Path(folder, "train.json")).get("template")
    else:
        from zoo.checkpoint import plan_for  # imports torch

        template = plan_for(Path(folder), tokenizer).template
    if template is None:
        raise ValueError(f"the model in {folder} has no chat template: choose one of {', '.join(TEMPLATES)}")
    return template


class Encoder:
    """Questions and answers in tokens, as the options of document_options() ask for."""

    def __init__(self, args: argparse.Namespace):
        self.tokenizer, self.mask_id, self.end_id = tokenizer_of(args.tokenizer, args.vocab_size)
        self.chat, self.block = args.chat, getattr(args, "block", 1)
        self.packed = ("train", "val") if getattr(args, "pack", False) else ()  # test: one canvas for each
        self.length = args.length or (256 if self.tokenizer.vocab_size > 1000 else 640)
        if self.block > 1 and not self.packed:
            why = "the end token fills an unpacked row anyway"
            raise ValueError(f"--block, a number of tokens, goes with --pack: {why}")
        if self.packed and (self.length % self.block or self.length >= 1 << 16):
            must = f"must be a multiple of --block {self.block}, and below 65,536"
            raise ValueError(f"--length {self.length} with --pack {must}")
        if self.chat == "auto":
            self.chat = template_of(args.tokenizer, self.tokenizer)
        if self.chat:  # the token that ends a turn; a template without one (plain) takes the tokenizer's
            last = self._talk("1", "1")[0][-1]
            self.end_id = last if last in self.tokenizer.specials.values() else self.end_id

    def _talk(self, question: str, answer: str) -> tuple[list[int], list[bool]]:
        """The conversation in tokens up to the end of its answer, without a line break of the template."""
        talk = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        ids, answers = encode_answers(self.tokenizer, self.chat, talk)
        stop = len(ids) - answers[::-1].index(True)
        return ids[:stop], answers[:stop]

    def encode(self, question: str, answer: str) -> tuple[list[int], list[bool]]:
        """(ids, response) of a document with its end token. No template: question, line break, answer."""
        if self.chat:
            ids, response = self._talk(question, answer)
            ended = ids[-1] == self.end_id
        else:
            prompt, written = self.tokenizer.encode(question + "\n"), self.tokenizer.encode(answer)
            ids, response, ended = prompt + written, [False] * len(prompt) + [True] * len(written), False
        return (ids, response) if ended else ([*ids, self.end_id], [*response, True])

    def fits(self, ids: list[int]) -> bool:
        return len(ids) <= self.length

    @property
    def dtype(self) -> type:
        """Of an array of ids."""
        return np.uint16 if self.tokenizer.vocab_size <= 1 << 16 else np.uint32


class Documents:
    """Encoded documents on their way into rows, split by split, packed if asked.

    What is done lies in files without a name in `folder`, or in the nearest one above it that is there, so
    memory does not grow with the data set."""

    def __init__(self, encoder: Encoder, folder: Path):
        self.encoder, self._rows, self._packers = encoder, {}, {}
        self.folder = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.is_dir())
        self.dropped, self.written = dict.fromkeys(SPLITS, 0), dict.fromkeys(SPLITS, 0)

    def add(self, split: str, ids: list[int], response: list[bool]) -> None:
        """One document for a split; a longer one than a row is counted in `dropped`."""
        e = self.encoder
        if not e.fits(ids):
            self.dropped[split] += 1
            return
        if split not in self._rows:
            dtypes = (e.dtype, bool, *[np.uint16] * (split in e.packed))
            self._rows[split] = Rows(self.folder, e.length, dtypes)
            if split in e.packed:
                self._packers[split] = Packer(e.length, e.block, e.end_id, self._rows[split].write)
        self.written[split] += 1
        if split in self._packers:
            self._packers[split].add(ids, response)
        else:
            rest = e.length - len(ids)
            self._rows[split].write(ids + [e.end_id] * rest, response + [True] * rest)

    def splits(self) -> dict[str, Examples]:
        """The finished arrays, on the disk, of the splits that got a document."""
        for packer in self._packers.values():
            packer.close()
        return {split: self._rows[split].arrays() for split in SPLITS if split in self._rows}

    def facts(self) -> dict:
        """What meta.json tells about how the rows were made."""
        e = self.encoder
        facts = {"template": e.chat or None, "packed": list(e.packed), "block": e.block}
        return facts | {"documents": self.written} if e.chat or e.packed else {}


class Packer:
    """First fit in order: a document goes to the first open row that has room. At most OPEN_ROWS are open,
    then the fullest is written."""

    def __init__(self, length: int, block: int, end_id: int, write: Callable[..., None]):
        self.length, self.block, self.end_id, self.write = length, block, end_id, write
        self.open: list[tuple[list[int], list[bool], list[int]]] = []  # tokens, response, segments of a row

    def add(self, ids: list[int], response: list[bool]) -> None:
        rest = -len(ids) % self.block
        ids, response = ids + [self.end_id] * rest, response + [True] * rest
        row = next((row for row in self.open if len(row[0]) + len(ids) <= self.length), None)
        if row is None:
            if len(self.open) == OPEN_ROWS:
                self._finish(max(range(OPEN_ROWS), key=lambda k: len(self.open[k][0])))
            row = ([], [], [])
            self.open.append(row)
        number = row[2][-1] + 1 if row[2] else 1
        for part, more in zip(row, (ids, response, [number] * len(ids))):
            part.extend(more)
        if len(row[0]) == self.length:
            self._finish(next(k for k, other in enumerate(self.open) if other is row))

    def close(self) -> None:
        while self.open:
            self._finish(0)

    def _finish(self, at: int) -> None:
        tokens, response, segments = self.open.pop(at)
        rest = self.length - len(tokens)
        self.write(tokens + [self.end_id] * rest, response + [False] * rest, segments + [0] * rest)


class Rows:
    """Rows of one split, each a list for every array, in files without a name: they vanish by themselves."""

    def __init__(self, folder: Path, length: int, dtypes: tuple[type, ...]):
        self.length, self.dtypes, self.count = length, dtypes, 0
        self.files = [tempfile.TemporaryFile(dir=folder) for _ in dtypes]

    def write(self, *columns: list) -> None:
        for file, column, dtype in zip(self.files, columns, self.dtypes):
            file.write(np.array(column, dtype).tobytes())
        self.count += 1

    def arrays(self) -> Examples:
        for file in self.files:
            file.flush()
        shape = (self.count, self.length)
        return tuple(np.memmap(file, dtype, "r", shape=shape) for file, dtype in zip(self.files, self.dtypes))


# ---- writing

def write_array(path: Path, array: np.ndarray) -> None:
    """`array` as path (.npy), whole or not at all."""
    def write(temporary: Path) -> None:
        with open(temporary, "wb") as file:  # np.save would append .npy to a temporary name
            np.save(file, array, allow_pickle=False)

    write_atomic(path, write)


def write_dataset(folder: Path, name: str, tokenizer: Tokenizer, splits: dict[str, np.ndarray | Examples], *,
                  mask_id: int, eos_id: int | None, source: str, licence: str, argv: list[str], facts: dict,
                  wanted: tuple[str, ...] = SPLITS) -> None:  # fmt: skip
    """Write arrays, tokenizer and, last, meta.json; then print what was made. `facts` are further entries
    of meta.json, `wanted` the splits that there must be: a set for evaluation has only "test"."""
    examples = isinstance(next(iter(splits.values()), ()), tuple)
    counts = dict.fromkeys(wanted, 0)
    for split in counts.keys() & splits.keys():
        counts[split] = len(splits[split][0] if examples else splits[split])
    if min(counts.values()) == 0:
        empty = min(counts, key=counts.get)
        raise ValueError(f"nothing is left for {empty}: the source is too small, or too much was dropped")
    folder.mkdir(parents=True, exist_ok=True)
    for old in ("meta.json", *ORIGINALS):  # a tokenizer of an earlier preparation may consist of other files
        (folder / old).unlink(missing_ok=True)
    arrays = [f"{split}{part}.npy" for split in SPLITS for part in ("", "_response", "_segments")]
    killed = (*folder.glob("*.npy.*"), *folder.glob("*.json.*"))  # what write_atomic could not take away
    for old in (*arrays, *killed):
        (folder / old).unlink(missing_ok=True)
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    for split in wanted:
        tokens, *others = splits[split] if examples else (splits[split],)
        write_array(folder / f"{split}.npy", tokens.astype(dtype, copy=False))
        for part, array, kind in zip(("response", "segments"), others, (bool, np.uint16)):
            write_array(folder / f"{split}_{part}.npy", array.astype(kind, copy=False))
    tokenizer.save(folder)
    meta = {
        "name": name, "kind": "examples" if examples else "stream",
        "length": tokens.shape[1] if examples else None, "vocab_size": max(tokenizer.vocab_size, mask_id + 1),
        "mask_id": mask_id, "eos_id": eos_id, "tokenizer": tokenizer.fingerprint, "splits": counts,
        "source": source, "licence": licence,
        "command": shlex.join(["python", f"data/{name}/prepare.py", *argv]), **facts, "format": FORMAT,
    }  # fmt: skip
    text = json.dumps(meta, indent=2) + "\n"
    write_atomic(folder / "meta.json", lambda path: path.write_text(text, encoding="utf-8"))
    summary(folder)


def summary(folder: Path) -> None:
    """Five facts about the data set as it now lies on the disk, the last one an example."""
    data = load(folder)
    meta, counts = data.meta, ", ".join(f"{split} {count:,}" for split, count in data.meta["splits"].items())
    print(f"{data.name}: {meta['kind']} in {folder}")
    rows = "rows" if meta.get("packed") else "examples"
    unit = "tokens" if meta["kind"] == "stream" else f"{rows} of {meta['length']} tokens"
    print(f"  {counts} {unit}")
    print(f"  vocabulary {meta['vocab_size']:,}, <mask> = {data.mask_id}, <eos> = {data.eos_id}")
    print(f"  source: {meta['source']}; licence: {meta['licence']}")
    if meta["kind"] == "stream":
        shown = data.show(data.tokens("val")[:80])
    else:
        shown = data.show(data.tokens("test")[0])
        if data.layout is not str:  # a grid does not show by itself what was given
            puzzle = np.where(data.response("test")[0], data.mask_id, data.tokens("test")[0])
            shown = data.show(puzzle) + "\nsolved:\n" + shown
    print("  for example:\n" + "\n".join("    " + line for line in shown.splitlines()))
