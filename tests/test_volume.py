"""sample.py --prompts: every record is what denoise() gives that prompt alone, and a kill costs nothing."""

import copy
import dataclasses
import functools
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import tiny_model

import rcd
import sample
from zoo import files
from zoo.decoding import Decoding
from zoo.tokenizer import bytes_tokenizer
from zoo.tools import command, volume

ROOT = Path(__file__).resolve().parents[1]
BYTES = bytes_tokenizer(["<eos>", "<mask>"])
PROMPTS = ["one", "a longer prompt", "", "ö two", "x" * 30, "last"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> tuple[Path, rcd.Transformer]:
    """A block-causal target in bytes. Some of its answers reach an end token."""
    folder = tmp_path_factory.mktemp("volume") / "text"
    model = tiny_model(4, vocab_size=258, mask_id=257, block_size=8, max_len=68, eos_ids=(256,), pad_id=256)
    with torch.no_grad():
        model.embedding[256] *= 3
    files.save(model, folder)
    BYTES.save(folder)
    sampler = {"rule": "threshold", "threshold": 0.3}
    (folder / "train.json").write_text(json.dumps({"stage": "target", "sampler": sampler}))
    return folder, model


@pytest.fixture
def cli(model, tmp_path, monkeypatch, capsys):
    """cli(*options) -> (exit code, stderr) of sample.py on in.jsonl and out.jsonl, in this process."""
    monkeypatch.chdir(tmp_path)

    def call(*options: str) -> tuple[int, str]:
        files = ["--prompts=in.jsonl", "--out=out.jsonl"]
        argv = ["sample.py", f"--model={model[0]}", "--device=cpu", "--dtype=float32", *files, *options]
        monkeypatch.setattr(sys, "argv", argv)
        try:
            command.run(sample.main)
            code = 0
        except SystemExit as end:
            code = end.code
        return code, capsys.readouterr().err

    return call


def write(prompts: list[str], **more: list) -> None:
    given = [dict(zip(more, fields), prompt=p) for p, *fields in zip(prompts, *more.values())]
    Path("in.jsonl").write_text("".join(json.dumps(g) + "\n" for g in given))


def records(but: tuple[str, ...] = ("seconds",)) -> list[dict]:
    lines = Path("out.jsonl").read_text(encoding="utf-8").splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in but} for line in lines]


@pytest.fixture(scope="module")
def alone(model) -> list[tuple[list[int], int] | None]:
    """The answer and the NFE of each prompt by itself. None: two confidences are so close that rounding
    decides."""
    double, sampler = copy.deepcopy(model[1]).double(), rcd.Sampler(rule="threshold", threshold=0.3)
    found = []
    for prompt in PROMPTS:
        [ids], [nfe] = rcd.generate(model[1], [list(prompt.encode())], 20, sampler)
        same = rcd.generate(double, [list(prompt.encode())], 20, sampler)[0] == [ids]
        found.append((ids, nfe) if same else None)
    return found


