"""How many positions' logits are in memory at once: positions cut into chunks."""

import math
from collections.abc import Iterator

import torch


def chunks(
    num_positions: int, vocab_size: int, device: torch.device, chunk_size: int | None = None
) -> Iterator[slice]:
    """Slices of positions, `chunk_size` in each, or by default as many as [`default_chunk_size`] admits, all of one size.

    Raises:
        `ValueError`: for a chunk size below 1.
    """
    if chunk_size is None:
        longest = default_chunk_size(vocab_size, device)
        chunk_size = math.ceil(num_positions / max(1, math.ceil(num_positions / longest))) or 1  # of one size
    if chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size} holds no position, so the loss would never end; use 1 or more.")
    # At least one chunk, empty if need be: a batch without a position then gives zeros of the right types and shapes.
    for start in range(0, max(num_positions, 1), chunk_size):
        yield slice(start, start + chunk_size)


def default_chunk_size(vocab_size: int, device: torch.device) -> int:
    """Positions whose fp32 logits take about 64 MiB, for a head's matrix product to run at full speed. On CPU 16 MiB or,
    where these hold fewer, 40 positions, which share the passes over the heads and their gradient; at most 30 MiB, for
    beyond 32 glibc maps every tensor again, and each page of it costs a fault."""
    position, mebibyte = 4 * vocab_size, 2**20
    if device.type == "cpu":
        return max(1, min(max(16 * mebibyte // position, 40), 30 * mebibyte // position))
    return max(1, 64 * mebibyte // position)
