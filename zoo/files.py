"""The files of a run folder: safetensors and JSON, never half-written, nothing unpickled.

torch is imported when a model is read or written, not before: the scripts of data/ only need write_atomic.
"""

import json
import os
import platform
import sys
import tempfile
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch

    from rcd import Config, Transformer


class Loaded(NamedTuple):
    """A model and what is needed to use it."""

    model: "Transformer"
    tokenizer: Any  # a zoo.tokenizer.Tokenizer
    folder: Path  # where it was read from
    template: str | None  # chat template: a name in zoo/templates.py; None = plain text
    defaults: dict  # Decoding fields that its family, or its training run, recommends
    meta: dict  # train.json of our own runs, else empty


def write_atomic(path: Path, write: Callable[[Path], None]) -> None:
    """write(temporary path), fsync, rename: a reader finds the old file or the new one, never a part."""
    path = Path(path)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name + ".")
    os.close(handle)
    try:
        write(Path(name))
        with open(name, "rb+") as f:
            os.fsync(f.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


@contextmanager
def locked(folder: Path, command: str, remedy: str):
    """The folder, made if need be, for this process alone: folder/.lock is locked, and says whose it is.

    The system frees the lock of a process that has died. Raises ValueError if another one holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "a+") as file:
        try:
            import fcntl  # not on Windows

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            free = os.path.samestat(os.fstat(file.fileno()), os.stat(folder / ".lock"))
        except ImportError:
            free = True
        except (BlockingIOError, FileNotFoundError):  # held, or just taken away by who held it
            free = False
        except OSError as error:
            free = True
            warning = f"{folder} cannot be locked ({error.strerror}): let no second run write there"
            print(f"WARNING: {warning}", file=sys.stderr)
        if not free:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise ValueError(f"{folder} is in use by {holder}; wait for it, or {remedy}")
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}: {command}\n")
        file.flush()
        yield


def check_writable(path: str) -> None:
    """Raises ValueError if no file can be written there: its folder is missing, or it is a folder itself."""
    if Path(path).is_dir() or not Path(path).parent.is_dir():
        wrong = "it is a folder" if Path(path).is_dir() else f"there is no folder {Path(path).parent}"
        raise ValueError(f"cannot write {path}: {wrong}")


def read_json(path: Path) -> dict:
    """A JSON object from a file. Raises FileNotFoundError or ValueError in one line."""
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} is not a model folder: it has no {path.name}")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} is damaged: it holds no JSON object")
    return value


def config_from(values: dict) -> "Config":
    """A Config from JSON, with every field checked. Raises ValueError that names the field which is wrong."""
    from rcd import Config, check

    names = {f.name for f in fields(Config)}
    for what, wrong in (("unknown", set(values) - names), ("missing", names - set(values))):
        check(not wrong, f"{what} Config fields: {', '.join(sorted(wrong))}")
    for f in fields(Config):
        kind = {float: (int, float), tuple[int, ...]: (list, tuple)}.get(f.type, f.type)
        check(isinstance(values[f.name], kind), f"{f.name}={values[f.name]!r} is of the wrong kind")
    rows, real, mask, pad = (values[n] for n in ("vocab_size", "real_vocab", "mask_id", "pad_id"))
    width, rotary = values["head_dim"], values["rotary_dim"]
    for holds, says in (
        (0 <= real <= rows, f"real_vocab={real} must not exceed vocab_size={rows}"),
        (not values["eos_ids"] or pad != mask,
         f"pad_id={pad} is the mask token: what follows an end would stay masked"),
        (values["block_size"] >= 0, f"block_size={values['block_size']} must not be negative"),
        (rotary <= width and (rotary or width) % 2 == 0,
         f"rotary_dim={rotary} (0: head_dim={width}) must be even and fit into the head: RoPE rotates pairs"),
    ):  # fmt: skip
        check(holds, says)
    return Config(**values)


def save(model: "Transformer", folder: Path) -> None:
    """folder/model.safetensors and folder/config.json, which load() reads."""
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: p.detach().contiguous() for name, p in model.state_dict().items()}
    meta = {"format": "pt"}
    write_atomic(folder / "model.safetensors", lambda path: save_file(tensors, path, metadata=meta))
    text = json.dumps({"model_type": "rcd", **asdict(model.config)}, indent=1)
    write_atomic(folder / "config.json", lambda path: path.write_text(text + "\n"))


def load(folder: Path, device: "str | torch.device" = "cpu",
         dtype: "torch.dtype | None" = None) -> "Transformer":  # fmt: skip
    """The model of a run folder. Raises FileNotFoundError or ValueError that names what is wrong."""
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from rcd import Transformer
    from zoo.rivals import carries

    folder = Path(folder)
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} is not a run folder: it has no {name}")
    try:
        values = json.loads((folder / "config.json").read_text())
        tensors = load_file(folder / "model.safetensors", device=str(device))
    except (json.JSONDecodeError, SafetensorError, UnicodeDecodeError) as error:
        raise ValueError(f"{folder} holds a damaged file: {error}") from None
    if not isinstance(values, dict) or values.pop("model_type", "") != "rcd":
        what = "is not of this project's own format; load pretrained folders with zoo.load()"
        raise ValueError(f"{folder}/config.json {what}")
    try:
        config = config_from(values)
    except ValueError as error:
        raise ValueError(f"{folder}/config.json: {error}") from None
    with torch.device("meta"):
        model = Transformer(config)
        for name in carries.named_by(tensors):
            carries.shaped(model, name)
    assign_tensors(model, tensors, dtype, str(folder))
    return model


def assign_tensors(model: "Transformer", tensors: "dict[str, torch.Tensor]", dtype: "torch.dtype | None",
                   source: str) -> None:  # fmt: skip
    """Put tensors into a model on the meta device. Raises ValueError that lists all that do not fit."""
    expected = {name: p.shape for name, p in model.state_dict().items()}
    wrong = [f"missing {n}" for n in expected if n not in tensors]
    wrong += [f"unexpected {n}" for n in tensors if n not in expected]
    wrong += [
        f"{n} is {tuple(t.shape)}, expected {tuple(expected[n])}"
        for n, t in tensors.items()
        if n in expected and t.shape != expected[n]
    ]
    if wrong:
        raise ValueError(f"{source}: the tensors do not fit the config: {'; '.join(wrong)}")
    model.load_state_dict({n: t if dtype is None else t.to(dtype) for n, t in tensors.items()}, assign=True)
