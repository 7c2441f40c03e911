"""Residual Context Diffusion (RCD), the whole method in one file.

A masked-diffusion language model starts from a canvas of [MASK] tokens. At every step it predicts a
distribution p_i for each masked position i, commits the few it is sure of, and throws the other predictions
away. RCD (arXiv 2601.22954) keeps them: each becomes a soft embedding, mixed into the [MASK] embedding that
the next step reads.

    Delta_i = sum_j p_ij E_j                            (Eq. 1)  in Residual; E (V, D): the input embedding
    e_i     = (1 - alpha_i) E[MASK] + alpha_i Delta_i   (Eq. 2)  in mix, at masked positions; else E[x_i]
    alpha_i = H(p_i) / log V                            (Eq. 3)  in WEIGHTS; the less sure, the more residual

Training (Algorithm 1, diffusion_loss). Stage 1: a reference is fine-tuned with the plain masked loss and
frozen. Stage 2: the target, from the same base, learns on e built from the reference's p (reference_context).
Sampling (Algorithm 2, denoise) feeds it its own p of the step before; trajectory_step trains it on that.

Four things are made to be replaced: a weight (WEIGHTS: p -> alpha), a carry (Residual: logits -> what the
next step reads), a commit rule (RULES: which cells to fix now) and a Reader (canvas -> logits).

Shapes: B batch, T canvas (prompt and masks), b block, D width, V vocabulary, H heads, G key-value heads, K
head width, S keys, W positions read, N masked cells, n some of B or N. Only the N cells get logits and p.E.
"""
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torch.utils.checkpoint import checkpoint

CHUNK = 1 << 25  # elements: no float32 temporary of shape (n, V) is larger (128 MiB)
TILE = 1 << 19  # elements per thread: on a CPU a softmax of tiles this small stays in the cache

def by_rows(f: Callable[..., tuple], rows: int, *tensors: Tensor) -> tuple[Tensor, ...]:
    """f on at most `rows` of the N rows of the tensors at a time, results joined: temporaries stay small."""
    results = [f(*chunk) for chunk in zip(*(x.split(max(1, rows)) for x in tensors))]
    return results[0] if len(results) == 1 else tuple(map(torch.cat, zip(*results)))

