"""Which models can be sampled from: decided by running them, not by their names.

The model runs a few tokens on the sampler's cache: rows of different lengths, a block, going back by another count in each row,
single steps, a row that moves, a place that is refilled. What its head is given has to be what it is given without a cache. Windows are
shortened for it: their ends are then within these few tokens. What differs is refused with the figure. Names
remain only where so few tokens cannot show the trouble (`positions_of`).

Shapes: N rows, Q tokens, S tokens of a row, H hidden.
"""

import math
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import nn

from .ragged_cache import (
    FULL,
    SLIDING,
    HeadInput,
    RaggedDecoder,
    attention_implementation,
    eval_mode,
    sampling_attention,
)


WAY_OUT = (
    "Train on given texts with rollout='dataset', which needs no sampling, or use a decoder-only model with full or sliding-window "
    "attention."
)
# Of each model object, what its proof gave.
_PROVEN: "WeakKeyDictionary[nn.Module, Proof]" = WeakKeyDictionary()


@dataclass(frozen=True)
class Proof:
    """What the sampler's cache changes in a model's last hidden states, relative to the largest of them.

    Attributes:
        error (`float`): the largest difference to the same texts without a cache.
        limit (`float`): what rounding explains: half the digits of the type that is computed in, or eight times what the model
            itself differs by when it reads the beginning of a row alone.
    """

    error: float
    limit: float


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
                proof = _run(model)
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
    return _PROVEN[base]


def check_kind(model: nn.Module) -> None:
    """Raises `ValueError` for a model that no proof is needed for, saying why and what can be done."""
    name, config = _name(model), model.config.get_text_config()
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(f"{name} is an encoder-decoder; its prompt is not part of the decoder's sequence. {WAY_OUT}")
    check_one_device(name, model)
    if not isinstance(getattr(config, "num_hidden_layers", None), int):
        raise ValueError(f"{name} does not say how many layers it has (num_hidden_layers). {WAY_OUT}")
    unknown = set(getattr(config, "layer_types", None) or []) - {
        FULL,
        SLIDING,
        "attention",
    }  # its name in transformers 5.0
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
    """Raises `ValueError` for an adapter (a `PeftConfig`, or `None`) that adds tokens to the sequence."""
    if peft_config is not None and peft_config.is_prompt_learning:
        raise ValueError(
            f"{peft_config.peft_type} is a prompt-learning adapter, whose virtual tokens shift every position. Use LoRA or "
            "another adapter that leaves the sequence as it is."
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


# The proof

# Prompts of different lengths, and what follows. Of each block of four inputs another number is kept.
PROMPT_LENGTHS, BLOCK, KEPT = (3, 7, 5), 4, (1, 3, 4)


def _run(model: nn.Module) -> Proof:
    device, vocab_size = next(model.parameters()).device, model.config.get_text_config().vocab_size
    decoder = RaggedDecoder(model, num_rows=3, num_slots=32)
    texts: list[list[int]] = [[], [], []]  # by place
    seen: list[list[torch.Tensor]] = [[], [], []]  # hidden states of the last tokens of each
    finished: list[tuple[list[int], list[torch.Tensor]]] = []
    num_made = 0

    def new_tokens(count: int) -> list[int]:
        nonlocal num_made
        num_made += count
        return [3 + (7919 * i) % max(vocab_size - 8, 1) for i in range(num_made - count, num_made)]

    def feed(places: Sequence[int], tokens: list[list[int]], kept: Sequence[int]) -> None:
        """Each place reads its tokens, and keeps the first of them."""
        positions = [[len(texts[place]) + j for j in range(len(tokens[0]))] for place in places]
        hidden, _ = decoder(
            torch.tensor(tokens, device=device), torch.tensor(positions, device=device), rows=list(places),
            num_slots_in_use=max(map(max, positions)) + 1,
        )  # fmt: skip
        for row, (place, count) in enumerate(zip(places, kept, strict=True)):
            texts[place] += tokens[row][:count]
            seen[place] += hidden[row, :count]

    longest = max(PROMPT_LENGTHS)
    feed((0, 1, 2), [new_tokens(longest) for _ in range(3)], PROMPT_LENGTHS)
    feed((0, 1, 2), [new_tokens(BLOCK) for _ in range(3)], KEPT)
    feed((0, 1, 2), [new_tokens(1) for _ in range(3)], (1, 1, 1))
    feed((0, 1, 2), [new_tokens(BLOCK) for _ in range(3)], KEPT[::-1])
    finished.append((texts[0], seen[0]))
    decoder.move_row(2, 0)
    texts[0], seen[0], texts[2], seen[2] = texts[2], seen[2], [], []
    feed((2,), [new_tokens(3)], (2,))  # the place that became free takes another prompt
    feed((0, 1, 2), [new_tokens(BLOCK) for _ in range(3)], KEPT)
    finished += zip(texts, seen, strict=True)

    errors, noise, sizes = [], [], []
    for text, hidden in finished:
        alone, beginning = _hidden_states(model, text), _hidden_states(model, text[: len(text) // 2])
        errors.append((torch.stack(hidden).float() - alone).abs().max())
        noise.append((beginning - alone[: len(beginning)]).abs().max())
        sizes.append(alone.abs().max())
    error, own = (float(torch.stack(values).max() / torch.stack(sizes).max()) for values in (errors, noise))
    types = [hidden[0].dtype]
    if torch.is_autocast_enabled(device.type):
        types.append(torch.get_autocast_dtype(device.type))
    rounding = max(torch.finfo(dtype).eps for dtype in types) ** 0.5
    return Proof(error, max(rounding, min(8 * own, 0.1)))


def _hidden_states(model: nn.Module, text: list[int]) -> torch.Tensor:
    """The input of the head for a row that is read alone and without a cache, (S, H)."""
    with attention_implementation(model, sampling_attention(model)), HeadInput(model) as head_input:
        model(input_ids=torch.tensor([text], device=next(model.parameters()).device), use_cache=False)
    return head_input.value[0].float()


@contextmanager
def _short_windows(model: nn.Module):
    """Windows of three tokens, in the masks of models that make them from their configuration when they run."""
    config = model.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    if isinstance(window, int):
        config.sliding_window = min(window, 3)
    try:
        yield
    finally:
        if isinstance(window, int):
            config.sliding_window = window


def _name(model: nn.Module) -> str:
    return f"{type(model).__name__} (model_type={model.config.get_text_config().model_type!r})"


def _hint(model: nn.Module) -> str:
    """Why it may be so, where the class says something about it."""
    if getattr(model, "_is_stateful", False):
        return "It has recurrent or linear-attention layers, whose state cannot go back to an earlier token when a draft is rejected. "
    if getattr(model.config.get_text_config(), "alibi", False) or model.config.get_text_config().model_type == "bloom":
        return "Its ALiBi biases are made from a two-dimensional mask, and rows here have different lengths. "
    return ""
