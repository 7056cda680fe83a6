"""A judgement from what a server sends: the teacher's k most probable tokens, and rank and probability of each proposal.

The top-K rule, `min_prob` and greedy replacement are exact. So is what looks at the teacher's nucleus, where that lies among the
k tokens: a temperature T below 1 makes what is outside negligible, and it is bounded here (at most its mass times p_k^(1/T - 1), p_k the
least probable of the k). Elsewhere a replacement is drawn among the k tokens; `teacher_mass_outside` says what is left out.

Shapes: N rows, G drafted tokens, k known tokens, V vocabulary.
"""

import math
from dataclasses import dataclass

import torch

from .draft import Judgement, take_column
from .nucleus import Nucleus
from .sampling_params import SamplingParams, at_least, draw_from_probs, least_of


# The names under which a response keeps what the teacher said of it.
TOP_IDS, TOP_LOG_PROBS, LABEL_LOG_PROBS = "teacher_top_ids", "teacher_top_log_probs", "teacher_label_log_probs"


@dataclass(frozen=True)
class Scores:
    """
    What a teacher says of some positions. The leading shape is (N, G), or any other.

    Attributes:
        ids (`torch.LongTensor` of shape `(N, G, k)`): its most probable tokens, in ascending order of their ids; -1 in the place of one
            that was left out.
        log_probs (`torch.Tensor` of shape `(N, G, k)`): theirs, in nats, of the full distribution at temperature 1; fp32. Minus infinity
            where one was left out.
        token_log_probs (`torch.Tensor` of shape `(N, G)`): those of the tokens that were judged.
        token_ranks (`torch.LongTensor` of shape `(N, G)`): how many tokens are more probable than each of these; -1 where none was
            judged.
    """

    ids: torch.Tensor
    log_probs: torch.Tensor
    token_log_probs: torch.Tensor
    token_ranks: torch.Tensor

    def within(self, num_ids: int) -> "Scores":
        """Without the ids from `num_ids` on, which the student does not have (a head that is padded further): what they have is left to
        the tokens that are not known.

        Raises:
            `ValueError`: where no id is left.
        """
        is_beyond = self.ids >= num_ids
        if not bool(is_beyond.any()):
            return self
        if bool(is_beyond.all(-1).any()):
            k = self.ids.shape[-1]
            raise ValueError(
                f"The teacher's {k} most probable tokens are all beyond the {num_ids} ids that both models share, at some position. Ask "
                "for more of them (teacher_top_k), or serve a teacher with the student's vocabulary."
            )
        above = (is_beyond & (self.log_probs > self.token_log_probs[..., None])).sum(-1)
        return Scores(
            self.ids.masked_fill(is_beyond, -1),
            self.log_probs.masked_fill(is_beyond, -math.inf),
            self.token_log_probs,
            torch.where(self.token_ranks < 0, self.token_ranks, self.token_ranks - above),
        )


