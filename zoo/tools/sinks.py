"""Where log.jsonl is also shown: TensorBoard, or Weights & Biases.

The log stays the one record. A sink is opened when a stage begins or goes on. It is given the entries that
the log holds by then, and each new one as it is written. So it holds what the log holds, and nothing twice.
"""

import secrets
import shutil
from collections.abc import Callable
from pathlib import Path

from zoo.files import write_atomic

Sink = Callable[[dict], None]  # takes one entry of the log


def tensorboard(folder: Path, options: dict, resumed: bool) -> Sink:
    """Event files in folder/tensorboard, written anew: `tensorboard --logdir=out`."""
    from torch.utils.tensorboard import SummaryWriter

    shutil.rmtree(folder / "tensorboard", ignore_errors=True)
    writer = SummaryWriter(folder / "tensorboard")
    writer.add_text("options", "\n".join(f"- {name}: {value}" for name, value in options.items()))

    def sink(entry: dict) -> None:
        for name in entry.keys() - {"step"}:
            writer.add_scalar(name, entry[name], entry["step"])
        writer.flush()

    return sink


def wandb(folder: Path, options: dict, resumed: bool) -> Sink:
    """A run of the project "rcd", whose id is kept in folder/wandb.txt.

    A resumed stage goes on in the same run, from the first step that this one lacks. With WANDB_MODE=offline
    no run can be read: each start writes one of its own, from step 1. Raises ValueError where wandb refuses,
    such as without a login.
    """
    import wandb

    file = folder / "wandb.txt"
    if not (resumed and file.is_file()):
        write_atomic(file, lambda path: path.write_text(secrets.token_hex(8)))
    try:
        run = wandb.init(project="rcd", name=f"{folder.parent.name}/{folder.name}", id=file.read_text(),
                         dir=folder, config=options, resume="allow", reinit="finish_previous")  # fmt: skip
    except wandb.Error as error:
        remedy = "type `wandb login` first, or set WANDB_MODE=offline"
        raise ValueError(f"--log=wandb: {str(error).rstrip('.')}; {remedy}") from None
    first = run.step  # the first step that it does not have yet

    def sink(entry: dict) -> None:
        if entry["step"] >= first:
            values = {name: value for name, value in entry.items() if name != "step"}
            run.log(values, step=entry["step"], commit=True)

    return sink


SINKS = {"tensorboard": tensorboard, "wandb": wandb}  # by the names of their packages
