"""The benchmark's own arithmetic, against torch's FLOP counter, published sizes and sums done by hand.

And that its rows run.
"""

import json
import sys

import bench
import costs
import numpy as np
import peers
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import rcd

HAND = rcd.Config(vocab_size=10, mask_id=9, n_layer=3, n_head=4, n_kv_head=2, head_dim=6, d_model=8, d_ff=5,
                  block_size=4, tied=False)  # fmt: skip


def counted(work) -> int:
    """FLOPs by torch's own counter, which sees through attention if it is two matrix products."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        work()
    return counter.get_total_flops()


@pytest.mark.parametrize("name, parameters", [
    ("SDAR-4B", 4_411_424_256), ("SDAR-8B", 8_190_735_360), ("LLaDA-8B", 8_015_581_184),
])  # fmt: skip
def test_shapes_have_the_published_number_of_parameters(name, parameters):
    """Half the total_size, all is bfloat16, in the index of JetLM/SDAR-4B-Chat, JetLM/SDAR-8B-Chat and
    GSAI-ML/LLaDA-8B-Instruct."""
    with torch.device("meta"):
        assert sum(p.numel() for p in rcd.Transformer(costs.SHAPES[name]).parameters()) == parameters


def test_formulas_by_hand():
    # A layer: q and o 8 x 24 each, k and v 8 x 12 each, three matrices 8 x 5: 192 + 192 + 96 + 96 + 120
    assert costs.layer_weights(HAND) == 696
    # 7 tokens, 3 layers: 2 x 7 x 3 x 696, q k and p v 2 x (2 x 7 x 11 x 24) x 3, head 2 x 5 x 10 x 8;
    # the residual is as much as the head
    assert costs.forward_flops(HAND, 7, 11, 5) == 29_232 + 22_176 + 800
    assert costs.forward_flops(HAND, 7, 11, 5, residual=True) == 29_232 + 22_176 + 1_600
    # 3 x 696 weights, head 80, logits twice 50, keys and values 2 x 3 x 11 x 12; a residual: 80 + 100 more
    assert costs.step_bytes(HAND, 11, 5) == 2 * (2_088 + 80 + 100 + 792)
    assert costs.step_bytes(HAND, 11, 5, residual=True, itemsize=4) == 4 * (2_088 + 160 + 200 + 792)
    flops, size = 52_208, 6_120
    assert costs.step_seconds(HAND, 7, 11, 5, False, bandwidth=1.0, rate=1e9) == size
    assert costs.step_seconds(HAND, 7, 11, 5, False, bandwidth=1e9, rate=1.0) == flops


def test_bytes_are_those_of_the_tensors(tiny):
    for tied in (False, True):
        model = tiny(block_size=4, tied=tied)
        matrices = sum(p.numel() for p in model.parameters() if p.dim() == 2)
        matrices -= 0 if tied else model.embedding.numel()  # ids only look it up
        cache = rcd.KVCache(model.config, 1, 15, torch.zeros((), dtype=torch.bfloat16))  # and one for padding
        assert costs.step_bytes(model.config, 16, 0) == 2 * matrices + cache.k.nbytes + cache.v.nbytes
    assert costs.step_bytes(tiny().config, 16, 0) == 2 * matrices, "a bidirectional model reads no cache"


@torch.no_grad()
def test_flops_of_a_step_against_torchs_counter(tiny):
    model = tiny(block_size=8)
    canvas = torch.full((1, 24), 11)
    canvas[:, :8] = 1
    steps = rcd.denoise(model, canvas, rcd.Sampler(carry="none", steps=2))
    reads_the_prompt_too = costs.forward_flops(model.config, 16, 16, 8)
    assert counted(lambda: next(steps)) == reads_the_prompt_too
    steps = rcd.denoise(model, canvas, rcd.Sampler(carry="none", steps=4))
    next(steps)
    assert counted(lambda: next(steps)) == costs.forward_flops(model.config, 8, 16, 4)
    logits = model.logits(torch.randn(5, 16))
    with_residual, without = (costs.forward_flops(model.config, 8, 16, 5, residual=r) for r in (True, False))
    assert counted(lambda: rcd.Residual()(logits, model.embedding)) == with_residual - without


def test_a_training_step_is_three_forwards_and_the_gpts_costs_the_same():
    c = costs.gpt_shape(300, 2, 128)
    tokens, one = torch.randint(0, c.mask_id, (3, 16)), torch.ones(3, 1)
    model, gpt = bench.build(c, torch.float32), peers.GPT(c)
    expected = 3 * 3 * costs.forward_flops(c, 16, 16, 16)
    assert counted(lambda: rcd.diffusion_loss(model, tokens, t=one).backward()) == expected
    assert counted(lambda: gpt.loss(tokens).backward()) == expected
    assert all(p.grad.abs().sum() > 0 for p in gpt.parameters())


@torch.no_grad()
def test_the_gpt_sees_nothing_that_comes_later():
    torch.manual_seed(0)
    gpt, tokens = peers.GPT(costs.gpt_shape(50, 2, 64)), torch.randint(0, 50, (1, 12))
    other = tokens.clone()
    other[:, 7] = (other[:, 7] + 1) % 50
    before, after = gpt(tokens), gpt(other)
    assert torch.equal(before[:, :7], after[:, :7]) and not torch.allclose(before[:, 7:], after[:, 7:])


@pytest.mark.parametrize("steps", [1, 3, 8])
def test_recomputing_gives_the_tokens_of_the_cached_sampler(tiny, steps):
    model = tiny(block_size=8)
    canvas = bench.canvas_of(model, 1, 32)
    filled = bench.fill(model, canvas, steps)
    assert torch.equal(filled, peers.fill_recomputing(model, canvas, steps))
    assert len(filled[:, 8:].unique()) > 3


def test_ratios_are_of_pairs_that_ran_in_turn_after_a_round_that_does_not_count():
    order, given = [], {"a": iter([1e6, 2.0, 8.0, 3.0]), "b": iter([1e-6, 1.0, 2.0, 3.0])}

    def probe(name):
        order.append(name)
        return next(given[name])

    times = bench.interleave([lambda: probe("a"), lambda: probe("b")], 3)
    row = bench.compared("x", "a / b", *times, "<= 1.9")
    assert order == list("abababab")
    assert row.ratio == 2.0 and row.quartiles == (1.5, 3.0)  # of 2, 4 and 1
    assert str(row) == "| x | a / b | 2.000 (1.500 to 3.000) | 3,000 / 2,000 ms | <= 1.9, not met |"
    assert str(row._replace(target=">= 1.9")).endswith(">= 1.9, met |")
    assert str(row._replace(target="")).endswith("|  |")


def test_a_peak_is_the_works_own_and_not_its_parents():
    here = np.ones(40_000_000)  # 320 MB
    assert 90e6 <= bench.peak(bench.resident, np.ones, 12_500_000) < 150e6 < here.nbytes


def three_at_most() -> None:
    a = torch.ones(1 << 20)  # 4 MiB
    b = a + 1
    b = b * 2  # the old b is alive while the new one is made
    del a, b
    torch.ones(1 << 20)


def test_tensors_are_counted_while_they_are_alive():
    assert bench.peak(bench.tensors, three_at_most) >> 20 == 12


def test_predictions_by_hand():
    (_, ratio, text), *_ = costs.predictions("H100", 0.5, 1.0, 4.0)
    weights = 28 * (2 * 2048 * 128 * 24 + 3 * 2048 * 6144)  # SDAR-1.7B: 12.6M and 37.7M a layer
    table, logits, cache = 151936 * 2048, 32 * 151936, 2 * 28 * 2048 * 8 * 128
    seqd, rcd_ = weights + table + 2 * logits + cache, weights + 2 * table + 4 * logits + cache
    assert ratio == pytest.approx(rcd_ / seqd)  # far below the ridge: bytes decide
    reached, roofline = 4 / (2 * rcd_ / (0.5 * 3.35e12)), 4 / (2 * rcd_ / 3.35e12)
    assert text.startswith(f"{reached:,.0f} tokens/s (roofline {roofline:,.0f}), 4.3 of 80 GB")
    # LLaDA runs 1,024 tokens at every step: FLOPs decide
    *_, (what, ratio, text) = costs.predictions("H100", 1.0, 0.25, 4.0)
    layers, attention = 2 * 1024 * (8_015_581_184 - 2 * 126464 * 4096), 32 * 1024 * 4 * 1024 * 4096
    flops = layers + attention + 2 * 2 * 32 * 126464 * 4096
    assert "LLaDA-8B" in what and text.startswith(f"{4 / (flops / (0.25 * 989e12)):,.0f} tokens/s")


def test_every_row_is_documented():
    listed = bench.__doc__.split("\n\n")[2].splitlines()
    assert [line.split()[0] for line in listed] == list(bench.ROWS)


def test_rows_run(monkeypatch, capsys, tmp_path):
    def small(vocab: int, layers: int, width: int, block_size: int = 0) -> rcd.Config:
        return costs.gpt_shape(min(vocab, 300), 1, 64, block_size)

    monkeypatch.setattr(bench, "gpt_shape", small)
    monkeypatch.setattr(bench, "matmul_rate", lambda: 1e12)
    monkeypatch.setattr(bench, "bandwidth", lambda: 1e10)
    names = [name for name in bench.ROWS if name != "load"]  # which writes 300 MB
    options = ["--quick", "--repeats=1", f"--only={','.join(names)}", f"--save={tmp_path / 'bench.json'}"]
    monkeypatch.setattr(sys, "argv", ["bench.py", *options])
    bench.main()
    printed = capsys.readouterr().out
    saved = json.loads((tmp_path / "bench.json").read_text())
    in_table = [line.split(" | ")[0][2:] for line in printed.splitlines() if line[:2] == "| "][1:]
    assert in_table == [row["name"] for row in saved["rows"]]
    assert list(dict.fromkeys(in_table)) == names
    assert all(row["ratio"] > 0 for row in saved["rows"])
    assert saved["machine"]["torch"] == torch.__version__
    assert costs.__doc__.strip() in printed
    assert printed.count("PREDICTION, not measured") == len(costs.SHAPES)


@pytest.mark.parametrize("option", ["--only=step,stp", "--gpu=H1000", "--repeats=-1", "--tokens_per_step=0"])
def test_a_mistake_is_one_line(monkeypatch, option):
    monkeypatch.setattr(sys, "argv", ["bench.py", option])
    with pytest.raises(ValueError, match=option[2:].split("=")[0]) as error:
        bench.main()
    assert "\n" not in str(error.value)
