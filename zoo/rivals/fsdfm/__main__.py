"""Train FS-DFM, and write with it: python -m zoo.rivals.fsdfm train|sample. Each has its --help.

train makes out/NAME/dfm and then, from it, the few-step student out/NAME/few: safetensors and JSON. Ctrl-C
saves. --resume goes on to the same weights, bit by bit: a step draws its batch, times and jumps from
generators seeded by (seed, stage, step), and nothing else is random.

sample shows texts. With --judge=RUN, an autoregressive model of the same tokens (`python train.py
--block_size=1 --stage=base`), it shows a table instead: the judge's perplexity, exp of the mean nats per
token of a text, and the entropy in bits of the tokens within a text, each a mean over texts. A low perplexity
is worth something only at the entropy of real text, which is the first row: of the validation split.

Examples:
  python -m zoo.rivals.fsdfm train                                      characters of Tiny Shakespeare
  python -m zoo.rivals.fsdfm train --data=gsm8k --name=fsdfm-gsm8k      subwords, as its prepare.py was told
  python -m zoo.rivals.fsdfm sample --steps=1,8 --prompt="ROMEO:"
  python -m zoo.rivals.fsdfm sample --model=fsdfm/dfm --steps=1024      the model of stage dfm
  python -m zoo.rivals.fsdfm sample --steps=8,1024 --count=64 --judge=judge/base
"""

import json
import math
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.func import functional_call

import data
import zoo
from rcd import Transformer, check, diffusion_loss, sample_t
from zoo import tokenizer
from zoo.files import read_json, write_atomic
from zoo.progress import progress
from zoo.rivals.fsdfm import RATES, TEACHERS, few_step_loss, path, path_loss, sample
from zoo.rivals.fsdfm.dit import DiT, DiTConfig, init_weights, load, save, student_of
from zoo.tools import checks, training
from zoo.tools.command import arguments, autocast, pick_device, run

STAGES = ("dfm", "few")
IGNORED = {"dfm": {"few_steps", "few_lr", "teacher", "rate", "ema"}, "few": {"steps", "lr"}}


@dataclass
class Train:
    """what is trained, and how long"""

    data: str = "shakespeare_char"  # data set: a folder under data/, or one that its prepare.py wrote (--out)
    name: str = "fsdfm"  # the run is out/<name>/
    stage: str = "all"  # dfm | few | all
    teacher: str = "rk4"  # shortcut teacher of stage few: rk4 | rk2
    rate: str = "cumulative"  # scalar of the teacher's jumps: cumulative | instantaneous | one
    steps: int = 4000  # optimiser steps of stage dfm
    few_steps: int = 2000  # optimiser steps of stage few
    batch_size: int = 64  # canvases per optimiser step
    lr: float = 1e-3  # peak learning rate of stage dfm
    few_lr: float = 1e-3  # peak learning rate of stage few
    schedule: str = "cosine"  # cosine (to a tenth) | constant, both after the warm-up
    warmup: float = 0.05  # share of the steps in which the rate rises linearly
    weight_decay: float = 0.03  # of matrices
    beta2: float = 0.95  # AdamW
    clip: float = 1.0  # largest norm of the gradient; 0 = no clipping
    ema: float = 0.999  # decay of the moving average that teaches stage few (the paper, far longer: 0.9995)
    save_every: int = 500  # steps between saves
    seed: int = 1337  # same seed, same machine: same weights to the bit
    device: str = ""  # cuda | mps | cpu; default: the best one found
    dtype: str = ""  # bfloat16 | float32, of matmuls; default: bfloat16 where the processor has it
    resume: bool = False  # go on where an interrupted run stopped
    overwrite: bool = False  # train again over an existing run


@dataclass
class Shape:
    """the network of stage dfm; the student's is the same"""

    source: str = "uniform"  # x_0: uniform | mask
    n_layer: int = 4  # layers
    n_head: int = 4  # attention heads
    d_model: int = 128  # width
    d_cond: int = 32  # width of the vector that carries t and h
    length: int = 64  # canvas length in tokens for a stream of text; data sets of examples bring their own


@dataclass
class Sample:
    """what is written"""

    model: str = "fsdfm/few"  # a stage of a run, or its folder
    steps: str = "8"  # forward passes; several with commas between them
    count: int = 4  # texts
    prompt: str = ""  # the texts begin with it
    rate: str = "cumulative"  # scalar of the jumps: cumulative | instantaneous | one
    temperature: float = 1.0  # of every draw: texts of two models compare at equal entropy
    judge: str = ""  # an autoregressive run: show a table instead of the texts
    seed: int = 1337  # of the draws
    device: str = ""  # cuda | mps | cpu; default: the best one found
    dtype: str = ""  # bfloat16 | float32, of matmuls; default: bfloat16 where the processor has it


