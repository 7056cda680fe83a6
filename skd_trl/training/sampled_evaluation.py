"""Evaluation of rows without a reference: the student writes a response, as the run's sampling shapes its draws, and is scored on it.

What is scored is the student's own text, as at inference: the teacher replaces nothing in it. A row's noise depends on the seed
and on its place in the evaluation alone. So neither the batch size nor the number of processes changes a response, the same
student is given the same figure twice, and students of two steps are compared on the same noise.

Shapes: B rows of a batch, T response.
"""

import torch
from accelerate import Accelerator
from datasets import Dataset, IterableDataset
from transformers import PreTrainedModel

from ..data.batches import IGNORE_INDEX, Key
from ..sampling.admission import positions_of, prove
from .distributed import agree_on_maximum, is_sharded, keyed_generator
from .metrics import num_own_rows


def check_sampled_evaluation(
    dataset: Dataset | IterableDataset,
    name: str,
    student: PreTrainedModel,
    max_new_tokens: int,
    teacher_room: int | None = None,
) -> None:
    """Refuses a prepared evaluation set whose rows without a reference the student cannot sample for, or a teacher (of `teacher_room`
    tokens) cannot score. A stream is not read ahead: there the sampling refuses the row.

    Raises:
        `ValueError`: for a student that cannot be sampled from, and for a prompt that leaves no room for a response.
    """
    if not isinstance(dataset, Dataset):
        return
    columns = [dataset[name] for name in ("response_ids", "prompt_ids")]
    columns.append(dataset["teacher_prompt_ids"] if "teacher_prompt_ids" in dataset.column_names else columns[1])
    pairs = [(prompt, read or prompt) for response, prompt, read in zip(*columns, strict=True) if not response]
    if not pairs:
        return
    prompts, by_teacher = zip(*pairs, strict=True)
    for who, texts, room in (
        ("student", prompts, positions_of(student.config.get_text_config())),
        ("teacher", by_teacher, teacher_room),
    ):
        too_long = [len(text) for text in texts if room is not None and len(text) + max_new_tokens > room]
        if too_long:
            raise ValueError(
                f"{len(too_long)} prompts of the {name} data set have no reference, and with max_new_tokens={max_new_tokens} the "
                f"{who} has no room for a response: the longest has {max(too_long)} tokens, of {room} positions. Lower "
                "max_new_tokens, set max_prompt_length, or give references."
            )
    if not is_sharded(student):
        prove(student)


def rows_to_sample(batch: dict[str, torch.Tensor], accelerator: Accelerator) -> torch.Tensor:
    """Which rows of an evaluation's batch have no reference (B,), on the CPU, without those that only fill the batch up."""
    is_missing = (batch[Key.LABELS] == IGNORE_INDEX).all(dim=1).cpu()
    is_missing[num_own_rows(batch, accelerator) :] = False
    return is_missing


def any_on_any_process(flags: torch.Tensor, accelerator: Accelerator) -> bool:
    """Whether any flag is set; collective, as sampling may be."""
    if accelerator.num_processes == 1:
        return bool(flags.any())
    return agree_on_maximum(accelerator)(int(flags.any()))[0] > 0


def row_noise(places: list[int], max_new_tokens: int, seed: int) -> torch.Tensor:
    """The noise (B, T, 3) of rows by their places in an evaluation."""
    noise = torch.empty(len(places), max_new_tokens, 3)
    for row, place in zip(noise, places, strict=True):
        row.copy_(torch.rand(row.shape, generator=keyed_generator("evaluation", seed, place)))
    return noise
