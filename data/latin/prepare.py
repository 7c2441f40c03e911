"""Latin squares: reasoning that goes in no order and stays uncertain for many steps.

    given           a completion
    _ _ _ _ _ 3     1 6 5 4 2 3
    2 3 _ _ _ 4     2 3 6 5 1 4
    5 _ _ 6 3 _     5 1 4 6 3 2
    _ _ _ _ _ _     3 4 2 1 5 6
    _ 5 _ _ _ _     6 5 3 2 4 1
    _ 2 _ 3 _ _     4 2 1 3 6 5

Every row and every column holds each digit once. Some cells are given, the model fills the others, and any
valid completion counts: with 10 of 36 cells given there are usually many, so which digit goes where stays
open until enough cells are fixed. The canvas is the size*size cells in reading order, one token each,
without separators; the vocabulary is the digits and <mask>.

Squares are drawn with the Markov chain of Jacobson and Matthews ("Generating uniformly distributed random
Latin squares", J. Combin. Designs 4, 1996), many chains side by side. Its stationary distribution is
uniform over all Latin squares of the size; chains start at the cyclic square, run size^3 moves before the
first square is taken and size^2 between takes, and each square taken gets random row, column and symbol
permutations. Given cells are drawn uniformly. Squares equal up to a renaming of the digits always fall into
the same split.
"""
import sys
from collections.abc import Iterator
from math import isqrt
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a script, without an installation
from data.common import claimed, collect, options, run, sizes, write_dataset
from zoo.tokenizer import CharTokenizer
from zoo.tools.command import whole

SOURCE = "generated"


def latin_squares(n: int, rng: np.random.Generator, chains: int = 2048) -> Iterator[np.ndarray]:
    """Endless batches (b, n, n) of Latin squares over 0 … n-1, b <= chains.

    A square is a cube of zeros and ones, cube[r, c, s] = 1 where cell (r, c) holds s: each line in each of
    the three directions sums to 1. A move adds 1 at a cell that holds 0 (or at the only -1) and, to keep
    the sums, ±1 at the other corners of a box spanned with a 1 on each of its three lines. The far corner
    may become -1: that state is "improper", it is walked through but never taken."""
    i, rows = np.arange(chains), np.arange(n)
    cube = np.zeros((chains, n, n, n), np.int8)
    cube[:, rows[:, None], rows, (rows[:, None] + rows) % n] = 1
    debt = np.full((chains, 3), -1)  # where the -1 is, if there is one
    improper = np.zeros(chains, bool)

    def a_one(line: np.ndarray) -> np.ndarray:  # (chains, n) -> (chains,): a random place among the ones
        return ((line == 1) * rng.random(line.shape)).argmax(1)

    def move() -> None:
        r, c = rng.integers(n, size=(2, chains))
        s = (cube[i, r, c].argmax(1) + rng.integers(1, n, chains)) % n  # not the symbol that is there, so a 0
        r, c, s = np.where(improper[:, None], debt, np.stack((r, c, s), 1)).T
        r1, c1, s1 = a_one(cube[i, :, c, s]), a_one(cube[i, r, :, s]), a_one(cube[i, r, c])
        for (a, b, d), sign in (((r, c, s), 1), ((r, c1, s1), 1), ((r1, c, s1), 1), ((r1, c1, s), 1),
                                ((r1, c, s), -1), ((r, c1, s), -1), ((r, c, s1), -1), ((r1, c1, s1), -1)):
            cube[i, a, b, d] += sign
        improper[:] = cube[i, r1, c1, s1] < 0
        debt[:] = np.stack((r1, c1, s1), 1)

    for _ in range(n**3):
        move()
    while True:
        squares = cube[~improper].argmax(3)  # (b, n, n)
        order = rng.random((3, len(squares), n)).argsort(2)
        squares = np.take_along_axis(squares, order[0][:, :, None], 1)  # rows
        squares = np.take_along_axis(squares, order[1][:, None, :], 2)  # columns
        yield np.take_along_axis(order[2][:, None, :], squares, 2)      # symbols
        for _ in range(n**2):
            move()


def relabelled(grid: np.ndarray) -> str:
    """The grid with symbols renamed in order of appearance, one name for all grids equal up to renaming."""
    names = {}
    return "".join(str(names.setdefault(s, len(names))) for s in grid.tolist())


def layout(text: str) -> str:
    """One line per row: n tokens for n * n of them, n / 2 if a token is two cells (data/sudoku)."""
    n = isqrt(len(text))
    n = n if n * n == len(text) else isqrt(2 * len(text)) // 2
    return "\n".join(" ".join(text[i:i + n]) for i in range(0, len(text), n))


def check(filled: str, solution: str, given: str) -> bool:
    """Given cells are kept, every line holds each digit once; `solution` is one of the right answers."""
    n = isqrt(len(solution))
    digits = set("123456789"[:n])
    lines = [filled[i * n:(i + 1) * n] for i in range(n)] + [filled[i::n] for i in range(n)]
    kept = len(filled) == n * n and all(g in ("_", f) for f, g in zip(filled, given))
    return kept and all(set(line) == digits for line in lines)


def main(argv: list[str]) -> None:
    parser = options(__doc__, __file__)
    parser.add_argument("--size", type=whole(3, 9), default=6, help="cells per row, 3 to 9")
    parser.add_argument("--given", type=whole(0), help="given cells (default: 10 of 36, in proportion)")
    sizes(parser, train=100_000)
    args = parser.parse_args(argv)
    n = args.size
    shown = n * n * 10 // 36 if args.given is None else args.given
    if shown >= n * n:
        raise ValueError(f"--given goes from 0 to {n * n - 1} for --size {n}")
    tokenizer = CharTokenizer("123456789"[:n], ["<mask>"])  # digit d is token d - 1

    def draws(rng: np.random.Generator) -> Iterator[tuple[list[str], np.ndarray, np.ndarray]]:
        for squares in latin_squares(n, rng):
            tokens = squares.reshape(-1, n * n)  # (b, n, n) -> (b, n*n)
            empty = rng.random(tokens.shape).argsort(1) >= shown
            yield [relabelled(square) for square in tokens], tokens, empty

    with claimed(args.out):
        write_dataset(args.out, "latin", tokenizer, collect(args, draws), mask_id=n, eos_id=None,
                      source=SOURCE, licence="none needed", argv=argv,
                      facts={"seed": args.seed, "size": n, "given": shown})


if __name__ == "__main__":
    run(main)
