"""How many responses are written at the same time: as many as fit with what is free when a window begins."""

import math

from accelerate.logging import get_logger
from torch import nn

from . import machine as machines
from .machine import Machine
from .memory_count import Window, hidden_bytes, sampling_bytes
from .memory_plan import RESERVE, gib


logger = get_logger(__name__)


def places_now(student: nn.Module, teacher: nn.Module, machine: Machine, window: Window, kept: int = 0) -> int:
    """How many rows of `window` can be written at once with what is free on the device at this moment, and with the `kept` bytes that
    caches of the last window have; fewer than it asks for are said in the log. All of them, with a warning, where a model's forward cannot be
    counted on tensors that hold nothing."""
    slots, draft = window.longest_prompt + window.max_new_tokens + window.num_draft_tokens, window.num_draft_tokens
    try:
        room = (machines.free_bytes(machine.device, now=True) + kept) * (1 - RESERVE)
        room -= window.num_prompts * window.max_new_tokens * hidden_bytes(teacher)
        rough = sum(_rough_bytes(model, slots, draft) for model in (student, teacher))
        if 2 * rough * window.num_places <= room:  # there is no need to count
            return window.num_places
        parts, per_place = sampling_bytes(student, teacher, machine, window, False, machine.is_gpu)
    except Exception:  # whatever a model may do with such tensors
        logger.warning_once(
            "The memory of a sampling could not be counted, so all responses of a step are written at once. If the memory runs out, lower "
            "rollout_batch_size."
        )
        logger.debug("The count ended with", exc_info=True)
        return window.num_places
    fixed = max(sum(parts.values()) - per_place * window.num_places, 0)
    places = max(1, min(window.num_places, int(max(room - fixed, 0) // max(per_place, 1))))
    if places < window.num_places:
        logger.warning(
            f"{window.num_places} responses at once would need {gib(per_place * window.num_places)} of the {gib(room)} that are free: "
            f"{places} are written at once, and the others take their places (rollout_batch_size={places}). The texts are the same."
        )
    return places


def _rough_bytes(model: nn.Module, slots: int, draft: int) -> float:
    """Bytes of a place, from the configuration; more than most caches take. Of a model without attention there is no rough number."""
    config = model.config.get_text_config()
    if getattr(config, "num_attention_heads", None) is None:
        return math.inf
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 4 * (2 * config.num_hidden_layers * heads * size * slots + 2 * draft * config.vocab_size)
