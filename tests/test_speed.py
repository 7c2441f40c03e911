"""zoo/speed.py and --compile: faster on a GPU, and nothing else changes. One file, because torch takes ten
seconds to trace the first function of a process."""

import functools
from dataclasses import replace

import pytest
import torch
from test_loss import MASK, seeded
from test_sampler import KINDS, drain
from torch.nn.attention import flex_attention

from rcd import attention_mask, diffusion_loss, training_mask
from zoo import speed
from zoo.decoding import Decoding
from zoo.recipes import document_positions

_ = MASK  # canvases below are written with it


@pytest.mark.parametrize("fixed, backend", [(False, "eager"), (True, "aot_eager")])
def test_a_compiled_forward_gives_the_same_tokens(tiny, fixed, backend):
    """As sample.py --compile does it, but for the code generator, which takes a minute. The graphs are
    captured whole, the cache that they write to included, and a handful serves every width, row count and
    length. In fixed shapes they are graphs of one shape each, and their writes are made functional, too."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = tiny(seed=24, n_layer=1, **KINDS["blocks shifted"])
    s = Decoding(rule="threshold", threshold=0.5, block_size=4)
    canvas = torch.tensor([[1] * 5 + [_] * 15, [1, 2] + [_] * 18, [1] * 9 + [_] * 11])
    lengths = torch.tensor([20, 20, 12])
    plain = drain(model, canvas, s, lengths=lengths)
    model.compile(dynamic=not fixed, fullgraph=True, backend=backend)
    compiled = drain(model, canvas, replace(s, fixed_shapes=fixed), lengths=lengths)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert 1 <= graphs <= (3 if fixed else 6)  # torch gives up at 8
    drain(model, canvas, replace(s, fixed_shapes=fixed), lengths=lengths)
    # Another cache, no other graph.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
    assert len(plain) == len(compiled) > 10
    for one, other in zip(plain, compiled):
        assert torch.equal(one.tokens, other.tokens) and torch.equal(one.nfe, other.nfe)
        torch.testing.assert_close(one.confidence, other.confidence, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("block_size, packed, compiled, remat", [
    (0, True, False, False), (4, False, False, False), (4, True, True, True),
])  # fmt: skip
def test_flex_attention_learns_what_the_boolean_mask_does(
    tiny, monkeypatch, block_size, packed, compiled, remat
):
    """The mask as on CUDA, here on a CPU: the same loss. Compiled also the same gradients, and one graph of
    each function for all batches of a size. (torch has no backward kernel of it on a CPU; aot_eager needs
    none. Compilation takes seconds, so two masks are left to the loss.)"""
    options, graphs = dict(block_size=block_size, n_head=4, n_kv_head=2, head_dim=16), []

    def counting(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    compile = functools.cache(lambda f: torch.compile(f, backend=counting) if compiled else f)
    monkeypatch.setattr(speed, "compiled", compile)
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *_: None, raising=False)
    torch._dynamo.reset()
    monkeypatch.setattr(speed, "FLEX", ())
    dense = speed.prepare(tiny(**options), "cpu")
    monkeypatch.setattr(speed, "FLEX", ("cpu",))
    flex = speed.prepare(tiny(**options), "cpu")
    assert dense.attention_mask is attention_mask and flex.attention_mask is speed.flex_mask
    models = [speed.remat(model) if remat else model for model in (dense, flex)]
    for seed in range(2):
        g = seeded(seed)
        tokens = torch.randint(MASK, (3, 40), generator=g)
        segments = torch.randint(2, (3, 40), generator=g).cumsum(1) // 4
        positions = document_positions(segments) if packed else None
        results = []
        for model in models:
            with torch.set_grad_enabled(compiled):
                loss = diffusion_loss(model, tokens, positions=positions, generator=seeded(seed))
            grads = torch.autograd.grad(loss, list(model.parameters())) if compiled else ()
            results.append([loss, *grads])
        for one, other in zip(*results, strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
    assert len(graphs) == (2 if compiled else 0)


@pytest.mark.parametrize("block_size", [0, 64])
def test_flex_attention_skips_the_tiles_where_nothing_is_seen(monkeypatch, block_size):
    """On CUDA its kernel runs only the tiles (128 x 128) that the mask names: in each row its own."""
    monkeypatch.setattr(speed, "compiled", lambda f: f)
    rows = torch.tensor([[0] * 128 + [1] * 256, [0] * 384])
    for segments in (rows, rows[:1]):
        may_attend = training_mask(document_positions(segments), block_size)
        B, tiles = len(segments), 6 if block_size else 3
        dense = attention_mask(may_attend, B, tiles * 128, "cpu").view(B, 1, tiles, 128, tiles, 128)
        named = speed.flex_mask(may_attend, B, tiles * 128, "cpu").block_mask.to_dense()
        assert torch.equal(named.bool(), dense.any(5).any(3)) and not named.bool().all()


def test_compiling_needs_a_compiler_on_a_cpu(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    speed.check_compiler(torch.device("cuda"))
    with pytest.raises(ValueError, match="--compile needs a C\\+\\+ compiler"):
        speed.check_compiler(torch.device("cpu"))
