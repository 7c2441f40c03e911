"""Sudoku: a Latin square whose boxes hold each digit once too, and here with exactly one solution.

    given           the solution
    _ _ _ 5 6 _     1 3 4 5 6 2
    _ _ _ 3 _ 1     5 6 2 3 4 1
    2 _ _ _ _ _     2 1 6 4 5 3
    _ 4 _ _ 2 _     3 4 5 1 2 6
    6 5 _ _ _ _     6 5 1 2 3 4
    _ _ _ _ 1 _     4 2 3 6 1 5

The small one is 6x6 with boxes of 2x3, --size 9 is the newspaper's. --no_boxes leaves the boxes out: another
puzzle, a Latin square with one solution (data/latin has squares with many). The canvas is the size*size cells
in reading order, one token each, without separators; the vocabulary is the digits and <mask>. The model fills
the empty cells, and its answer counts when it is the solution.

Full boards are drawn by putting random digits into random tightest cells and following forced moves; boards
that end in a contradiction are thrown away (every board can come out, not all equally often). Then cells
are emptied in random order, each only if the solution stays the only one, until --given are left. All of it
runs on many boards at once, a cell being a bit set of its possible digits. Puzzles whose solutions are
equal up to a renaming of the digits always fall into the same split.
"""
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a script, without an installation
from data.common import claimed, collect, options, run, sizes, write_dataset
from data.latin.prepare import layout, relabelled  # noqa: F401 (load() looks for layout here)
from zoo.tokenizer import CharTokenizer
from zoo.tools.command import whole

SOURCE = "generated"
BOX = {6: (2, 3), 9: (3, 3)}  # size: rows and columns of a box
GIVEN = {(6, True): (9, 9), (6, False): (11, 12), (9, True): (24, 32), (9, False): (30, 36)}  # fewest, usual
COUNT = np.array([bits.bit_count() for bits in range(1 << 9)])


