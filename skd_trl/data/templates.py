"""What a chat template does with a conversation: how it wants its contents, and what of them it leaves out.

Templates differ in what they can print: texts or parts, a null content or the word "None", calls with arguments as a dict or as
JSON text, reasoning of earlier turns. A
template is asked by rendering a mark, once, and its conversations are handed over as it wants them. What a row holds is then
looked for in what was rendered, since a template drops what it does not know without a word.
"""

import itertools
import json
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from .conversations import UnusableRow, as_text


RENDER_ERRORS = (jinja2.TemplateError, AttributeError, IndexError, KeyError, TypeError, ValueError)
# Keys in which data sets keep an answer's reasoning, besides its content.
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
THINK_TAG = re.compile(r"</?think>")
HALVES = ("SKDCONTENT", "MARK")


@dataclass(frozen=True)
class TemplateHabits:
    """`parts`: "needed" where a template prints no text, else "joined": the text is what it would print of the parts, and some
    templates print parts of a tool's turn as Python. `null_as_text`: whether it prints the word "None" for a content that
    is null, or fails on one beside calls. `arguments`: "either" where it prints a dict and its JSON text alike, or neither; "dict" where it prints JSON text once more as
    JSON, fails on it, or has another form for a dict; "text" where it fails on a dict or prints it as Python."""

    parts: str
    null_as_text: bool
    arguments: str


def make_renderer(
    tokenizer: PreTrainedTokenizerBase, tools: list[dict] | None, kwargs: dict[str, Any]
) -> Callable[..., str]:
    """Turns to text, as the tokenizer's chat template prints them. Raises `UnusableRow` where it cannot."""
    if tokenizer.chat_template is None:
        raise UnusableRow(
            "form",
            "it is a conversation, and the tokenizer has no chat template. Set `tokenizer.chat_template` (or "
            "`chat_template_path` in the config, to a .jinja file), use the tokenizer of an instruction-tuned model, or give `prompt` "
            "and `completion` as plain texts.",
        )

    def render(turns: list[dict], **mode: bool) -> str:
        try:
            habits = habits_of(tokenizer, tokenizer.get_chat_template(kwargs.get("chat_template"), tools))
            shaped = [_shaped(turn, habits) for turn in turns]
            return str(tokenizer.apply_chat_template(shaped, tools=tools, tokenize=False, **{**kwargs, **mode}))
        except RENDER_ERRORS as error:
            raise UnusableRow("unreadable", f"the chat template cannot render it: {error}") from error

    return render


@lru_cache(maxsize=16)
def habits_of(tokenizer: PreTrainedTokenizerBase, template: str) -> TemplateHabits:
    def render_turns(turns: list[dict]) -> str:
        try:
            return str(tokenizer.apply_chat_template(turns, chat_template=template, tokenize=False))
        except RENDER_ERRORS:
            return ""

    def render(*contents: str | list[dict] | None) -> str:
        roles = ("user", "assistant") if len(contents) == 2 else ("system", "user", "assistant")
        return render_turns([{"role": role, "content": c} for role, c in zip(roles, contents, strict=True)])

    mark, in_parts = "".join(HALVES), [{"type": "text", "text": half} for half in HALVES]
    parts = "joined"
    for number in (3, 2):  # not every template takes a system turn
        if mark in render(*[mark] * number):
            break
        as_parts = render(*[in_parts] * number)
        if mark in as_parts and "'text'" not in as_parts:
            parts = "needed"
            break
    prints_null = "None" in render(mark, None) and "None" not in render(mark, "")

    # Whether it fails on calls beside a null content, and how it wants their arguments.
    as_dict, rendered = {HALVES[0]: HALVES[1]}, {}
    for content, form in itertools.product(("", None), ("dict", "text")):
        function = {"name": "skd", "arguments": as_dict if form == "dict" else json.dumps(as_dict)}
        calls = [{"id": "skdcall00", "type": "function", "function": function}]
        answer = {"role": "assistant", "content": content, "tool_calls": calls}
        rendered[content, form] = render_turns([{"role": "user", "content": HALVES[1]}, answer])
    fails_on_null = any(rendered["", form] and not rendered[None, form] for form in ("dict", "text"))
    # Some print calls beside a content that is null alone.
    dict_text, text_text = (
        next((text for text in (rendered["", form], rendered[None, form]) if HALVES[0] in text), "")
        for form in ("dict", "text")
    )
    takes_dict = HALVES[0] in dict_text and f"'{HALVES[0]}'" not in dict_text
    takes_text = HALVES[0] in text_text and f'\\"{HALVES[0]}' not in text_text
    arguments = "dict" if takes_dict else "text" if takes_text else "either"
    return TemplateHabits(parts, prints_null or fails_on_null, "either" if dict_text == text_text else arguments)


def _shaped(turn: dict, habits: TemplateHabits) -> dict:
    if turn.get("tool_calls") and habits.arguments != "either":
        calls = []
        for call in turn["tool_calls"]:
            arguments = call["function"].get("arguments")
            if habits.arguments == "text" and isinstance(arguments, dict):
                arguments = json.dumps(arguments, ensure_ascii=False)
            elif habits.arguments == "dict" and isinstance(arguments, str):
                arguments = _parsed(arguments or "{}")
            calls.append({**call, "function": {**call["function"], "arguments": arguments}})
        turn = {**turn, "tool_calls": calls}
    if "content" not in turn:
        return turn
    content = turn["content"]
    if content is None and (habits.null_as_text or not turn.get("tool_calls")):
        content = ""
    if isinstance(content, list) and habits.parts == "joined":
        content = as_text(content)
    if isinstance(content, str) and habits.parts == "needed":
        content = [{"type": "text", "text": content}]
    return {**turn, "content": content}


def _parsed(text: str) -> Any:
    """What JSON text of a dict holds; other text as it is."""
    with suppress(ValueError):
        if isinstance(value := json.loads(text), dict):
            return value
    return text


def held_by(turn: dict) -> dict[str, list[str]]:
    """The texts that a turn holds, by kind: `reasoning`, `text`, `calls`. What is blank is left out."""
    before, _, text = as_text(turn.get("content")).rpartition("</think>")
    reasoning = [before, *(turn[key] for key in REASONING_KEYS if isinstance(turn.get(key), str))]
    calls: list[str] = []
    for call in turn.get("tool_calls") or []:
        function = call.get("function", call) if isinstance(call, dict) else {}
        arguments = function.get("arguments")
        arguments = _parsed(arguments) if isinstance(arguments, str) else arguments
        calls += [str(function.get("name") or ""), *_leaves(arguments)]
    held = {"reasoning": reasoning, "text": [text], "calls": calls}
    held = {kind: [piece for piece in pieces if _squeezed(piece)] for kind, pieces in held.items()}
    return {kind: pieces for kind, pieces in held.items() if pieces}


def _leaves(value: Any) -> Iterator[str]:
    """The texts in a nested value. Numbers are left out: templates write them in several ways."""
    if isinstance(value, str):
        yield value
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _leaves(item)


def missing_from(rendered: str, held: dict[str, list[str]]) -> set[str]:
    """The kinds of which something is not in a rendered text, apart from white space and tags around reasoning."""
    squeezed = _squeezed(rendered)

    def is_in(piece: str) -> bool:
        in_json = (json.dumps(piece, ensure_ascii=is_ascii)[1:-1] for is_ascii in (False, True))
        return any(_squeezed(form) in squeezed for form in (piece, *in_json))

    return {kind for kind, pieces in held.items() if not all(map(is_in, pieces))}


def _squeezed(text: str) -> str:
    return "".join(THINK_TAG.sub("", text).split())
