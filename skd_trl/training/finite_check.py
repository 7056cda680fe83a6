"""NaN and infinity in a step's loss: found before the optimizer moves, on all processes alike, and named.

A loss that is not finite makes every trained weight NaN in one step, and the Trainer logs it as 0 (`logging_nan_inf_filter`).
Flags are kept on the device over the micro-batches of a step, and read once, before the backward of the last of them: DeepSpeed
moves the weights inside that backward.
"""

import torch
from accelerate import Accelerator
from torch import nn

from ..loss.distillation_loss import DistillationLoss
from .distributed import is_sharded


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
        culprits = [f"the {name}'s{_where(model)}" for name, model, is_guilty in
                    (("student", student, by_student), ("teacher", teacher, by_teacher)) if is_guilty]  # fmt: skip
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


def _where(model: nn.Module | None) -> str:
    """The parameters that are not finite, if this process holds them."""
    if model is None or is_sharded(model):
        return ""
    names = [name for name, p in model.named_parameters() if p.is_floating_point() and not p.isfinite().all()]
    more = f" and {len(names) - 2} more" if len(names) > 2 else ""
    return f" (weights {', '.join(names[:2])}{more})" if names else ""
