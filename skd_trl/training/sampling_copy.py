"""A copy of the student to sample with: its weights in the type that mixed precision computes in, and its adapter merged.

Under autocast an fp32 weight is cast wherever it is used; in a captured round that is once for every drafted token. An adapter almost
doubles a token's operators. The copy holds cast and merged weights, is brought up to date in place before each sampling (graphs go on
reading the same memory), and shares everything else. The loss is the student's own, with its adapter.

A merged weight is rounded once to the type it is computed in, as activations are after each layer; in fp32 the copy's logits are the
student's up to rounding. So a response may differ where two logits nearly tie, and is as much the student's as with another batch size.
"""

from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from torch import nn

from .distributed import is_sharded, shards_the_student
from .merged_adapter import plain_layer, plain_layers, write_weight
from .models import copy_around


logger = get_logger(__name__)
PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class CopySettings:
    """What differs in the copy: `dtype` of fp32 and trained weights (`None`: as they are), and whether its adapter is merged."""

    dtype: torch.dtype | None = None
    merges_adapter: bool = False

    @property
    def is_needed(self) -> bool:
        return self.dtype is not None or self.merges_adapter

    @classmethod
    def of(cls, student: nn.Module, args: Any, mixed_precision: str, is_gpu: bool) -> "CopySettings":
        """As `sampling_copy` and `merge_adapter` of `args` ask; where they are `None`, what is possible: a copy in another type anywhere,
        a merged adapter on a GPU."""
        if is_sharded(student) or hasattr(student, "set_reshard_after_forward"):
            return cls()
        is_possible = not _has_own_forwards(student)
        can_cast = mixed_precision in PRECISIONS and any(p.dtype == torch.float32 for p in student.parameters())
        casts = can_cast and (is_possible if args.sampling_copy is None else args.sampling_copy)
        merges = is_gpu and is_possible if args.merge_adapter is None else args.merge_adapter
        merges = merges and bool(plain_layers(student)[0])
        return cls(PRECISIONS[mixed_precision] if casts else None, merges)


def check_merging(student: nn.Module, accelerator: Accelerator) -> None:
    """For `merge_adapter=True`.

    Raises:
        `ValueError`: if there is no adapter that can be merged.
    """
    plain, others = plain_layers(student)
    if shards_the_student(accelerator):
        raise ValueError(
            "merge_adapter=True needs the student's weights whole on each process, and ZeRO-3 and FSDP2 shard them. Leave merge_adapter "
            "None, or train under DDP, ZeRO-1 or ZeRO-2."
        )
    if not plain:
        why = "; ".join(sorted({f"{name.rsplit('.', 1)[-1]} is {reason}" for name, reason in others.items()}))
        raise ValueError(
            f"merge_adapter=True, but the student has no adapter layer to merge{f' ({why})' if why else ''}. Leave merge_adapter None, or "
            "train with LoRA or DoRA on linear layers and embeddings."
        )


def check_casting(student: nn.Module, accelerator: Accelerator) -> None:
    """For `sampling_copy=True`.

    Raises:
        `ValueError`: if there is no weight that a copy would hold in another type.
    """
    precision = accelerator.mixed_precision
    if shards_the_student(accelerator):
        found = "ZeRO-3 and FSDP2 shard the student's weights, and a copy needs them whole on each process"
    elif precision not in PRECISIONS:
        found = f"mixed precision is {precision!r}, so the student computes in the type that its weights have"
    elif accelerator.distributed_type == "DEEPSPEED":
        found = f"DeepSpeed's engine has cast the student's weights to {precision} already"
    elif all(p.dtype != torch.float32 for p in student.parameters()):
        found = "the student has no fp32 weights to cast"
    else:
        return
    raise ValueError(
        f"sampling_copy=True would have no effect: {found}. Leave sampling_copy None, or train a student of fp32 weights with "
        "bf16=True or fp16=True, under DDP or in one process."
    )


class SamplingCopy:
    """Makes the copy at first need, and keeps it."""

    def __init__(self):
        self._student: nn.Module | None = None
        self._settings = CopySettings()
        self._model: nn.Module
        self._pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._merged: list[tuple[nn.Module, nn.Module]] = []

    @torch.no_grad()
    def of(self, student: nn.Module, settings: CopySettings) -> nn.Module:
        """The copy of `student` with its present weights.

        Raises:
            `ValueError`: if one of its modules has a forward that was set on the object: a copy would run the original's.
        """
        student = getattr(student, "_orig_mod", student)  # what `torch_compile` was given
        if self._student is not student or self._settings != settings:
            if _has_own_forwards(student):
                option = "merge_adapter" if settings.merges_adapter else "sampling_copy"
                raise ValueError(
                    f"{option}=True cannot copy this {type(student).__name__}: modules in it have a forward that was set on the object, "
                    f"and a copy would run the original's. Leave {option} None, or give the model as it was loaded."
                )
            merged, others = plain_layers(student) if settings.merges_adapter else ({}, {})
            self._merged = [(layer, plain_layer(layer, settings.dtype)) for layer in merged.values()]
            # What is in here is not copied but taken for the copy.
            copies: dict[int, Any] = {id(layer): plain for layer, plain in self._merged}
            self._pairs = []
            for weight in _outside(student, merged):
                own = weight
                if _has_own_memory(weight, settings.dtype):
                    own = nn.Parameter(weight.detach().to(settings.dtype, copy=True), requires_grad=False)
                    self._pairs.append((own, weight))
                copies[id(weight)] = own
            self._model = copy_around(student, copies)
            vars(self._model).pop("forward", None)  # accelerate's, which runs the original under autocast
            if others:
                named = "; ".join(f"{name} ({reason})" for name, reason in list(others.items())[:5])
                logger.warning(
                    f"{len(others)} of the adapter's layers are sampled with unmerged, and cost time: {named}."
                )
            self._student, self._settings = student, settings
        for own, weight in self._pairs:
            own.copy_(weight)
        with torch.autocast(next(student.parameters()).device.type, enabled=False):
            for layer, plain in self._merged:
                write_weight(layer, plain)
        return self._model


def copied_bytes(student: nn.Module, settings: CopySettings) -> int:
    """Memory of the copy beside the student."""
    merged = plain_layers(student)[0] if settings.merges_adapter else {}
    bases = [layer.get_base_layer() for layer in merged.values()]  # type: ignore[operator]
    own = [(p, settings.dtype or p.dtype) for base in bases for p in base.parameters(recurse=False)]
    own += [(p, settings.dtype) for p in _outside(student, merged) if _has_own_memory(p, settings.dtype)]
    return sum(p.numel() * dtype.itemsize for p, dtype in own if dtype is not None)


def _outside(student: nn.Module, layers: dict[str, nn.Module]) -> list[nn.Parameter]:
    """The student's parameters that are not in these layers alone."""
    inside = {id(module) for layer in layers.values() for module in layer.modules()}
    modules = [module for module in student.modules() if id(module) not in inside]
    return list({id(p): p for module in modules for p in module.parameters(recurse=False)}.values())


def _has_own_memory(weight: torch.Tensor, dtype: torch.dtype | None) -> bool:
    """Whether a weight that is not merged differs in the copy: what is frozen and has the type already is shared."""
    return dtype is not None and (
        weight.dtype == torch.float32 or (weight.requires_grad and weight.is_floating_point())
    )


def _has_own_forwards(student: nn.Module) -> bool:
    student = getattr(student, "_orig_mod", student)
    return any("forward" in vars(module) for module in student.modules() if module is not student)
