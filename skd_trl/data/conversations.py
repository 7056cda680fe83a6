"""The columns of a row -> turns as chat templates know them: `role`, `content`, `tool_calls`.

Public data sets write the same conversation in many ways: `from` and `value` for `role` and `content`, "human" and "gpt" for
"user" and "assistant" (ShareGPT), calls as turns of JSON text (LLaMA-Factory, ms-swift) or under `function_call` (OpenAI's older
form), contents in parts, calls and tools as text, the system prompt in a column. Known forms are translated. What is not known is
never guessed at: it is an `UnusableRow` that says what to change. A role that is not known may be one that the template knows, so
it is kept, but not as the last one, where it decides whether the row holds an answer.
"""

import json
from typing import Any


class UnusableRow(Exception):
    """A row that cannot be trained on; `kind` is a key of `row_reports.PROBLEMS`."""

    def __init__(self, kind: str, detail: str):
        super().__init__(detail)
        self.kind = kind


# Turns whose content is a call, or a list of calls, as JSON text.
CALL_ROLES = ("function_call", "tool_call")
# Where turns keep their calls: a list, one call, or either as JSON text.
CALL_KEYS = ("tool_calls", "function_call")
NAMES_OF_ROLES = {
    "system": ("system",),
    "developer": ("developer",),
    "user": ("user", "human", "prompter"),
    "assistant": ("assistant", "gpt", "chatgpt", "model", "bot", "chatbot", "ai", *CALL_ROLES),
    "tool": ("tool", "observation", "function", "function_response", "tool_response"),
    "ipython": ("ipython",),
}
ROLES = {name: role for role, names in NAMES_OF_ROLES.items() for name in names}
TEXT_TYPES = (None, "text", "input_text", "output_text")
SYSTEM_COLUMNS = ("system", "system_prompt")


# What marks a turn as not to be trained on: OpenAI's, axolotl's, and ms-swift's name for it.
NOT_TRAINED = ("weight", "train", "training", "loss")


def is_answer(turn: dict) -> bool:
    """Whether a turn is an answer of the assistant that may be trained on."""
    return turn["role"] == "assistant" and not any(turn.get(name, True) in (0, False) for name in NOT_TRAINED)


def turns_of(value: Any, column: str) -> list[dict]:
    """The turns of a column, with known roles and with contents that are text, a list of text parts, or None.

    Raises:
        `UnusableRow`: for what is no conversation, and for a turn that a template could not print as text.
    """
    if value is None:
        return []
    if not isinstance(value, list):
        raise UnusableRow(
            "unreadable",
            f"its `{column}` is of type {type(value).__name__}, where a conversation belongs: a list of turns such as "
            '{"role": "user", "content": "..."}. Turn it into one (JSON text: `json.loads`), or give texts as `prompt` and '
            "`completion`.",
        )
    turns = [_turn(without_none(turn), f"turn {number} of its `{column}`") for number, turn in enumerate(value)]
    if turns and turns[-1]["role"] not in NAMES_OF_ROLES:
        raise UnusableRow(
            "unreadable",
            f"the last turn of its `{column}` has the role {turns[-1]['role']!r}, and whether that is an answer is not known. "
            f"Rename it: assistant for an answer, user for a question (known are {', '.join(ROLES)}, in any case).",
        )
    return turns


def _turn(turn: Any, where: str) -> dict:
    if not isinstance(turn, dict):
        raise UnusableRow(
            "unreadable", f"{where} is of type {type(turn).__name__}, not a dict with `role` and `content`."
        )
    turn = {**turn}
    for name, other in (("role", "from"), ("content", "value")):
        if turn.get(name) is None and other in turn:
            turn[name] = turn.pop(other)
    if not isinstance(turn.get("role"), str):
        raise UnusableRow("unreadable", f"{where} has no `role` with text, but the keys {sorted(turn)}.")
    content = turn.get("content")
    if not isinstance(content, str | list | None):
        raise UnusableRow("unreadable", f"{where} has a {type(content).__name__} as content. Turn it into text.")
    if isinstance(content, list):
        parts = [{"type": "text", "text": part} if isinstance(part, str) else part for part in content]
        for part in parts:
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            if not isinstance(part, dict) or kind not in TEXT_TYPES or not isinstance(part.get("text"), str):
                raise UnusableRow(
                    "unreadable",
                    f"{where} holds a part of type {kind!r} without text. Only text is supported: remove the part or the row.",
                )
        content = [{"type": "text", "text": part["text"]} for part in parts] or ""
    name = turn["role"].strip().lower()
    if name in CALL_ROLES:
        return {"role": "assistant", "content": None, "tool_calls": _calls(as_text(content) or "{}", where)}
    calls = [call for key in CALL_KEYS for call in _calls(turn.pop(key, None), where)]
    # Some templates ask whether a key is there.
    if calls:
        turn |= {"content": content, "tool_calls": calls}
    elif "content" in turn:
        turn["content"] = content
    return {**turn, "role": ROLES.get(name, turn["role"])}


