"""sample.py, its canvases, viewers and evaluation: what is printed, drawn and written is what denoise() did.

A mistake is one line. The models are tiny and random.
"""

import dataclasses
import io
import json
import os
import re
import subprocess
import sys
import threading
import time
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_model
from hypothesis import given
from hypothesis import strategies as st

import rcd
import sample
import train
import zoo
from data import canvases
from data.sudoku import prepare
from rcd import Residual, Sampler, denoise
from zoo import files
from zoo import tokenizer as tokenizers
from zoo.decoding import Carry, Decoding
from zoo.rivals import carries
from zoo.tools import command, evaluate, viewers

ROOT = Path(__file__).resolve().parents[1]
PUZZLE = "1_3__6" + "_" * 12 + "4_6123" + "______" + "31_5__"  # 6x6, any digits
DIGITS = tokenizers.CharTokenizer("123456", ["<mask>"])
BYTES = tokenizers.bytes_tokenizer(["<eos>", "<mask>"])


def save_run(folder: Path, tokenizer, meta: dict, seed: int, **config) -> rcd.Transformer:
    model = tiny_model(seed, vocab_size=tokenizer.vocab_size, mask_id=tokenizer.specials["<mask>"], **config)
    files.save(model, folder)
    tokenizer.save(folder)
    (folder / "train.json").write_text(json.dumps(meta))
    return model


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Run folders under out/: grid (target and reference), blocks and text (block-causal), stream."""
    out = tmp_path_factory.mktemp("sample") / "out"
    target, reference = {"data": "sudoku", "stage": "target"}, {"data": "sudoku", "stage": "reference"}
    paired = {**target, "reference": "../reference"}
    base = {"data": "shakespeare_char", "stage": "base"}
    few = tokenizers.CharTokenizer("\n abcde", ["<mask>"])
    ends = dict(eos_ids=(256,), pad_id=256)
    models = {
        "grid/target": save_run(out / "grid/target", DIGITS, paired, 1, max_len=36),
        "grid/reference": save_run(out / "grid/reference", DIGITS, reference, 2, max_len=36),
        "blocks": save_run(out / "blocks", DIGITS, target, 3, block_size=6, max_len=36),
        "text": save_run(out / "text", BYTES, {"stage": "target"}, 4, block_size=8, max_len=68, **ends),
        "stream": save_run(out / "stream", few, base, 5, max_len=40),
    }
    return out.parent, models


@pytest.fixture
def cli(runs, monkeypatch, capsys):
    """cli(*options) -> (exit code, stdout, stderr) of sample.py beside the run folders, in this process."""
    monkeypatch.chdir(runs[0])

    def call(*options: str, stdin: bytes = b"") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["sample.py", "--device=cpu", "--dtype=float32", *options])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        try:
            command.run(sample.main)
            code = 0
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    return call


def by_hand(model, canvas: str, sampler: Sampler, reference=None) -> tuple[list[str], int]:
    """The canvas after every forward, as text, and the NFE."""
    ids = torch.tensor([[model.config.mask_id if c == "_" else DIGITS.ids[c] for c in canvas]])
    steps = list(denoise(model, ids, sampler, Residual(), reference=reference))
    return ["".join("123456_"[i] for i in step.tokens[0].tolist()) for step in steps], int(steps[-1].nfe[0])


# ------------------------------------------------------------------------------------------------------------
# Plain text


@pytest.mark.parametrize("sampler", [
    Sampler(steps=5), Sampler(rule="threshold", threshold=0.3), Sampler(steps=4, start="warm"),
])  # fmt: skip
def test_plain_lines_are_the_steps(cli, runs, sampler):
    models = runs[1]
    name = "threshold" if sampler.rule == "threshold" else "steps"
    option = f"--{name}={getattr(sampler, name)}"
    code, out, _ = cli("--model=grid/target", f"--prompt={PUZZLE}", f"--start={sampler.start}", option)
    states, nfe = by_hand(models["grid/target"], PUZZLE, sampler, models["grid/reference"])
    lines = out.splitlines()
    assert code == 0 and "\x1b" not in out
    assert lines[: len(states) + 1] == [f"{i:3} {state}" for i, state in enumerate([PUZZLE, *states])]
    final = states[-1]
    assert all(g in ("_", f) for g, f in zip(PUZZLE, final))
    assert lines[len(states) + 1 :][:8] == ["", *(" ".join(final[i : i + 6]) for i in range(0, 36, 6)), ""]
    tokens = PUZZLE.count("_")
    numbers = re.fullmatch(r"(\d+) tokens, (\d+) NFE, ([\d.]+) tokens/step, [\d,]+ tokens/s", lines[-1])
    assert numbers.groups() == (str(tokens), str(nfe), f"{tokens / nfe:.2f}")


def test_samples_of_several_batches(cli):
    """Five canvases in batches of two: three are seen live, each is printed once, numbers are of all."""
    several = ["--num_samples=5", "--batch_size=2"]
    code, out, _ = cli("--model=grid/target", f"--prompt={PUZZLE}", "--steps=3", *several)
    assert code == 0
    assert len(re.findall(r"^  3 \d{36}$", out, re.M)) == 3
    assert re.findall(r"^RCD (\d):$", out, re.M) == list("12345")
    assert f"{5 * PUZZLE.count('_')} tokens, 15 NFE, " in out.splitlines()[-1]


def test_compare_runs_seqd_on_the_reference(cli, runs):
    models = runs[1]
    _, out, err = cli("--model=grid/target", f"--prompt={PUZZLE}", "--steps=4", "--compare")
    seqd, _ = by_hand(models["grid/reference"], PUZZLE, Sampler(steps=4, carry="none"))
    target, _ = by_hand(models["grid/target"], PUZZLE, Sampler(steps=4))
    steps = [f"{i:3} {a} | {b}" for i, (a, b) in enumerate(zip([PUZZLE, *seqd], [PUZZLE, *target]))]
    assert out.splitlines()[:6] == [f"    {'SeqD (reference)':36} | RCD", *steps]
    assert "SeqD runs on the reference, out/grid/reference" in err
    _, out, err = cli("--model=blocks", f"--prompt={PUZZLE}", "--steps=6", "--compare")
    seqd, _ = by_hand(models["blocks"], PUZZLE, Sampler(steps=6, carry="none"))
    lines = out.splitlines()
    assert lines[0].startswith("    SeqD (same weights)") and lines[7].startswith(f"  6 {seqd[-1]} | ")
    assert "SeqD runs on the model's own weights" in err


def test_text_is_continued(cli, runs):
    """A byte-level prompt: continued by whole blocks, decoded as a whole, no control character is printed."""
    model = runs[1]["text"]
    code, out, _ = cli("--model=text", "--prompt=naïve 日本\x1b[31m", "--max_new=20", "--steps=9", "--seed=3")
    ids = BYTES.encode("naïve 日本\x1b[31m")
    responses, nfe = rcd.generate(model, [ids], 20, Sampler(steps=9))
    lines = out.splitlines()
    masks = -(-(len(ids) + 20) // 8) * 8 - len(ids)
    assert code == 0 and lines[0] == "  0 naïve 日本␛[31m" + "_" * masks
    assert not any(unicodedata.category(c) == "Cc" for c in out.replace("\n", ""))
    shown = "".join(viewers.glyphs(BYTES.decode(ids + responses[0]), "\n"))
    assert shown.replace("\n", "↵") in out and f", {nfe[0]} NFE, " in lines[-1]
    whole_blocks = "_" * 61  # blocks of 8 within 68
    assert cli("--model=text", "--prompt=xyz", "--steps=9")[1].startswith(f"  0 xyz{whole_blocks}\n")


CHAT = tokenizers.bytes_tokenizer(["<eos>", "<mask>", "<|im_start|>", "<|im_end|>"])
CHAT_CONFIG = dict(eos_ids=(256,), pad_id=256, max_len=64)
ASKED = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("block_size", [4, 0])
def test_a_chat_models_answer_is_text(cli, runs, block_size):
    """The answer on stdout, the numbers on stderr; several answers in a row; --no-stream shows the steps."""
    meta = {"template": "qwen3", "stage": "target"}
    model = save_run(runs[0] / "out/chat", CHAT, meta, 9, block_size=block_size, **CHAT_CONFIG)
    ids = CHAT.encode(ASKED, allow_special=True)
    [response], [nfe] = rcd.generate(model, [ids], 20, Sampler(rule="threshold", threshold=0.2))
    text = "".join(viewers.glyphs(CHAT.decode(response), "\n"))
    options = ["--model=chat", "--prompt=Hi", "--max_new=20", "--threshold=0.2"]
    assert len(text) > 5 and "\t" not in CHAT.decode(response)
    for more in ([], ["--plain"]):
        code, out, err = cli(*options, *more)
        assert code == 0 and out == text + "\n"
        assert re.fullmatch(rf"\d+ tokens, {nfe} NFE, .*", err.splitlines()[-1])
    three = "".join(f"\nRCD {i}:\n{text}\n" for i in (1, 2, 3))
    assert cli(*options, "--num_samples=3", "--batch_size=2")[1] == three
    asked = ASKED.replace("\n", "↵")
    assert cli(*options, "--no-stream")[1].startswith(f"  0 {asked}____")
    assert f" {asked}____" in cli(*options, "--compare")[1]
    assert cli(options[0], "--prompt=a_b", "--infill=_", "--steps=1")[1].startswith("  0 a_b\n")


def test_an_answer_appears_as_its_blocks_fill(cli, runs, monkeypatch, capsys):
    """Seven commits by hand. A character is printed when its bytes are there and no mask is before it."""
    save_run(runs[0] / "out/chat4", CHAT, {"template": "qwen3"}, 9, block_size=4, **CHAT_CONFIG)
    start, seen = len(CHAT.encode(ASKED, allow_special=True)), []
    answer = [*"é\tab日\x1b!".encode(), 256]
    # cells of the answer that a step commits, and the text that is complete after it
    script = [
        ([1, 2], ""), ([0], "é\t"), ([4, 5, 6], ""), ([3], "ab"), ([7], "日"), ([9, 10], ""), ([8], "␛!"),
    ]  # fmt: skip

    def scripted(model, canvas, *_rest, **_more):
        for number, (cells, _text) in enumerate(script):
            committed = torch.zeros_like(canvas, dtype=torch.bool)
            committed[0, [start + i for i in cells]] = True
            canvas[0, [start + i for i in cells]] = torch.tensor([answer[i] for i in cells])
            if number == len(script) - 1:
                canvas[0, start + len(answer) :] = 256
            alpha, nfe = torch.zeros(canvas.shape), torch.tensor([number + 1])
            yield rcd.Step(0, canvas.clone(), committed, committed.float(), alpha, nfe)
            seen.append(capsys.readouterr().out)

    monkeypatch.setattr(sample, "denoise", scripted)
    code, out, _ = cli("--model=chat4", "--prompt=Hi", "--max_new=16")
    assert code == 0 and seen == [text for _, text in script] and out == "\n"


def test_draws_depend_on_the_seed_only(cli):
    options = ["--model=stream", "--temperature=1", "--steps=4"]
    first, again, other = (cli(*options, f"--seed={seed}")[1].splitlines()[4] for seed in (1, 1, 2))
    assert first == again != other


def test_prompts_from_everywhere(cli, tmp_path):
    """Typed, from a file, from stdin; with white space; "_" and "." are masks if they are no characters."""
    file = tmp_path / "puzzle.txt"
    file.write_text("\n".join(PUZZLE[i : i + 6].replace("_", ".") for i in range(0, 36, 6)))
    outputs = []
    for prompt in (PUZZLE, file, "-"):
        out = cli("--model=grid/target", "--steps=2", f"--prompt={prompt}", stdin=PUZZLE.encode() + b"\n")[1]
        outputs.append(out.splitlines()[:-1])  # without the numbers, which hold a time
    assert outputs[0][0] == f"  0 {PUZZLE}" and outputs[0] == outputs[1] == outputs[2]
    assert cli("--model=stream", "--prompt=a_ b", "--steps=1")[1].startswith("  0 a_ b\n")
    assert cli("--model=text", "--prompt=a_b*c*", "--infill=*", "--steps=2")[1].startswith("  0 a_b_c_\n")
    assert cli("--model=stream", "--steps=2")[1].startswith("  0 " + "_" * 40 + "\n")  # no prompt: all of it


def test_examples_are_drawn_with_the_seed(cli, runs):
    """Without a prompt: new test examples, prepared as the model's data set was. Answers are checked."""
    tokenizer = tokenizers.CharTokenizer("0123456789+=,.", ["<eos>", "<mask>"])
    prepared = "python data/sums/prepare.py --terms 3 --digits 1 --train 5000"
    meta = {"data": "sums", "data_command": prepared, "stage": "target"}
    save_run(runs[0] / "out/sums", tokenizer, meta, 6, max_len=12, eos_ids=(14,), pad_id=14)
    firsts = []
    for seed in (1, 1, 2):
        code, out, err = cli("--model=sums", "--steps=2", f"--seed={seed}")
        assert code == 0 and out.splitlines()[-1].endswith(", 0/1 right")
        firsts.append(out.splitlines()[0])
    assert cli("--model=sums", "--steps=2", "--num_samples=3")[1].splitlines()[-1].endswith(", 0/3 right")
    dot = cli("--model=sums", "--prompt=1+2+3=3,_.", "--steps=1")[1]  # "." is one of its characters
    assert dot.startswith("  0 1+2+3=3,_.\n")
    assert firsts[0] == firsts[1] != firsts[2]
    assert all(re.fullmatch(r"  0 \d\+\d\+\d=_{6}", line) for line in firsts)


