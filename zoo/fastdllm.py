"""Fast-dLLM v2 (Efficient-Large-Model), 1.5B and 7B: Qwen2.5-Instruct made block-causal in blocks of 32, logits still shifted.

A block is filled in sub-blocks of 8, left to right, and before them its first token alone: the row before it is clean, so that is the
autoregressive prediction. A prompt that ends inside a block leaves the head of it given, and no such first token. Threshold 0.9 is the
model card's (the code's default, 1, is one token a step). At temperature 0 the tokens are those of the authors' loop. What differs: an
answer's last sub-block is finished after an end token (the text is the same); above temperature 0 the first token of a block is drawn like
the others (theirs stays argmax); and a prompt of exactly 32 tokens is read, which theirs is not. The 1.5B model ties its head. The two ids
of padding in its files disagree; padding is never read.
"""

from zoo.family import Family, Plan, Settings, Source, standard_config, standard_name


def plan(s: Settings, source: Source) -> Plan:
    config = standard_config(s, source, block_size=s.integer("bd_size", 32), mask_id=151665, eos_ids=(151645, 151643), pad_id=151643,
                             qkv_bias=True, logit_shift=True)  # fmt: skip
    return Plan("Fast-dLLM v2", config, standard_name, "qwen2.5", {"rule": "threshold", "threshold": 0.9, "sub_block": 8, "carry": "none"})


FAMILY = Family("Fast-dLLM v2", ("fast_dllm_qwen",), plan, {
    "Efficient-Large-Model/Fast_dLLM_v2_1.5B": ("1.5B", "32", "151665"),
    "Efficient-Large-Model/Fast_dLLM_v2_7B": ("7.6B", "32", "151665"),
})  # fmt: skip
