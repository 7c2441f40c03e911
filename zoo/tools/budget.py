"""What a training run will need, before it starts: does it fit into memory, and how fast can the device be?

Everything is computed from shapes: a model on the meta device, and the forward of one layer on fake tensors.
"""

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import zoo
from rcd import CHUNK, Layer, SwiGLU, Transformer
from zoo import checkpoint
from zoo.files import config_from
from zoo.recipes import Trajectories
from zoo.speed import FLEX

if TYPE_CHECKING:
    from zoo.tokenizer import Tokenizer


def shape_of(name: str | Path, tokens: "Tokenizer") -> tuple[Transformer, int]:
    """The model `name`, whose tokenizer is given, on the meta device; and its bytes as stored."""
    folder = zoo.find(name)
    values, found = zoo.read_json(folder / "config.json"), checkpoint.entries(folder)
    stored = sum(map(checkpoint.nbytes, found.values()))
    if values.pop("model_type", "") != "rcd":
        return checkpoint.match(checkpoint.plan_for(folder, tokens), found, str(folder))[0], stored
    with torch.device("meta"):
        return Transformer(config_from(values)), stored


def kept_by_layer(model: Transformer, rows: int, length: int, masked: bool, device: torch.device,
                  dtype: torch.dtype) -> int:  # fmt: skip
    """Bytes that one layer keeps for its backward pass besides its input: what autograd saves of a forward.

    masked: the attention reads a dense mask.
    """
    c, experts, saved = model.config, getattr(model.layers[-1].mlp, "experts", ()), []
    with FakeTensorMode(), torch.device(device):
        layer = Layer(c, 0)
        if len(experts):  # a token meets top_k and the shared one: as much as one SwiGLU of all their widths
            mlp = model.layers[-1].mlp
            shared = [mlp.shared_experts] if hasattr(mlp, "shared_experts") else []
            width = sum(e.gate_proj.out_features for e in (*experts[: mlp.top_k], *shared))
            layer.mlp = SwiGLU(c.d_model, width)
        x = torch.empty(rows, length, c.d_model, requires_grad=True)
        cos = torch.empty(rows, 1, length, (c.rotary_dim or c.head_dim) // 2)
        mask = torch.empty(rows, 1, length, length, dtype=torch.bool) if masked else None
        autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t), autocast:
            layer(x, cos, cos, mask, None)
        matrices = sum(p.numel() for p in layer.parameters() if p.dim() == 2)
        copies = dtype.itemsize * matrices * (dtype != torch.float32)  # autocast's, which memory() counts
        storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in saved}
        given = [t.untyped_storage()._cdata for t in (*layer.parameters(), x, cos, mask) if t is not None]
        return sum(storages.values()) - sum(storages.get(key, 0) for key in given) - copies


