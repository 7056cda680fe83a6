"""What a training of real pairs holds on each GPU, planned for GPUs of several sizes: whether it fits, and how many responses at once.

    python benchmarks/gpu_memory.py
    python benchmarks/gpu_memory.py --pairs 8B:0.6B --detail 80    # with the parts of each plan

It is the plan that `skd check` and a training print (`skd_trl/training/memory_plan.py`), for machines that are not there: models are
built on the meta device from the sizes below, so this needs neither a GPU nor a download. On one GPU and with LoRA the student is
trained under bf16 autocast; under ZeRO-3 DeepSpeed keeps bf16 weights and fp32 copies of what is trained.
"""

import argparse
from collections.abc import Iterator

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from skd_trl import SKDConfig
from skd_trl.training.machine import Machine
from skd_trl.training.memory_plan import GIB, MemoryPlan, fitted_plan


# The published configurations: hidden and intermediate size, layers, heads, key heads, tied embeddings.
SIZES = {
    "0.6B": (1024, 3072, 28, 16, 8, True),
    "1.7B": (2048, 6144, 28, 16, 8, True),
    "4B": (2560, 9728, 36, 32, 8, True),
    "8B": (4096, 12288, 36, 32, 8, False),
    "32B": (5120, 25600, 64, 64, 8, False),
}
PAIRS = ("8B:0.6B", "8B:1.7B", "32B:4B")
MEMORIES = (24, 48, 80)
MODES = {"one GPU": 1, "ZeRO-3, 2 GPUs": 2, "ZeRO-3, 4 GPUs": 4, "ZeRO-3, 8 GPUs": 8}


def main(options: argparse.Namespace) -> None:
    print(
        f"Prompts of {options.prompt_tokens} tokens, responses of up to {options.new_tokens}, {options.prompts} prompts a step on all GPUs "
        f"together, micro-batches of {options.rows}, gradient checkpointing, AdamW."
    )
    for pair in options.pairs:
        print(f"\nTeacher Qwen3-{pair.split(':')[0]}, student Qwen3-{pair.split(':')[1]}\n")
        print(f"| GPUs | student | {' | '.join(f'{size} GB' for size in MEMORIES)} |\n|{'---|' * (2 + len(MEMORIES))}")
        for line, plans in lines(pair, options, list(MODES), ["full", "LoRA"]):
            print(line)
            for plan in plans if options.detail else ():
                if round(plan.free / GIB) == options.detail:
                    print(f"```\n{plan.table()}\n```")


def lines(pair: str, options, modes: list[str], kinds: list[str]) -> Iterator[tuple[str, list[MemoryPlan]]]:
    """A line of the table for each mode and kind of student, with its plans."""
    teacher_name, student_name = pair.split(":")
    teacher = build(teacher_name, torch.bfloat16)
    students = {
        kind: adapted(student_name) if kind == "LoRA" else build(student_name, torch.float32) for kind in kinds
    }
    for mode in modes:
        for kind, student in students.items():
            plans = [planned(student, teacher, MODES[mode], size * GIB, options) for size in MEMORIES]
            yield f"| {mode} | {kind} | {' | '.join(map(cell, plans))} |", plans


def planned(student: nn.Module, teacher: nn.Module, num_gpus: int, memory: int, options) -> MemoryPlan:
    machine = Machine(
        torch.device("cpu"),  # where the fake tensors are: there may be no GPU
        memory,
        "DEEPSPEED" if num_gpus > 1 else "NO",
        num_gpus,
        stage=3 if num_gpus > 1 else 0,
        mixed_precision="bf16",
        is_gpu=True,
    )
    args = SKDConfig(
        "unused",
        use_cpu=True,
        bf16=False,
        merge_adapter=False,  # a merged copy takes two bytes more for each weight of the student
        per_device_train_batch_size=options.rows,
        gradient_accumulation_steps=max(options.prompts // (options.rows * num_gpus), 1),
        max_new_tokens=options.new_tokens,
        max_length=options.prompt_tokens + options.new_tokens,
    )
    return fitted_plan(student, teacher, machine, args, options.prompt_tokens)


def cell(plan: MemoryPlan) -> str:
    """GiB at most, and how many responses are written at once."""
    size = f"{plan.peak / GIB:.1f}"
    if not plan.fits:
        return f"no ({size})"
    return f"{size}, {plan.num_places} at once" if plan.num_places < plan.num_prompts else f"{size}, all at once"


def build(name: str, dtype: torch.dtype):
    hidden, intermediate, layers, heads, key_heads, tied = SIZES[name]
    config = AutoConfig.for_model(
        "qwen3", vocab_size=151936, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=key_heads, head_dim=128, tie_word_embeddings=tied,
    )  # fmt: skip
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def adapted(name: str) -> nn.Module:
    """A frozen student in bf16 with an adapter of rank 16 on all linear layers, in fp32 as peft makes it."""
    with torch.device("meta"):
        return get_peft_model(build(name, torch.bfloat16), LoraConfig(r=16, target_modules="all-linear"))


def settings() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--pairs", nargs="+", default=list(PAIRS), help="teacher:student")
    parser.add_argument("--prompt_tokens", type=int, default=512)
    parser.add_argument("--new_tokens", type=int, default=1024)
    parser.add_argument("--prompts", type=int, default=64, help="of an optimizer step, on all GPUs together")
    parser.add_argument("--rows", type=int, default=4, help="of a micro-batch")
    parser.add_argument("--detail", type=int, help="the parts of the plans for GPUs of so many GB")
    return parser


if __name__ == "__main__":
    main(settings().parse_args())
