"""Several seeds of one experiment in one table: `python tests/evidence/merge.py out/seed1 out/seed2 out/seed3 --save=tests/evidence/sudoku`.

Every run folder holds the table.json that train.py wrote. A row's accuracy is the mean over seeds; its 95 % interval is a bootstrap that
draws seeds and, within them, test items, so it covers both. NAME.json keeps what the table and the picture NAME.png are made of.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a script, from anywhere
from zoo.files import write_atomic


def bootstrap(correct: np.ndarray, draws: int = 2000) -> tuple[float, float]:
    """95 % interval of the mean of correct (seeds, items)."""
    rng, (S, N) = np.random.default_rng(0), correct.shape
    means = [correct[rng.integers(S, size=S)][np.arange(S)[:, None], rng.integers(N, size=(S, N))].mean() for _ in range(draws)]
    return tuple(np.percentile(means, (2.5, 97.5)).tolist())


def merge(folders: list[Path]) -> list[dict]:
    """The rows that all runs have, over their seeds. Raises ValueError for runs that do not belong together."""
    tables = [json.loads((folder / "table.json").read_text()) for folder in folders]
    keyed = [{(r["label"], r["rule"], r["value"]): r for r in t["rows"]} for t in tables]
    if len({t["seed"] for t in tables}) < len(tables):
        raise ValueError("two of these runs have the same seed")
    if any(k.keys() != keyed[0].keys() for k in keyed):
        raise ValueError("these runs were not evaluated under the same settings")
    rows = []
    for label, rule, value in keyed[0]:
        group = [k[label, rule, value] for k in keyed]
        correct = np.array([r["correct"] for r in group])  # (seeds, items)
        rows.append({
            "label": label, "rule": rule, "value": value, "accuracy": float(correct.mean()), "interval": bootstrap(correct),
            "by_seed": correct.mean(1).round(4).tolist(), "nfe": float(np.mean([r["nfe"] for r in group])),
        })  # fmt: skip
    return rows


def table(rows: list[dict]) -> str:
    """Markdown: one line per setting, the models side by side."""
    labels = list(dict.fromkeys(r["label"] for r in rows))
    lines = ["| rule | " + " | ".join(f"{label}: accuracy (95 %) | NFE" for label in labels) + " |", "|---|" + "--:|--:|" * len(labels)]
    for rule, value in dict.fromkeys((r["rule"], r["value"]) for r in rows):
        cells, name = [], f"threshold {value:g}" if rule == "threshold" else f"{value} step" + "s" * (value > 1)
        for label in labels:
            r = next(r for r in rows if (r["label"], r["rule"], r["value"]) == (label, rule, value))
            cells += [f"{r['accuracy']:.1%} ({r['interval'][0]:.1%} to {r['interval'][1]:.1%})", f"{r['nfe']:.2f}"]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(rows: list[dict], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    for axes, (rule, title) in zip(figure.subplots(1, 2, sharey=True), (("threshold", "confidence threshold"), ("static", "step budget"))):
        for k, label in enumerate(dict.fromkeys(r["label"] for r in rows)):
            curve = sorted((r for r in rows if (r["label"], r["rule"]) == (label, rule)), key=lambda r: r["nfe"])
            x, y = [r["nfe"] for r in curve], [100 * r["accuracy"] for r in curve]
            axes.plot(x, y, "o-", color=f"C{k}", label=label)
            axes.fill_between(x, *[[100 * r["interval"][i] for r in curve] for i in (0, 1)], color=f"C{k}", alpha=0.2)
        axes.set(title=title, xlabel="forward passes per canvas (NFE)", xscale="log")
        ticks = (2, 3, 4, 6, 9, 13, 26) if rule == "static" else (2, 3, 4, 5, 6, 8, 10)
        axes.set_xticks(ticks, map(str, ticks), minor=False)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("accuracy in %")
    figure.axes[0].legend()
    write_atomic(path, lambda temporary: figure.savefig(temporary, format="png", dpi=130))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--save", type=Path, help="write SAVE.json and SAVE.png")
    o = parser.parse_args()
    try:
        rows = merge(o.runs)
    except (OSError, ValueError) as error:
        sys.exit(print(f"error: {error}", file=sys.stderr) or 2)
    print(table(rows))
    if o.save:
        commands = [json.loads((folder / "table.json").read_text())["command"] for folder in o.runs]
        text = json.dumps({"commands": commands, "rows": rows}, indent=1) + "\n"
        write_atomic(o.save.with_suffix(".json"), lambda path: path.write_text(text))
        plot(rows, o.save.with_suffix(".png"))


if __name__ == "__main__":
    main()
