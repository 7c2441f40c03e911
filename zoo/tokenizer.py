"""Tokenizers: characters, bytes, and byte-level BPE read from the files of a hub folder.

Byte-level BPE (Sennrich et al. 2016, on bytes as in GPT-2) has three steps. The text is normalised (NFC, if
the original does so). The original's regular expressions split it into pieces. Inside each piece, the
adjacent pair that comes first in the merge list is replaced, leftmost first, until no listed pair is left.
tiktoken does the splitting and merging, so everything read from a file is brought into tiktoken's form first.

tiktoken merges by the rank of the merged BYTES. The original merges by the rank of the PAIR. So the ranks are
derived, not copied:
    R = {t : the original algorithm, run on the bytes of t only, ends in the one token t}
    rank(t) = rank of the last merge of that run, for t in R
With these ranks the two agree on every piece, for any merge list: one token may have many pairs, pairs may be
out of order, tokens may be unreachable. Proof:
    1. Locality. While no merge has crossed the ends of a span, the merges inside it are those of a run on
       that span only: if the best pair of the whole piece lies inside the span, it is the best pair of the
       span.
    2. Let tokens c, d be adjacent and t = c + d. By 1 the run on t passes through [c, d]. If t is in R, the
       one step left is the merge (c, d), so this pair is listed with rank(t). If t is not in R, (c, d) is not
       listed. So at every step both algorithms have the same candidates with the same ranks. tiktoken takes a
       short cut for a whole piece that is a token. Such a token is in R, so both give it.
Ids need not follow the ranks and may have holes: a table maps ranks to ids. A token outside R can only be
decoded. There is one exception: with `ignore_merges` the original looks up whole pieces before it merges.
Then a token outside R gets a rank behind all merges. If its run ends in three tokens or more, only the
look-up can find it. If its run ends in two, a merge would find it as well, and the file is refused.

Special and other added tokens (`<|im_end|>`, `<think>`) come out of text only if `allow_special` asks for
them. The `tokenizers` library always takes them: `allow_special=True` does the same.
NFC is Python's. `tokenizers` uses Unicode 9 there and can order a run of combining marks differently if one
of them is younger (98 marks in Python 3.11). Where several patterns split the text, all but the last run in
Python's `re`, with its Unicode tables.
"""

import base64
import functools
import hashlib
import itertools
import json
import math
import re
import unicodedata
from collections.abc import Collection, Iterable
from pathlib import Path

import numpy as np
import tiktoken

from zoo.files import write_atomic

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# tokenizer_class in tokenizer_config.json -> (patterns, NFC). vocab.json and merges.txt do not hold these.
CLASSES = {
    "GPT2Tokenizer": ([GPT2], False),
    "Qwen2Tokenizer": ([QWEN], True),
    "DreamTokenizer": ([QWEN], True),
}
ORIGINALS = (
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)
# \s in the files' patterns. Python's \s has four control characters more.
WHITE = "\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
LONGEST = 400_000  # from about 998,000 white-space characters in a row tiktoken's matcher overflows its stack
# What a plain byte-level BPE has in the "model" entry of tokenizer.json. null means the same.
PLAIN_MODEL = {
    "type": "BPE",
    "dropout": None,
    "byte_fallback": False,
    "continuing_subword_prefix": "",
    "end_of_word_suffix": "",
}

# GPT-2 style files spell each byte as a printable character: itself, or the next free one from U+0100 on.
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
OTHERS = sorted({*range(256)} - {*PRINTABLE})
SYMBOL = {b: chr(b) for b in PRINTABLE} | {b: chr(256 + k) for k, b in enumerate(OTHERS)}
BYTE = {c: b for b, c in SYMBOL.items()}


