"""Residual Context Diffusion (RCD), the whole method in one file.

A masked-diffusion language model starts from a canvas of [MASK] tokens. At every denoising step it predicts a distribution p_i for every
masked position i, commits the few it is sure of, and throws the other predictions away. RCD (arXiv 2601.22954) keeps them. Each discarded
distribution becomes a soft embedding, and that is mixed into the [MASK] embedding which the next step reads:

    Delta_i = sum_j p_ij E_j                                            (Eq. 1)  residual: expected input embedding, E is (V, D)
    e_i     = (1 - alpha_i) E[MASK] + alpha_i Delta_i                   (Eq. 2)  at masked positions; plain E[x_i] at all others
    alpha_i = H(p_i) / log V                                            (Eq. 3)  normalised entropy: the less certain, the more residual

Training (Algorithm 1) has two stages. Fine-tune a reference with the plain masked loss and freeze it; then train the target, started from
the same base, on inputs e built from the reference's p. Sampling (Algorithm 2) feeds the target its own p of the step before.

Read from top to bottom:  1 Config   2 Transformer   3 Forward process and masks   4 The residual   5 The loss   6 The sampler

Shapes: B batch, T canvas length, b block length, D width, V vocabulary, H heads, G key-value heads, K head width, N rows that matter (the
masked ones): lm_head, softmax, entropy and p.E never run on any other row.
"""

import functools
import importlib.util
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, and_masks, create_block_mask, flex_attention
from torch.utils.checkpoint import checkpoint

CHUNK = 1 << 25  # elements: float32 temporaries of (N, V) never exceed this many (128 MiB); only the sampler keeps all logits of a step
TILE = 1 << 19  # elements, for each thread of a CPU: float32 temporaries that stay in its cache


