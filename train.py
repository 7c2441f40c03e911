"""Convert a masked-diffusion language model to Residual Context Diffusion (RCD), in three stages:

    base       the plain masked loss, from scratch. --init_from=MODEL takes the place of this stage.
    reference  stage 1: the plain masked loss again, from the base. Also SeqD, the control without a residual.
    target     stage 2: from the base again, on as many tokens. It reads a residual: its own, of a step
               before, or by --recipe=paper, Algorithm 1, the reference's.

Then a table: accuracy against forward passes, SeqD beside RCD. Each stage is a folder out/NAME/STAGE/ of
safetensors and JSON. Ctrl-C saves. --resume goes on to the same weights, bit by bit: step i draws its batch,
masks and noise from generators seeded by (seed, stage, i), and nothing else is random.

Examples:
  python train.py                              Sudoku, all stages from scratch
  python train.py --recipe=paper --name=paper  stage 2 by Algorithm 1
  python train.py --resume                     go on after Ctrl-C
  python train.py --data=gsm8k --init_from=JetLM/SDAR-1.7B-Chat --recipe=paper --remat
  torchrun --nproc_per_node=8 train.py ...     on eight GPUs: the same batches, the same weights
"""

import os

# OpenMP's threads spin while they wait for each other. If another program has one of the cores, each step
# waits for a time slice: 655 tokens a second on two busy cores, 13,000 without. Torch reads this at import.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import functools
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Generator, Tensor

import data
from rcd import maskable, reference_context
from zoo import lora, rivals, speed
from zoo.decoding import Carry, Decoding
from zoo.progress import progress
from zoo.recipes import earlier_context, sometimes_absent
from zoo.tools import checks, distributed, models, training
from zoo.tools.budget import matmul_rate, peak_memory, training_flops
from zoo.tools.checks import LATER, RECIPES
from zoo.tools.command import arguments, autocast, pick_device, run
from zoo.tools.distributed import SharedTrajectories, once
from zoo.tools.training import (LOSSES, State, Stop, accuracy, batches, draw_t, generators, learning_rate,
                                move, split_rows, validate)  # fmt: skip

OUT = Path("out")
STAGES = ("base", "reference", "target")


@dataclass
class Train:
    """what is trained, and how long"""

    data: str = "sudoku"  # data set: a folder under data/, or one that its prepare.py wrote (--out)
    name: str = ""  # the run is out/<name>/; default: the data set's name
    stage: str = "all"  # base | reference | target | all
    recipe: str = ""  # whose residual stage 2 reads: paper (Algorithm 1: the frozen reference's) | earlier
    # (its own, of an earlier state of the canvas) | trajectory (its own, of the denoising step before);
    # or another paper's, of zoo/rivals: soft-mask | loopholing | relay | gemma | loop (NAME-trajectory trains
    # them like trajectory) | scmdm; default: trajectory below 64 tokens to fill, else earlier
    absent: float = 0.0  # share of rows without a residual (not on trajectories); default: by recipe
    buffer: int = 8  # recipe trajectory: batches of trajectories that take turns
    budget: int = 0  # on trajectories: most steps of a canvas, 0 = one a token; default: 8
    grow: bool = False  # on trajectories: the most steps of a canvas grow in training, from 2 to the budget
    window: int = 1  # recipe trajectory: denoising steps in a training step, with a gradient through all
    init_from: str = ""  # start from this model and train no base: run folder, zoo name or hub id
    reference: str = ""  # frozen reference, perhaps smaller (implies recipe paper); default: stage 1's model
    preset: str = ""  # cpu | gpu: sizes and lengths below where they are 0; default: by device
    options: str = ""  # take the options of this run, by its train.json (a stage's folder); typed ones win
    plan: str = ""  # cards, as in H100:8: print what fits on them, and train nothing
    resume: bool = False  # go on where an interrupted run stopped
    overwrite: bool = False  # train again over an existing run
    force: bool = False  # go on even if the memory estimate is more than ten times what is free
    seed: int = 1337  # same seed, same machine: same weights to the bit
    device: str = ""  # cuda | mps | cpu; default: the best one found
    dtype: str = ""  # bfloat16 | float32, of matmuls; default: bfloat16 where the processor has it
    adam: str = "float32"  # of AdamW's two moments: float32 | bfloat16, half the memory; weights are float32
    compile: bool = False  # torch.compile the model
    t_per: str = "document"  # a noise level t per document | block (Fast-dLLM v2); not read on trajectories
    weighting: str = "1/t"  # of a mask, after the base: 1/t | 1 | complementary (once each: zoo/fastdllm.py)
    shard: str = "auto"  # with torchrun, a process holds: none (all) | full (a part) | auto (part if need be)
    offload: bool = False  # with --shard=full: that part, with its gradients and moments, is on the host
    remat: bool = False  # compute layers again in backward: less memory for a third more compute
    lora: int = 0  # train matrices of this rank beside frozen ones, and merge them at the end; 0 = train all
    base_steps: int = 0  # optimiser steps of the base
    steps: int = 0  # optimiser steps of the reference, and of the target
    batch_size: int = 0  # canvases per optimiser step
    accumulate: int = 1  # pieces of a batch; each weighs by its response tokens, on trajectories by its rows
    lr: float = 0.0  # peak learning rate
    schedule: str = "cosine"  # cosine (to a tenth) | constant, both after the warm-up
    warmup: float = 0.05  # share of the steps in which the rate rises linearly (the paper: 0.03, constant)
    weight_decay: float = 0.01  # of matrices; norms and biases are not decayed
    beta2: float = 0.98  # AdamW
    clip: float = 1.0  # largest norm of the gradient; 0 = no clipping
    ema: float = 0.99  # save a moving average of the weights with this decay; 0 = save the last weights
    log: str = ""  # show the log, out/NAME/STAGE/log.jsonl, also in: tensorboard | wandb
    eval_every: int = 0  # steps between validations
    eval_items: int = 128  # validation canvases for the accuracy during training
    test_items: int = 500  # test canvases of the table, 16 where 64 tokens or more are to fill; 0 = no table


