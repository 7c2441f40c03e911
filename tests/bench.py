"""How fast, as ratios: `python tests/bench.py` (--quick, --only=step,load and --save=FILE.json: see --help).

Every row sets two things beside each other that ran in turn in the same process, A B A B ..., and gives the
median of A / B over the pairs with its quartiles: whatever else the machine was doing hits both. A peak of
memory is taken in a process of its own: of a load what is resident above what that held after its imports, of
training the tensors that are alive. Weights are random. The
sampler's are stored in the dtype of the matmuls, those in training are float32.

    step          a denoising step, RCD over SeqD, by vocabulary and masks: the second step of a block of 64
    cache         the sampler with its key-value cache over the same steps without one, by length
    batch         tokens per second of the sampler, by batch
    train         a training step: stage 1 over a plain GPT's, stage 2 over stage 1
    flops         a training step of 100M parameters: model FLOP/s over those of a large matrix product
    transformers  our forward over that of transformers' Qwen3 with the same weights, all logits
    load          zoo.load of a folder in hub layout over reading its tensors with safetensors
    scale         the residual's share of a step of SDAR-1.7B, and predictions for a GPU: no measurements

What is behind the last rows, and the formula of FLOPs, is in costs.py and printed under the table.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is imported: see train.py
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # see sample.py

import json
import multiprocessing
import platform
import re
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, from anywhere

import costs
import numpy as np
import peers
import torch
from costs import gpt_shape
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

import zoo
from rcd import Config, Sampler, Transformer, denoise, diffusion_loss, reference_context
from zoo.decoding import Carry
from zoo.files import write_atomic
from zoo.recipes import Trajectories, init_weights
from zoo.tools.command import arguments, autocast, pick_device, run

CPU, DTYPE, REASON = pick_device("cpu", "")  # bfloat16 where the processor multiplies it


@dataclass
class Bench:
    """what is measured"""

    quick: bool = False  # small shapes and few repeats: under four minutes on one core
    only: str = ""  # rows, separated by commas: step, cache, batch, train, flops, transformers, load, scale;
    # default: all
    repeats: int = 0  # pairs behind a ratio; 0 = 3 with --quick, else 7
    save: str = ""  # write the rows into this JSON file too
    gpu: str = "H100"  # predictions are for: H100 | A100 | RTX4090
    tokens_per_step: float = 2.0  # predictions: tokens that a step commits


class Row(NamedTuple):
    name: str
    what: str
    ratio: float
    quartiles: tuple[float, float] | None = None
    detail: str = ""
    target: str = ""  # "<= 1.35" or ">= 0.6"

    def __str__(self) -> str:
        ratio, target = f"{self.ratio:.3f}", self.target
        if self.quartiles:
            ratio += " ({:.3f} to {:.3f})".format(*self.quartiles)
        if target:
            bound = float(target[3:])
            met = self.ratio <= bound if target[0] == "<" else self.ratio >= bound
            target += ", met" if met else ", not met"
        return f"| {self.name} | {self.what} | {ratio} | {self.detail} | {target} |"


# ---- Measuring


def timed(work: Callable, *args) -> Callable[[], float]:
    """A probe: it runs once and returns the seconds that count."""

    def probe() -> float:
        begin = time.perf_counter()
        work(*args)
        return time.perf_counter() - begin

    return probe


def interleave(probes: list[Callable[[], float]], repeats: int) -> list[np.ndarray]:
    """What every probe returned in every round, after one round that does not count."""
    return list(np.array([[probe() for probe in probes] for _ in range(repeats + 1)][1:]).T)


def compared(name: str, what: str, a: np.ndarray, b: np.ndarray, target: str = "", unit: str = "ms",
             scale: float = 1e3) -> Row:  # fmt: skip
    """The row of A / B; a and b are paired."""
    low, middle, high = np.percentile(a / b, (25, 50, 75)).tolist()
    medians = np.median(a) * scale, np.median(b) * scale
    shown = [f"{v:,.0f}" if v >= 100 else f"{v:.3g}" for v in medians]
    return Row(name, what, middle, (low, high), f"{shown[0]} / {shown[1]} {unit}", target)


def most_held() -> int:
    """The most bytes that this process has held.

    Where /proc tells, not ru_maxrss: that starts at the parent's, even through exec.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        return int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1]) << 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << (0 if sys.platform == "darwin" else 10)


def resident(work: Callable, *args) -> int:
    """Bytes that work(*args) adds to what the process holds at most."""
    before = most_held()
    work(*args)
    return most_held() - before


