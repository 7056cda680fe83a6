"""Sampled responses for people to look at: kept as parquet while a run goes on, shown in the terminal, sent to trackers.

A response is shown with what the teacher replaced, the only way to see what interleaved sampling does to a response. A character may
be several tokens (`世`, `🎉`): the last of them has its text, the others an empty one, and it is marked if one of them is.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from rich.text import Text
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from ..sampling.rollout import Rollout


# A character has at most four bytes, so no more tokens than that are waited for.
MAX_TOKENS_OF_CHARACTER = 4
INCOMPLETE = "\ufffd"


def completion_records(
    rollout: Rollout, tokenizer: PreTrainedTokenizerBase, step: int, is_fixed: bool = False
) -> list[dict]:
    """One record per row: `step`, `prompt`, `response`, `tokens` (the text of each), `replaced` (bool each: the teacher's token),
    `proposals` (the student's token at each place, as text; `None` where the student proposed none) and `is_fixed` (whether this
    prompt is sampled again and again through the training)."""
    records = []
    for row in range(len(rollout.input_ids)):
        is_response = rollout.labels[row] != -100
        ids = rollout.labels[row, is_response].tolist()
        prompt = rollout.input_ids[row, (rollout.attention_mask[row] == 1) & ~is_response]
        proposals = rollout.proposals[row, : len(ids)].tolist()
        tokens, proposed = token_texts(tokenizer, ids, proposals)
        records.append(
            {
                "step": step,
                "prompt": tokenizer.decode(prompt),
                "response": tokenizer.decode(ids),
                "tokens": tokens,
                "replaced": rollout.replaced[row, : len(ids)].tolist(),
                "proposals": proposed if all(token >= 0 for token in proposals) else None,
                "is_fixed": is_fixed,
            }
        )
    return records


def token_texts(
    tokenizer: PreTrainedTokenizerBase, ids: list[int], proposals: list[int]
) -> tuple[list[str], list[str]]:
    """The text that each token of a response adds to it, and the text that the proposal at each place would have added."""

    def text(tokens: list[int]) -> str:
        return tokenizer.decode(tokens, clean_up_tokenization_spaces=False)

    texts, proposed = [], []
    start = read = 0  # the tokens before `read` have given their text; those from `start` on are its context
    for position, (token, proposal) in enumerate(zip(ids, proposals, strict=True)):
        known = text(ids[start:read])
        with_token = text(ids[start : position + 1])
        is_whole = not with_token.endswith(INCOMPLETE) or position + 1 - read >= MAX_TOKENS_OF_CHARACTER
        texts.append(with_token[len(known) :] if is_whole or position + 1 == len(ids) else "")
        is_other = proposal >= 0 and proposal != token
        proposed.append(text([*ids[start:position], proposal])[len(known) :] if is_other else texts[-1])
        if is_whole:
            start, read = read, position + 1
    return texts, proposed


def whole_pieces(tokens: list[str], replaced: list[bool], marker: str = "") -> Iterator[tuple[str, bool, int, int]]:
    """The pieces of a response that are whole characters: text, whether a token of it is the teacher's, and the tokens from `start` up
    to `stop`. A piece without text is shown as `marker`."""
    start, is_replaced = 0, False
    for position, (text, by_teacher) in enumerate(zip(tokens, replaced, strict=True)):
        is_replaced = is_replaced or bool(by_teacher)
        if text or position + 1 == len(tokens):
            yield text or marker, is_replaced, start, position + 1
            start, is_replaced = position + 1, False


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
        for text, replaced, *_ in whole_pieces(record["tokens"], record["replaced"]):
            response.append(f"{opening}{text}{closing}" if replaced else text, style=style if replaced else "")
        prompt = record["prompt"]
        shown = prompt if len(prompt) <= 240 else "... " + prompt[-236:]
        table.add_row(Text(shown), response, f"{_share(record):.0%}")
    with console.capture() as captured:
        console.print(table)
    # A character that the console's encoding does not have is printed as a mark.
    encoding = getattr(console.file, "encoding", None) or "utf-8"
    with tqdm.external_write_mode(file=console.file):  # a progress bar gives its line free
        console.file.write(captured.get().encode(encoding, errors="replace").decode(encoding))
        console.file.flush()


def marked_text(record: dict, opening: str = "⟦", closing: str = "⟧") -> str:
    """A response with the teacher's tokens between brackets: for what shows no colours."""
    pieces = whole_pieces(record["tokens"], record["replaced"])
    return "".join(f"{opening}{text}{closing}" if replaced else text for text, replaced, *_ in pieces)


def send_completions(records: list[dict], step: int, report_to: list[str], tensorboard_writer=None) -> None:
    """A table `completions` to each tracker of `report_to`: Weights & Biases and trackio as `GRPOTrainer` sends them, TensorBoard
    (through its open writer) as text, a table in Markdown."""
    table = pd.DataFrame(
        {
            "step": [step] * len(records),
            "prompt": [record["prompt"] for record in records],
            "completion": [record["response"] for record in records],
            "marked": [marked_text(record) for record in records],
            "replaced_share": [_share(record) for record in records],
            "is_fixed": [record["is_fixed"] for record in records],
        }
    )
    if "wandb" in report_to:
        import wandb

        if wandb.run is not None:
            wandb.log({"completions": wandb.Table(dataframe=table)})
    if "trackio" in report_to:
        import trackio

        trackio.log({"completions": trackio.Table(dataframe=table)})
    if tensorboard_writer is not None:
        rows = [
            f"| {_cell(row.prompt)} | {_cell(row.marked)} | {row.replaced_share:.0%} |" for row in table.itertuples()
        ]
        head = ["| prompt | response (⟦⟧: the teacher's tokens) | the teacher's |", "|---|---|---|"]
        tensorboard_writer.add_text("completions", "\n".join(head + rows), step)
        tensorboard_writer.flush()


def with_prompt_texts(dataset, tokenizer: PreTrainedTokenizerBase):
    """A prepared data set with its prompts as texts in a column `prompt`, as the tokenizer would read them again: where callbacks of
    TRL look for them. Raises `ValueError` for what is not one data set in memory."""
    if not isinstance(dataset, Dataset):
        raise ValueError(
            f"A callback looks for prompts in an evaluation set that is of type {type(dataset).__name__}; it needs one Dataset. Give the "
            "callback one (callback.eval_dataset), or leave it out: log_completions=True shows sampled responses of the training."
        )
    if "prompt" in dataset.column_names:
        return dataset
    texts = []
    for ids in dataset["prompt_ids"]:
        text = tokenizer.decode(ids)
        # A tokenizer that begins texts with its own token would do so a second time.
        again = tokenizer(text).input_ids
        is_twice = tokenizer.bos_token and again[1:] == list(ids) and again[0] == tokenizer.bos_token_id
        texts.append(text.removeprefix(tokenizer.bos_token) if is_twice else text)
    return dataset.add_column("prompt", texts)


def _share(record: dict) -> float:
    return sum(record["replaced"]) / max(len(record["replaced"]), 1)


def _cell(text: str) -> str:
    """`text` as a cell of a Markdown table."""
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", "<br>")
