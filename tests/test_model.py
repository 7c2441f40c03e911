"""The transformer against the `transformers` library and against loops, its cache and its Config."""

import math

import peers
import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode

import rcd
from rcd import Config, Transformer
from zoo import speed

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
        num_attention_heads=c.n_head, num_key_value_heads=c.n_kv_head, max_position_embeddings=c.max_len,
        rms_norm_eps=c.norm_eps, rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta},
        tie_word_embeddings=c.tied, attn_implementation="eager", **extra,
    )  # fmt: skip
    theirs = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            noise = torch.randn_like(p)
            p.copy_(1 + 0.3 * noise if "norm" in name else noise * (0.4 if p.dim() == 2 else 0.3))
    return theirs


def same_weights(ours: Transformer, theirs: torch.nn.Module) -> Transformer:
    """Copied by name. Only the prefix "model." differs."""
    state = {name.removeprefix("model."): p for name, p in theirs.state_dict().items()}
    if ours.config.tied:
        state.pop("lm_head.weight")
    ours.load_state_dict(state, strict=True)
    return ours.eval()


def additive(allowed: list[list[bool]]) -> torch.Tensor:
    """(T, T) booleans -> the (1, 1, T, T) float mask that transformers adds to its scores."""
    low = torch.finfo(torch.float32).min
    return torch.tensor([[0.0 if ok else low for ok in row] for row in allowed])[None, None]


