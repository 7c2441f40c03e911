"""Train an unmasking policy (zoo/rivals/policy.py) for a model that is there, by GRPO, in minutes on a CPU.

Puzzles are rows of a prepared data set of examples with one right answer each. Every step takes some puzzles,
fills each several times with the policy, rewards what is right in few passes, and moves the policy. The model
is not trained. At the end: accuracy and forward passes on validation puzzles, beside those of thresholds.

Examples:
  python -m zoo.tools.policy                          for the shipped Sudoku model with its residual
  python -m zoo.tools.policy --power=10 --out=quick.safetensors
  python sample.py --rule=policy --policy=out/policy.safetensors
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # see train.py

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Generator, Tensor

import zoo
from rcd import Reader, Residual, Transformer, denoise
from zoo.decoding import Carry, Decoding, carry_options
from zoo.files import write_atomic
from zoo.progress import progress
from zoo.rivals.policy import Act, Policy, grpo_loss, reward
from zoo.tools.command import arguments, autocast, pick_device, run


@dataclass
class Options:
    """what the policy is trained for, and how long"""

    model: str = "sudoku/target"  # run folder, name of a run under out/ or of a model in zoo/
    data: str = "data/sudoku"  # folder of a prepared data set (data/NAME/prepare.py writes it)
    out: str = "out/policy.safetensors"  # where the policy goes
    power: float = 1.0  # a of the reward r (1 - passes / T)^a: 0 = only right answers count, 10 = few passes
    steps: int = 200  # updates
    puzzles: int = 16  # of a step
    group: int = 8  # rollouts of each puzzle
    lr: float = 3e-4  # AdamW's learning rate, constant
    items: int = 200  # validation puzzles of the table; 0 = none
    seed: int = 1337  # of puzzles, actions and first weights
    device: str = ""  # of the model: cuda | mps | cpu; default: the best one found
    dtype: str = ""  # bfloat16 | float16 | float32, of the model's matmuls

    def __post_init__(self):
        least_of = {"steps": 1, "puzzles": 1, "group": 2, "items": 0, "power": 0, "lr": 0}
        for name, least in least_of.items():
            if not getattr(self, name) >= least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}")


class Puzzles:
    """Rows of a split: solutions (N, L), and which cells are to be filled (N, L)."""

    def __init__(self, folder: str, split: str):
        """Raises FileNotFoundError if the data set is not prepared."""
        files = [Path(folder) / f"{split}{part}.npy" for part in ("", "_response")]
        missing = [str(file) for file in files if not file.is_file()]
        if missing:
            prepare = f"python {Path(folder) / 'prepare.py'}"
            raise FileNotFoundError(f"there is no {', '.join(missing)}: run `{prepare}`, or choose --data")
        self.tokens, self.response = (np.load(file, mmap_mode="r", allow_pickle=False) for file in files)

    def rows(self, at) -> tuple[Tensor, Tensor]:
        return torch.from_numpy(self.tokens[at].astype("int64")), torch.from_numpy(self.response[at].copy())


def rollout(model: Transformer, net: Policy, solutions: Tensor, fill: Tensor, s: Decoding, residual: Residual,
            generator: Generator) -> tuple[list[Act], Tensor, Tensor]:  # fmt: skip
    """Fill the cells (B, L) once, by the policy -> what it did, which rows are right (B,), passes (B,)."""
    acts: list[Act] = []

    class Exploring(Decoding):
        def reader(self, model: Transformer, tokens: Tensor, lengths: Tensor, b: int, fill: Tensor) -> Reader:
            read = super().reader(model, tokens, lengths, b, fill)
            read.net, read.acts = net, acts
            return read

    canvas = solutions.masked_fill(fill, model.config.mask_id)
    *_, last = denoise(model, canvas, Exploring(**vars(s)), residual, generator=generator)
    return acts, ((last.tokens == solutions) | ~fill).all(1), last.nfe


def measure(model: Transformer, net: Policy, puzzles: Puzzles, items: int, s: Decoding, residual: Residual,
            seed: int) -> list[tuple[str, float, float]]:  # fmt: skip
    """(rule, accuracy, passes) of the policy at several speeds, and of thresholds, on the first puzzles."""
    solutions, fill = puzzles.rows(slice(0, items))
    canvas, rows = solutions.masked_fill(fill, model.config.mask_id), []
    for speed in (0.5, 1.0, 2.0):
        generator = Generator(model.embedding.device).manual_seed(seed)
        _, right, passes = rollout(model, net, solutions, fill, replace(s, policy_speed=speed), residual,
                                   generator)  # fmt: skip
        rows.append((f"policy, speed {speed:g}", right.float().mean().item(), passes.float().mean().item()))
    for threshold in (0.5, 0.7, 0.8, 0.9, 0.95):
        plain = replace(s, rule="threshold", threshold=threshold)
        *_, last = denoise(model, canvas, plain, residual)
        right = ((last.tokens == solutions) | ~fill).all(1)
        rows.append((f"threshold {threshold:g}", right.float().mean().item(), last.nfe.float().mean().item()))
    return rows


def main() -> None:
    (o,) = arguments(__doc__, Options)
    device, dtype, reason = pick_device(o.device, o.dtype)
    loaded, puzzles, out = zoo.load(o.model, device), Puzzles(o.data, "train"), Path(o.out)
    validation = Puzzles(o.data, "val") if o.items else None
    out.parent.mkdir(parents=True, exist_ok=True)
    carry = "residual" if loaded.meta.get("stage") == "target" else "none"
    s = Decoding(rule="policy", carry=carry)
    residual = Carry(**carry_options(loaded.meta.get("residual", {})))

    torch.manual_seed(o.seed)  # the first weights of the policy
    model, net = loaded.model.requires_grad_(False), Policy()
    optimizer = torch.optim.AdamW(net.parameters(), lr=o.lr, weight_decay=0.0)
    choose, act = Generator().manual_seed(o.seed), Generator(device).manual_seed(o.seed)
    print(f"{reason}\n{loaded.folder}: a policy of {sum(p.numel() for p in net.parameters()):,} parameters")
    with progress(o.steps, "policy", "steps") as bar:
        for _ in range(o.steps):
            at = torch.randint(len(puzzles.tokens), (o.puzzles,), generator=choose).numpy()
            solutions, fill = (x.repeat_interleave(o.group, dim=0) for x in puzzles.rows(at))
            with autocast(device, dtype):
                acts, right, passes = rollout(model, net, solutions, fill, s, residual, act)
            rewards = reward(right, passes, fill.sum(1), o.power)
            optimizer.zero_grad(set_to_none=True)
            grpo_loss(net, acts, rewards, o.group).backward()
            optimizer.step()
            means = {"reward": rewards, "right": right.float(), "passes": passes.float()}
            bar.update()
            bar.set_postfix({name: f"{x.mean():.3f}" for name, x in means.items()})
    tensors = {name: p.detach().contiguous() for name, p in net.state_dict().items()}
    facts = {"model": o.model, "power": str(o.power)}
    write_atomic(out, lambda path: save_file(tensors, path, metadata=facts))
    if validation:
        with autocast(device, dtype):
            rows = measure(model, net, validation, o.items, s, residual, o.seed)
        print("\n| rule | accuracy | NFE |\n|---|--:|--:|")
        for rule, accuracy, nfe in rows:
            print(f"| {rule} | {accuracy:.1%} | {nfe:.2f} |")
    print(f"{out}; try: python sample.py --model={o.model} --rule=policy --policy={out}")


if __name__ == "__main__":
    run(main)
