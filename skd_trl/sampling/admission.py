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
from dataclasses import dataclass, replace
from weakref import WeakKeyDictionary

import torch
from torch import nn

from .mixers import STATEFUL_KINDS, is_stateful
from .prefill import left_padded
from .ragged_cache import (
    CHUNKED,
    FULL,
    INDEXED,
    SLIDING,
    WITHOUT_ATTENTION,
    HeadInput,
    RaggedDecoder,
    attention_implementation,
    eval_mode,
    sampling_attention,
)
from .recurrent_state import Reading


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
        limit (`float`): what rounding explains: half the digits of the coarsest type that is computed in, or eight times what the
            model itself differs by when it reads the beginning of a row alone.
        padding (`str`, *optional*): on which side prompts of different lengths are padded in one forward: `"right"`, `"left"` where a
            recurrent state would keep what comes last, `None` where it keeps padding on either side.
        continues (`bool`): whether several tokens at once can be read on what was read before.
    """

    error: float
    limit: float
    padding: str | None = "right"
    continues: bool = True


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
                proof = _prove_states(model) if is_stateful(model) else _run(model)
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


def _prove_states(model: nn.Module) -> Proof:
    """How a model with recurrent state can be prefilled: what costs least of what is right."""
    proof = _run(model, "left")
    if not proof.error <= proof.limit:
        proof = _run(model, None)
    if not proof.error <= proof.limit:
        return proof
    try:
        shared = _run(model, None, num_shared=2)
        continues = shared.error <= shared.limit
    except Exception:  # a forward may not be written for several tokens on a state
        continues = False
    return replace(proof, continues=continues)


def _run(model: nn.Module, padding: str | None = "right", num_shared: int = 0) -> Proof:
    trial = _Trial(model, padding)
    if num_shared:
        trial.share(num_shared)
    trial.prefill((0, 1, 2), PROMPT_LENGTHS)
    trial.block(BLOCK, KEPT)
    trial.block(1, (1, 1, 1))
    trial.block(BLOCK, KEPT[::-1], by_step=True)
    trial.finish(0)
    trial.move_row(2, 0)
    trial.prefill((2,), (2,))  # the place that became free takes another prompt
    trial.block(BLOCK, KEPT)
    trial.finish(1)
    trial.prefill((1,), (0,))  # a prompt of one token, which is the first input of a block
    trial.block(BLOCK, KEPT)
    for place in range(3):
        trial.finish(place)

    errors, noise, sizes = [], [], []
    for text, hidden in trial.finished:
        alone, beginning = _hidden_states(model, text), _hidden_states(model, text[: len(text) // 2])
        errors.append((torch.stack(hidden).float() - alone).abs().max())
        noise.append((beginning - alone[: len(beginning)]).abs().max())
        sizes.append(alone.abs().max())
    error, own = (float(torch.stack(values).max() / torch.stack(sizes).max()) for values in (errors, noise))
    rounding = max(torch.finfo(dtype).eps for dtype in _types(model, trial.finished[0][1][0])) ** 0.5
    return Proof(error, max(rounding, min(8 * own, 0.1)), padding)


def _types(model: nn.Module, hidden: torch.Tensor) -> set[torch.dtype]:
    """The types that `model` computes in: that of its hidden states, of autocast, and of quantised layers. These (bitsandbytes' 4 bits,
    HQQ) round their inputs to a `compute_dtype` of theirs and return the type that they were given."""
    types = {hidden.dtype} | {getattr(module, "compute_dtype", None) for module in model.modules()}
    if torch.is_autocast_enabled(hidden.device.type):
        types.add(torch.get_autocast_dtype(hidden.device.type))
    return {dtype for dtype in types if isinstance(dtype, torch.dtype) and dtype.is_floating_point}


class _Trial:
    """Three rows that the sampler's cache is tried on, in the ways that sampling uses it."""

    def __init__(self, model: nn.Module, padding: str | None):
        self.device, self.padding = next(model.parameters()).device, padding
        self.vocab_size = model.config.get_text_config().vocab_size
        self.decoder = RaggedDecoder(model, num_rows=3, num_slots=48)
        self.beginning: tuple[list[int], list[torch.Tensor]] = ([], [])
        self.texts: list[list[int]] = [[], [], []]  # by place
        self.seen: list[list[torch.Tensor]] = [[], [], []]  # the hidden states of their tokens
        self.finished: list[tuple[list[int], list[torch.Tensor]]] = []
        self.num_made = 0

    def new_tokens(self, count: int) -> list[int]:
        self.num_made += count
        return [3 + (7919 * i) % max(self.vocab_size - 8, 1) for i in range(self.num_made - count, self.num_made)]

    def share(self, count: int) -> None:
        """Reads a beginning once for all rows."""
        tokens, positions = self.new_tokens(count), torch.arange(count, device=self.device)[None]
        hidden, _ = self.decoder(
            torch.tensor([tokens], device=self.device),
            positions,
            num_slots_in_use=count,
            reading=Reading(is_beginning=True),
        )
        self.decoder.spread_first_row(count)
        self.beginning = (tokens, list(hidden[0]))
        for place in range(3):
            self.texts[place], self.seen[place] = list(tokens), list(hidden[0])

    def prefill(self, places: Sequence[int], lengths: Sequence[int]) -> None:
        """Gives these places to prompts: all in one forward where it can be padded, else one by one."""
        if self.decoder.states is not None:
            self.decoder.states.begin_rows(places)
        start, longest = len(self.beginning[0]), max(lengths)
        prompts = [self.new_tokens(longest) for _ in places]
        for place, prompt, length in zip(places, prompts, lengths, strict=True):
            self.texts[place] = [*self.beginning[0], *prompt[:length]]
            self.seen[place] = list(self.beginning[1])
        groups = [[row] for row in range(len(places))] if self.padding is None else [list(range(len(places)))]
        for group in groups:
            num_tokens = max(lengths[row] for row in group)
            if num_tokens == 0:
                continue
            tokens = torch.tensor([prompts[row][:num_tokens] for row in group], device=self.device)
            positions = torch.arange(start, start + num_tokens, device=self.device).expand_as(tokens)
            padding, of_group = None, torch.tensor([lengths[row] for row in group], device=self.device)
            if self.padding == "left":
                tokens, positions, padding = left_padded(tokens, positions, of_group)
            hidden, _ = self.decoder(
                tokens, positions, rows=[places[row] for row in group], num_slots_in_use=start + num_tokens,
                reading=Reading(is_beginning=start == 0, padding=padding),
            )  # fmt: skip
            for row, states in zip(group, hidden, strict=True):
                self.seen[places[row]] += states[-lengths[row] :] if padding is not None else states[: lengths[row]]

    def block(self, num_tokens: int, kept: Sequence[int], by_step: bool = False) -> None:
        """All rows read a block, in one forward or token by token, and keep the first tokens of it."""
        tokens = [self.new_tokens(num_tokens) for _ in range(3)]
        positions = [[len(text) + step for step in range(num_tokens)] for text in self.texts]
        block, at = (torch.tensor(values, device=self.device) for values in (tokens, positions))
        num_slots = max(map(max, positions)) + 1
        if self.decoder.states is not None:
            self.decoder.states.begin_round(num_tokens)
        hidden = []
        for column in range(num_tokens) if by_step else (slice(None),):
            columns = slice(column, column + 1) if by_step else column
            step = column if by_step else 0
            hidden.append(
                self.decoder(
                    block[:, columns], at[:, columns], num_slots_in_use=num_slots, reading=Reading(step=step)
                )[0]
            )
        states = torch.cat(hidden, dim=1)
        for place, count in enumerate(kept):
            self.texts[place] += tokens[place][:count]
            self.seen[place] += states[place, :count]
        if self.decoder.states is not None:
            self.decoder.states.keep(torch.tensor(kept, device=self.device))

    def finish(self, place: int) -> None:
        self.finished.append((self.texts[place], self.seen[place]))

    def move_row(self, source: int, target: int) -> None:
        self.decoder.move_row(source, target)
        self.texts[target], self.seen[target] = self.texts[source], self.seen[source]


def _hidden_states(model: nn.Module, text: list[int]) -> torch.Tensor:
    """The input of the head for a row that is read alone and without a cache, (S, H)."""
    with attention_implementation(model, sampling_attention(model)), HeadInput(model) as head_input:
        model(input_ids=torch.tensor([text], device=next(model.parameters()).device), use_cache=False)
    return head_input.value[0].float()


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
