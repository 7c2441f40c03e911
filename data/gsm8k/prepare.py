"""GSM8K: grade-school word problems with worked solutions (Cobbe et al., "Training Verifiers to Solve Math Word Problems", 2021).

    Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May. How many clips did Natalia sell?
    Natalia sold 48/2 = 24 clips in May.
    Natalia sold 48+24 = 72 clips altogether in April and May.
    #### 72

The prompt is the question and a line break; the response is the solution, "#### result" and <eos> up to the fixed length (so a model learns
where to stop, as LLaDA does). The answer counts when the number after the first "####" equals the reference's: commas, "$", spaces and a
trailing dot do not matter. The calculator marks <<48/2=24>> of the original are removed unless --marks is given. Examples longer than
--length are dropped and counted in meta.json. test.npy is the original test set; val.npy is the 5 % of the original training set that a
hash of the question picks, train.npy the rest.

Tokenizers: `--tokenizer gpt2` (tiktoken fetches its files once; when it cannot, bytes are used), `--tokenizer bytes`, or a folder with a
hub tokenizer. `--vocab_size 4096` keeps the first 4096 tokens of a BPE in merge order: right for a small model.
"""
import json
import re
import sys
from decimal import Decimal
from pathlib import Path

import numpy as np
from tiktoken_ext import openai_public
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a script, without an installation
from data.common import Examples, options, read_text, run, split_of, write_dataset
from zoo import tokenizer as tokenizers

SOURCE = "https://raw.githubusercontent.com/openai/grade-school-math/master/grade_school_math/data"
SPECIALS = ["<eos>", "<mask>"]


def result(text: str) -> Decimal | None:
    """The number after the first "####"."""
    match = re.search(r"####[\s$]*(-?[\s$]*[\d,]*\.?\d+)", text, re.ASCII)
    return Decimal(re.sub(r"[\s$,]", "", match[1])) if match else None


def check(filled: str, solution: str, given: str) -> bool:
    """The results are equal as numbers."""
    return result(filled) == result(solution)


def read(source: str, name: str) -> list[dict[str, str]]:
    """The problems of one JSON-lines file. Raises ValueError with file and line number."""
    path, problems = f"{source.rstrip('/')}/{name}", []
    for number, line in enumerate(read_text(path, "JSON lines").split("\n"), 1):  # not splitlines: some questions hold U+2028
        if not line.strip():
            continue
        try:
            problem = json.loads(line)
            if not all(isinstance(problem[key], str) for key in ("question", "answer")):
                raise TypeError
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error.msg}); is the file truncated?") from error
        except (KeyError, TypeError) as error:
            raise ValueError(f'{path}, line {number}: expected an object with the texts "question" and "answer"') from error
        if result(problem["answer"]) is None:
            raise ValueError(f"{path}, line {number}: the answer has no #### followed by a number")
        problems.append(problem)
    return problems


def tokenizer_of(name: str, size: int) -> tuple[tokenizers.Tokenizer, int, int]:
    """The tokenizer, its mask id and its eos id. `size` > 0 keeps that many tokens in merge order."""
    if Path(name).is_dir():
        tokenizer = tokenizers.load(name)
        if not size:  # the folder's own ids, for a model that has them
            config = Path(name, "tokenizer_config.json")
            eos = json.loads(config.read_text(encoding="utf-8")).get("eos_token") if config.is_file() else "<eos>"
            eos = eos["content"] if isinstance(eos, dict) else eos
            mask = next((special for special in tokenizer.specials if "mask" in special.lower()), None)
            if mask is None or eos not in tokenizer.specials:
                raise ValueError(f"the tokenizer in {name} has no mask or no end token of its own: pass --vocab_size to add them")
            return tokenizer, tokenizer.specials[mask], tokenizer.specials[eos]
        if not isinstance(tokenizer, tokenizers.BPETokenizer):
            raise ValueError(f"the tokenizer in {name} is not a BPE: leave --vocab_size away")
    elif name == "bytes":
        tokenizer, size = tokenizers.bytes_tokenizer(SPECIALS), size or 256
    elif name == "gpt2":
        try:
            ranks = openai_public.gpt2()["mergeable_ranks"]
        except (OSError, ValueError) as error:
            print(f"tiktoken cannot fetch its gpt2 files ({type(error).__name__}): using bytes instead", file=sys.stderr)
            return tokenizer_of("bytes", 0)
        merged = dict(sorted(ranks.items(), key=lambda item: item[1]))
        tokenizer, size = tokenizers.BPETokenizer(merged, [tokenizers.GPT2], {}), size or len(merged)
    else:
        raise ValueError(f"--tokenizer {name}: expected gpt2, bytes, or a folder with a hub tokenizer")
    tokenizer = tokenizers.truncated(tokenizer, size, SPECIALS)
    return tokenizer, tokenizer.specials["<mask>"], tokenizer.specials["<eos>"]


def main(argv: list[str]) -> None:
    parser = options(__doc__, __file__)
    parser.add_argument("--source", default=SOURCE, help="address or folder that has train.jsonl and test.jsonl")
    parser.add_argument("--tokenizer", default="gpt2", help="gpt2, bytes, or a folder with a hub tokenizer")
    parser.add_argument("--vocab_size", type=int, default=0, help="keep this many tokens of a BPE, in merge order; 0 = all")
    parser.add_argument("--length", type=int, default=0, help="tokens per example; 0 = 256, or 640 with bytes")
    parser.add_argument("--marks", action="store_true", help="keep the calculator marks <<48/2=24>>")
    args = parser.parse_args(argv)
    if args.length < 0:
        raise ValueError("--length is a number of tokens, or 0 to choose")
    problems = {name: read(args.source, f"{name}.jsonl") for name in ("train", "test")}
    tested = {problem["question"] for problem in problems["test"]}
    tokenizer, mask_id, eos_id = tokenizer_of(args.tokenizer, args.vocab_size)
    length = args.length or (256 if tokenizer.vocab_size > 1000 else 640)
    rows, dropped = {"train": [], "val": [], "test": []}, {"train": 0, "val": 0, "test": 0}
    for name, problem in tqdm([(file, problem) for file in problems for problem in problems[file]], desc="tokens", unit=""):
        question, answer = problem["question"].strip(), problem["answer"].strip()
        split = "test" if name == "test" else "val" if split_of(question) == "val" else "train"
        prompt = tokenizer.encode(question + "\n")
        response = tokenizer.encode(answer if args.marks else re.sub("<<[^<>]*>>", "", answer))
        padding = length - len(prompt) - len(response)
        if padding < 1 or (name == "train" and problem["question"] in tested):
            dropped[split] += 1
        else:
            rows[split].append((prompt + response + [eos_id] * padding, len(prompt)))
    splits: dict[str, Examples] = {}
    for split, examples in rows.items():
        prompts = np.array([prompt for _, prompt in examples]).reshape(-1, 1)
        splits[split] = np.array([ids for ids, _ in examples]).reshape(-1, length), np.arange(length) >= prompts  # both (N, L)
    write_dataset(args.out, "gsm8k", tokenizer, splits, mask_id=mask_id, eos_id=eos_id, source=args.source,
                  licence="MIT" if args.source == SOURCE else "as its source", argv=argv,
                  facts={"tokenizer_name": args.tokenizer, "marks": args.marks, "dropped": dropped})


if __name__ == "__main__":
    run(main)
