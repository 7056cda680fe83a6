"""A user's own ideas, written with the public names of skd_trl alone: what `test_user_code.py` trains with."""

from dataclasses import dataclass

import torch

from skd_trl import AcceptanceRule, Draft, Gate, ResponseFacts


@dataclass(frozen=True)
class OneIn(AcceptanceRule):
    """Accepts the tokens whose id `n` divides."""

    n: int = 2

    def __post_init__(self):
        if self.n < 1:
            raise ValueError(f"n={self.n} divides nothing.")

    def __call__(self, draft: Draft) -> torch.Tensor:
        return draft.tokens % self.n == 0


def only_replaced(floor: float = 0.0) -> Gate:
    """Listens to the tokens that the teacher replaced."""

    def score(distributions, facts: ResponseFacts) -> torch.Tensor:
        return facts.replaced

    return Gate(score, floor)


def brier(student_logits: torch.Tensor, teacher_logits: torch.Tensor) -> torch.Tensor:
    """Half the squared difference of the probabilities, (N, V) and (N, V) to (N,)."""
    return 0.5 * (student_logits.softmax(-1) - teacher_logits.softmax(-1)).square().sum(-1)
