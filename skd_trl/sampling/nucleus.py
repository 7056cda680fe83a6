"""Draws from a nucleus without a sort of the vocabulary, and without asking the device whether that was right.

The nucleus is looked for among a number of most probable tokens that is fixed before a round. Where it does not fit, the round says so
by row: such a row keeps nothing of the round, and is written again with more candidates, in the end with all. As noise is
keyed by position, its text is the same. Texts need few candidates for long stretches and many for others, so the larger number
is kept for a while.

Shapes: N rows, `...` leading ones of N rows, V vocabulary, C candidates.
"""

import torch

from .sampling_params import (
    SamplingParams,
    at_least,
    draw_from_probs,
    first_above,
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


class Nucleus:
    """Finds the nuclei of one sampling.

    Args:
        ladder (`tuple` of `int`): how many candidates are tried, one after the other, before all. With none, nothing ever misses.

    Attributes:
        level (`int`): which of them is tried.
        fitting (`list` of `torch.BoolTensor` of shape `(N, ...)`): of each draw of this round, the rows whose nucleus fitted.
    """

    PATIENCE = 16  # rounds for which a larger number of candidates is kept

    def __init__(self, ladder: tuple[int, ...] = ()):
        self.ladder, self.level, self.num_rounds_left = ladder, 0, 0
        self.fitting: list[torch.Tensor] = []

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
            return draw_from_probs(self.probs(logits, sampling), uniforms)
        ordered, ids = softmax_at(logits, sampling.temperature).topk(num_candidates, dim=-1)
        if sampling.top_k:
            ordered = _without(ordered, ordered < ordered[..., sampling.top_k - 1 : sampling.top_k])
        least = ordered[..., sampling.top_k - 1 : sampling.top_k]
        if sampling.top_p < 1.0:
            ordered = ordered / ordered.sum(-1, keepdim=True) if sampling.top_k else ordered
            least = least_of(ordered, sampling.top_p)
        is_outside = ordered < least
        self.fitting.append(is_outside[..., -1:])
        # In the vocabulary's order, in which the plain draw counts.
        ids, order = ids.sort(dim=-1)
        cumulative = _without(ordered, is_outside).gather(-1, order).cumsum(-1, dtype=torch.float64)
        return ids.gather(-1, first_above(cumulative, target(cumulative[..., -1:], uniforms))).squeeze(-1)

    def probs(self, logits: torch.Tensor, sampling: SamplingParams) -> torch.Tensor:
        """As [`~skd_trl.sampling.sampling_params.shaped_probs`], where the nucleus fits."""
        num_candidates = self.num_candidates(logits.shape[-1])
        if sampling.temperature == 0.0 or sampling.top_p == 1.0:
            return shaped_probs(logits, sampling)
        probs = tempered_probs(logits, sampling)
        if num_candidates is None:
            return at_least(probs, least_of(probs.sort(dim=-1, descending=True).values, sampling.top_p))
        ordered = probs.topk(num_candidates, dim=-1).values
        least = least_of(ordered, sampling.top_p)
        self.fitting.append(ordered[..., -1:] < least)
        return at_least(probs, least)

    def begin_round(self) -> None:
        self.fitting = []

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
