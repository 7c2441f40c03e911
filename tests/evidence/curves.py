"""Training curves of some runs in one picture: `python tests/evidence/curves.py out/gsm8k out/shakespeare1 --save=tests/evidence/text`.

A run folder's stages follow each other; a curve is the validation bound (nats per token), a dot the end of a stage. NAME.json keeps the
numbers and the commands, NAME.png is the picture.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a script, from anywhere
from zoo.files import write_atomic

STAGES = ("base", "reference", "target")


def read(folder: Path) -> dict:
    """{stage: {command, parameters of the run, tokens, val_loss}} of a run folder."""
    out = {}
    for stage in STAGES:
        if (folder / stage / "train.json").is_file():
            meta = json.loads((folder / stage / "train.json").read_text())
            log = [json.loads(line) for line in (folder / stage / "log.jsonl").read_text().splitlines()]
            points = [(e["tokens"], e["val_loss"]) for e in log if "val_loss" in e]
            out[stage] = {"command": meta["command"], "seed": meta["seed"], "tokens": [t for t, _ in points], "val_loss": [v for _, v in points]}
    if not out:
        raise FileNotFoundError(f"{folder} holds no finished stage")
    return out


def main() -> None:
    from matplotlib.figure import Figure

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--save", type=Path, required=True, help="write SAVE.json and SAVE.png")
    o = parser.parse_args()
    try:
        runs = {folder.name: read(folder) for folder in o.runs}
    except (OSError, ValueError) as error:
        sys.exit(print(f"error: {error}", file=sys.stderr) or 2)
    figure = Figure(figsize=(4 * len(runs), 3.4), layout="constrained")
    for axes, (name, stages) in zip(figure.subplots(1, len(runs), squeeze=False)[0], runs.items()):
        for k, (stage, curve) in enumerate(stages.items()):
            start = 0 if stage == "base" else max(stages.get("base", {"tokens": [0]})["tokens"])  # both stages start from the base
            axes.plot([start + t for t in curve["tokens"]], curve["val_loss"], "o-", markersize=3, color=f"C{k}", label=stage)
        axes.set(title=name, xlabel="tokens trained on", ylabel="validation bound, nats per token")
        axes.grid(alpha=0.3)
        axes.legend()
    write_atomic(o.save.with_suffix(".png"), lambda temporary: figure.savefig(temporary, format="png", dpi=110))
    write_atomic(o.save.with_suffix(".json"), lambda path: path.write_text(json.dumps(runs, indent=1) + "\n"))


if __name__ == "__main__":
    main()
