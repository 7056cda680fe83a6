"""One data set row -> the token ids of its prompt and of its reference response.

The prompt is what the model is given at inference, to the token: the chat template with its generation prompt, or the
plain text. The response is the rest of the rendered conversation up to its end-of-sequence token; `boundary.py` finds
where it begins. The functions are pure and see one row: they count nothing and print nothing (`dataset.py` does).
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from .boundary import EMPTY_REASONING, answer_start, continuation_ids, end_at_eos, ids_after, rendered_ids


@dataclass(frozen=True)
class RowRules:
    """How rows become ids. Lengths are in tokens; `None` is no limit."""

    max_prompt_length: int | None
    max_response_length: int | None
    needs_response: bool
    eos_token_ids: tuple[int, ...]
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    # `datasets` hashes importable functions by name only: raise this when a row would come out differently, else
    # caches of the older rules are read.
    version: int = 1


class UnusableRow(Exception):
    """A row that cannot be trained on; `kind` is a key of `data.PROBLEMS`."""

    def __init__(self, kind: str, detail: str):
        super().__init__(detail)
        self.kind = kind


def tokenize_row(
    row: dict[str, Any],
    *,
    tokenizer: PreTrainedTokenizerBase,
    rules: RowRules,
    formatting_func: Callable[[dict], dict] | None = None,
) -> dict[str, Any]:
    """
    Ids of one row, or why it has none.

    Returns:
        `dict`: `prompt_ids` and `response_ids` (lists of ids; the response is empty for a prompt-only row), `problem`
        (a key of `data.PROBLEMS`, empty for a usable row), `detail` (its text) and `notes` (keys of `data.NOTES`:
        what was changed in a usable row).
    """
    notes: list[str] = []
    try:
        prompt_ids, response_ids = _encode(row, tokenizer, rules, formatting_func, notes)
        _check(prompt_ids, response_ids, rules)
    except UnusableRow as problem:
        return {"prompt_ids": [], "response_ids": [], "problem": problem.kind, "detail": str(problem), "notes": []}
    limit = rules.max_response_length
    if limit is not None and len(response_ids) > limit:
        notes.append("cut_response")
        response_ids = response_ids[:limit]
    return {"prompt_ids": prompt_ids, "response_ids": response_ids, "problem": "", "detail": "", "notes": notes}


def _encode(row, tokenizer, rules, formatting_func, notes) -> tuple[list[int], list[int]]:
    if formatting_func is not None:
        row = formatting_func(row)
        if not isinstance(row, dict):
            raise UnusableRow(
                "form",
                f"`formatting_func` returned a {type(row).__name__}. Distillation has to know where the prompt ends, "
                "which one text does not say. Return a row with `messages`, with `prompt` and `completion`, or with "
                "`prompt` alone.",
            )
    if {"prompt_ids", "response_ids"} <= row.keys():
        return list(row["prompt_ids"] or []), list(row["response_ids"] or [])
    if "input_ids" in row:
        prompt_ids, response_ids = _split_tokenized(row)
        return prompt_ids, end_at_eos(response_ids, rules.eos_token_ids, tokenizer=tokenizer, notes=notes)
    if images := {"image", "images"} & row.keys():
        raise UnusableRow("form", f"it has a column {images.pop()!r}. Only text is supported: remove the column.")
    if "conversations" in row:
        row = {**row, "messages": [_with_role_and_content(turn) for turn in row["conversations"] or []]}
    if "messages" in row:
        return _encode_chat(row, row["messages"], tokenizer, rules, notes)
    if "prompt" not in row:
        raise UnusableRow(
            "form",
            f"it has the columns {sorted(row)}. Give `messages`, `prompt` and `completion`, `prompt` alone, or "
            "`input_ids` and `completion_mask`; text without a marked prompt has nothing to distill an answer to.",
        )
    if rules.needs_response and "completion" not in row:
        raise UnusableRow(
            "form",
            "it has `prompt` but no `completion`, and this run trains on reference responses. Add a `completion` "
            "column, or train on sampled responses only.",
        )
    if not row["prompt"]:
        raise UnusableRow("no_prompt", "its prompt is missing or empty.")
    if isinstance(row["prompt"], list):
        completion = row.get("completion") or []
        if isinstance(completion, str):
            raise UnusableRow("unreadable", "its prompt is a conversation and its completion is a text: use one form.")
        return _encode_chat(row, [*row["prompt"], *completion], tokenizer, rules, notes, continues=not completion)
    return _encode_text(row["prompt"], row.get("completion"), tokenizer, rules, notes)


def _check(prompt_ids: list[int], response_ids: list[int], rules: RowRules) -> None:
    if not prompt_ids:
        raise UnusableRow("no_prompt", "its prompt has no tokens.")
    limit = rules.max_prompt_length
    if limit is not None and len(prompt_ids) > limit:
        raise UnusableRow("long_prompt", f"its prompt has {len(prompt_ids)} tokens.")
    if rules.needs_response and not response_ids:
        raise UnusableRow("no_response", "it has no reference response.")


def _split_tokenized(row: dict[str, Any]) -> tuple[list[int], list[int]]:
    """Rows that TRL has tokenized: the last run of response positions is the response, what precedes it the prompt."""
    if row.get("completion_mask") is not None:
        mask = [bool(bit) for bit in row["completion_mask"]]
    elif row.get("labels") is not None:
        mask = [label != -100 for label in row["labels"]]
    else:
        raise UnusableRow(
            "form",
            "it has `input_ids` but neither `completion_mask` nor `labels`, so nothing says where the prompt ends. "
            "Add `completion_mask` (0 on the prompt, 1 on the response).",
        )
    ids = list(row["input_ids"] or [])
    if len(mask) != len(ids):
        raise UnusableRow("unreadable", f"its mask has {len(mask)} entries for {len(ids)} tokens.")
    end = max((i + 1 for i, bit in enumerate(mask) if bit), default=len(ids))
    start = end
    while start > 0 and mask[start - 1]:
        start -= 1
    return ids[:start], ids[start:end]


def _encode_text(prompt, completion, tokenizer, rules, notes) -> tuple[list[int], list[int]]:
    for name, text in (("prompt", prompt), ("completion", completion)):
        if text is not None and not isinstance(text, str):
            raise UnusableRow(
                "unreadable", f"its {name} is a {type(text).__name__}, neither a text nor a conversation."
            )
    if not prompt:
        raise UnusableRow("no_prompt", "its prompt is missing or empty.")
    prompt_ids = _text_ids(prompt, tokenizer)
    if not completion:
        return prompt_ids, []
    full_ids = _text_ids(prompt + completion, tokenizer)
    response_ids = ids_after(prompt_ids, full_ids, completion, tokenizer=tokenizer, notes=notes)
    # As SFTTrainer does for plain text, so that the student learns to stop.
    if not set(response_ids) & set(rules.eos_token_ids):
        eos = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else next(iter(rules.eos_token_ids), None)
        response_ids = response_ids if eos is None else [*response_ids, eos]
    return prompt_ids, end_at_eos(response_ids, rules.eos_token_ids, tokenizer=tokenizer, notes=notes)


def _text_ids(text: str, tokenizer) -> list[int]:
    # A text that was rendered elsewhere brings its own bos; the tokenizer would add a second one.
    has_bos = bool(tokenizer.bos_token) and text.startswith(tokenizer.bos_token)
    ids = tokenizer(text, add_special_tokens=not has_bos, verbose=False)["input_ids"]
    # Tokenizers set up with `add_eos_token` close the prompt before the answer.
    if ids and ids[-1] == tokenizer.eos_token_id and not text.endswith(tokenizer.eos_token):
        ids = ids[:-1]
    return list(ids)


def _encode_chat(row, messages, tokenizer, rules, notes, continues=False) -> tuple[list[int], list[int]]:
    """The assistant's last message is the reference; with `continues` it is the start of the answer to come."""
    messages = [_without_none(message) for message in messages or []]
    if not all(isinstance(message, dict) and "role" in message for message in messages):
        raise UnusableRow("unreadable", "its conversation has a turn that is not a dict with `role` and `content`.")
    is_answer = bool(messages) and messages[-1].get("role") == "assistant"
    prompt, answer = (messages[:-1], messages[-1]) if is_answer and not continues else (messages, None)
    if not any(message.get("content") or message.get("tool_calls") for message in prompt):
        raise UnusableRow("no_prompt", "its conversation has no turn before the answer.")
    render = _renderer(row, tokenizer, rules)
    if is_answer and continues:
        return rendered_ids(render(prompt, continue_final_message=True), tokenizer), []

    prompt_text = render(prompt, add_generation_prompt=True)
    prompt_ids = rendered_ids(prompt_text, tokenizer)
    if answer is None or not (answer.get("content") or answer.get("tool_calls")):
        return prompt_ids, []
    full_text = render([*prompt, answer])
    if full_text.startswith(prompt_text):
        full_ids = rendered_ids(full_text, tokenizer)
        response_text = full_text[len(prompt_text) :]
        response_ids = ids_after(prompt_ids, full_ids, response_text, tokenizer=tokenizer, notes=notes)
    else:
        notes.append("not_prefix")
        start = answer_start(prompt, answer, prompt_text=prompt_text, full_text=full_text, render=render)
        if start is None:
            raise UnusableRow(
                "unreadable",
                "the chat template renders its prompt differently once an answer follows, and the answer cannot be "
                "found in it. Use another chat template.",
            )
        response_text = full_text[start:]
        response_ids = continuation_ids(prompt_ids, response_text, tokenizer=tokenizer)
    if EMPTY_REASONING.match(response_text):
        notes.append("empty_reasoning")
    return prompt_ids, end_at_eos(response_ids, rules.eos_token_ids, tokenizer=tokenizer, notes=notes)


