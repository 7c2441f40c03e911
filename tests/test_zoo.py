"""The zoo against the classes of `transformers`: random tiny checkpoints written by them, read by us, must give the same logits."""

import json
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import peers
import rcd
import zoo
from zoo import checkpoint, files
from zoo.__main__ import main
from zoo.tokenizer import bytes_tokenizer

HUB = Path(__file__).parent.parent.parent / "shared/data/hub"
MASK, EOS, ROWS = 257, 256, 264  # bytes, <eos>, <mask>, and rows that no token uses
SIZES = dict(vocab_size=ROWS, hidden_size=48, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
             max_position_embeddings=64, rope_theta=5e4)  # fmt: skip
EXPERTS = dict(num_experts=8, num_experts_per_tok=3, moe_intermediate_size=24)


def randomise(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in (*model.named_parameters(), *((n, b) for n, b in model.named_buffers() if "correction_bias" in n)):
            noise = torch.randn(p.shape, generator=generator)
            p.copy_(
                1 + 0.3 * noise
                if name.endswith("norm.weight")
                else 0.3 * noise
                if p.dim() < 2 or "embed" in name
                else noise / p.shape[-1] ** 0.5
            )
    return model.float().eval()


def write(folder: Path, model: torch.nn.Module, tensors: dict | None = None, values: dict | None = None, **changes) -> Path:
    """A hub folder: what save_pretrained writes, with other tensors or another config.json, plus a byte tokenizer."""
    model.save_pretrained(folder)
    values = values if values is not None else json.loads((folder / "config.json").read_text())
    values = {"mask_token_id": MASK, **values, "eos_token_id": EOS, **changes}
    (folder / "config.json").write_text(json.dumps({k: v for k, v in values.items() if v is not ...}))
    if tensors is not None:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    bytes_tokenizer(["<eos>", "<mask>"]).save(folder)
    return folder


def sdar(folder: Path, name: str = "SDAR-tiny", **changes) -> Path:
    model = randomise(transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SIZES, head_dim=16, tie_word_embeddings=False)))
    return write(folder / name, model, **{"model_type": "sdar", **changes})


def their_logits(model: torch.nn.Module, tokens: torch.Tensor, block: int) -> torch.Tensor:
    """Logits (B, T, V) of a transformers model without its causal mask; block 0 = bidirectional."""
    T = tokens.shape[1]
    seen = torch.tensor([[not block or k // block <= q // block for k in range(T)] for q in range(T)])
    mask = torch.zeros(1, 1, T, T).masked_fill(~seen, torch.finfo(torch.float32).min)
    model.config._attn_implementation = "eager"
    with torch.no_grad():
        return model(input_ids=tokens, attention_mask=mask.expand(len(tokens), 1, T, T), use_cache=False).logits


@torch.no_grad()
def our_logits(model: rcd.Transformer, tokens: torch.Tensor) -> torch.Tensor:
    """Logits (B, T - 1, V) of the tokens 1 to T - 1, whichever row predicts them."""
    B, T = tokens.shape
    positions, block = torch.arange(T)[None], model.config.block_size
    mask = peers.block_causal_mask(positions, positions, block)[:, None] if block else None
    hidden = model(model.embed(tokens), positions, mask)
    row, column = (i.flatten() for i in torch.meshgrid(torch.arange(B), torch.arange(1, T), indexing="ij"))
    return model.logits(model.rows(hidden, (row, column))).view(B, T - 1, -1)


def assert_same(theirs: torch.nn.Module, loaded: zoo.Loaded, block: int, shift: bool) -> None:
    tokens = torch.randint(0, ROWS, (2, 11), generator=torch.Generator().manual_seed(1))
    expected, got = their_logits(theirs, tokens, block), our_logits(loaded.model, tokens)
    expected = expected[:, :-1] if shift else expected[:, 1:]
    drawable = [i for i in range(ROWS) if i != MASK and i < MASK + 1]
    assert expected.std() > 0.3, "the oracle says nothing"
    assert torch.allclose(got[..., drawable], expected[..., drawable], atol=1e-5, rtol=1e-5)
    assert bool((got[..., MASK:] == -torch.inf).all())
    assert loaded.model.config.block_size == block and loaded.model.config.logit_shift == shift and loaded.model.config.mask_id == MASK


# ---------------------------------------------------------------------------------------------------------------------------------------
# Families


@pytest.mark.parametrize("name, block", [("SDAR-4B-Chat", 4), ("SDAR-1.7B-Chat-b8", 8), ("RCD-SDAR-4B-b3", 3), ("SeqD-SDAR-4B", 32)])
def test_sdar_equals_qwen3_and_takes_its_block_from_the_name(tmp_path, name, block):
    model = randomise(transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SIZES, head_dim=16, tie_word_embeddings=False)))
    loaded = zoo.load(write(tmp_path / name, model, model_type="sdar"))
    assert_same(model, loaded, block, False)
    residual, control = name.startswith("RCD"), name.startswith("SeqD")
    assert loaded.defaults == {
        "rule": "threshold",
        "threshold": 0.85 if residual or control else 0.95,
        "carry": "residual" if residual else "none",
    }
    assert rcd.Sampler(**loaded.defaults) and loaded.template == "qwen3"
    assert loaded.model.config.head_dim == 16 and loaded.model.config.real_vocab == 258 and EOS in loaded.model.config.eos_ids


def test_an_absent_head_dim_is_128_in_qwen3_kin_and_width_over_heads_in_others(tmp_path):
    model = randomise(transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SIZES, head_dim=128, tie_word_embeddings=False)))
    assert_same(model, zoo.load(write(tmp_path / "SDAR", model, model_type="sdar", head_dim=...)), 4, False)
    model = randomise(transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SIZES, tie_word_embeddings=False)))
    assert_same(model, zoo.load(write(tmp_path / "Dream", model, model_type="Dream", head_dim=...)), 0, True)


def test_sdar_block_of_config_json(tmp_path):
    assert zoo.load(sdar(tmp_path, block_size=16)).model.config.block_size == 16


