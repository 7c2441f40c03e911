"""The FLOPs and bytes of a step, and what they predict. A multiply-add is two FLOPs.

FLOPs of a forward: 2 tokens x weights of the layers + 4 tokens x keys x layers x heads x head width
+ 2 rows x V x D. The rows are those of the head. The residual adds 2 rows x V x D. A training step is three
forwards; recomputation is not counted. Bytes of a step: each weight once, E (V x D) again for the residual,
the keys and values, the logits (with a residual: and p) written and read. A predicted step takes
    max(bytes / (bandwidth x e_bytes), FLOPs / (rate x e_flops)).
Bandwidth and rate are measured here (a sum, a matrix product). Forwards of 4 and of 512 tokens reach the
shares e_bytes and e_flops of them. The row "check" compares the formula with a step that they do not come
from. On a GPU, bandwidth and rate are its maker's. Both e are this machine's: a guess, with the roofline
(both 1) beside it. Predicted memory: weights, keys and values, rows x V logits, and twice that many float32.
"""

from collections.abc import Iterator

from rcd import Config

# Bytes/s, dense bfloat16 FLOP/s with float32 sums, bytes of memory. Sources: NVIDIA's data sheets of H100
# SXM5 and A100 80GB SXM4, and its Ada whitepaper.
GPUS = {
    "H100": (3.35e12, 989e12, 80e9),
    "A100": (2.039e12, 312e12, 80e9),
    "RTX4090": (1.008e12, 165.2e12, 24e9),
}
SDAR = dict(vocab_size=151936, mask_id=151669, n_kv_head=8, head_dim=128, max_len=32768, block_size=32,
            tied=False)  # fmt: skip
SHAPES = {
    "SDAR-1.7B": Config(**SDAR, n_layer=28, n_head=16, d_model=2048, d_ff=6144),
    "SDAR-4B": Config(**SDAR, n_layer=36, n_head=32, d_model=2560, d_ff=9728),
    "SDAR-8B": Config(**SDAR, n_layer=36, n_head=32, d_model=4096, d_ff=12288),
    "LLaDA-8B": Config(vocab_size=126464, mask_id=126336, n_layer=32, n_head=32, n_kv_head=32, head_dim=128,
                       d_model=4096, d_ff=12288, max_len=4096, qk_norm=False, tied=False),
}  # fmt: skip


def gpt_shape(vocab: int, layers: int, width: int, block_size: int = 0) -> Config:
    """The shape of train.py's base: heads of 64, a tied head."""
    heads, d_ff = width // 64, width * 8 // 3 // 8 * 8
    return Config(vocab_size=vocab, mask_id=vocab - 1, n_layer=layers, n_head=heads, n_kv_head=heads,
                  head_dim=64, d_model=width, d_ff=d_ff, max_len=4096, block_size=block_size)  # fmt: skip


def layer_weights(c: Config) -> int:
    """Elements of the matrices of one layer."""
    return 2 * c.d_model * c.head_dim * (c.n_head + c.n_kv_head) + 3 * c.d_model * c.d_ff


def forward_flops(c: Config, tokens: float, keys: int, rows: float, residual: bool = False) -> float:
    """FLOPs of tokens through the layers, where each sees so many keys, and of the head: (rows, D) x (D, V).
    The residual is (rows, V) x (V, D)."""
    layers = tokens * c.n_layer * (2 * layer_weights(c) + 4 * keys * c.n_head * c.head_dim)
    return layers + (1 + residual) * 2 * rows * c.vocab_size * c.d_model


def step_bytes(c: Config, keys: int, rows: int, residual: bool = False, itemsize: int = 2) -> int:
    """Bytes of memory traffic of a step. A bidirectional model (block_size 0) has no cache to read."""
    cache = 2 * c.n_layer * keys * c.n_kv_head * c.head_dim if c.block_size else 0
    table_and_logits = (1 + residual) * c.vocab_size * (c.d_model + 2 * rows)
    return itemsize * (c.n_layer * layer_weights(c) + table_and_logits + cache)


def step_seconds(c: Config, tokens: float, keys: int, rows: int, residual: bool, bandwidth: float,
                 rate: float, itemsize: int = 2) -> float:  # fmt: skip
    """Seconds of a step that is bound by bandwidth (bytes/s) or by rate (FLOP/s)."""
    moving = step_bytes(c, keys, rows, residual, itemsize) / bandwidth
    return max(moving, forward_flops(c, tokens, keys, rows, residual) / rate)


def predictions(gpu: str, e_bytes: float, e_flops: float,
                tokens_per_step: float) -> Iterator[tuple[str, float, str]]:  # fmt: skip
    """For each of SHAPES in bfloat16 at batch 1: what it is, the time of an RCD step over a SeqD step's, and
    tokens per second and memory as text."""
    bandwidth, rate, room = GPUS[gpu]
    for name, c in SHAPES.items():
        keys = 2048 if c.block_size else 1024
        # A bidirectional step runs the whole canvas. Any other runs its block and, once a block, the block
        # before. At most all of the block is masked.
        tokens, rows = (c.block_size + tokens_per_step, c.block_size) if c.block_size else (keys, 32)
        reached = bandwidth * e_bytes, rate * e_flops
        rcd, seqd = (step_seconds(c, tokens, keys, rows, residual, *reached) for residual in (True, False))
        best = tokens_per_step / step_seconds(c, tokens, keys, rows, True, bandwidth, rate)
        # With the residual's bytes all weights are counted: E is among them.
        held = step_bytes(c, keys, 0, residual=True) + rows * c.vocab_size * (2 + 8)
        case = f"{keys:,} tokens, batch 1, {tokens_per_step:g} tokens a step"
        what = f"PREDICTION, not measured: RCD / SeqD, {name} on an {gpu}, {case}"
        per_second = f"{tokens_per_step / rcd:,.0f} tokens/s (roofline {best:,.0f})"
        yield what, rcd / seqd, f"{per_second}, {held / 1e9:.1f} of {room / 1e9:.0f} GB"
