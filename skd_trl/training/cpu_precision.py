"""Whether a CPU computes as fast in 16 bits as in fp32: tried once in a process, on one product of a model's kind.

TRL's configurations set `bf16=True` where nothing is said. Processors with AMX gain by it; one with AVX512-BF16 alone may take twice as
long for a product of many rows, and one without either far longer. Models say nothing of it: a run is only slow.
"""

import time
from functools import cache

import torch
from accelerate import Accelerator

from .findings import Verdict
from .machine import compute_type


# Rows, outputs and inputs of the product that is tried, and how often; the first turn is not counted.
TRIED, NUM_TURNS = (256, 1536, 576), 3
# From so many times as long on, it is worth a word.
WORTH_A_WORD = 1.25


def slower_in_16_bits(accelerator: Accelerator) -> tuple[Verdict, str]:
    """The finding on a training in mixed precision on a CPU."""
    dtype = compute_type(accelerator.mixed_precision)
    if accelerator.device.type != "cpu" or dtype is None:
        return Verdict.GOOD, "Products are computed in a type that is fast on this device."
    ratio = seconds_of_product(dtype) / seconds_of_product(torch.float32)
    name = str(dtype).removeprefix("torch.")
    if ratio < WORTH_A_WORD:
        return Verdict.GOOD, f"A product in {name} takes {ratio:.1f} times as long on this processor as in float32."
    return Verdict.WARNING, (
        f"Mixed precision is {accelerator.mixed_precision!r}, and a product in {name} takes {ratio:.1f} times as long on this processor as in "
        "float32: steps are slower by about as much. Set bf16=False (and fp16=False) on this machine; TRL's default is bf16=True."
    )


@cache
def seconds_of_product(dtype: torch.dtype) -> float:
    """Seconds of a product of the size `TRIED` in a type, by a trial of some milliseconds: the shortest of `NUM_TURNS`."""
    num_rows, num_outputs, num_inputs = TRIED
    rows = torch.ones(num_rows, num_inputs, dtype=dtype, device="cpu")
    weight = torch.ones(num_outputs, num_inputs, dtype=dtype, device="cpu")
    turns = []
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        for _ in range(NUM_TURNS + 1):
            start = time.perf_counter()
            torch.nn.functional.linear(rows, weight)
            turns.append(time.perf_counter() - start)
    return min(turns[1:])
