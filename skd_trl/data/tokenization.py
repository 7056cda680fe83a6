"""One data set row -> the token ids of its prompt and of its reference response, or of each of its answers.

The prompt equals the input at inference, token for token: the chat template with its generation prompt, or the
plain text. Here is what form a row has, and plain and tokenized ones; `chat_rows.py` has conversations. The functions are pure
and see one row: they count nothing and print nothing (`row_reports.py` does).
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from transformers import PreTrainedTokenizerBase

from .boundary import end_at_eos, ids_after
from .chat_rows import Example, encode_chat, examples_of_completion, examples_of_messages
from .conversations import (
    UnusableRow,
    refuse_system_column,
    template_kwargs_of,
    tools_of,
    turns_of,
    with_system_column,
)
from .recorded_scores import SCORES, scores_of
from .row_rules import RowRules
from .teacher_prompts import teacher_row
from .templates import make_renderer


# Notes that are about the prompt, and so matter in every run.
NOTES_OF_PROMPTS = ("lost_turn", "lost_tools")
# Public data sets' columns of what no text model can read, beside turns that speak of it.
MEDIA_COLUMNS = {"image", "images", "video", "videos", "audio", "audios"}
# The columns by which a row's form is known; earlier ones override later ones.
FORMS = ("prompt_ids", "input_ids", "messages", "conversations", "prompt")
# What a row says beside its example, of itself where `formatting_func` leaves it out.
BESIDE_EXAMPLES = ("teacher_id", *SCORES, "scored_prompt_ids", "scored_response_ids")
# Of one example: adds to the notes it is given, and returns the ids of the prompt, of the response, and of the teacher's prompt if
# it has its own.
Encoder = Callable[[list[str]], tuple[list[int], list[int], list[int]]]
PairEncoder = Callable[[list[str]], tuple[list[int], list[int]]]


def form_of(row: dict[str, Any]) -> str | None:
    """Which column of `FORMS` a row is read from, `None` if it has none. One that is null counts only if all are: data sets of different
    forms, concatenated, give each row the columns of both."""
    found = [column for column in FORMS if column in row and (column != "prompt_ids" or "response_ids" in row)]
    return next((column for column in found if row[column] is not None), found[0] if found else None)


def tokenize_row(
    row: dict[str, Any],
    *,
    tokenizer: PreTrainedTokenizerBase,
    rules: RowRules,
    formatting_func: Callable[[dict], dict] | None = None,
) -> list[dict[str, Any]]:
    """
    Ids of one row, or why it has none: one result, and with `rules.every_answer` one for each answer.

    Returns:
        `list` of `dict`: `prompt_ids` and `response_ids` (lists of ids; the response is empty for a prompt-only row),
        `teacher_prompt_ids` (empty where the teacher reads the student's prompt), `problem` (a key of `row_reports.PROBLEMS`, empty for a usable row), `detail` (its text) and `notes` (keys of `row_reports.NOTES`:
        what was changed in a usable row).
    """
    try:
        row = row if formatting_func is None else _formatted(row, formatting_func)
        encoders = _encoders(row, tokenizer, rules)
        results = [_result(encode, row, rules, len(encoders)) for encode in encoders]
    except UnusableRow as problem:
        results = [_unusable(problem)]
    names, index = rules.teacher_names, -1
    if str(row.get("teacher_id")) in names:  # a name may be a number in a row
        index = names.index(str(row["teacher_id"]))
    elif "prompt_ids" in row and row.get("teacher_index") in range(len(names)):  # a prepared row
        index = row["teacher_index"]
    elif names:
        found = f"its `teacher_id` is {row['teacher_id']!r}" if "teacher_id" in row else "it has no `teacher_id`"
        unknown = UnusableRow("unknown_teacher", f"{found}; the teachers are {', '.join(names)}.")
        results = [result if result["problem"] else _unusable(unknown) for result in results]
    for number, result in enumerate(results, start=1):
        if names:
            result["teacher_index"] = -1 if result["problem"] else index
        if result["problem"] and len(results) > 1:
            result["detail"] = f"answer {number} of {len(results)}: {result['detail']}"
    return results


def _result(encode: Encoder, row: dict[str, Any], rules: RowRules, num_answers: int) -> dict[str, Any]:
    notes: list[str] = []
    try:
        prompt_ids, response_ids, teacher_prompt_ids = encode(notes)
        _check(prompt_ids, response_ids, teacher_prompt_ids, rules)
        limit = rules.max_response_length
        if limit is not None and len(response_ids) > limit:
            notes.append("cut_response")
            response_ids = response_ids[:limit]
        longest = (
            (rules.max_text_length, prompt_ids),
            (rules.max_teacher_text_length, teacher_prompt_ids or prompt_ids),
        )
        room = min((length - len(ids) for length, ids in longest if length is not None), default=None)
        if room is not None and len(response_ids) > room:
            notes.append("cut_text")
            response_ids = response_ids[:room]
        if not rules.reads_response:
            notes = [note for note in notes if note in NOTES_OF_PROMPTS]
        elif not response_ids:
            notes.append("to_sample")
        ids = {"prompt_ids": prompt_ids, "response_ids": response_ids, "teacher_prompt_ids": teacher_prompt_ids}
        result = {**ids, "problem": "", "detail": "", "notes": notes}
        if not rules.needs_scores:
            return result
        if num_answers > 1:
            raise UnusableRow(
                "form",
                "it has scores of one response, and several answers. Give one row for each answer, or every_answer=False.",
            )
        return result | scores_of(row, result, rules.num_ids, rules.eos_token_ids)
    except UnusableRow as problem:
        return _unusable(problem)


def _unusable(problem: UnusableRow) -> dict[str, Any]:
    ids = {"prompt_ids": [], "response_ids": [], "teacher_prompt_ids": []}
    return {**ids, "problem": problem.kind, "detail": str(problem), "notes": []}


def _formatted(row: dict[str, Any], formatting_func: Callable[[dict], dict]) -> dict[str, Any]:
    formatted = formatting_func(row)
    if not isinstance(formatted, dict):
        raise UnusableRow(
            "form",
            f"`formatting_func` returned a {type(formatted).__name__}. Distillation has to know where the prompt ends, "
            "which one text does not say. Return a row with `messages`, with `prompt` and `completion`, or with "
            "`prompt` alone.",
        )
    return {name: row[name] for name in BESIDE_EXAMPLES if name in row} | formatted


def _encoders(row, tokenizer, rules) -> list[Encoder]:
    """One for each example of the row, by the form that the row has."""
    form = form_of(row)
    if form == "prompt_ids":
        given = list(row["prompt_ids"] or []), list(row["response_ids"] or [])
        if "teacher_prompt_ids" in row:
            return [lambda notes: (*given, list(row["teacher_prompt_ids"] or []))]
        return [partial(_with_teacher, lambda notes: given, row, None, tokenizer, rules)]
    if form == "input_ids":
        examples = _split_tokenized(row, rules)
        _refuse_one_for_several(row, examples)
        encoders = [partial(_ended, *example, tokenizer, rules) for example in examples]
        return [partial(_with_teacher, encode, row, None, tokenizer, rules) for encode in encoders]
    if media := sorted(MEDIA_COLUMNS & row.keys()):
        raise UnusableRow("form", f"it has a column {media[0]!r}. Only text is supported: remove the column.")
    if form in ("messages", "conversations"):
        turns = with_system_column(row, turns_of(row[form], form))
        return _chat_encoders(row, examples_of_messages(turns, rules), tokenizer, rules)
    if form is None:
        raise UnusableRow(
            "form",
            f"it has the columns {sorted(row)}. Give `messages`, `prompt` and `completion`, `prompt` alone, or "
            "`input_ids` and `completion_mask`; text without a marked prompt has nothing to distill an answer to.",
        )
    if rules.needs_response and "completion" not in row:
        raise UnusableRow(
            "form",
            "it has `prompt` but no `completion`, and this run trains on reference responses (rollout='dataset', or lmbda below 1). "
            "Add a `completion` column, or train on sampled responses only.",
        )
    if not row["prompt"]:
        raise UnusableRow("no_prompt", "its prompt is missing or empty.")
    if isinstance(row["prompt"], str):
        refuse_system_column(row)
        encode = partial(_encode_text, row["prompt"], row.get("completion"), tokenizer, rules)
        return [partial(_with_teacher, encode, row, row["prompt"], tokenizer, rules)]
    if isinstance(row.get("completion"), str) and row["completion"]:
        raise UnusableRow("unreadable", "its prompt is a conversation and its completion is plain text: use one form.")
    prompt = with_system_column(row, turns_of(row["prompt"], "prompt"))
    completion = turns_of(row.get("completion") or None, "completion")
    return _chat_encoders(row, examples_of_completion(prompt, completion, rules), tokenizer, rules)


def _with_teacher(encode: PairEncoder, row, prompt, tokenizer, rules, notes) -> tuple[list[int], list[int], list[int]]:
    """What `encode` gives and what the teacher reads, if that is not the `prompt`."""
    own = encode(notes)
    other = teacher_row(row, prompt, rules.teacher_prompt_template)
    if other is None:
        return *own, []
    try:
        (encode_teacher,) = _encoders(other, tokenizer, replace(rules, needs_response=False))
        teacher_prompt_ids = encode_teacher([])[0]
    except UnusableRow as problem:
        raise UnusableRow(problem.kind, f"of what its teacher reads: {problem}") from problem
    if not teacher_prompt_ids:
        raise UnusableRow("no_teacher_prompt", "what its teacher reads has no tokens.")
    limit = rules.max_teacher_prompt_length
    if limit is not None and len(teacher_prompt_ids) > limit:
        raise UnusableRow(
            "long_teacher_prompt",
            f"its teacher's prompt has {len(teacher_prompt_ids)} tokens, and there is room for {limit}.",
        )
    return *own, teacher_prompt_ids


def _refuse_one_for_several(row: dict[str, Any], examples: list) -> None:
    if len(examples) > 1 and row.get("teacher_prompt"):
        raise UnusableRow(
            "unreadable",
            f"it has one `teacher_prompt` for {len(examples)} answers. Give `privileged_context`, which is put into the prompt of "
            "each, or one row for each answer.",
        )


def _check(prompt_ids: list[int], response_ids: list[int], teacher_prompt_ids: list[int], rules: RowRules) -> None:
    if not prompt_ids:
        raise UnusableRow("no_prompt", "its prompt has no tokens.")
    limit = rules.max_prompt_length
    if limit is not None and len(prompt_ids) > limit:
        kind = "no_room" if rules.is_limited_by_positions else "long_prompt"
        raise UnusableRow(kind, f"its prompt has {len(prompt_ids)} tokens.")
    if rules.needs_response and not response_ids:
        raise UnusableRow("no_response", "it has no reference response.")
    if rules.num_ids is None:
        return
    ids = [*prompt_ids, *response_ids, *teacher_prompt_ids]
    for i in (min(ids), max(ids)):
        if not 0 <= i < rules.num_ids:
            raise UnusableRow("unknown_id", f"it has the id {i}; the last that can be used is {rules.num_ids - 1}.")


def _split_tokenized(row: dict[str, Any], rules: RowRules) -> list[tuple[list[int], list[int]]]:
    """Rows that TRL has tokenized: a run of response positions is a response, what precedes it its prompt. The last run, or all."""
    masks = [row[name] for name in ("completion_mask", "assistant_masks") if row.get(name) is not None]
    if not masks and row.get("labels") is not None:
        masks = [[label != -100 for label in row["labels"]]]
    if not masks:
        raise UnusableRow(
            "form",
            "it has `input_ids` but none of `completion_mask`, `assistant_masks` and `labels`, so nothing says where the prompt ends. "
            "Add `completion_mask` (0 on the prompt, 1 on the response).",
        )
    ids = list(row["input_ids"] or [])
    for mask in masks:
        if len(mask) != len(ids):
            raise UnusableRow("unreadable", f"its mask has {len(mask)} entries for {len(ids)} tokens.")
    mask = [all(bits) for bits in zip(*masks, strict=True)]  # of two, as TRL reads them: what both count
    starts = [i for i, bit in enumerate(mask) if bit and (i == 0 or not mask[i - 1])]
    ends = [i + 1 for i, bit in enumerate(mask) if bit and not any(mask[i + 1 : i + 2])]
    runs = list(zip(starts, ends, strict=True)) or [(len(ids), len(ids))]
    return [(ids[:start], ids[start:end]) for start, end in (runs if rules.every_answer else runs[-1:])]


def _ended(prompt_ids, response_ids, tokenizer, rules, notes) -> tuple[list[int], list[int]]:
    return prompt_ids, end_at_eos(response_ids, rules.eos_token_ids, tokenizer=tokenizer, notes=notes)


def _encode_text(prompt, completion, tokenizer, rules, notes) -> tuple[list[int], list[int]]:
    for name, text in (("prompt", prompt), ("completion", completion)):
        if text is not None and not isinstance(text, str):
            raise UnusableRow(
                "unreadable", f"its {name} is of type {type(text).__name__}, neither text nor a conversation."
            )
    prompt_ids = _text_ids(prompt, tokenizer)
    if not completion:
        return prompt_ids, []
    full_ids = _text_ids(prompt + completion, tokenizer)
    response_ids = ids_after(prompt_ids, full_ids, completion, tokenizer=tokenizer, notes=notes)
    # As SFTTrainer does for plain text: the student has to learn to stop.
    if not set(response_ids) & set(rules.eos_token_ids):
        eos = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else next(iter(rules.eos_token_ids), None)
        response_ids = response_ids if eos is None else [*response_ids, eos]
    return _ended(prompt_ids, response_ids, tokenizer, rules, notes)


def _text_ids(text: str, tokenizer) -> list[int]:
    # Text that was rendered elsewhere brings its own bos; the tokenizer would add a second one.
    has_bos = bool(tokenizer.bos_token) and text.startswith(tokenizer.bos_token)
    ids = tokenizer(text, add_special_tokens=not has_bos, verbose=False)["input_ids"]
    # Tokenizers set up with `add_eos_token` close the prompt before the answer.
    if ids and ids[-1] == tokenizer.eos_token_id and not text.endswith(tokenizer.eos_token):
        ids = ids[:-1]
    return list(ids)


def _chat_encoders(row, examples: list[Example], tokenizer, rules) -> list[Encoder]:
    tools = tools_of(row)
    render = make_renderer(tokenizer, tools, {**rules.chat_template_kwargs, **template_kwargs_of(row)})
    functions = [tool["function"] if isinstance(tool.get("function"), dict) else tool for tool in tools or []]
    tool_names = [str(function.get("name") or "") for function in functions]
    encode = partial(encode_chat, render=render, tool_names=tool_names, tokenizer=tokenizer, rules=rules)
    _refuse_one_for_several(row, examples)
    return [
        partial(_with_teacher, partial(encode, *example), row, example[0], tokenizer, rules) for example in examples
    ]
