"""Running sums: a chain of thought in which every step needs the one before.

    4+6+9+7+1+7=10,19,26,27,34.

The prompt is a sum of digits, the response writes down every partial sum: 4+6 = 10, 10+9 = 19, ..., 27+7 =
34. A model that fills all positions in one pass has to do all the additions at once; filling one token at a
time it only ever adds two numbers. At this length a small model still learns to do both; more --terms make
the chain longer, and --digits=2 is a good deal harder to learn: carries go from right to left, the digits
are written from left to right. The answer counts when every partial sum is right. Characters are tokens;
the response is padded with <eos> to a fixed length.

Two problems with the same terms in another order are the same problem: they always fall into the same split.
"""
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a script, without an installation
from data.common import claimed, collect, options, run, sizes, write_dataset
from zoo.tokenizer import CharTokenizer
from zoo.tools.command import whole

SOURCE = "generated"
TOKENIZER = CharTokenizer("0123456789+=,.", ["<eos>", "<mask>"])


def problem(terms: list[int]) -> tuple[str, str]:
    """The prompt and the response."""
    partial = np.cumsum(terms)[1:]
    return "+".join(map(str, terms)) + "=", ",".join(map(str, partial)) + "."


def check(filled: str, solution: str, given: str) -> bool:
    """Every partial sum is right; what stands after the first <eos> does not count."""
    return filled.split("<eos>")[0] == solution.split("<eos>")[0]


def main(argv: list[str]) -> None:
    parser = options(__doc__, __file__)
    parser.add_argument("--terms", type=whole(2, 20), default=6,
                        help="numbers to add, 2 to 20: the chain has one step less")
    parser.add_argument("--digits", type=whole(1, 6), default=1, help="digits of each number, 1 to 6")
    sizes(parser, train=100_000)
    args = parser.parse_args(argv)
    low, high = 10 ** (args.digits - 1), 10**args.digits  # no leading zeros: all prompts are as long
    prompt_length, length = map(len, problem([high - 1] * args.terms))
    length += prompt_length
    eos_id, mask_id = TOKENIZER.specials["<eos>"], TOKENIZER.specials["<mask>"]
    is_response = np.arange(length) >= prompt_length

    def draws(rng: np.random.Generator) -> Iterator[tuple[list[str], np.ndarray, np.ndarray]]:
        while True:
            numbers = rng.integers(low, high, (2048, args.terms))
            tokens = np.full((len(numbers), length), eos_id, np.uint16)
            for row, terms in zip(tokens, numbers):
                ids = TOKENIZER.encode("".join(problem(terms)))
                row[:len(ids)] = ids
            keys = [" ".join(map(str, sorted(terms))) for terms in numbers]
            yield keys, tokens, np.tile(is_response, (len(numbers), 1))

    with claimed(args.out):
        write_dataset(args.out, "sums", TOKENIZER, collect(args, draws), mask_id=mask_id, eos_id=eos_id,
                      source=SOURCE, licence="none needed", argv=argv,
                      facts={"seed": args.seed, "terms": args.terms, "digits": args.digits})


if __name__ == "__main__":
    run(main)
