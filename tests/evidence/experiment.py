"""A named experiment over several seeds, in one command: `python tests/evidence/experiment.py sudoku`.

An experiment is a list of runs, each one command line, mostly of train.py, and a list of curves, each a
trained model under the sampler with accuracy (for text: infilling and the verdict of an autoregressive judge)
over step budgets and confidence thresholds. Runs and curves are cells under out/<experiment>/. A finished one
is not made again, an interrupted run goes on where it stopped. So the command may be killed and typed again,
and different seeds may be made side by side in different shells.

What comes out, beside this file: <experiment>.json (every figure, its interval, every command),
<experiment>.md (the table) and, unless it is an ablation of many curves, <experiment>.png. Accuracy is the
mean over seeds; its 95 % interval is a bootstrap that draws seeds and, within them, test items. Nothing is
chosen by these test items: train.py's own table, which one looks at while trying things, shows the first half
of the test canvases, an experiment the second. What is fitted (fit below) is fitted on validation canvases.
"""

import functools
import json
import math
import os
import re
import subprocess
import sys
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

HERE, ROOT = Path(__file__).parent, Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # run as a script, from anywhere

import numpy as np
import torch

import data
import train
import zoo
from rcd import check, denoise, diffusion_loss
from zoo.decoding import Carry, Decoding, carry_options
from zoo.files import write_atomic
from zoo.progress import progress
from zoo.tools import checks
from zoo.tools.command import Parser, arguments, autocast, pick_device, run
from zoo.tools.evaluate import Setting, evaluate


@dataclass(frozen=True)
class Curve:
    """One model under the sampler. Braces name runs of the same seed."""

    label: str
    run: str  # the run whose model is sampled
    sampler: dict = field(default_factory=dict)  # Decoding fields other than the commit rule's
    residual: dict = field(default_factory=dict)  # Carry fields other than those it was trained with
    reference: str = ""  # the run that warms the start up
    more: tuple[int, ...] = ()  # further step budgets, which the summary counts and the table leaves out
    fit: tuple[str, tuple] = ()  # (Carry field, values): the best value on validation canvases is taken
    sweep: tuple[dict, ...] = ()  # Decoding fields of each row, in place of step budgets and thresholds


@dataclass(frozen=True)
class Experiment:
    """Runs, curves, and how they are measured."""

    about: str
    options: str  # of train.py, for every run
    runs: dict[str, str]  # name -> further options of train.py; {name} is the model of an earlier run;
    # or "-m MODULE --model={name} ...": another program, which trains that model on
    curves: list[Curve]
    steps: tuple[int, ...] = (1, 2, 4, 6, 9, 13, 26)
    thresholds: tuple[float, ...] = (0.5, 0.7, 0.85, 0.95, 0.99, 0.999)
    factors: tuple[float, ...] = ()  # of --rule=factor
    items: int = 500  # test canvases
    within: tuple[int, ...] = (3, 4, 5, 6, 8)  # forward passes, of the summary
    judge: str = ""  # text: the autoregressive run that judges what was written
    drawn: tuple[str, ...] = ()  # labels of the curves in the picture; () = all
    by_curve: bool = False  # the table has a line per curve, for many of them, not a line per setting
    folder: str = ""  # of its cells, under out/; default: its name. Shared by experiments that share runs
    prepare: str = ""  # its own data, out/<folder>/data: NAME and options of data/NAME/prepare.py
    policies: dict[str, str] = field(default_factory=dict)  # name -> options of zoo.rivals.policy


FROM_BASE = "--init_from={base}"
PLAIN = {"base": "--stage=base", "seqd": f"--stage=reference {FROM_BASE}"}
TRAJECTORY = f"--stage=target {FROM_BASE}"
# The defaults of train.py were others when a part of the tables was made: bases of 1,000 steps, a fixed
# weight of a half, and trajectories of up to one step a token.
BEFORE, FIXED = "--base_steps=1000 --budget=0", "--weight=fixed --fixed=0.5"
HALF = f"{TRAJECTORY} {FIXED}"
SHORT, GROW = f"{TRAJECTORY} --weight=entropy --budget=8", f"{HALF} --grow"
ALGORITHM_1 = f"--stage=target --recipe=paper {FROM_BASE} --reference={{seqd}}"
EARLIER = f"--stage=target --recipe=earlier {FROM_BASE}"

SEQD = Curve("SeqD", "seqd", {"carry": "none"})
RCD = Curve("RCD", "rcd")
COLD = Curve("by the letter, cold", "letter")
WARM = Curve("by the letter, warm", "letter", {"start": "warm"}, reference="seqd")
SELF = Curve("RCD, self start", "rcd", {"start": "self"})
BY_LETTER = {"rcd": HALF, "letter": ALGORITHM_1}  # Algorithm 1 by the letter, beside the recipe of before
MORE = (3, 5, 7)
TEN = "sudoku --given=10 --train=50000"  # an easier Sudoku
WITH_COMPUTE = PLAIN | {"seqd-compute": PLAIN["seqd"] + " --steps=770"}
COMPUTE = Curve("SeqD, 10 % more steps", "seqd-compute", {"carry": "none"}, more=MORE)
OTHER_BUDGETS = [Curve("RCD, entropy, 8 steps", "entropy", more=MORE),
                 Curve("RCD, steps grow", "grow", more=MORE)]  # fmt: skip
TWICE = {"seqd-twice": f"{PLAIN['seqd']} --steps=1400", "rcd-twice": f"{TRAJECTORY} --steps=1400"}
OF_TWICE = [Curve("SeqD, twice the tokens", "seqd-twice", {"carry": "none"}, more=MORE),
            Curve("RCD, twice the tokens", "rcd-twice", more=MORE)]  # fmt: skip
HIDDEN = {"loopholing-trajectory": f"--stage=target --recipe=loopholing-trajectory {FROM_BASE}"}
OF_HIDDEN = Curve("loopholing-trajectory", "loopholing-trajectory", more=MORE)
OF_BEFORE = Curve("RCD, a half, no limit", "half", more=MORE)
WITH_HALF = WITH_COMPUTE | {"rcd": TRAJECTORY, "half": f"{HALF} --budget=0"}
FACTORS = (1.0, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01)
DRAWN = "SeqD", COMPUTE.label, "RCD", OF_HIDDEN.label
FEW = {"steps": (1, 2, 4, 8, 15), "thresholds": (0.5, 0.7, 0.85, 0.95, 0.99), "within": (1, 2, 3, 4, 15)}
HARD = [replace(SEQD, more=MORE), replace(RCD, more=MORE), replace(SELF, more=MORE)]


