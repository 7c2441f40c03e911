"""What the training loop of train.py needs: batches, learning rate, state to resume from, log, validation.

`o` and `shape` stand for the dataclasses Train and Shape of train.py: options by name.
"""

import functools
import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import FrameType

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from rcd import Context, Residual, Sampler, Transformer, diffusion_loss, maskable
from zoo import adam
from zoo.decoding import carry_options
from zoo.fastdllm import complementary_loss
from zoo.files import write_atomic
from zoo.recipes import document_positions, noise_levels
from zoo.tools import distributed
from zoo.tools.checks import (BEFORE, EARLIER, SHARDS, SHARDS_BEFORE, STATE, begin_anew, check_same,
                              command, states)  # fmt: skip
from zoo.tools.command import autocast
from zoo.tools.evaluate import Setting, evaluate
from zoo.tools.sinks import SINKS

# ---- Losses and batches

# By --weighting: the likelihood bound, all masks alike, or every token masked in one of two copies.
LOSSES = {"1/t": diffusion_loss, "1": functools.partial(diffusion_loss, bound=False),
          "complementary": complementary_loss}  # fmt: skip
Batch = tuple[Tensor, Tensor, Tensor | None]  # tokens, response (bool), positions of packed rows: each (B, T)
Draw = Callable[..., Batch]  # rows, generator, mine (default: all) -> a batch on the host


def batches(dataset, split: str, length: int) -> Draw:
    """Random examples of a data.Dataset, packed or not; of a stream, random windows with nothing given.

    Several processes draw the same rows, and each reads the tokens of its own, `mine`: the others' are 0. All
    of them read where answers and documents lie, for a loss is divided by all answers, and a noise level
    belongs to a document.
    """
    tokens, response, segments = dataset.tokens(split), dataset.response(split), dataset.segments(split)
    if response is None and len(tokens) < length:
        raise ValueError(f"length={length}: the {split} split of {dataset.name} has {len(tokens):,} tokens")

    def draw(rows: int, generator: torch.Generator, mine: slice | np.ndarray = slice(None)) -> Batch:
        x = np.zeros((rows, length), np.int64)
        if response is None:
            at = torch.randint(len(tokens) - length + 1, (rows,), generator=generator).numpy()
            x[mine] = tokens[at[mine, None] + np.arange(length)]  # (b, T), one gather from the memory map
            return torch.from_numpy(x), torch.ones(rows, length, dtype=torch.bool), None
        at = torch.randint(len(tokens), (rows,), generator=generator).numpy()
        x[mine] = tokens[at[mine]]
        numbers = None if segments is None else torch.from_numpy(segments[at].astype(np.int64))
        positions = None if numbers is None else document_positions(numbers)
        return torch.from_numpy(x), torch.from_numpy(response[at]), positions

    return draw


def split_rows(batch: Batch, rows: list[int]) -> list[Batch]:
    """The batch in pieces of so many rows."""
    return list(zip(*((None,) * len(rows) if x is None else x.split(rows) for x in batch)))


def move(batch: Batch, device: torch.device) -> Batch:
    """The batch on the device.

    CUDA copies from pinned memory while it computes, and kernels are only queued: the next batch is drawn
    while the device is busy with the last step. On a CPU a thread that reads ahead would hide nothing: the
    gather takes 20 microseconds, below 0.1 % of a step (128 x 36, 16 x 256 and 1 x 8,192 tokens, one core of
    an AMD EPYC).
    """
    pinned = (x if x is None or device.type != "cuda" else x.pin_memory() for x in batch)
    return tuple(x if x is None else x.to(device, non_blocking=True) for x in pinned)


def draw_t(tokens: Tensor, positions: Tensor | None, t_per: str, block_size: int,
           generator: torch.Generator) -> Tensor:  # fmt: skip
    """Noise levels (B, T): one per document, or per block. Raises ValueError for a model without blocks."""
    if t_per == "block" and not block_size:
        needs = "choose from document, block; block needs a block-causal model (block_size > 0)"
        raise ValueError(f"t_per={t_per!r}: {needs}")
    if positions is None:  # a row is a document
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape)
    return noise_levels(positions, block_size if t_per == "block" else 0, generator)


# ---- The loop


def learning_rate(o, step: int, steps: int) -> float:
    """Of this step of so many: a linear rise over o.warmup of them, then a cosine to a tenth, or constant."""
    warmup = max(1, round(o.warmup * steps))
    if step < warmup:
        return o.lr * (step + 1) / warmup
    if o.schedule == "constant":
        return o.lr
    return o.lr * (0.1 + 0.45 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))))


def generators(*seeds: int, device: torch.device) -> tuple[torch.Generator, torch.Generator]:
    """The randomness of one step: a generator on the host for its batch, one on the device for its noise."""
    seed = int(np.random.SeedSequence(seeds).generate_state(1, np.uint64)[0] >> 1)
    return torch.Generator().manual_seed(seed), torch.Generator(device).manual_seed(seed)


