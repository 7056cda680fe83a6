"""NaN and infinity in a step's loss and gradients, and in weights to be saved: found before, on all processes alike, and named.

A loss that is not finite makes every trained weight NaN in one step, and the Trainer logs it as 0 (`logging_nan_inf_filter`).
Flags are kept on the device over the micro-batches of a step, and read once, before the backward of the last of them: DeepSpeed
moves the weights inside that backward. Of gradients it is asked whether it did: it looks at them itself, and leaves the step out.
"""

import math
from collections.abc import Iterable

import torch
from accelerate import Accelerator, DistributedType
from torch import nn
from transformers import Trainer, TrainerCallback

from ..loss.distillation_loss import DistillationLoss
from .distributed import is_sharded


# Types of weights that can be looked at. Quantised ones are not trained.
PRECISIONS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
GRADIENT_ADVICE = (
    "If the divergence is a function of yours, keep roots, quotients and logarithms away from 0; else use a type of more range "
    "(bf16 or fp32)."
)


class FiniteCheck:
    """What was not finite in the micro-batches of a step: the loss, and the student's and the teacher's distributions."""

    def __init__(self):
        self.flags: torch.Tensor | None = None

    def add(self, outcome: DistillationLoss) -> None:
        """Takes the loss and both models' entropies of a micro-batch into account; nothing is waited for."""
        entropies = [outcome.statistics.get(f"{name}_entropy", outcome.weight[:0]) for name in ("student", "teacher")]
        values = [outcome.loss.detach(), *entropies]
        flags = torch.stack([(~value.isfinite()).any() for value in values])
        self.flags = flags if self.flags is None else self.flags | flags

    def require(self, step: int, student: nn.Module, teacher: nn.Module | None, accelerator: Accelerator) -> None:
        """Ends the optimizer step `step` (1 is the first); collective.

        Raises:
            `FloatingPointError`: if a loss of it is not finite on any process, naming the model and the step.
        """
        assert self.flags is not None  # a micro-batch was added
        counts = accelerator.reduce(self.flags.float(), reduction="sum")
        self.flags = None
        is_bad, by_student, by_teacher = (counts > 0).tolist()  # type: ignore[union-attr]
        if not is_bad:
            return
        culprits = []
        for owner, model, is_guilty in (("student", student, by_student), ("teacher", teacher, by_teacher)):
            if is_guilty:
                # Its weights that are not finite are named, if this process holds them.
                named = model.named_parameters() if model is not None and not is_sharded(model) else ()
                weights = _names(((name, p) for name, p in named if p.is_floating_point()), kind="weights ")
                culprits.append(f"the {owner}'s{weights}")
        found = (
            f"{' and '.join(culprits)} distributions hold NaN or infinity"
            if culprits
            else "both models' distributions are finite, so the divergence makes it"
        )
        raise FloatingPointError(
            f"Step {step}: the loss is not finite: {found}. The step was not taken. Load finite weights "
            "(a checkpoint from before), use a type of more range (bf16 or fp32 for fp16), or lower learning_rate if the "
            "student was finite at the start."
        )


class GradientCheck(TrainerCallback):
    """Before each optimizer step: raises `FloatingPointError` if a gradient is not finite on any process. A loss that is finite can have
    such a gradient (a root at 0, a quotient of two small numbers), and the optimizer would spoil all weights with it."""

    def __init__(self, trainer: Trainer):
        self.trainer = trainer

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        accelerator = self.trainer.accelerator
        if accelerator.scaler is not None:  # fp16: it looks itself, and leaves the step out
            return
        if accelerator.distributed_type == DistributedType.DEEPSPEED:
            _require_step_of_deepspeed(self.trainer.model_wrapped, state.global_step + 1)
            return
        named = [(name, _own_part(p.grad)) for name, p in self.trainer.model.named_parameters() if p.grad is not None]
        if not _is_bad_anywhere((grad for _, grad in named), accelerator, is_collective=True):
            return
        names = _names(named)
        raise FloatingPointError(
            f"Step {state.global_step + 1}: the loss is finite and its gradient is not{names}. The step was not taken. {GRADIENT_ADVICE}"
        )


def _require_step_of_deepspeed(engine, step: int) -> None:
    """DeepSpeed's optimizers keep no gradient, agree on whether what they have reduced is finite, and leave the step out.

    Raises:
        `FloatingPointError`: if they have, or if its configuration forbids that and they have not.
    """
    if engine.fp16_enabled():  # a step left out lowers the loss scale; it raises at the lowest
        return
    norm = engine.get_global_grad_norm()
    was_left_out = bool(getattr(engine.optimizer, "overflow", False))
    if was_left_out or (norm is not None and not 0 <= norm < math.inf):  # -1 says NaN
        outcome = (
            "The step was not taken."
            if was_left_out
            else "DeepSpeed took the step, as `check_grad_overflow` of its `bf16` block is false: the student in memory is damaged. Leave "
            "the setting out, and go on from a checkpoint."
        )
        raise FloatingPointError(
            f"Step {step}: the loss is finite and its gradient is not, on one process at least. {outcome} {GRADIENT_ADVICE}"
        )


def require_finite_weights(student: nn.Module, step: int, directory: str, accelerator: Accelerator) -> None:
    """Collective where the student is sharded, as saving is.

    Raises:
        `FloatingPointError`: if a weight that is to be saved in `directory` is not finite.
    """
    named = [(name, _own_part(p).detach()) for name, p in student.named_parameters() if p.dtype in PRECISIONS]
    if _is_bad_anywhere((weight for _, weight in named), accelerator, is_collective=is_sharded(student)):
        raise FloatingPointError(
            f"After step {step} the student's weights hold NaN or infinity{_names(named)}. Nothing was saved, and what is in "
            f"{directory} was not touched. Go on from an earlier checkpoint, with a lower learning_rate or a type of more range."
        )


def _own_part(tensor: torch.Tensor) -> torch.Tensor:
    """What this process holds of a tensor that ZeRO-3 or FSDP2 may shard."""
    return getattr(tensor, "ds_tensor", getattr(tensor, "_local_tensor", tensor))


def _is_bad_anywhere(tensors: Iterable[torch.Tensor], accelerator: Accelerator, is_collective: bool) -> bool:
    # A process may hold no part of a weight.
    held = [tensor for tensor in tensors if tensor.numel() > 0]
    flag = torch.zeros((), device=accelerator.device)
    # A Euclidean norm may overflow where no number does. It is asked first: on CPU the largest number takes 20 times as long.
    for norm in (2.0, float("inf")) if held else ():
        values = torch._foreach_norm(held, norm)
        flag = sum(((~value.isfinite()).to(flag) for value in values), torch.zeros_like(flag))
        if not flag:
            break
    if is_collective and accelerator.num_processes > 1:
        flag = accelerator.reduce(flag, reduction="sum")
    return bool(flag > 0)  # type: ignore[operator]


def _names(named: Iterable[tuple[str, torch.Tensor]], kind: str = "") -> str:
    names = [name for name, tensor in named if not tensor.isfinite().all()]
    more = f" and {len(names) - 2} more" if len(names) > 2 else ""
    return f" ({kind}{', '.join(names[:2])}{more})" if names else ""