def ablation(about: str, runs: dict[str, str], curves: list[Curve]) -> Experiment:
    """Sudoku with stages of half the length."""
    plain = {"base": "--stage=base", "seqd": f"--stage=reference --steps=350 {FROM_BASE}"}
    runs = plain | {name: f"{options} --steps=350" for name, options in runs.items()}
    return Experiment(about, f"--ema=0 {BEFORE}", runs, [SEQD, *curves], (4, 6, 9, 26),
                      (0.85, 0.95, 0.99, 0.999), within=(4, 5, 6, 8), by_curve=True, folder="ablation",
                      prepare=TEN)  # fmt: skip


WEIGHTS = {w: f"--weight={w}" for w in ("entropy", "confidence", "1-entropy", "1-confidence", "one", "top-1")}
WEIGHTS |= {f"fixed-{a}": f"--weight=fixed --fixed={a}" for a in (0.3, 0.5, 0.7)}
REMEDIES = {
    "letter": ALGORITHM_1,
    "letter-absent": f"{ALGORITHM_1} --absent=0.3",
    "letter-fixed-absent": f"{ALGORITHM_1} {FIXED} --absent=0.3",
    "earlier-entropy": f"{EARLIER} --weight=entropy --absent=0.3",
    "earlier-fixed": f"{EARLIER} {FIXED} --absent=0.3",
    "entropy": f"{TRAJECTORY} --weight=entropy",
    "fixed-0.5": f"{TRAJECTORY} {FIXED}",
    "fixed-0.5-window-2": f"{TRAJECTORY} {FIXED} --window=2 --batch_size=64",
}


def warm(label: str, run: str, residual: dict | None = None, reference: str = "seqd") -> Curve:
    return Curve(label, run, {"start": "warm"}, residual or {}, reference)


