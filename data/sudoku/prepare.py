"""Sudoku: a Latin square whose boxes hold each digit once too, and here with exactly one solution.

    given           the solution
    _ _ _ 5 6 _     1 3 4 5 6 2
    _ _ _ 3 _ 1     5 6 2 3 4 1
    2 _ _ _ _ _     2 1 6 4 5 3
    _ 4 _ _ 2 _     3 4 5 1 2 6
    6 5 _ _ _ _     6 5 1 2 3 4
    _ _ _ _ 1 _     4 2 3 6 1 5

The small one is 6x6 with boxes of 2x3, --size 8 has boxes of 2x4, --size 9 is the newspaper's. --no_boxes
leaves the boxes out: another puzzle, a Latin square with one solution (data/latin has squares with many). The
canvas is the size*size cells in reading order, one token each, without separators; the vocabulary is the
digits and <mask>. The model fills the empty cells, and its answer counts when it is the solution.

--pairs makes one token of two neighbouring cells, as a subword holds several letters: 18 tokens of 36 kinds
instead of 36 of 6, with --size 8 32 of 64. Digits a and b of 1 to n are character n (a - 1) + b - 1 of 0 to
9, A to Z, a to z, + and =. What a model predicts then is a joint distribution of two cells. Pairs are given
or empty as a whole.

Full boards are drawn by putting random digits into random tightest cells and following forced moves; boards
that end in a contradiction are thrown away (every board can come out, not all equally often). Then cells
are emptied in random order, each only if the solution stays the only one, until --given are left. All of it
runs on many boards at once, a cell being a bit set of its possible digits. Puzzles whose solutions are
equal up to a renaming of the digits always fall into the same split.
"""
import string
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
BOX = {6: (2, 3), 8: (2, 4), 9: (3, 3)}  # size: rows and columns of a box
# (size, boxes, pairs): the fewest tokens given that are not too rare to find, and the usual number
GIVEN = {(6, True, False): (9, 9), (6, False, False): (11, 12), (8, True, False): (18, 20),
         (8, False, False): (23, 25), (9, True, False): (24, 32), (9, False, False): (30, 36),
         (6, True, True): (5, 5), (6, False, True): (6, 6), (8, True, True): (11, 12),
         (8, False, True): (13, 14)}  # fmt: skip
PAIRS = string.digits + string.ascii_uppercase + string.ascii_lowercase + "+="
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

    def puzzles(self, solutions: np.ndarray, given: int, rng: np.random.Generator,
                width: int = 1) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
        """Empty tokens of `width` cells in random order, each only if nothing else could stand there, until
        `given` are left. Returns the solutions for which that worked and (b, n*n / width) bool, True = empty.
        """
        count = self.n**2 // width
        empty, i = np.zeros((len(solutions), count), bool), np.arange(len(solutions))
        for token in rng.random(empty.shape).argsort(1).T:  # (B,): the next token of every board
            todo = empty.sum(1) < count - given
            for cell in range(width):  # something else differs in one of its cells
                other = np.where(empty.repeat(width, 1), self.full, solutions)
                digit = solutions[i, token * width + cell]
                other.reshape(-1, count, width)[i, token] = self.full
                other[i, token * width + cell] = self.full & ~digit
                todo[todo] = ~self.solvable(other[todo])
            empty[i[todo], token[todo]] = True
        done = empty.sum(1) == count - given
        return solutions[done], empty[done]


def check(filled: str, solution: str, given: str) -> bool:
    """There is one solution."""
    return filled == solution


def main(argv: list[str]) -> None:
    parser = options(__doc__, __file__)
    parser.add_argument("--size", type=whole(), default=6, choices=BOX, help="cells per row")
    usual = "given cells (default: 9 of 36, 20 of 64, 32 of 81; without boxes 12, 25, 36), or pairs"
    parser.add_argument("--given", type=whole(0), help=f"{usual} (5 of 18, 12 of 32; 6, 14)")
    parser.add_argument("--no_boxes", action="store_true", help="rows and columns are the only rules")
    parser.add_argument("--pairs", action="store_true", help="a token is two cells; not with --size 9")
    sizes(parser, train=30_000)
    args = parser.parse_args(argv)
    n, boxes, width = args.size, not args.no_boxes, 1 + args.pairs
    if n % width:
        raise ValueError(f"--pairs does not fit --size {n}: a row of {n} cells has no whole number of pairs")
    fewest, default = GIVEN[n, boxes, args.pairs]
    given, most = default if args.given is None else args.given, n * n // width - 1
    if not fewest <= given <= most:
        least = f"{fewest} (fewer are too rare to find)"
        raise ValueError(f"--given goes from {least} to {most} for --size {n}{' --pairs' * args.pairs}")
    rules = Rules(n, boxes)
    kinds = PAIRS[: n * n] if args.pairs else "123456789"[:n]
    tokenizer = CharTokenizer(kinds, ["<mask>"])  # alone, digit d is token d - 1

    def draws(rng: np.random.Generator) -> Iterator[tuple[list[str], np.ndarray, np.ndarray]]:
        while True:
            boards, empty = rules.puzzles(rules.solutions(rng, 1024), given, rng, width)
            digits = COUNT[boards - 1]  # the bit of digit d is 2**(d - 1), so d - 1 bits lie below it
            tokens = digits.reshape(-1, n * n // width, width) @ n ** np.arange(width)[::-1]
            yield [relabelled(board) for board in digits], tokens, empty

    with claimed(args.out):
        write_dataset(args.out, "sudoku", tokenizer, collect(args, draws), mask_id=n**width,
                      eos_id=None, source=SOURCE, licence="none needed", argv=argv,
                      facts={"seed": args.seed, "size": n, "given": given, "boxes": boxes,
                             "pairs": args.pairs})  # fmt: skip


if __name__ == "__main__":
    run(main)