@pytest.mark.parametrize("typed, expected", [
    ([], dict(rule="threshold", threshold=0.6, steps=7, carry="residual")),  # the model's own
    (["--threshold=0.4"], dict(rule="threshold", threshold=0.4, steps=0)),
    (["--steps=3"], dict(rule="static", steps=3)),
    (["--steps=3", "--threshold=0.4"], dict(rule="threshold", threshold=0.4, steps=3)),
    (["--entropy_bound=0.2"], dict(rule="entropy-bounded", entropy_bound=0.2, steps=0)),
    (["--factor=0.5"], dict(rule="factor", factor=0.5, steps=0)),
    (["--kl_bound=0.1"], dict(rule="klass", kl_bound=0.1, steps=0)),
    (["--rescue=0.7"], dict(rule="r2", rescue=0.7, steps=0)),
    (["--revoke=0.8", "--threshold=0.6"], dict(rule="wino", revoke=0.8, threshold=0.6, steps=0)),
    (["--rule=margin"], dict(rule="margin", steps=7)),
    (["--steps=3", "--rule=random", "--carry=none"], dict(rule="random", steps=3, carry="none")),
])  # fmt: skip
def test_typed_options_win_over_the_models_own(cli, runs, monkeypatch, typed, expected):
    own = {"rule": "threshold", "threshold": 0.6, "steps": 7}
    meta = {"stage": "target", "sampler": own, "residual": {"t_res": 0.5}}
    save_run(runs[0] / "out/own", DIGITS, meta, 7)
    seen = []
    monkeypatch.setattr(sample, "watch", lambda o, settings, *rest: seen.extend(settings))
    cli("--model=own", *typed)
    assert {name: getattr(seen[0].sampler, name) for name in expected} == expected
    assert seen[0].residual == Carry(t_res=0.5)
    cli("--model=stream", "--steps=2")
    assert (seen[1].label, seen[1].sampler.carry) == ("SeqD", "none")  # a base has never read residuals


