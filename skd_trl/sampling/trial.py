"""What the sampler's cache changes in a model: the same few tokens with it and without a cache.

Rows of different lengths, a block, going back by another count in each row, single steps, a row that moves, a place that is
refilled, a beginning that all rows share. `admission` decides by it.

Shapes: N rows, Q tokens, S tokens of a row, H hidden.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from .prefill import left_padded
from .ragged_cache import HeadInput, RaggedDecoder, attention_implementation, sampling_attention
from .recurrent_state import Reading


# Prompts of different lengths, and what follows. Of each block of four inputs another number is kept.
PROMPT_LENGTHS, BLOCK, KEPT = (3, 7, 5), 4, (1, 3, 4)


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


def run_trial(model: nn.Module, padding: str | None = "right", num_shared: int = 0) -> Proof:
    """Tries the cache on `model`, with prompts padded on the side `padding`, and behind `num_shared` tokens that all of them share."""
    trial = Trial(model, padding)
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
    # The types that it computes in: that of its hidden states, of autocast, and of quantised layers. These (bitsandbytes' 4 bits, HQQ)
    # round their inputs to a `compute_dtype` of theirs and return the type that they were given.
    state = trial.finished[0][1][0]
    types = {state.dtype} | {getattr(module, "compute_dtype", None) for module in model.modules()}
    if torch.is_autocast_enabled(state.device.type):
        types.add(torch.get_autocast_dtype(state.device.type))
    floating = (dtype for dtype in types if isinstance(dtype, torch.dtype) and dtype.is_floating_point)
    rounding = max(torch.finfo(dtype).eps for dtype in floating) ** 0.5
    return Proof(error, max(rounding, min(8 * own, 0.1)), padding)


class Trial:
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
        width = 1 if by_step else num_tokens
        for step, part in enumerate(zip(block.split(width, dim=1), at.split(width, dim=1), strict=True)):
            hidden.append(self.decoder(*part, num_slots_in_use=num_slots, reading=Reading(step=step))[0])
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
