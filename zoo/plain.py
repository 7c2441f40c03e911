"""Plain autoregressive Qwen3, Qwen2.5 and Llama 3: not diffusion models, but what one is trained from.

They start out as their best-known descendants are: Qwen3 like SDAR (block-causal, blocks of 4, no shift), Qwen2.5 like Fast-dLLM v2
(blocks of 32, logits shifted), Llama like SDAR. The mask token is put into a row of the embedding table that no token uses; it means
nothing until it is trained. Changing model.config.block_size or .logit_shift before training is fine.
"""

import re

from zoo.family import Family, Plan, Settings, Source, standard_config, standard_name


def free_row(source: Source, rows: int) -> tuple[int, str]:
    """An id for the mask and a note about it. Raises ValueError if the table is full."""
    tokenizer = source.tokenizer
    if tokenizer is None:
        raise ValueError("an autoregressive checkpoint needs its tokenizer: the mask token is put where no token is")
    for name, i in tokenizer.specials.items():
        if re.fullmatch(r"\W*mask\W*", name.lower()):
            return i, f"{name} ({i}) is the mask token"
    if tokenizer.vocab_size < rows:
        return tokenizer.vocab_size, f"not a diffusion model yet: the unused row {tokenizer.vocab_size} of the table becomes the mask token"
    reserved = [(i, name) for name, i in tokenizer.specials.items() if "reserved_special_token" in name]
    if not reserved:
        raise ValueError(f"no row of the embedding table ({rows}) is free for a mask token")
    return max(reserved)[0], f"not a diffusion model yet: {max(reserved)[1]} ({max(reserved)[0]}) becomes the mask token"


def plan(s: Settings, source: Source) -> Plan:
    kind = s.get("model_type")
    s.expect("use_mrope", False)
    s.expect("pretraining_tp", 1)
    mask, note = free_row(source, s.integer("vocab_size"))
    qwen = {"eos_ids": (151643, 151645), "pad_id": 151643}
    if kind == "qwen3":
        config = standard_config(s, source, block_size=4, mask_id=mask, qk_norm=True, head_dim=128, **qwen)
    elif kind == "qwen2":
        config = standard_config(s, source, block_size=32, mask_id=mask, qkv_bias=True, logit_shift=True, **qwen)
    else:
        config = standard_config(s, source, block_size=4, mask_id=mask, eos_ids=(), pad_id=0)
    chat = {"qwen3": "base" not in source.label.lower(), "qwen2": "instruct" in source.label.lower()}.get(kind, False)
    template = {"qwen3": "qwen3", "qwen2": "qwen2.5"}[kind] if chat else None
    return Plan("plain", config, standard_name, template, notes=(note,))


FAMILY = Family("plain", ("qwen3", "qwen2", "llama"), plan, {
    "Qwen/Qwen3-0.6B": ("0.6B", "4", "151669"),
    "Qwen/Qwen3-1.7B-Base": ("1.7B", "4", "151669"),
    "Qwen/Qwen2.5-0.5B": ("0.5B", "32", "151665"),
    "Qwen/Qwen2.5-1.5B-Instruct": ("1.5B", "32", "151665"),
})  # fmt: skip
