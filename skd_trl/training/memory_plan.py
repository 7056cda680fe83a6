"""What a training holds on each device at its worst moments, counted before anything is allocated, and what would make it fit.

Two moments decide: the sampling of a window (caches, logits of a draft, hidden states of all responses) and a micro-batch (gradients,
activations, a chunk of the loss). Activations, caches and logits are counted by running both models' own forwards on fake tensors,
which have shapes, types and a device, and no memory; the rest is arithmetic. Not counted: what a device and its libraries take for
themselves, and what an allocator cannot use of what it has (see `RESERVE`).

Shapes: R places, B rows of a micro-batch, S their columns, P longest prompt, T longest response, G draft, V vocabulary.
"""

import math
from dataclasses import dataclass, replace

from torch import nn

from ..sampling.packed_weights import packed_bytes
from .machine import Machine
from .memory_count import (
    Window,
    hidden_bytes,
    largest_layer,
    likely_draft,
    sampling_bytes,
    training_bytes,
    whole_bytes,
)
from .sampling_copy import CopySettings, copied_bytes


GIB = 2**30
# Of the memory that is free, what is left to the allocator and to libraries.
RESERVE = 0.1
# The same where caches are kept for the next step's sampling, and with them the graphs: they may be given back, and a run that ends for them may not.
KEPT_RESERVE = 0.2


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on one device. `held` is there throughout, `sampling` and `training` in turns; `per_place` is what one more row that is
    written at once costs, `free` what the device has for all of it (0: not known), `most_kept` how much of it caches may have during a
    micro-batch."""

    held: dict[str, int]
    sampling: dict[str, int]
    training: dict[str, int]
    per_place: int
    num_places: int
    num_prompts: int
    free: int = 0
    most_kept: int = 0

    @property
    def peak(self) -> int:
        return sum(self.held.values()) + max(sum(self.sampling.values()), sum(self.training.values()))

    @property
    def fits(self) -> bool:
        return self.peak <= self.free * (1 - RESERVE) or self.free == 0

    def table(self) -> str:
        """A line for each moment, in GiB."""
        lines = [
            f"Memory per device, planned: {gib(self.peak)} at most" + (f" of {gib(self.free)}" if self.free else "")
        ]
        for name, parts in (("always", self.held), ("sampling", self.sampling), ("a micro-batch", self.training)):
            shown = ", ".join(f"{part} {gib(size)}" for part, size in parts.items() if size >= GIB / 1024)
            lines.append(f"  {name:<13} {gib(sum(parts.values())):>10}  {shown}")
        return "\n".join(lines)


def plan_memory(
    student: nn.Module, teacher: nn.Module, machine: Machine, args, window: Window, is_spread: bool
) -> MemoryPlan:
    """
    The plan of a training.

    Args:
        student, teacher (`nn.Module`):
            Models of transformers; an adapter may be around the student. Their weights are not looked at and may be on the meta device.
        machine ([`Machine`]):
            Which engine, how many processes, which precision and which device.
        args ([`SKDConfig`]):
            For the options that cost memory: optimizer, checkpointing, chunks of the loss, gathering of the student.
        window ([`Window`]): the shapes of a step.
        is_spread (`bool`): whether the teacher is spread over the processes.
    """
    ranks, stage = machine.num_processes, machine.stage
    trained = sum(p.numel() for p in student.parameters() if p.requires_grad)
    # DeepSpeed's engine of 16 bits casts the weights, and trains copies of them in fp32.
    keeps_copies = machine.engine == "DEEPSPEED" and machine.mixed_precision != "no"
    most_bytes = 2 if keeps_copies else 8
    weights = whole_bytes(student, most_bytes)
    states = trained * (_state_bytes(args) + (4 if keeps_copies else 0))
    gradients = sum(p.numel() * min(p.element_size(), most_bytes) for p in student.parameters() if p.requires_grad)
    # Of a teacher on another device the loss has a copy of the head. The student's own teacher shares tensors with it.
    beside = teacher if getattr(args, "teacher_device", None) is None else teacher.get_output_embeddings()
    held = {
        "student": weights // (ranks if stage == 3 else 1),
        "optimizer": states // (ranks if stage > 0 else 1),
        "teacher": whole_bytes(beside, without=student) // (ranks if is_spread else 1),
    }
    copied = CopySettings.of(student, args, machine.mixed_precision, machine.is_gpu) if stage < 3 else CopySettings()
    if keeps_copies:  # there is nothing left to cast
        copied = replace(copied, dtype=None)
    if copied.is_needed:
        held["student's copy for sampling"] = copied_bytes(student, copied)
    casts = copied.dtype is not None
    is_captured = machine.is_gpu and stage < 3 and not is_spread
    sampling, per_place = sampling_bytes(student, teacher, machine, window, casts or keeps_copies, is_captured)
    if machine.device.type == "cpu" and machine.mixed_precision == "no":
        held["teacher's packed weights"] = packed_bytes(beside, without=student)
        sampling["student's packed weights"] = packed_bytes(student)
    if stage == 3 and args.ds3_gather_for_generation:
        sampling["gathered student"] = weights
    if is_spread:
        sampling["gathered layer of the teacher"] = 2 * largest_layer(teacher)
    hidden = window.num_prompts * window.max_new_tokens * hidden_bytes(teacher)
    sampling["hidden states"] = hidden
    gradients //= ranks if stage > 1 else 1
    training = {"hidden states": hidden}
    training |= training_bytes(student, teacher, machine, args, window, gradients, sum(held.values()) + hidden)
    if stage == 3:
        training["gathered layer"] = 2 * largest_layer(student)
    graphs = sampling.get("graphs", 0)
    most_kept = int(machine.memory * (1 - KEPT_RESERVE)) - sum(held.values()) - sum(training.values()) - graphs
    if is_captured and sampling["caches"] <= most_kept:
        training |= {"kept caches": sampling["caches"], "graphs": graphs}
    places = per_place, window.num_places, window.num_prompts
    return MemoryPlan(held, sampling, training, *places, machine.memory, max(most_kept, 0))


def fitted_plan(student: nn.Module, teacher: nn.Module, machine: Machine, args, longest_prompt: int) -> MemoryPlan:
    """The plan of a training with these arguments, whose prompts have up to `longest_prompt` tokens. Where all rows of a step do not fit
    at once, it is that of as many as do, at least one."""
    rows, steps = args.per_device_train_batch_size, args.gradient_accumulation_steps
    places = min(args.rollout_batch_size or rows * steps, rows * steps)
    spread = shards_teacher(args.shard_teacher, teacher, machine)
    window = Window(places, rows * steps, longest_prompt, args.max_new_tokens, rows, steps, likely_draft(args))
    plan = plan_memory(student, teacher, machine, args, window, spread)
    missing = sum(plan.held.values()) + sum(plan.sampling.values()) - plan.free * (1 - RESERVE)
    if plan.free == 0 or missing <= 0 or places == 1:
        return plan
    places = max(1, places - math.ceil(missing / max(plan.per_place, 1)))
    return plan_memory(student, teacher, machine, args, replace(window, num_places=places), spread)


def shards_teacher(wish: bool | None, teacher: nn.Module, machine: Machine) -> bool:
    """Whether the teacher is spread over processes: as wished, and with `None` only where an engine can and the whole one would take
    more than half of a device. The same on all ranks, for it asks what a device has and not what is free."""
    if wish is not None:
        return wish
    return machine.can_spread and whole_bytes(teacher) > machine.memory / 2


def _state_bytes(args) -> int:
    """Bytes of an optimizer's states for each trained number."""
    name = str(getattr(args.optim, "value", args.optim))
    if name.startswith(("sgd", "adafactor", "galore", "lomo")):
        return 0
    return 2 if "8bit" in name else 8


def gib(size: float) -> str:
    return f"{size / GIB:.1f} GiB" if size >= GIB / 10 else f"{size / 2**20:.1f} MiB"
