"""Convert a masked-diffusion language model to Residual Context Diffusion: `python train.py`.

    base       the plain masked loss from scratch (or --init_from, and this stage is skipped)
    reference  stage 1: the plain masked loss again, from the base. It is at the same time the control, SeqD: what the same number of
               training tokens buys without a residual
    target     stage 2: from the base once more, the same number of tokens, but the model reads a residual (see --recipe)

and then one table: accuracy against forward passes, SeqD beside RCD. Each stage is a run folder out/<name>/<stage>/ of safetensors and
JSON. Ctrl-C saves; --resume goes on to bit-identical weights, because step i draws its batch, masks and noise from a generator seeded by
(seed, stage, i) and nothing else is random.
"""

import os

# OpenMP's threads spin while they wait for each other. If another program has one of the cores, every step waits for its time slice: measured
# on two busy cores, 655 tokens a second spinning, 13,000 not. It must be said before torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import functools
import json
import math
import shlex
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

import data
import zoo
from rcd import (T_PER, Config, Residual, Sampler, Trajectories, Transformer, diffusion_loss, earlier_context, maskable, noise_levels,
                 reference_context, sometimes_absent)  # fmt: skip
from sample import Setting, arguments, autocast, evaluate, pick_device, run, sweep, table
from zoo import tokenizer
from zoo.budget import available, forward_flops, matmul_rate, memory, report_memory, shape_of
from zoo.files import load, save, write_atomic

OUT = Path("out")
STAGES = ("base", "reference", "target")


@dataclass
class Train:
    """what is trained, and how long"""

    data: str = "sudoku"  # data set: a folder under data/, or a folder that its prepare.py wrote (--out)
    name: str = ""  # the run is out/<name>/; default: the data set's name
    stage: str = "all"  # base | reference | target | all
    recipe: str = ""  # how the target learns: trajectory (on its own denoising steps; default below 64 tokens to fill) | earlier (on the residual of its own earlier state; default above) | paper (Algorithm 1: on the reference's residual)
    absent: float = 0.0  # recipes paper and earlier: part of the rows without a residual, so that a cold start is trained too; earlier: 0.3
    pool: int = 8  # recipe trajectory: batches of trajectories that take turns, so that successive steps do not see the same canvases
    window: int = 1  # recipe trajectory: denoising steps that make a training step; the gradient flows back through them
    init_from: str = ""  # start from this model instead of training a base: run folder, zoo name or hub folder
    reference: str = ""  # the frozen reference of stage 2 (implies --recipe=paper; small-to-large conversion); default: this run's stage 1
    preset: str = ""  # cpu | gpu: sizes and lengths below where they are 0; default: by device
    resume: bool = False  # go on where an interrupted run stopped
    overwrite: bool = False  # train again over an existing run
    seed: int = 1337  # same seed, same machine: same weights to the bit
    device: str = ""  # cuda | mps | cpu; default: the best one found
    dtype: str = ""  # bfloat16 | float32, of the matmuls (weights, gradients, AdamW stay float32); default: bfloat16 where the processor has it
    compile: bool = False  # torch.compile the model
    t_per: str = "document"  # one noise level t per document (LLaDA, SDAR) | per block (Fast-dLLM v2; block-causal models)
    remat: bool = False  # activation checkpointing: layers are computed again in backward, less memory for a third more compute
    base_steps: int = 0  # optimiser steps of the base
    steps: int = 0  # optimiser steps of the reference, and of the target
    batch_size: int = 0  # canvases per optimiser step
    accumulate: int = 1  # gradient accumulation: a batch goes through in so many parts
    lr: float = 0.0  # peak learning rate
    schedule: str = "cosine"  # cosine (to a tenth) | constant, both after the warm-up
    warmup: float = 0.05  # part of the steps in which the rate rises linearly (the paper: 0.03, constant)
    weight_decay: float = 0.01  # of matrices; norms and biases are not decayed
    beta2: float = 0.98  # AdamW
    clip: float = 1.0  # largest norm of the gradient; 0 = no clipping
    ema: float = 0.0  # keep and save an exponential moving average of the weights with this decay; 0 = none
    eval_every: int = 0  # steps between validations
    eval_items: int = 128  # validation canvases for the accuracy during training
    test_items: int = 500  # test canvases of the final table, 16 where 64 tokens or more are to fill; 0 = no table


