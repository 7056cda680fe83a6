"""Products with a weight on a CPU, from a copy of it that is packed as oneDNN reads it fastest.

`torch.nn.functional.linear` takes a weight as it lies, row by row. A packed copy gives the same products, up to rounding: those of three
to 32 rows, as drafts and judged blocks have them, in a third to three quarters of the time, those of hundreds in nine tenths, in bf16
nearly all of them in about half. (On an AMD processor; on an Intel one those of one to three rows gain nothing, those of 4 to 32 take half to
nine tenths.) Packing costs as much as a few products, so a weight is packed when it has been used a few times, and again when it has
changed: a frozen teacher's once, a trained student's in each sampling that is long enough.

Shapes: M rows, I inputs, O outputs.
"""

import math
import os
from contextlib import contextmanager
from dataclasses import dataclass
from weakref import ReferenceType, ref

import psutil
import torch
from torch import nn
from torch.nn import functional

from . import few_rows
from .ragged_cache import has_shards


_linear = functional.linear
# So many products with a weight cost about what packing it saves, where the other order is the faster one for few rows and where it is not.
PAYS_AFTER = {True: 2, False: 10}
# Up to so many rows the other order is about as fast, where it gains: nothing is packed for them.
FEW_ROWS = 4
# Up to so many rows PyTorch's own order is as fast where the other does not gain.
FEW_ROWS_AS_THEY_LIE = 3
# Rows of a product that a copy is made for; other numbers can be multiplied with it too.
LIKELY_ROWS = 8
# Smaller weights are in a processor's cache, however they lie.
LEAST_NUMBERS = 2**17
# Of the machine's memory, what all copies may take.
MOST_SHARE = 1 / 8
# Numbers of a weight that are looked at to see whether somebody has changed it behind PyTorch's back (`weight.data`).
NUM_LOOKED_AT = 32


@dataclass
class Copy:
    """What is known of a weight: as it was (`address`, PyTorch's count of changes, some numbers), how often it was used, and its copy."""

    weight: ReferenceType[torch.Tensor]
    address: int
    version: int
    numbers: torch.Tensor
    num_uses: int = 0
    packed: torch.Tensor | None = None

    @classmethod
    def of(cls, weight: torch.Tensor) -> "Copy":
        return cls(ref(weight), weight.data_ptr(), weight._version, some_numbers(weight))

    @property
    def is_of_weight_as_it_is(self) -> bool:
        weight = self.weight()
        if weight is None or weight.untyped_storage().nbytes() < weight.nbytes:  # freed by an engine that gathers it
            return False
        return torch.equal(self.numbers, some_numbers(weight))


