"""What a family of checkpoints says about itself, and the reading of config.json that all families share.

A family turns config.json into a Plan: our Config, the names of its tensors, its chat template, recommended
sampler settings. A setting that our Transformer does not compute (scaled RoPE, a sliding window, another
activation) stops the loading with an error that names it. So does an unknown setting whose name says that it
may touch the computation.
"""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn

from rcd import Config
from zoo.files import config_from
from zoo.tokenizer import Tokenizer

# Words in the name of a setting that may change what a model computes. Such a setting, if no family reads it,
# must be off, unless only training or the original's choice of kernels reads it.
SUSPECT = re.compile(
    "rope|rotary|scal|slid|window|bias|activation|_act|norm|softcap|alibi|multiplier|expert|moe|group|router|"
    "layer_types|quant"
)
HARMLESS = {"max_window_layers", "router_aux_loss_coef", "router_z_loss_coef", "output_router_logits",
            "init_std", "moe_router_dtype", "router_dtype", "rope_full_precision", "aux_loss_alpha",
            "moe_implementation"}  # fmt: skip
ROPE = ("rope_theta", "partial_rotary_factor")  # newer versions of transformers have them in rope_parameters
OFF = (None, False, 0, 1, [], {}, "default")  # 1: a factor, a frequency or a group of one


class Plan(NamedTuple):
    """Everything needed to rebuild one checkpoint, except its weights."""

    family: str
    config: Config
    original: Callable[[str], str]  # our parameter name -> theirs; those with one name are its rows, in order
    template: str | None = None  # name in zoo/templates.py
    defaults: dict = {"carry": "none"}  # Decoding fields; only models trained on residuals carry them
    experts: Callable[[int], nn.Module | None] | None = None  # layer number -> its mlp, None = the SwiGLU
    notes: tuple[str, ...] = ()  # what a user should know


