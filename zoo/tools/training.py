"""What the training loop of train.py needs: batches, learning rate, state to resume from, log, validation.

`o` and `shape` stand for the dataclasses Train and Shape of train.py: options by name.
"""

import errno
import functools
import json
import math
import os
import platform
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, fields
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import zoo
from rcd import Config, Context, Residual, Sampler, Transformer, diffusion_loss, maskable
from zoo import lora, tokenizer
from zoo.decoding import RENAMED, Decoding, carry_options
from zoo.checkpoint import DTYPES, entries, match, plan_for, read
from zoo.files import config_from, load, save, write_atomic
from zoo.recipes import document_positions, init_weights, noise_levels
from zoo.rivals import ABSENT, carries
from zoo.rivals import RECIPES as RIVALS
from zoo.tools import distributed
from zoo.tools.budget import available, cards, memory, plan, report_memory, shape_of, size
from zoo.tools.command import autocast
from zoo.tools.evaluate import Setting, evaluate, sweep, table
from zoo.tools.sinks import SINKS

# ---- Options

# A resumed run may change these: where it runs and what it shows. All other options decide its weights.
FREE = {"resume", "overwrite", "force", "name", "stage", "device", "preset", "eval_every", "eval_items",
        "test_items", "options", "log", "shard"}  # fmt: skip


def command(resume: bool = False) -> str:
    """The command line of this run, to be typed again."""
    typed = [a for a in sys.argv[1:] if a not in ("--resume", "--overwrite")]
    return shlex.join([*distributed.launcher(), "train.py", *typed, *(["--resume"] if resume else [])])


def frozen(options: dict, dtype: torch.dtype) -> dict[str, str]:
    """The options that must be equal for a resumed run to give the same weights."""
    return {k: str(v) for k, v in options.items() if k not in FREE} | {"dtype": str(dtype)}


def options_of(name: str, *groups: type) -> dict:
    """The options of an earlier run from its train.json, as defaults for the fields of these dataclasses.

    name: a folder, a run or a model; "" = no options. A line on stderr names options which this version calls
    otherwise, and those it does not have. Raises ValueError or OSError for what is no such file.
    """
    path = zoo.find(name) / "train.json" if name else None
    stored = zoo.read_json(path).get("options") if name else {}
    if not isinstance(stored, dict):
        raise ValueError(f"{path} is damaged: it holds no options")
    kinds = {f.name: type(f.default) for cls in groups for f in fields(cls)}
    values, unknown = carry_options(stored), [k for k in carry_options(stored) if k not in kinds]
    told = [f"{old} is now {new}" for old, new in RENAMED.items() if old in stored]
    told += [f"no option of this version, left out: {k}={values[k]}" for k in unknown]
    for line in told:
        print(f"{path}: {line}", file=sys.stderr)
    values = {k: v for k, v in values.items() if k not in (*unknown, "resume", "overwrite", "options")}
    for k, v in values.items():
        if type(v) is not kinds[k] and (type(v), kinds[k]) != (int, float):
            raise ValueError(f"{path} is damaged: {k}={v!r} is no {kinds[k].__name__}")
    return values


# Recipe -> the weight of the residual, unless --weight says. Algorithm 1 has the entropy's, which is small
# for what is nearly sure but not committed yet. On trajectories a fixed half needs fewer passes, and costs a
# point of accuracy where passes are many.
RECIPES = {
    "trajectory": {"weight": "fixed", "fixed": 0.5},
    "paper": {"weight": "entropy"},
    "earlier": {"weight": "fixed", "fixed": 0.5},
    **RIVALS,
}


def implied(typed: dict, dataset) -> dict:
    """Defaults that the typed options and the data.Dataset imply.

    A trajectory takes as many training steps as denoising steps: if canvases are long, it sees too few.
    """
    response = dataset.response("train")
    short = response is not None and response[:1024].sum(1).mean() < 64
    recipe = typed.get("recipe", "paper" if typed.get("reference") else "trajectory" if short else "earlier")
    absent, test_items = (ABSENT | {"earlier": 0.3}).get(recipe, 0.0), 500 if short else 16
    return {"recipe": recipe, **RECIPES.get(recipe, {}), "absent": absent, "test_items": test_items}