def tile(logits: Tensor) -> int:
    """Rows of logits (N, V) that a softmax in float32 takes at a time."""
    return max(1, min(CHUNK, TILE * torch.get_num_threads() if logits.is_cpu else CHUNK) // logits.shape[1])

def padded(product: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """product(x). On a CPU the rows of x are padded to a multiple of 64: oneDNN keeps a kernel per number."""
    padding = -len(x) % 64 if len(x) > 512 and x.is_cpu else 0
    return product(F.pad(x, (0, 0, 0, padding)))[: len(x)] if padding else product(x)

def check(holds: bool, message: str) -> None:  # raises ValueError(message) if it does not hold
    if not holds:
        raise ValueError(message)

# ---- 1. Config ---------------------------------------------------------------------------------------------
@dataclass
class Config:
    """The shape of a model, with the options that SDAR, LLaDA, Dream and Fast-dLLM v2 weights need (zoo/)."""
    vocab_size: int = 64  # V: rows of the embedding table
    n_layer: int = 4
    n_head: int = 4  # H: query heads
    n_kv_head: int = 4  # G: key-value heads, each shared by H / G query heads (grouped-query attention)
    head_dim: int = 32  # K: not d_model / n_head (SDAR-4B has 32 heads of 128 in a width of 2560)
    d_model: int = 128  # D
    d_ff: int = 344  # hidden width of the SwiGLU
    max_len: int = 256  # longest canvas in tokens
    block_size: int = 0  # 0 = bidirectional attention (LLaDA); b = block-causal, blocks of b tokens (SDAR)
    mask_id: int = 63  # id of [MASK]; its logit is always -inf
    eos_ids: tuple[int, ...] = ()  # each of these ends a response at the end of its block
    pad_id: int = 0  # fills what follows an end
    real_vocab: int = 0  # ids from here up are padding rows of the table and never drawn; 0 = vocab_size
    rope_theta: float = 10000.0  # base of the rotary frequencies
    rotary_dim: int = 0  # R: how many of the K dimensions rotate; 0 = all
    norm_eps: float = 1e-6
    qk_norm: bool = True  # RMSNorm on each query and key head before the rotation (Qwen3, SDAR)
    qkv_bias: bool = False  # (Qwen2.5, Dream, Fast-dLLM v2)
    tied: bool = True  # the head shares the embedding table
    logit_shift: bool = False  # position i - 1 predicts token i (Dream, Fast-dLLM v2: once autoregressive)
    def __post_init__(self):
        self.eos_ids, H, G = tuple(self.eos_ids), self.n_head, self.n_kv_head  # JSON has no tuples
        check(0 <= self.mask_id < self.vocab_size, f"mask_id={self.mask_id} is no id below {self.vocab_size}")
        check(G > 0 and H % G == 0, f"n_head={H} must be a multiple of n_kv_head={G}")

# ---- 2. Transformer ----------------------------------------------------------------------------------------
# Pre-norm, as in Llama. It reads embeddings, not ids: a soft input is no special case. Names are Qwen's.

class RMSNorm(nn.RMSNorm):
    """RMSNorm in float32 for every input dtype: squares of half-precision numbers overflow."""
    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.normalized_shape, self.weight.float(), self.eps).to(x.dtype)

def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE: dimensions i and i + R/2 form a pair. x (B, H, T, K); cos, sin (B, 1, T, R/2) in float32."""
    half = cos.shape[-1]
    a, b, rest = x[..., :half].float(), x[..., half : 2 * half].float(), x[..., 2 * half :]
    return torch.cat([(a * cos - b * sin).to(x.dtype), (b * cos + a * sin).to(x.dtype), rest], dim=-1)

class KVCache:
    """Keys and values by position. Exact if block-causal: a finished block sees no later one, so its keys are
    final. The open block is written at every step, and once more, free of masks, at the next one's first."""
    def __init__(self, c: Config, B: int, T: int, like: Tensor):  # column T, index -1, takes the padding
        self.k, self.v = (like.new_zeros(c.n_layer, B, T + 1, c.n_kv_head, c.head_dim) for _ in range(2))
    def at(self, rows: Tensor, positions: Tensor, stop: int) -> None:
        """The next forward writes positions (n, W), -1 = padding, of rows (n,) and gets keys [0, stop)."""
        self.rows, self.positions, self.stop = rows.to(self.k.device), positions.to(self.k.device), stop
    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write k, v (n, G, W, K); return all keys and values of these rows, each (n, G, stop, K)."""
        for store, new in ((self.k[layer], k), (self.v[layer], v)):  # (B, T + 1, G, K)
            store[self.rows[:, None], self.positions] = new.transpose(1, 2).to(store.dtype)  # the only write
        rows = slice(None) if len(self.rows) == self.k.shape[1] else self.rows  # no copy if it is all of them
        return tuple(x[layer][rows][:, : self.stop].transpose(1, 2).to(k.dtype) for x in (self.k, self.v))

class Attention(nn.Module):
    """Grouped-query attention. mask (B or 1, 1, T, S): True = may attend; None = everything is seen; or a
    function (q, k, v) -> y that attends by itself (zoo/speed.py: flex_attention)."""
    def __init__(self, c: Config, layer: int):
        super().__init__()
        self.config, self.layer, heads, kv_heads = c, layer, c.n_head * c.head_dim, c.n_kv_head * c.head_dim
        self.q_proj = nn.Linear(c.d_model, heads, bias=c.qkv_bias)
        self.k_proj, self.v_proj = (nn.Linear(c.d_model, kv_heads, bias=c.qkv_bias) for _ in range(2))
        self.o_proj = nn.Linear(heads, c.d_model, bias=False)
        self.grouped = c.n_head != c.n_kv_head  # a bool here: torch.compile of 2.6 takes no comparison there
        if c.qk_norm:
            self.q_norm, self.k_norm = RMSNorm(c.head_dim, c.norm_eps), RMSNorm(c.head_dim, c.norm_eps)
    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask, cache: KVCache | None) -> Tensor:
        c, (B, T, _) = self.config, x.shape
        q, k, v = (proj(x).view(B, T, -1, c.head_dim) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H, T, K), (B, G, T, K) twice
        if c.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache is not None:
            k, v = cache.update(self.layer, k, v)  # (B, G, T, K) -> (B, G, S, K)
        y = mask(q, k, v) if callable(mask) else F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, enable_gqa=self.grouped)  # (B, H, T, K)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))  # (B, T, D)

class SwiGLU(nn.Module):  # (..., D) -> (..., D)
    def __init__(self, d_model: int, d_ff: int):
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(d_model, d_ff, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(d_ff, d_model, bias=False)
    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))

class Layer(nn.Module):  # attention, then SwiGLU, each added to x (B, T, D)
    def __init__(self, c: Config, index: int):
        super().__init__()
        self.input_layernorm = RMSNorm(c.d_model, c.norm_eps)
        self.self_attn = Attention(c, index)
        self.post_attention_layernorm = RMSNorm(c.d_model, c.norm_eps)
        self.mlp = SwiGLU(c.d_model, c.d_ff)
    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask, cache: KVCache | None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask, cache)
        return x + self.mlp(self.post_attention_layernorm(x))

class Transformer(nn.Module):
    """Embeddings (B, T, D) -> hidden states (B, T, D) -> logits (N, V) at the cells asked for."""
    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.attention_mask = attention_mask  # builds training masks; zoo/speed.py has another one for CUDA
        table = torch.empty(config.vocab_size, config.d_model)  # unset: init_weights or a checkpoint fills it
        self.embed_tokens = nn.Embedding.from_pretrained(table, freeze=False)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.n_layer))
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        if not config.tied:
            self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
    embedding = property(lambda self: self.embed_tokens.weight)  # E (V, D), the table of Eq. 1
    head = property(lambda self: self.embedding if self.config.tied else self.lm_head.weight)  # (V, D)
    def forward(self, x: Tensor, positions: Tensor, mask=None, cache: KVCache | None = None) -> Tensor:
        """Embeddings x (B, T, D) at positions (B or 1, T) -> hidden states (B, T, D); mask: see Attention."""
        half = (self.config.rotary_dim or self.config.head_dim) // 2  # R/2
        exponents = -torch.arange(half, device=x.device, dtype=torch.float32) / half  # (R/2,)
        angles = positions[:, None, :, None].float() * self.config.rope_theta**exponents  # (B, 1, T, R/2)
        cos, sin = angles.cos(), angles.sin()
        for layer in self.layers:
            x = layer(x, cos, sin, mask, cache)
        return self.norm(x)
    def predicting(self, hidden: Tensor, cells: tuple[Tensor, Tensor]) -> Tensor:
        """The hidden states (N, D) that predict the cells: under logit_shift those one column earlier."""
        row, column = cells
        return hidden[row, (column - 1).clamp(min=0) if self.config.logit_shift else column]
    def logits(self, hidden: Tensor) -> Tensor:
        """hidden (N, D) -> logits (N, V): -inf for [MASK] and padding, which nothing may draw or carry."""
        z = padded(lambda x: F.linear(x, self.head), hidden)  # no view of the table: autocast keeps its copy
        z[:, self.config.mask_id] = -math.inf
        if self.config.real_vocab:  # even an empty write makes backward copy the gradient
            z[:, self.config.real_vocab :] = -math.inf
        return z

# ---- 3. Forward process and training masks -----------------------------------------------------------------
# Rows may be packed with documents: positions (B, T) restart at 0 with each. None: one document a row.

def mask_tokens(tokens: Tensor, response: Tensor, t: Tensor, noise: Tensor, mask_id: int):
    """q(x_t | x_0): a response token is masked with probability t, the prompt never. -> x_t, masked (B, T).
    tokens, response (B, T); t (B, 1) or (B, T) in (0, 1]; noise (B, T) uniform: a larger t masks more."""
    masked = response & (noise < t)
    return tokens.masked_fill(masked, mask_id), masked

def sample_t(rows: int, generator: Generator | None, device: torch.device | str = "cpu") -> Tensor:
    """t ~ U(0.001, 1), (B, 1), stratified: each row is uniform, and a batch covers the interval evenly."""
    u = torch.rand(1, generator=generator, device=device) + torch.arange(rows, device=device) / rows
    u = u[torch.randperm(rows, generator=generator, device=device)] % 1
    return (1e-3 + (1 - 1e-3) * u)[:, None]

def maskable(c: Config, response: Tensor, positions: Tensor | None = None) -> Tensor:
    """The response tokens (B, T) that can be predicted: under logit_shift not a document's first."""
    column = torch.arange(response.shape[1], device=response.device) if positions is None else positions
    return response & (column > 0) if c.logit_shift else response

def training_mask(positions: Tensor, b: int) -> Callable[..., Tensor]:
    """Which tokens attend to which, as a function (row, head, query, key) -> bool. A token sees its own
    document. If b > 0 the input is [noisy | clean], 2T tokens, which trains all blocks at once (arXiv
    2503.09573): a block sees itself in its own half, and the clean blocks before it."""
    T, document, block = positions.shape[1], (positions == 0).cumsum(1), positions // max(1, b)  # (B, T)
    def may_attend(row: Tensor, head: Tensor | None, q: Tensor, k: Tensor) -> Tensor:
        q_block, k_block, same_half = block[row, q % T], block[row, k % T], (q < T) == (k < T)
        in_reach = ((q_block == k_block) & same_half) | ((k_block < q_block) & (k >= T))
        same_document = document[row, q % T] == document[row, k % T]
        return same_document & in_reach if b else same_document
    return may_attend

def attention_mask(may_attend: Callable, rows: int, length: int, device: torch.device) -> Tensor:
    """may_attend as a tensor (rows, 1, length, length); rows = 1 if the rows of a batch are alike."""
    row, at = torch.arange(rows, device=device)[:, None, None, None], torch.arange(length, device=device)
    return may_attend(row, None, at[:, None], at)

def denoiser_hidden(model: Transformer, x: Tensor, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
    """Hidden states (B, T, D) of the noisy input x (B, T, D), under the model's own attention. tokens (B, T)
    are the clean ids: a block-causal model reads them as the finished blocks before each block."""
    (B, T), b, packed = tokens.shape, model.config.block_size, positions is not None
    at = positions if packed else torch.arange(T, device=x.device)[None]  # (B or 1, T)
    mask = None if not (b or packed) else model.attention_mask(
        training_mask(at.expand(B, T), b), B if packed else 1, 2 * T if b else T, x.device)
    if not b:
        return model(x, at, mask)
    hidden = model(torch.cat([x, model.embed_tokens(tokens)], dim=1), at.repeat(1, 2), mask)  # (B, 2T, D)
    noisy, clean = hidden.split(T, dim=1)
    if model.config.logit_shift:  # a block's first token is predicted from a clean position, as in sampling
        noisy = torch.where(((at + 1) % b == 0)[..., None], clean, noisy)
    return noisy

# ---- 4. The residual ---------------------------------------------------------------------------------------
def softmax(logits: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """logits (n, V) -> z = logits / temperature, p = softmax(z), float32. z is finite: 0 * -inf is NaN."""
    z = (logits.float() if temperature == 1 else logits.float() / temperature).clamp(min=-1e30)
    return z, z.softmax(-1)

def entropy_of(z: Tensor, p: Tensor) -> Tensor:
    """z and p = softmax(z) (n, V) -> H (n,) in nats: -sum p log p = log sum exp(z) - sum p z."""
    log_sum_exp = z.amax(-1) - p.amax(-1).log()  # log p = z - log sum exp(z), here of the likeliest token
    return (log_sum_exp - (p * z).sum(-1)).clamp(min=0)

# The weights: alpha (n,) from z = logits / T_res and p = softmax(z), both (n, V). zoo/decoding.py has more.
WEIGHTS: dict[str, Callable[[Tensor, Tensor, "Residual"], Tensor]] = {
    "entropy": lambda z, p, r: entropy_of(z, p) / math.log(p.shape[1]),  # Eq. 3
    "confidence": lambda z, p, r: p.amax(-1),
    "fixed": lambda z, p, r: z.new_full((len(z),), r.fixed),
}

@dataclass(frozen=True)
class Residual:
    """The carry of RCD: logits -> alpha and Delta, which the next step mixes into its masked inputs."""
    weight: str = "entropy"  # alpha: entropy (Eq. 3) | confidence (max p) | fixed
    fixed: float = 0.3  # alpha of weight=fixed
    t_res: float = 1.0  # residual temperature, of alpha alone: Delta is untempered. Algorithm 1 has 1
    weights = WEIGHTS  # no annotation: not a field
    def __post_init__(self):
        check(self.weight in self.weights, f"weight={self.weight!r}: choose from {', '.join(self.weights)}")
        check(0 < self.t_res < math.inf, f"t_res={self.t_res} must be above 0 and finite")
        check(0 <= self.fixed <= 1, f"fixed={self.fixed} must lie in [0, 1]")
    def __call__(self, logits: Tensor, E: Tensor, grad: bool = False) -> tuple[Tensor, Tensor]:
        """Eq. 3 and 1: logits (N, V), E (V, D) -> alpha (N,) in float32, Delta (N, D) in E's dtype. grad: let
        the gradient through Delta. Alpha passes no gradient: the entropy's is infinite at p = 0."""
        dtype = F.linear(E[:0], E[:0]).dtype  # p is cast to what p @ E is computed in: E's, or autocast's
        def chunk(logits: Tensor) -> tuple[Tensor, Tensor]:  # (n, V)
            p, alpha = torch.empty_like(logits, dtype=dtype), torch.empty(len(logits), device=logits.device)
            rows = max(1, len(logits)) if grad else tile(logits)  # autograd would copy p for every tile
            for i in range(0, len(logits), rows):  # in place: joining tiles would copy p once more
                alpha[i : i + rows], p[i : i + rows] = self.alpha_and_p(logits[i : i + rows])
            return alpha, padded(lambda x: x @ E, p).to(E.dtype)  # Eq. 1: p·E, soft embeddings (n, D)
        with torch.set_grad_enabled(grad):
            return by_rows(chunk, CHUNK // logits.shape[1], logits)
    def alpha_and_p(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """logits (n, V) -> alpha (n,), tempered by T_res, and the p (n, V) of Eq. 1, untempered. float32."""
        z, p = softmax(logits, self.t_res)
        return WEIGHTS[self.weight](z, p, self).detach(), p if self.t_res == 1 else softmax(logits)[1]

def mix(x: Tensor, cells: tuple[Tensor, Tensor], alpha: Tensor, delta: Tensor, mask_embedding: Tensor):
    """Eq. 2, (1 - alpha) E[MASK] + alpha Delta, at the cells of x (B, T, D). alpha (N,), delta (N, D)."""
    soft = torch.lerp(mask_embedding.expand_as(delta), delta, alpha[:, None].to(delta.dtype))  # (N, D)
    return x.index_put(cells, soft.to(x.dtype))

# ---- 5. The loss: one function for pre-training, fine-tuning, the reference and the target -----------------
class Noised(NamedTuple):
    """A batch under the forward process, as a context sees it."""
    tokens: Tensor  # (B, T) clean ids
    response: Tensor  # (B, T) bool: may be masked
    positions: Tensor | None  # (B, T) of packed rows
    t: Tensor  # (B, T) or (B, 1) noise level
    noise: Tensor  # (B, T) uniform draws behind the mask
    x: Tensor  # (B, T) ids with masks
    cells: tuple[Tensor, Tensor]  # row and column of the N masked cells, (N,) each
    uniform: Tensor  # (B, 2) draws: how much earlier; whether a residual is absent (zoo/recipes.py)

# Gives diffusion_loss alpha (N,) and Delta (N, D). train.py's default needs none: it is trajectory_step.
Context = Callable[[Transformer, Noised], tuple[Tensor, Tensor]]

def reference_context(reference: Transformer, residual: Residual) -> Context:
    """Algorithm 1, stage 2: the frozen reference reads the same x_t, and Delta is made of the target's E."""
    def context(target: Transformer, n: Noised) -> tuple[Tensor, Tensor]:
        check_reference(target, reference)
        return residual_of(reference, n.x, n, residual, target.embedding)
    return context

def residual_of(model: Transformer, x: Tensor, n: Noised, residual: Residual, E: Tensor):
    """alpha (N,), Delta (N, D) at n.cells, from a forward of model on the ids x (B, T) without gradient."""
    with torch.no_grad():
        h = model.predicting(denoiser_hidden(model, model.embed_tokens(x), n.tokens, n.positions), n.cells)
        return by_rows(lambda some: residual(model.logits(some), E), CHUNK // model.config.vocab_size, h)

def check_reference(model: Transformer, reference: Transformer) -> None:
    """Raises ValueError if the two do not share a vocabulary: p of the one meets E of the other."""
    own, other = ((m.config.vocab_size, m.config.mask_id) for m in (model, reference))
    check(own == other, f"the reference has another vocabulary: (vocab_size, mask_id) is {other}, not {own}")

def diffusion_loss(model: Transformer, tokens: Tensor, response: Tensor | None = None,
                   positions: Tensor | None = None, *, context: Context | None = None, bound: bool = True,
                   t: Tensor | None = None, generator: Generator | None = None, draws: tuple = ()) -> Tensor:
    """E_t (1/t) sum over masked of -log p(x_0 | x_t), in nats per response token: a bound on -log p(x_0).

    tokens (B, T); response (B, T) bool, None = all; positions (B, T) of packed rows; t (B, 1) or (B, T), and
    draws, the noise and uniform of Noised: drawn if not given. context None: plain masked training (base,
    reference, SeqD). bound False: no 1/t, masks weigh alike. Divided by response tokens (0: ValueError)."""
    response = torch.ones_like(tokens, dtype=torch.bool) if response is None else response
    response = maskable(model.config, response, positions)
    check(bool(response.any()), "nothing to learn: no token of this batch belongs to a response")
    t = sample_t(len(tokens), generator, tokens.device) if t is None else t
    shapes = tokens.shape, (len(tokens), 2)
    noise, uniform = draws or (torch.rand(s, generator=generator, device=tokens.device) for s in shapes)
    x, masked = mask_tokens(tokens, response, t, noise, model.config.mask_id)  # x_t
    cells, e = masked.nonzero(as_tuple=True), model.embed_tokens(x)  # N cells, (B, T, D)
    if context is not None:  # alpha and Delta of p, Eq. 3 and 1, then Eq. 2
        alpha, delta = context(model, Noised(tokens, response, positions, t, noise, x, cells, uniform))
        e = mix(e, cells, alpha, delta, model.embedding[model.config.mask_id])
    hidden = model.predicting(denoiser_hidden(model, e, tokens, positions), cells)  # (N, D)
    (nll,) = token_losses(model, hidden, tokens[cells])  # (N,)
    weight = 1 / t.expand_as(tokens)[cells] if bound else 1
    return (weight * nll).sum() / response.sum()

def token_losses(model: Transformer, hidden: Tensor, targets: Tensor, also: Callable = lambda logits: ()):
    """-log p(target) (N,) of hidden (N, D), targets (N,), and what also(logits (n, V)) gives. One chunk of
    logits exists at a time; if there are several, backward computes them again."""
    def chunk(hidden: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        logits = model.logits(hidden)  # (n, V)
        nll = lambda z, target: (F.cross_entropy(z.float(), target, reduction="none"),)  # noqa: E731
        return *by_rows(nll, tile(logits), logits, targets), *also(logits)
    rows, again = CHUNK // model.config.vocab_size, partial(checkpoint, chunk, use_reentrant=False)
    return by_rows(again if len(hidden) > rows else chunk, rows, hidden, targets)

def trajectory_step(model: Transformer, tokens: Tensor, masked: Tensor, alpha: Tensor, delta: Tensor,
                    residual: Residual, positions: Tensor | None = None, grad: bool = False):
    """Stage 2 without a reference (not in the paper): a denoising step that learns. It reads tokens (B, T),
    the truth, but where masked the target's own residual of the step before, alpha (B, T), delta (B, T, D).
    -> these N cells; there -log p(truth), next alpha, Delta, confidence: zoo/recipes.py commits by it."""
    cells, E = masked.nonzero(as_tuple=True), model.embedding
    x = model.embed_tokens(tokens.masked_fill(masked, model.config.mask_id))  # (B, T, D)
    x = mix(x, cells, alpha[cells], delta[cells].to(E.dtype), E[model.config.mask_id])  # Eq. 2
    hidden = model.predicting(denoiser_hidden(model, x, tokens, positions), cells)  # (N, D)
    def carry(logits: Tensor) -> tuple[Tensor, ...]:  # alpha, Delta and confidence
        return *residual(logits, E, grad), predict(logits.detach(), Sampler(), None)[1]
    return cells, *token_losses(model, hidden, tokens[cells], carry)

# ---- 6. The sampler ----------------------------------------------------------------------------------------
class Candidates(NamedTuple):
    """The N masked cells that a commit rule chooses from. All lies on the host but the logits."""
    row: Tensor  # (N,)
    column: Tensor  # (N,)
    confidence: Tensor  # (N,) untempered probability of the drawn token
    quota: Tensor  # (B,) cells each row must commit now: its masks / its steps left, rounded up
    logits: Tensor | None  # (N, V)
    generator: Generator | None
    read: "Reader | None" = None  # the reader; a rule with a memory stores it there (zoo/rivals)
    def rank(self, score: Tensor) -> Tensor:
        """score (N,) -> rank (N,): 0 for the best cell of each row, 1 for the second, ..."""
        order = score.argsort(descending=True, stable=True)
        order = order[self.row[order].argsort(stable=True)]  # row by row, best first
        row = self.row[order]  # sorted, so that searchsorted finds where each row begins
        rank = torch.arange(len(row), device=row.device) - torch.searchsorted(row, row)
        return torch.empty_like(rank).index_put((order,), rank)  # in the order of the cells again
    def best(self, score: Tensor) -> Tensor:
        """(N,) bool: the cells of highest score in each row, as many as its quota."""
        return self.rank(score) < self.quota[self.row]

def static(c: Candidates, s: "Sampler") -> Tensor:
    """Algorithm 2, top-m: the most confident cells of each row, m (its quota) = masks / steps left."""
    return c.best(c.confidence)

def threshold(c: Candidates, s: "Sampler") -> Tensor:
    """The paper's experiments: every confidence above a threshold, and at least the quota: 1 if steps=0."""
    return c.best(c.confidence) | (c.confidence > s.threshold)

# The commit rules: which cells to fix now, (N,) bool. zoo/decoding.py has more.
RULES: dict[str, Callable[[Candidates, "Sampler"], Tensor]] = {"static": static, "threshold": threshold}

@dataclass(frozen=True)
class Sampler:
    """How a canvas is denoised. zoo/decoding.py has more."""
    rule: str = "static"  # what to commit: static (the most confident, on a step budget) | threshold
    steps: int = 0  # steps for a response, shared out over its blocks; 0 = one token a step
    threshold: float = 0.85  # rule=threshold: commit every confidence above it, and at least the quota
    block_size: int = 0  # decode block by block; 0 = the model's own block, or the whole canvas
    carry: str = "residual"  # residual (RCD) | none (SeqD, the control: nothing is carried)
    start: str = "cold"  # before a block: cold | warm (one pass of the reference)
    temperature: float = 0.0  # of the draw; 0 = argmax. Confidence is always that of the untempered p
    starts = ("cold", "warm")  # no annotation: not a field
    def __post_init__(self):
        for name, among in (("rule", RULES), ("start", self.starts), ("carry", ("residual", "none"))):
            value = getattr(self, name)
            check(value in among, f"{name}={value!r}: choose from {', '.join(among)}")
        for name in ("steps", "block_size", "temperature"):
            check(0 <= (x := getattr(self, name)) < math.inf, f"{name}={x} must be finite and not negative")
    def reader(self, model: Transformer, tokens: Tensor, lengths: Tensor, b: int, fill: Tensor) -> "Reader":
        """What reads the canvas. fill (B, T): the cells that were masks at first."""
        return Reader(model, tokens, lengths, b)
    def start_readers(self, read: "Reader", reference: Transformer | None, generator: Generator | None):
        """The readers of the passes before a block's first commit. Each leaves a residual to the next."""
        return [Reader(reference, read.tokens, read.lengths, read.b)] if self.start == "warm" else []
    def turns(self, at: Tensor, b: int, c: Config) -> tuple[Tensor, int]:
        """at (B, T), place behind the first block's begin -> turn (B, T) that fills it; turns per block."""
        return at // b, 1
    def draw(self, z: Tensor, generator: Generator | None) -> Tensor:
        """Tokens (n,) drawn from softmax(z / temperature), z (n, V): argmax p / Exp(1) is such a draw."""
        p = (z / self.temperature).softmax(-1)
        return (p / torch.empty_like(p).exponential_(generator=generator)).argmax(-1)

def predict(logits: Tensor, s: Sampler, generator: Generator | None) -> tuple[Tensor, Tensor]:
    """logits (N, V) -> the token of each cell and its confidence, both (N,)."""
    def rows(logits: Tensor) -> tuple[Tensor, Tensor]:  # (n, V)
        z, p = softmax(logits)
        token = p.argmax(-1) if s.temperature == 0 else s.draw(z, generator)
        return token, p.gather(-1, token[:, None])[:, 0]
    return by_rows(rows, tile(logits), logits)

class Reader:
    """Reads the canvas with one model: logits at masked cells. A block-causal model keeps an exact KV cache;
    cached: any model keeps one (zoo/fastdllm.py: approximate). tokens (B, T) is the canvas, which the sampler
    fills in place; b is the block length. Positions, rows and lengths (B,) lie on the host."""
    passes = 1  # forward passes of a call
    def __init__(self, model: Transformer, tokens: Tensor, lengths: Tensor, b: int, cached: bool = False):
        self.model, self.tokens, self.lengths, self.b, c = model, tokens, lengths, b, model.config
        self.last_begin = torch.full_like(lengths, -1)  # (B,) begin of the block read last; -1: read all
        self.cache = KVCache(c, *tokens.shape, model.head) if cached or c.block_size else None
    def window(self, rows: Tensor, begin: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
        """Positions [oldest, stop), (n,) each, that rows (n,) read: all; with a cache this block (logit_shift
        also the token before), at its first step also the block read last, whose keys are still of masks."""
        if self.cache is None:
            return torch.zeros_like(begin), torch.full_like(end, self.tokens.shape[1])
        oldest = torch.minimum(begin - int(self.model.config.logit_shift), self.last_begin[rows]).clamp(min=0)
        self.last_begin[rows] = begin  # so this is called once a forward
        return oldest, end
    def frame(self, begin: Tensor, end: Tensor, cells: Tensor):
        """-> rows (n,) with cells; index (N,), where in rows each cell lies; oldest, stop (n,); W; S."""
        rows, index = cells[:, 0].unique(return_inverse=True)  # rows that are done are not read
        oldest, stop = self.window(rows, begin[rows], end[rows])
        keys = int(stop.max()) if self.model.config.block_size else self.tokens.shape[1]
        return rows, index, oldest, stop, int((stop - oldest).max()), keys
    def __call__(self, begin: Tensor, end: Tensor, cells: Tensor, alpha: Tensor | None, delta: Tensor | None):
        """Logits (N, V) at the masked cells (N, 2) of the blocks [begin, end), (B,) each. alpha (N,) and
        delta (N, D) are the residual of the cells; None = there is none."""
        model, device, c = self.model, self.model.head.device, self.model.config
        rows, index, oldest, stop, width, keys = self.frame(begin, end, cells)
        positions = stop[:, None] - width + torch.arange(width)  # (n, W) end at stop; before oldest: padding
        at = positions.clamp(min=0)
        x = model.embed_tokens(self.tokens[rows[:, None], at].to(device))  # (n, W, D)
        in_window = index.to(device), (cells[:, 1] - positions[index, 0]).to(device)
        if alpha is not None:
            x = mix(x, in_window, alpha, delta, model.embedding[c.mask_id])  # Eq. 2
        reach = self.lengths[rows, None]  # (n, 1): a query sees the keys [0, reach), here all of its row
        if c.block_size:  # (n, W): here up to the end of its block
            reach = torch.minimum(stop[:, None], (at // self.b + 1) * self.b)
        mask = None if bool((reach == keys).all()) else (  # attention is quicker without one
            torch.arange(keys, device=device) < reach[:, None, :, None].to(device))  # (n, 1, W or 1, S)
        if self.cache:
            self.cache.at(rows, positions.masked_fill(positions < oldest[:, None], -1), keys)
        self.hidden = model.predicting(model(x, at.to(device), mask, self.cache), in_window)  # (N, D)
        return model.logits(self.hidden)

def step_budget(masks: list[int], steps: int) -> list[int]:
    """Share steps out over blocks with so many masks: in proportion, at least 1, at most one per mask."""
    filled = sum(m > 0 for m in masks)
    check(not steps or steps >= filled, f"steps={steps} is fewer than the {filled} blocks or sub-blocks")
    out, left, steps_left = [], sum(masks), min(steps or sum(masks), sum(masks))
    for m in masks:
        filled -= m > 0
        out.append(min(max(1, round(steps_left * m / left)), m, steps_left - filled) if m else 0)
        left, steps_left = left - m, steps_left - out[-1]
    return out

def plan(c: Config, canvas: Tensor, lengths: Tensor, s: Sampler) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What is filled when: turn (B, T), the turn in which a mask is filled, -1 = given; begin, end, steps
    (B, turns), the block of each turn and its budget. Raises ValueError if the canvas does not fit."""
    (_, T), column = canvas.shape, torch.arange(canvas.shape[1])
    check(int(lengths.max()) <= T, f"lengths={lengths.tolist()} exceed the canvas of {T} tokens")
    fill = (column < lengths[:, None]) & (canvas == c.mask_id)
    check(not (c.logit_shift and fill[:, 0].any()), "logit_shift: the first token of a canvas must be given")
    b = s.block_size or c.block_size or T
    first = torch.where(fill, column, T).amin(dim=1)  # (B,) the first mask
    first = first // b * b if c.block_size or not s.block_size else first  # LLaDA: blocks count from it
    turn, per_block = s.turns(column - first[:, None], b, c)
    turn = turn.masked_fill(~fill, -1)  # (B, T)
    turns = torch.arange(int(turn.max()) + 1)
    masks, begin = (turn[..., None] == turns).sum(1), first[:, None] + turns // per_block * b  # (B, turns)
    steps = torch.tensor([step_budget(row, s.steps) for row in masks.tolist()]).view(masks.shape)
    return turn, begin, torch.minimum(begin + b, lengths[:, None]), steps

class Step(NamedTuple):
    """The record of one denoising step: (B, T), and nfe (B,), on the host but for alpha."""
    block: int  # which block of each row is being denoised
    tokens: Tensor  # the canvas after this step
    committed: Tensor  # bool: fixed by this step
    confidence: Tensor  # untempered probability of the drawn token where this step looked, else 0
    alpha: Tensor  # weight of the residual that a still masked position hands to the next step, else 0
    nfe: Tensor  # forward passes so far, all of them counted

def end_rows(tokens: Tensor, turn: Tensor, j: int, c: Config) -> None:  # in place, when turn j is full
    drawn = (turn == j) & torch.isin(tokens, torch.tensor(c.eos_ids, dtype=torch.long))  # (B, T)
    left = drawn.any(dim=1, keepdim=True) & (turn > j)  # a row with an end token is done
    tokens[left], turn[left] = c.pad_id, -1

@torch.no_grad()
def denoise(model: Transformer, canvas: Tensor, sampler: Sampler = Sampler(), residual: Residual = Residual(),
            *, lengths: Tensor | None = None, reference: Transformer | None = None,
            generator: Generator | None = None) -> Iterator[Step]:
    """Algorithm 2: fill every [MASK] of canvas (B, T), yielding a Step after each commit (no mask: none).

    Block by block, until no mask is left: mix e (Eq. 2), read it, commit the surest cells, and turn what is
    predicted for the others into the residual of the next step (Eq. 3 and 1). A block's first step has none
    (cold start), or that of a pass of the reference, which commits nothing (warm).
    lengths (B,): tokens of each row, the rest is padding; None = T. Given tokens may stand anywhere and never
    change. No row sees another. A row that drew an end token is done when its block or sub-block is full;
    the masks of later ones become pad_id. Raises ValueError for a canvas that does not fit the model."""
    s, c, E, carries = sampler, model.config, model.embedding, sampler.carry == "residual"
    integers = canvas.numel() and not canvas.is_floating_point()
    check(canvas.dim() == 2 and integers, "a canvas is ids (B, T), at least one, of an integer dtype")
    canvas, (B, T) = canvas.cpu().long(), canvas.shape
    lengths = torch.full((B,), T) if lengths is None else lengths.cpu()
    for m in (model, reference) if carries and s.start == "warm" else (model,):
        check(m is not None, "start=warm needs the reference model: give it, or choose start=cold")
        check(T <= m.config.max_len, f"the canvas is longer than max_len={m.config.max_len}")
        check_reference(model, m)
    turn, begin, end, steps_left = plan(c, canvas, lengths, s)
    tokens, nfe = canvas.masked_fill(torch.arange(T) >= lengths[:, None], c.pad_id), torch.zeros_like(lengths)
    read = s.reader(model, tokens, lengths, s.block_size or c.block_size or T, turn >= 0)
    start_readers = s.start_readers(read, reference, generator) if carries else []
    def on_canvas(cells: Tensor, values: Tensor) -> Tensor:  # for the record: (N, 2), (N,) -> (B, T)
        return values.new_zeros(B, T).index_put(tuple(cells.T.to(values.device)), values)
    for j in range(begin.shape[1]):  # block by block, the rows side by side
        block, cells = (begin[:, j], end[:, j]), (turn == j).nonzero()  # (N, 2): the masks of the block
        alpha = delta = None  # cold start: the first pass is an ordinary one
        for start_read in start_readers if len(cells) else []:  # warm start
            nfe[cells[:, 0].unique()] += start_read.passes
            alpha, delta = residual(start_read(*block, cells, alpha, delta), E)
        while len(cells):
            nfe[cells[:, 0].unique()] += read.passes
            logits = read(*block, cells, alpha, delta)  # Eq. 2, then a forward pass: (N, V)
            token, confidence = (x.cpu() for x in predict(logits, s, generator))  # the host waits here
            masks = cells[:, 0].bincount(minlength=B)  # (B,) still masked
            quota = -(-masks // steps_left[:, j].clamp(min=1))  # (B,) commit masks / steps left, rounded up
            commit = RULES[s.rule](Candidates(*cells.T, confidence, quota, logits, generator, read), s)
            tokens[tuple(cells[commit].T)] = token[commit]
            committed, shown = on_canvas(cells, commit), on_canvas(cells, confidence)
            cells, steps_left[:, j] = cells[~commit], steps_left[:, j] - 1
            if carries and len(cells):
                alpha, delta = residual(logits[~commit], E)  # Eq. 3 and 1, only for what Eq. 2 will read
            weight = on_canvas(cells, alpha) if carries and len(cells) else torch.zeros(B, T, device=E.device)
            if not len(cells):
                end_rows(tokens, turn, j, c)
            number = int(begin[0, j] - begin[0, 0]) // read.b  # a block may take several turns
            yield Step(number, tokens.clone(), committed, shown, weight, nfe.clone())

def canvas_for(c: Config, prompts: list[list[int]], max_new: int, block_size: int = 0):
    """Canvas (B, T): each prompt and max_new masks, a block-causal model's in whole blocks. lengths (B,)."""
    check(max_new > 0 and len(prompts) > 0, f"max_new={max_new} and {len(prompts)} prompts: at least 1 each")
    check(not any(c.mask_id in p for p in prompts), "a prompt holds the mask token: denoise() fills a canvas")
    b = (block_size or c.block_size) if c.block_size else 1
    lengths = [-(-(len(prompt) + max_new) // b) * b for prompt in prompts]
    canvas = [[*prompt] + [c.mask_id] * (max(lengths) - len(prompt)) for prompt in prompts]
    return torch.tensor(canvas), torch.tensor(lengths)

def generate(model: Transformer, prompts: list[list[int]], max_new: int, sampler: Sampler = Sampler(),
             residual: Residual = Residual(), *, reference: Transformer | None = None,
             generator: Generator | None = None) -> tuple[list[list[int]], list[int]]:
    """Continue prompts by max_new tokens, or to a block's end: responses up to their end tokens, NFE."""
    canvas, lengths = canvas_for(model.config, prompts, max_new, sampler.block_size)
    *_, last = denoise(model, canvas, sampler, residual, lengths=lengths, reference=reference,
                       generator=generator)
    rows = [row[len(p) : n] for row, p, n in zip(last.tokens.tolist(), prompts, lengths.tolist())]
    ends = [next((i for i, x in enumerate(row) if x in model.config.eos_ids), len(row)) for row in rows]
    return [row[:end] for row, end in zip(rows, ends)], last.nfe.tolist()