EXPERIMENTS = {
    "sudoku": Experiment(
        "6x6 Sudoku, 9 given, 27 cells to fill, one solution; all of the canvas must be right",
        "--data=sudoku", WITH_HALF | TWICE | HIDDEN | {"grow": f"{GROW} --budget=0"},
        [HARD[0], COMPUTE, *HARD[1:], *OF_TWICE, OF_HIDDEN, OF_BEFORE,
         Curve("RCD, a half, steps grow", "grow", more=MORE)],
        (1, 2, 4, 6, 9, 13, 27), factors=FACTORS, drawn=DRAWN,
    ),
    "squares": Experiment(
        "6x6 Latin squares with one solution, 12 given, 24 cells to fill; all of the canvas must be right",
        "--batch_size=64", WITH_HALF, [HARD[0], COMPUTE, *HARD[1:], OF_BEFORE], (1, 2, 4, 6, 9, 13, 24),
        factors=FACTORS, prepare="sudoku --no_boxes",
    ),
    "sums-alike": Experiment(
        "chain of thought: five running sums of six one-digit numbers, all of them right; all masks weigh "
        "alike in the loss of either side, without 1/t",
        "--data=sums --batch_size=64 --weighting=1", WITH_HALF | {"four": f"{TRAJECTORY} --budget=4"},
        [SEQD, replace(COMPUTE, more=()), RCD, SELF, Curve("RCD, 4 steps", "four"),
         replace(OF_BEFORE, more=())],
        **FEW,
    ),
    "sums-12": Experiment(
        "longer running sums: eleven of twelve one-digit numbers, 32 tokens, all of them right; all masks "
        "weigh alike",
        "--batch_size=64 --weighting=1", WITH_COMPUTE | {"rcd": TRAJECTORY},
        [SEQD, replace(COMPUTE, more=()), RCD],
        steps=(1, 2, 4, 8, 16, 32), thresholds=(0.5, 0.7, 0.85, 0.95, 0.99), within=(1, 2, 4, 8, 32),
        prepare="sums --terms=12",
    ),
    "sums": Experiment(
        "the running sums with 1/t, from a base of 1,000 steps, a fixed weight of a half",
        f"--data=sums --batch_size=64 {BEFORE}", PLAIN | {"rcd": HALF}, [SEQD, RCD, SELF], **FEW,
    ),
    "compute": Experiment(
        "the same puzzles from a base of 1,000 steps, what else helps SeqD: 10 % more steps (one on "
        "trajectories costs 5 % more), or all masks weighing alike in its loss, without 1/t",
        f"--data=sudoku {BEFORE}",
        WITH_COMPUTE | {"seqd-alike": PLAIN["seqd"] + " --weighting=1", "rcd": HALF},
        [HARD[0], COMPUTE, Curve("SeqD, masks alike", "seqd-alike", {"carry": "none"}, more=MORE), HARD[1]],
        (1, 2, 4, 6, 9, 13, 27), folder="short-base",
    ),
    "squares-half": Experiment(
        "6x6 Latin squares, from a base of 1,000 steps, a fixed weight of a half beside Eq. 3's",
        f"--batch_size=64 {BEFORE}", WITH_COMPUTE | {"rcd": HALF, "entropy": SHORT, "grow": GROW},
        [HARD[0], COMPUTE, *HARD[1:], *OTHER_BUDGETS],
        (1, 2, 4, 6, 9, 13, 24), prepare="sudoku --no_boxes",
    ),
    "sudoku-10": Experiment(
        "6x6 Sudoku, 10 given, 26 cells to fill, one solution; all of the canvas must be right",
        f"--ema=0 {BEFORE}",
        PLAIN | BY_LETTER | {"seqd-more": f"--stage=reference {FROM_BASE} --steps=1120"},
        [replace(SEQD, more=MORE), replace(RCD, more=MORE), COLD, WARM, SELF,
         Curve("SeqD, 60 % more training", "seqd-more", {"carry": "none"}, more=MORE)],
        prepare=TEN,
    ),
    "long": Experiment(
        "Sudoku, 10 given, with stages of three times the length (2,100 steps), from the same base",
        f"--ema=0 {BEFORE}",
        {"base": "--stage=base", "seqd-long": PLAIN["seqd"] + " --steps=2100",
         "rcd-long": HALF + " --steps=2100"},
        [Curve("SeqD, long", "seqd-long", {"carry": "none"}, more=MORE),
         Curve("RCD, long", "rcd-long", more=MORE),
         Curve("RCD, long, self start", "rcd-long", {"start": "self"}, more=MORE)],
        folder="sudoku-10", prepare=TEN,
    ),
    "latin": Experiment(
        "6x6 Latin squares, 10 given, 26 cells to fill, any valid completion counts",
        f"--data=latin --ema=0 {BEFORE}", PLAIN | BY_LETTER, [SEQD, RCD, COLD, WARM, SELF],
        within=(6, 9, 13, 15, 20),
    ),
    "sums-half": Experiment(
        "the running sums, masks alike, from a base of 1,000 steps, a fixed weight of a half",
        f"--data=sums --batch_size=64 --weighting=1 {BEFORE}",
        {**WITH_COMPUTE, "rcd": HALF, "four": f"{HALF} --budget=4", "grow": GROW},
        [SEQD, replace(COMPUTE, more=()), RCD, SELF, Curve("RCD, 4 steps", "four"),
         Curve("RCD, steps grow", "grow")],
        **FEW,
    ),
    "sums-letter": Experiment(
        "the running sums with Algorithm 1 by the letter beside them, without an average of the weights",
        f"--data=sums --batch_size=64 --ema=0 {BEFORE}", PLAIN | BY_LETTER, [SEQD, RCD, COLD, WARM, SELF],
        **FEW,
    ),
    "text": Experiment(
        "Tiny Shakespeare, 64 characters, half of them masked at random (infilling) or the last 32 "
        "(writing, temperature 1)",
        f"--data=shakespeare_char --length=64 --batch_size=12 --ema=0 {BEFORE}",
        {"base": "--stage=base --base_steps=2000",
         "judge": "--stage=base --base_steps=4000 --block_size=1 --seed=7",
         "seqd": f"--stage=reference {FROM_BASE} --steps=1400",
         "rcd": EARLIER + " --steps=1400",
         "letter": ALGORITHM_1 + " --steps=1400"},
        [SEQD, RCD, COLD, WARM],
        steps=(1, 2, 4, 8, 16, 32), thresholds=(0.5, 0.9), items=200, within=(1, 4, 8, 16, 32), judge="judge",
    ),
    "subwords": Experiment(
        "Tiny Shakespeare in 1,024 subwords (data/shakespeare_bpe), 64 tokens, half of them masked at random "
        "(infilling) or the last 32 (writing, temperature 1)",
        "--data=shakespeare_bpe --length=64 --batch_size=12",
        {"base": "--stage=base --base_steps=2000",
         "judge": "--stage=base --base_steps=4000 --block_size=1 --seed=7",
         "seqd": f"--stage=reference {FROM_BASE} --steps=1400", "rcd": EARLIER + " --steps=1400",
         "trajectory": HALF + " --recipe=trajectory --steps=1400 --budget=0",
         "letter": ALGORITHM_1 + " --steps=1400"},
        [SEQD, RCD, Curve("RCD, trajectories", "trajectory"), COLD, WARM],
        steps=(1, 2, 4, 8, 16, 32), thresholds=(0.5, 0.9), items=200, within=(1, 4, 8, 16, 32), judge="judge",
    ),
    "weights": ablation(
        "the residual's weight, each trained with it on trajectories",
        {name: f"{TRAJECTORY} {options}" for name, options in WEIGHTS.items()},
        [Curve(name, name) for name in WEIGHTS],
    ),
    "remedies": ablation(
        "how the target is trained: Algorithm 1, rows without a residual, its own earlier state, its own "
        "trajectories",
        REMEDIES,
        [Curve(name, name) for name in REMEDIES]
        + [warm(f"{name}, warm", name) for name in REMEDIES if name.startswith("letter")],
    ),
    "starts": ablation(
        "a block's first residual", {"letter": ALGORITHM_1, "fixed-0.5": f"{TRAJECTORY} {FIXED}"},
        [Curve(f"{label}, {start}", name, {"start": start}, reference="seqd" if start == "warm" else "")
         for label, name in (("letter", "letter"), ("trajectory", "fixed-0.5"))
         for start in ("cold", "warm", "self", "dirichlet")],
    ),
    "temperature": ablation(
        "T_res at sampling, by the letter with a warm start", {"letter": ALGORITHM_1},
        [warm(f"T_res {t}", "letter", {"t_res": t}) for t in (0.5, 0.8, 0.92, 1.0, 1.25, 2.0)]
        + [warm(f"T_res {t}, Delta tempered", "letter", {"t_res": t, "temper_delta": True})
           for t in (0.5, 0.8, 1.25)]
        + [replace(warm("T_res fitted", "letter"),
                   fit=("t_res", (0.5, 0.65, 0.8, 0.92, 1.0, 1.25, 1.5, 2.0)))],
    ),
    "reference": ablation(
        "the size of the reference, by the letter with a warm start: 0.1, 0.8 (the target's) and 2.6 million "
        "parameters",
        {"small-base": "--stage=base --n_layer=2 --n_head=2 --d_model=64",
         "small": "--stage=reference --init_from={small-base}",
         "large-base": "--stage=base --n_layer=6 --n_head=6 --d_model=192",
         "large": "--stage=reference --init_from={large-base}",
         "letter": ALGORITHM_1, "letter-small": ALGORITHM_1.replace("{seqd}", "{small}"),
         "letter-large": ALGORITHM_1.replace("{seqd}", "{large}")},
        [warm("smaller, warm", "letter-small", reference="small"), warm("same, warm", "letter"),
         warm("larger, warm", "letter-large", reference="large")],
    ),
    "blocks": ablation(
        "decoding block by block, the canvas's 36 cells in blocks of 9, 12 and 18 (bidirectional attention)",
        {"fixed-0.5": f"{TRAJECTORY} {FIXED}"},
        [Curve(f"{label}, block {b}", name, {"carry": carry, "block_size": b}) for b in (9, 12, 18)
         for label, name, carry in (("SeqD", "seqd", "none"), ("RCD", "fixed-0.5", "residual"))]
        + [Curve("RCD", "fixed-0.5")],
    ),
    "block-causal": Experiment(
        "chain of thought with block-causal attention, blocks of four tokens (a Sudoku is no task for it: a "
        "block does not see what is given after it)",
        f"--data=sums --batch_size=64 --ema=0 --block_size=4 {BEFORE}", PLAIN | {"rcd": HALF},
        [SEQD, RCD, SELF],
        (4, 5, 8, 15), (0.7, 0.85, 0.95, 0.99), within=(4, 5, 6, 8, 15),
    ),
}  # fmt: skip

