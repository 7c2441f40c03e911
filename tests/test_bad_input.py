"""Wrong command lines of every script: one line on stderr that says what is wrong, exit code 2, and soon.

The values are those that once ended in a traceback, in hours of work or in nothing at all: what is no number,
sizes beyond memory or beyond 64 bits, devices that are none, and "--".
"""
import contextlib
import importlib
import re
import sys

import pytest

import data
import sample
import train
import zoo.__main__ as commands
from zoo.tools import command

TASKS = {name: importlib.import_module(f"data.{name}.prepare") for name in data.names()}
SCRIPTS = ["train", "sample", *TASKS]
HUGE, LONG = str(2**31), "9" * 5000
WRONG = {
    "whole": ["", "x", "1.5", "nan", HUGE, f"-{2**31 + 1}", str(2**64), LONG, "--", "1\n2", "\x1b[31m"],
    "number": ["", "x", "nan", "inf", "-inf", "1e39", "1e308", LONG, "--", "\udcff"],
    "text": ["--"], "switch": ["1", "--"],
}  # fmt: skip


def start(script: str, argv: list[str]) -> None:
    """As `python SCRIPT.py ARGV` would."""
    main = {"train": train.main, "sample": sample.main}.get(script)
    if script == "zoo":
        commands.main(argv)
    elif main:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [f"{script}.py", *argv])
            command.run(main)
    else:
        command.run(lambda: TASKS[script].main(argv))


def told(script: str, argv: list[str], capsys) -> str:
    """The line that ends a wrong command."""
    with pytest.raises(SystemExit) as end:
        start(script, argv)
    lines = capsys.readouterr().err.splitlines(keepends=True)
    assert end.value.code == 2 and lines[-1].startswith("error: ") and lines[-1].endswith("\n"), argv
    assert lines[-1].removesuffix("\n").isprintable() and len(lines[-1]) < 1100, argv
    assert not [line for line in lines[:-1] if line.startswith(("error", "Traceback", "usage"))], argv
    return lines[-1]


def options_of(script: str) -> dict[str, str]:
    """Option -> what kind of value it takes, from the script's own parser."""

    class Seen(Exception):
        pass

    def look(parser, *_):
        raise Seen(parser._actions)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command.Parser, "parse_known_args", look)
        with pytest.raises(Seen) as seen:
            TASKS[script].main([]) if script in TASKS else sys.modules[script].main()
    kinds = {}
    for action in seen.value.args[0]:
        read = getattr(action.type, "__qualname__", "").split(".")[0]
        kind = "switch" if action.nargs == 0 else read if read in WRONG else "text"
        kinds[action.option_strings[-1].replace("--no-", "--")] = kind
    return {name: kind for name, kind in kinds.items() if name != "--help"}


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_option_takes_a_value_of_another_kind(script, capsys):
    options = options_of(script)
    assert "--out" in options or "--seed" in options
    for name, kind in options.items():
        for value in WRONG[kind]:
            assert f"argument {name}" in told(script, [f"{name}={value}"], capsys)
        if kind in ("whole", "number"):
            assert f"argument {name}" in told(script, [name], capsys)


