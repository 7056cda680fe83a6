"""Whether the types that a training computes in cost what they should not: updates lost to rounding, casts, products that are slow.

Each finding looks at the weights as they were loaded, at accelerate's mixed precision, and of a CPU at one product that is tried.
"""

import time
from functools import cache

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel

from .findings import Verdict
from .machine import compute_type


# Rows, outputs and inputs of the product that is tried, and how often; the first turn is not counted.
TRIED, NUM_TURNS = (256, 1536, 576), 3
# From so many times as long on, it is worth a word.
WORTH_A_WORD = 1.25


def lost_updates(student: PreTrainedModel, accelerator: Accelerator) -> tuple[Verdict, str]:
    """The finding on trained weights in 16 bits that an optimizer moves as they are. bf16 has three digits:
    a step below a 500th of a weight, as learning rates for fine-tuning make it, is rounded away."""
    kind, precision = accelerator.distributed_type, accelerator.mixed_precision
    good = Verdict.GOOD, "The optimizer moves weights in fp32."
    if kind == "DEEPSPEED" or (kind == "FSDP" and precision != "no"):  # they keep weights in fp32 for the optimizer
        return good
    trained = [p for p in student.parameters() if p.requires_grad]
    small = [p for p in trained if p.dtype in (torch.bfloat16, torch.float16)]
    if not small:
        return good
    share = sum(p.numel() for p in small) / sum(p.numel() for p in trained)
    return Verdict.WARNING, (
        f"{share:.0%} of the weights that are trained are {str(small[0].dtype).removeprefix('torch.')}: most steps at usual learning "
        "rates are smaller than their rounding, and are lost. Load the student in float32 (dtype=torch.float32, or leave dtype out of "
        "model_init_kwargs) and leave bf16=True, which computes in bf16 all the same; or train an adapter, or with DeepSpeed, "
        "which keep weights in float32 for the optimizer."
    )


def casts_of_teacher(
    student: PreTrainedModel, teacher: PreTrainedModel, accelerator: Accelerator
) -> tuple[Verdict, str]:
    """The finding on a teacher in fp32 under mixed precision: autocast casts its weights in each of its forwards, one for every round."""
    good = Verdict.GOOD, "The teacher's weights are used in the type that they have."
    kind, dtype = accelerator.distributed_type, compute_type(accelerator.mixed_precision)
    if dtype is None or kind in ("DEEPSPEED", "FSDP"):  # they cast a teacher once, or while they gather it
        return good
    own = {id(parameter) for parameter in student.parameters()}
    weights = [p for p in teacher.parameters() if p.ndim > 1]
    wide = [p for p in weights if p.dtype == torch.float32]
    if any(id(parameter) in own for parameter in weights) or 2 * len(wide) <= len(weights):
        return good
    name = str(dtype).removeprefix("torch.")
    return Verdict.WARNING, (
        f"The teacher's weights are float32 and mixed precision is {accelerator.mixed_precision!r}: each of its forwards, one for every "
        f"round of sampling, casts them to {name} again, and they take twice the memory. Load the teacher in {name} "
        f'(teacher_model_init_kwargs={{"dtype": "{name}"}}, or dtype=torch.{name} in from_pretrained).'
    )


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
