"""LLaDA: 8B Base and Instruct, LLaDA-1.5, iLLaDA-8B and LLaDA-MoE-7B-A1B. Bidirectional, no logit shift.

LLaDA-8B has names of its own: blocks.N.ff_out is the MLP's way down, transformer.ff_out is the language-model
head, and the SiLU is on ff_proj. iLLaDA has Llama's names and grouped queries. LLaDA-MoE has Qwen3's names,
64 experts, and a softmax router whose top 8 are not renormalised, whatever its config.json says. Its
model_type is "llada" too: its architecture tells it apart.

Decoding: LLaDA-8B at threshold 0.9 in blocks of 32 is as good as one token a step (Fast-dLLM, arXiv
2505.22618, Table 1). For iLLaDA nobody has published that, so: one token a step. For LLaDA-MoE 0.8 and 0.9
are in use (dInfer); 0.9 is the safe one. The authors' own loop is --rule=static with --steps and
--block_size; it also fills what follows an end token. Their two switches against end tokens are not built.
"""

import math
import re

from torch import Tensor

from rcd import Config, Reader
from zoo.experts import Experts
from zoo.family import Family, Plan, Settings, Source, ends, standard_config, standard_name
from zoo.files import config_from

NAMES = {
    "embed_tokens": "wte", "norm": "ln_f", "lm_head": "ff_out",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ff_norm",
    "self_attn.q_proj": "q_proj", "self_attn.k_proj": "k_proj", "self_attn.v_proj": "v_proj",
    "self_attn.o_proj": "attn_out",
    "mlp.gate_proj": "ff_proj", "mlp.up_proj": "up_proj", "mlp.down_proj": "ff_out",
}  # fmt: skip
OFF = ("alibi", "attention_layer_norm", "bias_for_layer_norm", "include_bias", "include_qkv_bias",
       "input_emb_norm", "scale_logits", "multi_query_attention", "weight_tying")  # fmt: skip
ONLY = {"activation_type": "silu", "block_type": "llama", "layer_norm_type": "rms", "rope": True,
        "layer_norm_with_affine": True, "block_group_size": 1}  # fmt: skip
THRESHOLD = {"rule": "threshold", "threshold": 0.9, "block_size": 32, "carry": "none"}
ONE_BY_ONE = {"rule": "static", "block_size": 32, "carry": "none"}
PLAIN_TEXT = "its chat template is not known here: plain text"


class Guided:
    """Classifier-free guidance: logits = u + (w + 1)(z - u); u is read with the prompt masked. Two passes."""

    passes = 2

    def __init__(self, read: Reader, unguided: Reader, prompt: Tensor, w: float):
        self.read, self.unguided, self.prompt, self.w = read, unguided, prompt, w  # prompt (B, T) bool
        self.model, self.tokens, self.lengths, self.b = read.model, read.tokens, read.lengths, read.b

    def __call__(self, *block: Tensor) -> Tensor:
        """As Reader: logits (N, V)."""
        self.unguided.tokens = self.tokens.masked_fill(self.prompt, self.model.config.mask_id)
        z, u = self.read(*block), self.unguided(*block)
        return (u + (self.w + 1) * (z - u)).masked_fill(z == -math.inf, -math.inf)


def original(name: str) -> str:
    """layers.3.mlp.down_proj.weight -> model.transformer.blocks.3.ff_out.weight"""
    layer, module, kind = re.fullmatch(r"(?:layers\.(\d+)\.)?(.+)\.(weight|bias)", name).groups()
    return f"model.transformer.{f'blocks.{layer}.' if layer else ''}{NAMES[module]}.{kind}"


