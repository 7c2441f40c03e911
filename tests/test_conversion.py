"""The paper's conversion from end to end: an SDAR folder with the real Qwen vocabulary and packed chats.

Both stages are trained, saved, loaded and sampled.
"""

import itertools
import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from real_files import SDAR, qwen
from safetensors.torch import save_file

import data
import rcd
import sample
import train
import zoo
from data.common import Packer, write_dataset
from rcd import Residual, diffusion_loss, reference_context
from zoo import files, tokenizer
from zoo.recipes import document_positions, init_weights
from zoo.templates import encode_answers, encode_chat
from zoo.tools import budget
from zoo.tools.training import batches

VOCABULARY = ("vocab.json", "merges.txt", "added_tokens.json", "tokenizer_config.json")
MASK, END = 151669, 151643
LENGTH = 80

# ---- A packed row by hand: two documents of 7 and 6 tokens and three of padding, blocks of 4

ROLE = "pppaaaappaaaa..."  # p = prompt, a = answer
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
}


@pytest.mark.parametrize("carry", [False, True])
def test_sixteen_cells_by_hand(tiny, carry):
    reference = tiny(seed=2, block_size=4)
    tokens = torch.randint(11, (1, 16), generator=torch.Generator().manual_seed(0))
    response = torch.tensor([[r == "a" for r in ROLE]])
    positions = document_positions(torch.tensor([[int(d) for d in DOCUMENT]]))
    assert positions[0].tolist() == POSITION

    def predictions(tokens):
        noised, hidden = [], []
        own = reference_context(reference, Residual()) if carry else None

        def context(m, n):
            noised.append(n)
            N = len(n.cells[0])
            return own(m, n) if own else (torch.zeros(N), torch.zeros(N, 16))

        m = tiny(seed=1, block_size=4)
        m.logits = lambda h: (hidden.append(h), rcd.Transformer.logits(m, h))[1]
        diffusion_loss(m, tokens, response, positions, t=torch.ones(1, 1), context=context)
        (n,) = noised
        assert len(hidden) == 1
        assert torch.equal(n.x, tokens.masked_fill(response, 11)) and n.cells[1].tolist() == [*SEEN]
        return hidden[0]  # (8, D)

    with torch.no_grad():
        before, changed = predictions(tokens), {i: "" for i in SEEN}
        for j in range(16):
            other = tokens.clone()
            other[0, j] = (other[0, j] + 1) % 11
            moved = (predictions(other) - before).abs().amax(1) > 1e-6  # (8,)
            for i, m in zip(SEEN, moved.tolist()):
                changed[i] += ".#"[m]
    assert changed == SEEN


# ---- Before the training


def write_packed(folder: Path, tokens: tokenizer.Tokenizer, mask_id: int, end_id: int, texts: dict,
                 length: int) -> None:  # fmt: skip
    """A data set of packed rows. texts: split -> documents (ids, whether each is an answer's)."""
    splits = {}
    for split, documents in texts.items():
        rows = []
        packer = Packer(length, 1, end_id, lambda *row, rows=rows: rows.append(row))
        for ids, response in documents:
            packer.add(ids, response)
        packer.close()
        splits[split] = tuple(map(np.array, zip(*rows)))
    facts = {"template": None, "packed": list(texts), "block": 1}
    write_dataset(folder, "gsm8k", tokens, splits, mask_id=mask_id, eos_id=end_id, source="this test",
                  licence="none", argv=[], facts=facts)  # fmt: skip


def write_folder(folder: Path, model: rcd.Transformer, **values) -> Path:
    """The model in the hub's layout, without its tokenizer."""
    c, tensors = model.config, model.state_dict().items()
    tensors = {n if n.startswith("lm_head") else f"model.{n}": t for n, t in tensors}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({
        "vocab_size": c.vocab_size, "hidden_size": c.d_model, "num_hidden_layers": c.n_layer,
        "num_attention_heads": c.n_head, "num_key_value_heads": c.n_kv_head, "head_dim": c.head_dim,
        "intermediate_size": c.d_ff, "max_position_embeddings": c.max_len, "rope_theta": c.rope_theta,
        "rms_norm_eps": c.norm_eps, "hidden_act": "silu", "tie_word_embeddings": c.tied, **values,
    }))  # fmt: skip
    return folder


