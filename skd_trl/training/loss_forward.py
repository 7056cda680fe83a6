"""The loss inside the student's forward, between backbone and head, whatever wraps the model (DDP, DeepSpeed, FSDP, PEFT).

There a sharded head's parameters are whole, and the full logits are never built.
Shapes: B rows, S positions of a batch, H hidden.
"""

import types
from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from transformers import PreTrainedModel

from ..loss.lm_head import backbone, head_module


def add_loss_forward(model: PreTrainedModel) -> None:
    """Lets `model(..., loss_fn=fn)` run the backbone alone and return `fn(last_hidden_state)`; without `loss_fn` nothing
    changes. The loss is computed inside the forward that the wrappers see, and in it takes the place of the head's own
    forward: there the head's parameters are whole, and ZeRO-3 and FSDP find in its input and output what they prepare
    for the backward, tied weights included.

    `model` is a transformers model (under PEFT its base model); `fn` gets (B, S, H) and returns a dict of tensors.
    """
    original_forward = model.forward

    def forward(self, *args, loss_fn: Callable[[torch.Tensor], dict[str, torch.Tensor]] | None = None, **kwargs):
        if loss_fn is None:
            return original_forward(*args, **kwargs)
        hidden = backbone(self)(*args, **kwargs, use_cache=False)[0]
        # Under an adapter that trains a copy of the head, FSDP's hooks are on the wrapper and ZeRO-3's on the copy.
        copy_of_head, wrapper = head_module(self), self.get_output_embeddings()
        call = partial(_in_place_of_forward, copy_of_head, loss_fn)
        return call(hidden) if wrapper is copy_of_head else _in_place_of_forward(wrapper, call, hidden)

    # `generate` and the Trainer read the signature.
    forward.__signature__ = original_forward.__signature__ if hasattr(original_forward, "__signature__") else None
    forward.__wrapped__ = original_forward
    if forward.__signature__ is None:
        del forward.__signature__
    model.forward = types.MethodType(forward, model)


def _in_place_of_forward(
    module: nn.Module, fn: Callable[[torch.Tensor], dict[str, torch.Tensor]], hidden: torch.Tensor
):
    """`fn(hidden)` between the hooks of `module`; inside, `module` is itself again."""
    own = module.__dict__.get("forward")  # what others have put on the instance, such as accelerate

    def restore() -> None:
        module.__dict__.pop("forward", None)
        if own is not None:
            module.forward = own

    def forward(hidden: torch.Tensor) -> dict[str, torch.Tensor]:
        restore()
        return fn(hidden)

    module.forward = forward
    try:
        return module(hidden)
    finally:
        restore()