def test_padding_and_cache_change_nothing(tmp_path):
    """Blocks fed one by one through the cache, and a short row beside a longer one, against the original's single uncached forward."""
    theirs = randomise(transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SIZES, head_dim=16, tie_word_embeddings=False)))
    model = zoo.load(write(tmp_path / "SDAR-b4", theirs, model_type="sdar")).model
    tokens = torch.randint(0, MASK, (1, 12), generator=torch.Generator().manual_seed(2))
    expected = their_logits(theirs, tokens, 4)[0, :, :MASK]
    cache = rcd.KVCache(model.config, 1, 12, torch.device("cpu"), torch.float32)
    with torch.no_grad():
        for start in (0, 4, 8):
            at = torch.arange(start, start + 4)[None]
            cache.point_at(torch.tensor([0]), at, start + 4)
            hidden = model(model.embed(tokens[:, start : start + 4]), at, None, cache)
            assert torch.allclose(model.logits(hidden[0])[:, :MASK], expected[start : start + 4], atol=1e-5, rtol=1e-5)
    short = tokens[:, :8].clone()
    short[0, 6:] = MASK
    alone = their_logits(theirs, short, 4)[0, 6:8, :MASK].log_softmax(-1)
    canvas = torch.full((2, 12), MASK)
    canvas[0, :6], canvas[1, :9] = short[0, :6], tokens[0, :9]
    step = next(rcd.denoise(model, canvas, rcd.Sampler(carry="none"), lengths=torch.tensor([8, 12])))
    assert torch.allclose(step.confidence[0, 6:8], alone.exp().amax(-1), atol=1e-5)


def llada_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A Llama's tensors under LLaDA's names, written out from the model card's modelling file."""
    out = {"model.transformer.wte.weight": model.model.embed_tokens.weight, "model.transformer.ln_f.weight": model.model.norm.weight,
           "model.transformer.ff_out.weight": model.lm_head.weight}  # fmt: skip
    for i, layer in enumerate(model.model.layers):
        at, mlp, to = layer.self_attn, layer.mlp, f"model.transformer.blocks.{i}."
        out |= {to + "attn_norm.weight": layer.input_layernorm.weight, to + "ff_norm.weight": layer.post_attention_layernorm.weight,
                to + "q_proj.weight": at.q_proj.weight, to + "k_proj.weight": at.k_proj.weight, to + "v_proj.weight": at.v_proj.weight,
                to + "attn_out.weight": at.o_proj.weight, to + "ff_proj.weight": mlp.gate_proj.weight,
                to + "up_proj.weight": mlp.up_proj.weight,
                to + "ff_out.weight": mlp.down_proj.weight}  # fmt: skip
    return {n: t.detach().clone() for n, t in out.items()}


LLADA = {
    "activation_type": "silu", "alibi": False, "alibi_bias_max": 8.0, "architectures": ["LLaDAModelLM"], "attention_layer_norm": False,
    "attention_layer_norm_with_affine": True, "bias_for_layer_norm": False, "block_group_size": 1, "block_type": "llama", "d_model": 48,
    "embedding_size": ROWS, "include_bias": False, "include_qkv_bias": False, "input_emb_norm": False, "layer_norm_type": "rms",
    "layer_norm_with_affine": True, "max_sequence_length": 64, "mlp_hidden_size": 40, "mlp_ratio": 4, "model_type": "llada",
    "multi_query_attention": None, "n_heads": 4, "n_kv_heads": 4, "n_layers": 2, "rms_norm_eps": 1e-5, "rope": True,
    "rope_full_precision": True, "rope_theta": 5e4, "scale_logits": False, "vocab_size": ROWS, "weight_tying": False,
}  # fmt: skip


@pytest.mark.parametrize("name, template", [("LLaDA-8B-Instruct", "llada"), ("LLaDA-8B-Base", None)])
def test_llada_equals_llama_without_its_mask(tmp_path, name, template):
    model = randomise(transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SIZES, "num_key_value_heads": 4}, rms_norm_eps=1e-5)))
    loaded = zoo.load(write(tmp_path / name, model, llada_tensors(model), LLADA))
    assert_same(model, loaded, 0, False)
    assert loaded.template == template and loaded.defaults["block_size"] == 32


def test_illada_equals_llama_without_its_mask_tied(tmp_path):
    model = randomise(transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, tie_word_embeddings=True)))
    loaded = zoo.load(write(tmp_path / "x", model, model_type="illada", architectures=["ILLaDAForCausalLM"]))
    assert_same(model, loaded, 0, False)
    assert loaded.model.config.tied


