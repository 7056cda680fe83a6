"""One data set row -> the token ids of its prompt and of its reference response, or of each of its answers.

The prompt equals the input at inference, token for token: the chat template with its generation prompt, or the
plain text. The response is the rest of the rendered conversation up to its end-of-sequence token; `boundary.py` finds
where it begins. The functions are pure and see one row: they count nothing and print nothing (`dataset.py` does).
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from transformers import PreTrainedTokenizerBase

from .boundary import EMPTY_REASONING, answer_start, continuation_ids, end_at_eos, ids_after, rendered_ids
from .conversations import (
    UnusableRow,
    refuse_system_column,
    template_kwargs_of,
    tools_of,
    turns_of,
    with_system_column,
)
from .recorded_scores import scores_of
from .teacher_prompts import DEFAULT_TEMPLATE, teacher_row
from .templates import held_by, make_renderer, missing_from


@dataclass(frozen=True)
class RowRules:
    """
    How rows become ids. Lengths are in tokens; `None` is no limit.

    Attributes:
        max_prompt_length (`int` or `None`): rows whose prompt has more are left out.
        max_response_length (`int` or `None`): reference responses are cut after so many.
        needs_response (`bool`): whether a row without a reference response is an error.
        eos_token_ids (`tuple[int, ...]`): ids that end a response; see [`~skd_trl.data.vocabulary.end_of_sequence_ids`].
        chat_template_kwargs (`dict`): given to the chat template for every row; a row's own column of that name overrides it.
        max_text_length (`int` or `None`): reference responses are cut where prompt and reference together have so many.
        num_ids (`int` or `None`): the number of ids that both models have; rows that hold others, or ids beyond the tokenizer's, are
            errors.
        every_answer (`bool`): makes a conversation of n answers n rows, each answer after what came before it. A last question
            without an answer is a row more where no references are needed.
        reads_response (`bool`): whether anything is computed on reference responses. Where it is not, nothing is noted about them.
        teacher_prompt_template (`str`): how the teacher's prompt is made of a `privileged_context`; see `teacher_prompts.py`.
        max_teacher_prompt_length (`int` or `None`): rows with a longer prompt for the teacher are left out.
        max_teacher_text_length (`int` or `None`): reference responses are cut where that prompt and they have so many together.
        teacher_names (`tuple[str, ...]`): several teachers, one of which each row names in `teacher_id`.
        needs_scores (`bool`): whether a row without a teacher's scores is an error; see `recorded_scores.py`.
    """

    max_prompt_length: int | None
    max_response_length: int | None
    needs_response: bool
    eos_token_ids: tuple[int, ...]
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    max_text_length: int | None = None
    num_ids: int | None = None
    every_answer: bool = False
    reads_response: bool = True
    teacher_prompt_template: str = DEFAULT_TEMPLATE
    max_teacher_prompt_length: int | None = None
    max_teacher_text_length: int | None = None
    teacher_names: tuple[str, ...] = ()
    needs_scores: bool = False
    # `datasets` hashes importable functions by name only: raise this when a row would come out differently, else
    # caches of the older rules are read.
    version: int = 4


# Notes that are about the prompt, and so matter in every run.
NOTES_OF_PROMPTS = ("lost_turn", "lost_tools")
KINDS = {"reasoning": "reasoning", "text": "text", "calls": "calls of tools"}
# Prompt, answer (None: to be sampled), and the note about turns after it that are not used ("" if there are none).
Example = tuple[list[dict], dict | None, str]
# Of one example: adds to the notes it is given, and returns the ids of the prompt, of the response, and of the teacher's prompt if
# it has its own.
Encoder = Callable[[list[str]], tuple[list[int], list[int], list[int]]]
PairEncoder = Callable[[list[str]], tuple[list[int], list[int]]]


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
        `teacher_prompt_ids` (empty where the teacher reads the student's prompt), `problem` (a key of `dataset.PROBLEMS`, empty for a usable row), `detail` (its text) and `notes` (keys of `dataset.NOTES`:
        what was changed in a usable row).
    """
    try:
        encoders = _encoders(row, tokenizer, rules, formatting_func)
    except UnusableRow as problem:
        return [_unusable(problem)]
    results = [_result(encode, rules) for encode in encoders]
    if rules.teacher_names:
        results = [_with_teacher_index(row, result, rules.teacher_names) for result in results]
    if rules.needs_scores:
        results = [_with_scores(row, result, rules, len(results)) for result in results]
    for number, result in enumerate(results, start=1):
        if result["problem"] and len(results) > 1:
            result["detail"] = f"answer {number} of {len(results)}: {result['detail']}"
    return results


