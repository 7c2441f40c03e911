"""zoo/tokenizer.py against the `tokenizers` library, `transformers`' Qwen2 tokenizer and brute force."""

import base64
import functools
import json
import random
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from real_files import SDAR, SHARED, needed
from real_files import qwen as real_qwen
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Original

from zoo import tokenizer as zoo
from zoo.tokenizer import GPT2, QWEN, SYMBOL, BPETokenizer, CharTokenizer, bytes_tokenizer, load, truncated

LLAMA3 = QWEN.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
DEEPSEEK3 = (r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"
             r"|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
             r"|\s*[\r\n]+|\s+(?!\S)|\s+")  # fmt: skip


def split(pattern):
    return pre_tokenizers.Split(Regex(pattern), "isolated")


BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
WITH_GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
STYLES = {  # the pre-tokenizers of well-known files
    "gpt2": WITH_GPT2,
    "qwen": pre_tokenizers.Sequence([split(QWEN), BYTES]),
    "llama3": pre_tokenizers.Sequence([split(LLAMA3), BYTES]),
    "digits": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), WITH_GPT2]),
    "deepseek-llm": pre_tokenizers.Sequence([
        split(r"[\r\n]"), split(r"\s?[A-Za-zµÀ-ÖØ-öø-ƺ]+"), split(r"\s?[!-/:-~！-／：-～‘-‟　-。]+"),
        split(r"\s+$"), split("[一-龥ࠀ-一가-퟿]+"), pre_tokenizers.Digits(individual_digits=True), BYTES,
    ]),
    "deepseek-coder": pre_tokenizers.Sequence([
        split(r"[\r\n]"), split(r"\s?\p{L}+"), split(r"\s?\p{P}+"), split("[一-龥ࠀ-一가-퟿]+"),
        pre_tokenizers.Digits(individual_digits=True), BYTES,
    ]),
    "deepseek-v3": pre_tokenizers.Sequence([
        split(r"\p{N}{1,3}"), split("[一-龥぀-ゟ゠-ヿ]+"), split(DEEPSEEK3), BYTES,
    ]),
    "gaps": pre_tokenizers.Sequence([split(r"\p{L}+"), BYTES]),  # a pattern that leaves stretches unmatched
    "string": pre_tokenizers.Sequence([
        pre_tokenizers.Split("a.b", "isolated"), split(r"[^\S\n]+|\p{Lu}\p{Ll}*"), BYTES,
    ]),
    "numbers": pre_tokenizers.Sequence([
        split(r"[ !]+$"), pre_tokenizers.Digits(individual_digits=False), WITH_GPT2,
    ]),
    "whole": pre_tokenizers.Sequence([BYTES]),
}  # fmt: skip


@functools.cache
def nasty() -> list[str]:
    """Texts that break tokenizers.

    Every assigned character between others, emoji sequences, controls, runs, line ends, combining marks, and
    what looks like a special token.
    """
    assigned = [c for c in map(chr, range(0x110000)) if unicodedata.category(c) not in ("Cs", "Cn", "Co")]
    rows = ["".join(assigned[k : k + 80]) for k in range(0, len(assigned), 80)]
    script = [f"a{c} {c}1{c}\n{c}  {c}'{c}" for c in assigned[::97]]
    emoji = ["👩‍👩‍👧‍👦👍🏽🇩🇪🇫🇷1️⃣🏴󠁧󠁢󠁥󠁮󠁧󠁿 ❤️‍🔥x☃️y", "🤷🏿‍♀️" * 50]
    controls = [
        "".join(map(chr, range(32))), "\x00", "\x1c \x1d\x1e\x1f", "a\x1cb\x1da \x1ea\x1f",
        "\x7f\x80\x85\xa0\u200b\u2028\u2029\ufeff\ufffe\uffff\U0010ffff",
    ]  # fmt: skip
    repeated = "a", " ", "\n", "\t", "!", "7", "é", "漢", "ab", "\r\n", " \n", "\u0301", "\u3000", "<|"
    runs = [c * n for c in repeated for n in (2, 3, 9, 129, 5000)]
    marks = [
        "e\u0301 é \u1100\u1161\u11a8 각 \u212a\u212b \u0344 \u0958 \ufb01 q\u0307\u0323 q\u0323\u0307",
        "नमस्ते दुनिया", "שָׁלוֹם", "สวัสดีชาวโลก", "ﷺ مرحبا",
    ]  # fmt: skip
    text = [
        "", " ", "'S 'ſ 'LL 'Ve it's WE'RE I'd i'm don'T'Til",
        "x = 3.14159e-10; // 12345678901\r\n\tif (a<=b) {\r\n\r\n  return;}   \n \n\n  z ",
        "<|im_end|><think></think> <|endoftext|>", "١٢٣४५६ ⅷ¾²㊿ 𝟙𝟚", "aaa.bbb a.b A.B Abc ABc",
        "a  !\nb !\n\n !c !", "12 1212 34534512",
    ]  # fmt: skip
    return rows + script + emoji + controls + runs + marks + text


