"""How a model's draws are shaped, and the draw itself: inverse CDF from a given uniform number.

One uniform number makes one draw, so whoever owns the numbers owns the outcome: the sampler keys them by row, position
and role. No draw scans the vocabulary: its blocks are summed first, and one block is scanned. What is here sorts it to find a
nucleus; `nucleus.py` does without. Shapes: `...` any leading ones, V vocabulary, C candidates, K blocks of W ids.
"""

from dataclasses import dataclass
from functools import cache, lru_cache

import numpy as np
import torch
from torch.nn import functional


# Ids in a block (W), where the vocabulary has no divisor near it. Smaller vocabularies than four blocks are scanned at once.
BLOCK = 128
# Candidates for a nucleus that are tried before the vocabulary is sorted, on CPU.
SHORT_LISTS = (64, 1024)


@dataclass(frozen=True)
class SamplingParams:
    """Shapes the draws from a model, in the order transformers applies the same names.

    Args:
        temperature (`float`, defaults to `1.0`):
            Divides the logits. `0.0` is greedy: the most probable token, the lowest id among ties.
        top_p (`float`, defaults to `1.0`):
            Draw from the smallest set of most probable tokens whose probability reaches `top_p`, and what ties with its last.
            `1.0` keeps all.
        top_k (`int`, defaults to `0`):
            Draw from the `top_k` most probable tokens, and what ties with the last of them. `0` keeps all.

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

    @property
    def is_cut(self) -> bool:
        """Whether less than the whole vocabulary is drawn from, by chance."""
        return self.temperature > 0.0 and (self.top_p < 1.0 or self.top_k > 0)


def draw(logits: torch.Tensor, sampling: SamplingParams, uniforms: torch.Tensor) -> torch.Tensor:
    """Draws one token from each row of `logits` (..., V) with `uniforms` (...) in [0, 1): ids of shape (...)."""
    if sampling.temperature == 0.0:
        return logits.argmax(-1)
    return draw_from_probs(shaped_probs(logits, sampling), uniforms)


def draw_from_probs(probs: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """Inverse CDF: the first token whose cumulative probability exceeds `uniforms` (...). `probs` (..., V) need not sum
    to 1, and a token of probability 0 is never drawn."""
    vocab_size = probs.shape[-1]
    if vocab_size <= 4 * BLOCK:
        cumulative = probs.cumsum(-1, dtype=torch.float64)
        return first_above(cumulative, target(cumulative[..., -1:], uniforms)).squeeze(-1)
    width = block_width(vocab_size)
    if vocab_size % width:
        probs = functional.pad(probs, (0, -vocab_size % width))
    blocks = probs.unflatten(-1, (-1, width))  # (..., K, W)
    # In fp64, whose scan is as good as monotone: in fp32 a parallel one is not.
    edges = blocks.sum(-1, dtype=torch.float64).cumsum(-1)  # (..., K), where blocks end
    # From the target to these ends.
    left = torch.addcmul(edges, below_one(uniforms)[..., None], edges[..., -1:], value=-1)
    # Counted among all but the last: what is no number is in the vocabulary then.
    block = (left[..., :-1] <= 0).sum(-1, keepdim=True)
    inside = blocks.gather(-2, block[..., None].expand(*block.shape, width)).squeeze(-2)
    inside = inside.cumsum(-1, dtype=torch.float64)
    # Below 0 by rounding alone; a token of probability 0 at the block's start must not be drawn then.
    wanted = (inside[..., -1:] - left.gather(-1, block)).clamp_(min=0)
    return torch.add((inside[..., :-1] <= wanted).sum(-1, keepdim=True), block, alpha=width).squeeze(-1)


def draw_among(
    probs: torch.Tensor, ids: torch.Tensor, uniforms: torch.Tensor, otherwise: torch.Tensor
) -> torch.Tensor:
    """As `draw_from_probs` draws, where only `ids` (..., C), in ascending order, have probabilities, `probs` (..., C): ids (...). Where all of
    these are 0, or no numbers, `otherwise` (..., 1)."""
    cumulative = probs.cumsum(-1, dtype=torch.float64)
    index = torch.searchsorted(cumulative, target(cumulative[..., -1:], uniforms), right=True)
    return torch.cat([ids, otherwise], dim=-1).gather(-1, index).squeeze(-1)


@cache
def block_width(vocab_size: int) -> int:
    """W: the divisor of the vocabulary's size that is nearest to `BLOCK`, from half to twice of it; `BLOCK` if there is none."""
    near = [width for width in range(BLOCK // 2, 2 * BLOCK + 1) if vocab_size % width == 0]
    return min(near, key=lambda width: abs(width - BLOCK), default=BLOCK)


def below_one(uniforms: torch.Tensor) -> torch.Tensor:
    """`uniforms` in [0, 1), such that their product with a sum is below the sum."""
    return uniforms.clamp(max=1 - 2**-40) if uniforms.dtype == torch.float64 else uniforms


def target(total: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """The cumulative probability (..., 1) that `uniforms` (...) in [0, 1) stand for where `total` (..., 1) is reached: below it."""
    return below_one(uniforms)[..., None] * total


def first_above(cumulative: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The first of the entries of `cumulative` (..., C) that exceeds `target` (..., 1): its index, (..., 1)."""
    # The clamp is for probabilities that are not numbers: their loss says so, an index out of range would not.
    return torch.searchsorted(cumulative, target, right=True).clamp_(max=cumulative.shape[-1] - 1)


def shaped_probs(logits: torch.Tensor, sampling: SamplingParams) -> torch.Tensor:
    """The distribution that is drawn from: (..., V) in fp32, summing to 1, zero outside top-k and nucleus."""
    if sampling.temperature == 0.0:
        return torch.zeros_like(logits, dtype=torch.float32).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
    probs = tempered_probs(logits, sampling)
    if sampling.top_p == 1.0:
        return probs
    # Sorting a vocabulary on CPU costs more than the draw (8 rows of 49k: 64 candidates 0.6 ms, 1024 3.8, all 28). Elsewhere the
    # test would wait for the device.
    for num_candidates in SHORT_LISTS if probs.device.type == "cpu" else ():
        if num_candidates < probs.shape[-1]:
            ordered = probs.topk(num_candidates, dim=-1).values
            if bool((ordered.sum(-1) > sampling.top_p).all()):
                return at_least(probs, least_of(ordered, sampling.top_p))
    return at_least(probs, least_of(probs.sort(dim=-1, descending=True).values, sampling.top_p))


def tempered_probs(logits: torch.Tensor, sampling: SamplingParams) -> torch.Tensor:
    """Without the nucleus: (..., V) in fp32, summing to 1."""
    probs = softmax_at(logits, sampling.temperature)
    if 0 < sampling.top_k < logits.shape[-1]:
        probs = at_least(probs, probs.topk(sampling.top_k, dim=-1).values[..., -1:])
    return probs


def softmax_at(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """(..., V) in fp32, over the whole vocabulary."""
    if temperature == 1.0:
        return logits.float().softmax(-1)
    if logits.dtype == torch.float32:
        return (logits / temperature).softmax(-1)
    return (logits / on_device(temperature, logits.device)).softmax(-1)  # cast and divided in one operator


@lru_cache(maxsize=64)
def on_device(number: float, device: torch.device) -> torch.Tensor:
    """A number as a tensor (1,) in fp32, one for some time: a scheduled number has a new value in each step. Whoever has a graph that
    reads it keeps it."""
    return torch.full((1,), number, device=device)


def at_least(probs: torch.Tensor, least: torch.Tensor) -> torch.Tensor:
    """`probs` without what is below `least` (..., 1), summing to 1. A threshold, not a set of ids: which of several equal ones
    a sort puts first depends on its length and the device, and so on the rows beside this one."""
    kept = probs.masked_fill(probs < least, 0.0)
    return kept / kept.sum(-1, keepdim=True)


def least_of(ordered: torch.Tensor, top_p: float) -> torch.Tensor:
    """Of probabilities in descending order (..., C), in fp32, that of the token which reaches `top_p`, (..., 1); 0 if none does."""
    # The largest of those at which `top_p` is reached. The operator is ReLU's backward: its first argument where the second is above a
    # number, else 0.
    below = np.nextafter(np.float32(top_p), np.float32(-1))
    reached = torch.ops.aten.threshold_backward(ordered, ordered.cumsum(-1), float(below))
    return reached.amax(-1, keepdim=True)
