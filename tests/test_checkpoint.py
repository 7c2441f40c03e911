"""zoo/checkpoint.py: folders in the hub's layout are loaded, refused if they do not fit, and written back."""

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
from tiny_checkpoints import (LLADA, LLADA2, MASK, SIZES, full_head_llama, glm, llada2_tensors, llada_tensors,
                              qwen3, sdar, write)  # fmt: skip

import zoo
from zoo import checkpoint
from zoo.__main__ import main
from zoo.tokenizer import bytes_tokenizer

ROOT = Path(__file__).resolve().parents[1]

# ---- Loading


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtypes_and_shards(tmp_path, dtype):
    """In one file or in shards, converted on loading or not: the values are torch's own conversion."""
    model = qwen3().to(dtype)
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
                theirs = model.get_parameter(n if n.startswith("lm_head") else f"model.{n}")
                assert torch.equal(p, theirs.to(want or dtype)), n


def test_weights_are_a_copy_not_a_window_into_the_file(tmp_path):
    folder = sdar(tmp_path)
    model, before = zoo.load(folder).model, (folder / "model.safetensors").read_bytes()
    weights = {n: p.clone() for n, p in model.named_parameters()}
    (folder / "model.safetensors").write_bytes(b"\0" * len(before))
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters())


def test_tied_heads(tmp_path):
    """A head that is stored equal is left out; one that differs is refused; untied but absent means tied.

    The original class would overwrite a head that differs.
    """
    model = qwen3(tied=True)
    tensors = {n: t.clone() for n, t in model.state_dict().items()}
    folder = write(tmp_path / "x", model, tensors, model_type="sdar")
    assert zoo.load(folder).model.config.tied
    tensors["lm_head.weight"] += 1
    with pytest.raises(ValueError, match="lm_head.weight is stored and different"):
        zoo.load(write(tmp_path / "x", model, tensors, model_type="sdar"))
    del tensors["lm_head.weight"]
    folder = write(tmp_path / "x", model, tensors, model_type="sdar", tie_word_embeddings=False)
    assert zoo.load(folder).model.config.tied


# ---- Memory

MEASURE = """
import json, os, sys, time, rcd, torch, zoo, zoo.checkpoint, zoo.tokenizer
from zoo.decoding import Decoding
with torch.device("meta"):
    rcd.Transformer(rcd.Config())  # torch's own 65 MB for its first meta tensors
def rss():
    with open("/proc/self/status") as f:
        return {l.split(":")[0]: int(l.split()[1]) * 1024 for l in f if l.startswith(("VmRSS", "VmHWM"))}
def measure(folder, dtype, *sample):
    before, begin = rss()["VmRSS"], time.perf_counter()
    loaded = zoo.load(folder, dtype=getattr(torch, dtype))
    weights = sum(p.numel() * p.element_size() for p in loaded.model.parameters())
    print(rss()["VmHWM"] - before, weights, time.perf_counter() - begin)
    if sample:
        begin, prompt = time.perf_counter(), loaded.tokenizer.encode("one two three")
        response, nfe = rcd.generate(loaded.model, [prompt], 4, Decoding(**loaded.defaults))
        print(len(response[0]), nfe[0], time.perf_counter() - begin)
for case in json.loads(sys.argv[1]):
    if not (child := os.fork()):  # its peak begins with what is held here
        measure(*case)
        sys.stdout.flush()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
"""


