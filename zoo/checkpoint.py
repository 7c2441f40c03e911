"""Folders in the Hugging Face hub's layout: read them into our Transformer, verify them, write them back.

A folder holds config.json, model.safetensors (or several shards and model.safetensors.index.json) and a
tokenizer. Everything is checked before anything is loaded: config.json by its family (zoo/families.py), then
every tensor's name, shape and dtype against the model, from the headers of the files alone. Then the model,
built without memory on the meta device, receives one tensor after the other. Peak memory is that of the
weights. Pickled weights are never opened.
"""

import json
import os
import re
import shutil
import sys
import tempfile
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rcd import Transformer
from zoo import tokenizer
from zoo.decoding import Decoding
from zoo.families import FAMILIES
from zoo.family import Plan, Settings, Source
from zoo.files import Loaded, config_from, read_json
from zoo.files import save as save_run
from zoo.progress import progress
from zoo.templates import TEMPLATES

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
INDEX = "model.safetensors.index.json"
SHARD_BYTES = 5 * 10**9
MAPPED = 1 << 25  # bytes read before a file is opened anew: until then they count as this process's memory
# Files of a model that was in the folder before.
STALE = re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?|tokenizer\.json|train\.json")
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
COPIED = ("generation_config.json", "LICENSE", "LICENSE.md", "LICENSE.txt")  # beside the tokenizer's files
# The "rcd" section of config.json: Config fields that training may set, the chat template, Decoding fields.
KEPT = {"block_size": int, "mask_id": int, "eos_ids": list, "pad_id": int, "logit_shift": bool}
OURS = {**KEPT, "template": (str, type(None)), "defaults": dict}


class Entry(NamedTuple):
    """A tensor in a file."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


def entries(folder: Path) -> dict[str, Entry]:
    """Every tensor in the files of a folder, from their headers. Raises FileNotFoundError or ValueError."""
    if (folder / "model.safetensors").is_file():
        files, listed = ["model.safetensors"], None
    elif (folder / INDEX).is_file():
        listed = read_json(folder / INDEX).get("weight_map")
        if not isinstance(listed, dict) or not listed or not all(isinstance(f, str) for f in listed.values()):
            raise ValueError(f"{folder / INDEX} is damaged: it has no weight_map")
        files = sorted({*listed.values()})
        strange = [f for f in files if not re.fullmatch(r"[\w-][\w.-]*\.safetensors", f)]
        if strange:
            rule = "a shard must be a .safetensors file in the same folder"
            raise ValueError(f"{folder / INDEX} names {strange[0]!r}: {rule}")
        missing = [f for f in files if not (folder / f).is_file()]
        if missing:
            lacks = f"{len(missing)} of {len(files)} shards ({', '.join(missing)})"
            raise FileNotFoundError(f"{folder} lacks {lacks}: finish the download")
    else:
        pickled = ", ".join(sorted(p.name for p in folder.iterdir() if p.suffix in PICKLED))
        why = f"only pickled weights ({pickled}), which are never opened: convert them to safetensors"
        raise FileNotFoundError(f"{folder} holds {why if pickled else 'no model.safetensors'}")
    found = {}
    for file in files:
        try:
            with safe_open(folder / file, "pt") as f:
                for name in f.keys():
                    tensor = f.get_slice(name)
                    if name in found:
                        raise ValueError(f"{folder}: {name} is in {found[name].file.name} and in {file}")
                    found[name] = Entry(folder / file, tuple(tensor.get_shape()), tensor.get_dtype())
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{folder / file} is damaged or not a safetensors file: {error}") from None
    if listed is not None:
        astray = sorted(n for n in listed if n not in found or found[n].file.name != listed[n])
        if astray:
            where = ", ".join(f"{n} is not in {listed[n]}" for n in astray)
            raise ValueError(f"{folder / INDEX} does not match the shards: {where}")
    return found


def label_of(folder: Path) -> str:
    """The name of the model in this folder: the repository's, if it lies in the hub's cache."""
    cached = [p for p in folder.absolute().parts if p.startswith("models--")]
    return cached[-1].removeprefix("models--").replace("--", "/") if cached else folder.absolute().name


def plan_for(folder: Path, tokens: tokenizer.Tokenizer | None) -> Plan:
    """The plan of the folder's family. Raises ValueError for an unknown family or unsupported settings."""
    values = read_json(folder / "config.json")
    model_type = str(values.get("model_type"))
    family = next((f for f in FAMILIES if model_type.lower() in f.model_types), None)
    if family is None:
        known = ", ".join(f"{f.name} ({', '.join(f.model_types)})" for f in FAMILIES)
        what = f"model_type {model_type!r}, which is not among the families here"
        raise ValueError(f"{folder}/config.json has {what}: {known}")
    ours = values.pop("rcd", {})
    if not isinstance(ours, dict) or not all(isinstance(v, OURS.get(k, ())) for k, v in ours.items()):
        may = f"its rcd section may hold {', '.join(OURS)} of the right kind"
        raise ValueError(f"{folder}/config.json: {may}, not {ours}")
    generation = folder / "generation_config.json"
    stated = read_json(generation).get("eos_token_id") if generation.is_file() else []
    stated = tuple(i for i in (stated if isinstance(stated, list) else [stated]) if isinstance(i, int))
    settings = Settings(values, f"{folder.name} ({family.name})")
    try:
        plan = family.plan(settings, Source(label_of(folder), stated, tokens, ours.get("block_size")))
        settings.finish()
        rows, ids = plan.config.vocab_size, None if tokens is None else tokens.vocab_size
        if ids is not None and ids > rows:
            raise ValueError(f"the tokenizer has {ids} ids, the embedding table only {rows} rows")
        real = {} if ids in (None, rows) else {"real_vocab": ids}
        kept = {k: v for k, v in ours.items() if k in KEPT}
        config = config_from({**vars(plan.config), **real, **kept})
        template, defaults = ours.get("template", plan.template), ours.get("defaults", plan.defaults)
        Decoding(**defaults)
        if template is not None and template not in TEMPLATES:
            raise ValueError(f"no chat template {template!r}: there are {', '.join(TEMPLATES)}")
    except (TypeError, ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"{folder}/config.json: {error}") from None
    named = {} if tokens is None else {i: n for n, i in tokens.specials.items() if "mask" in n.lower()}
    masks = {i: n for i, n in named.items() if "gmask" not in n.lower()}
    if masks and config.mask_id not in masks:
        but = f"but the tokenizer's mask token is {masks} (set mask_token_id in config.json)"
        raise ValueError(f"{folder}: the mask id is {config.mask_id}, {but}")
    notes = () if ours else plan.notes
    return plan._replace(config=config, template=template, defaults=defaults, notes=notes)