# ------------------------------------------------------------------------------------------------------------
# The terminal


class Screen:
    """As much of a terminal as viewers.Terminal uses: rows of (character, style), `height` of them in sight.

    There is no right edge.
    """

    def __init__(self, height: int):
        self.rows, self.row, self.column, self.height = [[]], 0, 0, height

    def feed(self, text: str) -> None:
        style = ""
        for code, c in re.findall(r"\x1b\[([\d;]*[A-Za-z])|((?s:.))", text):
            if code.endswith("m"):
                style = code[:-1] if code != "0m" else ""
            elif code.endswith("F"):
                assert int(code[:-1]) <= min(self.row, self.height - 1)  # the cursor stops at the upper edge
                self.row, self.column = self.row - int(code[:-1]), 0
            elif code == "K":
                del self.rows[self.row][self.column :]
            elif code == "J":
                del self.rows[self.row][self.column :], self.rows[self.row + 1 :]
            elif c == "\n":
                self.row, self.column = self.row + 1, 0
                self.rows += [[]] * (self.row == len(self.rows))
                self.rows = [list(row) for row in self.rows]
            elif c != "\r":
                assert c.isprintable() and not code, (code, c)
                self.rows[self.row][self.column : self.column + 1] = [(c, style)]
                self.column += 1

    def text(self) -> list[str]:
        return ["".join(c for c, _ in row).rstrip() for row in self.rows]


