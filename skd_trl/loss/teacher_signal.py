"""What the loss knows of the teacher at each position: its hidden states and head, or its k most probable tokens.

Hidden states give the full vocabulary, made into logits chunk by chunk. A served or recorded teacher gives ids and
log-probabilities; then both distributions are coarsened to k + 1 outcomes (the k ids, and all other tokens in one), and
divergences apply to these unchanged. Merging outcomes never raises a divergence (the data-processing inequality), so the
coarse loss is a lower bound of the full one; with k = V they are equal.

Shapes: N positions, H hidden, V vocabulary, k known tokens, K outcomes. p is the teacher, q the student.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .chunks import chunks
from .divergences import at_labels, log_probs
from .lm_head import LMHead
from .token_distributions import FULL_VOCABULARY_STATISTICS, CoarseDistributions, TokenDistributions


if TYPE_CHECKING:
    from .gates import Gate


# The log-probability of an outcome that neither model has: a number, whose exp() is 0.
NOTHING = -1e4


class TeacherSignal(ABC):
    """What the loss knows of the teacher at N positions. `signal[rows]` are some of them, `len(signal)` is N."""

    @property
    @abstractmethod
    def top_k(self) -> float:
        """How many of the teacher's most probable tokens are known; `math.inf` for the full vocabulary."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, rows: slice) -> "TeacherSignal": ...

    @classmethod
    @abstractmethod
    def cat(cls, signals: "Sequence[Any]") -> "TeacherSignal":
        """The signals of several micro-batches of one teacher, in their order."""

    def with_heads(self, change: Callable[[LMHead], LMHead]) -> "TeacherSignal":
        """The same signal, with each head that it has replaced by what `change` makes of it."""
        return self

    @abstractmethod
    def prepared(self, vocab_size: int) -> "TeacherSignal":
        """What can be done once for all chunks: the same signal, cut to the shared vocabulary."""

    @abstractmethod
    def compare(self, student_logits: Tensor, labels: Tensor) -> TokenDistributions:
        """Both models' distributions over the same outcomes, at positions of these logits `(N, V)` and labels `(N,)`;
        differentiable in the student's logits."""


@dataclass(frozen=True)
class HiddenStates(TeacherSignal):
    """
    A model's last hidden states and what makes logits of them. The student's have the same form.

    Attributes:
        states (`Tensor` `(N, H)`):
            At the positions that predict the response's tokens.
        head (`LMHead`):
            Whole, not a shard.
    """

    states: Tensor
    head: LMHead

    @property
    def top_k(self) -> float:
        return math.inf

    def __len__(self) -> int:
        return len(self.states)

    def __getitem__(self, rows: slice) -> "HiddenStates":
        return HiddenStates(self.states[rows], self.head)

    @classmethod
    def cat(cls, signals: "Sequence[HiddenStates]") -> "HiddenStates":
        return replace(signals[0], states=torch.cat([signal.states for signal in signals]))

    def with_heads(self, change: Callable[[LMHead], LMHead]) -> "HiddenStates":
        return replace(self, head=change(self.head))

    @torch.no_grad()
    def prepared(self, vocab_size: int) -> "HiddenStates":
        return replace(self, head=self.head.prepared(vocab_size))

    def compare(self, student_logits: Tensor, labels: Tensor) -> TokenDistributions:
        with torch.no_grad():
            teacher_logits = self.head.logits(self.states, student_logits.shape[-1])
        return TokenDistributions.from_logits(student_logits, teacher_logits, labels)


