r"""AIME: the 30 problems of a year's American Invitational Mathematics Examination, with answers from 0 to
999. For evaluation only: there is nothing but test.npy.

A row is the problem and the room for a solution, whose reference is the answer in a \boxed{}. A canvas
counts when the last box of the response holds the same (data/answers.py). The paper evaluates 2024 and
2025, with 16,384 tokens (--length).

    python data/aime/prepare.py --tokenizer FOLDER-OF-THE-MODEL --chat auto --year 2025 --out data/aime25
    python sample.py --model FOLDER-OF-THE-MODEL --eval data/aime25

The files of 2024 need pyarrow: pip install -e ".[data]"
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a script, without an installation
from data import answers
from data.common import run
from data.hub import parser_of, write_benchmark
from zoo.tools.command import whole

YEARS = {2024: ("HuggingFaceH4/aime_2024", ["data/train-*.parquet"]),  # its only split is called train
         2025: ("opencompass/AIME2025", ["aime2025-I.jsonl", "aime2025-II.jsonl"])}  # fmt: skip
SOURCE = "https://huggingface.co/datasets/HuggingFaceH4/aime_2024"
check = answers.check


def main(argv: list[str]) -> None:
    parser = parser_of(__doc__, __file__, 2048, train=False)
    parser.add_argument("--year", type=whole(), choices=YEARS, default=2024, help="of the hub's files")
    args = parser.parse_args(argv)
    write_benchmark(args, argv, "aime", *YEARS[args.year], "as its source")


if __name__ == "__main__":
    run(main)
