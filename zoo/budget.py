"""What a training run will need, before it starts: does it fit into memory, and how fast can the device be?

Everything is computed from shapes: a model on the meta device, one layer's forward on fake tensors. Training keeps float32 weights, which are
their own master copy, and multiplies in --dtype under autocast; so weights, gradients and AdamW's two moments are 16 bytes a parameter.
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
from rcd import CHUNK, FLEX, Config, Layer, SwiGLU, Trajectories, Transformer
from zoo import checkpoint

if TYPE_CHECKING:
    from train import Train
    from zoo.tokenizer import Tokenizer


def shape_of(name: str | Path, tokens: "Tokenizer") -> tuple[Transformer, int]:
    """The model `name`, whose tokenizer is given, without its weights (on the meta device), and the bytes of its tensors as stored."""
    folder = zoo.find(name)
    values, found = zoo.read_json(folder / "config.json"), checkpoint.entries(folder)
    stored = sum(map(checkpoint.nbytes, found.values()))
    if values.pop("model_type", "") != "rcd":
        return checkpoint.match(checkpoint.plan_for(folder, tokens), found, str(folder))[0], stored
    with torch.device("meta"):
        return Transformer(Config.from_dict(values)), stored


def kept_by_layer(model: Transformer, rows: int, length: int, masked: bool, device: torch.device, dtype: torch.dtype) -> int:
    """Bytes that one layer keeps for its backward pass, its input not counted: what autograd saves in a forward on shapes alone."""
    c, experts, saved = model.config, getattr(model.layers[-1].mlp, "experts", ()), []
    with FakeTensorMode(), torch.device(device):
        layer = Layer(c, 0)
        if len(experts):  # a token goes through top_k of the experts and the shared one: as much as one SwiGLU of their widths together
            mlp = model.layers[-1].mlp
            shared = [mlp.shared_experts] if hasattr(mlp, "shared_experts") else []
            layer.mlp = SwiGLU(c.d_model, sum(e.gate_proj.out_features for e in (*experts[: mlp.top_k], *shared)))
        x = torch.empty(rows, length, c.d_model, requires_grad=True)
        cos = torch.empty(rows, 1, length, (c.rotary_dim or c.head_dim) // 2)
        mask = torch.empty(rows, 1, length, length, dtype=torch.bool) if masked else None
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            layer(x, cos, cos, mask, None)
        given = [t for t in (*layer.parameters(), x, cos, mask) if t is not None]
        storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in saved}
        copies = 0 if dtype == torch.float32 else dtype.itemsize * sum(p.numel() for p in layer.parameters() if p.dim() == 2)
        # what was there before is not kept by this layer, and autocast's copies of the weights are counted by memory()
        return sum(storages.values()) - sum(storages.get(t.untyped_storage()._cdata, 0) for t in given) - copies


def memory(model: Transformer, o: "Train", rows: int, remat: bool, length: int, packed: bool, reference: int, own: bool,
           device: torch.device, dtype: torch.dtype) -> dict[str, int]:  # fmt: skip
    """Bytes that a training step of `rows` canvases at once needs, by what needs them, at the moment when they are most. model may be on meta.

    Weights, gradients and AdamW's two moments are float32: 16 bytes a parameter, and the weights are their own master copy. What is there
    all the time meets two heaps, one at the start of the backward pass (everything that the layers keep; autocast's copies of the matrices;
    the logits of one chunk three times: they, their softmax, its gradient; the gradient of the table that they come from) and one at its
    end (all gradients, and what one layer keeps). Under --accumulate gradients are there from the second part on.
    Freed blocks that the C library does not hand back come on top. reference: its bytes; own: training on own trajectories.
    """
    c, parameters, matrices = model.config, sum(p.numel() for p in model.parameters()), sum(p.numel() for p in model.parameters() if p.dim() == 2)
    tokens, masked = length * (2 if c.block_size else 1), bool(c.block_size) or packed  # [noisy | clean]
    window = o.window if own else 1  # so many steps keep their activations, and their logits if those are one chunk
    kept, x = kept_by_layer(model, rows, tokens, masked and device.type not in FLEX, device, dtype), 4 * rows * tokens * c.d_model
    chunk = max(1, CHUNK // c.vocab_size)  # rows
    state = Trajectories(c, o.batch_size * o.pool, length, "meta", packed).state if own else {}
    always = {
        "weights": 4 * parameters, "AdamW": 8 * parameters, "average": 4 * parameters * (o.ema > 0), "reference": reference,
        "trajectories": sum(v.nbytes for v in state.values()),
        "attention mask": masked * rows * tokens**2 * (device.type not in FLEX),  # flex_attention's there has an entry per tile
    }  # fmt: skip
    start = {
        "activations": window * c.n_layer * (x if remat else x + kept), f"{str(dtype)[6:]} copies": dtype.itemsize * matrices * (dtype != torch.float32),
        "logits": 12 * (window * rows * length if rows * length <= chunk else chunk) * c.vocab_size + 4 * c.vocab_size * c.d_model,
        "gradients": 4 * parameters * (rows < o.batch_size),
    }  # fmt: skip
    end = {"gradients": 4 * parameters, "activations": x + kept}
    return always | max(start, end, key=lambda parts: sum(parts.values()))


def available(device: torch.device) -> int:
    """Bytes that are free on the device; 0 = unknown."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        return next(int(line.split()[1]) << 10 for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable"))
    except (OSError, StopIteration):  # not Linux: what is built in
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 0


