"""Progress where stderr is no terminal: which lines come when, and what they say, by a clock of our own."""

import io
import re
import sys
import time
from unittest.mock import Mock

import pytest

from zoo.progress import clock, download_bars, progress


@pytest.fixture
def run(monkeypatch, capsys):
    """run(bar, updates, seconds, n=1, **postfix): the lines of updates by n, so many seconds apart."""
    now = [time.time() // 1]  # not 0: a thread of tqdm's compares it with the true time
    for name in ("zoo.progress.time.monotonic", "tqdm.std.time"):
        monkeypatch.setattr(name, lambda: now[0])

    def lines(bar, updates: int, seconds: float, n: int = 1, **postfix: str) -> list[str]:
        with bar:
            for _ in range(updates):
                now[0] += seconds
                bar.update(n)
                if postfix:
                    bar.set_postfix(postfix)
        out, err = capsys.readouterr()
        assert not re.search("[\r\x1b]", out + err) and out == ""
        return err.splitlines()

    return lines


def percents(lines: list[str]) -> list[int]:
    return [int(re.search(r"(\d+)%", line)[1]) for line in lines]


def test_a_line_every_five_percent_with_loss_rate_and_time_left(run):
    lines = run(progress(1000, "target", "steps"), 1000, 0.5, loss="0.512", tok_s="3,210")
    assert percents(lines) == list(range(5, 101, 5))
    assert lines[8] == "target   45%  450/1,000 steps  loss 0.512  3,210 tok/s  4:35 left"
    assert lines[-1] == "target  100%  1,000/1,000 steps  loss 0.512  3,210 tok/s  in 8:20"


def test_lines_are_at_least_one_second_and_at_most_thirty_apart(run):
    assert percents(run(progress(100, "x"), 12, 10.0)) == [3, 5, 8, 10, 12]  # 5 % take 50 seconds
    assert len(run(progress(10_240, "x"), 10_240, 2**-10, loss="1")) == 10  # 5 % take half a second
    assert run(progress(None, "x", "examples"), 7, 10.0) == ["x  3 examples", "x  6 examples",
                                                             "x  7 examples  in 1:10"]  # fmt: skip


def test_work_that_goes_on_counts_from_where_it_stopped(run):
    lines = run(progress(4_000_000, "load", "B", initial=1_000_000), 4, 8.0, 40_000)  # interrupted again
    assert lines == ["load   29%  1.16M/4.00MB  9:28 left", "load   29%  1.16M/4.00MB  in 0:32"]


def test_what_ends_at_once_is_one_line_and_none_inside_other_work(run):
    assert run(progress(3, "x"), 3, 0.1) == ["x  100%  3/3  in 0:00"]
    assert run(progress(3, "x", leave=False), 3, 0.1) == run(progress(3, "x", quiet=True), 3, 40.0) == []
    assert run(download_bars()(total=3, desc="x"), 3, 0.1) == []  # as huggingface_hub makes them
    for bar in (progress(3, "x", leave=False), download_bars()(total=3, desc="x")):
        assert percents(run(bar, 3, 40.0)) == [33, 67, 100]  # once it spoke, it tells its end too


def test_a_closed_pipe_does_not_end_the_work(run, monkeypatch):
    monkeypatch.setattr(sys.stderr, "write", Mock(side_effect=BrokenPipeError))
    assert run(progress(3, "x"), 3, 40.0) == []


def test_a_terminal_gets_a_bar(monkeypatch):
    monkeypatch.setattr(sys, "stderr", terminal := io.StringIO())
    terminal.isatty = lambda: True
    with progress(2, "x", "steps") as bar:
        bar.update(2)
    assert "\r" in terminal.getvalue() and "100%|" in terminal.getvalue() and download_bars() is None


def test_the_clock():
    assert [clock(seconds) for seconds in (0.4, 59.6, 133, 3733)] == ["0:00", "1:00", "2:13", "1:02:13"]
