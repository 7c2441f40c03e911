"""Train an unmasking policy (zoo/rivals/policy) for a model that is there, by GRPO, in minutes on a CPU.

Puzzles are canvases of a data set whose answers can be checked. Every step takes some puzzles, fills each
several times with the policy, rewards what is right in few passes, and moves the policy. The model is not
trained. At the end: accuracy and forward passes on validation puzzles, beside those of thresholds.

Examples:
  python -m zoo.rivals.policy                          for the shipped Sudoku model with its residual
  python -m zoo.rivals.policy --power=10 --out=quick.safetensors
  python sample.py --rule=policy --policy=out/policy.safetensors
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # see train.py

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Generator, Tensor

import data
import zoo
from rcd import Reader, Residual, Transformer, check, denoise
from zoo.decoding import Carry, Decoding, carry_options
from zoo.files import write_atomic
from zoo.progress import progress
from zoo.rivals import carries
from zoo.rivals.policy import Act, Policy, grpo_loss, reward
from zoo.tools import checks, training
from zoo.tools.command import arguments, autocast, pick_device, run
from zoo.tools.evaluate import Setting, evaluate, table


@dataclass
class Options:
    """what the policy is trained for, and how long"""

    model: str = "sudoku/target"  # run folder, name of a run under out/ or of a model in zoo/
    data: str = "sudoku"  # data set with right answers: a name under data/, or a folder that prepare.py wrote
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
        if self.lr > 1:
            raise ValueError(f"lr={self.lr} must be at most 1")
        if Path(self.out).is_dir():
            raise ValueError(f"cannot write {self.out}: it is a folder")


def rollout(model: Transformer, net: Policy, solutions: Tensor, fill: Tensor, s: Decoding, residual: Residual,
            generator: Generator) -> tuple[list[Act], Tensor, Tensor]:  # fmt: skip
    """Fill the cells (B, L) once, by the policy -> what it did, the canvas (B, L), passes (B,)."""
    acts: list[Act] = []

    class Exploring(Decoding):
        def reader(self, model: Transformer, tokens: Tensor, lengths: Tensor, b: int, fill: Tensor) -> Reader:
            read = super().reader(model, tokens, lengths, b, fill)
            read.net, read.acts = net, acts
            return read

    canvas = solutions.masked_fill(fill, model.config.mask_id)
    *_, last = denoise(model, canvas, Exploring(**vars(s)), residual, generator=generator)
    return acts, last.tokens, last.nfe


def main() -> None:
    (o,) = arguments(__doc__, Options)
    device, dtype, reason = pick_device(o.device, o.dtype)
    dataset = data.load(o.data)
    check(dataset.check is not None, f"data set {dataset.name} has no answers that can be checked")
    check(not dataset.packed("train"), f"data set {dataset.name} is packed: prepare it without --pack")
    checks.check_tokens(dataset, o.model, "")
    loaded, out = zoo.load(o.model, device), Path(o.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    carry = "residual" if loaded.meta.get("stage") == "target" else "none"
    s = Decoding(rule="policy", carry=carry)
    residual = Carry(**carry_options(loaded.meta.get("residual", {})))

    torch.manual_seed(o.seed)  # the first weights of the policy
    model, net = loaded.model.requires_grad_(False), Policy()
    optimizer = torch.optim.AdamW(net.parameters(), lr=o.lr, weight_decay=0.0)
    batch = training.batches(dataset, "train", dataset.meta["length"])
    choose, act = Generator().manual_seed(o.seed), Generator(device).manual_seed(o.seed)
    print(f"{reason}\n{loaded.folder}: a policy of {sum(p.numel() for p in net.parameters()):,} parameters")
    with progress(o.steps, "policy", "steps") as bar:
        for _ in range(o.steps):
            solutions, fill, _ = batch(o.puzzles, choose)  # (P, L)
            solutions, fill = (x.repeat_interleave(o.group, dim=0) for x in (solutions, fill))  # (B, L)
            with autocast(device, dtype):
                acts, filled, passes = rollout(model, net, solutions, fill, s, residual, act)
            rows = zip(filled.tolist(), solutions.tolist(), fill.tolist())
            right = torch.tensor([dataset.correct(*row) for row in rows])  # (B,)
            rewards = reward(right, passes, fill.sum(1), o.power)
            loss = grpo_loss(net, acts, rewards, o.group)
            if loss.requires_grad:  # else no group has a better and a worse rollout
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
            means = {"reward": rewards, "right": right.float(), "passes": passes.float()}
            bar.update()
            bar.set_postfix({name: f"{x.mean():.3f}" for name, x in means.items()})
    tensors = {name: p.detach().contiguous() for name, p in net.state_dict().items()}
    facts = {"model": o.model, "power": str(o.power)}
    write_atomic(out, lambda path: save_file(tensors, path, metadata=facts))
    if o.items:
        samplers = [replace(s, policy=str(out), policy_speed=speed) for speed in (0.5, 1.0, 2.0)]
        samplers += [replace(s, rule="threshold", threshold=c) for c in (0.5, 0.7, 0.8, 0.9, 0.95)]
        name = carries.label(model) if carry == "residual" else "SeqD"
        settings = [Setting(name, model, None, sampler, residual) for sampler in samplers]
        print(table(evaluate(settings, dataset, "val", o.items, o.items, dtype, o.seed)))
    print(f"{out}; try: python sample.py --model={o.model} --rule=policy --policy={out}")


if __name__ == "__main__":
    run(main)
