"""Random tiny checkpoints in the hub's layout, for every family.

A model of `transformers` gets random weights. Its tensors are written under the names of the family's own
files, with a config.json as the family publishes it, and a byte tokenizer.
"""

import json
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn

from zoo.tokenizer import bytes_tokenizer

MASK, EOS, ROWS = 257, 256, 264  # bytes, <eos>, <mask>, and rows that no token uses
SIZES = dict(vocab_size=ROWS, hidden_size=48, intermediate_size=40, num_hidden_layers=2,
             num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
             rope_theta=5e4)  # fmt: skip
FULL_HEADS = {**SIZES, "num_key_value_heads": 4}
LLADA = {
    "activation_type": "silu", "alibi": False, "alibi_bias_max": 8.0, "architectures": ["LLaDAModelLM"],
    "attention_layer_norm": False, "attention_layer_norm_with_affine": True, "bias_for_layer_norm": False,
    "block_group_size": 1, "block_type": "llama", "d_model": 48, "embedding_size": ROWS,
    "include_bias": False, "include_qkv_bias": False, "input_emb_norm": False, "layer_norm_type": "rms",
    "layer_norm_with_affine": True, "max_sequence_length": 64, "mlp_hidden_size": 40, "mlp_ratio": 4,
    "model_type": "llada", "multi_query_attention": None, "n_heads": 4, "n_kv_heads": 4, "n_layers": 2,
    "rms_norm_eps": 1e-5, "rope": True, "rope_full_precision": True, "rope_theta": 5e4,
    "scale_logits": False, "vocab_size": ROWS, "weight_tying": False,
}  # fmt: skip
LLADA2 = {
    **{k: v for k, v in SIZES.items() if k != "rope_theta"},
    "model_type": "llada2_moe", "architectures": ["LLaDA2MoeModelLM"], "head_dim": 16,
    "first_k_dense_replace": 1, "hidden_act": "silu", "moe_intermediate_size": 24, "n_group": 4,
    "topk_group": 2, "norm_head": False, "norm_topk_prob": True, "num_experts": 16, "num_experts_per_tok": 3,
    "num_shared_experts": 1, "output_router_logits": False, "partial_rotary_factor": 0.5,
    "rms_norm_eps": 1e-6, "rope_theta": 600000, "routed_scaling_factor": 2.5, "score_function": "sigmoid",
    "moe_router_enable_expert_bias": True, "tie_word_embeddings": False, "use_qk_norm": True,
    "use_qkv_bias": False, "use_bias": False, "router_dtype": "fp32", "sliding_window": 4096,
    "use_sliding_window": False, "max_window_layers": 28,
}  # fmt: skip

# ---- Models of transformers


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    biases = [(n, b) for n, b in model.named_buffers() if "correction_bias" in n]
    with torch.no_grad():
        for name, p in (*model.named_parameters(), *biases):
            noise = torch.randn(p.shape, generator=generator)
            if name.endswith("norm.weight"):
                p.copy_(1 + 0.3 * noise)
            elif p.dim() < 2 or "embed" in name:
                p.copy_(0.3 * noise)
            else:
                p.copy_(noise / p.shape[-1] ** 0.5)
    return model.float().eval()


def qwen3(tied: bool = False, head_dim: int = 16) -> nn.Module:
    config = transformers.Qwen3Config(**SIZES, head_dim=head_dim, tie_word_embeddings=tied)
    return randomise(transformers.Qwen3ForCausalLM(config))


def qwen2(tied: bool = False) -> nn.Module:
    config = transformers.Qwen2Config(**SIZES, tie_word_embeddings=tied)
    return randomise(transformers.Qwen2ForCausalLM(config))


def llama(tied: bool = False) -> nn.Module:
    config = transformers.LlamaConfig(**SIZES, tie_word_embeddings=tied)
    return randomise(transformers.LlamaForCausalLM(config))


def full_head_llama() -> nn.Module:
    """LLaDA-8B's architecture: as many key-value heads as query heads."""
    config = transformers.LlamaConfig(**FULL_HEADS, rms_norm_eps=1e-5)
    return randomise(transformers.LlamaForCausalLM(config))


def qwen3_moe(sizes: dict, **options) -> nn.Module:
    config = transformers.Qwen3MoeConfig(
        **sizes, num_experts=8, num_experts_per_tok=3, moe_intermediate_size=24, tie_word_embeddings=False,
        **options,
    )  # fmt: skip
    return randomise(transformers.Qwen3MoeForCausalLM(config))


