"""Chat templates of the model families: a conversation becomes text, tokens, or tokens with marked answers.

A conversation is a list of {"role": "system" | "user" | "assistant", "content": str}. An assistant's
reasoning is inside its content as `<think>...</think>`, or is a third entry "reasoning_content". A template
turns the conversation into segments, and each segment records who wrote it. Only what the template wrote can
become a special token: a user who types `<|im_end|>` sends these characters, not the token.
Text between two special tokens is encoded in one go, as the original does on the rendered string. There is
one exception: an answer's first token starts behind the assistant's header, where sampling would start it.
(The original may merge the header's line feed with line feeds at the beginning of an answer. No sampler can
produce that token.)

Sources: qwen3 is SDAR's chat_template.jinja. llada is the template in LLaDA-8B-Instruct's
tokenizer_config.json. qwen2.5 and dream are Qwen2.5's ChatML with each family's system message. llada2's
single turn is inclusionAI's benchmark prompt; its system message, further turns and reasoning follow Ling
2.0, whose tokenizer it shares. Tools are not supported.
"""

import functools
import itertools
from collections.abc import Callable
from typing import NamedTuple

from zoo.tokenizer import Tokenizer, any_of

ROLES = ("system", "user", "assistant")
NO_THOUGHT = "<think>\n\n</think>\n\n"


class Segment(NamedTuple):
    text: str
    template: bool = True  # written by the template: names of special tokens in it are special tokens
    answer: bool = False  # what the assistant says, its end mark included


class Template(NamedTuple):
    segments: Callable[[list[dict], bool, bool], list[Segment]]  # (messages, add_generation_prompt, thinking)
    needs: tuple[str, ...] = ()  # special tokens without which a tokenizer cannot belong to this template
    thinking: bool | None = None  # the default of the switch; None: the template has no switch


def _turn(head: str, content: str, end: str, answer: bool) -> list[Segment]:
    return [Segment(head), Segment(content, False, answer), Segment(end, True, answer)]


def _reasoning(message: dict) -> tuple[str, str]:
    """(reasoning, reply) of an assistant's message. Only the last pair of tags counts, as in Qwen3."""
    content = message["content"]
    if message.get("reasoning_content") is not None:
        return message["reasoning_content"], content
    if "</think>" not in content:
        return "", content
    reasoning = content.split("</think>")[0].split("<think>")[-1]
    return reasoning.strip("\n"), content.split("</think>")[-1].lstrip("\n")


def _last_query(messages: list[dict]) -> int:
    """Index of the last user message that is not a tool's response: reasoning before it is left out."""
    for k in reversed(range(len(messages))):
        content = messages[k]["content"]
        tool = content.startswith("<tool_response>") and content.endswith("</tool_response>")
        if messages[k]["role"] == "user" and not tool:
            return k
    return len(messages) - 1


def _qwen3(messages: list[dict], add_generation_prompt: bool, thinking: bool) -> list[Segment]:
    """ChatML without a default system message.

    The last answer has its reasoning in front, even an empty one. With thinking=False an empty reasoning
    belongs to the prompt.
    """
    out, header = [], "<|im_start|>assistant\n"
    for k, message in enumerate(messages):
        last, answer = k == len(messages) - 1, message["role"] == "assistant"
        reasoning, reply = _reasoning(message) if answer else ("", message["content"])
        if answer and k > _last_query(messages) and (last or reasoning):
            reasoning = reasoning.strip("\n")
            written = thinking or reasoning != ""  # by the model; else the prompt holds it
            out.append(Segment(header))
            out += [Segment("<think>\n", True, written), Segment(reasoning, False, written)]
            out.append(Segment("\n</think>\n\n", True, written))
            out += _turn("", reply.lstrip("\n"), "<|im_end|>", True)
        else:
            out += _turn(f"<|im_start|>{message['role']}\n", reply, "<|im_end|>", answer)
        out.append(Segment("\n"))
    return out + [Segment(header + ("" if thinking else NO_THOUGHT))] * add_generation_prompt


def _chatml(messages: list[dict], add_generation_prompt: bool, thinking: bool, system: str) -> list[Segment]:
    """ChatML with a default system message. Reasoning stays in the content."""
    if messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    out = []
    for m in messages:
        out += _turn(f"<|im_start|>{m['role']}\n", m["content"], "<|im_end|>", m["role"] == "assistant")
        out.append(Segment("\n"))
    return out + [Segment("<|im_start|>assistant\n")] * add_generation_prompt


def _llada(messages: list[dict], add_generation_prompt: bool, thinking: bool) -> list[Segment]:
    """Llama 3's headers, contents stripped.

    The original always ends in the assistant's header. Here it can be left out, for training.
    """
    head = "<|start_header_id|>{}<|end_header_id|>\n\n".format
    out = [Segment("<|startoftext|>")]
    for m in messages:
        out += _turn(head(m["role"]), m["content"].strip(), "<|eot_id|>", m["role"] == "assistant")
    return out + [Segment(head("assistant"))] * add_generation_prompt


