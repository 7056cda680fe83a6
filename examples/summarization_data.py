"""Rows of any summarization set, on the hub or in local files, as `prompt` and `completion` (both conversations).

The one place that knows column names: a set with other columns needs one line in `TEXT_AND_SUMMARY`.
"""

from pathlib import Path

from datasets import Dataset, load_dataset


# Columns of the text and of its summary -> what the user asks. Sets that have `prompt` and `completion` stay as they are.
TEXT_AND_SUMMARY = {
    ("dialogue", "summary"): "Summarize the following dialogue.",  # knkarthick/dialogsum, knkarthick/samsum
    ("document", "summary"): "Summarize the following document.",  # EdinburghNLP/xsum
    ("article", "highlights"): "Summarize the following article.",  # abisee/cnn_dailymail
}


def load_summarization(
    name: str, split: str, *, config: str | None = None, num_rows: int = 0, seed: int = 0
) -> Dataset:
    """
    Load one split of a data set with the columns `prompt` and `completion`.

    Args:
        name (`str`): name of a data set on the hub, or a local directory with one `{split}.jsonl` for each split.
        split (`str`): name of the split.
        config (`str`, *optional*): configuration of the hub's data set.
        num_rows (`int`): size of a random sample to take; 0 takes all rows.
        seed (`int`): seed of that sample.

    Raises:
        ValueError: if the split's file is missing, if the split is empty, or if its columns are not known.
    """
    if Path(name).is_dir():
        file = Path(name) / f"{split}.jsonl"
        if not file.exists():
            raise ValueError(f"{name} has no file {file.name} for the split {split!r}; it has {sorted_names(name)}.")
        dataset = load_dataset("json", data_files=str(file), split="train")
    else:
        if not name or name.startswith((".", "/")) or name.count("/") > 1:
            raise ValueError(
                f"the data directory {name!r} does not exist. For the offline set, run `python "
                "examples/offline_assets.py --output_dir examples/assets` first."
            )
        dataset = load_dataset(name, config, split=split)
    if not len(dataset):
        raise ValueError(f"the split {split!r} of {name} has no rows.")
    dataset = as_prompt_completion(dataset)
    if num_rows and num_rows < len(dataset):
        dataset = dataset.shuffle(seed=seed).select(range(num_rows))
    return dataset


def as_prompt_completion(dataset: Dataset) -> Dataset:
    """The same rows with the columns `prompt` and `completion` only."""
    columns = dataset.column_names
    if {"prompt", "completion"} <= set(columns):
        return dataset.select_columns(["prompt", "completion"])
    for (text, summary), instruction in TEXT_AND_SUMMARY.items():
        if {text, summary} <= set(columns):
            return dataset.map(
                lambda row, text=text, summary=summary, instruction=instruction: {
                    "prompt": [{"role": "user", "content": f"{instruction}\n\n{row[text].strip()}"}],
                    "completion": [{"role": "assistant", "content": row[summary].strip()}],
                },
                remove_columns=columns,
                desc="prompt and completion",
            )
    known = ", ".join(f"{text} + {summary}" for text, summary in TEXT_AND_SUMMARY)
    raise ValueError(
        f"the data set has the columns {columns}, which are no pair of text and summary known here (prompt + completion, "
        f"{known}). Rename its columns, or add a line to TEXT_AND_SUMMARY in {Path(__file__).name}."
    )


def text_of(value: str | list[dict[str, str]]) -> str:
    """The plain text of a `completion`, whether it is a string or a conversation."""
    return value if isinstance(value, str) else value[-1]["content"]


def sorted_names(directory: str) -> list[str]:
    return sorted(path.name for path in Path(directory).iterdir())
