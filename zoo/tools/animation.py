"""What the terminal shows, as a moving picture: an SVG with CSS and no script, so it also moves in an <img>.

The steps are laid over each other, and CSS shows one after the other. A glyph that stays in its place for
several steps is drawn once, and seen from the first of them to the last.
"""

import html
import re
from collections.abc import Callable, Iterator

from zoo.tools.viewers import Picture, Trace, columns_of, glyphs

WIDE, HIGH, EDGE = 9, 21, 16  # pixels of the moving picture: a column, a line, the margin
STYLE = """
svg { --ink: #1f2328; --page: #fff; --line: #d0d7de; fill: var(--ink) }
text { font: 15px ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; text-anchor: middle }
.page { fill: var(--page) }  .box { stroke: var(--line) }
@media (prefers-reduced-motion: reduce) { * { animation: none !important } }
"""
DARK = "@media (prefers-color-scheme: dark) { svg { --ink: #e6edf3; --page: #0d1117; --line: #3d444d }"


def animation(traces: list[Trace], layout: Callable[[str], str], budget: int) -> str:
    """The SVG of finished traces, as a terminal of 80 columns shows them. layout, budget: see Picture.

    At most 48 steps are shown, evenly chosen. The same traces give the same bytes.
    """
    count, picture = max(len(t.steps) for t in traces), Picture(traces, layout, False, budget, 80)
    frames, seen = [count * k // min(count, 48) for k in range(min(count, 48) + 1)], {}
    for k, step in enumerate(frames):
        past = [t.at(step) for t in traces]
        screen = [picture.legend, "", *picture.body(past), "", picture.status(past)]
        for glyph in painted(screen):  # drawn once for as long as it stays in its place
            spans = seen.setdefault(glyph, [])
            if spans and spans[-1][1] == k:
                spans[-1][1] = k + 1
            else:
                spans.append([k, k + 1])

    pause = min(1.2, 20 / len(frames))  # seconds that a frame is shown; the last one stays for four
    body, moves, at = [], {}, [k * pause for k in range(len(frames))]
    at.append(at[-1] + 4)
    for (row, column, glyph, style), spans in seen.items():
        x, y, width = EDGE + WIDE * column, EDGE + HIGH * row, WIDE * columns_of(glyph)
        colour = f"c{style.split(';')[-1]}" if style else ""
        for begin, end in spans:
            span, inverted = f"s{begin}-{end}", style.startswith("7;")
            moves[span] = keyframes(span, at[begin], at[end], at[-1])
            if inverted:
                place = f'x="{x}" y="{y}" width="{width}" height="{HIGH}"'
                body.append(f'<rect class="{span} {colour}" {place}/>')
            kind, place = "page" if inverted else colour, f'x="{x + width / 2:g}" y="{y + 16}"'
            body.append(f'<text class="{span} {kind}" {place}>{html.escape(glyph)}</text>')
    codes = sorted({int(style.split(";")[-1]) for *_, style in seen if style})
    light, dark = ("".join(f" .c{c} {{ fill: {rgb(c, white)} }}" for c in codes) for white in (0, 0.3))
    width, height = 2 * EDGE + 80 * WIDE, 2 * EDGE + HIGH * (1 + max(row for row, *_ in seen))
    says = f"{' and '.join(t.label for t in traces)} fill a canvas in {count} steps"
    head = f'width="{width}" height="{height}" role="img" aria-label="{html.escape(says)}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" {head}>'
    page = f'<rect class="page box" x=".5" y=".5" width="{width - 1}" height="{height - 1}" rx="6"/>'
    style = f"<style>{STYLE}{light}\n{DARK}{dark} }}\n{''.join(moves.values())}</style>"
    return "\n".join([head, style, page, *body, "</svg>\n"])


def keyframes(kind: str, begin: float, end: float, total: float) -> str:
    """CSS: what is of this class is seen from `begin` to `end` (seconds), again and again. The last is seen
    where nothing moves."""
    if end - begin == total:
        return ""
    at = {0: begin == 0, 100 * begin / total: True, 100 * end / total: end == total}
    steps = " ".join(f"{percent:.2f}% {{opacity: {int(on)}}}" for percent, on in at.items())
    always = f"opacity: {int(end == total)}; animation: {kind} {total:g}s step-end infinite"
    return f"@keyframes {kind} {{{steps}}}\n.{kind} {{{always}}}\n"


def painted(lines: list[str]) -> Iterator[tuple[int, int, str, str]]:
    """(row, column, glyph, style) of all that is not blank. style: the codes of its colour, "" = none."""
    for row, line in enumerate(lines):
        column, style = 0, ""
        for k, part in enumerate(re.split(r"\x1b\[([\d;]*)m", line)):
            if k % 2:
                style = "" if part == "0" else part
                continue
            for glyph in glyphs(part, ""):
                if glyph != " " or style:
                    yield row, column, glyph, style
                column += columns_of(glyph)


def rgb(code: int, white: float) -> str:
    """#rrggbb of one of xterm's colours: a cube of 6 x 6 x 6 from 16 on, greys from 232 on.

    white: how much of it is mixed in, from 0 to 1.
    """
    cube = ((code - 16) // 36, (code - 16) // 6 % 6, (code - 16) % 6)
    levels = [8 + 10 * (code - 232)] * 3 if code >= 232 else [55 + 40 * v if v else 0 for v in cube]
    return "#" + "".join(f"{round(level + white * (255 - level)):02x}" for level in levels)
