r"""OpenMathInstruct-2 (Toshniwal et al., "OpenMathInstruct-2", 2024): problems derived from GSM8K and MATH,
solved by Llama 3.1 405B; what the paper converts LLaDA with.

The prompt is the problem, the response its generated solution; the answer counts when the last box of the
response holds the same as the reference's (data/answers.py). As in the paper a million samples of up to
2,048 tokens: from the hub, the authors' own fair sample (train_1M); from other files, those that come
first. A problem has several solutions, all of them in the same split; --seed decides the order.

All cores encode. A preparation that was interrupted or killed goes on with the same command: data/store.py.

    python data/openmathinstruct2/prepare.py --tokenizer FOLDER-OF-THE-MODEL --chat auto --pack

Needs pyarrow: pip install -e ".[data]"
"""
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a script, without an installation
from data import answers
from data.common import run
from data.hub import GOES_ON, Pair, parser_of, records, texts, write_training_set

REPO, FILES = "nvidia/OpenMathInstruct-2", ["data/train_1M-*.parquet"]
SOURCE = f"https://huggingface.co/datasets/{REPO}"
COLUMNS = {"problem": ("problem", "question"), "solution": ("generated_solution", "solution")}
check = answers.check


def pairs(files: list[Path], done: int) -> Iterator[Pair]:
    for place, record in records(files, COLUMNS, done=done):
        yield texts(place, [record["problem"]]), texts(place, [record["solution"]])


def main(argv: list[str]) -> None:
    parser = parser_of(__doc__, __file__, 2048, train=True)
    parser.set_defaults(samples=1_000_000)
    args = parser.parse_args(argv)
    write_training_set(args, argv, "openmathinstruct2", REPO, FILES, pairs, "CC-BY-4.0")


if __name__ == "__main__":
    run(main, GOES_ON)
