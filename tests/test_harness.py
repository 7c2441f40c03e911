"""zoo/tools/harness.py: the bound against an enumeration, and the model in the real lm-evaluation-harness."""

import functools
import itertools
import json
import math
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_model

import rcd
from zoo import files, recipes
from zoo.decoding import Carry, Decoding
from zoo.rivals import carries
from zoo.templates import encode_chat
from zoo.tokenizer import bytes_tokenizer
from zoo.tools import command, harness
from zoo.tools.evaluate import Setting

BYTES = bytes_tokenizer(["<eos>", "<mask>"])
KINDS = {"bidirectional": {}, "blocks": {"block_size": 4}, "shifted": {"logit_shift": True}}


@torch.no_grad()
def expected_bound(model: rcd.Transformer, tokens: list[int], given: int) -> float:
    """The bound by its definition, over every set of masked tokens: the sum over k of the mean of S_k / k."""
    total, where = 0.0, range(given, len(tokens))
    for k in range(1, len(where) + 1):
        sums = []
        for masked in itertools.combinations(where, k):
            x = torch.tensor([[model.config.mask_id if i in masked else v for i, v in enumerate(tokens)]])
            hidden = rcd.denoiser_hidden(model, model.embed_tokens(x), torch.tensor([tokens]))
            shift = int(model.config.logit_shift)
            z = model.logits(hidden[0]).log_softmax(-1)
            sums.append(-sum(z[i - shift, tokens[i]].item() for i in masked))
        total += sum(sums) / len(sums) / k
    return total


def bound(model, tokens, given, draws, context=None, batch=64, seed=0) -> float:
    response = torch.arange(len(tokens)) >= given
    rest = batch, torch.float32, context, torch.Generator().manual_seed(seed)
    return harness.bound(model, torch.tensor(tokens), response, draws, *rest)


@pytest.mark.parametrize("kind", KINDS)
def test_the_bound_is_the_one_over_all_maskings(kind):
    model, tokens, given = tiny_model(**KINDS[kind]), [3, 1, 4, 1, 5, 9, 2], 3
    expected = expected_bound(model, tokens, given)
    assert bound(model, tokens, given, 2000) == pytest.approx(expected, rel=0.03)
    few = [bound(model, tokens, given, 40, seed=seed) for seed in range(20)]
    assert sum(few) / 20 == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("draws, batch", [(1, 1), (5, 2), (128, 16)])
def test_a_single_token_and_a_model_that_knows_nothing_are_exact(draws, batch):
    model, tokens = tiny_model(), [3, 1, 4, 1, 5]
    expected = expected_bound(model, tokens, 4)
    assert bound(model, tokens, 4, draws, batch=batch) == pytest.approx(expected, rel=1e-5)
    with torch.no_grad():
        model.embedding.zero_()
    assert bound(model, tokens, 1, draws, batch=batch) == pytest.approx(4 * math.log(11), rel=1e-5)


def test_the_bound_of_a_target_reads_its_residual():
    """With alpha = 0 it is the plain one to the bit, with the model's own alpha another."""
    model, tokens = tiny_model(), [3, 1, 4, 1, 5, 9, 2]
    plain = bound(model, tokens, 2, 50)
    nothing, own = (recipes.earlier_context(rcd.Residual(*w)) for w in (("fixed", 0.0), ()))
    assert bound(model, tokens, 2, 50, nothing) == plain
    assert bound(model, tokens, 2, 50, own) != pytest.approx(plain, rel=1e-3)


@pytest.mark.parametrize("name", ["loopholing", "none"])
def test_a_likelihood_reads_the_models_own_carry(name, monkeypatch):
    model, seen = carries.attach(tiny_model(), name, 0), []
    monkeypatch.setattr(harness, "bound", lambda *given: seen.append(given[-2]) or 0.0)
    o, setting = harness.Options(pretrained="x"), Setting("", model, None, Decoding(), Carry())
    asked = SimpleNamespace(setting=setting, device="cpu", dtype=torch.float32, o=o)
    harness.Harness.bound(asked, [1, 2], [3, 4])
    assert (seen[0] is carries.own_context) == (name == "loopholing") and seen[0] is not None


def test_without_the_package_it_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(harness, "LM", object)
    with pytest.raises(SystemExit) as end:
        command.run(harness.main)
    assert end.value.code == 2 and "pip install -e" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------
