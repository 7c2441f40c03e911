"""LLaDA2.0 (inclusionAI): mini, flash and their fine-tunes. Block-causal in blocks of 32, no logit shift.

One query_key_value tensor holds the rows of all queries, then of all keys, then of all values. RoPE turns the
first half of each head. The first layer is dense; each other layer has 256 experts behind a grouped sigmoid
router (zoo/experts.py), and a shared one.

The masks of an unfinished block see one another and the past only. So the exact cache works, though the
authors' code has none. Decoding: threshold 0.95, the authors' default.

LLaDA2.1 loads, and is sampled in the same way. Its editing, a second threshold above which a token that is
committed already is replaced, is left out. It reads logits at cells that are no masks, and a loop that may
undo what it did: the loop of rcd.py, Algorithm 2, reads masks and only ever commits. And what an edited cell
would carry is not defined: Eq. 2 mixes a residual into [MASK] embeddings alone.
"""

import re

from zoo.experts import Experts
from zoo.family import Family, Plan, Settings, Source, standard_config

NAMES = [("embed_tokens", "word_embeddings"), (r"self_attn\.[qkv]_proj", "attention.query_key_value"),
         (r"self_attn\.o_proj", "attention.dense"), (r"self_attn\.q_norm", "attention.query_layernorm"),
         (r"self_attn\.k_norm", "attention.key_layernorm")]  # fmt: skip


def original(name: str) -> str:
    """layers.3.self_attn.k_proj.weight -> model.layers.3.attention.query_key_value.weight"""
    for ours, theirs in NAMES:
        name = re.sub(ours, theirs, name)
    return name if name.startswith("lm_head.") else f"model.{name}"


def plan(s: Settings, source: Source) -> Plan:
    for key in ("use_bias", "use_qkv_bias", "using_split_qkv_in_self_attention", "norm_head", "norm_softmax",
                "use_sliding_window"):  # fmt: skip
        s.expect(key, False)
    s.get("sliding_window")  # the modelling file never reads it
    s.expect("use_qk_norm", True)
    s.expect("use_rmsnorm", True)
    s.expect("norm_topk_prob", True)
    s.expect("score_function", "sigmoid")
    s.expect("moe_router_enable_expert_bias", True)
    rotary = int(s.integer("head_dim", 128) * s.number("partial_rotary_factor", 0.5))
    if s.get("rotary_dim") not in (None, rotary):
        factor = s.get("partial_rotary_factor")
        s.problems.append(f"rotary_dim={s.get('rotary_dim')} beside partial_rotary_factor={factor}")
    s.values.setdefault("partial_rotary_factor", 0.5)
    s.values["use_sliding_window"] = False
    block = s.integer("block_size", 32)
    config = standard_config(s, source, block_size=block, mask_id=156895, eos_ids=(156892,), pad_id=156892,
                             qk_norm=True, head_dim=128)  # fmt: skip
    width, n_experts = s.integer("moe_intermediate_size"), s.integer("num_experts", most=4096)
    top_k = s.integer("num_experts_per_tok", most=4096)
    options = {"normalise": True, "sigmoid": True, "groups": s.integer("n_group", 8),
               "kept_groups": s.integer("topk_group", 4), "scale": s.number("routed_scaling_factor", 2.5),
               "shared": width * s.integer("num_shared_experts", 1, least=0, most=64)}  # fmt: skip
    dense = s.integer("first_k_dense_replace", 1, least=0)

    def experts(layer: int) -> Experts | None:
        return Experts(config.d_model, width, n_experts, top_k, **options) if layer >= dense else None

    defaults, label = {"rule": "threshold", "threshold": 0.95, "carry": "none"}, source.label.lower()
    notes = ["sampled without token editing: a committed token stays"] if "llada2.1" in label else []
    role_end = source.tokenizer.specials.get("<|role_end|>") if source.tokenizer else None
    if role_end is not None and role_end != config.mask_id:
        config.eos_ids = tuple(sorted({*config.eos_ids, role_end}))
    elif source.tokenizer:
        notes.append("the tokenizer's files do not list <|role_end|>: answers end at <|endoftext|> alone")
    return Plan("LLaDA2", config, original, "llada2", defaults, experts, tuple(notes))


FAMILY = Family("LLaDA2", ("llada2_moe",), plan, {
    "inclusionAI/LLaDA2.0-mini": ("16.3B", "32", "156895"),
    "inclusionAI/LLaDA2.0-flash": ("103B", "32", "156895"),
})  # fmt: skip
