"""A rollout -> the micro-batches of its step: each takes its rows, without the columns that only longer rows of others need.

Shapes: B rows of a micro-batch, S columns, T the longest response.
"""

import torch

from ..data.batches import IGNORE_INDEX, PROMPT_KEYS, Key
from ..sampling.rollout import Rollout


def sampled_batches(rollout: Rollout, batches: list[dict[str, torch.Tensor]]) -> list[dict[str, torch.Tensor]]:
    """`batches` with sampled responses in the place of the references; the rows of `rollout` are theirs, in order."""
    sizes = [len(batch[Key.PROMPTS]) for batch in batches]
    by_column = {
        Key.INPUT_IDS: rollout.input_ids,
        Key.ATTENTION_MASK: rollout.attention_mask,
        Key.LABELS: rollout.labels,
    }
    by_position = {Key.REPLACED: rollout.replaced, Key.TEACHER_RANK: rollout.teacher_rank, **rollout.teacher_signal}
    lengths = rollout.attention_mask.sum(dim=1), (rollout.labels != IGNORE_INDEX).sum(dim=1)
    columns, positions = torch.stack(lengths).tolist()  # the one wait for the device
    sampled, start = [], 0
    for batch, size in zip(batches, sizes, strict=True):
        rows, start = slice(start, start + size), start + size
        num_columns, num_positions = max(columns[rows], default=0), max(positions[rows], default=0)
        sampled.append(
            {
                **{
                    name: batch[name]
                    for pair in (*PROMPT_KEYS, (Key.TEACHER_INDEX,))
                    for name in pair
                    if name in batch
                },
                **{name: values[rows, :num_columns] for name, values in by_column.items()},
                **{name: values[rows, :num_positions] for name, values in by_position.items()},
            }
        )
    return sampled
