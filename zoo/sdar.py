"""SDAR (JetLM), TraDo (Gen-Verse), and the RCD and SeqD models trained from them.

Qwen3 weights, block-causal, no logit shift. A published config.json may lack the block size and the mask id:
the mask is 151669, and the block is the one in the name (-b32), else 4. Blocks count from position 0, and the
prompt lies in them like everything else. The router of the 30B-A3B is Qwen3-MoE's: softmax, top 8,
renormalised.

Decoding: the thresholds 0.85 (generate.py), 0.9 (JetEngine) and 0.95 (the authors' evaluation) are all in
use; 0.95 is the safe one. RCD's own models carry residuals, in blocks of 32 or 64 at threshold 0.85 (arXiv
2601.22954, Table 1). At temperature 0 (their top_k = 1) and at 1 the tokens are those of the authors'
evaluation, static or dynamic, with at least one token a step. At other temperatures their confidence is the
tempered one. A budget of fewer steps holds for every block there, and for the whole response here.
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
    config = standard_config(s, source, block_size=block, mask_id=151669, eos_ids=(151643, 151645),
                             pad_id=151643, qk_norm=True, head_dim=128)  # fmt: skip
    experts = None
    n_experts = s.get("num_experts", s.get("num_local_experts"))
    if n_experts:
        name = "SDAR-MoE"
        for key in ("mlp_only_layers", "shared_expert_intermediate_size"):
            s.expect(key, [], 0)
        s.expect("decoder_sparse_step", 1)
        width, n_experts = s.integer("moe_intermediate_size"), s.integer("num_experts", n_experts, most=4096)
        top_k = s.integer("num_experts_per_tok", most=4096)
        normalise = bool(s.get("norm_topk_prob", True))  # true in SDAR-30B-A3B, by the ports that run it

        def experts(layer: int) -> Experts:
            return Experts(config.d_model, width, n_experts, top_k, normalise=normalise)

    threshold, carry = (0.85 if residual or control else 0.95), ("residual" if residual else "none")
    defaults = {"rule": "threshold", "threshold": threshold, "carry": carry}
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