def _calls(given: Any, where: str) -> list[dict]:
    calls = given
    if isinstance(given, str):
        try:
            calls = json.loads(given.strip() or "[]")
        except ValueError:
            pass
    if not isinstance(calls, list):
        calls = [calls] if calls or isinstance(calls, dict) else []
    functions = [call.get("function", call) if isinstance(call, dict) else None for call in calls]
    if not all(isinstance(function, dict) and "name" in function for function in functions):
        raise UnusableRow(
            "unreadable",
            f'{where} has a call that is not of the form {{"name": ..., "arguments": ...}}, as a dict or as JSON. Write it so, '
            "as an assistant's turn with `tool_calls`.",
        )
    wrapped = [{"type": "function", "function": {**call, "arguments": call.get("arguments", {})}} for call in calls]
    return [call if "function" in call else wrap for call, wrap in zip(calls, wrapped, strict=True)]


def as_text(content: str | list[dict] | None) -> str:
    """A content as one text: the template's own way with parts is to print them one after the other."""
    return "".join(part["text"] for part in content) if isinstance(content, list) else content or ""


def with_system_column(row: dict[str, Any], turns: list[dict]) -> list[dict]:
    """The turns after the system prompt that a column beside them holds, if one does."""
    for column in SYSTEM_COLUMNS:
        text = row.get(column)
        if not text or not turns:
            continue
        if not isinstance(text, str):
            raise UnusableRow("unreadable", f"its `{column}` is of type {type(text).__name__}. Turn it into text.")
        own = [as_text(turn.get("content")) for turn in turns if turn["role"] in ("system", "developer")]
        if not own:
            turns = [{"role": "system", "content": text}, *turns]
        elif own[0].strip() != text.strip():
            raise UnusableRow(
                "unreadable",
                f"it has a system prompt in `{column}` and another one beside it or in its turns. Remove one of them.",
            )
    return turns


def refuse_system_column(row: dict[str, Any]) -> None:
    """For prompts that are plain texts, in which a system prompt has no place that is known."""
    if found := [column for column in SYSTEM_COLUMNS if row.get(column)]:
        raise UnusableRow(
            "unreadable",
            f"it has a system prompt in `{found[0]}` beside a prompt that is a plain text. Write it into the prompt, make the prompt "
            "a conversation, or remove the column.",
        )


def tools_of(row: dict[str, Any]) -> list[dict] | None:
    """The tools of a row, from a list or its JSON text. `None` for none: some templates print a preamble for an empty list."""
    tools = _from_json(row.get("tools"), "tools")
    functions = _from_json(row.get("functions"), "functions")  # OpenAI's older form
    if functions and not tools:
        functions = functions if isinstance(functions, list) else [functions]
        tools = [{"type": "function", "function": _from_json(function, "functions")} for function in functions]
    if not tools:
        return None
    if isinstance(tools, list):
        tools = [_from_json(tool, "tools") for tool in tools]
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise UnusableRow("unreadable", f"its `tools` are not a list of dicts but {tools!r:.80}. Make them one.")
    return [_with_parameters(tool) for tool in without_none(tools)]


def _with_parameters(tool: dict) -> dict:
    """The tool with the schema of its parameters as a dict, where that is JSON text."""
    if isinstance(tool.get("function"), dict):
        return {**tool, "function": _with_parameters(tool["function"])}
    if not isinstance(tool.get("parameters"), str):
        return tool
    return {**tool, "parameters": _from_json(tool["parameters"], "tools") or {}}


def template_kwargs_of(row: dict[str, Any]) -> dict[str, Any]:
    kwargs = _from_json(row.get("chat_template_kwargs"), "chat_template_kwargs") or {}
    if not isinstance(kwargs, dict):
        raise UnusableRow(
            "unreadable", f"its `chat_template_kwargs` are not a dict but {kwargs!r:.80}. Make them one."
        )
    return without_none(kwargs)


def _from_json(value: Any, column: str) -> Any:
    if not isinstance(value, str) or not value.strip():
        return None if isinstance(value, str) else value
    try:
        return json.loads(value)
    except ValueError as error:
        raise UnusableRow("unreadable", f"its `{column}` are not JSON: {error}") from error


def without_none(value: Any) -> Any:
    # Arrow gives every row the keys of all rows, filled with None; templates ask whether a key is there.
    if isinstance(value, dict):
        return {key: without_none(item) for key, item in value.items() if item is not None or key == "content"}
    return [without_none(item) for item in value] if isinstance(value, list) else value
