"""Train a masked model on exact-match rewards: python -m zoo.rivals.coupled_grpo. Its method: __init__.py.

Each step completes some training canvases several times, with the sampler that is to become better: a budget
of --passes steps, temperature 1. The reward of a completion is 1 if all of it is right, else 0. A model that
was trained with a residual completes with it. The trained model is an ordinary run under out/, in the layout
of its origin. Ctrl-C ends the training early and saves.

Examples:
  python -m zoo.rivals.coupled_grpo                                       the shipped RCD model, on Sudoku
  python -m zoo.rivals.coupled_grpo --model=sudoku/reference --name=grpo-seqd     SeqD, the control
  python sample.py --model=grpo/target --eval=sudoku --limit=500          accuracy against forward passes
"""

import copy
import math
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

import data
import zoo
from rcd import check, denoise
from zoo.decoding import Carry, Decoding, carry_options
from zoo.progress import progress
from zoo.rivals.carries import residual_context
from zoo.rivals.coupled_grpo import advantages, draws, grpo_loss, log_probability
from zoo.tools import checks, training
from zoo.tools.command import arguments, autocast, pick_device, run


@dataclass
class Train:
    """what is trained, and how long"""

    model: str = "sudoku/target"  # start: run folder, zoo name or hub id
    data: str = ""  # data set with right answers; default: the model's own
    name: str = "grpo"  # the result is out/<name>/<stage of the model>
    steps: int = 100  # batches of completions
    canvases: int = 16  # canvases of a batch
    group: int = 10  # completions of each canvas
    passes: int = 6  # steps of the sampler
    inner: int = 2  # optimiser steps on each batch
    context: bool = False  # estimate log p with the model's own residual, at twice the forwards; default:
    # plain masks, as every canvas begins
    lr: float = 3e-5  # constant learning rate
    weight_decay: float = 0.1  # AdamW
    clip: float = 0.2  # largest norm of the gradient; 0 = no clipping
    epsilon: float = 0.5  # the ratio is clipped to 1 - epsilon .. 1 + epsilon
    beta: float = 0.01  # weight of the KL
    sync: int = 64  # steps after which the reference of the KL becomes the model of that moment
    seed: int = 1337  # of canvases, completions and masks
    device: str = ""  # cuda | mps | cpu; default: the best one found
    dtype: str = ""  # bfloat16 | float32, of matmuls; default: bfloat16 where the processor has it
    overwrite: bool = False  # write over an existing run


def main() -> None:
    (o,) = arguments(__doc__, Train)
    for name in ("steps", "canvases", "passes", "inner", "sync"):
        check(getattr(o, name) > 0, f"{name}={getattr(o, name)} must be at least 1")
    checks.check_numbers(o)
    check(o.lr <= 1, f"lr={o.lr} must be at most 1")
    check(o.group > 1, f"group={o.group} must be at least 2: a completion is compared with the others")
    device, dtype, reason = pick_device(o.device, o.dtype)
    loaded = zoo.load(o.model, device, torch.float32)
    model, stage = loaded.model, loaded.meta.get("stage", "target")
    named = o.data or data.trained_on(loaded.meta)
    check(bool(named), "--data=NAME: this model does not say what it was trained on")
    dataset, folder = data.load(named), Path("out") / o.name / stage
    check(dataset.check is not None, f"data set {dataset.name} has no right answers, so there is no reward")
    check(not dataset.packed("train"), f"data set {dataset.name} is packed: prepare it without --pack")
    check(o.overwrite or not folder.exists(), f"{folder} is already there: --overwrite, or --name=NAME")
    checks.check_tokens(dataset, o.model, "")
    checks.quick_attention(device, dataset.meta["length"])
    print(reason)

    carry = loaded.defaults.get("carry", "residual" if stage == "target" else "none")
    residual = Carry(**carry_options(loaded.meta.get("residual", {})))
    context = residual_context(model, residual) if o.context and carry == "residual" else None
    sampler = Decoding(steps=o.passes, carry=carry, temperature=1.0)
    batch, reference = training.batches(dataset, "train", dataset.meta["length"]), copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), o.lr, (0.9, 0.99), weight_decay=o.weight_decay)
    done, rewarded = 0, []

    with training.Stop() as stop, progress(o.steps, "coupled-GRPO", "steps") as bar:
        while done < o.steps and not stop.asked():
            host, noise = training.generators(o.seed, done, device=device)
            solutions, response, _ = batch(o.canvases, host)  # (P, T)
            solutions, response = (x.repeat_interleave(o.group, 0) for x in (solutions, response))  # (B, T)
            canvas = solutions.masked_fill(response, model.config.mask_id)
            with autocast(device, dtype):
                *_, last = denoise(model, canvas, sampler, residual, generator=noise)
            rows = zip(last.tokens.tolist(), solutions.tolist(), response.tolist())
            rewards = torch.tensor([float(dataset.correct(*row)) for row in rows]).view(-1, o.group)
            advantage = advantages(rewards).flatten().to(device)  # (B,)
            tokens, response = last.tokens.to(device), response.to(device)
            d = draws(tokens, noise)
            with torch.no_grad(), autocast(device, dtype):
                old, ref = (log_probability(m, tokens, response, d, context) for m in (model, reference))
            for _ in range(o.inner):
                with autocast(device, dtype):
                    new = log_probability(model, tokens, response, d, context)
                grpo_loss(new, old, ref, advantage, response, o.epsilon, o.beta).backward()
                norm = torch.nn.utils.clip_grad_norm_(model.parameters(), o.clip or math.inf)
                # On a GPU the host waits here, as it did at every step of the sampler.
                check(math.isfinite(norm), f"the gradient became {norm} at step {done}: lower lr={o.lr}")
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            done += 1
            if done % o.sync == 0:
                reference.load_state_dict(model.state_dict())
            rewarded.append(float(rewards.mean()))
            bar.update()
            bar.set_postfix(reward=f"{sum(rewarded[-10:]) / len(rewarded[-10:]):.1%}")

    first, final = (sum(part) / len(part) for part in (rewarded[:10], rewarded[-10:]))
    command = shlex.join(["python", "-m", "zoo.rivals.coupled_grpo", *sys.argv[1:]])
    meta = loaded.meta | {"stage": stage, "data": dataset.name, "command": command, "grpo": vars(o)}
    meta |= {"step": done, "tokens": None, "val_loss": None}
    zoo.save(loaded._replace(model=model, meta=meta), folder)
    print(f"{done} steps; mean reward of the first ten {first:.1%}, of the last ten {final:.1%} -> {folder}")


if __name__ == "__main__":
    run(main)
