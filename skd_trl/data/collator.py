"""Prepared rows -> batches.

The layout of every batch and of every rollout: the prompt left-padded into P columns, then the response right-padded
into T columns, so that sampling continues at one column for all rows. Labels are -100 on prompts and padding.

Shapes: B rows, P prompt columns, T response columns (0 when no row has a reference response).
"""

from dataclasses import dataclass
from typing import Any

import torch


IGNORE_INDEX = -100


@dataclass
class DataCollatorForDistillation:
    """
    Batches of the rows of [`~skd_trl.data.dataset.prepare_dataset`].

    Args:
        pad_token_id (`int`):
            Id that fills the padding. It may be an end-of-sequence id: masks and labels go by lengths, not by ids.
        pad_to_multiple_of (`int`, *optional*):
            Rounds P and T up, each to a multiple of this.

    Returns (of a call):
        `dict`: `input_ids`, `attention_mask`, `labels` (B, P+T), `prompts`, `prompt_attention_mask` (B, P), all
        `torch.long`; and for streamed rows `skipped_rows` (B,): how many unusable rows were passed over before each.
    """

    pad_token_id: int
    pad_to_multiple_of: int | None = None

    def __post_init__(self):
        if self.pad_token_id is None:
            raise ValueError(
                "pad_token_id is None: rows of different lengths cannot be batched. Set `tokenizer.pad_token`, for "
                "example to `tokenizer.eos_token`."
            )
        if self.pad_to_multiple_of is not None and self.pad_to_multiple_of < 1:
            raise ValueError(f"pad_to_multiple_of={self.pad_to_multiple_of} must be 1 or more, or None.")

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        num_prompt_columns = self._round_up(max(len(row["prompt_ids"]) for row in rows))
        num_response_columns = self._round_up(max(len(row["response_ids"]) for row in rows))
        shape = (len(rows), num_prompt_columns + num_response_columns)
        input_ids = torch.full(shape, self.pad_token_id, dtype=torch.long)
        attention_mask = torch.zeros(shape, dtype=torch.long)
        labels = torch.full(shape, IGNORE_INDEX, dtype=torch.long)
        for i, row in enumerate(rows):
            response_ids = torch.as_tensor(row["response_ids"], dtype=torch.long)
            start = num_prompt_columns - len(row["prompt_ids"])
            end = num_prompt_columns + len(response_ids)
            input_ids[i, start:num_prompt_columns] = torch.as_tensor(row["prompt_ids"], dtype=torch.long)
            input_ids[i, num_prompt_columns:end] = response_ids
            labels[i, num_prompt_columns:end] = response_ids
            attention_mask[i, start:end] = 1
        batch = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "labels": labels,
            "prompts": input_ids[:, :num_prompt_columns].clone(),
            "prompt_attention_mask": attention_mask[:, :num_prompt_columns].clone(),
        }
        if "skipped_rows" in rows[0]:
            batch["skipped_rows"] = torch.tensor([row["skipped_rows"] for row in rows], dtype=torch.long)
        return batch

    def _round_up(self, length: int) -> int:
        multiple = self.pad_to_multiple_of or 1
        return -(-length // multiple) * multiple


def merge_prompts(prompts: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """The left-padded prompts and masks, (B, P) each, of several batches as one batch."""
    width = max(ids.shape[1] for ids, _ in prompts)
    ids, masks = zip(
        *((torch.nn.functional.pad(x, (width - x.shape[1], 0)) for x in pair) for pair in prompts), strict=True
    )
    return torch.cat(ids), torch.cat(masks)
