"""How fast, as ratios: `python tests/bench.py` (`--quick` takes less than a minute, `--only=step,load` some rows, `--save=FILE.json` keeps them).

Every row sets two things beside each other that ran in turn in the same process, A B A B ..., and gives the median of A / B over the pairs with
its quartiles: whatever else the machine was doing hits both. A peak of memory is taken in a process of its own, above what that held
after its imports. Weights are random; the sampler's are stored in the dtype of the matmuls, those in training are float32.

    step          one denoising step, RCD over SeqD, by vocabulary and masked positions: the second step of a block of 64
    cache         the sampler with its key-value cache against the same steps that recompute the prefix, by canvas length
    batch         tokens per second of the sampler, by batch
    train         a training step: stage 1 over a plain GPT's, stage 2 over stage 1
    flops         a training step of 100M parameters: model FLOP/s over those of a large matrix product
    transformers  our forward over that of transformers' Qwen3 with the same weights, all logits
    load          zoo.load of a folder in hub layout over reading its tensors with safetensors
    scale         the residual's share of a step in the shape of SDAR-1.7B, and predictions for a GPU, which are no measurements

FLOPs (2 for a multiply-add) of a forward: 2 tokens x weights of the layers + 4 tokens x keys x layers x heads x head width + 2 rows x V x D,
rows being those that the head runs on; the residual adds 2 rows x V x D. A training step is three forwards (what is computed twice to save
memory is not counted). Bytes of a step: every weight once, E (V x D) once more for the residual, the keys and values so far, the logits
written and read, and with a residual the probabilities too. A predicted step takes
    max(bytes / (bandwidth x e_bytes), FLOPs / (rate x e_flops)).
Here bandwidth and rate are measured (a sum, a matrix product), and e_bytes and e_flops are what forwards of 4 and of 512 tokens reach of
them; "check" is that formula on a step that they were not taken from. On the GPU bandwidth and rate are its maker's and both e are this
machine's, which is a guess; the roofline beside it has both at 1. Predicted memory: weights, keys and values, and rows x V logits, twice in float32.
"""

import json
import multiprocessing
import operator
import os
import platform
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, from anywhere
from sample import arguments, autocast, pick_device, run  # before torch: it says how threads wait

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

import zoo
from rcd import Config, Residual, Sampler, Trajectories, Transformer, block_causal_mask, denoise, diffusion_loss, reference_context
from zoo.files import write_atomic
from zoo.tokenizer import bytes_tokenizer

CPU, DTYPE, REASON = pick_device("cpu", "")  # bfloat16 where the processor multiplies it
GPUS = {  # bytes/s, dense bfloat16 FLOP/s with float32 sums, bytes: NVIDIA's data sheets (H100 SXM5, A100 80GB SXM4) and Ada whitepaper
    "H100": (3.35e12, 989e12, 80e9), "A100": (2.039e12, 312e12, 80e9), "RTX4090": (1.008e12, 165.2e12, 24e9),
}  # fmt: skip
SDAR = dict(vocab_size=151936, mask_id=151669, n_kv_head=8, head_dim=128, max_len=32768, block_size=32, tied=False)
SHAPES = {
    "SDAR-1.7B": Config(**SDAR, n_layer=28, n_head=16, d_model=2048, d_ff=6144),
    "SDAR-4B": Config(**SDAR, n_layer=36, n_head=32, d_model=2560, d_ff=9728),
    "SDAR-8B": Config(**SDAR, n_layer=36, n_head=32, d_model=4096, d_ff=12288),
    "LLaDA-8B": Config(vocab_size=126464, mask_id=126336, n_layer=32, n_head=32, n_kv_head=32, head_dim=128, d_model=4096, d_ff=12288,
                       max_len=4096, qk_norm=False, tied=False),
}  # fmt: skip


@dataclass
class Bench:
    """what is measured"""

    quick: bool = False  # small shapes and few repeats: under a minute on two cores
    only: str = ""  # rows, separated by commas: step, cache, batch, train, flops, transformers, load, scale; default: all
    repeats: int = 0  # pairs behind a ratio; 0 = 3 with --quick, else 7
    save: str = ""  # write the rows into this JSON file too
    gpu: str = "H100"  # predictions are for: H100 | A100 | RTX4090
    tokens_per_step: float = 2.0  # predictions: tokens that a step commits