def build(plan: Plan) -> Transformer:
    """The model on the meta device: shapes without memory."""
    with torch.device("meta"):
        model = Transformer(plan.config)
        for i, layer in enumerate(model.layers):
            layer.mlp = (plan.experts(i) if plan.experts else None) or layer.mlp
    return model


def layout(plan: Plan, model: Transformer) -> dict[str, list[str]]:
    """The checkpoint's tensors: name -> our parameters whose rows it stacks, nearly always one."""
    tensors: dict[str, list[str]] = {}
    for name in model.state_dict():
        tensors.setdefault(plan.original(name), []).append(name)
    return tensors


def stacked_shape(model: dict[str, Tensor], names: list[str]) -> tuple[int, ...]:
    """The shape of these parameters of a state_dict, stacked by rows."""
    return sum(model[n].shape[0] for n in names), *model[names[0]].shape[1:]


def match(plan: Plan, found: dict[str, Entry], source: str) -> tuple[Transformer, dict[str, list[str]]]:
    """The meta model and its layout, if the tensors are exactly what it needs. Raises ValueError that lists
    every one that is not.

    A head that is not stored is tied to the embedding. A head that is stored although it is tied is left out
    (see `load`).
    """
    head = plan.original("lm_head.weight")
    plan.config.tied = plan.config.tied or head not in found
    model = build(plan)
    tensors = layout(plan, model)
    ours = model.state_dict()
    shapes = {name: stacked_shape(ours, names) for name, names in tensors.items()}
    unused = {n for n in found if n.endswith("rotary_emb.inv_freq")} | ({head} if plan.config.tied else set())
    known = {n: e for n, e in found.items() if n in shapes}
    wrong = [f"missing {n}" for n in shapes if n not in found]
    wrong += [f"unexpected {n}" for n in found if n not in shapes and n not in unused]
    wrong += [f"{n} is {e.shape}, expected {shapes[n]}" for n, e in known.items() if e.shape != shapes[n]]
    only = f"(only {', '.join(DTYPES)})"
    wrong += [f"{n} is stored as {e.dtype} {only}" for n, e in known.items() if e.dtype not in DTYPES]
    if wrong:
        raise ValueError(f"{source}: the tensors do not fit the config: {'; '.join(wrong)}")
    return model, tensors


def read(found: dict[str, Entry], names: list[str], quiet: bool = False) -> Iterator[tuple[str, Tensor]]:
    """Each tensor as a view of its file, the large ones first: there is still room for a mapped copy."""
    bar = progress(sum(nbytes(found[n]) for n in names), "load", "B", leave=False, quiet=quiet)
    queue = deque(sorted(names, key=lambda n: (nbytes(found[n]) < MAPPED, found[n].file)))
    while queue:
        file, size = found[queue[0]].file, 0
        with safe_open(file, "pt") as f:
            while queue and found[queue[0]].file == file and size < MAPPED:
                name = queue.popleft()
                yield name, f.get_tensor(name)
                size += nbytes(found[name])
                bar.update(nbytes(found[name]))
    bar.close()


