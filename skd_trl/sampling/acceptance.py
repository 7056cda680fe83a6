"""Rules that judge drafted tokens: which of the student's proposals stay in the training text.

SKD (Xu et al., ICLR 2025, arXiv 2410.11325, Algorithm 1) keeps a token that is among the teacher's top K. The rules
here are that one, its two limits, and the other rules from the literature that fit the same sampler. A rule looks at a
whole draft at once and does not cut it at the first rejection: that is the sampler's part, like the drawing itself.

A new rule is a frozen dataclass with `__call__(draft) -> accepted (N, G)` and an entry in `ACCEPTANCE_RULES`.
Shapes: N rows, G drafted tokens, V vocabulary.
"""

from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar

import torch

from .nucleus import Nucleus
from .sampling_params import SamplingParams, draw_from_probs


@dataclass(frozen=True)
class Judgement:
    """What a teacher says of a draft: here its logits, so everything. [`TopJudgement`] knows only its top k.

    Attributes:
        logits (`torch.Tensor` of shape `(N, G, V)`):
            Raw. V is 0 where nothing was judged.
        signal (`dict` of `torch.Tensor` of shape `(N, G, ...)`):
            What the loss may use of the teacher at each of these tokens, kept with the responses under these names.
    """

    has_all_outcomes: ClassVar[bool] = True  # is over the whole vocabulary
    logits: torch.Tensor
    signal: dict[str, torch.Tensor]

    def rank(self, tokens: torch.Tensor) -> torch.Tensor:
        """How many ids the teacher ranks higher than `tokens` (N, G): (N, G), -1 where nothing was judged."""
        if self.logits.shape[-1] == 0:
            return torch.full_like(tokens, -1)
        return (self.logits > self.logits.gather(-1, tokens[..., None])).sum(-1)

    def probability(self, tokens: torch.Tensor) -> torch.Tensor:
        """The probability (N, G) of `tokens` (N, G) at temperature 1 over the whole vocabulary."""
        return self.logits.float().softmax(-1).gather(-1, tokens[..., None]).squeeze(-1)

    def mass_above(self, tokens: torch.Tensor) -> torch.Tensor:
        """The probability (N, G) of all ids that the teacher ranks higher than `tokens` (N, G)."""
        probs = self.logits.float().softmax(-1)
        return (probs * (probs > probs.gather(-1, tokens[..., None]))).sum(-1)

    def shaped_probs(self, sampling: SamplingParams, nucleus: Nucleus) -> torch.Tensor:
        """The distribution that is drawn from, over the outcomes that `at_outcomes` and `tokens_of` know: (N, G, V)."""
        return nucleus.probs(self.logits, sampling)

    def shaped_probability(self, tokens: torch.Tensor, sampling: SamplingParams, nucleus: Nucleus) -> torch.Tensor:
        """The probability (N, G) of `tokens` (N, G) in that distribution."""
        return self.shaped_probs(sampling, nucleus).gather(-1, tokens[..., None]).squeeze(-1)

    def draw(self, sampling: SamplingParams, nucleus: Nucleus, uniforms: torch.Tensor) -> torch.Tensor:
        """Draws from it with `uniforms` (N,), of a judgement of one column: the tokens (N,)."""
        return nucleus.draw(self.logits.squeeze(1), sampling, uniforms)

    def at_outcomes(self, values: torch.Tensor) -> torch.Tensor:
        """Of `values` (N, G, V) those at the outcomes: here all."""
        return values

    def tokens_of(self, outcomes: torch.Tensor) -> torch.Tensor:
        """The ids (N, G) of outcomes (N, G): here they are ids."""
        return outcomes

    def decide(self, block: torch.Tensor) -> None:
        """Is told of the tokens (N, G) that were written, where the loss's signal depends on them: here it does not."""

    def column(self, index: torch.Tensor) -> "Judgement":
        """The judgement of one column per row, `index` (N, 1), without the loss's signal."""
        return Judgement(take_column(self.logits, index), {})


