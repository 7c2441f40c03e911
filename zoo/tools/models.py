"""The models of a stage of train.py: what it starts from, what fits into memory, what it leaves behind.

`o` and `shape` stand for the dataclasses Train and Shape of train.py: options by name.
"""

import functools
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import zoo
from rcd import Config, Residual, Transformer, check
from zoo import lora, tokenizer
from zoo.checkpoint import DTYPES, entries, match, plan_for, read
from zoo.decoding import Decoding
from zoo.files import config_from, load, save, write_atomic
from zoo.recipes import init_weights
from zoo.rivals import carries
from zoo.tools import distributed
from zoo.tools.budget import available, cards, memory, plan, report_memory, shape_of, size
from zoo.tools.checks import command, remove_states
from zoo.tools.evaluate import evaluate, sweep, table

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
    """The memory() of a stage in each of so many processes, as a function of rows, remat, shards, the rank of
    LoRA and offload. reference: its name; "" = none."""
    o, own, tokens = r.o, carries.on_trajectories(recipe), r.dataset.tokenizer
    with torch.device("meta"):
        start = o.init_from or r.root / "base"
        ready = o.init_from or (r.root / "base" / "config.json").is_file()
        model = shape_of(start, tokens)[0] if ready and stage != "base" else Transformer(r.config)
    stored = shape_of(reference, tokens)[1] if reference else 0

    def need(rows: int, remat: bool, shards: int = 1, rank: int = o.lora,
             offload: bool = False) -> dict[str, int]:  # fmt: skip
        copies = 2 if o.weighting == "complementary" and stage != "base" else 1
        return memory(
            model, copies * rows, remat, length=r.length, batch_size=-(-o.batch_size // processes),
            device=r.device, dtype=r.dtype, packed=r.dataset.packed("train"), ema=o.ema > 0,
            reference=stored, buffer=o.buffer if own else 0, window=o.window if own else 1, shards=shards,
            adapters=lora.parameters(model, rank) if stage != "base" else 0, offload=offload,
            moments=getattr(torch, o.adam),
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
    whole_only = o.lora or (stage == "target" and carries.name_of(recipe) in carries.LEARNED)
    sharded = o.shard == "full" or (o.shard == "auto" and too_large and not whole_only)
    version = torch.__version__  # the first to write safetensors in shards is 2.9
    update = f"a model in shards needs torch 2.9 or newer, not {version}: update it, or choose --shard=none"
    check(not sharded or version >= (2, 9), update)
    if n > 1:
        why = f"a process would need {size(whole)} of {size(have)}" if o.shard == "auto" else "asked for"
        print(f"{n} processes, shard {'full' if sharded else 'none'} ({why})")
    offload = o.offload and r.device.type != "cpu"  # which is the host
    need = functools.partial(need, shards=n if sharded else 1, offload=offload)
    report_memory(need, have, rows, o.accumulate, o.remat, o.force)
    return sharded


def print_plan(r: Run) -> None:
    """What the target would need on the cards that --plan names, and which options make it fit."""
    o, (count, have) = r.o, cards(r.o.plan)
    r = r._replace(dtype=r.dtype if o.dtype else torch.bfloat16)  # what such a card trains in
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
        check_blocks(model, r)
    else:
        stored = None if o.lora else torch.float32  # what is frozen needs no float32
        model, origin = of_origin(zoo.load(o.init_from, r.device, stored), r)
    carry = carries.name_of(o.recipe) if stage == "target" else ""  # few recipes have parameters of their own
    if carry in carries.LEARNED and origin:
        here = "a carry with parameters is saved in this project's own layout only"
        raise ValueError(f"recipe={o.recipe} cannot convert {o.init_from}: {here}")
    return carries.attach(model, carry, o.seed), origin


def check_blocks(model: Transformer, r: Run) -> None:
    """Raises ValueError if the options ask for another block_size than that of the model to start from."""
    b, asked = model.config.block_size, r.shape.block_size
    if asked not in (0, b):
        raise ValueError(f"block_size={asked}, but the model to start from has {b}: leave it out")


def of_origin(loaded: zoo.Loaded, r: Run) -> tuple[Transformer, zoo.Loaded | None]:
    """As start_of(), of a model that was loaded."""
    most = loaded.model.config.max_len
    if r.length > most:
        raise ValueError(f"canvases of {r.length} tokens are longer than max_len={most} of {r.o.init_from}")
    check_blocks(loaded.model, r)
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
    parallel = distributed.Parallel(model, reference, r.device, r.dtype, True, r.o.offload)
    distributed.fill(model, weights, torch.device("cpu") if r.o.offload else r.device)
    if reference:
        distributed.fill(reference, others, r.device)
    return model, origin, reference, parallel


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
    remove_states(folder)


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
    start = "self" if carries.on_trajectories(o.recipe) else "cold"  # a further row
    tokens = float(dataset.response("test")[: o.test_items].sum(1).mean())
    length = dataset.meta["length"]
    settings = sweep(seqd, target, warm, Decoding(start=start), r.residual, tokens,
                     blocks=-(-length // (target.config.block_size or length)))  # fmt: skip
    rows = evaluate(settings, dataset, "test", o.test_items, o.batch_size, r.dtype, o.seed)
    text = json.dumps({"command": command(), "seed": o.seed, "rows": rows}) + "\n"
    distributed.once(lambda: write_atomic(root / "table.json", lambda path: path.write_text(text)))
    print(table(rows))
