"""Engines' configurations as people bring them: what cannot train a pair is refused by name, before training.

`check_parallel_models` looks at models and the ways to load them, before an engine exists; `check_settings` at what the launcher
has set up. `teacher_settings` is the part of DeepSpeed's configuration that concerns a model which never trains.
"""

import copy
import re
from typing import Any

from accelerate import Accelerator
from datasets import Dataset
from torch import nn
from transformers import TrainingArguments


PARALLEL_LOADING = ("tp_plan", "tp_size", "ep_plan", "ep_size", "device_mesh", "distributed_config")
OF_ONE_COPY = (
    "ranks of such a group share the tokens of one row, while sampling, the heads and the loss here take whole rows and whole logits on "
    "each rank"
)
INSTEAD = (
    "To spread models over GPUs use DeepSpeed ZeRO-3 or FSDP2, HSDP included (examples/accelerate); for long rows lower max_length "
    "and loss_chunk_size."
)
# What a teacher's engine takes over of DeepSpeed's configuration: types and the placement of weights.
OF_ANY_MODEL = ("bf16", "fp16", "torch_autocast", "communication_data_type", "aio", "zero_optimization")
# Of its ZeRO block, what only an engine with an optimizer can have (ZeRO++ and MiCS), or what would round the teacher's weights.
OF_TRAINING = re.compile("offload_optimizer|zero_hpz_|zero_quantized_|mics_|zenflow")


def check_parallel_models(args: TrainingArguments, models: dict[str, Any]) -> None:
    """Refuses a student or teacher (by name; a model, or where to load it from) whose layers are split over ranks.

    Raises:
        `ValueError`: with what splits them.
    """
    loading = {"model_init_kwargs": "model", "teacher_model_init_kwargs": "teacher_model"}
    for field, name in loading.items():
        kwargs: Any = getattr(args, field, None) or {}
        found = next(
            (key for key in PARALLEL_LOADING if isinstance(kwargs, dict) and kwargs.get(key) is not None), None
        )
        if found is not None:
            raise ValueError(
                f"{field}[{found!r}]={kwargs[found]!r} would split the layers of {name} over ranks (tensor parallelism), which is not "
                f"supported: {OF_ONE_COPY}. Leave it out. {INSTEAD}"
            )
    for name, model in models.items():
        size = getattr(model, "_tp_size", None) or 1
        if isinstance(model, nn.Module) and size > 1:
            raise ValueError(
                f"{name} was loaded with tensor parallelism over {size} ranks (tp_plan), which is not supported: {OF_ONE_COPY}. Load it "
                f"without tp_plan. {INSTEAD}"
            )


def check_processes(args: TrainingArguments) -> None:
    """Refuses one process for several GPUs, where the Trainer would put the student into `nn.DataParallel`.

    Raises:
        `ValueError`: with how to use them.
    """
    if args.n_gpu > 1:
        raise ValueError(
            f"One process sees {args.n_gpu} GPUs, and the Trainer would spread the rows of a batch over them with nn.DataParallel, whose "
            "copies of the student would not compute this loss. Start one process for each GPU with `accelerate launch` or `torchrun`, "
            "or show this one a single GPU (CUDA_VISIBLE_DEVICES=0); teacher_device puts the teacher on another."
        )


def check_settings(args: TrainingArguments, accelerator: Accelerator, student: nn.Module, teacher: nn.Module) -> None:
    """Refuses what an engine would end with an unclear error after the models are placed, or what it would not save.

    Raises:
        `ValueError`: for tensor, context and sequence parallelism, DeepSpeed's numbers that differ from the arguments', quantised
            weights that FSDP2 would have to split, FSDP's activation checkpointing beside an adapter, a best model that FSDP could not load, and
            batches that some processes have and others have not.
    """
    if accelerator.num_processes > 1 and not accelerator.even_batches and not args.dataloader_drop_last:
        raise ValueError(
            "even_batches=False gives some processes a batch less than others, which then wait for them in the count of a step's tokens. Leave it "
            "True, or set dataloader_drop_last=True."
        )
    plugin = accelerator.state.deepspeed_plugin if accelerator.distributed_type == "DEEPSPEED" else None
    # The sizes of the groups that share a row, by the names under which they were configured.
    parallelism, names = getattr(accelerator, "parallelism_config", None), ("tp_size", "cp_size", "sp_size")
    sizes = {f"parallelism_config's {name}": getattr(parallelism, name, None) for name in names}
    if plugin is not None:
        config = plugin.deepspeed_config
        sizes["DeepSpeed's autotp_size"] = (config.get("tensor_parallel") or {}).get("autotp_size")
        sizes["DeepSpeed's sequence_parallel_size"] = config.get("sequence_parallel_size")
    for name, size in sizes.items():
        if (size or 1) > 1:
            raise ValueError(f"{name}={size} is not supported: {OF_ONE_COPY}. Set it to 1. {INSTEAD}")
    if plugin is not None:
        # Noted by transformers when the trainer is made, and raised by it at the start of training, where the teacher's engine is up.
        # A line of it: `- ds gradient_accumulation_steps=1 vs hf gradient_accumulation_steps=2`.
        lines = getattr(plugin.hf_ds_config, "mismatches", [])
        pairs = [line.removeprefix("- ds ").partition(" vs hf ") for line in lines]
        if pairs:
            found = "; ".join(f"{deepspeed} there, {arguments} here" for deepspeed, _, arguments in pairs)
            raise ValueError(
                f"DeepSpeed's configuration and the training arguments disagree: {found}. Set these values of DeepSpeed's to "
                '"auto" (or leave them out of deepspeed_config in the accelerate config), or change the arguments.'
            )
    elif accelerator.distributed_type == "FSDP":
        _check_fsdp(args, accelerator, student, teacher)


