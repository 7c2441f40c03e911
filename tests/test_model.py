"""The transformer against the `transformers` library and against loops, its cache, and the files it is kept in."""

import dataclasses
import json
import math

import pytest
import torch
import transformers

import peers
import rcd
from rcd import Config, Transformer
from zoo import files

T, V = 9, 13
FAMILIES = {
    "qwen3": ("Qwen3", dict(qk_norm=True)),
    "qwen2": ("Qwen2", dict(qk_norm=False, qkv_bias=True)),
    "llama": ("Llama", dict(qk_norm=False)),
}


def hugging_face(c: Config, family: str, seed: int) -> torch.nn.Module:
    """The same architecture in the other library, with random weights (norms and biases too)."""
    extra = {} if family == "Qwen2" else {"head_dim": c.head_dim}
    config = getattr(transformers, f"{family}Config")(
        vocab_size=c.vocab_size, hidden_size=c.d_model, intermediate_size=c.d_ff, num_hidden_layers=c.n_layer,
        num_attention_heads=c.n_head, num_key_value_heads=c.n_kv_head, max_position_embeddings=c.max_len, rms_norm_eps=c.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta}, tie_word_embeddings=c.tied,
        attn_implementation="eager", **extra,
    )  # fmt: skip
    theirs = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            p.copy_(1 + 0.3 * torch.randn_like(p) if "norm" in name else torch.randn_like(p) * (0.4 if p.dim() == 2 else 0.3))
    return theirs


def same_weights(ours: Transformer, theirs: torch.nn.Module) -> Transformer:
    """Copied by name alone: nothing but the prefix "model." differs."""
    state = {name.removeprefix("model."): p for name, p in theirs.state_dict().items()}
    if ours.config.tied:
        state.pop("lm_head.weight")
    ours.load_state_dict(state, strict=True)
    return ours.eval()


def additive(allowed: list[list[bool]]) -> torch.Tensor:
    """(T, T) booleans -> the (1, 1, T, T) float mask that transformers adds to its scores."""
    return torch.tensor([[0.0 if ok else torch.finfo(torch.float32).min for ok in row] for row in allowed])[None, None]


