"""LoRA: a change of low rank, and nothing else."""

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_train import puzzles, run, run_in_full, stopped  # noqa: F401 (fixtures)

from rcd import Config, Transformer, diffusion_loss
from zoo import lora
from zoo.tools import budget

INPUTS = torch.arange(8)[None]


@pytest.mark.parametrize("bias", [False, True])
def test_at_first_nothing_has_changed_and_merged_it_is_the_same_model(tiny, bias):
    model = tiny(qkv_bias=bias)
    plain = copy.deepcopy(model)
    lora.adapt(model, 2, seed=1)
    read = lambda m: m(m.embed_tokens(INPUTS), INPUTS)  # noqa: E731
    assert torch.equal(read(model), read(plain))
    for p in model.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.3, generator=torch.Generator().manual_seed(2))
    adapted = read(model)
    assert not torch.allclose(adapted, read(plain), atol=1e-2)
    merged = lora.merge(model)
    torch.testing.assert_close(read(merged), adapted, atol=1e-5, rtol=1e-5)
    assert merged.state_dict().keys() == plain.state_dict().keys()
    assert type(merged.layers[0].mlp.up_proj) is torch.nn.Linear


def test_so_many_numbers_are_trained_and_every_one_has_a_gradient(tiny):
    model = lora.adapt(tiny(), 3, seed=1)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == lora.parameters(tiny(), 3)
    for p in trained:
        torch.nn.init.normal_(p, std=0.3)
    diffusion_loss(model, INPUTS, t=torch.ones(1, 1)).backward()
    assert all(bool(p.grad.any()) for p in trained) and model.embedding.grad is None


def test_a_run_changes_linear_maps_by_that_rank(run, monkeypatch):  # noqa: F811
    """And resumes to the same bits."""
    run("--name=x", "--stage=base")
    options = ["--stage=reference", "--init_from=out/x/base", "--lora=2", "--ema=0.5", "--lr=0.01"]
    run("--name=y", *options)
    with_signal = ["--name=z", *options]
    stopped(run, monkeypatch, 2, 2, *with_signal)
    run("--resume", *with_signal)
    base, whole, cut = (load_file(Path(f"out/{n}/model.safetensors"))
                        for n in ("x/base", "y/reference", "z/reference"))  # fmt: skip
    assert base.keys() == whole.keys()
    for name, before in base.items():
        assert torch.equal(whole[name], cut[name])
        change = whole[name] - before
        if name.endswith("_proj.weight"):
            values = torch.linalg.svdvals(change)
            assert values[1] > 1e-6 and (values[2:] < 1e-6).all()
        else:
            assert not change.any()


def test_memory_of_adapters_by_hand(monkeypatch):
    monkeypatch.setattr(budget, "kept_by_layer", lambda *_: 1000)
    with torch.device("meta"):
        model = Transformer(Config(n_layer=2))
    need = budget.memory(model, 3, False, length=5, batch_size=3, device=torch.device("cpu"),
                         dtype=torch.bfloat16, adapters=100)  # fmt: skip
    parameters = sum(p.numel() for p in model.parameters())
    assert (need["weights"], need["AdamW"]) == (2 * parameters + 4 * 100, 8 * 100)
    assert need["logits"] == 12 * 15 * 64 and need["bfloat16 copies"] == need["gradients"] == 0


def test_memory_of_shards_by_hand(monkeypatch):
    """Each of four processes: a quarter of the weights, and what it gathers."""
    monkeypatch.setattr(budget, "kept_by_layer", lambda *_: 0)
    with torch.device("meta"):
        model = Transformer(Config(n_layer=2, qk_norm=False))
    usual = dict(length=5, batch_size=3, device=torch.device("cpu"), dtype=torch.bfloat16, shards=4)
    need = budget.memory(model, 3, False, **usual, reference=80, ema=True)
    layer = 4 * 128 * 128 + 3 * 128 * 344 + 2 * 128
    rest = 64 * 128 + 128
    quarter = (2 * layer + rest) // 4
    assert (need["weights"], need["AdamW"], need["average"]) == (4 * quarter, 8 * quarter, 4 * quarter)
    assert need["reference"] == 20 and need["gathered"] == 2 * (2 * layer + rest) + 4 * (layer + rest)
    half = budget.memory(model, 3, False, **usual, moments=torch.bfloat16)
    assert half["AdamW"] == 4 * quarter and half["weights"] == 4 * quarter
    away = budget.memory(model, 3, False, **usual, reference=80, ema=True, offload=True)
    assert away["gathered"] == need["gathered"] + 4 * quarter and away["reference"] == 20
    assert not (away["weights"] or away["AdamW"] or away["average"] or away["gradients"])
