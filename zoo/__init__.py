"""The model zoo: trained models by name, in this project's own code.

`zoo.load(name)` finds a model, rebuilds it as rcd.Transformer and gives it together with its tokenizer, its chat template and the sampler
settings that its family recommends. A name is, in this order: a folder; a run under out/ ("sudoku/target"); a model that is shipped under
zoo/; an id on the Hugging Face hub ("JetLM/SDAR-4B-Chat", or "JetLM/SDAR-4B-Chat@revision"), which is downloaded once into its cache.
Nothing is unpickled and no code from a checkpoint is ever run. torch is imported when a model is loaded, not before.
"""

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch

    from rcd import Transformer
    from zoo.tokenizer import Tokenizer

SHIPPED = Path(__file__).parent


class Loaded(NamedTuple):
    """A model and what is needed to use it."""

    model: "Transformer"
    tokenizer: "Tokenizer"
    folder: Path  # where it was read from
    template: str | None  # chat template: a name in zoo/templates.py; None = plain text
    defaults: dict  # Sampler fields that its family, or its training run, recommends
    meta: dict  # train.json of our own runs, else empty


def names() -> dict[str, Path]:
    """Models on this machine: those under out/ of the working directory, then the shipped ones; name -> folder."""
    found = {}
    for root in (Path("out"), SHIPPED):
        for config in sorted(root.glob("**/config.json")):
            found.setdefault(config.parent.relative_to(root).as_posix(), config.parent)
    return found


def find(name: str | Path, revision: str | None = None) -> Path:
    """The folder of a model; one that is only on the hub is downloaded. Raises FileNotFoundError that lists what there is."""
    if Path(name).is_dir():
        return Path(name)
    for root in (Path("out"), SHIPPED):
        if (root / name / "config.json").is_file():
            return root / name
    there = f"on this machine there are: {', '.join(names()) or 'none yet'}"
    if not re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", str(name)):
        raise FileNotFoundError(f"no model {str(name)!r}: give a folder, a run, or a hub id (owner/name); {there}")
    from zoo.hub import download

    try:
        return download(str(name), revision)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}; {there}") from None


def load(name: str | Path, device: "str | torch.device" = "cpu", dtype: "torch.dtype | None" = None) -> Loaded:
    """The model `name` on `device`; dtype None keeps the one it is stored in.

    Raises FileNotFoundError (no such model, a file is missing) or ValueError (damaged, unknown family, settings that we would compute
    wrongly), each in one line.
    """
    from zoo.files import load as load_run
    from zoo import tokenizer

    folder = find(name)
    values = read_json(folder / "config.json")
    if values.get("model_type") != "rcd":
        from zoo import checkpoint

        return checkpoint.load(folder, device, dtype)
    meta = read_json(folder / "train.json") if (folder / "train.json").is_file() else {}
    return Loaded(load_run(folder, device, dtype), tokenizer.load(folder), folder, meta.get("template"), meta.get("sampler", {}), meta)


def save(loaded: Loaded, folder: str | Path) -> None:
    """Write a model in the layout it was loaded from: a run folder, or its family's tensor names and config.json plus an "rcd" section.

    What is saved can be loaded here again, and its tensors load in the family's original class. Nothing is ever half-written.
    """
    from zoo import checkpoint

    checkpoint.save(loaded, Path(folder))


def push_to_hub(folder: str | Path, repo_id: str, *, private: bool = True, message: str = "Upload model") -> str:
    """Upload a model folder to the hub as one commit; returns its address. Raises ValueError or OSError in one line."""
    from zoo import hub

    return hub.push_to_hub(folder, repo_id, private=private, message=message)


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