def drawable(logits: torch.Tensor, c: Config) -> torch.Tensor:
    ids = [i for i in range(c.vocab_size) if i != c.mask_id and (not c.real_vocab or i < c.real_vocab)]
    return logits[..., ids]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kv", [1, 2, 4])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_logits_equal_transformers(family, kv, tied):
    name, options = FAMILIES[family]
    head_dim = 6 if family == "qwen2" else 10  # 4 heads of 10 in a width of 24; Qwen2 of transformers derives it from the width
    c = Config(vocab_size=V, mask_id=5, n_layer=2, n_head=4, n_kv_head=kv, head_dim=head_dim, d_model=24, d_ff=31, max_len=64,
               rope_theta=50.0, norm_eps=1e-3, tied=tied, **options)  # fmt: skip
    theirs = hugging_face(c, name, seed=kv)
    ours = same_weights(Transformer(c), theirs)
    ids = torch.randint(V, (2, T), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(T)[None]

    def compare(mask, their_mask, positions=positions):
        z = ours.logits(ours(ours.embed(ids), positions, mask).flatten(0, 1)).view(2, T, V)
        expected = theirs(ids, attention_mask=their_mask, position_ids=positions.expand(2, T)).logits
        assert expected.std() > 0.5  # or it would be no test
        torch.testing.assert_close(drawable(z, c), drawable(expected, c), atol=1e-5, rtol=1e-5)
        assert bool((z[..., 5] == -math.inf).all())
        return z

    full = compare(None, additive([[True] * T] * T))
    for b in (2, 4, 5):
        blocks = compare(
            peers.block_causal_mask(positions, positions, b)[:, None], additive([[k // b <= q // b for k in range(T)] for q in range(T)])
        )
        assert not torch.allclose(blocks, full)
    compare(peers.block_causal_mask(positions, positions, 1)[:, None], None)  # blocks of one token: what their library does by itself
    compare(None, additive([[True] * T] * T), positions=positions * 3 + 7)  # positions are what RoPE says, not the index

    soft = torch.randn(2, T, c.d_model, generator=torch.Generator().manual_seed(2))
    z = ours.logits(ours(soft, positions).flatten(0, 1)).view(2, T, V)
    expected = theirs(inputs_embeds=soft, attention_mask=additive([[True] * T] * T)).logits
    torch.testing.assert_close(drawable(z, c), drawable(expected, c), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rotary_dim", [0, 2, 4])
@torch.no_grad()
def test_partial_rotary_attention_by_loops(tiny, rotary_dim):
    """One attention layer, one number at a time: pairs (i, i + R/2) of the first R dimensions turn by position * theta^(-2i/R)."""
    model = tiny(seed=3, n_layer=1, n_head=4, n_kv_head=2, head_dim=6, rotary_dim=rotary_dim, rope_theta=30.0)
    c, attention = model.config, model.layers[0].self_attn
    x = torch.randn(1, 5, 16, generator=torch.Generator().manual_seed(4))
    positions = [0, 1, 2, 5, 11]
    allowed = [[k <= q or k == 4 for k in range(5)] for q in range(5)]
    R = rotary_dim or c.head_dim

    def rms(v, weight):
        return [a * w / math.sqrt(sum(b * b for b in v) / len(v) + c.norm_eps) for a, w in zip(v, weight.tolist())]

    def turned(v, position):
        out = list(v)
        for i in range(R // 2):
            angle = position * c.rope_theta ** (-2 * i / R)
            out[i] = v[i] * math.cos(angle) - v[i + R // 2] * math.sin(angle)
            out[i + R // 2] = v[i + R // 2] * math.cos(angle) + v[i] * math.sin(angle)
        return out

    def heads(projection, n):
        out = (x[0].double() @ projection.weight.double().T).tolist()
        return [[row[h * 6 : h * 6 + 6] for h in range(n)] for row in out]

    q, k, v = heads(attention.q_proj, 4), heads(attention.k_proj, 2), heads(attention.v_proj, 2)
    expected = []
    for i in range(5):
        row = []
        for h in range(4):
            g = h // 2  # two query heads share a key head
            mine = turned(rms(q[i][h], attention.q_norm.weight), positions[i])
            scores = {}
            for j in range(5):
                if allowed[i][j]:
                    other = turned(rms(k[j][g], attention.k_norm.weight), positions[j])
                    scores[j] = math.exp(sum(a * b for a, b in zip(mine, other)) / math.sqrt(6))
            row += [sum(s * v[j][g][d] for j, s in scores.items()) / sum(scores.values()) for d in range(6)]
        expected.append(row)
    expected = torch.tensor(expected, dtype=torch.float64) @ attention.o_proj.weight.double().T  # (5, D)

    captured = {}
    hook = attention.register_forward_hook(lambda module, args, out: captured.update(out=out))
    model.layers[0].input_layernorm = torch.nn.Identity()  # so that the attention layer reads x itself
    model(x, torch.tensor([positions]), torch.tensor(allowed)[None, None])
    hook.remove()
    torch.testing.assert_close(captured["out"][0].double(), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_padded_rows_of_the_table_and_the_mask_have_no_logit(tiny):
    model = tiny(real_vocab=9, mask_id=4)
    h = torch.randn(3, 16)
    z = model.logits(h)
    banned = [4, 9, 10, 11]
    assert bool((z[:, banned] == -math.inf).all())
    keep = [i for i in range(12) if i not in banned]
    torch.testing.assert_close(z[:, keep], h @ model.embed_tokens.weight[keep].T)


def test_rows_that_predict_a_cell(tiny):
    hidden = torch.arange(2 * 4 * 16.0).view(2, 4, 16)
    where = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 3, 1, 2])
    torch.testing.assert_close(tiny().rows(hidden, where), torch.stack([hidden[0, 0], hidden[0, 3], hidden[1, 1], hidden[1, 2]]))
    torch.testing.assert_close(
        tiny(logit_shift=True).rows(hidden, where), torch.stack([hidden[0, 0], hidden[0, 2], hidden[1, 0], hidden[1, 1]])
    )


def test_rms_norm_is_taken_in_float32():
    norm = rcd.RMSNorm(4, 1e-6)
    norm.weight.data = torch.tensor([1.0, 2.0, 0.5, -1.0])
    large = torch.tensor([[300.0, -400.0, 500.0, 600.0]])  # squares overflow float16
    small = torch.tensor([[3e-4, -4e-4, 5e-4, 6e-4]])  # squares vanish in float16
    for dtype in (torch.float16, torch.bfloat16):
        for x in (large.to(dtype), small.to(dtype)):
            exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight.double()
            assert norm(x).dtype == dtype
            torch.testing.assert_close(norm(x).double(), exact.to(dtype).double())  # to the last bit or its neighbour
            torch.testing.assert_close(norm.to(dtype)(x).double(), exact.to(dtype).double())
            norm.float()


def test_initial_weights_follow_gpt2():
    c = Config(vocab_size=400, mask_id=0, n_layer=8, n_head=4, n_kv_head=4, head_dim=32, d_model=128, d_ff=300, qkv_bias=True, tied=False)
    model = Transformer(c).init_weights(torch.Generator().manual_seed(0))
    for name, p in model.named_parameters():
        if name.endswith("norm.weight"):
            assert bool((p == 1).all()), name
        elif name.endswith("bias"):
            assert bool((p == 0).all()), name
        else:
            std = 0.02 / 4 if "o_proj" in name or "down_proj" in name else 0.02  # sqrt(2 * 8 layers) = 4
            assert abs(p.std().item() / std - 1) < 0.05 and abs(p.mean().item()) < 0.05 * std, name
    again = Transformer(c).init_weights(torch.Generator().manual_seed(0))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))
    other = Transformer(c).init_weights(torch.Generator().manual_seed(1))
    assert not torch.equal(model.embedding, other.embedding)


def test_tied_and_untied_heads(tiny):
    tied, untied = tiny(tied=True), tiny(tied=False)
    assert tied.head is tied.embedding and "lm_head.weight" not in tied.state_dict()
    assert untied.head is untied.lm_head.weight and not torch.equal(untied.head, untied.embedding)


def test_recomputed_layers_give_the_same_gradients(tiny):
    x, positions = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0)), torch.arange(5)[None]
    grads = []
    for remat in (False, True):
        model = tiny()
        calls = []
        model.layers[0].mlp.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        model.remat = remat
        model(x, positions).square().sum().backward()
        grads.append([p.grad for name, p in model.named_parameters() if not name.startswith("embed")])
        assert len(calls) == (2 if remat else 1)  # remat really recomputes
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b)


@torch.no_grad()
def test_cache_in_pieces_gives_what_a_whole_forward_gives(tiny):
    model, b, positions = tiny(), 3, torch.arange(9)[None]
    x = torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(0))
    whole = model(x, positions, peers.block_causal_mask(positions, positions, b)[:, None])
    cache = rcd.KVCache(model.config, 2, 9, x.device, x.dtype)
    for begin, end, noise in (
        (0, 3, 0),
        (3, 6, 5),
        (3, 6, 0),
        (1, 9, 0),
    ):  # a block is rewritten until it is clean, a window begins anywhere
        at = positions[:, begin:end].repeat(2, 1)
        cache.point_at(torch.arange(2), at, end)
        mask = peers.block_causal_mask(at, torch.arange(end)[None], b)[:, None]
        part = model(x[:, begin:end] + noise, at, mask, cache)
    torch.testing.assert_close(part, whole[:, 1:], atol=1e-5, rtol=1e-5)


def test_cache_keeps_by_row_and_position():
    c = Config(n_layer=2, n_head=2, n_kv_head=1, head_dim=2)
    cache = rcd.KVCache(c, 3, 5, torch.device("cpu"), torch.float32)
    k = torch.arange(8.0).view(2, 2, 1, 2) + 1  # (2 rows, 2 positions, 1 head, width 2)
    cache.point_at(torch.tensor([0, 2]), torch.tensor([[-1, 0], [1, 2]]), 3)
    keys, values = cache.update(1, k, -k)
    assert keys[:, :, 0].tolist() == [[[3, 4], [0, 0], [0, 0]], [[0, 0], [5, 6], [7, 8]]]  # the -1 of row 0 is seen by nobody
    assert torch.equal(values, -keys)
    cache.point_at(torch.tensor([0, 1, 2]), torch.tensor([[1], [1], [1]]), 5)
    keys, _ = cache.update(1, torch.full((3, 1, 1, 2), 9.0), torch.zeros(3, 1, 1, 2))
    assert keys[:, :, 0, 0].tolist() == [[3, 9, 0, 0, 0], [0, 9, 0, 0, 0], [0, 9, 7, 0, 0]]
    assert not cache.k[0].any()  # the other layer has its own


# ---------------------------------------------------------------------------------------------------------------------------------------
# Config


def test_config_refuses_what_cannot_be_a_model():
    for options, says in (
        (dict(n_head=4, n_kv_head=3), "n_kv_head=3"), (dict(mask_id=64), "mask_id=64"), (dict(mask_id=-1), "mask_id=-1"),
        (dict(head_dim=5), "even"), (dict(rotary_dim=3), "even"), (dict(head_dim=4, rotary_dim=6), "rotary_dim=6"),
        (dict(block_size=-1), "block_size=-1"), (dict(n_kv_head=0), "n_kv_head=0"), (dict(real_vocab=65), "real_vocab=65"),
        (dict(pad_id=5, mask_id=5, eos_ids=(3,)), "pad_id=5"),  # or what follows an end would stay masked
        (dict(n_layer="two"), "n_layer='two'"), (dict(eos_ids=None), "eos_ids=None"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=says):
            Config(**options)
    assert Config(eos_ids=[3, 4]).eos_ids == (3, 4)  # JSON has no tuples
    values = {f.name: getattr(Config(), f.name) for f in dataclasses.fields(Config)}
    assert Config.from_dict(values) == Config()
    with pytest.raises(ValueError, match="banana, cherry"):
        Config.from_dict(values | {"cherry": 1, "banana": 2})
    del values["block_size"], values["rope_theta"]  # a default in their place would be another model
    with pytest.raises(ValueError, match="block_size, rope_theta"):
        Config.from_dict(values)


# ---------------------------------------------------------------------------------------------------------------------------------------
# Files


@pytest.mark.parametrize("options", [dict(), dict(tied=False, qkv_bias=True, qk_norm=False, eos_ids=(3, 5), real_vocab=10, block_size=4)])
def test_save_and_load(tiny, tmp_path, options):
    model = tiny(**options)
    files.save(model, tmp_path / "deep" / "run")
    again = files.load(tmp_path / "deep" / "run")
    assert again.config == model.config
    assert {n: p.dtype for n, p in again.named_parameters()} == {n: torch.float32 for n, _ in model.named_parameters()}
    for (name, a), (_, b) in zip(model.named_parameters(), again.named_parameters()):
        assert torch.equal(a, b) and b.requires_grad and b.device.type == "cpu", name
    ids, positions = torch.tensor([[1, 2, 3, 11]]), torch.arange(4)[None]
    assert torch.equal(again(again.embed(ids), positions), model(model.embed(ids), positions))
    half = files.load(tmp_path / "deep" / "run", dtype=torch.bfloat16)
    assert all(torch.equal(a.bfloat16(), b) for a, b in zip(model.parameters(), half.parameters()))
    assert json.loads((tmp_path / "deep" / "run" / "config.json").read_text())["model_type"] == "rcd"
    assert sorted(p.name for p in (tmp_path / "deep" / "run").iterdir()) == ["config.json", "model.safetensors"]  # no leftovers


def test_every_tensor_that_does_not_fit_is_named(tiny, tmp_path):
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
    message = str(error.value)
    assert "\n" not in message and message.startswith("somewhere: ")
    for part in ("missing norm.weight", "missing layers.1.mlp.up_proj.weight", "unexpected layers.2.mlp.up_proj.weight",
                 "unexpected lm_head.weight", "layers.0.self_attn.q_norm.weight is (7,), expected (6,)"):  # fmt: skip
        assert part in message
    assert message.count("missing") == message.count("unexpected") == 2 and message.count("expected (") == 1
    assert all(p.is_meta for p in empty.parameters())  # nothing is half-loaded


def test_a_folder_that_cannot_be_loaded_says_why_in_one_line(tiny, tmp_path):
    def refused(kind, says):
        with pytest.raises(kind, match=says) as error:
            files.load(tmp_path)
        assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)

    refused(FileNotFoundError, "no config.json")
    files.save(tiny(), tmp_path)
    weights, config = (tmp_path / "model.safetensors"), (tmp_path / "config.json")
    good, text = weights.read_bytes(), config.read_text()
    for size in (0, 5, 100, len(good) - 1):
        weights.write_bytes(good[:size])
        refused(ValueError, "damaged")
    weights.write_bytes(good)
    for damaged in (b"", text[: len(text) // 2].encode(), b"\xff\xfe{}"):
        config.write_bytes(damaged)
        refused(ValueError, "damaged")
    config.write_text(text.replace('"model_type": "rcd"', '"model_type": "sdar"'))
    refused(ValueError, "zoo.load")
    config.write_text(text.replace('"n_layer": 2', '"n_layer": 3'))
    refused(ValueError, "missing layers.2.input_layernorm.weight")
    config.write_text(text)
    weights.unlink()
    refused(FileNotFoundError, "no model.safetensors")


def test_a_config_of_the_wrong_kind_is_one_line_too(tiny, tmp_path):
    files.save(tiny(), tmp_path)
    config = tmp_path / "config.json"
    text = config.read_text()
    for damaged in ("[1, 2]", "3", text.replace('"n_layer": 2', '"n_layer": "two"'), text.replace('"eos_ids": []', '"eos_ids": null'),
                    text.replace('"tied": true', '"tied": true, "colour": 3'), text.replace(' "n_layer": 2,\n', "")):  # fmt: skip
        assert damaged != text
        config.write_text(damaged)
        with pytest.raises(ValueError) as error:
            files.load(tmp_path)
        assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


def test_a_killed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file.json"
    files.write_atomic(path, lambda p: p.write_text("old"))
    assert path.read_text() == "old" and path.stat().st_mode & 0o777 == 0o644

    def half(p):
        p.write_text("ne")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        files.write_atomic(path, half)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]

    order = []
    monkeypatch.setattr(files.os, "fsync", lambda fd: order.append("fsync"))
    replace = files.os.replace
    monkeypatch.setattr(files.os, "replace", lambda a, b: (order.append("replace"), replace(a, b)))
    files.write_atomic(path, lambda p: (order.append("write"), p.write_text("new")))
    assert path.read_text() == "new" and order == ["write", "fsync", "replace"]


def test_a_save_that_fails_keeps_the_model_that_was_there(tiny, tmp_path, monkeypatch):
    import safetensors.torch

    files.save(tiny(seed=0), tmp_path)

    def full_disk(tensors, path, metadata):
        path.write_bytes(b"part of it")
        raise OSError("No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full_disk)
    with pytest.raises(OSError, match="No space"):
        files.save(tiny(seed=1), tmp_path)
    assert torch.equal(files.load(tmp_path).embedding, tiny(seed=0).embedding)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("n", [1, 512, 513, 640, 1000])
def test_spare_rows_leave_no_trace(tiny, n):
    """Few sizes of matrix products, at most an eighth more rows, and nobody sees them."""
    model, rows, spare = tiny(), torch.randn(n, 16), rcd.spare_rows(n, torch.device("cpu"))
    assert spare < max(1, n / 8) and ((n + spare) % 64 == 0 or n <= 512) and rcd.spare_rows(n, torch.device("cuda")) == 0
    with torch.no_grad():
        logits = model.logits(rows)
        torch.testing.assert_close(logits, torch.cat([model.logits(row[None]) for row in rows]))
        delta = rcd.Residual()(logits, model.embedding)[1]
    torch.testing.assert_close(delta, logits.softmax(-1) @ model.embedding)