def write_large(folder: Path, values: dict, stored: torch.dtype, shards: int, random: bool = False) -> Path:
    """A checkpoint of this config.json."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(values))
    bytes_tokenizer(["<eos>", "<mask>"]).save(folder)
    plan = checkpoint.plan_for(folder, None)
    shapes = {plan.original(n): p.shape for n, p in checkpoint.build(plan).state_dict().items()}
    files = {n: f"model-{i * shards // len(shapes)}.safetensors" for i, n in enumerate(shapes)}
    for file in {*files.values()}:
        tensors = {n: torch.ones(s, dtype=stored) for n, s in shapes.items() if files[n] == file}
        for t in tensors.values():
            if random and t.dim() > 1:
                t.normal_(std=0.02)
        save_file(tensors, folder / file)
    (folder / checkpoint.INDEX).write_text(json.dumps({"weight_map": files}))
    return folder


def measure(*cases: tuple[str, ...]) -> list[list[float]]:
    """Load checkpoints, each in a process of its own. A case: (folder, dtype), or (folder, dtype, "sample").

    Returns [peak bytes, bytes of the weights, seconds], and for a sample [tokens, NFE, seconds].
    """
    argv = [sys.executable, "-c", MEASURE, json.dumps(cases)]
    run = subprocess.run(argv, capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    return [[float(x) for x in line.split()] for line in run.stdout.splitlines()]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_peak_memory_is_that_of_the_weights(tmp_path):
    cases = []
    for dtype, layers, shards in (("float32", 2, 3), ("bfloat16", 4, 1)):
        values = dict(SIZES, hidden_size=1024, intermediate_size=4096, num_attention_heads=8, head_dim=128,
                      num_hidden_layers=layers, model_type="sdar", mask_token_id=MASK,
                      rms_norm_eps=1e-6)  # fmt: skip
        cases.append((str(write_large(tmp_path / dtype, values, torch.float32, shards)), dtype))
    for case, (peak, weights, _) in zip(cases, measure(*cases), strict=True):
        assert weights > 1e8
        # Beside the weights: 64 MiB of a file, mapped at a time, and the tensor that crosses their end.
        assert peak <= 1.05 * weights + 2**26 + 17e6, (case, peak / 1e6, weights / 1e6)


FULL_SIZE = {
    "SDAR-1.7B-Chat": dict(
        model_type="sdar", vocab_size=151936, head_dim=128, num_key_value_heads=8, rope_theta=1e6,
        rms_norm_eps=1e-6, max_position_embeddings=32768, hidden_size=2048, num_hidden_layers=28,
        num_attention_heads=16, intermediate_size=6144,
    ),
    "LLaDA-8B-Instruct": LLADA | dict(
        d_model=4096, n_heads=32, n_kv_heads=32, n_layers=32, mlp_hidden_size=12288, embedding_size=126464,
        max_sequence_length=4096,
    ),
}  # fmt: skip


@pytest.mark.full_size
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("name", FULL_SIZE)
def test_full_size(tmp_path, name):
    """`pytest -m full_size -n 0 -s -k SDAR`: random bfloat16 weights in real shapes, then a block.

    SDAR takes 4 GB on disk and in memory, LLaDA 16 GB. Peak memory is within 5 % of the weights.
    """
    values = FULL_SIZE[name] | {"mask_token_id": MASK}  # the byte tokenizer's
    folder = write_large(tmp_path / name, values, torch.bfloat16, 4, random=True)
    loading, sampling = measure((str(folder), "bfloat16", "sample"))
    (peak, weights, seconds), (tokens, nfe, took) = loading, sampling
    print(f"\n{name}: {weights / 1e9:.2f} GB of weights, peak {peak / 1e9:.2f} GB, ", end="")
    print(f"loaded in {seconds:.1f} s, {tokens:.0f} tokens in {nfe:.0f} forwards, {took:.1f} s")
    assert peak <= 1.05 * weights


# ---- Refusals: each in one line that names the culprit


def refused(folder: Path, match: str, kind: type = ValueError) -> None:
    with pytest.raises(kind, match=match) as caught:
        zoo.load(folder)
    assert "\n" not in str(caught.value)
    with pytest.raises(SystemExit) as stop:
        main(["check", str(folder)])
    assert stop.value.code == 2


@pytest.mark.parametrize("key, value", [
    ("rope_scaling", {"type": "yarn", "factor": 4.0}), ("rope_scaling", "linear"),
    ("rope_scaling", {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}),
    ("rope_parameters", {"full_attention": {"rope_theta": 1e4}}), ("partial_rotary_factor", 2.0),
    ("hidden_act", "gelu"), ("attention_bias", True), ("use_sliding_window", True), ("mlp_bias", True),
    ("layer_types", ["full_attention", "sliding_attention"]), ("final_logit_softcapping", 30.0),
    ("residual_multiplier", 0.22), ("quantization_config", {"bits": 4}),
    ("shared_expert_intermediate_size", 8),
])  # fmt: skip
def test_unexpected_settings_are_named(tmp_path, key, value):
    named = {"partial_rotary_factor": "rotary_dim=32"}.get(key, key)
    refused(sdar(tmp_path, **{key: value, "num_experts": 0}), named)


@pytest.mark.parametrize("key, value", [
    ("alibi", True), ("activation_type", "gelu"), ("block_type", "sequential"), ("rope", False),
    ("layer_norm_type", "default"), ("include_qkv_bias", True), ("weight_tying", True),
    ("attention_layer_norm", True), ("scale_logits", True),
    ("rope_scaling", {"type": "linear", "factor": 2.0}),
])  # fmt: skip
def test_unexpected_settings_of_llada_are_named(tmp_path, key, value):
    model = full_head_llama()
    refused(write(tmp_path / "x", model, llada_tensors(model), LLADA, **{key: value}), key)


@pytest.mark.parametrize("key, value, match", [
    ("score_function", "softmax", "score_function"), ("use_qk_norm", False, "use_qk_norm"),
    ("use_qkv_bias", True, "use_qkv_bias"), ("norm_topk_prob", False, "norm_topk_prob"),
    ("rotary_dim", 4, "rotary_dim"), ("use_sliding_window", True, "use_sliding_window"),
    ("n_group", 3, "cannot choose"), ("num_experts_per_tok", 9, "cannot choose"),
])  # fmt: skip
def test_unexpected_settings_of_llada2_are_named(tmp_path, key, value, match):
    (tmp_path / "config.json").write_text(json.dumps({**LLADA2, "mask_token_id": MASK, key: value}))
    with pytest.raises(ValueError, match=match):
        checkpoint.build(checkpoint.plan_for(tmp_path, None))


@pytest.mark.parametrize("changes, match", [
    ({"model_type": "gpt2"}, "'gpt2', which is not among the families here: SDAR .*llada2_moe"),
    ({"model_type": ...}, "model_type 'None'"),
    ({"hidden_size": "48"}, "hidden_size, not '48'"),
    ({"num_hidden_layers": 10**9}, "num_hidden_layers, not 1000000000"),
    ({"rope_theta": ..., "rope_parameters": ...}, "rope_theta, not None"),
    ({"num_key_value_heads": 3}, "multiple of n_kv_head=3"),
    ({"mask_token_id": 9999}, "mask_id=9999"),
    ({"mask_token_id": 65}, "the mask id is 65, but the tokenizer's mask token is {257: '<mask>'}"),
    ({"vocab_size": 200, "mask_token_id": 100},
     "the tokenizer has 258 ids, the embedding table only 200 rows"),
    ({"rcd": {"code": 1}}, "its rcd section may hold"),
    ({"rcd": {"template": "x"}}, "no chat template 'x'"),
    ({"rcd": {"defaults": {"stepz": 1}}}, "unexpected keyword argument 'stepz'"),
    ({"rcd": {"defaults": {"rule": "x"}}}, "rule='x'"),
    ({"rcd": {"block_size": "x"}}, "of the right kind, not {'block_size': 'x'}"),
    ({"num_hidden_layers": 3}, "missing model.layers.2.input_layernorm.weight; missing"),
    ({"num_hidden_layers": 1}, "unexpected model.layers.1"),
    ({"intermediate_size": 41}, r"model.layers.0.mlp.gate_proj.weight is \(40, 48\), expected \(41, 48\)"),
])  # fmt: skip
def test_configs_that_do_not_fit(tmp_path, changes, match):
    refused(sdar(tmp_path, **changes), match)


def test_every_wrong_tensor_is_listed(tmp_path):
    folder = sdar(tmp_path)
    good = load_file(folder / "model.safetensors")
    tensors, q_norm = dict(good), "model.layers.1.self_attn.q_norm.weight"
    tensors |= {"model.norm.weight": torch.zeros(3), "extra": torch.zeros(1), q_norm: good[q_norm].double()}
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors")
    refused(folder, "missing model.layers.0.mlp.up_proj.weight; unexpected extra; "
                    r"model.norm.weight is \(3,\), expected \(48,\); "
                    r"model.layers.1.self_attn.q_norm.weight is stored as F64")  # fmt: skip
    old = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8), **good}
    save_file(old, folder / "model.safetensors")
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
    lambda d: d[: len(d) // 2], lambda d: d[:5], lambda d: b"", lambda d: d + b"x",
    lambda d: b"\x80\x04\x95" + d, lambda d: struct.pack("<Q", 1 << 62) + d[8:],
    lambda d: header(d, outside), lambda d: header(d, negative),
    lambda d: header(d, lambda v: b"[" * 100000), lambda d: header(d, lambda v: b"{}"),
])  # fmt: skip
def test_damaged_files(tmp_path, damage):
    folder = sdar(tmp_path)
    file = folder / "model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    damaged = "model.safetensors is damaged or not a safetensors file"
    refused(folder, f"{damaged}|missing model.embed_tokens.weight")


@pytest.mark.parametrize("shard", [
    "../model.safetensors", "/etc/passwd", "a/b.safetensors", "..", "x.bin", "", "C:\\x.safetensors",
    ".safetensors", "model.safetensors\n",
])  # fmt: skip
def test_shard_names_stay_in_the_folder(tmp_path, shard):
    folder = sdar(tmp_path / "in")
    (folder / "model.safetensors").rename(tmp_path / "model.safetensors")
    (folder / checkpoint.INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": shard}}))
    refused(folder, "a shard must be a .safetensors file in the same folder")


def test_indexes_that_lie(tmp_path):
    folder = sdar(tmp_path)
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    index = folder / checkpoint.INDEX
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
    never = r"only pickled weights \(pytorch_model.bin\), which are never opened"
    refused(folder, never, FileNotFoundError)
    (folder / "pytorch_model.bin").unlink()
    refused(folder, "no model.safetensors", FileNotFoundError)
    (folder / "config.json").unlink()
    refused(folder, "it has no config.json", FileNotFoundError)
    (folder / "config.json").write_text("[" * 100000)
    refused(folder, "config.json is damaged")


# ---- Saving


def test_save_writes_the_original_layout_back(tmp_path):
    """Changed and saved in shards: the original class loads the same tensors, we load the same model."""
    source = sdar(tmp_path, block_size=4)
    (source / "generation_config.json").write_text('{"eos_token_id": [256]}')
    loaded = zoo.load(source)
    with torch.no_grad():
        loaded.model.layers[0].mlp.up_proj.weight.add_(1)
    loaded.model.config.block_size = 8
    defaults = {"rule": "threshold", "threshold": 0.85, "carry": "residual"}
    loaded = loaded._replace(defaults=defaults, meta={"data": "gsm8k"})
    target = tmp_path / "export"
    checkpoint.save(loaded, target, shard_bytes=50_000)
    assert len(list(target.glob("model-*.safetensors"))) > 2 and not list(target.glob(".save*"))
    values, before = (json.loads((f / "config.json").read_text()) for f in (target, source))
    ours = values.pop("rcd")
    assert values == before and ours["block_size"] == 8 and ours["mask_id"] == MASK
    again = zoo.load(target)
    assert again.model.config == loaded.model.config
    assert (again.template, again.defaults, again.meta) == (loaded.template, loaded.defaults, loaded.meta)
    theirs, report = transformers.Qwen3ForCausalLM.from_pretrained(target, output_loading_info=True)
    assert not any(report.values())
    for n, p in again.model.named_parameters():
        assert torch.equal(p, loaded.model.get_parameter(n))
        assert torch.equal(p, theirs.get_parameter(n if n.startswith("lm_head") else f"model.{n}"))
    # Over itself, now in one file: nothing of the shards stays behind.
    zoo.save(again._replace(meta={}), target)
    assert [p.name for p in target.glob("model*")] == ["model.safetensors"]
    assert torch.equal(zoo.load(target).model.head, loaded.model.head)
    names = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}
    assert {p.name for p in target.iterdir()} == names


def test_a_converted_autoregressive_model_keeps_its_mask(tmp_path, capsys):
    folder = write(tmp_path / "Qwen3-tiny", qwen3(tied=True), mask_token_id=...)
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
    changes = {"num_hidden_layers": 3, "torch_dtype": "float32"}
    source = write(tmp_path / "x", model, llada2_tensors(model), LLADA2, **changes)
    zoo.save(zoo.load(source), tmp_path / "y")
    before, after = (load_file(f / "model.safetensors") for f in (source, tmp_path / "y"))
    assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)
    zoo.save(zoo.load(source, dtype=torch.bfloat16), tmp_path / "z")
    half = load_file(tmp_path / "z/model.safetensors")
    biases = {f"model.layers.{i}.mlp.gate.expert_bias" for i in (1, 2)}
    assert {n for n, t in half.items() if t.dtype != torch.bfloat16} == biases
    assert json.loads((tmp_path / "z/config.json").read_text())["torch_dtype"] == "bfloat16"


def test_save_interrupted_leaves_the_old_model(tmp_path, monkeypatch):
    folder = sdar(tmp_path)
    loaded = zoo.load(folder)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    with torch.no_grad():
        loaded.model.norm.weight.add_(1)

    def crash(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", crash)
    with pytest.raises(OSError, match="No space left"):
        zoo.save(loaded, folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
