"""Which positions a distillation loss listens to, and how loudly: one weight in [0, 1] per response position.

SpecKD (arXiv 2510.24021): L = 1/|y| sum_t w_t D(p_t || q_t), w without gradient. Every gate gives an acceptance A in
[0, 1] and a floor b, and w = b + (1 - b) A; it counts as accepted where A >= 1/2 (for a hard gate: A = 1).
A gate sees raw logits (no temperature), response positions only, a chunk of them at a time, and draws no noise of its
own. A new one is a function and an entry. How the weights are normalised is the trainer's choice, not the gate's.

Shapes: N positions, V vocabulary, U uniforms per position, S scores per position. p is the teacher, q the student.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .token_distributions import TokenDistributions


@dataclass(frozen=True)
class Gate:
    """
    A gate: `gate(student_logits=..., teacher_logits=...)` gives weights `(N,)`, fp32, without gradient.

    Attributes:
        score (`Callable`):
            `score(distributions, labels, uniforms)`, called on one chunk of positions: acceptances `(N,)`, or for a
            gate that compares positions with each other, whatever `select` needs, `(N,)` or `(N, S)`.
        floor (`float`):
            Weight of a rejected position, in [0, 1].
        num_uniforms (`int`):
            How many numbers from U[0, 1) each position needs. They are the caller's, so that a weight depends neither
            on the chunk a position falls into nor on the global generator.
        needs_labels (`bool`):
            Whether the gate judges the response's own token.
        select (`Callable` or `None`):
            For a gate over a population: turns the scores of *all* its positions into acceptances `(N,)`. The
            population is what the caller gathered before calling (one micro-batch or, better, a whole accumulation
            window).
    """

    score: Callable[[TokenDistributions, Tensor | None, Tensor | None], Tensor]
    floor: float = 0.0
    num_uniforms: int = 0
    needs_labels: bool = False
    select: Callable[[Tensor], Tensor] | None = None

    def __post_init__(self):
        if not 0 <= self.floor <= 1:
            raise ValueError(
                f"floor={self.floor} is outside [0, 1], so it cannot weigh a rejected position; use 0 to ignore "
                f"rejected positions, 0.01 for SpecKD's default, 1 to switch the gate off."
            )

    @torch.no_grad()
    def __call__(
        self,
        *,
        student_logits: Tensor,
        teacher_logits: Tensor,
        labels: Tensor | None = None,
        uniforms: Tensor | None = None,
    ) -> Tensor:
        """
        Weights `(N,)` from logits `(N, V)`; `labels` `(N,)` are the response's tokens, `uniforms` `(N, num_uniforms)`.

        Raises:
            `ValueError`: labels or uniforms that the gate needs are missing, or k exceeds V.
        """
        distributions = TokenDistributions.from_logits(student_logits, teacher_logits)
        return self.weight(self.acceptance(self.scores(distributions, labels, uniforms)))

    def scores(self, distributions: TokenDistributions, labels: Tensor | None, uniforms: Tensor | None) -> Tensor:
        """`score`, with its inputs checked."""
        if self.needs_labels and labels is None:
            raise ValueError(
                "This gate judges the response's own token, and no labels came with the logits; pass labels."
            )
        num_positions = distributions.student_logits.shape[0]
        if self.num_uniforms and (uniforms is None or uniforms.shape != (num_positions, self.num_uniforms)):
            found = None if uniforms is None else tuple(uniforms.shape)
            raise ValueError(
                f"uniforms has shape {found}, but this gate draws; pass `torch.rand({num_positions}, "
                f"{self.num_uniforms})`."
            )
        return self.score(distributions, labels, uniforms)

    def acceptance(self, scores: Tensor) -> Tensor:
        """Acceptances `(N,)` in [0, 1], from the scores of the whole population."""
        return (scores if self.select is None else self.select(scores)).float()

    def weight(self, acceptance: Tensor) -> Tensor:
        """b + (1 - b) A, exactly b at A = 0 and exactly 1 at A = 1."""
        return torch.lerp(acceptance.new_tensor(self.floor), acceptance.new_tensor(1.0), acceptance)


def greedy_top_k(k: int = 5, floor: float = 0.01) -> Gate:
    """A = [argmax q is among the k largest of p] (SpecKD, arXiv 2510.24021, greedy top-k). Ties count in."""
    _check_k(k)

    def score(distributions: TokenDistributions, labels, uniforms) -> Tensor:
        _check_k(k, vocab_size=distributions.teacher_logits.shape[-1])
        teacher = distributions.teacher_logits
        proposed = teacher.gather(-1, distributions.student_argmax[:, None])
        return (teacher > proposed).sum(-1) < k

    return Gate(score, floor)


def spec_k(k: int = 5, floor: float = 0.01, exact: bool = False) -> Gate:
    """
    A = [any of k draws x ~ q passes u < p(x) / q(x)] (SpecKD, arXiv 2510.24021, Spec-k; its version 1 says non-greedy
    top-k). `exact=True` is its expectation, A = 1 - TV(p, q)^k: one draw is accepted with probability sum min(p, q).
    """
    _check_k(k)

    def check(distributions: TokenDistributions) -> None:
        _check_k(k, vocab_size=distributions.teacher_logits.shape[-1])

    def expected(distributions: TokenDistributions, labels, uniforms) -> Tensor:
        check(distributions)
        return 1 - distributions.total_variation**k

    def sampled(distributions: TokenDistributions, labels, uniforms) -> Tensor:
        check(distributions)
        drawn = _draw(distributions.student_probs, uniforms[:, :k])
        return (uniforms[:, k:] < _ratio(distributions, drawn)).any(-1)

    return Gate(expected, floor) if exact else Gate(sampled, floor, num_uniforms=2 * k)


def one_minus_tv(floor: float = 0.0) -> Gate:
    """A = 1 - TV(p, q), the probability that speculative sampling keeps a student's draw; spec_k at k = 1, exact."""
    return Gate(lambda distributions, labels, uniforms: 1 - distributions.total_variation, floor)


