"""ALiBi biases (Press et al., 2022, arXiv 2108.12409) over slots.

BLOOM and Falcon make them from a two-dimensional mask, by counting its ones. A softmax does not change if all scores of a query do, so a
bias that grows with the key's position is the same for every query, and where slots are positions for every row.
"""

import sys
from contextlib import contextmanager
from functools import wraps

import torch
from torch import nn


NAME = "build_alibi_tensor"


@contextmanager
def alibi_over_slots(model: nn.Module):
    """While `model` runs on masks (N, 1, Q, L), its biases are those of the positions 0 to L - 1."""
    module = sys.modules[type(model).__module__]
    original = getattr(module, NAME, None)
    if original is None:
        yield
        return

    @wraps(original)
    def over_slots(attention_mask: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        if attention_mask.ndim == 4:
            ones = (len(attention_mask), attention_mask.shape[-1])
            attention_mask = torch.ones(ones, dtype=torch.long, device=attention_mask.device)
        return original(attention_mask, *args, **kwargs)

    setattr(module, NAME, over_slots)
    try:
        yield
    finally:
        setattr(module, NAME, original)