OLD_NFC = normalizers.NFC()


def differs(text: str) -> bool:
    """Whether the NFC of `tokenizers`, as of Unicode 9, is another than Python's."""
    return OLD_NFC.normalize_str(text) != unicodedata.normalize("NFC", text)


@functools.cache
def young_marks() -> set[str]:
    combining = [c for c in map(chr, range(0x110000)) if unicodedata.combining(c)]
    return {c for c in combining if differs(f"a{c}\u0301\u0316")} | {"\U00011935"}


WORDS = "the of and to a in is it you that he was for on are with as his they I at be this have one her said "
WORDS += "would 12 345 é 漢字 don't\n"
TEXT = [" ".join(random.Random(k).choices(WORDS.split(" "), k=60)) for k in range(200)]


@functools.cache
def trained(style: str, size: int = 700, specials=("<eos>", "<mask>"), nfc: bool = True) -> Original:
    """A tokenizer of the `tokenizers` library, trained on the texts above. The tests do not change it."""
    original = Original(models.BPE())
    original.pre_tokenizer, original.decoder = STYLES[style], decoders.ByteLevel()
    if nfc:
        original.normalizer = normalizers.NFC()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=list(specials), initial_alphabet=alphabet,
                                  show_progress=False)  # fmt: skip
    original.train_from_iterator(TEXT + nasty()[::50], trainer)
    return original


def hub(folder: Path, original: Original, change=lambda data: None) -> Path:
    """A hub folder with this tokenizer.json, after `change` to its data."""
    data = json.loads(original.to_str())
    change(data)
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(data), encoding="utf-8")
    return folder


def same(ours: BPETokenizer, original: Original, texts: list[str]) -> None:
    """Ids and decoded text equal, with added tokens recognised.

    `tokenizers` normalises as of Unicode 9. Where a younger combining mark makes that differ from Python, it
    gets the text normalised.
    """
    if ours.nfc:
        young = [k for k, text in enumerate(texts) if differs(text)]
        assert len(young) <= len(texts) // 50 and all({*texts[k]} & young_marks() for k in young)
        texts = [unicodedata.normalize("NFC", text) if k in young else text for k, text in enumerate(texts)]
    for text, want in zip(texts, original.encode_batch(texts, add_special_tokens=False), strict=True):
        ids = ours.encode(text, allow_special=True)
        assert ids == want.ids, text[:80]
        assert ours.decode(ids) == original.decode(ids, skip_special_tokens=False), text[:80]


@pytest.fixture(scope="module")
def qwen():
    ours, theirs = real_qwen()
    return ours, theirs.backend_tokenizer


def test_qwen_files(qwen):
    ours, original = qwen
    assert ours.vocab_size == 151670 and ours.nfc and ours.patterns == [QWEN]
    assert ours.specials == {t.content: i for i, t in original.get_added_tokens_decoder().items()}
    assert ours.ids is None  # ids follow the merge order, so tiktoken's ranks are the ids
    vocab = json.loads((SDAR / "vocab.json").read_text(encoding="utf-8"))
    assert {zoo._spell(t): i for t, i in ours.merged.items()} == vocab