@dataclass
class Shape:
    """the model that a base is trained as (0 = by preset)"""

    n_layer: int = 0  # layers
    n_head: int = 0  # attention heads of width 32 (cpu) or 64 (gpu)
    d_model: int = 0  # width
    length: int = 0  # canvas length in tokens for a stream of text; data sets of examples bring their own
    block_size: int = 0  # attention: 0 = fully bidirectional, b = block-causal over blocks of b tokens


PRESETS = {  # what a 0 above stands for: the first runs in minutes on a laptop's CPU, the second in about as long on one GPU
    "cpu": {"base_steps": 1000, "steps": 700, "batch_size": 128, "lr": 1e-3, "eval_every": 100, "n_layer": 4, "n_head": 4, "d_model": 128, "head_dim": 32, "length": 64},
    "gpu": {"base_steps": 5000, "steps": 3000, "batch_size": 512, "lr": 5e-4, "eval_every": 500, "n_layer": 8, "n_head": 8, "d_model": 512, "head_dim": 64, "length": 256},
}
# The weight of the residual where --weight does not say: Algorithm 1 has the entropy's. On trajectories a fixed half is better, because the
# entropy weighs down just what is nearly sure but not committed yet (measured: README, the table of weights).
WEIGHT = {"trajectory": {"weight": "fixed", "fixed": 0.5}, "paper": {"weight": "entropy"}, "earlier": {"weight": "fixed", "fixed": 0.5}}


Batch = tuple[Tensor, Tensor, Tensor | None]  # tokens (B, T), response (B, T) bool, segments (B, T) of packed rows


def batches(dataset: "data.Dataset", split: str, length: int) -> Callable[[int, torch.Generator], Batch]:
    """draw(rows, generator) -> a Batch: random examples (packed or not), or random windows of a stream, where all is response."""
    tokens, response, segments = dataset.tokens(split), dataset.response(split), dataset.segments(split)

    def draw(rows: int, generator: torch.Generator) -> Batch:
        if response is None:
            at = torch.randint(len(tokens) - length + 1, (rows,), generator=generator).numpy()
            x = tokens[at[:, None] + np.arange(length)]  # (B, T), one gather from the memory map
            return torch.from_numpy(x.astype(np.int64)), torch.ones(rows, length, dtype=torch.bool), None
        at = torch.randint(len(tokens), (rows,), generator=generator).numpy()
        packed = None if segments is None else torch.from_numpy(segments[at].astype(np.int64))
        return torch.from_numpy(tokens[at].astype(np.int64)), torch.from_numpy(response[at]), packed

    return draw


def rows_of(x: Tensor | None, rows: list[int]) -> tuple:
    """x (B, ...) in parts of so many rows."""
    return (None,) * len(rows) if x is None else x.split(rows)


def move(batch: Batch, device: torch.device) -> Batch:
    """The batch on the device.

    From pinned memory CUDA copies while it computes, and since kernels are only queued, the next batch is drawn while the device is busy
    with the last step. On a CPU a thread that reads ahead would hide nothing: the gather from the memory map takes 20 microseconds, below
    0.1 % of a step (128 x 36, 16 x 256 and 1 x 8,192 tokens, one core of an AMD EPYC).
    """
    return tuple(x if x is None else (x.pin_memory() if device.type == "cuda" else x).to(device, non_blocking=True) for x in batch)


def learning_rate(o: Train, step: int, steps: int) -> float:
    warmup = max(1, round(o.warmup * steps))
    if step < warmup:
        return o.lr * (step + 1) / warmup
    if o.schedule == "constant":
        return o.lr
    return o.lr * (0.1 + 0.45 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))))