def _result(encode: Encoder, rules: RowRules) -> dict[str, Any]:
    notes: list[str] = []
    try:
        prompt_ids, response_ids, teacher_prompt_ids = encode(notes)
        _check(prompt_ids, response_ids, rules)
        _check_ids([*prompt_ids, *response_ids, *teacher_prompt_ids], rules)
    except UnusableRow as problem:
        return _unusable(problem)
    limit = rules.max_response_length
    if limit is not None and len(response_ids) > limit:
        notes.append("cut_response")
        response_ids = response_ids[:limit]
    rooms = [
        longest - len(ids)
        for longest, ids in (
            (rules.max_text_length, prompt_ids),
            (rules.max_teacher_text_length, teacher_prompt_ids or prompt_ids),
        )
        if longest is not None
    ]
    room = min(rooms, default=None)
    if room is not None and len(response_ids) > room:
        notes.append("cut_text")
        response_ids = response_ids[:room]
    if not rules.reads_response:
        notes = [note for note in notes if note in NOTES_OF_PROMPTS]
    elif not response_ids:
        notes.append("to_sample")
    ids = {"prompt_ids": prompt_ids, "response_ids": response_ids, "teacher_prompt_ids": teacher_prompt_ids}
    return {**ids, "problem": "", "detail": "", "notes": notes}


