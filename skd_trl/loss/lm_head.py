"""A language model's head, apart from the model: logits can then be made of its last hidden states in chunks.

logits = softcap(scale * (hidden W^T + bias)), in fp32 from the scale on. Most heads are a plain `nn.Linear`, tied or
not, and are applied to their tensors, never through the module's `__call__`: hooks of ZeRO-3 or FSDP belong to whoever
gathers the weights around the loss (see `LMHead.parameters`). A head under LoRA, or any other module, is called.

What an architecture does to its logits is read from its config. A convention this file does not know would be silently
wrong, hence `LMHead.verify`, which compares with the model's own logits once.

Shapes: N positions, H hidden, V vocabulary.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel


# Gemma's, recurrent_gemma's, xlstm's.
_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
# `logits_scaling` divides in granite's family (and minicpm3's, before a head without bias), but multiplies here.
_MULTIPLIES_BY_LOGITS_SCALING = ("hyperclovax", "hyperclovax_vision_v2")


@dataclass(frozen=True)
class LMHead:
    """
    The head of a causal language model.

    Attributes:
        weight (`Tensor` `(V, H)` or `None`):
            The projection; `None` if only `module` knows how to apply itself.
        bias (`Tensor` `(V,)` or `None`):
            Its bias.
        scale (`float`):
            Multiplies the raw logits (cohere's `logit_scale`, the inverse of granite's `logits_scaling`, ...).
        softcap (`float` or `None`):
            `softcap * tanh(logits / softcap)`, after the scale (gemma's `final_logit_softcapping`).
        module (`nn.Module` or `None`):
            The head to call where it is more than a weight and a bias, e.g. under LoRA.
        vocab_size (`int` or `None`):
            The first logits of `module` that are kept; `None` keeps all.

    To use other tensors in the place of the model's (a DTensor made full), `dataclasses.replace(head, weight=...)`:
    the loss is differentiated with respect to what the head holds.
    """

    weight: Tensor | None
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    module: nn.Module | None = None
    vocab_size: int | None = None

    @classmethod
    def of(cls, model: PreTrainedModel) -> "LMHead":
        """
        The head of `model` (a transformers or peft model, unwrapped), as it is now: make it again for each step,
        because FSDP swaps parameters and adapters are switched on and off.

        Raises:
            `ValueError`: `model` has no output embeddings.
        """
        module = head_module(model)
        if module is None:
            name = type(model).__name__
            raise ValueError(f"{name} has no output embeddings, that is no head. Pass a causal language model.")
        config = model.config.get_text_config()
        scale = getattr(config, "logit_scale", None) or 1.0
        scale *= getattr(config, "lm_head_multiplier", None) or 1.0
        scaling = getattr(config, "logits_scaling", None) or 1.0
        multiplies = config.model_type in _MULTIPLIES_BY_LOGITS_SCALING
        scale = scale * scaling if multiplies else scale / scaling
        softcap = next(filter(None, (getattr(config, name, None) for name in _SOFTCAPS)), None)
        # Subclasses with another forward (quantized, adapters) are more than weight and bias. FSDP's subclass,
        # made on the fly, keeps nn.Linear's forward.
        if isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward:
            return cls(weight=module.weight, bias=module.bias, scale=scale, softcap=softcap)
        return cls(weight=None, module=module, scale=scale, softcap=softcap)

    def parameters(self) -> list[Tensor]:
        """All tensors the head is made of: what has to be whole (gathered from its shards) around the loss."""
        if self.module is not None:
            return list(self.module.parameters())
        return [tensor for tensor in (self.weight, self.bias) if tensor is not None]

    def trainable_parameters(self) -> list[Tensor]:
        """Those of `parameters()` that want a gradient: none where the head is frozen, as under LoRA."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def prepared(self, vocab_size: int | None = None) -> "LMHead":
        """This head cut to its first `vocab_size` rows and, under autocast, cast once for all chunks."""
        if self.module is not None:
            return replace(self, vocab_size=vocab_size)
        assert self.weight is not None  # a head is either its module or its tensors
        dtype, device_type = self.weight.dtype, self.weight.device.type
        if torch.is_autocast_enabled(device_type):
            dtype = torch.get_autocast_dtype(device_type)
        bias = None if self.bias is None else self.bias[:vocab_size].to(dtype)
        # A weight that is not cut stays the same tensor: on a CPU it may have a packed copy.
        weight = self.weight if vocab_size in (None, len(self.weight)) else self.weight[:vocab_size]
        return LMHead(weight.to(dtype), bias, self.scale, self.softcap)

    def project(self, hidden: Tensor) -> Tensor:
        """Raw logits `(N, V)` of `hidden` `(N, H)`, in the model's type, before scale and soft-capping."""
        if self.module is not None:
            return self.module(hidden)[..., : self.vocab_size]
        assert self.weight is not None
        return F.linear(hidden.to(self.weight.dtype), self.weight, self.bias)

    def shape_logits(self, raw: Tensor) -> Tensor:
        """The model's logits `(N, V)`, fp32 at least, from raw ones."""
        logits = raw.to(torch.promote_types(raw.dtype, torch.float32))
        if self.scale != 1:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits

    def logits(self, hidden: Tensor, vocab_size: int | None = None) -> Tensor:
        """The model's logits `(N, vocab_size)`, fp32 at least, from its last hidden states `(N, H)`."""
        return self.shape_logits(self.prepared(vocab_size).project(hidden))

    @torch.no_grad()
    def verify(self, model: PreTrainedModel) -> bool:
        """
        Whether this head makes `model`'s own logits of what `backbone(model)` returns, and whether that is what the
        model's head is given; tried on two tokens, in the precision that is on. To be called before a model is sharded. `False`
        means that the model does something between its backbone and its logits that is not known here: use its full logits instead.
        """
        hidden: list[Tensor] = []
        hooks = [
            backbone(model).register_forward_hook(lambda module, args, output: hidden.append(output[0])),
            model.get_output_embeddings().register_forward_pre_hook(lambda module, args: hidden.append(args[0])),
        ]
        was_training = model.training
        try:
            input_ids = torch.tensor([[1, 2]], device=model.device)
            expected = model.eval()(input_ids=input_ids, use_cache=False).logits
        finally:
            model.train(was_training)
            for hook in hooks:
                hook.remove()
        if len(hidden) != 2 or not torch.equal(hidden[0], hidden[1]):
            return False
        logits, expected, dtypes = self.logits(hidden[0]), expected.float(), (model.dtype, expected.dtype)
        if torch.is_autocast_enabled(expected.device.type):
            dtypes += (torch.get_autocast_dtype(expected.device.type),)
        # Same product, maybe in another order: a few roundings of the type it is computed in, relative to the largest.
        rounding = max(torch.finfo(dtype).eps for dtype in (*dtypes, torch.float32)) * 16
        return logits.shape == expected.shape and bool(
            (logits - expected).abs().max() <= rounding * expected.abs().max()
        )


def backbone(model: PreTrainedModel) -> nn.Module:
    """The part of `model` (a transformers or peft model, unwrapped) whose first output is what the head takes."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return base.get_decoder()


def head_module(model: PreTrainedModel) -> nn.Module | None:
    """The module that makes `model`'s logits, as it is now: of an adapter's copies the one that is on."""
    module = model.get_output_embeddings()
    # peft's ModulesToSaveWrapper holds the frozen original and a trained copy per adapter; which one counts depends on
    # whether adapters are on.
    if not hasattr(module, "modules_to_save"):
        return module
    active = [name for name in module.active_adapters if name in module.modules_to_save]
    if module.disable_adapters or not active:
        return module.original_module
    return module.modules_to_save[active[0]]
