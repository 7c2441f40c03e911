"""A run folder's files: safetensors and JSON, never half-written, nothing unpickled.

torch is imported when a model is read or written, not before: the scripts of data/ only need write_atomic.
"""

import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from rcd import Transformer


def write_atomic(path: Path, write: Callable[[Path], None]) -> None:
    """write(temporary path beside it), fsync, rename: whoever reads path finds the old file or the new one, never a part of one."""
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


def save(model: "Transformer", folder: Path) -> None:
    """folder/model.safetensors and folder/config.json, which load() reads."""
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: p.detach().contiguous() for name, p in model.state_dict().items()}
    write_atomic(folder / "model.safetensors", lambda path: save_file(tensors, path, metadata={"format": "pt"}))
    text = json.dumps({"model_type": "rcd", **asdict(model.config)}, indent=1)
    write_atomic(folder / "config.json", lambda path: path.write_text(text + "\n"))


def load(folder: Path, device: "str | torch.device" = "cpu", dtype: "torch.dtype | None" = None) -> "Transformer":
    """The model of a run folder. Raises FileNotFoundError or ValueError in one line that names what is missing or does not fit."""
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from rcd import Config, Transformer

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
        raise ValueError(f"{folder}/config.json is not of this project's own format; load pretrained folders with zoo.load()")
    try:
        config = Config.from_dict(values)
    except ValueError as error:
        raise ValueError(f"{folder}/config.json: {error}") from None
    with torch.device("meta"):
        model = Transformer(config)
    assign_tensors(model, tensors, dtype, str(folder))
    return model


def assign_tensors(model: "Transformer", tensors: "dict[str, torch.Tensor]", dtype: "torch.dtype | None", source: str) -> None:
    """Put tensors into a meta-device model; every missing, unexpected or misshapen one is listed by name, and nothing is half-loaded."""
    expected = {name: p.shape for name, p in model.state_dict().items()}
    wrong = [f"missing {name}" for name in expected if name not in tensors]
    wrong += [f"unexpected {name}" for name in tensors if name not in expected]
    wrong += [f"{n} is {tuple(t.shape)}, expected {tuple(expected[n])}" for n, t in tensors.items() if n in expected and t.shape != expected[n]]
    if wrong:
        raise ValueError(f"{source}: the tensors do not fit the config: {'; '.join(wrong)}")
    model.load_state_dict({n: t if dtype is None else t.to(dtype) for n, t in tensors.items()}, assign=True)
