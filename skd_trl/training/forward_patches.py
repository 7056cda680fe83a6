"""What trainers leave on the models they were given: `model.forward` replaced by theirs. Taken off before the next trainer.

accelerate puts autocast around it and marks the model as prepared: the next trainer, whatever its precision, would then run it
in the last one's. TRL puts a function there that holds the model's own forward: a copy of the model then computes with the
original's weights. What others put there (kernels, hooks of a `device_map`) stays.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import nn

from .distributed import is_sharded


def take_off_patches(model: nn.Module) -> None:
    """Gives `model`, and under PEFT its base model, the forward back that it had before any trainer. Sharded models are left to
    their engine."""
    if is_sharded(model):
        return
    modules = [model, model.get_base_model()] if hasattr(model, "get_base_model") else [model]  # type: ignore[operator]
    for module in modules:
        forward = module.__dict__.pop("forward", None)
        forward = module.__dict__.pop("_original_forward", forward)
        module.__dict__.pop("_is_accelerate_prepared", None)
        function = getattr(forward, "__func__", forward)
        # TRL's patch (or an earlier version's of this package) holds the forward before it in its closure.
        while inspect.isfunction(function) and "original_forward" in function.__code__.co_freevars:
            forward = inspect.getclosurevars(function).nonlocals["original_forward"]
            function = getattr(forward, "__func__", forward)
        # The class's forward, and what its decorators wrap: accelerate unwraps down to that (`keep_fp32_wrapper=False`).
        own: list[Callable] = [type(module).forward]
        while hasattr(own[-1], "__wrapped__"):
            own.append(own[-1].__wrapped__)  # type: ignore[attr-defined]
        if function is not None and function not in own:
            module.forward = function.__get__(module) if inspect.isfunction(function) else forward


@contextmanager
def forward_kept(model: nn.Module) -> Iterator[None]:
    """Afterwards the forward of `model` is what it was: SFTTrainer puts its own loss there, which is not used here."""
    own = model.__dict__.get("forward")
    try:
        yield
    finally:
        model.__dict__.pop("forward", None)
        if own is not None:
            model.forward = own


@contextmanager
def adapters_on_heads_pass(model: nn.Module) -> Iterator[None]:
    """Inside, `get_output_embeddings()` of a transformers model shows what is under an adapter on its head. SFTTrainer refuses
    such an adapter, as its own loss would pass it over; the loss here calls the head."""
    original: Callable = model.get_output_embeddings  # type: ignore[assignment]

    def get_output_embeddings() -> nn.Module:
        head = original()
        return getattr(head, "base_layer", head)

    model.get_output_embeddings = get_output_embeddings
    try:
        yield
    finally:
        del model.get_output_embeddings