@pytest.fixture
def terminal(cli, monkeypatch):
    """terminal(*options) -> Screen: the same, with a pseudo-terminal of 80 x 24 as stdout."""

    def call(*options: str, **environment: str) -> Screen:
        usual = {"COLUMNS": "80", "LINES": "24", "TERM": "xterm-256color", "NO_COLOR": ""}
        for name, value in {**usual, **environment}.items():
            monkeypatch.setenv(name, value)
        master, slave = os.openpty()
        chunks = []

        def drain() -> None:
            while chunk := read(master):
                chunks.append(chunk)

        def read(fd: int) -> bytes:
            try:
                return os.read(fd, 1 << 16)
            except OSError:  # Linux: the other end is closed
                return b""

        reader = threading.Thread(target=drain)
        reader.start()
        with monkeypatch.context() as m, open(slave, "w", encoding="utf-8") as stdout:
            m.setattr(sys, "stdout", stdout)
            m.setattr(time, "sleep", lambda seconds: None)
            code = cli(*options)[0]
        reader.join()
        os.close(master)
        assert code == 0
        screen = Screen(int(os.environ["LINES"]))
        screen.feed(b"".join(chunks).decode())
        return screen

    return call


def test_terminal_shows_a_grid_in_place(terminal, runs):
    models = runs[1]
    screen = terminal("--model=grid/target", f"--prompt={PUZZLE}", "--steps=5", "--compare")
    a, _ = by_hand(models["grid/reference"], PUZZLE, Sampler(steps=5, carry="none"))
    b, _ = by_hand(models["grid/target"], PUZZLE, Sampler(steps=5))
    grids = [[" ".join(states[-1][i : i + 6]) for i in range(0, 36, 6)] for states in (a, b)]
    text = screen.text()
    assert text[1:7] == [f"    {x:36} │ {y}" for x, y in zip(*grids)]  # one picture is left of the six
    assert text[8].split("│")[1].strip() == "RCD step 5, 0 left" and text[9] == ""
    assert max(map(len, text[:9])) <= 80
    styles = [style for row in screen.rows[1:7] for _, style in row[4:15:2]]
    for i, style in enumerate(styles):
        step = next(k for k, state in enumerate(a, 1) if state[i] != "_")  # that committed it
        colour, inverted = viewers.RAMP[(step - 1) * 11 // 4], 7 if step == 5 else 0
        assert style == (f"{inverted};38;5;{colour}" if PUZZLE[i] == "_" else "")


@pytest.mark.parametrize("option", ["--steps=3", "--steps=99", "--threshold=0.99"])
def test_the_ramp_is_used_from_end_to_end(terminal, option):
    """Also if the budget is above the number of masks, or unknown: a step fills at least one mask."""
    screen = terminal("--model=grid/target", f"--prompt={PUZZLE}", option)
    colours = {style.split(";")[-1] for row in screen.rows[1:7] for _, style in row if style}
    assert {str(viewers.RAMP[0]), str(viewers.RAMP[-1])} <= colours


def test_terminal_shows_short_text_line_by_line(terminal):
    screen = terminal("--model=stream", "--prompt=abc", "--steps=3", "--max_new=10")
    lines = [line for line in screen.text() if re.match(r" *\d+ abc", line)]
    assert [line[:3] for line in lines] == ["  0", "  1", "  2", "  3"]
    assert lines[0] == "  0 abc" + "·" * 10 and not set(lines[3]) & set(viewers.SHADES)


def test_terminal_streams_an_answer(terminal, runs):
    save_run(runs[0] / "out/chat8", CHAT, {"template": "qwen3"}, 9, block_size=4, **CHAT_CONFIG)
    screen = terminal("--model=chat8", "--prompt=Hi", "--max_new=8")
    assert not any(style for row in screen.rows for _, style in row)
    text = "\n".join(screen.text())
    assert not any(c in text for c in viewers.SHADES + "_") and "user" not in text


def test_masks_are_shaded_by_alpha(terminal):
    """A residual of fixed weight has the shade of that weight. A weight of 0 has the lowest."""
    shades = {}
    for weight in ("0", "0.2", "0.5", "0.9"):
        carry = ["--carry=residual", "--weight=fixed", f"--fixed={weight}"]
        screen = terminal("--model=stream", "--prompt=abc", "--steps=4", "--max_new=10", *carry)
        first = "".join(line for line in screen.text() if line.startswith("  1 "))
        shades[weight] = set(first) & set(viewers.SHADES)
    assert shades == {"0": {"·"}, "0.2": {"░"}, "0.5": {"▒"}, "0.9": {"▓"}}


def test_long_text_never_outgrows_the_screen(terminal, runs):
    """40 columns, 8 rows: cut while it runs, for the cursor to come back; whole at the end."""
    screen = terminal("--model=text", "--prompt=日本語 " + "x\n" * 5, "--steps=12", COLUMNS="40", LINES="8")
    text = screen.text()
    assert text[1:7] == ["    日本語 x↵", *["    x↵"] * 4, text[6]]
    assert sum("日本語" in line for line in text) == 1
    assert not any(c in viewers.SHADES for line in text[1:-4] for c in line)


@pytest.mark.parametrize("options, environment", [
    (["--plain"], {}), ([], {"NO_COLOR": "1"}), ([], {"TERM": "dumb"}),
])  # fmt: skip
def test_no_colours_where_they_are_not_wanted(terminal, options, environment):
    screen = terminal("--model=grid/target", f"--prompt={PUZZLE}", "--steps=2", *options, **environment)
    assert not any(style for row in screen.rows for _, style in row)
    assert screen.text()[0] == f"  0 {PUZZLE}"


@given(st.text(st.characters(exclude_categories=()), max_size=30))
def test_no_control_character_reaches_a_terminal(text):
    out = viewers.glyphs(text, "\n")
    assert all(c.isprintable() or c == "\n" for glyph in out for c in glyph)
    assert not out or unicodedata.category(out[0][0]) not in ("Mn", "Me")
    assert "".join(out).count("\n") == text.count("\n")
    if text.isprintable() and not any(unicodedata.category(c) in ("Mn", "Me") for c in text):
        assert "".join(out) == text


def test_combining_marks_stay_with_their_letter():
    assert viewers.glyphs("e\u0301x\u0302\u0303", "") == ["e\u0301", "x\u0302\u0303"]
    assert viewers.glyphs("\u0301\n\u0301", "↵\n") == ["◌\u0301", "↵", "\n", "◌\u0301"]


LOADED_BYTES = files.Loaded(tiny_model(vocab_size=258, mask_id=257), BYTES, Path(), None, {}, {})


@given(st.lists(st.one_of(st.integers(0, 255), st.none()), min_size=1, max_size=24))
def test_pieces_are_the_decoded_text(ids):
    """Between masks the pieces together are what the tokenizer decodes, also if a mask cuts a character."""
    trace = viewers.Trace("", LOADED_BYTES, [257 if i is None else i for i in ids])
    pieces = trace.pieces()
    assert all(piece == "" for piece, i in zip(pieces, ids) if i is None)
    for between in re.finditer("o+", "".join("x" if i is None else "o" for i in ids)):
        at = slice(*between.span())
        assert "".join(pieces[at]) == BYTES.decode(ids[at])


def test_lines_are_as_wide_as_asked():
    """A wide character takes two columns and is not cut. A mark of its own stands on a circle."""
    trace = viewers.Trace("", LOADED_BYTES, BYTES.encode("ab日本\ncde\u0301f"))
    viewer = viewers.Terminal([trace], str, plain=True, budget=0)
    assert viewer.lines(trace, viewer.in_a_row, "\n", 3) == ["ab ", "日 ", "本 ", "cde", "◌\u0301f "]


# ------------------------------------------------------------------------------------------------------------
# The page


def panels_of(page: str) -> list[dict]:
    return json.loads(re.search(r"const {panels, vocabulary} = (.*), last = ", page)[1])["panels"]


def test_page_is_not_broken_by_a_token(runs):
    """A token that would end the script, as those of pretrained vocabularies may."""
    tokenizer = tokenizers.CharTokenizer("ab", ["</script><script>alert(1)</script>", "<mask>"])
    loaded = files.Loaded(tiny_model(vocab_size=4, mask_id=3), tokenizer, Path(), None, {}, {})
    page = viewers.page([viewers.Trace("<b>", loaded, [0, 2, 3])], ["<i>"], str)
    assert page.count("<script>") == page.count("</script>") == 1 and "<b>" not in page
    assert panels_of(page)[0]["text"] == ["a", "</script><script>alert(1)</script>", ""]


def test_page_holds_the_run_and_nothing_else(cli, runs, tmp_path):
    model, file = runs[1]["text"], tmp_path / "run.html"
    prompt = "</script><script>alert(1)</script> é\u2028"
    options = ["--max_new=16", "--steps=6", "--compare", f"--html={file}"]
    code, out, _ = cli("--model=text", f"--prompt={prompt}", *options)
    page = file.read_text(encoding="utf-8")
    assert code == 0
    assert not re.search(r"https?:|//[a-z]|\bsrc\s*=|<link|url\(|@import|<img|<iframe", page)
    assert page.count("<script>") == page.count("</script>") == 1
    assert "alert(1)<" not in page and "\u2028" not in page
    panels = panels_of(page)
    assert [p["label"] for p in panels] == ["SeqD (same weights)", "RCD"]
    assert [p["stats"] for p in panels] == [line.split(": ", 1)[1] for line in out.splitlines()[-2:]]
    canvas, lengths = rcd.canvas_for(model.config, [BYTES.encode(prompt)], 16)
    steps = list(denoise(model, canvas, Sampler(steps=6), Residual()))
    panel = panels[1]
    assert panel["to_fill"] == (canvas[0] == model.config.mask_id).tolist()
    assert panel["layout"] == list(range(int(lengths[0])))
    assert len(panel["steps"]) == len(steps)
    for number, (cells, step) in enumerate(zip(panel["steps"], steps), 1):
        looked = step.confidence[0].nonzero()[:, 0].tolist()
        assert [i for i, *_ in cells] == looked
        for i, confidence, alpha, top in cells:
            assert confidence == top[0][1] and len(top) == 5  # the likeliest token is the one that is drawn
            assert (panel["committed_at"][i] == number) == bool(step.committed[0, i])
            expected = step.confidence[0, i].item(), step.alpha[0, i].item()
            assert (confidence, alpha) == pytest.approx(expected, abs=5.1e-4)  # rounded to three places
    assert "".join(panel["text"]).startswith("</script><script>alert(1)</script> é ")


def test_page_lays_out_a_grid(cli, tmp_path):
    file, options = tmp_path / "run.html", ["--steps=2", "--num_samples=2"]
    cli("--model=grid/target", f"--prompt={PUZZLE}", *options, f"--html={file}")
    panels = panels_of(file.read_text(encoding="utf-8"))
    assert [p["label"] for p in panels] == ["RCD 1", "RCD 2"]
    rows = [list(range(i, i + 6)) for i in range(0, 36, 6)]
    assert panels[0]["layout"] == [x for row in rows for x in (["\n"] if row[0] else []) + row]
    assert list(tmp_path.iterdir()) == [file]


def test_svg_is_the_animation_of_the_first_canvas(cli, tmp_path):
    """The same bytes again. What it shows: tests/test_viewers.py."""
    options = ["--model=grid/target", f"--prompt={PUZZLE}", "--steps=3", "--num_samples=2", "--compare"]
    for name in "ab":
        assert cli(*options, f"--svg={tmp_path / name}")[0] == 0
    a, b = ((tmp_path / name).read_bytes() for name in "ab")
    assert a == b and b'aria-label="SeqD (reference) 1 and RCD 1 fill a canvas in 3 steps"' in a


# ------------------------------------------------------------------------------------------------------------
# Evaluation


def test_eval_table_is_a_recount(cli, runs, tmp_path):
    """Puzzles whose solutions are SeqD's in 4 steps, but for one: the table says so, and a recount agrees."""
    models, rng, seqd = runs[1], np.random.default_rng(0), Sampler(steps=4, carry="none")
    puzzles = ["".join(rng.choice(list("123456_"), 36, p=[0.14] * 6 + [0.16])) for _ in range(4)]
    solved = [by_hand(models["grid/reference"], p, seqd)[0][-1] for p in puzzles]
    wrong = puzzles[0].index("_")
    solved[0] = solved[0][:wrong] + str(int(solved[0][wrong]) % 6 + 1) + solved[0][wrong + 1 :]
    ids = torch.tensor([["123456_".index(c) for c in p] for p in puzzles])
    file, picture = tmp_path / "p.txt", tmp_path / "p.png"
    file.write_text("\n\n".join(f"{p} {s}" for p, s in zip(puzzles, solved)))
    code, out, _ = cli("--model=grid/target", f"--eval={file}", "--batch_size=1", f"--plot={picture}")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in out.splitlines()]
    assert code == 0 and len({len(line) for line in out.splitlines()}) == 1
    assert set("".join(rows[1])) == {"-", ":"}
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert {row[0] for row in rows[2:]} == {"SeqD", "RCD (cold)", "RCD (warm)"}
    for label, rule, accuracy, nfe, per_step in rows[2:]:
        value = float(re.search(r"[\d.]+", rule)[0])
        way = dict(rule="threshold", threshold=value) if "threshold" in rule else dict(steps=int(value))
        way |= dict(carry="none") if label == "SeqD" else dict(start=label[5:-1])
        model = models["grid/reference" if label == "SeqD" else "grid/target"]
        *_, last = denoise(model, ids, Sampler(**way), Residual(), reference=models["grid/reference"])
        filled = ["".join("123456_"[i] for i in row) for row in last.tokens.tolist()]
        right = sum(a == b for a, b in zip(filled, solved)) / 4
        total = int(last.nfe.sum())
        assert accuracy.startswith(f"{right:.1%} (") and nfe == f"{total / 4:.2f}"
        assert per_step == f"{sum(p.count('_') for p in puzzles) / total:.2f}"
    assert next(row for row in rows if row[:2] == ["SeqD", "static, 4 steps"])[2].startswith("75.0% (")


