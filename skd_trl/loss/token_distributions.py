"""Two models' next-token distributions at the same positions: what divergences compare, gates read and statistics report.

Both are distributions over the same K outcomes. With the teacher's full vocabulary an outcome is a token, K = V. Of a
teacher of whom the k most probable tokens are known, the outcomes are these k, and all others in one: K = k + 1. What
several readers need is computed once.

Shapes: N positions, V vocabulary, k known tokens, K outcomes. p is the teacher, q the student.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .divergences import at_labels, log_probs
from .response_facts import ResponseFacts


@dataclass(frozen=True)
class TokenDistributions:
    """
    Both models' next-token distributions at N positions. Inside a loss the student's log-probabilities carry its gradient; gates and
    statistics are computed without.

    Attributes:
        student_logits (`Tensor` `(N, V)`), teacher_logits (`Tensor` `(N, K)`):
            What ranks are read from: log-probabilities may tie where logits do not.
        all_student_log_probs (`Tensor` `(N, V)`):
            The student's log-probabilities of all tokens, fp32 at least.
        student_log_probs, teacher_log_probs (`Tensor` `(N, K)`):
            Log-probabilities of the outcomes, fp32 at least.
        labels (`Tensor` `(N,)`):
            The response's tokens.
    """

    student_logits: Tensor
    teacher_logits: Tensor
    all_student_log_probs: Tensor
    student_log_probs: Tensor
    teacher_log_probs: Tensor
    labels: Tensor

    @classmethod
    def from_logits(cls, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> "TokenDistributions":
        """Where the outcomes are the tokens."""
        student_log_probs, teacher_log_probs = log_probs(student_logits), log_probs(teacher_logits)
        return cls(student_logits, teacher_logits, student_log_probs, student_log_probs, teacher_log_probs, labels)

    def __len__(self) -> int:
        return len(self.student_logits)

    @property
    def both_logits(self) -> tuple[Tensor, Tensor]:
        """The student's logits of the outcomes and the teacher's, `(N, K)` each, fp32 at least."""
        student, teacher = self.student_logits, self.teacher_logits
        return tuple(logits.to(torch.promote_types(logits.dtype, torch.float32)) for logits in (student, teacher))  # type: ignore[return-value]

    @property
    def vocab_size(self) -> int:
        return self.student_logits.shape[-1]

    def outcome_of(self, tokens: Tensor) -> Tensor:
        """Which outcome `(N,)` each of `tokens` `(N,)` belongs to: where to look it up in `(N, K)`."""
        return tokens

    @cached_property
    def student_probs(self) -> Tensor:
        """q of the outcomes, `(N, K)`."""
        return self.student_log_probs.exp()

    @cached_property
    def teacher_probs(self) -> Tensor:
        """p of the outcomes, `(N, K)`."""
        return self.teacher_log_probs.exp()

    @cached_property
    def student_label_log_probs(self) -> Tensor:
        """log q(y) of the response's token y, `(N,)`."""
        return at_labels(self.all_student_log_probs, self.labels)

    @cached_property
    def teacher_label_log_probs(self) -> Tensor:
        """log p(y) of the response's token y, `(N,)`."""
        return at_labels(self.teacher_log_probs, self.labels)

    @cached_property
    def student_argmax(self) -> Tensor:
        """The student's most probable token, `(N,)`."""
        return self.student_logits.argmax(-1)

    @cached_property
    def student_argmax_rank(self) -> Tensor:
        """How many tokens the teacher ranks above the student's most probable one, `(N,)`; ties are not above."""
        proposed = self.teacher_logits.gather(-1, self.outcome_of(self.student_argmax)[:, None])
        return (self.teacher_logits > proposed).sum(-1)

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
        """TV(p, q) = 1/2 sum |p - q| over the outcomes, `(N,)` in [0, 1]."""
        return ((self.teacher_probs - self.student_probs).abs_().sum(-1) / 2).clamp_(max=1)


@dataclass(frozen=True)
class CoarseDistributions(TokenDistributions):
    """
    The same where k tokens of the teacher are known, over these and the rest. Where k = V there is no rest.

    The student's entropy and argmax, both models' label log-probabilities and every rank below k are exact. (The known
    scores do not say whether a token outside them ties with the last of them; it counts as below.) What
    compares whole distributions, such as the total variation, compares those of the outcomes, and is never above that
    over the vocabulary. The teacher's entropy is not known.

    Attributes:
        ids (`Tensor` `(N, k)`):
            The known tokens. `teacher_logits` are their log-probabilities, and minus infinity for the rest.
        label_log_probs (`Tensor` `(N,)`):
            The teacher's of the response's tokens.
    """

    ids: Tensor
    label_log_probs: Tensor

    @property
    def both_logits(self) -> tuple[Tensor, Tensor]:
        """Log-probabilities: the teacher's logits are not known."""
        return self.student_log_probs, self.teacher_log_probs

    def outcome_of(self, tokens: Tensor) -> Tensor:
        is_known = self.ids == tokens[:, None]
        return torch.where(is_known.any(-1), is_known.int().argmax(-1), self.ids.shape[-1])

    @property
    def teacher_label_log_probs(self) -> Tensor:
        return self.label_log_probs

    @cached_property
    def student_entropy(self) -> Tensor:
        return -torch.linalg.vecdot(self.all_student_log_probs.exp(), self.all_student_log_probs)

    @cached_property
    def teacher_entropy(self) -> Tensor:
        if self.ids.shape[-1] == self.vocab_size:
            return super().teacher_entropy
        raise ValueError(
            f"The teacher's entropy was asked for, but {self.ids.shape[-1]} of its {self.vocab_size} tokens are known; use "
            f"a teacher whose hidden states are at hand, or set needs_top_k=math.inf on the gate that asks."
        )


# What can be said of a position besides its divergence, for people who watch: (N,) of distributions and facts. Each costs
# passes over (N, V), so the loss computes those it is asked for by name and no others. A new one is an entry.
STATISTICS: dict[str, Callable[[TokenDistributions, ResponseFacts], Tensor]] = {
    "student_entropy": lambda distributions, facts: distributions.student_entropy,
    "teacher_entropy": lambda distributions, facts: distributions.teacher_entropy,
    "tv": lambda distributions, facts: distributions.total_variation,
    "student_nll": lambda distributions, facts: -distributions.student_label_log_probs,
    "teacher_nll": lambda distributions, facts: -distributions.teacher_label_log_probs,
    "correct": lambda distributions, facts: distributions.student_argmax == facts.labels,
}
# Those that a top-k signal does not tell.
FULL_VOCABULARY_STATISTICS = frozenset({"teacher_entropy"})


def check_statistics(names: Iterable[str]) -> None:
    """
    Raises:
        `ValueError`: a name that is not in `STATISTICS`.
    """
    unknown = set(names) - set(STATISTICS)
    if unknown:
        raise ValueError(f"statistics={sorted(unknown)} do not exist; there are {sorted(STATISTICS)}.")