def hellinger(floor: float = 0.0) -> Gate:
    """A = 1 - h, with the Hellinger distance h = sqrt(1 - sum_v sqrt(p q)) in [0, 1]."""

    def score(distributions: TokenDistributions, labels, uniforms) -> Tensor:
        overlap = ((distributions.student_log_probs + distributions.teacher_log_probs) / 2).exp_().sum(-1)
        return 1 - (1 - overlap).clamp(min=0).sqrt()

    return Gate(score, floor)


def min_prob(alpha: float = 0.25, floor: float = 0.0) -> Gate:
    """A = [p(y) >= alpha] for the response's token y: CA-OPD's rule (arXiv 2609.02401), whose alpha falls to 0.25."""
    _check_share("alpha", alpha)

    def score(distributions: TokenDistributions, labels, uniforms) -> Tensor:
        return distributions.teacher_log_probs.gather(-1, labels[:, None]).squeeze(-1).exp() >= alpha

    return Gate(score, floor, needs_labels=True)


def accept_ratio(floor: float = 0.0, exact: bool = False) -> Gate:
    """
    A = 1 with probability min(1, p(y) / q(y)) for the response's token y, as TrOPD keeps tokens; `exact=True` is that
    probability itself.
    """

    def expected(distributions: TokenDistributions, labels, uniforms) -> Tensor:
        return _ratio(distributions, labels[:, None]).squeeze(-1)

    def sampled(distributions: TokenDistributions, labels, uniforms) -> Tensor:
        return uniforms.squeeze(-1) < expected(distributions, labels, uniforms)

    if exact:
        return Gate(expected, floor, needs_labels=True)
    return Gate(sampled, floor, num_uniforms=1, needs_labels=True)


def entropy_gap(floor: float = 0.0) -> Gate:
    """A = sigmoid(H(q) - H(p)), in nats: loud where the student is less sure than the teacher (TSD-KD)."""
    return Gate(
        lambda distributions, labels, uniforms: torch.sigmoid(
            distributions.student_entropy - distributions.teacher_entropy
        ),
        floor,
    )