def unfused(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The model's tensors with one entry for every expert's projection, as all published checkpoints have them."""
    out = {}
    for name, t in model.state_dict().items():
        if name.endswith("experts.gate_up_proj"):
            for e, both in enumerate(t):
                for part, w in zip(("gate", "up"), both.chunk(2)):
                    out[name.replace("gate_up_proj", f"{e}.{part}_proj.weight")] = w.contiguous()
        elif name.endswith("experts.down_proj"):
            out |= {name.replace("down_proj", f"{e}.down_proj.weight"): w.contiguous() for e, w in enumerate(t)}
        else:
            out[name] = t
    return out


@pytest.mark.parametrize("normalise", [True, False])
def test_sdar_moe_equals_qwen3_moe(tmp_path, normalise):
    config = transformers.Qwen3MoeConfig(**SIZES, **EXPERTS, head_dim=16, norm_topk_prob=normalise, tie_word_embeddings=False)
    model = randomise(transformers.Qwen3MoeForCausalLM(config))
    folder = write(tmp_path / "SDAR-30B-A3B-Chat", model, unfused(model), model_type="sdar_moe", num_experts=8)
    loaded = zoo.load(folder)
    assert_same(model, loaded, 4, False)
    assert loaded.model.layers[1].mlp.top_k == 3


def test_llada_moe_equals_qwen3_moe_without_renormalising(tmp_path):
    config = transformers.Qwen3MoeConfig(**{**SIZES, "num_key_value_heads": 4}, **EXPERTS, head_dim=12, norm_topk_prob=False,
    rms_norm_eps=1e-5,
                                         tie_word_embeddings=False)  # fmt: skip
    model = randomise(transformers.Qwen3MoeForCausalLM(config))
    values = {**SIZES, "num_key_value_heads": 4, "architectures": ["LLaDAMoEModelLM"], "model_type": "llada", "num_experts": 8,
              "num_experts_per_tok": 3, "expert_intermediate_size": 24, "dense_intermediate_size": 40, "moe_layer_freq": [1, 1],
              "qk_layernorm": True, "norm_topk_prob": True, "routed_scaling_factor": 1, "router_num_group": None, "hidden_act": "silu",
              "partial_rotary_factor": 1, "router_topk_group": None, "moe_router_enable_expert_bias": False, "attention_bias": False,
              "shared_expert_intermediate_size": None, "tie_word_embeddings": False, "router_aux_loss_coef": 0.01}  # fmt: skip
    values.pop("intermediate_size")
    assert_same(model, zoo.load(write(tmp_path / "m", model, unfused(model), values)), 0, False)


LLADA2 = {
    **{k: v for k, v in SIZES.items() if k != "rope_theta"}, "model_type": "llada2_moe", "architectures": ["LLaDA2MoeModelLM"],
    "head_dim": 16,
    "first_k_dense_replace": 1, "hidden_act": "silu", "moe_intermediate_size": 24, "n_group": 4, "topk_group": 2, "norm_head": False,
    "norm_topk_prob": True, "num_experts": 16, "num_experts_per_tok": 3, "num_shared_experts": 1, "output_router_logits": False,
    "partial_rotary_factor": 0.5, "rms_norm_eps": 1e-6, "rope_theta": 600000, "routed_scaling_factor": 2.5, "score_function": "sigmoid",
    "moe_router_enable_expert_bias": True, "tie_word_embeddings": False, "use_qk_norm": True, "use_qkv_bias": False, "use_bias": False,
    "router_dtype": "fp32", "sliding_window": 4096, "use_sliding_window": False, "max_window_layers": 28,
}  # fmt: skip


def glm(layers: int = 3) -> torch.nn.Module:
    """GLM-4's mixture of experts has LLaDA2's partial rotary, head norms, grouped sigmoid router and shared expert."""
    keep = {k: v for k, v in {**SIZES, "num_hidden_layers": layers}.items() if k != "rope_theta"}
    return randomise(transformers.Glm4MoeForCausalLM(transformers.Glm4MoeConfig(
        **keep, head_dim=16, n_routed_experts=16, num_experts_per_tok=3, moe_intermediate_size=24, norm_topk_prob=True, n_group=4,
        topk_group=2,
        n_shared_experts=1, first_k_dense_replace=1, use_qk_norm=True, routed_scaling_factor=2.5, attention_bias=False, rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 6e5, "partial_rotary_factor": 0.5}, tie_word_embeddings=False)))  # fmt: skip


def llada2_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    out = {}
    for name, t in unfused(model).items():
        name = name.replace("embed_tokens", "word_embeddings").replace("self_attn", "attention").replace("o_proj", "dense")
        name = (
            name.replace("q_norm", "query_layernorm").replace("k_norm", "key_layernorm").replace("e_score_correction_bias", "expert_bias")
        )
        out[name] = t
    for i in range(len(model.model.layers)):
        at = f"model.layers.{i}.attention."
        out[at + "query_key_value.weight"] = torch.cat([out.pop(f"{at}{x}_proj.weight") for x in "qkv"])
    return out


def test_llada2_equals_glm4_moe(tmp_path):
    model = glm()
    loaded = zoo.load(write(tmp_path / "LLaDA2.0-mini", model, llada2_tensors(model), LLADA2, num_hidden_layers=3, block_size=4))
    assert_same(model, loaded, 4, False)
    assert loaded.model.config.rotary_dim == 8 and loaded.template == "llada2"
    assert isinstance(loaded.model.layers[0].mlp, rcd.SwiGLU) and not isinstance(loaded.model.layers[1].mlp, rcd.SwiGLU)
    again = zoo.load(write(tmp_path / "b", model, llada2_tensors(model), LLADA2, num_hidden_layers=3))
    assert again.model.config.block_size == 32


@pytest.mark.parametrize("kept", [2, 1])
def test_group_router_against_a_literal_one(kept):
    """Every token by hand: groups by the sum of their two best biased scores, experts by biased score, weights by unbiased score."""
    from zoo.experts import Experts

    torch.manual_seed(0)
    experts = Experts(8, 4, 12, 3, normalise=True, sigmoid=True, groups=4, kept_groups=kept, scale=2.5)
    experts.gate.weight.data.normal_()
    experts.gate.expert_bias.normal_(std=2)  # so large that scores below zero take part in the choice
    x = torch.randn(50, 8)
    weights, chosen = experts.route(x)
    for n in range(50):
        s = [1 / (1 + 2.718281828459045 ** -float(w.detach() @ x[n])) for w in experts.gate.weight]
        biased = [s[e] + float(experts.gate.expert_bias[e]) for e in range(12)]
        groups = sorted(range(4), key=lambda g: -sum(sorted(biased[3 * g : 3 * g + 3])[1:]))[:kept]
        best = sorted((e for e in range(12) if e // 3 in groups), key=lambda e: -biased[e])[:3]
        assert sorted(chosen[n].tolist()) == sorted(best)
        for w, e in zip(weights[n].tolist(), chosen[n].tolist()):
            assert w == pytest.approx(2.5 * s[e] / sum(s[i] for i in best), rel=1e-5)


def test_experts_get_gradients_and_autocast(tmp_path):
    model = glm()
    ours = zoo.load(write(tmp_path / "x", model, llada2_tensors(model), LLADA2, num_hidden_layers=3)).model
    tokens = torch.randint(0, 256, (2, 32), generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        rcd.diffusion_loss(ours, tokens, generator=torch.Generator().manual_seed(0)).backward()
    mlp = ours.layers[1].mlp
    assert mlp.gate.weight.grad.abs().sum() > 0 and any(e.up_proj.weight.grad is not None for e in mlp.experts)
    assert "expert_bias" not in {n.split(".")[-1] for n, _ in ours.named_parameters()}  # an optimiser must not touch it


@pytest.mark.parametrize("model_type, name, block", [("Dream", "Dream-v0-Instruct-7B", 0), ("Fast_dLLM_Qwen", "Fast_dLLM_v2_7B", 8)])
def test_shifted_families_equal_qwen2(tmp_path, model_type, name, block):
    model = randomise(transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SIZES, tie_word_embeddings=block != 0)))
    folder = write(tmp_path / name, model, model_type=model_type, bd_size=8)
    loaded = zoo.load(folder)
    assert_same(model, loaded, block, True)
    assert loaded.model.config.tied == (block != 0) and loaded.model.config.qkv_bias
    assert loaded.template == ("qwen2.5" if block else "dream")


@pytest.mark.parametrize("name, block", [("Qwen3-0.6B-diffusion-mdlm-v0.1", 0), ("Qwen3-0.6B-diffusion-bd3lm-v0.1", 32)])
def test_dllm_equals_qwen3_tied(tmp_path, name, block):
    model = randomise(transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SIZES, head_dim=16, tie_word_embeddings=True)))
    loaded = zoo.load(write(tmp_path / name, model, model_type="a2d-qwen3"))
    assert_same(model, loaded, block, False)
    assert loaded.model.config.tied and loaded.template == "qwen3-no-thinking"
    with pytest.raises(ValueError, match="must say whether it is mdlm"):
        zoo.load(write(tmp_path / "mine", model, model_type="a2d-qwen3"))


@pytest.mark.parametrize("kind, block, shift", [("qwen3", 4, False), ("qwen2", 32, True), ("llama", 4, False)])
def test_autoregressive_start_puts_the_mask_into_an_unused_row(tmp_path, capsys, kind, block, shift):
    classes = {"qwen3": (transformers.Qwen3ForCausalLM, transformers.Qwen3Config), "qwen2": (transformers.Qwen2ForCausalLM,
    transformers.Qwen2Config),
               "llama": (transformers.LlamaForCausalLM, transformers.LlamaConfig)}  # fmt: skip
    model = randomise(
        classes[kind][0](classes[kind][1](**SIZES, **({"head_dim": 16} if kind == "qwen3" else {}), tie_word_embeddings=False))
    )
    folder = write(tmp_path / "x", model, mask_token_id=...)
    bytes_tokenizer(["<eos>"]).save(folder)
    loaded = zoo.load(folder)
    assert "unused row 257 of the table becomes the mask token" in capsys.readouterr().err
    assert_same(model, loaded, block, shift)
    assert loaded.template is None if kind != "qwen3" else loaded.template == "qwen3"
    bytes_tokenizer(["<eos>", *(f"<|reserved_special_token_{i}|>" for i in range(7))]).save(folder)
    assert zoo.load(folder).model.config.mask_id == 263
    bytes_tokenizer(["<eos>", *(f"<{i}>" for i in range(7))]).save(folder)
    with pytest.raises(ValueError, match="no row of the embedding table"):
        zoo.load(folder)


# Shapes of the published models, typed in from their model cards and papers; the counts in `zoo list` must follow from them.
QWEN3 = dict(vocab_size=151936, head_dim=128, num_key_value_heads=8, max_position_embeddings=32768, rope_theta=1e6, rms_norm_eps=1e-6)
LLADA2_MINI = {
    "num_hidden_layers": 20, "hidden_size": 2048, "intermediate_size": 5120, "first_k_dense_replace": 1, "hidden_act": "silu",
    "head_dim": 128,
    "max_position_embeddings": 16384, "moe_intermediate_size": 512, "norm_topk_prob": True, "num_experts_per_tok": 8, "norm_head": False,
    "num_attention_heads": 16, "num_experts": 256, "num_key_value_heads": 4, "rope_theta": 600000, "rope_scaling": None,
    "tie_word_embeddings": False, "use_bias": False, "use_rmsnorm": True, "rms_norm_eps": 1e-06, "num_shared_experts": 1,
    "use_qkv_bias": False,
    "embedding_dropout": 0.0, "norm_softmax": False, "output_dropout": 0.0, "vocab_size": 157184, "rotary_dim": 64, "router_dtype": "fp32",
    "using_split_qkv_in_self_attention": False, "moe_router_enable_expert_bias": True, "routed_scaling_factor": 2.5, "n_group": 8,
    "topk_group": 4, "score_function": "sigmoid", "max_window_layers": 28, "output_router_logits": False, "pad_token_id": 156892,
    "partial_rotary_factor": 0.5, "use_sliding_window": False, "attention_dropout": 0.0, "use_cache": False,
}  # fmt: skip
PUBLISHED = {
    "JetLM/SDAR-1.7B-Chat": ("sdar", dict(QWEN3, hidden_size=2048, num_hidden_layers=28, num_attention_heads=16, intermediate_size=6144),
    2031739904),
    "JetLM/SDAR-4B-Chat": ("sdar", dict(QWEN3, hidden_size=2560, num_hidden_layers=36, num_attention_heads=32, intermediate_size=9728),
    4411424256),
    "JetLM/SDAR-8B-Chat-b32": ("sdar", dict(QWEN3, hidden_size=4096, num_hidden_layers=36, num_attention_heads=32,
    intermediate_size=12288), 8190735360),
    "JetLM/SDAR-30B-A3B-Chat": ("sdar_moe", dict(QWEN3, hidden_size=2048, num_hidden_layers=48, num_attention_heads=32,
    num_key_value_heads=4,
                                intermediate_size=6144, num_experts=128, num_experts_per_tok=8, moe_intermediate_size=768), None),
    "Efficient-Large-Model/Fast_dLLM_v2_1.5B": ("Fast_dLLM_Qwen", dict(
        vocab_size=151936, hidden_size=1536, num_hidden_layers=28, num_attention_heads=12, num_key_value_heads=2, intermediate_size=8960,
        rope_theta=1e6, rms_norm_eps=1e-6, tie_word_embeddings=True, max_position_embeddings=32768), 1543714304),
    "Dream-org/Dream-v0-Instruct-7B": ("Dream", dict(
        vocab_size=152064, hidden_size=3584, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4, intermediate_size=18944,
        rope_theta=1e6, rms_norm_eps=1e-6, max_position_embeddings=131072), 7615616512),
    "dllm-hub/Qwen3-0.6B-diffusion-mdlm-v0.1": ("a2d-qwen3", dict(
        QWEN3, hidden_size=1024, num_hidden_layers=28, num_attention_heads=16, intermediate_size=3072, tie_word_embeddings=True),
        596049920),
    "inclusionAI/LLaDA-MoE-7B-A1B-Base": ("llada", dict(
        vocab_size=157184, hidden_size=2048, num_hidden_layers=16, num_attention_heads=16, num_key_value_heads=16, num_experts=64,
        rope_theta=5e4,
        num_experts_per_tok=8, expert_intermediate_size=1024, dense_intermediate_size=8192, max_position_embeddings=8192), None),
    "inclusionAI/LLaDA2.0-mini": ("llada2_moe", LLADA2_MINI, None),
    "inclusionAI/LLaDA2.0-flash": ("llada2_moe", {**LLADA2_MINI, "num_hidden_layers": 32, "hidden_size": 4096, "intermediate_size": 9216,
                                   "moe_intermediate_size": 1024, "num_attention_heads": 32}, None),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_shapes_have_the_listed_number_of_parameters(tmp_path, name):
    from zoo.families import FAMILIES

    model_type, values, exact = PUBLISHED[name]
    folder = tmp_path / name.split("/")[1]
    folder.mkdir()
    counts = {}
    for layers in (2, 3):  # all further layers are like the third
        (folder / "config.json").write_text(json.dumps({"model_type": model_type, **values, "num_hidden_layers": layers}))
        counts[layers] = sum(p.numel() for p in checkpoint.build(checkpoint.plan_for(folder, None)).parameters())
    count = counts[2] + (values["num_hidden_layers"] - 2) * (counts[3] - counts[2])
    listed = next(f.models[name][0] for f in FAMILIES if name in f.models)
    assert exact is None or count == exact
    assert (f"{count / 1e9:.1f}B" if count < 1e11 else f"{count / 1e9:.0f}B") == listed


@pytest.mark.parametrize("name, mask, count", [("JetLM--SDAR-4B-Chat", 151669, 399), ("GSAI-ML--LLaDA-8B-Instruct", 126336, 291)])
def test_real_index_files_name_our_tensors_and_bytes(name, mask, count):
    folder = HUB / name
    if not folder.is_dir():
        pytest.skip("no real hub metadata here")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    plan = checkpoint.plan_for(folder, None)
    model = checkpoint.build(plan)
    tensors = checkpoint.layout(plan, model)
    assert {*tensors} == {*index["weight_map"]} and len(tensors) == count
    assert 2 * sum(p.numel() for p in model.parameters()) == index["metadata"]["total_size"]
    assert plan.config.mask_id == mask


# ---------------------------------------------------------------------------------------------------------------------------------------
# Loading


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtypes_and_shards(tmp_path, dtype):
    """Stored in any of the three, in one file or in shards, and converted or not on loading: the values are torch's own conversion."""
    model = randomise(transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SIZES, head_dim=16, tie_word_embeddings=False))).to(dtype)
    write(tmp_path / "one", model, model_type="sdar")
    model.save_pretrained(tmp_path / "many", max_shard_size="50KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(tmp_path / "one" / name, tmp_path / "many" / name)
    for folder in ("one", "many"):
        for want in (None, torch.float32, torch.bfloat16):
            ours = zoo.load(tmp_path / folder, dtype=want).model
            for n, p in ours.named_parameters():
                assert p.dtype == (want or dtype) and p.requires_grad and not p.is_meta
                assert torch.equal(p, model.get_parameter(n if n.startswith("lm_head") else f"model.{n}").to(want or dtype)), n


def test_weights_are_a_copy_not_a_window_into_the_file(tmp_path):
    folder = sdar(tmp_path)
    model, before = zoo.load(folder).model, (folder / "model.safetensors").read_bytes()
    weights = {n: p.clone() for n, p in model.named_parameters()}
    (folder / "model.safetensors").write_bytes(b"\0" * len(before))
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters())