def test_qwen_equals_the_original(qwen):
    same(*qwen, nasty())
    rows = (needed(SHARED / "gsm8k") / "test.jsonl").read_text(encoding="utf-8").splitlines()
    lines = [json.loads(row)[key] for row in rows for key in ("question", "answer")]
    assert len(lines) == 2 * 1319
    same(*qwen, lines + [(needed(SHARED / "tinyshakespeare") / "input.txt").read_text(encoding="utf-8")])


def test_qwen_long_runs(qwen):
    same(*qwen, [c * 100_000 for c in ("a", " ", "\n", "!", "0", "é")] + ["a" * 30_000 + " " * 300_000 + "b"])


def test_runs_too_long_for_the_pattern_matcher_are_refused_in_one_line():
    ours = bytes_tokenizer([])
    assert len(ours.encode("a" * 1_000_000)) == 1_000_000
    for text in (" " * 1_000_000, "a" * 250_000 + "\t" * 900_000 + "b"):
        with pytest.raises(ValueError) as error:
            ours.encode(text)
        says = "the text has more than 400,000 white-space characters in a row: shorten it"
        assert str(error.value) == says
    unmatched = BPETokenizer({bytes([b]): b for b in range(256)}, [r"\p{N}"], {})
    with pytest.raises(ValueError, match="one piece of it may be too long"):
        unmatched.encode("a" * 1_000_000)


@pytest.mark.parametrize("style", STYLES)
def test_trained_vocabularies_in_both_spellings(style, tmp_path):
    original = trained(style, nfc=style in ("qwen", "gpt2"))

    def as_strings(data):
        assert isinstance(data["model"]["merges"][0], list)
        data["model"]["merges"] = [" ".join(pair) for pair in data["model"]["merges"]]

    pairs, strings = load(hub(tmp_path / "a", original)), load(hub(tmp_path / "b", original, as_strings))
    assert pairs.fingerprint == strings.fingerprint and pairs.vocab_size == original.get_vocab_size()
    assert pairs.specials == {"<eos>": 0, "<mask>": 1}
    assert pairs.ids is not None  # the specials come first: a table takes ranks to ids
    same(pairs, original, nasty()[::8] + nasty()[-60:] + TEXT + ["<mask>a<eos><eos", "x  <mask>  y"])


@pytest.mark.parametrize("pattern", [
    r"\s", r"\S", r"\s?\p{L}+", r"[\s\p{Nd}]", r"\P{L}{2}", r"[^\p{P}\s]+(?!\p{S})", r"\p{N}{1,3}",
    r"\p{Lu}\p{L}*", r"[ !]+$",
])  # fmt: skip
def test_patterns_before_the_last_split_as_the_original(pattern):
    ours, theirs = zoo._python_regex(pattern), split(pattern)
    for text in nasty():
        pieces = [piece for piece in ours.split(text) if piece]
        assert pieces == [piece for piece, _ in theirs.pre_tokenize_str(text)]


def test_invalid_utf8_and_unknown_ids(qwen):
    ours, original = qwen
    draw = random.Random(0)
    for _ in range(300):
        ids = [draw.randrange(151670) for _ in range(draw.randrange(30))]
        assert ours.decode(ids) == original.decode(ids, skip_special_tokens=False)
    single = bytes_tokenizer(["<mask>"])
    assert single.decode([0xE6, 0xBC, 256, 0xA2, 0x41]) == b"\xe6\xbc<mask>\xa2A".decode("utf-8", "replace")
    assert single.decode(np.array([104, 105])) == "hi" and single.decode([]) == ""
    for unknown in (257, -1):
        with pytest.raises(ValueError, match=f"^id {unknown} is not in the vocabulary"):
            single.decode([104, unknown])


def test_text_never_gives_a_special_token_unless_asked(qwen):
    ours, original = qwen
    for name, i in ours.specials.items():
        text = f"{name}a {name}{name}"
        ids = ours.encode(text)
        assert not {*ids} & {*ours.specials.values()} and ours.decode(ids) == text
        assert ours.encode(text, allow_special=True) == original.encode(text).ids
        assert ours.encode(text, allow_special=[name]) == original.encode(text).ids
        other = "<|endoftext|>" if name == "<|im_end|>" else "<|im_end|>"
        assert ours.encode(name + other, allow_special={name}) == [i, *ours.encode(other)]
    with pytest.raises(ValueError, match=r"^this tokenizer has no special token '<nothing>'$"):
        ours.encode("a", allow_special={"<nothing>"})
    nested = bytes_tokenizer(["<a>", "<a>b", "<a"])  # the longest name wins, as in `tokenizers`
    assert nested.encode("<a>b<a>c<a", allow_special=True) == [257, 256, ord("c"), 258]


