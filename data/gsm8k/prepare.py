"""GSM8K: grade-school word problems with worked solutions (Cobbe et al., "Training Verifiers to Solve Math
Word Problems", 2021).

    Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May. How many
    clips did Natalia sell? Natalia sold 48/2 = 24 clips in May. Natalia sold 48+24 = 72 clips altogether in
    April and May. #### 72

The prompt is the question and a line break; the response is the solution, "#### result" and <eos> up to the
fixed length (so a model learns where to stop, as LLaDA does). The answer counts when the number after the
first "####" equals the reference's: commas, "$", spaces and a trailing dot do not matter. The calculator
marks <<48/2=24>> of the original are removed unless --marks is given. Examples longer than --length are
dropped and counted in meta.json. test.npy is the original test set; val.npy is the 5 % of the original
training set that a hash of the question picks, train.npy the rest.

Tokenizers: `--tokenizer gpt2` (tiktoken fetches its files once; when it cannot, bytes are used),
`--tokenizer bytes`, or a folder with a hub tokenizer. `--vocab_size 4096` keeps the first 4096 tokens of a
BPE in merge order: right for a small model.

To convert a pretrained model, `--tokenizer FOLDER --chat auto` writes question and solution as the model's
own chat template does, and `--pack --block 4` puts several examples into each row of the training set
(data/common.py tells how).
"""
import json
import re
import sys
from decimal import Decimal
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a script, without an installation
from data.answers import response
from data.common import (Documents, Encoder, claimed, document_options, options, read_text, run,
                         split_of, write_dataset)  # fmt: skip
from zoo.progress import progress

SOURCE = "https://raw.githubusercontent.com/openai/grade-school-math/master/grade_school_math/data"


def result(text: str) -> Decimal | None:
    """The number after the first "####"."""
    match = re.search(r"####[\s$]*(-?[\s$]*[\d,]*\.?\d+)", text, re.ASCII)
    return Decimal(re.sub(r"[\s$,]", "", match[1])) if match else None


def check(filled: str, solution: str, given: str) -> bool:
    """The results are equal as numbers. Only the response is looked at, up to the end token."""
    return result(response(filled, solution, given)) == result(response(solution, solution, given))


def read(source: str, name: str) -> list[dict[str, str]]:
    """The problems of one JSON-lines file. Raises ValueError with file and line number."""
    path, problems = f"{source.rstrip('/')}/{name}", []
    for number, line in enumerate(read_text(path, "JSON lines").split("\n"), 1):  # splitlines: also at U+2028
        if not line.strip():
            continue
        try:
            problem = json.loads(line)
            if not all(isinstance(problem[key], str) for key in ("question", "answer")):
                raise TypeError
        except json.JSONDecodeError as error:
            why = f"not JSON ({error.msg}); is the file truncated?"
            raise ValueError(f"{path}, line {number}: {why}") from error
        except (KeyError, TypeError) as error:
            wanted = 'an object with the texts "question" and "answer"'
            raise ValueError(f"{path}, line {number}: expected {wanted}") from error
        if result(problem["answer"]) is None:
            raise ValueError(f"{path}, line {number}: the answer has no #### followed by a number")
        problems.append(problem)
    return problems


def main(argv: list[str]) -> None:
    parser = options(__doc__, __file__)
    parser.add_argument("--source", default=SOURCE, help="address or folder with train.jsonl and test.jsonl")
    document_options(parser, 0, explained="tokens per example; 0 = 256, or 640 with bytes")
    parser.add_argument("--marks", action="store_true", help="keep the calculator marks <<48/2=24>>")
    args = parser.parse_args(argv)
    problems = {name: read(args.source, f"{name}.jsonl") for name in ("train", "test")}
    tested, encoder = {problem["question"] for problem in problems["test"]}, Encoder(args)
    documents = Documents(encoder, args.out)
    with progress(sum(map(len, problems.values())), "prepare", "examples") as bar:
        for name, problem in ((file, problem) for file in problems for problem in problems[file]):
            question, answer = problem["question"].strip(), problem["answer"].strip()
            answer = answer if args.marks else re.sub("<<[^<>]*>>", "", answer)
            split = "test" if name == "test" else "val" if split_of(question) == "val" else "train"
            if name == "train" and problem["question"] in tested:
                documents.dropped[split] += 1
            else:
                documents.add(split, *encoder.encode(question, answer))
            bar.update()
    facts = {"tokenizer_name": args.tokenizer, "marks": args.marks, "dropped": documents.dropped}
    with claimed(args.out):
        write_dataset(args.out, "gsm8k", encoder.tokenizer, documents.splits(), mask_id=encoder.mask_id,
                      eos_id=encoder.end_id, source=args.source, argv=argv, facts=facts | documents.facts(),
                      licence="MIT" if args.source == SOURCE else "as its source")


if __name__ == "__main__":
    run(main)
