"""dllm-hub's small models: Qwen3-0.6B and Qwen2.5-Coder-0.5B made masked (mdlm) or block (bd3lm) diffusion
models.

mdlm is bidirectional, bd3lm block-causal; no logit shift. Both have the same model_type: the name tells them
apart. bd3lm was trained on blocks of 32 from position 0, and sampling here counts them so too: a prompt may
end inside a block. Decoding: one token a step, as in their results.

The authors' sampler pads the longest prompt on the left to whole blocks; that is left out. Its blocks end
elsewhere in the text than those of training, and what a prompt gets depends on the longest one of its batch:
here rows are independent. The logits agree where a prompt fills its blocks.
"""

from zoo.family import Family, Plan, Settings, Source, standard_config, standard_name


def plan(s: Settings, source: Source) -> Plan:
    label, qwen3 = source.label.lower(), s.get("model_type").lower() == "a2d-qwen3"
    kind = next((k for k in ("bd3lm", "mdlm") if k in label), None)
    if kind is None and s.get("block_size") is None and source.block_size is None:
        choice = "mdlm (bidirectional) or bd3lm (blocks of 32)"
        raise ValueError(f"dllm: the folder's name {source.label!r} must say whether it is {choice}")
    block = s.integer("block_size", 32 if kind == "bd3lm" else 0, least=0)
    s.expect("loophole_enabled", False)
    mask = source.tokenizer.specials.get("<|mask|>") if source.tokenizer else None
    mask = mask or (151669 if qwen3 else 151665)  # the first id after the original's own
    config = standard_config(s, source, block_size=block, mask_id=mask, eos_ids=(151645, 151643),
                             pad_id=151643, qk_norm=qwen3, qkv_bias=not qwen3,
                             head_dim=128 if qwen3 else 0)  # fmt: skip
    template = "qwen3-no-thinking" if qwen3 else "qwen2.5"
    defaults = {"rule": "static", "block_size": 0 if block else 32, "carry": "none"}
    return Plan("dllm", config, standard_name, template, defaults)


FAMILY = Family("dllm", ("a2d-qwen3", "a2d-qwen2"), plan, {
    "dllm-hub/Qwen3-0.6B-diffusion-mdlm-v0.1": ("0.6B", "-", "151669"),
    "dllm-hub/Qwen3-0.6B-diffusion-bd3lm-v0.1": ("0.6B", "32", "151669"),
    "dllm-hub/Qwen2.5-Coder-0.5B-Instruct-diffusion-mdlm-v0.1": ("0.5B", "-", "151665"),
    "dllm-hub/Qwen2.5-Coder-0.5B-Instruct-diffusion-bd3lm-v0.1": ("0.5B", "32", "151665"),
})  # fmt: skip
