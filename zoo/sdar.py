"""SDAR (JetLM), TraDo (Gen-Verse) and the RCD and SeqD models trained from them: Qwen3 weights, block-causal, no logit shift.

The published config.json need not hold block size and mask id: the mask is 151669, and the block is what the name ends in (-b32), else 4.
Blocks are absolute and the prompt lies in them like everything else. The 30B-A3B router is Qwen3-MoE's: softmax, top 8, renormalised.
Threshold: 0.85 (generate.py), 0.9 (JetEngine) and 0.95 (the authors' evaluation) are all in use; the last is the safe one. RCD's own
models carry residuals, with blocks of 32 or 64 and threshold 0.85 (arXiv 2601.22954, Table 1).
At temperature 0 (their top_k = 1) and 1 the tokens are those of the authors' evaluation, static or dynamic, one a step at least. At other
temperatures their confidence is the tempered one; a budget of fewer steps is theirs for every block, here for the response.
"""

from zoo.experts import Experts
from zoo.family import Family, Plan, Settings, Source, named_block, standard_config, standard_name


def plan(s: Settings, source: Source) -> Plan:
    name, notes, label = "SDAR", [], source.label.lower()
    residual, control = "rcd" in label, "seqd" in label
    named, stated = named_block(label), s.get("block_size")
    if named and stated and named != stated:
        notes.append(f"config.json says block_size {stated}, the name says {named}: the name counts")
    block = named or s.integer("block_size", 32 if residual or control else 4)
    config = standard_config(
        s, source, block_size=block, mask_id=151669, eos_ids=(151643, 151645), pad_id=151643, qk_norm=True, head_dim=128
    )
    experts = None
    n_experts = s.get("num_experts", s.get("num_local_experts"))
    if n_experts:
        name = "SDAR-MoE"
        for key in ("mlp_only_layers", "shared_expert_intermediate_size"):
            s.expect(key, [], 0)
        s.expect("decoder_sparse_step", 1)
        sizes = (
            s.integer("moe_intermediate_size"),
            s.integer("num_experts", n_experts, most=4096),
            s.integer("num_experts_per_tok", most=4096),
        )
        normalise = bool(s.get("norm_topk_prob", True))  # true in SDAR-30B-A3B, by the ports that run it

        def experts(layer: int) -> Experts:
            return Experts(config.d_model, *sizes, normalise=normalise)

    defaults = {"rule": "threshold", "threshold": 0.85 if residual or control else 0.95, "carry": "residual" if residual else "none"}
    return Plan(name, config, standard_name, "qwen3", defaults, experts, tuple(notes))


FAMILY = Family("SDAR", ("sdar", "sdar_moe"), plan, {
    "JetLM/SDAR-1.7B-Chat": ("2.0B", "4", "151669"),
    "JetLM/SDAR-4B-Chat": ("4.4B", "4", "151669"),
    "JetLM/SDAR-8B-Chat": ("8.2B", "4", "151669"),
    "JetLM/SDAR-1.7B-Chat-b32": ("2.0B", "32", "151669"),
    "JetLM/SDAR-4B-Chat-b32": ("4.4B", "32", "151669"),
    "JetLM/SDAR-8B-Chat-b32": ("8.2B", "32", "151669"),
    "JetLM/SDAR-30B-A3B-Chat": ("30.5B", "4", "151669"),
    "JetLM/SDAR-30B-A3B-Sci": ("30.5B", "4", "151669"),
    "Gen-Verse/TraDo-4B-Instruct": ("4.4B", "4", "151669"),
    "Gen-Verse/TraDo-8B-Instruct": ("8.2B", "4", "151669"),
    "Gen-Verse/TraDo-8B-Thinking": ("8.2B", "4", "151669"),
})  # fmt: skip
