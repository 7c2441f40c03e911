r"""MATH-500: 500 problems of the MATH test set (Hendrycks et al., 2021), chosen by Lightman et al., 2023.
For evaluation only: there is nothing but test.npy.

A row is the problem and the room for a solution, whose reference is the final answer in a \boxed{}. A
canvas counts when the last box of the response holds the same (data/answers.py). The paper evaluates SDAR
with 16,384 tokens and LLaDA with 512 (--length).

    python data/math500/prepare.py --tokenizer FOLDER-OF-THE-MODEL --chat auto
    python sample.py --model FOLDER-OF-THE-MODEL --eval math500
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a script, without an installation
from data import answers
from data.common import run
from data.hub import parser_of, write_benchmark

REPO, FILES = "HuggingFaceH4/MATH-500", ["test.jsonl"]
SOURCE = f"https://huggingface.co/datasets/{REPO}"
check = answers.check


def main(argv: list[str]) -> None:
    args = parser_of(__doc__, __file__, 2048, train=False).parse_args(argv)
    write_benchmark(args, argv, "math500", REPO, FILES, "MIT")


if __name__ == "__main__":
    run(main)
