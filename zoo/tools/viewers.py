"""How a canvas is watched while it fills: in a terminal, as streamed text, and afterwards as a page."""

import codecs
import copy
import itertools
import json
import shutil
import time
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from rcd import Reader, Step, by_rows, softmax, tile
from zoo.decoding import Decoding
from zoo.files import Loaded
from zoo.progress import progress

# xterm colours from the first step to the last, readable on black and on white
RAMP = (26, 32, 31, 30, 29, 64, 100, 136, 166, 160, 161, 127)
SHADES, GREY = "·░▒▓", "38;5;244"  # a mask: no residual, then alpha up to 1/3, 2/3, 1
# A task lays out a string with a character per position: private characters from this one on stand for them.
POSITIONS = 0xF0000

Top = dict[tuple[int, int], list[tuple[int, float]]]  # (row, position) -> its likeliest tokens with their p


class TopReader:
    """A reader that keeps the five likeliest tokens of each cell that it read last."""

    def __init__(self, read: Reader, top: Top):
        self.read, self.top = read, top

    def __getattr__(self, name: str):
        """Anything else of the reader: a rule that looks back finds its notes there."""
        return getattr(self.read, name)

    def __call__(self, begin: Tensor, end: Tensor, cells: Tensor, *residual: Tensor | None) -> Tensor:
        """As Reader: logits (N, V)."""
        logits = self.read(begin, end, cells, *residual)
        k = min(5, logits.shape[1])
        p, ids = by_rows(lambda z: softmax(z)[1].topk(k), tile(logits), logits)  # (N, k) each
        self.top.clear()
        for cell, row_ids, row_p in zip(cells.tolist(), ids.tolist(), p.tolist()):
            self.top[tuple(cell)] = list(zip(row_ids, row_p))
        return logits


@dataclass(frozen=True)
class Watched(Decoding):
    """The same sampler, whose top holds the hypotheses of the step that was made last."""

    top: Top = field(default_factory=dict)

    def reader(self, *canvas) -> TopReader:
        return TopReader(super().reader(*canvas), self.top)


class Trace:
    """What happened to one row of a canvas under one setting."""

    def __init__(self, label: str, loaded: Loaded, ids: list[int]):
        self.label, self.tokenizer, self.nfe = label, loaded.tokenizer, 0
        self.ends, self.mask_id = loaded.model.config.eos_ids, loaded.model.config.mask_id
        self.ids, self.to_fill = ids, [i == self.mask_id for i in ids]
        self.committed_at = [0] * len(ids)  # the step that committed a position, from 1; 0 = none
        self.alpha = [0.0] * len(ids)  # of the residual that a mask carries
        # Per step, of each mask it looked at: position, confidence, alpha, likeliest tokens with their p.
        self.steps: list[list[tuple[int, float, float, list[tuple[int, float]]]]] = []

    def add(self, step: Step, row: int, top: Top) -> None:
        """A step, of which this is the row. top: its hypotheses, {} = they are not to be kept."""
        values = (step.committed, step.confidence, step.alpha)
        committed, confidence, alpha = (x[row, : len(self.ids)].tolist() for x in values)
        looked = [i for i, c in enumerate(confidence) if c or committed[i]]
        if looked:  # else this row was done before
            self.ids, self.nfe = step.tokens[row, : len(self.ids)].tolist(), int(step.nfe[row])
            self.steps.append([(i, confidence[i], alpha[i], top.get((row, i), [])) for i in looked])
            for i in looked:
                self.committed_at[i], self.alpha[i] = len(self.steps) * committed[i], alpha[i]

    def at(self, k: int) -> "Trace":
        """This trace as it was after k steps."""
        if k >= len(self.steps):
            return self
        past, done = copy.copy(self), [0 < at <= k for at in self.committed_at]
        past.steps, past.alpha = self.steps[:k], [0.0] * len(self.ids)
        for i, _, alpha, _ in itertools.chain(*past.steps):
            past.alpha[i] = alpha
        kept = [d or not fill for d, fill in zip(done, self.to_fill)]
        past.ids = [i if keep else self.mask_id for i, keep in zip(self.ids, kept)]
        past.committed_at = [at * d for at, d in zip(self.committed_at, done)]
        return past

    def name(self, token: int) -> str:
        """A token by itself, spaces and line ends in sight, and in hexadecimal what is no text."""
        spelled = self.tokenizer.tokens.get(token, b"?")
        try:
            return "".join(glyphs(spelled.decode("utf-8").replace(" ", "␣"), "↵"))
        except UnicodeDecodeError:
            return "".join(f"<{byte:02X}>" for byte in spelled)

    def pieces(self) -> list[str]:
        """The text of each position, "" for a mask. A character of several tokens is at the last of them."""
        decoder, out = codecs.getincrementaldecoder("utf-8")("replace"), [""]
        for i, committed_at, to_fill in zip(self.ids, self.committed_at, self.to_fill):
            nothing, end = to_fill and not committed_at, to_fill and i in self.ends
            out[-1] += decoder.decode(b"", True) if nothing or end else ""
            out.append("" if nothing else "∎" if end else decoder.decode(self.tokenizer.tokens.get(i, b"?")))
        out[-1] += decoder.decode(b"", True)
        return out[1:]


