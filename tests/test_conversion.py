"""The paper's conversion from end to end: an SDAR folder with the real Qwen vocabulary, packed chats, both stages, saved, loaded, sampled."""

import itertools
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from test_train import write_packed

import data
import rcd
import sample
import train
import zoo
from rcd import Residual, diffusion_loss, reference_context
from zoo import budget, files, tokenizer
from zoo.templates import encode_answers, encode_chat

REAL = Path(__file__).resolve().parents[2] / "shared/data/hub/JetLM--SDAR-4B-Chat"
VOCABULARY = ("vocab.json", "merges.txt", "added_tokens.json", "tokenizer_config.json")
MASK, END = 151669, 151643
LENGTH = 80

# ---------------------------------------------------------------------------------------------------------------------------------------
# A packed row by hand. Two documents of 7 and 6 tokens and three of padding; p = prompt, a = answer, blocks of 4 from each document's start.
#
ROLE = "pppaaaappaaaa..."
DOCUMENT = "1111111222222000"
POSITION = [0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 3, 4, 5, 0, 1, 2]
SEEN = {  # all answers masked: the tokens whose value can change the prediction at a cell
    3: "###.............",  # its block, 0 to 3, where the prompt is given
    4: "####............",  # the clean block before it, answer included
    5: "####............",
    6: "####............",
    9: ".......##.......",  # the second document starts anew
    10: ".......##.......",
    11: ".......####.....",
    12: ".......####.....",
}  # fmt: skip


@pytest.mark.parametrize("carry", [False, True])
def test_sixteen_cells_by_hand(tiny, carry):
    reference = tiny(seed=2, block_size=4)
    tokens = torch.randint(11, (1, 16), generator=torch.Generator().manual_seed(0))
    segments, response = torch.tensor([[int(d) for d in DOCUMENT]]), torch.tensor([[r == "a" for r in ROLE]])
    assert rcd.document_positions(tokens, segments)[0].tolist() == POSITION

    def predictions(tokens):
        noised = []
        own = reference_context(reference, Residual()) if carry else None

        def context(m, n):
            noised.append(n)
            return own(m, n) if own else (torch.zeros(len(n.where[0])), torch.zeros(len(n.where[0]), 16))

        rows = []
        m = tiny(seed=1, block_size=4)
        m.logits = lambda h: (rows.append(h), rcd.Transformer.logits(m, h))[1]
        diffusion_loss(m, tokens, response, segments, t=torch.ones(1, 1), context=context)
        n = noised[0]
        assert torch.equal(n.x, tokens.masked_fill(response, 11)) and n.where[1].tolist() == [*SEEN]
        return rows[0]

    with torch.no_grad():
        before, changed = predictions(tokens), {i: "" for i in SEEN}
        for j in range(16):
            other = tokens.clone()
            other[0, j] = (other[0, j] + 1) % 11
            moved = (predictions(other) - before).abs().amax(1) > 1e-6  # (8,)
            for i, m in zip(SEEN, moved.tolist()):
                changed[i] += ".#"[m]
    assert changed == SEEN


# ---------------------------------------------------------------------------------------------------------------------------------------
# From end to end