def row_chunks(n: int, vocab_size: int) -> Iterator[slice]:
    """Slices that cover range(n) so that rows * vocab_size <= CHUNK; at least one, which may be empty."""
    size = max(1, CHUNK // vocab_size)
    return (slice(i, min(i + size, n)) for i in range(0, max(n, 1), size))


def tiles(logits: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """logits (N, V), and what else has N rows, a few rows at a time, for what runs over them several times in float32, a softmax or an entropy.

    On a CPU a tile stays in the cache (a draw and its entropy, 64 rows of V = 151,936, two threads: 9 ms, 34 ms all at once); elsewhere it is
    a chunk, since kernels cost to launch. Parts by split, whose backward is one concatenation.
    """
    elements = min(CHUNK, TILE * torch.get_num_threads()) if logits.device.type == "cpu" else CHUNK
    size = max(1, elements // logits.shape[1])
    return zip(*(x.split(size) for x in (logits, *others)))


def spare_rows(n: int, device: torch.device) -> int:
    """Rows of zeros that make n a multiple of 64 where it is above 512, on a CPU. Its library compiles a matrix product for every n that it
    meets and keeps it: 1 ms and 1.4 MB each, gigabytes in a run where every step has another number of masks."""
    return -n % 64 if n > 512 and device.type == "cpu" else 0


FLEX = ("cuda",) if importlib.util.find_spec("triton") else ()  # devices where flex_attention is compiled
compiled = functools.cache(torch.compile)  # of a function, at its first use


# ---------------------------------------------------------------------------------------------------------------------------------------
# 1. Config


@dataclass
class Config:
    """Everything that defines a model. The options are those that SDAR, LLaDA, Dream and Fast-dLLM v2 weights need (see zoo/)."""

    vocab_size: int = 64  # V: rows of the embedding table
    n_layer: int = 4
    n_head: int = 4  # H: query heads
    n_kv_head: int = 4  # G: key-value heads, shared by H / G query heads each (grouped-query attention)
    head_dim: int = 32  # K: never derived from d_model / n_head (SDAR-4B has 32 heads of 128 in a width of 2560)
    d_model: int = 128  # D: width of the residual stream
    d_ff: int = 344  # hidden width of the SwiGLU
    max_len: int = 256  # longest canvas in tokens that the model was made for
    block_size: int = 0  # attention: 0 = fully bidirectional (LLaDA), b = block-causal over absolute blocks of b tokens (SDAR)
    mask_id: int = 63  # id of [MASK]; its logit is always -inf, so it is never drawn and never left behind
    eos_ids: tuple[int, ...] = ()  # any of these ends a response at the end of its block
    pad_id: int = 0  # fills what follows an end
    real_vocab: int = 0  # ids from here up are padding rows of the table, never drawn; 0 = vocab_size
    rope_theta: float = 10000.0  # base of the rotary frequencies
    rotary_dim: int = 0  # how many of the K dimensions rotate; 0 = all
    norm_eps: float = 1e-6
    qk_norm: bool = True  # RMSNorm on every query and key head before the rotation (Qwen3, SDAR)
    qkv_bias: bool = False  # (Qwen2.5, Dream, Fast-dLLM v2)
    tied: bool = True  # the head shares the embedding table
    logit_shift: bool = False  # row i - 1 predicts token i (Dream, Fast-dLLM v2: models that were autoregressive)

    def __post_init__(self):
        for f in fields(self):
            value, kind = getattr(self, f.name), {float: (int, float), tuple[int, ...]: (list, tuple)}.get(f.type, f.type)
            if not isinstance(value, kind):
                raise ValueError(f"{f.name}={value!r} is of the wrong kind")
        self.eos_ids = tuple(self.eos_ids)  # JSON has no tuples
        if self.n_kv_head < 1 or self.n_head % self.n_kv_head:
            raise ValueError(f"n_head={self.n_head} must be a multiple of n_kv_head={self.n_kv_head}")
        if not 0 <= self.mask_id < self.vocab_size:
            raise ValueError(f"mask_id={self.mask_id} must be a row of the embedding table: 0 <= mask_id < vocab_size={self.vocab_size}")
        if not 0 <= self.real_vocab <= self.vocab_size:
            raise ValueError(f"real_vocab={self.real_vocab} must not exceed vocab_size={self.vocab_size}")
        if self.eos_ids and self.pad_id == self.mask_id:
            raise ValueError(f"pad_id={self.pad_id} is the mask token: what follows an end would stay masked")
        if self.block_size < 0:
            raise ValueError(f"block_size={self.block_size} must not be negative")
        if self.rotary_dim > self.head_dim or (self.rotary_dim or self.head_dim) % 2:
            raise ValueError(f"rotary_dim={self.rotary_dim} (0: head_dim={self.head_dim}) must be even and fit into the head: RoPE rotates pairs")

    @classmethod
    def from_dict(cls, values: dict) -> "Config":
        """A Config from JSON; an unknown or missing key is an error that names it."""
        names = {f.name for f in fields(cls)}
        for what, wrong in (("unknown", set(values) - names), ("missing", names - set(values))):
            if wrong:
                raise ValueError(f"{what} Config fields: {', '.join(sorted(wrong))}")
        return cls(**values)


# ---------------------------------------------------------------------------------------------------------------------------------------
# 2. Transformer: Llama-style, pre-norm. It takes embeddings, not ids, so that a soft input is nothing special; the head runs on the rows
#    that it is asked for. Parameter names are those of the Qwen checkpoints, so most weights of the zoo load without renaming.


class RMSNorm(nn.RMSNorm):
    """RMSNorm in float32 whatever the input's dtype (half-precision squares overflow and lose the small ones)."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.normalized_shape, self.weight.float(), self.eps).to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE, half-split: pairs are (i, i + R/2) within the first R dimensions. x (B, H, T, K), cos and sin (B, 1, T, R/2) in float32."""
    half = cos.shape[-1]
    a, b, rest = x[..., :half].float(), x[..., half : 2 * half].float(), x[..., 2 * half :]
    return torch.cat([(a * cos - b * sin).to(x.dtype), (b * cos + a * sin).to(x.dtype), rest], dim=-1)  # (B, H, T, K)


class KVCache:
    """Keys (after norm and rotation) and values by absolute position, exact for block-causal attention (for bidirectional see View).

    A forward *overwrites* the positions that it is given, so a block being denoised needs no special case: it is rewritten at every step,
    and for the last time, clean, by the first forward of the next block. Position -1 (padding on the left of a window) is a bin.
    """

    def __init__(self, config: Config, rows: int, length: int, device: torch.device, dtype: torch.dtype):
        shape = (config.n_layer, rows, length + 1, config.n_kv_head, config.head_dim)
        self.k, self.v = torch.zeros(shape, device=device, dtype=dtype), torch.zeros(shape, device=device, dtype=dtype)
        self.rows, self.positions, self.stop = torch.arange(rows, device=device), torch.empty(0), 0  # set by point_at

    def point_at(self, rows: Tensor, positions: Tensor, stop: int) -> None:
        """The next forward writes positions (n, W) of these rows (n,) and reads positions [0, stop)."""
        self.rows, self.positions, self.stop = rows, positions, stop

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write k, v (n, W, G, K); return all keys and values of these rows, each (n, stop, G, K)."""
        out = []
        for store, new in ((self.k[layer], k), (self.v[layer], v)):
            store[self.rows[:, None], self.positions] = new.to(store.dtype)
            out.append((store if len(self.rows) == len(store) else store[self.rows])[:, : self.stop])
        return out[0], out[1]


class Attention(nn.Module):
    def __init__(self, config: Config, layer: int):
        super().__init__()
        self.config, self.layer = config, layer
        heads, kv = config.n_head * config.head_dim, config.n_kv_head * config.head_dim
        self.q_proj = nn.Linear(config.d_model, heads, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.d_model, kv, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.d_model, kv, bias=config.qkv_bias)
        self.o_proj = nn.Linear(heads, config.d_model, bias=False)
        if config.qk_norm:
            self.q_norm, self.k_norm = RMSNorm(config.head_dim, config.norm_eps), RMSNorm(config.head_dim, config.norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | BlockMask | None, cache: KVCache | None) -> Tensor:
        c, (B, T, _) = self.config, x.shape
        q = self.q_proj(x).view(B, T, c.n_head, c.head_dim).transpose(1, 2)  # (B, H, T, K)
        k = self.k_proj(x).view(B, T, c.n_kv_head, c.head_dim).transpose(1, 2)  # (B, G, T, K)
        v = self.v_proj(x).view(B, T, c.n_kv_head, c.head_dim).transpose(1, 2)  # (B, G, T, K)
        if c.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache is not None:
            k, v = cache.update(self.layer, k.transpose(1, 2), v.transpose(1, 2))  # (B, S, G, K)
            k, v = k.transpose(1, 2), v.transpose(1, 2)  # (B, G, S, K)
        k, v, grouped = k.to(q.dtype), v.to(q.dtype), c.n_head != c.n_kv_head
        if isinstance(mask, BlockMask):
            flex = flex_attention if torch.compiler.is_compiling() else compiled(flex_attention)
            y = flex(q, k, v, block_mask=mask, enable_gqa=grouped)  # (B, H, T, K)
        else:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)  # (B, H, T, K)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, c.n_head * c.head_dim))  # (B, T, D)


class SwiGLU(nn.Module):
    def __init__(self, d_model: int, d_ff: int):
        super().__init__()
        self.gate_proj = nn.Linear(d_model, d_ff, bias=False)
        self.up_proj = nn.Linear(d_model, d_ff, bias=False)
        self.down_proj = nn.Linear(d_ff, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, config: Config, index: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.d_model, config.norm_eps)
        self.self_attn = Attention(config, index)
        self.post_attention_layernorm = RMSNorm(config.d_model, config.norm_eps)
        self.mlp = SwiGLU(config.d_model, config.d_ff)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | BlockMask | None, cache: KVCache | None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Transformer(nn.Module):
    """embed() -> forward() -> logits(): ids (B, T) to embeddings (B, T, D) to final hidden states (B, T, D) to logits (N, V)."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.remat = False  # recompute every layer in backward: less memory for a third more compute (activation checkpointing)
        table = torch.empty(config.vocab_size, config.d_model)  # not nn.Embedding(V, D): its own initialisation costs a second on meta
        self.embed_tokens = nn.Embedding.from_pretrained(table, freeze=False)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.n_layer))
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        if not config.tied:
            self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)

    def init_weights(self, generator: torch.Generator | None = None) -> "Transformer":
        """Normal(0, 0.02), the projections that write into the residual stream divided by sqrt(2 n_layer) (GPT-2); norms 1, biases 0."""
        for name, p in self.named_parameters():
            if p.dim() == 2:
                std = 0.02 / math.sqrt(2 * self.config.n_layer) if name.endswith(("o_proj.weight", "down_proj.weight")) else 0.02
                nn.init.normal_(p, std=std, generator=generator)
            else:
                nn.init.constant_(p, float(name.endswith("norm.weight")))
        return self

    @property
    def embedding(self) -> Tensor:
        """E (V, D): the input table, which the residual's expectation runs over."""
        return self.embed_tokens.weight

    @property
    def head(self) -> Tensor:
        return self.embed_tokens.weight if self.config.tied else self.lm_head.weight  # (V, D)

    def embed(self, tokens: Tensor) -> Tensor:
        return self.embed_tokens(tokens)  # (B, T) -> (B, T, D)

    def forward(self, x: Tensor, positions: Tensor, mask: Tensor | BlockMask | None = None, cache: KVCache | None = None) -> Tensor:
        """x (B, T, D), positions (B or 1, T) -> hidden (B, T, D). mask, None = everything sees everything: boolean (B or 1, 1, T, S),
        True = may attend, or flex_attention's."""
        half = (self.config.rotary_dim or self.config.head_dim) // 2
        frequencies = self.config.rope_theta ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)  # (R/2,)
        angles = positions[:, None, :, None].float() * frequencies  # (B, 1, T, R/2)
        cos, sin = angles.cos(), angles.sin()
        for layer in self.layers:
            if self.remat and torch.is_grad_enabled():
                x = checkpoint(layer, x, cos, sin, mask, cache, use_reentrant=False)
            else:
                x = layer(x, cos, sin, mask, cache)
        return self.norm(x)

    def rows(self, hidden: Tensor, where: tuple[Tensor, Tensor]) -> Tensor:
        """The hidden states that predict the tokens at the cells where = (row, column): (N, D). Under logit_shift one column earlier."""
        row, column = where
        return hidden[row, (column - 1).clamp(min=0) if self.config.logit_shift else column]

    def logits(self, rows: Tensor) -> Tensor:
        """rows (N, D) -> logits (N, V); [MASK] and padded rows of the table are -inf: they can be neither drawn nor carried."""
        z = F.linear(F.pad(rows, (0, 0, 0, spare_rows(len(rows), rows.device))), self.head)[: len(rows)]
        z[:, self.config.mask_id] = -math.inf
        if self.config.real_vocab:
            z[:, self.config.real_vocab :] = -math.inf
        return z


# ---------------------------------------------------------------------------------------------------------------------------------------
# 3. Forward process and masks


def mask_tokens(tokens: Tensor, response: Tensor, t: Tensor, noise: Tensor, mask_id: int) -> tuple[Tensor, Tensor]:
    """The forward process q(x_t | x_0): mask each response token on its own with probability t; the prompt is never masked.

    tokens (B, T) ids; response (B, T) bool, True = maskable; t (B, 1) or (B, T) in (0, 1]; noise (B, T) uniform in [0, 1).
    Returns x_t (B, T) and masked (B, T) bool. The same noise at a larger t masks a superset: an earlier state of the same trajectory.
    """
    masked = response & (noise < t)
    return tokens.masked_fill(masked, mask_id), masked


