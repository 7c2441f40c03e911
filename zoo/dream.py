"""Dream-7B and DiffuCoder-7B: Qwen2.5-7B made bidirectional; logits stay shifted (row i - 1 predicts token i), queries, keys and values
have biases. The mask is 151666; 151665 is <|beginoftext|>, with which no prompt needs to begin.

Decoding: Fast-dLLM's threshold 0.9 in blocks of 32 loses at most a point on most tasks (arXiv 2505.22618, Table 2). The authors' own, one
token a step over the whole canvas, is --block_size=0 with --certainty=entropy (their alg `entropy`), confidence
(`maskgit_plus`) or margin (`topk_margin`): the same tokens at temperature 0, but for the last two, which their schedule commits in one step
(and none in the first). Above temperature 0 theirs ranks by the tempered, filtered distribution. Their `origin` and alg_temp are not built.
DiffuCoder's licence is not a permissive one: see its model card.
"""

from zoo.family import Family, Plan, Settings, Source, standard_config, standard_name


def plan(s: Settings, source: Source) -> Plan:
    s.expect("use_mrope", False)
    config = standard_config(s, source, mask_id=151666, eos_ids=(151643, 151645), pad_id=151643, qkv_bias=True, logit_shift=True)
    template = None if "base" in source.label.lower() else "dream"
    return Plan("Dream", config, standard_name, template, {"rule": "threshold", "threshold": 0.9, "block_size": 32, "carry": "none"})


FAMILY = Family("Dream", ("dream",), plan, {
    "Dream-org/Dream-v0-Base-7B": ("7.6B", "-", "151666"),
    "Dream-org/Dream-v0-Instruct-7B": ("7.6B", "-", "151666"),
    "apple/DiffuCoder-7B-Instruct": ("7.6B", "-", "151666"),
    "apple/DiffuCoder-7B-cpGRPO": ("7.6B", "-", "151666"),
})  # fmt: skip
