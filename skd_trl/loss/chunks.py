"""How many positions' logits are in memory at once: positions cut into chunks.

Each chunk reads both heads and adds to the gradient of the student's, so on a GPU many positions share that: at 110 of Qwen3's
vocabulary it reads more of heads than of logits. On CPU a chunk that stays in the cache is faster.

Shapes: N positions, V vocabulary.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch


MIB = 2**20
# Tensors (N, V) in fp32 that a chunk holds at its worst moment, by a count over divergences, gates and statistics.
TENSORS_PER_CHUNK = 15
# Of all memory of a device, what a chunk may take; and of what is free at the moment.
SHARE_OF_ALL, SHARE_OF_FREE = 1 / 16, 1 / 2
# Beyond that many positions the heads are a small part of what is read.
MOST_POSITIONS = 4096


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes of a device: all it has, and what is free."""

    total: int
    free: int

    @classmethod
    def of(cls, device: torch.device) -> "DeviceMemory | None":
        """That of a CUDA device at this moment, with what PyTorch holds unused; of others it is not asked."""
        if device.type != "cuda":
            return None
        free, total = torch.cuda.mem_get_info(device)
        return cls(total, free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))


def chunks(
    num_positions: int, vocab_size: int, device: torch.device, chunk_size: int | None = None
) -> Iterator[slice]:
    """Slices of positions, `chunk_size` in each, or by default as many as [`default_chunk_size`] admits, all of one size.

    Raises:
        `ValueError`: for a chunk size below 1.
    """
    if chunk_size is None:
        chunk_size = even_chunk_size(num_positions, default_chunk_size(vocab_size, device, DeviceMemory.of(device)))
    if chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size} holds no position, so the loss would never end; use 1 or more.")
    # At least one chunk, empty if need be: a batch without a position then gives zeros of the right types and shapes.
    for start in range(0, max(num_positions, 1), chunk_size):
        yield slice(start, start + chunk_size)


def even_chunk_size(num_positions: int, longest: int) -> int:
    """Positions per chunk where as few chunks as `longest` admits are of one size."""
    return math.ceil(num_positions / max(1, math.ceil(num_positions / longest))) or 1


def default_chunk_size(vocab_size: int, device: torch.device, memory: DeviceMemory | None = None) -> int:
    """
    Positions per chunk.

    On CPU their fp32 logits take 16 MiB or, where these hold fewer, 40 positions, which share the passes over the heads and their
    gradient; at most 30 MiB, for beyond 32 glibc maps every tensor again, and each page of it costs a fault. Elsewhere they take 64 MiB,
    and where `memory` is known as much as a sixteenth of all of it and half of what is free hold, up to 4096 positions. It is all
    memory that decides as long as enough is free, so a run that is repeated adds its chunks up in the same order.
    """
    position = 4 * vocab_size
    if device.type == "cpu" and memory is None:
        return max(1, min(max(16 * MIB // position, 40), 30 * MIB // position))
    fewest = max(1, 64 * MIB // position)
    if memory is None:
        return fewest
    room = min(memory.total * SHARE_OF_ALL, memory.free * SHARE_OF_FREE)
    fits = int(room) // (TENSORS_PER_CHUNK * position)
    return max(fewest, min(fits // 128 * 128, MOST_POSITIONS))  # whole tiles of the products
