"""Last hidden states of a model that is not trained, whatever wraps it, without its full logits: the teacher's in the loss.

Shapes: B rows, S positions of a batch, H hidden.
"""

import torch
from torch import nn
from transformers import PreTrainedModel

from ..loss.lm_head import backbone
from .router_logits import without_router_logits


@torch.no_grad()
def last_hidden_states(model: nn.Module, unwrapped: PreTrainedModel, **inputs: torch.Tensor) -> torch.Tensor:
    """The hidden states (B, S, H) that go into the head of `model`, called as it is wrapped; `unwrapped` is what is inside.
    Nothing about the model is changed, and the head sees no position. It runs eagerly under `torch_compile` too: what dynamo has
    compiled does not ask whose hook it was."""
    caught = []
    hook = backbone(unwrapped).register_forward_hook(lambda module, args, output: caught.append(output[0]))
    try:
        with without_router_logits(unwrapped), torch.compiler.set_stance("force_eager"):
            model(**inputs, use_cache=False, logits_to_keep=inputs["input_ids"].new_empty(0))
    finally:
        hook.remove()
    return caught[0]
