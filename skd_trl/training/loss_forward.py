"""The loss inside the student's forward, between backbone and head, whatever wraps the model (DDP, DeepSpeed, FSDP, PEFT).

There a sharded head's parameters are whole, and the full logits are never built. The model is changed for the one call only: a
copy that a callback makes of it between two calls is a model by itself.
Shapes: B rows, S positions of a batch, H hidden.
"""

import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn
from transformers import PreTrainedModel

from ..loss.lm_head import backbone, head_module
from .router_logits import without_router_logits


LossFunction = Callable[[torch.Tensor], dict[str, torch.Tensor]]


@contextmanager
def loss_in_forward(model: PreTrainedModel) -> Iterator[None]:
    """Inside, `model(..., loss_fn=fn)` runs the backbone alone and returns `fn(last_hidden_state)`. The loss is computed in the
    forward that the wrappers see, and in it takes the place of the head's own forward: there the head's parameters are whole,
    and ZeRO-3 and FSDP find in its input and output what they prepare for the backward, tied weights included.

    `model` is a transformers model (under PEFT its base model); `fn` gets (B, S, H) and returns a dict of tensors. What has been
    put around the model's own forward, such as accelerate's autocast, is passed over: enter it outside.
    """
    with _forward_of(model, types.MethodType(_backbone_and_loss, model)), without_router_logits(model):
        yield


def _backbone_and_loss(self: PreTrainedModel, *args, loss_fn: LossFunction, **kwargs) -> dict[str, torch.Tensor]:
    hidden = backbone(self)(*args, **kwargs, use_cache=False)[0]
    # Under an adapter that trains a copy of the head, FSDP's hooks are on the wrapper and ZeRO-3's on the copy.
    copy_of_head, wrapper = head_module(self), self.get_output_embeddings()
    call = partial(_in_place_of_forward, copy_of_head, loss_fn)
    return call(hidden) if wrapper is copy_of_head else _in_place_of_forward(wrapper, call, hidden)


def _in_place_of_forward(module: nn.Module, fn: LossFunction, hidden: torch.Tensor) -> dict[str, torch.Tensor]:
    """`fn(hidden)` between the hooks of `module`; inside, `module` is itself again."""
    own = module.__dict__.get("forward")  # what others have put on the instance, such as accelerate

    def forward(hidden: torch.Tensor) -> dict[str, torch.Tensor]:
        _put_back(module, own)
        return fn(hidden)

    with _forward_of(module, forward):
        return module(hidden)


@contextmanager
def _forward_of(module: nn.Module, forward: Callable) -> Iterator[None]:
    own = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        _put_back(module, own)


def _put_back(module: nn.Module, own: Callable | None) -> None:
    module.__dict__.pop("forward", None)
    if own is not None:
        module.forward = own
