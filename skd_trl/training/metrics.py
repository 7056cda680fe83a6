"""Metrics as sums: exact averages over tokens, micro-batches, steps and ranks, at the cost of one reduction per log.

An average of averages weighs a short response's tokens more than a long one's. Here every metric is a pair of sums,
numerator and denominator, kept on the device and divided once, when the trainer logs.
"""

from collections.abc import Mapping, Sequence

import torch
from accelerate import Accelerator

from ..data.batches import FILLS_UP, IGNORE_INDEX, Key
from ..loss.distillation_loss import DistillationLoss
from ..sampling.rollout import Rollout


class RatioMetrics:
    """Sums of numerators and denominators by name.

    Args:
        names: all the names that may ever be added. Ranks reduce in this order, whatever each of them has seen.
        totals: those of them that are counts, reported as their sum.
    """

    def __init__(self, names: tuple[str, ...], totals: tuple[str, ...] = ()):
        self.names, self.totals = names, totals
        self.reset()

    def reset(self) -> None:
        self.sums: dict[str, tuple] = {}

    def add(self, name: str, numerator: torch.Tensor | float, denominator: torch.Tensor | float = 1.0) -> None:
        """Adds to the sums of `name`; tensors are scalars and are not waited for."""
        if name not in self.names:
            raise KeyError(f"{name!r} is not one of the declared metrics {self.names}.")
        before = self.sums.get(name, (0.0, 0.0))
        self.sums[name] = before[0] + numerator, before[1] + denominator

    def add_mean(self, name: str, values: torch.Tensor) -> None:
        """Adds values whose mean is the metric, e.g. one per token."""
        self.add(name, values.float().sum(), float(values.numel()))

    def add_share(self, name: str, is_counted: torch.Tensor, among: torch.Tensor) -> None:
        """Adds how many of those that are marked in `among` are marked in `is_counted` too, without waiting for the device."""
        self.add(name, (is_counted & among).sum(), among.sum())

    def compute(self, accelerator: Accelerator) -> dict[str, float]:
        """Ratios (or totals) over all ranks of what was added since the last time; collective. Names without data are left
        out."""
        table = torch.zeros(len(self.names), 2, dtype=torch.float64)
        for i, name in enumerate(self.names):
            table[i] = torch.tensor([float(value) for value in self.sums.get(name, (0.0, 0.0))], dtype=torch.float64)
        device = accelerator.device
        table = table.to(device, torch.float32 if device.type == "mps" else torch.float64)
        table = accelerator.reduce(table, reduction="sum").cpu()
        self.reset()
        return {
            name: (numerator if name in self.totals else numerator / denominator).item()
            for name, (numerator, denominator) in zip(self.names, table, strict=True)
            if denominator != 0
        }


def with_prefix(metrics: Mapping[str, float], prefix: str) -> dict[str, float]:
    return {f"{prefix}{name}": value for name, value in metrics.items()}


def num_own_rows(batch: dict, accelerator: Accelerator) -> int:
    """How many rows of an evaluation's batch are its own. On several processes others fill the last batch up; they are given out a
    second time."""
    if Key.SKIPPED_ROWS in batch:  # of a stream
        return int((batch[Key.SKIPPED_ROWS] != FILLS_UP).sum())
    state = accelerator.gradient_state
    num_rows = len(batch[Key.LABELS])
    num_left = state.remainder if state.end_of_dataloader else -1
    if num_left <= 0:
        return num_rows
    return min(max(num_left - accelerator.process_index * num_rows, 0), num_rows)


def without_filled_rows(batch: dict, num_own: int) -> dict:
    """A batch of an evaluation of which the first `num_own` rows are its own, without the labels of the others, which would be counted
    twice."""
    labels = batch[Key.LABELS]
    if num_own == len(labels):
        return batch
    labels = labels.clone()
    labels[num_own:] = IGNORE_INDEX
    return {**batch, Key.LABELS: labels}


def add_rollout(metrics: RatioMetrics, rollout: Rollout, seconds: float, num_processes: int) -> None:
    """What there is to say of sampled responses, and of the `seconds` that sampling them took."""
    num_tokens, num_rows = (rollout.labels != IGNORE_INDEX).sum(), len(rollout.input_ids)
    metrics.add("replaced_share", rollout.replaced.sum(), num_tokens)
    metrics.add("response_length", num_tokens, num_rows)
    metrics.add("truncated_share", rollout.num_truncated, num_rows)
    metrics.add("tokens_per_round", num_tokens, rollout.num_rounds)
    if rollout.num_drafted > 0:
        metrics.add("draft_length", rollout.num_drafted, rollout.num_rounds)
    metrics.add("sampling_seconds", seconds)
    metrics.add("tokens_per_second", 0.0, seconds / num_processes)
    judged = rollout.teacher_rank >= 0
    metrics.add_share("acceptance_rate", ~rollout.replaced, judged)
    metrics.add("teacher_rank", (rollout.teacher_rank * judged).sum(), judged.sum())


OF_EACH_TEACHER = ("acceptance_rate", "replaced_share", "teacher_entropy", "divergence", "num_tokens")


def names_by_teacher(teachers: Sequence[str]) -> dict[str, list[str]]:
    """The metrics of each of several teachers: `acceptance_rate_NAME` and others, over its rows."""
    return {metric: [f"{metric}_{name}" for name in teachers] for metric in OF_EACH_TEACHER}


def add_rollout_by_teacher(
    metrics: RatioMetrics, rollout: Rollout, which: torch.Tensor, teachers: Sequence[str]
) -> None:
    """What each of several teachers did in sampled responses; `which` (B,) says whose each row is."""
    names, judged = names_by_teacher(teachers), rollout.teacher_rank >= 0
    is_token = torch.arange(judged.shape[1], device=judged.device) < (rollout.labels != -100).sum(dim=1, keepdim=True)
    for i in range(len(teachers)):
        own = (which == i)[:, None]
        metrics.add_share(names["acceptance_rate"][i], ~rollout.replaced, judged & own)
        metrics.add_share(names["replaced_share"][i], rollout.replaced, is_token & own)


def add_loss_by_teacher(
    metrics: RatioMetrics, outcome: DistillationLoss, which: torch.Tensor, teachers: Sequence[str]
) -> None:
    """The loss by teacher; `which` (N,) says whose each response token is."""
    names = names_by_teacher(teachers)
    for i in range(len(teachers)):
        own = which == i
        metrics.add_mean(names["divergence"][i], outcome.divergence[own])
        metrics.add_mean(names["teacher_entropy"][i], outcome.statistics["teacher_entropy"][own])
        metrics.add(names["num_tokens"][i], own.sum())
