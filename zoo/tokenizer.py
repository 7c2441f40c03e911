"""Tokenizers: characters, bytes and byte-level BPE, the last built from whatever a hub folder has.

Byte-level BPE (Sennrich et al. 2016, on bytes as in GPT-2): normalise the text (NFC, if the original does), split it into pieces with the
original's regular expressions, and inside each piece replace the adjacent pair that comes first in the merge list, leftmost first, until
no listed pair is left. The splitting and merging run in tiktoken; everything read from a file is brought into tiktoken's form first.

tiktoken merges by the rank of the merged BYTES, the original by the rank of the PAIR, so ranks are not copied but derived:
    R = {t : the original algorithm, run on the bytes of t alone, ends in the one token t},  rank(t) = rank of the last merge of that run.
With these ranks the two agree on every piece, for any merge list (many pairs for one token, pairs out of order, dead tokens). Proof:
    1. Locality. While no merge has crossed the ends of a span, the merges inside it are those of a run on that span alone, since the
       best pair of the whole, where it lies inside, is the best pair of the part.
    2. Let tokens c, d be adjacent and t = c + d. By 1 the run on t alone passes through [c, d]. If t is in R, the one step left is the
       merge (c, d), so this pair is listed with rank(t); if t is not in R, (c, d) is not listed. So at every step both algorithms have
       the same candidates with the same ranks. A whole piece that is a token (tiktoken's short cut) is in R: both give t.
Ids need not follow the ranks, and may have holes: a table takes ranks to ids. A token outside R can only be decoded. If the original
looks whole pieces up before merging (`ignore_merges`), such a token goes behind all merges, where only the look-up finds it if its run
ends in three tokens or more; if it ends in two, the file is refused.

Special and other added tokens (`<|im_end|>`, `<think>`) never come out of text unless `allow_special` asks for them; what the
`tokenizers` library does, which always takes them, is `allow_special=True`.
NFC is Python's; `tokenizers` knows Unicode 9 there, so a run of combining marks with one that is younger (98 of them in Python 3.11) can
come out of it in another order. Where several patterns split the text, all but the last run in Python's `re`, with its Unicode tables.
"""

import base64
import functools
import hashlib
import itertools
import json
import re
import unicodedata
from collections.abc import Collection, Iterable
from pathlib import Path

import numpy as np
import tiktoken

from zoo.files import write_atomic

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# vocab.json + merges.txt do not say how text is split and whether it is normalised: the class named in tokenizer_config.json does
CLASSES = {"GPT2Tokenizer": ([GPT2], False), "Qwen2Tokenizer": ([QWEN], True), "DreamTokenizer": ([QWEN], True)}
ORIGINALS = ("tokenizer.json", "vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json", "tokenizer_config.json",
             "chat_template.jinja")  # fmt: skip
WHITE = "\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"  # \s in the files; Python's has four control characters more
LONGEST = 400_000  # from about 998,000 white-space characters in a row tiktoken's pattern matcher overflows its stack

# The printable character that stands for each byte in GPT-2 style files: itself, or the next free one from U+0100 on.
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
SYMBOL = {b: chr(b) for b in PRINTABLE} | {b: chr(256 + k) for k, b in enumerate(sorted({*range(256)} - {*PRINTABLE}))}
BYTE = {c: b for b, c in SYMBOL.items()}