@dataclass
class Row:
    name: str
    what: str
    ratio: float | None = None
    quartiles: tuple[float, float] | None = None
    detail: str = ""
    target: str = ""  # "<= 1.35" or ">= 0.6"

    def __str__(self) -> str:
        ratio, verdict = "" if self.ratio is None else f"{self.ratio:.3f}", ""
        if self.quartiles:
            ratio += " ({:.3f} to {:.3f})".format(*self.quartiles)
        if self.target:
            sense, value = self.target.split()
            verdict = self.target + (", met" if {"<=": operator.le, ">=": operator.ge}[sense](self.ratio, float(value)) else ", not met")
        return f"| {self.name} | {self.what} | {ratio} | {self.detail} | {verdict} |"


# Costs by formula ----------------------------------------------------------------------------------------------------------------------


def layer_weights(c: Config) -> int:
    return 2 * c.d_model * c.head_dim * (c.n_head + c.n_kv_head) + 3 * c.d_model * c.d_ff


def residual_flops(c: Config, rows: float) -> float:
    return 2 * rows * c.vocab_size * c.d_model  # p E, (rows, V) x (V, D); the head's product has the same size


def forward_flops(c: Config, tokens: int, keys: int, rows: float) -> float:
    return tokens * c.n_layer * (2 * layer_weights(c) + 4 * keys * c.n_head * c.head_dim) + residual_flops(c, rows)


def step_bytes(c: Config, keys: int, rows: int, residual: bool) -> int:
    per_row = c.n_layer * layer_weights(c) + (1 + residual) * c.vocab_size * (c.d_model + 2 * rows)
    return DTYPE.itemsize * (per_row + 2 * c.n_layer * keys * c.n_kv_head * c.head_dim)


def step_seconds(c: Config, tokens: int, keys: int, rows: int, residual: bool, bandwidth: float, rate: float) -> float:
    """A step of tokens that each see so many keys; a bidirectional model (block_size 0) has no cache to read."""
    flops = forward_flops(c, tokens, keys, rows) + residual * residual_flops(c, rows)
    return max(step_bytes(c, keys if c.block_size else 0, rows, residual) / bandwidth, flops / rate)


# Measuring -----------------------------------------------------------------------------------------------------------------------------

Probe = Callable[[], float]  # runs once and returns the seconds that count


def timed(work: Callable, *args) -> Probe:
    def probe() -> float:
        begin = time.perf_counter()
        work(*args)
        return time.perf_counter() - begin

    return probe


def interleave(probes: list[Probe], repeats: int) -> list[np.ndarray]:
    """What every probe returned in every round, after one round that does not count."""
    return list(np.array([[probe() for probe in probes] for _ in range(repeats + 1)][1:]).T)


def compared(name: str, what: str, a: np.ndarray, b: np.ndarray, target: str = "", unit: str = "ms", scale: float = 1e3) -> Row:
    """The row of A / B; a and b are paired."""
    low, middle, high = np.percentile(a / b, (25, 50, 75)).tolist()
    return Row(name, what, middle, (low, high), f"{np.median(a) * scale:,.4g} / {np.median(b) * scale:,.4g} {unit}", target)


def most_held() -> int:
    """The most bytes that this process has held. Where /proc tells, not ru_maxrss: that starts at the parent's, even through exec."""
    status = Path("/proc/self/status")
    if status.is_file():
        return int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1]) << 10
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << (0 if sys.platform == "darwin" else 10)


def added(threads: int, work: Callable, *args) -> int:
    torch.set_num_threads(threads)
    before = most_held()
    work(*args)
    return most_held() - before