@dataclass
class Shape:
    """the model that a base is trained as (0 = by preset); the one of --init_from has its own"""

    n_layer: int = 0  # layers
    n_head: int = 0  # attention heads of width 32 (cpu) or 64 (gpu)
    d_model: int = 0  # width
    length: int = 0  # canvas length in tokens for a stream of text; data sets of examples bring their own
    block_size: int = 0  # attention: 0 = fully bidirectional, b = block-causal over blocks of b tokens


PRESETS = {  # minutes on a laptop's CPU; about as long on one GPU
    "cpu": {"base_steps": 2000, "steps": 700, "batch_size": 128, "lr": 1e-3, "eval_every": 100,
            "n_layer": 4, "n_head": 4, "d_model": 128, "head_dim": 32, "length": 64},
    "gpu": {"base_steps": 5000, "steps": 3000, "batch_size": 512, "lr": 5e-4, "eval_every": 500,
            "n_layer": 8, "n_head": 8, "d_model": 512, "head_dim": 64, "length": 256},
}  # fmt: skip


def checked(o: Train, shape: Shape, device: torch.device) -> dict:
    """Fill zeros from the preset, and return it. Raises ValueError, in one line, for what cannot work."""
    o.preset = o.preset or ("gpu" if device.type == "cuda" else "cpu")
    checks.check_choices(o, {"preset": PRESETS, "stage": (*STAGES, "all"), "recipe": RECIPES,
        "schedule": ("cosine", "constant"), "t_per": ("document", "block"), "adam": ("float32", "bfloat16"),
        "weighting": LOSSES, "shard": ("auto", "none", "full"), "log": ("", *training.SINKS)})  # fmt: skip
    checks.fill_zeros(PRESETS[o.preset], o, shape)
    checks.check_options(o, shape.block_size)
    if o.compile and not o.plan:
        speed.check_compiler(device)
    return PRESETS[o.preset]


def residual_source(recipe: str, r: models.Run, model, reference, rows: list[int], sharded: bool):
    """Where stage 2 gets its residual: a context of the loss, or trajectories. The base and stage 1 (recipe
    "masked") have none. The default: implied() in zoo/tools/checks.py. rows: canvases in each piece."""
    o, context = r.o, None
    if recipe == "paper":  # Algorithm 1: from the reference, which reads the same x_t
        context = reference_context(reference, r.residual)
        context = distributed.gathered(context, reference) if sharded else context
    elif recipe == "earlier":  # from the model itself, which reads an earlier state of the canvas
        context = earlier_context(r.residual)
    elif rivals.carries.on_trajectories(recipe):  # from the denoising step before, as in sampling
        given = r.dataset.packed("train"), o.window, o.weighting == "1/t", rivals.carries.step_of(recipe)
        return None, [SharedTrajectories(model.config, n, r.length, r.device, *given, o.budget)
                      for _ in range(o.buffer) for n in rows]  # fmt: skip
    elif recipe in rivals.RECIPES:  # another paper's, mostly from the model itself, which reads the same x_t
        context = rivals.carries.context_of(recipe, r.residual)
    return (sometimes_absent(context, o.absent) if context and o.absent else context), []


