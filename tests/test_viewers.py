"""What is shown of a run afterwards, against the steps of denoise(): hypotheses, the page, the animation."""

import copy
import html
import re
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import torch
from conftest import tiny_model

import zoo
from rcd import Residual, denoise
from zoo import files
from zoo import tokenizer as tokenizers
from zoo.decoding import Carry, Decoding
from zoo.tools import animation, viewers
from zoo.tools.viewers import Trace, Watched

LETTERS = tokenizers.CharTokenizer("abcdefghij", ["<eos>", "<mask>"])  # ids 0 to 9, 10, 11
ENDS = dict(eos_ids=(10,), pad_id=10)


def frozen(trace: Trace) -> Trace:
    """A copy with lists of its own."""
    now = copy.copy(trace)
    vars(now).update({name: value[:] for name, value in vars(trace).items() if isinstance(value, list)})
    return now


@pytest.mark.parametrize("rule", ["klass", "r2", "wino", "factor"])
def test_a_rule_that_looks_back_does_so_when_it_is_watched(rule):
    model, sampler = tiny_model(seed=3), Decoding(rule=rule, threshold=0.4)
    canvas = torch.tensor([[1, 2] + [11] * 10])
    plain, watched = (list(denoise(model, canvas, s)) for s in (sampler, Watched(**vars(sampler))))
    assert len(plain) == len(watched) > 1
    assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(plain, watched))


def record(model, canvas: torch.Tensor, sampler: Decoding, residual: Residual):
    """Traces of the rows of a canvas, the steps, and a copy of the traces after each of them."""
    loaded = files.Loaded(model, LETTERS, Path(), None, {}, {})
    traces, steps, past = [Trace("RCD", loaded, row) for row in canvas.tolist()], [], []
    watched = Watched(**vars(sampler))
    past.append([*map(frozen, traces)])
    for step in denoise(model, canvas, watched, residual, generator=torch.Generator().manual_seed(0)):
        for row, trace in enumerate(traces):
            trace.add(step, row, watched.top)
        steps.append(step)
        past.append([*map(frozen, traces)])
    return traces, steps, past


CANVAS = torch.tensor([[1, 11, 11, 4, 11, 11, 11, 2], [11] * 8])


@pytest.mark.parametrize("carry", ["none", "residual"])
def test_hypotheses_are_the_likeliest_tokens_of_a_forward_pass(tiny, carry):
    """Against plain forwards of the whole canvas, with Eq. 1 and 2 written out."""
    model, fixed = tiny(), 0.3
    sampler = Decoding(steps=4, carry=carry)
    traces, steps, _ = record(model, CANVAS, sampler, Carry("fixed", fixed))
    E, x, p = model.embedding, CANVAS, None
    for number, step in enumerate(steps):
        e = E[x]
        if carry == "residual" and p is not None:
            e = torch.where((x == 11)[..., None], (1 - fixed) * E[11] + fixed * p @ E, e)
        with torch.no_grad():
            p = model.logits(model(e, torch.arange(8)[None])[x >= 0]).softmax(-1).view(2, 8, 12)
        for row, trace in enumerate(traces):
            seen = {i: top for i, *_, top in trace.steps[number]}
            assert set(seen) == set((x[row] == 11).nonzero()[:, 0].tolist())
            for i, top in seen.items():
                order = sorted(range(12), key=lambda token: -p[row, i, token])[:5]
                assert [token for token, _ in top] == order
                assert [q for _, q in top] == pytest.approx(p[row, i, order].tolist(), abs=1e-5)
        x = step.tokens


@pytest.mark.parametrize("block_size, sampler", [
    (0, Decoding(start="self", self_passes=2)), (0, Decoding(guidance=1.0, steps=3)),
    (0, Decoding(cache="dual", block_size=4)), (0, Decoding(start="dirichlet", temperature=1.0)),
    (4, Decoding(rule="threshold", threshold=0.3)), (4, Decoding(fixed_shapes=True, sub_block=2)),
])  # fmt: skip
def test_a_sampler_that_is_watched_does_the_same(tiny, block_size, sampler):
    model = tiny(block_size=block_size)
    watched = record(model, CANVAS, sampler, Residual())[1]
    plain = list(denoise(model, CANVAS, sampler, generator=torch.Generator().manual_seed(0)))
    assert len(watched) == len(plain)
    for a, b in zip(watched, plain):
        assert all(torch.equal(torch.as_tensor(x), torch.as_tensor(y)) for x, y in zip(a, b))


