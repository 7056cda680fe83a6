"""Several processes: the same decisions on all ranks, different noise on each, models that are whole when they must be.

The engines are DeepSpeed and FSDP through accelerate. Where a model's parameters are sharded each of its forwards is
collective, and ranks have to run the same number of them in the same order, whatever their texts do. Nothing that steers
a model's forward is drawn from a global generator: ranks consume those at different rates, and a resumed trainer reloads
them too late for the first window.
"""

import hashlib
import os
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from .._compat import add_hooks, remove_hooks
from ..loss.lm_head import LMHead
from ..sampling.ragged_cache import has_shards
from .engine_settings import is_quantized, teacher_settings


def keyed_generator(*key: int | str) -> torch.Generator:
    """A CPU generator that depends on `key` alone: same key, same numbers, on every rank and after every resume."""
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def agree_on_maximum(accelerator: Accelerator) -> Callable[..., tuple[int, ...]]:
    """A function of a few whole numbers that returns their maxima over ranks; collective."""

    def agree(*numbers: int) -> tuple[int, ...]:
        values = torch.tensor([numbers], dtype=torch.long, device=accelerator.device)
        return tuple(_gathered(values, accelerator).amax(dim=0).tolist())

    return agree


def _gathered(values: torch.Tensor, accelerator: Accelerator) -> torch.Tensor:
    return cast(torch.Tensor, accelerator.gather(values))


def is_sharded(model: nn.Module) -> bool:
    """Whether the parameters are spread over ranks (ZeRO-3, FSDP2), which makes every forward collective; or will be when they are
    loaded."""
    return is_stand_in(model) or has_shards(model)


def is_stand_in(model: nn.Module) -> bool:
    """Whether the model has no weights yet: it will be loaded in shards (`teacher_weights.py`)."""
    return getattr(model, "is_stand_in", False)


@contextmanager
def whole_head(head: LMHead, trained: bool = False):
    """`head` with its tensors whole, whatever shards them. Gradients do not find their way back from there: a head that is
    `trained` has to be whole already, inside its own forward (`loss_forward.loss_in_forward`).

    Raises:
        `RuntimeError`: if such a head is not.
    """
    if trained and any(isinstance(p, DTensor) or _is_zero3_shard(p) for p in head.trainable_parameters()):
        raise RuntimeError(
            "The student's head is not whole inside its own forward, so it would silently not be trained: what shards the "
            "model does not hook into the module that get_output_embeddings() returns. Report this with the model, the "
            "adapter's configuration and the accelerate configuration."
        )
    if any(isinstance(p, DTensor) for p in head.parameters()):
        tensors = {"weight": head.weight, "bias": head.bias}
        whole = {name: t.full_tensor().detach() for name, t in tensors.items() if isinstance(t, DTensor)}
        yield replace(head, **whole)
    elif shards := [p for p in head.parameters() if _is_zero3_shard(p)]:
        import deepspeed

        with deepspeed.zero.GatheredParameters(shards):
            yield head
    else:
        yield head


def _is_zero3_shard(parameter: Any) -> bool:
    # Not those that are whole now: inside the owner's forward, or persistent, and DeepSpeed keeps track of them.
    return hasattr(parameter, "ds_id") and parameter.ds_status.name != "AVAILABLE"


@contextmanager
def student_for_sampling(model: nn.Module, accelerator: Accelerator, gather: bool):
    """The student inside its wrappers. With `gather`, parameters that ZeRO-3 or FSDP2 shard are whole on every rank
    inside, which costs memory and saves a gathering per layer and token."""
    unwrapped: Any = accelerator.unwrap_model(model)
    if not gather or not is_sharded(model):
        yield unwrapped
    elif _is_fsdp2(unwrapped):
        units = [module for module in unwrapped.modules() if _is_fsdp2(module)]
        unwrapped.set_reshard_after_forward(False)
        try:
            for unit in units:
                unit.unshard()
            yield unwrapped
        finally:
            for unit in units:
                unit.reshard()
            # Layers are resharded after each forward as configured; the root, which the backward needs first, is not.
            unwrapped.set_reshard_after_forward(bool(accelerator.state.fsdp_plugin.reshard_after_forward))
            unwrapped.set_reshard_after_forward(False, recurse=False)
    else:
        # As TRL's `unwrap_model_for_generation`, which does not put the hooks back when something is raised inside, and
        # turns checkpointing off and on, needlessly here: sampling runs in eval mode.
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(model.parameters())):
            remove_hooks(model)  # else the first forward gives the parameters back
            put_back = _without_first_hook(model)
            try:
                yield unwrapped
            finally:
                put_back()
                add_hooks(model)


