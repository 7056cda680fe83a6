"""LoRA layers as plain ones, for a copy of the student that samples: the weight that a layer acts as, without the layer.

W + the sum of scale x B A over the active adapters (LoRA, Hu et al., 2021); under DoRA (Liu et al., 2024) scaled by magnitude over
norm. peft's own `merge` is used, on a stand-in of the layer whose base weight is a copy in fp32: the student is never changed. What
peft merges otherwise than it runs is left as it is, by name.
"""

import copy
from typing import Any

import torch
from torch import nn


def plain_layers(student: nn.Module) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """The adapter's layers that are a plain layer with another weight, by name, and of all others why not."""
    if not hasattr(student, "peft_config"):
        return {}, {}
    from peft.tuners.tuners_utils import BaseTunerLayer

    plain, others = {}, {}
    for name, module in student.named_modules():
        if isinstance(module, BaseTunerLayer):
            reason = _reason_against(module)
            if reason is None:
                plain[name] = module
            else:
                others[name] = reason
    return plain, others


def plain_layer(layer: Any, dtype: torch.dtype | None) -> nn.Module:
    """The base layer of `layer` with memory for the weight that it acts as, and for its bias, in `dtype` or by default its own. What is
    in it is for `write_weight` to say."""
    base = layer.get_base_layer()
    tensors = {name: p for name, p in base.named_parameters(recurse=False)}
    return _with(
        base,
        {
            name: nn.Parameter(torch.empty_like(p, dtype=dtype or p.dtype), requires_grad=False)
            for name, p in tensors.items()
        },
    )


@torch.no_grad()
def write_weight(layer: Any, plain: nn.Module) -> None:
    """Writes the weight that `layer` acts as at this moment into `plain`, in place, rounded once."""
    base = layer.get_base_layer()
    copies = {name: p.detach().to(torch.float32, copy=True) for name, p in base.named_parameters(recurse=False)}
    exact = _with(base, {name: nn.Parameter(p, requires_grad=False) for name, p in copies.items()})
    if not layer.disable_adapters and not layer.merged:
        stand_in = copy.copy(layer)
        modules = {**layer._modules, "base_layer": exact}
        vars(stand_in).update(_modules=modules, merged_adapters=[], _caches={})
        stand_in.merge(adapter_names=list(layer.active_adapters))
        exact = stand_in.get_base_layer()
    for name, own in plain.named_parameters():
        own.copy_(getattr(exact, name))


def _reason_against(layer: Any) -> str | None:
    from peft.tuners import lora
    from transformers.pytorch_utils import Conv1D

    if type(layer) not in (lora.Linear, lora.Embedding):
        return f"a {type(layer).__module__.split('.')[-2]}.{type(layer).__name__}"
    base = layer.get_base_layer()
    if type(base) not in (nn.Linear, nn.Embedding, Conv1D):
        return f"around a {type(base).__name__}"
    active = [name for name in layer.active_adapters if name in {**layer.lora_A, **layer.lora_embedding_A}]
    kinds = [type(layer.lora_variant[name]).__name__ for name in active if name in getattr(layer, "lora_variant", {})]
    unknown = [kind for kind in kinds if not kind.startswith("Dora")]
    if unknown:
        return f"a {unknown[0]}"
    if kinds and len(active) > 1:  # peft applies one magnitude after the other, where the forward adds
        return "several adapters with DoRA among them"
    return None


def _with(module: nn.Module, parameters: dict[str, nn.Parameter]) -> Any:
    """A module that differs from `module` in these parameters alone."""
    other = copy.copy(module)
    vars(other)["_parameters"] = {**module._parameters, **parameters}
    return other