def tensors(work: Callable, *args) -> int:
    """Bytes of the tensors that are alive at once while work(*args) runs, at most: what a GPU's allocator
    counts. What is resident also depends on how the C library reuses what it got back."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work(*args)
    with tempfile.TemporaryDirectory() as folder:
        profiler.export_chrome_trace(str(trace := Path(folder) / "trace.json"))
        events = json.loads(trace.read_text())["traceEvents"]
    return max(e["args"]["Total Allocated"] for e in events if e["name"] == "[memory]")


def peak(measure: Callable, work: Callable, *args) -> int:
    """What measure (resident or tensors) says of work(*args) in a fresh process."""
    spawn, threads = multiprocessing.get_context("spawn"), torch.get_num_threads()
    with ProcessPoolExecutor(1, spawn, torch.set_num_threads, (threads,)) as executor:
        return executor.submit(measure, work, *args).result()


def matmul_rate() -> float:
    """FLOP/s of the best of three square matrix products."""
    squares = [torch.randn(n, n, dtype=DTYPE) for n in (1024, 2048, 4096)]
    rates = [2 * len(x) ** 3 / timed(torch.mm, x, x)() for x in squares for _ in range(1 + 4096 // len(x))]
    return max(rates)


def bandwidth() -> float:
    """Bytes/s of reading: the best of some sums over half a gibibyte."""
    x = torch.ones(1 << 27)
    return x.nbytes / min(timed(x.sum)() for _ in range(5))


def build(c: Config, dtype: torch.dtype = DTYPE, seed: int = 0) -> Transformer:
    """Random weights, made in place: a large model never exists twice."""
    with torch.device("meta"):
        model = Transformer(c).to(dtype)
    return init_weights(model.to_empty(device=CPU), torch.Generator().manual_seed(seed)).eval()


def middle_sized(o: Bench, vocab: int, block_size: int = 0) -> Config:
    """The shape of the rows that say no other."""
    return gpt_shape(vocab, *((4, 256) if o.quick else (8, 512)), block_size)


# ---- The rows


def second_step(model: Transformer, masks: int, carry: str, residual_top_k: int = 0) -> float:
    """Seconds of the second step of a block of 64 with so many masks: the first that reads what another
    carried."""
    canvas = torch.zeros(1, 64, dtype=torch.long)
    canvas[:, -masks:] = model.config.mask_id
    with autocast(CPU, DTYPE):
        steps = denoise(model, canvas, Sampler(carry=carry), Carry(residual_top_k=residual_top_k))
        next(steps)
        return timed(next, steps)()


def step(o: Bench) -> Iterator[Row]:
    for V in (4096, 151936) if o.quick else (7, 4096, 32768, 151936):
        model = build(middle_sized(o, V, 64))
        for masks in (32,) if o.quick else (8, 32, 64):
            probes = [partial(second_step, model, masks, carry) for carry in ("residual", "none")]
            what = f"RCD / SeqD, V = {V:,}, {masks} masks"
            yield compared("step", what, *interleave(probes, 3 * o.repeats))


def canvas_of(model: Transformer, rows: int, masks: int) -> Tensor:
    """(rows, b + masks): a block of random tokens, then masks."""
    c, generator = model.config, torch.Generator().manual_seed(0)
    given = torch.randint(c.mask_id, (rows, c.block_size), generator=generator)
    return torch.cat([given, torch.full((rows, masks), c.mask_id)], dim=1)


def fill(model: Transformer, canvas: Tensor, steps: int) -> Tensor:
    """The sampler in SeqD, so many steps for every block but the first."""
    blocks = canvas.shape[1] // model.config.block_size - 1
    *_, last = denoise(model, canvas, Sampler(carry="none", steps=steps * blocks))
    return last.tokens


def cache(o: Bench) -> Iterator[Row]:
    lengths, medians, flops = (128, 256, 512) if o.quick else (128, 256, 512, 1024), [], []
    model = build(middle_sized(o, 4096, 32))
    for T in lengths:
        canvas, ways = canvas_of(model, 1, T), (fill, peers.fill_recomputing)
        with autocast(CPU, DTYPE):
            times = interleave([timed(way, model, canvas, 4) for way in ways], min(3, o.repeats))
        yield compared("cache", f"with cache / recomputing, {T} tokens, 4 steps a block of 32", *times)
        medians.append(np.median(times, axis=1))
        tokens, rows, ends = 4 * 32 + 32, 32 + 24 + 16 + 8, range(64, 33 + T, 32)  # of a block's four steps
        flops.append(sum(costs.forward_flops(model.config, tokens, end, rows) for end in ends))
    points = np.log(lengths), np.log(np.column_stack([medians, flops]))
    ours, recomputing, ideal = np.polyfit(*points, 1)[0].tolist()
    what = f"with cache: time as a power of length, {lengths[0]} to {lengths[-1]}"
    detail = f"recomputing: {recomputing:.2f}, FLOPs with cache: {ideal:.2f}"
    yield Row("cache", what, ours, None, detail, "<= 1.2")


def batch(o: Bench) -> Iterator[Row]:
    model = build(middle_sized(o, 4096, 32))
    probes = [timed(fill, model, canvas_of(model, rows, 96), 4) for rows in (1, 8, 32)]
    with autocast(CPU, DTYPE):
        times = interleave(probes, min(5, o.repeats))
    for rows, seconds in zip((8, 32), times[1:]):
        what = f"tokens/s, batch {rows} / batch 1, 96 tokens each"
        yield compared("batch", what, rows / seconds, 1 / times[0], unit="tokens/s", scale=96)


STEPS = ("a GPT's step", "stage 1", "stage 2 (paper, same-size reference)", "stage 2 (trajectories)")
BY_MASS = Carry(residual_epsilon=1e-3)
BRIEFLY = tuple(f"{step}, `residual_top_k` 128" for step in STEPS[2:])


def learner(kinds: tuple[str, ...], c: Config, rows: int, length: int) -> list[Callable[[], float]]:
    """An optimiser step of each kind as train.py takes it. Half of all tokens are masked.

    The stages share one model and its optimiser.
    """
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, c.mask_id, (rows, length), generator=generator)
    everything = torch.ones(rows, length, dtype=torch.bool)
    t = ((torch.arange(rows) + 0.5) / rows)[:, None]  # (B, 1)
    gpt = peers.GPT(c) if STEPS[0] in kinds else None
    model = build(c, torch.float32) if {*kinds} - {STEPS[0]} else None
    by_paper, by_trajectory = (STEPS[2], BRIEFLY[0]), (STEPS[3], BRIEFLY[1])
    reference = None
    if {*by_paper} & {*kinds}:
        reference = build(c, seed=1).requires_grad_(False)  # stored as the zoo's models are
    under_way = Trajectories(c, rows, length)
    networks = [network for network in (gpt, model) if network is not None]
    optimizers = {n: torch.optim.AdamW(n.parameters(), lr=1e-5, fused=True) for n in networks}

    def loss_of(kind: str) -> Tensor:
        if kind == STEPS[0]:
            return gpt.loss(tokens)
        residual = Carry(residual_top_k=128 if kind in BRIEFLY else 0)
        if kind in by_trajectory:  # as many masks as elsewhere
            masked = torch.rand(rows, length, generator=generator) < t
            under_way.state["masked"] = under_way.state["response"] & masked
            fresh = lambda n: (tokens[:n], everything[:n], None)  # noqa: E731
            return under_way.loss(model, fresh, residual, generator)
        context = reference_context(reference, residual) if kind in by_paper else None
        return diffusion_loss(model, tokens, context=context, t=t, generator=generator)

    def update(kind: str) -> None:
        network = gpt if kind == STEPS[0] else model
        with autocast(CPU, DTYPE), sdpa_kernel(SDPBackend.MATH):  # train.py's choice for short canvases
            loss = loss_of(kind)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizers[network].step()
        optimizers[network].zero_grad(set_to_none=True)

    return [timed(update, kind) for kind in kinds]


def two_updates(kind: str, *args) -> None:
    (probe,) = learner((kind,), *args)
    probe(), probe()


def train(o: Bench) -> Iterator[Row]:
    for V in (4096,) if o.quick else (4096, 151936):
        c, rows, length = middle_sized(o, V), *((4, 128) if o.quick else (8, 256))
        shape = f"V = {V:,}, {c.n_layer} layers of {c.d_model}, {rows} x {length} tokens"
        kinds, size = STEPS + BRIEFLY * (V > 128 << 10), (c, rows, length)
        times = dict(zip(kinds, interleave(learner(kinds, *size), min(5, o.repeats))))
        held = {}
        if not o.quick:  # a small process would hold little but torch
            held = {kind: peak(tensors, two_updates, kind, *size) for kind in kinds}
        for a, b in zip(kinds[1:], (STEPS[0], *[STEPS[1]] * len(kinds))):
            most, most_memory = ("<= 1.35", "<= 1.1") if b == STEPS[1] else ("", "")
            yield compared("train", f"time of {a} / {b}, {shape}", times[a], times[b], most)
            if held:
                what, ratio = f"most tensors alive, {a} / {b}, {shape}", held[a] / held[b]
                detail = f"{held[a] / 2**20:,.0f} / {held[b] / 2**20:,.0f} MiB"
                yield Row("train", what, ratio, None, detail, most_memory)


def flops(o: Bench) -> Iterator[Row]:
    c, rows, length = gpt_shape(16384, 12, 768), 2 if o.quick else 16, 256
    model_flops = 3 * rows * costs.forward_flops(c, length, length, length / 2)
    probes = [*learner(STEPS[1:2], c, rows, length), matmul_rate]
    seconds, rate = interleave(probes, min(5, o.repeats))
    what = f"stage 1, 98M parameters, {rows} x {length} tokens / a matrix product, {str(DTYPE)[6:]}"
    yield compared("flops", what, model_flops / seconds, rate, ">= 0.6", unit="GFLOP/s", scale=1e-9)


@torch.no_grad()
def transformers(o: Bench) -> Iterator[Row]:
    def forward(model: Transformer, tokens: Tensor) -> Tensor:
        positions = torch.arange(tokens.shape[1])[None]
        return model.logits(model(model.embed_tokens(tokens), positions).flatten(0, 1))  # (B T, V)

    for c, rows in ((gpt_shape(512, 2, 128), 8), (gpt_shape(16384, 12, 768), 1 if o.quick else 4)):
        tokens = torch.randint(0, c.mask_id, (rows, 256))
        for dtype in dict.fromkeys((DTYPE, torch.float32)):
            model = build(c, dtype)
            try:
                theirs = peers.qwen3(model)
            except ImportError:
                tqdm.write("transformers: skipped, it is not installed (extra `test`)", file=sys.stderr)
                return
            difference = (forward(model, tokens) - theirs(tokens).flatten(0, 1)).float()
            apart = difference[:, : c.mask_id].abs().max()
            shape = f"{c.n_layer} layers of {c.d_model}, {rows} x 256 tokens, {str(dtype)[6:]}"
            what = f"forward, ours / Qwen3ForCausalLM's, {shape}"
            times = interleave([timed(forward, model, tokens), timed(theirs, tokens)], o.repeats)
            row = compared("transformers", what, *times)
            yield row._replace(detail=f"{row.detail}, logits at most {apart:.0e} apart")


def load(o: Bench) -> Iterator[Row]:
    vocab, layers = (32768, 8) if o.quick else (151936, 28)  # the second is Qwen3-0.6B
    c = Config(vocab_size=vocab, mask_id=257, n_layer=layers, n_head=16, n_kv_head=8, head_dim=128,
               d_model=1024, d_ff=3072)  # fmt: skip
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        size = peers.write_sdar(build(c, torch.bfloat16), folder)
        times = interleave([timed(zoo.load, folder), timed(peers.read_all, folder)], o.repeats)
        what = f"time of zoo.load / load_file and a copy, {size / 1e6:,.0f} MB of bfloat16"
        yield compared("load", what, *times)
        held = peak(resident, zoo.load, folder)
        detail = f"{held / 1e6:,.0f} / {size / 1e6:,.0f} MB"
        yield Row("load", "peak memory of zoo.load / weights", held / size, None, detail, "<= 1.05")


@torch.no_grad()
def scale(o: Bench) -> Iterator[Row]:
    sdar = "SDAR-1.7B"
    name, c = ("98M parameters", gpt_shape(16384, 12, 768)) if o.quick else (sdar, costs.SHAPES[sdar])
    model = build(replace(c, block_size=64))

    def forward(tokens: int) -> Tensor:
        x = torch.zeros(1, tokens, c.d_model, dtype=DTYPE)
        return model.logits(model(x, torch.arange(tokens)[None])[0, :64])

    logits = model.logits(torch.randn(63, c.d_model).to(DTYPE))  # (63, V), the cells of a second step
    steps = [partial(second_step, model, 64, *how) for how in (("residual",), ("none",), ("residual", 128))]
    sure = logits * (10 / logits[:, : c.mask_id].float().std())  # 256 tokens hold 0.999 of each p
    shares = [p.float().softmax(-1).topk(256).values.sum(-1) for p in (sure, logits)]
    assert shares[0].min() > 0.999 > shares[1].max()
    sides = (Carry(), logits), (Carry(residual_top_k=128), logits), (BY_MASS, sure), (BY_MASS, logits)
    by_itself = [timed(residual, z, model.embedding) for residual, z in sides]
    probes = [*steps, *by_itself, timed(forward, 4), timed(forward, 512)]
    rcd, seqd, brief, whole, part, short, long, few, many = interleave(probes, o.repeats)
    again = "the same, `residual_top_k` 128"
    yield compared("scale", f"RCD / SeqD, a step of {name}, block 64, batch 1", rcd, seqd, "<= 1.03")
    yield compared("scale", again, brief, seqd, "<= 1.03")
    yield compared("scale", f"the residual by itself / an RCD step of {name}", whole, rcd, "<= 0.03")
    yield compared("scale", again, part, brief, "<= 0.03")
    adaptive = "the residual by itself, `residual_epsilon` 0.001,"
    yield compared("scale", f"{adaptive} every p within 256 tokens / that step", short, brief, "<= 0.03")
    yield compared("scale", f"{adaptive} no p within 256 tokens / exact", long, whole)

    bytes_here, flops_here = bandwidth(), matmul_rate()
    e_bytes = costs.step_bytes(c, 4, 4, itemsize=DTYPE.itemsize) / bytes_here / np.median(few)
    e_flops = costs.forward_flops(c, 512, 512, 64) / flops_here / np.median(many)
    reached = bytes_here * e_bytes, flops_here * e_flops
    expected = costs.step_seconds(c, 64, 64, 63, True, *reached, DTYPE.itemsize)
    what = f"check: predicted / measured RCD step of {name}"
    row = compared("scale", what, np.full_like(rcd, expected), rcd)
    rates = f"{bytes_here / 1e9:.1f} GB/s, {flops_here / 1e9:,.0f} GFLOP/s"
    yield row._replace(detail=f"{row.detail}; {rates}, e_bytes {e_bytes:.2f}, e_flops {e_flops:.2f}")

    for what, ratio, detail in costs.predictions(o.gpu, e_bytes, e_flops, o.tokens_per_step):
        yield Row("scale", what, ratio, None, detail)


ROWS = {f.__name__: f for f in (step, cache, batch, train, flops, transformers, load, scale)}


def machine() -> dict:
    """Where and when the figures are measured."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    named = re.search(r"model name\s*: (.*)", info)
    return {
        "processor": named[1] if named else platform.machine(), "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 2), "torch": torch.__version__, "threads": torch.get_num_threads(),
        "dtype": str(DTYPE)[6:], "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip


def main() -> None:
    (o,) = arguments(__doc__, Bench)
    chosen = [name.strip() for name in o.only.split(",")] if o.only else list(ROWS)
    for what, value, choices in (("only", {*chosen}, ROWS), ("gpu", {o.gpu}, costs.GPUS)):
        if wrong := value - choices.keys():
            raise ValueError(f"{what}={', '.join(sorted(wrong))}: choose from {', '.join(choices)}")
    if o.repeats < 0:
        raise ValueError(f"repeats={o.repeats} must not be negative")
    if not 0 < o.tokens_per_step <= 32:
        raise ValueError(f"tokens_per_step={o.tokens_per_step} must lie in (0, 32]")
    o.repeats = o.repeats or (3 if o.quick else 7)
    here = machine()
    print(", ".join(f"{key} {value}" for key, value in here.items()), f"({REASON})\n")
    print("| row | what | A / B (quartiles) | A / B, measured | target |")
    print("|---|---|--:|--:|---|", flush=True)
    rows, begin = [], time.perf_counter()
    # Where stderr is no terminal there is no bar: the rows tell how far it is.
    with tqdm(chosen, unit="row", disable=None, dynamic_ncols=True) as bar:
        for name in bar:
            bar.set_description(name)
            for row in ROWS[name](o):
                row = row._replace(target="") if o.quick else row  # targets are for the large shapes
                rows.append(row)
                tqdm.write(str(row), file=sys.stdout)
                sys.stdout.flush()
            if o.save:  # after each: what is there survives Ctrl-C
                values = {"machine": here, "options": asdict(o), "rows": [row._asdict() for row in rows]}
                text = json.dumps(values, indent=1) + "\n"
                write_atomic(Path(o.save), lambda path, text=text: path.write_text(text))
    quick = ", --quick: small shapes and few repeats, not to be quoted" * o.quick
    print(f"\n{time.perf_counter() - begin:.0f} seconds{quick}")
    print("\n" + costs.__doc__.strip())


if __name__ == "__main__":
    run(main)