def test_the_bound_of_an_approximate_delta_is_printed(cli, runs):
    longest = runs[1]["grid/target"].embedding.norm(dim=1).max().item()
    told = cli("--model=grid/target", f"--prompt={PUZZLE}", "--steps=2", "--residual_epsilon=0.25")[2]
    assert f"|Delta - exact| is at most {0.5 * longest:.2g}, " in told
    assert "|Delta" not in cli("--model=grid/target", f"--prompt={PUZZLE}", "--steps=2")[2]


def test_a_model_on_trajectories_has_no_warm_row_unless_asked_for(cli, tmp_path, monkeypatch):
    monkeypatch.setattr(carries, "on_trajectories", lambda recipe: True)
    file = tmp_path / "p.txt"
    file.write_text("_" + ("123456" * 6)[1:] + " " + "123456" * 6)
    for more in ([], ["--start=warm"]):
        code, out, _ = cli("--model=grid/target", f"--eval={file}", *more)
        rows = {line.strip("|").split("|")[0].strip() for line in out.splitlines()[2:]}
        assert code == 0 and rows == {"SeqD", "RCD (cold)", *(["RCD (warm)"] if more else [])}


@pytest.mark.parametrize("line", ["{0}", "{0} {0} {0}", "{1} {1}", "{1} {0}", "{0} {0}", "7{0} {1}"])
def test_a_line_that_is_no_puzzle_is_named(cli, tmp_path, line):
    """One without a cell to fill, too: no step would be taken."""
    file = tmp_path / "p.txt"
    full = "123456" * 6
    file.write_text(f"_{full[1:]} {full}\n" + line.format("_" + full[1:], full))
    code, _, told = cli("--model=grid/target", f"--eval={file}")
    assert code == 2 and "p.txt, line 2: " in told.splitlines()[-1]