def plan(s: Settings, source: Source) -> Plan:
    architecture = str(s.get("architectures", [""])[:1])
    if "LLaDAMoE" in architecture or s.get("num_experts"):
        return plan_moe(s, source)
    if "ILLaDA" in architecture or s.get("model_type").lower() == "illada":
        return plan_illada(s, source)
    for key in OFF:
        s.expect(key, False)
    for key, only in ONLY.items():
        s.expect(key, only)
    for of_what_is_off in ("alibi_bias_max", "attention_layer_norm_with_affine"):
        s.get(of_what_is_off)
    rows, heads = s.integer("embedding_size", s.get("vocab_size")), s.integer("n_heads", most=1024)
    width = s.integer("d_model")
    config = config_from(vars(Config()) | {
        "vocab_size": rows, "n_layer": s.integer("n_layers", most=1024), "n_head": heads,
        "n_kv_head": s.integer("n_kv_heads", heads, most=1024), "head_dim": width // heads, "d_model": width,
        "d_ff": s.integer("mlp_hidden_size"), "max_len": s.integer("max_sequence_length"),
        "mask_id": s.integer("mask_token_id", 126336, least=0),
        **ends(s, source, rows, (126081, 126348), 126081), "rope_theta": s.rope_theta(),
        "norm_eps": s.number("rms_norm_eps", 1e-5), "qk_norm": False, "tied": False,
    })  # fmt: skip
    base, residual = "base" in source.label.lower(), "rcd" in source.label.lower()
    # RCD on LLaDA (arXiv 2601.22954) fills 512 tokens in one block. The paper's warm start takes a reference.
    defaults = {"rule": "threshold", "threshold": 0.85, "carry": "residual"} if residual else THRESHOLD
    return Plan("LLaDA", config, original, None if base else "llada", defaults)


def plan_illada(s: Settings, source: Source) -> Plan:
    """iLLaDA. Its modelling file also knows a LayerNorm and biases, which its checkpoints do not use."""
    s.expect("layer_norm_eps")
    config = standard_config(s, source, mask_id=5, eos_ids=(2,), pad_id=1, norm_eps=1e-6)
    return Plan("iLLaDA", config, standard_name, None, ONE_BY_ONE, notes=(PLAIN_TEXT,))


def plan_moe(s: Settings, source: Source) -> Plan:
    s.expect("qk_layernorm", True)
    s.expect("shared_expert_intermediate_size", 0)
    s.expect("moe_router_enable_expert_bias", False)
    for key in ("router_num_group", "router_topk_group", "routed_scaling_factor"):
        s.expect(key, 1)
    if set(s.get("moe_layer_freq", [1])) != {1}:
        s.problems.append("moe_layer_freq (only experts in every layer)")
    dense = s.get("dense_intermediate_size")  # no layer is dense
    d_ff = "dense_intermediate_size" if dense else "expert_intermediate_size"
    config = standard_config(s, source, mask_id=156895, eos_ids=(156892,), pad_id=156892, qk_norm=True,
                             d_ff=d_ff, norm_eps=1e-5)  # fmt: skip
    width, n_experts = s.integer("expert_intermediate_size"), s.integer("num_experts", most=4096)
    top_k = s.integer("num_experts_per_tok", most=4096)

    def experts(layer: int) -> Experts:
        return Experts(config.d_model, width, n_experts, top_k, normalise=False)

    return Plan("LLaDA-MoE", config, standard_name, None, THRESHOLD, experts, (PLAIN_TEXT,))


FAMILY = Family("LLaDA", ("llada", "llada_moe", "lladamoe", "illada"), plan, {
    "GSAI-ML/LLaDA-8B-Base": ("8.0B", "-", "126336"),
    "GSAI-ML/LLaDA-8B-Instruct": ("8.0B", "-", "126336"),
    "GSAI-ML/LLaDA-1.5": ("8.0B", "-", "126336"),
    "GSAI-ML/iLLaDA-8B-Base": ("7.6B", "-", "5"),
    "GSAI-ML/iLLaDA-8B-Instruct": ("7.6B", "-", "5"),
    "inclusionAI/LLaDA-MoE-7B-A1B-Base": ("7.4B", "-", "156895"),
    "inclusionAI/LLaDA-MoE-7B-A1B-Instruct": ("7.4B", "-", "156895"),
})  # fmt: skip