def _llada2(messages: list[dict], add_generation_prompt: bool, thinking: bool) -> list[Segment]:
    """<role> tags. A first system message shares its turn with the switch `detailed thinking off`."""
    first = messages[0]["role"] == "system"
    system = messages[0]["content"] + "\n" if first else ""
    out = _turn("<role>SYSTEM</role>", system, "detailed thinking off<|role_end|>", False)
    names = {"system": "SYSTEM", "user": "HUMAN", "assistant": "ASSISTANT"}
    for k, message in list(enumerate(messages))[first:]:
        head, answer = f"<role>{names[message['role']]}</role>", message["role"] == "assistant"
        reasoning, reply = _reasoning(message) if answer else ("", message["content"])
        if reasoning and k > _last_query(messages):
            out += [Segment(head), Segment("\n<think>\n", True, True)]
            out += [Segment(reasoning.strip("\n"), False, True), Segment("\n</think>\n\n", True, True)]
            head, reply = "", reply.lstrip("\n")
        out += _turn(head, reply, "<|role_end|>", answer)
    return out + [Segment("<role>ASSISTANT</role>")] * add_generation_prompt


def _plain(messages: list[dict], add_generation_prompt: bool, thinking: bool) -> list[Segment]:
    """The contents as they are, one after the other: for base models."""
    return [Segment(m["content"], False, m["role"] == "assistant") for m in messages]


QWEN_SYSTEM = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
DREAM_SYSTEM = "You are a helpful assistant."
CHATML = ("<|im_start|>", "<|im_end|>")
LLAMA3 = ("<|startoftext|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
TEMPLATES = {
    "qwen3": Template(_qwen3, CHATML, thinking=True),  # SDAR, TraDo, RCD
    "qwen3-no-thinking": Template(_qwen3, CHATML, thinking=False),  # dllm-hub's Qwen3
    "qwen2.5": Template(functools.partial(_chatml, system=QWEN_SYSTEM), CHATML),
    "dream": Template(functools.partial(_chatml, system=DREAM_SYSTEM), CHATML),
    "llada": Template(_llada, LLAMA3),
    "llada2": Template(_llada2, ("<|role_end|>",)),
    "plain": Template(_plain),
}


def segments(
    template: str, messages: list[dict], add_generation_prompt: bool = True, thinking: bool | None = None
) -> list[Segment]:
    """The conversation as a template (a name in TEMPLATES) writes it.

    thinking: None leaves the template's default. Raises ValueError for what the template cannot write.
    """
    if template not in TEMPLATES:
        raise ValueError(f"no chat template {template!r}: there are {', '.join(TEMPLATES)}")
    default = TEMPLATES[template].thinking
    if thinking is not None and default is None:
        raise ValueError(f"the chat template {template} has no thinking switch")
    if not messages:
        raise ValueError("the conversation is empty")
    for message in messages:
        texts = [message.get("content"), message.get("reasoning_content") or ""]
        valid = message.get("role") in ROLES and all(isinstance(t, str) for t in texts)
        if not valid or message.keys() - {"role", "content", "reasoning_content"}:
            shape = f"{{role: {' | '.join(ROLES)}, content: text, reasoning_content: text}}"
            raise ValueError(f"a message is {shape}, not {str(message)[:80]}")
    thinking = default if thinking is None else thinking
    return TEMPLATES[template].segments(messages, add_generation_prompt, thinking)


def render(
    template: str, messages: list[dict], add_generation_prompt: bool = True, thinking: bool | None = None
) -> str:
    """The conversation as one string, equal to the family's jinja template. Arguments as in `segments`."""
    return "".join(s.text for s in segments(template, messages, add_generation_prompt, thinking))


def encode_answers(
    tokenizer: Tokenizer,
    template: str,
    messages: list[dict],
    add_generation_prompt: bool = False,
    thinking: bool | None = None,
) -> tuple[list[int], list[bool]]:
    """(tokens, marks) of a conversation, for training. A mark is True for an answer's tokens.

    An answer includes its reasoning and its end mark. The tokens before a last answer to a user are exactly
    what `encode_chat` gives for the messages before it. If thinking is off and the answer has reasoning all
    the same, this holds up to the header only.
    Raises ValueError if the template cannot write the conversation or the tokenizer does not fit.
    """
    written = segments(template, messages, add_generation_prompt, thinking)
    missing = [name for name in TEMPLATES[template].needs if name not in tokenizer.specials]
    if missing:
        lacks = f"the special token {missing[0]}, which this tokenizer does not have"
        raise ValueError(f"the chat template {template} needs {lacks}")
    special = any_of(frozenset(tokenizer.specials))
    ids, marks = [], []
    for answer, group in itertools.groupby(written, key=lambda segment: segment.answer):
        tokens, text = [], ""  # text: read, but not encoded yet
        for segment in group:
            pieces = special.split(segment.text) if segment.template else [segment.text]
            for k, piece in enumerate(pieces):
                if k % 2:
                    tokens += [*tokenizer.encode(text), tokenizer.specials[piece]]
                    text = ""
                else:
                    text += piece
        tokens += tokenizer.encode(text)
        ids += tokens
        marks += [answer] * len(tokens)
    return ids, marks


def encode_chat(
    tokenizer: Tokenizer,
    template: str,
    messages: list[dict],
    add_generation_prompt: bool = True,
    thinking: bool | None = None,
) -> list[int]:
    """The tokens of a conversation, by default up to where the assistant's answer starts.

    Raises ValueError as `encode_answers` does.
    """
    return encode_answers(tokenizer, template, messages, add_generation_prompt, thinking)[0]
