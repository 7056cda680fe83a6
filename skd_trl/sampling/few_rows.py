"""Products of a weight with few rows on a CPU, as a student's step has them, asked for in the order that reads the weight fastest.

`x W^T` of two to eight rows and `W x^T`, transposed back, are one product. PyTorch asks for the first. On an AMD processor MKL takes up to
four times as long for it, and gives it to one thread; on an Intel one the second takes twice as long. So both are tried, once in a process.
Where the second is the faster one, weights with many columns gain by it at two or three rows only; a single row of few columns gains as
two equal ones. Rounding differs, as it does between other numbers of rows. Where rows are more or columns many, [`PackedWeights`] are
faster still.

Shapes: M rows, I inputs, O outputs.
"""

import time
from contextlib import contextmanager
from functools import cache

import torch
from torch.nn import functional


_linear = functional.linear
# From so many columns on, a weight gains at two and three rows alone.
MANY_INPUTS = 1024
# The trial: rows, outputs, inputs; so many weights, read from memory in turn; so often.
TRIED = (3, 1536, 576)
NUM_TRIED, NUM_TURNS = 6, 3


@contextmanager
def products_of_few_rows(device: torch.device):
    """While this lasts, `torch.nn.functional.linear` is [`linear`] in fp32 on a CPU, where the other order is the faster one."""
    is_for_it = device.type == "cpu" and functional.linear is _linear and not torch.is_autocast_enabled("cpu")
    if not (is_for_it and other_order_is_faster()):
        yield
        return
    functional.linear = linear
    try:
        yield
    finally:
        functional.linear = _linear


def linear(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`input` (..., I), `weight` (O, I), `bias` (O,): what `torch.nn.functional.linear` gives, up to rounding, (..., O)."""
    num_rows = input.numel() // max(input.shape[-1], 1)
    is_plain = type(weight) in (torch.Tensor, torch.nn.Parameter) and weight.is_contiguous() and weight.ndim == 2
    is_fp32 = input.dtype == weight.dtype == torch.float32 and weight.device.type == "cpu"
    if not (is_plain and is_fp32 and gains(num_rows, *weight.shape)):
        return _linear(input, weight, bias)
    rows = input.reshape(num_rows, -1)
    columns = rows.t() if num_rows > 1 else rows.repeat(2, 1).t()
    output = torch.mm(weight, columns)[:, :num_rows].t().contiguous()
    output = output.view(*input.shape[:-1], -1)
    return output if bias is None else output.add_(bias)


def gains(num_rows: int, num_outputs: int, num_inputs: int) -> bool:
    """Whether so many rows of a weight of this shape are faster in the other order, on a machine where it is the faster one."""
    if num_inputs >= MANY_INPUTS:
        return 2 <= num_rows <= 3
    return 1 <= num_rows <= (8 if num_outputs >= num_inputs else 5)


@cache
def other_order_is_faster() -> bool:
    """Whether this machine's products of few rows are faster in the other order, by a trial of some milliseconds.

    The one takes twice as long as the other, in this direction or that (`benchmarks/products.py`), so the answer is the same in each run.
    """
    num_rows, *shape = TRIED
    cpu = {"dtype": torch.float32, "device": "cpu"}
    rows, weights = torch.ones(num_rows, shape[1], **cpu), [torch.ones(shape, **cpu) for _ in range(NUM_TRIED)]

    def seconds(product) -> float:
        start = time.perf_counter()
        for weight in weights:
            product(weight)
        return time.perf_counter() - start

    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        turns = [
            (seconds(lambda weight: _linear(rows, weight)), seconds(lambda weight: torch.mm(weight, rows.t())))
            for _ in range(NUM_TURNS + 1)
        ]
    as_asked, other = (min(column) for column in zip(*turns[1:], strict=True))
    return other < as_asked
