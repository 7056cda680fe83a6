"""Products of a weight with few rows on a CPU, as a student's step has them, asked for in the order that reads the weight fastest.

`x W^T` of two to eight rows and `W x^T`, transposed back, are one product. PyTorch asks for the first, for which MKL takes up to four
times as long, and which it gives to one thread. Weights with many columns gain at two or three rows only; a single row
of few columns gains as two equal ones. Rounding differs, as it does between other numbers of rows. Where rows are more or columns many,
[`PackedWeights`] are faster still.

Shapes: M rows, I inputs, O outputs.
"""

from contextlib import contextmanager

import torch
from torch.nn import functional


_linear = functional.linear
# From so many columns on, a weight gains at two and three rows alone.
MANY_INPUTS = 1024


@contextmanager
def products_of_few_rows(device: torch.device):
    """While this lasts, `torch.nn.functional.linear` is [`linear`] in fp32 on a CPU."""
    if device.type != "cpu" or functional.linear is not _linear or torch.is_autocast_enabled("cpu"):
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
    """Whether so many rows are faster in the other order, with a weight of this shape. Measured on one AMD processor (NOTES.md)."""
    if num_inputs >= MANY_INPUTS:
        return 2 <= num_rows <= 3
    return 1 <= num_rows <= (8 if num_outputs >= num_inputs else 5)
