"""Accuracy against forward passes: fill the canvases of a data set under many settings; table and plot."""

import math
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import zoo
from rcd import Residual, Sampler, Transformer, check, denoise
from zoo.decoding import Decoding, carry_options
from zoo.files import write_atomic
from zoo.progress import progress
from zoo.rivals import carries
from zoo.tools import distributed
from zoo.tools.command import autocast


# Commit rules that keep no step budget: the field that says how careful they are, and its values in a table.
CAREFUL = "threshold", (0.5, 0.7, 0.85, 0.95, 0.99)
SWEPT = {
    **dict.fromkeys(("threshold", "klass", "r2", "r2-spatial", "r2-temporal", "wino"), CAREFUL),
    "factor": ("factor", (2.0, 1.0, 0.5, 0.2, 0.05)),
    "entropy-bounded": ("entropy_bound", (3.0, 1.0, 0.3, 0.1, 0.03)),
    "policy": ("policy_speed", (0.5, 1.0, 2.0, 4.0, 8.0)),
}  # fmt: skip

# The options that a rule reads beside --steps. Without --rule, those that are typed imply the first rule here
# that reads them all. Rules that are not here read none.
READS = {
    "static": (), "threshold": ("threshold",), "entropy-bounded": ("entropy_bound",), "factor": ("factor",),
    "klass": ("kl_bound", "threshold"), "r2": ("rescue", "threshold"), "wino": ("revoke", "threshold"),
    "r2-spatial": ("rescue", "threshold"), "r2-temporal": ("rescue", "threshold"),
    "policy": ("policy", "policy_speed"),
}  # fmt: skip


class Setting(NamedTuple):
    """One row of an evaluation."""

    label: str
    model: Transformer
    reference: Transformer | None  # of start=warm
    sampler: Sampler
    residual: Residual


def recommended(loaded: zoo.Loaded, typed: dict) -> dict:
    """Defaults for what was not typed: what the model's makers recommend, and the rule that is implied.

    Raises ValueError for typed options that belong to different rules, or to another model.
    """
    carry = "residual" if loaded.meta.get("stage") == "target" else "none"
    values = {"carry": carry, **carry_options(loaded.meta.get("residual", {})), **loaded.defaults}
    own, weight = carries.of(loaded.model) is not None, typed.get("weight")
    has = f"{loaded.folder} has {'a' if own else 'no'} carry of its own"
    check(weight is None or own == (weight == "learned"), f"weight={weight}, but {has}: leave --weight out")

    asked = [name for name in typed if any(name in reads for reads in READS.values())]
    fits, options = [rule for rule, reads in READS.items() if {*asked} <= {*reads}], " and --".join(asked)
    check(bool(fits), f"--{options} belong to different rules")
    rule = typed.get("rule", fits[0])
    check(not asked or rule in fits, f"rule={rule} does not read --{options}: choose from {', '.join(fits)}")
    ignored = "steps" in typed and rule in ("wino", "policy")
    check(not ignored, f"rule={rule} ignores --steps: leave it out")
    tried = [name for name in typed if name in ("steps", "carry", SWEPT.get(rule, CAREFUL)[0])]
    says = f"--eval tries several values of --{' and --'.join(tried)}"
    instead = "" if tried == ["carry"] else f", perhaps for --rule={rule}"
    check(not typed.get("eval") or not tried, f"{says}: leave it out{instead}")
    if not asked and "steps" not in typed:
        return values
    return {**values, "steps": 0, "rule": fits[0]}  # a rule that was typed wins


def load_reference(loaded: zoo.Loaded, typed: str, device: torch.device,
                   dtype: torch.dtype | None) -> zoo.Loaded | None:  # fmt: skip
    """The model that --reference names, else the one in train.json: a path from the run folder, or a name."""
    named = typed or loaded.meta.get("reference") or ""
    place = Path(os.path.normpath(named if typed else loaded.folder / named))
    if not named or named.startswith("..") and not place.is_dir():
        return None
    reference = zoo.load(place if place.is_dir() else named, device, dtype)
    if reference.tokenizer.fingerprint != loaded.tokenizer.fingerprint:
        other = f"has another tokenizer than the model {loaded.folder}"
        raise ValueError(f"the reference {reference.folder} {other}")
    return reference


