"""Prepared rows -> batches, and the response tokens of a batch, which are all that the loss works on.

Each row of a batch, given or sampled, is [prompt | response | padding]: what a causal model makes of a row then never
depends on its padding. Labels are -100 on prompts and padding. Prompts to sample responses for are a second, left-padded
rectangle.

Shapes: B rows, S columns of a batch, P columns of its left-padded prompts, T the longest response, N response tokens in
all, row by row, H hidden.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence


IGNORE_INDEX = -100
# The `skipped_rows` of a row that is there once more, to fill up the last batch of an evaluation on several processes.
FILLS_UP = -1


class Key(StrEnum):
    """Every entry that a batch can have, with its shape and who puts it there."""

    # The data collator, and with sampled responses the sampling: `torch.long`, (B, S)
    INPUT_IDS = "input_ids"
    ATTENTION_MASK = "attention_mask"
    LABELS = "labels"
    # The data collator: left-padded prompts to sample responses for, `torch.long`, (B, P)
    PROMPTS = "prompts"
    PROMPT_ATTENTION_MASK = "prompt_attention_mask"
    # The same of the teacher, where rows have a prompt for it, (B, its own P); the student's prompt in rows that have none
    TEACHER_PROMPTS = "teacher_prompts"
    TEACHER_PROMPT_ATTENTION_MASK = "teacher_prompt_attention_mask"
    # The data collator: which of several teachers a row belongs to, (B,)
    TEACHER_INDEX = "teacher_index"
    # The data collator, of streams: unusable rows before each row, (B,), or `FILLS_UP`
    SKIPPED_ROWS = "skipped_rows"
    # The sampling: where the teacher's token is, `torch.bool`, (B, T), and the rank of the student's proposal among the teacher's
    # tokens, `torch.long`, (B, T), -1 where nothing was judged
    REPLACED = "replaced"
    TEACHER_RANK = "teacher_rank"
    # The teacher's last hidden states: from the sampling, where it judged the responses, (B, T, H)
    TEACHER_HIDDEN_STATES = "teacher_hidden_states"
    # The data collator, of rows with recorded scores: the teacher's k most probable tokens, `torch.long`, (B, T, k), their
    # log-probabilities (B, T, k), and those of the response's tokens, (B, T)
    TEACHER_TOP_IDS = "teacher_top_ids"
    TEACHER_TOP_LOG_PROBS = "teacher_top_log_probs"
    TEACHER_LABEL_LOG_PROBS = "teacher_label_log_probs"
    # An evaluation: the place of each row in it, (B,)
    PLACE = "place"
    # SpecKD: noise of its gates, (N, U), weights of a window that is weighed as a whole, (N,), what the compared gate accepts (N,)
    GATE_UNIFORMS = "gate_uniforms"
    COMPARED_UNIFORMS = "compared_uniforms"
    GATE_WEIGHT = "gate_weight"
    GATE_ACCEPTED = "gate_accepted"
    COMPARED_ACCEPTED = "compared_accepted"


def model_inputs(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What both models are called with. Positions are left to the model: padding at the right does not move
    them, and some models do not count from 0."""
    return {"input_ids": batch[Key.INPUT_IDS], "attention_mask": batch[Key.ATTENTION_MASK]}