def glm() -> nn.Module:
    """GLM-4's experts have LLaDA2's partial rotary, head norms, grouped sigmoid router and shared expert."""
    sizes = {k: v for k, v in SIZES.items() if k != "rope_theta"} | {"num_hidden_layers": 3}
    config = transformers.Glm4MoeConfig(
        **sizes, head_dim=16, n_routed_experts=16, num_experts_per_tok=3, moe_intermediate_size=24,
        norm_topk_prob=True, n_group=4, topk_group=2, n_shared_experts=1, first_k_dense_replace=1,
        use_qk_norm=True, routed_scaling_factor=2.5, attention_bias=False, rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 6e5, "partial_rotary_factor": 0.5},
        tie_word_embeddings=False,
    )  # fmt: skip
    return randomise(transformers.Glm4MoeForCausalLM(config))


def their_logits(model: nn.Module, tokens: Tensor, block: int) -> Tensor:
    """Logits (B, T, V) of a transformers model without its causal mask; block 0 = bidirectional."""
    T = tokens.shape[1]
    seen = torch.tensor([[not block or k // block <= q // block for k in range(T)] for q in range(T)])
    mask = torch.zeros(1, 1, T, T).masked_fill(~seen, torch.finfo(torch.float32).min)
    model.config._attn_implementation = "eager"
    with torch.no_grad():
        mask = mask.expand(len(tokens), 1, T, T)
        return model(input_ids=tokens, attention_mask=mask, use_cache=False).logits


# ---- Their tensors under the names of the published files


def llada_tensors(model: nn.Module) -> dict[str, Tensor]:
    """A Llama's tensors under LLaDA's names, written out from the model card's modelling file."""
    out = {
        "model.transformer.wte.weight": model.model.embed_tokens.weight,
        "model.transformer.ln_f.weight": model.model.norm.weight,
        "model.transformer.ff_out.weight": model.lm_head.weight,
    }
    for i, layer in enumerate(model.model.layers):
        at, mlp, to = layer.self_attn, layer.mlp, f"model.transformer.blocks.{i}."
        out |= {
            to + "attn_norm.weight": layer.input_layernorm.weight,
            to + "ff_norm.weight": layer.post_attention_layernorm.weight,
            to + "q_proj.weight": at.q_proj.weight,
            to + "k_proj.weight": at.k_proj.weight,
            to + "v_proj.weight": at.v_proj.weight,
            to + "attn_out.weight": at.o_proj.weight,
            to + "ff_proj.weight": mlp.gate_proj.weight,
            to + "up_proj.weight": mlp.up_proj.weight,
            to + "ff_out.weight": mlp.down_proj.weight,
        }
    return {n: t.detach().clone() for n, t in out.items()}


def unfused(model: nn.Module) -> dict[str, Tensor]:
    """The tensors with one entry for every expert's projection, as all published checkpoints have them."""
    out = {}
    for name, t in model.state_dict().items():
        if name.endswith("experts.gate_up_proj"):
            for e, both in enumerate(t):
                for kind, w in zip(("gate", "up"), both.chunk(2)):
                    out[name.replace("gate_up_proj", f"{e}.{kind}_proj.weight")] = w.contiguous()
        elif name.endswith("experts.down_proj"):
            for e, w in enumerate(t):
                out[name.replace("down_proj", f"{e}.down_proj.weight")] = w.contiguous()
        else:
            out[name] = t
    return out


def llada2_tensors(model: nn.Module) -> dict[str, Tensor]:
    renamed = {
        "embed_tokens": "word_embeddings", "self_attn": "attention", "o_proj": "dense",
        "q_norm": "query_layernorm", "k_norm": "key_layernorm", "e_score_correction_bias": "expert_bias",
    }  # fmt: skip
    out = {}
    for name, t in unfused(model).items():
        for theirs, llada2 in renamed.items():
            name = name.replace(theirs, llada2)
        out[name] = t
    for i in range(len(model.model.layers)):
        at = f"model.layers.{i}.attention."
        out[at + "query_key_value.weight"] = torch.cat([out.pop(f"{at}{x}_proj.weight") for x in "qkv"])
    return out


# ---- Folders


def write(folder: Path, model: nn.Module, tensors: dict | None = None, values: dict | None = None,
          **changes) -> Path:  # fmt: skip
    """A hub folder: what save_pretrained writes, with other tensors or another config.json, and a tokenizer.

    changes: entries of config.json; ... leaves an entry out.
    """
    model.save_pretrained(folder)
    values = values if values is not None else json.loads((folder / "config.json").read_text())
    values = {"mask_token_id": MASK, **values, "eos_token_id": EOS, **changes}
    (folder / "config.json").write_text(json.dumps({k: v for k, v in values.items() if v is not ...}))
    if tensors is not None:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    bytes_tokenizer(["<eos>", "<mask>"]).save(folder)
    return folder


def sdar(folder: Path, name: str = "SDAR-tiny", **changes) -> Path:
    return write(folder / name, qwen3(), **{"model_type": "sdar", **changes})


def llada2(folder: Path, **changes) -> Path:
    model = glm()
    return write(folder, model, llada2_tensors(model), LLADA2, **{"num_hidden_layers": 3, **changes})