# The largest values of what is built or run one by one, and of shares. The memory estimate bounds the rest.
LIMITS = {"n_layer": 1000, "buffer": 1000, "window": 1000, "batch_size": 1 << 20, "warmup": 1, "ema": 1}


def fill_zeros(preset: dict, *groups: object) -> None:
    """Set every field that is 0 to the preset's value. ValueError: a number below 0, or above its limit."""
    for group in groups:
        for f in fields(group):
            if f.name in preset and not getattr(group, f.name):
                setattr(group, f.name, preset[f.name])
            value = getattr(group, f.name)
            if isinstance(value, (int, float)) and not value >= 0:
                raise ValueError(f"{f.name}={value} must not be negative")
            if f.name in LIMITS and value > LIMITS[f.name]:
                raise ValueError(f"{f.name}={value} must be at most {LIMITS[f.name]:,}")


def check_choices(o, choices: dict[str, Iterable[str]]) -> None:
    """Raises ValueError for an option that is none of its choices."""
    for name, among in choices.items():
        if getattr(o, name) not in among:
            raise ValueError(f"{name}={getattr(o, name)!r}: choose from {', '.join(filter(None, among))}")


def check_options(o, block_size: int) -> None:
    """Raises ValueError for options that contradict each other. block_size: that of --block_size."""
    trajectory = o.recipe == "trajectory"
    for wrong, says in (
        (o.reference and o.recipe != "paper",
         f"--reference is read by --recipe=paper; recipe={o.recipe} needs none"),
        (not 1 <= o.accumulate <= o.batch_size,
         f"accumulate={o.accumulate} must lie between 1 and batch_size={o.batch_size}"),
        (o.batch_size // max(1, o.accumulate) < distributed.environment("WORLD_SIZE"),
         f"batch_size={o.batch_size} in {o.accumulate} pieces has no row for each of "
         f"{distributed.environment('WORLD_SIZE')} processes: raise --batch_size, or lower --accumulate"),
        (not 0 <= o.absent < 1 or (o.absent and trajectory),
         f"absent={o.absent} must lie in [0, 1), and is 0 for recipe=trajectory, whose trajectories all "
         "start without a residual"),
        (min(o.window, o.buffer) < 1, f"window={o.window} and buffer={o.buffer} must be at least 1"),
        (o.window > 1 and not trajectory, f"--window is read by --recipe=trajectory, not by {o.recipe}"),
        (o.t_per == "block" and not (block_size or o.init_from),
         "--t_per=block needs a block-causal model: --block_size=b"),
        (o.dtype == "float16", "dtype=float16 would need loss scaling: train in bfloat16 or float32"),
        (o.shard == "full" and distributed.processes() == 1,
         "--shard=full shares a model out to several processes: torchrun --nproc_per_node=N train.py ..."),
        (o.lora and o.shard == "full", "--lora is for a model that fits into a process: choose --shard=none"),
        (o.recipe in carries.LEARNED and (o.lora or o.shard == "full"),
         f"recipe={o.recipe} has parameters of its own: it takes neither --lora nor --shard=full"),
        (o.init_from and o.stage == "base",
         "--stage=base trains a base from scratch; with --init_from choose --stage=reference, target or all"),
        (o.log and not find_spec(o.log),
         f"--log={o.log} needs a package that is not here: pip install -e '.[{o.log}]'"),
    ):  # fmt: skip
        if wrong:
            raise ValueError(says)


