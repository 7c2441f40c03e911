"""Mathematical answers, documents in a chat template, packing, and the data sets of the paper.

The files are made here. The oracles: pairs of answers written by hand, a packer by brute force, and the chat
template of transformers."""

import json
import re
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from real_files import SDAR, qwen
from test_hub import SHA, Routes, hub  # noqa: F401 (a fixture)

import data
import train
from data import common
from data import hub as reading
from data.aime import prepare as aime
from data.answers import LIMIT, boxed, check, response, same_answer
from data.gsm8k import prepare as gsm8k
from data.math500 import prepare as math500
from data.openmathinstruct2 import prepare as openmath
from data.openr1_math import prepare as openr1
from zoo import tokenizer as tokenizers
from zoo.templates import TEMPLATES, encode_chat
from zoo.tokenizer import bytes_tokenizer

ROOT = Path(__file__).resolve().parents[1]

# ---- answers

# Groups of spellings of one answer: every pair in a group is the same.
SAME = [
    [r"\frac{1}{2}", r"\dfrac{1}{2}", r"\tfrac12", r"\frac12", r"\frac1{2}", r"\frac 1 2", "1/2", " 1 / 2 ",
     "0.5", ".5", "0.50", r"$\frac{1}{2}$", r"\(\frac{1}{2}\)", r"\left(\frac{1}{2}\right)", r"\frac{2}{4}",
     r"\frac{0.5}{1}", r"\displaystyle\frac{1}{2}", "+1/2", "1/2.", r"\frac{\frac{1}{3}}{\frac{2}{3}}"],
    ["1234", "1,234", "1{,}234", r"1,\!234", r"1\,234", "$1,234$", r"\$1234", "1234.00", "1,234.0", "1234.",
     r"1.234 \times 10^3", r"1.234\cdot10^{3}", "1.234e3", "+1234"],
    ["1234567", "1,234,567", r"1{,}234{,}567", r"1,\!234,\!567"],
    ["7/2", r"3\frac{1}{2}", "3 1/2", r"3 \frac12", "3.5", r"3\tfrac{1}{2}", r"\frac{7}{2}",
     r"\frac{-7}{-2}"],
    ["-7/2", r"-3\frac{1}{2}", "-3 1/2", r"-\frac{7}{2}", r"\frac{-7}{2}", r"\frac{7}{-2}", "-3.5", "−3.5"],
    ["x=5", "5", "5.0", "x = 5", "$x=5$", "(5)", r"\text{5}"],
    ["50\\%", "50%", "50", r"50 \%", "50 percent", r"50\text{ percent}"],
    ["25%", "1/4", "0.25"],
    ["90^\\circ", r"90^{\circ}", "90°", "90", "90 degrees", r"90\text{ degrees}", r"90\degree"],
    [r"5\text{ cm}", "5 cm", r"5\,\text{cm}", r"5\ \mathrm{cm}", "5", r"5\mbox{ cm}"],
    [r"12\text{ cm}^2", r"12\,\mathrm{cm}^{2}", "12 cm^2", "12"],
    ["7 apples", r"7\text{ apples}", "7 apple", "7"],
    [r"\$5.00", "5 dollars", "5", "$5$"],
    [r"(1,2)", "(1, 2)", r"\left(1,2\right)", r"\left( 1 , 2 \right)", r"(\frac{2}{2}, 2.0)",
     r"\bigl(1,2\bigr)", "(1;2)"],
    [r"[1,2)", r"\left[1, 2\right)", r"x \in [1,2)", r"x\in\left[1,2\right)"],
    [r"(-\infty, 3]", r"\left(-\infty,3\right]", r"(-\infty,\frac{6}{2}]"],
    [r"\{1,2,3\}", r"\{3, 2, 1\}", r"\left\{1,2,3\right\}", "1,2,3", "3, 1, 2", r"1, 2\text{ and }3",
     "{1,2,3}", r"\lbrace 1, 2, 3 \rbrace", "1, 2, and 3", "1, 2 and 3"],
    [r"(-\infty,1)\cup(2,3)", r"(2,3)\cup(-\infty,1)", r"(2, 3) \cup \left(-\infty, 1\right)"],
    [r"x=-2, x=3", "x = 3, -2", "-2, 3", "3 or -2", "x=3 or x=-2"],
    [r"\sqrt{2}", r"\sqrt2", r"\sqrt 2", "sqrt(2)", "√2", r"\sqrt {2}"],
    [r"3\sqrt{2}", r"3 \sqrt{2}", r"3\cdot\sqrt{2}", "3*sqrt(2)", "3√2"],
    [r"\frac{\sqrt{3}}{2}", r"\dfrac{\sqrt3}{2}", r"\sqrt{3}/2", "sqrt(3)/2", r"\frac{\sqrt{3}}2"],
    [r"\sqrt[3]{2}", r"\sqrt[3]2", r"\sqrt[3]{ 2 }"],
    [r"\frac{\pi}{2}", r"\pi/2", "pi/2", "π/2", r"\frac{\pi}2", r"\frac\pi2"],
    [r"2\pi", r"2 \pi", "2pi", "2π", r"2\cdot\pi", "2*pi"],
    [r"\frac{1}{2}\pi", r"\frac12\pi", r"\frac{2}{4} \pi"],
    [r"\frac{a+b}{2}", "(a+b)/2", r"\frac{a + b}{2}"],
    ["x^2+1", "x^{2}+1", "x^2 + 1", "y = x^2+1"],
    ["f(x)=2x", "2x", "f(x) = 2 x"],
    ["x^{-1}", "x^(-1)", "x^-1"],
    ["1024", "2^{10}", "2^10", "1,024"],
    ["1011_2", "1011_{2}"],
    ["A", "(A)", r"\text{A}", r"\text{(A)}", r"\textbf{A}", r"\mathrm{(A)}"],
    [r"\text{Monday}", "Monday", "monday", r"\text{ Monday }"],
    [r"\text{no solution}", "no solution"],
    [r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"],
    ["0", "-0", "0.0", "0/7", r"\frac{0}{3}"],
    ["1000000", "10^6", "10^{6}", r"1 \times 10^6", "1e6", "1,000,000"],
    ["1/1000", "10^{-3}", "0.001", "1e-3"],
    ["3:4", "3 : 4"],
    ["007", "7"],
    ["\\infty", "∞", r"+\infty"],
    [r"\{\}", r"\lbrace\rbrace"],
    [r"2\le x\leq 3", r"2 \leq x \le 3", "2<=x<=3"],
]  # fmt: skip

DIFFERENT = [
    ("0.333", "1/3"), ("0.33", r"\frac{1}{3}"), ("0.333...", "0.333"), ("5", "50"), ("5", "-5"),
    ("5", "5.01"), ("(1,2)", "(2,1)"), ("(1,234)", "1234"), ("(1,234)", "(1234)"), ("1,234", "1, 234"),
    ("1,23", "123"), ("12,34", "1234"), ("0,123", "123"), ("31/2", "3 1/2"),
    (r"\frac{31}{2}", r"3\frac{1}{2}"), ("2(1/2)", "2.5"), (r"2\cdot\frac{1}{2}", "2.5"), ("1 2", "12"),
    ("1 2", "1,2"), (r"\frac{1}{2}", r"\frac{2}{1}"), ("5 cm", "5 m"), (r"5\text{ cm}", r"5\text{ m}"),
    ("5 cm", "6 cm"), ("5 cm^2", "5 cm^3"), ("5 cm", "5 cm^2"), ("50%", "5"), ("50%", "0.05"), ("50%", "40%"),
    ("0.5%", "50%"), ("50%", r"50^\circ"), ("x=5", "y=5"), ("x=5", "x=6"), ("f(x)=x", "g(x)=x"),
    ("x_1=5", "x_2=5"), ("[1,2]", "(1,2)"), ("[1,2)", "(1,2]"), ("[1,2]", "[2,1]"), ("(1,2)", "1,2"),
    ("(1,2)", r"\{1,2\}"), (r"\{1,2\}", r"\{1,3\}"), (r"\{1,2\}", r"\{1,2,3\}"), (r"\{1,2,2\}", r"\{1,1,2\}"),
    ("1,2", "1"), ("1,2,3", "1,2"), (r"\sqrt{2}", "2"), (r"\sqrt{2}", "1.414"), (r"\sqrt{4}", "2"),
    (r"\sqrt{2}", r"\sqrt{3}"), (r"\sqrt[3]{2}", r"\sqrt{2}"), (r"\sqrt[3]{2}", r"3\sqrt{2}"),
    (r"2\sqrt{3}", r"3\sqrt{2}"), (r"\sqrt{23}", r"\sqrt{2}3"), (r"\pi", "3.14"), (r"\pi", r"2\pi"),
    (r"\frac{\pi}{2}", r"\frac{2}{\pi}"), ("i", "1"), (r"\frac{1}{2x}", r"\frac{1}{2}x"), ("1/2x", "1/(2x)"),
    (r"\frac{a}{b+c}", r"\frac{a}{b}+c"), (r"\frac{a+b}{c}", r"a+\frac{b}{c}"), ("x^2", "x2"), ("x^2", "2x"),
    ("x^{12}", "x^{1}2x"), ("x^{ab}", "x^ab"), ("x^{2}", "x_{2}"), ("x+1", "x-1"), ("x", "X"), ("n", "N"),
    ("2 ab", "2"), ("2ab", "2"), ("2x", "2"), ("2 x", "2"), ("2\\pi", "2"), ("2i", "2"),
    ("10^{10^{10}}", "10^{10}"), ("10^{10^{10}}", "10^{11}"), ("1e999999999", "1"),
    ("1e999999999", "1e999999998"), (r"\frac{1}{0}", "0"), (r"\frac{1}{0}", r"\frac{2}{0}"), ("0/0", "0"),
    ("", "0"), ("", "5"), ("5", "five"), ("A", "B"), ("(A)", "(B)"), (r"\text{Monday}", "Tuesday"),
    ("yes", "no"), ("5", "A"), (r"\infty", r"-\infty"), (r"\infty", "8"), ("(-\\infty,3)", "(-\\infty,3]"),
    ("(-\\infty,3)", "(\\infty,3)"), (r"(1,2)\cup(3,4)", r"(1,2)\cup(3,5)"),
    (r"(1,2)\cup(3,4)", "(1,2),(3,4)"), (r"(1,2)\cup(3,4)", "(1,4)"), ("2^{10}", "1000"), ("2^{10}", "20"),
    ("2^{-1}", "-2"), ("1011_2", "1011"), ("1011_2", "1011_3"), ("1011_2", "11"), ("3:4", "3/4"),
    ("3:4", "4:3"), ("3!", "3"), ("-1/2", "1/2"), (r"-\frac{1}{2}", r"\frac{1}{2}"), (r"-3\frac12", "-2.5"),
    (r"1\pm 2", "1"), (r"1\pm 2", "1+2"), ("1.2.3", "1.23"), ("1..2", "1.2"), ("12", "1.2"), ("1e3", "13"),
    ("1e3", "e"), ("1.0e2", "1.0"), ("1,000", "1"), ("100,20", "10020"), ("2<x<3", "2≤x≤3"), ("x<2", "x>2"),
    ("x≤2", "x≥2"), (r"\frac{3}{4}", "34"), (r"\frac34", "34"), ("3/4", "0.7"), ("99/100", "1"),
    ("0.9999999999999999999999", "1"), ("10000000000000000000000001", "10000000000000000000000000"),
    ("1/3", "0.3333333333333333333333333333"), ("123456789012345678", "123456789012345679"),
    ("((1,2),3)", "(1,(2,3))"), ("((1,2),(3,4))", "((1,2),(4,3))"), (r"\{(1,2)\}", r"\{(2,1)\}"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}2\\1\end{pmatrix}"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", "12"), ("1/2/3", "1/6"), ("½", "12"), ("²", "2"), ("٣", "3"),
    ("__import__('os')", "0"), ("9**9", "387420489"), ("1 1/2", "11/2"), ("x=y=3", "3"),
]  # fmt: skip


