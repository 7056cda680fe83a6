"""Draws from a nucleus without a sort of the vocabulary, and without asking the device whether that was right.

The nucleus is looked for among a number of most probable tokens that is fixed before a round. Where it does not fit, the round says so
by row: such a row keeps nothing of the round, and is written again with more candidates, in the end with all. As noise is
keyed by position, its text is the same. Texts need few candidates for long stretches and many for others, so the larger number
is kept for a while.

Shapes: N rows, `...` leading ones of N rows, V vocabulary, C candidates.
"""

from dataclasses import dataclass

import torch

from .sampling_params import (
    SamplingParams,
    at_least,
    draw_from_probs,
    least_of,
    shaped_probs,
    softmax_at,
    target,
    tempered_probs,
)


# On CPU few candidates are much cheaper.
CANDIDATES_ON_CPU, CANDIDATES = (64, 1024), (1024,)
# A vocabulary of fewer entries for each candidate is sorted at once.
LEAST_SHARE = 16


@dataclass(frozen=True)
class Uncut:
    """A distribution and where it is to be cut.

    Attributes:
        probs (`torch.Tensor` of shape `(..., V)`): at its temperature, summing to 1.
        least (`torch.Tensor` of shape `(..., 1)`, *optional*): what is below it does not count. By default all counts.
        ids (`torch.LongTensor` of shape `(..., C)`, *optional*): the candidates among which is all that counts, where it fits.
    """

    probs: torch.Tensor
    least: torch.Tensor | None = None
    ids: torch.Tensor | None = None

    def cut(self) -> torch.Tensor:
        return self.probs if self.least is None else at_least(self.probs, self.least)


class Nucleus:
    """Finds the nuclei of one sampling.

    Args:
        ladder (`tuple` of `int`): how many candidates are tried, one after the other, before all. With none, nothing ever misses.

    Attributes:
        level (`int`): which of them is tried.
        fitting (`list` of `torch.BoolTensor` of shape `(N, ...)`): of each draw of this round, the rows whose nucleus fitted.
        drawn (`list` of [`Uncut`], *optional*): what each draw of this round was from, if that is kept.
    """

    PATIENCE = 16  # rounds for which a larger number of candidates is kept

    def __init__(self, ladder: tuple[int, ...] = ()):
        self.ladder, self.level, self.num_rounds_left = ladder, 0, 0
        self.fitting: list[torch.Tensor] = []
        self.drawn: list[Uncut] | None = None
        self._sorted: torch.Tensor | None = None

    def num_candidates(self, vocab_size: int, top_k: int = 0) -> int | None:
        """C, above `top_k`, or `None` for all."""
        enough = (number for number in self.ladder[self.level :] if number * LEAST_SHARE <= vocab_size)
        return next((number for number in enough if number > top_k), None)

    def draw(self, logits: torch.Tensor, sampling: SamplingParams, uniforms: torch.Tensor) -> torch.Tensor:
        """As [`~skd_trl.sampling.sampling_params.draw`], where the nucleus fits."""
        if sampling.temperature == 0.0:
            return logits.argmax(-1)
        num_candidates = self.num_candidates(logits.shape[-1], sampling.top_k)
        if (sampling.top_p == 1.0 and sampling.top_k == 0) or num_candidates is None:
            uncut = self.uncut(logits, sampling)
            self._keep(uncut)
            return draw_from_probs(uncut.cut(), uniforms)
        probs = softmax_at(logits, sampling.temperature)
        ordered, ids = probs.topk(num_candidates, dim=-1)
        if sampling.top_k:
            ordered = _without(ordered, ordered < ordered[..., sampling.top_k - 1 : sampling.top_k])
        least = ordered[..., sampling.top_k - 1 : sampling.top_k]
        if sampling.top_p < 1.0:
            ordered = ordered / ordered.sum(-1, keepdim=True) if sampling.top_k else ordered
            least = least_of(ordered, sampling.top_p)
        is_outside = ordered < least
        self.fitting.append(is_outside[..., -1:])
        if not sampling.top_k:
            self._keep(Uncut(probs, least))
        # In the vocabulary's order, in which the plain draw counts. One more id, 0, takes an index that no probability decided
        # (where these are no numbers: the loss says so). All draws of a round use the same memory.
        shape = (2, *ids.shape[:-1], ids.shape[-1] + 1)
        if self._sorted is None or self._sorted.shape != shape:
            self._sorted = ids.new_zeros(shape)
        values, order = self._sorted[..., :-1]
        torch.sort(ids, dim=-1, out=(values, order))
        ids = self._sorted[0]
        cumulative = _without(ordered, is_outside).gather(-1, order).cumsum(-1, dtype=torch.float64)
        index = torch.searchsorted(cumulative, target(cumulative[..., -1:], uniforms), right=True)
        return ids.gather(-1, index).squeeze(-1)

    def probs(self, logits: torch.Tensor, sampling: SamplingParams) -> torch.Tensor:
        """As [`~skd_trl.sampling.sampling_params.shaped_probs`], where the nucleus fits."""
        return self.uncut(logits, sampling).cut()

    def uncut(self, logits: torch.Tensor, sampling: SamplingParams) -> Uncut:
        """The distribution that is drawn from, and where its nucleus ends, if that fits."""
        num_candidates = self.num_candidates(logits.shape[-1])
        if sampling.temperature == 0.0 or sampling.top_p == 1.0:
            return Uncut(shaped_probs(logits, sampling))
        probs = tempered_probs(logits, sampling)
        if num_candidates is None:
            return Uncut(probs, least_of(probs.sort(dim=-1, descending=True).values, sampling.top_p))
        ordered, ids = probs.topk(num_candidates, dim=-1)
        least = least_of(ordered, sampling.top_p)
        self.fitting.append(ordered[..., -1:] < least)
        return Uncut(probs, least, ids)

    def _keep(self, uncut: Uncut) -> None:
        if self.drawn is not None:
            self.drawn.append(uncut)

    def take_drawn(self) -> tuple[Uncut, ...]:
        """What the draws of this round until now were from, if that was kept. No more is."""
        drawn, self.drawn = self.drawn or (), None
        return tuple(drawn)

    def begin_round(self, keeps_drawn: bool = False) -> None:
        """Nothing is known of this round's draws yet. `keeps_drawn`: what they are from is kept until the next one."""
        self.fitting, self.drawn, self._sorted = [], [] if keeps_drawn else None, None

    def fitted(self, num_rows: int) -> torch.Tensor | None:
        """The rows (N,) of this round of which every draw fitted, or `None` if all must: the last candidate is outside the nucleus, or
        some id beyond it may be inside, or tie with the last one inside."""
        if not self.fitting:
            return None
        return torch.cat([fitted.reshape(num_rows, -1) for fitted in self.fitting], dim=1).all(dim=1)

    def observe(self, num_missed: int) -> None:
        """After a round: more candidates where they were too few, fewer again after some rounds in which they were enough."""
        if num_missed:
            self.level, self.num_rounds_left = min(self.level + 1, len(self.ladder)), self.PATIENCE
        elif self.level and self.num_rounds_left == 0:
            self.level, self.num_rounds_left = self.level - 1, self.PATIENCE
        else:
            self.num_rounds_left = max(self.num_rounds_left - 1, 0)


def _without(probs: torch.Tensor, is_outside: torch.Tensor) -> torch.Tensor:
    """`probs` with 0 where `is_outside`, in one operator that no tensor is copied for."""
    return torch.addcmul(probs, probs, is_outside, value=-1)
