"""The signal of several teachers at the positions of one batch: each position has the full vocabulary of one teacher.

Heads and hidden sizes differ, the vocabulary does not, so the loss sees one distribution at each position and asks no further.

Shapes: N positions, M of them a teacher's, H hidden (each teacher its own), V vocabulary.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .lm_head import LMHead
from .teacher_signal import HiddenStates, TeacherSignal
from .token_distributions import TokenDistributions


@dataclass(frozen=True)
class HiddenStatesOfSeveral(TeacherSignal):
    """
    Attributes:
        parts (`tuple` of [`HiddenStates`]):
            One for each teacher, with the states (M, H) of its positions.
        positions (`tuple` of `Tensor` `(M,)`):
            Which of the N positions these are.
        num_positions (`int`):
            N.

    Raises:
        `ValueError`: if not every position has one teacher.
    """

    parts: tuple[HiddenStates, ...]
    positions: tuple[Tensor, ...]
    num_positions: int

    def __post_init__(self):
        sizes = [len(part) for part in self.parts]
        if sizes != [len(own) for own in self.positions] or sum(sizes) != self.num_positions:
            raise ValueError(
                f"The teachers have {sizes} of {self.num_positions} positions; each position has one teacher."
            )

    @property
    def top_k(self) -> float:
        return math.inf

    def __len__(self) -> int:
        return self.num_positions

    def __getitem__(self, rows: slice) -> "HiddenStatesOfSeveral":
        start, stop, _ = rows.indices(self.num_positions)
        inside = [(own >= start) & (own < stop) for own in self.positions]
        parts = [replace(part, states=part.states[mask]) for part, mask in zip(self.parts, inside, strict=True)]
        positions = [own[mask] - start for own, mask in zip(self.positions, inside, strict=True)]
        return HiddenStatesOfSeveral(tuple(parts), tuple(positions), stop - start)

    @classmethod
    def cat(cls, signals: "Sequence[HiddenStatesOfSeveral]") -> "HiddenStatesOfSeveral":
        parts = tuple(HiddenStates.cat(of_one) for of_one in zip(*(s.parts for s in signals), strict=True))
        starts = torch.tensor([0, *(len(signal) for signal in signals)]).cumsum(0).tolist()
        shifted = [[own + start for own in s.positions] for s, start in zip(signals, starts, strict=False)]
        return cls(parts, tuple(map(torch.cat, zip(*shifted, strict=True))), starts[-1])

    def with_heads(self, change: Callable[[LMHead], LMHead]) -> "HiddenStatesOfSeveral":
        return replace(self, parts=tuple(part.with_heads(change) for part in self.parts))

    @torch.no_grad()
    def prepared(self, vocab_size: int) -> "HiddenStatesOfSeveral":
        return replace(self, parts=tuple(part.prepared(vocab_size) for part in self.parts))

    def compare(self, student_logits: Tensor, labels: Tensor) -> TokenDistributions:
        with torch.no_grad():
            teacher_logits = torch.empty_like(student_logits)
            for part, own in zip(self.parts, self.positions, strict=True):
                if len(own) > 0:
                    logits = part.head.logits(part.states, student_logits.shape[-1])
                    teacher_logits[own] = logits.to(teacher_logits.dtype)
        return TokenDistributions.from_logits(student_logits, teacher_logits, labels)
