"""Tiny Shakespeare in subwords: the text of shakespeare_char in the tokens of a BPE.

By default those are the first 1,024 of GPT-2's, in merge order: about 450,000 tokens. More subwords than that
are too rare in so short a text to be learned from it. --tokenizer=FOLDER takes the BPE of a hub model. The
splits are those of shakespeare_char: the first 90 % of the characters are train.npy, the last 10 % val.npy,
and test.npy is the same text as val.npy. There is no right answer, so `check` is None.
"""
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a script, without an installation
from data.common import claimed, options, run, tokenizer_of, write_dataset
from data.shakespeare_char.prepare import SOURCE, text_of
from zoo.tools.command import whole

check = None


def main(argv: list[str]) -> None:
    parser = options(__doc__, __file__)
    parser.add_argument("--source", default=SOURCE,
                        help="address or file of the text (any UTF-8 text of 1,000 characters or more)")
    parser.add_argument("--tokenizer", default="gpt2", help="gpt2, bytes, or a folder with a hub tokenizer")
    parser.add_argument("--vocab_size", type=whole(0), default=1024,
                        help="keep this many tokens of the BPE, in merge order; 0 = all")
    args = parser.parse_args(argv)
    text = text_of(args.source)
    size = 0 if args.tokenizer == "bytes" else args.vocab_size
    tokenizer, mask_id, _ = tokenizer_of(args.tokenizer, size)
    cut = int(0.9 * len(text))
    train, val = (np.array(tokenizer.encode(part)) for part in (text[:cut], text[cut:]))
    with claimed(args.out):
        write_dataset(args.out, "shakespeare_bpe", tokenizer, {"train": train, "val": val, "test": val},
                      mask_id=mask_id, eos_id=None, source=args.source,
                      licence="public domain" if args.source == SOURCE else "as its source", argv=argv,
                      facts={})


if __name__ == "__main__":
    run(main)