def drawable(logits: torch.Tensor, c: Config) -> torch.Tensor:
    return logits[..., [i for i in range(c.vocab_size) if i != c.mask_id]]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kv", [1, 2, 4])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_logits_equal_transformers(family, kv, tied):
    name, options = FAMILIES[family]
    head_dim = 6 if family == "qwen2" else 10  # transformers' Qwen2 takes the width, 24, over its 4 heads
    c = Config(vocab_size=V, mask_id=5, n_layer=2, n_head=4, n_kv_head=kv, head_dim=head_dim, d_model=24,
               d_ff=31, max_len=64, rope_theta=50.0, norm_eps=1e-3, tied=tied, **options)  # fmt: skip
    theirs = hugging_face(c, name, seed=kv)
    ours = same_weights(Transformer(c), theirs)
    ids = torch.randint(V, (2, T), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(T)[None]

    def compare(mask, their_mask, positions=positions):
        z = ours.logits(ours(ours.embed_tokens(ids), positions, mask).flatten(0, 1)).view(2, T, V)
        expected = theirs(ids, attention_mask=their_mask, position_ids=positions.expand(2, T)).logits
        assert expected.std() > 0.5  # or it would be no test
        torch.testing.assert_close(drawable(z, c), drawable(expected, c), atol=1e-5, rtol=1e-5)
        assert bool((z[..., 5] == -math.inf).all())
        return z

    full = compare(None, additive([[True] * T] * T))
    for b in (2, 4, 5):
        by_loops = additive([[k // b <= q // b for k in range(T)] for q in range(T)])
        blocks = compare(peers.block_causal_mask(positions, positions, b)[:, None], by_loops)
        assert not torch.allclose(blocks, full)
    # Blocks of one token are causal attention, which is what their library does by itself.
    compare(peers.block_causal_mask(positions, positions, 1)[:, None], None)
    # RoPE takes the positions that are given, not the index.
    compare(None, additive([[True] * T] * T), positions=positions * 3 + 7)

    soft = torch.randn(2, T, c.d_model, generator=torch.Generator().manual_seed(2))
    z = ours.logits(ours(soft, positions).flatten(0, 1)).view(2, T, V)
    expected = theirs(inputs_embeds=soft, attention_mask=additive([[True] * T] * T)).logits
    torch.testing.assert_close(drawable(z, c), drawable(expected, c), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rotary_dim", [0, 2, 4])
@torch.no_grad()
def test_partial_rotary_attention_by_loops(tiny, rotary_dim):
    """One attention layer, one number at a time. Pairs (i, i + R/2) of the first R dimensions turn by
    position * theta^(-2i/R)."""
    model = tiny(seed=3, n_layer=1, n_head=4, n_kv_head=2, head_dim=6, rotary_dim=rotary_dim, rope_theta=30.0)
    c, attention = model.config, model.layers[0].self_attn
    x = torch.randn(1, 5, 16, generator=torch.Generator().manual_seed(4))
    positions = [0, 1, 2, 5, 11]
    allowed = [[k <= q or k == 4 for k in range(5)] for q in range(5)]
    R = rotary_dim or c.head_dim

    def rms(v, weight):
        root = math.sqrt(sum(b * b for b in v) / len(v) + c.norm_eps)
        return [a * w / root for a, w in zip(v, weight.tolist())]

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
    h = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    z = model.logits(h)
    banned = [4, 9, 10, 11]
    assert bool((z[:, banned] == -math.inf).all())
    keep = [i for i in range(12) if i not in banned]
    torch.testing.assert_close(z[:, keep], h @ model.embed_tokens.weight[keep].T)


def test_rows_that_predict_a_cell(tiny):
    hidden = torch.arange(2 * 4 * 16.0).view(2, 4, 16)
    cells = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 3, 1, 2])
    own = torch.stack([hidden[0, 0], hidden[0, 3], hidden[1, 1], hidden[1, 2]])
    before = torch.stack([hidden[0, 0], hidden[0, 2], hidden[1, 0], hidden[1, 1]])
    assert torch.equal(tiny().predicting(hidden, cells), own)
    assert torch.equal(tiny(logit_shift=True).predicting(hidden, cells), before)


def test_rms_norm_is_taken_in_float32():
    norm = rcd.RMSNorm(4, 1e-6)
    norm.weight.data = torch.tensor([1.0, 2.0, 0.5, -1.0])
    large = torch.tensor([[300.0, -400.0, 500.0, 600.0]])  # squares overflow float16
    small = torch.tensor([[3e-4, -4e-4, 5e-4, 6e-4]])  # squares vanish in float16
    for dtype in (torch.float16, torch.bfloat16):
        for x in (large.to(dtype), small.to(dtype)):
            rms = (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt()
            exact = x.double() / rms * norm.weight.double()
            assert norm(x).dtype == dtype
            torch.testing.assert_close(norm(x).double(), exact.to(dtype).double())
            torch.testing.assert_close(norm.to(dtype)(x).double(), exact.to(dtype).double())
            norm.float()


def test_tied_and_untied_heads(tiny):
    tied, untied = tiny(tied=True), tiny(tied=False)
    assert tied.head is tied.embedding and "lm_head.weight" not in tied.state_dict()
    assert untied.head is untied.lm_head.weight and not torch.equal(untied.head, untied.embedding)


def test_recomputed_layers_give_the_same_gradients(tiny):
    x, positions = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0)), torch.arange(5)[None]
    grads = []
    for remat in (False, True):
        model, calls = speed.remat(tiny()) if remat else tiny(), []
        model.layers[0].mlp.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        model(x, positions).square().sum().backward()
        grads.append([p.grad for name, p in model.named_parameters() if not name.startswith("embed")])
        assert len(calls) == (2 if remat else 1)  # a layer is computed again, and only then
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b)


@torch.no_grad()
def test_cache_in_pieces_gives_what_a_whole_forward_gives(tiny):
    model, b, positions = tiny(), 3, torch.arange(9)[None]
    x = torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(0))
    whole = model(x, positions, peers.block_causal_mask(positions, positions, b)[:, None])
    cache = rcd.KVCache(model.config, 2, 9, like=x)
    # A block is written again until it is clean. A window begins anywhere.
    for begin, end, noise in ((0, 3, 0), (3, 6, 5), (3, 6, 0), (1, 9, 0)):
        at = positions[:, begin:end].repeat(2, 1)
        cache.at(torch.arange(2), at, end)
        mask = peers.block_causal_mask(at, torch.arange(end)[None], b)[:, None]
        part = model(x[:, begin:end] + noise, at, mask, cache)
    torch.testing.assert_close(part, whole[:, 1:], atol=1e-5, rtol=1e-5)


