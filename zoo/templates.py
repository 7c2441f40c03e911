"""Chat templates of the model families, spelled out: a conversation becomes text, tokens, or tokens with the answers marked.

A conversation is a list of {"role": "system" | "user" | "assistant", "content": str}; an assistant's reasoning is either inside its content
as `<think>...</think>` or a third entry "reasoning_content". A template turns it into segments that know who wrote them:
special tokens are made only of what the template wrote, so a user who types `<|im_end|>` sends these characters, not the token.
Text between two special tokens is encoded in one go, as the original does it on the rendered string, except that an answer's first token
always starts where sampling would start it: behind the assistant's header. (The original may merge the header's line feed with line feeds
at the beginning of an answer, a token that no sampler can produce.)

Sources: qwen3 is SDAR's chat_template.jinja and llada the one in LLaDA-8B-Instruct's tokenizer_config.json; qwen2.5 and dream are Qwen2.5's
ChatML with each family's system message; llada2's single turn is inclusionAI's benchmark prompt, and what it does with a system message,
further turns and reasoning is taken from Ling 2.0, whose tokenizer it shares. Tools are not supported.
"""

import functools
import itertools
import re
from collections.abc import Callable
from typing import NamedTuple

from zoo.tokenizer import Tokenizer

ROLES = ("system", "user", "assistant")
NO_THOUGHT = "<think>\n\n</think>\n\n"


class Segment(NamedTuple):
    text: str
    template: bool = True  # written by the template: names of special tokens in it are special tokens
    answer: bool = False  # part of what the assistant says, its end mark included


class Template(NamedTuple):
    segments: Callable[[list[dict], bool, bool], list[Segment]]  # (messages, add_generation_prompt, thinking)
    needs: tuple[str, ...] = ()  # special tokens without which a tokenizer cannot belong to this template
    thinking: bool | None = None  # the default of the switch; None: the template has no switch


def _turn(head: str, content: str, end: str, answer: bool) -> list[Segment]:
    return [Segment(head), Segment(content, False, answer), Segment(end, True, answer)]


def _reasoning(message: dict) -> tuple[str, str]:
    """(reasoning, what is said aloud) of an assistant's message; only the last pair of tags counts, as in Qwen3's template."""
    said = message["content"]
    if message.get("reasoning_content") is not None:
        return message["reasoning_content"], said
    if "</think>" not in said:
        return "", said
    return said.split("</think>")[0].split("<think>")[-1].strip("\n"), said.split("</think>")[-1].lstrip("\n")


def _last_query(messages: list[dict]) -> int:
    """Index of the last user message that is not a tool's response: reasoning before it is left out."""
    asked = [k for k, m in enumerate(messages) if m["role"] == "user"
             and not (m["content"].startswith("<tool_response>") and m["content"].endswith("</tool_response>"))]  # fmt: skip
    return asked[-1] if asked else len(messages) - 1


def _qwen3(messages: list[dict], add_generation_prompt: bool, thinking: bool) -> list[Segment]:
    """ChatML without a default system message. The last answer has its reasoning in front even if empty; thinking=False gives it in the prompt."""
    out, header = [], "<|im_start|>assistant\n"
    for k, message in enumerate(messages):
        last, reasoning, said = k == len(messages) - 1, "", message["content"]
        if message["role"] == "assistant":
            reasoning, said = _reasoning(message)
        if message["role"] == "assistant" and k > _last_query(messages) and (last or reasoning):
            given = not thinking and not reasoning.strip("\n")
            out += [Segment(header), Segment("<think>\n", answer=not given), Segment(reasoning.strip("\n"), False, not given),
                    Segment("\n</think>\n\n", answer=not given), *_turn("", said.lstrip("\n"), "<|im_end|>", True)]  # fmt: skip
        else:
            out += _turn(f"<|im_start|>{message['role']}\n", said, "<|im_end|>", message["role"] == "assistant")
        out.append(Segment("\n"))
    return out + [Segment(header + ("" if thinking else NO_THOUGHT))] * add_generation_prompt


def _chatml(messages: list[dict], add_generation_prompt: bool, thinking: bool, system: str) -> list[Segment]:
    """ChatML with a default system message, reasoning untouched."""
    if messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    out = []
    for m in messages:
        out += [*_turn(f"<|im_start|>{m['role']}\n", m["content"], "<|im_end|>", m["role"] == "assistant"), Segment("\n")]
    return out + [Segment("<|im_start|>assistant\n")] * add_generation_prompt


def _llada(messages: list[dict], add_generation_prompt: bool, thinking: bool) -> list[Segment]:
    """Llama 3's headers, contents stripped. The original always ends in the assistant's header; here it can be left out (for training)."""
    head = "<|start_header_id|>{}<|end_header_id|>\n\n".format
    out = [Segment("<|startoftext|>")]
    for m in messages:
        out += _turn(head(m["role"]), m["content"].strip(), "<|eot_id|>", m["role"] == "assistant")
    return out + [Segment(head("assistant"))] * add_generation_prompt


