"""What a training runs on, as far as memory is concerned: how many devices of which size, and what is spread over them.

It is taken from an accelerator, or made up, for a plan of GPUs that are not there.
"""

from contextlib import nullcontext
from dataclasses import dataclass

import psutil
import torch
from accelerate import Accelerator

from ..sampling.packed_weights import host_bytes


# What accelerate's names of a precision compute in.
_COMPUTE_TYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp8": torch.bfloat16}


@dataclass(frozen=True)
class Machine:
    """
    Attributes:
        device (`torch.device`):
            Where tensors are, or what stands in for it while they are counted.
        memory (`int`):
            Bytes that a device has for a training; 0 if that is not known.
        engine (`str`):
            `"DEEPSPEED"`, `"FSDP"`, or another of accelerate's names where nothing is spread.
        num_processes (`int`):
            How many devices.
        stage (`int`):
            What is spread over them: 0 nothing, 1 the optimizer, 2 gradients too, 3 weights too.
        mixed_precision (`str`):
            accelerate's name.
        is_gpu (`bool`):
            Whether rounds are captured, and chunks of the loss follow the memory.
    """

    device: torch.device
    memory: int
    engine: str = "NO"
    num_processes: int = 1
    stage: int = 0
    mixed_precision: str = "no"
    is_gpu: bool = False

    @classmethod
    def of(cls, accelerator: Accelerator) -> "Machine":
        device, engine = (
            accelerator.device,
            str(getattr(accelerator.distributed_type, "value", accelerator.distributed_type)),
        )
        stage = 3 if engine == "FSDP" else 0
        if engine == "DEEPSPEED":
            stage = accelerator.state.deepspeed_plugin.zero_stage
        return cls(
            device, free_bytes(device), engine, accelerator.num_processes, stage, accelerator.mixed_precision,
            device.type == "cuda",
        )  # fmt: skip

    @property
    def can_spread(self) -> bool:
        """Whether an engine can spread a teacher."""
        return self.engine in ("DEEPSPEED", "FSDP") and self.num_processes > 1

    def autocast(self):
        """The precision that models run in."""
        dtype = compute_type(self.mixed_precision)
        return nullcontext() if dtype is None else torch.autocast(self.device.type, dtype=dtype)


def compute_type(mixed_precision: str) -> torch.dtype | None:
    """What a precision of accelerate's computes in; `None` for that of the weights."""
    return _COMPUTE_TYPES.get(mixed_precision)


def free_bytes(device: torch.device, now: bool = False) -> int:
    """What `device` has for a training: all of it, or with `now` what is free; of a CPU's memory each process has its share."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + unused if now else total
    if device.type == "cpu":
        return psutil.virtual_memory().available if now else host_bytes()
    return 0