def nbytes(entry: Entry) -> int:
    return torch.Size(entry.shape).numel() * DTYPES.get(entry.dtype, torch.float64).itemsize


def load(folder: Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> Loaded:
    """A pretrained folder; dtype None keeps that of its embedding. Errors as in zoo.load."""
    tokens = tokenizer.load(folder)
    plan = plan_for(folder, tokens)
    found = entries(folder)
    model, tensors = match(plan, found, str(folder))
    dtype = dtype or DTYPES[found[plan.original("embed_tokens.weight")].dtype]
    ours, ready = model.state_dict(), {}
    bad = []
    for name, tensor in read(found, list(tensors)):
        if tensor.dim() == 1 and not bool(tensor.isfinite().all()):
            bad.append(name)
        start = 0
        for own in tensors[name]:
            rows = ours[own].shape[0]
            kind = torch.float32 if own.endswith("expert_bias") else dtype  # thousandths decide there
            empty = torch.empty(ours[own].shape, dtype=kind, device=device)
            ready[own] = empty.copy_(tensor[start : start + rows])
            start += rows
        del tensor
    if bad:
        raise ValueError(f"{folder}: not a number in {', '.join(bad)}")
    head = plan.original("lm_head.weight")
    if plan.config.tied and head in found:
        stored, table = next(read(found, [head], quiet=True))[1], ready["embed_tokens.weight"]
        if stored.shape != table.shape or not torch.equal(stored.to(device, dtype), table):
            ties = "config.json ties the head to the embedding"
            raise ValueError(f"{folder}: {ties}, but {head} is stored and different")
    model.load_state_dict(ready, assign=True)
    for note in plan.notes:
        print(f"note: {label_of(folder)}: {note}", file=sys.stderr)
    meta = read_json(folder / "train.json") if (folder / "train.json").is_file() else {}
    return Loaded(model, tokens, folder, plan.template, plan.defaults, meta)


def save(loaded: Loaded, folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
    """Write the layout that the model was loaded from: its own run folder's, or its family's with the
    original tensor names.

    config.json keeps the original keys and gains an "rcd" section with what training may have changed, which
    the original class does not read. Nothing appears under its name before everything is written.
    """
    folder = Path(folder)
    values = read_json(loaded.folder / "config.json")
    folder.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=folder, prefix=".save."))
    try:
        if values.get("model_type") == "rcd":
            save_run(loaded.model, work)
        else:
            write(loaded, values, work, shard_bytes)
        loaded.tokenizer.save(work)
        if loaded.meta:
            (work / "train.json").write_text(json.dumps(loaded.meta, indent=1) + "\n", encoding="utf-8")
        for path in work.iterdir():
            with open(path, "rb+") as file:
                os.fsync(file.fileno())
        stale = {p.name for p in folder.iterdir() if STALE.fullmatch(p.name)}
        # What points to others comes last.
        written = sorted(work.iterdir(), key=lambda p: (p.name == "config.json", p.name == INDEX))
        for path in written:
            os.replace(path, folder / path.name)
        for name in stale - {p.name for p in written}:
            (folder / name).unlink()
    finally:
        shutil.rmtree(work, ignore_errors=True)


def write(loaded: Loaded, values: dict, folder: Path, shard_bytes: int) -> None:
    """The pretrained layout of `save`: shards, index, config.json and what else belongs to it."""
    from huggingface_hub import split_torch_state_dict_into_shards

    plan = plan_for(loaded.folder, loaded.tokenizer)
    ours = loaded.model.state_dict()
    tensors = layout(plan, loaded.model)
    with torch.device("meta"):
        kinds = {n: (stacked_shape(ours, own), ours[own[0]].dtype) for n, own in tensors.items()}
        sizes = {n: torch.empty(shape, dtype=dtype) for n, (shape, dtype) in kinds.items()}
    split = split_torch_state_dict_into_shards(sizes, max_shard_size=shard_bytes)
    for file, names in split.filename_to_tensors.items():
        stacked = {n: [ours[own].detach() for own in tensors[n]] for n in names}
        stacked = {n: torch.cat(rows) if len(rows) > 1 else rows[0] for n, rows in stacked.items()}
        stacked = {n: t.cpu().contiguous() for n, t in stacked.items()}
        save_file(stacked, folder / file, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    for key in {"torch_dtype", "dtype"} & values.keys():
        values[key] = str(loaded.model.head.dtype).removeprefix("torch.")
    kept = {k: getattr(loaded.model.config, k) for k in KEPT}
    values["rcd"] = {**kept, "template": loaded.template, "defaults": loaded.defaults}
    (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    for name in COPIED:
        if (loaded.folder / name).is_file():
            shutil.copyfile(loaded.folder / name, folder / name)
