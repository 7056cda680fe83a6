"""Sampled responses for people to look at: kept as parquet while a run goes on, and shown in the terminal.

A response is shown with what the teacher replaced, the only way to see what interleaved sampling does to a text.
"""

import os
from pathlib import Path
from typing import TextIO

import pandas as pd
import torch
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from ..sampling.rollout import Rollout


def completion_records(rollout: Rollout, tokenizer: PreTrainedTokenizerBase, step: int) -> list[dict]:
    """One record per row: `step`, `prompt`, `response`, `tokens` (each decoded), `replaced` (bool each: the teacher's token) and
    `proposals` (the student's token at each place, decoded; `None` where the student proposed none)."""
    records = []
    for row in range(len(rollout.input_ids)):
        is_response = rollout.labels[row] != -100
        ids = rollout.labels[row, is_response]
        prompt = rollout.input_ids[row, (rollout.attention_mask[row] == 1) & ~is_response]
        proposals = rollout.proposals[row, : len(ids)]
        records.append(
            {
                "step": step,
                "prompt": tokenizer.decode(prompt),
                "response": tokenizer.decode(ids),
                "tokens": _decode_each(tokenizer, ids),
                "replaced": rollout.replaced[row, : len(ids)].tolist(),
                "proposals": _decode_each(tokenizer, proposals) if (proposals >= 0).all() else None,
            }
        )
    return records


def save_completions(records: list[dict], output_dir: str, step: int) -> Path:
    """Writes `output_dir/completions/completions_{step}.parquet`, whole or not at all."""
    path = Path(output_dir) / "completions" / f"completions_{step:05d}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    pd.DataFrame(records).to_parquet(partial)
    os.replace(partial, path)
    return path


def print_completions(records: list[dict], num_rows: int, step: int, console: Console | None = None) -> None:
    """A table of the first `num_rows` records. The teacher's tokens stand out: in reverse video on a terminal, between
    brackets in a file, which has no colours."""
    console = console or Console()
    brackets = ("[", "]") if console.options.ascii_only else ("⟦", "⟧")
    style, opening, closing = ("reverse", "", "") if console.is_terminal else ("", *brackets)
    legend = "reversed" if style else f"{opening} {closing}"
    table = Table(title=Text(f"Sampled responses, step {step} ({legend}: the teacher's tokens)"), show_lines=True)
    table.add_column("prompt", max_width=60)
    table.add_column("response")
    table.add_column("teacher's", justify="right")
    for record in records[:num_rows]:
        response = Text()
        for token, replaced in zip(record["tokens"], record["replaced"], strict=True):
            response.append(f"{opening}{token}{closing}" if replaced else token, style=style if replaced else "")
        prompt = record["prompt"]
        shown = prompt if len(prompt) <= 240 else "... " + prompt[-236:]
        share = sum(record["replaced"]) / max(len(record["replaced"]), 1)
        table.add_row(Text(shown), response, f"{share:.0%}")
    with console.capture() as captured:
        console.print(table)
    _print_safely(captured.get(), console.file)


def with_prompt_texts(dataset, tokenizer: PreTrainedTokenizerBase):
    """A prepared data set with its prompts as texts in a column `prompt`, as the tokenizer would read them again: where callbacks of
    TRL look for them.

    Raises:
        `ValueError`: for what is not one data set in memory.
    """
    if not isinstance(dataset, Dataset):
        raise ValueError(
            f"A callback looks for prompts in an evaluation set that is a {type(dataset).__name__}; it needs one Dataset. Give the "
            "callback one (callback.eval_dataset), or leave it out: log_completions=True shows sampled responses of the training."
        )
    if "prompt" in dataset.column_names:
        return dataset
    texts = []
    for ids in dataset["prompt_ids"]:
        text = tokenizer.decode(ids)
        # A tokenizer that begins texts with a token of its own would do so a second time.
        again = tokenizer(text).input_ids
        is_twice = tokenizer.bos_token and again[1:] == list(ids) and again[0] == tokenizer.bos_token_id
        texts.append(text.removeprefix(tokenizer.bos_token) if is_twice else text)
    return dataset.add_column("prompt", texts)


def _print_safely(text: str, file: TextIO) -> None:
    """Prints `text` with a mark in the place of every character that the console's encoding does not have."""
    encoding = getattr(file, "encoding", None) or "utf-8"
    file.write(text.encode(encoding, errors="replace").decode(encoding))
    file.flush()


def _decode_each(tokenizer: PreTrainedTokenizerBase, ids: torch.Tensor) -> list[str]:
    return [tokenizer.decode([token]) for token in ids.tolist()]