class Stop:
    """Within it the first Ctrl-C or SIGTERM only is noted: no step is cut in two. The next interrupts.

    torchrun hands every Ctrl-C on, so that its processes get it twice. They are not interrupted.
    """

    def __enter__(self) -> "Stop":
        self.noted = False
        self.before = {number: signal.signal(number, self.note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def note(self, number: int, frame: FrameType | None) -> None:
        if self.noted and distributed.processes() == 1:
            raise KeyboardInterrupt
        self.noted = True

    def asked(self) -> bool:
        """Whether any process was told to stop: all of them end with the same step."""
        return distributed.anyone(self.noted)

    def __exit__(self, kind: type | None, *_) -> None:
        if kind and distributed.processes() > 1:
            return  # torchrun sends SIGTERM when another process has died: there is something left to say
        for number, handler in self.before.items():
            signal.signal(number, handler)


def open_folder(folder: Path, tokens, o, stages: tuple[str, ...]) -> None:
    """Make the folder of a stage, with the tokenizer, and without what a killed process left half-written."""
    folder.mkdir(parents=True, exist_ok=True)
    begin_anew(folder, stages, o)
    for path in folder.glob(f"{STATE}.*"):
        path.unlink()
    tokens.save(folder)


class State:
    """What a resumed stage needs: weights, AdamW's moments, the moving average, trajectories under way.

    All are of one step, and in one file, folder/state.safetensors, with the options that decide the weights:
    the same file for any number of processes.
    """

    def __init__(self, model: Transformer, o, trajectories: list[distributed.SharedTrajectories],
                 moments: torch.dtype = torch.float32):  # fmt: skip
        """moments: what AdamW stores its two in."""
        self.model, self.step, self.trajectories, self.moments = model, 0, trajectories, moments
        self.trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.names = sorted(self.trained, key=lambda n: self.trained[n].dim() < 2)  # as AdamW counts
        groups = [
            {"params": [p for p in self.trained.values() if p.dim() >= 2], "weight_decay": o.weight_decay},
            {"params": [p for p in self.trained.values() if p.dim() < 2], "weight_decay": 0.0},
        ]
        own = moments != torch.float32
        kind, fused = adam.AdamW if own else torch.optim.AdamW, model.embedding.device.type in ("cuda", "cpu")
        self.optimizer = kind(groups, lr=o.lr, betas=(0.9, o.beta2), fused=fused and not own)
        self.decay = o.ema
        self.ema = {n: p.detach().clone() for n, p in self.trained.items()} if o.ema else {}
        self.shards = distributed.Shards() if hasattr(model.embedding, "to_local") else None

    def average(self) -> None:
        """Move the average towards the weights of this step. The decay rises: early weights are forgotten."""
        decay = min(self.decay, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            for name, average in self.ema.items():
                average.lerp_(self.trained[name], 1 - decay)

    def finish(self) -> None:
        """Give the model its moving average, if there is one."""
        self.wait()
        with torch.no_grad():
            for name, average in self.ema.items():
                self.trained[name].copy_(average)

    def tensors(self) -> dict[str, Tensor]:
        """Weights, moments and average by name; in shards if the model is."""
        found = {f"weight.{n}": p.detach() for n, p in self.trained.items()}
        for index, values in self.optimizer.state_dict()["state"].items():
            found |= {f"{key}.{self.names[index]}": value for key, value in values.items()}
        return found | {f"ema.{n}": p for n, p in self.ema.items()}

    def wait(self) -> None:
        """Until a state that is being written is there."""
        if self.shards:
            self.shards.wait()

    def save(self, folder: Path, options: dict[str, str]) -> None:
        """Process 0 writes the file. The state before it stays, under another name, until the next save. In
        shards all processes write, and training goes on meanwhile: see wait()."""
        tensors, under_way = self.tensors(), {}
        for i, group in enumerate(self.trajectories):
            whole = {n: distributed.gather(v, group.rows) for n, v in group.state.items()}
            under_way |= {f"trajectory{i}.{n}": v.contiguous() for n, v in whole.items() if v is not None}
        meta = {"step": str(self.step), **options}
        if self.shards:
            shards = {n: x for n, x in tensors.items() if not n.startswith("step.")}  # that is self.step
            self.shards.save(folder / SHARDS, folder / SHARDS_BEFORE, shards, under_way, meta)
            return

        def write(path: Path) -> None:
            tensors_here = {n: x.contiguous() for n, x in tensors.items()}
            save_file(tensors_here | under_way, path, metadata=meta)
            if (folder / STATE).exists():
                os.replace(folder / STATE, folder / BEFORE)

        distributed.once(lambda: write_atomic(folder / STATE, write))

    def restore(self, folder: Path, options: dict[str, str]) -> None:
        """Go on from the newest state that is whole.

        Raises ValueError if there is none, or if the options were others: the weights would not be the same.
        """
        for path in states(folder):
            try:
                if path.is_dir():
                    saved, under_way = distributed.facts_of_shards(path), load_file(path / "more.safetensors")
                else:
                    with safe_open(path, "pt") as f:
                        saved = f.metadata()
                    under_way = load_file(path)
                break
            except (SafetensorError, OSError) as error:
                print(f"{path} is damaged: {error}", file=sys.stderr)
        else:
            raise ValueError(f"no state in {folder} is whole: --overwrite starts this stage again")
        if "before" in path.name:
            print(f"{folder}: going on from the state before it, of step {saved['step']}", file=sys.stderr)
        saved = EARLIER | carry_options(saved)
        check_same(folder, saved, options)
        self.step, fused = int(saved["step"]), self.optimizer.defaults["fused"]
        # Steps of AdamW by parameter: fewer for an expert that some batches did not reach, perhaps none.
        steps = {n.removeprefix("step."): float(x) for n, x in under_way.items() if n.startswith("step.")}
        if self.step and not steps:  # in shards, where there are no experts
            steps = dict.fromkeys(self.trained, float(self.step))
        for name, taken in steps.items():
            p = self.trained[name]
            step = torch.tensor(taken, device=p.device if fused else "cpu")
            moments = {k: torch.zeros_like(p, dtype=self.moments) for k in ("exp_avg", "exp_avg_sq")}
            self.optimizer.state[p] = {"step": step, **moments}
        into = {n: x for n, x in self.tensors().items() if not n.startswith("step.")}
        if path.is_dir():
            distributed.load_shards(path, into)
        else:
            for name, x in into.items():
                local, mine = distributed.own_rows(x, under_way[name])
                local.copy_(mine)
        for i, group in enumerate(self.trajectories):
            if f"trajectory{i}.segments" in under_way:  # of an earlier version
                segments = under_way[f"trajectory{i}.segments"]
                under_way[f"trajectory{i}.positions"] = document_positions(segments)
            rows = {n: under_way[f"trajectory{i}.{n}"][group.mine] for n in group.state}
            group.state = {n: rows[n].to(v.device) for n, v in group.state.items()}


class Log:
    """log.jsonl of a stage. Its rates are those of the training itself: see paused()."""

    def __init__(self, path: Path, step: int, tokens_per_step: int, flops_per_token: float, peak: float,
                 options: dict):  # fmt: skip
        """step: where a resumed stage goes on; entries up to there stay. peak: FLOP/s of a process.
        options: of the run; `log` names what is fed the same entries, see SINKS."""
        self.path, self.first, self.tokens_per_step = path, step, tokens_per_step
        self.flops_per_token, self.begin = flops_per_token, time.perf_counter()
        self.peak = peak * distributed.processes()
        self.total, self.count, self.shown = 0.0, 0, {}  # of the losses since the last entry; see write()
        lines = path.read_text().splitlines(True) if step and path.is_file() else []
        kept = "".join(line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step)
        write_atomic(path, lambda temporary: temporary.write_text(kept))
        sink = SINKS.get(options["log"], lambda *_: lambda entry: None)
        self.sink = sink(path.parent, options, step > 0)
        for line in kept.splitlines():
            self.sink(json.loads(line))

    def add(self, loss: Tensor) -> None:
        self.total, self.count = self.total + loss, self.count + 1

    def entry(self, step: int, rate: float) -> dict:
        """Of the steps since the last one."""
        mean, self.total, self.count = float(self.total) / self.count, 0.0, 0
        speed = (step - self.first) * self.tokens_per_step / (time.perf_counter() - self.begin)  # tokens/s
        flops = speed * self.flops_per_token
        return {
            "step": step, "loss": round(mean, 5), "lr": rate, "tokens": step * self.tokens_per_step,
            "tokens_per_second": round(speed), "tflops": float(f"{flops / 1e12:.4g}"),
            "mfu": float(f"{flops / self.peak:.4g}"),
        }  # fmt: skip

    @contextmanager
    def paused(self):
        """What happens within does not count as training time."""
        paused = time.perf_counter()
        yield
        self.begin += time.perf_counter() - paused

    def write(self, entry: dict) -> dict[str, str]:
        """Append the entry; returns what a progress bar shows of it, and of the last validation."""
        with open(self.path, "a") as f:
            f.write(json.dumps(entry) + "\n")
        self.sink(entry)
        if "val_loss" in entry:
            self.shown["val"] = f"{entry['val_loss']:g}"
        if "val_accuracy" in entry:
            self.shown["acc"] = f"{entry['val_accuracy']:.1%}@{entry['val_nfe']:.0f}"
        speed, share = f"{entry['tokens_per_second']:,}", f"{entry['mfu']:.0%}"
        return {"loss": f"{entry['loss']:.3f}", "tok_s": speed, "mfu": share} | self.shown

    def last(self) -> dict:
        """The newest entry, {} if there is none."""
        lines = self.path.read_text().splitlines()
        return json.loads(lines[-1]) if lines else {}


class NoLog:
    """In place of the Log in all processes but the first."""

    def add(self, loss: Tensor) -> None: ...

    def entry(self, step: int, rate: float) -> dict:
        return {}

    def paused(self):
        return nullcontext()

    def write(self, entry: dict) -> dict:
        return {}

    def last(self) -> dict:
        return {}


def open_log(path: Path, *facts) -> Log | NoLog:
    """See Log. Only process 0 writes one."""
    return NoLog() if distributed.rank() else Log(path, *facts)


def stopped(stage: str, state: State, steps: int) -> None:
    """Say how to go on after Ctrl-C or SIGTERM, all being saved. Raises KeyboardInterrupt."""
    state.wait()
    go_on = f"saved; go on with: {command(resume=True)}"
    print(f"\n{stage}: stopped at step {state.step} of {steps}, {go_on}", file=sys.stderr)
    raise KeyboardInterrupt


def not_finite(folder: Path, o, state: State, loss: Tensor, batch: Batch,
               under_way: list[distributed.SharedTrajectories]) -> None:  # fmt: skip
    """Write what a step read whose loss or gradient is no number, and raise ValueError. The weights are still
    those before it.

    under_way: the trajectories that took the step, in place of the batch.
    """
    state.wait()
    names, path = ("tokens", "response", "positions"), folder / "not-finite.safetensors"
    read = {n: [x] for n, x in zip(names, batch) if x is not None}
    if under_way:
        read = {n: [distributed.gather(g.state[n], g.rows) for g in under_way] for n in read}

    def write(temporary: Path) -> None:
        facts = {"step": str(state.step + 1), "loss": str(float(loss))}
        save_file({n: torch.cat(x).contiguous() for n, x in read.items()}, temporary, metadata=facts)

    distributed.once(lambda: write_atomic(path, write))
    what = "loss" if not loss.isfinite() else "gradient"
    remedy = f"lower --lr (now {o.lr}) or raise --warmup, and start again with --overwrite"
    kept = f"its batch is in {path}, what was saved before is still there"
    raise ValueError(f"the {what} became infinite, or no number, at step {state.step + 1}: {kept}; {remedy}")


def validate(model: Transformer, draw: Draw, context: Context | None, device: torch.device,
             dtype: torch.dtype, length: int, rows: int) -> float:  # fmt: skip
    """The 1/t-weighted bound in nats per response token, on fixed canvases, noise levels and masks. Without a
    context the model reads no residual: so it is on trajectories.

    1,024 canvases, fewer if they are long. A forward takes `rows` of them, or 16,384 tokens if that is more.
    Several processes share the four draws.
    """
    total, repeats, drawn = 0.0, 4, max(4, min(256, (1 << 16) // length))
    shares = math.gcd(repeats, distributed.processes())  # as many forwards in every process
    with torch.no_grad(), autocast(device, dtype):
        for i in range(distributed.rank() % shares, repeats, shares):
            generator, noise = torch.Generator().manual_seed(i), torch.Generator(device).manual_seed(i)
            tokens, response, positions = draw(drawn, generator)
            t = draw_t(tokens, positions, "document", 0, generator)
            count = maskable(model.config, response, positions).sum(1)  # (B,)
            for k in torch.arange(drawn).split(max(rows, (1 << 14) // length)):
                some = (x if x is None else x[k].to(device) for x in (tokens, response, positions))
                t_k = t[k].to(device)
                loss = diffusion_loss(model, *some, context=context, t=t_k, generator=noise).item()
                total += loss * (count[k].sum() / count.sum()).item()
    total = distributed.total(torch.tensor(total, dtype=torch.float64))
    return float(total) / repeats / (distributed.processes() // shares)


def has_answers(dataset, split: str) -> bool:
    """Whether answers to this split can be checked: a packed row is no canvas of one task."""
    return dataset.check is not None and not dataset.packed(split)


def accuracy(model: Transformer, dataset, items: int, sampler: Sampler, residual: Residual,
             dtype: torch.dtype) -> dict[str, float]:  # fmt: skip
    """On the first so many validation canvases, as log entries; {} where there are no answers."""
    if not items or not has_answers(dataset, "val"):
        return {}
    setting = Setting("", model, None, sampler, residual)
    (row,) = evaluate([setting], dataset, "val", items, items, dtype)
    return {"val_accuracy": row["accuracy"], "val_nfe": row["nfe"]}
