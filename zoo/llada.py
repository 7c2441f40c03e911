"""LLaDA: 8B Base and Instruct, LLaDA-1.5, iLLaDA-8B and LLaDA-MoE-7B-A1B. Fully bidirectional, no logit shift.

LLaDA-8B has names of its own. Mind that blocks.N.ff_out is the MLP's way down and transformer.ff_out the language-model head, and that the
SiLU is on ff_proj. iLLaDA has Llama's names and grouped queries; LLaDA-MoE has Qwen3's, 64 experts, and a softmax router whose top 8 are
not renormalised, whatever its config.json says. Its model_type is "llada" as well: its architecture tells it apart.
Decoding: LLaDA-8B at threshold 0.9 in blocks of 32 is as good as one token a step (Fast-dLLM, arXiv 2505.22618, Table 1). For iLLaDA nobody
has published that, so: one token a step. LLaDA-MoE: 0.8 and 0.9 are in use (dInfer), the second is the safe one. The authors' own loop is
--rule=static with --steps and --block_size; it also fills what follows an end token. Their two switches against end tokens are not built.
"""

import re

from rcd import Config
from zoo.experts import Experts
from zoo.family import Family, Plan, Settings, Source, ends, standard_config, standard_name

NAMES = {"embed_tokens": "wte", "norm": "ln_f", "lm_head": "ff_out", "input_layernorm": "attn_norm", "post_attention_layernorm": "ff_norm",
         "self_attn.q_proj": "q_proj", "self_attn.k_proj": "k_proj", "self_attn.v_proj": "v_proj", "self_attn.o_proj": "attn_out",
         "mlp.gate_proj": "ff_proj", "mlp.up_proj": "up_proj", "mlp.down_proj": "ff_out"}  # fmt: skip
THRESHOLD = {"rule": "threshold", "threshold": 0.9, "block_size": 32, "carry": "none"}
ONE_BY_ONE = {"rule": "static", "block_size": 32, "carry": "none"}


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
    for key in ("alibi", "attention_layer_norm", "bias_for_layer_norm", "include_bias", "include_qkv_bias", "input_emb_norm",
    "scale_logits",
                "multi_query_attention", "weight_tying"):  # fmt: skip
        s.expect(key, False)
    for key, only in {"activation_type": "silu", "block_type": "llama", "layer_norm_type": "rms", "rope": True,
    "layer_norm_with_affine": True,
                      "block_group_size": 1}.items():  # fmt: skip
        s.expect(key, only)
    for unread in ("alibi_bias_max", "attention_layer_norm_with_affine"):  # belong to alibi and attention_layer_norm, which are off
        s.get(unread)
    rows, heads, width = s.integer("embedding_size", s.get("vocab_size")), s.integer("n_heads", most=1024), s.integer("d_model")
    config = Config(
        vocab_size=rows, n_layer=s.integer("n_layers", most=1024), n_head=heads, n_kv_head=s.integer("n_kv_heads", heads, most=1024),
        head_dim=width // heads, d_model=width, d_ff=s.integer("mlp_hidden_size"), max_len=s.integer("max_sequence_length"), block_size=0,
        mask_id=s.integer("mask_token_id", 126336, least=0), **ends(s, source, rows, (126081, 126348), 126081), rope_theta=s.rope_theta(),
        norm_eps=s.number("rms_norm_eps", 1e-5), qk_norm=False, tied=False,
    )  # fmt: skip
    base, residual = "base" in source.label.lower(), "rcd" in source.label.lower()
    # RCD on LLaDA (arXiv 2601.22954): 512 tokens in one block. The paper starts warm, which takes a reference; cold is what runs without.
    defaults = {"rule": "threshold", "threshold": 0.85, "carry": "residual"} if residual else THRESHOLD
    return Plan("LLaDA", config, original, None if base else "llada", defaults)


def plan_illada(s: Settings, source: Source) -> Plan:
    """iLLaDA: its modelling file knows a LayerNorm and biases too, which its checkpoints do not use."""
    s.expect("layer_norm_eps")
    config = standard_config(s, source, mask_id=5, eos_ids=(2,), pad_id=1, norm_eps=1e-6)
    return Plan("iLLaDA", config, standard_name, None, ONE_BY_ONE, notes=("its chat template is not known here: plain text",))


def plan_moe(s: Settings, source: Source) -> Plan:
    s.expect("qk_layernorm", True)
    s.expect("shared_expert_intermediate_size", 0)
    s.expect("moe_router_enable_expert_bias", False)
    for key in ("router_num_group", "router_topk_group", "routed_scaling_factor"):
        s.expect(key, 1)
    if set(s.get("moe_layer_freq", [1])) != {1}:
        s.problems.append("moe_layer_freq (only experts in every layer)")
    d_ff = "dense_intermediate_size" if s.get("dense_intermediate_size") else "expert_intermediate_size"  # no layer is dense
    config = standard_config(s, source, mask_id=156895, eos_ids=(156892,), pad_id=156892, qk_norm=True, d_ff=d_ff, norm_eps=1e-5)
    sizes = (s.integer("expert_intermediate_size"), s.integer("num_experts", most=4096), s.integer("num_experts_per_tok", most=4096))

    def experts(layer: int) -> Experts:
        return Experts(config.d_model, *sizes, normalise=False)

    return Plan("LLaDA-MoE", config, standard_name, None, THRESHOLD, experts, ("its chat template is not known here: plain text",))


FAMILY = Family("LLaDA", ("llada", "llada_moe", "lladamoe", "illada"), plan, {
    "GSAI-ML/LLaDA-8B-Base": ("8.0B", "-", "126336"),
    "GSAI-ML/LLaDA-8B-Instruct": ("8.0B", "-", "126336"),
    "GSAI-ML/LLaDA-1.5": ("8.0B", "-", "126336"),
    "GSAI-ML/iLLaDA-8B-Base": ("7.6B", "-", "5"),
    "GSAI-ML/iLLaDA-8B-Instruct": ("7.6B", "-", "5"),
    "inclusionAI/LLaDA-MoE-7B-A1B-Base": ("7.4B", "-", "156895"),
    "inclusionAI/LLaDA-MoE-7B-A1B-Instruct": ("7.4B", "-", "156895"),
})  # fmt: skip