def check_tokens(dataset, init_from: str, reference: str) -> None:
    """Raises ValueError if the data set is not in the tokens of the models that are named ("" = none)."""
    prepared = dataset.tokenizer.fingerprint
    if init_from and tokenizer.load(zoo.find(init_from)).fingerprint != prepared:
        remedy = f"prepare it again with --tokenizer={zoo.find(init_from)}"
        raise ValueError(f"data set {dataset.name} is not in the tokens of {init_from}: {remedy}")
    if reference and tokenizer.load(zoo.find(reference)).fingerprint != prepared:
        raise ValueError(f"data set {dataset.name} is not in the tokens of the reference {reference}")


def check_folder(root: Path, stages: list[str], o) -> None:
    """Raises ValueError for stages that are there already, unless they are to be resumed or overwritten."""
    found = ", ".join(s for s in stages if (root / s / "train.json").exists() or states(root / s))
    if found and not (o.resume or o.overwrite):
        ways = "--resume goes on, --overwrite starts again, --name=NAME keeps both"
        raise ValueError(f"{root} already holds {found}: {ways}")


# What the system says if it will not write: no permission, a read-only file system, no room, no folder.
REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO,
           errno.EEXIST, errno.ENOTDIR)  # fmt: skip


@contextmanager
def claimed(root: Path):
    """The run folder, for this run alone: root/.lock is locked, and names the process that holds it.

    The system frees the lock of a process that has died. Raises ValueError if another one holds it, and
    OSError, in one line, if something cannot be written there.
    """
    files = []

    def lock() -> None:
        root.mkdir(parents=True, exist_ok=True)
        files.append(open(root / ".lock", "a+"))
        try:
            import fcntl  # not on Windows
        except ImportError:
            return
        try:
            fcntl.flock(files[0], fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            files[0].seek(0)
            holder = files[0].read().strip() or "another process"
            raise ValueError(f"{root} is in use by {holder}; wait for it, or choose --name=NAME") from None
        except OSError as error:
            warning = f"{root} cannot be locked ({error.strerror}): let no second run write there"
            print(f"WARNING: {warning}", file=sys.stderr)
        files[0].truncate(0)
        files[0].write(f"process {os.getpid()} on {platform.node()}: {command()}\n")
        files[0].flush()

    try:
        distributed.once(lock)
        yield
    except (OSError, SafetensorError) as error:
        if isinstance(error, OSError) and error.errno not in REFUSED:
            raise
        kept = "what was saved before is still there; mend that, then go on with"
        raise OSError(f"cannot write to {root}: {error}; {kept}: {command(resume=True)}") from None
    finally:
        for file in files:
            file.close()


def quick_attention(device: torch.device, length: int) -> None:
    """For short canvases on a CPU: no fused attention, whose bfloat16 backward is slow there.

    256 canvases of 36 tokens, 4 heads of 32, forward and backward, on two cores of an AMD EPYC, torch 2.13:
    63 ms fused, 7 ms as two matmuls and a softmax.
    """
    if device.type == "cpu" and length <= 512:
        torch.backends.cuda.enable_flash_sdp(False)
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)


# ---- Models


class Run(NamedTuple):
    """What the stages of a run share."""

    o: Any
    shape: Any
    residual: Residual
    dataset: Any  # data.Dataset
    config: Config  # of a base
    root: Path  # out/<name>
    length: int  # of a canvas in tokens
    device: torch.device
    dtype: torch.dtype
    peak: float  # FLOP/s of a matmul here: full utilisation