def test_a_puzzle_of_another_size_than_the_model_learned_is_named(cli, tmp_path):
    (tmp_path / "p.txt").write_text("_2 12\n")
    code, _, told = cli("--model=sudoku/target", f"--eval={tmp_path}/p.txt")
    assert code == 2 and "p.txt, line 1: expected a canvas of 36 tokens with _" in told.splitlines()[-1]
    loaded = zoo.load("sudoku/target")
    task = dataclasses.replace(canvases.task_of(loaded), layout=str)  # a line of text may be shorter
    assert canvases.Puzzles.read(f"{tmp_path}/p.txt", loaded, task).rows.shape == (2, 1, 2)


def test_no_rule_is_named_as_a_way_out_of_a_carry_that_eval_tries_anyway(cli):
    code, _, told = cli("--eval=sudoku", "--carry=none")
    assert code == 2 and told.splitlines()[-1].endswith("several values of --carry: leave it out")


def test_intervals_are_bootstrap_intervals():
    """Against resampling the items one by one."""
    for correct in ([True] * 60 + [False] * 40, [True] * 3 + [False] * 197, [False] * 50):
        draws = np.random.default_rng(5).choice(correct, (20_000, len(correct))).mean(1)
        assert evaluate.interval(correct) == pytest.approx(np.percentile(draws, (2.5, 97.5)), abs=0.011)