# In the real package: pip install -e ".[eval]"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A block-causal target in bytes."""
    folder = tmp_path_factory.mktemp("harness") / "target"
    ends = dict(eos_ids=(256,), pad_id=256)
    files.save(tiny_model(4, vocab_size=258, mask_id=257, block_size=8, max_len=96, **ends), folder)
    BYTES.save(folder)
    sampler = {"rule": "threshold", "threshold": 0.5}
    (folder / "train.json").write_text(json.dumps({"stage": "target", "sampler": sampler}))
    return folder


@pytest.fixture
def tasks(tmp_path, monkeypatch):
    """Three local tasks: written answers, a choice, and a text. Nothing is downloaded."""
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = [{"question": f"{a}+{a}=", "answer": str(2 * a), "wrong": str(3 * a)} for a in range(1, 6)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = f"""
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path}/rows.jsonl}}}}
test_split: test
doc_to_text: "{{{{question}}}}"
"""
    (tmp_path / "write.yaml").write_text("task: tiny_write\noutput_type: generate_until\n" + common + """
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["\\n", "e"], max_gen_toks: 12, do_sample: false, temperature: 0.0}
metric_list: [{metric: exact_match}]
""")
    (tmp_path / "choose.yaml").write_text("task: tiny_choose\noutput_type: multiple_choice\n" + common + """
doc_to_target: 0
doc_to_choice: "{{[answer, wrong]}}"
metric_list: [{metric: acc}]
""")
    (tmp_path / "text.yaml").write_text("task: tiny_text\noutput_type: loglikelihood_rolling\n" + common + """
doc_to_target: "{{question}}"
metric_list: [{metric: bits_per_byte}]
""")
    return tmp_path, rows


def evaluated(tasks, folder, *names: str, **model_args) -> dict:
    import lm_eval
    from lm_eval.api.registry import model_registry
    from lm_eval.tasks import TaskManager

    if "rcd" not in model_registry:
        model_registry.register("rcd", target="zoo.tools.harness:Harness")
    args = {"pretrained": str(folder), "device": "cpu", "dtype": "float32", "draws": 64, **model_args}
    manager = TaskManager(include_path=str(tasks[0]), include_defaults=False)
    return lm_eval.simple_evaluate(model="rcd", model_args=args, tasks=list(names), task_manager=manager,
                                   batch_size=64, bootstrap_iters=0)  # fmt: skip


def answers(result: dict, task: str) -> list:
    """The model's raw answers, in the order of the documents."""
    return [s["resps"] for s in sorted(result["samples"][task], key=lambda s: s["doc_id"])]


def test_lm_eval_gets_what_generate_writes(tasks, folder):
    result = evaluated(tasks, folder, "tiny_write")
    model = files.load(folder)
    expected = []
    for row in tasks[1]:
        sampler = rcd.Sampler(rule="threshold", threshold=0.5)
        ids, _ = rcd.generate(model, [list(row["question"].encode())], 12, sampler)
        expected.append(re.split("[\ne]", bytes(ids[0]).decode("utf-8", "replace"))[0])
    assert [a[0][0] for a in answers(result, "tiny_write")] == expected and len({*expected}) > 1
    right = sum(e == row["answer"] for e, row in zip(expected, tasks[1]))
    assert result["results"]["tiny_write"]["exact_match,none"] == right / 5


def test_lm_eval_chooses_by_the_bound(tasks, folder):
    result = evaluated(tasks, folder, "tiny_choose", carry="none")
    model, right = files.load(folder), 0
    for row, given in zip(tasks[1], answers(result, "tiny_choose")):
        prompt, values = list(row["question"].encode()), []
        for text, ((value, greedy),) in zip((row["answer"], row["wrong"]), given):
            text = " " + text  # as lm_eval joins them
            tokens = prompt + list(text.encode())
            expected = expected_bound(model, tokens, len(prompt))
            assert float(value) == pytest.approx(-expected, rel=0.1)
            values.append(float(value))
            canvas = torch.tensor([prompt + [257] * len(text)])
            *_, step = rcd.denoise(model, canvas, rcd.Sampler("threshold", threshold=0.5, carry="none"))
            assert (str(greedy) == "True") == (step.tokens[0].tolist() == tokens)
        right += values[0] > values[1]
    assert result["results"]["tiny_choose"]["acc,none"] == right / 5


def test_lm_eval_measures_bits_per_byte(tasks, folder):
    result = evaluated(tasks, folder, "tiny_text", carry="none", draws=200)
    model, nats, size = files.load(folder), 0.0, 0
    for row in tasks[1]:
        nats += expected_bound(model, list(row["question"].encode()), 0)
        size += len(row["question"])
    bits = result["results"]["tiny_text"]["bits_per_byte,none"]
    assert bits == pytest.approx(nats / math.log(2) / size, rel=0.05)


def test_long_texts_windows_and_batches(tasks, folder):
    """A text of several windows is the sum of their bounds. A prompt that is too long loses its beginning.
    The batch size changes no answer."""
    from lm_eval.api.instance import Instance

    def asked(kind: str, *arguments) -> list:
        return [Instance(kind, {}, arguments, 0)]

    args = {"pretrained": str(folder), "device": "cpu", "dtype": "float32", "draws": 8}
    model = harness.Harness.create_from_arg_obj(args, {"batch_size": 3})
    text = "abcdefgh" * 25  # 200 bytes: windows of 96, 96 and 8
    parts = [model.bound([], list(text[i : i + 96].encode())) for i in (0, 96, 192)]
    (whole,) = model.loglikelihood_rolling(asked("loglikelihood_rolling", text))
    assert whole == pytest.approx(-sum(parts)) and whole < 0
    assert model.loglikelihood_rolling(asked("loglikelihood_rolling", "")) == [0]
    options = {"until": [], "max_gen_toks": 16}
    long, short = (model.generate_until(asked("generate_until", t, options)) for t in (text, text[-80:]))
    assert long == short and long[0]
    one = harness.Harness.create_from_arg_string(",".join(f"{k}={v}" for k, v in args.items()))
    assert (one.o.batch_size, model.o.batch_size) == (1, 3)
    several = [*asked("generate_until", "1+1=", options), *asked("generate_until", "a longer one", options)]
    assert one.generate_until(several) == model.generate_until(several)
    drawn = {**options, "do_sample": True, "temperature": 1.0}
    several = asked("generate_until", "a", drawn) * 3
    first, again = one.generate_until(several), model.generate_until(several)
    assert first == again and len({*first}) > 1


@pytest.mark.parametrize("given, says", [
    ({"pretrained": "nowhere"}, "no model 'nowhere'"), ({"treshold": 0.5}, "treshold"),
    ({"threshold": 7}, "threshold=7.0 must lie in"), ({"batch_size": "auto"}, "batch_size"),
    ({"draws": 0}, "draws=0"),
])  # fmt: skip
def test_a_wrong_model_argument_is_one_line(folder, capsys, given, says):
    args = {"pretrained": str(folder), "device": "cpu", **given}
    with pytest.raises(SystemExit) as end:
        command.run(lambda: harness.Harness.create_from_arg_obj(args))
    err = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and err[-1].startswith("error: ") and says in err[-1]


def test_a_conversation_is_the_templates(tmp_path, tiny):
    """The text that lm_eval passes on becomes the tokens that the template writes itself."""
    tokenizer = bytes_tokenizer(["<eos>", "<mask>", "<|im_start|>", "<|im_end|>"])
    files.save(tiny(vocab_size=260, mask_id=257), tmp_path)
    tokenizer.save(tmp_path)
    (tmp_path / "train.json").write_text('{"stage": "target", "template": "qwen3"}')
    model = harness.Harness.create_from_arg_obj({"pretrained": str(tmp_path), "device": "cpu"})
    history = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "2 + 2?"}]
    text = model.apply_chat_template(history)
    assert model.encode(text) == encode_chat(tokenizer, "qwen3", history) and 258 in model.encode(text)
    begun = [*history, {"role": "assistant", "content": "It is"}]
    open_end = model.apply_chat_template(begun, add_generation_prompt=False)
    assert open_end.endswith("<think>\n\n</think>\n\nIt is") and open_end.startswith(text)
    with pytest.raises(ValueError, match="a message is"):
        model.apply_chat_template([{"role": "cat", "content": "miaow"}])


def test_the_command_line(tasks, folder, monkeypatch, capsys):
    """python -m zoo.tools.harness is lm_eval's own, with the model rcd. Without --device lm_eval asks for
    cuda:0 everywhere; the best device that is there is taken."""
    from lm_eval.tasks import TaskManager

    args = f"pretrained={folder},carry=residual,threshold=0.85"
    rest = [f"--include_path={tasks[0]}", "--tasks=tiny_write", "--batch_size=4"]
    few = functools.partial(TaskManager, include_defaults=False)  # of thousands of files
    monkeypatch.setattr("lm_eval.tasks.TaskManager", few)
    monkeypatch.setattr(sys, "argv", ["lm_eval", "--model=rcd", f"--model_args={args}", *rest])
    command.run(harness.main)
    out = capsys.readouterr().out
    assert "tiny_write" in out and "exact_match" in out and "threshold" in out
