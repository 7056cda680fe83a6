"""Data set rows -> prompts and reference responses, with every row that cannot be used accounted for.

`tokenization.py` turns one row into ids; this module runs it over a data set and says what happened. A map-style data
set is settled before training starts: rows without a prompt (or without the reference that the run needs) are errors,
rows with a prompt over its limit are left out and counted. A stream cannot be read ahead: its unusable rows are left
out as they come, and the row that follows them carries their number (`skipped_rows`). So the count is right in
data loader workers, on several ranks and after a resume, wherever the row ends up.
"""

import logging
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pyarrow.compute as pc
from datasets import Dataset, Features, IterableDataset, Sequence, Value
from transformers import PreTrainedTokenizerBase

from .recorded_scores import TOKENIZER_COLUMN, has_scores, vocabulary_digest
from .teacher_prompts import COLUMNS as TEACHER_COLUMNS
from .tokenization import RowRules, tokenize_row


logger = logging.getLogger(__name__)

COLUMNS = {name: Sequence(Value("int32")) for name in ("prompt_ids", "response_ids", "teacher_prompt_ids")}
SCORE_COLUMNS = {
    "teacher_top_ids": Sequence(Sequence(Value("int32"))),
    "teacher_top_log_probs": Sequence(Sequence(Value("float32"))),
    "teacher_label_log_probs": Sequence(Value("float32")),
}
REPORT_COLUMNS = {
    "row": Value("int64"),
    "problem": Value("string"),
    "detail": Value("string"),
    "notes": Sequence(Value("string")),
}