@pytest.mark.parametrize("group", SAME, ids=lambda group: group[0])
def test_same_answers(group):
    for a in group:
        for b in group:
            assert same_answer(a, b), (a, b)


@pytest.mark.parametrize("a,b", DIFFERENT)
def test_different_answers(a, b):
    assert not same_answer(a, b) and not same_answer(b, a)


def test_groups_do_not_run_into_each_other():
    """No answer of one group is one of another, but for those that say a number with and without a sign or
    unit."""
    related = {"5", "50", "7", "7/2", "12"}
    for k, group in enumerate(SAME):
        for other in SAME[k + 1 :]:
            if not related & {*group} & {*other}:
                bare = [b for b in other if "%" not in group[0] + b and "percent" not in b]
                assert not [b for b in bare if same_answer(group[0], b)], group[0]


NUMBERS = st.fractions(max_denominator=10**6) | st.integers(-(10**12), 10**12).map(Fraction)


def spellings(value: Fraction) -> list[str]:
    """Ways to write a number, by plain string formatting."""
    p, q, sign = abs(value.numerator), value.denominator, "-" if value < 0 else ""
    out = [rf"{sign}\frac{{{p}}}{{{q}}}", rf"\dfrac{{{sign}{3 * p}}}{{{3 * q}}}", f"{sign}{p}/{q}"]
    out += [rf"$x = {sign}\frac{{{p:,}}}{{{q}}}$"]
    if p > q > 1:
        out += [rf"{sign}{p // q}\frac{{{p % q}}}{{{q}}}", f"{sign}{p // q} {p % q}/{q}"]
    if q == 1:
        out += [f"{sign}{p}", f"{sign}{p:,}.", f"{sign}{p:,}".replace(",", "{,}"), rf"{sign}{p}\text{{ cm}}"]
    if 10**6 % q == 0:
        out += [f"{sign}{p * 10**6 // q // 10**6}.{p * 10**6 // q % 10**6:06}"]
    return out