class Tokenizer:
    """What both kinds share: `tokens` (id -> bytes), `specials` (name -> id), `vocab_size`, encode, decode, save, fingerprint."""

    tokens: dict[int, bytes]
    specials: dict[str, int]
    originals: tuple[Path, ...] = ()  # the hub's files this was read from; `save` copies them

    def encode(self, text: str, allow_special: bool | Collection[str] = False) -> list[int]:
        """Ids of `text`. Special names in it are ordinary text, unless allow_special is True (all of them) or holds their names.

        Raises ValueError for a lone surrogate, and for a character that a character tokenizer does not have.
        """
        lone = re.search("[\ud800-\udfff]", text)
        if lone:
            raise ValueError(f"the text has a lone surrogate U+{ord(lone[0]):04X} at position {lone.start()}: it is not valid Unicode")
        names = sorted(self.specials if allow_special is True else allow_special or (), key=len, reverse=True)  # the longest one wins
        if not names:
            return self._encode(text)
        if not self.specials.keys() >= {*names}:
            raise ValueError(f"this tokenizer has no special token {min({*names} - self.specials.keys())!r}")
        parts = re.split(f"({'|'.join(map(re.escape, names))})", text)  # text, special, text, special, ..., text
        return [i for k, part in enumerate(parts) for i in ([self.specials[part]] if k % 2 else self._encode(part))]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`: special tokens as their names, bytes that are not UTF-8 as U+FFFD. Raises ValueError for an unknown id."""
        try:
            return b"".join([self.tokens[i] for i in np.asarray(ids).tolist()]).decode("utf-8", "replace")
        except KeyError as error:
            raise ValueError(f"id {error} is not in the vocabulary (the largest is {self.vocab_size - 1})") from None

    @functools.cached_property
    def vocab_size(self) -> int:
        """The largest id + 1; ids below it may be unused."""
        return max(self.tokens) + 1

    @functools.cached_property
    def fingerprint(self) -> str:
        """Short hash of all that fixes text <-> ids (tokens, ids, order, splitting, normalisation, specials), from whatever files."""
        return hashlib.sha256(json.dumps(self.description(), sort_keys=True).encode()).hexdigest()[:16]

    def save(self, folder: str | Path) -> None:
        """Write our own tokenizer.json or copy the hub's files byte for byte; each file appears whole or not at all."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        files = {path.name: path.read_bytes() for path in self.originals}
        files = files or {"tokenizer.json": json.dumps(self.description()).encode()}
        for name, data in files.items():
            write_atomic(folder / name, lambda path, data=data: path.write_bytes(data))
        if "tokenizer.json" not in files:
            (folder / "tokenizer.json").unlink(missing_ok=True)  # one left by another tokenizer would be read first


class CharTokenizer(Tokenizer):
    """One id per character: `chars` in the given order, then `specials`."""

    def __init__(self, chars: str | list[str], specials: list[str]):
        self.chars = list(chars)
        self.specials = _numbered(specials, len(self.chars))
        if any(len(c) != 1 for c in self.chars) or len({*self.chars, *specials}) < len(self.chars) + len(specials):
            raise ValueError("a character vocabulary needs single characters and special names that are all different")
        self.ids = {c: i for i, c in enumerate(self.chars)}
        self.tokens = {i: t.encode() for i, t in enumerate([*self.chars, *specials])}

    def _encode(self, text: str) -> list[int]:
        try:
            return [self.ids[c] for c in text]
        except KeyError as error:
            c = error.args[0]
            raise ValueError(f"character {c!r} (U+{ord(c):04X}) is not in the vocabulary of {len(self.chars)} characters") from None

    def description(self) -> dict:
        """The contents of our own tokenizer.json."""
        return {"kind": "char", "chars": self.chars, "specials": list(self.specials)}


class BPETokenizer(Tokenizer):
    """Byte-level BPE on tiktoken.

    merged: token bytes -> id in MERGE ORDER (the position is tiktoken's rank), with all 256 single bytes.
    patterns: regular expressions that split the text one after the other; what lies between the matches of one is a piece too.
    specials: name -> id. nfc: normalise to NFC first. decoded: id -> bytes of the tokens that no text gives.
    """

    def __init__(self, merged: dict[bytes, int], patterns: list[str], specials: dict[str, int], nfc: bool = False,
                 decoded: dict[int, bytes] | None = None, originals: Collection[Path] = ()):  # fmt: skip
        missing = [b for b in range(256) if bytes([b]) not in merged]
        if missing:
            raise ValueError(f"not a byte-level BPE: it has no token for {len(missing)} of the 256 bytes, such as 0x{missing[0]:02X}")
        spelled = [name for name in specials if name.encode() in merged]
        if spelled:
            raise ValueError(f"the special token {spelled[0]!r} is an ordinary token as well: text could not be kept apart from it")
        self.merged, self.patterns, self.specials, self.nfc = merged, patterns, specials, nfc
        self.decoded, self.originals = decoded or {}, tuple(originals)
        self.tokens = {i: t for t, i in merged.items()} | self.decoded | {i: name.encode() for name, i in specials.items()}
        if len(self.tokens) < len(merged) + len(self.decoded) + len(specials) or min(self.tokens) < 0 or "" in specials:
            raise ValueError("two tokens of the vocabulary have the same id, or one has a negative id or an empty name")
        ids = np.array(list(merged.values()))
        self.ids = None if (ids == np.arange(len(ids))).all() else ids  # rank -> id
        self.splits = [_python_regex(p) for p in patterns[:-1]]
        bare = re.sub(r"\[[^\]]*\]", "", re.sub(r"\\.", "", patterns[-1]))  # without escapes and character classes
        if {*"$^"} & {*bare} or any(e[1].isalnum() and e[1] not in "pPsSdDrnt" for e in re.findall(r"\\.", patterns[-1])):
            raise ValueError(f"cannot split by {patterns[-1]!r}: ^, $ or one of its escapes can mean something else in tiktoken")
        between = f"(?:(?!{patterns[-1]})(?s:.))+"  # tiktoken would drop what the pattern does not match
        self.encoding = tiktoken.Encoding("bpe", pat_str=f"{patterns[-1]}|{between}", special_tokens={},
                                          mergeable_ranks={t: rank for rank, t in enumerate(merged)})  # fmt: skip

    def _encode(self, text: str) -> list[int]:
        pieces = [unicodedata.normalize("NFC", text) if self.nfc else text]
        for split in self.splits:
            pieces = [part for piece in pieces for part in split.split(piece)]
        if any(text[k : k + LONGEST].isspace() for k in range(0, len(text) - LONGEST + 1, LONGEST)):
            raise ValueError(f"the text has more than {LONGEST:,} white-space characters in a row: shorten it")
        try:
            ranks = [rank for piece in pieces for rank in self.encoding.encode_ordinary(piece)]
        except BaseException as error:
            if type(error).__name__ != "PanicException":  # what a Rust library's failure is; not an Exception
                raise
            raise ValueError(f"tiktoken cannot split the text, one piece of it may be too long ({error})") from None
        return ranks if self.ids is None else self.ids[ranks].tolist()

    def description(self) -> dict:
        """The contents of our own tokenizer.json."""
        ids = None if self.ids is None else self.ids.tolist()
        return {"kind": "bpe", "nfc": self.nfc, "patterns": self.patterns, "tokens": [_spell(t) for t in self.merged], "ids": ids,
                "specials": self.specials, "decoded": {str(i): _spell(t) for i, t in self.decoded.items()}}  # fmt: skip


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
    """The BPE of the first `size` tokens in merge order (256 bytes, then merges), with ids 0 to size - 1, then `specials`.

    A prefix of a merge list is itself a BPE: no merge needs a later one.
    """
    if not 256 <= size <= len(tokenizer.merged):
        raise ValueError(f"a truncated vocabulary has 256 (the bytes) to {len(tokenizer.merged)} tokens, not {size}")
    merged = {t: rank for rank, t in enumerate(list(tokenizer.merged)[:size])}
    return BPETokenizer(merged, tokenizer.patterns, _numbered(specials, size), tokenizer.nfc)


def load(folder: str | Path, pattern: str | None = None, nfc: bool = False) -> Tokenizer:
    """The tokenizer of a folder: our own tokenizer.json, or the hub's tokenizer.json, vocab.json + merges.txt, or *.tiktoken.

    `pattern` and `nfc` say how text is split and normalised where the files do not: a .tiktoken file, a tokenizer_class not in CLASSES.
    Raises FileNotFoundError if there is no tokenizer, ValueError for one that cannot be reproduced exactly.
    """
    folder = Path(folder)
    candidates = [folder / "tokenizer.json", folder / "vocab.json", *sorted(folder.glob("*.tiktoken"))]
    path = next((p for p in candidates if p.is_file()), None)
    if path is None:
        raise FileNotFoundError(f"no tokenizer in {folder}: expected tokenizer.json, vocab.json with merges.txt, or a .tiktoken file")
    try:
        return _read(path, pattern, nfc)
    except (LookupError, TypeError, AttributeError, ValueError, RecursionError, re.error) as error:
        raise ValueError(f"{path}: {error if type(error) is ValueError else f'malformed, {type(error).__name__}: {error}'}") from None


def _read(path: Path, pattern: str | None, nfc: bool) -> Tokenizer:
    def optional(name: str) -> dict:
        return json.loads((path.parent / name).read_text(encoding="utf-8")) if (path.parent / name).is_file() else {}

    data = {} if path.suffix == ".tiktoken" else optional(path.name)
    if path.name == "tokenizer.json" and data.get("kind") == "char":
        return CharTokenizer(data["chars"], data["specials"])
    if path.name == "tokenizer.json" and data.get("kind") == "bpe":
        ids = range(len(data["tokens"])) if data["ids"] is None else data["ids"]
        merged = {_unspell(t): i for t, i in zip(data["tokens"], ids, strict=True)}
        return BPETokenizer(merged, data["patterns"], data["specials"], data["nfc"], {int(i): _unspell(t) for i, t in data["decoded"].items()})

    config, decoded = optional("tokenizer_config.json"), {}
    listed = data["added_tokens"] if path.name == "tokenizer.json" else []
    listed = listed + [{**token, "id": int(i)} for i, token in config.get("added_tokens_decoder", {}).items()]
    specials = _specials(listed + [{"content": name, "id": i} for name, i in optional("added_tokens.json").items()])
    kind = str(config.get("tokenizer_class")).removesuffix("Fast")
    patterns, nfc = ([pattern], nfc) if pattern else CLASSES.get(kind, ([], False))
    if path.suffix == ".tiktoken":
        lines = [line.split() for line in path.read_bytes().splitlines() if line]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
        merged = dict(sorted(ranks.items(), key=lambda item: (len(item[0]) > 1, item[1])))
    elif path.name == "vocab.json":
        lines = (path.parent / "merges.txt").read_text(encoding="utf-8").split("\n")
        merges = [line.split(" ") for line in lines if line.strip() and not line.startswith("#version")]
        merged, decoded = _merge_order(data, merges, specials, False)
    else:
        patterns, nfc, model = _patterns(data["pre_tokenizer"]), _nfc(data["normalizer"]), data["model"]
        plain = {"type": "BPE", "dropout": None, "byte_fallback": False, "continuing_subword_prefix": "", "end_of_word_suffix": ""}
        other = [f"{key} = {model[key]!r}" for key in plain if model.get(key) not in (plain[key], None)]
        if other:
            raise ValueError(f"not a plain byte-level BPE: its model has {other[0]}")
        merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
        merged, decoded = _merge_order(model["vocab"], merges, specials, model.get("ignore_merges", False))
    if not patterns:
        raise ValueError(f"the files do not say how text is split, and their tokenizer_class {kind} is not one of {', '.join(CLASSES)}")
    originals = [] if pattern else [path.parent / name for name in ORIGINALS if (path.parent / name).is_file()]
    return BPETokenizer(merged, patterns, specials, nfc, decoded, originals)


def _specials(listed: list[dict]) -> dict[str, int]:
    """name -> id of the added tokens; the first name of an id is the one that counts (SDAR's files spell its mask in two ways)."""
    names: dict[int, str] = {}
    for token in listed:
        names.setdefault(token["id"], token["content"])
        unusual = [key for key in ("lstrip", "rstrip", "single_word") if token.get(key)]
        if unusual:
            raise ValueError(f"the added token {token['content']!r} has {unusual[0]}, which is not supported")
    if len({*names.values()}) < len(names):
        raise ValueError("an added token has two ids")
    return {name: i for i, name in names.items()}


def _merge_order(vocab: dict[str, int], merges: list, specials: dict[str, int], ignore_merges: bool) -> tuple[dict, dict]:
    """The `merged` and `decoded` of BPETokenizer, as the module's docstring derives them."""
    rank = {(a, b): r for r, (a, b) in enumerate(merges)}
    absent = [t for a, b in rank for t in (a, b, a + b) if t not in vocab]
    if absent:
        raise ValueError(f"the merges use {absent[0]!r}, which is not in the vocabulary")
    clash = [name for name, i in specials.items() if vocab.get(name, i) != i]
    if clash:
        raise ValueError(f"the added token {clash[0]!r} has another id in the vocabulary")
    none, reached, whole, decoded = len(merges), [], [], {}
    for token, i in vocab.items():
        parts, last = list(token), -1
        while len(parts) > 1:
            ranks = [rank.get(pair, none) for pair in itertools.pairwise(parts)]
            best = min(ranks)
            if best == none:
                break
            at, last = ranks.index(best), best
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        if not BYTE.keys() >= {*token}:
            decoded[i] = token.encode()  # spelled outside the byte alphabet, so no text gives it
        elif len(parts) == 1:
            reached.append((last, i, _unspell(token)))
        elif not ignore_merges or token in specials:
            decoded[i] = _unspell(token)
        elif len(parts) > 2:
            whole.append((none, i, _unspell(token)))
        else:
            raise ValueError(f"the token {token!r} is found by the look-up of whole pieces only, and merges cannot avoid it")
    return {t: i for _, i, t in sorted(reached) + whole}, {i: t for i, t in decoded.items() if i not in specials.values()}


def _nfc(normalizer: dict | None) -> bool:
    steps = [] if normalizer is None else normalizer["normalizers"] if normalizer["type"] == "Sequence" else [normalizer]
    if any(step["type"] != "NFC" for step in steps):
        raise ValueError(f"the normalizer {[step['type'] for step in steps]} is not supported, only NFC or none")
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
            raise ValueError(f"the pre-tokenizer { {key: step[key] for key in step if key != 'pattern'} } is not supported")
    if steps[-1]["type"] != "ByteLevel":
        raise ValueError("not a byte-level BPE: the pre-tokenizer does not end in ByteLevel")
    return patterns or [r"(?s:.+)"]


@functools.cache
def _category(name: str) -> str:
    """The characters of a Unicode general category (`L`, `Nd`, ...) as the ranges of a character class."""
    codes = [c for c in range(0x110000) if unicodedata.category(chr(c)).startswith(name)]
    if not codes:
        raise ValueError(f"unknown Unicode category {name!r}")
    cuts = [k for k in range(1, len(codes)) if codes[k] != codes[k - 1] + 1]
    return "".join(f"{re.escape(chr(codes[a]))}-{re.escape(chr(codes[b - 1]))}" for a, b in zip([0, *cuts], [*cuts, len(codes)]))


def _python_regex(pattern: str) -> re.Pattern:
    """A pattern that others follow, for Python's `re` (tiktoken shows no pieces): \\p{..} and \\s are written out."""
    out, inside = [], False
    for token in re.findall(r"\\[pP]\{\w+\}|\\.|.", pattern, re.DOTALL):
        negated = token[:2] in ("\\P", "\\S")
        if re.fullmatch(r"\\[^\WpPsSrnt]", token) or (token == "[" or negated) and inside or token == "^" and out[-1:] != ["["]:
            raise ValueError(f"cannot split by {pattern!r} before another pattern: {token} is not supported there")
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