def _llada2(messages: list[dict], add_generation_prompt: bool, thinking: bool) -> list[Segment]:
    """<role> tags; a first system message shares its turn with the switch `detailed thinking off`."""
    first = messages[0]["role"] == "system"
    out = _turn("<role>SYSTEM</role>", messages[0]["content"] + "\n" if first else "", "detailed thinking off<|role_end|>", False)
    names = {"system": "SYSTEM", "user": "HUMAN", "assistant": "ASSISTANT"}
    for k, message in list(enumerate(messages))[first:]:
        head, said, answer = f"<role>{names[message['role']]}</role>", message["content"], message["role"] == "assistant"
        reasoning, said = _reasoning(message) if answer else ("", said)
        if reasoning and k > _last_query(messages):
            out += [Segment(head), Segment("\n<think>\n", answer=True), Segment(reasoning.strip("\n"), False, True),
                    Segment("\n</think>\n\n", answer=True)]  # fmt: skip
            head, said = "", said.lstrip("\n")
        out += _turn(head, said, "<|role_end|>", answer)
    return out + [Segment("<role>ASSISTANT</role>")] * add_generation_prompt


def _plain(messages: list[dict], add_generation_prompt: bool, thinking: bool) -> list[Segment]:
    """The contents as they are, one after the other: for base models."""
    return [Segment(m["content"], False, m["role"] == "assistant") for m in messages]


CHATML = ("<|im_start|>", "<|im_end|>")
TEMPLATES = {
    "qwen3": Template(_qwen3, CHATML, thinking=True),  # SDAR, TraDo, RCD
    "qwen3-no-thinking": Template(_qwen3, CHATML, thinking=False),  # dllm-hub's Qwen3
    "qwen2.5": Template(functools.partial(_chatml, system="You are Qwen, created by Alibaba Cloud. You are a helpful assistant."), CHATML),
    "dream": Template(functools.partial(_chatml, system="You are a helpful assistant."), CHATML),
    "llada": Template(_llada, ("<|startoftext|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")),
    "llada2": Template(_llada2, ("<|role_end|>",)),
    "plain": Template(_plain),
}


def segments(template: str, messages: list[dict], add_generation_prompt: bool = True, thinking: bool | None = None) -> list[Segment]:
    """The conversation as the template `template` (a name in TEMPLATES) writes it. Raises ValueError for what it cannot write."""
    if template not in TEMPLATES:
        raise ValueError(f"no chat template {template!r}: there are {', '.join(TEMPLATES)}")
    default = TEMPLATES[template].thinking
    if thinking is not None and default is None:
        raise ValueError(f"the chat template {template} has no thinking switch")
    if not messages:
        raise ValueError("the conversation is empty")
    for message in messages:
        texts = [message.get("content"), message.get("reasoning_content") or ""]
        if message.get("role") not in ROLES or not all(isinstance(t, str) for t in texts) or message.keys() - {"role", "content", "reasoning_content"}:
            raise ValueError(f"a message is {{role: {' | '.join(ROLES)}, content: text, reasoning_content: text}}, not {str(message)[:80]}")
    return TEMPLATES[template].segments(messages, add_generation_prompt, default if thinking is None else thinking)


def render(template: str, messages: list[dict], add_generation_prompt: bool = True, thinking: bool | None = None) -> str:
    """The conversation as one string, equal to the family's jinja template. thinking: None leaves the family's default."""
    return "".join(s.text for s in segments(template, messages, add_generation_prompt, thinking))


def encode_answers(tokenizer: Tokenizer, template: str, messages: list[dict], add_generation_prompt: bool = False,
                   thinking: bool | None = None) -> tuple[list[int], list[bool]]:  # fmt: skip
    """Tokens of a conversation for training, and for each of them whether it is an answer's (its reasoning and end mark included).

    What stands before a last answer to a user is exactly what `encode_chat` gives for the messages before it (if thinking is off and the
    answer has reasoning all the same, only up to the header).
    """
    written = segments(template, messages, add_generation_prompt, thinking)
    missing = [name for name in TEMPLATES[template].needs if name not in tokenizer.specials]
    if missing:
        raise ValueError(f"the chat template {template} needs the special token {missing[0]}, which this tokenizer does not have")
    special = re.compile(f"({'|'.join(map(re.escape, sorted(tokenizer.specials, key=len, reverse=True)))})")
    ids, answers = [], []
    for answer, group in itertools.groupby(written, key=lambda segment: segment.answer):
        tokens, text = [], ""
        for segment in group:
            for k, part in enumerate(special.split(segment.text) if segment.template else [segment.text]):
                if k % 2:
                    tokens += [*tokenizer.encode(text), tokenizer.specials[part]]
                    text = ""
                else:
                    text += part
        tokens += tokenizer.encode(text)
        ids += tokens
        answers += [answer] * len(tokens)
    return ids, answers


def encode_chat(tokenizer: Tokenizer, template: str, messages: list[dict], add_generation_prompt: bool = True,
                thinking: bool | None = None) -> list[int]:  # fmt: skip
    """Tokens of a conversation, by default up to where the assistant's answer starts. Raises ValueError if the tokenizer does not fit."""
    return encode_answers(tokenizer, template, messages, add_generation_prompt, thinking)[0]