@pytest.mark.parametrize("model_type", ["sdar", "qwen3"])  # the second has no mask token yet: its tokenizer says which row is free
def test_the_shape_is_known_before_the_weights_are_read(tmp_path, tiny, model_type):
    letters, specials = tokenizer.bytes_tokenizer(["<eos>", "<mask>"] if model_type == "sdar" else ["<eos>"]), {"sdar": {"mask_token_id": 257}}
    model = tiny(vocab_size=264, mask_id=257, tied=False).bfloat16()
    save_file({n if n.startswith("lm_head") else f"model.{n}": t for n, t in model.state_dict().items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({
        "model_type": model_type, "vocab_size": 264, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 6, "intermediate_size": 20, "max_position_embeddings": 64, "rope_theta": 1e4, "hidden_act": "silu",
        "rms_norm_eps": 1e-6, "tie_word_embeddings": False, **specials.get(model_type, {})}))  # fmt: skip
    letters.save(tmp_path)
    shape, stored = budget.shape_of(tmp_path, letters)
    assert all(p.is_meta for p in shape.parameters()) and {n: p.shape for n, p in shape.named_parameters()} == {
        n: p.shape for n, p in model.named_parameters()
    }
    assert stored == 2 * sum(p.numel() for p in model.parameters()) and shape.config == zoo.load(tmp_path).model.config


def test_data_in_other_tokens_are_one_line(tmp_path, tiny, monkeypatch):
    letters = tokenizer.bytes_tokenizer(["<eos>", "<mask>"])
    texts = {split: [([97, 98, 99], [False, True, True])] for split in data.SPLITS}
    write_packed(tmp_path / "data", letters, 257, 256, texts, 8)
    files.save(tiny(vocab_size=258, mask_id=257), tmp_path / "model")
    tokenizer.bytes_tokenizer(["<mask>", "<eos>"]).save(tmp_path / "model")
    monkeypatch.setattr(sys, "argv", ["train.py", f"--data={tmp_path / 'data'}", f"--init_from={tmp_path / 'model'}", "--device=cpu"])
    with pytest.raises(ValueError, match="data set gsm8k is not in the tokens of .*: prepare it again with --tokenizer="):
        train.main()


def folder_of(path: Path, seed: int, width: int) -> Path:
    """A tiny random SDAR in the hub's layout, in bfloat16, with the real vocabulary."""
    sizes = dict(vocab_size=151936, mask_id=MASK, n_layer=2, n_head=2, n_kv_head=1, head_dim=8, d_model=width, d_ff=24, tied=False)
    model = rcd.Transformer(rcd.Config(**sizes)).init_weights(torch.Generator().manual_seed(seed)).bfloat16()
    path.mkdir(parents=True)
    save_file({n if n.startswith("lm_head") else f"model.{n}": t for n, t in model.state_dict().items()}, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps({
        "model_type": "sdar", "vocab_size": 151936, "hidden_size": width, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 8, "intermediate_size": 24, "max_position_embeddings": 256, "rope_theta": 1e6, "hidden_act": "silu",
        "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "torch_dtype": "bfloat16"}))  # fmt: skip
    for name in VOCABULARY:
        shutil.copyfile(REAL / name, path / name)
    return path


CHATS = [
    [("user", f"What is {a} plus {b}?"), ("assistant", f"{a} + {b} = {a + b}\n#### {a + b}")]
    for a, b in itertools.islice(itertools.product(range(2, 40, 3), range(5, 90, 7)), 24)
] + [[("system", "Be brief."), ("user", "Hi."), ("assistant", "Hello!"), ("user", "Bye."), ("assistant", "Goodbye!")]]


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """Everything once: folders, data, `train.py --recipe=paper`. Yields the working folder, the data set and what the context saw."""
    if not REAL.is_dir():
        pytest.skip("the real vocabulary is not here")
    patch, place = pytest.MonkeyPatch(), tmp_path_factory.mktemp("conversion")
    known, read, seen = {}, tokenizer.load, []

    def load(folder):  # equal files give an equal tokenizer, and reading the real one takes seconds
        files = tuple((Path(folder) / n).read_bytes() if (Path(folder) / n).is_file() else None for n in VOCABULARY)
        return known.get(files) or known.setdefault(files, read(folder))

    patch.setattr(tokenizer, "load", load)
    patch.chdir(place)
    # Blocks of 4 are SDAR's own. A smaller, other-seeded reference: small-to-large.
    model, small = folder_of(place / "SDAR-tiny-Chat", 1, 24), folder_of(place / "SDAR-tinier-Chat", 2, 16)
    qwen = tokenizer.load(model)
    texts = [encode_answers(qwen, "qwen3", [{"role": r, "content": c} for r, c in chat], thinking=False) for chat in CHATS]
    write_packed(place / "chats", qwen, MASK, END, {"train": texts, "val": texts[-6:], "test": texts[:4]}, LENGTH)

    def spying(reference, residual):
        inner = reference_context(reference, residual)
        return lambda m, n: (seen.append(n), inner(m, n))[1]

    validate = train.validate
    patch.setattr(train, "reference_context", spying)
    patch.setattr(train, "validate", lambda *given: validate(*given[:5], 1 << 14, given[6]))  # four canvases, not 256
    patch.setattr(sys, "argv", [
        "train.py", f"--data={place / 'chats'}", f"--init_from={model}", f"--reference={small}", "--recipe=paper", "--name=chats", "--steps=3",
        "--batch_size=3", "--accumulate=2", "--remat", "--ema=0.5", "--lr=1e-3", "--schedule=constant", "--warmup=0.03", "--device=cpu",
    ])  # fmt: skip
    train.main()
    yield place, data.load(place / "chats"), seen
    patch.undo()


def test_the_data_are_chats_with_answers_marked(converted):
    _, dataset, _ = converted
    tokens, response, segments = dataset.tokens("train")[0], dataset.response("train")[0], dataset.segments("train")[0]
    first = dataset.tokenizer.decode(tokens[segments == 1].tolist())
    prompt = encode_chat(dataset.tokenizer, "qwen3", [{"role": "user", "content": "What is 2 plus 5?"}], thinking=False)
    assert first.startswith("<|im_start|>user\nWhat is 2 plus 5?<|im_end|>\n<|im_start|>assistant\n") and tokens[: len(prompt)].tolist() == prompt
    answers = dataset.tokenizer.decode(tokens[(segments == 1) & response].tolist())
    assert answers == "2 + 5 = 7\n#### 7<|im_end|>" and segments.max() >= 2 and not response[segments == 0].any()


def test_prompts_are_never_masked_and_every_document_has_its_own_t(converted):
    _, dataset, seen = converted
    assert {len(n.tokens) for n in seen[:6]} == {2, 1}  # three steps of a batch of three in two parts
    several = 0
    for n in seen:
        assert torch.equal(n.x[~n.response], n.tokens[~n.response]) and torch.equal(n.x[n.response] == MASK, (n.noise < n.t)[n.response])
        assert bool(n.response[n.where].all()) and not bool(n.response[n.segments == 0].any()) and bool((n.x[n.where] == MASK).all())
        levels = [{t.item() for t in n.t[b][n.segments[b] == k]} for b in range(len(n.t)) for k in n.segments[b].unique()]
        assert all(len(t) == 1 for t in levels)
        assert len(set.union(*levels)) == len(levels)  # different ones
        several += len(levels) > len(n.t)
    assert several


def test_what_is_saved_is_loaded_again(converted):
    place, dataset, _ = converted
    for stage in ("reference", "target"):
        loaded, original = zoo.load(f"chats/{stage}"), zoo.load(place / "SDAR-tiny-Chat", dtype=torch.float32)
        assert loaded.template == "qwen3" and loaded.defaults["carry"] == ("residual" if stage == "target" else "none")
        assert loaded.model.config == original.model.config and loaded.model.config.block_size == 4 and loaded.meta["stage"] == stage
        assert loaded.tokenizer.fingerprint == dataset.tokenizer.fingerprint
        pairs = list(zip(loaded.model.parameters(), original.model.parameters()))
        assert not any(torch.equal(a, b) for a, b in pairs) and all(bool(a.isfinite().all()) for a, _ in pairs)
        assert max((a - b).abs().max().item() for a, b in pairs) < 3.1e-3  # three AdamW steps of 1e-3, half-averaged
        values = json.loads((place / "out/chats" / stage / "config.json").read_text())
        assert values["model_type"] == "sdar" and values["torch_dtype"] == "float32"
        log = [json.loads(line) for line in (place / "out/chats" / stage / "log.jsonl").read_text().splitlines()]
        assert len(log) == 3 and log[-1]["val_loss"] > 0 and 0 < log[-1]["mfu"]


@pytest.mark.parametrize("stage", ["reference", "target"])
def test_documents_do_not_see_each_other(converted, stage):
    place, dataset, _ = converted
    model, reference = zoo.load(f"chats/{stage}").model, zoo.load(place / "SDAR-tinier-Chat").model
    context = reference_context(reference, Residual()) if stage == "target" else None
    tokens, response, segments = (x[:1] for x in train.batches(dataset, "train", LENGTH)(1, torch.Generator().manual_seed(0)))
    assert int(segments.max()) >= 2

    def loss(tokens, number):
        part = response & (segments == number)
        with torch.no_grad():
            return diffusion_loss(model, tokens, part, segments, t=torch.ones(1, 1), context=context).item()

    for changed, watched in ((1, 2), (2, 1), (1, 1)):
        other = tokens.clone()
        other[(segments == changed) & ~response] = 100  # another prompt
        if changed == watched:
            assert loss(other, watched) != loss(tokens, watched)
        else:
            assert loss(other, watched) == loss(tokens, watched)


def test_the_conversion_samples(converted, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["sample.py", "--model=chats/target", "--prompt=What is 2 plus 5?", "--max_new=8", "--device=cpu", "--plain"])
    sample.main()
    told = re.search(r"(\d+) tokens, (\d+) NFE", capsys.readouterr().err)  # stdout is the text alone
    assert told and 8 <= int(told[1]) < 8 + 4 and 1 <= int(told[2]) <= int(told[1])  # whole blocks of 4
