"""How much each position counts in a distillation loss: one weight in [0, 1] per response position.

SpecKD (arXiv 2510.24021): L = 1/|y| sum_t w_t D(p_t || q_t), w without gradient. Every gate gives an acceptance A in
[0, 1] and a floor b, and w = b + (1 - b) A; it counts as accepted where A >= 1/2 (for a hard gate: A = 1).
A gate sees raw distributions (no temperature) and facts, response positions only, a chunk of them at a time, and draws no
noise itself. A new one is a function and an entry. How the weights are normalised is the trainer's choice, not the gate's.

Shapes: N positions, V vocabulary, K outcomes, U uniforms per position, S scores per position. p is the teacher, q the
student.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from numbers import Integral

import torch
from torch import Tensor

from .response_facts import ResponseFacts
from .token_distributions import TokenDistributions


@dataclass(frozen=True)
class GateWeights:
    """
    Attributes:
        weight (`Tensor` `(N,)`, fp32):
            What each position's divergence is multiplied by; a constant, no gradient goes through it.
        accepted (`Tensor` `(N,)`, bool):
            Whether the gate accepted the position. Its weight may be another (a kept end of sequence, a warm-up).
    """

    weight: Tensor
    accepted: Tensor

    def __len__(self) -> int:
        return len(self.weight)

    def __getitem__(self, rows: slice) -> "GateWeights":
        return GateWeights(self.weight[rows], self.accepted[rows])


@dataclass(frozen=True)
class Gate:
    """
    A gate: `gate(student_logits=..., teacher_logits=...)` gives weights `(N,)`, fp32, without gradient.

    Attributes:
        score (`Callable`):
            `score(distributions, facts)`, called on one chunk of positions with its [`TokenDistributions`] and
            [`ResponseFacts`]: acceptances `(N,)`, or for a gate that compares positions with each other, whatever
            `select` needs, `(N,)` or `(N, S)`.
        floor (`float`):
            Weight of a rejected position, in [0, 1].
        num_uniforms (`int`):
            How many numbers from U[0, 1) each position needs, in `facts.uniforms`. They are the caller's, so a weight
            depends neither on the chunk a position falls into nor on the global generator.
        needs_labels (`bool`):
            Whether the gate judges the response's own token, and so cannot be called without facts.
        select (`Callable` or `None`):
            For a gate over a population: turns the scores of *all* its positions into acceptances `(N,)`. The
            population is what the caller gathered before calling (one micro-batch or, better, a whole accumulation
            window).
        keep_eos (`bool`):
            Whether ends of sequence weigh 1, accepted or not.
        needs_top_k (`float`):
            The smallest k of a top-k teacher signal that the gate can live on. `math.inf`, the default, needs the full
            vocabulary: looking a token up by its id would find another outcome. 1 is for a gate that looks at facts, the
            student's figures, label log-probabilities, or sums over outcomes.
        name (`str`):
            For error messages.
    """

    score: Callable[[TokenDistributions, ResponseFacts], Tensor]
    floor: float = 0.0
    num_uniforms: int = 0
    needs_labels: bool = False
    select: Callable[[Tensor], Tensor] | None = None
    keep_eos: bool = False
    needs_top_k: float = math.inf
    name: str = "given"

    def __post_init__(self):
        if not 0 <= self.floor <= 1:
            raise ValueError(
                f"floor={self.floor} is outside [0, 1], so it cannot weigh a rejected position; use 0 to ignore "
                f"rejected positions, 0.01 for SpecKD's default, 1 to switch the gate off."
            )

    @torch.no_grad()
    def __call__(
        self, *, student_logits: Tensor, teacher_logits: Tensor, facts: ResponseFacts | None = None
    ) -> Tensor:
        """
        Weights `(N,)` from logits `(N, V)` and the facts about N positions; without facts, the positions are one
        response whose tokens are not known.

        Raises:
            `ValueError`: labels or uniforms that the gate needs are missing, or k exceeds V.
        """
        if facts is None:
            if self.needs_labels:
                raise ValueError(
                    f"The gate {self.name} judges the response's own token, and no labels came with the logits; pass "
                    f"facts=ResponseFacts.of(labels)."
                )
            unknown = torch.full((len(student_logits),), -100, device=student_logits.device)
            facts = ResponseFacts.of(unknown)
        distributions = TokenDistributions.from_logits(student_logits, teacher_logits, facts.labels)
        return self.weights(self.acceptance(self.scores(distributions, facts)), facts).weight

    def scores(self, distributions: TokenDistributions, facts: ResponseFacts) -> Tensor:
        """`score`, with its noise checked, and how many there are. One that `select` reads may have columns."""
        if self.num_uniforms and facts.uniforms.shape[-1] != self.num_uniforms:
            raise ValueError(
                f"uniforms has shape {tuple(facts.uniforms.shape)}, but the gate {self.name} draws; pass facts with "
                f"uniforms=torch.rand({len(facts)}, {self.num_uniforms})."
            )
        scores = self.score(distributions, facts)
        facts.check_one_each(
            f"gate {self.name}", scores[..., 0] if self.select is not None and scores.ndim > 1 else scores
        )
        return scores

    def acceptance(self, scores: Tensor) -> Tensor:
        """Acceptances `(N,)` in [0, 1], from the scores of the whole population."""
        return (scores if self.select is None else self.select(scores)).float()

    def weights(self, acceptance: Tensor, facts: ResponseFacts) -> GateWeights:
        """w = b + (1 - b) A, exactly b at A = 0 and exactly 1 at A = 1; 1 at ends of sequence with `keep_eos`."""
        facts.check_one_each(f"gate {self.name}", acceptance)
        weight = torch.lerp(acceptance.new_tensor(self.floor), acceptance.new_tensor(1.0), acceptance)
        return GateWeights(weight.masked_fill(facts.is_end, 1.0) if self.keep_eos else weight, acceptance >= 0.5)


def greedy_top_k(k: int = 5, floor: float = 0.01) -> Gate:
    """A = [argmax q is among the k largest of p] (SpecKD, arXiv 2510.24021, greedy top-k). Ties count in."""
    _check_k(k)

    def score(distributions: TokenDistributions, facts: ResponseFacts) -> Tensor:
        _check_k(k, distributions.vocab_size)
        return distributions.student_argmax_rank < k

    return Gate(score, floor, needs_top_k=k, name="greedy_top_k")


def spec_k(k: int = 5, floor: float = 0.01, exact: bool = False) -> Gate:
    """
    A = [any of k draws x ~ q passes u < p(x) / q(x)] (SpecKD, arXiv 2510.24021, Spec-k; its version 1 says non-greedy
    top-k). `exact=True` is its expectation, A = 1 - TV(p, q)^k: one draw is accepted with probability sum min(p, q).
    On a top-k signal x is an outcome: accepted at least as often as over the vocabulary.
    """
    _check_k(k)

    def expected(distributions: TokenDistributions, facts: ResponseFacts) -> Tensor:
        _check_k(k, distributions.vocab_size)
        return 1 - distributions.total_variation**k

    def sampled(distributions: TokenDistributions, facts: ResponseFacts) -> Tensor:
        _check_k(k, distributions.vocab_size)
        drawn = _draw(distributions.student_probs, facts.uniforms[:, :k])
        teacher, student = (
            log_probs.gather(-1, drawn)
            for log_probs in (distributions.teacher_log_probs, distributions.student_log_probs)
        )
        return (facts.uniforms[:, k:] < _ratio(teacher, student)).any(-1)

    if exact:
        return Gate(expected, floor, needs_top_k=1, name="spec_k")
    return Gate(sampled, floor, num_uniforms=2 * k, needs_top_k=1, name="spec_k")


def one_minus_tv(floor: float = 0.0) -> Gate:
    """A = 1 - TV(p, q), the probability that speculative sampling keeps a student's draw; spec_k at k = 1, exact. On a
    top-k signal over its outcomes, so never below that over the vocabulary."""
    return Gate(
        lambda distributions, facts: 1 - distributions.total_variation, floor, needs_top_k=1, name="one_minus_tv"
    )


def hellinger(floor: float = 0.0) -> Gate:
    """A = 1 - h, with the Hellinger distance h = sqrt(1 - sum_v sqrt(p q)) in [0, 1]. On a top-k signal over its
    outcomes, so never below that over the vocabulary."""

    def score(distributions: TokenDistributions, facts: ResponseFacts) -> Tensor:
        overlap = ((distributions.student_log_probs + distributions.teacher_log_probs) / 2).exp_().sum(-1)
        return 1 - (1 - overlap).clamp(min=0).sqrt()

    return Gate(score, floor, needs_top_k=1, name="hellinger")


def min_prob(alpha: float = 0.25, floor: float = 0.0) -> Gate:
    """A = [p(y) >= alpha] for the response's token y: CA-OPD's rule (arXiv 2609.02401), whose alpha falls to 0.25."""
    _check_share("alpha", alpha)
    return Gate(
        lambda distributions, facts: distributions.teacher_label_log_probs.exp() >= alpha,
        floor,
        needs_labels=True,
        needs_top_k=1,
        name="min_prob",
    )


def accept_ratio(floor: float = 0.0, exact: bool = False) -> Gate:
    """
    A = 1 with probability min(1, p(y) / q(y)) for the response's token y, as TrOPD keeps tokens; `exact=True` is that
    probability itself.
    """

    def expected(distributions: TokenDistributions, facts: ResponseFacts) -> Tensor:
        return _ratio(distributions.teacher_label_log_probs, distributions.student_label_log_probs)

    def sampled(distributions: TokenDistributions, facts: ResponseFacts) -> Tensor:
        return facts.uniforms.squeeze(-1) < expected(distributions, facts)

    if exact:
        return Gate(expected, floor, needs_labels=True, needs_top_k=1, name="accept_ratio")
    return Gate(sampled, floor, num_uniforms=1, needs_labels=True, needs_top_k=1, name="accept_ratio")


def entropy_gap(floor: float = 0.0) -> Gate:
    """A = sigmoid(H(q) - H(p)), in nats: large where the student is less sure than the teacher (TSD-KD)."""

    def score(distributions: TokenDistributions, facts: ResponseFacts) -> Tensor:
        return torch.sigmoid(distributions.student_entropy - distributions.teacher_entropy)

    return Gate(score, floor, name="entropy_gap")


def student_entropy_top(share: float = 0.2, floor: float = 0.0) -> Gate:
    """A = [H(q) is among the ceil(share x N) largest of the population] (as SE-KD and TIP select tokens)."""
    _check_share("share", share)

    def select(entropies: Tensor) -> Tensor:
        # 1e-9: 0.55 x 100 in floats is 55.00000000000001 and must not round up to 56.
        kept = entropies.topk(math.ceil(share * len(entropies) - 1e-9)).indices
        return torch.zeros_like(entropies).index_fill_(0, kept, 1)

    return Gate(
        lambda distributions, facts: distributions.student_entropy,
        floor,
        select=select,
        needs_top_k=1,
        name="student_entropy_top",
    )


GATES: dict[str, Callable[..., Gate]] = {
    "greedy_top_k": greedy_top_k,
    "spec_k": spec_k,
    "one_minus_tv": one_minus_tv,
    "hellinger": hellinger,
    "min_prob": min_prob,
    "accept_ratio": accept_ratio,
    "entropy_gap": entropy_gap,
    "student_entropy_top": student_entropy_top,
}


def random(gate: Gate) -> Gate:
    """
    The gate's acceptances, shuffled over the population: a control with the same share accepted and the same mean
    weight, which depends on no token in particular. Its noise is the gate's and one number more.
    """

    def score(distributions: TokenDistributions, facts: ResponseFacts) -> Tensor:
        scores = gate.scores(distributions, replace(facts, uniforms=facts.uniforms[:, :-1])).float()
        return torch.cat([scores[:, None] if scores.ndim == 1 else scores, facts.uniforms[:, -1:]], dim=-1)

    def select(scores: Tensor) -> Tensor:
        order = scores[:, -1].argsort(stable=True)
        inner_scores = scores[:, :-1]
        return gate.acceptance(inner_scores.squeeze(-1) if inner_scores.shape[-1] == 1 else inner_scores)[order]

    return replace(gate, score=score, num_uniforms=gate.num_uniforms + 1, select=select, name=f"{gate.name} (random)")


def inverted(gate: Gate) -> Gate:
    """1 - A of the gate: a control with weight exactly where the gate has none."""
    control = replace(gate, name=f"{gate.name} (inverted)")
    if gate.select is not None:
        return replace(control, select=lambda scores: 1 - gate.acceptance(scores))
    return replace(control, score=lambda distributions, facts: 1 - gate.scores(distributions, facts).float())


def same_mean(gate: Gate) -> Gate:
    """
    The gate's mean acceptance over the population, at every position: a control that is the ungated loss with the same
    mean weight. It shows what of a gate's effect a smaller step has as well.
    """
    return replace(
        gate,
        select=lambda scores: gate.acceptance(scores).mean().expand(len(scores)),
        name=f"{gate.name} (same_mean)",
    )


# What a gate is compared with: each makes another gate of it.
GATE_CONTROLS: dict[str, Callable[[Gate], Gate]] = {"random": random, "inverted": inverted, "same_mean": same_mean}


def _ratio(teacher_log_probs: Tensor, student_log_probs: Tensor) -> Tensor:
    """min(1, p / q), from log-probabilities: both may underflow."""
    return (teacher_log_probs - student_log_probs).clamp(max=0).exp()


def _draw(probs: Tensor, uniforms: Tensor) -> Tensor:
    """Outcomes `(N, U)` drawn by inverting the distribution function, on CPU far faster than `torch.multinomial`. One of
    probability 0 is never drawn. The sampler has the same draw, of one token a row; sampling and loss do not import each
    other."""
    # A parallel scan in fp32 is not monotone; on CPU the scan accumulates in fp64 anyway.
    cumulative = (probs.double() if probs.is_cuda else probs).cumsum(-1)
    total = cumulative[:, -1:]
    targets = uniforms.to(total.dtype) * total
    targets = torch.minimum(targets, torch.nextafter(total, torch.zeros_like(total)))  # rounding may reach the total
    # The clamp is for probabilities that are not numbers: their loss says so, an index out of range would not.
    return torch.searchsorted(cumulative, targets, right=True).clamp_(max=probs.shape[-1] - 1)


def _check_k(k: int, vocab_size: int | None = None) -> None:
    if not isinstance(k, Integral) or k < 1 or (vocab_size is not None and k > vocab_size):
        upper = "the vocabulary size" if vocab_size is None else vocab_size
        raise ValueError(f"k={k} is outside 1..{upper}, so no such set of tokens exists; SpecKD uses k=5.")


def _check_share(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{name}={value} is outside [0, 1], so it is no probability or share; choose one within.")