def base_config(dataset, shape, head_dim: int, length: int) -> Config:
    """Config of a base for canvases of `length` tokens."""
    return Config(
        vocab_size=dataset.meta["vocab_size"], mask_id=dataset.mask_id, pad_id=dataset.eos_id or 0,
        eos_ids=() if dataset.eos_id is None else (dataset.eos_id,), n_layer=shape.n_layer,
        n_head=shape.n_head, n_kv_head=shape.n_head, head_dim=head_dim, d_model=shape.d_model,
        d_ff=-(-shape.d_model * 8 // 3) // 8 * 8, max_len=max(length, 16), block_size=shape.block_size,
    )  # fmt: skip


def reference_of(recipe: str, r: Run) -> str | Path:
    """The name of Algorithm 1's reference, "" for other recipes. FileNotFoundError: not trained yet."""
    if not r.o.init_from and not (r.root / "base" / "train.json").is_file():
        raise FileNotFoundError(f"{r.root}/base is not trained yet: --stage=base, or --init_from=MODEL")
    if recipe != "paper":
        return ""
    if not r.o.reference and not (r.root / "reference" / "train.json").is_file():
        remedy = "--stage=reference, or --reference=MODEL"
        raise FileNotFoundError(f"{r.root}/reference is not trained yet: {remedy}")
    return r.o.reference or r.root / "reference"


def needs(stage: str, recipe: str, r: Run, reference: str | Path, processes: int) -> Callable[..., dict]:
    """The memory() of a stage in each of so many processes, as a function of rows, remat, shards and the rank
    of LoRA. reference: its name; "" = none."""
    o, own, tokens = r.o, recipe == "trajectory", r.dataset.tokenizer
    with torch.device("meta"):
        start = o.init_from or r.root / "base"
        ready = o.init_from or (r.root / "base" / "config.json").is_file()
        model = shape_of(start, tokens)[0] if ready and stage != "base" else Transformer(r.config)
    stored = shape_of(reference, tokens)[1] if reference else 0

    def need(rows: int, remat: bool, shards: int = 1, rank: int = o.lora) -> dict[str, int]:
        return memory(
            model, rows, remat, length=r.length, batch_size=-(-o.batch_size // processes), device=r.device,
            dtype=r.dtype, packed=r.dataset.segments("train") is not None, ema=o.ema > 0, reference=stored,
            buffer=o.buffer if own else 0, window=o.window if own else 1, shards=shards,
            adapters=lora.parameters(model, rank) if stage != "base" else 0,
        )  # fmt: skip

    return need


def report_stage(stage: str, recipe: str, r: Run, reference: str | Path) -> bool:
    """Say how much memory a stage will need, before anything is loaded. reference: its name; "" = none.

    Returns whether the model is to be sharded: --shard, or where that is auto, if it does not fit otherwise.
    """
    o, n = r.o, distributed.processes()
    rows, have = -(-o.batch_size // n), available(r.device)
    if r.device.type == "cpu":  # the processes of a machine share it
        have //= max(1, distributed.environment("LOCAL_WORLD_SIZE"))
    need = needs(stage, recipe, r, reference, n)
    whole = sum(need(-(-rows // o.accumulate), o.remat).values())
    too_large = n > 1 and distributed.anyone(0 < have < whole)
    whole_only = o.lora or (stage == "target" and recipe in carries.LEARNED)
    sharded = o.shard == "full" or (o.shard == "auto" and too_large and not whole_only)
    if n > 1:
        why = f"a process would need {size(whole)} of {size(have)}" if o.shard == "auto" else "asked for"
        print(f"{n} processes, shard {'full' if sharded else 'none'} ({why})")
    need = functools.partial(need, shards=n if sharded else 1)
    report_memory(need, have, rows, o.accumulate, o.remat, o.force)
    return sharded


def print_plan(r: Run) -> None:
    """What the target would need on the cards that --plan names, and which options make it fit."""
    o, (count, have) = r.o, cards(r.o.plan)
    reference = (o.reference or o.init_from) if o.recipe == "paper" else ""
    need = needs("target", o.recipe, r, reference, count)
    print(f"{o.plan}, {size(have)} of each counted, {o.batch_size} canvases of {r.length} tokens; estimates:")
    for line in plan(need, count, have, -(-o.batch_size // count)):
        print(line)


def start_of(stage: str, r: Run) -> tuple[Transformer, zoo.Loaded | None]:
    """The model that a stage starts from; and where it is a pretrained one in its own layout, all of that."""
    o = r.o
    if stage == "base":
        return init_weights(Transformer(r.config), torch.Generator().manual_seed(o.seed)).to(r.device), None
    if not o.init_from:
        model, origin = load(r.root / "base", r.device, torch.float32), None
    else:
        stored = None if o.lora else torch.float32  # what is frozen needs no float32
        model, origin = of_origin(zoo.load(o.init_from, r.device, stored), r)
    carry = o.recipe if stage == "target" else ""  # not every recipe brings a carry with parameters
    if carry in carries.LEARNED and origin:
        here = "a carry with parameters is saved in this project's own layout only"
        raise ValueError(f"recipe={carry} cannot convert {o.init_from}: {here}")
    return carries.attach(model, carry, o.seed), origin


def of_origin(loaded: zoo.Loaded, r: Run) -> tuple[Transformer, zoo.Loaded | None]:
    """As start_of(), of a model that was loaded."""
    most = loaded.model.config.max_len
    if r.length > most:
        raise ValueError(f"canvases of {r.length} tokens are longer than max_len={most} of {r.o.init_from}")
    own = zoo.read_json(loaded.folder / "config.json").get("model_type") == "rcd"
    return loaded.model, None if own else loaded


Weights = Iterator[tuple[str, Tensor]]  # parameter by parameter


def sharded_start(stage: str, r: Run) -> tuple[Transformer, zoo.Loaded | None, Weights]:
    """As start_of(), but on the meta device, and the weights that it will get."""
    if stage == "base":
        whole = init_weights(Transformer(r.config), torch.Generator().manual_seed(r.o.seed))
        with torch.device("meta"):
            return Transformer(r.config), None, iter(whole.state_dict().items())
    loaded, weights = opened(r.o.init_from or r.root / "base", torch.float32)
    return *of_origin(loaded, r), weights


def opened(name: str | Path, dtype: torch.dtype | None = None) -> tuple[zoo.Loaded, Weights]:
    """A model on the meta device, and its weights: of the files only what is copied will be read.

    dtype None is that of its embedding. Errors as in zoo.load.
    """
    folder = zoo.find(name)
    values, tokens, found = zoo.read_json(folder / "config.json"), tokenizer.load(folder), entries(folder)
    if values.pop("model_type", "") == "rcd":
        with torch.device("meta"):
            model = Transformer(config_from(values))
        layout, template, defaults = {n: [n] for n in model.state_dict()}, None, {}
        if {n: e.shape for n, e in found.items()} != {n: (*p.shape,) for n, p in model.state_dict().items()}:
            raise ValueError(f"{folder}: the tensors do not fit the config")
        table = "embed_tokens.weight"
    else:
        plan = plan_for(folder, tokens)
        (model, layout), template, defaults = match(plan, found, str(folder)), plan.template, plan.defaults
        table = plan.original("embed_tokens.weight")
    rows = {n: len(p) for n, p in model.state_dict().items()}

    def weights() -> Weights:
        for name, tensor in read(found, list(layout)):
            yield from zip(layout[name], tensor.split([rows[n] for n in layout[name]]))

    model.to(dtype or DTYPES[found[table].dtype])
    return zoo.Loaded(model, tokens, folder, template, defaults, {}), weights()


def open_models(stage: str, r: Run, named: str | Path, sharded: bool):
    """The model to train; its origin, see start_of(); the frozen reference `named`, in the dtype it is stored
    in, "" = none; and what trains the model in several processes."""
    if not sharded:
        model, origin = start_of(stage, r)
        if r.o.lora and stage != "base":
            lora.adapt(model, r.o.lora, r.o.seed)
        reference = zoo.load(named, r.device).model.requires_grad_(False) if named else None
        return model, origin, reference, distributed.Parallel(model, None, r.device, r.dtype, False)
    model, origin, weights = sharded_start(stage, r)
    loaded, others = opened(named) if named else (None, ())
    reference = loaded and loaded.model.requires_grad_(False)
    parallel = distributed.Parallel(model, reference, r.device, r.dtype, True)
    distributed.fill(model, weights, r.device)
    if reference:
        distributed.fill(reference, others, r.device)
    return model, origin, reference, parallel


# ---- Batches

Batch = tuple[Tensor, Tensor, Tensor | None]  # tokens, response (bool), positions of packed rows: each (B, T)
Draw = Callable[[int, torch.Generator], Batch]  # rows, generator -> a batch on the host


def batches(dataset, split: str, length: int) -> Draw:
    """Random examples of a data.Dataset, packed or not; of a stream, random windows with nothing given."""
    tokens, response, segments = dataset.tokens(split), dataset.response(split), dataset.segments(split)
    if response is None and len(tokens) < length:
        raise ValueError(f"length={length}: the {split} split of {dataset.name} has {len(tokens):,} tokens")

    def draw(rows: int, generator: torch.Generator) -> Batch:
        if response is None:
            at = torch.randint(len(tokens) - length + 1, (rows,), generator=generator).numpy()
            x = tokens[at[:, None] + np.arange(length)]  # (B, T), one gather from the memory map
            return torch.from_numpy(x.astype(np.int64)), torch.ones(rows, length, dtype=torch.bool), None
        at = torch.randint(len(tokens), (rows,), generator=generator).numpy()
        numbers = None if segments is None else torch.from_numpy(segments[at].astype(np.int64))
        positions = None if numbers is None else document_positions(numbers)
        return torch.from_numpy(tokens[at].astype(np.int64)), torch.from_numpy(response[at]), positions

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


def open_folder(folder: Path, tokens) -> None:
    """Make the folder of a stage, with the tokenizer, and without what a killed process left half-written."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.glob(f"{STATE}.*"):
        path.unlink()
    tokens.save(folder)


# The last state of a stage, and the one before it: a file, or a folder if the model is sharded.
STATE, BEFORE, SHARDS, SHARDS_BEFORE = (
    "state.safetensors", "state.before.safetensors", "state.shards", "state.before.shards",
)  # fmt: skip


def states(folder: Path) -> list[Path]:
    """What a stage can be resumed from, the newest first."""
    found = [folder / n for n in (STATE, SHARDS, BEFORE, SHARDS_BEFORE) if (folder / n).exists()]
    return sorted(found, key=lambda path: ("before" in path.name, -path.stat().st_mtime))


class State:
    """What a resumed stage needs: weights, AdamW's moments, the moving average, trajectories under way.

    All are of one step, and in one file, folder/state.safetensors, with the options that decide the weights:
    the same file for any number of processes.
    """

    def __init__(self, model: Transformer, o, trajectories: list[distributed.SharedTrajectories]):
        self.model, self.step, self.trajectories = model, 0, trajectories
        self.trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.names = sorted(self.trained, key=lambda n: self.trained[n].dim() < 2)  # as AdamW counts
        groups = [
            {"params": [p for p in self.trained.values() if p.dim() >= 2], "weight_decay": o.weight_decay},
            {"params": [p for p in self.trained.values() if p.dim() < 2], "weight_decay": 0.0},
        ]
        fused = model.embedding.device.type in ("cuda", "cpu")
        self.optimizer = torch.optim.AdamW(groups, lr=o.lr, betas=(0.9, o.beta2), fused=fused)
        self.decay = o.ema
        self.ema = {n: p.detach().clone() for n, p in self.trained.items()} if o.ema else {}

    def average(self) -> None:
        """Move the average towards the weights of this step. The decay rises: early weights are forgotten."""
        decay = min(self.decay, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            for name, average in self.ema.items():
                average.lerp_(self.trained[name], 1 - decay)

    def finish(self) -> None:
        """Give the model its moving average, if there is one."""
        with torch.no_grad():
            for name, average in self.ema.items():
                self.trained[name].copy_(average)

    def tensors(self) -> dict[str, Tensor]:
        """Weights, moments and average by name; in shards if the model is."""
        found = {f"weight.{n}": p.detach() for n, p in self.trained.items()}
        for index, values in self.optimizer.state_dict()["state"].items():
            found |= {f"{key}.{self.names[index]}": value for key, value in values.items()}
        return found | {f"ema.{n}": p for n, p in self.ema.items()}

    def save(self, folder: Path, options: dict[str, str]) -> None:
        """Process 0 writes the file. The state before it stays, under another name, until the next save."""
        tensors, under_way = self.tensors(), {}
        for i, group in enumerate(self.trajectories):
            whole = {n: distributed.gather(v, group.rows) for n, v in group.state.items()}
            under_way |= {f"trajectory{i}.{n}": v.contiguous() for n, v in whole.items() if v is not None}
        meta = {"step": str(self.step), **options}
        if hasattr(self.model.embedding, "to_local"):
            shards = {n: x for n, x in tensors.items() if not n.startswith("step.")}  # that is self.step
            distributed.save_shards(folder / SHARDS, folder / SHARDS_BEFORE, shards, under_way, meta)
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
        saved = {RENAMED.get(k, k): v for k, v in saved.items()}
        changed = [f"{k}={saved.get(k)} (now {v})" for k, v in options.items() if saved.get(k) != v]
        if changed:
            remedy = "give the same ones, or --overwrite"
            raise ValueError(f"{folder} was trained with other options: {', '.join(changed)}; {remedy}")
        self.step, moments = int(saved["step"]), {}
        for i, p in enumerate(p for group in self.optimizer.param_groups for p in group["params"]):
            moments[i] = {"step": torch.tensor(float(self.step))}
            moments[i] |= {key: torch.zeros_like(p) for key in ("exp_avg", "exp_avg_sq")}
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": moments if self.step else {}})
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
        """step: where a resumed stage goes on; entries up to there stay. peak: FLOP/s of full utilisation.
        options: of the run; `log` names what is fed the same entries, see SINKS."""
        self.path, self.first, self.tokens_per_step = path, step, tokens_per_step
        self.flops_per_token, self.peak, self.begin = flops_per_token, peak, time.perf_counter()
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
            "tokens_per_second": round(speed), "tflops": round(flops / 1e12, 4),
            "mfu": round(flops / self.peak, 4),
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


def stopped(stage: str, step: int, steps: int) -> None:
    """Say how to go on after Ctrl-C or SIGTERM, all being saved. Raises KeyboardInterrupt."""
    go_on = f"saved; go on with: {command(resume=True)}"
    print(f"\n{stage}: stopped at step {step} of {steps}, {go_on}", file=sys.stderr)
    raise KeyboardInterrupt


def not_finite(folder: Path, o, step: int, loss: Tensor, batch: Batch,
               under_way: list[distributed.SharedTrajectories]) -> None:  # fmt: skip
    """Write what a step read whose loss or gradient is no number, and raise ValueError. The weights are still
    those before it.

    under_way: the trajectories that took the step, in place of the batch.
    """
    names, path = ("tokens", "response", "positions"), folder / "not-finite.safetensors"
    read = {n: [x] for n, x in zip(names, batch) if x is not None}
    if under_way:
        read = {n: [distributed.gather(g.state[n], g.rows) for g in under_way] for n in read}

    def write(temporary: Path) -> None:
        facts = {"step": str(step + 1), "loss": str(float(loss))}
        save_file({n: torch.cat(x).contiguous() for n, x in read.items()}, temporary, metadata=facts)

    distributed.once(lambda: write_atomic(path, write))
    what = "loss" if not loss.isfinite() else "gradient"
    remedy = f"lower --lr (now {o.lr}) or raise --warmup, and start again with --overwrite"
    kept = f"its batch is in {path}, what was saved before is still there"
    raise ValueError(f"the {what} became infinite, or no number, at step {step + 1}: {kept}; {remedy}")


def validate(model: Transformer, draw: Draw, context: Context | None, device: torch.device,
             dtype: torch.dtype, length: int, rows: int) -> float:  # fmt: skip
    """The 1/t-weighted bound in nats per response token, always on the same canvases, noise levels and masks.

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
    return dataset.check is not None and dataset.segments(split) is None


def accuracy(model: Transformer, dataset, items: int, sampler: Sampler,
             dtype: torch.dtype) -> dict[str, float]:  # fmt: skip
    """On the first so many validation canvases, as log entries; {} where there are no answers."""
    if not items or not has_answers(dataset, "val"):
        return {}
    setting = Setting("", model, None, sampler, Residual())
    (row,) = evaluate([setting], dataset, "val", items, items, dtype)
    return {"val_accuracy": row["accuracy"], "val_nfe": row["nfe"]}


# ---- Ends


def record(stage: str, recipe: str, r: Run, origin: zoo.Loaded | None) -> dict:
    """train.json: how a stage was made, and how its model is sampled."""
    reference = (r.o.reference or "../reference") if stage == "target" else None
    return {
        "stage": stage, "recipe": recipe, "command": command(), "seed": r.o.seed, "data": r.dataset.name,
        "data_command": r.dataset.meta["command"], "length": r.length,
        "template": origin and origin.template, "reference": reference, "residual": asdict(r.residual),
        "sampler": {"rule": "threshold", "threshold": 0.95},
        "options": asdict(r.o) | asdict(r.shape) | asdict(r.residual),
        "device": str(r.device), "dtype": str(r.dtype)[6:], "torch": torch.__version__,
    }  # fmt: skip


def save_stage(model: Transformer, origin: zoo.Loaded | None, folder: Path, meta: dict) -> None:
    """The trained model and train.json, which marks the end of a stage.

    origin: see start_of(). The model is saved in its layout: what reads the original reads the conversion.
    """
    if origin is None:
        save(model, folder)
        text = json.dumps(meta, indent=1) + "\n"
        write_atomic(folder / "train.json", lambda path: path.write_text(text))
    else:
        defaults = origin.defaults | {"carry": "residual" if meta["stage"] == "target" else "none"}
        zoo.save(origin._replace(model=model, defaults=defaults, meta=meta), folder)
    for path in states(folder):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def final_table(r: Run) -> None:
    """Print and save SeqD beside RCD, over budgets and thresholds, on the first test canvases."""
    o, root, dataset, device = r.o, r.root, r.dataset, r.device
    stage_1 = str(root / "reference") if (root / "reference" / "train.json").is_file() else ""
    names = (stage_1 or o.reference, o.reference or stage_1)
    stored = sum(shape_of(name, dataset.tokenizer)[1] for name in (root / "target", *names) if name)
    if distributed.anyone(0 < available(device) < stored):
        return print(f"no table: a process would have to hold {size(stored)} of models")
    target = zoo.load(root / "target", device).model
    seqd, reference = (zoo.load(name, device).model if name else None for name in names)
    seqd = seqd if seqd and seqd.config == target.config else None  # a smaller model is no control
    warm = reference if o.recipe == "paper" else None  # others never learned to read a reference's residual
    start = "self" if o.recipe == "trajectory" else "cold"  # a second start, which a trajectory has learned
    tokens = float(dataset.response("test")[: o.test_items].sum(1).mean())
    length = dataset.meta["length"]
    settings = sweep(seqd, target, warm, Decoding(start=start), r.residual, tokens,
                     thresholds=[0.5, 0.7, 0.85, 0.95, 0.99],
                     blocks=-(-length // (target.config.block_size or length)))  # fmt: skip
    rows = evaluate(settings, dataset, "test", o.test_items, o.batch_size, r.dtype, o.seed)
    text = json.dumps({"command": command(), "seed": o.seed, "rows": rows}) + "\n"
    distributed.once(lambda: write_atomic(root / "table.json", lambda path: path.write_text(text)))
    print(table(rows))
