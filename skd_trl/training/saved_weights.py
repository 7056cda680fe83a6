"""What is saved of the student is whole, whatever the engine writes by its configuration, and is read back and counted.

The Trainer leaves the weights out of what a user saves under FSDP's SHARDED_STATE_DICT and under ZeRO-3 without
`stage3_gather_16bit_weights_on_model_save`: there are shards at best. Its checkpoints, from which a run is resumed, stay as the
engine is configured to write them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel


logger = get_logger(__name__)


@contextmanager
def whole_weights(accelerator: Accelerator, engine: nn.Module) -> Iterator[None]:
    """Inside, the Trainer's `save_model` gathers the weights of the student in `engine`."""
    fsdp = getattr(accelerator.state, "fsdp_plugin", None)
    zero = getattr(getattr(engine, "_config", None), "zero_config", None)
    if fsdp is not None:
        from torch.distributed.fsdp import StateDictType

        holder, name, value = fsdp, "state_dict_type", StateDictType.FULL_STATE_DICT
    elif zero is not None:
        holder, name, value = zero, "gather_16bit_weights_on_model_save", True
    else:
        yield
        return
    before = getattr(holder, name)
    setattr(holder, name, value)
    try:
        yield
    finally:
        setattr(holder, name, before)


@contextmanager
def whole_parameters(model: nn.Module) -> Iterator[None]:
    """Inside, parameters that ZeRO-3 shards are whole on every rank; collective."""
    if any(hasattr(p, "ds_id") for p in model.parameters()):
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(model.parameters())):
            yield
    else:
        yield


def writes_shards(accelerator: Accelerator) -> bool:
    """Whether the engine's checkpoints are configured to hold shards in place of whole weights."""
    fsdp = getattr(accelerator.state, "fsdp_plugin", None)
    if fsdp is not None:
        return "FULL_STATE_DICT" not in str(fsdp.state_dict_type)
    deepspeed = getattr(accelerator.state, "deepspeed_plugin", None)
    if deepspeed is None or deepspeed.zero_stage != 3:
        return False
    return not deepspeed.deepspeed_config["zero_optimization"].get("stage3_gather_16bit_weights_on_model_save", False)


def describe_shards(accelerator: Accelerator) -> str | None:
    """What to say at the start about checkpoints that hold shards; `None` where they hold whole weights."""
    if not writes_shards(accelerator):
        return None
    if getattr(accelerator.state, "fsdp_plugin", None) is not None:
        way, setting = "`accelerate merge-weights`", "fsdp_state_dict_type: SHARDED_STATE_DICT"
    else:
        way, setting = "the zero_to_fp32.py beside them", "zero3_save_16bit_model: false"
    return (
        f"{setting}: checkpoints hold shards, from which a run can be resumed, and no whole weights of a fully trained student; "
        f"{way} merges them. save_model() writes whole weights."
    )


def check_saved(student: nn.Module, directory: str) -> None:
    """Reads back what has just been written of the student: all that was trained has to be in it.

    Raises:
        `RuntimeError`: if there are fewer numbers in the files than were trained.
    """
    trained = {id(p): getattr(p, "ds_numel", p.numel()) for p in student.parameters() if p.requires_grad}
    num_trained, saved = sum(trained.values()), []
    # A model's own files, or those of adapters, which may be in folders of their names.
    for file in [*Path(directory).glob("*.safetensors"), *Path(directory).glob("*/adapter_model.safetensors")]:
        with safe_open(file, "pt") as tensors:
            saved += [prod(tensors.get_slice(name).get_shape()) for name in tensors.keys()]
    if sum(saved) < num_trained:
        raise RuntimeError(
            f"{num_trained:,} numbers of the student were trained, and the weights in {directory} are {len(saved)} tensors of "
            f"{sum(saved):,} numbers: what was trained is not all there. The student is still in memory: look at the engine's "
            "configuration (accelerator.state), and save accelerator.get_state_dict(trainer.model_wrapped)."
        )
    logger.debug(
        f"{directory}: {len(saved)} tensors of {sum(saved):,} numbers, with all {num_trained:,} that were trained."
    )


def load_renamed(student: PreTrainedModel, directory: str | Path) -> None:
    """Loads what transformers saves under other names than its modules have, such as experts one by one: the Trainer looks for the modules'
    names alone, and leaves what it does not find as it was. Nothing is done where all names are the modules'."""
    saved = set()
    for file in Path(directory).glob("model*.safetensors"):
        with safe_open(file, "pt") as tensors:
            saved |= set(tensors.keys())
    if saved <= set(student.state_dict()):
        return
    loaded = type(student).from_pretrained(directory, config=student.config, dtype=torch.float32)
    renamed = {name: tensor for name, tensor in loaded.state_dict().items() if name not in saved}
    student.load_state_dict(
        renamed, strict=False
    )  # what has its name in the file, the Trainer has loaded as it is there