@pytest.mark.parametrize("model_type", ["sdar", "qwen3"])
def test_the_shape_is_known_before_the_weights_are_read(tmp_path, tiny, model_type):
    """qwen3 has no mask token yet: the tokenizer says which row is free."""
    there = model_type == "sdar"
    model = tiny(vocab_size=264, mask_id=257, tied=False).bfloat16()
    write_folder(tmp_path, model, model_type=model_type, **({"mask_token_id": 257} if there else {}))
    letters = tokenizer.bytes_tokenizer(["<eos>", "<mask>"] if there else ["<eos>"])
    letters.save(tmp_path)
    shape, stored = budget.shape_of(tmp_path, letters)
    assert all(p.is_meta for p in shape.parameters())
    shapes = [{n: p.shape for n, p in m.named_parameters()} for m in (shape, model)]
    assert shapes[0] == shapes[1] and stored == 2 * sum(p.numel() for p in model.parameters())
    assert shape.config == zoo.load(tmp_path).model.config


def test_data_in_other_tokens_are_one_line(tmp_path, tiny, monkeypatch):
    letters = tokenizer.bytes_tokenizer(["<eos>", "<mask>"])
    texts = {split: [([97, 98, 99], [False, True, True])] for split in data.SPLITS}
    write_packed(tmp_path / "data", letters, 257, 256, texts, 8)
    files.save(tiny(vocab_size=258, mask_id=257), tmp_path / "model")
    tokenizer.bytes_tokenizer(["<mask>", "<eos>"]).save(tmp_path / "model")
    argv = [f"--data={tmp_path / 'data'}", f"--init_from={tmp_path / 'model'}", "--device=cpu"]
    monkeypatch.setattr(sys, "argv", ["train.py", *argv])
    says = "data set gsm8k is not in the tokens of .*: prepare it again with --tokenizer="
    with pytest.raises(ValueError, match=says):
        train.main()


# ---- From end to end

CHATS = [
    [("user", f"What is {a} plus {b}?"), ("assistant", f"{a} + {b} = {a + b}\n#### {a + b}")]
    for a, b in itertools.islice(itertools.product(range(2, 40, 3), range(5, 90, 7)), 24)
] + [[("system", "Be brief."), ("user", "Hi."), ("assistant", "Hello!"), ("user", "Bye."),
      ("assistant", "Goodbye!")]]  # fmt: skip