def peak(work: Callable, *args) -> int:
    """Bytes that work(*args) adds to what a fresh process holds at most."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(added, torch.get_num_threads(), work, *args).result()


def matmul_rate(dtype: torch.dtype = DTYPE) -> float:
    """FLOP/s of the best of three square matrix products."""
    products = [(n, torch.randn(n, n, dtype=dtype)) for n in (1024, 2048, 4096)]
    return max(2 * n**3 / timed(torch.mm, x, x)() for n, x in products for _ in range(1 + 4096 // n))


def bandwidth() -> float:
    """Bytes/s of reading: the best of some sums over half a gibibyte."""
    x = torch.ones(1 << 27)
    return x.nbytes / min(timed(x.sum)() for _ in range(5))


def gpt_shape(vocab: int, layers: int, width: int, **options) -> Config:
    """The shape of train.py's base: heads of 64, a tied head."""
    return Config(vocab_size=vocab, mask_id=vocab - 1, n_layer=layers, n_head=width // 64, n_kv_head=width // 64, head_dim=64, d_model=width,
                  d_ff=width * 8 // 3 // 8 * 8, max_len=4096, **options)  # fmt: skip


def build(c: Config, dtype: torch.dtype = DTYPE, seed: int = 0) -> Transformer:
    """Random weights, made in place: a large model never exists twice."""
    with torch.device("meta"):
        model = Transformer(c).to(dtype)
    return model.to_empty(device=CPU).init_weights(torch.Generator().manual_seed(seed)).eval()


# Sampling ------------------------------------------------------------------------------------------------------------------------------


def second_step(model: Transformer, masks: int, carry: str) -> float:
    """Seconds of the second step of a block of 64 of which so many positions were masked: the first that reads what another carried."""
    canvas = torch.zeros(1, 64, dtype=torch.long)
    canvas[:, -masks:] = model.config.mask_id
    with autocast(CPU, DTYPE):
        steps = denoise(model, canvas, Sampler(carry=carry))
        next(steps)
        return timed(next, steps)()


def step(o: Bench) -> Iterator[Row]:
    for V in (4096, 151936) if o.quick else (7, 4096, 32768, 151936):
        model = build(gpt_shape(V, *(4, 256) if o.quick else (8, 512), block_size=64))
        for masks in (32,) if o.quick else (8, 32, 64):
            rcd, seqd = interleave([partial(second_step, model, masks, carry) for carry in ("residual", "none")], 3 * o.repeats)
            yield compared("step", f"RCD / SeqD, V = {V:,}, {masks} masks", rcd, seqd)


def fill(model: Transformer, rows: int, length: int, steps: int) -> Tensor:
    """The sampler, SeqD: so many steps for every block of rows empty canvases."""
    canvas = torch.full((rows, length), model.config.mask_id)
    with autocast(CPU, DTYPE):
        *_, last = denoise(model, canvas, Sampler(carry="none", steps=steps * length // model.config.block_size))
    return last.tokens


@torch.no_grad()
def fill_recomputing(model: Transformer, length: int, steps: int) -> Tensor:
    """The same without a cache, for one canvas: every step runs all positions up to the end of the block that it fills."""
    b, canvas = model.config.block_size, torch.full((1, length), model.config.mask_id)
    for end in range(b, length + 1, b):
        positions = torch.arange(end)[None]  # (1, S)
        mask = block_causal_mask(positions, positions, b)[:, None]  # (1, 1, S, S)
        for left in range(steps, 0, -1):
            column = (canvas[0, :end] == model.config.mask_id).nonzero()[:, 0]  # (N,)
            with autocast(CPU, DTYPE):
                logits = model.logits(model(model.embed(canvas[:, :end]), positions, mask)[0, column])  # (N, V)
            confidence, token = logits.float().softmax(-1).max(-1)
            sure = confidence.topk(-(-len(column) // left)).indices
            canvas[0, column[sure]] = token[sure]
    return canvas


def cache(o: Bench) -> Iterator[Row]:
    lengths, medians = (128, 256, 512) if o.quick else (256, 512, 1024, 2048), []
    model = build(gpt_shape(4096, *(4, 256) if o.quick else (8, 512), block_size=32))
    for T in lengths:
        times = interleave([timed(fill, model, 1, T, 4), timed(fill_recomputing, model, T, 4)], min(3, o.repeats))
        medians.append(np.median(times, axis=1))
        yield compared("cache", f"with cache / recomputing, canvas of {T}, 4 steps a block of 32", *times)
    with_cache, without = np.polyfit(np.log(lengths), np.log(medians), 1)[0].tolist()
    yield Row("cache", f"with cache: exponent of time in length, {lengths[0]} to {lengths[-1]}", with_cache, None, f"recomputing: {without:.2f}", "<= 1.1")


def batch(o: Bench) -> Iterator[Row]:
    model = build(gpt_shape(4096, *(4, 256) if o.quick else (8, 512), block_size=32))
    times = interleave([timed(fill, model, rows, 128, 4) for rows in (1, 8, 32)], min(5, o.repeats))
    for rows, seconds in zip((8, 32), times[1:]):
        yield compared("batch", f"tokens/s, batch {rows} / batch 1, canvases of 128", rows / seconds, 1 / times[0], unit="tokens/s", scale=128)


# Training ------------------------------------------------------------------------------------------------------------------------------


class GPT(nn.Module):
    """The peer: a plain autoregressive GPT, pre-norm, learned positions, tied head; its MLP is 3/2 d_ff wide, as it has two matrices, not three."""

    def __init__(self, c: Config):
        super().__init__()
        D, wide, self.n_head = c.d_model, 3 * c.d_ff // 2, c.n_head
        linear = partial(nn.Linear, bias=False)
        self.tokens, self.positions, self.norm = nn.Embedding(c.vocab_size, D), nn.Embedding(c.max_len, D), nn.LayerNorm(D)
        self.layers = nn.ModuleList(
            nn.ModuleDict({"norm1": nn.LayerNorm(D), "qkv": linear(D, 3 * D), "out": linear(D, D),
                           "norm2": nn.LayerNorm(D), "up": linear(D, wide), "down": linear(wide, D)}) for _ in range(c.n_layer))  # fmt: skip
        for p in self.parameters():
            nn.init.normal_(p, std=0.02) if p.dim() == 2 else None

    def loss(self, tokens: Tensor) -> Tensor:
        """Cross-entropy of the next token at all of (B, T)."""
        B, T = tokens.shape
        x = self.tokens(tokens) + self.positions.weight[:T]  # (B, T, D)
        for layer in self.layers:
            q, k, v = (y.view(B, T, self.n_head, -1).transpose(1, 2) for y in layer["qkv"](layer["norm1"](x)).chunk(3, dim=-1))  # (B, H, T, K)
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + layer["out"](y.transpose(1, 2).reshape(B, T, -1))
            x = x + layer["down"](F.gelu(layer["up"](layer["norm2"](x))))
        logits = F.linear(self.norm(x), self.tokens.weight)  # (B, T, V)
        return F.cross_entropy(logits.flatten(0, 1).float(), tokens.roll(-1, dims=1).flatten())


STEPS = ("a GPT's step", "stage 1", "stage 2 (paper, same-size reference)", "stage 2 (trajectories)")


def learner(kinds: tuple[str, ...], c: Config, rows: int, length: int) -> list[Probe]:
    """An optimiser step of each kind as train.py takes it; the stages share one model and its optimiser. Half of all tokens are masked."""
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
    generator = torch.Generator().manual_seed(0)
    tokens, everything = torch.randint(0, c.mask_id, (rows, length), generator=generator), torch.ones(rows, length, dtype=torch.bool)
    t = ((torch.arange(rows) + 0.5) / rows)[:, None]  # (B, 1)
    gpt = GPT(c) if STEPS[0] in kinds else None
    model = build(c, torch.float32) if {*kinds} - {STEPS[0]} else None
    context = reference_context(build(c, torch.float32, seed=1).requires_grad_(False), Residual()) if STEPS[2] in kinds else None
    under_way = Trajectories(c, rows, length)
    optimizers = {net: torch.optim.AdamW(net.parameters(), lr=1e-5, fused=True) for net in (gpt, model) if net is not None}

    def update(kind: str) -> None:
        net = gpt if kind == STEPS[0] else model
        with autocast(CPU, DTYPE), sdpa_kernel(SDPBackend.MATH):  # train.py's choice for short canvases
            if kind == STEPS[0]:
                loss = gpt.loss(tokens)
            elif kind == STEPS[3]:  # as many masks as elsewhere
                under_way.state["masked"] = under_way.state["response"] & (torch.rand(rows, length, generator=generator) < t)
                loss = under_way.loss(model, lambda n: (tokens[:n], everything[:n]), Residual(), generator)
            else:
                loss = diffusion_loss(model, tokens, context=context if kind == STEPS[2] else None, t=t, generator=generator)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizers[net].step()
        optimizers[net].zero_grad(set_to_none=True)

    return [timed(update, kind) for kind in kinds]


def two_updates(kind: str, *args) -> None:
    (probe,) = learner((kind,), *args)
    probe(), probe()


def train(o: Bench) -> Iterator[Row]:
    for V in (4096,) if o.quick else (4096, 151936):
        size = (gpt_shape(V, 4, 256), 4, 128) if o.quick else (gpt_shape(V, 8, 512), 8, 256)
        times = dict(zip(STEPS, interleave(learner(STEPS, *size), min(5, o.repeats))))
        held = {} if o.quick else {kind: peak(two_updates, kind, *size) for kind in STEPS}  # a small process would hold little but torch
        for a, b, most, most_memory in zip(STEPS[1:], (*STEPS[:2], STEPS[1]), ("", "<= 1.35", "<= 1.35"), ("", "<= 1.1", "<= 1.1")):
            yield compared("train", f"time of {a} / {b}, V = {V:,}, {size[0].n_layer} layers of {size[0].d_model}, {size[1]} x {size[2]} tokens",
                           times[a], times[b], most)  # fmt: skip
            if held:
                detail = f"{held[a] / 2**20:,.0f} / {held[b] / 2**20:,.0f} MiB"
                yield Row("train", f"peak memory of {a} / {b}, V = {V:,}", held[a] / held[b], None, detail, most_memory)


def flops(o: Bench) -> Iterator[Row]:
    c, rows, length = gpt_shape(16384, 12, 768), 2 if o.quick else 16, 256
    model_flops = 3 * rows * forward_flops(c, length, length, length / 2)
    seconds, rate = interleave([*learner(STEPS[1:2], c, rows, length), matmul_rate], min(5, o.repeats))
    what = f"stage 1, 98M parameters, {rows} x {length} tokens / a matrix product, {str(DTYPE)[6:]}"
    yield compared("flops", what, model_flops / seconds, rate, ">= 0.6", unit="GFLOP/s", scale=1e-9)


# Others' code on the same weights ------------------------------------------------------------------------------------------------------


def transformers(o: Bench) -> Iterator[Row]:
    try:
        from transformers import Qwen3Config, Qwen3ForCausalLM
    except ImportError:
        yield Row("transformers", "skipped: transformers is not installed (extra `test`)")
        return
    for c, rows in ((gpt_shape(512, 2, 128), 8), (gpt_shape(16384, 12, 768), 1 if o.quick else 4)):
        settings = Qwen3Config(vocab_size=c.vocab_size, hidden_size=c.d_model, intermediate_size=c.d_ff, num_hidden_layers=c.n_layer,
                               num_attention_heads=c.n_head, num_key_value_heads=c.n_kv_head, head_dim=c.head_dim, rms_norm_eps=c.norm_eps,
                               rope_theta=c.rope_theta, tie_word_embeddings=True)  # fmt: skip
        tokens, positions = torch.randint(0, c.mask_id, (rows, 256)), torch.arange(256)[None]
        for dtype in dict.fromkeys((DTYPE, torch.float32)):
            model, theirs = build(c, dtype), Qwen3ForCausalLM(settings).to(dtype).eval()
            theirs.load_state_dict({f"model.{name}": p for name, p in model.state_dict().items()}, strict=False)
            for layer in theirs.model.layers:
                layer.self_attn.is_causal = False
            forwards = [lambda m=model: m.logits(m(m.embed(tokens), positions).flatten(0, 1)),  # noqa: B023, they run before the next round
                        lambda m=theirs: m(input_ids=tokens, use_cache=False).logits.flatten(0, 1)]  # noqa: B023
            with torch.no_grad():
                apart = (forwards[0]() - forwards[1]()).float()[:, : c.mask_id].abs().max()  # (B T, V - 1)
                row = compared("transformers", f"forward, ours / Qwen3ForCausalLM's, {c.n_layer} layers of {c.d_model}, {rows} x 256 tokens, {str(dtype)[6:]}",
                               *interleave([timed(f) for f in forwards], o.repeats))  # fmt: skip
            yield replace(row, detail=f"{row.detail}, logits at most {apart:.0e} apart")


def hub_folder(folder: Path, layers: int) -> int:
    """Random weights of Qwen3-0.6B's width as an SDAR folder; returns the bytes of its tensors."""
    c = Config(vocab_size=151936, mask_id=257, n_layer=layers, n_head=16, n_kv_head=8, head_dim=128, d_model=1024, d_ff=3072)
    tensors = {f"model.{name}": p for name, p in build(c, torch.bfloat16).state_dict().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({
        "model_type": "sdar", "vocab_size": c.vocab_size, "hidden_size": c.d_model, "intermediate_size": c.d_ff, "num_hidden_layers": layers,
        "num_attention_heads": c.n_head, "num_key_value_heads": c.n_kv_head, "head_dim": c.head_dim, "rope_theta": 1e6, "rms_norm_eps": 1e-6,
        "max_position_embeddings": c.max_len, "tie_word_embeddings": True, "mask_token_id": c.mask_id,
    }))  # fmt: skip
    bytes_tokenizer(["<eos>", "<mask>"]).save(folder)
    return sum(p.nbytes for p in tensors.values())


def read_all(folder: Path) -> list[Tensor]:
    """What reading costs at least. load_file only maps the file: a tensor is read when it is copied."""
    return [tensor.clone() for tensor in load_file(folder / "model.safetensors").values()]


def load(o: Bench) -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        size = hub_folder(folder, 2 if o.quick else 28)
        times = interleave([timed(zoo.load, folder), timed(read_all, folder)], o.repeats)
        yield compared("load", f"time of zoo.load / load_file and a copy, {size / 1e6:,.0f} MB of bfloat16", *times)
        held = peak(zoo.load, folder)
        yield Row("load", "peak memory of zoo.load / weights", held / size, None, f"{held / 1e6:,.0f} / {size / 1e6:,.0f} MB", "<= 1.05")


# Scale ---------------------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def scale(o: Bench) -> Iterator[Row]:
    name, c = ("98M parameters", gpt_shape(16384, 12, 768)) if o.quick else ("SDAR-1.7B", SHAPES["SDAR-1.7B"])
    model = build(replace(c, block_size=64))

    def forward(tokens: int) -> Tensor:
        x = torch.zeros(1, tokens, c.d_model, dtype=DTYPE)
        return model.logits(model(x, torch.arange(tokens)[None])[0, :64])

    logits = model.logits(torch.randn(63, c.d_model).to(DTYPE))  # (63, V), the rows of a second step
    rcd, seqd, alone, few, many = interleave([
        partial(second_step, model, 64, "residual"), partial(second_step, model, 64, "none"), timed(Residual(), logits, model.embedding),
        timed(forward, 4), timed(forward, 512)], o.repeats)  # fmt: skip
    yield compared("scale", f"RCD / SeqD, a step of {name}, block 64, batch 1", rcd, seqd, "<= 1.03")
    yield compared("scale", f"the residual by itself / an RCD step of {name}", alone, rcd, "<= 0.03")

    bytes_here, flops_here = bandwidth(), matmul_rate()
    e_bytes = step_bytes(model.config, 4, 4, False) / bytes_here / np.median(few)
    e_flops = forward_flops(c, 512, 512, 64) / flops_here / np.median(many)
    expected = step_seconds(model.config, 64, 64, 63, True, bytes_here * e_bytes, flops_here * e_flops)
    row = compared("scale", f"check: predicted / measured RCD step of {name}", np.full_like(rcd, expected), rcd)
    yield replace(row, detail=f"{row.detail}; here {bytes_here / 1e9:.1f} GB/s, {flops_here / 1e9:,.0f} GFLOP/s, e_bytes {e_bytes:.2f}, e_flops {e_flops:.2f}")

    bytes_there, flops_there, room = GPUS[o.gpu]
    for name, c in SHAPES.items():
        keys = 2048 if c.block_size else 1024
        # A bidirectional step runs the whole canvas, any other its block and, once a block, the one before it. All of the block is masked, at most.
        tokens, rows = (c.block_size + o.tokens_per_step, c.block_size) if c.block_size else (keys, 32)
        rcd, seqd = (step_seconds(c, tokens, keys, rows, residual, bytes_there * e_bytes, flops_there * e_flops) for residual in (True, False))
        roofline = step_seconds(c, tokens, keys, rows, True, bytes_there, flops_there)
        held = step_bytes(c, keys if c.block_size else 0, 0, residual=True) + rows * c.vocab_size * (DTYPE.itemsize + 8)
        what = f"PREDICTION, not measured: RCD / SeqD, {name} on an {o.gpu}, {keys:,} tokens, batch 1, {o.tokens_per_step:g} tokens a step"
        speed = f"{o.tokens_per_step / rcd:,.0f} tokens/s (roofline {o.tokens_per_step / roofline:,.0f}), {held / 1e9:.1f} of {room / 1e9:.0f} GB"
        yield Row("scale", what, rcd / seqd, None, speed)


# The command ---------------------------------------------------------------------------------------------------------------------------

ROWS = {f.__name__: f for f in (step, cache, batch, train, flops, transformers, load, scale)}


def machine() -> dict:
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", info.read_text()) if info.is_file() else None
    return {"processor": found[1] if found else platform.machine(), "cores": os.cpu_count(), "load": round(os.getloadavg()[0], 2),
            "torch": torch.__version__, "threads": torch.get_num_threads(), "dtype": str(DTYPE)[6:], "date": time.strftime("%Y-%m-%d")}  # fmt: skip


def main() -> None:
    (o,) = arguments(__doc__, Bench)
    chosen = [name.strip() for name in o.only.split(",")] if o.only else list(ROWS)
    for what, value, choices in (("only", {*chosen}, ROWS), ("gpu", {o.gpu}, GPUS)):
        if value - choices.keys():
            raise ValueError(f"{what}={', '.join(sorted(value - choices.keys()))}: choose from {', '.join(choices)}")
    if o.repeats < 0 or not 0 < o.tokens_per_step <= 32:
        raise ValueError(f"repeats={o.repeats} must not be negative, and tokens_per_step={o.tokens_per_step} must lie in (0, 32]")
    o.repeats = o.repeats or (3 if o.quick else 7)
    here, rows, begin = machine(), [], time.perf_counter()
    print(", ".join(f"{key} {value}" for key, value in here.items()), f"({REASON})\n")
    print("| row | what | A / B (quartiles) | A / B, measured | target |\n|---|---|--:|--:|---|", flush=True)
    with tqdm(chosen, unit="row", disable=None, dynamic_ncols=True) as bar:
        for name in bar:
            bar.set_description(name)
            for row in ROWS[name](o):
                rows.append(row)
                tqdm.write(str(row), file=sys.stdout)
                sys.stdout.flush()
    print(f"\n{time.perf_counter() - begin:.0f} seconds" + ", --quick: small shapes and few repeats, not to be quoted" * o.quick)
    print("\n" + __doc__[__doc__.index("FLOPs (") :].strip())
    if o.save:
        text = json.dumps({"machine": here, "options": asdict(o), "rows": [asdict(row) for row in rows]}, indent=1) + "\n"
        write_atomic(Path(o.save), lambda path: path.write_text(text))


if __name__ == "__main__":
    run(main)
