"""Files of rows: which split a folder's files are, and what they hold, with texts as they are in the file."""

import datetime
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pandas as pd
from datasets import Dataset, Features, IterableDataset, Value, load_dataset
from datasets.exceptions import DatasetGenerationError


READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
# One of several files of a split, as the hub names them.
SHARD = re.compile(r"-\d+-of-(\d+)$")
ABOUT_ROWS = ("dataset_infos.json", "dataset_info.json")  # what lies beside rows, and holds none


def read_files(files: list[Path], streaming: bool = False) -> Dataset | IterableDataset:
    """The rows of files of one kind.

    Raises:
        `ValueError`: for a file that is empty or cannot be read.
    """
    if empty := [file for file in files if not file.stat().st_size]:
        raise ValueError(f"{empty[0]} has no rows: the file is empty.")
    kind, _ = kind_and_split(files[0])
    try:
        return _read(kind, files, streaming)
    except DatasetGenerationError as error:
        reason = " ".join(str(error.__cause__ or error).split())
        where = files[0] if len(files) == 1 else files[0].parent
        raise ValueError(f"{where} cannot be read as {kind}: {reason}") from error


def files_by_split(folder: Path) -> dict[str, list[Path]]:
    """A folder's files of rows, by the split that each is named after: one file, or numbered ones of one kind.

    Raises:
        `ValueError`: for a split of which two files say that they are all of it, or of which parts are missing.
    """
    files: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        kind, split = kind_and_split(path)
        if kind in READERS and path.is_file() and path.name not in ABOUT_ROWS:
            files.setdefault(split, []).append(path)
    for split, of_split in files.items():
        _check_split(folder, split, of_split)
    return files


def _check_split(folder: Path, split: str, files: list[Path]) -> None:
    """Raises `ValueError` unless a split's files are one, or all the parts that their names count."""
    kinds = {kind_and_split(path)[0] for path in files}
    totals = {int(shard[1]) if (shard := SHARD.search(_uncompressed(path).stem)) else None for path in files}
    if len(kinds) > 1 or len(totals) > 1 or (totals == {None} and len(files) > 1):
        raise ValueError(
            f"{folder} has {' and '.join(path.name for path in files)}: each may be its split {split!r}. Give one file by its name, or "
            "move the others."
        )
    (total,) = totals
    if total is not None and total != len(files):
        raise ValueError(f"{folder} has {len(files)} of the {total} files of its split {split!r}: fetch the others.")


def kind_and_split(path: Path) -> tuple[str, str]:
    """A file's ending without that of its compression, and the split that it is named after."""
    plain = _uncompressed(path)
    return plain.suffix, SHARD.sub("", plain.stem)


def _uncompressed(path: Path) -> Path:
    return path.with_suffix("") if path.suffix in COMPRESSED else path


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
        # With their times, or datasets would give what it has kept of files that have changed since.
        times = [file.stat().st_mtime_ns for file in files]
        return make(_json_rows, gen_kwargs={"files": names, "times": times})  # type: ignore[return-value]
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


def _json_rows(files: list[str], times: list[int]) -> Iterator[dict]:
    for name in files:
        with fsspec.open(name, "rt", compression="infer", encoding="utf-8") as opened:
            file: Any = opened
            is_one_list = file.read(1) == "["
            file.seek(0)
            yield from json.load(file) if is_one_list else (json.loads(line) for line in file if line.strip())