def memory(model: Transformer, rows: int, remat: bool, *, length: int, batch_size: int, device: torch.device,
           dtype: torch.dtype, packed: bool = False, ema: bool = False, reference: int = 0, buffer: int = 0,
           window: int = 1, shards: int = 1, adapters: int = 0,
           offload: bool = False, moments: torch.dtype = torch.float32) -> dict[str, int]:  # fmt: skip
    """Bytes that a training step needs at the moment when it needs most, by what needs them.

    model may be on the meta device; rows of the batch_size canvases go through it at once. reference: bytes
    of the frozen one. buffer: batches of trajectories, 0 = none; window: their steps in a training step.
    batch_size: canvases of one process. shards: processes that share the weights and all that belongs to
    them; each gathers two layers, and what is in no layer, in dtype, and adds up gradients in float32.
    offload: what a process holds of these is on the host, and not counted: its rows of what is gathered are.

    Weights and gradients are float32, AdamW's two moments of the dtype `moments`: 16 or 12 bytes a parameter.
    With adapters (LoRA, so many numbers) only theirs are, and the weights stay in dtype. To what is there all
    the time the larger of two peaks is added. At the start of the backward pass all layers keep their
    activations, autocast keeps its copies of the matrices, and the logits of one chunk exist three times:
    they, their softmax, its gradient. The gradient of the head's table is there too, and under --accumulate
    all other gradients. At the end of the backward pass there are all gradients, and what one layer keeps.
    Freed blocks that the C library does not hand back come on top.
    """
    c, parameters = model.config, sum(p.numel() for p in model.parameters())
    matrices = sum(p.numel() for p in model.parameters() if p.dim() == 2)
    tokens = length * (2 if c.block_size else 1)  # [noisy | clean]
    masked = (bool(c.block_size) or packed) and device.type not in FLEX  # flex_attention needs no dense mask
    kept, x = kept_by_layer(model, rows, tokens, masked, device, dtype), 4 * rows * tokens * c.d_model
    chunk = max(1, CHUNK // c.vocab_size)  # rows of logits; a window keeps its logits if they are one chunk
    logits = window * rows * length if rows * length <= chunk else chunk
    state = Trajectories(c, batch_size * buffer, length, "meta", packed).state if buffer else {}
    layer = sum(p.numel() for p in model.layers[-1].parameters())
    rest, own = parameters - c.n_layer * layer, 0 if offload else adapters or -(-parameters // shards)
    brought = -(-(2 * layer + rest) // shards) * offload  # from the host
    copied = dtype != torch.float32 and shards == 1 and not adapters
    always = {
        "weights": 4 * own + dtype.itemsize * parameters * (adapters > 0),
        "AdamW": 2 * moments.itemsize * own,
        "average": 4 * own * ema,
        "gathered": (dtype.itemsize * (2 * layer + rest) + 4 * (layer + rest + brought)) * (shards > 1),
        "reference": -(-reference // shards),
        "trajectories": sum(v.nbytes for v in state.values()),
        "attention mask": masked * rows * tokens**2,
    }
    start = {
        "activations": window * c.n_layer * (x if remat else x + kept),
        f"{str(dtype)[6:]} copies": dtype.itemsize * matrices * copied,
        "logits": 12 * logits * c.vocab_size + 4 * c.vocab_size * c.d_model * (not adapters),
        "gradients": 4 * own * (rows < batch_size),
    }
    end = {"gradients": 4 * own, "activations": x + kept}
    return always | max(start, end, key=lambda peak: sum(peak.values()))


def available(device: torch.device) -> int:
    """Bytes that are free on the device; 0 = unknown."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):  # not Linux: what is built in
        known = hasattr(os, "sysconf")
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if known else 0


def report_memory(need: Callable[[int, bool], dict[str, int]], have: int, batch_size: int, accumulate: int,
                  remat: bool, force: bool = False) -> None:  # fmt: skip
    """Print what need(rows, remat) says, see memory(). If it is more than `have`, warn and name a remedy.

    Raises ValueError if it is more than ten times `have`, which no remedy mends; with force it only warns.
    """

    def total(accumulate: int, remat: bool) -> int:
        return sum(need(-(-batch_size // accumulate), remat).values())

    now, shown = total(accumulate, remat), need(-(-batch_size // accumulate), remat)
    other = f"{size(total(accumulate, not remat))} {'without' if remat else 'with'} --remat"
    print(f"memory: about {size(now)} of {size(have) if have else 'unknown'} free, {other}; "
          f"{', '.join(f'{name} {size(n)}' for name, n in shown.items() if n)}")  # fmt: skip
    if not 0 < have < now:
        return
    if now > 10 * have and not force:
        much = f"{size(now)} is more than ten times the {size(have)} that are free"
        raise ValueError(f"{much}: choose smaller sizes, or --force to go on")
    divisors = [k for k in range(accumulate, batch_size + 1) if not batch_size % k]
    ways = [(k, again) for k in divisors for again in sorted({remat, True})]
    found = next(((k, again) for k, again in ways if total(k, again) <= have), None)
    if found:
        options = ["--remat"] * (found[1] and not remat)
        options += [f"--accumulate={found[0]}"] * (found[0] > accumulate)
        advice = f"{' '.join(options)} needs {size(total(*found))}"
    else:
        least = f"even --remat --accumulate={batch_size} needs {size(total(batch_size, True))}"
        advice = f"{least}: a smaller model, or shorter canvases"
        advice += f", or a smaller --reference than {size(shown['reference'])}" if shown["reference"] else ""
    too_much = f"this will probably run out of memory: {size(now - have)} too much"
    print(f"WARNING: {too_much}; {advice}", file=sys.stderr)


# GiB of memory, less a tenth for what is not counted: the context, buffers of exchanges, fragments.
CARDS = {"RTX4090": 24, "RTX5090": 32, "L40S": 48, "A100": 80, "H100": 80, "H200": 141, "B200": 180}


def cards(text: str) -> tuple[int, int]:
    """H100:8 -> how many cards, and the bytes of one that can be counted on; 24:1 names GiB. ValueError."""
    name, _, count = text.partition(":")
    gib = int(name) if name.isdecimal() else CARDS.get(name, 0)
    if not gib or not (count or "1").isdecimal() or int(count or 1) < 1:
        known = f"of {', '.join(CARDS)}; or GiB, as in 24:1"
        raise ValueError(f"plan={text!r}: give a card and how many, as in H100:8, {known}")
    return int(count or 1), int(0.9 * gib * 2**30)


def plan(need: Callable[..., dict[str, int]], count: int, have: int, batch_size: int) -> list[str]:
    """For every way to train: the fewest pieces of a batch with which it fits into `have` bytes.

    need(rows, remat, shards, rank, offload): see memory(). batch_size: canvases of one of `count` processes.
    """
    lines, pieces = [], [k for k in range(1, batch_size + 1) if not batch_size % k]
    full = [(count, 0, False), (count, 0, True)] if count > 1 else []
    for shards, rank, offload in [(1, 0, False), *full, (1, 16, False)]:
        for remat in (False, True):
            ways = [(k, sum(need(batch_size // k, remat, shards, rank, offload).values())) for k in pieces]
            k, total = next((way for way in ways if way[1] <= have), ways[-1])
            options = [f"--shard={'full' if shards > 1 else 'none'}"] * (count > 1) + ["--offload"] * offload
            options += [f"--lora={rank}"] * (rank > 0) + ["--remat"] * remat + [f"--accumulate={k}"] * (k > 1)
            verdict = "fits" if total <= have else "too much"
            lines.append(f"  {verdict:8}  {size(total):>11}  {' '.join(options) or 'no option'}")
    return lines


def size(n: int) -> str:
    return f"{n / 2**30:.2f} GiB" if n >= 2**30 else f"{n / 2**20:.1f} MiB"


def peak_memory(device: torch.device) -> str:
    """The most memory that this process has taken so far, in words."""
    if device.type == "cuda":
        return f"peak memory {torch.cuda.max_memory_allocated(device) / 2**30:.2f} GiB on the GPU"
    try:
        import resource  # not on Windows
    except ImportError:
        return "peak memory unknown"
    unit = 2**30 if sys.platform == "darwin" else 2**20  # bytes there, KiB on Linux
    return f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit:.2f} GiB"


def matmul_rate(device: torch.device, dtype: torch.dtype, seconds: float = 0.2) -> float:
    """FLOP/s of a square matmul, the best of as many as fit into the time: 100 % of the utilisation."""
    n = 1024 if device.type == "cpu" else 8192
    a = torch.randn(n, n, device=device).to(dtype)
    times, end = [], time.perf_counter() + seconds
    while len(times) < 2 or time.perf_counter() < end:
        begin = time.perf_counter()
        (a @ a)[0, 0].item()  # waits for the device
        times.append(time.perf_counter() - begin)
    return 2 * n**3 / min(times)


def forward_flops(model: Transformer, length: int, predicted: float) -> float:
    """FLOPs of one canvas, forward; backward takes twice as many.

    2 for each token and parameter of a matmul that it meets, and 4 T H K a layer for its attention over all T
    keys. [noisy | clean] doubles the tokens. The head runs on the predicted (masked) tokens only.
    """
    c, met = model.config, 0.0
    for layer in model.layers:
        met += sum(p.numel() for p in layer.parameters() if p.dim() == 2)
        if hasattr(layer.mlp, "experts"):  # a token meets top_k of them
            idle = 1 - layer.mlp.top_k / len(layer.mlp.experts)
            met -= idle * sum(p.numel() for p in layer.mlp.experts.parameters())
    tokens = length * (2 if c.block_size else 1)
    attention = 4 * c.n_layer * c.n_head * c.head_dim * length
    return tokens * (2 * met + attention) + 2 * predicted * c.vocab_size * c.d_model


def training_flops(model: Transformer, reader: Transformer | None, dataset, length: int) -> float:
    """FLOPs of one canvas in training: three forwards, and one of the reader that gives the residual."""
    response = dataset.response("train")
    masks = length * (1.0 if response is None else float(response[:1024].mean())) / 2  # t is 1/2 in the mean
    extra = forward_flops(reader, length, masks) if reader else 0
    return 3 * forward_flops(model, length, masks) + extra
