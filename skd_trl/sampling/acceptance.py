"""Rules that judge drafted tokens: which of the student's proposals stay in the training text.

SKD (Xu et al., ICLR 2025, arXiv 2410.11325, Algorithm 1) keeps a token that is among the teacher's top K. The rules
here are that one, its two limits, and the other rules from the literature that fit the same sampler. A rule looks at a
whole draft at once and does not cut it at the first rejection: that is the sampler's part, like the drawing itself.

A new rule is a frozen dataclass with `__call__(draft) -> accepted (N, G)` and an entry in `ACCEPTANCE_RULES`.
Shapes: N rows, G drafted tokens, V vocabulary.
"""

from dataclasses import dataclass, field
from typing import ClassVar

import torch

from .draft import Draft
from .sampling_params import draw_among, draw_from_probs


@dataclass(frozen=True)
class AcceptanceRule:
    """Base of all rules.

    A rule is a frozen dataclass with `__call__(draft) -> accepted (N, G)`. `needs_student`: the sampler keeps the student's
    logits of the draft. `drafts`: False for a rule that never accepts; the student then does not run. `judges`: False for one
    that always accepts; the teacher then does not run. A rule must not wait for the device (no `item`, no `if` on a tensor).
    """

    needs_student: ClassVar[bool] = False
    drafts: ClassVar[bool] = True
    judges: ClassVar[bool] = True

    def __call__(self, draft: Draft) -> torch.Tensor:
        raise NotImplementedError

    def replacement_probs(self, draft: Draft) -> torch.Tensor:
        """What a rejected token is replaced from, for a draft of one column: the teacher's distribution over the judgement's
        outcomes, (N, 1, V) or (N, 1, k)."""
        return draft.shaped_probs("teacher")

    def replacement(self, draft: Draft, uniforms: torch.Tensor) -> torch.Tensor:
        """The tokens (N,) that replace rejected ones, for a draft of one column, drawn with `uniforms` (N,) in [0, 1)."""
        if not self.judges:  # never used
            return draft.tokens.squeeze(1)
        if type(self).replacement_probs is AcceptanceRule.replacement_probs:  # then without building them
            return draft.judgement.draw(draft.teacher_sampling, draft.nucleus, uniforms)
        outcomes = draw_from_probs(self.replacement_probs(draft).squeeze(1), uniforms)
        return draft.judgement.tokens_of(outcomes[:, None]).squeeze(1)


@dataclass(frozen=True)
class TopK(AcceptanceRule):
    """Accept a token among the `k` tokens that the teacher ranks highest (SKD, Algorithm 1; the paper's k is 25)."""

    k: int = 25

    def __post_init__(self):
        if not isinstance(self.k, int) or self.k < 1:
            raise ValueError(
                f"k={self.k!r}: the top_k rule needs a whole number of at least 1. For the teacher's own "
                "text (the limit K = 0) use accept='never'."
            )

    def __call__(self, draft: Draft) -> torch.Tensor:
        return draft.teacher_rank < self.k


@dataclass(frozen=True)
class TopP(AcceptanceRule):
    """Accept a token in the teacher's nucleus: those that rank higher together have less than `p` (SKD's code offers it)."""

    p: float = 0.9

    def __post_init__(self):
        if not 0.0 < self.p <= 1.0:
            raise ValueError(f"p={self.p}: the top_p rule needs a share above 0 and at most 1.")

    def __call__(self, draft: Draft) -> torch.Tensor:
        if self.p == 1.0:  # the sum may round to 1
            return torch.ones_like(draft.tokens, dtype=torch.bool)
        return draft.judgement.mass_above(draft.tokens) < self.p


@dataclass(frozen=True)
class MinProb(AcceptanceRule):
    """Accept a token that the teacher gives at least probability `alpha` (CA-OPD, arXiv 2609.02401, which replaces by the
    teacher's argmax: `teacher_temperature=0`)."""

    alpha: float = 0.25

    def __post_init__(self):
        if not 0.0 <= self.alpha <= 1.0:
            raise ValueError(f"alpha={self.alpha}: the min_prob rule needs a probability, 0 to 1.")

    def __call__(self, draft: Draft) -> torch.Tensor:
        return draft.probability("teacher", shaped=False) >= self.alpha


@dataclass(frozen=True)
class Mixture(AcceptanceRule):
    """Texts drawn exactly from (1 - gamma) student + gamma teacher: accept with probability
    min(1, 1 - gamma + gamma p_teacher / p_student), replace from the residual [p_teacher - p_student]+ (IPD)."""

    gamma: float = 0.1
    needs_student: ClassVar[bool] = True

    def __post_init__(self):
        if not 0.0 <= self.gamma <= 1.0:
            raise ValueError(f"gamma={self.gamma}: the mixture rule needs a share, 0 (student) to 1 (teacher).")

    def __call__(self, draft: Draft) -> torch.Tensor:
        student, teacher = draft.both_probabilities()
        return draft.coins * student < torch.lerp(student, teacher, self.gamma)

    def replacement_probs(self, draft: Draft) -> torch.Tensor:
        student, teacher = draft.both_shaped_probs.unbind(1)
        residual = (teacher - student).clamp(min=0)
        # Equal distributions leave no residual, and are rejected by rounding only.
        return torch.where(residual.sum(-1, keepdim=True) > 0, residual, teacher)

    def replacement(self, draft: Draft, uniforms: torch.Tensor) -> torch.Tensor:
        is_own = type(self).replacement_probs is Mixture.replacement_probs
        candidates = draft.teacher_candidates() if is_own and draft.judgement.has_all_outcomes else None
        if candidates is None:
            return super().replacement(draft, uniforms)
        # The residual is among the candidates for the teacher's nucleus. Where it leaves nothing, the teacher's favourite will do.
        ids = candidates.sort(dim=-1).values
        both = draft.both_shaped_probs.gather(-1, ids[:, None].expand(-1, 2, -1, -1))
        residual = (both[:, 1] - both[:, 0]).clamp_(min=0)
        return draw_among(residual.squeeze(1), ids.squeeze(1), uniforms, otherwise=candidates[:, 0, :1])


@dataclass(frozen=True)
class Speculative(Mixture):
    """Texts drawn exactly from the teacher: accept with probability min(1, p_teacher / p_student), replace from the
    residual (speculative sampling, Leviathan et al., ICML 2023): sequence-level distillation, drafted by the student."""

    gamma: float = field(default=1.0, init=False)


@dataclass(frozen=True)
class Always(AcceptanceRule):
    """Accept everything: the student's own text, on-policy distillation (SKD's limit K = V)."""

    judges: ClassVar[bool] = False

    def __call__(self, draft: Draft) -> torch.Tensor:
        return torch.ones_like(draft.tokens, dtype=torch.bool)


@dataclass(frozen=True)
class Never(AcceptanceRule):
    """Accept nothing: the teacher's own text, sequence-level distillation (SKD's limit K = 0)."""

    drafts: ClassVar[bool] = False

    def __call__(self, draft: Draft) -> torch.Tensor:
        return torch.zeros_like(draft.tokens, dtype=torch.bool)


ACCEPTANCE_RULES: dict[str, type[AcceptanceRule]] = {
    "top_k": TopK,
    "top_p": TopP,
    "min_prob": MinProb,
    "mixture": Mixture,
    "speculative": Speculative,
    "always": Always,
    "never": Never,
}