def train_stage(stage: str, o: Train, shape: Shape, dataset: data.Dataset, length: int) -> None:
    """Train a stage to its end, in out/<name>/<stage>. Raises KeyboardInterrupt after Ctrl-C, all saved."""
    device, dtype, _ = pick_device(o.device, o.dtype)
    folder, first = Path("out") / o.name / stage, torch.Generator().manual_seed(o.seed)
    if stage == "few":
        o = replace(o, steps=o.few_steps, lr=o.few_lr)
        checks.check_tokens(dataset, str(folder.parent / "dfm"), "")
        model = student_of(load(folder.parent / "dfm", device), first)
    else:
        o, size = replace(o, ema=0.0), {k: v for k, v in asdict(shape).items() if k != "length"}
        model = init_weights(DiT(DiTConfig(dataset.meta["vocab_size"], dataset.mask_id, **size)), first)
    model, batch = model.to(device), training.batches(dataset, "train", length)
    state, recent, mean = training.State(model, o, []), [], 0.0
    frozen = checks.frozen(asdict(o) | asdict(shape), dtype, IGNORED[stage])
    folder.mkdir(parents=True, exist_ok=True)
    checks.begin_anew(folder, STAGES, o)
    if o.resume and checks.states(folder):
        state.restore(folder, frozen)
    print(f"{stage}: {sum(p.numel() for p in model.parameters()):,} parameters, {o.steps} steps")

    def teacher(x: Tensor, t: Tensor, h: Tensor) -> Tensor:
        return functional_call(model, state.ema, (x, t, h))  # the moving average

    with training.Stop() as stop, progress(o.steps, stage, "steps", initial=state.step) as bar:
        while state.step < o.steps and not stop.asked():
            for group in state.optimizer.param_groups:
                group["lr"] = training.learning_rate(o, state.step, o.steps)
            host, noise = training.generators(o.seed, STAGES.index(stage), state.step, device=device)
            x_1 = training.move(batch(o.batch_size, host), device)[0]  # (B, T)
            with autocast(device, dtype):
                if stage == "few":
                    done = state.step / o.steps
                    loss = few_step_loss(model, teacher, x_1, noise, done, o.teacher, o.rate)
                else:
                    t = 1 - sample_t(len(x_1), noise, device)[:, 0]  # (B,) in [0, 0.999]
                    x = path(model.config, x_1, t, noise)
                    loss = path_loss(model(x, t, torch.zeros_like(t)), x, x_1, t).mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), o.clip or math.inf)
            state.optimizer.step()
            state.optimizer.zero_grad(set_to_none=True)
            state.average()
            state.step += 1
            recent.append(loss.detach())
            bar.update()
            if state.step % 50 == 0 or state.step == o.steps:
                mean, recent = float(torch.stack(recent).mean()), []
                check(math.isfinite(mean), f"the loss became {mean} at step {state.step}: lower lr={o.lr}")
                bar.set_postfix(loss=f"{mean:.3f}")
            if state.step % o.save_every == 0:
                state.save(folder, frozen)
    if state.step < o.steps:
        state.save(folder, frozen)
        print(f"\n{stage}: saved at step {state.step} of {o.steps}; --resume goes on", file=sys.stderr)
        raise KeyboardInterrupt
    save(model, folder)
    dataset.tokenizer.save(folder)
    meta = {"stage": stage, "data": o.data, "length": length, "step": state.step, "loss": round(mean, 5),
            "options": asdict(o) | asdict(shape)}  # fmt: skip
    text = json.dumps(meta, indent=1) + "\n"
    write_atomic(folder / "train.json", lambda file: file.write_text(text))
    checks.remove_states(folder)