@settings(max_examples=100)
@given(st.data())
def test_any_merge_list_gives_what_the_original_gives(data):
    """Random merges: several pairs for one token, tokens without merges, pairs in any order and twice.

    Ids are permuted and have holes.
    """
    tokens, merges = list("abc"), []
    for _ in range(data.draw(st.integers(1, 12))):
        pair = (data.draw(st.sampled_from(tokens)), data.draw(st.sampled_from(tokens)))
        merges.append(pair)
        if pair[0] + pair[1] not in tokens:
            tokens.append(pair[0] + pair[1])
    if data.draw(st.booleans()):
        merges = data.draw(st.permutations(merges))
    extra = data.draw(st.lists(st.text("abc", min_size=2, max_size=4), max_size=3))
    names = [*SYMBOL.values(), *(t for t in dict.fromkeys(tokens + extra) if len(t) > 1)]
    ids = random.Random(data.draw(st.integers(0, 9))).sample(range(len(names) + 50), len(names))
    ignore_merges = data.draw(st.booleans())
    vocab = dict(zip(names, ids, strict=True))
    original = Original(models.BPE(vocab=vocab, merges=merges, ignore_merges=ignore_merges))
    try:
        merged, decoded = zoo._merge_order(vocab, [*map(list, merges)], {}, ignore_merges)
    except ValueError as error:
        assert ignore_merges and "look-up of whole pieces" in str(error)
        return
    ours = BPETokenizer(merged, ["(?s:.+)"], {}, False, decoded)
    assert {*ours.tokens} == {*ids}
    for text in [*names[256:], *(data.draw(st.text("abc", max_size=n)) for n in (6, 40, 700))]:
        assert ours.encode(text) == original.encode(text).ids, (text, merges)


def test_ignore_merges_and_its_limit(tmp_path):
    vocab = {c: i for i, c in enumerate(SYMBOL.values())} | {"ab": 256, "abcd": 257}
    original = Original(models.BPE(vocab=vocab, merges=[("a", "b")], ignore_merges=True))
    original.pre_tokenizer, original.decoder = WITH_GPT2, decoders.ByteLevel()
    ours = load(hub(tmp_path, original))  # abcd ends in ab, c, d: only the look-up of a whole piece finds it
    same(ours, original, ["abcd", "abcde", " abcd", "abcdabcd", "abcd.abcd"])
    assert ours.encode("abcd.abcd") == [257, vocab["."], 257] and ours.encode("abcde") != [257, vocab["e"]]

    def one_more_merge(data):
        data["model"]["vocab"]["cd"] = 258
        data["model"]["merges"].append(["c", "d"])

    with pytest.raises(ValueError, match="'abcd' is found by the look-up of whole pieces only"):
        load(hub(tmp_path, original, one_more_merge))


def test_tokens_that_no_text_gives(tmp_path):
    original = trained("llama3", specials=("<｜end▁of▁sentence｜>",), nfc=False)
    size = original.get_vocab_size()
    unreachable = {"▁x": size, "zzzz": size + 1}
    folder = hub(tmp_path, original, lambda data: data["model"]["vocab"].update(unreachable))
    ours, theirs = load(folder), Original.from_file(str(folder / "tokenizer.json"))
    same(ours, theirs, ["▁x zzzz", "a<｜end▁of▁sentence｜>zzzz"])
    assert ours.specials == {"<｜end▁of▁sentence｜>": 0} and ours.vocab_size == size + 2
    for i in (0, size, size + 1):
        text = ours.decode([i])
        assert text == theirs.decode([i], skip_special_tokens=False) and i not in ours.encode(text)


KINDS = [("qwen", "Qwen2Tokenizer"), ("qwen", "DreamTokenizer"), ("gpt2", "GPT2TokenizerFast")]


