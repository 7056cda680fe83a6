"""What can be said of a position besides its divergence, for people who watch: one number from both models' distributions.

Each costs passes over `(N, V)`, so that the loss computes those it is asked for by name and no others. A new one is a
function and an entry.

Shapes: N positions, V vocabulary. p is the teacher, q the student.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from .token_distributions import TokenDistributions


Statistic = Callable[[TokenDistributions, Tensor], Tensor]


def student_nll(distributions: TokenDistributions, labels: Tensor) -> Tensor:
    """-log q(y) of the response's token y, nats."""
    return -_at(distributions.student_log_probs, labels)


def teacher_nll(distributions: TokenDistributions, labels: Tensor) -> Tensor:
    """-log p(y) of the response's token y, nats."""
    return -_at(distributions.teacher_log_probs, labels)


def correct(distributions: TokenDistributions, labels: Tensor) -> Tensor:
    """Whether the response's token is the student's argmax; bool."""
    return distributions.student_argmax == labels


STATISTICS: dict[str, Statistic] = {
    "student_entropy": lambda distributions, labels: distributions.student_entropy,
    "teacher_entropy": lambda distributions, labels: distributions.teacher_entropy,
    "tv": lambda distributions, labels: distributions.total_variation,
    "student_nll": student_nll,
    "teacher_nll": teacher_nll,
    "correct": correct,
}
_OF_LABELS = {"student_nll", "teacher_nll", "correct"}


@torch.no_grad()
def statistics_of(distributions: TokenDistributions, labels: Tensor | None, names: Iterable[str]) -> dict[str, Tensor]:
    """The named `STATISTICS` `(N,)`, detached; entropies and likelihoods in nats."""
    return {name: STATISTICS[name](distributions, labels) for name in names}


def check_statistics(names: Iterable[str], has_labels: bool) -> None:
    """
    Raises:
        `ValueError`: a name that is not in `STATISTICS`, or one that is about labels where there are none.
    """
    unknown = set(names) - set(STATISTICS)
    if unknown:
        raise ValueError(f"statistics={sorted(unknown)} do not exist; there are {sorted(STATISTICS)}.")
    if not has_labels and (missing := _OF_LABELS & set(names)):
        raise ValueError(f"statistics={sorted(missing)} are about the response's tokens; pass labels.")


def _at(log_probs: Tensor, labels: Tensor) -> Tensor:
    return log_probs.gather(-1, labels[:, None]).squeeze(-1)