def student_entropy_top(share: float = 0.2, floor: float = 0.0) -> Gate:
    """A = [H(q) is among the ceil(share x N) largest of the population] (as SE-KD and TIP select tokens)."""
    _check_share("share", share)

    def select(entropies: Tensor) -> Tensor:
        # 1e-9: 0.2 x 5 in floats may lie a hair above 1 and must not round up to 2.
        kept = entropies.topk(math.ceil(share * len(entropies) - 1e-9)).indices
        return torch.zeros_like(entropies).index_fill_(0, kept, 1)

    return Gate(lambda distributions, labels, uniforms: distributions.student_entropy, floor, select=select)


def random(gate: str = "greedy_top_k", **parameters) -> Gate:
    """
    The named gate's acceptances, shuffled over the population: a control with the same share accepted and the same
    mean weight, which listens to no token in particular.
    """
    inner = make_gate(gate, **parameters)

    def score(distributions: TokenDistributions, labels, uniforms) -> Tensor:
        scores = inner.scores(distributions, labels, uniforms[:, :-1]).float()
        return torch.cat([scores[:, None] if scores.ndim == 1 else scores, uniforms[:, -1:]], dim=-1)

    def select(scores: Tensor) -> Tensor:
        order = scores[:, -1].argsort(stable=True)
        inner_scores = scores[:, :-1]
        return inner.acceptance(inner_scores.squeeze(-1) if inner_scores.shape[-1] == 1 else inner_scores)[order]

    return Gate(score, inner.floor, inner.num_uniforms + 1, inner.needs_labels, select)


def inverted(gate: str = "greedy_top_k", **parameters) -> Gate:
    """1 - A of the named gate: a control that listens exactly where the gate does not."""
    inner = make_gate(gate, **parameters)
    if inner.select is not None:
        return replace(inner, select=lambda scores: 1 - inner.acceptance(scores))
    return replace(inner, score=lambda *arguments: 1 - inner.scores(*arguments).float())


def same_mean(gate: str = "greedy_top_k", **parameters) -> Gate:
    """
    The named gate's mean acceptance over the population, at every position: a control that is the ungated loss with the
    same mean weight, so that a gate is not credited with what a smaller step does.
    """
    inner = make_gate(gate, **parameters)
    return replace(inner, select=lambda scores: inner.acceptance(scores).mean().expand(len(scores)))


GATES: dict[str, Callable[..., Gate]] = {
    "greedy_top_k": greedy_top_k,
    "spec_k": spec_k,
    "one_minus_tv": one_minus_tv,
    "hellinger": hellinger,
    "min_prob": min_prob,
    "accept_ratio": accept_ratio,
    "entropy_gap": entropy_gap,
    "student_entropy_top": student_entropy_top,
    "random": random,
    "inverted": inverted,
    "same_mean": same_mean,
}


def make_gate(name: str, **parameters) -> Gate:
    """
    `GATES[name](**parameters)`.

    Raises:
        `ValueError`: no gate has that name.
    """
    if name not in GATES:
        raise ValueError(f"gate={name!r} is unknown; choose one of {', '.join(GATES)}.")
    return GATES[name](**parameters)


def _ratio(distributions: TokenDistributions, tokens: Tensor) -> Tensor:
    """min(1, p / q) at `tokens` `(N, K)`, from log-probabilities: both may underflow."""
    log_ratio = distributions.teacher_log_probs.gather(-1, tokens) - distributions.student_log_probs.gather(-1, tokens)
    return log_ratio.clamp(max=0).exp()


def _draw(probs: Tensor, uniforms: Tensor) -> Tensor:
    """Tokens `(N, K)` drawn by inverting the distribution function, on CPU far faster than `torch.multinomial`."""
    cumulative = probs.cumsum(-1)
    targets = uniforms * cumulative[:, -1:]  # the last sum is 1 only up to rounding
    return torch.searchsorted(cumulative, targets, right=True).clamp_(max=probs.shape[-1] - 1)


def _check_k(k: int, vocab_size: int | None = None) -> None:
    if k < 1 or (vocab_size is not None and k > vocab_size):
        upper = "the vocabulary size" if vocab_size is None else vocab_size
        raise ValueError(f"k={k} is outside 1..{upper}, so no such set of tokens exists; SpecKD uses k=5.")


def _check_share(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{name}={value} is outside [0, 1], so it is no probability or share; choose one within.")
