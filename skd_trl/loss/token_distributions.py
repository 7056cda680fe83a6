"""Two models' next-token distributions at the same positions: what gates and statistics read, each part computed once.

Shapes: N positions, V vocabulary. p is the teacher, q the student.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .divergences import log_probs


@dataclass(frozen=True)
class TokenDistributions:
    """
    Both models' next-token distributions at N positions, detached; what several readers need is computed once.

    Attributes:
        student_logits, teacher_logits (`Tensor` `(N, V)`):
            What ranks are read from: log-probabilities may tie where logits do not.
        student_log_probs, teacher_log_probs (`Tensor` `(N, V)`):
            Their log-softmax, fp32 at least.
    """

    student_logits: Tensor
    teacher_logits: Tensor
    student_log_probs: Tensor
    teacher_log_probs: Tensor

    @classmethod
    def from_logits(cls, student_logits: Tensor, teacher_logits: Tensor) -> "TokenDistributions":
        student_logits, teacher_logits = student_logits.detach(), teacher_logits.detach()
        return cls(student_logits, teacher_logits, log_probs(student_logits), log_probs(teacher_logits))

    @cached_property
    def student_probs(self) -> Tensor:
        return self.student_log_probs.exp()

    @cached_property
    def teacher_probs(self) -> Tensor:
        return self.teacher_log_probs.exp()

    @cached_property
    def student_argmax(self) -> Tensor:
        return self.student_logits.argmax(-1)

    @cached_property
    def student_entropy(self) -> Tensor:
        """H(q) `(N,)`, nats."""
        return -torch.linalg.vecdot(self.student_probs, self.student_log_probs)

    @cached_property
    def teacher_entropy(self) -> Tensor:
        """H(p) `(N,)`, nats."""
        return -torch.linalg.vecdot(self.teacher_probs, self.teacher_log_probs)

    @cached_property
    def total_variation(self) -> Tensor:
        """TV(p, q) = 1/2 sum_v |p - q|, `(N,)` in [0, 1]."""
        return ((self.teacher_probs - self.student_probs).abs_().sum(-1) / 2).clamp_(max=1)
