"""Micro-batches in which some rows have a sampled response and the others keep their reference (ImitKD, Lin et al., EMNLP 2020).

Works on rows, prompt ids and response ids, and collates them again: it does not depend on how a batch is laid out. The teacher's
signal is left out, as no forward has made it for all rows of a micro-batch.

Shapes: R rows of all micro-batches, B rows of one, P prompt, T response.
"""

from collections.abc import Callable
from typing import Any

import torch

from .batches import IGNORE_INDEX, Key


COLLATED = ("prompt_ids", "response_ids", "teacher_prompt_ids", Key.TEACHER_INDEX)
# What sampling says of each response token, and its value in a reference response.
SAMPLED_FACTS = {Key.REPLACED: False, Key.TEACHER_RANK: -1}


def mix_sampled_rows(
    batches: list[dict[str, torch.Tensor]],
    sampled: list[dict[str, torch.Tensor]],
    is_sampled: torch.Tensor,
    collate: Callable[[list[dict]], dict[str, torch.Tensor]],
) -> list[dict[str, torch.Tensor]]:
    """
    The micro-batches with the responses of some of their rows replaced.

    Args:
        batches (`list` of batches): as the data collator made them.
        sampled (`list` of batches): the rows with a sampled response, in their order.
        is_sampled (`torch.BoolTensor` of shape `(R,)`): which rows of `batches` these are.
        collate (`Callable`): makes a batch of rows `{"prompt_ids": list, "response_ids": list}`, and `teacher_prompt_ids` where
            the teacher reads another prompt.

    Returns:
        `list` of batches of the same sizes: the collator's entries, and `replaced` (B, T) and `teacher_rank` (B, T) where
        `sampled` has them, False and -1 for references.
    """
    new_rows = iter([row for batch in sampled for row in _rows_of(batch)])
    flags, mixed = iter(is_sampled.tolist()), []
    for batch in batches:
        rows = [next(new_rows) if next(flags) else row for row in _rows_of(batch)]
        own = collate([{name: row[name] for name in COLLATED if name in row} for row in rows])
        longest = max(len(row["response_ids"]) for row in rows)
        for name, fill in SAMPLED_FACTS.items():
            if not sampled or name in sampled[0]:
                values = [row.get(name, [fill] * len(row["response_ids"])) for row in rows]
                own[name] = torch.tensor([value + [fill] * (longest - len(value)) for value in values])
        device = batch[Key.INPUT_IDS].device
        mixed.append({name: value.to(device) for name, value in own.items()})
    return mixed


def _rows_of(batch: dict[str, torch.Tensor]) -> list[dict[str, Any]]:
    """Prompt ids, response ids, and of a sampled batch the facts of each response token, row by row."""
    rows = []
    for i, labels in enumerate(batch[Key.LABELS]):
        response_ids = labels[labels != IGNORE_INDEX].tolist()
        row = {"prompt_ids": batch[Key.PROMPTS][i][batch[Key.PROMPT_ATTENTION_MASK][i] == 1].tolist()}
        row["response_ids"] = response_ids
        if Key.TEACHER_PROMPTS in batch:
            is_token = batch[Key.TEACHER_PROMPT_ATTENTION_MASK][i] == 1
            row["teacher_prompt_ids"] = batch[Key.TEACHER_PROMPTS][i][is_token].tolist()
        if Key.TEACHER_INDEX in batch:
            row[Key.TEACHER_INDEX] = int(batch[Key.TEACHER_INDEX][i])
        for name in SAMPLED_FACTS:
            if name in batch:
                row[name] = batch[name][i, : len(response_ids)].tolist()
        rows.append(row)
    return rows