def test_sweep_asks_for_no_fewer_steps_than_blocks(runs):
    models = runs[1]
    settings = evaluate.sweep(None, models["blocks"], None, Decoding(), Carry(), 21.4)
    assert {s.label for s in settings} == {"RCD (cold)"}
    canvas = torch.full((1, 36), 6)
    for setting in settings:
        assert setting.sampler.rule == "threshold" or 6 <= setting.sampler.steps <= 22
        *_, step = denoise(setting.model, canvas, setting.sampler, setting.residual)
        assert not (step.tokens == 6).any()
    target, reference = models["grid/target"], models["grid/reference"]
    free = evaluate.sweep(reference, target, reference, Decoding(), Carry(), 24.0)
    budgets = [s.sampler.steps for s in free if s.label == "SeqD" and s.sampler.rule == "static"]
    assert budgets == [1, 2, 3, 4, 5, 8, 12, 24]
    assert {(s.label, s.sampler.carry, s.sampler.start) for s in free} == {
        ("SeqD", "none", "cold"), ("RCD (cold)", "residual", "cold"), ("RCD (warm)", "residual", "warm"),
    }  # fmt: skip


def test_plot_without_matplotlib_is_one_line(monkeypatch, capsys, tmp_path):
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    row = {"label": "SeqD", "rule": "static", "value": 4, "accuracy": 0.5, "nfe": 4.0, "correct": [True]}
    evaluate.plot([row], tmp_path / "x.png", "")
    says = 'no plot, matplotlib is not installed: pip install -e ".[plot]"\n'
    assert capsys.readouterr().err == says
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------------------
# Mistakes


@pytest.mark.parametrize("options, says", [
    (["--model=nothing"], "no model 'nothing'"),
    (["--prompt=nothing.txt"], "nothing.txt"),
    (["--prompt=" + "7" + PUZZLE[1:]], "character '7'"),
    (["--prompt=123"], "has 3 cells"),
    (["--prompt=" + "1" * 36], "0 to fill"),
    (["--prompt=-"], "prompt is empty"),
    (["--model=blocks", f"--prompt={PUZZLE}", "--steps=2"], "fewer than the"),
    (["--model=blocks", f"--prompt={PUZZLE}", "--start=warm"], "needs the reference"),
    (["--html=no/such/run.html"], "no folder no/such"),
    (["--svg=no/such/run.svg"], "no folder no/such"),
    (["--plot=no/such/run.png", "--eval=sudoku"], "no folder no/such"),
    (["--model=text", "--prompt=" + "x" * 70], "leaves room for 0"),
    (["--model=text", "--prompt=xyz", "--max_new=62"], "leaves room for 61"),
    (["--model=text", "--prompt=x", "--infill=ab"], "one character"),
    (["--num_samples=0"], "num_samples=0"),
    (["--stepz=8"], "--stepz"),
    (["--rule=best"], "rule='best'"),
    (["--factor=0.5", "--revoke=0.8"], "--factor and --revoke belong to different rules"),
    (["--factor=1", "--threshold=0.5"], "--factor and --threshold belong to different rules"),
    (["--rule=static", "--threshold=0.5"], "rule=static does not read --threshold: choose from threshold,"),
    (["--rule=left-to-right", "--factor=2"], "rule=left-to-right does not read --factor: choose from factor"),
    (["--eval=sudoku", "--steps=2", "--carry=none"], "--eval tries several values of --steps and --carry"),
    (["--eval=sudoku", "--threshold=0.6"], "--eval tries several values of --threshold: leave it out"),
    (["--eval=sudoku", "--rule=factor", "--factor=1"], "--eval tries several values of --factor"),
    (["--eval=nowhere.txt"], "--eval=nowhere.txt: there is no such file"),
    (["--html=run.svg", "--svg=./run.svg"], "./run.svg would be overwritten"),
    (["--prompt=bad0.txt", "--html=bad0.txt"], "bad0.txt would be overwritten"),
    (["--reference=grid/reference"], "--reference is read by --compare, --eval and --start=warm"),
    (["--plot=x.png"], "--plot=x.png draws what --eval measures"),
    (["--rule=wino", "--steps=2"], "rule=wino ignores --steps: leave it out"),
    (["--plot=x.foo", "--eval=sudoku"], "name a .png, .svg or .pdf file"),
    (["--html=out"], "cannot write out: it is a folder"),
    (["--weight=learned"], "grid/target has no carry of its own: leave --weight out"),
    (["--eval=sudoku", "--html=run.html"], "--eval excludes --prompt, --compare, --html and --svg"),
    (["--device=abacus"], "device='abacus'"),
    (["--eval=nothing"], "no data set 'nothing'"),
    (["--eval=bad0.txt"], "bad0.txt, line 2"),
    (["--eval=bad1.txt"], "bad1.txt, line 2"),
    (["--eval=bad2.txt"], "bad2.txt, line 2"),
    (["--eval=bad3.txt"], "bad3.txt, line 1"),
    (["--eval=bad4.txt"], "bad4.txt, line 1: character 'x'"),
    (["--reference=stream", f"--prompt={PUZZLE}", "--start=warm"], "another tokenizer"),
    (["--rule=entropy"], "rule='entropy': choose from"),  # the name of an earlier version
    (["--think=2"], "unrecognized arguments: --think=2"),  # likewise
])  # fmt: skip
def test_a_mistake_is_one_line(cli, runs, options, says):
    first = "1_3_ 1234\n"
    bad = [first + "123 456", first + "2_3_ 1234", first + "1_3_ 123_", "1_3_", "1_3x 1234"]
    for number, text in enumerate(bad):
        (runs[0] / f"bad{number}.txt").write_text(text)
    model = [] if any(o.startswith("--model") for o in options) else ["--model=grid/target"]
    code, out, err = cli(*model, *options)
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(errors) == 1 and err.splitlines()[-1] == errors[0] and says in errors[0]
    assert "Traceback" not in err and not re.search(r"[1-6_]{36}\n", out.replace(PUZZLE, ""))