def check_capturing(args: TrainingArguments, accelerator: Accelerator) -> None:
    """For `capture_sampling=True`.

    Raises:
        `ValueError`: where there is no CUDA.
    """
    kind = accelerator.device.type
    if getattr(args, "capture_sampling", None) and getattr(args, "samples", True) and kind != "cuda":
        raise ValueError(
            f"capture_sampling=True needs models on CUDA, and these are on {kind}. Leave capture_sampling None, and rounds are captured where "
            "they can be."
        )


def check_batches(dataset: Any, args: TrainingArguments, accelerator: Accelerator) -> None:
    """Refuses a training set that `dataloader_drop_last` leaves nothing of.

    Raises:
        `ValueError`: with both numbers.
    """
    needed = args.per_device_train_batch_size * (1 if accelerator.split_batches else accelerator.num_processes)
    if args.dataloader_drop_last and isinstance(dataset, Dataset) and len(dataset) < needed:
        raise ValueError(
            f"dataloader_drop_last=True leaves no batch: the training set has {len(dataset)} usable rows, and a batch of all processes {needed}. "
            "Leave it False, or lower per_device_train_batch_size."
        )


def teacher_settings(config: dict, hidden_size: int, shard: bool) -> dict:
    """DeepSpeed's configuration for the teacher's engine: `config`, the student's, without all that belongs to training. The ZeRO
    stage is 3 with `shard`, and 0 else."""
    settings = {name: copy.deepcopy(config[name]) for name in OF_ANY_MODEL if name in config}
    zero = {key: value for key, value in settings["zero_optimization"].items() if not OF_TRAINING.match(key)}
    zero["stage"] = 3 if shard else 0
    if not shard:
        zero.pop("offload_param", None)
    # What transformers takes for "auto". DeepSpeed's own defaults keep tensors of up to 100,000 numbers on every rank.
    for name, value in (
        ("stage3_param_persistence_threshold", 10 * hidden_size),
        ("stage3_prefetch_bucket_size", int(0.9 * hidden_size * hidden_size)),
    ):
        if shard and zero.get(name, "auto") == "auto":
            zero[name] = value
    zero = {key: value for key, value in zero.items() if value != "auto"}
    return {**settings, "zero_optimization": zero, "train_micro_batch_size_per_gpu": 1}  # a number that it asks for


def describe_offloading(args: TrainingArguments, accelerator: Accelerator) -> str | None:
    """What to say at the start about an optimizer that accelerate puts DeepSpeedCPUAdam in place of; `None` if it is the one asked for."""
    if accelerator.distributed_type != "DEEPSPEED":
        return None
    config = accelerator.state.deepspeed_plugin.deepspeed_config
    device = (config["zero_optimization"].get("offload_optimizer") or {}).get("device", "none")
    is_kept = "optimizer" in config or not config.get("zero_force_ds_cpu_optimizer", True)
    optim = str(getattr(args.optim, "value", args.optim))
    if device in (None, "none") or is_kept or optim.startswith("adamw_torch") or "adagrad" in optim or "lion" in optim:
        return None
    return (
        f"optim={optim!r} is not what trains: with the optimizer offloaded to {device} accelerate puts DeepSpeedCPUAdam in its place. "
        "Set zero_force_ds_cpu_optimizer: false in the DeepSpeed file to keep it, or do not offload."
    )


def is_quantized(model: nn.Module) -> bool:
    """Whether weights are stored as whole numbers, or by a quantiser of transformers."""
    return bool(getattr(model, "is_quantized", False)) or any(not p.is_floating_point() for p in model.parameters())


def _check_fsdp(args: TrainingArguments, accelerator: Accelerator, student: nn.Module, teacher: nn.Module) -> None:
    plugin = accelerator.state.fsdp_plugin
    if any(not p.is_floating_point() for p in student.parameters()):
        raise ValueError(
            "The student has quantised weights, whole numbers that FSDP2 cannot split. Train it with DDP, or DeepSpeed ZeRO "
            "(examples/accelerate/zero3.yaml), or load it unquantised."
        )
    if getattr(args, "shard_teacher", None) and is_quantized(teacher):
        raise ValueError(
            "shard_teacher=True, and FSDP2 cannot split the teacher's quantised weights. Use DeepSpeed, which can "
            "(examples/accelerate/zero2.yaml, zero3.yaml), or leave shard_teacher out: the teacher is then whole on each GPU."
        )
    if plugin.activation_checkpointing and any("lora_" in name for name, _ in student.named_parameters()):
        raise ValueError(
            "fsdp_activation_checkpointing: true renames the modules that the adapter is in, and the adapter would be saved without any "
            "tensor. Set it to false in the accelerate config and gradient_checkpointing=True in the training arguments, which "
            "saves the same memory."
        )
    if args.load_best_model_at_end and "SHARDED_STATE_DICT" in str(plugin.state_dict_type):
        raise ValueError(
            "load_best_model_at_end=True with fsdp_state_dict_type: SHARDED_STATE_DICT would end with weights that are not those of "
            "the best checkpoint, or hang. Set fsdp_state_dict_type: FULL_STATE_DICT, or load the best checkpoint yourself after "
            "training (trainer.state.best_model_checkpoint)."
        )