@settings(max_examples=100)
@given(NUMBERS, NUMBERS, st.data())
def test_numbers_are_exact(a, b, draw):
    x, y = draw.draw(st.sampled_from(spellings(a))), draw.draw(st.sampled_from(spellings(b)))
    assert same_answer(x, y) == (a == b)
    assert same_answer(x, draw.draw(st.sampled_from(spellings(a))))


@settings(max_examples=30)
@given(st.lists(NUMBERS, min_size=2, max_size=5), st.randoms(), st.data())
def test_order_matters_in_tuples_only(values, rng, draw):
    def write(values):  # no thousands: between brackets every comma separates
        plain = [[s for s in spellings(v) if not {*"x,"} & {*s.replace("{,}", "")}] for v in values]
        return ", ".join(draw.draw(st.sampled_from(spelled)) for spelled in plain)

    other = rng.sample(values, len(values))
    assert same_answer(rf"\{{{write(values)}\}}", rf"\left\{{{write(other)}\right\}}")
    assert same_answer(f"({write(values)})", rf"\left({write(other)}\right)") == (values == other)
    assert not same_answer(f"({write(values)})", f"({write(values[1:])})")


PIECES = [
    r"\frac", r"\sqrt", "{", "}", "(", ")", "[", r"\{", r"\}", ",", ";", " ", "1", "23", "0", ".", "-", "/",
    "^", "_", "%", "=", "x", "pi", r"\pi", r"\text{", "cm", r"\cup", "⟦", "⟧", "⦃", "‹", "›", "e", "10^",
    r"\\", "\\", "$", r"\left", r"\circ", r"\infty", "\n", "é", "²", "\0",
]  # fmt: skip
JUNK = st.lists(st.sampled_from(PIECES), max_size=12).map("".join) | st.text(max_size=20)


@settings(max_examples=200)
@given(JUNK, JUNK)
def test_nothing_raises_and_the_order_of_the_arguments_does_not_matter(a, b):
    assert same_answer(a, a) and same_answer(a, b) == same_answer(b, a)
    assert same_answer(a, f" {a}\n")
    boxed(a + r"\boxed{" + b)


