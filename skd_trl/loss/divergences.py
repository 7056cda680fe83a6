"""How far the student's next-token distribution is from the teacher's, one number per position, in nats.

Every divergence is a function of the two models' log-probabilities, wrapped to take logits as well, which is
what the registry promises: `DIVERGENCES["jsd"](beta=0.5)(student_logits, teacher_logits)`. A new one is a function and
an entry. No temperature, no reduction and no mask live here: the loss weighs and sums (see `skd_trl.loss.distillation_loss`).

Shapes: N positions, V vocabulary. p is the teacher, q the student.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Divergence:
    """
    A per-position divergence, differentiable in the student.

    Attributes:
        from_log_probs (`Callable[[Tensor, Tensor], Tensor]`):
            Takes the student's and the teacher's log-probabilities `(N, V)`, returns nats `(N,)`. The loss calls this:
            one softmax serves divergence, gate and statistics. Where only the teacher's k most probable tokens are
            known, the V outcomes are these and the rest in one.
        needs_top_k (`float`):
            The smallest such k it can be computed from; `math.inf` for one that needs the full vocabulary.
    """

    from_log_probs: Callable[[Tensor, Tensor], Tensor]
    needs_top_k: float = 1

    def __call__(self, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        """Divergence of `student_logits` from `teacher_logits`, both `(N, V)` of any float type: `(N,)` nats, fp32."""
        return self.from_log_probs(log_probs(student_logits), log_probs(teacher_logits))


def forward_kl() -> Divergence:
    """KL(p || q) = sum_v p (log p - log q): mode covering; the loss of SKD (arXiv 2410.11325, Algorithm 1)."""
    return Divergence(lambda student, teacher: _kl(teacher, student))


def reverse_kl() -> Divergence:
    """KL(q || p): mode seeking; MiniLLM's (arXiv 2306.08543, section 2.1)."""
    return Divergence(lambda student, teacher: _kl(student, teacher))


def jsd(beta: float = 0.5) -> Divergence:
    """
    Generalized Jensen-Shannon divergence (GKD, arXiv 2306.13649, equation 1), as `trl`'s `GKDTrainer` defines it:
    beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q.

    Its ends are conventions, not limits (both limits are 0): beta = 0 is the forward KL, beta = 1 the reverse KL.

    Raises:
        `ValueError`: beta outside [0, 1].
    """
    _check_share("beta", beta, "use 0 for the forward KL, 1 for the reverse KL, 0.5 for the symmetric one")
    if beta == 0:
        return forward_kl()
    if beta == 1:
        return reverse_kl()

    def from_log_probs(student: Tensor, teacher: Tensor) -> Tensor:
        mixture = _log_mixture(teacher, student, beta)
        return beta * _kl(teacher, mixture) + (1 - beta) * _kl(student, mixture)

    return Divergence(from_log_probs)


def skew_forward_kl(alpha: float = 0.1) -> Divergence:
    """
    KL(p || alpha p + (1 - alpha) q), DistiLLM's skew KL (arXiv 2402.03898, section 3.1): bounded by log(1 / alpha).

    Raises:
        `ValueError`: alpha outside [0, 1).
    """
    _check_skew(alpha)
    if alpha == 0:
        return forward_kl()
    return Divergence(lambda student, teacher: _kl(teacher, _log_mixture(teacher, student, alpha)))


def skew_reverse_kl(alpha: float = 0.1) -> Divergence:
    """
    KL(q || alpha q + (1 - alpha) p), DistiLLM's skew reverse KL (arXiv 2402.03898, section 3.1).

    Raises:
        `ValueError`: alpha outside [0, 1).
    """
    _check_skew(alpha)
    if alpha == 0:
        return reverse_kl()
    return Divergence(lambda student, teacher: _kl(student, _log_mixture(student, teacher, alpha)))


DIVERGENCES: dict[str, Callable[..., Divergence]] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jsd": jsd,
    "skew_forward_kl": skew_forward_kl,
    "skew_reverse_kl": skew_reverse_kl,
}


def log_probs(logits: Tensor) -> Tensor:
    """Log-probabilities of `logits` `(N, V)`, in fp32 at least: a bf16 sum over a vocabulary is off by percents."""
    return torch.log_softmax(logits, dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))


def at_labels(log_probs: Tensor, labels: Tensor) -> Tensor:
    """The log-probabilities `(N,)` of `labels` `(N,)`, out of `(N, V)`."""
    return log_probs.gather(-1, labels[:, None]).squeeze(-1)


def _kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    # The difference first: sum(a log a) - sum(a log b) would cancel to noise where the two agree, and every good
    # student ends there.
    return (log_a.exp() * (log_a - log_b)).sum(-1)


def _log_mixture(log_a: Tensor, log_b: Tensor, share_of_a: float) -> Tensor:
    return torch.logaddexp(log_a + math.log(share_of_a), log_b + math.log1p(-share_of_a))


def _check_share(name: str, value: float, advice: str) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{name}={value} is outside [0, 1], so it cannot mix two distributions; {advice}.")


def _check_skew(alpha: float) -> None:
    _check_share("alpha", alpha, "DistiLLM uses 0.1")
    if alpha == 1:
        raise ValueError("alpha=1 compares a distribution with itself, which teaches nothing; DistiLLM uses 0.1.")