def train_stage(stage: str, r: models.Run) -> None:
    """Train a stage to its end, in out/<name>/<stage>. Raises KeyboardInterrupt after Ctrl-C, all saved."""
    o, dataset, length, device, dtype = r.o, r.dataset, r.length, r.device, r.dtype
    folder, steps = r.root / stage, o.base_steps if stage == "base" else o.steps
    recipe, weighting = o.recipe if stage == "target" else "masked", "1/t" if stage == "base" else o.weighting

    # The model to train, and the frozen reference of Algorithm 1.
    named = models.reference_of(recipe, r) if stage != "base" else ""
    sharded = models.report_stage(stage, recipe, r, named)  # does it fit into memory?
    model, origin, reference, parallel = models.open_models(stage, r, named, sharded)
    size = sum(p.numel() for p in model.parameters())
    print(f"{stage}: {size:,} parameters, {steps} steps of {o.batch_size} canvases")
    for network in filter(None, (model, reference)):
        speed.prepare(network, device)
    if o.remat:
        speed.remat(model)
    if o.compile:
        model.compile()
    rows = [o.batch_size // o.accumulate + (i < o.batch_size % o.accumulate) for i in range(o.accumulate)]
    context, trajectories = residual_source(recipe, r, model, reference, rows, sharded)
    draw, draw_val = batches(dataset, "train", length), batches(dataset, "val", length)

    def turn(step: int) -> list[SharedTrajectories]:
        """The trajectories that take a step now."""
        return trajectories[step % o.buffer * len(rows) :][: len(rows)]

    def losses(step: int, generator: Generator, noise: Generator) -> Iterator[Tensor]:
        """This process's part of the loss of a batch, in as many summands as --accumulate says."""
        if trajectories:
            some, fresh = turn(step), lambda n, *mine: move(draw(n, generator, *mine), device)
            for i, n in enumerate(rows):
                with autocast(device, dtype):
                    given = model, fresh, r.residual, noise, step / steps if o.grow else 1.0
                    loss = parallel.loss(functools.partial(some[i].loss, *given), last=i == len(rows) - 1)
                yield loss * (n / o.batch_size)
            return
        pieces = split_rows(draw(o.batch_size, generator, distributed.rows_of(rows)), rows)
        counts = [maskable(model.config, response, at).sum(1) for _, response, at in pieces]  # of each row
        whole = sum(int(count.sum()) for count in counts)
        some = [i for i, count in enumerate(counts) if count.any() or not whole]  # rows with an answer
        for i in some:
            tokens, response, positions = move(pieces[i], device)
            with autocast(device, dtype):
                t = draw_t(tokens, positions, o.t_per, model.config.block_size, noise)
                mine, drawn = distributed.own(tokens, response, positions, t, noise)
                part = functools.partial(LOSSES[weighting], model, *mine, context=context, **drawn)
                loss = parallel.loss(part, last=i == some[-1])
            count = int(counts[i][distributed.share(rows[i])].sum())
            yield loss * (count / whole)  # each token counts alike

    # What is saved and logged.
    once(lambda: training.open_folder(folder, dataset.tokenizer, o, STAGES))
    meta = models.record(stage, recipe, r, origin)
    frozen = checks.frozen(meta["options"], dtype, LATER[stage])
    state = State(model, o, trajectories, moments=getattr(torch, o.adam))
    if o.resume and checks.states(folder):
        state.restore(folder, frozen)
    tokens_per_step = o.batch_size * length * (o.window if trajectories else 1)
    flops = training_flops(model, reference or (model if context else None), dataset, length)
    log = training.open_log(folder / "log.jsonl", state.step, tokens_per_step,
                            flops / length * (1 + (weighting == "complementary")), r.peak, meta["options"])
    sampler = Decoding(rule="threshold", carry="residual" if stage == "target" else "none")
    quiet = distributed.rank() > 0
    with Stop() as stop, progress(steps, stage, "steps", initial=state.step, quiet=quiet) as bar:
        while not stop.asked() and state.step < steps:
            rate, total = learning_rate(o, state.step, steps), 0.0
            for group in state.optimizer.param_groups:
                group["lr"] = rate
            seeds = o.seed, STAGES.index(stage), state.step
            for loss in losses(state.step, *generators(*seeds, device=device)):
                loss.backward()
                total += loss.detach()
            total = distributed.total(total)
            norm = distributed.clip(model, o.clip or math.inf)
            if not math.isfinite(total + norm):  # on a GPU the host waits here
                again, _ = generators(*seeds, device=device)
                training.not_finite(folder, o, state, total, draw(o.batch_size, again), turn(state.step))
            state.optimizer.step()
            state.optimizer.zero_grad(set_to_none=True)
            state.average()
            state.step += 1

            log.add(total)
            bar.update()
            if state.step % max(1, steps // 100) and state.step < steps:
                continue
            entry, due = log.entry(state.step, rate), state.step % o.eval_every == 0 or state.step == steps
            if due:
                with log.paused():
                    given = (model, draw_val, context, device, dtype, length, rows[0])
                    entry |= {"val_loss": round(parallel.read(functools.partial(validate, *given)), 5)}
                    if not sharded:
                        entry |= accuracy(model, dataset, o.eval_items, sampler, r.residual, dtype)
            bar.set_postfix(log.write(entry))
            if due:  # after its entry: a run that is resumed drops entries newer than its state
                with log.paused():
                    state.save(folder, frozen)

    if state.step < steps:
        state.save(folder, frozen)
        training.stopped(stage, state, steps)
    state.finish()
    meta |= {"step": steps, "tokens": steps * tokens_per_step, "val_loss": log.last().get("val_loss")}
    result = distributed.whole(model) if sharded else lora.merge(model)
    once(lambda: models.save_stage(result, origin, folder, meta))
    print(f"{stage}: {steps} steps, {meta['tokens']:,} tokens -> {folder}")


def main() -> None:
    groups, opened = (Train, Shape, Carry), functools.cache(data.load)
    o, shape, residual = arguments(__doc__, *groups, presets=lambda t: checks.defaults(groups, opened, t))
    device, dtype, reason = pick_device(o.device, o.dtype)
    preset, dataset = checked(o, shape, device), opened(o.data)
    length = dataset.meta["length"] if dataset.response("train") is not None else shape.length
    checks.quick_attention(device, length)
    root = OUT / (o.name or dataset.name)
    stages = [s for s in STAGES if o.stage in (s, "all") and not (s == "base" and o.init_from)]
    checks.check_folder(root, [] if o.plan else stages, o)
    print(f"{reason}\ndata {dataset.name}: {dataset.meta['splits']['train']:,} train, canvas {length}, "
          f"vocabulary {dataset.meta['vocab_size']}; preset {o.preset}")  # fmt: skip
    config = models.base_config(dataset, shape, preset["head_dim"], length)
    checks.check_tokens(dataset, o.init_from, o.reference if "target" in stages else "")
    begin, peak = time.perf_counter(), matmul_rate(device, dtype)
    print(f"matmuls run at {peak / 1e12:.3g} TFLOP/s here in {str(dtype)[6:]}; mfu is the model's share")
    r = models.Run(o, shape, residual, dataset, config, root, length, device, dtype, peak)
    if o.plan:
        return models.print_plan(r)
    with checks.claimed(root):
        for stage in stages:
            if o.resume and (root / stage / "train.json").is_file():
                checks.check_done(root / stage, asdict(o) | asdict(shape) | asdict(residual), LATER[stage])
                print(f"{stage}: already there, {root / stage}")
            else:
                train_stage(stage, r)
        if "target" in stages and o.test_items and training.has_answers(dataset, "test"):
            models.final_table(r)
    show = "--compare" if config.block_size else "--steps=8"  # blocks may be more than 8
    show = show if dataset.meta["source"] == "generated" else "--prompt=TEXT"  # a chat model has no examples
    minutes, last = (time.perf_counter() - begin) / 60, root / stages[-1]
    print(f"{minutes:.1f} minutes, {peak_memory(device)}; try: python sample.py --model={last} {show}")


if __name__ == "__main__":
    run(distributed.together(main, go_on=checks.command(resume=True)))
