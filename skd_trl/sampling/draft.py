"""What a round knows when it decides: the teacher's judgement of a draft, and the draft itself.

Nothing is computed before a rule asks for it. What the student's draws have found out, softmax and the edge of the nucleus, is not
computed again, and where both models have a nucleus, both distributions are cut in the same operators.

Shapes: N rows, G drafted tokens, V vocabulary, C candidates, k tokens that a served teacher sends.
"""

from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar

import torch

from .nucleus import Nucleus, Uncut
from .sampling_params import SamplingParams


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

    def uncut(self, sampling: SamplingParams, nucleus: Nucleus) -> Uncut:
        """The distribution that is drawn from, (N, G, V), and where its nucleus ends."""
        return nucleus.uncut(self.logits, sampling)

    def shaped_probs(self, sampling: SamplingParams, nucleus: Nucleus) -> torch.Tensor:
        """The distribution that is drawn from, over the outcomes that `at_outcomes` and `tokens_of` know: (N, G, V)."""
        return self.uncut(sampling, nucleus).cut()

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
        drawn (`tuple` of [`~skd_trl.sampling.nucleus.Uncut`], *optional*): of each column what the proposals were drawn from, (N, V), where
            that is known; else it is computed from the logits where a rule asks for it.
    """

    tokens: torch.Tensor
    student_logits: torch.Tensor
    judgement: Judgement
    student_sampling: SamplingParams
    teacher_sampling: SamplingParams
    coins: torch.Tensor
    nucleus: Nucleus = field(default_factory=Nucleus)
    is_drafted: bool = True
    drawn: tuple[Uncut, ...] = ()

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
        self._check_known(of)
        judgement = Judgement(self.student_logits, {}) if of == "student" else self.judgement
        if not shaped:
            return judgement.probability(self.tokens)
        if self.judgement.has_all_outcomes:
            return self.shaped_probs(of).gather(-1, self.tokens[..., None]).squeeze(-1)
        sampling = self.student_sampling if of == "student" else self.teacher_sampling
        return judgement.shaped_probability(self.tokens, sampling, self.nucleus)

    def _check_known(self, of: str) -> None:
        """Raises `ValueError` for another model than the two, or one whose logits were not kept."""
        if of not in ("student", "teacher"):
            raise ValueError(f"of={of!r} is neither 'student' nor 'teacher'.")
        if of == "student" and not self.drawn and self.student_logits.shape[-1] == 0:
            raise ValueError("The student's logits are not kept: a rule that looks at them sets needs_student = True.")

    def shaped_probs(self, of: str) -> torch.Tensor:
        """The distributions that `"student"` or `"teacher"` draws from, over the judgement's outcomes: (N, G, V), or (N, G, k) where the
        teacher sends its top k. A rule that takes them from here never waits for the device, and no vocabulary is sorted where
        the nuclei are small."""
        self._check_known(of)
        if of not in self._shaped_probs:
            if of == "student":
                probs = self.judgement.at_outcomes(self.student_uncut.cut())
            elif self.judgement.has_all_outcomes:
                probs = self.teacher_uncut.cut()
            else:
                probs = self.judgement.shaped_probs(self.teacher_sampling, self.nucleus)
            self._shaped_probs[of] = probs
        return self._shaped_probs[of]

    def both_probabilities(self) -> tuple[torch.Tensor, torch.Tensor]:
        """`probability("student")` and `probability("teacher")`, together."""
        if not self.judgement.has_all_outcomes:
            return self.probability("student"), self.probability("teacher")
        tokens = self.tokens[:, None, :, None].expand(-1, 2, -1, -1)
        student, teacher = self.both_shaped_probs.gather(-1, tokens).squeeze(-1).unbind(1)
        return student, teacher

    @cached_property
    def both_shaped_probs(self) -> torch.Tensor:
        """`shaped_probs("student")` and `shaped_probs("teacher")` as one tensor, (N, 2, G, V) or (N, 2, G, k)."""
        if self.drawn and self.judgement.has_all_outcomes:
            columns = [*self.drawn, self.teacher_uncut]
            least = [column.least for column in columns if column.least is not None]
            if len(least) in (0, len(columns)):  # cut together
                both = torch.cat([*(own.probs[:, None] for own in self.drawn), self.teacher_uncut.probs], dim=1)
                if least:
                    edges = torch.cat([*(edge[:, None] for edge in least[:-1]), least[-1]], dim=1)
                    both.masked_fill_(both < edges, 0.0)  # as `at_least`, in place
                    both.div_(both.sum(-1, keepdim=True))
                return both.unflatten(1, (2, -1))
        return torch.stack([self.shaped_probs("student"), self.shaped_probs("teacher")], dim=1)

    def teacher_candidates(self) -> torch.Tensor | None:
        """Ids (N, G, C), the most probable first, among which is all that the teacher draws, if these are known to be fewer than all."""
        return self.teacher_uncut.ids

    @cached_property
    def student_uncut(self) -> Uncut:
        """The distributions that the student draws from, (N, G, V), and where their nuclei end."""
        if not self.drawn:
            return self.nucleus.uncut(self.student_logits, self.student_sampling)
        probs, least = torch.stack([own.probs for own in self.drawn], dim=1), [own.least for own in self.drawn]
        return Uncut(probs, None if least[0] is None else torch.stack(least, dim=1))  # type: ignore[arg-type]

    @cached_property
    def teacher_uncut(self) -> Uncut:
        """The distributions that the teacher draws from, (N, G, V), and where their nuclei end."""
        return self.judgement.uncut(self.teacher_sampling, self.nucleus)

    @cached_property
    def _shaped_probs(self) -> dict[str, torch.Tensor]:
        return {}


class DraftInSteps(Draft):
    """A draft that was just written. The student's logits are put together only if a rule asks for them.

    Args:
        steps (`list`): of each column the tokens (N,) and the student's logits (N, V).
        facts: everything else, by name.
    """

    steps: list[tuple[torch.Tensor, torch.Tensor]]
    needs_student: bool

    def __init__(self, steps: list[tuple[torch.Tensor, torch.Tensor]], needs_student: bool, **facts):
        vars(self).update(facts, steps=steps, needs_student=needs_student)

    @cached_property
    def student_logits(self) -> torch.Tensor:  # type: ignore[override]
        if not self.needs_student:
            return self.steps[0][1][:, None, :0].expand(-1, len(self.steps), -1)
        return torch.stack([logits for _, logits in self.steps], dim=1)


class _Column(Draft):
    """A column of a draft, of which only what is asked for is taken out."""

    draft: Draft
    index: torch.Tensor

    def __init__(self, draft: Draft, index: torch.Tensor):
        names = ("student_sampling", "teacher_sampling", "nucleus", "is_drafted")
        vars(self).update({name: getattr(draft, name) for name in names}, draft=draft, index=index, drawn=())

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

    # Where the rule has judged by them, they are there.

    @cached_property
    def _shaped_probs(self) -> dict[str, torch.Tensor]:
        return {of: take_column(probs, self.index) for of, probs in self.draft._shaped_probs.items()}

    @cached_property
    def both_shaped_probs(self) -> torch.Tensor:
        if "both_shaped_probs" not in vars(self.draft):
            return super().both_shaped_probs
        both = self.draft.both_shaped_probs
        return both.gather(2, self.index[:, None, :, None].expand(-1, 2, -1, both.shape[-1]))

    def teacher_candidates(self) -> torch.Tensor | None:
        if "teacher_uncut" not in vars(self.draft):
            return super().teacher_candidates()
        ids = self.draft.teacher_uncut.ids
        return None if ids is None else take_column(ids, self.index)
