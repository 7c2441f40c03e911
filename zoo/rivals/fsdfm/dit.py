"""The network of FS-DFM: a small diffusion transformer (DiT) that knows the time t and the step size h.

Tokens x_t (B, T), t (B,) and h (B,) go in, logits (B, T, V) of the clean tokens come out. Attention is
bidirectional with rotary positions. t and h reach the network by adaLN-zero: a vector c, made of both, gives
each layer the shift, scale and gate of its two halves. Gates and head start at zero, so a new network
predicts the uniform distribution.

The model of stage 1 has no embedder of h and ignores it. The few-step student adds one. Its output starts at
zero, so a student begins as the model it is made from. (The authors' code joins t and h by further linear
layers in each block, which begin at random. Their dropout of 0.1 is left out, too.)
"""

import json
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rcd import check, rotate
from zoo.files import assign_tensors, read_json, write_atomic


@dataclass
class DiTConfig:
    """The shape of a network, and the source x_0 that it was trained from."""

    vocab_size: int  # V
    mask_id: int  # never predicted; the source "mask" is made of it
    source: str = "uniform"  # x_0: uniform (any token but the mask) | mask
    n_layer: int = 4
    n_head: int = 4  # H
    d_model: int = 128  # D
    d_cond: int = 32  # C: width of the condition c
    step_aware: bool = False  # whether h is embedded: the few-step student

    def __post_init__(self):
        check(self.source in ("uniform", "mask"), f"source={self.source!r}: choose from uniform, mask")
        whole = self.n_head > 0 and self.d_model % (2 * self.n_head) == 0  # RoPE rotates pairs
        check(whole, f"d_model={self.d_model} must be a multiple of 2 n_head={2 * self.n_head}")


class Embedder(nn.Module):
    """A number in [0, 1] -> (B, C): 128 cosines and sines with periods up to 1e4, of 1,000 times the number,
    then two linear layers."""

    def __init__(self, d_cond: int):
        super().__init__()
        self.hidden, self.out = nn.Linear(256, d_cond), nn.Linear(d_cond, d_cond)

    def forward(self, number: Tensor) -> Tensor:
        frequencies = torch.exp(-math.log(1e4) * torch.arange(128, device=number.device) / 128)
        angles = 1000 * number[:, None].float() * frequencies  # (B, 128)
        return self.out(F.silu(self.hidden(torch.cat([angles.cos(), angles.sin()], -1))))


def modulate(norm: nn.LayerNorm, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (B, T, D), shift and scale (B, 1, D): the "adaptive layer norm" of adaLN."""
    return norm(x) * (1 + scale) + shift


class Block(nn.Module):
    """Attention and an MLP, each shifted, scaled and gated by c (B, C)."""

    def __init__(self, c: DiTConfig):
        super().__init__()
        D, self.heads = c.d_model, c.n_head
        self.norm = nn.LayerNorm(D, elementwise_affine=False)
        self.qkv, self.out = nn.Linear(D, 3 * D, bias=False), nn.Linear(D, D, bias=False)
        self.up, self.down = nn.Linear(D, 4 * D), nn.Linear(4 * D, D)
        self.modulation = nn.Linear(c.d_cond, 6 * D)

    def forward(self, x: Tensor, c: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        B, T, D = x.shape
        shift, scale, gate, shift_2, scale_2, gate_2 = self.modulation(c)[:, None].chunk(6, -1)  # (B, 1, D)
        heads = self.qkv(modulate(self.norm, x, shift, scale)).view(B, T, 3, self.heads, D // self.heads)
        q, k, v = heads.permute(2, 0, 3, 1, 4)  # (B, H, T, D / H) each
        y = F.scaled_dot_product_attention(rotate(q, cos, sin), rotate(k, cos, sin), v)
        x = x + gate * self.out(y.transpose(1, 2).reshape(B, T, D))
        y = F.gelu(self.up(modulate(self.norm, x, shift_2, scale_2)), approximate="tanh")
        return x + gate_2 * self.down(y)


class DiT(nn.Module):
    """x (B, T) ids, t (B,), h (B,) -> logits (B, T, V)."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.config, (V, D, C) = config, (config.vocab_size, config.d_model, config.d_cond)
        self.embed_tokens = nn.Embedding(V, D)
        self.embed_t = Embedder(C)
        if config.step_aware:
            self.embed_h = Embedder(C)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm, self.modulation = nn.LayerNorm(D, elementwise_affine=False), nn.Linear(C, 2 * D)
        self.head = nn.Linear(D, V)

    @property
    def embedding(self) -> Tensor:
        return self.embed_tokens.weight  # (V, D), not shared with the head

    def forward(self, x: Tensor, t: Tensor, h: Tensor) -> Tensor:
        c = self.embed_t(t)
        c = F.silu(c + self.embed_h(h) if self.config.step_aware else c)  # (B, C)
        half = self.config.d_model // self.config.n_head // 2
        exponents = -torch.arange(half, device=x.device) / half
        angles = torch.arange(x.shape[1], device=x.device)[:, None] * 1e4**exponents  # (T, half)
        cos, sin, y = angles.cos()[None, None], angles.sin()[None, None], self.embed_tokens(x)  # (B, T, D)
        for block in self.blocks:
            y = block(y, c, cos, sin)
        shift, scale = self.modulation(c)[:, None].chunk(2, -1)
        logits = self.head(modulate(self.norm, y, shift, scale)).float()
        logits[..., self.config.mask_id] = -1e30  # p = 0; a finite number, so that 0 times it is 0
        return logits


def init_weights(model: DiT, generator: torch.Generator) -> DiT:
    """Matrices (m, n) normal(0, 1/sqrt(n)), biases 0; what modulates or predicts starts at zero (adaLN-zero).
    With 0.02, as in large models, the small c would hardly feel t, and training starts slowly."""
    for name, p in model.named_parameters():
        if p.dim() < 2 or "modulation" in name or name in ("head.weight", "embed_h.out.weight"):
            nn.init.zeros_(p)
        else:
            nn.init.normal_(p, std=p.shape[1] ** -0.5, generator=generator)
    return model


def student_of(model: DiT, generator: torch.Generator) -> DiT:
    """The few-step student: the weights of stage 1, and a new embedder of h. Same logits for every h."""
    student = init_weights(DiT(replace(model.config, step_aware=True)), generator).to(model.embedding.device)
    student.load_state_dict(model.state_dict(), strict=False)
    return student


def save(model: DiT, folder: Path) -> None:
    """folder/model.safetensors and folder/config.json, which load() reads."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: p.detach().contiguous() for name, p in model.state_dict().items()}
    write_atomic(folder / "model.safetensors", lambda path: save_file(tensors, path, {"format": "pt"}))
    text = json.dumps({"model_type": "fsdfm", **asdict(model.config)}, indent=1)
    write_atomic(folder / "config.json", lambda path: path.write_text(text + "\n"))


def load(folder: Path, device: torch.device | str = "cpu") -> DiT:
    """The network of a folder. Raises FileNotFoundError or ValueError that names what is wrong."""
    values = read_json(folder / "config.json")
    check(values.pop("model_type", "") == "fsdfm", f"{folder} holds no FS-DFM model")
    try:
        with torch.device("meta"):
            model = DiT(DiTConfig(**values))
        tensors = load_file(folder / "model.safetensors", device=str(device))
    except (TypeError, ValueError, SafetensorError) as error:
        raise ValueError(f"{folder} is damaged: {error}") from None
    assign_tensors(model, tensors, torch.float32, str(folder))
    return model