def take_column(values: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Columns `index` (N, 1) of `values` (N, G, ...): (N, 1, ...)."""
    index = index.reshape(*index.shape, *(1,) * (values.ndim - 2))
    return values.gather(1, index.expand(-1, 1, *values.shape[2:]))


@dataclass(frozen=True)
class Draft:
    """What a rule may look at. Row `i, j` of the logits is the distribution that token `i, j` was judged by.

    Attributes:
        tokens (`torch.LongTensor` of shape `(N, G)`): the student's proposals; -100 where it drafted nothing.
        student_logits (`torch.Tensor` of shape `(N, G, V)`): raw; V is 0 but for rules with `needs_student`.
        judgement ([`Judgement`]): the teacher's.
        student_sampling, teacher_sampling ([`SamplingParams`]): how either model's draws are shaped.
        coins (`torch.Tensor` of shape `(N, G)`): uniform numbers in [0, 1) for rules that accept by chance.
        nucleus ([`~skd_trl.sampling.nucleus.Nucleus`], *optional*): how this round finds nuclei; by default by sorting.
        is_drafted (`bool`, *optional*, defaults to `True`): whether there are proposals.
    """

    tokens: torch.Tensor
    student_logits: torch.Tensor
    judgement: Judgement
    student_sampling: SamplingParams
    teacher_sampling: SamplingParams
    coins: torch.Tensor
    nucleus: Nucleus = field(default_factory=Nucleus)
    is_drafted: bool = True

    @property
    def teacher_logits(self) -> torch.Tensor:
        """(N, G, V), raw."""
        return self.judgement.logits

    @cached_property
    def teacher_rank(self) -> torch.Tensor:
        """How many ids the teacher ranks higher than the proposal, (N, G): 0 is its favourite. Ties count for the proposal.
        Of raw logits: temperature and nucleus would turn a rank below the top few into a tie at zero. -1 where nothing was
        drafted or judged."""
        return self.judgement.rank(self.tokens) if self.is_drafted else torch.full_like(self.tokens, -1)

    def column(self, index: torch.Tensor) -> "Draft":
        """The draft of one column per row, `index` (N, 1): what a replacement is drawn from."""
        return _Column(self, index)

    def probability(self, of: str, shaped: bool = True) -> torch.Tensor:
        """Probability of the proposals under `"student"` or `"teacher"`, (N, G), as drawn from or (`shaped=False`)
        at temperature 1 over the whole vocabulary."""
        judgement = Judgement(self.student_logits, {}) if of == "student" else self.judgement
        if not shaped:
            return judgement.probability(self.tokens)
        if self.judgement.has_all_outcomes:
            return self.shaped_probs(of).gather(-1, self.tokens[..., None]).squeeze(-1)
        sampling = self.student_sampling if of == "student" else self.teacher_sampling
        return judgement.shaped_probability(self.tokens, sampling, self.nucleus)

    def shaped_probs(self, of: str) -> torch.Tensor:
        """The distributions that `"student"` or `"teacher"` draws from, over the judgement's outcomes: (N, G, V), or (N, G, k) where the
        teacher sends its top k. A rule that takes them from here never waits for the device, and no vocabulary is sorted where
        the nuclei are small."""
        if of not in self._shaped_probs:
            if of == "student":
                probs = self.judgement.at_outcomes(self.nucleus.probs(self.student_logits, self.student_sampling))
            else:
                probs = self.judgement.shaped_probs(self.teacher_sampling, self.nucleus)
            self._shaped_probs[of] = probs
        return self._shaped_probs[of]

    @cached_property
    def _shaped_probs(self) -> dict[str, torch.Tensor]:
        return {}


class _Column(Draft):
    """A column of a draft, of which only what is asked for is taken out."""

    draft: Draft
    index: torch.Tensor

    def __init__(self, draft: Draft, index: torch.Tensor):
        names = ("student_sampling", "teacher_sampling", "nucleus", "is_drafted")
        vars(self).update({name: getattr(draft, name) for name in names}, draft=draft, index=index)

    @cached_property
    def tokens(self) -> torch.Tensor:  # type: ignore[override]
        return self.draft.tokens.gather(1, self.index)

    @cached_property
    def student_logits(self) -> torch.Tensor:  # type: ignore[override]
        return take_column(self.draft.student_logits, self.index)

    @cached_property
    def judgement(self) -> Judgement:  # type: ignore[override]
        return self.draft.judgement.column(self.index)

    @cached_property
    def coins(self) -> torch.Tensor:  # type: ignore[override]
        return self.draft.coins.gather(1, self.index)

    @cached_property
    def _shaped_probs(self) -> dict[str, torch.Tensor]:
        # Where the rule has judged by them, they are there.
        return {of: take_column(probs, self.index) for of, probs in self.draft._shaped_probs.items()}


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
        student, teacher = draft.probability("student"), draft.probability("teacher")
        return draft.coins * student < (1 - self.gamma) * student + self.gamma * teacher

    def replacement_probs(self, draft: Draft) -> torch.Tensor:
        teacher = draft.shaped_probs("teacher")
        residual = (teacher - draft.shaped_probs("student")).clamp(min=0)
        # Equal distributions leave no residual, and are rejected by rounding only.
        return torch.where(residual.sum(-1, keepdim=True) > 0, residual, teacher)


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

    def replacement(self, draft: Draft, uniforms: torch.Tensor) -> torch.Tensor:
        return draft.tokens.squeeze(1)  # never used


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
