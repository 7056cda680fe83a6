"""The loss inside the student's forward, between backbone and head, whatever wraps the model (DDP, DeepSpeed, FSDP, PEFT).

There a sharded head's parameters are whole, and the full logits are never built. The model is changed for the one call only: a
copy that a callback makes of it between two calls is a model by itself. Of all this `torch.compile` is shown the backbone alone:
the loss takes gradients inside the forward, and its functions are new with each step.
Shapes: B rows, S positions of a batch, H hidden.
"""

import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial

import torch
from accelerate import Accelerator
from accelerate.utils import DynamoBackend
from torch import nn
from transformers import PreTrainedModel

from ..loss.lm_head import backbone, head_module
from .router_logits import without_router_logits


LossFunction = Callable[[torch.Tensor], dict[str, torch.Tensor]]


@contextmanager
def loss_in_forward(model: PreTrainedModel, compiled: Callable | None = None) -> Iterator[None]:
    """Inside, `model(..., loss_fn=fn)` runs the backbone alone and returns `fn(last_hidden_state)`. The loss is computed in the
    forward that the wrappers see, and in it replaces the forward of the head: there the head's parameters are whole,
    and ZeRO-3 and FSDP find in its input and output what they prepare for the backward, tied weights included.

    `model` is a transformers model (under PEFT its base model); `fn` gets (B, S, H) and returns a dict of tensors. What has been
    put around the model's own forward, such as accelerate's autocast, is skipped: enter it outside. `compiled` takes the
    backbone's place (see [`CompiledBackbone`]); nothing else that is called inside is then compiled, the wrappers included.
    """
    forward = partial(_backbone_and_loss, compiled=compiled)
    eagerly = nullcontext() if compiled is None else torch.compiler.set_stance("force_eager")
    with _forward_of(model, types.MethodType(forward, model)), without_router_logits(model), eagerly:
        yield


class CompiledBackbone:
    """The student's backbone as `torch_compile` wants it, wrapped once for each student: `model_init` and a search bring others."""

    def __init__(self, accelerator: Accelerator):
        plugin = accelerator.state.dynamo_plugin
        self.is_wanted = plugin.backend != DynamoBackend.NO
        self.options = plugin.to_kwargs()
        self._backbone: nn.Module | None = None
        self._compiled: Callable

    def of(self, model: PreTrainedModel) -> Callable | None:
        """The compiled backbone of `model`; `None` without that option."""
        if not self.is_wanted:
            return None
        if self._backbone is not (own := backbone(model)):
            self._backbone, self._compiled = own, torch.compile(own, **self.options)
        return self._compiled


def _backbone_and_loss(
    self: PreTrainedModel, *args, loss_fn: LossFunction, compiled: Callable | None = None, **kwargs
) -> dict[str, torch.Tensor]:
    if compiled is None:
        hidden = backbone(self)(*args, **kwargs, use_cache=False)[0]
    else:
        with torch.compiler.set_stance("default"):
            hidden = compiled(*args, **kwargs, use_cache=False)[0]
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