def train(argv: list[str]) -> None:
    o, shape = arguments(__doc__, Train, Shape, argv=argv)
    checks.check_choices(o, {"stage": (*STAGES, "all"), "teacher": TEACHERS, "rate": RATES,
                               "schedule": ("cosine", "constant")})  # fmt: skip
    checks.check_numbers(o)
    for name in ("steps", "few_steps", "batch_size", "save_every"):
        check(getattr(o, name) > 0, f"{name}={getattr(o, name)} must be at least 1")
    for name, value in asdict(shape).items():
        check(name == "source" or value > 0, f"{name}={value} must be at least 1")
    device, _, reason = pick_device(o.device, o.dtype)
    dataset, root = data.load(o.data), Path("out") / o.name
    length = dataset.meta["length"] or shape.length
    checks.quick_attention(device, length)
    stages = [s for s in STAGES if o.stage in (s, "all")]
    checks.check_folder(root, stages, o)
    print(f"{reason}\ndata {dataset.name}: canvas {length}, vocabulary {dataset.meta['vocab_size']}")
    with checks.claimed(root, "-m zoo.rivals.fsdfm"):
        for stage in stages:
            if o.resume and (root / stage / "train.json").is_file():
                checks.check_done(root / stage, asdict(o) | asdict(shape), IGNORED[stage])
                print(f"{stage}: already there, {root / stage}")
            else:
                train_stage(stage, o, shape, dataset, length)
    print(f"try: python -m zoo.rivals.fsdfm sample --model={root / stages[-1]} --steps=8")


def judged(judge: Transformer, texts: Tensor) -> str:
    """The judge's perplexity and the unigram entropy in bits of texts (N, T), each a mean over texts."""
    t, nats, bits = torch.ones(1, 1, device=texts.device), [], []
    for text in texts:
        nats.append(diffusion_loss(judge, text[None], t=t))  # t = 1: token by token, all to be predicted
        p = text.unique(return_counts=True)[1] / len(text)
        bits.append(-(p * p.log2()).sum())
    return f"{float(torch.stack(nats).exp().mean()):10.2f} {float(torch.stack(bits).mean()):8.3f}"


@torch.no_grad()
def write(argv: list[str]) -> None:
    (o,) = arguments(__doc__, Sample, argv=argv)
    checks.check_choices(o, {"rate": RATES})
    budgets = [int(s) for s in o.steps.split(",") if s.strip().isdigit()]
    check(len(budgets) == o.steps.count(",") + 1, f"steps={o.steps!r} should be numbers like 1,8,64")
    check(o.count > 0, f"count={o.count} must be at least 1")
    check(o.temperature > 0, f"temperature={o.temperature} must be above 0")
    device, dtype, _ = pick_device(o.device, o.dtype)
    folder, makes = zoo.names().get(o.model, Path(o.model)), "train makes fsdfm/dfm and fsdfm/few"
    check((folder / "config.json").is_file(), f"no model {o.model!r}: python -m zoo.rivals.fsdfm {makes}")
    model, tokens, meta = load(folder, device), tokenizer.load(folder), read_json(folder / "train.json")
    length, ids = meta["length"], tokens.encode(o.prompt)
    check(len(ids) < length, f"a prompt of {len(ids)} tokens leaves no room in a canvas of {length}")
    checks.quick_attention(device, length)
    canvas = torch.full((o.count, length), model.config.mask_id, device=device)
    canvas[:, : len(ids)] = torch.tensor(ids, dtype=torch.long, device=device)
    if o.judge:
        judge = zoo.load(o.judge, device)
        check(judge.tokenizer.fingerprint == tokens.fingerprint, f"{o.judge} has another tokenizer")
        check(judge.model.config.block_size == 1, f"{o.judge} is not autoregressive: train.py --block_size=1")
        real = training.batches(data.load(meta["data"]), "val", length)
        texts = real(o.count, torch.Generator().manual_seed(o.seed))[0].to(device)
        print(f"  steps perplexity  entropy\n   real {judged(judge.model, texts)}")
    for steps in budgets:
        generator = torch.Generator(device).manual_seed(o.seed)
        drawn = sample(model, model.config, canvas, steps, generator, o.rate, o.temperature)
        with autocast(device, dtype), progress(steps, f"{steps} steps", "steps", leave=False) as bar:
            for x in drawn:  # noqa: B007
                bar.update()
        if o.judge:
            print(f"{steps:7} {judged(judge.model, x)}", flush=True)
            continue
        for text in x.tolist():
            print(f"---- {steps} steps\n{tokens.decode(text)}")


def main() -> None:
    commands = {"train": train, "sample": write}
    command = sys.argv[1] if len(sys.argv) > 1 else "nothing"
    if command in ("-h", "--help"):
        return print(__doc__)
    check(command in commands, f"say train or sample, not {command} (--help tells more)")
    commands[command](sys.argv[2:])


if __name__ == "__main__":
    run(main)
