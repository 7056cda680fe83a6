"""Prepared rows -> batches, and the response tokens of a batch, which are all that the loss works on.

The layout of every batch and of every rollout: the prompt left-padded into P columns, then the response right-padded
into T columns, so that sampling continues at one column for all rows. Labels are -100 on prompts and padding.

Shapes: B rows, P prompt columns, T response columns (0 when no row has a reference response), N response tokens in all,
row by row, H hidden.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch


IGNORE_INDEX = -100


class Key(StrEnum):
    """Every entry that a batch can have, with its shape and who puts it there."""

    # The data collator, and with sampled responses the sampling: `torch.long`, (B, P+T)
    INPUT_IDS = "input_ids"
    ATTENTION_MASK = "attention_mask"
    LABELS = "labels"
    # The data collator: left-padded prompts to sample responses for, `torch.long`, (B, P)
    PROMPTS = "prompts"
    PROMPT_ATTENTION_MASK = "prompt_attention_mask"
    # The data collator, of streams: unusable rows before each row, (B,)
    SKIPPED_ROWS = "skipped_rows"
    # The sampling: where the teacher's token is, `torch.bool`, (B, T)
    REPLACED = "replaced"
    # The teacher's last hidden states: from the sampling, where it judged the responses, (B, T, H)
    TEACHER_HIDDEN_STATES = "teacher_hidden_states"
    # SpecKD: noise of its gates, (N, U), weights of a window that is weighed as a whole, (N,), what the compared gate accepts (N,)
    GATE_UNIFORMS = "gate_uniforms"
    COMPARED_UNIFORMS = "compared_uniforms"
    GATE_WEIGHT = "gate_weight"
    GATE_ACCEPTED = "gate_accepted"
    COMPARED_ACCEPTED = "compared_accepted"


def model_inputs(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What both models are called with. Positions are given: with left padding, models with learned positions would
    otherwise count the padding."""
    mask = batch[Key.ATTENTION_MASK]
    position_ids = (mask.cumsum(dim=1) - 1).clamp(min=0)
    return {"input_ids": batch[Key.INPUT_IDS], "attention_mask": mask, "position_ids": position_ids}


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
        batch: dict[str, torch.Tensor] = {
            Key.INPUT_IDS: input_ids,
            Key.ATTENTION_MASK: attention_mask,
            Key.LABELS: labels,
            Key.PROMPTS: input_ids[:, :num_prompt_columns].clone(),
            Key.PROMPT_ATTENTION_MASK: attention_mask[:, :num_prompt_columns].clone(),
        }
        if Key.SKIPPED_ROWS in rows[0]:
            batch[Key.SKIPPED_ROWS] = torch.tensor([row[Key.SKIPPED_ROWS] for row in rows], dtype=torch.long)
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


@dataclass(frozen=True)
class ResponseTokens:
    """Which places of a batch (B, P+T) hold response tokens, and what they are.

    Logits at t predict token t+1, so the hidden state of a response's last token and that of the prompt's last but one
    have no business in the loss.

    Attributes:
        mask (`torch.BoolTensor` of shape `(B, T)`): True on response tokens.
        labels (`torch.LongTensor` of shape `(N,)`): the tokens.
    """

    mask: torch.Tensor
    labels: torch.Tensor

    @classmethod
    def of(cls, batch: dict[str, torch.Tensor]) -> "ResponseTokens":
        labels = batch[Key.LABELS][:, batch[Key.PROMPTS].shape[1] :]
        mask = labels != IGNORE_INDEX
        return cls(mask, labels[mask])

    def predicted_by(self, hidden: torch.Tensor) -> torch.Tensor:
        """The hidden states (N, H) that predict the tokens, out of those of a whole batch (B, P+T, H)."""
        return hidden[:, -self.mask.shape[1] - 1 : -1][self.mask]

    def pick(self, values: torch.Tensor) -> torch.Tensor:
        """Values (N, ...) at the tokens, out of those of the responses (B, T, ...)."""
        return values[self.mask]

    def as_rows(self, values: torch.Tensor) -> torch.Tensor:
        """The inverse of `pick`: (B, T, ...) with 0 on padding, from values (N, ...) at the tokens."""
        rows = values.new_zeros((*self.mask.shape, *values.shape[1:]))
        rows[self.mask] = values
        return rows

    @property
    def rows(self) -> torch.Tensor:
        """The row that each token belongs to, (N,)."""
        return self.mask.nonzero()[:, 0]

    @property
    def positions(self) -> torch.Tensor:
        """Each token's place in its response, (N,), from 0."""
        return self.mask.nonzero()[:, 1]