def test_cache_keeps_by_row_and_position():
    c = Config(n_layer=2, n_head=2, n_kv_head=1, head_dim=2)
    cache = rcd.KVCache(c, 3, 5, like=torch.zeros(()))
    k = torch.arange(8.0).view(2, 1, 2, 2) + 1  # (2 rows, 1 head, 2 positions, width 2)
    cache.at(torch.tensor([0, 2]), torch.tensor([[-1, 0], [1, 2]]), 3)
    keys, values = cache.update(1, k, -k)
    # Position -1 of row 0 is padding: no one sees it.
    assert keys[:, 0].tolist() == [[[3, 4], [0, 0], [0, 0]], [[0, 0], [5, 6], [7, 8]]]
    assert torch.equal(values, -keys)
    cache.at(torch.arange(3), torch.ones(3, 1, dtype=torch.long), 5)
    keys, _ = cache.update(1, torch.full((3, 1, 1, 2), 9.0), torch.zeros(3, 1, 1, 2))
    assert keys[:, 0, :, 0].tolist() == [[3, 9, 0, 0, 0], [0, 9, 0, 0, 0], [0, 9, 7, 0, 0]]
    assert not cache.k[0].any()  # the other layer has its own


# ---- Config


@pytest.mark.parametrize("options, says", [
    (dict(n_head=4, n_kv_head=3), "n_head=4 must be a multiple of n_kv_head=3"),
    (dict(n_kv_head=0), "n_head=4 must be a multiple of n_kv_head=0"),
    (dict(mask_id=64), "mask_id=64 is no id below 64"),
    (dict(mask_id=-1), "mask_id=-1 is no id below 64"),
])  # fmt: skip
def test_config_refuses_what_cannot_be_a_model(options, says):
    """What JSON may hold beyond this is checked in tests/test_files.py."""
    with pytest.raises(ValueError) as error:
        Config(**options)
    assert str(error.value) == says


def test_end_tokens_are_a_tuple_whatever_they_were():
    assert Config(eos_ids=[3, 4]).eos_ids == (3, 4)


# ---- Rows of padding


@torch.no_grad()
def test_autocast_casts_the_table_once(tiny):
    """It keeps the copy of a parameter, not that of a view of one."""
    model, copies = tiny(), []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten._to_copy.default:
                copies.append(tuple(args[0].shape))
            return func(*args, **kwargs or {})

    with torch.autocast("cpu", torch.bfloat16), Watch():
        for _ in range(3):
            model.logits(torch.ones(2, 16))
    assert copies.count(tuple(model.head.shape)) == 1


@pytest.mark.parametrize("n", [1, 512, 513, 640, 1000])
@torch.no_grad()
def test_padding_rows_of_a_matrix_product_leave_no_trace(tiny, n):
    """A product meets few sizes, of at most an eighth more rows. Its result is that of the n rows."""
    model, rows, sizes = tiny(), torch.randn(n, 16, generator=torch.Generator().manual_seed(n)), []

    def product(x):
        sizes.append(len(x))
        return 2 * x

    assert torch.equal(rcd.padded(product, rows), 2 * rows)
    assert sizes[0] - n < max(1, n / 8) and (n <= 512 or sizes[0] % 64 == 0) and (n > 512 or sizes[0] == n)
    assert rcd.padded(product, rows.to("meta")).shape == (n, 16) and sizes[1] == n  # only on a CPU
    logits = model.logits(rows)
    torch.testing.assert_close(logits, torch.cat([model.logits(row[None]) for row in rows]))
    delta = rcd.Residual()(logits, model.embedding)[1]
    torch.testing.assert_close(delta, logits.softmax(-1) @ model.embedding)


def test_nothing_is_copied_in_backward_for_columns_that_are_not_there(tiny):
    """An assignment to columns of the logits copies their whole gradient: one for [MASK], one for padding."""
    for padding in (0, 2):
        model = tiny(real_vocab=padding and tiny().config.vocab_size - padding)
        node, names = model.logits(torch.ones(3, model.config.d_model)).grad_fn, []
        while node:
            names.append(node.name())
            node = node.next_functions[0][0] if node.next_functions else None
        copies = sum(name.endswith("CopySlices") for name in names)
        assert copies == (2 if padding else 1), names
