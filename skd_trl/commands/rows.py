"""Rows for a command: a data set of the hub, a file, a folder of files, or what `save_to_disk` wrote."""

import datetime
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from string import Formatter
from typing import Any

import fsspec
import pandas as pd
from datasets import (
    Dataset,
    DatasetDict,
    Features,
    IterableDataset,
    Value,
    get_dataset_split_names,
    load_dataset,
    load_from_disk,
)
from datasets.exceptions import DatasetGenerationError

from ..training.score import num_missing_files, scored_files


READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
# One of several files of a split, as the hub names them.
SHARD = re.compile(r"-\d+-of-(\d+)$")
ABOUT_ROWS = ("dataset_infos.json", "dataset_info.json")  # what lies beside rows, and holds none


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
        """The rows as conversations, or as they are where no template was given."""
        if self.prompt_template is None and self.completion_template is None:
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
    elif path.is_file() or (path.is_dir() and _files(path)):
        files = [path] if path.is_file() else _files(path)[split]
        if empty := [file for file in files if not file.stat().st_size]:
            raise ValueError(f"{empty[0]} has no rows: the file is empty.")
        kind, _ = _kind_and_split(files[0])
        try:
            rows = _read(kind, files, streaming)
        except DatasetGenerationError as error:
            reason = " ".join(str(error.__cause__ or error).split())
            raise ValueError(f"{files[0] if len(files) == 1 else path} cannot be read as {kind}: {reason}") from error
    else:
        rows = load_dataset(name, config, split=split, streaming=streaming)
    if isinstance(rows, IterableDataset):
        return rows.take(num_rows) if num_rows else rows
    if not len(rows):
        raise ValueError(f"the split {split!r} of {name} has no rows.")
    return rows.shuffle(seed=seed).select(range(num_rows)) if 0 < num_rows < len(rows) else rows


def _read(kind: str, files: list[Path], streaming: bool) -> Dataset | IterableDataset:
    """The rows of files of one `kind`. Texts stay as they are in the file: readers that guess types would make 1.0 of a 1 beside an empty
    cell, nothing of the word None, and another text of a date."""
    names, options = list(map(str, files)), {}
    if kind == ".csv":
        columns = pd.read_csv(names[0], nrows=0).columns
        features = Features({column: Value("string") for column in columns})
        options = {"features": features, "keep_default_na": False, "na_values": [""]}
    rows = load_dataset(READERS[kind], data_files=names, split="train", streaming=streaming, **options)
    if READERS[kind] == "json" and _has_times(rows.features if rows.features is not None else next(iter(rows), {})):
        make = IterableDataset.from_generator if streaming else Dataset.from_generator
        return make(_json_rows, gen_kwargs={"files": names})  # type: ignore[return-value]
    return rows


def _has_times(value: Any) -> bool:
    """Whether something in features, or in a row, is a time: in a JSON file it was a string."""
    if isinstance(value, dict):
        return any(map(_has_times, value.values()))
    if isinstance(value, list):
        return any(map(_has_times, value))
    if isinstance(value, Value):
        return value.dtype.startswith(("timestamp", "date", "time"))
    if hasattr(value, "feature"):  # of a list
        return _has_times(value.feature)
    return isinstance(value, datetime.date | datetime.time)


def _json_rows(files: list[str]) -> Iterator[dict]:
    for name in files:
        with fsspec.open(name, "rt", compression="infer", encoding="utf-8") as opened:
            file: Any = opened
            is_one_list = file.read(1) == "["
            file.seek(0)
            yield from json.load(file) if is_one_list else (json.loads(line) for line in file if line.strip())


def split_names(name: str, config: str | None = None) -> list[str]:
    """The splits of a data set.

    Raises:
        `ValueError`: if there is no such data set.
    """
    path = Path(name)
    if path.is_file():
        kind, _ = _kind_and_split(path)
        if kind not in READERS:
            raise ValueError(f"{name} is a {kind or 'nameless'} file; give one of {', '.join(READERS)}.")
        return ["train"]
    if path.is_dir():
        if scored_files(path):
            return ["train"]
        if _is_saved(path):
            saved = load_from_disk(name)
            return [str(split) for split in saved] if isinstance(saved, DatasetDict) else ["train"]
        if _files(path):
            return list(_files(path))
    elif not name or name.startswith((".", "/", "~")) or name.count("/") > 1 or _kind_and_split(path)[0] in READERS:
        raise ValueError(f"the data set {name!r} does not exist: there is no such file or folder.")
    try:
        return get_dataset_split_names(name, config)
    except Exception as error:  # whatever a hub, a proxy or a loading script raises
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"the data set {name!r} cannot be read, neither here nor on the hub. {reason}") from error


def _files(folder: Path) -> dict[str, list[Path]]:
    """A folder's files of rows, by the split that each is named after: one file, or numbered ones of one kind.

    Raises:
        `ValueError`: for a split of which two files say that they are all of it, or of which parts are missing.
    """
    files: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        kind, split = _kind_and_split(path)
        if kind in READERS and path.is_file() and path.name not in ABOUT_ROWS:
            files.setdefault(split, []).append(path)
    for split, of_split in files.items():
        _check_split(folder, split, of_split)
    return files


def _check_split(folder: Path, split: str, files: list[Path]) -> None:
    """Raises `ValueError` unless a split's files are one, or all the parts that their names count."""
    kinds = {_kind_and_split(path)[0] for path in files}
    totals = {int(shard[1]) if (shard := SHARD.search(_uncompressed(path).stem)) else None for path in files}
    if len(kinds) > 1 or len(totals) > 1 or (totals == {None} and len(files) > 1):
        raise ValueError(
            f"{folder} has {' and '.join(path.name for path in files)}: each may be its split {split!r}. Give one file by its name, or "
            "move the others."
        )
    (total,) = totals
    if total is not None and total != len(files):
        raise ValueError(f"{folder} has {len(files)} of the {total} files of its split {split!r}: fetch the others.")


def _kind_and_split(path: Path) -> tuple[str, str]:
    """A file's ending without that of its compression, and the split that it is named after."""
    plain = _uncompressed(path)
    return plain.suffix, SHARD.sub("", plain.stem)


def _uncompressed(path: Path) -> Path:
    return path.with_suffix("") if path.suffix in COMPRESSED else path


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
    columns = rows.column_names or list(next(iter(rows), {}))
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
