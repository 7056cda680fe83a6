"""What can be said of a position besides its divergence, for people who watch: one number from both models' distributions.

Each costs passes over `(N, V)`, so that the loss computes those it is asked for by name and no others. A new one is a
function and an entry, under what it needs.

Shapes: N positions, V vocabulary. p is the teacher, q the student.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from .divergences import at_labels
from .token_distributions import TokenDistributions


def student_nll(distributions: TokenDistributions, labels: Tensor) -> Tensor:
    """-log q(y) of the response's token y, nats."""
    return -at_labels(distributions.student_log_probs, labels)


def teacher_nll(distributions: TokenDistributions, labels: Tensor) -> Tensor:
    """-log p(y) of the response's token y, nats."""
    return -at_labels(distributions.teacher_log_probs, labels)


def correct(distributions: TokenDistributions, labels: Tensor) -> Tensor:
    """Whether the response's token is the student's argmax; bool."""
    return distributions.student_argmax == labels


OF_DISTRIBUTIONS: dict[str, Callable[[TokenDistributions], Tensor]] = {
    "student_entropy": lambda distributions: distributions.student_entropy,
    "teacher_entropy": lambda distributions: distributions.teacher_entropy,
    "tv": lambda distributions: distributions.total_variation,
}
OF_LABELS: dict[str, Callable[[TokenDistributions, Tensor], Tensor]] = {
    "student_nll": student_nll,
    "teacher_nll": teacher_nll,
    "correct": correct,
}
STATISTICS = (*OF_DISTRIBUTIONS, *OF_LABELS)


@torch.no_grad()
def statistics_of(distributions: TokenDistributions, labels: Tensor | None, names: Iterable[str]) -> dict[str, Tensor]:
    """The named `STATISTICS` `(N,)`, detached; see [`check_statistics`] for what `labels` `(N,)` are needed for."""
    return {
        name: OF_LABELS[name](distributions, labels) if name in OF_LABELS else OF_DISTRIBUTIONS[name](distributions)
        for name in names
    }


def check_statistics(names: Iterable[str], has_labels: bool) -> None:
    """
    Raises:
        `ValueError`: a name that is not in `STATISTICS`, or one of `OF_LABELS` where there are none.
    """
    unknown = set(names) - set(STATISTICS)
    if unknown:
        raise ValueError(f"statistics={sorted(unknown)} do not exist; there are {sorted(STATISTICS)}.")
    if not has_labels and (missing := set(OF_LABELS) & set(names)):
        raise ValueError(f"statistics={sorted(missing)} are about the response's tokens; pass labels.")