class Settings:
    """config.json. What is read or expected is ticked off; finish() refuses wrong and unknown settings."""

    def __init__(self, values: dict, family: str):
        self.values, self.family, self.unread, self.problems = dict(values), family, set(values), []

    def get(self, key: str, default: Any = None) -> Any:
        """The value of key, or default if it is absent or null."""
        self.unread.discard(key)
        value = self.values.get(key)
        return default if value is None else value

    def integer(self, key: str, default: int | None = None, most: int = 1 << 24, least: int = 1) -> int:
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            kind = f"a whole number from {least} to {most}"
            raise ValueError(f"{self.family}: config.json needs {kind} as {key}, not {value!r}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e12:
            raise ValueError(f"{self.family}: config.json needs a positive number as {key}, not {value!r}")
        return float(value)

    def expect(self, key: str, *allowed: Any) -> None:
        """key must be absent, null or one of these."""
        value = self.get(key)
        if value is not None and value not in allowed:
            self.problems.append(f"{key}={value!r} (only {' or '.join(map(repr, allowed)) or 'null'})")

    def rope_theta(self) -> float:
        """The base of the rotary frequencies, from either spelling. Scaled variants of RoPE are problems."""
        for key in ("rope_scaling", "rope_parameters"):
            rope = self.get(key, {})
            plain = ("default", None, 1.0)
            if not isinstance(rope, dict) or any(v not in plain for k, v in rope.items() if k not in ROPE):
                self.problems.append(f"{key}={rope!r} (only plain RoPE)")
                self.values["rope_theta"] = 1.0  # so that finish() comes to name the problem
            else:
                self.values |= {k: rope[k] for k in ROPE if k in rope}
        return self.number("rope_theta")

    def finish(self) -> None:
        """Raises ValueError that lists every setting which our Transformer would compute wrongly."""
        suspect = [k for k in sorted(self.unread - HARMLESS) if SUSPECT.search(k)]
        unknown = [f"{k}={self.values[k]!r} (unknown here)" for k in suspect if self.values[k] not in OFF]
        wrong = self.problems + unknown
        if wrong:
            raise ValueError(f"{self.family}: settings that would need another model: {', '.join(wrong)}")


class Source(NamedTuple):
    """What a family may look at besides config.json."""

    label: str  # name of the hub repository or of the folder
    eos_ids: tuple[int, ...]  # end tokens in generation_config.json
    tokenizer: Tokenizer | None
    block_size: int | None = None  # of a model that was saved here


class Family(NamedTuple):
    name: str
    model_types: tuple[str, ...]  # in lower case
    plan: Callable[[Settings, Source], Plan]
    models: dict[str, tuple[str, str, str]]  # hub id -> parameters, block ("-": bidirectional), mask id


def standard_config(s: Settings, source: Source, *, mask_id: int, eos_ids: tuple[int, ...], pad_id: int,
                    block_size: int = 0, qk_norm: bool = False, qkv_bias: bool = False,
                    logit_shift: bool = False, head_dim: int = 0, d_ff: str = "intermediate_size",
                    norm_eps: float | None = None) -> Config:  # fmt: skip
    """Config of a checkpoint whose config.json has the keys of transformers' Qwen and Llama classes.

    mask_id, eos_ids and pad_id are the family's, for a config.json that does not name them. head_dim: what an
    absent one means; 0 is width / heads. Raises ValueError for a setting that is missing or out of range.
    """
    width, heads = s.integer("hidden_size"), s.integer("num_attention_heads", most=1024)
    rows = s.integer("vocab_size")
    head_dim = s.integer("head_dim", head_dim or width // heads, most=4096)
    s.expect("hidden_act", "silu")
    s.expect("attention_bias", qkv_bias)
    s.expect("mlp_bias", False)
    s.expect("use_sliding_window", False)
    if s.get("use_sliding_window") is not False:  # a window that is not switched off explicitly
        s.expect("sliding_window")
    s.get("sliding_window")
    if any(kind != "full_attention" for kind in s.get("layer_types", [])):
        s.problems.append("layer_types (only full_attention)")
    theta = s.rope_theta()
    rotary = round(head_dim * s.number("partial_rotary_factor", 1.0))
    if rotary > head_dim:
        s.problems.append("partial_rotary_factor above 1")
    return config_from(vars(Config()) | {
        "vocab_size": rows, "n_layer": s.integer("num_hidden_layers", most=1024), "n_head": heads,
        "n_kv_head": s.integer("num_key_value_heads", heads, most=1024), "head_dim": head_dim,
        "d_model": width, "d_ff": s.integer(d_ff), "max_len": s.integer("max_position_embeddings"),
        "block_size": block_size,
        "mask_id": s.integer("mask_token_id", mask_id, least=0), **ends(s, source, rows, eos_ids, pad_id),
        "rope_theta": theta, "rotary_dim": 0 if rotary == head_dim else rotary,
        "norm_eps": s.number("rms_norm_eps", norm_eps), "qk_norm": qk_norm, "qkv_bias": qkv_bias,
        "logit_shift": logit_shift, "tied": bool(s.get("tie_word_embeddings", False)),
    })  # fmt: skip


def ends(s: Settings, source: Source, rows: int, eos_ids: tuple[int, ...], pad_id: int) -> dict:
    """eos_ids and pad_id: the family's and those in the JSON files, as far as the table has them."""
    listed = s.get("eos_token_id", [])
    listed = [*eos_ids, *source.eos_ids, *(listed if isinstance(listed, list) else [listed])]
    eos = tuple(sorted({i for i in listed if isinstance(i, int) and 0 <= i < rows}))
    pads = [i for i in (s.get("pad_token_id"), pad_id, *eos, 0) if isinstance(i, int) and 0 <= i < rows]
    return {"eos_ids": eos, "pad_id": pads[0]}


def standard_name(name: str) -> str:
    """Our parameter name in a Qwen or Llama checkpoint."""
    return name if name.startswith("lm_head.") else f"model.{name}"


def named_block(label: str) -> int | None:
    """The block size that a name like SDAR-8B-Chat-b32 ends in or holds."""
    found = re.search(r"[-_]b(\d{1,4})(?![\dA-Za-z.])", label)
    return int(found[1]) if found and int(found[1]) else None
