"""A copy of the student to sample with, in the type that mixed precision computes in.

Under autocast an fp32 weight is cast wherever it is used; in a captured round that is once for every drafted token. The copy holds the
cast weights, is brought up to date in place before each sampling (graphs go on reading the same memory), and shares what is
frozen and has the type already, such as the model under an adapter. It costs two bytes for each other weight.
"""

import copy

import torch
from accelerate import Accelerator
from torch import nn

from .distributed import is_sharded


PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}


class SamplingCopy:
    """Makes the copy at first need, and keeps it."""

    def __init__(self):
        self._student: nn.Module | None = None
        self._model: nn.Module
        self._pairs: list[tuple[torch.Tensor, torch.Tensor]] = []

    @torch.no_grad()
    def of(self, student: nn.Module, dtype: torch.dtype) -> nn.Module:
        """The copy of `student` with its present weights in `dtype`.

        Raises:
            `ValueError`: if one of its modules has a forward that was set on the object: a copy would run the original's.
        """
        student = getattr(student, "_orig_mod", student)  # what `torch_compile` was given
        if self._student is not student:
            self._model, self._pairs = _copied(student, dtype)
            self._student = student
        for own, weight in self._pairs:
            own.copy_(weight)
        return self._model


def is_worth_copying(student: nn.Module, accelerator: Accelerator) -> bool:
    """Whether sampling would cast weights: of an fp32 student under bf16 or fp16, on CUDA, that no engine shards."""
    return accelerator.device.type == "cuda" and can_be_copied(student, accelerator) and not _has_own_forwards(student)


def can_be_copied(student: nn.Module, accelerator: Accelerator) -> bool:
    """Whether there is anything to cast, and the weights are whole where they are."""
    if (
        accelerator.mixed_precision not in PRECISIONS
        or is_sharded(student)
        or hasattr(student, "set_reshard_after_forward")
    ):
        return False
    return any(p.dtype == torch.float32 for p in student.parameters())


def _copied(student: nn.Module, dtype: torch.dtype) -> tuple[nn.Module, list[tuple[torch.Tensor, torch.Tensor]]]:
    if _has_own_forwards(student):
        raise ValueError(
            f"sampling_copy=True cannot copy this {type(student).__name__}: modules in it have a forward that was set on the object, "
            "and a copy would run the original's. Leave sampling_copy None, or give the model as it was loaded."
        )
    copies, pairs = {}, []
    for weight in student.parameters():
        if weight.dtype == torch.float32 or (weight.requires_grad and weight.is_floating_point()):
            own = nn.Parameter(weight.detach().to(dtype, copy=True), requires_grad=False)
            pairs.append((own, weight))
        else:
            own = weight
        copies[id(weight)] = own
    # A weight is not copied first and cast then: where deepcopy comes upon one, it finds the cast one.
    model = copy.deepcopy(student, copies)
    vars(model).pop("forward", None)  # accelerate's, which runs the original under autocast
    return model, pairs


def _has_own_forwards(student: nn.Module) -> bool:
    student = getattr(student, "_orig_mod", student)
    return any("forward" in vars(module) for module in student.modules() if module is not student)
