"""Plain autoregressive Qwen3, Qwen2.5 and Llama 3: what a diffusion model is trained from.

Each starts out as its best-known descendant: Qwen3 as SDAR (block-causal, blocks of 4, no shift), Qwen2.5 as
Fast-dLLM v2 (blocks of 32, logits shifted), Llama as SDAR. The mask token takes a row of the embedding table
that no token uses, and means nothing until it is trained. model.config.block_size and .logit_shift may be
changed before training.
"""

import re

from zoo.family import Family, Plan, Settings, Source, standard_config, standard_name


def free_row(source: Source, rows: int) -> tuple[int, str]:
    """An id for the mask and a note about it. Raises ValueError if the table of `rows` is full."""
    tokenizer = source.tokenizer
    if tokenizer is None:
        why = "the mask token is put where no token is"
        raise ValueError(f"an autoregressive checkpoint needs its tokenizer: {why}")
    for name, i in tokenizer.specials.items():
        if re.fullmatch(r"\W*mask\W*", name.lower()):
            return i, f"{name} ({i}) is the mask token"
    not_yet, size = "not a diffusion model yet", tokenizer.vocab_size
    if size < rows:
        return size, f"{not_yet}: the unused row {size} of the table becomes the mask token"
    reserved = [(i, name) for name, i in tokenizer.specials.items() if "reserved_special_token" in name]
    if not reserved:
        raise ValueError(f"no row of the embedding table ({rows}) is free for a mask token")
    return max(reserved)[0], f"{not_yet}: {max(reserved)[1]} ({max(reserved)[0]}) becomes the mask token"


def plan(s: Settings, source: Source) -> Plan:
    kind = s.get("model_type")
    s.expect("use_mrope", False)
    s.expect("pretraining_tp", 1)
    mask, note = free_row(source, s.integer("vocab_size"))
    qwen = {"eos_ids": (151643, 151645), "pad_id": 151643}
    if kind == "qwen3":
        config = standard_config(s, source, block_size=4, mask_id=mask, qk_norm=True, head_dim=128, **qwen)
    elif kind == "qwen2":
        config = standard_config(s, source, block_size=32, mask_id=mask, qkv_bias=True, logit_shift=True,
                                 **qwen)  # fmt: skip
    else:
        config = standard_config(s, source, block_size=4, mask_id=mask, eos_ids=(), pad_id=0)
    label = source.label.lower()
    chat = {"qwen3": "base" not in label, "qwen2": "instruct" in label}.get(kind, False)
    template = {"qwen3": "qwen3", "qwen2": "qwen2.5"}[kind] if chat else None
    return Plan("plain", config, standard_name, template, notes=(note,))


FAMILY = Family("plain", ("qwen3", "qwen2", "llama"), plan, {
    "Qwen/Qwen3-0.6B": ("0.6B", "4", "151669"),
    "Qwen/Qwen3-1.7B-Base": ("1.7B", "4", "151669"),
    "Qwen/Qwen2.5-0.5B": ("0.5B", "32", "151665"),
    "Qwen/Qwen2.5-1.5B-Instruct": ("1.5B", "32", "151665"),
})  # fmt: skip
