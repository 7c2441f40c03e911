"""Every family against the classes of `transformers`: from the same files, the same logits.

Then the sizes that `python -m zoo list` promises, models by name, and the command line.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from real_files import LLADA as REAL_LLADA
from real_files import SDAR, needed
from safetensors.torch import load_file
from tiny_checkpoints import (EOS, FULL_HEADS, LLADA, MASK, ROWS, SIZES, full_head_llama, glm, llada2,
                              llada_tensors, llama, qwen2, qwen3, qwen3_moe, sdar, their_logits, unfused,
                              write)  # fmt: skip

import rcd
import zoo
from zoo import checkpoint, files
from zoo.__main__ import main
from zoo.decoding import Decoding
from zoo.experts import Experts
from zoo.families import FAMILIES
from zoo.tokenizer import bytes_tokenizer

ROOT = Path(__file__).resolve().parents[1]


@torch.no_grad()
def our_logits(model: rcd.Transformer, tokens: torch.Tensor) -> torch.Tensor:
    """Logits (B, T - 1, V) of the tokens 1 to T - 1, whichever row predicts them."""
    B, T = tokens.shape
    positions, block = torch.arange(T)[None], model.config.block_size
    mask = (positions // block <= positions.T // block)[None, None] if block else None  # (1, 1, T, T)
    hidden = model(model.embed_tokens(tokens), positions, mask)
    cells = torch.meshgrid(torch.arange(B), torch.arange(1, T), indexing="ij")
    row, column = (i.flatten() for i in cells)
    return model.logits(model.predicting(hidden, (row, column))).view(B, T - 1, -1)


def assert_same(theirs: torch.nn.Module, loaded: zoo.Loaded, block: int, shift: bool) -> None:
    tokens = torch.randint(0, ROWS, (2, 11), generator=torch.Generator().manual_seed(1))
    expected, got = their_logits(theirs, tokens, block), our_logits(loaded.model, tokens)
    expected = expected[:, :-1] if shift else expected[:, 1:]
    assert expected.std() > 0.3, "the oracle says nothing"
    assert torch.allclose(got[..., :MASK], expected[..., :MASK], atol=1e-5, rtol=1e-5)
    assert bool((got[..., MASK:] == -torch.inf).all())
    c = loaded.model.config
    assert (c.block_size, c.logit_shift, c.mask_id) == (block, shift, MASK)


# ---- Families

NAMED_BLOCKS = [("SDAR-4B-Chat", 4), ("SDAR-1.7B-Chat-b8", 8), ("RCD-SDAR-4B-b3", 3), ("SeqD-SDAR-4B", 32)]


@pytest.mark.parametrize("name, block", NAMED_BLOCKS)
def test_sdar_equals_qwen3_and_takes_its_block_from_the_name(tmp_path, name, block):
    model = qwen3()
    loaded = zoo.load(write(tmp_path / name, model, model_type="sdar"))
    assert_same(model, loaded, block, False)
    residual, control = name.startswith("RCD"), name.startswith("SeqD")
    assert loaded.defaults == {
        "rule": "threshold",
        "threshold": 0.85 if residual or control else 0.95,
        "carry": "residual" if residual else "none",
    }
    assert Decoding(**loaded.defaults) and loaded.template == "qwen3"
    c = loaded.model.config
    assert c.head_dim == 16 and c.real_vocab == 258 and EOS in c.eos_ids


def test_sdar_block_of_config_json(tmp_path, capsys):
    assert zoo.load(sdar(tmp_path, block_size=16)).model.config.block_size == 16
    assert zoo.load(sdar(tmp_path, "SDAR-b8", block_size=16)).model.config.block_size == 8
    assert "config.json says block_size 16, the name says 8: the name counts" in capsys.readouterr().err


def test_an_absent_head_dim_is_128_in_qwen3_kin_and_width_over_heads_in_others(tmp_path):
    model = qwen3(head_dim=128)
    folder = write(tmp_path / "SDAR", model, model_type="sdar", head_dim=...)
    assert_same(model, zoo.load(folder), 4, False)
    model = qwen2()
    folder = write(tmp_path / "Dream", model, model_type="Dream", head_dim=...)
    assert_same(model, zoo.load(folder), 0, True)


def test_padding_and_cache_change_nothing(tmp_path):
    """Blocks through the cache, and a short row beside a longer one, against their one uncached forward."""
    theirs = qwen3()
    model = zoo.load(write(tmp_path / "SDAR-b4", theirs, model_type="sdar")).model
    tokens = torch.randint(0, MASK, (1, 12), generator=torch.Generator().manual_seed(2))
    expected = their_logits(theirs, tokens, 4)[0, :, :MASK]
    cache = rcd.KVCache(model.config, 1, 12, like=model.head)
    with torch.no_grad():
        for start in (0, 4, 8):
            at = torch.arange(start, start + 4)[None]
            cache.at(torch.tensor([0]), at, start + 4)
            hidden = model(model.embed_tokens(tokens[:, start : start + 4]), at, None, cache)
            got = model.logits(hidden[0])[:, :MASK]
            assert torch.allclose(got, expected[start : start + 4], atol=1e-5, rtol=1e-5)
    short = tokens[:, :8].clone()
    short[0, 6:] = MASK
    expected = their_logits(theirs, short, 4)[0, 6:8, :MASK].softmax(-1).amax(-1)
    canvas = torch.full((2, 12), MASK)
    canvas[0, :6], canvas[1, :9] = short[0, :6], tokens[0, :9]
    step = next(rcd.denoise(model, canvas, rcd.Sampler(carry="none"), lengths=torch.tensor([8, 12])))
    assert torch.allclose(step.confidence[0, 6:8], expected, atol=1e-5)


@pytest.mark.parametrize("name, template", [("LLaDA-8B-Instruct", "llada"), ("LLaDA-8B-Base", None)])
def test_llada_equals_llama_without_its_mask(tmp_path, name, template):
    model = full_head_llama()
    loaded = zoo.load(write(tmp_path / name, model, llada_tensors(model), LLADA))
    assert_same(model, loaded, 0, False)
    assert loaded.template == template and loaded.defaults["block_size"] == 32


def test_illada_equals_llama_without_its_mask_tied(tmp_path):
    model = llama(tied=True)
    folder = write(tmp_path / "x", model, model_type="illada", architectures=["ILLaDAForCausalLM"])
    loaded = zoo.load(folder)
    assert_same(model, loaded, 0, False)
    assert loaded.model.config.tied


@pytest.mark.parametrize("normalise", [True, False])
def test_sdar_moe_equals_qwen3_moe(tmp_path, normalise):
    model = qwen3_moe(SIZES, head_dim=16, norm_topk_prob=normalise)
    changes = {"model_type": "sdar_moe", "num_experts": 8}
    loaded = zoo.load(write(tmp_path / "SDAR-30B-A3B-Chat", model, unfused(model), **changes))
    assert_same(model, loaded, 4, False)
    assert loaded.model.layers[1].mlp.top_k == 3


def test_llada_moe_equals_qwen3_moe_without_renormalising(tmp_path):
    model = qwen3_moe(FULL_HEADS, head_dim=12, norm_topk_prob=False, rms_norm_eps=1e-5)
    values = {
        **FULL_HEADS, "architectures": ["LLaDAMoEModelLM"], "model_type": "llada", "num_experts": 8,
        "num_experts_per_tok": 3, "expert_intermediate_size": 24, "dense_intermediate_size": 40,
        "moe_layer_freq": [1, 1], "qk_layernorm": True, "norm_topk_prob": True, "routed_scaling_factor": 1,
        "router_num_group": None, "hidden_act": "silu", "partial_rotary_factor": 1,
        "router_topk_group": None, "moe_router_enable_expert_bias": False, "attention_bias": False,
        "shared_expert_intermediate_size": None, "tie_word_embeddings": False, "router_aux_loss_coef": 0.01,
    }  # fmt: skip
    del values["intermediate_size"]
    assert_same(model, zoo.load(write(tmp_path / "m", model, unfused(model), values)), 0, False)


def test_llada2_equals_glm4_moe(tmp_path):
    loaded = zoo.load(llada2(tmp_path / "LLaDA2.0-mini", block_size=4))
    assert_same(glm(), loaded, 4, False)
    assert loaded.model.config.rotary_dim == 8 and loaded.template == "llada2"
    dense, *rest = (isinstance(layer.mlp, rcd.SwiGLU) for layer in loaded.model.layers)
    assert dense and not any(rest)
    assert zoo.load(llada2(tmp_path / "b")).model.config.block_size == 32


@pytest.mark.parametrize("kept", [2, 1])
def test_group_router_against_a_literal_one(kept):
    """Every token by hand.

    Groups are chosen by the sum of their two best biased scores, experts by biased score. Weights come from
    the unbiased score.
    """
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
    model = zoo.load(llada2(tmp_path / "x")).model
    tokens = torch.randint(0, 256, (2, 32), generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        rcd.diffusion_loss(model, tokens, generator=torch.Generator().manual_seed(0)).backward()
    mlp = model.layers[1].mlp
    assert mlp.gate.weight.grad.abs().sum() > 0
    assert any(e.up_proj.weight.grad is not None for e in mlp.experts)
    names = {n.split(".")[-1] for n, _ in model.named_parameters()}
    assert "expert_bias" not in names  # an optimiser must not touch it


SHIFTED = [("Dream", "Dream-v0-Instruct-7B", 0), ("Fast_dLLM_Qwen", "Fast_dLLM_v2_7B", 8)]


@pytest.mark.parametrize("model_type, name, block", SHIFTED)
def test_shifted_families_equal_qwen2(tmp_path, model_type, name, block):
    model = qwen2(tied=block != 0)
    loaded = zoo.load(write(tmp_path / name, model, model_type=model_type, bd_size=8))
    assert_same(model, loaded, block, True)
    assert loaded.model.config.tied == (block != 0) and loaded.model.config.qkv_bias
    assert loaded.template == ("qwen2.5" if block else "dream")


DLLM = [("Qwen3-0.6B-diffusion-mdlm-v0.1", 0), ("Qwen3-0.6B-diffusion-bd3lm-v0.1", 32),
        ("Qwen2.5-Coder-0.5B-Instruct-diffusion-mdlm-v0.1", 0)]  # fmt: skip


@pytest.mark.parametrize("name, block", DLLM)
def test_dllm_equals_its_qwen_tied(tmp_path, name, block):
    kind = "qwen3" if "Qwen3" in name else "qwen2"
    model = {"qwen3": qwen3, "qwen2": qwen2}[kind](tied=True)
    loaded = zoo.load(write(tmp_path / name, model, model_type=f"a2d-{kind}"))
    assert_same(model, loaded, block, False)
    assert loaded.model.config.tied
    assert loaded.template == {"qwen3": "qwen3-no-thinking", "qwen2": "qwen2.5"}[kind]
    with pytest.raises(ValueError, match="must say whether it is mdlm"):
        zoo.load(write(tmp_path / "mine", model, model_type=f"a2d-{kind}"))
    zoo.save(loaded, tmp_path / "run/target")  # a conversion says it in its config.json
    again = zoo.load(tmp_path / "run/target")
    assert again.model.config == loaded.model.config and again.defaults == loaded.defaults


@pytest.mark.parametrize("make, block, shift", [(qwen3, 4, False), (qwen2, 32, True), (llama, 4, False)])
def test_autoregressive_start_puts_the_mask_into_an_unused_row(tmp_path, capsys, make, block, shift):
    model = make()
    folder = write(tmp_path / "x", model, mask_token_id=...)
    bytes_tokenizer(["<eos>"]).save(folder)
    loaded = zoo.load(folder)
    assert "unused row 257 of the table becomes the mask token" in capsys.readouterr().err
    assert_same(model, loaded, block, shift)
    assert loaded.template == ("qwen3" if make is qwen3 else None)
    bytes_tokenizer(["<eos>", *(f"<|reserved_special_token_{i}|>" for i in range(7))]).save(folder)
    assert zoo.load(folder).model.config.mask_id == 263
    bytes_tokenizer(["<eos>", *(f"<{i}>" for i in range(7))]).save(folder)
    with pytest.raises(ValueError, match="no row of the embedding table"):
        zoo.load(folder)


@pytest.mark.parametrize("name, notes", [("LLaDA2.0-mini", 1), ("LLaDA2.1-mini", 2)])
def test_what_llada2_cannot_do_is_said_on_loading(tmp_path, capsys, name, notes):
    """LLaDA2.1 loads, without token editing. A tokenizer that does not list the end of a turn is named."""
    folder = llada2(tmp_path / name)
    capsys.readouterr()
    zoo.load(folder)
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]
    assert len(said) == notes and "<|role_end|>" in said[-1]
    assert ("without token editing" in said[0]) == (notes == 2)
    bytes_tokenizer(["<eos>", "<mask>", "<|role_end|>"]).save(folder)
    loaded = zoo.load(folder)
    assert 258 in loaded.model.config.eos_ids and "role_end" not in capsys.readouterr().err


# ---- Published models

# Shapes typed in from the model cards and papers. The counts in `zoo list` must follow from them.
QWEN3 = dict(vocab_size=151936, head_dim=128, num_key_value_heads=8, max_position_embeddings=32768,
             rope_theta=1e6, rms_norm_eps=1e-6)  # fmt: skip
QWEN25 = dict(num_hidden_layers=28, rope_theta=1e6, rms_norm_eps=1e-6)
LLADA2_MINI = {
    "num_hidden_layers": 20, "hidden_size": 2048, "intermediate_size": 5120, "first_k_dense_replace": 1,
    "hidden_act": "silu", "head_dim": 128, "max_position_embeddings": 16384, "moe_intermediate_size": 512,
    "norm_topk_prob": True, "num_experts_per_tok": 8, "norm_head": False, "num_attention_heads": 16,
    "num_experts": 256, "num_key_value_heads": 4, "rope_theta": 600000, "rope_scaling": None,
    "tie_word_embeddings": False, "use_bias": False, "use_rmsnorm": True, "rms_norm_eps": 1e-06,
    "num_shared_experts": 1, "use_qkv_bias": False, "embedding_dropout": 0.0, "norm_softmax": False,
    "output_dropout": 0.0, "vocab_size": 157184, "rotary_dim": 64, "router_dtype": "fp32",
    "using_split_qkv_in_self_attention": False, "moe_router_enable_expert_bias": True,
    "routed_scaling_factor": 2.5, "n_group": 8, "topk_group": 4, "score_function": "sigmoid",
    "max_window_layers": 28, "output_router_logits": False, "pad_token_id": 156892,
    "partial_rotary_factor": 0.5, "use_sliding_window": False, "attention_dropout": 0.0, "use_cache": False,
}  # fmt: skip
PUBLISHED = {  # id -> model_type, config.json, parameters where the card gives the exact number
    "JetLM/SDAR-1.7B-Chat": ("sdar", dict(
        QWEN3, hidden_size=2048, num_hidden_layers=28, num_attention_heads=16, intermediate_size=6144,
    ), 2031739904),
    "JetLM/SDAR-4B-Chat": ("sdar", dict(
        QWEN3, hidden_size=2560, num_hidden_layers=36, num_attention_heads=32, intermediate_size=9728,
    ), 4411424256),
    "JetLM/SDAR-8B-Chat-b32": ("sdar", dict(
        QWEN3, hidden_size=4096, num_hidden_layers=36, num_attention_heads=32, intermediate_size=12288,
    ), 8190735360),
    "JetLM/SDAR-30B-A3B-Chat": ("sdar_moe", dict(
        QWEN3, hidden_size=2048, num_hidden_layers=48, num_attention_heads=32, num_key_value_heads=4,
        intermediate_size=6144, num_experts=128, num_experts_per_tok=8, moe_intermediate_size=768,
    ), None),
    "Efficient-Large-Model/Fast_dLLM_v2_1.5B": ("Fast_dLLM_Qwen", dict(
        QWEN25, vocab_size=151936, hidden_size=1536, num_attention_heads=12, num_key_value_heads=2,
        intermediate_size=8960, tie_word_embeddings=True, max_position_embeddings=32768,
    ), 1543714304),
    "Dream-org/Dream-v0-Instruct-7B": ("Dream", dict(
        QWEN25, vocab_size=152064, hidden_size=3584, num_attention_heads=28, num_key_value_heads=4,
        intermediate_size=18944, max_position_embeddings=131072,
    ), 7615616512),
    "dllm-hub/Qwen3-0.6B-diffusion-mdlm-v0.1": ("a2d-qwen3", dict(
        QWEN3, hidden_size=1024, num_hidden_layers=28, num_attention_heads=16, intermediate_size=3072,
        tie_word_embeddings=True,
    ), 596049920),
    "inclusionAI/LLaDA-MoE-7B-A1B-Base": ("llada", dict(
        vocab_size=157184, hidden_size=2048, num_hidden_layers=16, num_attention_heads=16,
        num_key_value_heads=16, num_experts=64, rope_theta=5e4, num_experts_per_tok=8,
        expert_intermediate_size=1024, dense_intermediate_size=8192, max_position_embeddings=8192,
    ), None),
    "inclusionAI/LLaDA2.0-mini": ("llada2_moe", LLADA2_MINI, None),
    "inclusionAI/LLaDA2.0-flash": ("llada2_moe", LLADA2_MINI | dict(
        num_hidden_layers=32, hidden_size=4096, intermediate_size=9216, moe_intermediate_size=1024,
        num_attention_heads=32,
    ), None),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_shapes_have_the_listed_number_of_parameters(tmp_path, name):
    model_type, values, exact = PUBLISHED[name]
    folder = tmp_path / name.split("/")[1]
    folder.mkdir()
    counts = {}
    for layers in (2, 3):  # all further layers are like the third
        config = {"model_type": model_type, **values, "num_hidden_layers": layers}
        (folder / "config.json").write_text(json.dumps(config))
        model = checkpoint.build(checkpoint.plan_for(folder, None))
        counts[layers] = sum(p.numel() for p in model.parameters())
    count = counts[2] + (values["num_hidden_layers"] - 2) * (counts[3] - counts[2])
    listed = next(f.models[name][0] for f in FAMILIES if name in f.models)
    assert exact is None or count == exact
    assert (f"{count / 1e9:.1f}B" if count < 1e11 else f"{count / 1e9:.0f}B") == listed


@pytest.mark.parametrize("folder, mask, count", [(SDAR, 151669, 399), (REAL_LLADA, 126336, 291)])
def test_real_index_files_name_our_tensors_and_bytes(folder, mask, count):
    index = json.loads((needed(folder) / checkpoint.INDEX).read_text())
    plan = checkpoint.plan_for(folder, None)
    model = checkpoint.build(plan)
    tensors = checkpoint.layout(plan, model)
    assert {*tensors} == {*index["weight_map"]} and len(tensors) == count
    assert 2 * sum(p.numel() for p in model.parameters()) == index["metadata"]["total_size"]
    assert plan.config.mask_id == mask


# ---- Models by name


def test_import_is_light():
    code = "import sys, zoo, zoo.tokenizer; assert 'torch' not in sys.modules; "
    code += "import zoo.checkpoint; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_names_runs_and_order(tmp_path, monkeypatch, capsys, tiny):
    """A run under out/ by its name, with what train.json says; an unknown name lists what there is."""
    model, tokens = tiny(vocab_size=258, mask_id=MASK), bytes_tokenizer(["<eos>", "<mask>"])
    folder = tmp_path / "out/toy/target"
    files.save(model, folder)
    tokens.save(folder)
    (folder / "train.json").write_text(json.dumps({"data": "toy", "sampler": {"steps": 8}}))
    monkeypatch.chdir(tmp_path)
    loaded = zoo.load("toy/target")
    assert loaded.folder == Path("out/toy/target") and loaded.template is None
    assert loaded.defaults == {"steps": 8} and loaded.meta["data"] == "toy"
    assert all(torch.equal(p, model.get_parameter(n)) for n, p in loaded.model.named_parameters())
    assert loaded.tokenizer.fingerprint == tokens.fingerprint and "toy/target" in zoo.names()
    main(["check", str(folder)])
    count = sum(p.numel() for p in model.parameters())
    assert f"{count:,} parameters: all there" in capsys.readouterr().out
    main(["check", "toy/target"])
    assert "stage     unknown\ndata      toy\n" in capsys.readouterr().out
    main(["list"])
    assert "toy/target" in capsys.readouterr().out
    with pytest.raises(FileNotFoundError, match="no model 'toy': .*on this machine there are: toy/target"):
        zoo.load("toy")
    zoo.save(loaded, tmp_path / "copy")
    again = zoo.load(tmp_path / "copy")
    assert again.meta == loaded.meta and torch.equal(again.model.embedding, model.embedding)


# ---- The command line


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
    for fact in ("block_size=16", "qwen3", "257 <mask>", "threshold=0.95"):
        assert fact in out


@pytest.mark.parametrize("argv, says", [
    ([], ""), (["check"], ""), (["info"], ""), (["frobnicate"], ""), (["info", ""], ""),
    (["download", "--revisionn=x", "a/b"], ""),
    (["check", "nothing"], "no folder nothing"), (["info", "nothing"], "no model 'nothing'"),
])  # fmt: skip
def test_a_mistake_on_the_command_line_is_one_line(capsys, argv, says):
    with pytest.raises(SystemExit) as stop:
        main(argv)
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and not out and err.startswith(f"error: {says}") and err.count("\n") == 1


def test_a_template_that_the_tokenizer_cannot_write_is_named(capsys, tmp_path):
    folder = sdar(tmp_path)
    main(["info", str(folder)])
    unusable = "template  qwen3 (cannot be used: the tokenizer lacks <|im_start|>, <|im_end|>)"
    assert unusable in capsys.readouterr().out.splitlines()
    bytes_tokenizer(["<eos>", "<mask>", "<|im_start|>", "<|im_end|>"]).save(folder)
    main(["info", str(folder)])
    assert "template  qwen3" in capsys.readouterr().out.splitlines()


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