def qwen_folder(folder: Path, seed: int, width: int) -> Path:
    """A tiny random SDAR in bfloat16, with the real vocabulary."""
    config = rcd.Config(vocab_size=151936, mask_id=MASK, n_layer=2, n_head=2, n_kv_head=1, head_dim=8,
                        d_model=width, d_ff=24, tied=False, rope_theta=1e6)  # fmt: skip
    model = init_weights(rcd.Transformer(config), torch.Generator().manual_seed(seed)).bfloat16()
    write_folder(folder, model, model_type="sdar", torch_dtype="bfloat16")
    for name in VOCABULARY:
        shutil.copyfile(SDAR / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """Everything once: folders, data, `train.py --recipe=paper`.

    Yields the working folder, the data set, and the batches that the context of stage 2 saw.
    """
    patch, place = pytest.MonkeyPatch(), tmp_path_factory.mktemp("conversion")
    read, seen, (real, _) = tokenizer.load, [], qwen()

    def contents(folder):
        paths = [Path(folder) / name for name in VOCABULARY]
        return [path.read_bytes() if path.is_file() else None for path in paths]

    def load(folder):  # equal files give an equal tokenizer, and reading the real one takes seconds
        return real if contents(folder) == contents(SDAR) else read(folder)

    patch.setattr(tokenizer, "load", load)
    patch.chdir(place)
    model = qwen_folder(place / "SDAR-tiny-Chat", 1, 24)  # in blocks of 4
    small = qwen_folder(place / "SDAR-tinier-Chat", 2, 16)  # the reference, smaller than the target
    talks = [[{"role": role, "content": content} for role, content in chat] for chat in CHATS]
    texts = [encode_answers(real, "qwen3", talk, thinking=False) for talk in talks]
    splits = {"train": texts, "val": texts[-6:], "test": texts[:4]}
    write_packed(place / "chats", real, MASK, END, splits, LENGTH)

    def spying(reference, residual):
        inner = reference_context(reference, residual)
        return lambda m, n: (seen.append(n), inner(m, n))[1]

    def brief(model, draw, context, device, dtype, length, rows):  # four canvases, not 256
        return validate(model, draw, context, device, dtype, 1 << 14, rows)

    validate = train.validate
    patch.setattr(train, "reference_context", spying)
    patch.setattr(train, "validate", brief)
    patch.setattr(sys, "argv", [
        "train.py", f"--data={place / 'chats'}", f"--init_from={model}", f"--reference={small}",
        "--recipe=paper", "--name=chats", "--steps=3", "--batch_size=3", "--accumulate=2", "--remat",
        "--ema=0.5", "--lr=1e-3", "--schedule=constant", "--warmup=0.03", "--device=cpu",
    ])  # fmt: skip
    train.main()
    yield place, data.load(place / "chats"), seen
    patch.undo()


def test_the_data_are_chats_with_answers_marked(converted):
    _, dataset, _ = converted
    rows = (dataset.tokens("train"), dataset.response("train"), dataset.segments("train"))
    assert not rows[1][rows[2] == 0].any()
    tokens, response, segments = (x[0] for x in rows)
    first = tokens[segments == 1].tolist()
    question = [{"role": "user", "content": "What is 2 plus 5?"}]
    prompt = encode_chat(dataset.tokenizer, "qwen3", question, thinking=False)
    start = "<|im_start|>user\nWhat is 2 plus 5?<|im_end|>\n<|im_start|>assistant\n"
    assert dataset.tokenizer.decode(first).startswith(start) and first[: len(prompt)] == prompt
    answers = dataset.tokenizer.decode(tokens[(segments == 1) & response].tolist())
    assert answers == "2 + 5 = 7\n#### 7<|im_end|>" and segments.max() >= 2


def test_prompts_are_never_masked_and_every_document_has_its_own_t(converted):
    _, _, seen = converted
    assert {len(n.tokens) for n in seen[:6]} == {2, 1}  # three steps of a batch of three in two pieces
    several = 0
    for n in seen:
        assert torch.equal(n.x[~n.response], n.tokens[~n.response])
        assert torch.equal(n.x[n.response] == MASK, (n.noise < n.t)[n.response])
        assert bool(n.response[n.cells].all()) and bool((n.x[n.cells] == MASK).all())
        documents = (n.positions == 0).cumsum(1)  # (B, T); the last one of a row may be its padding
        levels = [set(n.t[row][documents[row] == k].tolist())
                  for row in range(len(n.t)) for k in documents[row].unique()]  # fmt: skip
        assert all(len(t) == 1 for t in levels)
        assert len(set.union(*levels)) == len(levels)  # different ones
        answered = [int(documents[row][n.response[row]].unique().numel()) for row in range(len(n.t))]
        several += max(answered) > 1
    assert several


def test_what_is_saved_is_loaded_again(converted):
    place, dataset, _ = converted
    original = zoo.load(place / "SDAR-tiny-Chat", dtype=torch.float32)
    for stage in ("reference", "target"):
        loaded = zoo.load(f"chats/{stage}")
        assert loaded.template == "qwen3" and loaded.meta["stage"] == stage
        assert loaded.defaults["carry"] == ("residual" if stage == "target" else "none")
        assert loaded.model.config == original.model.config and loaded.model.config.block_size == 4
        assert loaded.tokenizer.fingerprint == dataset.tokenizer.fingerprint
        pairs = list(zip(loaded.model.parameters(), original.model.parameters()))
        assert not any(torch.equal(a, b) for a, b in pairs)
        assert all(bool(a.isfinite().all()) for a, _ in pairs)
        # Three AdamW steps of 1e-3, half-averaged.
        assert max((a - b).abs().max().item() for a, b in pairs) < 3.1e-3
        folder = place / "out/chats" / stage
        values = json.loads((folder / "config.json").read_text())
        assert values["model_type"] == "sdar" and values["torch_dtype"] == "float32"
        log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        assert len(log) == 3 and log[-1]["val_loss"] > 0 and 0 < log[-1]["mfu"]


@pytest.mark.parametrize("stage", ["reference", "target"])
def test_documents_do_not_see_each_other(converted, stage):
    place, dataset, _ = converted
    model, reference = zoo.load(f"chats/{stage}").model, zoo.load(place / "SDAR-tinier-Chat").model
    context = reference_context(reference, Residual()) if stage == "target" else None
    batch = batches(dataset, "train", LENGTH)(1, torch.Generator().manual_seed(0))
    tokens, response, positions = batch
    documents = (positions == 0).cumsum(1)
    assert response[documents == 1].any() and response[documents == 2].any()

    @torch.no_grad()
    def loss(tokens, number):
        watched = response & (documents == number)
        t = torch.ones(1, 1)
        return diffusion_loss(model, tokens, watched, positions, t=t, context=context).item()

    for changed, watched in ((1, 2), (2, 1), (1, 1)):
        other = tokens.clone()
        other[(documents == changed) & ~response] = 100  # another prompt
        equal = loss(other, watched) == loss(tokens, watched)
        assert equal == (changed != watched)


def test_the_conversion_samples(converted, monkeypatch, capsys):
    options = ["--prompt=What is 2 plus 5?", "--max_new=8", "--device=cpu", "--plain"]
    monkeypatch.setattr(sys, "argv", ["sample.py", "--model=chats/target", *options])
    sample.main()
    told = re.search(r"(\d+) tokens, (\d+) NFE", capsys.readouterr().err)  # stdout is only the text
    assert told and 8 <= int(told[1]) < 8 + 4 and 1 <= int(told[2]) <= int(told[1])  # whole blocks of 4