@pytest.mark.parametrize("block_size", [0, 2])
def test_a_trace_at_a_step_is_what_it_was_then(tiny, block_size):
    """Also of rows that are done earlier than others, and of what stands behind an end token."""
    traces, _, past = record(tiny(block_size=block_size, seed=3, **ENDS), CANVAS, Decoding(), Residual())
    for then in past:
        for trace, was in zip(traces, then):
            at = trace.at(len(was.steps))
            assert (at.ids, at.committed_at, at.alpha) == (was.ids, was.committed_at, was.alpha)
            assert at.steps == was.steps and at.pieces() == was.pieces()
    assert len({len(trace.steps) for trace in traces}) == 2  # one row is done first


def test_names_of_tokens_hide_nothing():
    tokens = tokenizers.bytes_tokenizer(["<eos>", "<mask>"])
    loaded = files.Loaded(tiny_model(vocab_size=258, mask_id=257), tokens, Path(), None, {}, {})
    names = [Trace("", loaded, [257]).name(i) for i in (*b" \n\x00a\xe6", 256)]
    assert names == ["␣", "↵", "␀", "a", "<E6>", "<eos>"]


# ---- The animation


@pytest.fixture(scope="module")
def shipped() -> list[Trace]:
    """SeqD and RCD of the shipped model on one Sudoku, in 8 steps."""
    puzzle, traces = [int(c) for c in "666456666260166666636616546666666606"], []
    for name, carry in (("reference", "none"), ("target", "residual")):
        loaded = zoo.load(f"sudoku/{name}")
        trace, sampler = Trace(name, loaded, puzzle), Watched(steps=8, carry=carry)
        for step in denoise(loaded.model, torch.tensor([puzzle]), sampler, Carry("fixed", 0.5)):
            trace.add(step, 0, sampler.top)
        traces.append(trace)
    return traces


def grid(text: str) -> str:
    return "\n".join(" ".join(text[i : i + 6]) for i in range(0, 36, 6))


def screen_at(svg: ElementTree.Element, second: float) -> tuple[dict, set]:
    """What is seen at that time, by the style sheet alone: (x, y) -> glyph, and where it is inverted."""
    style, shown, inverted, on = svg[0].text, {}, set(), {}
    total = max(float(s) for s in re.findall(r"animation: \S+ ([\d.]+)s step-end infinite", style))
    for span, frames in re.findall(r"@keyframes (\S+) {(.*)}\n", style):
        steps = re.findall(r"([\d.]+)% {opacity: ([01])}", frames)
        *_, on[span] = (opacity for percent, opacity in steps if float(percent) <= 100 * second / total)
    for element in svg[2:]:
        x, y = float(element.get("x")), float(element.get("y"))
        if on.get(element.get("class").split()[0], "1") == "0":
            continue
        if element.tag.endswith("text"):
            assert (x, y) not in shown  # one glyph at a time
            shown[x, y] = element.text
        else:
            inverted.add((x + float(element.get("width")) / 2, y + 16))
    return shown, inverted


def test_the_animation_shows_every_step(shipped):
    text = animation.animation(shipped, grid, 8)
    svg = ElementTree.fromstring(text)
    assert len(text) < 60_000 and "<script" not in text and text.count("http") == 1  # the name of SVG itself
    for k in range(9):
        shown, inverted = screen_at(svg, 1.2 * k + 0.6)
        columns, rows = sorted({x for x, _ in shown}), sorted({y for _, y in shown})
        assert (columns[1] - columns[0], rows[2] - rows[1]) == (9, 21)
        for panel, trace in enumerate(shipped):
            was = trace.at(k)
            left = columns[0] + panel * (36 + 3) * 9
            for i, token in enumerate(was.ids):
                place = left + i % 6 * 18, rows[1] + i // 6 * 21
                shade = "·░▒▓"[min(3, 1 + int(3 * was.alpha[i])) if was.alpha[i] else 0]
                assert shown[place] == (shade if token == 6 else "123456"[token])
                assert (place in inverted) == (0 < was.committed_at[i] == k)
        line = "".join(shown.get((columns[0] + 9 * n, rows[-1]), " ") for n in range(75))
        assert line[:36].split(",")[0] == f"reference step {k}" and line[39:].startswith(f"target step {k},")