class PackedWeights:
    """Packed copies of weights on a CPU, for as long as the weights live and stay as they are.

    Args:
        most_bytes (`int`, *optional*): what all copies together may take. Defaults to an eighth of the machine's memory, of which each
            process has its part.
    """

    def __init__(self, most_bytes: int | None = None):
        self.most_bytes = allowed_bytes() if most_bytes is None else most_bytes
        self.copies: dict[int, Copy] = {}  # by id of the weight
        self.is_proved: bool | None = None  # whether a packed product was right, once one was tried

    @contextmanager
    def products(self, model: nn.Module):
        """While this lasts, `torch.nn.functional.linear` is [`linear`], which packs the weights of `model` where it is whole and on a CPU;
        such times may lie in one another. Weights may change between two of them, in one only by PyTorch's own in-place operations.
        What is written to a few numbers of `weight.data` is not seen."""
        self.copies = {key: copy for key, copy in self.copies.items() if copy.is_of_weight_as_it_is}
        own = [] if has_shards(model) else [weight for weight in model.parameters() if is_packable(weight)]
        for weight in own:
            if id(weight) not in self.copies:
                self.copies[id(weight)] = Copy.of(weight)
        if not own or functional.linear is not _linear:
            yield
            return
        functional.linear = self.linear
        try:
            yield
        finally:
            functional.linear = _linear

    def linear(self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """`input` (..., I), `weight` (O, I), `bias` (O,): what `torch.nn.functional.linear` gives, up to rounding, (..., O)."""
        if torch.is_grad_enabled():
            return _linear(input, weight, bias)
        if torch.is_autocast_enabled("cpu"):
            if weight.dtype != torch.get_autocast_dtype("cpu"):
                return _linear(input, weight, bias)
            input, bias = input.to(weight.dtype), None if bias is None else bias.to(weight.dtype)
        copy = self.copies.get(id(weight))
        if copy is None or copy.weight() is not weight or input.dtype != weight.dtype or input.numel() == 0:
            return _unpacked(input, weight, bias)
        num_rows, is_fp32 = input.numel() // input.shape[-1], weight.dtype == torch.float32
        gains_by_order = is_fp32 and few_rows.other_order_is_faster() and few_rows.gains(num_rows, *weight.shape)
        most_unpacked = (2 if gains_by_order else 1) if few_rows.other_order_is_faster() else FEW_ROWS_AS_THEY_LIE
        if is_fp32 and num_rows <= most_unpacked:
            packed = None
        else:
            packed = self.packed(copy, weight, counts=not gains_by_order or num_rows > FEW_ROWS)
        if packed is None:
            return _unpacked(input, weight, bias)
        output = torch.ops.mkldnn._linear_pointwise(input, packed, bias, "none", [], "")
        if self.is_proved is None:
            expected = _linear(input, weight, bias)
            self.is_proved = bool((output - expected).abs().max() <= 0.02 * expected.abs().max())
        return output if self.is_proved else _linear(input, weight, bias)

    def packed(self, copy: Copy, weight: torch.Tensor, counts: bool) -> torch.Tensor | None:
        """The packed `copy` of its weight, if it has paid, fits, and works. This use `counts` if a copy would be faster by much."""
        if (copy.address, copy.version) != (weight.data_ptr(), weight._version):
            copy = self.copies[id(weight)] = Copy.of(weight)
        copy.num_uses += counts
        pays_after = PAYS_AFTER[few_rows.other_order_is_faster()]
        is_due = counts and copy.num_uses == pays_after + 1 and self.is_proved is not False
        if is_due and self.num_bytes + weight.nbytes <= self.most_bytes:
            try:
                copy.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), LIKELY_ROWS)
            except (AttributeError, RuntimeError):  # a PyTorch without oneDNN, or with another one
                self.is_proved = False
        return copy.packed

    def forget_trained(self, model: nn.Module) -> None:
        """Gives back the copies of a model's weights that are trained: the next optimizer step changes them."""
        for weight in model.parameters():
            if weight.requires_grad:
                self.copies.pop(id(weight), None)

    @property
    def num_bytes(self) -> int:
        """What the copies take."""
        return sum(copy.packed.nbytes for copy in self.copies.values() if copy.packed is not None)


def is_packable(weight: torch.Tensor) -> bool:
    """Whether a weight can have a packed copy: a plain one, in fp32 or bf16 on a CPU."""
    return (
        type(weight) is nn.Parameter
        and weight.ndim == 2
        and weight.numel() >= LEAST_NUMBERS
        and weight.dtype in (torch.float32, torch.bfloat16)
        and weight.device.type == "cpu"
        and weight.is_contiguous()
    )


def packed_bytes(model: nn.Module, without: nn.Module | None = None) -> int:
    """What packed copies of all weights of a `model` take that products are made with, but those that another model has too."""
    linear = {module.weight for module in model.modules() if isinstance(module, nn.Linear)}
    linear -= set() if without is None else set(without.parameters())
    return min(sum(weight.nbytes for weight in linear if is_packable(weight)), allowed_bytes())


def allowed_bytes() -> int:
    """What copies may take in this process."""
    return int(host_bytes() * MOST_SHARE)


def host_bytes() -> int:
    """The machine's memory, of which each of its processes has the same part."""
    return psutil.virtual_memory().total // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def some_numbers(weight: torch.Tensor) -> torch.Tensor:
    """A few numbers of a tensor, by which it is seen whether somebody has changed it."""
    step = max(weight.numel() // NUM_LOOKED_AT, 1)
    while math.gcd(step, weight.shape[-1] if weight.ndim else 1) > 1:  # else they would all be of one column
        step -= 1
    return weight.detach().flatten()[::step].clone()


def _unpacked(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """The product with a weight as it lies."""
    return (few_rows.linear if few_rows.other_order_is_faster() else _linear)(input, weight, bias)
