"""Draw how a canvas fills: `python tests/evidence/picture.py` writes canvas.svg, an animation, beside it.

The shipped model solves a 6x6 Sudoku in 8 steps. A mask is shaded by alpha, the weight of its residual. The
small digits in it are the distribution p that Delta is made of: the darker, the likelier. The file holds CSS
and no script, so it also moves inside an <img>.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a script, from anywhere

import torch

import zoo
from data.canvases import encode
from rcd import Residual, Sampler, Step, denoise
from zoo.files import write_atomic

PUZZLE = "___56_ ___3_1 2_____ _4__2_ 65____ ____1_"
STEPS, SECONDS, PAUSE = 8, 1.5, 4.5  # forward passes; how long each is shown; how long the last one stays
CELL, EDGE, RIGHT = 54, 20, 372  # pixels: a cell, the margin, where the words begin
MASK = 6  # id of [MASK]; 0 to 5 are the digits 1 to 6
COLOURS = ("#3b4cc0", "#3a68c8", "#1f7db3", "#0f8585", "#2c8150", "#7d7016", "#b05d14", "#b83a3a")  # by step
STYLE = """
svg { --ink: #1f2328; --page: #fff; --line: #d0d7de; --given: #d8dee4; --shade: #b48bee }
@media (prefers-color-scheme: dark) {
  svg { --ink: #e6edf3; --page: #0d1117; --line: #3d444d; --given: #3d444d; --shade: #8250d6 } }
text { font: 14px system-ui, sans-serif; fill: var(--ink) }  .head { font-size: 20px; font-weight: 600 }
.big, .small { text-anchor: middle; font-size: 15px }  .big { font-size: 25px; font-weight: 600 }
.page, .mask { fill: var(--page); stroke: var(--line) }  .given { fill: var(--given) }  .done { fill: #fff }
.shade { fill: var(--shade) }  .new, .box { fill: none; stroke: var(--ink) }  .new { stroke-width: 3 }
@media (prefers-reduced-motion: reduce) { g { animation: none !important } }
"""


def solve() -> tuple[list[int], list[Step], list[torch.Tensor]]:
    """The canvas (36,), the record of every step, and p (N, V) at the N masks that are left after it."""
    loaded, carried = zoo.load("sudoku/target"), []
    residual = Residual(loaded.meta["residual"]["weight"], loaded.meta["residual"]["fixed"])

    def carry(logits: torch.Tensor, E: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        carried.append(logits.softmax(-1))
        return residual(logits, E)

    canvas = encode(PUZZLE, loaded)
    steps = denoise(loaded.model, torch.tensor([canvas]), Sampler(steps=STEPS), carry)
    return canvas, list(steps), carried


def square(cell: int, kind: str, style: str = "") -> str:
    x, y = EDGE + cell % 6 * CELL + 1, EDGE + cell // 6 * CELL + 1
    return f'<rect class="{kind}" x="{x}" y="{y}" width="{CELL - 2}" height="{CELL - 2}" rx="4" {style}/>'


def text(x: float, y: float, words: object, kind: str = "", style: str = "") -> str:
    return f'<text x="{x}" y="{y}" class="{kind}" {style}>{words}</text>'


def digit(cell: int, token: int, kind: str = "big") -> str:
    return text(EDGE + (cell % 6 + 0.5) * CELL, EDGE + (cell // 6 + 0.5) * CELL + 9, token + 1, kind)


def pencil(cell: int, p: list[float]) -> str:
    """p (V,) of a mask: small digits in three columns and two rows."""
    x, y = EDGE + cell % 6 * CELL + 11, EDGE + cell // 6 * CELL + 23
    shown = [(x + i % 3 * 16, y + i // 3 * 20, i + 1, 0.25 + 0.75 * v) for i, v in enumerate(p) if v > 0.04]
    return "".join(text(a, b, words, "small", f'opacity="{v:.2f}"') for a, b, words, v in shown)


def keyframes(k: int) -> str:
    """Class c{k} is seen from step k on, s{k} in step k only. Without animation: the last step is seen."""
    total, start = STEPS * SECONDS + PAUSE, "0% {opacity: 0}" if k else ""
    begin = f"{100 * k * SECONDS / total:.2f}% {{opacity: 1}}"
    end = f"{100 * (k + 1) * SECONDS / total:.2f}% {{opacity: 0}}" if k < STEPS else ""
    return (f"@keyframes c{k} {{{start} {begin}}}\n@keyframes s{k} {{{start} {begin} {end}}}\n"
            f".c{k} {{animation: c{k} {total}s step-end infinite}}\n"
            f".s{k} {{opacity: {k // STEPS}; animation: s{k} {total}s step-end infinite}}\n")  # fmt: skip


def draw() -> str:
    """The animation as SVG."""
    canvas, steps, carried = solve()
    body = [square(i, "given") + digit(i, t) if t < MASK else square(i, "mask") for i, t in enumerate(canvas)]
    frames = [text(RIGHT, 42, f"step 0 of {STEPS}", "head") + text(RIGHT, 68, "every mask is bare")]
    for k, step in enumerate(steps, 1):
        tokens, new = step.tokens[0].tolist(), step.committed[0].nonzero()[:, 0].tolist()
        left = [i for i, token in enumerate(tokens) if token == MASK]
        fill = f'fill="{COLOURS[k - 1]}"'
        body += [f'<g class="c{k}">{square(i, "", fill)}{digit(i, tokens[i], "big done")}</g>' for i in new]
        words = f"{len(new)} tokens committed, {len(left)} masks left"
        frame = text(RIGHT, 42, f"step {k} of {STEPS}", "head") + text(RIGHT, 68, words)
        for i, p in zip(left, carried[k - 1].tolist() if left else []):
            frame += square(i, "shade", f'fill-opacity="{float(step.alpha[0, i]):.2f}"') + pencil(i, p)
        frames.append(frame + "".join(square(i, "new") for i in new))
    body += [f'<g class="s{k}">{frame}</g>' for k, frame in enumerate(frames)]
    box = f'class="box" width="{3 * CELL}" height="{2 * CELL}"'
    body += [f'<rect {box} x="{EDGE + i % 2 * 3 * CELL}" y="{EDGE + i // 2 * 2 * CELL}"/>' for i in range(6)]

    key = f'width="24" height="24" rx="3" x="{RIGHT}"'  # the legend
    for y, kind, opacity, words in ((106, "given", 1, "given"), (140, "shade", 0.5, "mask, shaded by its α"),
                                    (174, "mask", 1, "p, which the next step reads")):  # fmt: skip
        body.append(f'<rect class="{kind}" fill-opacity="{opacity}" {key} y="{y}"/>')
        body.append(text(RIGHT + 36, y + 17, words))
    body.append(text(RIGHT + 7, 187, 2, "small") + text(RIGHT + 17, 194, 6, "small", 'opacity="0.5"'))
    for n, colour in enumerate(COLOURS):
        body.append(f'<rect fill="{colour}" {key} y="220" transform="translate({28 * n})"/>')
        body.append(text(RIGHT + 28 * n + 12, 237, n + 1, "small done"))
    body.append(text(RIGHT, 264, "committed, by step") + text(RIGHT, 310, "a mask reads"))
    body.append(text(RIGHT, 334, "(1 − α) E[MASK] + α Σ p(j) E[j]"))
    head = f'width="660" height="364" role="img" aria-label="A 6x6 Sudoku is filled in {STEPS} steps"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 660 364" {head}>'
    style = f"<style>{STYLE}{''.join(map(keyframes, range(STEPS + 1)))}</style>"
    return "\n".join([head, style, '<rect class="page" width="660" height="364"/>', *body, "</svg>\n"])


if __name__ == "__main__":
    target = Path(__file__).with_name("canvas.svg")
    write_atomic(target, lambda path: path.write_text(draw(), encoding="utf-8"))