def test_the_animation_stays_on_the_last_step_where_nothing_moves(shipped):
    """prefers-reduced-motion, and programs that know no animation."""
    text = animation.animation(shipped, grid, 8)
    for begin, end, opacity in re.findall(r"\.s(\d+)-(\d+) {opacity: ([01]); animation", text):
        assert opacity == str(int(end == "9")), (begin, end)
    assert "prefers-reduced-motion: reduce) { * { animation: none" in text


def test_colours_are_those_of_xterm():
    assert [animation.rgb(code, 0) for code in (16, 26, 127, 231, 244)] == [
        "#000000", "#005fd7", "#af00af", "#ffffff", "#808080",
    ]  # fmt: skip
    assert animation.rgb(16, 0.5) == "#808080" and animation.rgb(26, 1) == "#ffffff"


def test_a_long_run_is_shown_in_48_steps(tiny):
    traces, steps, _ = record(tiny(max_len=60), torch.full((1, 60), 11), Decoding(), Residual())
    text = animation.animation(traces, str, 0)
    ends = {int(end) for end in re.findall(r"@keyframes s\d+-(\d+)", text)}
    assert len(steps) == 60 and max(ends) == 49 and "RCD fill a canvas in 60 steps" in text
    shown, _ = screen_at(ElementTree.fromstring(text), 1e-3 + 24 * 20 / 49)
    status = "".join(glyph for (_, y), glyph in sorted(shown.items()) if y == max(y for _, y in shown))
    assert status == "RCDstep30,30left"


# ---- The page, in a browser where there is one

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def opened(file: Path, asked: str, milliseconds: int) -> str:
    """The page as HTML after so much time, which passes at once."""
    words = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    words += [f"--virtual-time-budget={milliseconds}", f"--user-data-dir={file.parent / 'profile'}"]
    words += [f"file://{file}{asked}"]
    return subprocess.run(words, capture_output=True, text=True, timeout=300, check=True).stdout


@pytest.mark.skipif(not BROWSER, reason="no Chromium here")
def test_the_page_in_a_browser(shipped, tmp_path):
    """At a step that is asked for: every position, and the table of one. Else it plays to the end."""
    file = tmp_path / "run.html"
    file.write_text(viewers.page(shipped, ["1 NFE", "2 NFE"], grid), encoding="utf-8")
    dom = opened(file, "#step=3", 1000)
    assert "step 3 of 8</output>" in dom and ">Play</button>" in dom
    cells = [(dict(re.findall(r'([\w-]+)="(.*?)"', opening)), text)
             for opening, text in re.findall(r'<span ([^>]*role="option"[^>]*)>(.*?)</span>', dom)]
    assert len(cells) == 72
    for (cell, text), (trace, i) in zip(cells, ((t, i) for t in shipped for i in range(36))):
        kind, alpha = cell["class"], re.search(r"--alpha: ?([\d.]+)", cell["style"])[1]
        was, where = trace.at(3), f"row {i // 6 + 1}, column {i % 6 + 1}, "
        top = next((top for at, *_, top in was.steps[-1] if at == i), [])
        if not was.to_fill[i]:
            expected = "given", f"given: {text}", text
        elif was.committed_at[i]:
            new = " new" * (was.committed_at[i] == 3)
            expected = f"done{new}", f"committed at step {was.committed_at[i]}: {text}: with p = ", None
        else:
            carried = "the next step reads 0.50" if trace.label == "target" else "p is thrown away"
            expected = "mask", f"a mask, likeliest {top[0][0] + 1}: {carried}", f"{top[0][0] + 1}"
        assert kind.replace(" chosen", "") == expected[0]
        assert html.unescape(cell["aria-label"]).startswith(where + expected[1])
        assert text == expected[2] or kind.startswith("done") and text == "123456"[was.ids[i]]
        assert float(alpha) == pytest.approx(was.alpha[i] * (was.ids[i] == 6), abs=1e-3)
    chosen = next(i for i, (cell, _) in enumerate(cells) if cell["aria-selected"] == "true")
    table = re.findall(r"<td.*?>(.*?)</td><td.*?>(.*?)</td><td.*?>.*?</td>", dom)[5:10]  # of the target
    *_, top = next(entry for entry in reversed(sum(shipped[1].steps[:3], [])) if entry[0] == chosen)
    assert [token for token, _ in table] == [f"{token + 1}" for token, _ in top]
    assert [float(p) for _, p in table] == pytest.approx([p for _, p in top], abs=0.0056)
    assert "step 8 of 8</output>" in opened(file, "", 12_000)