class State:
    """What a resumed stage needs: weights, AdamW's moments, the average, the trajectories under way. All of one step, in one safetensors file."""

    def __init__(self, model: Transformer, o: Train, device: torch.device, trajectories: list[Trajectories]):
        self.model, self.step, self.trajectories = model, 0, trajectories
        self.names = sorted(dict(model.named_parameters()), key=lambda n: model.get_parameter(n).dim() < 2)  # matrices first, as AdamW counts
        matrices = [p for p in model.parameters() if p.dim() >= 2]
        others = [p for p in model.parameters() if p.dim() < 2]
        groups = [{"params": matrices, "weight_decay": o.weight_decay}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=o.lr, betas=(0.9, o.beta2), fused=device.type in ("cuda", "cpu"))
        self.ema = {n: p.detach().clone() for n, p in model.named_parameters()} if o.ema else {}

    def save(self, folder: Path, meta: dict) -> None:
        tensors = {f"weight.{n}": p.detach().contiguous() for n, p in self.model.named_parameters()}
        for index, values in self.optimizer.state_dict()["state"].items():
            tensors |= {f"{key}.{self.names[index]}": value.contiguous() for key, value in values.items()}
        tensors |= {f"ema.{n}": p for n, p in self.ema.items()}
        tensors |= {f"trajectory{i}.{n}": v.contiguous() for i, part in enumerate(self.trajectories) for n, v in part.state.items()}
        write_atomic(folder / "state.safetensors", lambda path: save_file(tensors, path, metadata={"step": str(self.step), **meta}))

    def restore(self, path: Path, meta: dict) -> None:
        """Raises ValueError if the file was written under other options than meta: going on would not give the same weights."""
        with safe_open(path, "pt") as f:
            saved = f.metadata()
        self.step = int(saved.pop("step"))
        changed = [f"{k}={saved.get(k)} (now {v})" for k, v in meta.items() if saved.get(k) != v]
        if changed:
            raise ValueError(f"{path.parent} was trained with other options: {', '.join(changed)}; give the same ones, or --overwrite")
        tensors = load_file(path)
        moments = {i: {k: tensors[f"{k}.{n}"] for k in ("step", "exp_avg", "exp_avg_sq")} for i, n in enumerate(self.names)} if self.step else {}
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": moments})
        with torch.no_grad():
            for name, p in self.model.named_parameters():
                p.copy_(tensors[f"weight.{name}"])
            for name in self.ema:
                self.ema[name].copy_(tensors[f"ema.{name}"])
        for i, part in enumerate(self.trajectories):
            part.state = {n: tensors[f"trajectory{i}.{n}"].to(v.device) for n, v in part.state.items()}