def test_stdin_that_is_not_text(cli):
    code, _, err = cli("--model=grid/target", "--prompt=-", stdin=b"12\xff3")
    assert code == 2 and err.splitlines()[-1] == "error: stdin: byte 2 is not UTF-8; expected a prompt"


def test_the_command_itself(runs):
    """`python sample.py` as a process. A reader that has seen enough, such as `head`, is no error."""
    words = [sys.executable, str(ROOT / "sample.py"), "--model=out/grid/target", f"--prompt={PUZZLE}"]
    words += ["--steps=12", "--num_samples=50", "--batch_size=1"]
    process = subprocess.Popen(words, cwd=runs[0], env={**os.environ, "OMP_NUM_THREADS": "1"},
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip
    assert process.stdout.readline().decode() == f"  0 {PUZZLE}\n"
    process.stdout.close()
    err = process.stderr.read().decode()
    assert process.wait(60) == 0 and len(err.splitlines()) == 2  # the model, the device


def test_the_shipped_checkpoint(cli):
    code, out, _ = cli("--steps=8")
    numbers = r"\d+ tokens, 8 NFE, [\d.]+ tokens/step, [\d,]+ tokens/s, [01]/1 right"
    assert code == 0 and re.fullmatch(numbers, out.splitlines()[-1])


# ---- Defaults and runs of earlier versions


@pytest.fixture
def settings_of(cli, runs, monkeypatch):
    """settings_of(train.json, *options, code=0) -> the Setting that sample.py takes for such a run."""

    def call(meta: dict, *typed: str, code: int = 0) -> evaluate.Setting | None:
        seen = []
        save_run(runs[0] / "out/own", DIGITS, meta, 7)
        with monkeypatch.context() as patch:
            patch.setattr(sample, "watch", lambda o, settings, *rest: seen.extend(settings))
            told = cli("--model=own", *typed)
        assert told[0] == code
        sys.stderr.write(told[2])
        return seen[0] if seen else None

    return call


def test_a_base_was_not_trained_to_read_residuals(settings_of):
    setting = settings_of({"stage": "base"}, "--steps=2")
    assert setting.label == "SeqD" and setting.sampler == Decoding(steps=2, carry="none")


def test_runs_of_earlier_versions_load(settings_of, capsys):
    """train.json with the names that options had: `terms` is residual_top_k, `pool` was read in training.
    `certainty` and `think` were never written; they are not read. A rule of another name is one line."""
    residual = {"weight": "fixed", "fixed": 0.5, "t_res": 1.0, "temper_delta": False, "terms": 3}
    meta = {"stage": "target", "residual": residual, "options": {"pool": 8, "given": 0.0, **residual}}
    sampler = {"rule": "threshold", "threshold": 0.9}
    for extra in ({}, {"certainty": "confidence", "think": 1}):
        setting = settings_of(meta | {"sampler": sampler | extra})
        assert setting.residual == Carry("fixed", 0.5, residual_top_k=3)
        assert setting.sampler == Decoding(**sampler)
    capsys.readouterr()
    assert settings_of(meta | {"sampler": {"rule": "entropy"}}, code=2) is None
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: rule='entropy': choose from ") and "entropy-bounded" in line


@pytest.mark.parametrize("rule, on_a_budget, free, field", [
    ("static", "static", "threshold", "threshold"), ("margin", "margin", "threshold", "threshold"),
    ("threshold", "static", "threshold", "threshold"), ("r2", "static", "r2", "threshold"),
    ("entropy-bounded", "static", "entropy-bounded", "entropy_bound"),
    ("factor", "static", "factor", "factor"),
])  # fmt: skip
def test_a_sweep_over_budgets_and_over_the_rule(tiny, rule, on_a_budget, free, field):
    settings = evaluate.sweep(None, tiny(), None, Decoding(rule=rule), Carry(), 8, [1, 2], [0.5])
    assert [(s.sampler.rule, s.sampler.steps) for s in settings] == [
        (on_a_budget, 1), (on_a_budget, 2), (free, 0),
    ]  # fmt: skip
    assert getattr(settings[-1].sampler, field) == 0.5


def test_a_table_of_another_rule_names_its_values(cli, tmp_path):
    """The shipped model: the smaller the factor, the more passes."""
    prepare.main([f"--out={tmp_path}/puzzles", "--given=14", "--train=8", "--val=8", "--test=8"])
    code, out, _ = cli("--model=sudoku/target", f"--eval={tmp_path}/puzzles", "--limit=1", "--rule=factor")
    rows = re.findall(r"SeqD +\| factor ([\d.]+) +\|.*?\| +([\d.]+) \|", out)
    assert code == 0 and [value for value, _ in rows] == ["2", "1", "0.5", "0.2", "0.05"]
    assert float(rows[0][1]) < float(rows[-1][1])


@pytest.mark.parametrize("script, groups", [
    (sample, (sample.Options, Decoding, Carry)), (train, (train.Train, train.Shape, Carry)),
], ids=["sample", "train"])  # fmt: skip
def test_help_explains_every_option(monkeypatch, capsys, script, groups):
    """With the whole comment behind its field, in as many lines as that has, and its default."""
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", "--help"])
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit) as end:
        script.main()
    out = capsys.readouterr().out
    assert end.value.code == 0 and script.__doc__.rstrip().splitlines()[-1] in out
    for group in groups:
        for field in dataclasses.fields(group):
            kind = f", --no-{field.name}" if field.type is bool else f" {field.type.__name__.upper()}"
            (note,) = re.findall(rf"^  --{field.name}{kind}\s+(.+)$", out, re.M)
            assert len(note.split()) > 1 and not note.endswith((",", ";", "|"))
            told = field.default in ("", None) or "default: " in note  # something implies it
            assert told != note.endswith(f" [{field.default}]")