# Why a row is unusable, and what to change. `form` is wrong with the data set as a whole.
PROBLEMS = {
    "form": "cannot be used",
    "no_prompt": "have no prompt, and there is nothing to answer. Fill in or remove these rows",
    "no_teacher_prompt": (
        "have a column that says what the teacher reads, and nothing in it. Fill in or remove these rows, or remove the column: the "
        "teacher then reads the student's prompt"
    ),
    "no_response": (
        "have no reference response, and this run trains on reference responses (rollout='dataset', or lmbda below 1). Fill in or "
        "remove these rows, or train on sampled responses only"
    ),
    "unknown_teacher": "name none of the teachers in `teacher_id`, so nobody judges them. Fill in or remove these rows",
    "no_scores": (
        "have no scores of a teacher, and this run has no other teacher. Fill in or remove these rows, or give a teacher_model"
    ),
    "bad_scores": "have scores of a teacher that cannot be right. Score them again, or remove these rows",
    "unlike_scores": (
        "have scores of other texts than they would be trained on, so each score would be compared with another token. Score them "
        "again with this tokenizer and chat template, or train with the settings that they were scored with"
    ),
    "unreadable": "cannot be turned into tokens. Change or remove these rows",
    "unknown_id": (
        "hold ids that are no tokens of the tokenizer and both models: ids of another tokenizer, or of tokens that were added to it "
        "and not to the models. Tokenize them with the student's tokenizer, or keep these tokens out of the texts (giving them "
        "embeddings in both models helps only if both were trained on them)"
    ),
    "lost_answer": (
        "have an answer of which the chat template prints nothing (calls for a template without calls, or reasoning that it "
        "strips), so the reference response would be a bare end of turn. Use a chat template that prints it, or remove these rows"
    ),
    "long_prompt": "have a prompt over max_prompt_length={limits.max_prompt_length} and are left out (a cut prompt is "
    "no prompt of its template). Raise max_prompt_length to keep them, or max_length, from which it is taken by default; "
    "the models' positions are a limit too",
    "long_teacher_prompt": "have a prompt for the teacher over its limit and are left out. Raise max_teacher_prompt_length, which "
    "is by default what the teacher's positions leave beside the response, or shorten these rows",
}
# A row with one of these is left out; each other problem is an error.
LEFT_OUT = ("long_prompt", "long_teacher_prompt")
# What was changed in a usable row, and what to do about it.
NOTES = {
    "not_prefix": (
        "the chat template's generation prompt is not how the rendered conversation continues (a template that opens "
        "a reasoning block, for example), so the reference response follows a prompt that it was not written for. "
        'Pass chat_template_kwargs={{"enable_thinking": False}} if the template knows it, put the reasoning into the '
        "references, or use a template that prints both alike"
    ),
    "empty_reasoning": (
        "the chat template puts an empty reasoning block before the reference response, which teaches the student not "
        'to reason where its prompt asks it to. Pass chat_template_kwargs={{"enable_thinking": False}} if that is '
        "what you want (the block then belongs to the prompt), or put the reasoning into the references"
    ),
    "lost_answer": (
        "the chat template prints nothing of the row's answer, so the row has no reference response. Use a chat template that "
        "prints it, if anything is to be trained or evaluated on references"
    ),
    "lost_reasoning": (
        "the chat template leaves the reasoning of the row's answer out of the reference response, which teaches the student "
        "to answer without. Use a chat template that prints it (some are made for training), or remove it from the rows"
    ),
    "lost_calls": (
        "the chat template leaves calls of the row's answer out of the reference response, or parts of them. Use a chat template "
        "that prints them, or remove them from the rows"
    ),
    "lost_text": (
        "the chat template does not print the text of the row's answer as it is given. Look at one of the rows in the "
        "template, and use another one if the text is missing"
    ),
    "lost_turn": (
        "the chat template does not print a turn of the prompt as it is given, so a question, a tool's answer or a system prompt "
        "may be missing. Look at one of the rows in the template, and use another one if it is"
    ),
    "lost_tools": "the chat template does not print the row's tools. Use a chat template that does, or remove the column",
    "several_turns": (
        "the completion has several turns; the first is the reference response and the others are not used. Set "
        "every_answer=True to make each answer a row"
    ),
    "unscored_end": (
        "the end of sequence has no score, so it is left out of the response: nothing teaches the student to stop"
    ),
    "unanswered": (
        "the conversation ends with a question that has no answer; its answers are rows, the question is left out, as this run needs "
        "references. Nothing is to be done, unless an answer was lost"
    ),
    "to_sample": (
        "there is no reference response, so they are evaluated on a response that the student samples (temperature and "
        "student_top_p of the run): the loss there is the divergence on the student's own text, another figure than on references. "
        "Give the two kinds of rows as two evaluation sets to tell them apart"
    ),
    "merged": (
        "tokens merge across the end of the prompt, so the response is tokenized on its own, as the model would write "
        "it. To avoid it, end the prompt on a token boundary, for example by moving its trailing spaces to the "
        "completion"
    ),
    "no_eos": (
        "the reference response holds no end-of-sequence token, so nothing in it teaches the student to stop. Add the "
        "token that closes a turn to `generation_config.eos_token_id` or make it `tokenizer.eos_token`"
    ),
    "early_eos": (
        "the reference response goes on after its first end-of-sequence token; what follows is left out. Remove the "
        "token from the text, or check the models' `generation_config.eos_token_id`"
    ),
    "cut_text": (
        "prompt and reference response have more than {limits.max_text_length} tokens together (max_length, or the positions of a "
        "model), and the reference is cut there, without an end-of-sequence token. Raise max_length, use models with more "
        "positions, or shorten these rows"
    ),
    "cut_response": (
        "the reference response is over max_response_length={limits.max_response_length} and is cut there, without an "
        "end-of-sequence token. Raise max_response_length to keep it whole"
    ),
}
# A stream of nothing but unusable rows must not look like a run that hangs.
MAX_CONSECUTIVE_SKIPS = 1000


