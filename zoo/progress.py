"""Progress bars: drawn on a terminal; where stderr is a file or a pipe, plain lines.

A line comes every 5 % of the total or every 30 seconds, whichever is first, but not more than one a second:

    target   45%  450/1,000 steps  loss 0.512  3,210 tok/s  2:13 left
"""

import math
import sys
import time

from tqdm import tqdm

LINES, SECONDS = 20, 30.0  # lines in a whole job, and the longest time between two of them


def progress(total: int | None, desc: str, unit: str = "", *, initial: int = 0, leave: bool = True,
             quiet: bool = False) -> tqdm:  # fmt: skip
    """A bar of `total` units (None = unknown), with update(n), set_postfix(loss="0.512", ...) and close().

    It is a context manager too. unit is a plural ("steps"), or "B" for bytes. leave=False is for short jobs
    in others: on a terminal the bar vanishes, elsewhere a job that ends before its first line is due prints
    none. quiet=True shows nothing at all.
    """
    kind, unit = tqdm if sys.stderr.isatty() else Lines, unit if unit == "B" else f" {unit}"
    return kind(total=total, desc=desc, unit=unit, unit_scale=unit == "B", initial=initial, leave=leave,
                disable=quiet, dynamic_ncols=True)  # fmt: skip


def download_bars() -> type[tqdm] | None:
    """The tqdm_class for huggingface_hub: its own on a terminal, lines elsewhere."""
    return None if sys.stderr.isatty() else DownloadLines


class Lines(tqdm):
    """A tqdm bar that prints lines."""

    def __init__(self, *args, **options):  # tqdm's; huggingface_hub chooses some
        self.begun = self.printed_at = time.monotonic()
        self.line, self.first, self.spoke = -1, options.get("initial") or 0, False
        super().__init__(*args, **options)

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Called by tqdm whenever it would draw the bar anew: print a line if one is due."""
        now, line = time.monotonic(), int(LINES * self.n / self.total) if self.total else 0
        if self.line < 0:  # the bar has just been made
            self.line = line
        elif self.n != self.total:  # the last line is close()'s
            waited = now - self.printed_at
            if waited >= SECONDS or line > self.line and waited >= 1:
                self.line = line
                self.print(now)

    def print(self, now: float, last: bool = False) -> None:
        size = (lambda n: self.format_sizeof(n)) if self.unit_scale else "{:,}".format
        unit = "" if self.unit == "it" else self.unit.strip()  # "it": tqdm's default
        words = [self.desc.removesuffix(": ")]
        if self.total:
            words.append(f"{self.n / self.total:4.0%}")
        count = f"{size(self.n)}/{size(self.total)}" if self.total else size(self.n)
        words.append(count + unit if self.unit_scale else f"{count} {unit}".rstrip())
        for entry in (self.postfix or "").split(", "):  # "loss=0.512, tok_s=3,210": _s is "per second"
            name, _, value = entry.partition("=")
            words.append(f"{value} {name[:-2]}/s" if name.endswith("_s") else f"{name} {value}".strip())
        seconds, done = now - self.begun, self.n - self.first
        if last:
            words.append(f"in {clock(seconds)}")
        elif self.total and done > 0:
            words.append(f"{clock(seconds * (self.total - self.n) / done)} left")
        self.printed_at, self.spoke = now, True
        try:
            self.fp.write("  ".join(filter(None, words)) + "\n")
            self.fp.flush()
        except OSError:  # nobody reads stderr any more, a pipe is closed: that must not end the work
            pass

    def close(self) -> None:
        if self.disable:
            return
        if self.leave or self.spoke:
            self.print(time.monotonic(), last=True)
        self.delay = math.inf  # a bar that was not drawn yet: tqdm has nothing to wipe out
        super().close()


class DownloadLines(Lines):
    """huggingface_hub's bars: several, of which those that last speak."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options | {"leave": False})


def clock(seconds: float) -> str:
    """133 -> "2:13", 3,733 -> "1:02:13"."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02}:{s:02}" if hours else f"{m}:{s:02}"