def glyphs(text: str, newline: str) -> list[str]:
    """The characters of a text as a terminal may get them: combining marks join the one before, and control
    characters are replaced."""
    out = []
    for c in text:
        if c == "\n":
            out += newline
        elif unicodedata.category(c) not in ("Mn", "Me"):
            other = " " if c.isspace() else chr(0x2400 + ord(c)) if c < " " else "\ufffd"
            out.append(c if c.isprintable() else other)
        elif out and out[-1] != "\n":
            out[-1] += c
        else:
            out.append("◌" + c)
    return out


def columns_of(glyph: str) -> int:
    """How many columns of a terminal it takes."""
    return 2 if unicodedata.east_asian_width(glyph[0]) in "WF" else 1


class Picture:
    """Traces side by side as lines of text, in the colours of a terminal.

    layout: how the task arranges a canvas (data.Dataset.layout). plain: no colours. budget: the sampler's
    steps, 0 = unknown. columns: how wide it may be.
    """

    def __init__(self, traces: list[Trace], layout: Callable[[str], str], plain: bool, budget: int,
                 columns: int):  # fmt: skip
        self.plain, self.budget = plain, min(budget, sum(traces[0].to_fill))
        self.width = max(8, (columns - 4 - 3 * (len(traces) - 1)) // len(traces))  # of a panel
        self.in_a_row = "".join(map(chr, range(POSITIONS, POSITIONS + len(traces[0].ids))))
        self.layout = layout(self.in_a_row)
        ramp = "".join(f"\x1b[38;5;{colour}m█" for colour in RAMP)
        masks = f"masks: {SHADES[0]} no residual, {SHADES[1:]} alpha"
        self.legend = f"committed at the first {ramp}\x1b[0m last step; {masks}"

    def lines(self, trace: Trace, template: str, newline: str, width: int = 0) -> list[str]:
        """The trace as lines padded to `width` columns (0 = as long as they are), in colours unless plain."""
        pieces, out, used = trace.pieces(), [""], 0
        last = max(self.budget or len(RAMP), len(trace.steps)) - 1
        for c in template:
            i = ord(c) - POSITIONS
            if i < 0 or not trace.to_fill[i]:
                cell, style = c if i < 0 else glyphs(pieces[i], newline), ""
            elif trace.ids[i] == trace.mask_id:
                shade = min(3, 1 + int(3 * trace.alpha[i])) if trace.alpha[i] else 0
                cell, style = "_" if self.plain else SHADES[shade], GREY
            else:  # the newest inverted
                colour = RAMP[(trace.committed_at[i] - 1) * (len(RAMP) - 1) // max(1, last)]
                inverted = 7 * (trace.committed_at[i] == len(trace.steps))
                cell, style = glyphs(pieces[i], newline), f"{inverted};38;5;{colour}"
            for glyph in cell:
                if glyph == "\n" or width and used + columns_of(glyph) > width:
                    out[-1] += " " * (width - used)
                    out, used = [*out, ""], 0
                if glyph != "\n":
                    out[-1] += glyph if self.plain or not style else f"\x1b[{style}m{glyph}\x1b[0m"
                    used += columns_of(glyph)
        return [*out[:-1], out[-1] + " " * (width - used)]

    def body(self, traces: list[Trace]) -> list[str]:
        panels = [self.lines(t, self.layout, "↵\n", self.width) for t in traces]
        return [" │ ".join(lines) for lines in itertools.zip_longest(*panels, fillvalue=" " * self.width)]

    def status(self, traces: list[Trace]) -> str:
        words = [f"{t.label} step {len(t.steps)}, {t.ids.count(t.mask_id)} left" for t in traces]
        return " │ ".join(text[: self.width].ljust(self.width) for text in words)


class Terminal(Picture):
    """A line per step where a canvas fits into a line, else a picture that is redrawn."""

    def __init__(self, traces: list[Trace], layout: Callable[[str], str], plain: bool, budget: int):
        (width, self.rows), cells = shutil.get_terminal_size(), len(traces[0].ids)
        super().__init__(traces, layout, plain, budget, width)
        self.traces, self.height, self.drawn_at = traces, 0, 0.0
        self.by_line = plain or layout is str and cells <= self.width
        self.pause = 0 if plain else min(0.12, 5 / cells)  # seconds that a step is shown at least
        if not plain:
            print(self.legend)
        if len(traces) > 1 and self.by_line:
            print("    " + " | ".join(f"{t.label:{cells}}" for t in traces).rstrip())
        self.show()

    def show(self, last: bool = False) -> None:
        """Draw the traces: called before the first step, after every step and, with last=True, at the end."""
        time.sleep(max(0, self.drawn_at + self.pause - time.perf_counter()))
        self.drawn_at = time.perf_counter()
        if not self.by_line:
            self.draw(whole=last)
        elif not last:
            step = max(len(t.steps) for t in self.traces)
            rows = [self.lines(t, self.in_a_row, "↵")[0] for t in self.traces]
            print(f"{step:3} " + " | ".join(rows), flush=True)

    def draw(self, whole: bool) -> None:
        """The picture, over the one before. Too high for the screen: the part around the first mask."""
        body, room = self.body(self.traces), self.rows - 4
        if len(body) > room and not whole:
            masked = next((i for i, line in enumerate(body) if GREY in line), len(body))
            body = body[max(0, min(masked - room // 2, len(body) - room)) :][:room]
        body += ["", self.status(self.traces)]
        up = f"\x1b[{self.height}F" if self.height else ""
        print(up + "\n".join(f"    {line}\x1b[K" for line in body) + "\x1b[J", flush=True)
        self.height = len(body)

    def text(self, trace: Trace) -> str:
        """A finished canvas by itself, up to its end token."""
        ends = [i for i, token in enumerate(trace.ids) if trace.to_fill[i] and token in trace.ends]
        return "\n".join(self.lines(trace, self.in_a_row[: ends[0]] if ends else self.layout, "\n"))

    def shown(self, trace: Trace) -> bool:
        """Whether the canvas stands on the screen as text() gives it."""
        return trace in self.traces and not (self.by_line and "\n" in self.text(trace))


class Stream:
    """Answers as text. A single one is printed as it grows: what stands before the first mask is final.
    Of several there is a progress bar until all are done."""

    def __init__(self, traces: list[Trace], single: bool):
        self.traces, self.single, self.printed = traces, single, 0
        self.masks = sum(sum(t.to_fill) for t in traces)
        self.bar = progress(self.masks, "sample", "tokens", leave=False, quiet=single)

    def show(self, last: bool = False) -> None:
        for trace in self.traces if self.single else ():
            text = self.text(trace, last)
            print(text[self.printed :], end="\n" if last else "", flush=True)
            self.printed = len(text)
        self.bar.update(self.masks - sum(t.ids.count(t.mask_id) for t in self.traces) - self.bar.n)
        if last:
            self.bar.close()

    def text(self, trace: Trace, last: bool = True) -> str:
        """The answer up to its first mask or end token. Unless last, an unfinished character is left out."""
        answer = trace.ids[trace.to_fill.index(True) :]
        ids = itertools.takewhile(lambda i: i != trace.mask_id and i not in trace.ends, answer)
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        text = decoder.decode(b"".join(trace.tokenizer.tokens.get(i, b"?") for i in ids), last)
        return "\t".join("".join(glyphs(part, "\n")) for part in text.split("\t"))

    def shown(self, trace: Trace) -> bool:
        return self.single


def page(traces: list[Trace], stats: list[str], layout: Callable[[str], str]) -> str:
    """The run as an HTML page that needs nothing else: page.html with the traces in it as JSON.

    stats: a line of numbers per trace. Tokens are shown as text and never read as HTML.
    """
    panels, vocabulary = [], {}
    for t, numbers in zip(traces, stats):
        placed = layout("".join(map(chr, range(POSITIONS, POSITIONS + len(t.ids)))))
        placed = placed if layout is str else placed.replace(" ", "")  # the page has its own spaces in a grid
        steps = [[(i, round(c, 3), round(a, 3), [(token, round(p, 3)) for token, p in top])
                  for i, c, a, top in step] for step in t.steps]  # fmt: skip
        panels.append({
            "label": t.label, "stats": numbers, "grid": layout is not str,
            "committed_at": t.committed_at, "to_fill": t.to_fill,
            "text": ["".join(glyphs(piece, "↵\n")) for piece in t.pieces()],
            "layout": [c if c < chr(POSITIONS) else ord(c) - POSITIONS for c in placed],
            "steps": steps,
        })  # fmt: skip
        vocabulary |= {token: t.name(token) for step in steps for *_, top in step for token, _ in top}
    template = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    text = json.dumps({"panels": panels, "vocabulary": vocabulary})
    return template.replace("/*DATA*/", text.replace("<", "\\u003c"))
