"""Which models can be sampled from: decided by running them, not by their names.

The model runs a few tokens on the sampler's cache (`trial`). What its head is given has to be what it is given without a cache. Windows
are shortened for it: their ends are then within these few tokens. What differs is refused with the figure. Names remain only where
so few tokens cannot show the trouble (`positions_of`).
"""

import math
from contextlib import contextmanager
from dataclasses import replace
from weakref import WeakKeyDictionary

import torch
from torch import nn

from .mixers import STATEFUL_KINDS, is_stateful, mixers_of
from .ragged_cache import CHUNKED, FULL, INDEXED, SLIDING, WITHOUT_ATTENTION, eval_mode, has_shards
from .trial import Proof, run_trial


WAY_OUT = (
    "Train on given texts with rollout='dataset', which needs no sampling, or use a decoder-only model with full or sliding-window "
    "attention."
)
# Of each model object, what its proof gave.
_PROVEN: "WeakKeyDictionary[nn.Module, Proof]" = WeakKeyDictionary()


@torch.no_grad()
def prove(model: nn.Module) -> Proof:
    """Runs `model` (of transformers, or a `PeftModel` around one) on a few tokens, once for each object. Where its forward is
    collective, every rank runs the same forwards.

    Raises:
        `ValueError`: if it cannot be sampled from, with the figure or the reason.
    """
    check_kind(model)
    base = (
        model.get_base_model() if hasattr(model, "get_base_model") else model
    )  # which an adapter may be put around later
    if base not in _PROVEN:
        name = _name(model)
        try:
            with eval_mode(model), _short_windows(model):
                proof = _prove_states(model) if is_stateful(model) else run_trial(model)
        except (torch.OutOfMemoryError, KeyboardInterrupt):
            raise
        except Exception as error:  # whatever a forward may raise on a cache that it was not written for
            reason = f"{type(error).__name__}: {error}".strip().splitlines()[0][:300]
            raise ValueError(
                f"{name} does not run on the sampler's cache ({reason}). {_hint(model)}{WAY_OUT}"
            ) from error
        if not math.isfinite(proof.error):
            raise ValueError(f"{name} has hidden states that are not finite: check its weights for NaN and infinity.")
        if proof.error > proof.limit:
            raise ValueError(
                f"{name} gives other hidden states on the sampler's cache than without a cache: they differ by {proof.error:.1e} of the "
                f"largest, and rounding explains {proof.limit:.1e}. Its responses would not be its own. {_hint(model)}{WAY_OUT}"
            )
        _PROVEN[base] = proof
    if is_stateful(base) and has_shards(base) and any(mixer.rows_apart for mixer in mixers_of(base)):
        raise ValueError(
            f"{_name(model)} reads single tokens row by row, and its weights are spread over processes: each would gather them once a row, and "
            "they have different numbers of rows. Keep the teacher whole (shard_teacher=False), and gather a student for sampling "
            "(ds3_gather_for_generation=True)."
        )
    return _PROVEN[base]


def check_kind(model: nn.Module) -> None:
    """Raises `ValueError` for a model that no proof is needed for, saying why and what can be done."""
    name, config = _name(model), model.config.get_text_config()
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(f"{name} is an encoder-decoder; its prompt is not part of the decoder's sequence. {WAY_OUT}")
    check_one_device(name, model)
    if not isinstance(getattr(config, "num_hidden_layers", None), int):
        raise ValueError(f"{name} does not say how many layers it has (num_hidden_layers). {WAY_OUT}")
    known = {FULL, SLIDING, CHUNKED, INDEXED, "attention"}  # the last is its name in transformers 5.0
    unknown = set(getattr(config, "layer_types", None) or []) - known - STATEFUL_KINDS - WITHOUT_ATTENTION
    if unknown:
        raise ValueError(
            f"{name} has layers of kind {sorted(unknown)}, which a mask over slots cannot express. {_hint(model)}{WAY_OUT}"
        )
    if not isinstance(model.get_output_embeddings(), nn.Module):
        raise ValueError(f"{name} has no language-model head (get_output_embeddings() is None). {WAY_OUT}")
    check_adapter(getattr(model, "active_peft_config", None))


