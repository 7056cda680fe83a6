"""Memory per GPU of the paper's pairs in each mode: weights, gradients, optimizer, teacher and caches.

    python benchmarks/gpu_memory.py --num_gpus 8

The models are built on the meta device from the sizes below, so this needs neither a GPU nor a download. ZeRO-2 and 3 are
DeepSpeed's own estimators; the rest is counted: 16 bytes for a trained parameter in fp32 (weight, gradient, two Adam states),
2 for a frozen one in bf16. Activations of the training step are not counted: gradient checkpointing governs them.
"""

import argparse

import torch
from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM


GIB = 2**30
# The published configurations of google/gemma-7b, google/gemma-2b, Qwen/Qwen2-7B and Qwen/Qwen2-0.5B.
SIZES = {
    "Gemma-7B": {
        "model_type": "gemma", "vocab_size": 256000, "hidden_size": 3072, "intermediate_size": 24576, "num_hidden_layers": 28,
        "num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": 256, "tie_word_embeddings": True,
    },
    "Gemma-2B": {
        "model_type": "gemma", "vocab_size": 256000, "hidden_size": 2048, "intermediate_size": 16384, "num_hidden_layers": 18,
        "num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 256, "tie_word_embeddings": True,
    },
    "Qwen2-7B": {
        "model_type": "qwen2", "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
        "num_attention_heads": 28, "num_key_value_heads": 4, "tie_word_embeddings": False,
    },
    "Qwen2-0.5B": {
        "model_type": "qwen2", "vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
        "num_attention_heads": 14, "num_key_value_heads": 2, "tie_word_embeddings": True,
    },
}  # fmt: skip
PAIRS = (("Gemma-7B", "Gemma-2B"), ("Qwen2-7B", "Qwen2-0.5B"))
COLUMNS = ("student's states", "with LoRA", "gathered to sample", "teacher", "caches", "sum", "sum with LoRA")


def main(options: argparse.Namespace) -> None:
    for teacher_name, student_name in PAIRS:
        teacher, student = build(teacher_name), build(student_name)
        adapted = get_peft_model(build(student_name), LoraConfig(r=options.lora_rank, target_modules="all-linear"))
        trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
        print(
            f"\nTeacher {teacher_name} ({num_parameters(teacher) / 1e9:.2f} billion parameters), student {student_name} "
            f"({num_parameters(student) / 1e9:.2f} billion; LoRA of rank {options.lora_rank}: {trained / 1e6:.1f} million)\n"
        )
        print(f"| mode | {' | '.join(COLUMNS)} |\n|{'---|' * (len(COLUMNS) + 1)}")
        caches = sum(cache_bytes(model, options.rows, options.tokens) for model in (teacher, student))
        for mode, parts in modes(student, teacher, trained, options.num_gpus).items():
            full, lora, gathered, held_teacher = parts
            rest = gathered + held_teacher + caches
            cells = (full, lora, gathered, held_teacher, caches, full + rest, lora + rest)
            print(f"| {mode} | {' | '.join(f'{cell / GIB:.1f}' for cell in cells)} |")


def modes(student, teacher, trained: int, num_gpus: int) -> dict[str, tuple[float, float, float, float]]:
    """Bytes of the student's states, of the same with LoRA, of what sampling gathers, and of the teacher, by mode."""
    s, t = num_parameters(student), num_parameters(teacher)
    zero2, zero3 = zero2_bytes(s, num_gpus), zero3_bytes(student, num_gpus)
    teacher3 = 2 * t / num_gpus + 2 * largest_unit(teacher)
    frozen, adapter = 2 * s, 16 * trained
    whole_in_turn = 2 * largest_unit(student)
    shards = 2 * s / num_gpus + whole_in_turn
    return {
        "ddp": (16 * s, frozen + adapter, 0, 2 * t),
        "zero1": (4 * s + 16 * s / num_gpus, frozen + 4 * trained + adapter / num_gpus, 0, 2 * t),
        "zero2": (zero2, frozen + zero2_bytes(trained, num_gpus), 0, 2 * t),
        "zero2, shard_teacher": (zero2, frozen + zero2_bytes(trained, num_gpus), 0, teacher3),
        "zero3": (zero3, shards + adapter / num_gpus, 2 * s, teacher3),
        "zero3, student left sharded": (zero3, shards + adapter / num_gpus, 0, teacher3),
        "fsdp2": (
            16 * s / num_gpus + 2 * root_unit(student),
            2 * s / num_gpus + 2 * root_unit(student) + adapter / num_gpus,
            2 * s,
            2 * t / num_gpus + 2 * root_unit(teacher),
        ),
    }


def zero2_bytes(num_trained: int, num_gpus: int) -> float:
    return estimate_zero2_model_states_mem_needs(
        num_trained, num_gpus, 1, cpu_offload=False, additional_buffer_factor=1.0
    )[1]


def zero3_bytes(model, num_gpus: int) -> float:
    return estimate_zero3_model_states_mem_needs(
        num_parameters(model), largest_unit(model), num_gpus, 1, cpu_offload=False, cpu_offload_params=False,
        zero_init=True, additional_buffer_factor=1.0,
    )[1]  # fmt: skip


def build(name: str):
    sizes = dict(SIZES[name])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(sizes.pop("model_type"), **sizes))
    model.tie_weights()
    return model


def num_parameters(model) -> int:
    return sum(p.numel() for p in model.parameters())


def largest_unit(model) -> int:
    """Parameters that are whole at once: the largest single module's own, as DeepSpeed's estimator counts."""
    return max(sum(p.numel() for p in module.parameters(recurse=False)) for module in model.modules())


def root_unit(model) -> int:
    """Parameters in no layer, embeddings and head: FSDP2's root keeps them whole during a forward."""
    in_layers = sum(p.numel() for p in model.model.layers.parameters())
    return num_parameters(model) - in_layers


def cache_bytes(model, rows: int, tokens: int) -> float:
    """Keys and values in bf16 while sampling."""
    config = model.config
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * 2 * config.num_hidden_layers * config.num_key_value_heads * head * rows * tokens


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--num_gpus", type=int, default=8)
    parser.add_argument("--rows", type=int, default=8, help="responses written at once on each GPU")
    parser.add_argument("--tokens", type=int, default=1024, help="tokens of a prompt and its response")
    parser.add_argument("--lora_rank", type=int, default=16)
    main(parser.parse_args())