def _without_first_hook(engine: nn.Module) -> Callable[[], None]:
    """Takes off the hook that TRL's `remove_hooks` leaves, in which ranks compare what they have recorded at each of the first forwards: a
    rank that writes no row has no forward. Returns what puts it back."""
    offload: Any = getattr(getattr(engine, "optimizer", None), "parameter_offload", None)
    handle = getattr(offload, "fwd_pre_hook", None)
    hook = None if handle is None else offload.module._forward_pre_hooks.pop(handle.id, None)

    def put_back() -> None:
        if hook is not None:
            offload.fwd_pre_hook = offload.module.register_forward_pre_hook(hook, prepend=True)

    return put_back


@contextmanager
def forwards_forgotten(*models: nn.Module):
    """FSDP2 records each forward, without gradients too, and gathers what came before the first one of a step in its backward: on ranks that
    wrote different numbers of tokens that would be different weights. What was recorded inside is forgotten at the end."""
    try:
        yield
    finally:
        for module in (module for model in models for module in model.modules() if _is_fsdp2(module)):
            state: Any = module._get_fsdp_state()  # type: ignore[operator]
            for group in getattr(state, "_fsdp_param_groups", None) or filter(None, [state._fsdp_param_group]):
                group._post_forward_indices.clear()
                getattr(group.comm_ctx, "post_forward_order", []).clear()  # there from the first forward on


def _is_fsdp2(module: nn.Module) -> bool:
    return hasattr(module, "set_reshard_after_forward")


def prepare_teacher(teacher: PreTrainedModel, accelerator: Accelerator, shard: bool = False) -> nn.Module:
    """Puts the teacher on the device, in eval mode and without an optimizer: whole on every rank, or with `shard` spread over them
    (under DeepSpeed in a ZeRO-3 engine, under FSDP2 by layers, but for a quantised teacher, which FSDP2 cannot split). One that was
    loaded in shards stays so.
    See [`check_engine`] for what cannot be."""
    shard = shard or is_sharded(teacher)
    if accelerator.distributed_type == "DEEPSPEED":
        # As TRL's `prepare_deepspeed`, but for the stage: there a teacher beside a student under ZeRO-1 or 2 is always whole.
        import deepspeed

        hidden_size = teacher.config.get_text_config().hidden_size
        config = teacher_settings(accelerator.state.deepspeed_plugin.deepspeed_config, hidden_size, shard)
        prepared, *_ = deepspeed.initialize(model=teacher, config=config)
    elif accelerator.distributed_type == "FSDP" and shard and not is_quantized(teacher):
        prepared = teacher if is_sharded(teacher) else split_by_layers(teacher, accelerator)
    elif accelerator.distributed_type == "FSDP":  # as its accelerator would split it
        prepared = teacher.to(accelerator.device)
    else:  # the caller's own object, in whatever mode it came: it is put in eval mode for each use
        return accelerator.prepare_model(teacher, evaluation_mode=True)
    prepared.eval()  # DeepSpeed's returns nothing
    return prepared


def put_on_device(teacher: PreTrainedModel, device: torch.device, accelerator: Accelerator) -> nn.Module:
    """A whole teacher on a device that is not the accelerator's. (Quantised weights that are there already cannot be moved.)"""
    if next(teacher.parameters()).device != device:
        teacher = teacher.to(device)  # type: ignore[arg-type]
    return accelerator.prepare_model(teacher, device_placement=False, evaluation_mode=True)


def forwards_are_collective(*models: nn.Module) -> bool:
    """Whether a forward of one of the models gathers weights: they are spread over ranks, and not whole for the time being."""
    return any(isinstance(p, DTensor) or _is_zero3_shard(p) for model in models for p in model.parameters())


def check_connected(accelerator: Accelerator) -> None:
    """Refuses processes that a launcher started together and that do not know of each other: each would train a model by itself.

    Raises:
        `ValueError`: if there are fewer processes in the engine than the launcher says.
    """
    launched = int(os.environ.get("WORLD_SIZE", "1")) if "LOCAL_RANK" in os.environ else 1
    if launched > accelerator.num_processes:
        raise ValueError(
            f"The launcher started {launched} processes, and this one is in a group of {accelerator.num_processes}: each would "
            "train a model by itself and overwrite what the others save. Without a GPU set use_cpu=True in the arguments; else "
            "launch with `accelerate launch` or `torchrun`, one process per GPU."
        )


def check_engine(accelerator: Accelerator, shard_teacher: bool, compile_student: bool) -> None:
    """Refuses what cannot train, before training.

    Raises:
        `ValueError`: for FSDP1, `shard_teacher` where nothing can act on it, `compile_student` where the student is sharded.
    """
    kind = accelerator.distributed_type
    if kind == "FSDP" and accelerator.state.fsdp_plugin.fsdp_version == 1:
        raise ValueError(
            "FSDP version 1 cannot sample: its flat parameters are whole only inside the root's forward. Set "
            "fsdp_version: 2 in the accelerate config (examples/accelerate/fsdp2.yaml)."
        )
    if shard_teacher and kind not in ("DEEPSPEED", "FSDP"):
        raise ValueError(
            f"shard_teacher=True, but {accelerator.num_processes} process(es) of kind {getattr(kind, 'value', kind)} have "
            "no engine that shards. Launch with DeepSpeed or FSDP2 (examples/accelerate/zero2.yaml, zero3.yaml, "
            "fsdp2.yaml), or leave shard_teacher False."
        )
    if compile_student and shards_the_student(accelerator):
        raise ValueError(
            "compile_student=True cannot take a student that ZeRO-3 or FSDP2 shards: its parameters come and go. Train it "
            "under DDP, ZeRO-1 or ZeRO-2 (with shard_teacher=True for a large teacher), or leave it False."
        )