# Other papers' methods (zoo/rivals), on the runs that the tables above are made of.
RECIPES = ("scmdm", "gemma", "soft-mask", "loopholing", "relay", "loop", "gemma-trajectory",
           "soft-mask-trajectory", "loopholing-trajectory", "loop-trajectory")  # fmt: skip
RIVALS = {name: f"--stage=target --recipe={name} {FROM_BASE}" for name in RECIPES}
RIVALS["loop-trajectory"] += f" {FIXED}"
POLICIES = {"policy-1": "--model={rcd} --power=1", "policy-1-seqd": "--model={seqd} --power=1"}


def swept(rule: str, field: str, *values: float) -> tuple[dict, ...]:
    """A rule over values of one field."""
    return tuple({"rule": rule, field: v} for v in values)


def r2(rule: str) -> tuple[dict, ...]:
    """R2-dLLM's rules with (threshold, rescue): the paper's pair first, then ever more careful ones."""
    pairs = ((0.9, 0.8), (0.95, 0.9), (0.99, 0.95), (0.999, 0.99), (0.9999, 0.999), (0.99999, 0.9999))
    return tuple({"rule": rule, "threshold": t, "rescue": r} for t, r in pairs)


SWEEPS = {
    "threshold": swept("threshold", "threshold", 0.5, 0.7, 0.85, 0.95, 0.99, 0.999),
    "factor": swept("factor", "factor", 2.0, 1.0, 0.5, 0.2, 0.05, 0.01),
    "entropy-bounded": swept("entropy-bounded", "entropy_bound", 3.0, 1.0, 0.3, 0.1, 0.03, 0.01),
    "KLASS": swept("klass", "threshold", 0.5, 0.7, 0.85, 0.95, 0.99, 0.999),
    "R2": r2("r2"),
    "R2, in space": r2("r2-spatial"),
    "R2, in time": r2("r2-temporal"),
    "WINO": swept("wino", "threshold", 0.4, 0.6, 0.8, 0.9, 0.95, 0.99),
}


def on_both(label: str, sweep: tuple[dict, ...]) -> list[Curve]:
    return [Curve(f"SeqD, {label}", "seqd", {"carry": "none"}, sweep=sweep),
            Curve(f"RCD, {label}", "rcd", sweep=sweep)]  # fmt: skip


def with_policy(label: str, run: str, policy: str, **sampler: str) -> Curve:
    """A factor on its chances makes a policy quick or careful."""
    speeds = swept("policy", "policy_speed", 0.3, 0.5, 1, 2, 4, 8)
    return Curve(label, run, {"policy": policy, **sampler}, sweep=speeds)