@pytest.mark.parametrize("style, kind", KINDS)
def test_vocab_and_merges_files_equal_tokenizer_json(style, kind, tmp_path):
    original = trained(style, nfc=style == "qwen")
    one, two = hub(tmp_path / "one", original), tmp_path / "two"
    two.mkdir()
    original.model.save(str(two))
    added = original.get_added_tokens_decoder().items()
    added = {str(i): {"content": t.content, "lstrip": False} for i, t in added}
    config = {"tokenizer_class": kind, "added_tokens_decoder": added}
    (two / "tokenizer_config.json").write_text(json.dumps(config))
    # A second name of the same id does not count.
    (two / "added_tokens.json").write_text(json.dumps({"<MASK>": 1}))
    assert load(one).fingerprint == load(two).fingerprint
    same(load(two), original, nasty()[::20] + TEXT)
    pattern, nfc = load(one).patterns[0], load(one).nfc
    del config["tokenizer_class"]
    (two / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="do not say how text is split"):
        load(two)
    assert load(two, pattern=pattern, nfc=nfc).fingerprint == load(one).fingerprint
    # The files do not hold the pattern, so this is saved in our own format.
    load(two, pattern=pattern, nfc=nfc).save(tmp_path / "three")
    assert load(tmp_path / "three").fingerprint == load(one).fingerprint


def test_tiktoken_file(tmp_path):
    original = trained("llama3", specials=(), nfc=False)
    tokens = sorted(original.get_vocab().items(), key=lambda item: item[1])
    lines = [base64.b64encode(zoo._unspell(token)) + b" %d\n" % i for token, i in tokens]
    (tmp_path / "x.tiktoken").write_bytes(b"".join(lines))
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<mask>": len(tokens)}))
    ours = load(tmp_path, pattern=LLAMA3)
    same(ours, original, nasty()[::20] + TEXT)
    assert ours.specials == {"<mask>": len(tokens)}
    with pytest.raises(ValueError, match="do not say how text is split"):
        load(tmp_path)
    (tmp_path / "x.tiktoken").write_bytes(b"".join(lines[1:]))
    with pytest.raises(ValueError, match="no token for 1 of the 256 bytes"):
        load(tmp_path, pattern=LLAMA3)


def set_at(*path, value):
    def change(data):
        for key in path[:-1]:
            data = data[key]
        data[path[-1]] = value

    return change


def before(pattern):
    """One more splitting pattern, in front."""
    step = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"}
    return lambda data: data["pre_tokenizer"]["pretokenizers"].insert(0, step)


def split_at(*path, value):
    """Another value in the list of splitting steps."""
    return set_at("pre_tokenizer", "pretokenizers", *path, value=value)


def regex(pattern):
    """Another pattern in the first of them."""
    return split_at(0, "pattern", "Regex", value=pattern)


