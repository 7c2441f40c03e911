"""Make the data for R2-dLLM's fine-tuning, in kind: a model's own least redundant answers.

What comes out is a data set like the one that the canvases come from, with another train split. Then
train.py --weighting=complementary trains on it, as the package says.

Examples:
  python -m zoo.rivals.redundancy           answers of the shipped SeqD model to Sudoku
  python train.py --data=out/redundancy --name=redundancy --stage=reference --weighting=complementary \\
                  --init_from=sudoku/reference
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # see train.py

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import data
import zoo
from data.common import claimed, write_array
from rcd import check
from zoo.decoding import Carry, Decoding, carry_options
from zoo.files import write_atomic
from zoo.progress import progress
from zoo.tools import checks
from zoo.tools.command import arguments, pick_device, run
from zoo.tools.evaluate import Setting
from zoo.tools.volume import fill


@dataclass
class Options:
    """whose answers, to what, and how many are kept"""

    model: str = "sudoku/reference"  # run folder, name of a run under out/ or of a model in zoo/
    data: str = "sudoku"  # data set, by name or folder: its train split is answered
    out: str = "out/redundancy"  # folder of the new data set
    items: int = 4000  # canvases to answer: the first ones of the train split
    keep: float = 0.5  # share of the answers that is kept
    batch: int = 250  # canvases side by side
    threshold: float = 0.9  # of --rule=r2: confidence that commits
    rescue: float = 0.8  # of --rule=r2: mean of a window, run or streak that commits
    device: str = ""  # cuda | mps | cpu; default: the best one found
    dtype: str = ""  # bfloat16 | float16 | float32, of the model's matmuls

    def __post_init__(self):
        check(self.items > 0 and self.batch > 0, f"items={self.items}, batch={self.batch}: at least 1 each")
        check(0 < self.keep <= 1, f"keep={self.keep} should be above 0 and at most 1")


def main() -> None:
    (o,) = arguments(__doc__, Options)
    device, dtype, reason = pick_device(o.device, o.dtype)
    loaded, dataset, out = zoo.load(o.model, device), data.load(o.data), Path(o.out)
    examples = dataset.response("train") is not None and not dataset.packed("train")
    check(examples, f"--data={o.data}: the answers need canvases of examples, one to a row")
    checks.check_tokens(dataset, o.model, "")
    check(out.resolve() != dataset.folder.resolve(), f"--out={o.out} is the data set that is read")
    with claimed(out):
        print(f"{reason}\n{loaded.folder} answers {dataset.folder}")
        tokens, response = dataset.tokens("train")[: o.items], dataset.response("train")[: o.items]
        tokens, response = torch.from_numpy(tokens.astype(np.int64)), torch.from_numpy(response.copy())
        s = Decoding(rule="r2", threshold=o.threshold, rescue=o.rescue,
                     carry="residual" if loaded.meta.get("stage") == "target" else "none")  # fmt: skip
        residual = Carry(**carry_options(loaded.meta.get("residual", {})))
        setting = Setting("", loaded.model, None, s, residual)
        answers = []
        with progress(len(tokens), "answers", "canvases") as bar:
            for some in tokens.masked_fill(response, loaded.model.config.mask_id).split(o.batch):
                answers += fill(setting, some.tolist(), dtype, 0)
                bar.update(len(some))
        scores = torch.tensor([a.nfe / a.tokens for a in answers], dtype=torch.float64)  # (N,)
        order = scores.argsort(stable=True)  # the least redundant first; of two equal ones the earlier
        kept = order[: max(1, round(o.keep * len(order)))].sort().values

        (out / "meta.json").unlink(missing_ok=True)  # until all of it is there, it is no data set
        dataset.tokenizer.save(out)
        for path in dataset.folder.glob("*.npy"):
            if not path.name.startswith("train"):
                shutil.copyfile(path, out / path.name)
        filled = np.array([answers[i].canvas for i in kept.tolist()], dtype=dataset.tokens("train").dtype)
        write_array(out / "train.npy", filled)
        write_array(out / "train_response.npy", response[kept].numpy())
        answered = {"answers": {"model": o.model, "rule": "r2", "threshold": o.threshold, "rescue": o.rescue}}
        meta = dataset.meta | answered | {"splits": dataset.meta["splits"] | {"train": len(kept)}}
        write_atomic(out / "meta.json", lambda path: path.write_text(json.dumps(meta, indent=2) + "\n"))
    told = f"{scores.mean():.3f} passes per token, {scores[kept].mean():.3f} of those kept"
    print(f"{len(kept):,} of {len(scores):,} answers -> {out} ({told})")
    trained = (f"--data={out} --name=redundancy --stage=reference --init_from={o.model} "
               "--weighting=complementary")  # fmt: skip
    print(f"try: python train.py {trained}")


if __name__ == "__main__":
    run(main)
