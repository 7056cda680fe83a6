"""Rows for a command: a data set of the hub, a file, a folder of files, or what `save_to_disk` wrote."""

from dataclasses import dataclass, field
from pathlib import Path
from string import Formatter

from datasets import Dataset, DatasetDict, IterableDataset, get_dataset_split_names, load_dataset, load_from_disk

from ..data.dataset import columns_of
from ..data.tokenization import FORMS
from ..training.score import num_missing_files, scored_files
from .row_files import READERS, files_by_split, kind_and_split, read_files


@dataclass
class RowTemplates:
    """Options that make conversations of rows with any columns; see [`from_templates`]."""

    prompt_template: str | None = field(
        default=None,
        metadata={
            "help": "For rows with other columns: what the user says, such as 'Summarize this dialogue: {dialogue}'. A line break is \\n in a "
            "YAML file's double quotes, and in a shell in $'...'."
        },
    )
    completion_template: str | None = field(
        default=None,
        metadata={"help": "The same for the reference answer, such as '{summary}'. Default: prompts alone."},
    )

    def fill(self, rows: Dataset | IterableDataset) -> Dataset | IterableDataset:
        """The rows as conversations, or as they are where no template was given.

        Raises:
            `ValueError`: for rows of a form that is not known, and for templates of other columns.
        """
        if self.prompt_template is None and self.completion_template is None:
            columns = columns_of(rows)
            if not set(columns) & set(FORMS):
                raise ValueError(
                    f"the rows have the columns {', '.join(columns)}, and none of {', '.join(FORMS)}. Say how the texts are made of them, as in "
                    f"--prompt_template '{{question}}' --completion_template '{{answer}}'."
                )
            return rows
        return from_templates(rows, self.prompt_template, self.completion_template)


def load_rows(
    name: str,
    split: str,
    *,
    config: str | None = None,
    num_rows: int = 0,
    seed: int = 0,
    streaming: bool = False,
) -> Dataset | IterableDataset:
    """
    One split of a data set.

    Args:
        name (`str`): a data set of the hub; a `.jsonl`, `.json`, `.parquet` or `.csv` file, compressed or not, which is one split; a
            folder with a file of that kind for each split, such as `train.jsonl`, or with several (`train-00000-of-00002.parquet`);
            or a folder written by `save_to_disk` or `skd score`.
        split (`str`): its name. A file has the one split "train".
        config (`str`, *optional*): configuration of the hub's data set.
        num_rows (`int`): size of a random sample to take (of a stream the first rows); 0 takes all rows.
        seed (`int`): seed of that sample.
        streaming (`bool`): whether rows are read while they are needed.

    Raises:
        `ValueError`: if there is no such data set or split (the message names those there are), or no row in it.
    """
    splits = split_names(name, config)
    if split not in splits:
        raise ValueError(f"{name} has no split {split!r}; it has {', '.join(splits) or 'none'}.")
    path = Path(name)
    if path.is_dir() and (scored := scored_files(path)):
        if missing := num_missing_files(path):
            raise ValueError(
                f"{name} is not scored to its end: {missing} of its files are missing. Give the same `skd score` again; it goes on where it was."
            )
        rows = load_dataset("parquet", data_files=list(map(str, scored)), split="train", streaming=streaming)
    elif path.is_dir() and _is_saved(path):
        saved = load_from_disk(name)
        rows = saved[split] if isinstance(saved, DatasetDict) else saved
        rows = rows.to_iterable_dataset() if streaming else rows
    elif path.is_file() or (path.is_dir() and files_by_split(path)):
        rows = read_files([path] if path.is_file() else files_by_split(path)[split], streaming)
    else:
        rows = load_dataset(name, config, split=split, streaming=streaming)
    if isinstance(rows, IterableDataset):
        return rows.take(num_rows) if num_rows else rows
    if not len(rows):
        raise ValueError(f"the split {split!r} of {name} has no rows.")
    return rows.shuffle(seed=seed).select(range(num_rows)) if 0 < num_rows < len(rows) else rows


def split_names(name: str, config: str | None = None) -> list[str]:
    """The splits of a data set.

    Raises:
        `ValueError`: if there is no such data set.
    """
    path = Path(name)
    if path.is_file():
        kind, _ = kind_and_split(path)
        if kind not in READERS:
            raise ValueError(f"{name} is a {kind or 'nameless'} file; give one of {', '.join(READERS)}.")
        return ["train"]
    if path.is_dir():
        if scored_files(path):
            return ["train"]
        if _is_saved(path):
            saved = load_from_disk(name)
            return [str(split) for split in saved] if isinstance(saved, DatasetDict) else ["train"]
        if files_by_split(path):
            return list(files_by_split(path))
    elif not name or name.startswith((".", "/", "~")) or name.count("/") > 1 or kind_and_split(path)[0] in READERS:
        raise ValueError(f"the data set {name!r} does not exist: there is no such file or folder.")
    try:
        return get_dataset_split_names(name, config)
    except Exception as error:  # whatever a hub, a proxy or a loading script raises
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"the data set {name!r} cannot be read, neither here nor on the hub. {reason}") from error


def _is_saved(folder: Path) -> bool:
    """Whether `save_to_disk` wrote it."""
    return (folder / "dataset_dict.json").exists() or all(
        (folder / name).exists() for name in ("dataset_info.json", "state.json")
    )


def from_templates(
    rows: Dataset | IterableDataset, prompt: str | None, completion: str | None
) -> Dataset | IterableDataset:
    """Rows of any columns as conversations: `prompt` and `completion` are texts in which `{column}` is replaced by the row's value.
    Without `completion` the rows are prompts alone. Where a column that a template names is null, the prompt or the response is empty, whatever
    else the template holds, and the row counts as one without it.

    Raises:
        `ValueError`: for a template that names no column, or one that the rows lack.
    """
    if prompt is None:
        raise ValueError("completion_template needs a prompt_template beside it.")
    columns = columns_of(rows)
    named = {}
    for name, template in (("prompt_template", prompt), ("completion_template", completion)):
        if template is None:
            continue
        try:
            named[template] = [field for _, field, *_ in Formatter().parse(template) if field is not None]
        except ValueError as error:
            raise ValueError(f"{name}={template!r} cannot be read: {error}. Write {{{{ for a brace.") from error
        if missing := [field for field in named[template] if field not in columns]:
            raise ValueError(f"{name} names {missing}, and the rows have the columns {columns}.")
        if not named[template]:
            raise ValueError(f"{name}={template!r} names no column; write one of {columns} in braces.")

    def filled(template: str, row: dict) -> str:
        has_null = any(row[field] is None for field in named[template])
        return "" if has_null else template.format(**row).strip()

    def as_conversation(row: dict) -> dict:
        turns = {"prompt": [{"role": "user", "content": filled(prompt, row)}]}
        if completion is not None:
            turns["completion"] = [{"role": "assistant", "content": filled(completion, row)}]
        return turns

    return rows.map(as_conversation, remove_columns=columns)


def hold_out(rows: Dataset, num_rows: int, seed: int, share: float = 0.1) -> tuple[Dataset, Dataset]:
    """Rows to train on, and a random sample of at most `num_rows` (0: no limit) and a `share` of all that is kept out of them."""
    num_held_out = max(1, min(num_rows or len(rows), int(share * len(rows))))
    if len(rows) < 2:
        raise ValueError("one row alone cannot be trained on and held out; give more rows, or --compare false.")
    parts = rows.train_test_split(test_size=num_held_out, seed=seed)
    return parts["train"], parts["test"]