@pytest.mark.parametrize("text", [
    "{", "}", "(", r"\{", r"\frac{", r"\frac", r"\sqrt{", r"\boxed{", r"\boxed ", r"\text{", "10^", "10^{",
    "9", "1,", "1/", " 1", "\\", "1 1/2", "(1,", r"\{1,", "‹", "⟦", "x=", r"1\cup", r"\left(", "{}", "e9",
    "$", "1e9", "-", "; ",
])  # fmt: skip
def test_hostile_input_ends(text):
    """A test that hangs fails: 10^5 open brackets, towers of powers, numbers of 10^5 digits, quadratic traps
    of regular expressions."""
    for n in (900, 10**5):
        long = text * (n // len(text))
        for closer in ("", "}", ")", "1"):
            other = long + closer * (n // 10)
            assert isinstance(boxed(other), str | None) and same_answer(other, other)
            if n < LIMIT or not closer:  # else it would be cut off
                assert isinstance(same_answer(other[1:LIMIT], long[: LIMIT - 1]), bool)
        assert same_answer(long, long + "x") is False or n < LIMIT


def test_many_boxes():
    n = 10**5
    assert boxed(r"\boxed{" * n + "5" + "}" * n) == "5" and boxed(r"\boxed{7}" + r"\boxed{" * n) == "7"


def test_giant_numbers():
    tower = "10^{10^{10}}"
    assert same_answer(tower, "10^{10^{10} }") and not same_answer(tower, "1")
    assert not same_answer("9^{9^{9^9}}", "9^{9^{9^8}}") and not same_answer("1e1000000000", "1e1000000001")
    assert not same_answer("2^{1000000}", "4^{500000}"), "too large to be calculated: compared as text"
    assert same_answer("9" * (LIMIT - 1), "9" * (LIMIT - 1) + ".")
    assert not same_answer("9" * LIMIT, "9" * (LIMIT - 1))
    big = "1" + "0" * 990
    assert same_answer(r"\frac{" + big + "}{3}", big + "/3")
    assert not same_answer(r"\frac{" + big + "}{3}", big[:-1] + "1/3")
    assert not same_answer(r"\frac{" * 200 + "10^{1000}" + "}{10^{-1000}}" * 100, "1")


def test_nothing_is_evaluated(tmp_path):
    for text in (f"open({str(tmp_path / 'x')!r}, 'w')", f"__import__('os').mkdir({str(tmp_path / 'x')!r})"):
        same_answer(text, "1")
        same_answer(rf"\frac{{{text}}}{{2}}", "1")
    assert not (tmp_path / "x").exists()
    source = (ROOT / "data" / "answers.py").read_text(encoding="utf-8")
    assert not re.search(r"\b(eval|exec|compile|float|__import__)\(", source.replace("re.compile(", ""))


@pytest.mark.parametrize("text,expected", [
    (r"so \boxed{5}.", "5"), (r"\boxed{1} then \boxed{2}", "2"), (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
    (r"\boxed{ 5 }", "5"), (r"\fbox{7}", "7"), (r"\boxed 5", "5"), (r"\boxed5", "5"), (r"$\boxed 5$", "5"),
    (r"is \boxed 57.", "57"), (r"\boxed\frac{1}{2} ok", r"\frac{1}{2}"), (r"\boxed{\{1,2\}}", r"\{1,2\}"),
    (r"\boxed{\{1,2}", r"\{1,2"), (r"\boxed {3}", "3"), ("\\boxed{a\nb}", "a\nb"),
    (r"\boxed{1} \boxed{2", "1"), (r"\boxed{", None),
    ("nothing", None), (r"\boxedx{5}", None), (r"boxed{5}", None), ("", None),
    (r"\boxed{\boxed{5}}", "5"), (r"{ stray \boxed{5}", "5"), (r"stray } \boxed{5}", "5"),
    (r"\boxed{x \} y}", r"x \} y"), (r"\boxed{\text{a}} and {b}", r"\text{a}"), (r"\boxed{}", ""),
    (r"a\\\boxed{5}", "5"), (r"\boxed{1}\fbox{2}\boxed{3}", "3"),
])  # fmt: skip
def test_boxed(text, expected):
    assert boxed(text) == expected


def test_the_answer_is_looked_for_in_the_response_only():
    prompt, end = r"<|im_start|>user\nIs it \boxed{7}?<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>"
    solution, given_ = prompt + r"\boxed{\frac12}" + end * 3, prompt + "_" * 20
    assert response(prompt + "abc" + end + "d", solution, given_) == "abc"
    assert check(solution, solution, given_) and check(prompt + r"So $\boxed{0.5}$." + end, solution, given_)
    assert not check(prompt + "no box" + end, solution, given_), "the question's box is no answer"
    behind = prompt + r"\boxed{3}" + end + r"\boxed{\frac12}"
    assert not check(behind, solution, given_), "what stands behind the end does not count"
    assert not check(given_, solution, given_) and not check(prompt + r"\boxed{_}" + end, solution, given_)
    assert response("abc", "abc", "") == "abc"


# ---- documents and packing

NAMES = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|startoftext|>", "<|start_header_id|>",
    "<|end_header_id|>", "<|eot_id|>", "<|role_end|>", "<|MASK|>",
]  # fmt: skip
END = dict.fromkeys(TEMPLATES, "<|im_end|>") | {
    "llada": "<|eot_id|>", "llada2": "<|role_end|>", "plain": "<|endoftext|>",
}  # fmt: skip


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """A folder of an SDAR model as far as data preparation looks at it: config.json and a tokenizer."""
    folder = tmp_path_factory.mktemp("SDAR-tiny-Chat-b8")
    bytes_tokenizer(NAMES).save(folder)
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    config = {
        "model_type": "sdar", "vocab_size": 300, "hidden_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "intermediate_size": 16,
        "max_position_embeddings": 64, "rope_theta": 1e4, "rms_norm_eps": 1e-6, "hidden_act": "silu",
        "mask_token_id": 264,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_gsm8k(folder, train=150, test=6):
    """Problems whose questions hold decoys of an answer."""
    folder.mkdir(exist_ok=True)
    problems = [{"question": f"Ann writes #### {i + 7} and {'very ' * (i % 9)}gets {i}. How many?",
                 "answer": f"{'so ' * (i % 13)}{i}+{i} = {2 * i}\n#### {2 * i}"} for i in range(train + test)]
    for name, part in (("train", problems[:train]), ("test", problems[train:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(p) + "\n" for p in part), encoding="utf-8")
    return problems


def prepared(task, source, out, folder, *options):
    """Sources, tokenizer and output to the task's prepare.py; the data set."""
    sources = map(str, source if isinstance(source, list) else [source])
    task.main(["--source", *sources, "--tokenizer", str(folder), "--out", str(out), *options])
    return data.load(out)


def rows_of(dataset, split):
    """(tokens, response) of every row, read into memory at once."""
    return [*zip(np.array(dataset.tokens(split)), np.array(dataset.response(split)))]


@pytest.mark.parametrize("template", TEMPLATES)
def test_chat_rows(template, model_folder, tmp_path):
    problems = {p["question"]: p["answer"] for p in write_gsm8k(tmp_path / "in", train=50)}
    options = "--chat", template, "--length", "400"
    dataset = prepared(gsm8k, tmp_path / "in", tmp_path / "out", model_folder, *options)
    tokenizer, end = dataset.tokenizer, dataset.tokenizer.specials[END[template]]
    assert dataset.eos_id == end and dataset.meta["template"] == template
    assert dataset.meta["packed"] == [] and dataset.segments("train") is None
    talks = {q: [{"role": "user", "content": q}] for q in problems}
    prompts = {tuple(encode_chat(tokenizer, template, talk)): q for q, talk in talks.items()}
    for split in data.SPLITS:
        for ids, filled in rows_of(dataset, split):
            start = int(filled.argmax())
            answer = problems[prompts[tuple(ids[:start].tolist())]]
            assert filled[start:].all(), "a prompt, then nothing but response"
            said = ids[start:].tolist()
            at = said.index(end)
            assert set(said[at:]) == {end} and tokenizer.decode(said[:at]).endswith(answer)
            assert dataset.correct(ids, ids, filled)
            other = np.where(filled, end, ids)
            assert not dataset.correct(other, ids, filled), "the question's #### is no answer"
            wrong = tokenizer.encode("#### 99999") + [end] + tokenizer.encode(answer)
            other[start : start + len(wrong)] = wrong
            assert not dataset.correct(other, ids, filled), "the first number counts, none behind the end"
            right = tokenizer.encode(f"hm #### ${answer.split()[-1]}.")
            right += [end] + tokenizer.encode("#### 99999")
            other[start : start + len(right)] = right
            assert dataset.correct(other, ids, filled)


def test_auto_is_the_template_of_the_family(model_folder, tmp_path):
    write_gsm8k(tmp_path / "in")
    for k, chat in enumerate(("auto", "qwen3")):
        prepared(gsm8k, tmp_path / "in", tmp_path / str(k), model_folder, "--chat", chat, "--length", "400")
    for name in ("train.npy", "train_response.npy", "test.npy"):
        assert (tmp_path / "0" / name).read_bytes() == (tmp_path / "1" / name).read_bytes()
    assert json.loads((tmp_path / "0" / "meta.json").read_text())["template"] == "qwen3"


def brute_force(lengths: list[int], length: int, block: int, most: int) -> list[list[int]]:
    """First fit by the definition: rows of document numbers in the order in which they are written."""
    rows, written = [], []
    room = {n: -(-size // block) * block for n, size in enumerate(lengths)}

    def used(row):
        return sum(room[n] for n in row)

    for n in room:
        for row in rows:
            if used(row) + room[n] <= length:
                row.append(n)
                break
        else:
            if len(rows) == most:
                fullest = sorted(range(most), key=lambda k: (-used(rows[k]), k))[0]
                written.append(rows.pop(fullest))
            rows.append([n])
        for row in [row for row in rows if used(row) == length]:
            rows.remove(row)
            written.append(row)
    return written + rows


@settings(max_examples=100)
@given(lengths=st.lists(st.integers(1, 24), min_size=1, max_size=60),
       block=st.sampled_from([1, 2, 4, 8]), most=st.integers(1, 6))  # fmt: skip
def test_packing_against_brute_force(lengths, block, most):
    length, end, rows = 24, 999, []
    documents = [([100 * (n % 9) + k for k in range(size)], [k >= size // 3 for k in range(size)])
                 for n, size in enumerate(lengths)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "OPEN_ROWS", most)
        packer = common.Packer(length, block, end, lambda *row: rows.append(row))
        for ids, filled in documents:
            packer.add(ids, filled)
            assert len(packer.open) <= most
        packer.close()
    expected = brute_force(lengths, length, block, most)
    assert len(rows) == len(expected) and sorted(sum(expected, [])) == list(range(len(lengths)))
    for (tokens, filled, segments), row in zip(rows, expected):
        assert len(tokens) == len(filled) == len(segments) == length
        at = 0
        for number, n in enumerate(row, 1):
            ids, mask = documents[n]
            size = -(-len(ids) // block) * block
            assert at % block == 0 and tokens[at : at + size] == ids + [end] * (size - len(ids))
            assert filled[at : at + size] == mask + [True] * (size - len(ids))
            assert segments[at : at + size] == [number] * size
            at += size
        assert tokens[at:] == [end] * (length - at) and not any(filled[at:]) and not any(segments[at:])


@pytest.mark.parametrize("chat,block", [("auto", "1"), ("auto", "8"), ("llada", "4"), ("", "1"), ("", "16")])
def test_packed_rows_hold_the_documents_of_unpacked_ones(chat, block, model_folder, tmp_path):
    write_gsm8k(tmp_path / "in")
    options, pack = ["--chat", chat, "--length", "512"], ["--pack", "--block", block]
    plain = prepared(gsm8k, tmp_path / "in", tmp_path / "plain", model_folder, *options)
    packed = prepared(gsm8k, tmp_path / "in", tmp_path / "packed", model_folder, *options, *pack)
    assert packed.meta["packed"] == ["train", "val"] and packed.meta["block"] == int(block)
    assert packed.meta["template"] == {"auto": "qwen3", "": None}.get(chat, chat)
    assert packed.segments("test") is None and not (tmp_path / "packed" / "test_segments.npy").exists()
    for name in ("test.npy", "test_response.npy"):
        assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "packed" / name).read_bytes()
    end = packed.eos_id

    def documents(dataset, split):
        """Every document up to its end token, prompt and answer apart."""
        for row, (ids, filled) in enumerate(rows_of(dataset, split)):
            segments = np.ones_like(ids) if dataset is plain else np.array(dataset.segments(split)[row])
            for number in range(1, segments.max() + 1):
                at = np.flatnonzero(segments == number)
                assert (np.diff(at) == 1).all()
                assert dataset is plain or at[0] % int(block) == len(at) % int(block) == 0
                prompt, answer = ids[at][~filled[at]].tolist(), ids[at][filled[at]].tolist()
                assert not filled[at][: len(prompt)].any() and set(answer[answer.index(end) :]) == {end}
                assert dataset is plain or len(at) < len(prompt) + answer.index(end) + 1 + int(block)
                yield tuple(prompt), tuple(answer[: answer.index(end)])
            assert not filled[segments == 0].any() and set(ids[segments == 0].tolist()) <= {end}

    for split in ("train", "val"):
        assert sorted(documents(plain, split)) == sorted(documents(packed, split))
        assert len(packed.tokens(split)) < len(plain.tokens(split)) == packed.meta["documents"][split]
    again = prepared(gsm8k, tmp_path / "in", tmp_path / "again", model_folder, *options, *pack)
    for name in ("train.npy", "train_response.npy", "train_segments.npy"):
        assert (again.folder / name).read_bytes() == (packed.folder / name).read_bytes()
    prepared(gsm8k, tmp_path / "in", tmp_path / "packed", model_folder, "--length", "512")
    assert not [*(tmp_path / "packed").glob("*_segments.npy")], "left over from before"


@pytest.mark.parametrize("damage", [
    None, lambda s, r: s[:-1], lambda s, r: s.astype(np.int32), lambda s, r: np.where(s == 1, 3, s),
    lambda s, r: np.where(s == 1, 0, s), lambda s, r: s[:, ::-1], lambda s, r: np.where(s == 2, 9, s),
    lambda s, r: np.where(s > 0, s + 1, 0), lambda s, r: np.zeros_like(s),
    lambda s, r: np.where(r & (s == s.max(1, keepdims=True)), 0, s),
])  # fmt: skip
def test_damaged_segments_are_found(damage, model_folder, tmp_path):
    write_gsm8k(tmp_path / "in")
    dataset = prepared(gsm8k, tmp_path / "in", tmp_path / "out", model_folder, "--pack", "--length", "512")
    path = tmp_path / "out" / "train_segments.npy"
    if damage is None:
        path.unlink()
    else:
        damaged = damage(np.load(path), np.array(dataset.response("train")))
        del dataset
        np.save(path, damaged.astype(np.uint16) if damaged.dtype == np.int64 else damaged)
    with pytest.raises(ValueError, match="segments.*prepare it again") as error:
        data.load(tmp_path / "out")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("options,words", [
    (["--block", "4"], "--block, a number of tokens, goes with --pack"),
    (["--pack", "--block", "7", "--length", "100"], "multiple of --block 7"),
    (["--pack", "--length", "65536"], "below 65,536"),
    (["--chat", "chatml"], "no chat template 'chatml': there are qwen3"),
    (["--tokenizer", "bytes", "--chat", "auto"], "bytes is none: choose one of qwen3"),
    (["--tokenizer", "bytes", "--chat", "qwen3"], r"needs the special token <\|im_start\|>"),
    (["--tokenizer", "noconfig", "--chat", "auto"], "no config.json"),
    (["--tokenizer", "other", "--chat", "auto"], "model_type 'other'"),
    (["--tokenizer", "base-model", "--chat", "auto"], "has no chat template: choose one of"),
    (["--tokenizer", "run", "--chat", "auto"], "has no chat template"),
])  # fmt: skip
def test_wrong_options(options, words, model_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_gsm8k(tmp_path / "in")
    config = json.loads((model_folder / "config.json").read_text())
    types = {"noconfig": None, "other": "other", "base-model": "qwen3", "run": "rcd"}
    for name, model_type in types.items():
        bytes_tokenizer(NAMES).save(name)
        tokenizer_config = {"eos_token": {"content": "<|endoftext|>"}}
        Path(name, "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
        if model_type:
            Path(name, "config.json").write_text(json.dumps(config | {"model_type": model_type}))
    Path("run", "train.json").write_text(json.dumps({"template": None}))
    with pytest.raises((ValueError, OSError), match=words) as error:
        gsm8k.main(["--source", "in", "--tokenizer", str(model_folder), "--out", "out", *options])
    assert "\n" not in str(error.value) and not Path("out").exists()


def test_a_run_of_ours_has_the_template_of_its_origin(tmp_path):
    write_gsm8k(tmp_path / "in")
    bytes_tokenizer(NAMES).save(tmp_path / "run")
    (tmp_path / "run" / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    (tmp_path / "run" / "config.json").write_text(json.dumps({"model_type": "rcd"}))
    (tmp_path / "run" / "train.json").write_text(json.dumps({"template": "llada"}))
    options = "--chat", "auto", "--length", "512"
    dataset = prepared(gsm8k, tmp_path / "in", tmp_path / "out", tmp_path / "run", *options)
    assert dataset.meta["template"] == "llada"


# ---- the paper's data sets

def write_parquet(path, rows, **options):
    parquet, arrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(arrow.Table.from_pylist(rows), path, **options)


def generation(i, result=None, filler=0):
    result = 2 * i if result is None else result
    return f"<think>\nLet me see{' so' * filler}.\n</think>\n\nIt is \\boxed{{{result}}}."


def openr1_rows(n):
    """Rows in the shape of the hub's, with every reason to be kept or not, and {problem: the answer to
    expect, or None}."""
    rows, expected = [], {}
    for i in range(n):
        row = {
            "problem": f"Problem {i}: {i}+{i}? \\boxed{{0}}", "solution": "human", "answer": str(2 * i),
            "problem_type": "Algebra", "source": "x", "uuid": str(i),
            "generations": [generation(i, "wrong"), generation(i), generation(i, filler=3)],
            "correctness_math_verify": [False, True, True], "correctness_llama": None,
            "is_reasoning_complete": [True, True, True], "messages": [{"role": "user", "content": "x"}],
        }  # fmt: skip
        kept = 1
        match i % 8:
            case 1:
                row["is_reasoning_complete"], kept = [True, False, True], 2
            case 2:
                row["correctness_math_verify"], kept = [False, False, False], None
            case 3:
                row["correctness_math_verify"], kept = [False, None, False], 2
                row["correctness_llama"] = [False, False, True]
            case 4:
                row["generations"][1], kept = generation(i, filler=400), 2  # the first right one is too long
            case 5:
                row["generations"][1:], kept = ["no box", "none here either"], None
            case 6:
                row["generations"], row["correctness_math_verify"] = row["generations"][:2], [False, True]
                row["is_reasoning_complete"] = None
            case 7:
                row["generations"], kept = [generation(i, filler=400)] * 3, None
        rows.append(row)
        expected[row["problem"]] = None if kept is None else row["generations"][kept]
    return rows, expected


def held(dataset):
    """{question: (answer, split)} of all documents, by cutting the rows' text at the template's names."""
    pattern = r"<\|im_start\|>user\n(.*?)<\|im_end\|>\n<\|im_start\|>assistant\n(.*?)(?:<\|im_end\|>)+"
    found = {}
    for split in dataset.meta["splits"]:
        for row, (ids, _) in enumerate(rows_of(dataset, split)):
            packed = dataset.segments(split)
            segments = np.ones_like(ids) if packed is None else np.array(packed[row])
            for number in range(1, segments.max() + 1):
                text = dataset.text(ids[segments == number])
                question, answer = re.fullmatch(pattern, text, re.DOTALL).groups()
                found[question] = answer, split
    return found


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_openr1_math(kind, model_folder, tmp_path):
    rows, expected = openr1_rows(400)
    folder = tmp_path / "in" / "data"
    for part, some in enumerate((rows[:200], rows[200:])):
        name = f"train-0000{part}-of-00002.{kind}"
        if kind == "parquet":
            write_parquet(folder / name, some, row_group_size=16)
        else:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(jsonl(*map(json.dumps, some)))
    source = [tmp_path / "in"] if kind == "parquet" else sorted(folder.iterdir())
    if kind == "parquet":  # another configuration of the same data set in the folder is not read
        write_parquet(tmp_path / "in" / "all" / "train-00000-of-00001.parquet", rows[:3])
    options = ["--chat", "auto", "--pack", "--block", "8", "--length", "512", "--held", "0.1"]
    dataset = prepared(openr1, source, tmp_path / "out", model_folder, *options)
    found = held(dataset)
    assert {q: a for q, (a, _) in found.items()} == {q: a for q, a in expected.items() if a is not None}
    assert dataset.meta["unusable"] == 100 and sum(dataset.meta["dropped"].values()) == 50
    assert {split for _, split in found.values()} == set(data.SPLITS)
    assert sum(dataset.meta["documents"].values()) == len(found)
    for ids, filled in rows_of(dataset, "test"):
        assert dataset.correct(ids, ids, filled)
        silent = np.where(filled, dataset.eos_id, ids)
        assert not dataset.correct(silent, ids, filled), "the question's box is no answer"


def test_a_problem_is_in_one_split(tmp_path):
    rows = [{"problem": f"Problem {i % 50}?", "generated_solution": f"\\boxed{{{i}}}",
             "expected_answer": str(i), "problem_source": "math"} for i in range(500)]
    write_parquet(tmp_path / "in" / "data" / "train_1M-00000-of-00001.parquet", rows)
    options = ["--length", "64", "--held", "0.15"]
    dataset, seen = prepared(openmath, tmp_path / "in", tmp_path / "out", "bytes", *options), {}
    for split in data.SPLITS:
        for ids, filled in rows_of(dataset, split):
            seen.setdefault(dataset.text(ids[~filled]), set()).add(split)
            assert dataset.correct(ids, ids, filled)
    assert len(seen) == 50 and all(len(splits) == 1 for splits in seen.values())
    assert sum(dataset.meta["splits"].values()) == 500
    assert dataset.meta["length"] == 64 and dataset.meta["licence"] == "as its source"
    options += ["--samples", "123", "--instruction", "Box it."]
    few = prepared(openmath, tmp_path / "in", tmp_path / "few", "bytes", *options)
    assert sum(few.meta["splits"].values()) == 123
    prompts = {few.text(ids[~filled]) for ids, filled in rows_of(few, "train")}
    assert all(re.fullmatch(r"Problem \d+\?\nBox it\.\n", prompt) for prompt in prompts)


def test_real_tokenizer_end_to_end(tmp_path, monkeypatch, capsys):
    """The real vocabulary against transformers' rendering of the real template."""
    ours, theirs = qwen()
    monkeypatch.setattr(tokenizers, "load", lambda folder: ours)  # reading it takes seconds
    rows, expected = openr1_rows(160)
    for row in rows:
        expected[row["problem"] + " é 漢字 $\\frac{1}{2}$\n12345"] = expected.pop(row["problem"])
        row["problem"] += " é 漢字 $\\frac{1}{2}$\n12345"
    write_parquet(tmp_path / "in" / "part.parquet", rows, row_group_size=32)
    options = ["--chat=auto", "--pack", "--block=4", "--length=256", "--held=0.1"]
    prepared(openr1, tmp_path / "in", tmp_path / "out", SDAR, *options)
    printed = capsys.readouterr().out
    assert "rows of 256 tokens" in printed and "<|im_start|>assistant" in printed
    meta = json.loads((tmp_path / "out" / "meta.json").read_text())
    assert meta["template"] == "qwen3" and meta["block"] == 4
    assert meta["mask_id"] == 151669 and meta["eos_id"] == 151645
    wanted, found = set(), set()
    for question, answer in expected.items():
        if answer is not None:
            talk = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            rendered = theirs.apply_chat_template(talk, tokenize=True, return_dict=False)
            wanted.add(tuple(rendered[:-1]))  # without the line break behind the end token
    for split in data.SPLITS:
        tokens, response_ = (np.load(tmp_path / "out" / f"{split}{part}.npy") for part in ("", "_response"))
        segments = tmp_path / "out" / f"{split}_segments.npy"
        packed = np.load(segments) if segments.exists() else np.ones_like(tokens)
        assert tokens.dtype == np.uint32 and segments.exists() == (split != "test")
        for ids, filled, numbers in zip(tokens, response_, packed):
            for number in range(1, numbers.max() + 1):
                document, mask = ids[numbers == number].tolist(), filled[numbers == number]
                while document[-2:] == [151645, 151645]:
                    document.pop()
                found.add(tuple(document))
                # behind <|im_start|>, assistant and a line feed
                assert mask.argmax() == document.index(151644, 1) + 3 and mask[mask.argmax() :].all()
    unfit = {d for d in wanted if len(d) > 256}
    assert found == wanted - unfit and len(found) > 80


def test_rows_are_read_in_batches(tmp_path, monkeypatch):
    """Row groups one after the other, and finished rows go to the disk: nothing keeps all of them."""
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [{"problem": f"p{i}", "generated_solution": "\\boxed{1}"} for i in range(2000)]
    write_parquet(tmp_path / "in.parquet", rows, row_group_size=100)
    sizes, original = [], parquet.ParquetFile.iter_batches

    def batches(self, *args, **kwargs):
        for batch in original(self, *args, **kwargs):
            sizes.append(batch.num_rows)
            yield batch

    monkeypatch.setattr(parquet.ParquetFile, "iter_batches", batches)
    prepared(openmath, tmp_path / "in.parquet", tmp_path / "out", "bytes", "--length", "32", "--held", "0.1")
    assert max(sizes) <= 256 and sum(sizes) == 2000
    parser = reading.parser_of("", str(tmp_path / "x" / "prepare.py"), 32, True)
    encoder = common.Encoder(parser.parse_args(["--tokenizer", "bytes"]))
    documents = common.Documents(encoder, tmp_path)
    for _ in range(3):
        documents.add("train", [1, 2], [False, True])
    tokens, filled = documents.splits()["train"]
    assert isinstance(tokens, np.memmap) and isinstance(filled, np.memmap) and tokens.shape == (3, 32)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.parquet", "out"], "its files have no name"


# ---- sets for evaluation

MATH = [
    {"problem": "What is $1/2$ of 5? $\\boxed{7}$", "solution": "Half. $\\boxed{2.5}$",
     "answer": "\\frac{5}{2}", "subject": "Algebra", "level": 1, "unique_id": "a"},
    {"problem": "Roots of x^2=4?", "solution": "...", "answer": "2, -2", "subject": "Algebra", "level": 2,
     "unique_id": "b"},
]  # fmt: skip


@pytest.fixture
def math_file(tmp_path):
    (tmp_path / "test.jsonl").write_text("\n".join(map(json.dumps, MATH)))
    return tmp_path / "test.jsonl"


@pytest.mark.parametrize("chat", ["", "auto"])
def test_math500(chat, model_folder, math_file, tmp_path):
    options = "--chat", chat, "--length", "256", "--instruction", "Put it in a box."
    dataset = prepared(math500, math_file, tmp_path / "out", model_folder, *options)
    assert dataset.meta["splits"] == {"test": 2}
    assert sorted(p.name for p in dataset.folder.glob("*.npy")) == ["test.npy", "test_response.npy"]
    for split in ("train", "val"):
        for access in (dataset.tokens, dataset.response, dataset.segments):
            with pytest.raises(ValueError, match=f"math500 has no {split} split, only test"):
                access(split)
    answers = ("2\\frac12", "2.4"), ("x=-2, x=2", "2")
    for (ids, filled), row, (good, bad) in zip(rows_of(dataset, "test"), MATH, answers):
        prompt, start = dataset.text(ids[~filled]), int(filled.argmax())
        assert f"{row['problem']}\nPut it in a box." in prompt and filled[start:].all()
        begin, end = ("<|im_start|>user\n", "<|im_start|>assistant\n") if chat else ("", "")
        assert prompt.startswith(begin) and prompt.endswith(end)
        for answer, right in ((f"\\boxed{{{good}}}", True), (f"\\boxed{{{bad}}}", False), (good, False)):
            written = dataset.tokenizer.encode(f"So {answer}") + [dataset.eos_id]
            canvas = np.where(filled, dataset.eos_id, ids)
            canvas[start : start + len(written)] = written
            assert dataset.correct(canvas, ids, filled) is right
    with pytest.raises(ValueError, match="1 problems do not fit into --length 40: the longest needs 52"):
        prepared(math500, math_file, tmp_path / "short", "bytes", "--length", "40")


def test_a_set_for_evaluation_replaces_a_set_for_training(model_folder, math_file, tmp_path):
    write_gsm8k(tmp_path / "in")
    prepared(gsm8k, tmp_path / "in", tmp_path / "out", model_folder, "--pack", "--length", "512")
    prepared(math500, math_file, tmp_path / "out", model_folder)
    assert sorted(p.name for p in (tmp_path / "out").glob("*.npy")) == ["test.npy", "test_response.npy"]


def test_training_on_a_set_for_evaluation_is_one_line(math_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    prepared(math500, math_file, tmp_path / "out", "bytes", "--length", "128")
    monkeypatch.setattr(sys, "argv", ["train.py", f"--data={tmp_path / 'out'}", "--device=cpu"])
    with pytest.raises(ValueError, match="^the data set math500 has no train split, only test$"):
        train.main()


@pytest.mark.parametrize("rows,answers", [
    # as HuggingFaceH4/aime_2024, and as opencompass/AIME2025
    ([{"id": 60, "problem": "p", "solution": "long", "answer": "073", "url": "u", "year": "2024"}], ["073"]),
    ([{"question": "p", "answer": "073"}, {"question": "q", "answer": "5"}], ["073", "5"]),
    ([{"problem": "p", "answer": 73}], ["73"]), ([{"problem": "p", "solution": "so \\boxed{73}"}], ["73"]),
])  # fmt: skip
def test_aime_in_the_shapes_there_are(rows, answers, tmp_path):
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    write_parquet(tmp_path / "parquet" / "train-00000-of-00001.parquet", rows)
    for k, source in enumerate((tmp_path / "in.jsonl", tmp_path / "parquet")):
        dataset = prepared(aime, source, tmp_path / str(k), "bytes", "--length", "64")
        questions = [row.get("problem", row.get("question")) for row in rows]
        texts = [f"{q}\n\\boxed{{{a}}}" for q, a in zip(questions, answers)]
        assert [dataset.show(ids) for ids in dataset.tokens("test")] == texts
    assert same_answer("73", "073")


# ---- sources

def jsonl(*lines):
    return "".join(line + "\n" for line in lines).encode()


@pytest.mark.parametrize("content,words", [
    (jsonl('{"problem": "p", "answer": "1"}', "{"), "line 2: not JSON"),
    (jsonl('{"problem": "p", "answer": "1"}')[:-4], "line 1: not JSON"),
    (b'{"problem": "\xff"}', "line 1: not JSON"), (b"<html>", "line 1: not JSON"),
    (b"[" * 100000, "line 1: not JSON"), (b"[1]", "line 1: expected JSON lines"),
    (jsonl('{"text": "p", "answer": "1"}'), "no column problem or question; it has text, answer"),
    (jsonl("{}"), "it has none"), (jsonl('{"problem": 3, "answer": "1"}'), "row 1: expected text, not 3"),
    (jsonl('{"problem": "p"}'), "row 1: no problem, or no answer"),
    (jsonl('{"problem": null, "answer": "1"}'), "row 1: no problem"), (b"", "nothing is left for test"),
    (None, "No such file"), ("folder", "holds no test.jsonl, and no other"),
])  # fmt: skip
def test_wrong_json_lines(content, words, tmp_path):
    source = tmp_path / "in.jsonl"
    if content == "folder":
        source.mkdir()
    elif content is not None:
        source.write_bytes(content)
    with pytest.raises((ValueError, OSError), match=words) as error:
        prepared(math500, source, tmp_path / "out", "bytes", "--length", "64")
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("rows,words", [
    ([{"text": "p", "generated_solution": "\\boxed{1}"}],
     "no column problem or question; it has text, generated_solution"),
    ([{"a": 1, "b": 2}], "it has a, b"),
    ([{"problem": "p", "generated_solution": 3}], "row 1: expected text, not 3"),
    ([{"problem": "p", "generated_solution": "no box"}], "nothing is left")])  # fmt: skip
def test_wrong_parquet(rows, words, tmp_path):
    write_parquet(tmp_path / "in.parquet", rows)
    with pytest.raises(ValueError, match=words) as error:
        prepared(openmath, tmp_path / "in.parquet", tmp_path / "out", "bytes")
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("damage", [
    lambda raw: raw[: len(raw) // 2], lambda raw: b"", lambda raw: b"hello",
    lambda raw: raw[:100] + bytes(400) + raw[500:],
])  # fmt: skip
def test_damaged_parquet(damage, tmp_path):
    rows = [{"problem": f"p{i}", "generated_solution": "\\boxed{1}" + "x" * (i % 97)} for i in range(500)]
    write_parquet(tmp_path / "in.parquet", rows, compression="zstd")
    (tmp_path / "in.parquet").write_bytes(damage((tmp_path / "in.parquet").read_bytes()))
    with pytest.raises(ValueError, match="in.parquet is damaged") as error:
        prepared(openmath, tmp_path / "in.parquet", tmp_path / "out", "bytes")
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_generations_that_are_no_list(tmp_path):
    row = {"problem": "p", "generations": "text", "correctness_math_verify": [True]}
    write_parquet(tmp_path / "in.parquet", [row])
    with pytest.raises(ValueError, match="row 1: expected lists in generations"):
        prepared(openr1, tmp_path / "in.parquet", tmp_path / "out", "bytes")


@pytest.mark.parametrize("share", ["0", "0.5", "-1"])
def test_wrong_share(share, tmp_path):
    with pytest.raises(ValueError, match="--held"):
        prepared(openmath, tmp_path, tmp_path / "out", "bytes", "--held", share)


def test_without_pyarrow_one_line_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "in.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match=re.escape('pip install -e ".[data]"')) as error:
        prepared(openmath, tmp_path / "in.parquet", tmp_path / "out", "bytes")
    assert "\n" not in str(error.value)


class DatasetRoutes(Routes):
    """The hub of test_hub.py, with its repositories as data sets."""

    def do_GET(self):
        self.path = self.path.replace("/api/datasets/", "/api/models/").replace("/datasets/", "/")
        super().do_GET()

    do_HEAD = do_GET


@pytest.mark.parametrize("task,repo,wanted,options", [
    (openr1, "open-r1/OpenR1-Math-220k", ["data/train-00000-of-00010.parquet"], []),
    (openr1, "open-r1/OpenR1-Math-220k", ["all/train-00000-of-00020.parquet"], ["--subset", "all"]),
    (openmath, "nvidia/OpenMathInstruct-2", ["data/train_1M-00000-of-00003.parquet"], []),
    (math500, "HuggingFaceH4/MATH-500", ["test.jsonl"], []),
    (aime, "HuggingFaceH4/aime_2024", ["data/train-00000-of-00001.parquet"], []),
    (aime, "opencompass/AIME2025", ["aime2025-I.jsonl", "aime2025-II.jsonl"], ["--year", "2025"]),
])  # fmt: skip
def test_download(hub, task, repo, wanted, options, tmp_path):  # noqa: F811
    hub.RequestHandlerClass = DatasetRoutes
    row = {"problem": "p", "question": "p", "answer": "2", "generated_solution": "\\boxed{2}",
           "generations": ["\\boxed{2}"], "correctness_math_verify": [True]}
    rows = [row | {"problem": f"p{i}"} for i in range(100)]
    write_parquet(tmp_path / "rows.parquet", rows)
    raw, lines = (tmp_path / "rows.parquet").read_bytes(), [json.dumps(row) for row in rows]
    files = {name: raw if name.endswith("parquet") else jsonl(*lines, " " * len(name)) for name in wanted}
    others = {"README.md": b"x", "loader.py": b"raise SystemExit", "data/train-1.bin": b"x",
              "extended/train-00000-of-00010.parquet": b"x", "data/train_2M-00000-of-00005.parquet": b"x",
              "data/test-0.pkl": b"x"}
    name = task.__name__.split(".")[1]
    with pytest.raises(FileNotFoundError, match=f"cannot get {repo} from the hub.*--source") as error:
        task.main([*options, "--tokenizer", "bytes", "--out", str(tmp_path / "none")])
    assert "\n" not in str(error.value) and not (tmp_path / "none").exists()
    hub.repos[repo] = {SHA["main"]: others | files}
    held_out = ["--held", "0.1"] if task in (openr1, openmath) else []
    task.main([*options, *held_out, "--tokenizer", "bytes", "--length", "64", "--out", str(tmp_path / "out")])
    assert sorted(hub.fetched) == wanted
    dataset = data.load(tmp_path / "out")
    assert dataset.name == name and dataset.meta["source"] == f"https://huggingface.co/datasets/{repo}"
    assert sum(dataset.meta["splits"].values()) == 100 * len(wanted)
