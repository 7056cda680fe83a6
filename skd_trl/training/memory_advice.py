"""A plan of memory as text, and what would make a training fit: before it starts, and when a device is full."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .machine import Machine
from .memory_plan import GIB, MemoryPlan, gib


OPTIONS = {
    "sampling": "The memory ran out while responses were sampled. Lower rollout_batch_size (responses written at once; their caches are "
    "most of it), max_new_tokens or max_length; lower gradient_accumulation_steps (the teacher's hidden states of a whole step are "
    "kept); with several GPUs set shard_teacher=True, or under ZeRO-3 and FSDP2 ds3_gather_for_generation=False; or load the teacher "
    "quantised (teacher_model_init_kwargs).",
    "training": "The memory ran out in a training step. Lower per_device_train_batch_size (and raise gradient_accumulation_steps as "
    "much), set gradient_checkpointing=True, lower loss_chunk_size or max_length; train an adapter (peft_config); with several GPUs "
    "spread the student (ZeRO-3, FSDP2) or the teacher (shard_teacher=True).",
}


def describe_plan(plan: MemoryPlan, machine: Machine, args) -> str:
    """The plan as a table, and below it what would make it fit, if it does not."""
    text = plan.table()
    if plan.num_places < min(args.rollout_batch_size or plan.num_prompts, plan.num_prompts):
        text += (
            f"\n  At most {plan.num_places} of {plan.num_prompts} responses fit at once: freed places are refilled."
        )
    if not plan.fits:
        text += "\n  That does not fit. What saves most: " + "; ".join(advice(plan, machine, args)[:4]) + "."
    return text


@contextmanager
def out_of_memory_advised(moment: str) -> Iterator[None]:
    """An error of a device without memory left says which options lower what `moment` (`"sampling"` or `"training"`) takes."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise torch.OutOfMemoryError(f"{error}\n{OPTIONS[moment]}") from error


def advice(plan: MemoryPlan, machine: Machine, args) -> list[str]:
    """What would make a plan smaller where it is largest, the most effective first."""
    found: list[tuple[int, str]] = []
    in_sampling = sum(plan.sampling.values()) > sum(plan.training.values())
    if in_sampling and plan.num_places > 1:
        half = plan.num_places // 2
        found.append((plan.per_place * half, f"rollout_batch_size={plan.num_places - half}"))
    if not in_sampling and not args.gradient_checkpointing:
        found.append((plan.training["activations"] * 3 // 4, "gradient_checkpointing=True"))
    if not in_sampling and args.per_device_train_batch_size > 1:
        size = args.per_device_train_batch_size
        half = f"per_device_train_batch_size={size // 2} with twice the gradient_accumulation_steps"
        found.append((plan.training["activations"] * (size - size // 2) // size, half))
    if not in_sampling:
        found.append((plan.training["loss"] // 2, "a smaller loss_chunk_size"))
    if "gathered layer of the teacher" not in plan.sampling:
        spread = plan.held["teacher"] - plan.held["teacher"] // max(machine.num_processes, 2)
        found.append(
            (
                spread,
                "shard_teacher=True"
                if machine.can_spread
                else "a quantised teacher, or several GPUs with shard_teacher=True",
            )
        )
    if copy := plan.held.get("student's copy for sampling"):
        found.append((copy, "sampling_copy=False and merge_adapter=False"))
    if plan.sampling.get("gathered student") and in_sampling:
        found.append((plan.sampling["gathered student"], "ds3_gather_for_generation=False"))
    found.append(
        (
            plan.sampling["hidden states"] // 2,
            "half the gradient_accumulation_steps (hidden states of a step's responses)",
        )
    )
    found.append((plan.held["optimizer"] * 9 // 10, "an adapter (peft_config), or optim='adamw_bnb_8bit'"))
    return [f"{text} (saves about {gib(size)})" for size, text in sorted(found, reverse=True) if size >= GIB / 1024]
