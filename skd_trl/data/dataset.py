"""Data set rows -> prompts and reference responses, with every row that cannot be used accounted for.

`tokenization.py` turns one row into ids; this module runs it over a data set and says what happened. A map-style data
set is settled before training starts: rows without a prompt (or without the reference that the run needs) are errors,
rows with a prompt over its limit are left out and counted. A stream cannot be read ahead: its unusable rows are left
out as they come, and the row that follows them carries their number (`skipped_rows`), so that the count is right in
data loader workers, on several ranks and after a resume, wherever the row ends up.
"""

import logging
import os
from collections import Counter
from collections.abc import Callable
from typing import Any

from datasets import Dataset, Features, IterableDataset, Sequence, Value
from transformers import PreTrainedTokenizerBase

from .tokenization import RowRules, tokenize_row


logger = logging.getLogger(__name__)

COLUMNS = {"prompt_ids": Sequence(Value("int32")), "response_ids": Sequence(Value("int32"))}
REPORT_COLUMNS = {"problem": Value("string"), "detail": Value("string"), "notes": Sequence(Value("string"))}

# Why a row is unusable, and what to change. `form` is wrong with the data set as a whole.
PROBLEMS = {
    "form": "cannot be used",
    "no_prompt": "have no prompt, and there is nothing to answer. Fill in or remove these rows",
    "no_response": (
        "have no reference response, and this run trains or evaluates on reference responses. Fill in or remove "
        "these rows, or train on sampled responses only"
    ),
    "unreadable": "cannot be turned into tokens. Change or remove these rows",
    "long_prompt": "have a prompt over max_prompt_length={limits.max_prompt_length} and are left out (a cut prompt is "
    "no longer what its template means). Raise max_prompt_length to keep them",
}
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
    *,
    max_prompt_length: int | None,
    max_response_length: int | None,
    needs_response: bool,
    eos_token_ids: list[int],
    name: str = "train",
    num_proc: int | None = None,
    chat_template_kwargs: dict[str, Any] | None = None,
    formatting_func: Callable[[dict], dict] | None = None,
) -> Dataset | IterableDataset:
    """
    Token ids of the prompts and reference responses of a data set.

    Rows may hold `messages` (the last turn is the reference if it is the assistant's, else the row is a prompt alone),
    `prompt` and `completion` or `prompt` alone (texts or conversations), `conversations` (from/value), or TRL's
    tokenized rows: `input_ids` with `completion_mask` or `labels`. A conversation's own `tools` and
    `chat_template_kwargs` columns are handed to the chat template. `dataset` itself stays as it was.

    Args:
        dataset (`Dataset` or `IterableDataset`):
            The rows.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the student.
        max_prompt_length (`int`, *optional*):
            Rows whose prompt has more tokens are left out.
        max_response_length (`int`, *optional*):
            Reference responses are cut after this many tokens.
        needs_response (`bool`):
            Whether a row without a reference response is an error.
        eos_token_ids (`list[int]`):
            Ids that end a response; see [`~skd_trl.data.vocabulary.end_of_sequence_ids`].
        name (`str`, *optional*, defaults to `"train"`):
            What messages and progress bars call the data set.
        num_proc (`int`, *optional*):
            Number of processes, for map-style data sets.
        chat_template_kwargs (`dict`, *optional*):
            Given to the chat template for every row; a row's own column of that name goes before.
        formatting_func (`Callable`, *optional*):
            Turns a row into one of the forms above, as in `GKDTrainer` ("take in an example and return an example").
            A text, which `SFTTrainer` would take, does not say where the prompt ends and is refused.

    Returns:
        `Dataset` or `IterableDataset`: columns `prompt_ids` and `response_ids` (empty for a prompt alone), and for
        streams `skipped_rows`: how many unusable rows were passed over since the row before.

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
    rules = RowRules(
        max_prompt_length, max_response_length, needs_response, tuple(eos_token_ids), chat_template_kwargs or {}
    )
    arguments = {"tokenizer": tokenizer, "rules": rules, "formatting_func": formatting_func}
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
        tokenize_row,
        fn_kwargs=arguments,
        remove_columns=dataset.column_names,
        features=Features(**COLUMNS, **REPORT_COLUMNS),
        num_proc=num_proc,
        desc=f"Tokenizing {name} dataset",
    )
    usable = _report(tokenized, rules, name)
    tokenized = tokenized.select_columns(list(COLUMNS))
    return tokenized if len(usable) == len(tokenized) else tokenized.select(usable)


def _report(tokenized: Dataset, rules: RowRules, name: str) -> list[int]:
    """Indices of the usable rows. Every rank finds the same and raises the same; only the first one warns."""
    warn = logger.warning if int(os.environ.get("RANK", "0")) == 0 else logger.debug
    rows_by_problem: dict[str, list[int]] = {}
    for row, problem in enumerate(tokenized["problem"][:]):
        rows_by_problem.setdefault(problem, []).append(row)
    usable = rows_by_problem.pop("", [])
    for problem, text in PROBLEMS.items():
        if rows := rows_by_problem.get(problem):
            text = text.format(limits=rules)
            detail = f"row {rows[0]}: {tokenized[rows[0]]['detail']}"
            message = f"{len(rows)} of {len(tokenized)} rows of the {name} data set {text}. {_name(rows)} ({detail})"
            if problem != "long_prompt" or not usable:
                raise ValueError(message if usable else f"{message} No usable row is left.")
            warn(message)

    rows_by_note: dict[str, list[int]] = {}
    for row, notes in enumerate(tokenized["notes"][:]):
        for note in notes:
            rows_by_note.setdefault(note, []).append(row)
    for note, rows in rows_by_note.items():
        text = NOTES[note].format(limits=rules)
        warn(f"In {len(rows)} of {len(tokenized)} rows of the {name} data set {text}. {_name(rows)}")
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
    first = tokenize_row(first_row, **arguments)
    if first["problem"] == "form":
        raise ValueError(f"The {name} data set cannot be used. Row 0: {first['detail']}")
    return dataset.map(
        _StreamTokenizer(arguments, name),
        with_indices=True,
        batched=True,
        batch_size=1,
        remove_columns=dataset.column_names or list(first_row),
        features=Features(**COLUMNS, skipped_rows=Value("int32")),
    )


class _StreamTokenizer:
    """`tokenize_row` for `IterableDataset.map(batched=True, batch_size=1)`: gives one row, or none."""

    def __init__(self, arguments: dict[str, Any], name: str):
        self.arguments = arguments
        self.name = name
        self.num_pending = 0  # unusable rows since the last usable one
        self.counts: Counter[str] = Counter()

    def __call__(self, batch: dict[str, list], indices: list[int]) -> dict[str, list]:
        result = tokenize_row({key: values[0] for key, values in batch.items()}, **self.arguments)
        rules = self.arguments["rules"]
        for note in result["notes"]:
            self._log(note, f"row {indices[0]} of the {self.name} stream: {NOTES[note].format(limits=rules)}")
        if not result["problem"]:
            skipped, self.num_pending = self.num_pending, 0
            return {**{column: [result[column]] for column in COLUMNS}, "skipped_rows": [skipped]}
        self.num_pending += 1
        problem, detail = result["problem"], result["detail"]
        message = f"skipped row {indices[0]} of the {self.name} stream: {detail}"
        if problem == "long_prompt":
            message += f" max_prompt_length is {rules.max_prompt_length}."
        self._log(problem, message)
        if self.num_pending >= MAX_CONSECUTIVE_SKIPS:
            raise ValueError(
                f"The last {self.num_pending} rows of the {self.name} stream were all unusable ({dict(self.counts)} "
                f"so far). The last one: {detail}"
            )
        return {column: [] for column in (*COLUMNS, "skipped_rows")}

    def _log(self, reason: str, message: str) -> None:
        self.counts[reason] += 1
        count = self.counts[reason]
        if count <= 3 or str(count).rstrip("0") == "1":  # the first three, then every power of ten
            logger.warning(f"{message} ({count} rows with this so far)")