@pytest.mark.parametrize("size", [1, 4, 16])
def test_a_record_is_what_the_prompt_gets_alone(cli, alone, size):
    write(PROMPTS, id=[*range(6)])
    assert cli("--max_new=20", f"--batch_size={size}")[0] == 0
    got = records()
    assert [r["prompt"] for r in got] == PROMPTS and [r["line"] for r in got] == [1, 2, 3, 4, 5, 6]
    ended, compared = 0, 0
    for r, answer in zip(got, alone, strict=True):
        if answer is None:
            continue
        compared += 1
        (ids, nfe), prompt = answer, r["prompt"].encode()
        assert r["response"] == bytes(ids).decode("utf-8", "replace") and r["nfe"] == nfe
        filled = -(-(len(prompt) + 20) // 8) * 8 - len(prompt)
        ended += len(ids) < filled
        assert r["tokens"] <= filled and (len(ids) < filled or r["tokens"] == filled)
        assert r["tokens_per_step"] == round(r["tokens"] / r["nfe"], 3)
        assert r["settings"]["threshold"] == 0.3 and r["settings"]["carry"] == "residual"
    assert compared >= 4 and 0 < ended < 6


def test_a_run_that_was_cut_off_anywhere_goes_on(cli, monkeypatch):
    """Killed after any batch, and inside any of its lines: no record is doubled, lost or filled again."""
    write(PROMPTS)
    options = ("--max_new=9", "--batch_size=2")
    cli(*options)
    whole, wanted = Path("out.jsonl").read_bytes(), records()
    lines, fill, filled = whole.splitlines(keepends=True), volume.fill, []

    def counting(s, canvases, dtype, *seeds):
        filled.extend(canvases)
        return fill(s, canvases, dtype, *seeds)

    monkeypatch.setattr(volume, "fill", counting)
    for done in ([], [5], [4, 1], [1, 4, 0, 3, 2], [0, 1, 2, 3, 4, 5]):
        for half in (b"", lines[-1][:1], lines[-1][:40], lines[-1][:-1]):
            Path("out.jsonl").write_bytes(b"".join(lines[i] for i in done) + half)
            filled.clear()
            assert cli(*options)[0] == 0
            assert records() == wanted and len(filled) == 6 - len(done)


def test_a_run_that_is_cut_off_twice_leaves_whole_lines(cli, monkeypatch):
    write(PROMPTS)
    cli("--max_new=9", "--batch_size=2")
    wanted, fill, begun = records(), volume.fill, []

    def once(*arguments):
        begun.append(arguments)
        if len(begun) > 1:
            raise KeyboardInterrupt
        return fill(*arguments)

    Path("out.jsonl").write_bytes(Path("out.jsonl").read_bytes().split(b"\n")[0] + b'\n{"line": 2, "sam')
    monkeypatch.setattr(volume, "fill", once)
    assert cli("--max_new=9", "--batch_size=2")[0] == 130 and len(records()) == 3  # each line is whole
    monkeypatch.setattr(volume, "fill", fill)
    assert cli("--max_new=9", "--batch_size=2")[0] == 0 and records() == wanted


def test_a_killed_process_goes_on(cli, model, tmp_path):
    """SIGKILL in the middle of a run of 24 prompts. This process goes on with it."""
    write([f"prompt {i}" for i in range(24)])
    script = [sys.executable, str(ROOT / "sample.py"), f"--model={model[0]}", "--device=cpu"]
    options = ["--steps=24", "--max_new=24", "--batch_size=2"]
    files = ["--prompts=in.jsonl", "--out=out.jsonl", "--dtype=float32"]
    process = subprocess.Popen([*script, *files, *options], stderr=subprocess.DEVNULL, cwd=tmp_path)
    out, begin = tmp_path / "out.jsonl", time.monotonic()
    while not (out.exists() and out.read_bytes().count(b"\n") >= 3):
        assert process.poll() is None and time.monotonic() - begin < 60
        time.sleep(0.01)
    process.kill()
    process.wait()
    before = out.read_bytes()
    whole = before[: before.rfind(b"\n") + 1].splitlines()
    assert 3 <= len(whole) < 24
    assert cli(*options)[0] == 0
    after = out.read_bytes().splitlines()
    assert [json.loads(line)["prompt"] for line in after] == [f"prompt {i}" for i in range(24)]
    assert {*whole} <= {*after}  # to the last byte, the seconds too


def test_a_seed_decides_what_its_line_gets(cli):
    """Samples differ, and those of another seed too. The same line in another file, at another place, gets
    the same ones."""
    options = ("--max_new=8", "--temperature=1", "--num_samples=5", "--batch_size=3")
    write(PROMPTS[:3], seed=[7, 8, 7])
    cli(*options)
    first = records(("seconds", "line"))
    by_line = [[r["response"] for r in first[k : k + 5]] for k in (0, 5, 10)]
    assert [r["sample"] for r in first] == [1, 2, 3, 4, 5] * 3
    assert all(len({*responses}) > 1 for responses in by_line) and by_line[0] != by_line[2]
    Path("out.jsonl").unlink()
    write([PROMPTS[0], *PROMPTS[2::-1]], seed=[1, 7, 8, 7])
    cli(*options)
    second = records(("seconds", "line"))
    assert second[5:] == [*first[10:], *first[5:10], *first[:5]]
    assert {r["response"] for r in second[:5]}.isdisjoint(r["response"] for r in first)
    # A batch that was written in part is drawn again, to the same end.
    lines = Path("out.jsonl").read_bytes().splitlines(keepends=True)
    Path("out.jsonl").write_bytes(b"".join(lines[:1] + lines[6:9]))
    cli(*options)
    assert records(("seconds", "line")) == second


def test_a_learned_policy_draws():
    assert volume.draws(Decoding(rule="policy", policy="a file"))


one_layer = functools.cache(functools.partial(tiny_model, n_layer=1))


@pytest.mark.parametrize("rule", sorted(set(rcd.RULES) - {"wino", "policy"}))  # these have conditions
@pytest.mark.parametrize("start", ["cold", "self", "dirichlet"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_draws_says_whether_the_generator_is_used(rule, start, temperature):
    """The generator itself is the witness: what draws nothing leaves its state as it was."""
    s = Decoding(rule=rule, start=start, temperature=temperature, steps=4 if rule != "threshold" else 0)
    generator = torch.Generator().manual_seed(0)
    before, canvas = generator.get_state(), torch.full((1, 6), 11)
    for _ in rcd.denoise(one_layer(), canvas, s, generator=generator):
        pass
    assert volume.draws(s) == (not torch.equal(before, generator.get_state()))


@pytest.mark.parametrize("content, says", [
    ('{"prompt": "a"}\n{"prompt": 1}\n', "in.jsonl, line 2: expected a JSON object"),
    ('"a"\n', "in.jsonl, line 1: expected"), ("{\n", "in.jsonl, line 1: expected"), ("", "holds no prompt"),
    ('{"prompt": "a", "id": "\\ud800"}\n', "in.jsonl, line 1: expected"),
    ('{"prompt": "a", "seed": -1}\n', "seed=-1"), ('{"prompt": "a", "seed": "1"}\n', "seed='1'"),
    ('{"prompt": "a", "response": ""}\n', "'response'"),
    ('{"prompt": "a"}\n{"prompt": "' + "x" * 70 + '"}\n', "in.jsonl, line 2: a prompt of 70 tokens leaves"),
])  # fmt: skip
def test_a_wrong_line_is_named(cli, content, says):
    Path("in.jsonl").write_text(content)
    code, err = cli("--max_new=4")
    assert code == 2 and err.splitlines()[-1].startswith("error: ") and says in err.splitlines()[-1]
    assert not Path("out.jsonl").exists()


@pytest.mark.parametrize("options, says", [
    (["--num_samples=2"], "2 times the same"), (["--prompt=a"], "excludes"), (["--out="], "belong together"),
    (["--out=in.jsonl"], "would be overwritten"), (["--out=no/where.jsonl"], "there is no folder no"),
])  # fmt: skip
def test_options_that_cannot_be(cli, options, says):
    write(["a"])
    code, err = cli("--max_new=4", *options)
    assert code == 2 and says in err.splitlines()[-1]
    assert Path("in.jsonl").read_text() == '{"prompt": "a"}\n'


def test_a_file_of_something_else_is_left_alone(cli):
    write(["a", "b"])
    cli("--max_new=4")
    ours = Path("out.jsonl").read_text()
    first, second = ours.splitlines(keepends=True)
    other_prompt, no_settings = first.replace('"a"', '"c"'), json.dumps({**json.loads(first), "settings": 1})
    zero, nine = (first.replace('"line": 1', f'"line": {n}') for n in (0, 9))
    other_seed = second.replace('"seed": 1339', '"seed": 5')
    for text in ("my notes", "my notes\n", first + first, first + "my notes", other_prompt, other_seed,
                 no_settings + "\n", "{}\n", "[]\n", zero, nine):  # fmt: skip
        Path("out.jsonl").write_text(text)
        code, err = cli("--max_new=4")
        assert code == 2 and "out.jsonl is no unfinished file of these prompts" in err, text
        assert Path("out.jsonl").read_text() == text
    Path("out.jsonl").write_text(first)
    code, err = cli("--max_new=4", "--threshold=0.5")
    assert code == 2 and "threshold=0.3, now it is 0.5" in err
    assert Path("out.jsonl").read_text() == first


def test_a_prompt_with_masks_gives_the_whole_canvas(cli, monkeypatch):
    """The shipped model fills a grid; the answer is what a Sudoku solver by hand gives."""
    write(["___56____3_12______4__2_65________1_"])
    assert cli("--model=sudoku/target")[0] == 0
    (r,) = records()
    assert r["response"] == "134562562341216453345126651234423615" and r["tokens"] == 26
    groups = [*(range(i, i + 6) for i in range(0, 36, 6)), *(range(i, 36, 6) for i in range(6))]
    assert all({r["response"][i] for i in group} == {*"123456"} for group in groups)


def test_settings_hold_every_sampler_option(cli):
    write(["a"])
    cli("--max_new=4", "--temperature=0.5")
    settings = records()[0]["settings"]
    assert settings["temperature"] == 0.5
    assert {f.name for f in dataclasses.fields(Decoding)} <= settings.keys()