def without_response(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The first row of a batch as a micro-batch without a response token, which adds nothing to a step."""
    first = {name: values[:1] for name, values in batch.items()}
    return {**first, Key.LABELS: torch.full_like(first[Key.LABELS], IGNORE_INDEX)}


@dataclass
class DataCollatorForDistillation:
    """
    Batches of the rows of [`~skd_trl.data.dataset.prepare_dataset`].

    Args:
        pad_token_id (`int`):
            Id that fills the padding. It may be an end-of-sequence id: masks and labels go by lengths, not by ids.
        pad_to_multiple_of (`int`, *optional*):
            Rounds S up to a multiple of this.

    Returns (of a call):
        `dict`: `input_ids`, `attention_mask`, `labels` (B, S), `prompts`, `prompt_attention_mask` (B, P), all
        `torch.long`; recorded scores of rows that have them, right-padded with 0; `teacher_prompts` and `teacher_prompt_attention_mask` where a row has `teacher_prompt_ids`; `teacher_index` (B,) where there are several teachers; and for
        streamed rows `skipped_rows` (B,): how many unusable rows were passed over before each.
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
        texts = [[*row["prompt_ids"], *row["response_ids"]] for row in rows]
        multiple = self.pad_to_multiple_of or 1
        num_columns = -(-max(map(len, texts)) // multiple) * multiple
        input_ids = torch.full((len(rows), num_columns), self.pad_token_id)
        labels = torch.full_like(input_ids, IGNORE_INDEX)
        attention_mask = torch.zeros_like(input_ids)
        for i, (row, text) in enumerate(zip(rows, texts, strict=True)):
            start, end = len(row["prompt_ids"]), len(text)
            input_ids[i, :end] = torch.as_tensor(text)
            labels[i, start:end] = input_ids[i, start:end]
            attention_mask[i, :end] = 1
        prompts, prompt_attention_mask = self._left_padded([row["prompt_ids"] for row in rows])
        batch: dict[str, torch.Tensor] = {
            Key.INPUT_IDS: input_ids,
            Key.ATTENTION_MASK: attention_mask,
            Key.LABELS: labels,
            Key.PROMPTS: prompts,
            Key.PROMPT_ATTENTION_MASK: prompt_attention_mask,
        }
        if any(row.get("teacher_prompt_ids") for row in rows):
            own = [row.get("teacher_prompt_ids") or row["prompt_ids"] for row in rows]
            batch[Key.TEACHER_PROMPTS], batch[Key.TEACHER_PROMPT_ATTENTION_MASK] = self._left_padded(own)
        if Key.TEACHER_TOP_IDS in rows[0]:
            numbers = {len(ids) for row in rows for ids in row[Key.TEACHER_TOP_IDS]} or {1}
            if len(numbers) > 1:
                raise ValueError(
                    f"The rows of a batch have scores of {sorted(numbers)} tokens at a position, and the loss needs one number for all. "
                    "Cut them to the smallest."
                )
            (k,) = numbers
            for name, shape, dtype in (
                (Key.TEACHER_TOP_IDS, (-1, k), torch.long),
                (Key.TEACHER_TOP_LOG_PROBS, (-1, k), torch.float32),
                (Key.TEACHER_LABEL_LOG_PROBS, (-1,), torch.float32),
            ):
                # In this shape a row without a response fits beside the others.
                scores = [torch.as_tensor(row[name], dtype=dtype).reshape(shape) for row in rows]
                batch[name] = pad_sequence(scores, batch_first=True)
        for name in (Key.TEACHER_INDEX, Key.SKIPPED_ROWS):
            if name in rows[0]:
                batch[name] = torch.tensor([row[name] for row in rows], dtype=torch.long)
        return batch

    def _left_padded(self, prompts: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        num_columns = max(map(len, prompts))
        ids = torch.full((len(prompts), num_columns), self.pad_token_id)
        mask = torch.zeros_like(ids)
        for i, prompt in enumerate(prompts):
            ids[i, num_columns - len(prompt) :] = torch.as_tensor(prompt)
            mask[i, num_columns - len(prompt) :] = 1
        return ids, mask


def teacher_prompts_of(batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """The left-padded prompts that the teacher reads, and their mask, (B, P) each."""
    if Key.TEACHER_PROMPTS in batch:
        return batch[Key.TEACHER_PROMPTS], batch[Key.TEACHER_PROMPT_ATTENTION_MASK]
    return batch[Key.PROMPTS], batch[Key.PROMPT_ATTENTION_MASK]


def as_teacher_reads(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The batch with the teacher's prompts in the place of the student's: the same response tokens in the same order, in other
    columns."""
    if Key.TEACHER_PROMPTS not in batch:
        return batch
    prompts, prompt_mask = teacher_prompts_of(batch)
    tokens = ResponseTokens.of(batch)
    num_prompt, num_response = prompt_mask.sum(dim=1), (batch[Key.LABELS] != IGNORE_INDEX).sum(dim=1)
    width, total = prompts.shape[1], num_prompt + num_response
    # Prompts end at one column, as responses begin at one: a shift to the left by a row's padding lays it out.
    together = torch.cat([prompts, tokens.as_rows(tokens.labels)], dim=1)
    column = torch.arange(int(total.max()) if len(total) else 0, device=prompts.device)
    source = (column + (width - num_prompt)[:, None]).clamp(max=together.shape[1] - 1)
    is_token, is_prompt = column < total[:, None], column < num_prompt[:, None]
    input_ids = together.gather(1, source)
    return {
        Key.INPUT_IDS: input_ids.masked_fill(~is_token, 0),
        Key.ATTENTION_MASK: is_token.long(),
        Key.LABELS: input_ids.masked_fill(~is_token | is_prompt, IGNORE_INDEX),
    }


PROMPT_KEYS = ((Key.PROMPTS, Key.PROMPT_ATTENTION_MASK), (Key.TEACHER_PROMPTS, Key.TEACHER_PROMPT_ATTENTION_MASK))


def check_collator(collate: Callable[[list[dict]], Mapping], row: dict[str, Any], samples: bool) -> None:
    """Looks at what a data collator makes of a prepared row. Where responses are sampled it has to give prompts too, and all that the row
    has of the teacher.

    Raises:
        `ValueError`: for a collator that cannot take such a row, or whose batches lack an entry.
    """
    needed = [Key.INPUT_IDS, Key.ATTENTION_MASK, Key.LABELS]
    needed += [Key.PROMPTS, Key.PROMPT_ATTENTION_MASK] if samples else []
    needed += [Key.TEACHER_PROMPTS, Key.TEACHER_PROMPT_ATTENTION_MASK] if row.get("teacher_prompt_ids") else []
    scores = Key.TEACHER_TOP_IDS, Key.TEACHER_TOP_LOG_PROBS, Key.TEACHER_LABEL_LOG_PROBS
    needed += [key for key in (Key.TEACHER_INDEX, *scores) if key in row]
    name = getattr(collate, "__name__", type(collate).__name__)
    try:
        found = set(collate([dict(row)]))
    except Exception as error:
        raise ValueError(
            f"data_collator={name} cannot make a batch of rows with {', '.join(row)} ({type(error).__name__}: {error}). Leave it None, or "
            "wrap DataCollatorForDistillation."
        ) from error
    if missing := [key.value for key in needed if key not in found]:
        raise ValueError(
            f"data_collator={name} gives batches without {', '.join(missing)}, which the trainer reads. Leave it None, or wrap "
            "DataCollatorForDistillation."
        )


def merge_prompts(batches: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The left-padded prompts and masks, (B, P) each, of several batches as one batch; the teacher's if any has its own, and which
    of several teachers each row has."""
    merged: dict[str, torch.Tensor] = {}
    has_own = any(Key.TEACHER_PROMPTS in batch for batch in batches)
    for keys in PROMPT_KEYS if has_own else PROMPT_KEYS[:1]:
        pairs = [
            (batch[keys[0]], batch[keys[1]]) if keys[0] in batch else teacher_prompts_of(batch) for batch in batches
        ]
        width = max(ids.shape[1] for ids, _ in pairs)
        for i, key in enumerate(keys):
            parts = [torch.nn.functional.pad(pair[i], (width - pair[i].shape[1], 0)) for pair in pairs]
            merged[key] = torch.cat(parts)
    if Key.TEACHER_INDEX in batches[0]:
        merged[Key.TEACHER_INDEX] = torch.cat([batch[Key.TEACHER_INDEX] for batch in batches])
    return merged


@dataclass(frozen=True)
class ResponseTokens:
    """The response tokens of a batch (B, S), and where they are.

    Logits at t predict token t+1, so the hidden state of a response's last token and that of the prompt's last but one
    have no business in the loss.

    Attributes:
        labels (`torch.LongTensor` of shape `(N,)`): the tokens.
        rows (`torch.LongTensor` of shape `(N,)`): the row that each belongs to.
        columns (`torch.LongTensor` of shape `(N,)`): its column in the batch.
        positions (`torch.LongTensor` of shape `(N,)`): its place in its response, from 0.
        shape (`tuple[int, int]`): (B, T), of values by row and position.
    """

    labels: torch.Tensor
    rows: torch.Tensor
    columns: torch.Tensor
    positions: torch.Tensor
    shape: tuple[int, int]

    @classmethod
    def of(cls, batch: dict[str, torch.Tensor]) -> "ResponseTokens":
        """Raises `ValueError` for a batch that another trainer's collator, or a hand, has made without labels."""
        if missing := [key.value for key in (Key.INPUT_IDS, Key.ATTENTION_MASK, Key.LABELS) if key not in batch]:
            raise ValueError(
                f"A batch of {', '.join(map(str, batch))} lacks {', '.join(missing)}, which say what was answered to what. Take batches from "
                "`trainer.get_train_dataloader()`, or from `trainer.data_collator` of rows of `trainer.train_dataset`; each row of "
                "`input_ids` is prompt, response and padding, and `labels` are -100 outside the response."
            )
        labels = batch[Key.LABELS]
        mask = labels != IGNORE_INDEX
        rows, columns = mask.nonzero(as_tuple=True)
        positions = columns - mask.int().argmax(dim=1)[rows]
        return cls(labels[mask], rows, columns, positions, (len(labels), int(mask.sum(dim=1).max())))

    def predicted_by(self, hidden: torch.Tensor) -> torch.Tensor:
        """The hidden states (N, H) that predict the tokens, out of those of a whole batch (B, S, H)."""
        return hidden[self.rows, self.columns - 1]

    def pick(self, values: torch.Tensor) -> torch.Tensor:
        """Values (N, ...) at the tokens, out of those of the responses (B, T, ...)."""
        return values[self.rows, self.positions]

    def as_rows(self, values: torch.Tensor) -> torch.Tensor:
        """The inverse of `pick`: (B, T, ...) with 0 on padding, from values (N, ...) at the tokens."""
        rows = values.new_zeros((*self.shape, *values.shape[1:]))
        rows[self.rows, self.positions] = values
        return rows