class Tokenizer:
    """The base of both kinds. A subclass sets `tokens` and `specials`, has `_encode` and `description`."""

    tokens: dict[int, bytes]  # id -> bytes, special tokens included
    specials: dict[str, int]  # name -> id
    originals: tuple[Path, ...] = ()  # the hub's files this was read from; `save` copies them

    def encode(self, text: str, allow_special: bool | Collection[str] = False) -> list[int]:
        """The ids of `text`. Special names in it are ordinary text by default.

        allow_special: True makes all of them special tokens, a collection of names only those.
        Raises ValueError for a lone surrogate, an unknown special name, and a character that a character
        tokenizer does not have.
        """
        lone = re.search("[\ud800-\udfff]", text)
        if lone:
            where = f"U+{ord(lone[0]):04X} at position {lone.start()}"
            raise ValueError(f"the text has a lone surrogate {where}: it is not valid Unicode")
        names = {*self.specials} if allow_special is True else {*(allow_special or ())}
        if not names:
            return self._encode(text)
        if not self.specials.keys() >= names:
            raise ValueError(f"this tokenizer has no special token {min(names - self.specials.keys())!r}")
        ids, pieces = [], any_of(frozenset(names)).split(text)  # text, special, text, special, ..., text
        for k, piece in enumerate(pieces):
            ids += [self.specials[piece]] if k % 2 else self._encode(piece)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`: special tokens as their names, bytes that are not UTF-8 as U+FFFD.

        Raises ValueError for an unknown id.
        """
        try:
            return b"".join([self.tokens[i] for i in np.asarray(ids).tolist()]).decode("utf-8", "replace")
        except KeyError as error:
            largest = self.vocab_size - 1
            raise ValueError(f"id {error} is not in the vocabulary (the largest is {largest})") from None

    @functools.cached_property
    def vocab_size(self) -> int:
        """The largest id + 1; ids below it may be unused."""
        return max(self.tokens) + 1

    @functools.cached_property
    def fingerprint(self) -> str:
        """Short hash of `description`, so of all that fixes text <-> ids. The source files do not matter."""
        return hashlib.sha256(json.dumps(self.description(), sort_keys=True).encode()).hexdigest()[:16]

    def save(self, folder: str | Path) -> None:
        """Copy the hub's files byte for byte, or write our own tokenizer.json. No file is half-written."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        files = {path.name: path.read_bytes() for path in self.originals}
        files = files or {"tokenizer.json": json.dumps(self.description()).encode()}
        for name, data in files.items():
            write_atomic(folder / name, lambda path, data=data: path.write_bytes(data))
        if "tokenizer.json" not in files:
            (folder / "tokenizer.json").unlink(missing_ok=True)  # `load` would read another tokenizer's first


class CharTokenizer(Tokenizer):
    """One id per character: `chars` in the given order, then `specials`."""

    def __init__(self, chars: str | list[str], specials: list[str]):
        self.chars = list(chars)
        self.specials = _numbered(specials, len(self.chars))
        names = [*self.chars, *specials]
        if any(len(c) != 1 for c in self.chars) or len({*names}) < len(names):
            raise ValueError(
                "a character vocabulary needs single characters and special names that are all different"
            )
        self.ids = {c: i for i, c in enumerate(self.chars)}
        self.tokens = {i: t.encode() for i, t in enumerate(names)}

    def _encode(self, text: str) -> list[int]:
        try:
            return [self.ids[c] for c in text]
        except KeyError as error:
            c = error.args[0]
            vocabulary = f"the vocabulary of {len(self.chars)} characters"
            raise ValueError(f"character {c!r} (U+{ord(c):04X}) is not in {vocabulary}") from None

    def description(self) -> dict:
        """The contents of our own tokenizer.json."""
        return {"kind": "char", "chars": self.chars, "specials": list(self.specials)}


class BPETokenizer(Tokenizer):
    """Byte-level BPE on tiktoken.

    merged: token bytes -> id in MERGE ORDER (the position is tiktoken's rank), with all 256 single bytes.
    patterns: regular expressions that split the text, one after the other. What lies between the matches is a
        piece too.
    specials: name -> id.
    nfc: whether the text is normalised to NFC first.
    decoded: id -> bytes of the tokens that no text gives.
    originals: the files that `save` copies.
    Raises ValueError for a vocabulary or a last pattern that tiktoken cannot reproduce.
    """

    def __init__(
        self,
        merged: dict[bytes, int],
        patterns: list[str],
        specials: dict[str, int],
        nfc: bool = False,
        decoded: dict[int, bytes] | None = None,
        originals: Collection[Path] = (),
    ):
        missing = [b for b in range(256) if bytes([b]) not in merged]
        if missing:
            lacks = f"no token for {len(missing)} of the 256 bytes, such as 0x{missing[0]:02X}"
            raise ValueError(f"not a byte-level BPE: it has {lacks}")
        spelled = [name for name in specials if name.encode() in merged]
        if spelled:
            what = f"the special token {spelled[0]!r} is an ordinary token as well"
            raise ValueError(f"{what}: text could not be kept apart from it")
        self.merged, self.patterns, self.specials, self.nfc = merged, patterns, specials, nfc
        self.decoded, self.originals = decoded or {}, tuple(originals)
        named = {i: name.encode() for name, i in specials.items()}
        self.tokens = {i: t for t, i in merged.items()} | self.decoded | named
        total = len(merged) + len(self.decoded) + len(specials)
        if len(self.tokens) < total or min(self.tokens) < 0 or "" in specials:
            raise ValueError(
                "two tokens of the vocabulary have the same id, or one has a negative id or an empty name"
            )
        ids = np.array(list(merged.values()))
        self.ids = None if (ids == np.arange(len(ids))).all() else ids  # rank -> id; None: they are equal
        self.splits = [_python_regex(p) for p in patterns[:-1]]
        last = patterns[-1]
        _check_last(last)
        self.encoding = tiktoken.Encoding(
            "bpe",
            pat_str=f"{last}|(?:(?!{last})(?s:.))+",  # tiktoken would drop what `last` does not match
            special_tokens={},
            mergeable_ranks={t: rank for rank, t in enumerate(merged)},
        )

    def _encode(self, text: str) -> list[int]:
        pieces = [unicodedata.normalize("NFC", text) if self.nfc else text]
        for split in self.splits:
            pieces = [piece for longer in pieces for piece in split.split(longer)]
        if any(text[k : k + LONGEST].isspace() for k in range(0, len(text) - LONGEST + 1, LONGEST)):
            run = f"{LONGEST:,} white-space characters in a row"
            raise ValueError(f"the text has more than {run}: shorten it")
        try:
            ranks = [rank for piece in pieces for rank in self.encoding.encode_ordinary(piece)]
        except BaseException as error:
            # Rust's panic is no Exception, and its class cannot be imported.
            if type(error).__name__ != "PanicException":
                raise
            what = "tiktoken cannot split the text, one piece of it may be too long"
            raise ValueError(f"{what} ({error})") from None
        return ranks if self.ids is None else self.ids[ranks].tolist()

    def description(self) -> dict:
        """The contents of our own tokenizer.json."""
        return {
            "kind": "bpe",
            "nfc": self.nfc,
            "patterns": self.patterns,
            "tokens": [_spell(t) for t in self.merged],
            "ids": None if self.ids is None else self.ids.tolist(),
            "specials": self.specials,
            "decoded": {str(i): _spell(t) for i, t in self.decoded.items()},
        }


@functools.lru_cache(64)
def any_of(names: frozenset[str]) -> re.Pattern:
    """A pattern whose `split` gives text, name, text, name, ..., text. The longest name wins."""
    return re.compile(f"({'|'.join(map(re.escape, sorted(names, key=len, reverse=True)))})")


def _check_last(pattern: str) -> None:
    """Raise ValueError for a pattern with syntax that can mean something else in tiktoken."""
    escapes = re.findall(r"\\.", pattern)
    without_escapes = re.sub(r"\\.", "", pattern)
    without_classes = re.sub(r"\[[^\]]*\]", "", without_escapes)
    unsafe = any(e[1].isalnum() and e[1] not in "pPsSdDrnt" for e in escapes)
    if {*"$^"} & {*without_classes} or unsafe:
        raise ValueError(
            f"cannot split by {pattern!r}: ^, $ or one of its escapes can mean something else in tiktoken"
        )


def _spell(token: bytes) -> str:
    return "".join(SYMBOL[b] for b in token)


def _unspell(token: str) -> bytes:
    return bytes(BYTE[c] for c in token)


def _numbered(names: list[str], first: int) -> dict[str, int]:
    if len({*names, ""}) <= len(names):
        raise ValueError(f"special names must be different and not empty: {names}")
    return {name: first + k for k, name in enumerate(names)}


def bytes_tokenizer(specials: list[str]) -> BPETokenizer:
    """Ids 0 to 255 are the bytes of the text in UTF-8; then `specials`."""
    return BPETokenizer({bytes([b]): b for b in range(256)}, [r"(?s:.)"], _numbered(specials, 256))


def truncated(tokenizer: BPETokenizer, size: int, specials: list[str]) -> BPETokenizer:
    """The BPE of the first `size` tokens in merge order (256 bytes, then merges), with ids 0 to size - 1.

    `specials` get the ids after these. No merge needs a later one: a prefix of a merge list is itself a BPE.
    """
    if not 256 <= size <= len(tokenizer.merged):
        allowed = f"256 (the bytes) to {len(tokenizer.merged)} tokens"
        raise ValueError(f"a truncated vocabulary has {allowed}, not {size}")
    merged = {t: rank for rank, t in enumerate(list(tokenizer.merged)[:size])}
    return BPETokenizer(merged, tokenizer.patterns, _numbered(specials, size), tokenizer.nfc)


def load(folder: str | Path, pattern: str | None = None, nfc: bool = False) -> Tokenizer:
    """The tokenizer of a folder: our own tokenizer.json, or the files of the hub.

    The hub's files are tokenizer.json, vocab.json with merges.txt, or *.tiktoken, looked for in this order.
    `pattern` and `nfc` say how text is split and normalised where the files do not: for a .tiktoken file, or
    a tokenizer_class that is not in CLASSES.
    Raises FileNotFoundError if there is no tokenizer, ValueError for one that cannot be reproduced exactly.
    """
    folder = Path(folder)
    candidates = [folder / "tokenizer.json", folder / "vocab.json", *sorted(folder.glob("*.tiktoken"))]
    path = next((p for p in candidates if p.is_file()), None)
    if path is None:
        expected = "tokenizer.json, vocab.json with merges.txt, or a .tiktoken file"
        raise FileNotFoundError(f"no tokenizer in {folder}: expected {expected}")
    try:
        return _read(path, pattern, nfc)
    except (LookupError, TypeError, AttributeError, ValueError, RecursionError, re.error) as error:
        plain = type(error) is ValueError  # its message says what is wrong; other kinds mean broken contents
        what = error if plain else f"malformed, {type(error).__name__}: {error}"
        raise ValueError(f"{path}: {what}") from None


def _read(path: Path, pattern: str | None, nfc: bool) -> Tokenizer:
    data = _json(path) if path.suffix == ".json" else {}
    whole = path.name == "tokenizer.json"  # one file for all; kind is ours, the hub's has none
    if whole and data.get("kind") == "char":
        return CharTokenizer(data["chars"], data["specials"])
    if whole and data.get("kind") == "bpe":
        ids = range(len(data["tokens"])) if data["ids"] is None else data["ids"]
        merged = {_unspell(t): i for t, i in zip(data["tokens"], ids, strict=True)}
        decoded = {int(i): _unspell(t) for i, t in data["decoded"].items()}
        return BPETokenizer(merged, data["patterns"], data["specials"], data["nfc"], decoded)

    folder = path.parent
    config = _json(folder / "tokenizer_config.json")
    listed = data["added_tokens"] if whole else []
    listed = listed + [{**token, "id": int(i)} for i, token in config.get("added_tokens_decoder", {}).items()]
    added = _json(folder / "added_tokens.json")
    specials = _specials(listed + [{"content": name, "id": i} for name, i in added.items()])
    kind = str(config.get("tokenizer_class")).removesuffix("Fast")
    patterns, nfc = ([pattern], nfc) if pattern else CLASSES.get(kind, ([], False))
    if path.suffix == ".tiktoken":
        merged, decoded = _tiktoken_ranks(path), {}
    elif path.name == "vocab.json":
        lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
        merges = [line.split(" ") for line in lines if line.strip() and not line.startswith("#version")]
        merged, decoded = _merge_order(data, merges, specials, False)
    else:
        patterns, nfc, model = _patterns(data["pre_tokenizer"]), _nfc(data["normalizer"]), data["model"]
        for key, usual in PLAIN_MODEL.items():
            if model.get(key) not in (usual, None):
                raise ValueError(f"not a plain byte-level BPE: its model has {key} = {model[key]!r}")
        merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
        merged, decoded = _merge_order(model["vocab"], merges, specials, model.get("ignore_merges", False))
    if not patterns:
        says = f"their tokenizer_class {kind} is not one of {', '.join(CLASSES)}"
        raise ValueError(f"the files do not say how text is split, and {says}")
    originals = [] if pattern else [folder / name for name in ORIGINALS if (folder / name).is_file()]
    return BPETokenizer(merged, patterns, specials, nfc, decoded, originals)


def _json(path: Path) -> dict:
    """The contents of a JSON file, {} if there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _tiktoken_ranks(path: Path) -> dict[bytes, int]:
    """The `merged` of BPETokenizer. A line of the file is a token in base64 and its rank, which is its id."""
    lines = [line.split() for line in path.read_bytes().splitlines() if line]
    ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
    return dict(sorted(ranks.items(), key=lambda item: (len(item[0]) > 1, item[1])))  # single bytes first


def _specials(listed: list[dict]) -> dict[str, int]:
    """name -> id of the added tokens. The first name of an id counts: SDAR's files spell its mask twice."""
    names: dict[int, str] = {}
    for token in listed:
        names.setdefault(token["id"], token["content"])
        unusual = [key for key in ("lstrip", "rstrip", "single_word") if token.get(key)]
        if unusual:
            raise ValueError(f"the added token {token['content']!r} has {unusual[0]}, which is not supported")
    if len({*names.values()}) < len(names):
        raise ValueError("an added token has two ids")
    return {name: i for i, name in names.items()}


def _merge_order(
    vocab: dict[str, int], merges: list, specials: dict[str, int], ignore_merges: bool
) -> tuple[dict[bytes, int], dict[int, bytes]]:
    """The `merged` and `decoded` of BPETokenizer, as the module's docstring derives them."""
    rank = {(a, b): r for r, (a, b) in enumerate(merges)}
    absent = [t for a, b in rank for t in (a, b, a + b) if t not in vocab]
    if absent:
        raise ValueError(f"the merges use {absent[0]!r}, which is not in the vocabulary")
    clash = [name for name, i in specials.items() if vocab.get(name, i) != i]
    if clash:
        raise ValueError(f"the added token {clash[0]!r} has another id in the vocabulary")
    behind = len(merges)
    ranked, looked_up, decoded = [], [], {}
    for token, i in vocab.items():
        count, last = _run(token, rank)
        if not BYTE.keys() >= {*token}:
            decoded[i] = token.encode()  # spelled outside the byte alphabet, so no text gives it
        elif count == 1:
            ranked.append((last, i, _unspell(token)))
        elif not ignore_merges or token in specials:
            decoded[i] = _unspell(token)
        elif count > 2:
            looked_up.append((behind, i, _unspell(token)))
        else:
            what = "is found by the look-up of whole pieces only, and merges cannot avoid it"
            raise ValueError(f"the token {token!r} {what}")
    merged = {t: i for _, i, t in sorted(ranked) + looked_up}
    return merged, {i: t for i, t in decoded.items() if i not in specials.values()}


def _run(token: str, rank: dict[tuple[str, str], int]) -> tuple[int, int]:
    """The original algorithm on one token: how many tokens are left, and the rank of the last merge or -1."""
    pieces, last = list(token), -1
    while len(pieces) > 1:
        ranks = [rank.get(pair, math.inf) for pair in itertools.pairwise(pieces)]
        best = min(ranks)
        if best == math.inf:
            break
        at, last = ranks.index(best), best
        pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]
    return len(pieces), last


def _nfc(normalizer: dict | None) -> bool:
    """Whether the normalizer of a tokenizer.json is NFC. Raises ValueError for any other."""
    steps = [] if normalizer is None else [normalizer]
    if steps and steps[0]["type"] == "Sequence":
        steps = steps[0]["normalizers"]
    kinds = [step["type"] for step in steps]
    if any(kind != "NFC" for kind in kinds):
        raise ValueError(f"the normalizer {kinds} is not supported, only NFC or none")
    return bool(steps)


def _patterns(pre_tokenizer: dict | None) -> list[str]:
    """The splitting patterns of a tokenizer.json, whose last step has to be ByteLevel."""
    steps = [pre_tokenizer or {"type": "none"}]
    if steps[0]["type"] == "Sequence":
        steps = steps[0]["pretokenizers"]
    patterns = []
    for step in steps:
        if step["type"] == "Split" and step["behavior"] == "Isolated":
            ((form, text),) = step["pattern"].items()
            patterns.append(re.escape(text) if form == "String" else text)
        elif step["type"] == "Digits":
            patterns.append(r"\p{N}" if step["individual_digits"] else r"\p{N}+")
        elif step["type"] == "ByteLevel" and step is steps[-1] and not step["add_prefix_space"]:
            patterns += [GPT2] if step.get("use_regex", True) else []
        else:
            shown = {key: step[key] for key in step if key != "pattern"}
            raise ValueError(f"the pre-tokenizer {shown} is not supported")
    if steps[-1]["type"] != "ByteLevel":
        raise ValueError("not a byte-level BPE: the pre-tokenizer does not end in ByteLevel")
    return patterns or [r"(?s:.+)"]


@functools.cache
def _runs() -> list[tuple[str, int, int]]:
    """All code points as runs of one general category: its name, the first and the last."""
    runs = []
    for name, run in itertools.groupby(range(0x110000), lambda code: unicodedata.category(chr(code))):
        codes = list(run)
        runs.append((name, codes[0], codes[-1]))
    return runs


def _category(name: str) -> str:
    """The characters of a Unicode general category (`L`, `Nd`, ...) as the ranges of a character class."""
    spans = []
    for category, first, last in _runs():
        if not category.startswith(name):
            continue
        if spans and spans[-1][1] == first - 1:  # L is Lu, Ll, ... side by side
            first = spans.pop()[0]
        spans.append((first, last))
    if not spans:
        raise ValueError(f"unknown Unicode category {name!r}")
    return "".join(f"{re.escape(chr(first))}-{re.escape(chr(last))}" for first, last in spans)


def _python_regex(pattern: str) -> re.Pattern:
    """A pattern for Python's `re`, with \\p{..} and \\s written out.

    All patterns but the last need this: tiktoken gives no pieces that the next pattern could split.
    """
    out, inside = [], False  # inside: within a character class
    for token in re.findall(r"\\[pP]\{\w+\}|\\.|.", pattern, re.DOTALL):
        negated = token[:2] in ("\\P", "\\S")
        escape = re.fullmatch(r"\\[^\WpPsSrnt]", token)
        nested = inside and (token == "[" or negated)
        anchor = token == "^" and out[-1:] != ["["]
        if escape or nested or anchor:
            problem = f"{token} is not supported there"
            raise ValueError(f"cannot split by {pattern!r} before another pattern: {problem}")
        if token[:2] in ("\\p", "\\P", "\\s", "\\S"):
            ranges = WHITE if token[1] in "sS" else _category(token[3:-1])
            token = ranges if inside else f"[{'^' * negated}{ranges}]"
        else:
            inside = token == "[" or inside and token != "]"
        out.append(token)
    split = re.compile(f"({''.join(out)})", re.MULTILINE)  # $ is the end of a line in the originals' syntax
    if split.groups > 1:
        raise ValueError(f"cannot split by {pattern!r}: it has a group")
    return split
