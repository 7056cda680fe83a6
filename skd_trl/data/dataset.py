"""Data set rows -> prompts and reference responses, with every row that cannot be used accounted for.

`tokenization.py` turns one row into ids; this module runs it over a data set, and `row_reports.py` says what happened. A map-style
data set is settled before training starts: rows without a prompt (or without the reference that the run needs) are errors,
rows with a prompt over its limit are left out and counted. `streams.py` has those that cannot be read ahead.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pyarrow.compute as pc
from datasets import Dataset, Features, IterableDataset, Sequence, Value
from transformers import PreTrainedTokenizerBase

from .recorded_scores import TOKENIZER_COLUMN, has_scores, vocabulary_digest
from .row_reports import report
from .row_rules import RowRules
from .streams import prepare_stream
from .tokenization import tokenize_row


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

    Rows may have different forms, as those of data sets that were concatenated: each is read from the columns that are not null in it. They may
    hold `messages` (the last turn is the reference if it is the assistant's, else the row is a prompt alone),
    `prompt` and `completion` or `prompt` alone (texts or conversations), `conversations` (from/value), or TRL's
    tokenized rows: `input_ids` with `completion_mask`, `assistant_masks` or `labels`. A conversation's own `tools` and
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
        `teacher_prompt_ids` if the rows say that the teacher reads something else (`teacher_prompts.py`; in streams always, empty where it
        does not), and for streams `skipped_rows`: how many unusable rows were passed over since the row before.

    Raises:
        `ValueError`: for a map-style data set if it is empty, if rows have no prompt, no reference where one is
        needed, or cannot be rendered (the rows are named), or if no row is left; for a stream if its first row has
        none of the forms above, and after 1000 unusable rows in a row.
    """
    if not isinstance(dataset, Dataset | IterableDataset):
        raise ValueError(
            f"The {name} data set is of type {type(dataset).__name__}. Give a `datasets.Dataset` or `IterableDataset`: one "
            "split of a DatasetDict, or `Dataset.from_list(rows)`."
        )
    rules = rules.narrowed(tokenizer)
    arguments = {"tokenizer": tokenizer, "rules": rules, "formatting_func": formatting_func}
    if rules.needs_scores:
        _check_scores(dataset, tokenizer, name)
    if isinstance(dataset, IterableDataset):
        return prepare_stream(dataset, COLUMNS | _extra_columns(rules), arguments, name)
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
    usable = report(tokenized, len(dataset), rules, name)
    columns = [*COLUMNS, *_extra_columns(rules)]
    longest = pc.max(pc.list_value_length(tokenized.data.column("teacher_prompt_ids")))  # type: ignore[attr-defined]
    if not longest.as_py():
        columns.remove("teacher_prompt_ids")
    if length_column is not None:
        lengths = [len(p) + len(r) for p, r in zip(tokenized["prompt_ids"], tokenized["response_ids"], strict=True)]
        tokenized = tokenized.add_column(length_column, lengths)
        columns.append(length_column)
    tokenized = tokenized.select_columns(columns)
    return tokenized if len(usable) == len(tokenized) else tokenized.select(usable)


def _extra_columns(rules: RowRules) -> dict[str, Any]:
    """What rows have besides ids: which of several teachers is theirs, and the scores of one that is not there."""
    index = {"teacher_index": Value("int32")} if rules.teacher_names else {}
    return index | (SCORE_COLUMNS if rules.needs_scores else {})


def _check_scores(dataset: Dataset | IterableDataset, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Refuses a data set without scores, or with those of another tokenizer (if it says so)."""
    columns = columns_of(dataset)
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


def columns_of(dataset: Any) -> list[str]:
    """The columns of a data set; of a stream that does not say, those of its first row. None of what is no data set."""
    if isinstance(dataset, IterableDataset):
        return dataset.column_names or list(next(iter(dataset), {}))
    return list(getattr(dataset, "column_names", None) or ())


def has_own_prompts(dataset: Dataset | IterableDataset | None) -> bool:
    """Whether the rows of a prepared data set say what the teacher reads; of a stream the first one tells."""
    if isinstance(dataset, IterableDataset):
        return bool(next(iter(dataset), {}).get("teacher_prompt_ids"))
    return "teacher_prompt_ids" in getattr(dataset, "column_names", ())


def fullest_row(dataset: Dataset | IterableDataset) -> dict[str, Any]:
    """A prepared row that has what any row has: the first with a prompt for the teacher, if there is one; of a stream the first."""
    rows: Iterator[Any] = iter(dataset)
    first = next(rows)
    is_fullest = not isinstance(dataset, Dataset) or not has_own_prompts(dataset) or first["teacher_prompt_ids"]
    return first if is_fullest else next(row for row in rows if row["teacher_prompt_ids"])


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


def _tokenize_rows(batch: dict[str, list], indices: list[int], **arguments: Any) -> dict[str, list]:
    """`tokenize_row` for `Dataset.map(batched=True)`, with the number of the row that each result comes from."""
    results = []
    for i, number in enumerate(indices):
        row = {key: values[i] for key, values in batch.items()}
        results += [{**result, "row": number} for result in tokenize_row(row, **arguments)]
    columns = [*COLUMNS, *_extra_columns(arguments["rules"]), *REPORT_COLUMNS]
    return {column: [result.get(column, ()) for result in results] for column in columns}