TWO_NORMALIZERS = {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Strip"}]}


@pytest.mark.parametrize("change, message", [
    (set_at("model", "type", value="Unigram"), "type = 'Unigram'"),
    (set_at("model", "byte_fallback", value=True), "byte_fallback = True"),
    (set_at("model", "dropout", value=0.1), "dropout = 0.1"),
    (set_at("model", "end_of_word_suffix", value="</w>"), "end_of_word_suffix"),
    (set_at("normalizer", value={"type": "Lowercase"}), "only NFC or none"),
    (set_at("normalizer", value=TWO_NORMALIZERS), "only NFC or none"),
    (set_at("pre_tokenizer", value=None), "pre-tokenizer"),
    (set_at("pre_tokenizer", value={"type": "Metaspace", "replacement": "_"}), "Metaspace"),
    (split_at(0, "behavior", value="Removed"), "Removed"),
    (split_at(1, "add_prefix_space", value=True), "add_prefix_space"),
    (regex(r"\s+$|[^$]"), "can mean something else"),
    (regex(r"\w+|\W+"), "can mean something else"),
    (regex(r"(unclosed"), "Parsing error"),
    (lambda d: d["pre_tokenizer"]["pretokenizers"].pop(), "does not end in ByteLevel"),
    (before(r"\w+"), r": \\w is not supported"),
    (before(r"[^\s\S]"), r": \\S is not supported"),
    (before(r"a[^b^]"), "is not supported"),
    (before(r"(a)"), "group"),
    (before(r"[\P{L}]"), r": \\P\{L\} is not supported"),
    (before(r"\p{Xx}"), "category"),
    (lambda d: d["added_tokens"][0].update(lstrip=True), "has lstrip"),
    (lambda d: d["added_tokens"][0].update(id=1000), "another id"),
    (lambda d: d["added_tokens"].append({"id": 1000, "content": "<eos>"}), "two ids"),
    (lambda d: d["added_tokens"].append({"id": 9, "content": "<new>"}), "same id"),
    (lambda d: d["added_tokens"].append({"id": d["model"]["vocab"]["a"], "content": "a"}), "ordinary token"),
    (lambda d: d["model"]["merges"].append(["q", "qqq"]), "not in the vocabulary"),
    (lambda d: d["model"]["vocab"].pop("!"), "no token for 1 of the 256 bytes"),
    (lambda d: d["model"]["vocab"].update({"!": 5}), "same id"),
    (lambda d: d["model"].pop("merges"), "malformed"),
    (lambda d: d.pop("pre_tokenizer"), "malformed"),
])  # fmt: skip
def test_what_cannot_be_reproduced_is_refused_in_one_line(change, message, tmp_path):
    with pytest.raises(ValueError, match=message) as error:
        load(hub(tmp_path, trained("qwen", 300), change))
    assert str(error.value).startswith(f"{tmp_path / 'tokenizer.json'}: ")


def test_folders_without_a_readable_tokenizer(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"^no tokenizer in .*: expected tokenizer\.json"):
        load(tmp_path)
    for text in ("{", "[]", '{"kind": "bpe"}', '{"kind": "else"}', "\udcff"):
        (tmp_path / "tokenizer.json").write_bytes(text.encode("utf-8", "surrogateescape"))
        with pytest.raises(ValueError, match=r"tokenizer\.json: ") as error:
            load(tmp_path)
        assert "\n" not in str(error.value)
    (tmp_path / "tokenizer.json").rename(tmp_path / "vocab.json")
    with pytest.raises(ValueError, match="vocab.json: "):
        load(tmp_path)


def test_hub_files_are_copied_byte_for_byte(qwen, tmp_path):
    ours, _ = qwen
    CharTokenizer("a", []).save(tmp_path)  # an earlier tokenizer
    ours.save(tmp_path)
    kept = {"vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json",
            "tokenizer_config.json", "chat_template.jinja"}  # fmt: skip
    assert {path.name for path in tmp_path.iterdir()} == kept
    assert all((tmp_path / name).read_bytes() == (SDAR / name).read_bytes() for name in kept)


def test_truncated(qwen, tmp_path):
    ours, original = qwen
    lines = (SDAR / "merges.txt").read_text(encoding="utf-8").split("\n")[1:4097]
    merges = [tuple(line.split(" ")) for line in lines]
    size = 256 + len(merges)
    vocab = {token: i for token, i in original.get_vocab().items() if i < size}
    want = Original(models.BPE(vocab=vocab, merges=merges))
    want.normalizer, want.pre_tokenizer = original.normalizer, original.pre_tokenizer
    want.decoder = original.decoder
    want.add_tokens([AddedToken("<eos>", normalized=False), AddedToken("<mask>", normalized=False)])
    small = truncated(ours, size, ["<eos>", "<mask>"])
    assert small.specials == {"<eos>": size, "<mask>": size + 1} and small.vocab_size == size + 2
    same(small, want, nasty()[::10] + TEXT + ["<mask><eos><think>"])
    small.save(tmp_path)
    again = load(tmp_path)
    assert again.fingerprint == small.fingerprint
    assert again.encode("the <mask>", True) == small.encode("the <mask>", True)
    for wrong in (255, len(ours.merged) + 1):
        with pytest.raises(ValueError, match=f"not {wrong}$"):
            truncated(ours, wrong, [])
    permuted = trained("qwen")
    folder = hub(tmp_path / "permuted", permuted)
    assert list(truncated(load(folder), 300, []).merged.values()) == list(range(300))


@given(st.text(), st.lists(st.sampled_from(["<mask>", "<eos>", "x", "é"]), max_size=4))
def test_bytes(text, pieces):
    ours = bytes_tokenizer(["<eos>", "<mask>"])
    assert ours.encode(text) == list(text.encode()) and ours.decode(ours.encode(text)) == text
    ids = [i for p in pieces for i in ([ours.specials[p]] if p in ours.specials else p.encode())]
    text = "".join(pieces)
    assert ours.encode(text, allow_special=True) == ids and ours.decode(ids) == text


@given(st.lists(st.characters(exclude_categories=["Cs"]), unique=True, min_size=1), st.data())
def test_characters(chars, data):
    ours = CharTokenizer(chars, ["<eos>", "<mask>"])
    text = data.draw(st.text(st.sampled_from(chars)))
    assert ours.encode(text) == [chars.index(c) for c in text] and ours.decode(ours.encode(text)) == text
    V = len(chars)
    assert ours.vocab_size == V + 2 and ours.specials == {"<eos>": V, "<mask>": V + 1}
    assert ours.encode("<mask>" + text, allow_special=True) == [V + 1, *ours.encode(text)]


def test_characters_outside_the_vocabulary():
    ours = CharTokenizer("ab\n", ["<mask>"])
    assert ours.decode([0, 3, 2]) == "a<mask>\n"
    with pytest.raises(ValueError) as error:
        ours.encode("abéx")
    assert str(error.value) == "character 'é' (U+00E9) is not in the vocabulary of 3 characters"
    for wrong in (("aa", []), (["ab"], []), ("a", ["a"]), ("a", ["<m>", "<m>"]), ("a", [""])):
        with pytest.raises(ValueError, match="different"):
            CharTokenizer(*wrong)
    with pytest.raises(ValueError, match="different"):
        bytes_tokenizer(["<m>", "<m>"])
    with pytest.raises(ValueError, match="ordinary token as well"):
        bytes_tokenizer(["m"])


@pytest.mark.parametrize("ours", [CharTokenizer("ab", []), bytes_tokenizer([])])
def test_lone_surrogates(ours):
    with pytest.raises(ValueError, match=r"lone surrogate U\+DCFF at position 2"):
        ours.encode("ab\udcff")


def test_fingerprint_and_saving_our_own_format(tmp_path):
    single = {bytes([b]): b for b in range(256)}
    merged = {**single, b"ab": 256, b"bc": 257}
    swapped = {**single, b"bc": 257, b"ab": 256}  # the same ids, another merge order
    m = {"<m>": 300}
    kinds = [
        CharTokenizer("ab", ["<m>"]), CharTokenizer("ba", ["<m>"]), CharTokenizer("ab", ["<n>"]),
        CharTokenizer("ab<", []), bytes_tokenizer(["<m>"]), bytes_tokenizer(["<n>"]),
        BPETokenizer(merged, [GPT2], m), BPETokenizer(swapped, [GPT2], m), BPETokenizer(merged, [QWEN], m),
        BPETokenizer(merged, [GPT2], {"<m>": 301}), BPETokenizer(merged, [GPT2], m, nfc=True),
        BPETokenizer(merged, [r"\p{N}", GPT2], m), BPETokenizer(merged, [GPT2], m, decoded={299: b"zz"}),
    ]  # fmt: skip
    assert len({ours.fingerprint for ours in kinds}) == len(kinds)
    for ours in kinds:
        ours.save(tmp_path)
        again = load(tmp_path)
        assert again.fingerprint == ours.fingerprint
        assert again.tokens == ours.tokens and again.specials == ours.specials
        text = "ab<m>ab" if "<m>" in ours.specials or isinstance(ours, BPETokenizer) else "abab"
        assert again.encode(text, bool(ours.specials)) == ours.encode(text, bool(ours.specials))
    assert kinds[6].encode("abc") != kinds[7].encode("abc")
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.json"]


def test_an_interrupted_save_leaves_the_old_file(tmp_path, monkeypatch):
    CharTokenizer("ab", []).save(tmp_path)
    before = (tmp_path / "tokenizer.json").read_bytes()

    def full(descriptor):
        raise OSError("no space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="no space"):
        CharTokenizer("cd", []).save(tmp_path)
    assert (tmp_path / "tokenizer.json").read_bytes() == before
