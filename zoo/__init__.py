"""The model zoo: trained models by name, in this project's own code.

`zoo.load(name)` finds a model and rebuilds it as rcd.Transformer, with its tokenizer, its chat template and
the sampler settings that its family recommends. A name is, in this order: a folder; a run under out/
("sudoku/target"); a model that is shipped under zoo/; an id on the Hugging Face hub ("JetLM/SDAR-4B-Chat",
"JetLM/SDAR-4B-Chat@revision"), which is downloaded once into the hub's cache. Nothing is unpickled, and no
code from a checkpoint is run. torch is imported when a model is loaded, not before.
"""

import re
from pathlib import Path
from typing import TYPE_CHECKING

from zoo.files import Loaded, read_json

if TYPE_CHECKING:
    import torch

SHIPPED = Path(__file__).parent


def names() -> dict[str, Path]:
    """Models on this machine, name -> folder: those under out/ here, then the shipped ones."""
    found = {}
    for root in (Path("out"), SHIPPED):
        for config in sorted(root.glob("**/config.json")):
            found.setdefault(config.parent.relative_to(root).as_posix(), config.parent)
    return found


def find(name: str | Path, weights: bool = True) -> Path:
    """The folder of a model; one that is only on the hub is downloaded, if need be without its weights.
    FileNotFoundError: there is none."""
    if Path(name).is_dir():
        return Path(name)
    for root in (Path("out"), SHIPPED):
        if (root / name / "config.json").is_file():
            return root / name
    there = f"on this machine there are: {', '.join(names()) or 'none yet'}"
    if not re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", str(name)):
        known = "give a folder, a run, or a hub id (owner/name)"
        raise FileNotFoundError(f"no model {str(name)!r}: {known}; {there}")
    from zoo.hub import FACTS, WANTED, download

    try:
        return download(str(name), wanted=WANTED if weights else FACTS)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}; {there}") from None


def load(name: str | Path, device: "str | torch.device" = "cpu",
         dtype: "torch.dtype | None" = None) -> Loaded:  # fmt: skip
    """The model `name` on `device`; dtype None keeps the one it is stored in.

    Raises FileNotFoundError (no such model, a file is missing) or ValueError (damaged, unknown family,
    settings that we would compute wrongly), each in one line.
    """
    from zoo import tokenizer
    from zoo.files import load as load_run

    folder = find(name)
    values = read_json(folder / "config.json")
    if values.get("model_type") != "rcd":
        from zoo import checkpoint

        return checkpoint.load(folder, device, dtype)
    meta = read_json(folder / "train.json") if (folder / "train.json").is_file() else {}
    model, tokens = load_run(folder, device, dtype), tokenizer.load(folder)
    return Loaded(model, tokens, folder, meta.get("template"), meta.get("sampler", {}), meta)


def save(loaded: Loaded, folder: str | Path) -> None:
    """Write a model in the layout that it was loaded from: a run folder, or its family's files.

    What is saved can be loaded here again, and its tensors load in the family's original class: config.json
    gains a section "rcd". Nothing is ever half-written.
    """
    from zoo import checkpoint

    checkpoint.save(loaded, Path(folder))


def push_to_hub(folder: str | Path, repo_id: str, *, private: bool = True,
                message: str = "Upload model") -> str:  # fmt: skip
    """Upload a model folder to the hub as one commit; returns its address. Raises ValueError or OSError."""
    from zoo import hub

    return hub.push_to_hub(folder, repo_id, private=private, message=message)