@pytest.mark.parametrize("script", [*SCRIPTS, "zoo"])
@pytest.mark.parametrize("argv", [
    ["--lrr=1"], ["-x"], ["word"], ["--a\nb=1"], ["--\x1b[2J"], ["--=1"], ["--=--"], ["---"], ["\udcff"],
    ["--help=1"], ["--", "word"],
])  # fmt: skip
def test_no_script_takes_an_option_it_does_not_have(script, argv, capsys):
    assert "--help" in told(script, argv, capsys)


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Two tiny data sets: puzzles, and a text."""
    folder = tmp_path_factory.mktemp("sets")
    (folder / "in.txt").write_text("to be or not to be. " * 60)
    with contextlib.redirect_stdout(None):
        TASKS["sudoku"].main(["--train=8", "--val=4", "--test=4", f"--out={folder / 'sudoku'}"])
        TASKS["shakespeare_char"].main([f"--source={folder / 'in.txt'}", f"--out={folder / 'text'}"])
    return folder


MUCH = "is more than ten times the .* that are free: choose smaller sizes, or --force to go on"
SMALL = ["--stage=base", "--batch_size=2", "--n_layer=1", "--n_head=1", "--d_model=8", "--device=cpu"]


@pytest.mark.parametrize("argv,words", [
    (["--n_head=1000000000"], MUCH), (["--d_model=10000000"], MUCH),
    (["--d_model=1000000000"], "out of memory, smaller sizes need less"),
    (["--d_model=2147483647", "--n_head=2147483647"], "out of memory, smaller sizes need less"),
    (["--batch_size=1048576", "--d_model=4096"], MUCH), (["--batch_size=2147483647"], "at most 1,048,576"),
    (["--n_layer=1000000000"], "n_layer=1000000000 must be at most 1,000"),
    (["--buffer=1000000000"], "buffer=1000000000 must be at most 1,000"),
    (["--window=1000000000"], "window=1000000000 must be at most 1,000"),
    (["--accumulate=2147483647"], "accumulate=2147483647 must lie between 1 and batch_size=2"),
    (["--data=text", "--length=1000000000"], MUCH),
    (["--data=text", "--length=121"], "length=121: the val split of shakespeare_char has 120 tokens"),
    (["--ema=1.5"], "ema=1.5 must be at most 1"), (["--warmup=2"], "warmup=2.0 must be at most 1"),
    (["--ema=-1"], "ema=-1.0 must not be negative"), (["--beta2=1"], "beta"),
    (["--block_size=-1"], "block_size=-1 must not be negative"), (["--seed=-1"], "seed=-1 must not"),
    (["--device=cpu:x"], "device='cpu:x' is not available here; available: .*cpu"),
    (["--device=cpu:-1"], "device='cpu:-1'"), (["--device=cuda:99"], "device='cuda:99'"),
    (["--device=cpu:0"], "device='cpu:0'"), (["--device=meta"], "device='meta'"), (["--device=:"], "':'"),
    (["--device=cpu\n"], r"device='cpu\\n'"), (["--recipe=a\nb"], r"recipe='a\\nb'"),
    (["--data=no\x1b[2Jwhere"], r"no data set 'no\\x1b\[2Jwhere'"), (["--name=\0"], "null"),
])  # fmt: skip
def test_train(argv, words, sets, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "matmul_rate", lambda device, dtype: 1e12)  # takes 0.2 s
    argv = [arg.replace("--data=text", f"--data={sets / 'text'}") for arg in argv]
    line = told("train", [f"--data={sets / 'sudoku'}", *SMALL, *argv], capsys)
    assert re.search(words, line), line


@pytest.mark.parametrize("argv,words", [
    (["--num_samples=1000000000"], "num_samples=1000000000 must be at most 10,000"),
    (["--num_samples=0"], "num_samples=0 must be at least 1"), (["--seed=-1"], "seed=-1 must be at least 0"),
    (["--batch_size=-2147483648"], "batch_size=-2147483648 must be at least 1"),
    (["--start=self", "--self_passes=1000000000"], "self_passes=1000000000 must lie between 1 and 1,000"),
    (["--prompt=12", "--max_new=1000000000"], "the prompt has 2 cells"),
    (["--device=cpu:x"], "device='cpu:x' is not available here"), (["--device=cpu:-1"], "'cpu:-1'"),
    (["--device=mps:9"], "device='mps:9'"), (["--device=\udcff"], r"\\udcff"),
    (["--model=no\nwhere"], r"no model 'no\\nwhere'"), (["--model=\x1b[31m"], r"no model '\\x1b\[31m'"),
    (["--prompt=12\x073"], r"\\x07"), (["--html=no\nwhere/x.html"], r"cannot write no\\nwhere/x.html"),
    (["--eval=no\rwhere"], r"no data set 'no\\rwhere'"), (["--infill=ab"], "infill='ab' must be one"),
    ([f"--model={'m' * 5000}"], "name too long"),
])  # fmt: skip
def test_sample(argv, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    quick = [] if argv[0].startswith("--eval") else ["--steps=1"]
    line = told("sample", ["--device=cpu", *quick, *argv], capsys)
    assert re.search(words, line, re.IGNORECASE), line


@pytest.mark.parametrize("task,argv,words", [
    ("sums", ["--train=1000000000"], "--train: '1000000000' is no whole number from 1 to 10,000,000"),
    ("sudoku", ["--test=0"], "--test: '0'"), ("latin", ["--seed=-1"], "--seed: '-1'"),
    ("sums", ["--terms=1"], "from 2 to 20"), ("sums", ["--digits=7"], "from 1 to 6"),
    ("latin", ["--size=10"], "from 3 to 9"), ("latin", ["--given=36"], "--given goes from 0 to 35"),
    ("gsm8k", ["--length=2147483647"], "--length: '2147483647' is no whole number from 0 to 1,048,576"),
    ("math500", ["--length=-1"], "--length: '-1'"), ("gsm8k", ["--pack", "--block=0"], "--block: '0'"),
    ("openr1_math", ["--samples=-1"], "--samples: '-1'"), ("aime", ["--year=2023"], "--year: invalid choice"),
    ("openmathinstruct2", ["--workers=-1"], "--workers: '-1'"),
    ("openmathinstruct2", ["--source=a\nb", "--tokenizer=bytes"], r"a\\nb"),
    ("openr1_math", ["--source=--"], "argument --source: '--' is no value"),
    ("gsm8k", ["--source=a\nb"], r"a\\nb/train.jsonl"),
    ("shakespeare_char", ["--source=a\x1b]0;b"], r"a\\x1b\]0;b"),
])  # fmt: skip
def test_data(task, argv, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    line = told(task, ["--out=out", *argv], capsys)
    assert re.search(words, line), line
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("argv,words", [
    ([], "required: command"), (["lost"], "invalid choice: 'lost'"), (["info"], "required: name"),
    (["info", "--"], "required: name"), (["check", "no\nwhere"], r"no folder no\\nwhere"),
    (["info", "no\x1b[31m"], r"no model 'no\\x1b\[31m'"), (["download", "x", "--revision=--"], "'--' is no"),
    (["list", "more"], "unrecognized arguments: more"), (["check", "."], "it has no config.json"),
])  # fmt: skip
def test_zoo(argv, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert re.search(words, told("zoo", argv, capsys))


@pytest.mark.parametrize("error", [
    MemoryError(), MemoryError("Unable to allocate 7 TiB"), RuntimeError("CUDA out of memory. Tried\nto"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    RuntimeError("Storage size calculation overflowed with sizes=[9]"),
])  # fmt: skip
def test_too_little_memory_is_one_line(error, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit) as end:
        command.run(main)
    message = capsys.readouterr().err
    assert end.value.code == 2 and message.startswith("error: out of memory, smaller sizes need less: ")
    assert message.count("\n") == 1 and not message.endswith(": \n")


def test_a_fault_of_ours_still_shows_where_it_is():
    def main():
        raise RuntimeError("an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal"):
        command.run(main)


@pytest.mark.parametrize("message,shown", [
    ("a\nb\x1b[0m", r"a\nb\x1b[0m"), ("漢字 é", "漢字 é"), ("\u2028\udcff\x85", r"\u2028\udcff\x85"),
    ("x" * 1001, "x" * 1000 + " ..."), (ValueError("\t"), r"\t"),
])  # fmt: skip
def test_a_message_is_one_line(message, shown):
    assert command.escaped(message) == shown