def prepare_dataset(
    dataset: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    rules: RowRules,
    *,
    name: str = "train",
    num_proc: int | None = None,
    formatting_func: Callable[[dict], dict] | None = None,
    length_column: str | None = None,
) -> Dataset | IterableDataset:
    """
    Token ids of the prompts and reference responses of a data set.

    Rows may hold `messages` (the last turn is the reference if it is the assistant's, else the row is a prompt alone),
    `prompt` and `completion` or `prompt` alone (texts or conversations), `conversations` (from/value), or TRL's
    tokenized rows: `input_ids` with `completion_mask` or `labels`. A conversation's own `tools` and
    `chat_template_kwargs` columns (lists and dicts, or their JSON text) are handed to the chat template, and the text of a `system`
    or `system_prompt` column is put before its turns. Roles and contents of other data sets are translated
    (`conversations.py`). A conversation of several answers is one row, of its last; of several in a `completion`, of the first,
    since the prompt is the one that is given. `dataset` itself stays as it was.

    Args:
        dataset (`Dataset` or `IterableDataset`):
            The rows.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the student.
        rules ([`RowRules`]):
            Limits, and what is asked of a row.
        name (`str`, *optional*, defaults to `"train"`):
            What messages and progress bars call the data set.
        num_proc (`int`, *optional*):
            Number of processes, for map-style data sets.
        formatting_func (`Callable`, *optional*):
            Turns a row into one of the forms above, as in `GKDTrainer` ("take in an example and return an example").
            Plain text, which `SFTTrainer` would take, does not say where the prompt ends and is refused.
        length_column (`str`, *optional*):
            A column more, of the tokens of prompt and reference, for samplers that group rows by length. Not of streams.

    Returns:
        `Dataset` or `IterableDataset`: columns `prompt_ids` and `response_ids` (empty for a prompt alone),
        `teacher_prompt_ids` if the rows say that the teacher reads something else (`teacher_prompts.py`), and for streams `skipped_rows`: how many unusable rows were passed over since the row before.

    Raises:
        `ValueError`: for a map-style data set if it is empty, if rows have no prompt, no reference where one is
        needed, or cannot be rendered (the rows are named), or if no row is left; for a stream if its first row has
        none of the forms above, and after 1000 unusable rows in a row.
    """
    if not isinstance(dataset, Dataset | IterableDataset):
        raise ValueError(
            f"The {name} data set is a {type(dataset).__name__}. Give a `datasets.Dataset` or `IterableDataset`: one "
            "split of a DatasetDict, or `Dataset.from_list(rows)`."
        )
    rules = _narrowed(rules, tokenizer)
    arguments = {"tokenizer": tokenizer, "rules": rules, "formatting_func": formatting_func}
    if rules.needs_scores:
        _check_scores(dataset, tokenizer, name)
    if isinstance(dataset, IterableDataset):
        return _prepare_stream(dataset, arguments, name)
    if dataset.format["type"] == "custom":
        raise ValueError(
            f"The {name} data set uses `with_transform`, whose output may differ at every reading, and the token ids "
            "are computed once. Apply the transform with `Dataset.map` first."
        )
    if len(dataset) == 0:
        raise ValueError(f"The {name} data set is empty: give at least one row.")
    tokenized = dataset.with_format(None).map(
        _tokenize_rows,
        fn_kwargs=arguments,
        with_indices=True,
        batched=True,
        remove_columns=dataset.column_names,
        features=Features(**COLUMNS, **_extra_columns(rules), **REPORT_COLUMNS),
        num_proc=num_proc,
        desc=f"Tokenizing {name} dataset",
    )
    usable = _report(tokenized, len(dataset), rules, name)
    if length_column is not None:
        lengths = [len(p) + len(r) for p, r in zip(tokenized["prompt_ids"], tokenized["response_ids"], strict=True)]
        tokenized = tokenized.add_column(length_column, lengths)
    columns = [name for name in COLUMNS if name != "teacher_prompt_ids" or _longest(tokenized, name) > 0]
    columns += _extra_columns(rules)
    tokenized = tokenized.select_columns([*columns, *([length_column] if length_column else [])])
    return tokenized if len(usable) == len(tokenized) else tokenized.select(usable)


def _extra_columns(rules: RowRules) -> dict[str, Any]:
    """What rows have besides ids: which of several teachers is theirs, and the scores of one that is not there."""
    index = {"teacher_index": Value("int32")} if rules.teacher_names else {}
    return index | (SCORE_COLUMNS if rules.needs_scores else {})