class Rules:
    """Many boards at once: boards (B, n*n) uint16, each cell a bit set of the digits still possible."""

    def __init__(self, n: int, boxes: bool = True):
        cell, (height, width) = np.arange(n * n), BOX[n]
        row, column = cell // n, cell % n
        box = row // height * (n // width) + column // width
        self.n, self.full = n, (1 << n) - 1
        units_of = (row, n + column, 2 * n + box)[: 2 + boxes]
        self.units_of = np.stack(units_of)  # (3, n*n), or (2, n*n) without boxes: the units of a cell
        units = [cell[(self.units_of == unit).any(0)] for unit in range(len(units_of) * n)]
        self.units = np.stack(units)  # (3n or 2n, n): the cells of a unit

    def propagate(self, boards: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Follow forced moves to their end: a digit fixed in a unit leaves its other cells; a digit with
        one place in a unit goes there. Returns the boards and (B,) bool: no contradiction was found."""
        boards, alive, active = boards.copy(), np.ones(len(boards), bool), np.arange(len(boards))
        while len(active):
            old = boards[active]
            fixed = np.where(COUNT[old] == 1, old, 0).astype(np.uint16)
            taken = np.bitwise_or.reduce(fixed[:, self.units], 2)  # (b, 3n or 2n)
            new = np.where(fixed > 0, fixed, old & ~np.bitwise_or.reduce(taken[:, self.units_of], 1))
            once, twice = np.zeros_like(taken), np.zeros_like(taken)
            for place in self.units.T:  # (3n or 2n,): one cell of every unit
                twice |= once & new[:, place]
                once |= new[:, place]
            forced = new & np.bitwise_or.reduce((once & ~twice)[:, self.units_of], 1)
            ok = (once == self.full).all(1)  # every digit has a place in every unit
            new = np.where(forced > 0, forced, new)
            boards[active], alive[active] = new, ok
            active = active[ok & (new != old).any(1)]
        return boards, alive

    def solvable(self, boards: np.ndarray) -> np.ndarray:
        """(B,) bool: a completion exists. Breadth-first: one board per digit of the tightest cell."""
        found, owner = np.zeros(len(boards), bool), np.arange(len(boards))
        while len(boards):
            boards, alive = self.propagate(boards)
            solved = alive & (COUNT[boards] == 1).all(1)
            found[owner[solved]] = True
            going = alive & ~found[owner]
            boards, owner = boards[going], owner[going]
            cell = np.where(COUNT[boards] > 1, COUNT[boards], 99).argmin(1)
            choices = boards[np.arange(len(boards)), cell][:, None] & (1 << np.arange(self.n))  # (b, n)
            parent, digit = np.nonzero(choices)
            boards, owner = boards[parent], owner[parent]
            boards[np.arange(len(boards)), cell[parent]] = 1 << digit
        return found

    def solutions(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """At most `count` filled boards (b, n*n): random digits go into random tightest cells, boards that
        contradict themselves are dropped."""
        boards = np.full((count, self.n**2), self.full, np.uint16)
        while (COUNT[boards] > 1).any():
            choices = COUNT[boards]
            cell = np.where(choices > 1, choices + rng.random(choices.shape), 99).argmin(1)
            i = np.arange(len(boards))
            open_ = (boards[i, cell][:, None] & (1 << np.arange(self.n))) > 0  # (b, n)
            boards[i, cell] = 1 << (open_ * rng.random(open_.shape)).argmax(1)
            boards, alive = self.propagate(boards)
            boards = boards[alive]
        return boards

    def puzzles(self, solutions: np.ndarray, given: int,
                rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
        """Empty cells in random order, each only if no other digit could stand there, until `given` are left.
        Returns the solutions for which that worked and (b, n*n) bool, True = empty."""
        empty, i = np.zeros(solutions.shape, bool), np.arange(len(solutions))
        for cell in rng.random(solutions.shape).argsort(1).T:  # (B,): the next cell of every board
            other = np.where(empty, self.full, solutions)
            other[i, cell] = self.full & ~solutions[i, cell]
            todo = empty.sum(1) < self.n**2 - given
            todo[todo] = ~self.solvable(other[todo])
            empty[i[todo], cell[todo]] = True
        done = empty.sum(1) == self.n**2 - given
        return solutions[done], empty[done]


def check(filled: str, solution: str, given: str) -> bool:
    """There is one solution."""
    return filled == solution


def main(argv: list[str]) -> None:
    parser = options(__doc__, __file__)
    parser.add_argument("--size", type=whole(), default=6, choices=BOX, help="cells per row")
    usual = "given cells (default: 9 of 36, 32 of 81; without boxes 12 and 36)"
    parser.add_argument("--given", type=whole(0), help=usual)
    parser.add_argument("--no_boxes", action="store_true", help="rows and columns are the only rules")
    sizes(parser, train=30_000)
    args = parser.parse_args(argv)
    n, boxes = args.size, not args.no_boxes
    fewest, default = GIVEN[n, boxes]
    given = default if args.given is None else args.given
    if not fewest <= given < n * n:
        least = f"{fewest} (fewer are too rare to find)"
        raise ValueError(f"--given goes from {least} to {n * n - 1} for --size {n}")
    rules, tokenizer = Rules(n, boxes), CharTokenizer("123456789"[:n], ["<mask>"])  # digit d is token d - 1

    def draws(rng: np.random.Generator) -> Iterator[tuple[list[str], np.ndarray, np.ndarray]]:
        while True:
            boards, empty = rules.puzzles(rules.solutions(rng, 1024), given, rng)
            tokens = COUNT[boards - 1]  # the bit of digit d is 2**(d - 1), so d - 1 bits lie below it
            yield [relabelled(board) for board in tokens], tokens, empty

    with claimed(args.out):
        write_dataset(args.out, "sudoku", tokenizer, collect(args, draws), mask_id=n, eos_id=None,
                      source=SOURCE, licence="none needed", argv=argv,
                      facts={"seed": args.seed, "size": n, "given": given, "boxes": boxes})


if __name__ == "__main__":
    run(main)