def sample_t(rows: int, generator: torch.Generator | None, device: torch.device | str = "cpu", t_min: float = 1e-3) -> Tensor:
    """t ~ U(t_min, 1), (B, 1), stratified over the batch: each row stays uniform, the batch covers the interval (less variance)."""
    u = torch.rand(1, generator=generator, device=device) + torch.arange(rows, device=device) / rows
    u = u[torch.randperm(rows, generator=generator, device=device)] % 1
    return (t_min + (1 - t_min) * u)[:, None]  # (B, 1)


def document_positions(tokens: Tensor, segments: Tensor | None) -> Tensor:
    """Every token's position in its own document: (1, T), or (B, T) where rows are packed.

    tokens (B, T); segments (B, T), optional: the number of the document that a token belongs to. A document begins wherever it changes.
    """
    column = torch.arange(tokens.shape[1], device=tokens.device)[None]  # (1, T)
    if segments is None:
        return column
    first = torch.ones_like(segments, dtype=torch.bool)
    first[:, 1:] = segments[:, 1:] != segments[:, :-1]
    return column - torch.where(first, column, 0).cummax(dim=1).values  # (B, T)


def noise_levels(tokens: Tensor, segments: Tensor | None, block_size: int, generator: torch.Generator | None) -> Tensor:
    """t of every token (B, T), by `sample_t`: one for every document, or with block_size > 0 one for every block of every document.

    One for every document is what LLaDA (a row is a document) and SDAR (rows are packed) do, one for every block what Fast-dLLM v2 does.
    """
    positions = document_positions(tokens, segments)
    first = positions % block_size == 0 if block_size else positions == 0
    group = first.expand(tokens.shape).flatten().cumsum(0) - 1  # (B * T,) documents, or blocks, numbered through the batch
    return sample_t(int(group[-1]) + 1, generator, tokens.device)[group, 0].view(tokens.shape)  # (B, T)


Sees = Callable[[Tensor, Tensor | None, Tensor, Tensor], Tensor]  # (row, head, query, key), indices that broadcast -> may the query attend


def same_document(segments: Tensor) -> Sees:
    """Packed rows: a token sees its own document. segments (B, S): the document that a token belongs to."""
    return lambda b, h, q, k: segments[b, q] == segments[b, k]


