r"""OpenR1-Math-220k (open-r1, 2025): competition problems with verified solutions by DeepSeek-R1; what the
paper converts SDAR with.

The prompt is the problem; the response is the first generation that is complete, was found correct (by
Math-Verify or by Llama as a judge), has a \boxed{} answer and fits: the paper keeps samples of up to 8,192
tokens, the default --length. A generation begins with its reasoning in <think> tags. The answer counts when
the last box of the response holds the same as the reference's (data/answers.py).

    python data/openr1_math/prepare.py --tokenizer FOLDER-OF-THE-MODEL --chat auto --pack --block 32

The paper does not name the subset: `default` has 94k problems and is what its authors recommend for
fine-tuning, `extended` 131k easier ones, `all` both. Needs pyarrow: pip install -e ".[data]"

All cores encode. A preparation that was interrupted or killed goes on with the same command: data/store.py.
"""
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a script, without an installation
from data import answers
from data.common import run
from data.hub import GOES_ON, Pair, parser_of, records, texts, write_training_set

REPO = "open-r1/OpenR1-Math-220k"
SUBSETS = {"default": "data", "extended": "extended", "all": "all"}  # name -> folder
SOURCE = f"https://huggingface.co/datasets/{REPO}"
JUDGED = ("generations", "correctness_math_verify", "correctness_llama", "is_reasoning_complete")
COLUMNS = {name: (name,) for name in JUDGED}
check = answers.check


def correct(place: str, record: dict) -> list[str]:
    """The generations that are complete, as far as is known, and correct by at least one judge."""
    lists = [record[name] for name in COLUMNS]
    if not all(isinstance(values, list | None) for values in lists):
        raise ValueError(f"{place}: expected lists in {', '.join(COLUMNS)}")
    if record["is_reasoning_complete"] is None:
        lists[3] = [True] * len(lists[0] or [])
    rows = itertools.zip_longest(*(values or [] for values in lists))
    right = [text for text, verified, judged, complete in rows if (verified or judged) and complete]
    return texts(place, right)


def pairs(files: list[Path], done: int) -> Iterator[Pair]:
    columns = {"problem": ("problem", "question"), **COLUMNS}
    for place, record in records(files, columns, ("correctness_llama", "is_reasoning_complete"), done):
        yield texts(place, [record["problem"]]), correct(place, record)


def main(argv: list[str]) -> None:
    parser = parser_of(__doc__, __file__, 8192, train=True)
    parser.add_argument("--subset", choices=SUBSETS, default="default", help="of the hub's files")
    args = parser.parse_args(argv)
    patterns = [f"{SUBSETS[args.subset]}/train-*.parquet"]
    write_training_set(args, argv, "openr1_math", REPO, patterns, pairs, "Apache-2.0")


if __name__ == "__main__":
    run(main, GOES_ON)