class Stop:
    """Within it the first Ctrl-C (or SIGTERM) only raises a flag, so that a step is never cut in two; the second one interrupts."""

    def __enter__(self) -> "Stop":
        self.asked = False
        self.before = {number: signal.signal(number, self.ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def ask(self, number: int, frame) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def __exit__(self, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


def validate(model: Transformer, draw: Callable, context, device: torch.device, dtype: torch.dtype, length: int, rows: int) -> float:
    """The 1/t-weighted bound in nats per response token on validation data, always the same canvases, noise levels and masks.

    1,024 canvases, fewer if they are long; a forward takes as many as a training step (rows), or 16,384 tokens.
    """
    total, repeats, drawn, part = 0.0, 4, max(4, min(256, (1 << 16) // length)), max(rows, (1 << 14) // length)
    with torch.no_grad(), autocast(device, dtype):
        for i in range(repeats):
            generator, noise = torch.Generator().manual_seed(i), torch.Generator(device).manual_seed(i)
            tokens, response, segments = draw(drawn, generator)
            t = noise_levels(tokens, segments, 0, generator)
            count = maskable(model.config, tokens, response, segments).sum(1)  # (B,)
            for k in torch.arange(drawn).split(part):
                batch = (x if x is None else x[k].to(device) for x in (tokens, response, segments))
                loss = diffusion_loss(model, *batch, context=context, t=t[k].to(device), generator=noise).item()
                total += loss * (count[k].sum() / count.sum()).item()
    return total / repeats


# ---------------------------------------------------------------------------------------------------------------------------------------
# Training


def train_stage(stage: str, o: Train, model: Transformer, dataset: "data.Dataset", folder: Path, length: int, residual: Residual,
                reference: Transformer | None, origin: zoo.Loaded | None, device: torch.device, dtype: torch.dtype, peak: float, meta: dict) -> None:  # fmt: skip
    """Train one stage to its end in its run folder; what is saved is the model, or its moving average if there is one.

    The target learns by o.recipe; only recipe=paper (Algorithm 1) reads the frozen reference. A pretrained model is saved in the layout of
    its origin, so that what reads the original reads the conversion. peak is the FLOP/s that utilisation is measured by.
    Raises KeyboardInterrupt after Ctrl-C, everything saved.
    """
    steps = o.base_steps if stage == "base" else o.steps
    folder.mkdir(parents=True, exist_ok=True)
    dataset.tokenizer.save(folder)
    context = None if reference is None else reference_context(reference, residual)
    if stage == "target" and o.recipe == "earlier":
        context = earlier_context(residual)
    if context and o.absent:
        context = sometimes_absent(context, o.absent)
    rows = [o.batch_size // o.accumulate + (i < o.batch_size % o.accumulate) for i in range(o.accumulate)]
    own, packed = stage == "target" and o.recipe == "trajectory", dataset.segments("train") is not None
    trajectories = [Trajectories(model.config, n, length, device, packed, o.window) for _ in range(o.pool) for n in rows] if own else []
    state, log = State(model, o, device, trajectories), folder / "log.jsonl"
    # What must be equal for a resumed run to give the same weights: everything but where it runs and what it shows.
    free = {"resume", "overwrite", "name", "stage", "device", "preset", "eval_every", "eval_items", "test_items"}
    frozen = {k: str(v) for k, v in meta["options"].items() if k not in free} | {"dtype": str(dtype)}
    if o.resume and (folder / "state.safetensors").is_file():
        state.restore(folder / "state.safetensors", frozen)
        kept = [line for line in log.read_text().splitlines(True) if json.loads(line)["step"] <= state.step] if log.is_file() else []
        write_atomic(log, lambda path: path.write_text("".join(kept)))
    else:
        write_atomic(log, lambda path: path.write_text(""))

    draw, draw_val = batches(dataset, "train", length), batches(dataset, "val", length)
    model.remat = o.remat
    if o.compile:
        model.compile()
    sampler = Sampler(rule="threshold", threshold=0.85, carry="residual" if stage == "target" else "none")
    tokens_per_step = o.batch_size * length * (o.window if own else 1)
    response = dataset.response("train")
    predicted = length * (1.0 if response is None else float(response[:1024].mean())) / 2  # masked tokens of a canvas: t is 1/2 in the mean
    watched = reference or (model if context else None)  # whose extra forward, without gradient, the residual comes from
    flops = 3 * forward_flops(model, length, predicted) + (forward_flops(watched, length, predicted) if watched else 0)  # per canvas
    bar = tqdm(total=steps, initial=state.step, desc=stage, unit="step", disable=None, dynamic_ncols=True)
    begin, done, loss_sum, loss_count, shown = time.perf_counter(), state.step, 0.0, 0, {}
    with Stop() as stop, bar:
        while state.step < steps and not stop.asked:
            step = state.step
            seed = [o.seed, STAGES.index(stage), step]
            generator = torch.Generator().manual_seed(int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0] >> 1))
            noise = torch.Generator(device).manual_seed(generator.initial_seed())
            for group in state.optimizer.param_groups:
                group["lr"] = learning_rate(o, step, steps)

            loss = 0.0
            if own:
                for n, part in zip(rows, trajectories[step % o.pool * len(rows) :]):
                    with autocast(device, dtype):
                        term = part.loss(model, lambda k: move(draw(k, generator), device), residual, noise) * (n / o.batch_size)  # noqa: B023
                    term.backward()
                    loss += term.detach()
            else:
                batch = draw(o.batch_size, generator)
                parts = list(zip(*(rows_of(x, rows) for x in batch)))
                counts = [int(maskable(model.config, *part).sum()) for part in parts]  # a token counts alike, whichever part it is in
                for count, part in zip(counts, parts):
                    if count == 0 < sum(counts):
                        continue  # rows without an answer
                    with autocast(device, dtype):
                        term = diffusion_loss(model, *move(part, device), context=context, t_per=o.t_per, generator=noise)
                        term = term * (count / sum(counts))
                    term.backward()
                    loss += term.detach()
            if o.clip:
                torch.nn.utils.clip_grad_norm_(model.parameters(), o.clip)
            state.optimizer.step()
            state.optimizer.zero_grad(set_to_none=True)
            with torch.no_grad():
                for name, p in model.named_parameters() if o.ema else ():
                    state.ema[name].lerp_(p, 1 - o.ema)
            state.step += 1
            loss_sum, loss_count = loss_sum + loss, loss_count + 1
            bar.update()
            if state.step % max(1, steps // 100) == 0 or state.step == steps:
                mean = float(loss_sum) / loss_count
                if not math.isfinite(mean):
                    raise ValueError(f"the loss became {mean} at step {state.step}: lower --lr (now {o.lr}) or raise --warmup")
                rate = (state.step - done) * tokens_per_step / (time.perf_counter() - begin)
                entry = {"step": state.step, "loss": round(mean, 5), "lr": group["lr"], "tokens": state.step * tokens_per_step}
                done_flops = rate / length * flops
                entry |= {"tokens_per_second": round(rate), "tflops": round(done_flops / 1e12, 4), "mfu": round(done_flops / peak, 4)}
                loss_sum, loss_count = 0.0, 0
                if state.step % o.eval_every == 0 or state.step == steps:
                    paused = time.perf_counter()
                    shown["val"] = entry["val_loss"] = round(validate(model, draw_val, context, device, dtype, length, rows[0]), 5)
                    if dataset.check is not None and o.eval_items and dataset.segments("val") is None:
                        row = evaluate([Setting(stage, model, None, sampler, Residual())], dataset, "val", o.eval_items, o.eval_items, dtype)[0]
                        shown["acc"], entry["val_accuracy"], entry["val_nfe"] = f"{row['accuracy']:.1%}@{row['nfe']:.0f}", row["accuracy"], row["nfe"]
                    state.save(folder, frozen)
                    begin += time.perf_counter() - paused  # rates are those of training alone
                with open(log, "a") as f:
                    f.write(json.dumps(entry) + "\n")
                bar.set_postfix(loss=f"{mean:.3f}", tok_s=f"{rate:,.0f}", mfu=f"{entry['mfu']:.0%}", **shown)
    if state.step < steps:
        state.save(folder, frozen)
        print(f"\n{stage}: stopped at step {state.step} of {steps}, saved; go on with: {command(resume=True)}", file=sys.stderr)
        raise KeyboardInterrupt
    if o.ema:
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(state.ema[name])
    last = json.loads(log.read_text().splitlines()[-1]) if log.stat().st_size else {}
    meta = meta | {"step": state.step, "tokens": state.step * tokens_per_step, "val_loss": last.get("val_loss")}
    if origin is None:
        save(model, folder)
        write_atomic(folder / "train.json", lambda path: path.write_text(json.dumps(meta, indent=1) + "\n"))
    else:
        carry = {"carry": "residual" if stage == "target" else "none"}
        zoo.save(origin._replace(model=model, defaults=origin.defaults | carry, meta=meta), folder)
    (folder / "state.safetensors").unlink(missing_ok=True)  # train.json marks the end; the moments are of no use after it
    print(f"{stage}: {state.step} steps, {state.step * tokens_per_step:,} tokens -> {folder}")


def command(resume: bool = False) -> str:
    """The command line of this run, to be typed again."""
    typed = [a for a in sys.argv[1:] if a not in ("--resume", "--overwrite")]
    return shlex.join(["python", "train.py", *typed, *(["--resume"] if resume else [])])


def implied(typed: dict, dataset: "data.Dataset") -> dict:
    """Defaults that what was typed, and the data set, imply: a reference means the recipe that reads it, short canvases mean trajectories, and a recipe has
    its weight of the residual. A trajectory is as many training steps as denoising steps, all on the same canvas: long ones see too few."""
    response = dataset.response("train")
    short = response is not None and response[:1024].sum(1).mean() < 64
    recipe = typed.get("recipe", "paper" if typed.get("reference") else "trajectory" if short else "earlier")
    return {"recipe": recipe, **WEIGHT.get(recipe, {}), "absent": 0.3 * (recipe == "earlier"), "test_items": 500 if short else 16}


def checked(o: Train, shape: Shape, device: torch.device) -> dict:
    """Fill zeros from the preset and refuse what can not work, in one line. Returns the preset."""
    o.preset = o.preset or ("gpu" if device.type == "cuda" else "cpu")
    for name, value, choices in (("preset", o.preset, PRESETS), ("stage", o.stage, (*STAGES, "all")), ("recipe", o.recipe, tuple(WEIGHT)),
                                 ("schedule", o.schedule, ("cosine", "constant")), ("t_per", o.t_per, T_PER)):  # fmt: skip
        if value not in choices:
            raise ValueError(f"{name}={value!r}: choose from {', '.join(choices)}")
    preset = PRESETS[o.preset]
    for part in (o, shape):
        for f in fields(part):
            if f.name in preset and not getattr(part, f.name):
                setattr(part, f.name, preset[f.name])
            if isinstance(getattr(part, f.name), (int, float)) and not getattr(part, f.name) >= 0:
                raise ValueError(f"{f.name}={getattr(part, f.name)} must not be negative")
    if o.reference and o.recipe != "paper":
        raise ValueError(f"--reference is read by --recipe=paper; recipe={o.recipe} needs none")
    if not 1 <= o.accumulate <= o.batch_size:
        raise ValueError(f"accumulate={o.accumulate} must lie between 1 and batch_size={o.batch_size}")
    if not 0 <= o.absent < 1 or (o.absent and o.recipe == "trajectory"):
        raise ValueError(f"absent={o.absent} must lie in [0, 1), and is 0 for recipe=trajectory, whose trajectories all start without a residual")
    if min(o.window, o.pool) < 1:
        raise ValueError(f"window={o.window} and pool={o.pool} must be at least 1")
    if o.window > 1 and o.recipe != "trajectory":
        raise ValueError(f"--window is read by --recipe=trajectory, not by {o.recipe}")
    if o.t_per == "block" and not (shape.block_size or o.init_from):
        raise ValueError("--t_per=block needs a block-causal model: --block_size=b")
    if o.dtype == "float16":
        raise ValueError("dtype=float16 would need loss scaling: train in bfloat16 or float32")
    if o.init_from and o.stage == "base":
        raise ValueError("--stage=base trains a base from scratch; with --init_from choose --stage=reference, target or all")
    return preset


def main() -> None:
    opened = functools.cache(data.load)  # some defaults depend on the data set, and to open it is to check it whole
    o, shape, residual = arguments(__doc__, Train, Shape, Residual, presets=lambda typed: implied(typed, opened(typed.get("data", Train.data))))
    device, dtype, reason = pick_device(o.device, o.dtype)
    preset = checked(o, shape, device)
    dataset = opened(o.data)
    length = dataset.meta["length"] if dataset.response("train") is not None else shape.length
    if device.type == "cpu" and length <= 512:
        # Short canvases on a CPU: two matmuls and a softmax beat the fused attention, whose bfloat16 backward is slow there (256 canvases of
        # 36 tokens, 4 heads of 32, forward and backward, on two cores of an AMD EPYC, torch 2.13: 63 ms fused, 7 ms so).
        torch.backends.cuda.enable_flash_sdp(False)
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
    root = OUT / (o.name or dataset.name)
    stages = [s for s in STAGES if o.stage in (s, "all") and not (s == "base" and o.init_from)]
    found = [s for s in stages if any((root / s / f).exists() for f in ("train.json", "state.safetensors"))]
    if found and not (o.resume or o.overwrite):
        raise ValueError(f"{root} already holds {', '.join(found)}: --resume goes on, --overwrite starts again, --name=NAME keeps both")
    print(reason)
    print(f"data {dataset.name}: {dataset.meta['splits']['train']:,} train, canvas {length}, vocabulary {dataset.meta['vocab_size']}; preset {o.preset}")

    config = Config(
        vocab_size=dataset.meta["vocab_size"], mask_id=dataset.mask_id, eos_ids=() if dataset.eos_id is None else (dataset.eos_id,),
        pad_id=dataset.eos_id or 0, n_layer=shape.n_layer, n_head=shape.n_head, n_kv_head=shape.n_head, head_dim=preset["head_dim"],
        d_model=shape.d_model, d_ff=-(-shape.d_model * 8 // 3) // 8 * 8, max_len=max(length, 16), block_size=shape.block_size,
    )  # fmt: skip

    packed = dataset.segments("train") is not None

    def fresh(stage: str) -> tuple[Transformer, zoo.Loaded | None]:
        """The weights that a stage starts from, and the pretrained model that they are, if they are one."""
        if stage == "base":
            return Transformer(config).init_weights(torch.Generator().manual_seed(o.seed)).to(device), None
        if o.init_from:
            loaded = zoo.load(o.init_from, device, torch.float32)
            if length > loaded.model.config.max_len:
                raise ValueError(f"canvases of {length} tokens are longer than max_len={loaded.model.config.max_len} of {o.init_from}")
            own = zoo.read_json(loaded.folder / "config.json").get("model_type") == "rcd"
            return loaded.model, None if own else loaded
        return load(root / "base", device, torch.float32), None

    def needed(stage: str, reference: str | Path) -> Callable[[int, bool], dict[str, int]]:
        """(rows, remat) -> bytes of a training step by what needs them, before anything is loaded."""
        with torch.device("meta"):
            model = Transformer(config) if stage == "base" else shape_of(o.init_from or root / "base", dataset.tokenizer)[0]
        stored, own = shape_of(reference, dataset.tokenizer)[1] if reference else 0, stage == "target" and o.recipe == "trajectory"
        return lambda rows, remat: memory(model, o, rows, remat, length, packed, stored, own, device, dtype)

    if o.init_from and tokenizer.load(zoo.find(o.init_from)).fingerprint != dataset.tokenizer.fingerprint:
        folder = zoo.find(o.init_from)
        raise ValueError(f"data set {dataset.name} is not in the tokens of {o.init_from}: prepare it again with --tokenizer={folder}")
    if o.reference and "target" in stages and tokenizer.load(zoo.find(o.reference)).fingerprint != dataset.tokenizer.fingerprint:
        raise ValueError(f"data set {dataset.name} is not in the tokens of the reference {o.reference}")  # now, not after stage 1
    start = time.perf_counter()
    peak = matmul_rate(device, dtype)
    print(f"matmuls run at {peak / 1e12:.3g} TFLOP/s here in {str(dtype)[6:]}; mfu is the model's share of that")
    for stage in stages:
        if o.resume and (root / stage / "train.json").is_file():
            print(f"{stage}: already there, {root / stage}")
            continue
        if stage != "base" and not o.init_from and not (root / "base" / "train.json").is_file():
            raise FileNotFoundError(f"{root}/base is not trained yet: --stage=base, or --init_from=MODEL")
        named = (o.reference or root / "reference") if stage == "target" and o.recipe == "paper" else ""
        if named and not o.reference and not (named / "train.json").is_file():
            raise FileNotFoundError(f"{root}/reference is not trained yet: --stage=reference, or --reference=MODEL")
        report_memory(o, needed(stage, named), available(device))
        model, origin = fresh(stage)
        print(f"{stage}: {sum(p.numel() for p in model.parameters()):,} parameters, {o.base_steps if stage == 'base' else o.steps} steps of {o.batch_size} canvases")
        frozen = zoo.load(named, device, None).model.requires_grad_(False) if named else None  # in the dtype that it is stored in
        meta = {
            "stage": stage, "recipe": o.recipe if stage == "target" else "masked", "command": command(), "seed": o.seed,
            "data": dataset.name, "data_command": dataset.meta["command"], "length": length, "template": origin and origin.template,
            "reference": (o.reference or "../reference") if stage == "target" else None, "residual": asdict(residual),
            "sampler": {"rule": "threshold", "threshold": 0.95}, "options": asdict(o) | asdict(shape) | asdict(residual),
            "device": str(device), "dtype": str(dtype)[6:], "torch": torch.__version__,
        }  # fmt: skip
        train_stage(stage, o, model, dataset, root / stage, length, residual, frozen, origin, device, dtype, peak, meta)
    if o.stage in ("target", "all") and dataset.check is not None and o.test_items and dataset.segments("test") is None:
        final_table(o, root, dataset, residual, device, dtype)
    show = "--steps=8" if dataset.meta["source"] == "generated" else "--prompt=TEXT"  # a text has more blocks than 8, a chat model no examples
    print(f"{(time.perf_counter() - start) / 60:.1f} minutes, {peak_memory(device)}; try: python sample.py --model={root / stages[-1]} {show}")


def peak_memory(device: torch.device) -> str:
    if device.type == "cuda":
        return f"peak memory {torch.cuda.max_memory_allocated(device) / 2**30:.2f} GiB on the GPU"
    try:
        import resource  # not on Windows
    except ImportError:
        return "peak memory unknown"
    return f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == 'darwin' else 2**20):.2f} GiB"


def final_table(o: Train, root: Path, dataset: "data.Dataset", residual: Residual, device: torch.device, dtype: torch.dtype) -> None:
    """SeqD beside RCD over step budgets and thresholds, on test canvases that nothing was chosen by."""
    target = zoo.load(root / "target", device).model
    stage_1 = str(root / "reference") if (root / "reference" / "train.json").is_file() else ""
    seqd, reference = (zoo.load(name, device).model if name else None for name in (stage_1 or o.reference, o.reference or stage_1))
    seqd = seqd if seqd and seqd.config == target.config else None  # a smaller model is no control
    warm = reference if o.recipe == "paper" else None  # a target that never saw a reference's residual has no use for a warm start
    tokens = float(dataset.response("test")[: o.test_items].sum(1).mean())
    blocks = -(-dataset.meta["length"] // (target.config.block_size or dataset.meta["length"]))
    start = "self" if o.recipe == "trajectory" else "cold"  # beside the cold one: whose first residual a trajectory knows
    settings = sweep(seqd, target, warm, Sampler(start=start), residual, tokens, thresholds=[0.5, 0.7, 0.85, 0.95, 0.99], blocks=blocks)
    rows = evaluate(settings, dataset, "test", o.test_items, o.batch_size, dtype, o.seed)
    write_atomic(root / "table.json", lambda path: path.write_text(json.dumps({"command": command(), "seed": o.seed, "rows": rows}) + "\n"))
    print(table(rows))


if __name__ == "__main__":
    run(main)