def split_by_layers(teacher: PreTrainedModel, accelerator: Accelerator) -> nn.Module:
    """Shards each layer by FSDP2, so a forward holds one of them at a time, and the rest (embeddings, head) as the root."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    plugin, mesh = accelerator.state.fsdp_plugin, getattr(accelerator, "torch_device_mesh", None)
    settings = {
        "mesh": None if mesh is None else mesh[tuple(accelerator.parallelism_config.fsdp_dim_names)],
        "mp_policy": plugin.mixed_precision_policy or MixedPrecisionPolicy(),
        "offload_policy": plugin.cpu_offload,
        "reshard_after_forward": True,  # there is no backward that would need them
    }
    layers = set(getattr(teacher, "_no_split_modules", None) or ())
    for module in reversed(list(teacher.modules())):  # children before parents
        if type(module).__name__ in layers:
            fully_shard(module, **settings)
    fully_shard(teacher, **settings)
    return teacher


def name_layers_to_shard(student: nn.Module) -> None:
    """Leaves out of the layers that FSDP2 shards those that the student does not have: Qwen3.5's text model names blocks of a vision
    tower, and accelerate refuses what it does not find (transformers 5.24)."""
    present = {type(module).__name__ for module in student.modules()}
    names = list(getattr(student, "_no_split_modules", None) or ())
    if not present.issuperset(names):
        student._no_split_modules = [name for name in names if name in present]


def shards_the_student(accelerator: Accelerator) -> bool:
    """Whether the student's parameters will be spread over ranks: known before anything is."""
    kind = accelerator.distributed_type
    return kind == "FSDP" or (kind == "DEEPSPEED" and accelerator.state.deepspeed_plugin.zero_stage == 3)


def check_head(head: LMHead, name: str, accelerator: Accelerator) -> None:
    """Refuses a trained head that is more than a weight and a bias where its parts are gathered one by one.

    Raises:
        `ValueError`: for a head under LoRA, under ZeRO-3 or FSDP.
    """
    if shards_the_student(accelerator) and head.module is not None:
        kind = type(head.module).__name__
        option = "trainable_token_indices" if kind == "TrainableTokensWrapper" else "target_modules"
        raise ValueError(
            f"The {name}'s head is a {kind}, whose parts ZeRO-3 and FSDP gather and release one by "
            f"one, while the loss needs it whole for a pass over all positions. Leave the head out of the adapter's "
            f"{option} (modules_to_save is fine), or train with DDP, ZeRO-1 or ZeRO-2."
        )


def check_tying(student: nn.Module, accelerator: Accelerator) -> None:
    """Refuses tied embeddings of which an adapter saves one side, under FSDP, which splits no weight that two modules share.

    Raises:
        `ValueError`: with the way out.
    """
    ends = (student.get_input_embeddings(), student.get_output_embeddings())  # type: ignore[operator]
    before = [getattr(getattr(end, "original_module", end), "weight", None) for end in ends]
    is_saved = [hasattr(end, "modules_to_save") for end in ends]
    if accelerator.distributed_type == "FSDP" and before[0] is before[1] is not None and is_saved[0] != is_saved[1]:
        name = ("embed_tokens", "lm_head")[is_saved[1]]
        raise ValueError(
            f"modules_to_save={name!r} gives one side of the student's tied embeddings another weight, and FSDP2 cannot split the one that "
            "both sides still share. Set ensure_weight_tying=True in the LoraConfig, or train with DDP or ZeRO."
        )


def bound_waits(seconds: int) -> None:
    """Limits to `seconds` how long ranks wait for each other. The Trainer passes `ddp_timeout` on for GPUs only; on CPU a rank
    that hangs would hold the others for half an hour."""
    if dist.is_available() and dist.is_initialized() and dist.get_backend() == "gloo":
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds))


def gather_rows(values: torch.Tensor, accelerator: Accelerator) -> tuple[torch.Tensor, slice]:
    """`values` (N, ...) of all ranks, one after the other, though N differs, and where this rank's own are; collective."""
    if accelerator.num_processes == 1:
        return values, slice(0, len(values))
    sizes = _gathered(torch.tensor([len(values)], device=values.device), accelerator).tolist()
    padded = values.new_zeros((max(sizes), *values.shape[1:]))
    padded[: len(values)] = values
    parts = _gathered(padded, accelerator).split(max(sizes))
    start = sum(sizes[: accelerator.process_index])
    together = torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])
    return together, slice(start, start + len(values))