def rivals_on(task: str, folder: str) -> Experiment:
    """Every carry, each trained from the same base on as many tokens, beside the task's SeqD and RCD. Those
    on trajectories differ from RCD in nothing but what is carried.

    A window of two steps, as PUMBA trains, has half of the canvases then. No carry here costs more than two
    of SeqD's steps: SeqD, RCD and the window with twice the tokens are the control for compute.
    """
    e = EXPERIMENTS[task]
    kept, more = [c for c in e.curves if c.label in ("SeqD", "RCD")], e.curves[0].more
    batch = re.search(r"--batch_size=(\d+)", e.options)
    batch = int(batch[1]) if batch else 128  # train.py's
    runs = PLAIN | {"rcd": HALF} | TWICE | RIVALS | {"rcd-twice": f"{HALF} --steps=1400"}
    runs |= {name: f"{HALF} --window=2 --batch_size={rows}"
             for name, rows in (("window-2", batch // 2), ("window-2-twice", batch))}  # fmt: skip
    relay = f"--stage=target --recipe=relay-trajectory {FROM_BASE}"
    runs["relay-trajectory"] = f"{relay} --window=2 --batch_size={batch // 2}"
    curves = [*kept, Curve("ReMix, untrained", "seqd", {"js_reset": 0.3}, {"weight": "remix"}, more=more)]
    curves += [Curve(name, name, more=more) for name in RIVALS]
    curves += [Curve("relay-trajectory, window of 2", "relay-trajectory", more=more),
               Curve("RCD, window of 2", "window-2", more=more),
               Curve("SeqD, twice the tokens", "seqd-twice", {"carry": "none"}, more=more),
               Curve("RCD, twice the tokens", "rcd-twice", more=more),
               Curve("RCD, window of 2, twice the tokens", "window-2-twice", more=more)]  # fmt: skip
    about = f"{task}: what is carried from step to step, by other papers"
    return replace(e, about=about, options=f"{e.options} {BEFORE}", runs=runs, curves=curves, by_curve=True,
                   factors=(), folder=folder)  # fmt: skip


def in_pairs(name: str, most: int, prepare: str) -> Experiment:
    """A puzzle whose tokens are two cells each: p is over 36 tokens, not 6. SeqD with 10 % more steps is the
    control for compute."""
    about = f"{name}, one solution, tokens of two cells, {most} of 18 to fill, all of them right"
    curves = [HARD[0], COMPUTE, *HARD[1:], OF_HIDDEN, OF_BEFORE]
    return Experiment(about, "", WITH_HALF | HIDDEN, curves, (1, 2, 4, 6, 9, most),
                      factors=FACTORS, within=(2, 3, 4, 5, 6, 8), prepare=prepare, drawn=DRAWN)  # fmt: skip


def with_more(name: str, most: int, prepare: str, folder: str) -> Experiment:
    """By the recipe of before, with Algorithm 1 and both sides on twice the tokens beside it."""
    runs = WITH_COMPUTE | {"rcd": HALF, "letter": ALGORITHM_1, **HIDDEN,
                           **TWICE, "rcd-twice": f"{HALF} --steps=1400"}  # fmt: skip
    curves = [HARD[0], COMPUTE, *HARD[1:], replace(WARM, more=MORE), replace(COLD, more=MORE), OF_HIDDEN,
              *OF_TWICE]  # fmt: skip
    e = in_pairs(name, most, prepare)
    return replace(e, options=BEFORE, runs=runs, curves=curves, factors=(), by_curve=True, folder=folder)


def with_depth(e: Experiment) -> Experiment:
    """Looped layers beside as many layers with weights of their own: passes of half as much compute again.
    And other budgets of trajectories."""
    runs = {"deep-base": "--stage=base --n_layer=6", "deep-seqd": "--stage=reference --init_from={deep-base}",
            "deep-rcd": f"--stage=target --init_from={{deep-base}} {FIXED}"}  # fmt: skip
    loops = {name: RIVALS[name] for name in ("loop", "loop-trajectory")}
    curves = [Curve("SeqD, six layers", "deep-seqd", {"carry": "none"}, more=MORE),
              Curve("RCD, six layers", "deep-rcd", more=MORE),
              *(Curve(name, name, more=MORE) for name in loops)]  # fmt: skip
    runs |= loops | {"entropy": SHORT, "grow": GROW}
    return replace(e, runs=e.runs | runs, curves=e.curves + curves + OTHER_BUDGETS)


OF_COMPUTE = PLAIN | {"rcd": HALF}  # the runs of "compute" that others are made of
EXPERIMENTS |= {
    "pairs-8": Experiment(
        "8x8 Sudoku, one solution, tokens of two cells, 20 of 32 to fill, all of them right; the base is "
        "trained for 4,000 steps, the others for 1,000",
        "",
        {"base": "--stage=base --base_steps=4000",
         **{name: f"{WITH_HALF[name]} --steps=1000" for name in ("seqd", "rcd", "half")},
         "seqd-compute": f"{PLAIN['seqd']} --steps=1100"},
        [HARD[0], COMPUTE, HARD[1], OF_BEFORE],
        (1, 2, 4, 6, 9, 13, 20), factors=FACTORS, within=(2, 3, 4, 5, 6, 8), by_curve=True,
        prepare="sudoku --pairs --size=8 --train=100000",
    ),
    "pairs": in_pairs("6x6 Sudoku", 13, "sudoku --pairs"),
    "pairs-more": with_depth(with_more("6x6 Sudoku", 13, "sudoku --pairs", "pairs-half")),
    "squares-pairs": with_more("6x6 Latin squares", 12, "sudoku --pairs --no_boxes", "squares-pairs"),
    "rivals": rivals_on("sudoku", "short-base"),
    "rivals-sums": rivals_on("sums-alike", "sums-half"),
    "rules": replace(
        EXPERIMENTS["compute"], about="Sudoku: which cells a step commits, by other papers' rules",
        runs=OF_COMPUTE, by_curve=True,
        curves=[curve for label, sweep in SWEEPS.items() for curve in on_both(label, sweep)],
    ),
    "rewards": replace(
        EXPERIMENTS["compute"], about="Sudoku: a third stage on rewards, by coupled-GRPO",
        runs=OF_COMPUTE | {f"{run}-grpo": f"-m zoo.rivals.coupled_grpo --model={{{run}}} "
                           "--steps=60" for run in ("seqd", "rcd")},
        curves=[*HARD[:2], Curve("SeqD, rewards", "seqd-grpo", {"carry": "none"}, more=MORE),
                Curve("RCD, rewards", "rcd-grpo", more=MORE)],
        by_curve=True,
    ),
    "policies": replace(
        EXPERIMENTS["compute"], runs=OF_COMPUTE,
        about="Sudoku: which cells a step commits, by a threshold or a learned policy",
        curves=[*on_both("threshold", SWEEPS["threshold"]),
                with_policy("SeqD, policy", "seqd", "policy-1-seqd", carry="none"),
                with_policy("RCD, policy", "rcd", "policy-1")],
        policies=POLICIES, by_curve=True,
    ),
}  # fmt: skip


def part(e: Experiment, labels: list[str]) -> Experiment:
    """These curves, with the runs and policies that they need. Raises ValueError for an unknown label."""
    known = [c.label for c in e.curves]
    if wrong := [label for label in labels if label not in known]:
        raise ValueError(f"no curve {wrong[0]!r}: choose from {'; '.join(known)}")
    curves = [c for c in e.curves if c.label in labels]
    acting = {c.sampler.get("policy") for c in curves}
    policies = {name: options for name, options in e.policies.items() if name in acting}
    needed, runs = {e.judge, *policies.values()}, {}
    needed |= {name for c in curves for name in (c.run, c.reference)}
    for name, options in reversed(e.runs.items()):  # a run starts from earlier ones
        if name in needed or any(f"{{{name}}}" in text for text in needed):
            runs, needed = {name: options} | runs, needed | {options}
    return replace(e, runs=runs, policies=policies, curves=curves)


# ---- Cells


class SecondHalf(data.Dataset):
    """A data set whose test split is the second half of its test canvases."""

    def tokens(self, split: str) -> np.ndarray:
        return super().tokens(split)[500 * (split == "test") :]

    def response(self, split: str) -> np.ndarray:
        return super().response(split)[500 * (split == "test") :]


def succeeds(command: list[str]) -> bool:
    """Run a command in the repository, without its stdout. True if it ends with exit code 0."""
    return subprocess.run(command, cwd=ROOT, check=False, stdout=subprocess.DEVNULL).returncode == 0


class Cells:
    """The runs and curves of one experiment and seed under out/<experiment>/."""

    def __init__(self, name: str, seed: int, e: Experiment | None = None):
        self.e, self.seed = e or EXPERIMENTS[name], seed
        self.name = self.e.folder or name
        named = re.search(r"--data=(\S+)", self.e.options)
        self.data = f"out/{self.name}/data" if self.e.prepare else named[1]
        self.device, self.dtype, _ = pick_device("", "")
        self.models = {}

    def run(self, run: str) -> str:
        """Name of a run; one with a seed of its own is the same for all seeds, and is made once."""
        own = re.search(r"--seed=(\d+)", self.e.runs[run])
        return f"{self.name}/{run}-{own[1] if own else self.seed}"

    def stage(self, run: str) -> str:
        """What train.py calls its stage; another program keeps that of the model which it goes on from."""
        named = re.search("--stage=([a-z]+)", self.e.runs[run])
        return named[1] if named else self.stage(re.search(r"--model=\{(.+?)\}", self.e.runs[run])[1])

    def folder(self, run: str) -> str:
        """Name of its model, as train.py and zoo.load take it."""
        return f"{self.run(run)}/{self.stage(run)}"

    def command(self, run: str) -> list[str]:
        """What follows `python`."""
        options = self.e.runs[run].format(**{r: self.folder(r) for r in self.e.runs})
        seed = [] if "--seed" in options else [f"--seed={self.seed}"]
        if options.startswith("-m"):
            return [*options.split(), f"--data={self.data}", *seed, f"--name={self.run(run)}"]
        always = [f"--name={self.run(run)}", "--test_items=0", "--eval_items=0"]
        own = [f"--data={self.data}"] if self.e.prepare else []
        return ["train.py", *own, *self.e.options.split(), *options.split(), *seed, *always]

    def prepare(self) -> str:
        """Make the experiment's own data set, if it has one and it is not there. -> the command, or ""."""
        if not self.e.prepare:
            return ""
        name, *options = self.e.prepare.split()
        command = [f"data/{name}/prepare.py", *options, f"--out={self.data}"]
        if not (ROOT / self.data / "meta.json").is_file():
            print(f"python {' '.join(command)}", flush=True)
            if not succeeds([sys.executable, *command]):
                raise ValueError("its data set was not prepared: see above")
        made = zoo.read_json(ROOT / self.data / "meta.json")["command"].removeprefix("python ")
        anew = "remove it, and what it trained"
        check(made == " ".join(command), f"{self.data} was made by {made}: {anew}")
        return f"python {' '.join(command)}"

    def check(self, run: str) -> None:
        """Raises ValueError for a model that was trained with other options than train.py's would be now."""
        program, *argv = self.command(run)
        if program == "train.py":
            groups = train.Train, train.Shape, Carry
            presets = functools.partial(checks.defaults, groups, data.load)
            o, shape, residual = arguments("", *groups, argv=argv, presets=presets)
            train.checked(o, shape, self.device)
            options = vars(o) | vars(shape) | vars(residual)
            unread = checks.LATER[self.stage(run)] | ({"base_steps"} if o.init_from else set())
            checks.check_done(ROOT / "out" / self.folder(run), options, unread)

    def train(self, run: str) -> None:
        if (ROOT / "out" / self.folder(run) / "train.json").is_file():
            self.check(run)
        else:
            print(f"python {' '.join(self.command(run))}", flush=True)
            started = (ROOT / "out" / self.folder(run) / "state.safetensors").is_file()
            command = [sys.executable, *self.command(run), *(["--resume"] if started else [])]
            if not succeeds(command):
                stopped = f"{run} of seed {self.seed} did not finish"
                raise ValueError(f"{stopped}: see above; the same command goes on from here")

    def policy(self, name: str) -> Path:
        return ROOT / "out" / self.name / f"{name}-{self.seed}.safetensors"

    def policy_command(self, name: str) -> list[str]:
        options = self.e.policies[name].format(**{r: self.folder(r) for r in self.e.runs}).split()
        return [*options, f"--out={self.policy(name).relative_to(ROOT)}", f"--seed={self.seed}", "--items=0"]

    def train_policy(self, name: str) -> None:
        if not self.policy(name).is_file():
            print(f"python -m zoo.rivals.policy {' '.join(self.policy_command(name))}", flush=True)
            if not succeeds([sys.executable, "-m", "zoo.rivals.policy", *self.policy_command(name)]):
                raise ValueError(f"{name} of seed {self.seed} did not finish: see above")

    def model(self, run: str) -> zoo.Loaded | None:
        if run and run not in self.models:
            self.models[run] = zoo.load(ROOT / "out" / self.folder(run), self.device)
        return self.models[run] if run else None

    def settings(self, c: Curve, residual: dict) -> list[Setting]:
        loaded, reference = self.model(c.run), self.model(c.reference)
        carry = Carry(**carry_options(loaded.meta.get("residual", {})) | c.residual | residual)
        if c.sweep:
            policy = {"policy": str(self.policy(c.sampler["policy"]))} if "policy" in c.sampler else {}
            samplers = [Decoding(**c.sampler | policy | fields) for fields in c.sweep]
            return [Setting(c.label, loaded.model, reference and reference.model, s, carry) for s in samplers]
        samplers = [Decoding(rule="static", steps=k, **c.sampler) for k in self.e.steps]
        samplers += [Decoding(rule="threshold", threshold=t, **c.sampler) for t in self.e.thresholds]
        samplers += [Decoding(rule="static", steps=k, **c.sampler) for k in c.more]
        samplers += [Decoding(rule="factor", factor=f, **c.sampler) for f in self.e.factors]
        return [Setting(c.label, loaded.model, reference and reference.model, s, carry) for s in samplers]

    def curve(self, c: Curve) -> list[dict]:
        """Its rows, from its file if that was made of the same settings."""
        path = ROOT / "out" / self.name / f"{re.sub('[^a-zA-Z0-9.]+', '-', c.label)}-{self.seed}.json"
        of_curve = {name: value for name, value in asdict(c).items() if value != ()}
        settings = of_curve, self.e.steps, self.e.thresholds, self.e.items, *self.e.factors
        made_of = json.loads(json.dumps(settings))
        if path.is_file() and (stored := json.loads(path.read_text()))["made_of"] == made_of:
            return stored["rows"]
        dataset, fitted = data.load(self.data), {}
        dataset = dataset if self.e.judge else SecondHalf(**vars(dataset))
        if c.fit:
            name, values = c.fit
            scores = {}
            for value in values:
                settings = [s for s in self.settings(c, {name: value}) if s.sampler.rule == "threshold"]
                fits = evaluate(settings, dataset, "val", 200, 200, self.dtype, self.seed)
                scores[value] = np.mean([r["accuracy"] for r in fits])
            fitted = {name: max(scores, key=scores.get)}
        score = infill if self.e.judge else evaluate
        extra = (self.model(self.e.judge).model,) if self.e.judge else ()
        settings = self.settings(c, fitted)
        rows = score(settings, dataset, "test", self.e.items, 250, self.dtype, self.seed, *extra)
        rows = [r | {"fitted": fitted} if fitted else r for r in rows]
        if c.sweep:
            values = [next(v for name, v in fields.items() if name != "rule") for fields in c.sweep]
            rows = [r | {"value": v} for r, v in zip(rows, values)]
        text = json.dumps({"made_of": made_of, "rows": rows}) + "\n"
        write_atomic(path, lambda temporary: temporary.write_text(text))
        return rows


def infill(settings: list[Setting], dataset: data.Dataset, split: str, items: int, batch: int,
           dtype: torch.dtype, seed: int, judge) -> list[dict]:  # fmt: skip
    """Like evaluate(), for running text in windows of 64 characters, all at once (batch is not read).

    "correct" is the share of a randomly masked half that is filled in as the author wrote it (temperature 0).
    "judge" is the nats per character that the autoregressive judge needs for 32 characters written after 32
    of the author's (temperature 1). "entropy" is that of the characters written, in nats: low for a text
    that repeats itself.
    """
    stream = torch.from_numpy(dataset.tokens(split).astype("int64"))
    length, generator = 64, torch.Generator().manual_seed(0)
    windows = torch.randperm(len(stream) // length, generator=generator)[:items, None]
    text = stream[windows * length + torch.arange(length)]  # (N, T), disjoint
    half = torch.rand(text.shape, generator=generator).argsort(1) < length // 2  # (N, T)
    end = (torch.arange(length) >= length // 2).expand_as(half)  # (N, T)
    rows = []
    with progress(len(settings), settings[0].label, "settings", leave=False) as bar:
        for s in settings:
            device, mask = s.model.embedding.device, s.model.config.mask_id
            with torch.no_grad(), autocast(device, dtype):
                more = {"reference": s.reference, "generator": torch.Generator(device).manual_seed(seed)}
                canvas = text.masked_fill(half, mask).to(device)
                for filled in denoise(s.model, canvas, s.sampler, s.residual, **more):  # noqa: B007
                    pass
                canvas, writer = text.masked_fill(end, mask).to(device), replace(s.sampler, temperature=1.0)
                for written in denoise(s.model, canvas, writer, s.residual, **more):  # noqa: B007
                    pass
                t = torch.ones(1, 1, device=device)
                judged = [diffusion_loss(judge, row[None].to(device), end[:1].to(device), t=t).item()
                          for row in written.tokens]  # fmt: skip
            correct = (((filled.tokens == text) & half).sum(1) / half.sum(1)).tolist()
            p = torch.bincount(written.tokens[end]).float()
            rows.append({
                "label": s.label, "rule": s.sampler.rule,
                "value": s.sampler.threshold if s.sampler.rule == "threshold" else s.sampler.steps,
                "accuracy": float(np.mean(correct)), "nfe": filled.nfe.float().mean().item(),
                "correct": correct, "judge": judged, "written_nfe": written.nfe.float().mean().item(),
                "entropy": torch.special.entr(p / p.sum()).sum().item(),
            })  # fmt: skip
            bar.update()
    return rows


# ---- Tables and pictures


def bootstrap(correct: np.ndarray, draws: int = 2000) -> tuple[float, float]:
    """95 % interval of the mean of correct (seeds, items)."""
    rng, (S, N) = np.random.default_rng(0), correct.shape
    rows, means = np.arange(S)[:, None], []
    for _ in range(draws):
        means.append(correct[rng.integers(S, size=S)][rows, rng.integers(N, size=(S, N))].mean())
    return tuple(np.percentile(means, (2.5, 97.5)).tolist())


def merge(seeds: list[list[dict]]) -> list[dict]:
    """One curve's rows over its seeds."""
    rows = []
    for group in zip(*seeds):
        first, correct = group[0], np.array([r["correct"] for r in group], dtype=float)  # (seeds, items)
        row = {k: first[k] for k in ("label", "rule", "value")}
        row |= {"nfe": float(np.mean([r["nfe"] for r in group])), "accuracy": float(correct.mean())}
        row |= {"interval": bootstrap(correct), "by_seed": correct.mean(1).round(4).tolist()}
        if "judge" in first:
            judge = np.array([r["judge"] for r in group])
            row |= {"judge": float(judge.mean()), "judge_interval": bootstrap(judge)}
            row["judge_by_seed"] = judge.mean(1).round(4).tolist()
            row |= {k: float(np.mean([r[k] for r in group])) for k in ("entropy", "written_nfe")}
        rows.append(row | ({"fitted": [r["fitted"] for r in group]} if "fitted" in first else {}))
    return rows


def frontier(rows: list[dict], nfe: float) -> float:
    """The best accuracy that a curve reaches within nfe forward passes, by any of its rules."""
    return max((r["accuracy"] for r in rows if r["nfe"] <= nfe + 1e-9), default=0.0)


def summary(curves: list[list[dict]], within: tuple[int, ...]) -> list[str]:
    """What the paper claims, curve by curve: accuracy within few passes, and how many of them reach the
    best accuracy of the first curve, SeqD."""
    peak = max(curves[0], key=lambda r: (round(r["accuracy"], 6), -r["nfe"]))
    heads = " | ".join(f"within {n} NFE" for n in within)
    lines = [f"| | best accuracy | at NFE | first at SeqD's best (speed-up) | {heads} |"]
    lines += ["|---|--:|--:|--:|" + "--:|" * len(within)]
    for rows in curves:
        best = max(rows, key=lambda r: (round(r["accuracy"], 6), -r["nfe"]))
        reach = min((r["nfe"] for r in rows if r["accuracy"] >= peak["accuracy"]), default=math.nan)
        reached = "never" if math.isnan(reach) else f"{reach:.2f} ({peak['nfe'] / reach:.1f}x)"
        cells = [f"{best['accuracy']:.1%}", f"{best['nfe']:.2f}", reached]
        cells += [f"{frontier(rows, n):.1%}" for n in within]
        lines.append(f"| {rows[0]['label']} | " + " | ".join(cells) + " |")
    return lines


def rule_of(row: dict) -> str:
    if row["rule"] == "threshold":
        return f"threshold {row['value']:g}"
    if row["rule"] == "static":
        return f"{row['value']} step" + "s" * (row["value"] > 1)
    return f"{row['rule']} {row['value']:g}"


def table(curves: list[list[dict]]) -> list[str]:
    """Every figure: a line per setting, the curves side by side."""
    labels = [rows[0]["label"] for rows in curves]
    heads = " | ".join(f"{label}: accuracy (95 %) | NFE" for label in labels)
    lines = [f"| rule | {heads} |", "|---|" + "--:|--:|" * len(labels)]
    for group in zip(*curves):
        cells = []
        for r in group:
            low, high = r["interval"]
            cells.append(f"{r['accuracy']:.1%} ({low:.1%} to {high:.1%}) | {r['nfe']:.2f}")
        lines.append(f"| {rule_of(group[0])} | " + " | ".join(cells) + " |")
    if "judge" in curves[0][0]:
        heads = " | ".join(f"{label}: judge, nats per character (95 %) | entropy | NFE" for label in labels)
        lines += ["", f"| rule | {heads} |", "|---|" + "--:|--:|--:|" * len(labels)]
        for group in zip(*curves):
            cells = []
            for r in group:
                low, high = r["judge_interval"]
                judged = f"{r['judge']:.2f} ({low:.2f} to {high:.2f})"
                cells.append(f"{judged} | {r['entropy']:.2f} | {r['written_nfe']:.2f}")
            lines.append(f"| {rule_of(group[0])} | " + " | ".join(cells) + " |")
    return lines


def table_by_curve(curves: list[list[dict]]) -> list[str]:
    """Every accuracy in %, its 95 % interval and, after "@", its NFE: a line per curve. A cell names its rule
    if the curves have different ones."""
    alike = all([rule_of(r) for r in rows] == [rule_of(r) for r in curves[0]] for rows in curves)
    heads = " | ".join(rule_of(r) if alike else str(k) for k, r in enumerate(curves[0], 1))
    lines = [f"| in %, interval @ NFE | {heads} |", "|---|" + "--:|" * len(curves[0])]
    for rows in curves:
        cells = []
        for r in rows:
            low, high = r["interval"]
            rule = "" if alike else f"{rule_of(r)}: "
            figures = f"{100 * r['accuracy']:.1f} ({100 * low:.0f}-{100 * high:.0f}) @ {r['nfe']:.1f}"
            cells.append(rule + figures)
        lines.append(f"| {rows[0]['label']} | " + " | ".join(cells) + " |")
    return lines


def plot(curves: list[list[dict]], path: Path, title: str) -> None:
    from matplotlib.figure import Figure

    named = {"threshold": "confidence threshold", "static": "step budget", "factor": "factor"}
    rules = [(rule, name) for rule, name in named.items() if rule in {r["rule"] for r in curves[0]}]
    figure = Figure(figsize=(4.5 * len(rules), 4.4), layout="constrained")
    for axes, (rule, name) in zip(figure.subplots(1, len(rules), sharey=True), rules):
        drawn = []
        for k, rows in enumerate(curves):
            curve = sorted((r for r in rows if r["rule"] == rule), key=lambda r: r["nfe"])
            x = [r["nfe"] for r in curve]
            drawn += x
            axes.plot(x, [100 * r["accuracy"] for r in curve], "o-", color=f"C{k}", label=rows[0]["label"])
            low, high = ([100 * r["interval"][i] for r in curve] for i in (0, 1))
            axes.fill_between(x, low, high, color=f"C{k}", alpha=0.15)
        axes.set(title=name, xlabel="forward passes per canvas (NFE)", xscale="log")
        ticks = [t for t in (1, 2, 3, 4, 6, 9, 13, 20, 32) if min(drawn) * 0.9 <= t <= max(drawn) * 1.1]
        axes.set_xticks(ticks, map(str, ticks))
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("accuracy in %")
    handles = figure.axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=3, fontsize="small")
    figure.suptitle(title, fontsize="medium")
    write_atomic(path, lambda temporary: figure.savefig(temporary, format="png", dpi=110))


def main() -> None:
    parser = Parser(__doc__)
    about = "; ".join(f"{name}: {e.about}" for name, e in EXPERIMENTS.items())
    parser.add_argument("name", help=about.replace("%", "%%"))
    parser.add_argument("--seeds", default="1,2,3", help="comma-separated [1,2,3]")
    parser.add_argument("--only", default="", help="only the curves of these labels, separated by ;")
    parser.add_argument("--cells", action="store_true", help="only make the cells of these seeds, no table")
    o = parser.parse_args()
    if o.name not in EXPERIMENTS:
        raise ValueError(f"no experiment {o.name!r}: choose from {', '.join(EXPERIMENTS)}")
    if not re.fullmatch(r"\d+(,\d+)*", o.seeds):
        raise ValueError(f"--seeds={o.seeds} should be numbers with commas between them, like 1,2,3")
    e = EXPERIMENTS[o.name]
    e = part(e, o.only.split(";")) if o.only else e
    os.chdir(ROOT)
    seeds, by_seed, commands = [int(s) for s in o.seeds.split(",")], [], []
    for seed in seeds:
        cells = Cells(o.name, seed, e)
        commands += filter(None, [cells.prepare()])
        for name in e.runs:
            cells.train(name)
            commands.append("python " + " ".join(cells.command(name)))
        for name in e.policies:
            cells.train_policy(name)
            commands.append("python -m zoo.rivals.policy " + " ".join(cells.policy_command(name)))
        made = []
        with progress(len(e.curves), f"{o.name}, seed {seed}", "curves") as bar:
            for c in e.curves:
                made.append(cells.curve(c))
                bar.update()
        by_seed.append(made)
    if o.cells:
        return
    curves = [merge(list(seeds)) for seeds in zip(*by_seed)]
    command = f"python tests/evidence/experiment.py {o.name} --seeds={o.seeds}"
    command += f" --only='{o.only}'" if o.only else ""
    facts = {"about": e.about, "command": command, "items": e.items, "torch": torch.__version__}
    facts |= {"commands": list(dict.fromkeys(commands)), "curves": curves}
    text = [f"# {o.name}: {e.about}", ""]
    text += [f"`{command}`, {e.items} test items, {len(seeds)} seeds, torch {torch.__version__}", ""]
    text += [*summary(curves, e.within), "", *(table_by_curve if e.by_curve else table)(curves), ""]
    for first in (rows[0] for rows in curves if "fitted" in rows[0]):
        text.append(f"{first['label']}: {', '.join(map(str, first['fitted']))}, by seed")
    figures = json.dumps(facts, indent=1) + "\n"
    write_atomic(HERE / f"{o.name}.json", lambda path: path.write_text(figures))
    write_atomic(HERE / f"{o.name}.md", lambda path: path.write_text("\n".join(text).rstrip() + "\n"))
    if not e.by_curve:
        drawn = [rows for rows in curves if not e.drawn or rows[0]["label"] in e.drawn]
        plot(drawn, HERE / f"{o.name}.png", e.about)
    print("\n".join(text))


if __name__ == "__main__":
    run(main)