def _with_teacher_index(row: dict[str, Any], result: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    if result["problem"] or row.get("teacher_id") in names:
        return result | {"teacher_index": -1 if result["problem"] else names.index(row["teacher_id"])}
    found = f"its `teacher_id` is {row['teacher_id']!r}" if "teacher_id" in row else "it has no `teacher_id`"
    problem = UnusableRow("unknown_teacher", f"{found}; the teachers are {', '.join(names)}.")
    return _unusable(problem) | {"teacher_index": -1}


def _with_scores(row: dict[str, Any], result: dict[str, Any], rules: RowRules, num_results: int) -> dict[str, Any]:
    try:
        if result["problem"]:
            return result
        if num_results > 1:
            raise UnusableRow(
                "form",
                "it has scores of one response, and several answers. Give one row for each answer, or every_answer=False.",
            )
        return result | scores_of(row, result, rules.num_ids)
    except UnusableRow as problem:
        return _unusable(problem)


def _unusable(problem: UnusableRow) -> dict[str, Any]:
    ids = {"prompt_ids": [], "response_ids": [], "teacher_prompt_ids": []}
    return {**ids, "problem": problem.kind, "detail": str(problem), "notes": []}


def _encoders(row, tokenizer, rules, formatting_func) -> list[Encoder]:
    """One for each example of the row, by the form that the row has."""
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
        given = list(row["prompt_ids"] or []), list(row["response_ids"] or [])
        if "teacher_prompt_ids" in row:
            return [lambda notes: (*given, list(row["teacher_prompt_ids"] or []))]
        return [_with_teacher(lambda notes: given, row, None, tokenizer, rules)]
    if "input_ids" in row:
        examples = _split_tokenized(row, rules)
        _refuse_one_for_several(row, examples)
        encoders = [partial(_cut_tokenized, *example, tokenizer, rules) for example in examples]
        return [_with_teacher(encode, row, None, tokenizer, rules) for encode in encoders]
    if images := {"image", "images"} & row.keys():
        raise UnusableRow("form", f"it has a column {images.pop()!r}. Only text is supported: remove the column.")
    for column in ("messages", "conversations"):
        if column in row:
            turns = with_system_column(row, turns_of(row[column], column))
            return _chat_encoders(row, _examples_of_messages(turns, rules), tokenizer, rules)
    if "prompt" not in row:
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
        return [_with_teacher(encode, row, row["prompt"], tokenizer, rules)]
    if isinstance(row.get("completion"), str) and row["completion"]:
        raise UnusableRow("unreadable", "its prompt is a conversation and its completion is plain text: use one form.")
    prompt = with_system_column(row, turns_of(row["prompt"], "prompt"))
    completion = turns_of(row.get("completion") or None, "completion")
    return _chat_encoders(row, _examples_of_completion(prompt, completion, rules), tokenizer, rules)


def _with_teacher(encode: PairEncoder, row, prompt: str | list[dict] | None, tokenizer, rules: RowRules) -> Encoder:
    """`encode` and what the teacher reads, if that is not the `prompt`."""

    def encode_both(notes: list[str]) -> tuple[list[int], list[int], list[int]]:
        own = encode(notes)
        other = teacher_row(row, prompt, rules.teacher_prompt_template)
        if other is None:
            return *own, []
        try:
            (encode_teacher,) = _encoders(other, tokenizer, replace(rules, needs_response=False), None)
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

    return encode_both


def _refuse_one_for_several(row: dict[str, Any], examples: list) -> None:
    if len(examples) > 1 and row.get("teacher_prompt"):
        raise UnusableRow(
            "unreadable",
            f"it has one `teacher_prompt` for {len(examples)} answers. Give `privileged_context`, which is put into the prompt of "
            "each, or one row for each answer.",
        )


def _check(prompt_ids: list[int], response_ids: list[int], rules: RowRules) -> None:
    if not prompt_ids:
        raise UnusableRow("no_prompt", "its prompt has no tokens.")
    limit = rules.max_prompt_length
    if limit is not None and len(prompt_ids) > limit:
        raise UnusableRow("long_prompt", f"its prompt has {len(prompt_ids)} tokens.")
    if rules.needs_response and not response_ids:
        raise UnusableRow("no_response", "it has no reference response.")


def _check_ids(ids: list[int], rules: RowRules) -> None:
    if rules.num_ids is None or not ids:
        return
    for i in (min(ids), max(ids)):
        if not 0 <= i < rules.num_ids:
            raise UnusableRow("unknown_id", f"it has the id {i}; the last that can be used is {rules.num_ids - 1}.")


def _split_tokenized(row: dict[str, Any], rules: RowRules) -> list[tuple[list[int], list[int]]]:
    """Rows that TRL has tokenized: a run of response positions is a response, what precedes it its prompt. The last run, or all."""
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
    starts = [i for i, bit in enumerate(mask) if bit and (i == 0 or not mask[i - 1])]
    ends = [i + 1 for i, bit in enumerate(mask) if bit and not any(mask[i + 1 : i + 2])]
    runs = list(zip(starts, ends, strict=True)) or [(len(ids), len(ids))]
    return [(ids[:start], ids[start:end]) for start, end in (runs if rules.every_answer else runs[-1:])]


def _cut_tokenized(prompt_ids, response_ids, tokenizer, rules, notes) -> tuple[list[int], list[int]]:
    return prompt_ids, end_at_eos(response_ids, rules.eos_token_ids, tokenizer=tokenizer, notes=notes)


def _encode_text(prompt, completion, tokenizer, rules, notes) -> tuple[list[int], list[int]]:
    for name, text in (("prompt", prompt), ("completion", completion)):
        if text is not None and not isinstance(text, str):
            raise UnusableRow("unreadable", f"its {name} is a {type(text).__name__}, neither text nor a conversation.")
    prompt_ids = _text_ids(prompt, tokenizer)
    if not completion:
        return prompt_ids, []
    full_ids = _text_ids(prompt + completion, tokenizer)
    response_ids = ids_after(prompt_ids, full_ids, completion, tokenizer=tokenizer, notes=notes)
    # As SFTTrainer does for plain text: the student has to learn to stop.
    if not set(response_ids) & set(rules.eos_token_ids):
        eos = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else next(iter(rules.eos_token_ids), None)
        response_ids = response_ids if eos is None else [*response_ids, eos]
    return prompt_ids, end_at_eos(response_ids, rules.eos_token_ids, tokenizer=tokenizer, notes=notes)


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
    encode = partial(_encode_chat, render=render, tool_names=tool_names, tokenizer=tokenizer, rules=rules)
    _refuse_one_for_several(row, examples)
    return [_with_teacher(partial(encode, *example), row, example[0], tokenizer, rules) for example in examples]


def _examples_of_messages(turns: list[dict], rules: RowRules) -> list[Example]:
    """The last turn is the answer if it is the assistant's."""
    is_answered = bool(turns) and turns[-1]["role"] == "assistant"
    if rules.every_answer:
        answers = [i for i, turn in enumerate(turns) if turn["role"] == "assistant" and any(map(held_by, turns[:i]))]
        if examples := _examples_of_answers(turns, answers, rules):
            return examples
    return [(turns[:-1], turns[-1], "")] if is_answered else [(turns, None, "")]


def _examples_of_completion(prompt: list[dict], completion: list[dict], rules: RowRules) -> list[Example]:
    """As above. The prompt stays the one that is given: the answer is the first turn of a completion that has several."""
    if not completion:
        return [(prompt, None, "")]
    if completion[0]["role"] != "assistant":
        raise UnusableRow(
            "unreadable",
            f"its completion begins with a turn of the role {completion[0]['role']!r}, and an answer is the assistant's. Move the "
            "turns before it to the prompt.",
        )
    if not rules.every_answer:
        return [(prompt, completion[0], "several_turns" if len(completion) > 1 else "")]
    answers = [len(prompt) + i for i, turn in enumerate(completion) if turn["role"] == "assistant"]
    return _examples_of_answers([*prompt, *completion], answers, rules)


def _examples_of_answers(turns: list[dict], answers: list[int], rules: RowRules) -> list[Example]:
    """One for each of the turns that are numbered in `answers`, and one for a last question, where a response may be sampled."""
    examples: list[Example] = [(turns[:i], turns[i], "") for i in answers]
    if not answers or turns[-1]["role"] == "assistant":
        return examples
    if rules.needs_response:
        return [*examples[:-1], (*examples[-1][:2], "unanswered")]
    return [*examples, (turns, None, "")]


def _encode_chat(
    prompt, answer, note_on_rest, notes, *, render, tool_names, tokenizer, rules
) -> tuple[list[int], list[int]]:
    if not any(map(held_by, prompt)):
        raise UnusableRow("no_prompt", "its conversation has no turn before the answer.")
    if answer is None and prompt[-1]["role"] == "assistant":  # the start of the answer to come
        return rendered_ids(render(prompt, continue_final_message=True), tokenizer), []

    prompt_text = render(prompt, add_generation_prompt=True)
    prompt_ids = rendered_ids(prompt_text, tokenizer)
    if any(missing_from(prompt_text, held_by(turn)) - {"reasoning"} for turn in prompt):
        notes.append("lost_turn")
    if missing_from(prompt_text, {"tools": tool_names}):
        notes.append("lost_tools")
    if answer is None or not held_by(answer):
        return prompt_ids, []
    full_text = render([*prompt, answer])
    is_prefix = full_text.startswith(prompt_text)
    start = len(prompt_text)
    if not is_prefix:
        start = answer_start(prompt, answer, prompt_text=prompt_text, full_text=full_text, render=render)
    if start is None:
        raise UnusableRow(
            "unreadable",
            "the chat template renders its prompt differently once an answer follows, and the answer cannot be "
            "found in it. Use another chat template.",
        )
    response_text = full_text[start:]
    if not _note_what_is_lost(prompt, answer, full_text, response_text, notes, render=render, rules=rules):
        return prompt_ids, []
    if not is_prefix:
        response_ids = continuation_ids(prompt_ids, response_text, tokenizer=tokenizer)
    else:
        full_ids = rendered_ids(full_text, tokenizer)
        response_ids = ids_after(prompt_ids, full_ids, response_text, tokenizer=tokenizer, notes=notes)
    if "lost_reasoning" not in notes:
        notes += ["not_prefix"] * (not is_prefix)
        notes += ["empty_reasoning"] * bool(EMPTY_REASONING.match(response_text))
    notes += [note_on_rest] if note_on_rest else []
    return prompt_ids, end_at_eos(response_ids, rules.eos_token_ids, tokenizer=tokenizer, notes=notes)


def _note_what_is_lost(prompt, answer, full_text, response_text, notes, *, render, rules) -> bool:
    """Whether anything of the answer is left in what was rendered; what is not, is noted."""
    held = held_by(answer)
    missing = missing_from(response_text, held)
    if missing == held.keys() and any(full_text == _rendered_with(content, prompt, render) for content in ("", None)):
        if rules.needs_response:
            raise UnusableRow(
                "lost_answer",
                f"its answer holds {' and '.join(KINDS[kind] for kind in held)}, and the chat template prints an empty answer.",
            )
        notes.append("lost_answer")
        return False
    notes += [f"lost_{kind}" for kind in held if kind in missing]
    return True


def _rendered_with(content: str | None, prompt: list[dict], render: Callable[..., str]) -> str | None:
    try:
        return render([*prompt, {"role": "assistant", "content": content}])
    except UnusableRow:
        return None
