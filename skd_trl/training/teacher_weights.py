"""How the weights of a teacher that is given by name come from its files to where they are used.

A whole teacher is read straight to its device, whatever the engine does to the student. One that will be spread over processes is at
first a stand-in on the meta device, enough for checks and sizes; `load_in_shards` reads it when the engine is known. No process then
holds more than its share and one tensor, but the main process, which reads the files. Adapters and quantised weights are read whole.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.utils.import_utils import is_peft_available
from transformers.utils.peft_utils import find_adapter_config_file

from .._compat import deepspeed_configuration
from .distributed import is_stand_in, split_by_layers
from .engine_settings import teacher_settings
from .machine import Machine, free_bytes
from .memory_plan import shards_teacher


if TYPE_CHECKING:
    from ..skd_config import SKDConfig


# Of what says how to load a model, what its configuration is read with too.
OF_CONFIG = ("trust_remote_code", "revision", "subfolder", "cache_dir", "token", "local_files_only", "code_revision")


def load_teacher(name: str, args: "SKDConfig") -> PreTrainedModel:
    """The teacher `name`, whole and on the device where it will run; or, if it will be spread, a stand-in for it.

    Raises:
        `ValueError`: also for a model that is no causal language model.
    """
    machine, kwargs = machine_of(args), loading_options(args)
    try:
        with deepspeed_configuration(None), _environment(FSDP_CPU_RAM_EFFICIENT_LOADING="false"):
            stand_in = _stand_in(name, kwargs) if machine.engine in ("DEEPSPEED", "FSDP") else None
            if stand_in is not None and shards_teacher(args.shard_teacher, stand_in, machine):
                return stand_in
            device = torch.device(args.teacher_device or machine.device)
            is_read_on_host = stand_in is None and args.shard_teacher  # the engine spreads it from there
            if device.type != "cpu" and not is_read_on_host:
                kwargs.setdefault("device_map", {"": str(device)})
            return AutoModelForCausalLM.from_pretrained(name, **kwargs)
    except ValueError as error:
        # For another kind of model transformers' message lists all that it would load.
        kind = re.search(r"Unrecognized configuration class <class '[\w.]*?(\w+)Config'>", str(error))
        if kind is None:
            raise
        raise ValueError(
            f"The teacher {name!r} is a {kind[1]}, which transformers does not load as a causal language model. Only text is read here: "
            "use a decoder-only language model."
        ) from error


def load_in_shards(stand_in: PreTrainedModel, args: "SKDConfig", accelerator: Accelerator) -> PreTrainedModel:
    """The teacher that `stand_in` is for, spread over the processes of `accelerator`; collective.

    Under FSDP2 it is read by the main process alone, and sent to the others tensor by tensor; the modules are split before there are
    weights.
    """
    assert is_stand_in(stand_in)
    name, kwargs = stand_in.name_or_path, loading_options(args)
    if accelerator.distributed_type != "FSDP":
        hidden_size = stand_in.config.get_text_config().hidden_size
        settings = teacher_settings(accelerator.state.deepspeed_plugin.deepspeed_config, hidden_size, shard=True)
        with deepspeed_configuration(settings):  # transformers then splits each tensor as it is made
            return AutoModelForCausalLM.from_pretrained(name, **kwargs)
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
    from torch.distributed.fsdp import CPUOffloadPolicy

    # What transformers calls efficient: but for the first process of each machine, weights are on the meta device.
    with _environment(ACCELERATE_USE_FSDP="true", FSDP_CPU_RAM_EFFICIENT_LOADING="true"):
        model = AutoModelForCausalLM.from_pretrained(name, **kwargs)
    weights = model.state_dict() if accelerator.is_main_process else {}
    buffers = dict(model.named_buffers())
    model = model.to("meta")
    model.tie_weights()
    split_by_layers(model, accelerator)
    is_offloaded = isinstance(accelerator.state.fsdp_plugin.cpu_offload, CPUOffloadPolicy)
    model.to_empty(device="cpu" if is_offloaded else accelerator.device)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, cpu_offload=is_offloaded)
    set_model_state_dict(model, weights, options=options)
    for key, buffer in model.named_buffers():  # those that no file holds
        if accelerator.is_main_process:
            whole = buffers[key].to(accelerator.device)
        else:
            whole = torch.empty_like(buffer, device=accelerator.device)
        dist.broadcast(whole, src=0)
        buffer.copy_(whole)
    return model


def check_teacher_device(args: "SKDConfig") -> None:
    """
    Raises:
        `ValueError`: for a `teacher_device` that this machine lacks, or that does not go with the engine.
    """
    if args.teacher_device is None:
        return
    machine, device = machine_of(args), torch.device(args.teacher_device)
    given = f"teacher_device={args.teacher_device!r}"
    if machine.engine in ("DEEPSPEED", "FSDP"):
        raise ValueError(
            f"{given}: under {machine.engine} the engine decides where weights are. Leave it out; shard_teacher spreads the "
            "teacher over all GPUs, and offload_param (DeepSpeed) or fsdp_offload_params keep it on the host."
        )
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"{given}: this process sees {torch.cuda.device_count()} GPU(s), counted from 0.")
    if device.type != "cpu" and machine.num_processes > 1:
        raise ValueError(
            f"{given}: each of {machine.num_processes} processes would put a teacher there. Leave it out, which puts each beside its "
            "student, use 'cpu', or train in one process."
        )
    if (given_map := loading_options(args).get("device_map")) is not None:
        raise ValueError(f"{given}, and teacher_model_init_kwargs has device_map={given_map!r}. Drop one of them.")


def machine_of(args: "SKDConfig") -> Machine:
    """What the arguments say of the machine before there is an accelerator."""
    device = args.device  # the first look at it starts the processes' group
    state = args.distributed_state
    engine = "NO" if state is None else str(getattr(state.distributed_type, "value", state.distributed_type))
    if args.deepspeed_plugin is not None:
        engine = "DEEPSPEED"
    elif args.fsdp or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("true", "1"):
        engine = "FSDP"
    return Machine(device, free_bytes(device), engine, args.world_size)


def loading_options(args: "SKDConfig") -> dict[str, Any]:
    """The arguments of `from_pretrained` for the teacher."""
    given: Any = args.teacher_model_init_kwargs
    kwargs = dict(given or {})
    kwargs.setdefault("trust_remote_code", args.trust_remote_code)
    if isinstance(kwargs.get("dtype"), str) and kwargs["dtype"] != "auto":
        kwargs["dtype"] = getattr(torch, kwargs["dtype"])
    return kwargs


def _stand_in(name: str, kwargs: dict[str, Any]) -> PreTrainedModel | None:
    """The model without its weights: configuration, modules and sizes. `None` for one that cannot be read in shards: that has an
    adapter, quantised weights or a placement of the user's."""
    if kwargs.get("quantization_config") is not None or kwargs.get("device_map") is not None:
        return None
    if is_peft_available() and find_adapter_config_file(name, revision=kwargs.get("revision")) is not None:
        return None
    own = {key: kwargs[key] for key in OF_CONFIG if key in kwargs}
    config = AutoConfig.from_pretrained(name, **own)
    if getattr(config, "quantization_config", None) is not None:
        return None
    making = {key: kwargs[key] for key in ("attn_implementation", "trust_remote_code") if key in kwargs}
    dtype = kwargs.get("dtype", "auto")
    making["dtype"] = config.dtype or torch.float32 if dtype == "auto" else dtype
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, **making)
    with suppress(OSError):  # it has none
        model.generation_config = GenerationConfig.from_pretrained(name, **own)
    model.is_stand_in = True
    return model.eval()


@contextmanager
def _environment(**variables: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
