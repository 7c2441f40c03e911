"""Data sets against brute force: every oracle here is written without looking at the generators."""
import functools
import http.server
import importlib
import itertools
import json
import random
import re
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st
from real_files import SHARED, needed
from tiny_checkpoints import qwen3, write
from tiktoken_ext import openai_public

import data
from data import common
from data.aime import prepare as aime
from data.gsm8k import prepare as gsm8k
from data.latin import prepare as latin
from data.math500 import prepare as math500
from data.openmathinstruct2 import prepare as openmath
from data.openr1_math import prepare as openr1
from data.shakespeare_bpe import prepare as shakespeare_bpe
from data.shakespeare_char import prepare as shakespeare
from data.sudoku import prepare as sudoku
from data.sums import prepare as sums
from zoo import tokenizer as tokenizers

ROOT = Path(__file__).resolve().parents[1]
SMALL = ["--train", "400", "--val", "40", "--test", "60"]
FEW = ("--train", "60", "--val", "15", "--test", "15")
NINE = ["--size", "9", "--train", "12", "--val", "4", "--test", "4"]
EIGHT = ("--pairs", "--size", "8")
GENERATED = {"sums": [], "latin": [], "sudoku": FEW, "latin9": NINE, "sudoku9": NINE}


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """made("latin", *options) -> Dataset; each is prepared once."""
    @functools.cache
    def make(name, *argv):
        folder = tmp_path_factory.mktemp(name)
        task = importlib.import_module(f"data.{name.rstrip('9')}.prepare")
        solutions, squares = sudoku.Rules.solutions, latin.latin_squares
        with pytest.MonkeyPatch.context() as patch:
            # As many boards at a time as are asked for, and some: not 2,048, nor 1,024.
            chains = 64 if name == "latin9" else 512
            patch.setattr(latin, "latin_squares", functools.partial(squares, chains=chains))
            if name == "sudoku9" or "--pairs" in argv:
                patch.setattr(sudoku.Rules, "solutions", lambda r, rng, n: solutions(r, rng, n // 8))
            task.main([*SMALL, *GENERATED[name], *argv, "--out", str(folder)])
        return data.load(folder)
    return make


def canvases(dataset, split):
    """(solution, given) as strings, decoded by the list of characters rather than by the tokenizer."""
    names = {i: name for name, i in dataset.tokenizer.specials.items()}
    spell = [names.get(i) or dataset.tokenizer.chars[i] for i in range(dataset.meta["vocab_size"])]
    for ids, response in zip(dataset.tokens(split).tolist(), dataset.response(split).tolist()):
        yield "".join(spell[i] for i in ids), "".join("_" if r else spell[i] for i, r in zip(ids, response))


def cells(dataset, split):
    """canvases(), as digits where a token is two of them."""
    if not dataset.meta.get("pairs"):
        yield from canvases(dataset, split)
        return
    names = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz+="
    digits = "12345678"[: dataset.meta["size"]]
    two = dict(zip(names, map("".join, itertools.product(digits, repeat=2)))) | {"_": "__"}
    for texts in canvases(dataset, split):
        yield tuple("".join(two[character] for character in text) for text in texts)


# ---- sums

@pytest.mark.parametrize("argv", [(), ("--terms", "4", "--digits", "2"), ("--terms", "3", "--digits", "4")])
def test_sums_are_running_sums(made, argv):
    dataset = made("sums", *argv)
    assert [len(dataset.tokens(split)) for split in data.SPLITS] == [400, 40, 60]
    for split in data.SPLITS:
        for solution, shown in canvases(dataset, split):
            prompt, answer = solution.replace("<eos>", "").split("=")
            terms = [int(term) for term in prompt.split("+")]
            assert len(terms) == dataset.meta["terms"]
            assert {len(term) for term in prompt.split("+")} == {dataset.meta["digits"]}
            assert answer == ",".join(str(sum(terms[:k])) for k in range(2, len(terms) + 1)) + "."
            assert shown == prompt + "=" + "_" * (dataset.meta["length"] - len(prompt) - 1)
            assert re.fullmatch(r"[^<]*(<eos>)*", solution)


def test_sums_check(made):
    dataset = made("sums")
    assert all(re.fullmatch(r"[\d+]+=[\d,]+\.", dataset.show(ids)) for ids in dataset.tokens("val"))
    ok = "11+22+33=33,66.<eos><eos>"
    assert sums.check(ok, ok, "11+22+33=________")
    assert sums.check("11+22+33=33,66.<eos>7", ok, "")
    for wrong in ("33,67.<eos><eos>", "34,66.<eos><eos>", "33,66_<eos><eos>", "33,66.6<eos>"):
        assert not sums.check("11+22+33=" + wrong, ok, "")


def test_splits_of_sums_share_no_terms_in_any_order(made):
    dataset, problems = made("sums", "--terms", "2", "--digits", "2"), {}
    for split in data.SPLITS:
        prompts = [solution.split("=")[0] for solution, _ in canvases(dataset, split)]
        problems[split] = {tuple(sorted(prompt.split("+"))) for prompt in prompts}
    assert all(not problems[a] & problems[b] for a, b in itertools.combinations(data.SPLITS, 2))


# ---- grids

def lines(n, boxes=None):
    """Index sets that must hold every digit once."""
    found = [[r * n + c for c in range(n)] for r in range(n)]
    found += [[r * n + c for r in range(n)] for c in range(n)]
    if boxes:
        h, w = boxes
        corners = itertools.product(range(0, n, h), range(0, n, w))
        found += [[(top + i) * n + left + j for i in range(h) for j in range(w)] for top, left in corners]
    return found


def completions(grid, n, groups):
    """All ways to fill the "_" of a grid, by plain backtracking on the tightest cell."""
    grid = list(grid)
    peers = [{i for group in groups if cell in group for i in group} - {cell} for cell in range(n * n)]
    empty = [cell for cell in range(n * n) if grid[cell] == "_"]
    free = {cell: set("123456789"[:n]) - {grid[i] for i in peers[cell]} for cell in empty}
    if not free:
        yield "".join(grid)
        return
    cell = min(free, key=lambda i: len(free[i]))
    for digit in sorted(free[cell]):
        yield from completions([*grid[:cell], digit, *grid[cell + 1:]], n, groups)


def same_up_to_names(grid):
    """The cells of every digit: equal for two grids exactly when one is the other with digits renamed."""
    places = {}
    for i, digit in enumerate(grid):
        places.setdefault(digit, []).append(i)
    return frozenset(map(tuple, places.values()))


@pytest.mark.parametrize("name,argv,n,boxes,shown", [
    ("latin", (), 6, None, 10), ("latin", ("--size", "5", "--given", "3"), 5, None, 3),
    ("latin9", (), 9, None, 22), ("sudoku", (), 6, (2, 3), 9), ("sudoku9", ("--given", "40"), 9, (3, 3), 40),
    ("sudoku9", (), 9, (3, 3), 32), ("sudoku", ("--no_boxes",), 6, None, 12),
    ("sudoku", ("--given", "20", *SMALL), 6, (2, 3), 20),
    ("sudoku", ("--pairs", "--given", "8"), 6, (2, 3), 16),
    ("sudoku", ("--pairs", "--no_boxes", "--given", "8"), 6, None, 16),
    ("sudoku", EIGHT, 8, (2, 4), 24), ("sudoku", (*EIGHT, "--no_boxes"), 8, None, 28),
    ("sudoku", ("--size", "8"), 8, (2, 4), 20),
    ("sudoku", ("--size", "8", "--no_boxes"), 8, None, 25)])  # fmt: skip
def test_grids_are_valid_and_splits_share_none_up_to_renaming(made, name, argv, n, boxes, shown):
    dataset, classes = made(name, *argv), {}
    width = 1 + ("--pairs" in argv)  # cells of a token
    assert dataset.meta["length"] == n * n // width and dataset.meta["vocab_size"] == n**width + 1
    assert dataset.mask_id == n**width and dataset.eos_id is None
    for split in data.SPLITS:
        classes[split] = set()
        for solution, puzzle in cells(dataset, split):
            assert all(sorted(solution[i] for i in line) == list("123456789"[:n]) for line in lines(n, boxes))
            assert puzzle.count("_") == n * n - shown
            classes[split].add(same_up_to_names(solution))
    assert all(not classes[a] & classes[b] for a, b in itertools.combinations(data.SPLITS, 2))


@pytest.mark.parametrize("name,argv,n,boxes", [
    ("sudoku", (), 6, (2, 3)), ("sudoku9", (), 9, (3, 3)), ("sudoku", ("--no_boxes",), 6, None),
    ("sudoku", ("--pairs", "--given", "8"), 6, (2, 3)), ("sudoku", EIGHT, 8, (2, 4)),
    ("sudoku", ("--pairs", "--no_boxes", "--given", "8"), 6, None)])  # fmt: skip
def test_sudoku_has_one_solution(made, name, argv, n, boxes):
    for solution, puzzle in cells(made(name, *argv), "test"):
        assert list(itertools.islice(completions(puzzle, n, lines(n, boxes)), 2)) == [solution]


def test_sudoku_solver_agrees_with_backtracking():
    rng, rules, puzzles = random.Random(0), sudoku.Rules(6), []
    for solution in sudoku.Rules(6).solutions(np.random.default_rng(0), 100):
        grid = [str(int(bits).bit_length()) if rng.random() < 0.3 else "_" for bits in solution]
        grid[rng.randrange(36)] = rng.choice("123456")  # some of them have no solution any more
        puzzles.append(grid)
    groups = lines(6, (2, 3))
    pairs = [pair for group in groups for pair in itertools.combinations(group, 2)]
    expected = [next(completions(p, 6, groups), None) is not None
                and all(p[i] == "_" or p[i] != p[j] for i, j in pairs) for p in puzzles]
    boards = np.array([[63 if c == "_" else 1 << int(c) - 1 for c in p] for p in puzzles], np.uint16)
    assert rules.solvable(boards).tolist() == expected and 10 < sum(expected) < 90


def test_latin_check_takes_any_completion(made):
    several, dataset = 0, made("latin")
    tokens, response = np.array(dataset.tokens("test")), np.array(dataset.response("test"))
    for row, (solution, puzzle) in enumerate(itertools.islice(canvases(dataset, "test"), 8)):
        others = list(itertools.islice(completions(puzzle, 6, lines(6)), 50))
        several += len(others) > 1
        assert all(latin.check(other, solution, puzzle) for other in [solution, *others])
        assert dataset.correct(dataset.tokenizer.encode(others[-1]), tokens[row], response[row])
        shifted = solution.translate(str.maketrans("123456", "234561"))  # a square, but other given cells
        assert not latin.check(shifted, solution, puzzle)
        cell = puzzle.index("_")
        assert not latin.check(puzzle, solution, puzzle) and not latin.check(solution[:-1], solution, puzzle)
        for digit in set("123456_") - {solution[cell]}:
            assert not latin.check(solution[:cell] + digit + solution[cell + 1:], solution, puzzle)
    assert several > 5
    for half in ("123456" * 6, "".join(digit * 6 for digit in "123456")):  # right in rows, in columns only
        assert not latin.check(half, half, "_" * 36)


def test_latin_squares_are_uniform():
    """Order 5: each of the 56 squares with first row and column in order stands for equally many squares
    (Pearson's chi-square, 55 degrees of freedom)."""
    start = "12345" + "".join(digit + "____" for digit in "2345")
    reduced = Counter({grid: 0 for grid in completions(start, 5, lines(5))})
    assert len(reduced) == 56
    for squares in itertools.islice(latin.latin_squares(5, np.random.default_rng(1)), 10):
        for square in squares.tolist():
            columns = sorted(zip(*square))
            rows = sorted(zip(*columns))
            reduced["".join(str(s + 1) for row in rows for s in row)] += 1
    expected = reduced.total() / 56
    assert len(reduced) == 56 and expected > 50
    assert sum((count - expected) ** 2 / expected for count in reduced.values()) < 100


def test_grid_layout(made):
    assert latin.layout("12_456789") == "1 2 _\n4 5 6\n7 8 9"
    dataset = made("latin")
    ids, response = dataset.tokens("test")[0], dataset.response("test")[0]
    shown = dataset.show(np.where(response, dataset.mask_id, ids), mask=".")
    assert len(shown.split("\n")) == 6 and shown.replace("\n", " ").split(" ").count(".") == 26
    assert latin.layout("0123456789ABCDEFGH").split("\n")[::5] == ["0 1 2", "F G H"]  # pairs of cells


@pytest.mark.parametrize("task,n,boxes", [(latin, 6, None), (sudoku, 6, (2, 3))])
def test_docstring_example(task, n, boxes):
    rows = [row.split() for row in re.findall(r"^    ((?:[\d_] ){6}    .*)$", task.__doc__, re.MULTILINE)]
    puzzle, solution = ("".join("".join(row[k:k + 6]) for row in rows) for k in (0, 6))
    found = list(itertools.islice(completions(puzzle, n, lines(n, boxes)), 1000))
    assert solution in found and task.check(solution, solution, puzzle) and (task is latin or len(found) == 1)


# ---- all generated sets

@pytest.mark.parametrize("name, argv", [("sums", ()), ("latin", ()), ("sudoku", ("--given", "20"))])
def test_same_seed_same_files(made, name, argv):
    seeds = (), ("--seed", "1337"), ("--seed", "7")
    first, again, other = (made(name, *argv, *FEW, *seed) for seed in seeds)
    files = [path.name for path in first.folder.iterdir() if path.suffix == ".npy"]
    assert len(files) == 6
    for file in files:
        raw = (first.folder / file).read_bytes()
        assert raw == (again.folder / file).read_bytes()
        assert "response" in file or raw != (other.folder / file).read_bytes()
    trained = {row.tobytes() for row in first.tokens("train")}
    assert not trained & {row.tobytes() for row in other.tokens("test")}  # across seeds, too
    pairs = zip(first.tokens("train"), first.response("train"))
    assert len({tokens.tobytes() + response.tobytes() for tokens, response in pairs}) == 60


@pytest.mark.parametrize("name", ["sums", "latin", "sudoku"])
def test_dataset_interface(made, name):
    dataset = made(name)
    assert dataset.name == name and dataset.meta["kind"] == "examples"
    assert dataset.meta["command"].startswith(f"python data/{name}/prepare.py --train 400 ")
    for split in data.SPLITS:
        tokens, response = dataset.tokens(split), dataset.response(split)
        assert isinstance(tokens, np.memmap) and tokens.dtype == np.uint16 and tokens.max() < dataset.mask_id
        assert tokens.shape == response.shape and response.dtype == bool
        for ids, where, (solution, puzzle) in zip(tokens[:20], response, canvases(dataset, split)):
            masked, wrong = np.where(where, dataset.mask_id, ids), ids.copy()
            wrong[where.argmax()] = (wrong[where.argmax()] + 1) % 6
            assert dataset.text(ids) == solution and dataset.text(masked) == puzzle
            assert dataset.correct(ids, ids, where)
            assert not dataset.correct(wrong, ids, where) and not dataset.correct(masked, ids, where)
            assert dataset.tokenizer.encode(dataset.text(ids), allow_special=True) == ids.tolist()


@pytest.mark.parametrize("name,argv,words", [
    ("latin", ["--size", "3"], r"found only \d+ distinct examples for --(train|val|test): ask for fewer"),
    ("latin", ["--given", "36"], "--given"), ("sudoku", ["--given", "5"], "--given"),
    ("sudoku", ["--pairs", "--given", "18"], "--given goes from 5 .* to 17 for --size 6 --pairs"),
    ("sudoku", ["--pairs", "--size", "9"], "--pairs does not fit --size 9")])  # fmt: skip
def test_impossible_requests_are_one_line_and_write_nothing(name, argv, words, tmp_path):
    with pytest.raises(ValueError, match=words) as error:
        importlib.import_module(f"data.{name}.prepare").main([*SMALL, *argv, "--out", str(tmp_path / "out")])
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


PACKED = [gsm8k, openmath, openr1]
CHAT = [*PACKED, math500, aime]
TASKS = [sums, latin, sudoku, shakespeare, shakespeare_bpe, *CHAT]


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.__name__.split(".")[1])
def test_help_teaches(task, capsys):
    with pytest.raises(SystemExit) as stop:
        task.main(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and task.__doc__.strip() in text and "--out" in text and "default" in text
    assert ("--chat" in text) == (task in CHAT) and ("--pack" in text) == (task in PACKED)


# ---- loading

def copy(dataset, folder):
    folder.mkdir()
    for path in dataset.folder.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def test_load_unknown_name_lists_the_names():
    assert data.names() == sorted(task.__name__.split(".")[1] for task in TASKS)
    with pytest.raises(ValueError, match="openr1_math, shakespeare_bpe, shakespeare_char, sudoku, sums"):
        data.load("sudoko")


@pytest.fixture
def empty_home(monkeypatch, tmp_path):
    """data/ as after a clone: nothing prepared."""
    for name in data.names():
        (tmp_path / name).mkdir()
        (tmp_path / name / "prepare.py").touch()
    monkeypatch.setattr(data, "HERE", tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", ["shakespeare_char", "gsm8k", "openr1_math", "math500"])
def test_load_of_a_download_says_what_to_type(empty_home, name):
    with pytest.raises(FileNotFoundError, match=f"python data/{name}/prepare.py"):
        data.load(name)


def test_load_prepares_a_generated_set(empty_home, monkeypatch, capsys):
    main, calls, small = sums.main, [], [*SMALL, "--out", str(empty_home / "sums")]
    monkeypatch.setattr(sums, "main", lambda argv: calls.append(argv) or main(small))
    assert len(data.load("sums").tokens("train")) == 400
    printed = capsys.readouterr()
    assert "not prepared" in printed.err and "examples" in printed.err and printed.out == ""
    data.load("sums")
    assert calls == [[]]


def truncate(folder):
    (folder / "val.npy").write_bytes((folder / "val.npy").read_bytes()[:-10])


def no_array(folder):
    (folder / "val.npy").write_bytes(b"")


def pickled(folder):
    np.save(folder / "val.npy", np.array([{"a": 1}]), allow_pickle=True)


def too_large_id(folder):
    tokens = np.load(folder / "test.npy")
    tokens[3, 4] = 16
    np.save(folder / "test.npy", tokens)


def floats(folder):
    np.save(folder / "test.npy", np.load(folder / "test.npy").astype(np.float32))


def fewer_rows(folder):
    np.save(folder / "train.npy", np.load(folder / "train.npy")[:-1])


def other_response(folder):
    np.save(folder / "train_response.npy", np.load(folder / "train_response.npy")[:, 1:])


def numbers_for_response(folder):
    np.save(folder / "train_response.npy", np.load(folder / "train_response.npy").astype(np.uint8))


def other_tokenizer(folder):
    tokenizers.CharTokenizer("1023456789+=,.", ["<eos>", "<mask>"]).save(folder)


def missing_file(folder):
    (folder / "test_response.npy").unlink()


def cut_meta(folder):
    (folder / "meta.json").write_text((folder / "meta.json").read_text()[:100])


def edited_meta(**changes):
    def edit(folder):
        meta = json.loads((folder / "meta.json").read_text()) | changes
        meta = {key: value for key, value in meta.items() if value != "gone"}
        (folder / "meta.json").write_text(json.dumps(meta))
    return edit


@pytest.mark.parametrize("damage", [
    truncate, no_array, pickled, too_large_id, floats, fewer_rows, other_response, numbers_for_response,
    other_tokenizer, missing_file, cut_meta, edited_meta(name="nope"), edited_meta(format=2),
    edited_meta(length=23), edited_meta(splits="gone"), edited_meta(splits=None), edited_meta(splits={}),
    edited_meta(splits={"tests": 60}), edited_meta(splits={"train": 400, "test": 61})])  # fmt: skip
def test_damage_is_found_and_told_in_one_line(made, damage, tmp_path):
    folder = copy(made("sums"), tmp_path / "copy")
    data.load(folder)
    damage(folder)
    with pytest.raises(ValueError, match="prepare it again") as error:
        data.load(folder)
    assert "\n" not in str(error.value) and str(folder) in str(error.value)


@pytest.mark.parametrize("step", range(8))
def test_interrupted_preparation_leaves_nothing_loadable(made, step, tmp_path, monkeypatch):
    folder, count = copy(made("sums"), tmp_path / "copy"), itertools.count()

    def stops(function):
        def call(*args):
            if next(count) == step:
                raise KeyboardInterrupt
            return function(*args)
        return call

    monkeypatch.setattr(common, "write_atomic", stops(common.write_atomic))  # six arrays and, last, meta.json
    monkeypatch.setattr(tokenizers.CharTokenizer, "save", stops(tokenizers.CharTokenizer.save))
    with pytest.raises(KeyboardInterrupt):
        sums.main([*SMALL, "--seed", "3", "--out", str(folder)])
    with pytest.raises(ValueError, match="no data set"):
        data.load(folder)
    left = [path.name for path in folder.iterdir()]
    assert "meta.json" not in left and not [name for name in left if "tmp" in name]


# ---- Tiny Shakespeare

def test_shakespeare_splits_are_the_text(tmp_path):
    text = "".join(random.Random(0).choices("abc \né€", k=4001))
    (tmp_path / "in.txt").write_text(text, encoding="utf-8")
    shakespeare.main(["--source", str(tmp_path / "in.txt"), "--out", str(tmp_path / "out")])
    dataset = data.load(tmp_path / "out")
    texts = [dataset.text(dataset.tokens(split)) for split in data.SPLITS]
    assert texts == [text[:3600], text[3600:], text[3600:]]
    assert dataset.meta["kind"] == "stream" and dataset.response("val") is None and dataset.check is None
    assert dataset.meta["vocab_size"] == 8 and dataset.mask_id == 7


def test_shakespeare_in_subwords_is_the_text(tmp_path):
    text, folder = "To be, or not to be: that is the question.\n" * 50, SHARED / "hub" / "JetLM--SDAR-4B-Chat"
    (tmp_path / "in.txt").write_text(text, encoding="utf-8")
    for name, most in (("bytes", len(text)), (str(needed(folder)), len(text) / 2)):
        shakespeare_bpe.main(["--source", str(tmp_path / "in.txt"), "--out", str(tmp_path / "out"),
                              "--tokenizer", name])  # fmt: skip
        dataset, cut = data.load(tmp_path / "out"), int(0.9 * len(text))
        assert [dataset.text(dataset.tokens(split)) for split in ("train", "val")] == [text[:cut], text[cut:]]
        assert dataset.meta["kind"] == "stream" and dataset.meta["splits"]["train"] < most
        assert dataset.meta["vocab_size"] <= 1026 and dataset.tokens("train").max() < dataset.mask_id


def test_real_shakespeare(tmp_path):
    source = needed(SHARED / "tinyshakespeare") / "input.txt"
    shakespeare.main(["--source", str(source), "--out", str(tmp_path)])
    dataset, text = data.load(tmp_path), source.read_text()
    # nanoGPT documents 1,003,854 and 111,540
    assert dataset.meta["splits"] == {"train": 1_003_854, "val": 111_540, "test": 111_540}
    assert dataset.meta["vocab_size"] == 66 and list(dataset.tokenizer.chars) == sorted(set(text))
    assert dataset.text(dataset.tokens("train").tolist()) == text[:1_003_854]


@pytest.mark.parametrize("content,words", [
    (b"", "empty"), (b"<!DOCTYPE html><html>404</html>", "HTML"), (b"short", "too few"),
    (b"a\xff" * 1000, "UTF-8"), (b"a\0" * 1000, "binary"), (None, "No such file")])  # fmt: skip
def test_wrong_text(content, words, tmp_path):
    if content is not None:
        (tmp_path / "in.txt").write_bytes(content)
    with pytest.raises((ValueError, OSError), match=words) as error:
        shakespeare.main(["--source", str(tmp_path / "in.txt"), "--out", str(tmp_path / "out")])
    assert "in.txt" in str(error.value) and "\n" not in str(error.value) and not (tmp_path / "out").exists()


# ---- GSM8K

def write_gsm8k(folder, train=60, test=8):
    folder.mkdir(exist_ok=True)
    problems = [{"question": f" Ann has {i} {'red ' * (i % 5)}pens\u2028and gets {i}. How many?",
                 "answer": f"{i}+{i} = <<{i}+{i}={2 * i}>>{2 * i} pens.\n#### {2 * i:,}"}
                for i in range(train + test)]
    for name, part in (("train", problems[:train]), ("test", problems[train:])):
        text = "".join(json.dumps(problem, ensure_ascii=False) + "\n" for problem in part)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return problems


def expected_text(problem, marks=False):
    answer = problem["answer"]
    while "<<" in answer and not marks:
        answer = answer[:answer.index("<<")] + answer[answer.index(">>") + 2:]
    return problem["question"].strip() + "\n", answer.strip()


def assert_holds(dataset, problems, split, marks=False, every=1):
    """Every row of the split is a problem of the source: prompt, response, and <eos> to the end."""
    texts = {"".join(expected_text(p, marks)): expected_text(p, marks) for p in problems}
    eos = next(name for name, i in dataset.tokenizer.specials.items() if i == dataset.eos_id)
    for row in range(0, len(dataset.tokens(split)), every):
        ids, response = np.array(dataset.tokens(split)[row]), np.array(dataset.response(split)[row])
        prompt, answer = texts.pop(dataset.tokenizer.decode(ids[ids != dataset.eos_id]))
        assert dataset.tokenizer.decode(ids[~response]) == prompt
        filled = dataset.tokenizer.decode(ids[response])
        assert re.fullmatch(f"(?:{re.escape(eos)})+", filled.removeprefix(answer))
        assert dataset.correct(ids, ids, response)
        assert not dataset.correct(np.where(response, dataset.mask_id, ids), ids, response)


@pytest.mark.parametrize("marks", [False, True])
def test_gsm8k_rows(tmp_path, marks):
    problems = write_gsm8k(tmp_path / "in")
    length = len("".join(expected_text(problems[32], marks)).encode())  # this one has no room for <eos>
    argv = ["--tokenizer", "bytes", "--length", str(length), "--out", str(tmp_path / "out")]
    gsm8k.main(["--source", str(tmp_path / "in"), *argv, *["--marks"] * marks])
    dataset = data.load(tmp_path / "out")
    for split in data.SPLITS:
        assert_holds(dataset, problems, split, marks)
    counts, dropped = dataset.meta["splits"], dataset.meta["dropped"]
    assert counts["test"] + dropped["test"] == 8 and sum(counts.values()) + sum(dropped.values()) == 68
    fits = [len("".join(expected_text(p, marks)).encode()) < length for p in problems]
    assert 0 < sum(fits) < 68 and sum(fits) == sum(counts.values()) and counts["val"] > 0
    rows = {split: {row.tobytes() for row in dataset.tokens(split)} for split in ("train", "val")}
    assert not rows["train"] & rows["val"] and dataset.meta["vocab_size"] == 258


def test_gsm8k_question_of_the_test_set_is_not_trained_on(tmp_path):
    write_gsm8k(tmp_path / "in")
    with open(tmp_path / "in" / "test.jsonl", "ab") as file:
        file.write((tmp_path / "in" / "train.jsonl").read_bytes())
    with pytest.raises(ValueError, match="nothing is left for train"):
        gsm8k.main(["--source", str(tmp_path / "in"), "--tokenizer", "bytes", "--out", str(tmp_path / "out")])


def test_real_gsm8k(tmp_path):
    folder = needed(SHARED / "gsm8k")
    gsm8k.main(["--source", str(folder), "--tokenizer", "bytes", "--out", str(tmp_path)])
    dataset, of = data.load(tmp_path), {}
    for split, file in (("train", "train"), ("val", "train"), ("test", "test")):
        problems = [json.loads(line) for line in (folder / f"{file}.jsonl").read_bytes().splitlines()]
        assert_holds(dataset, problems, split, every=5 if split == "val" else 40)
        of[split] = dataset.meta["splits"][split] + dataset.meta["dropped"][split]
    assert of["test"] == 1319 and of["train"] + of["val"] == 7473 and 0.04 < of["val"] / 7473 < 0.06


@pytest.mark.parametrize("argv,size,mask,eos,dtype,length", [
    (["--vocab_size", "258"], 260, "<mask>", "<eos>", np.uint16, 640),
    ([], 70_001, "<|MASK|>", "<|endoftext|>", np.uint32, 256)])  # fmt: skip
def test_hub_tokenizer(tmp_path, argv, size, mask, eos, dtype, length):
    """A tokenizer in the files of the hub: its own mask and end token, or --vocab_size and two new ones."""
    problems, (hub, out) = write_gsm8k(tmp_path / "in"), (tmp_path / "hub", tmp_path / "out")
    hub.mkdir(), out.mkdir()
    merges = ["e n", "p en", "pen s", "a n", "H o", "Ho w", "g e"]
    tokens = [*map(tokenizers.SYMBOL.get, range(256)), *[merge.replace(" ", "") for merge in merges]]
    (hub / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (hub / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    config = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|endoftext|>"}
    config["added_tokens_decoder"] = {"263": {"content": "<|endoftext|>"}, "70000": {"content": "<|MASK|>"}}
    (hub / "tokenizer_config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "added_tokens.json"):  # of an earlier preparation: must not mix with these
        (out / name).write_text('{"<old>": 200000}')
    gsm8k.main(["--source", str(tmp_path / "in"), "--tokenizer", str(hub), "--out", str(out), *argv])
    dataset = data.load(out)
    for split in data.SPLITS:
        assert_holds(dataset, problems, split)
    specials = dataset.tokenizer.specials
    assert specials[mask] == dataset.mask_id and specials[eos] == dataset.eos_id
    assert dataset.meta["vocab_size"] == size and dataset.meta["length"] == length
    assert dataset.tokens("train").dtype == dtype
    assert len(dataset.tokenizer.encode("pens")) == (2 if argv else 1), "--vocab_size keeps two of the merges"


def test_a_plain_model_brings_an_unused_row_as_its_mask(tmp_path):
    """Qwen and Llama have no mask token: the row that zoo/plain.py chooses, beyond the tokenizer's ids."""
    problems = write_gsm8k(tmp_path / "in")
    folder = write(tmp_path / "hub", qwen3(), mask_token_id=...)
    tokenizers.bytes_tokenizer(["<eos>"]).save(folder)
    gsm8k.main(["--source", str(tmp_path / "in"), "--tokenizer", str(folder), "--out", str(tmp_path / "out")])
    dataset = data.load(tmp_path / "out")
    assert (dataset.mask_id, dataset.meta["vocab_size"]) == (257, 258)
    assert_holds(dataset, problems, "test")
    ids, response = dataset.tokens("test")[0], dataset.response("test")[0]
    shown = dataset.show(np.where(response, dataset.mask_id, ids))
    assert shown.endswith("_" * int(response.sum())) and dataset.correct(ids, ids, response)


def test_gmask_is_no_mask(tmp_path):
    """LLaDA 2 has [gMASK] before its mask."""
    tokenizers.bytes_tokenizer(["<eos>", "[gMASK]", "<|mask|>"]).save(tmp_path)
    assert common.tokenizer_of(str(tmp_path), 0)[1:] == (258, 256)


def little_gpt2():
    ranks = {bytes([b]): b for b in range(256)} | {b"en": 256, b"pen": 257, b"pens": 258, b"an": 259}
    return {"mergeable_ranks": dict(reversed(ranks.items()))}


@pytest.mark.parametrize("size", [0, 258])
def test_tiktoken_encoding(tmp_path, monkeypatch, size):
    monkeypatch.setattr(openai_public, "gpt2", little_gpt2)
    problems = write_gsm8k(tmp_path / "in")
    gsm8k.main(["--source", str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--vocab_size", str(size)])
    dataset = data.load(tmp_path / "out")
    kept = {token: rank for token, rank in little_gpt2()["mergeable_ranks"].items() if rank < (size or 260)}
    pattern = openai_public.r50k_pat_str
    oracle = tiktoken.Encoding("oracle", pat_str=pattern, mergeable_ranks=kept, special_tokens={})
    assert dataset.eos_id == len(kept) and dataset.mask_id == len(kept) + 1
    assert_holds(dataset, problems, "test")
    for ids, response in zip(dataset.tokens("test"), dataset.response("test")):
        assert ids[~response].tolist() == oracle.encode(dataset.tokenizer.decode(ids[~response]))


def test_without_network_bytes_are_used_and_said(tmp_path, monkeypatch, capsys):
    def unreachable():
        raise ConnectionError("no network")
    monkeypatch.setattr(openai_public, "gpt2", unreachable)
    write_gsm8k(tmp_path / "in")
    gsm8k.main(["--source", str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--vocab_size", "4096"])
    assert data.load(tmp_path / "out").meta["vocab_size"] == 258
    assert "using bytes instead" in capsys.readouterr().err


def line(**problem):
    return json.dumps({"question": "q", "answer": "#### 1"} | problem).encode()


@pytest.mark.parametrize("content,words", [
    (b"", "empty"), (b"<html><body>404: Not Found</body></html>", "line 1 is an HTML page"),
    (line() + b"\nNot Found", "line 2: not JSON"),
    (line() + b"\n" + line()[:-5], "line 2: not JSON .*truncated"),
    (line() + b'\n\n{"question": "q"}', "line 3: expected an object"), (b"[1]", "line 1: expected an object"),
    (line(answer=3), "line 1: expected an object"), (line(answer="so 3"), "line 1: .*####"),
    (line() + b"\xff", "not UTF-8"), (None, "No such file")])  # fmt: skip
@pytest.mark.parametrize("name", ["train.jsonl", "test.jsonl"])
def test_wrong_gsm8k(name, content, words, tmp_path):
    write_gsm8k(tmp_path / "in")
    (tmp_path / "in" / name).unlink()
    if content is not None:
        (tmp_path / "in" / name).write_bytes(content)
    with pytest.raises((ValueError, OSError), match=words) as error:
        gsm8k.main(["--source", str(tmp_path / "in"), "--tokenizer", "bytes", "--out", str(tmp_path / "out")])
    assert name in str(error.value) and "\n" not in str(error.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("argv,words", [
    (["--tokenizer", "nope"], "gpt2"), (["--tokenizer", "letters", "--vocab_size", "300"], "not a BPE"),
    (["--tokenizer", "letters"], "no mask"), (["--tokenizer", "bytes", "--vocab_size", "100"], "256"),
    (["--tokenizer", "bytes", "--length", "20"], "nothing is left")])
def test_wrong_gsm8k_options(argv, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_gsm8k(tmp_path / "in")
    tokenizers.CharTokenizer("abc", ["<eos>"]).save("letters")
    with pytest.raises(ValueError, match=words) as error:
        gsm8k.main(["--source", str(tmp_path / "in"), "--out", str(tmp_path / "out"), *argv])
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("written,value,equal", [
    ("#### 72", "72", True), ("####72", "72", True), ("#### $1,080.", "1080", True),
    ("#### $ 1080", "1,080", True), ("#### 72.0", "72", True), ("#### -12", "-12", True),
    ("#### -$12", "-12", True), ("#### 0.50", ".5", True), ("#### 18 dollars", "18", True),
    ("#### 18\n#### 19", "18", True), ("#### 73", "72", False), ("#### 12", "-12", False),
    ("#### 7", "72", False), ("#### 720", "72", False), ("72", "72", False), ("#### ", "72", False),
    ("#### _2", "72", False), ("#### 18\n#### 19", "19", False), ("#### 7.2", "72", False)])  # fmt: skip
def test_gsm8k_numbers(written, value, equal):
    assert gsm8k.check(f"q\nsome steps\n{written}<eos><eos>", f"q\nsteps\n#### {value}<eos>", "") is equal


@settings(max_examples=50)
@given(st.integers(-10**9, 10**9), st.integers(-10**9, 10**9))
def test_gsm8k_check_is_equality_of_numbers(a, b):
    assert gsm8k.check(f"#### {a:,}.", f"#### {a}", "")
    assert gsm8k.check(f"#### {a:,}", f"#### {b}", "") == (a == b)


# ---- the network's side and the command line

@pytest.fixture
def server(tmp_path):
    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(tmp_path))

        def do_GET(self):
            if self.path != "/cut.txt":
                return super().do_GET()
            self.send_response(200)
            self.send_header("Content-Length", "100000")
            self.end_headers()
            self.wfile.write(b"half a text" * 1000)

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()


def test_download(server, tmp_path):
    text = "To be, or not to be. " * 10_000
    (tmp_path / "input.txt").write_text(text)
    shakespeare.main(["--source", f"{server}/input.txt", "--out", str(tmp_path / "text")])
    assert data.load(tmp_path / "text").meta["splits"]["train"] == int(0.9 * len(text))
    problems = write_gsm8k(tmp_path / "problems")
    gsm8k.main(["--source", f"{server}/problems/", "--tokenizer", "bytes", "--out", str(tmp_path / "gsm8k")])
    assert_holds(data.load(tmp_path / "gsm8k"), problems, "test")


@pytest.mark.parametrize("path,words", [
    ("absent.txt", "404"), ("cut.txt", "broke off at 11,000 of 100,000 bytes")])  # fmt: skip
def test_failed_download(server, tmp_path, path, words):
    with pytest.raises(ValueError, match=words) as error:
        shakespeare.main(["--source", f"{server}/{path}", "--out", str(tmp_path / "out")])
    assert path in str(error.value) and "--source" in str(error.value) or "try again" in str(error.value)
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def script(name, *argv):
    command = [sys.executable, ROOT / "data" / name / "prepare.py", *argv]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_scripts_run_from_anywhere_and_end_with_an_example(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = script("sums", *SMALL, "--out", "here")
    assert done.returncode == 0 and done.stdout.count("\n") == 6
    assert re.search(r"\d+=[\d,]+\.\n$", done.stdout)
    assert (tmp_path / "here" / "meta.json").is_file()


@pytest.mark.parametrize("name,argv,words", [
    ("gsm8k", ["--source", "nowhere"], "nowhere/train.jsonl"),
    ("openr1_math", ["--source", "nowhere", "--tokenizer", "bytes"], "nowhere"),
    ("sums", ["--out", "file", *SMALL], "file")])  # fmt: skip
def test_scripts_tell_mistakes_in_one_line(name, argv, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    done = script(name, *argv)
    told = done.stderr.splitlines()
    assert done.returncode == 2 and done.stdout == "" and "Traceback" not in done.stderr
    assert told[-1].startswith("error: ") and words in told[-1]
    assert all(line.startswith("prepare ") for line in told[:-1]), "nothing besides, but the lines of a bar"
