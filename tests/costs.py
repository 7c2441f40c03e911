"""FLOPs (2 a multiply-add) of a forward: 2 tokens x weights of the layers + 4 tokens x keys x layers x heads x head width + 2 rows x V x D, where
rows are those of the head; the residual adds 2 rows x V x D; a training step is three forwards, recomputation not counted. Bytes of a step:
every weight once, E (V x D) again for the residual, the keys and values, logits (with a residual: and p) written and read. A predicted step takes
    max(bytes / (bandwidth x e_bytes), FLOPs / (rate x e_flops)).
Here bandwidth and rate are measured (a sum, a matrix product), and e_bytes and e_flops are what forwards of 4 and of 512 tokens reach of them;
"check" is the formula on a step that they do not come from. On a GPU bandwidth and rate are its maker's, but both e are this machine's: a guess,
with the roofline (both 1) beside it. Predicted memory: weights, keys and values, rows x V logits and twice that many float32.
"""

from collections.abc import Iterator

from rcd import Config

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


def gpt_shape(vocab: int, layers: int, width: int, block_size: int = 0) -> Config:
    """The shape of train.py's base: heads of 64, a tied head."""
    return Config(vocab_size=vocab, mask_id=vocab - 1, n_layer=layers, n_head=width // 64, n_kv_head=width // 64, head_dim=64, d_model=width,
                  d_ff=width * 8 // 3 // 8 * 8, max_len=4096, block_size=block_size)  # fmt: skip


def layer_weights(c: Config) -> int:
    """Elements of the matrices of one layer."""
    return 2 * c.d_model * c.head_dim * (c.n_head + c.n_kv_head) + 3 * c.d_model * c.d_ff


def forward_flops(c: Config, tokens: float, keys: int, rows: float, residual: bool = False) -> float:
    """tokens through the layers, each of which sees so many keys, and (rows, D) x (D, V) of the head; the residual is (rows, V) x (V, D)."""
    layers = tokens * c.n_layer * (2 * layer_weights(c) + 4 * keys * c.n_head * c.head_dim)
    return layers + (1 + residual) * 2 * rows * c.vocab_size * c.d_model


def step_bytes(c: Config, keys: int, rows: int, residual: bool = False, itemsize: int = 2) -> int:
    """Bytes of memory traffic; a bidirectional model (block_size 0) has no keys and values to read."""
    cache = 2 * c.n_layer * keys * c.n_kv_head * c.head_dim if c.block_size else 0
    return itemsize * (c.n_layer * layer_weights(c) + (1 + residual) * c.vocab_size * (c.d_model + 2 * rows) + cache)


def step_seconds(c: Config, tokens: float, keys: int, rows: int, residual: bool, bandwidth: float, rate: float, itemsize: int = 2) -> float:
    return max(step_bytes(c, keys, rows, residual, itemsize) / bandwidth, forward_flops(c, tokens, keys, rows, residual) / rate)


def predictions(gpu: str, e_bytes: float, e_flops: float, tokens_per_step: float) -> Iterator[tuple[str, float, str]]:
    """For each of SHAPES in bfloat16 at batch 1: what it is, the seconds of an RCD step over a SeqD step, tokens per second and memory."""
    bandwidth, rate, room = GPUS[gpu]
    for name, c in SHAPES.items():
        keys = 2048 if c.block_size else 1024
        # A bidirectional step runs the whole canvas, any other its block and, once a block, the one before it. All of the block is masked, at most.
        tokens, rows = (c.block_size + tokens_per_step, c.block_size) if c.block_size else (keys, 32)
        rcd, seqd = (step_seconds(c, tokens, keys, rows, residual, bandwidth * e_bytes, rate * e_flops) for residual in (True, False))
        best = tokens_per_step / step_seconds(c, tokens, keys, rows, True, bandwidth, rate)
        held = step_bytes(c, keys, 0, residual=True) + rows * c.vocab_size * (2 + 8)  # all weights: the residual's bytes have E among them
        what = f"PREDICTION, not measured: RCD / SeqD, {name} on an {gpu}, {keys:,} tokens, batch 1, {tokens_per_step:g} tokens a step"
        yield what, rcd / seqd, f"{tokens_per_step / rcd:,.0f} tokens/s (roofline {best:,.0f}), {held / 1e9:.1f} of {room / 1e9:.0f} GB"