def report_memory(o: "Train", need: Callable[[int, bool], dict[str, int]], have: int) -> None:
    """Print what need(rows, remat) says, see memory(); if it is more than there is, warn, and name the first remedy that is enough."""

    def total(parts: int, remat: bool) -> int:
        return sum(need(-(-o.batch_size // parts), remat).values())

    now, shown = total(o.accumulate, o.remat), need(-(-o.batch_size // o.accumulate), o.remat)
    print(f"memory: about {size(now)} of {size(have) if have else 'unknown'} free, {size(total(o.accumulate, not o.remat))} "
          f"{'without' if o.remat else 'with'} --remat; {', '.join(f'{name} {size(n)}' for name, n in shown.items() if n)}")  # fmt: skip
    if not 0 < have < now:
        return
    ways = [(k, remat) for k in range(o.accumulate, o.batch_size + 1) if not o.batch_size % k for remat in sorted({o.remat, True})]
    found = next(((k, remat) for k, remat in ways if total(k, remat) <= have), None)
    if found:
        options = ["--remat"] * (found[1] and not o.remat) + [f"--accumulate={found[0]}"] * (found[0] > o.accumulate)
        advice = f"{' '.join(options)} needs {size(total(*found))}"
    else:
        advice = f"even --remat --accumulate={o.batch_size} needs {size(total(o.batch_size, True))}: a smaller model, or shorter canvases"
        advice += f", or a smaller --reference than {size(shown['reference'])}" if shown["reference"] else ""
    print(f"WARNING: this will probably run out of memory: {size(now - have)} too much; {advice}", file=sys.stderr)


def size(n: int) -> str:
    return f"{n / 2**30:.2f} GiB" if n >= 2**30 else f"{n / 2**20:.1f} MiB"


def matmul_rate(device: torch.device, dtype: torch.dtype, seconds: float = 0.2) -> float:
    """FLOP/s of a square matmul here and now, the best of as many as fit: what the utilisation is measured against."""
    n = 1024 if device.type == "cpu" else 8192
    a = torch.randn(n, n, device=device).to(dtype)
    times, end = [], time.perf_counter() + seconds
    while len(times) < 2 or time.perf_counter() < end:
        begin = time.perf_counter()
        (a @ a)[0, 0].item()  # waits for the device
        times.append(time.perf_counter() - begin)
    return 2 * n**3 / min(times)


def forward_flops(model: Transformer, length: int, predicted: float) -> float:
    """FLOPs of one canvas, forward (backward takes twice as many): 2 for every token and matmul parameter that it meets, 4 T H K a layer for
    its attention, counted over all T keys. [noisy | clean] doubles the tokens. The head sees the predicted (masked) tokens alone."""
    c, met = model.config, 0.0
    for layer in model.layers:
        met += sum(p.numel() for p in layer.parameters() if p.dim() == 2)
        if hasattr(layer.mlp, "experts"):  # a token meets top_k of them
            idle = 1 - layer.mlp.top_k / len(layer.mlp.experts)
            met -= idle * sum(p.numel() for p in layer.mlp.experts.parameters())
    tokens = length * (2 if c.block_size else 1)
    return tokens * (2 * met + 4 * c.n_layer * c.n_head * c.head_dim * length) + 2 * predicted * c.vocab_size * c.d_model