def noisy_clean(positions: Tensor, block_size: int) -> Sees:
    """Attention for training a block-causal model on all its blocks at once (block diffusion, arXiv 2503.09573).

    The input is [noisy | clean], 2T tokens with the positions (B, T) twice. A noisy block sees itself and the *clean* blocks before it; a
    clean block sees clean blocks up to itself; nothing clean sees anything noisy.
    """
    block, T = positions // block_size, positions.shape[1]  # (B, T)

    def sees(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        own, other, q_noisy, k_noisy = block[b, q % T], block[b, k % T], q < T, k < T
        return ((other == own) & (q_noisy == k_noisy)) | ((other < own) & ~k_noisy)

    return sees


def attention_mask(sees: Sees, rows: int, length: int, device: torch.device | str) -> Tensor | BlockMask:
    """Of `length` tokens among themselves. On CUDA for flex_attention, which skips the tiles where nothing is seen (of [noisy | clean] three
    quarters); elsewhere boolean (rows, 1, length, length). rows = 1: all rows of the batch see alike; flex_attention asks `sees` of each."""
    if torch.device(device).type in FLEX:
        return compiled(create_block_mask)(sees, None if rows == 1 else rows, None, length, length, device=device)
    row, at = torch.arange(rows, device=device)[:, None, None, None], torch.arange(length, device=device)
    return sees(row, None, at[:, None], at)


def denoiser_hidden(model: Transformer, x: Tensor, tokens: Tensor, segments: Tensor | None = None) -> Tensor:
    """Hidden states (B, T, D) of the noisy input x (B, T, D), under the model's own attention.

    tokens (B, T) are the clean ids; only a block-causal model reads them (earlier blocks are clean when a block is denoised).
    segments (B, T), optional: document number of every token of a packed row; documents do not see each other, positions restart.
    Padding is one more document: its tokens see themselves, so that no row of the attention is empty.
    """
    (B, T), b, positions = tokens.shape, model.config.block_size, document_positions(tokens, segments)
    sees = [noisy_clean(positions.expand(B, T), b)] if b else []
    if segments is not None:
        sees.append(same_document(segments.repeat(1, 2) if b else segments))
    mask = attention_mask(and_masks(*sees), B if segments is not None else 1, 2 * T if b else T, x.device) if sees else None
    if not b:
        return model(x, positions, mask)
    hidden = model(torch.cat([x, model.embed(tokens)], dim=1), positions.repeat(1, 2), mask)  # (B, 2T, D)
    noisy, clean = hidden.split(T, dim=1)
    if model.config.logit_shift:  # the row before a block's first token is a clean one, as it is in sampling
        last = (positions + 1) % b == 0  # (B or 1, T)
        noisy = torch.where(last[..., None], clean, noisy)
    return noisy


# ---------------------------------------------------------------------------------------------------------------------------------------
# 4. The residual

WEIGHTS = ("entropy", "confidence", "fixed", "one", "1-entropy", "1-confidence", "top-1")
STARTS = ("cold", "warm", "self", "dirichlet")


@dataclass(frozen=True)
class Residual:
    """What is carried from step to step: everything that the paper ablates about it is a choice here."""

    weight: str = "entropy"  # alpha: entropy (Eq. 3) | confidence (max p) | fixed | one | 1-entropy | 1-confidence | top-1 (E[argmax], 1)
    fixed: float = 0.3  # alpha under weight=fixed
    t_res: float = 1.0  # residual temperature T_res: alpha is taken from softmax(logits / T_res); below 1 injects less
    temper_delta: bool = False  # T_res tempers Delta too (Algorithm 2, line 25 does not; section 3.3 can be read either way)
    terms: int = 0  # Delta from so many of the likeliest tokens alone (approximate, quick on a CPU); 0 = the whole vocabulary, exact

    def __post_init__(self):
        if self.weight not in WEIGHTS:
            raise ValueError(f"weight={self.weight!r}: choose from {', '.join(WEIGHTS)}")
        if not 0 < self.t_res < math.inf:
            raise ValueError(f"t_res={self.t_res} must be above 0 and finite")
        if not 0 <= self.fixed <= 1:
            raise ValueError(f"fixed={self.fixed} must lie in [0, 1]")
        if self.terms < 0:
            raise ValueError(f"terms={self.terms} must not be negative")

    @property
    def reads_entropy(self) -> bool:
        """Whether the entropy of softmax(logits) is what alpha is made of, so that a draw which computes it saves the residual work."""
        return self.weight in ("entropy", "1-entropy") and self.t_res == 1

    def __call__(self, logits: Tensor, embedding: Tensor, entropy: Tensor | None = None, grad: bool = False) -> tuple[Tensor, Tensor]:
        """Eq. 1 and 3: logits (N, V), embedding E (V, D) -> alpha (N,) in float32, Delta (N, D) in E's dtype.

        entropy (N,), optional: that of softmax(logits) in nats, from whoever has computed it already. grad lets the gradient through Delta;
        never through alpha (the entropy's is infinite where p = 0).

        The softmax is taken in float32, a chunk of rows at a time, so memory does not grow with N * V. With terms = k, where m is the mass
        of a row's k likeliest tokens, Delta is their expectation alone, sum p_j E_j / m; then |Delta - exact| <= 2 (1 - m) max |E_j|.
        Proof: |sum of the other p_j E_j| <= (1 - m) max |E_j|, and so is (1/m - 1) |sum of the k p_j E_j|, whose weights sum to m.
        """
        V, t, alpha, delta = logits.shape[1], self.t_res if self.temper_delta else 1.0, [], []
        given = [x for x in (logits, entropy) if x is not None]
        with torch.set_grad_enabled(grad):
            for chunk in row_chunks(len(logits), V):
                p = []
                for z, *known in tiles(*(x[chunk] for x in given)):
                    softmax_at = functools.cache(functools.partial(softmax, z))  # z, p in float32 at a temperature: once, and only if read
                    alpha.append(self.weigh(softmax_at, *z.shape, z.device, *known).detach())
                    if self.weight != "top-1" and not 0 < self.terms < V:
                        p.append(softmax_at(t)[1].to(embedding.dtype))
                z = logits[chunk]  # (n, V)
                if self.weight == "top-1":
                    delta.append(embedding[z.argmax(-1)])
                elif 0 < self.terms < V:
                    top, ids = z.topk(self.terms)  # (n, k)
                    delta.append(F.embedding_bag(ids, embedding, per_sample_weights=softmax(top, t)[1].to(embedding.dtype), mode="sum"))
                else:
                    p.append(embedding.new_zeros(spare_rows(len(z), z.device), V))
                    delta.append((torch.cat(p) @ embedding)[: len(z)].to(embedding.dtype))  # Eq. 1
        return torch.cat(alpha), torch.cat(delta)

    def weigh(self, softmax_at: Callable[[float], tuple[Tensor, Tensor]], n: int, V: int, device: torch.device, entropy: Tensor | None = None) -> Tensor:
        """alpha (n,) in float32 of n rows, whose z and p are softmax_at(temperature)."""
        if self.reads_entropy and entropy is not None:
            a = entropy / math.log(V)  # Eq. 3
        elif self.weight in ("entropy", "1-entropy"):
            a = entropy_of(*softmax_at(self.t_res)) / math.log(V)
        elif self.weight in ("confidence", "1-confidence"):
            a = softmax_at(self.t_res)[1].amax(-1)
        else:
            a = torch.full((n,), self.fixed if self.weight == "fixed" else 1.0, device=device)
        return 1 - a if self.weight.startswith("1-") else a


def softmax(logits: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """logits (n, V) -> z = logits / temperature, finite (0 * -inf is no number, and [MASK] has p = 0), and p = softmax(z), in float32."""
    z = (logits.float() if temperature == 1 else logits.float() / temperature).clamp(min=-1e30)
    return z, z.softmax(-1)


def entropy_of(z: Tensor, p: Tensor) -> Tensor:
    """H(p) (n,) in nats of p = softmax(z), both (n, V): log sum exp(z) - sum p z, because a logarithm of every p costs more than all else."""
    log_sum = z.amax(-1) - p.amax(-1).log()  # (n,)
    return (log_sum - (p * z).sum(-1)).clamp(min=0)


def mix(x: Tensor, where: tuple[Tensor, Tensor], alpha: Tensor, delta: Tensor, mask_embedding: Tensor) -> Tensor:
    """Eq. 2: x (B, T, D) with (1 - alpha) E[MASK] + alpha Delta at the N cells where = (row, column). alpha (N,), Delta (N, D)."""
    soft = torch.lerp(mask_embedding.expand_as(delta), delta, alpha[:, None].to(delta.dtype))  # (N, D)
    return x.index_put(where, soft.to(x.dtype))


def residual_of(model: Transformer, x: Tensor, tokens: Tensor, where: tuple[Tensor, Tensor], residual: Residual,
                embedding: Tensor, segments: Tensor | None = None) -> tuple[Tensor, Tensor]:  # fmt: skip
    """alpha (N,) and Delta (N, D) at the cells where, from one no-gradient forward of model on the input x (B, T, D).

    The head and the softmax take a chunk of rows at a time: the model's probabilities never exist for all rows at once.
    """
    with torch.no_grad():
        rows = model.rows(denoiser_hidden(model, x, tokens, segments), where)  # (N, D')
        parts = [residual(model.logits(rows[r]), embedding) for r in row_chunks(len(rows), model.config.vocab_size)]
        return torch.cat([a for a, _ in parts]), torch.cat([d for _, d in parts])


# ---------------------------------------------------------------------------------------------------------------------------------------
# 5. The loss: one function for pre-training, fine-tuning, the reference and the target


class Noised(NamedTuple):
    """One batch under the forward process; what a context function (where the residual comes from) may look at."""

    tokens: Tensor  # (B, T) clean ids
    response: Tensor  # (B, T) bool, maskable
    t: Tensor  # (B, T) noise level, or (B, 1)
    noise: Tensor  # (B, T) uniform draws behind the mask
    x: Tensor  # (B, T) ids with masks
    where: tuple[Tensor, Tensor]  # the N masked cells: (row, column)
    segments: Tensor | None  # (B, T) document numbers of packed rows
    coins: Tensor  # (B, 2) two more uniform draws of every row: how much earlier a residual is, and whether it is absent


Context = Callable[[Transformer, Noised], tuple[Tensor, Tensor]]  # -> alpha (N,), Delta (N, D) for the model's masked cells


def check_reference(model: Transformer, reference: Transformer) -> None:
    """A reference speaks about the model's tokens: p of one meets E of the other. Raises ValueError if it can not."""
    here, there = ((m.config.vocab_size, m.config.mask_id) for m in (model, reference))
    if here != there:
        raise ValueError(f"the reference has another vocabulary: (vocab_size, mask_id) is {there} there, {here} here")


def reference_context(reference: Transformer, residual: Residual) -> Context:
    """Algorithm 1: the frozen reference looks at the *same* x_t; alpha from its entropy, Delta with the *target's* embeddings."""

    def context(model: Transformer, n: Noised) -> tuple[Tensor, Tensor]:
        check_reference(model, reference)
        return residual_of(reference, reference.embed(n.x), n.tokens, n.where, residual, model.embedding, n.segments)

    return context


def earlier_context(residual: Residual) -> Context:
    """Not in the paper: the model's *own* prediction from an *earlier*, more masked state of the same trajectory, as sampling has it.

    One more forward, without gradient. The earlier state lies at a noise level drawn between t and 1 and is read without a residual.
    """

    def context(model: Transformer, n: Noised) -> tuple[Tensor, Tensor]:
        t = n.t + (1 - n.t) * n.coins[:, :1]  # the same noise at a larger t masks a superset
        x, _ = mask_tokens(n.tokens, n.response, t, n.noise, model.config.mask_id)
        return residual_of(model, model.embed(x), n.tokens, n.where, residual, model.embedding, n.segments)

    return context


def sometimes_absent(context: Context, probability: float) -> Context:
    """Not in the paper: a context that is absent from a row with this probability, so that the first pass of a cold start is trained too."""

    def thinned(model: Transformer, n: Noised) -> tuple[Tensor, Tensor]:
        alpha, delta = context(model, n)
        return alpha * (n.coins[n.where[0], 1] >= probability), delta

    return thinned


def maskable(config: Config, tokens: Tensor, response: Tensor | None, segments: Tensor | None) -> Tensor:
    """(B, T) bool: the tokens that the loss counts. response (B, T), None = every token.

    Under logit_shift nothing stands before a document's first token: it has no row to be predicted from, and is always given.
    """
    response = torch.ones_like(tokens, dtype=torch.bool) if response is None else response
    return response & (document_positions(tokens, segments) > 0) if config.logit_shift else response


T_PER = ("document", "block")


def diffusion_loss(model: Transformer, tokens: Tensor, response: Tensor | None = None, segments: Tensor | None = None, *,
                   context: Context | None = None, t: Tensor | None = None, t_per: str = "document",
                   generator: torch.Generator | None = None) -> Tensor:  # fmt: skip
    """The masked-diffusion bound in nats per response token (LLaDA; MDLM): E_t (1/t) sum over masked of -log p(x_0 | x_t).

    tokens (B, T) clean ids; response (B, T) bool, None = every token; segments (B, T), None = every row is one document. context None is
    plain masked training (base, reference, SeqD); reference_context(...) is stage 2 of RCD. t (B, 1) or (B, T), None = drawn per document
    or per block (t_per). The sum is divided by the number of *maskable* tokens, never by the number of masks, which would undo the 1/t and
    is no bound. The head runs on masked rows only, in chunks that backward recomputes.
    Raises ValueError if nothing is maskable, or for a t_per that the model does not have.
    """
    if t_per not in T_PER or (t_per == "block" and not model.config.block_size):
        raise ValueError(f"t_per={t_per!r}: choose from {', '.join(T_PER)}; block needs a block-causal model (block_size > 0)")
    response = maskable(model.config, tokens, response, segments)
    if not bool(response.any()):
        raise ValueError("nothing to learn: no token of this batch belongs to a response")
    if t is None:
        t = noise_levels(tokens, segments, model.config.block_size if t_per == "block" else 0, generator)
    noise = torch.rand(tokens.shape, generator=generator, device=tokens.device)
    x, masked = mask_tokens(tokens, response, t, noise, model.config.mask_id)
    where = masked.nonzero(as_tuple=True)  # the N masked cells
    coins = torch.rand(len(tokens), 2, generator=generator, device=tokens.device)
    n = Noised(tokens, response, t, noise, x, where, segments, coins)

    e = model.embed(x)  # (B, T, D)
    if context is not None:
        alpha, delta = context(model, n)
        e = mix(e, where, alpha, delta, model.embedding[model.config.mask_id])
    rows = model.rows(denoiser_hidden(model, e, tokens, segments), where)  # (N, D)
    (nll,) = row_losses(model, rows, tokens[where])  # (N,)
    weight = 1 / t.expand_as(noise)[where]  # (N,)
    return (weight * nll).sum() / response.sum()


def row_losses(model: Transformer, rows: Tensor, targets: Tensor, read: Callable[[Tensor], tuple[Tensor, ...]] | None = None) -> tuple[Tensor, ...]:
    """-log p(target) of every row, and what else read(logits (n, V)) takes from the same logits: rows (N, D), targets (N,) -> (N,) float32, ...

    More than one chunk is recomputed in backward, which stops before read unless a gradient flows through it.
    """

    def chunk(rows: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        logits = model.logits(rows)  # (n, V)
        nll = [F.cross_entropy(z.float(), t, reduction="none") for z, t in tiles(logits, targets)]
        return torch.cat(nll), *(read(logits) if read else ())

    chunks = list(row_chunks(len(rows), model.config.vocab_size))
    if len(chunks) <= 1:
        return chunk(rows, targets)
    return tuple(torch.cat(parts) for parts in zip(*(checkpoint(chunk, rows[c], targets[c], use_reentrant=False) for c in chunks)))


# ---------------------------------------------------------------------------------------------------------------------------------------
# 6. The sampler

RULES = ("static", "threshold", "random", "left-to-right", "entropy")


@dataclass(frozen=True)
class Sampler:
    """How a canvas is denoised. The commit rule says which masked positions to fix now, the carry what one step hands to the next."""

    rule: str = "static"  # static (top confidences on a step budget) | threshold | random | left-to-right | entropy (entropy-bounded)
    steps: int = 0  # budget of forward passes for a whole response, shared out over its blocks by their masks; 0 = one token a step
    threshold: float = 0.85  # rule=threshold commits every confidence above it, and always the best one
    entropy_bound: float = 0.1  # rule=entropy commits the k surest with H_1 + ... + H_(k-1) <= this many nats (EB-sampler, 2505.24857)
    block_size: int = 0  # decode block by block; 0 = the model's own block, the whole canvas for a bidirectional model
    sub_block: int = 0  # fill each block in parts of so many tokens, left to right; 0 = in one (Fast-dLLM v2: 8 of 32)
    certainty: str = "confidence"  # what rule=static takes most of: confidence | entropy (least of it) | margin (p1 - p2) (Dream's alg)
    carry: str = "residual"  # residual (RCD) | none (SeqD: sequential denoising, discarded predictions are thrown away)
    start: str = "cold"  # a block's first residual: cold (none) | warm (the reference) | self (its own) | dirichlet (random p)
    think: int = 1  # forward passes of start=self: each reads the residual of the one before, none commits
    temperature: float = 0.0  # of the draw; 0 = argmax. Confidence always comes from the untempered, unfiltered distribution
    top_k: int = 0  # draw among the k likeliest tokens; 0 = all
    top_p: float = 1.0  # draw among the likeliest tokens that hold this mass (looked for among the 1,024 likeliest)
    cache: str = "exact"  # a bidirectional model's keys and values: exact (none kept) | prefix | dual (approximate: kept while in a block)
    fixed_shapes: bool = False  # forwards in a few shapes, for CUDA graphs: rows that are done stay, keys are those of the whole canvas
    guidance: float = 0.0  # classifier-free guidance w (LLaDA): logits = u + (w + 1)(c - u), u with the prompt masked; doubles the NFE

    def __post_init__(self):
        for name, value, choices in (("rule", self.rule, RULES), ("start", self.start, STARTS), ("carry", self.carry, ("residual", "none")),
                                     ("certainty", self.certainty, ("confidence", "entropy", "margin")),
                                     ("cache", self.cache, ("exact", "prefix", "dual"))):  # fmt: skip
            if value not in choices:
                raise ValueError(f"{name}={value!r}: choose from {', '.join(choices)}")
        for name in ("steps", "block_size", "sub_block", "top_k", "temperature", "guidance", "entropy_bound"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} must be finite and not negative")
        if self.think < 1:
            raise ValueError(f"think={self.think} must be at least 1; choose start=cold for no pass before the first commit")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must lie in (0, 1]")
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"threshold={self.threshold} must lie in [0, 1]")

    @property
    def by_margin(self) -> bool:
        return self.rule == "static" and self.certainty == "margin"


class Step(NamedTuple):
    """The record of one forward pass; all tensors are (B, T) but nfe (B,), and on the host but alpha, which nobody need wait for."""

    block: int  # which block of every row is being denoised
    tokens: Tensor  # the canvas after this step
    committed: Tensor  # bool: fixed by this step
    confidence: Tensor  # untempered probability of the drawn token where this step looked, else 0
    alpha: Tensor  # weight of the residual that a still masked position hands to the next step, else 0
    nfe: Tensor  # forward passes so far, of every row: a warm start costs one, a self start `think`, guidance doubles


class View:
    """One model's reading of the canvas: what it has cached, and the forward over what it has not. Guidance hides the prompt from it.

    Block-causal models cache exactly. Bidirectional ones read the whole canvas at every step (exact), or do so at the first step of a block
    and keep those keys and values while they denoise it, though they would change (Fast-dLLM, 2505.22618): of all that stands before the
    block (prefix), or of everything but the block (dual). The canvas and where things are on it live on the host.

    fixed: rows and keys are always all there are, and windows a block times a power of two, so that a compiled forward needs few graphs.
    """

    def __init__(self, model: Transformer, canvas: Tensor, lengths: Tensor, block: int, cache: str = "exact", fixed: bool = False,
                 hidden: Tensor | None = None):  # fmt: skip
        self.model, self.canvas, self.lengths, self.block = model, canvas, lengths, block
        self.kind, self.fixed, self.hidden = cache, fixed, hidden
        cached, E = bool(model.config.block_size) or cache != "exact", model.embedding
        self.cache = KVCache(model.config, *canvas.shape, E.device, model.head.dtype) if cached else None
        if fixed and cached and E.device.type == "cuda":  # a CUDA graph may write to tensors that stay where they are
            for store in (self.cache.k, self.cache.v):
                torch._dynamo.mark_static_address(store, guard=False)  # guarded, every new cache would be compiled for anew
        self.begun = torch.full_like(lengths, -1)  # (B,) where the block begins that a row's last forward was for

    def window(self, rows: Tensor, start: Tensor, stop: Tensor) -> tuple[Tensor, Tensor]:
        """What the forward reads of each row (n,), whose block is [start, stop): the positions [oldest, end), each (n,)."""
        own = start - int(self.model.config.logit_shift)  # a shifted model predicts a block's first token from the one before
        if self.model.config.block_size:  # all whose keys are not final: on a block's first forward the block before it, or the prompt
            oldest, end = torch.minimum(own, self.begun[rows]), stop
        else:
            everything = (self.begun[rows] != start) | (self.kind == "exact")
            oldest = own.masked_fill(everything, 0)
            end = stop.masked_fill(everything | (self.kind == "prefix"), self.canvas.shape[1])
        self.begun[rows] = start
        return oldest.clamp(min=0), end

    def logits(self, start: Tensor, stop: Tensor, cells: Tensor, alpha: Tensor, delta: Tensor) -> Tensor:
        """Logits (N, V) at the masked cells (N, 2) = (row, column) of the blocks [start, stop), each (B,), given their residual."""
        model, device = self.model, delta.device
        rows, index = cells[:, 0].unique(return_inverse=True)  # only rows with something to predict take part: (n,), (N,)
        oldest, end = self.window(rows, start[rows], stop[rows])
        if self.fixed:  # the other rows take part with nothing in their windows
            oldest, end = (stop.index_copy(0, rows, x) for x in (oldest, end))
            rows, index = torch.arange(len(self.canvas)), cells[:, 0]
        width = int((end - oldest).max())  # one for all rows, aligned on the right
        if self.fixed and self.cache is not None:  # a power of two of blocks, or all of the canvas; and the token before under logit_shift
            shift, whole = int(model.config.logit_shift), -(-self.canvas.shape[1] // self.block)
            blocks = -(-(width - shift) // self.block)
            width = min(1 << (blocks - 1).bit_length(), whole) * self.block + shift
        positions = end[:, None] - width + torch.arange(width)  # (n, W), before oldest = padding
        at = positions.clamp(min=0)
        tokens = self.canvas[rows[:, None], at]  # (n, W)
        if self.hidden is not None:
            tokens = tokens.masked_fill(self.hidden[rows[:, None], at], model.config.mask_id)
        where = index.to(device), (cells[:, 1] - (end[index] - width)).to(device)  # cells in window coordinates
        x = mix(model.embed(tokens.to(device)), where, alpha, delta, model.embedding[model.config.mask_id])
        if model.config.block_size:  # a query sees the keys [0, reach): those up to the end of its own block ...
            S = self.canvas.shape[1] if self.fixed else int(end.max())
            reach = torch.minimum(end[:, None], (at // self.block + 1) * self.block)  # (n, W)
        else:  # ... or all of the row's own length, none of its padding
            S, reach = self.canvas.shape[1], self.lengths[rows, None]  # (n, 1)
        everything = bool((reach == S).all()) and not (self.fixed and model.config.block_size)
        mask = None if everything else (torch.arange(S, device=device) < reach.to(device)[..., None])[:, None]  # (n, 1, W, S)
        if self.cache is not None:
            self.cache.point_at(rows.to(device), positions.masked_fill(positions < oldest[:, None], -1).to(device), S)
        return model.logits(model.rows(model(x, at.to(device), mask, self.cache), where))


def draw(logits: Tensor, s: Sampler, generator: torch.Generator | None, entropy: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Token, confidence and doubt of every row: logits (N, V) -> three (N,). Only the draw is tempered and filtered.

    Doubt is p2 - p1 for a sampler that ranks by margin, else the entropy in nats if it, or the caller, wants that, else 0.
    """
    V, parts = logits.shape[1], []
    for (tile,) in tiles(logits):
        z, p = softmax(tile)  # (n, V)
        if s.temperature == 0:
            chosen = p.argmax(-1)  # (n,)
        else:
            k = min(s.top_k or V, V, 1024 if s.top_p < 1 else V)
            values, ids = (z / s.temperature).topk(k) if k < V or s.top_p < 1 else (z / s.temperature, None)  # (n, k)
            if s.top_p < 1:
                q = values.softmax(-1)
                values = values.masked_fill(q.cumsum(-1) - q >= s.top_p, -math.inf)  # the likeliest always stays
            race = torch.empty_like(values).exponential_(generator=generator)  # argmax q / Exp(1) is a draw from q
            chosen = (values.softmax(-1) / race).argmax(-1, keepdim=True)
            chosen = (chosen if ids is None else ids.gather(-1, chosen))[:, 0]
        if s.by_margin:
            doubt = p.topk(2).values.diff(dim=-1)[:, 0]
        elif entropy or "entropy" in (s.rule, s.certainty):
            doubt = entropy_of(z, p)
        else:
            doubt = p.new_zeros(len(p))
        parts.append((chosen, p.gather(-1, chosen[:, None])[:, 0], doubt))
    return tuple(torch.cat(x) for x in zip(*parts))


def choose(s: Sampler, cells: Tensor, confidence: Tensor, doubt: Tensor, quota: Tensor, generator: torch.Generator | None) -> Tensor:
    """The commit rule: which of the N masked cells to fix now -> (N,) bool. Every rule is "the k_row best by a score, k_row >= quota".

    cells (N, 2) = (row, column); quota (B,) >= 1: the fewest that keep the row's step budget.
    """
    row, column = cells[:, 0].contiguous(), cells[:, 1]
    static = confidence if s.certainty == "confidence" else -doubt
    score = {"static": static, "threshold": confidence, "entropy": -doubt, "left-to-right": -column.float(),
             "random": torch.rand(len(cells), generator=generator, device=generator.device if generator else None).to(cells.device)
             if s.rule == "random" else confidence}[s.rule]  # fmt: skip
    order = score.argsort(descending=True, stable=True)
    order = order[row[order].argsort(stable=True)]  # row by row, best first
    first = torch.searchsorted(row[order], row)  # where the row of each cell begins in that order
    rank = torch.empty_like(row)
    rank[order] = torch.arange(len(row), device=row.device)
    rank = rank - first  # 0 = the best cell of its row
    accept = rank < quota[row]
    if s.rule == "threshold":
        accept |= confidence > s.threshold
    elif s.rule == "entropy":  # entropies ascend along the order, so sum minus maximum is the sum of those before
        before = torch.zeros_like(doubt)
        total = doubt[order].double().cumsum(0) - doubt[order]
        before[order] = (total - total[first[order]]).float()
        accept |= before <= s.entropy_bound
    return accept


def step_budget(masks: list[int], steps: int) -> list[int]:
    """Share `steps` forwards over blocks with so many masks each: in proportion, at least one each, never more than masks; 0 = one a token.

    Raises ValueError if there are fewer steps than blocks with masks.
    """
    open_blocks = sum(m > 0 for m in masks)
    if steps and steps < open_blocks:
        raise ValueError(f"steps={steps} is fewer than the {open_blocks} blocks or sub-blocks, and each takes one: more steps or larger blocks")
    out, left, steps_left = [], sum(masks), min(steps or sum(masks), sum(masks))
    for m in masks:
        open_blocks -= m > 0
        share = min(max(1, round(steps_left * m / left)), m, steps_left - open_blocks) if m else 0
        out.append(share)
        left, steps_left = left - m, steps_left - share
    return out


@torch.no_grad()
def denoise(model: Transformer, canvas: Tensor, sampler: Sampler = Sampler(), residual: Residual = Residual(), *,
            lengths: Tensor | None = None, reference: Transformer | None = None, generator: torch.Generator | None = None) -> Iterator[Step]:  # fmt: skip
    """Algorithm 2: fill every [MASK] of canvas (B, T), yielding a Step after each forward pass. The only sampling loop of the project.

    lengths (B,): tokens of each row, what follows is padding; None = T. Given tokens may stand anywhere and never change. Rows are
    independent: at temperature 0 a row gets the same tokens in any batch. A row that drew an end token is done at the end of that block (or
    sub-block), the masks after it become pad_id. Raises ValueError for a canvas or a sampler that do not fit the model.
    """
    c, s, device, canvas = model.config, sampler, model.embedding.device, canvas.cpu()  # what lies where is small, and kept on the host
    if canvas.dim() != 2 or not canvas.numel():
        raise ValueError(f"a canvas is (B, T), both at least 1; this one is {tuple(canvas.shape)}")
    if not 0 <= int(canvas.min()) <= int(canvas.max()) < c.vocab_size:
        raise ValueError(f"the ids of a canvas are below {c.vocab_size}; this one has {int(canvas.min())} to {int(canvas.max())}")
    B, T = canvas.shape
    lengths = torch.full((B,), T) if lengths is None else lengths.cpu()
    if bool((lengths > T).any()):
        raise ValueError(f"lengths={lengths.tolist()} exceed the canvas of {T} tokens")
    inside = torch.arange(T) < lengths[:, None]  # (B, T)
    fill = inside & (canvas == c.mask_id)  # (B, T): what is to be filled
    tokens = torch.where(inside, canvas, c.pad_id)
    begin = s.start if s.carry == "residual" else "cold"
    if c.block_size and s.cache != "exact":
        raise ValueError(f"cache={s.cache} is for bidirectional models; a block-causal one has an exact cache, choose cache=exact")
    if begin == "warm" and reference is None:
        raise ValueError("start=warm needs the reference model: give it, or choose start=cold")
    if begin == "warm":
        check_reference(model, reference)
    for m in (model, reference) if begin == "warm" else (model,):
        if T > m.config.max_len:
            raise ValueError(f"a canvas of {T} tokens is longer than the model's max_len={m.config.max_len}")

    # Where each row's blocks lie. Block-causal models count blocks from position 0, given tokens included; others from the first mask.
    b = s.block_size or c.block_size or T
    column = torch.arange(T)
    first = torch.where(fill, column, T).amin(dim=1)  # (B,) first mask, T = nothing to fill
    first = first if s.block_size and not c.block_size else first // b * b
    sub = min(s.sub_block or b, b)
    alone = int(s.sub_block > 0 and c.block_size > 0 and c.logit_shift)  # Fast-dLLM v2: first what the clean block before predicts
    parts, at = -(-b // sub) + alone, column - first[:, None]  # of a block; while one is filled, the masks of later ones wait; (B, T)
    block_of = (at // b * parts + at % b // sub + alone * (at % b > 0)).masked_fill(~fill, -1)  # (B, T): the part that a mask is in
    n_blocks = int(block_of.max()) + 1
    counts = torch.stack([(block_of == j).sum(1) for j in range(n_blocks)], 1).tolist() if n_blocks else [[]] * B  # masks of each block
    budget = torch.tensor([step_budget(masks, s.steps) for masks in counts]).view(B, n_blocks)
    if c.logit_shift and bool(fill[:, 0].any()):
        raise ValueError("this model predicts a token from the position before it: the first token of a canvas must be given")

    main = View(model, tokens, lengths, b, s.cache, s.fixed_shapes)
    hidden = View(model, tokens, lengths, b, s.cache, s.fixed_shapes, hidden=inside & ~fill) if s.guidance else None
    warm = View(reference, tokens, lengths, b, fixed=s.fixed_shapes) if begin == "warm" else None
    nfe, ended = torch.zeros(B, dtype=torch.long), torch.zeros(B, dtype=torch.bool)
    D, E = c.d_model, model.embedding
    known = s.carry == "residual" and residual.reads_entropy and not s.by_margin  # the draw has the entropy that alpha is made of

    def predict(start: Tensor, stop: Tensor, cells: Tensor, alpha: Tensor, delta: Tensor) -> Tensor:
        nfe[cells[:, 0].unique()] += 2 if hidden is not None else 1
        z = main.logits(start, stop, cells, alpha, delta)
        if hidden is not None:
            u = hidden.logits(start, stop, cells, alpha, delta)
            z = (u + (s.guidance + 1) * (z - u)).masked_fill(z == -math.inf, -math.inf)
        return z

    for j in range(n_blocks):
        start = first + j // parts * b  # (B,)
        stop = torch.minimum(start + b, lengths)
        cells = (block_of == j).logical_and(~ended[:, None]).nonzero()  # (N, 2): every masked cell of the active blocks
        steps_left = budget[:, j].clone()  # (B,)
        alpha, delta = torch.zeros(len(cells), device=device), E.new_zeros(len(cells), D)  # cold: alpha = 0 is an ordinary pass
        if begin == "warm" and len(cells):
            nfe[cells[:, 0].unique()] += 1
            none = reference.embedding.new_zeros(len(cells), reference.config.d_model)
            alpha, delta = residual(warm.logits(start, stop, cells, alpha, none), E)
        elif begin == "self" and len(cells):
            for _ in range(s.think):
                alpha, delta = residual(predict(start, stop, cells, alpha, delta), E)
        elif begin == "dirichlet":
            race = torch.empty(len(cells), c.vocab_size, device=device).exponential_(generator=generator)  # normalised: Dirichlet(1, ..., 1)
            race[:, c.mask_id], race[:, c.real_vocab or c.vocab_size :] = 0, 0
            alpha, delta = residual(race.log(), E)

        while len(cells):
            logits = predict(start, stop, cells, alpha, delta)  # (N, V)
            drawn = draw(logits, s, generator, entropy=known)
            token, confidence, doubt = (x.cpu() for x in drawn)  # the only time that the host waits for the device
            masks = torch.zeros_like(nfe).index_add_(0, cells[:, 0], torch.ones_like(cells[:, 0]))  # (B,) still masked
            quota = -(-masks // steps_left.clamp(min=1)) if s.steps else torch.ones_like(masks)
            commit = choose(s, cells, confidence, doubt, quota, generator)
            steps_left -= 1

            row, col = cells[:, 0], cells[:, 1]
            tokens[row[commit], col[commit]] = token[commit]
            committed = torch.zeros_like(fill).index_put_((row, col), commit)
            shown = torch.zeros(B, T).index_put_((row, col), confidence)
            left = (~commit).nonzero()[:, 0]
            cells, left = cells[left], left.to(device)
            alpha, delta = torch.zeros(len(cells), device=device), E.new_zeros(len(cells), D)
            if s.carry == "residual" and len(cells):
                alpha, delta = residual(logits[left], E, drawn[2][left] if known else None)  # only what is still masked will read it
            carried = torch.zeros(B, T, device=device).index_put_(tuple(cells.to(device).T), alpha)
            if not len(cells) and c.eos_ids:  # the block is full: rows that drew an end are done
                ended |= (fill & (block_of == j) & torch.isin(tokens, torch.tensor(c.eos_ids))).any(dim=1)
                tokens[ended[:, None] & fill & (block_of > j)] = c.pad_id
            yield Step(j // parts, tokens.clone(), committed, shown, carried, nfe.clone())


def generate(model: Transformer, prompts: list[list[int]], max_new: int, sampler: Sampler = Sampler(), residual: Residual = Residual(), *,
             reference: Transformer | None = None, generator: torch.Generator | None = None) -> tuple[list[list[int]], list[int]]:  # fmt: skip
    """Continue each prompt (ids, any lengths) by max_new tokens: (responses cut before their first end token, NFE of each row).

    A block-causal model fills whole blocks, so its canvas is rounded up to one. Raises ValueError for a prompt that holds [MASK].
    """
    canvas, lengths = canvas_for(model.config, prompts, max_new, sampler.block_size)
    nfe = torch.zeros(len(prompts), dtype=torch.long)
    final = canvas
    for step in denoise(model, canvas, sampler, residual, lengths=lengths, reference=reference, generator=generator):
        final, nfe = step.tokens, step.nfe
    responses = []
    for row, prompt, length in zip(final.tolist(), prompts, lengths.tolist()):
        response = row[len(prompt) : length]
        ends = [i for i, token in enumerate(response) if token in model.config.eos_ids]
        responses.append(response[: ends[0]] if ends else response)
    return responses, nfe.tolist()


def canvas_for(c: Config, prompts: list[list[int]], max_new: int, block_size: int = 0) -> tuple[Tensor, Tensor]:
    """Right-padded canvas (B, T) of prompt + max_new masks, and lengths (B,), rounded up to whole blocks for a block-causal model."""
    if max_new < 1 or not prompts:
        raise ValueError(f"max_new={max_new} must be at least 1, and so must be the number of prompts ({len(prompts)})")
    if any(c.mask_id in prompt for prompt in prompts):
        raise ValueError("a prompt holds the mask token; to fill masks inside a text call denoise() on the canvas")
    block = (block_size or c.block_size) if c.block_size else 1
    lengths = torch.tensor([-(-(len(prompt) + max_new) // block) * block for prompt in prompts])
    canvas = torch.full((len(prompts), int(lengths.max())), c.mask_id)
    for i, prompt in enumerate(prompts):
        canvas[i, : len(prompt)] = torch.tensor(prompt, dtype=torch.long)
    return canvas, lengths


class Trajectories:
    """Stage 2 on the sampler's own trajectories (not the paper's recipe): no reference, no forward beyond the one that learns.

    Algorithm 1 shows the target a reference's p at the *same* x_t; sampling feeds it its own p, of the step before, which has not seen the
    newest tokens, after residuals of residuals. Here a batch is B trajectories under way. Every training step is one denoising step of
    each: read the canvas with the residual carried so far, take the loss on all that is masked, commit where the sampler would (its own
    commit rule, on a budget drawn per trajectory), and carry the new residual on. Only, what is committed is the true token. A trajectory
    starts cold, so the cold start is trained too; one that is full makes room for a new canvas. A block-causal model denoises all blocks
    side by side; the documents of a packed row are canvases side by side.

    window: that many steps of each trajectory make one training step, and the gradient flows back through Delta within it; 1 = not at all.
    """

    def __init__(self, config: Config, rows: int, length: int, device: torch.device | str = "cpu", packed: bool = False,
                 window: int = 1):  # fmt: skip
        self.window = window
        self.state = {
            "tokens": torch.zeros(rows, length, dtype=torch.long, device=device),  # the truth
            "response": torch.zeros(rows, length, dtype=torch.bool, device=device),
            "masked": torch.zeros(rows, length, dtype=torch.bool, device=device),
            "alpha": torch.zeros(rows, length, device=device),  # the residual that masked positions carry
            "delta": torch.zeros(rows, length, config.d_model, device=device),
            "left": torch.ones(rows, dtype=torch.long, device=device),  # steps until everything is committed
            "threshold": torch.ones(rows, device=device),  # half of the trajectories commit whatever is surer than theirs, too
        }
        if packed:
            self.state["segments"] = torch.zeros(rows, length, dtype=torch.long, device=device)

    def loss(self, model: Transformer, fresh: Callable[[int], tuple[Tensor, Tensor, Tensor | None]], residual: Residual,
             generator: torch.Generator | None) -> Tensor:  # fmt: skip
        """A window of every trajectory; fresh(n) -> tokens, response, segments (n, T) of new canvases (segments None: rows are not packed).

        Nats per token, each state weighted alike.
        """
        loss = sum(self.step(model, fresh, residual, generator) for _ in range(self.window)) / self.window
        self.state["delta"] = self.state["delta"].detach()
        return loss

    def step(self, model: Transformer, fresh: Callable[[int], tuple[Tensor, Tensor, Tensor | None]], residual: Residual,
             generator: torch.Generator | None) -> Tensor:  # fmt: skip
        """One denoising step of every trajectory, and its loss."""
        s, device = self.state, self.state["tokens"].device
        B, T = s["tokens"].shape
        empty = (~s["masked"].any(dim=1)).nonzero()[:, 0]
        if len(empty):
            tokens, response, segments = fresh(len(empty))
            if segments is not None:
                s["segments"][empty] = segments
            s["tokens"] = s["tokens"].index_put((empty,), tokens)  # a copy: backward through a window needs the tokens of the steps before
            s["response"][empty] = maskable(model.config, tokens, response, segments)
            s["masked"][empty], s["alpha"][empty] = s["response"][empty], 0.0

        # Documents and blocks are named by their first cell, counted through the batch: (B, T) each.
        segments, cell = s.get("segments"), torch.arange(B * T, device=device).view(B, T)
        positions = document_positions(s["tokens"], segments)  # (B or 1, T)
        document = cell - positions
        block = cell - positions % model.config.block_size if model.config.block_size else document

        def count(cells: Tensor, group: Tensor) -> Tensor:
            """How many of cells (B, T) each group holds -> (B * T,)."""
            return torch.zeros(B * T, dtype=torch.long, device=device).index_add_(0, group.flatten(), cells.flatten().long())

        if len(empty):
            most = count(s["masked"], block).view(B, T).amax(1)[empty].clamp(min=2)  # of the row's largest block
            u, v, w = torch.rand(3, len(empty), generator=generator, device=device)
            s["left"][empty] = torch.where(u < 0.5, (2 * (most / 2) ** v).round().long(), most)  # log-uniform, 2 steps to one token a step
            s["threshold"][empty] = torch.where(u < 0.5, 1.0, 1 - 0.3 * w**2)  # 0.7 to 1, more of them near 1
        masked, E = s["masked"], model.embedding
        where = masked.nonzero(as_tuple=True)  # N cells
        x = model.embed(s["tokens"].masked_fill(masked, model.config.mask_id))
        x = mix(x, where, s["alpha"][where], s["delta"][where].to(E.dtype), E[model.config.mask_id])
        rows = model.rows(denoiser_hidden(model, x, s["tokens"], segments), where)  # (N, D)

        def read(logits: Tensor) -> tuple[Tensor, ...]:
            """What a denoising step takes from them: alpha and Delta to carry, confidence and entropy to commit by."""
            _, confidence, entropy = draw(logits.detach(), Sampler(), generator, entropy=residual.reads_entropy)
            return *residual(logits, E, entropy if residual.reads_entropy else None, grad=self.window > 1), confidence, entropy

        nll, alpha, delta, confidence, entropy = row_losses(model, rows, s["tokens"][where], read)
        t = count(masked, document) / count(s["response"], document)  # (B * T,) the noise level that each document is at
        loss = (nll / t[document[where]]).sum() / s["response"].sum()

        for name, value in (("alpha", alpha), ("delta", delta)):
            s[name] = s[name].index_put(where, value.to(s[name].dtype))
        with torch.no_grad():
            quota = -(-count(masked, block) // s["left"].repeat_interleave(T))  # a budget for every block of every document
            commit = choose(Sampler(), torch.stack([block[where], where[1]], dim=1), confidence, entropy, quota, generator)
            commit |= confidence > s["threshold"][where[0]]
            s["masked"] = masked.index_put(where, ~commit)
            s["left"] = (s["left"] - 1).clamp(min=1)
        return loss
