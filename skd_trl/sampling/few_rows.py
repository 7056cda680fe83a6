"""Products of a weight with few rows on a CPU, as a student's step has them, asked for in the order that reads the weight fastest.

`x W^T` of two to eight rows and `W x^T`, transposed back, are one product. PyTorch asks for the first, for which MKL takes up to four
times as long, and which it gives to one thread. Where the weight has more columns than rows that turns at fewer rows, the earlier the
more columns. Rounding differs, as it does between other numbers of rows.

Shapes: M rows, I inputs, O outputs.
"""

from contextlib import contextmanager

import torch
from torch.nn import functional


_linear = functional.linear
# Up to so many columns, a weight that has fewer rows than columns gains at almost as many rows of input as others.
FEW_INPUTS = 1024


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
    is_fp32 = input.dtype == weight.dtype == torch.float32
    if not (is_plain and is_fp32 and 1 < num_rows <= most_rows(*weight.shape)):
        return _linear(input, weight, bias)
    output = torch.mm(weight, input.reshape(num_rows, -1).t()).t().contiguous()
    output = output.view(*input.shape[:-1], -1)
    return output if bias is None else output.add_(bias)


def most_rows(num_outputs: int, num_inputs: int) -> int:
    """How many rows at most are faster in the other order, with a weight of this shape. Measured on one AMD processor (NOTES.md)."""
    if num_outputs >= num_inputs:
        return 8
    if num_inputs <= FEW_INPUTS:
        return 5
    return 4 if torch.get_num_threads() > 1 else 3
