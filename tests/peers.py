"""What this project's code is compared with, by bench.py and by tests.

A plain GPT, the sampler without a cache, transformers' Qwen3, and a folder that safetensors reads.
"""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rcd import Config, Transformer
from zoo.tokenizer import bytes_tokenizer


def block_causal_mask(q_pos: Tensor, k_pos: Tensor, block_size: int) -> Tensor:
    """A query sees every key whose block is not later than its own. Positions q_pos (B, T), k_pos (B, S) ->
    (B, T, S) bool."""
    return k_pos[:, None, :] // block_size <= q_pos[:, :, None] // block_size


class GPT(nn.Module):
    """A plain autoregressive GPT: pre-norm, learned positions, tied head. Its MLP has two matrices where a
    SwiGLU has three, and is 3/2 d_ff wide."""

    def __init__(self, c: Config):
        super().__init__()
        D, wide, self.n_head = c.d_model, 3 * c.d_ff // 2, c.n_head
        linear = partial(nn.Linear, bias=False)
        self.tokens, self.positions = nn.Embedding(c.vocab_size, D), nn.Embedding(c.max_len, D)
        self.norm = nn.LayerNorm(D)
        self.layers = nn.ModuleList(
            nn.ModuleDict({
                "norm1": nn.LayerNorm(D), "qkv": linear(D, 3 * D), "out": linear(D, D),
                "norm2": nn.LayerNorm(D), "up": linear(D, wide), "down": linear(wide, D),
            }) for _ in range(c.n_layer)
        )  # fmt: skip
        for p in self.parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (B, T, V) of the token after each of (B, T)."""
        B, T = tokens.shape
        x = self.tokens(tokens) + self.positions.weight[:T]  # (B, T, D)
        for layer in self.layers:
            qkv = layer["qkv"](layer["norm1"](x)).chunk(3, dim=-1)
            q, k, v = (y.view(B, T, self.n_head, -1).transpose(1, 2) for y in qkv)  # (B, H, T, K)
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + layer["out"](y.transpose(1, 2).reshape(B, T, -1))
            x = x + layer["down"](F.gelu(layer["up"](layer["norm2"](x))))
        return F.linear(self.norm(x), self.tokens.weight)

    def loss(self, tokens: Tensor) -> Tensor:
        """Cross-entropy of the next token at all of (B, T). After the last token comes the first, so that no
        row is shorter."""
        return F.cross_entropy(self(tokens).flatten(0, 1).float(), tokens.roll(-1, dims=1).flatten())


@torch.no_grad()
def fill_recomputing(model: Transformer, canvas: Tensor, steps: int) -> Tensor:
    """What denoise() does to a canvas (1, T) in SeqD, if the masks fill whole blocks. There is no cache:
    a step runs all tokens up to the end of its block."""
    b, canvas = model.config.block_size, canvas.clone()
    first = int((canvas[0] == model.config.mask_id).nonzero()[0])
    for end in range(first + b, canvas.shape[1] + 1, b):
        positions = torch.arange(end)[None]  # (1, S)
        mask = block_causal_mask(positions, positions, b)[:, None]  # (1, 1, S, S)
        for left in range(steps, 0, -1):
            column = (canvas[0, :end] == model.config.mask_id).nonzero()[:, 0]  # (N,)
            hidden = model(model.embed_tokens(canvas[:, :end]), positions, mask)  # (1, S, D)
            logits = model.logits(hidden[0, column])  # (N, V)
            confidence, token = logits.float().softmax(-1).max(-1)
            sure = confidence.topk(-(-len(column) // left)).indices
            canvas[0, column[sure]] = token[sure]
    return canvas


def qwen3(model: Transformer) -> Callable[[Tensor], Tensor]:
    """transformers' Qwen3 with our weights, and attention in both directions: tokens (B, T) -> logits
    (B, T, V). Raises ImportError."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    c = model.config
    theirs = Qwen3ForCausalLM(Qwen3Config(
        vocab_size=c.vocab_size, hidden_size=c.d_model, intermediate_size=c.d_ff, num_hidden_layers=c.n_layer,
        num_attention_heads=c.n_head, num_key_value_heads=c.n_kv_head, head_dim=c.head_dim,
        rms_norm_eps=c.norm_eps, rope_theta=c.rope_theta, tie_word_embeddings=c.tied,
    )).to(model.head.dtype).eval()  # fmt: skip
    weights = {f"model.{name}": p for name, p in model.state_dict().items()}
    theirs.load_state_dict(weights, strict=False)  # the head is tied
    for layer in theirs.model.layers:
        layer.self_attn.is_causal = False
    return lambda tokens: theirs(input_ids=tokens, use_cache=False).logits


def write_sdar(model: Transformer, folder: Path) -> int:
    """Write a model with a tied head as an SDAR folder with a tokenizer of bytes. Returns the size of its
    tensors in bytes."""
    c, tensors = model.config, {f"model.{name}": p for name, p in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({
        "model_type": "sdar", "vocab_size": c.vocab_size, "hidden_size": c.d_model,
        "intermediate_size": c.d_ff, "num_hidden_layers": c.n_layer, "num_attention_heads": c.n_head,
        "num_key_value_heads": c.n_kv_head, "head_dim": c.head_dim, "rope_theta": c.rope_theta,
        "rms_norm_eps": c.norm_eps,
        "max_position_embeddings": c.max_len, "tie_word_embeddings": True, "mask_token_id": 257,
    }))  # fmt: skip
    bytes_tokenizer(["<eos>", "<mask>"]).save(folder)
    return sum(p.nbytes for p in tensors.values())


def read_all(folder: Path) -> list[Tensor]:
    """The least that reading costs. load_file only maps the file: a tensor is read when it is copied."""
    return [tensor.clone() for tensor in load_file(folder / "model.safetensors").values()]
