"""Tiny Shakespeare, one token per character: a real text of 1,115,394 characters to model, as in nanoGPT.

    ROMEO:
    But, soft! what light through yonder window breaks?

The vocabulary is the 65 characters of the text and <mask>. The splits are exactly nanoGPT's, so figures
compare: train.npy is the first 90 % of the text, val.npy the last 10 %. nanoGPT has no third split and
test.npy is the same text as val.npy (halving it would not do: the second half is 0.2 nats per character
harder for a 5-gram model). There is no right answer, so `check` is None.
"""
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a script, without an installation
from data.common import claimed, options, read_text, run, write_dataset
from zoo.tokenizer import CharTokenizer

SOURCE = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
check = None


def text_of(source: str) -> str:
    """The text at an address or in a file. Raises ValueError for fewer than 1,000 characters."""
    text = read_text(source, "plain text")
    if len(text) < 1000:
        few = f"{len(text)} characters are too few; expected a text of 1,000 or more"
        raise ValueError(f"{source}: {few}")
    return text


def main(argv: list[str]) -> None:
    parser = options(__doc__, __file__)
    parser.add_argument("--source", default=SOURCE,
                        help="address or file of the text (any UTF-8 text of 1,000 characters or more)")
    args = parser.parse_args(argv)
    text = text_of(args.source)
    tokenizer = CharTokenizer(sorted(set(text)), ["<mask>"])
    tokens = np.array(tokenizer.encode(text))
    train, val = np.split(tokens, [int(0.9 * len(tokens))])
    with claimed(args.out):
        write_dataset(args.out, "shakespeare_char", tokenizer, {"train": train, "val": val, "test": val},
                      mask_id=tokenizer.specials["<mask>"], eos_id=None, source=args.source,
                      licence="public domain" if args.source == SOURCE else "as its source", argv=argv,
                      facts={})


if __name__ == "__main__":
    run(main)