class TopJudgement(Judgement):
    """
    Args:
        scores ([`Scores`]): of the proposals (N, G).
        vocab_size (`int`): V, how many tokens there are.
    """

    def __init__(self, scores: Scores, vocab_size: int):
        object.__setattr__(self, "scores", scores)
        object.__setattr__(self, "vocab_size", vocab_size)
        signal = {
            TOP_IDS: scores.ids,
            TOP_LOG_PROBS: scores.log_probs,
            LABEL_LOG_PROBS: scores.token_log_probs.clone(),  # of the proposals, until `decide`
        }
        object.__setattr__(self, "signal", signal)

    has_all_outcomes = False
    scores: Scores
    vocab_size: int

    @property
    def logits(self) -> torch.Tensor:  # type: ignore[override]
        raise ValueError(
            f"The rule asks for the teacher's logits, but this teacher sends its {self.scores.ids.shape[-1]} most probable tokens. "
            "Use `draft.teacher_rank`, `draft.probability` or `draft.judgement.mass_above` in the rule, or a teacher in this process."
        )

    def rank(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.scores.token_ranks

    def mass_above(self, tokens: torch.Tensor) -> torch.Tensor:
        """Exact for a token among the k; for another one at least this much, its rank and its own probability considered."""
        own, ranks = self.scores.token_log_probs[..., None], self.scores.token_ranks
        known = torch.where(self.scores.log_probs > own, self.scores.log_probs, -math.inf).exp().sum(-1)
        between = (ranks - (self.scores.ids >= 0).sum(-1)).clamp(min=0)
        return known + between * self.scores.token_log_probs.exp()

    def probability(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.scores.token_log_probs.exp()

    def shaped_probability(self, tokens: torch.Tensor, sampling: SamplingParams, nucleus: Nucleus) -> torch.Tensor:
        is_token = self.scores.ids == tokens[..., None]
        inside = torch.where(is_token, self.shaped_probs(sampling, nucleus), 0.0).sum(-1)
        if sampling.temperature == 0.0 or sampling.top_p < 1.0 or sampling.top_k > 0:
            return inside
        outside = self.scores.token_log_probs / sampling.temperature - self._log_total(sampling.temperature)
        return torch.where(is_token.any(-1), inside, outside.exp())

    def shaped_probs(self, sampling: SamplingParams, nucleus: Nucleus) -> torch.Tensor:
        """(N, G, k); without nucleus and top-k they sum to less than 1 by what lies outside."""
        if sampling.temperature == 0.0:
            best = self.scores.log_probs.argmax(-1, keepdim=True)
            return torch.zeros_like(self.scores.log_probs).scatter_(-1, best, 1.0)
        total = self._log_total(sampling.temperature)[..., None]
        probs = (self.scores.log_probs / sampling.temperature - total).exp()
        if 0 < sampling.top_k < probs.shape[-1]:
            probs = at_least(probs, probs.topk(sampling.top_k, dim=-1).values[..., -1:])
        if sampling.top_p < 1.0:
            probs = at_least(probs, least_of(probs.sort(dim=-1, descending=True).values, sampling.top_p))
        return probs

    def draw(self, sampling: SamplingParams, nucleus: Nucleus, uniforms: torch.Tensor) -> torch.Tensor:
        outcomes = draw_from_probs(self.shaped_probs(sampling, nucleus).squeeze(1), uniforms)
        return self.tokens_of(outcomes[:, None]).squeeze(1)

    def _log_total(self, temperature: float) -> torch.Tensor:
        """Logarithm of the sum of p^(1/T) over all tokens, (N, G), those outside the k by their bound."""
        log_probs, is_known = self.scores.log_probs, self.scores.ids >= 0
        known = (log_probs / temperature).logsumexp(-1)
        if self.vocab_size <= self.scores.ids.shape[-1]:
            return known
        mass = log_probs.double().exp().sum(-1)
        log_outside = torch.log1p(-mass.clamp(max=1.0)).to(known.dtype)  # -inf where the k have all
        if temperature <= 1.0:
            outside = log_outside + (1 / temperature - 1) * log_probs.masked_fill(~is_known, math.inf).amin(-1)
        else:  # many tokens of equal probability have the largest sum
            outside = log_outside / temperature + (1 - 1 / temperature) * (self.vocab_size - is_known.sum(-1)).log()
        return torch.logaddexp(known, outside)

    def at_outcomes(self, values: torch.Tensor) -> torch.Tensor:
        return values.gather(-1, self.scores.ids.clamp(min=0))  # of one left out anything: its probability is 0

    def tokens_of(self, outcomes: torch.Tensor) -> torch.Tensor:
        return self.scores.ids.gather(-1, outcomes[..., None]).squeeze(-1)

    def decide(self, block: torch.Tensor) -> None:
        """Tells the loss of the tokens (N, G) that were written: a replacement is one of the k."""
        is_token = self.scores.ids == block[..., None]
        inside = torch.where(is_token, self.scores.log_probs, 0.0).sum(-1)
        label_log_probs = torch.where(is_token.any(-1), inside, self.scores.token_log_probs)
        self.signal[LABEL_LOG_PROBS].copy_(label_log_probs)

    def column(self, index: torch.Tensor) -> "TopJudgement":
        scores = self.scores
        return TopJudgement(
            Scores(
                take_column(scores.ids, index),
                take_column(scores.log_probs, index),
                take_column(scores.token_log_probs, index),
                take_column(scores.token_ranks, index),
            ),
            self.vocab_size,
        )