MEASURE = """
import sys, time, rcd, torch, zoo, zoo.checkpoint, zoo.tokenizer
with torch.device("meta"):
    rcd.Transformer(rcd.Config())  # torch's own 65 MB for its first meta tensors
def rss():
    with open("/proc/self/status") as f:
        return {l.split(":")[0]: int(l.split()[1]) * 1024 for l in f if l.startswith(("VmRSS", "VmHWM"))}
before, begin = rss()["VmRSS"], time.perf_counter()
loaded = zoo.load(sys.argv[1], dtype=getattr(torch, sys.argv[2]))
weights = sum(p.numel() * p.element_size() for p in loaded.model.parameters())
print(rss()["VmHWM"] - before, weights, time.perf_counter() - begin)
if len(sys.argv) > 3:
    begin = time.perf_counter()
    response, nfe = rcd.generate(loaded.model, [loaded.tokenizer.encode("one two three")], 4, rcd.Sampler(**loaded.defaults))
    print(len(response[0]), nfe[0], time.perf_counter() - begin)
"""


def measure(folder: Path, values: dict, dtype: str, stored: torch.dtype, shards: int, *sample: str) -> list[list[float]]:
    """Write a checkpoint of this config.json and load it in a process of its own: [[peak bytes, bytes of the weights, seconds], ...]."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(values))
    bytes_tokenizer(["<eos>", "<mask>"]).save(folder)
    plan = checkpoint.plan_for(folder, None)
    shapes = {plan.original(n): p.shape for n, p in checkpoint.build(plan).state_dict().items()}
    files = {n: f"model-{i * shards // len(shapes)}.safetensors" for i, n in enumerate(shapes)}
    for file in {*files.values()}:
        save_file({n: torch.randn(s, dtype=stored) * 0.02 if len(s) > 1 else torch.ones(s, dtype=stored) for n,
        s in shapes.items() if files[n] == file},
                  folder / file)  # fmt: skip
    (folder / checkpoint.INDEX).write_text(json.dumps({"weight_map": files}))
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, str(folder), dtype, *sample], capture_output=True, text=True, cwd=Path(zoo.__file__).parent.parent
    )
    assert run.returncode == 0, run.stderr
    return [[float(x) for x in line.split()] for line in run.stdout.splitlines()]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("dtype, shards", [("float32", 3), ("bfloat16", 1)])
def test_peak_memory_is_that_of_the_weights(tmp_path, dtype, shards):
    values = dict(
        SIZES, hidden_size=1024, intermediate_size=4096, num_attention_heads=8, num_hidden_layers=4, model_type="sdar", head_dim=128
    )
    values |= {"mask_token_id": MASK, "rms_norm_eps": 1e-6}
    [(peak, weights, _)] = measure(tmp_path / "SDAR", values, dtype, torch.float32, shards)
    assert weights > 1e8
    # beside the weights: the 64 MiB of a file that are mapped at a time, and the tensor that crosses their end
    assert peak <= 1.05 * weights + 2**26 + 17e6, (peak / 1e6, weights / 1e6)


@pytest.mark.full_size
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("name", ["SDAR-1.7B-Chat", "LLaDA-8B-Instruct"])
def test_full_size(tmp_path, name):
    """`pytest -m full_size -s -k SDAR`: random bfloat16 weights in the real shapes, 4 GB on disk and in memory (LLaDA: 16 GB). Peak memory
    while loading is within 5 % of the weights; a block is sampled."""
    values = {
        **QWEN3,
        "model_type": "sdar",
        "hidden_size": 2048,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "intermediate_size": 6144,
    }
    if name.startswith("LLaDA"):
        values = LLADA | {"d_model": 4096, "n_heads": 32, "n_kv_heads": 32, "n_layers": 32, "mlp_hidden_size": 12288,
        "embedding_size": 126464,
                          "max_sequence_length": 4096}  # fmt: skip
    values["mask_token_id"] = MASK  # the byte tokenizer's
    (peak, weights, seconds), (tokens, nfe, sampling) = measure(tmp_path / name, values, "bfloat16", torch.bfloat16, 4, "sample")
    print(f"\n{name}: {weights / 1e9:.2f} GB of weights, peak {peak / 1e9:.2f} GB, loaded in {seconds:.1f} s, ", end="")
    print(f"{tokens:.0f} tokens in {nfe:.0f} forwards, {sampling:.1f} s")
    assert peak <= 1.05 * weights


def test_tied_heads(tmp_path):
    """Stored equal: left out. Stored and different: refused, as the original class would overwrite it. Untied but absent: tied."""
    config = transformers.Qwen3Config(**SIZES, head_dim=16, tie_word_embeddings=True)
    model = randomise(transformers.Qwen3ForCausalLM(config))
    tensors = {n: t.clone() for n, t in model.state_dict().items()}
    folder = write(tmp_path / "x", model, tensors, model_type="sdar")
    assert zoo.load(folder).model.config.tied
    tensors["lm_head.weight"] += 1
    with pytest.raises(ValueError, match="lm_head.weight is stored and different"):
        zoo.load(write(tmp_path / "x", model, tensors, model_type="sdar"))
    del tensors["lm_head.weight"]
    assert zoo.load(write(tmp_path / "x", model, tensors, model_type="sdar", tie_word_embeddings=False)).model.config.tied


def test_import_is_light():
    code = (
        "import sys, zoo, zoo.tokenizer; assert 'torch' not in sys.modules; import zoo.checkpoint; assert 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(zoo.__file__).parent.parent)


def test_names_runs_and_order(tmp_path, monkeypatch, capsys, tiny):
    """A run under out/ by its name, with what train.json says; an unknown name lists what there is."""
    model, tokens = tiny(vocab_size=258, mask_id=MASK), bytes_tokenizer(["<eos>", "<mask>"])
    folder = tmp_path / "out/toy/target"
    files.save(model, folder)
    tokens.save(folder)
    (folder / "train.json").write_text(json.dumps({"data": "toy", "sampler": {"steps": 8}}))
    monkeypatch.chdir(tmp_path)
    loaded = zoo.load("toy/target")
    assert (
        loaded.defaults == {"steps": 8}
        and loaded.meta["data"] == "toy"
        and loaded.template is None
        and loaded.folder == Path("out/toy/target")
    )
    assert all(torch.equal(p, model.get_parameter(n)) for n, p in loaded.model.named_parameters())
    assert loaded.tokenizer.fingerprint == tokens.fingerprint and "toy/target" in zoo.names()
    main(["check", str(folder)])
    assert f"{sum(p.numel() for p in model.parameters()):,} parameters: all there" in capsys.readouterr().out
    main(["check", "toy/target"])
    assert "stage     unknown\ndata      toy\n" in capsys.readouterr().out
    main(["list"])
    assert "toy/target" in capsys.readouterr().out
    with pytest.raises(FileNotFoundError, match="no model 'toy': .*on this machine there are: toy/target"):
        zoo.load("toy")
    zoo.save(loaded, tmp_path / "copy")
    again = zoo.load(tmp_path / "copy")
    assert again.meta == loaded.meta and torch.equal(again.model.embedding, model.embedding)


# ---------------------------------------------------------------------------------------------------------------------------------------
# Refusals: each in one line that names the culprit


def refused(folder: Path, match: str, kind: type = ValueError) -> None:
    with pytest.raises(kind, match=match) as caught:
        zoo.load(folder)
    assert "\n" not in str(caught.value)
    with pytest.raises(SystemExit) as stop:
        main(["check", str(folder)])
    assert stop.value.code == 2


@pytest.mark.parametrize("key, value", [
    ("rope_scaling", {"type": "yarn", "factor": 4.0}), ("rope_scaling", {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}),
    ("rope_parameters", {"full_attention": {"rope_theta": 1e4}}), ("rope_scaling", "linear"),
    ("hidden_act", "gelu"), ("attention_bias", True), ("use_sliding_window", True), ("layer_types", ["full_attention",
    "sliding_attention"]),
    ("final_logit_softcapping", 30.0), ("residual_multiplier", 0.22), ("quantization_config", {"bits": 4}), ("mlp_bias", True),
    ("shared_expert_intermediate_size", 8), ("partial_rotary_factor", 2.0),
])  # fmt: skip
def test_unexpected_settings_are_named(tmp_path, key, value):
    refused(sdar(tmp_path, **{key: value, "num_experts": 0}), {"partial_rotary_factor": "rotary_dim=32"}.get(key, key))


@pytest.mark.parametrize("key, value", [("alibi", True), ("activation_type", "gelu"), ("block_type", "sequential"), ("layer_norm_type",
    "default"),
                                        ("include_qkv_bias", True), ("weight_tying", True), ("attention_layer_norm", True),
                                        ("scale_logits", True),
                                        ("rope", False), ("rope_scaling", {"type": "linear", "factor": 2.0})])  # fmt: skip
def test_unexpected_settings_of_llada_are_named(tmp_path, key, value):
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SIZES, "num_key_value_heads": 4}))
    refused(write(tmp_path / "x", model, llada_tensors(model), LLADA, **{key: value}), key)


@pytest.mark.parametrize("key, value", [("score_function", "softmax"), ("use_qk_norm", False), ("use_qkv_bias", True), ("norm_topk_prob",
    False),
                                        ("rotary_dim", 4), ("n_group", 3), ("num_experts_per_tok", 9), ("use_sliding_window",
                                        True)])  # fmt: skip
def test_unexpected_settings_of_llada2_are_named(tmp_path, key, value):
    (tmp_path / "config.json").write_text(json.dumps({**LLADA2, "mask_token_id": MASK, key: value}))
    with pytest.raises(ValueError, match=key if key not in ("n_group", "num_experts_per_tok") else "cannot choose"):
        checkpoint.build(checkpoint.plan_for(tmp_path, None))


@pytest.mark.parametrize("changes, match", [
    ({"model_type": "gpt2"}, "'gpt2', which is not among the families here: SDAR .*llada2_moe"),
    ({"model_type": ...}, "model_type 'None'"),
    ({"hidden_size": "48"}, "hidden_size, not '48'"), ({"num_hidden_layers": 10**9}, "num_hidden_layers, not 1000000000"),
    ({"rope_theta": ..., "rope_parameters": ...}, "rope_theta, not None"), ({"num_key_value_heads": 3}, "multiple of n_kv_head=3"),
    ({"mask_token_id": 9999}, "mask_id=9999"), ({"mask_token_id": 65},
    "the mask id is 65, but the tokenizer's mask token is {257: '<mask>'}"),
    ({"vocab_size": 200, "mask_token_id": 100}, "the tokenizer has 258 ids, the embedding table only 200 rows"),
    ({"rcd": {"code": 1}}, "its rcd section may hold"), ({"rcd": {"template": "x"}}, "no chat template 'x'"),
    ({"rcd": {"defaults": {"stepz": 1}}}, "unexpected keyword argument 'stepz'"), ({"rcd": {"defaults": {"rule": "x"}}}, "rule='x'"),
    ({"rcd": {"block_size": "x"}}, "of the right kind, not {'block_size': 'x'}"),
    ({"num_hidden_layers": 3}, "missing model.layers.2.input_layernorm.weight; missing"),
    ({"num_hidden_layers": 1}, "unexpected model.layers.1"),
    ({"intermediate_size": 41}, r"model.layers.0.mlp.gate_proj.weight is \(40, 48\), expected \(41, 48\)"),
])  # fmt: skip
def test_configs_that_do_not_fit(tmp_path, changes, match):
    refused(sdar(tmp_path, **changes), match)


def test_every_wrong_tensor_is_listed(tmp_path):
    folder = sdar(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = torch.zeros(3)
    tensors["extra"] = torch.zeros(1)
    tensors["model.layers.1.self_attn.q_norm.weight"] = tensors["model.layers.1.self_attn.q_norm.weight"].double()
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors")
    refused(folder, r"missing model.layers.0.mlp.up_proj.weight; unexpected extra; model.norm.weight is \(3,\), expected \(48,\); "
                    r"model.layers.1.self_attn.q_norm.weight is stored as F64")  # fmt: skip
    tensors = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8), **load_file(sdar(tmp_path) / "model.safetensors")}
    save_file(tensors, folder / "model.safetensors")
    zoo.load(folder)  # old checkpoints store this; it is no weight


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_in_a_norm(tmp_path, bad):
    folder = sdar(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.post_attention_layernorm.weight"][5] = bad
    save_file(tensors, folder / "model.safetensors")
    refused(folder, "not a number in model.layers.1.post_attention_layernorm.weight")


def header(data: bytes, change) -> bytes:
    """The file with another header: change gets its dict (in place) or returns the raw bytes to put there."""
    size = struct.unpack("<Q", data[:8])[0]
    values = json.loads(data[8 : 8 + size])
    text = change(values) or json.dumps(values).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + size :]


def outside(values: dict) -> None:
    values["model.norm.weight"]["data_offsets"] = [0, 10**15]


def negative(values: dict) -> None:
    values["model.norm.weight"]["shape"] = [-48]


@pytest.mark.parametrize("damage", [
    lambda d: d[: len(d) // 2], lambda d: d[:5], lambda d: b"", lambda d: struct.pack("<Q", 1 << 62) + d[8:], lambda d: d + b"x",
    lambda d: header(d, outside), lambda d: header(d, negative), lambda d: header(d, lambda v: b"[" * 100000), lambda d: header(d,
    lambda v: b"{}"),
    lambda d: b"\x80\x04\x95" + d,
])  # fmt: skip
def test_damaged_files(tmp_path, damage):
    folder = sdar(tmp_path)
    file = folder / "model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    refused(folder, "model.safetensors is damaged or not a safetensors file|missing model.embed_tokens.weight")


@pytest.mark.parametrize("shard", ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "..", "x.bin", "", "C:\\x.safetensors",
    ".safetensors",
                                   "model.safetensors\n"])  # fmt: skip
def test_shard_names_stay_in_the_folder(tmp_path, shard):
    folder = sdar(tmp_path / "in")
    (folder / "model.safetensors").rename(tmp_path / "model.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"model.norm.weight": shard}}))
    refused(folder, "a shard must be a .safetensors file in the same folder")


def test_indexes_that_lie(tmp_path):
    folder = sdar(tmp_path)
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    index = folder / "model.safetensors.index.json"
    weights = dict.fromkeys(load_file(folder / "a.safetensors"), "a.safetensors")
    index.write_text(json.dumps({"weight_map": {**weights, "ghost": "a.safetensors"}}))
    refused(folder, "does not match the shards: ghost is not in a.safetensors")
    index.write_text(json.dumps({"weight_map": {**weights, "model.norm.weight": "b.safetensors"}}))
    refused(folder, r"lacks 1 of 2 shards \(b.safetensors\): finish the download", FileNotFoundError)
    for text in ("{", "[]", "{}", '{"weight_map": {"a": 1}}', '{"weight_map": {}}', "\x00"):
        index.write_text(text)
        refused(folder, "is damaged")
    shutil.copy(folder / "a.safetensors", folder / "b.safetensors")
    index.write_text(json.dumps({"weight_map": {**weights, "model.norm.weight": "b.safetensors"}}))
    refused(folder, "is in a.safetensors and in b.safetensors")


def test_pickles_are_never_opened(tmp_path):
    folder = sdar(tmp_path)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refused(folder, r"only pickled weights \(pytorch_model.bin\), which are never opened", FileNotFoundError)
    (folder / "pytorch_model.bin").unlink()
    refused(folder, "no model.safetensors", FileNotFoundError)
    (folder / "config.json").unlink()
    refused(folder, "it has no config.json", FileNotFoundError)
    (folder / "config.json").write_text("[" * 100000)
    refused(folder, "config.json is damaged")


# ---------------------------------------------------------------------------------------------------------------------------------------
# Saving


def test_save_writes_the_original_layout_back(tmp_path):
    """Trained a little, saved in shards: the original class loads the same tensors, and we load the same model with its changes."""
    source = sdar(tmp_path, block_size=4)
    (source / "generation_config.json").write_text('{"eos_token_id": [256]}')
    loaded = zoo.load(source)
    with torch.no_grad():
        loaded.model.layers[0].mlp.up_proj.weight.add_(1)
    loaded.model.config.block_size = 8
    loaded = loaded._replace(defaults={"rule": "threshold", "threshold": 0.85, "carry": "residual"}, meta={"data": "gsm8k"})
    target = tmp_path / "export"
    checkpoint.save(loaded, target, shard_bytes=50_000)
    assert len(list(target.glob("model-*.safetensors"))) > 2 and not list(target.glob(".save*"))
    values, before = (json.loads((f / "config.json").read_text()) for f in (target, source))
    ours = values.pop("rcd")
    assert values == before and ours["block_size"] == 8 and ours["mask_id"] == MASK
    again = zoo.load(target)
    assert again.model.config == loaded.model.config
    assert (again.template, again.defaults, again.meta) == (loaded.template, loaded.defaults, loaded.meta)
    assert all(torch.equal(p, loaded.model.get_parameter(n)) for n, p in again.model.named_parameters())
    theirs, report = transformers.Qwen3ForCausalLM.from_pretrained(target, output_loading_info=True)
    assert not any(report.values())
    assert_same(theirs, again, 8, False)
    zoo.save(again._replace(meta={}), target)  # over itself, now in one file: nothing of the shards stays behind
    assert [p.name for p in target.glob("model*")] == ["model.safetensors"]
    assert torch.equal(zoo.load(target).model.head, loaded.model.head)
    assert {p.name for p in target.iterdir()} == {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}


def test_a_converted_autoregressive_model_keeps_its_mask(tmp_path, capsys):
    model = randomise(transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SIZES, head_dim=16, tie_word_embeddings=True)))
    folder = write(tmp_path / "Qwen3-tiny", model, mask_token_id=...)
    bytes_tokenizer(["<eos>"]).save(folder)
    loaded = zoo.load(folder)
    loaded.model.config.block_size = 0
    zoo.save(loaded, tmp_path / "converted")
    assert "unused row" in capsys.readouterr().err
    again = zoo.load(tmp_path / "converted")
    assert again.model.config == loaded.model.config and again.model.config.mask_id == 257
    assert "unused row" not in capsys.readouterr().err


def test_save_restacks_fused_tensors_and_experts(tmp_path):
    model = glm()
    source = write(tmp_path / "x", model, llada2_tensors(model), LLADA2, num_hidden_layers=3, torch_dtype="float32")
    loaded = zoo.load(source)
    zoo.save(loaded, tmp_path / "y")
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "y/model.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)
    zoo.save(zoo.load(source, dtype=torch.bfloat16), tmp_path / "z")
    half = load_file(tmp_path / "z/model.safetensors")
    assert {n for n, t in half.items() if t.dtype != torch.bfloat16} == {f"model.layers.{i}.mlp.gate.expert_bias" for i in (1, 2)}
    assert json.loads((tmp_path / "z/config.json").read_text())["torch_dtype"] == "bfloat16"


def test_save_interrupted_leaves_the_old_model(tmp_path, monkeypatch):
    folder = sdar(tmp_path)
    loaded = zoo.load(folder)
    files = {p.name: p.read_bytes() for p in folder.iterdir()}
    with torch.no_grad():
        loaded.model.norm.weight.add_(1)

    def crash(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", crash)
    with pytest.raises(OSError, match="No space left"):
        zoo.save(loaded, folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == files


# ---------------------------------------------------------------------------------------------------------------------------------------
# Command line


def test_list_and_info(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main(["list"])
    out = capsys.readouterr().out
    row = next(line for line in out.splitlines() if line.startswith("JetLM/SDAR-8B-Chat-b32"))
    assert row.split() == ["JetLM/SDAR-8B-Chat-b32", "SDAR", "8.2B", "32", "151669"]
    main(["info", "GSAI-ML/LLaDA-8B-Instruct"])
    assert "8.0B parameters, block -, mask id 126336" in capsys.readouterr().out
    main(["info", str(sdar(tmp_path, block_size=16))])
    out = capsys.readouterr().out
    assert "block_size=16" in out and "qwen3" in out and "257 <mask>" in out and "threshold=0.95" in out
    for argv in (["info", "nothing"], ["check", "nothing"]):
        with pytest.raises(SystemExit) as stop:
            main(argv)
        assert stop.value.code == 2
        err = capsys.readouterr().err
        assert err.startswith("error: no ") and err.count("\n") == 1


@pytest.mark.parametrize("argv", [[], ["check"], ["info"], ["frobnicate"], ["download", "--revisionn=x", "a/b"], ["check", "nothing"],
                                  ["info", "nothing"], ["info", ""]])  # fmt: skip
def test_a_mistake_on_the_command_line_is_one_line(capsys, argv):
    with pytest.raises(SystemExit) as stop:
        main(argv)
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and not out and err.startswith("error: ") and err.count("\n") == 1


def test_a_template_that_the_tokenizer_cannot_write_is_named(capsys, tmp_path):
    folder = sdar(tmp_path)
    main(["info", str(folder)])
    assert "template  qwen3 (cannot be used: the tokenizer lacks <|im_start|>, <|im_end|>)" in capsys.readouterr().out.splitlines()
    bytes_tokenizer(["<eos>", "<mask>", "<|im_start|>", "<|im_end|>"]).save(folder)
    main(["info", str(folder)])
    assert "template  qwen3" in capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("name, notes", [("LLaDA2.0-mini", 1), ("LLaDA2.1-mini", 2)])
def test_what_llada2_cannot_do_is_said_on_loading(tmp_path, capsys, name, notes):
    """LLaDA2.1 loads, without its token editing; and a tokenizer that does not list the end of a turn is named."""
    model = glm()
    folder = write(tmp_path / name, model, llada2_tensors(model), LLADA2, num_hidden_layers=3)
    capsys.readouterr()
    zoo.load(folder)
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]
    assert len(said) == notes and ("without token editing" in said[0]) == (notes == 2) and "<|role_end|>" in said[-1]
    bytes_tokenizer(["<eos>", "<mask>", "<|role_end|>"]).save(folder)
    loaded = zoo.load(folder)
    assert 258 in loaded.model.config.eos_ids and "role_end" not in capsys.readouterr().err


def test_check_prints_what_is_there(capsys, tmp_path):
    folder = sdar(tmp_path)
    main(["check", str(folder)])
    out = capsys.readouterr().out
    tensors = load_file(folder / "model.safetensors")
    count = sum(t.numel() for t in tensors.values())
    assert f"{len(tensors)} tensors, {count:,} parameters, {4 * count:,} bytes: all there" in out
    line = next(line for line in out.splitlines() if line.startswith("model.layers.N.mlp.down_proj.weight"))
    assert line.split() == ["model.layers.N.mlp.down_proj.weight", "[48,", "40]", "F32", "2"]
    (folder / "tokenizer.json").unlink()
    with pytest.raises(SystemExit) as stop:
        main(["check", str(folder)])
    assert stop.value.code == 2 and "has no tokenizer" in capsys.readouterr().err