@dataclass(frozen=True)
class TopLogProbs(TeacherSignal):
    """
    The teacher's k most probable tokens at each position.

    Attributes:
        ids (`Tensor` `(N, k)`, long):
            Different from each other in a row, in any order; -1 in the place of one that is not known. At least one is.
        log_probs (`Tensor` `(N, k)`):
            Their log-probabilities in the teacher's full distribution, nats, no temperature. fp32 or more: in half
            precision what they leave to the rest is known to 0.001, and taken to be no less.
        label_log_probs (`Tensor` `(N,)`):
            Those of the response's tokens, whether among the k or not.

    Raises:
        `ValueError`: shapes that do not belong together, or k = 0.
    """

    ids: Tensor
    log_probs: Tensor
    label_log_probs: Tensor

    def __post_init__(self):
        shapes = {name: tuple(getattr(self, name).shape) for name in ("ids", "log_probs", "label_log_probs")}
        fits = len(shapes["ids"]) == 2 and shapes["ids"] == shapes["log_probs"] and self.ids.shape[-1] > 0
        if not fits or shapes["label_log_probs"] != shapes["ids"][:1]:
            raise ValueError(
                f"Shapes are {shapes}, but ids and log_probs are (N, k) with k of 1 or more, and label_log_probs is (N,)."
            )

    @property
    def top_k(self) -> float:
        return self.ids.shape[-1]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, rows: slice) -> "TopLogProbs":
        return TopLogProbs(self.ids[rows], self.log_probs[rows], self.label_log_probs[rows])

    @classmethod
    def cat(cls, signals: "Sequence[TopLogProbs]") -> "TopLogProbs":
        columns = ([getattr(s, name) for s in signals] for name in ("ids", "log_probs", "label_log_probs"))
        return cls(*map(torch.cat, columns))

    @torch.no_grad()
    def prepared(self, vocab_size: int) -> "TopLogProbs":
        is_left_out = (self.ids < 0) | (self.ids >= vocab_size)
        # The host waits for the device here, once for all chunks.
        if not bool(is_left_out.any()):
            return self
        if bool(is_left_out.all(-1).any()):
            raise ValueError(
                f"The teacher's {self.top_k} most probable tokens are all beyond the {vocab_size} ids that both models share, at some "
                "position. Ask for more of them (teacher_top_k), or use a teacher with the student's vocabulary."
            )
        ids, log_probs = self.ids.masked_fill(is_left_out, -1), self.log_probs.masked_fill(is_left_out, -math.inf)
        if ids.shape[-1] >= vocab_size:  # what was left out is told of as the rest, which needs a token
            order = log_probs.topk(vocab_size - 1, dim=-1).indices
            ids, log_probs = ids.gather(-1, order), log_probs.gather(-1, order)
        return TopLogProbs(ids, log_probs, self.label_log_probs)

    def compare(self, student_logits: Tensor, labels: Tensor) -> CoarseDistributions:
        all_student, is_left_out = log_probs(student_logits), self.ids < 0
        ids = torch.where(is_left_out, self.ids.amax(-1, keepdim=True), self.ids)  # in its place one that is known
        student = all_student.gather(-1, ids).masked_fill(is_left_out, NOTHING)
        # The logarithm of 0, which a server or a recording may hold, times a probability of 0 would be none.
        teacher = self.log_probs.to(torch.promote_types(self.log_probs.dtype, torch.float32)).clamp(min=NOTHING)
        teacher = ranked = teacher.masked_fill(is_left_out, NOTHING)  # above the rest: that ranks k at best
        if self.ids.shape[-1] < all_student.shape[-1]:
            # Not log(1 - sum), which has no digits left where the student is sure of the k tokens.
            rest = all_student.scatter(-1, ids, -math.inf).logsumexp(-1, keepdim=True)
            student = torch.cat([student, rest], dim=-1)
            # All that is known of the teacher's rest is what the k leave. Below the rounding of the type they came in, that
            # is noise or the logarithm of nothing. In float64 the sum adds no rounding to theirs.
            mass = teacher.double().exp().sum(-1, keepdim=True)
            rest = torch.log1p(-mass.clamp(max=1 - torch.finfo(self.log_probs.dtype).eps)).to(teacher.dtype)
            ranked = torch.cat([teacher, torch.full_like(rest, -math.inf)], dim=-1)
            teacher = torch.cat([teacher, rest], dim=-1)
        label_log_probs = self.label_log_probs.to(teacher.dtype).clamp(min=NOTHING)
        return CoarseDistributions(
            student_logits, ranked, all_student, student, teacher, labels, self.ids, label_log_probs
        )


@torch.no_grad()
def top_log_probs(
    hidden: Tensor, head: LMHead, labels: Tensor, k: int, vocab_size: int, chunk_size: int | None = None
) -> TopLogProbs:
    """
    The coarse signal of a local teacher, in chunks of positions: what a served one would send, or a recording keeps.

    Args:
        hidden (`Tensor` `(N, H)`), head (`LMHead`):
            The teacher's last hidden states and head.
        labels (`Tensor` `(N,)`):
            The response's tokens.
        k (`int`):
            How many tokens to keep, the most probable first.
        vocab_size (`int`):
            Tokens that both models share; logits beyond are cut first.
        chunk_size (`int`, *optional*):
            As in [`distillation_loss`].

    Raises:
        `ValueError`: k outside 1..vocab_size.
    """
    if not 1 <= k <= vocab_size:
        raise ValueError(f"k={k} is outside 1..{vocab_size}, the tokens there are; choose one within.")
    head = head.prepared(vocab_size)
    parts = []
    for rows in chunks(len(hidden), vocab_size, hidden.device, chunk_size):
        logits = head.logits(hidden[rows], vocab_size)
        all_log_probs, ids = log_probs(logits), logits.topk(k, dim=-1).indices
        parts.append((ids, all_log_probs.gather(-1, ids), at_labels(all_log_probs, labels[rows])))
    return TopLogProbs(*map(torch.cat, zip(*parts, strict=True)))


def check_signal(
    top_k: float,
    vocab_size: int,
    *,
    gate: "Gate | None" = None,
    divergence: Callable[[Tensor, Tensor], Tensor] | None = None,
    statistics: Iterable[str] = (),
) -> None:
    """
    Refuses what a signal cannot give; to be called before training, and called by the loss.

    Args:
        top_k (`float`):
            The signal's: how many tokens of the teacher are known, `math.inf` for hidden states.
        vocab_size (`int`):
            Tokens that both models share.
        gate (`Gate`), divergence (`Divergence` or function), statistics (names, *optional*):
            What is to be computed. A gate and a divergence say in `needs_top_k` what they need.

    Raises:
        `ValueError`: the gate, the divergence or a statistic needs more tokens than the signal has.
    """
    needs = {f"statistic {name}": math.inf for name in sorted(FULL_VOCABULARY_STATISTICS.intersection(statistics))}
    if gate is not None:
        needs[f"gate {gate.name}"] = gate.needs_top_k
    needs["divergence"] = getattr(divergence, "needs_top_k", 1)
    for what, needed in needs.items():
        if top_k < min(needed, vocab_size):
            remedy = (
                f"the full vocabulary: use a teacher whose hidden states are at hand, or a signal with k={vocab_size}"
                if needed >= vocab_size
                else f"{needed}: ask for a signal with k={needed} or more"
            )
            raise ValueError(
                f"The teacher's signal has its {top_k} most probable tokens, but the {what} needs {remedy}; or choose another."
            )