def evaluate(settings: list[Setting], dataset, split: str, limit: int, batch: int, dtype: torch.dtype,
             seed: int = 0) -> list[dict]:  # fmt: skip
    """Fill the first `limit` canvases of a split of a data.Dataset under every setting, `batch` at once.

    Returns a dict per setting: label, rule, value (steps, or the field in SWEPT), accuracy (by the data set's
    own check), nfe (forward passes of a canvas, mean), tokens_per_step, correct (a bool per canvas), seconds.
    Several processes share the canvases, and each returns the whole result. Raises ValueError for a data set
    without right answers.
    """
    if dataset.check is None:
        where = "evaluate its validation bound with train.py instead"
        raise ValueError(f"data set {dataset.name} has no right answers to check; {where}")
    solutions = torch.from_numpy(dataset.tokens(split)[:limit].astype("int64"))  # (N, L)
    response = torch.from_numpy(dataset.response(split)[:limit].copy())  # (N, L)
    rows, batch = [], -(-min(batch, len(solutions)) // distributed.processes())
    mine = range(0, len(solutions), batch)[distributed.rank() :: distributed.processes()]
    canvases = sum(len(solutions[i : i + batch]) for i in mine)
    with progress(len(settings) * canvases, "evaluate", "canvases", leave=False) as bar:
        for label, model, reference, sampler, residual in settings:
            device, begin = model.embedding.device, time.perf_counter()
            correct, nfe = torch.zeros(2, len(solutions), dtype=torch.long)
            generator = torch.Generator(device).manual_seed(seed + distributed.rank())
            for i in mine:
                tokens, fill = solutions[i : i + batch], response[i : i + batch]
                canvas = tokens.masked_fill(fill, model.config.mask_id)
                with autocast(device, dtype):
                    run = denoise(model, canvas, sampler, residual, reference=reference, generator=generator)
                    for step in run:  # noqa: B007 (the last one is needed)
                        pass
                filled = zip(step.tokens.tolist(), tokens.tolist(), fill.tolist())
                correct[i : i + batch] = torch.tensor([dataset.correct(*row) for row in filled])
                nfe[i : i + batch] = step.nfe
                bar.update(len(tokens))
            correct, nfe = distributed.total(correct).bool().tolist(), distributed.total(nfe).tolist()
            rows.append({
                "label": label, "rule": sampler.rule,
                "value": getattr(sampler, SWEPT[sampler.rule][0]) if sampler.rule in SWEPT else sampler.steps,
                "accuracy": sum(correct) / len(correct), "nfe": sum(nfe) / len(nfe),
                "tokens_per_step": int(response.sum()) / sum(nfe), "correct": correct,
                "seconds": time.perf_counter() - begin,
            })  # fmt: skip
    return rows


def sweep(seqd: Transformer | None, target: Transformer, reference: Transformer | None, sampler: Decoding,
          residual: Residual, tokens: float, steps: list[int] | None = None,
          thresholds: list[float] | None = None, blocks: int | None = None) -> list[Setting]:  # fmt: skip
    """The settings of a table: SeqD (None leaves it out), RCD from a cold start and from the sampler's own;
    with a reference also warm. Or in place of RCD a model with a carry of its own, which knows no warm start.

    Each over step budgets and over thresholds, or over the rule's values in SWEPT. Default budgets: 1, 2, 4,
    and those that fill 8, 5, 3, 2 or 1 of the `tokens` of a canvas per step. None is below `blocks`, the most
    blocks that a canvas can have (default: what fits into the longest canvas), since each block takes a step.
    """
    if not steps:
        block = sampler.block_size or target.config.block_size
        least, most = blocks or (-(-target.config.max_len // block) if block else 1), math.ceil(tokens)
        wanted = (1, 2, 4, *(math.ceil(tokens / n) for n in (8, 5, 3, 2, 1)))
        steps = sorted({max(least, min(k, most)) for k in wanted})
    budgeted, swept = ("static", sampler.rule) if sampler.rule in SWEPT else (sampler.rule, "threshold")
    field, values = SWEPT[swept]
    samplers = [replace(sampler, rule=budgeted, steps=k, sub_block=0) for k in steps]  # budgets: whole blocks
    samplers += [replace(sampler, rule=swept, steps=0, **{field: v}) for v in thresholds or values]
    settings = []
    if seqd is not None:
        settings = [Setting("SeqD", seqd, None, replace(s, carry="none"), residual) for s in samplers]
    name = carries.label(target)
    for start in dict.fromkeys(["cold", *(["warm"] if reference and name == "RCD" else []), sampler.start]):
        carried = [replace(s, carry="residual", start=start) for s in samplers]
        settings += [Setting(f"{name} ({start})", target, reference, s, residual) for s in carried]
    return settings


def interval(correct: list[bool]) -> tuple[float, float]:
    """95 % bootstrap interval: of n items drawn with replacement, Binomial(n, accuracy) are right."""
    draws = np.random.default_rng(0).binomial(len(correct), np.mean(correct), 10_000) / len(correct)
    return tuple(np.percentile(draws, (2.5, 97.5)))


def table(rows: list[dict]) -> str:
    """The rows of evaluate() as an aligned table in Markdown."""
    cells = [("model", "rule", "accuracy (95 % interval)", "NFE", "tokens per step")]
    for r in rows:
        budget = f"{r['rule']}, {r['value']} step{'s' * (r['value'] != 1)}"
        rule = f"{r['rule']} {r['value']:g}" if r["rule"] in SWEPT else budget
        accuracy = "{:6.1%} ({:.1%} to {:.1%})".format(r["accuracy"], *interval(r["correct"]))
        cells.append((r["label"], rule, accuracy, f"{r['nfe']:.2f}", f"{r['tokens_per_step']:.2f}"))
    widths = [max(map(len, column)) for column in zip(*cells)]
    right = (0, 0, 0, 1, 1)  # 1: aligned on the right
    cells.insert(1, tuple("-" * (width - r) + ":" * r for width, r in zip(widths, right)))
    lines = [[c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right)] for row in cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def plot(rows: list[dict], path: str | Path, title: str) -> None:
    """Accuracy against NFE as a picture, a curve per label and rule. One line says how to get matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return print('no plot, matplotlib is not installed: pip install -e ".[plot]"', file=sys.stderr)
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes, labels = figure.subplots(), list(dict.fromkeys(r["label"] for r in rows))
    for label, rule in dict.fromkeys((r["label"], r["rule"]) for r in rows):
        curve = sorted((r for r in rows if (r["label"], r["rule"]) == (label, rule)), key=lambda r: r["nfe"])
        x, y = np.array([(r["nfe"], 100 * r["accuracy"]) for r in curve]).T
        error = np.abs(100 * np.array([interval(r["correct"]) for r in curve]).T - y)  # (2, n)
        dashed = dict(marker="s", linestyle="--", markerfacecolor="none")
        style = dict(marker="o", linestyle="-") if rule == "threshold" else dashed
        color = f"C{labels.index(label)}"
        axes.errorbar(x, y, error, color=color, capsize=2, label=f"{label}, {rule}", **style)
    axes.set(title=title, xlabel="forward passes per canvas (NFE)")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set(ylabel="accuracy in %, with 95 % bootstrap interval")
    axes.grid(alpha=0.3)
    axes.legend()
    kind = Path(path).suffix[1:] or "png"
    write_atomic(Path(path), lambda temporary: figure.savefig(temporary, format=kind, dpi=150))
