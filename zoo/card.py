"""The card of a trained model, README.md on the hub, from its train.json and the table.json of its run."""

import re
from pathlib import Path

from zoo.files import read_json, write_atomic

STAGES = {
    "base": "trained from scratch with the plain masked loss",
    "reference": "fine-tuned with the plain masked loss (stage 1): a reference, and SeqD, the control",
    "target": "trained to read a residual (stage 2)",
}


def options(values: dict) -> str:
    return ", ".join(f"{name}={value}" for name, value in values.items()) or "none"


def results(path: Path) -> list[str]:
    """The rows of table.json in Markdown, as train.py printed them, without the intervals."""
    if not path.is_file():
        return ["No table was made."]
    lines = ["| model | rule | accuracy | NFE | tokens per step |", "|---|---|--:|--:|--:|"]
    for r in read_json(path)["rows"]:
        rule = f"threshold {r['value']:g}" if r["rule"] == "threshold" else f"{r['rule']}, steps={r['value']}"
        numbers = f"{r['accuracy']:.1%} | {r['nfe']:.2f} | {r['tokens_per_step']:.2f}"
        lines.append(f"| {r['label']} | {rule} | {numbers} |")
    count = len(read_json(path)["rows"][0]["correct"])
    return [*lines, "", f"On the first {count} test canvases. NFE: forward passes of a canvas, all counted."]


def card(folder: Path, repo: str, licence: str) -> str:
    """The text of README.md. licence: its name on the hub. Raises ValueError or FileNotFoundError."""
    if not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", licence):
        raise ValueError(f"license={licence!r}: give its name on the hub, such as mit or apache-2.0")
    if not (folder / "train.json").is_file():
        own = "a card is written from the record of a run of train.py; write README.md yourself"
        raise FileNotFoundError(f"{folder} has no train.json: {own}")
    meta = read_json(folder / "train.json")
    run, stage, tokens, bound = (meta.get(k) for k in ("options", "stage", "tokens", "val_loss"))
    run, stage = run or {}, stage or ""
    origin = run.get("init_from") or ""
    facts = {
        "stage": f"{stage}: {STAGES.get(stage, 'unknown')}",
        "start": origin or "random weights", "reference": meta.get("reference") or "none",
        "data": meta.get("data"), "recipe": meta.get("recipe"),
        "residual": options(meta.get("residual") or {}), "sampler": options(meta.get("sampler") or {}),
        "length": f"{meta.get('length')} tokens", "seed": meta.get("seed"),
        "training": f"{meta.get('step')} steps" + (f", {tokens:,} tokens" if tokens else " on rewards"),
        "validation bound": "not measured" if bound is None else f"{bound} nats per response token",
        "made with": f"torch {meta.get('torch')}, {meta.get('dtype')} on {meta.get('device')}",
    }  # fmt: skip
    head = [f"license: {licence}", "library_name: rcd", "pipeline_tag: text-generation"]
    head += ["tags:", "- masked-diffusion", "- residual-context-diffusion", "- arxiv:2601.22954"]
    converted = read_json(folder / "config.json").get("model_type") != "rcd"
    if converted and re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", origin) and not Path(origin).exists():
        head.append(f"base_model: {origin.partition('@')[0]}")
    made = [command for command in (meta.get("data_command"), meta.get("command")) if command]
    return "\n".join([
        "---", *head, "---", f"# {repo}", "",
        "A masked-diffusion language model of the Residual Context Diffusion reference",
        "([the paper](https://arxiv.org/abs/2601.22954)).", "",
        "| | |", "|---|---|", *(f"| {name} | {fact} |" for name, fact in facts.items()), "",
        "## How it was made", "", "```", *made, "```", "",
        "## Accuracy against forward passes", "", *results(folder.parent / "table.json"), "",
        "## How it is used", "", "```", f"python sample.py --model={repo}", "```", "",
    ])  # fmt: skip


def write_card(folder: Path, repo: str, licence: str) -> Path:
    """folder/README.md, unless one is there: it may have been edited. Returns its path."""
    path = Path(folder) / "README.md"
    if not path.is_file():
        if not licence:
            whose = "give --license=NAME, such as mit; a converted model has its origin's"
            raise ValueError(f"a card needs a licence: {whose}")
        text = card(Path(folder), repo, licence)
        write_atomic(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    return path