def _with_role_and_content(turn: Any) -> Any:
    """A turn with the keys `from` and `value` renamed; any other as it is."""
    names = {"from": "role", "value": "content"}
    return {names.get(key, key): item for key, item in turn.items()} if isinstance(turn, dict) else turn


def _without_none(value: Any) -> Any:
    # Arrow gives every row the keys of all rows, filled with None; templates ask whether a key is there.
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None or key == "content"}
    return [_without_none(item) for item in value] if isinstance(value, list) else value


def _renderer(row, tokenizer, rules) -> Callable[..., str]:
    if tokenizer.chat_template is None:
        raise UnusableRow(
            "form",
            "it is a conversation, and the tokenizer has no chat template. Set `tokenizer.chat_template` (or "
            "`chat_template_path` in the config, to a .jinja file), use the tokenizer of an instruction-tuned model, or give `prompt` "
            "and `completion` as plain texts.",
        )
    try:
        tools = row.get("tools") or None  # some templates print their tool preamble for an empty list
        tools = _without_none(json.loads(tools) if isinstance(tools, str) else tools)
    except ValueError as error:
        raise UnusableRow("unreadable", f"its `tools` are not JSON: {error}") from error
    kwargs = {**rules.chat_template_kwargs, **_without_none(row.get("chat_template_kwargs") or {})}

    def render(messages: list[dict], **mode: bool) -> str:
        try:
            return tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, **{**kwargs, **mode})
        except (jinja2.TemplateError, AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise UnusableRow("unreadable", f"the chat template cannot render it: {error}") from error

    return render
