"""How a model's draws are shaped, and the draw itself: inverse CDF from a given uniform number.

One uniform number makes one draw, so whoever owns the numbers owns the outcome: the sampler keys them by row, position
and role. On CPU this is also an order of magnitude faster than `torch.multinomial`, which draws one exponential for each
entry of the vocabulary. Shapes: `...` any leading ones, V vocabulary.
"""

from dataclasses import dataclass

import torch


# Candidates for a nucleus that are tried before the vocabulary is sorted, on CPU.
SHORT_LISTS = (64, 1024)


@dataclass(frozen=True)
class SamplingParams:
    """Shapes the draws from a model, in the order transformers applies the same names.

    Args:
        temperature (`float`, defaults to `1.0`):
            Divides the logits. `0.0` is greedy: the likeliest token, the lowest id among ties.
        top_p (`float`, defaults to `1.0`):
            Draw from the smallest set of likeliest tokens whose probability reaches `top_p`, and what ties with its last.
            `1.0` keeps all.
        top_k (`int`, defaults to `0`):
            Draw from the `top_k` likeliest tokens, and what ties with the last of them. `0` keeps all.

    Raises:
        `ValueError`: for a value outside these ranges.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0

    def __post_init__(self):
        if not self.temperature >= 0.0:
            raise ValueError(f"temperature={self.temperature} must be 0 (greedy) or above.")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p={self.top_p} must be above 0 and at most 1 (1 keeps every token).")
        if self.top_k < 0:
            raise ValueError(f"top_k={self.top_k} must be 0 (every token) or above.")


def draw(logits: torch.Tensor, sampling: SamplingParams, uniforms: torch.Tensor) -> torch.Tensor:
    """Draws one token from each row of `logits` (..., V) with `uniforms` (...) in [0, 1): ids of shape (...)."""
    if sampling.temperature == 0.0:
        return logits.argmax(-1)
    return draw_from_probs(shaped_probs(logits, sampling), uniforms)


def draw_from_probs(probs: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """Inverse CDF: the first token whose cumulative probability exceeds `uniforms` (...). `probs` (..., V) need not sum
    to 1, and a token of probability 0 is never drawn."""
    # A parallel scan in fp32 is not monotone; on CPU the scan accumulates in fp64 anyway.
    cumulative = (probs.double() if probs.is_cuda else probs).cumsum(-1)
    total = cumulative[..., -1:]
    target = uniforms[..., None].to(total.dtype) * total
    target = torch.minimum(target, torch.nextafter(total, torch.zeros_like(total)))  # rounding may reach the total
    # The clamp is for probabilities that are not numbers: their loss says so, an index out of range would not.
    return torch.searchsorted(cumulative, target, right=True).squeeze(-1).clamp_(max=probs.shape[-1] - 1)


def shaped_probs(logits: torch.Tensor, sampling: SamplingParams) -> torch.Tensor:
    """The distribution that is drawn from: (..., V) in fp32, summing to 1, zero outside top-k and nucleus."""
    logits = logits.float()
    if sampling.temperature == 0.0:
        return torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
    return kept_outcomes((logits / sampling.temperature).softmax(-1), sampling)


def kept_outcomes(probs: torch.Tensor, sampling: SamplingParams) -> torch.Tensor:
    """Probabilities (..., V) after top-k and nucleus: zero outside, and then summing to 1."""
    if 0 < sampling.top_k < probs.shape[-1]:
        probs = _at_least(probs, probs.topk(sampling.top_k, dim=-1).values[..., -1:])
    if sampling.top_p < 1.0:
        probs = _at_least(probs, _least_of_nucleus(probs, sampling.top_p))
    return probs


def _at_least(probs: torch.Tensor, least: torch.Tensor) -> torch.Tensor:
    """`probs` without what is below `least` (..., 1), summing to 1. A threshold, not a set of ids: which of several equal ones
    a sort puts first depends on its length and the device, and so on the rows beside this one."""
    kept = probs.masked_fill(probs < least, 0.0)
    return kept / kept.sum(-1, keepdim=True)


def _least_of_nucleus(probs: torch.Tensor, top_p: float) -> torch.Tensor:
    """The probability (..., 1) of the token that reaches `top_p`, counted from the most probable one."""
    # Sorting a vocabulary on CPU costs more than the draw (8 rows of 49k: 64 candidates 0.4 ms, 1024 2.6, all 30), and
    # the nucleus is nearly always small. On a GPU the sort is cheap and the test would wait for the device.
    for num_candidates in SHORT_LISTS if not probs.is_cuda else ():
        if num_candidates < probs.shape[-1]:
            ordered = probs.topk(num_candidates, dim=-1).values
            if bool((ordered.sum(-1) > top_p).all()):
                break
    else:
        ordered = probs.sort(dim=-1, descending=True).values
    num_before = (ordered.cumsum(-1) - ordered < top_p).sum(-1, keepdim=True) - 1
    return ordered.gather(-1, num_before)
