"""zoo/files.py: run folders are written as a whole, and read back. What is wrong is named in one line."""

import dataclasses
import json
from pathlib import Path

import pytest
import safetensors.torch
import torch

from rcd import Config, Transformer
from zoo import files
from zoo.files import config_from, read_json, write_atomic

# ---- write_atomic


def test_a_killed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file.json"
    write_atomic(path, lambda p: p.write_text("old"))
    assert path.read_text() == "old" and path.stat().st_mode & 0o777 == 0o644

    def half(p):
        p.write_text("ne")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomic(path, half)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    path, order, replace = tmp_path / "file.json", [], files.os.replace
    monkeypatch.setattr(files.os, "fsync", lambda fd: order.append("fsync"))
    monkeypatch.setattr(files.os, "replace", lambda a, b: (order.append("replace"), replace(a, b)))
    write_atomic(path, lambda p: (order.append("write"), p.write_text("new")))
    assert path.read_text() == "new" and order == ["write", "fsync", "replace"]


# ---- read_json


def test_read_json(tmp_path):
    path = tmp_path / "x.json"
    with pytest.raises(FileNotFoundError) as error:
        read_json(path)
    assert str(error.value) == f"{tmp_path} is not a model folder: it has no x.json"
    path.write_text('{"é": [1, null]}', encoding="utf-8")
    assert read_json(path) == {"é": [1, None]}
    for damaged in (b"", b'{"a": ', b"\xff\xfe{}", b"[" * 100_000, b"[1, 2]", b"3", b"null"):
        path.write_bytes(damaged)
        with pytest.raises(ValueError) as error:
            read_json(path)
        assert str(error.value).startswith(f"{path} is damaged: ") and "\n" not in str(error.value)


# ---- config_from

PAIRS = "must be even and fit into the head: RoPE rotates pairs"
VALUES = {f.name: getattr(Config(), f.name) for f in dataclasses.fields(Config)}


def test_config_from_reads_what_json_holds():
    assert config_from(json.loads(json.dumps(VALUES))) == Config()
    c = config_from({**VALUES, "eos_ids": [3, 4], "rope_theta": 10000})  # no tuples, and 1e4 may be an int
    assert c.eos_ids == (3, 4) and c == Config(eos_ids=(3, 4))


@pytest.mark.parametrize("changes, says", [
    ({"mask_id": 64}, "mask_id=64 is no id below 64"),  # what Config itself refuses: tests/test_model.py
    ({"real_vocab": 65}, "real_vocab=65 must not exceed vocab_size=64"),
    ({"pad_id": 5, "mask_id": 5, "eos_ids": (3,)},
     "pad_id=5 is the mask token: what follows an end would stay masked"),
    ({"block_size": -1}, "block_size=-1 must not be negative"),
    ({"head_dim": 5}, f"rotary_dim=0 (0: head_dim=5) {PAIRS}"),
    ({"rotary_dim": 3}, f"rotary_dim=3 (0: head_dim=32) {PAIRS}"),
    ({"rotary_dim": 34}, f"rotary_dim=34 (0: head_dim=32) {PAIRS}"),
    ({"n_layer": "two"}, "n_layer='two' is of the wrong kind"),
    ({"n_layer": 2.0}, "n_layer=2.0 is of the wrong kind"),
    ({"eos_ids": None}, "eos_ids=None is of the wrong kind"),
    ({"tied": 1}, "tied=1 is of the wrong kind"),
    ({"cherry": 1, "banana": 2}, "unknown Config fields: banana, cherry"),
    ({"block_size": ..., "rope_theta": ...}, "missing Config fields: block_size, rope_theta"),  # no default
])  # fmt: skip
def test_config_from_names_what_is_wrong(changes, says):
    with pytest.raises(ValueError) as error:
        config_from({k: v for k, v in {**VALUES, **changes}.items() if v is not ...})
    assert str(error.value) == says


# ---- save and load


