"""A stream of rows -> a stream of ids. It cannot be read ahead: unusable rows are left out as they come, and the row that follows them
carries their number (`skipped_rows`). So the count is right in data loader workers, on several ranks and after a resume. Several
processes read all of it and take its rows in turn.
"""

import logging
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from datasets import Features, IterableDataset, Value

from .batches import FILLS_UP, Key
from .row_reports import NOTES
from .tokenization import tokenize_row


logger = logging.getLogger(__name__)

# A stream of nothing but unusable rows must not look like a run that hangs.
MAX_CONSECUTIVE_SKIPS = 1000


def prepare_stream(
    dataset: IterableDataset, columns: dict[str, Any], arguments: dict[str, Any], name: str
) -> IterableDataset:
    """`columns` of ids and what else rows have, with the `arguments` of [`~skd_trl.data.tokenization.tokenize_row`].

    Raises:
        `ValueError`: if it is empty, if its first row has no form that is known, or if no row can be used; and after 1000 unusable rows in
            a row.
    """
    dataset = dataset.with_format(None)
    first_row = next(iter(dataset), None)
    if first_row is None:
        raise ValueError(f"The {name} data set is empty: give at least one row.")
    _check_first_rows(dataset, arguments, name)
    return dataset.map(
        _StreamTokenizer(arguments, name, list(columns)),
        with_indices=True,
        batched=True,
        batch_size=1,
        remove_columns=dataset.column_names or list(first_row),
        features=Features(**columns, skipped_rows=Value("int32")),
    )


def _check_first_rows(dataset: IterableDataset, arguments: dict[str, Any], name: str) -> None:
    """Reads up to the first row that can be used."""
    problems: Counter[str] = Counter()
    for number, row in enumerate(dataset):
        results = tokenize_row(row, **arguments)
        if not all(result["problem"] for result in results):
            return
        problems.update(result["problem"] for result in results)
        detail = results[-1]["detail"]
        if number == 0 and results[0]["problem"] == "form":
            raise ValueError(f"The {name} data set cannot be used. Row 0: {detail}")
        if number + 1 >= MAX_CONSECUTIVE_SKIPS:
            break
    counts = ", ".join(f"{count} {problem}" for problem, count in problems.items())
    limit = f" max_prompt_length is {arguments['rules'].max_prompt_length}." if "long_prompt" in problems else ""
    raise ValueError(
        f"None of the first {number + 1} rows of the {name} stream can be used ({counts}). The last one: {detail}{limit}"
    )


class DealtStream(torch.utils.data.IterableDataset):
    """A stream for several processes, of whose rows accelerate gives each process the next in turn. Of a stream in several shards it would
    give each process other shards: where these are not of equal length, one process has a batch more than the others, and waits.

    Args:
        stream (`IterableDataset`): prepared.
        multiple (`int`, *optional*): its last row is repeated, as one that `FILLS_UP`, until the number of rows is a multiple of this: those of
            one batch on all processes. By default accelerate fills a last batch up with the first rows.
    """

    def __init__(self, stream: IterableDataset, multiple: int = 1):
        self.stream, self.multiple = stream, multiple

    def __iter__(self) -> Iterator[dict[str, Any]]:
        num_rows, row = 0, {}
        for row in self.stream:
            num_rows += 1
            yield row
        for _ in range(-num_rows % self.multiple):
            yield {**row, Key.SKIPPED_ROWS: FILLS_UP}

    def set_epoch(self, epoch: int) -> None:
        self.stream.set_epoch(epoch)


class _StreamTokenizer:
    """`tokenize_row` for `IterableDataset.map(batched=True, batch_size=1)`: gives the usable ones of its results."""

    def __init__(self, arguments: dict[str, Any], name: str, columns: list[str]):
        self.arguments, self.columns = arguments, columns
        self.name = name
        self.num_pending = 0  # unusable rows since the last usable one
        self.counts: Counter[str] = Counter()

    def __call__(self, batch: dict[str, list], indices: list[int]) -> dict[str, list]:
        """Logs what is to be said of the results. A usable one is given the number of those that were not since the one before."""
        row, rules = {key: values[0] for key, values in batch.items()}, self.arguments["rules"]
        where, usable = f"row {indices[0]} of the {self.name} stream", []
        for result in tokenize_row(row, **self.arguments):
            for note in result["notes"]:
                self._log(note, f"{where}: {NOTES[note].format(limits=rules)}")
            problem, detail = result["problem"], result["detail"]
            if not problem:
                usable.append(result | {"skipped_rows": self.num_pending})
                self.num_pending = 0
                continue
            self.num_pending += 1
            limit = f" max_prompt_length is {rules.max_prompt_length}." if problem == "long_prompt" else ""
            self._log(problem, f"skipped {where}: {detail}{limit}")
            if self.num_pending >= MAX_CONSECUTIVE_SKIPS:
                raise ValueError(
                    f"The last {self.num_pending} rows of the {self.name} stream were all unusable ({dict(self.counts)} "
                    f"so far). The last one: {detail}"
                )
        return {column: [result[column] for result in usable] for column in (*self.columns, "skipped_rows")}

    def _log(self, reason: str, message: str) -> None:
        self.counts[reason] += 1
        count = self.counts[reason]
        if count <= 3 or str(count).rstrip("0") == "1":  # the first three, then every power of ten
            logger.warning(f"{message} ({count} rows with this so far)")