def check_one_device(name: str, model: nn.Module) -> None:
    """Raises `ValueError` for a model that its `device_map` spreads: caches, heads and losses are on one device."""
    devices = {str(device) for device in (getattr(model, "hf_device_map", None) or {}).values()}
    if len(devices) > 1 or "disk" in devices:
        raise ValueError(
            f"{name} is split over {sorted(devices)} by its device_map, and each process needs it on one device. Leave "
            "device_map out; to spread a model over GPUs use DeepSpeed ZeRO-3 or FSDP2 (examples/accelerate)."
        )


def check_adapter(peft_config) -> None:
    """Raises `ValueError` for an adapter (a `PeftConfig`, or `None`) that adds tokens to the sequence, or looks for some in it."""
    if peft_config is not None and peft_config.is_prompt_learning:
        raise ValueError(
            f"{peft_config.peft_type} is a prompt-learning adapter, whose virtual tokens shift every position. Use LoRA or "
            "another adapter that leaves the sequence as it is."
        )
    if getattr(peft_config, "alora_invocation_tokens", None):
        raise ValueError(
            "alora_invocation_tokens makes an adapter (aLoRA) that acts from these tokens on and looks for them in the whole text, but a "
            "response is sampled on a cache, a few tokens at a time, where it would act elsewhere than in the loss. Leave them out (LoRA)."
        )


def positions_of(config) -> int | None:
    """Positions that sampled texts may use (`None`: no limit known): the model's, and with longrope (Phi-3's long contexts) those
    of its short factors. Beyond them a forward turns every row of the batch by other angles than its cached keys. Llama 4 scales its
    queries by a position that it reads from the cache, from `floor_scale` positions on. GPT-Neo's local layers assume that a block is
    at the end of every row, which shows from `window_size` positions on."""
    room = getattr(config, "max_position_embeddings", None)
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":
        return min(room, rope.get("original_max_position_embeddings", room))
    if getattr(config, "attn_temperature_tuning", False) and getattr(config, "floor_scale", None):
        return min(room, int(config.floor_scale))
    if "local" in (getattr(config, "attention_layers", None) or ()):
        return min(room, config.window_size)
    return room


def _prove_states(model: nn.Module) -> Proof:
    """How a model with recurrent state can be prefilled: what costs least of what is right."""
    proof = run_trial(model, "left")
    if not proof.error <= proof.limit:
        proof = run_trial(model, None)
    if not proof.error <= proof.limit:
        return proof
    try:
        shared = run_trial(model, None, num_shared=2)
        continues = shared.error <= shared.limit
    except Exception:  # a forward may not be written for several tokens on a state
        continues = False
    return replace(proof, continues=continues)


@contextmanager
def _short_windows(model: nn.Module):
    """Windows and chunks of three tokens, and indexed attention to three, in models that make masks from these when they run."""
    config = model.config.get_text_config()
    names = ("sliding_window", "attention_chunk_size", "index_topk")
    owners = [(config, name) for name in names]
    owners += [(module, "index_topk") for module in model.modules() if "index_topk" in module.__dict__]
    sizes = [(owner, name, getattr(owner, name, None)) for owner, name in owners]
    sizes = [(owner, name, size) for owner, name, size in sizes if isinstance(size, int)]
    for owner, name, size in sizes:
        setattr(owner, name, min(size, 3))
    try:
        yield
    finally:
        for owner, name, size in sizes:
            setattr(owner, name, size)


def _name(model: nn.Module) -> str:
    return f"{type(model).__name__} (model_type={model.config.get_text_config().model_type!r})"


def _hint(model: nn.Module) -> str:
    """Why it may be so, where the class says something about it."""
    if getattr(model, "_is_stateful", False):
        return "It has recurrent state of a kind that the sampler does not keep. "
    return ""