@pytest.mark.parametrize("options", [
    {}, dict(tied=False, qkv_bias=True, qk_norm=False, eos_ids=(3, 5), real_vocab=10, block_size=4),
])  # fmt: skip
def test_save_and_load(tiny, tmp_path, options):
    model, folder = tiny(**options), tmp_path / "deep" / "run"
    files.save(model, folder)
    again = files.load(folder)
    assert again.config == model.config
    assert dict(again.named_parameters()).keys() == dict(model.named_parameters()).keys()
    for (name, a), (_, b) in zip(model.named_parameters(), again.named_parameters()):
        assert torch.equal(a, b) and b.dtype == torch.float32, name
        assert b.requires_grad and b.device.type == "cpu", name
    ids, positions = torch.tensor([[1, 2, 3, 11]]), torch.arange(4)[None]
    hidden, hidden_again = (m(m.embed_tokens(ids), positions) for m in (model, again))
    assert torch.equal(hidden, hidden_again)
    half = files.load(folder, dtype=torch.bfloat16)
    assert all(torch.equal(a.bfloat16(), b) for a, b in zip(model.parameters(), half.parameters()))
    assert read_json(folder / "config.json")["model_type"] == "rcd"
    assert names(folder) == ["config.json", "model.safetensors"]  # nothing else stays behind


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_a_save_that_fails_keeps_the_model_that_was_there(tiny, tmp_path, monkeypatch):
    files.save(tiny(seed=0), tmp_path)

    def full_disk(tensors, path, metadata):
        path.write_bytes(b"the beginning")
        raise OSError("No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full_disk)
    with pytest.raises(OSError, match="No space"):
        files.save(tiny(seed=1), tmp_path)
    assert torch.equal(files.load(tmp_path).embedding, tiny(seed=0).embedding)
    assert names(tmp_path) == ["config.json", "model.safetensors"]


def test_every_tensor_that_does_not_fit_is_named(tiny):
    model = tiny()
    tensors = dict(model.state_dict())
    del tensors["norm.weight"], tensors["layers.1.mlp.up_proj.weight"]
    tensors["layers.2.mlp.up_proj.weight"] = torch.zeros(1)
    tensors["lm_head.weight"] = torch.zeros(12, 16)
    tensors["layers.0.self_attn.q_norm.weight"] = torch.zeros(7)
    with torch.device("meta"):
        empty = Transformer(model.config)
    with pytest.raises(ValueError) as error:
        files.assign_tensors(empty, tensors, None, "somewhere")
    start, _, listed = str(error.value).partition("the tensors do not fit the config: ")
    assert start == "somewhere: " and sorted(listed.split("; ")) == [
        "layers.0.self_attn.q_norm.weight is (7,), expected (6,)",
        "missing layers.1.mlp.up_proj.weight", "missing norm.weight",
        "unexpected layers.2.mlp.up_proj.weight", "unexpected lm_head.weight",
    ]  # fmt: skip
    assert all(p.is_meta for p in empty.parameters())  # nothing is half-loaded


def test_a_folder_that_cannot_be_loaded_says_why_in_one_line(tiny, tmp_path):
    def refused(kind, says):
        with pytest.raises(kind, match=says) as error:
            files.load(tmp_path)
        assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)

    refused(FileNotFoundError, "no config.json")
    files.save(tiny(), tmp_path)
    weights, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    good, text = weights.read_bytes(), config.read_text()
    for size in (0, 5, 100, len(good) - 1):
        weights.write_bytes(good[:size])
        refused(ValueError, "damaged")
    weights.write_bytes(good)
    for damaged in (b"", text[: len(text) // 2].encode(), b"\xff\xfe{}"):
        config.write_bytes(damaged)
        refused(ValueError, "damaged")
    for before, after, says in (
        (text, "[1, 2]", "not of this project's own format"),
        (text, "3", "not of this project's own format"),
        ('"model_type": "rcd"', '"model_type": "sdar"', "zoo.load"),
        ('"n_layer": 2', '"n_layer": 3', "missing layers.2.input_layernorm.weight"),
        ('"n_layer": 2', '"n_layer": "two"', "config.json: n_layer='two' is of the wrong kind"),
        ('"tied": true', '"tied": true, "colour": 3', "config.json: unknown Config fields: colour"),
    ):
        assert before in text
        config.write_text(text.replace(before, after))
        refused(ValueError, says)
    config.write_text(text)
    weights.unlink()
    refused(FileNotFoundError, "no model.safetensors")
