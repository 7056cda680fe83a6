"""Several processes: the same decisions on all ranks, different noise on each, models that are whole when they must be.

The engines are DeepSpeed and FSDP through accelerate. Where a model's parameters are sharded each of its forwards is
collective, and ranks have to run the same number of them in the same order, whatever their texts do. Nothing that steers
a model's forward is drawn from a global generator: ranks consume those at different rates, and a resumed trainer reloads
them too late for the first window.
"""

import hashlib
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace

import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.tensor import DTensor

from ._compat import prepare_deepspeed, prepare_fsdp, unwrap_model_for_generation
from .lm_head import LMHead


def keyed_generator(*key: int | str) -> torch.Generator:
    """A CPU generator that depends on `key` alone: same key, same numbers, on every rank and after every resume."""
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def agree_on_maximum(accelerator: Accelerator) -> Callable[..., tuple[int, ...]]:
    """A function of a few whole numbers that returns their maxima over ranks; collective."""

    def agree(*numbers: int) -> tuple[int, ...]:
        values = torch.tensor([numbers], dtype=torch.long, device=accelerator.device)
        return tuple(accelerator.gather(values).amax(dim=0).tolist())

    return agree


def is_sharded(model: nn.Module) -> bool:
    """Whether the parameters are spread over ranks (ZeRO-3, FSDP2), which makes every forward collective."""
    return any(hasattr(p, "ds_id") or isinstance(p, DTensor) for p in model.parameters())


@contextmanager
def whole_head(head: LMHead):
    """`head` with its tensors whole, whatever shards them."""
    if any(isinstance(p, DTensor) for p in head.parameters()):
        full = {name: getattr(head, name) for name in ("weight", "bias")}
        yield replace(head, **{k: v.full_tensor() if isinstance(v, DTensor) else v for k, v in full.items()})
    elif any(hasattr(p, "ds_id") for p in head.parameters()):
        import deepspeed

        with deepspeed.zero.GatheredParameters(head.parameters()):
            yield head
    else:
        yield head


@contextmanager
def student_for_sampling(model: nn.Module, accelerator: Accelerator, gather: bool):
    """The student inside its wrappers. Under ZeRO-3 with `gather` its parameters are whole on every rank meanwhile, so
    that its forwards are not collective."""
    # TRL's context also switches checkpointing off and on, needlessly here: sampling runs in eval mode. Its hooks come
    # back only if nothing is raised inside.
    if gather and is_sharded(model) and accelerator.distributed_type == "DEEPSPEED":
        with unwrap_model_for_generation(model, accelerator) as unwrapped:
            yield unwrapped
    else:
        yield accelerator.unwrap_model(model)


def prepare_teacher(teacher: nn.Module, accelerator: Accelerator) -> nn.Module:
    """Puts the teacher on the device, sharded where the student is: under ZeRO-3 and FSDP."""
    if accelerator.distributed_type == "DEEPSPEED":
        return prepare_deepspeed(teacher, accelerator)
    if accelerator.distributed_type == "FSDP":
        return prepare_fsdp(teacher, accelerator)
    return accelerator.prepare_model(teacher, evaluation_mode=True)