def _check_scores(dataset: Dataset | IterableDataset, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Refuses a data set without scores, or with those of another tokenizer (if it says so)."""
    columns = dataset.column_names or list(next(iter(dataset), {}))
    if not has_scores(columns):
        raise ValueError(
            f"The {name} data set has no scores of a teacher (`teacher_top_ids` and others), and there is no teacher. Score it "
            "(`python -m skd_trl score`), or give a teacher_model."
        )
    if TOKENIZER_COLUMN in columns:
        is_map = isinstance(dataset, Dataset)
        found = dataset.unique(TOKENIZER_COLUMN) if is_map else [next(iter(dataset))[TOKENIZER_COLUMN]]
        if found and set(found) != {vocabulary_digest(tokenizer)}:
            raise ValueError(
                f"The {name} data set was scored with another tokenizer ({', '.join(map(str, found))}; the student's is "
                f"{vocabulary_digest(tokenizer)}), whose ids are other tokens. Use a teacher and a student of one tokenizer."
            )


def num_scored_tokens(dataset: Dataset | IterableDataset, name: str) -> int:
    """How many tokens a prepared data set knows at each position (k), of a stream in its first row.

    Raises:
        `ValueError`: if rows know different numbers of them.
    """
    if not isinstance(dataset, Dataset):
        return max(map(len, next(iter(dataset))["teacher_top_ids"]), default=1)
    column = dataset.with_format("arrow")[:]["teacher_top_ids"] if len(dataset) else None
    lengths = pc.unique(pc.list_value_length(pc.list_flatten(column))).to_pylist()  # type: ignore[attr-defined]
    if len(lengths) != 1:
        raise ValueError(
            f"Rows of the {name} data set have scores of {sorted(lengths)} tokens at a position, and the loss needs one number for "
            "all. Cut them to the smallest."
        )
    return lengths[0]


def _longest(dataset: Dataset, column: str) -> int:
    return pc.max(pc.list_value_length(dataset.data.column(column))).as_py() or 0  # type: ignore[attr-defined]


def _narrowed(rules: RowRules, tokenizer: PreTrainedTokenizerBase) -> RowRules:
    """The rules with a prompt limit that leaves room for a token of the response, and without ids that are no tokens."""
    longest, num_ids = rules.max_prompt_length, rules.num_ids
    if rules.max_text_length is not None:
        longest = min(longest or rules.max_text_length, rules.max_text_length - 1)
    if num_ids is not None:
        num_ids = min(num_ids, max(tokenizer.get_vocab().values()) + 1)
    return replace(rules, max_prompt_length=longest, num_ids=num_ids)


def _tokenize_rows(batch: dict[str, list], indices: list[int], **arguments: Any) -> dict[str, list]:
    """`tokenize_row` for `Dataset.map(batched=True)`, with the number of the row that each result comes from."""
    results = []
    for i, number in enumerate(indices):
        row = {key: values[i] for key, values in batch.items()}
        results += [{**result, "row": number} for result in tokenize_row(row, **arguments)]
    columns = [*COLUMNS, *_extra_columns(arguments["rules"]), *REPORT_COLUMNS]
    return {column: [result.get(column, ()) for result in results] for column in columns}


def _report(tokenized: Dataset, num_rows: int, rules: RowRules, name: str) -> list[int]:
    """Indices of the usable results. Every rank finds the same and raises the same; only the first one warns."""
    warn = logger.warning if int(os.environ.get("RANK", "0")) == 0 else logger.debug
    rows = tokenized["row"][:]
    by_problem: dict[str, list[int]] = {}
    for index, problem in enumerate(tokenized["problem"][:]):
        by_problem.setdefault(problem, []).append(index)
    usable = by_problem.pop("", [])
    for problem, text in PROBLEMS.items():
        if found := by_problem.get(problem):
            named = list(dict.fromkeys(rows[index] for index in found))
            text = text.format(limits=rules)
            detail = f"row {named[0]}: {tokenized[found[0]]['detail']}"
            message = f"{len(named)} of {num_rows} rows of the {name} data set {text}. {_name(named)} ({detail})"
            if problem not in LEFT_OUT or not usable:
                raise ValueError(message if usable else f"{message} No usable row is left.")
            warn(message)
    if rules.every_answer:
        warn(f"every_answer: the {num_rows} rows of the {name} data set hold {len(rows)} answers, each a row.")

    by_note: dict[str, list[int]] = {}
    for row, notes in zip(rows, tokenized["notes"][:], strict=True):
        for note in notes:
            by_note.setdefault(note, []).append(row)
    for note, found in by_note.items():
        named = list(dict.fromkeys(found))
        text = NOTES[note].format(limits=rules)
        warn(f"In {len(named)} of {num_rows} rows of the {name} data set {text}. {_name(named)}")
    return usable


def _name(rows: list[int], num_named: int = 5) -> str:
    named = ", ".join(map(str, rows[:num_named]))
    rest = f" and {len(rows) - num_named} more" if len(rows) > num_named else ""
    return f"Row{'s' if len(rows) > 1 else ''} {named}{rest}."


def _prepare_stream(dataset: IterableDataset, arguments: dict[str, Any], name: str) -> IterableDataset:
    dataset = dataset.with_format(None)
    first_row = next(iter(dataset), None)
    if first_row is None:
        raise ValueError(f"The {name} data set is empty: give at least one row.")
    first = tokenize_row(first_row, **arguments)[0]
    if first["problem"] == "form":
        raise ValueError(f"The {name} data set cannot be used. Row 0: {first['detail']}")
    teachers = any(column in (dataset.column_names or first_row) for column in TEACHER_COLUMNS)
    columns = {key: value for key, value in COLUMNS.items() if key != "teacher_prompt_ids" or teachers}
    columns |= _extra_columns(arguments["rules"])
    return dataset.map(
        _StreamTokenizer(arguments, name, list(columns)),
        with_indices=True,
        batched=True,
        batch_size=1,
        remove_columns=dataset.column_names or list(first_row),
        features=Features(**columns, skipped_rows=Value("int32")),
    )


class _StreamTokenizer:
    """`tokenize_row` for `IterableDataset.map(batched=True, batch_size=1)`: gives the usable ones of its results."""

    def __init__(self, arguments: dict[str, Any], name: str, columns: list[str]):
        self.arguments, self.columns = arguments, columns
        self.name = name
        self.num_pending = 0  # unusable rows since the last usable one
        self.counts: Counter[str] = Counter()

    def __call__(self, batch: dict[str, list], indices: list[int]) -> dict[str, list]:
        row = {key: values[0] for key, values in batch.items()}
        usable = [result for result in tokenize_row(row, **self.arguments) if self._is_usable(result, indices[0])]
        columns: dict[str, list] = {column: [result[column] for result in usable] for column in self.columns}
        return columns | {"skipped_rows": [result["skipped_rows"] for result in usable]}

    def _is_usable(self, result: dict[str, Any], row: int) -> bool:
        """Logs what is to be said of a result. A usable one is given the number of those that were not since the one before."""
        rules = self.arguments["rules"]
        for note in result["notes"]:
            self._log(note, f"row {row} of the {self.name} stream: {NOTES[note].format(limits=rules)}")
        if not result["problem"]:
            result["skipped_rows"], self.num_pending = self.num_pending, 0
            return True
        self.num_pending += 1
        problem, detail = result["problem"], result["detail"]
        message = f"skipped row {row} of the {self.name} stream: {detail}"
        if problem == "long_prompt":
            message += f" max_prompt_length is {rules.max_prompt_length}."
        self._log(problem, message)
        if self.num_pending >= MAX_CONSECUTIVE_SKIPS:
            raise ValueError(
                f"The last {self.num_pending} rows of the {self.name} stream were all unusable ({dict(self.counts)} "
                f"so far). The last one: {detail}"
            )
        return False

    def _log(self, reason: str, message: str) -> None:
        self.counts[reason] += 1
        count = self.counts[reason]
        if count <= 3 or str(count).rstrip("0") == "1":  # the first three, then every power of ten
            logger.warning(f"{message} ({count} rows with this so far)")
