"""Recurrent state beside the key/value cache: linear attention, state spaces, short convolutions, with a state for each row.

A state cannot be cut back to an earlier token, so what it was after each token of a block is kept, and `keep` picks for every
row the one after the last token that is kept. For that the modules that own the states (the mixers) read a block token by
token, while attention, MLPs and the head read it whole. Nothing here knows an architecture: `mixers` finds which modules touch
which states, and states are whatever tensors these modules leave, rows first.

All of it is tensors of fixed shape: a block's states are (G + 1, B, ...), the first of them what is kept.

Shapes: B rows of the cache, N rows of one forward, Q tokens of each, G draft, `...` a state's own.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.utils import ModelOutput

from .mixers import Mixer, StatePlace, mixers_of


@dataclass(frozen=True)
class Reading:
    """How a forward uses the states.

    Attributes:
        step (`int`, *optional*): how many tokens of the block have been read before. `None` outside of a block: the states that
            are kept are then written themselves.
        is_beginning (`bool`): whether nothing has been read before.
        padding (`torch.Tensor` of shape `(N, Q)`, *optional*): 0 at what has to leave no trace in a state, 1 elsewhere.
    """

    step: int | None = None
    is_beginning: bool = False
    padding: torch.Tensor | None = None


class RecurrentStates:
    """The states of all mixers of a model, for the rows of one cache.

    Args:
        model (`nn.Module`): of transformers, or a `PeftModel` around one.
        cache (`Cache`): the one that the model is given, with transformers' own layers where a layer keeps states.
        num_rows (`int`): B.
    """

    def __init__(self, model: nn.Module, cache: Cache, num_rows: int):
        self.num_rows = num_rows
        self.mixers = mixers_of(model)
        self.slots = {place: _Slot(place, cache) for mixer in self.mixers for place in mixer.places}
        self.num_kept_steps = 0  # 0: a block is one token, which is always kept

    def begin_round(self, num_draft: int, may_keep_none: bool = True) -> bool:
        """Makes room for the states after each of G = `num_draft` tokens. A block of one token goes back only where a row may keep none
        of it, `may_keep_none`; otherwise it needs no room. Returns whether buffers were replaced by larger ones."""
        self.num_kept_steps = num_draft if num_draft > 1 or may_keep_none else 0
        return any([slot.reserve(self.num_kept_steps) for slot in self.slots.values()])

    @contextmanager
    def reading(self, rows: slice | torch.Tensor, shape: torch.Size, how: Reading) -> Iterator[None]:
        """One forward of the model over N `rows` and `shape` (N, Q) tokens."""
        with ExitStack() as stack:
            stack.enter_context(_clamped_steps([mixer.module for mixer in self.mixers]))
            for mixer in self.mixers:
                stack.enter_context(_forward(mixer.module, partial(self._run, mixer, rows, shape, how)))
            yield

    @contextmanager
    def idle(self, shape: torch.Size) -> Iterator[None]:
        """A forward without a cache over `shape` (N, Q) tokens, in which mixers are called as in a block of Q tokens."""

        def run(forward: Callable, *args, **kwargs):
            columns = [_column((args, kwargs), column, shape) for column in range(shape[1])]
            return _joined([forward(*own_args, **own_kwargs) for own_args, own_kwargs in columns])

        with ExitStack() as stack:
            for mixer in self.mixers:
                stack.enter_context(_forward(mixer.module, run))
            yield

    def _run(self, mixer: Mixer, rows, shape: torch.Size, how: Reading, forward: Callable, *args, **kwargs):
        """The mixer's forward: of a whole prompt at once, of a block token by token."""
        num_tokens = shape[1]
        if how.step is None or num_tokens == 1:
            return self._advance(mixer, rows, how, how.step, partial(mixer.run, forward, *args, **kwargs))
        outputs = []
        for column in range(num_tokens):
            own_args, own_kwargs = _column((args, kwargs), column, shape)
            outputs.append(
                self._advance(
                    mixer, rows, how, how.step + column, partial(mixer.run, forward, *own_args, **own_kwargs)
                )
            )
        return _joined(outputs)

    def _advance(self, mixer: Mixer, rows, how: Reading, step: int | None, forward: Callable):
        slots = [self.slots[place] for place in mixer.places]
        step = step if self.num_kept_steps else None
        for slot in slots:
            slot.hand_out(rows, step, how.is_beginning)
        for slot in slots:  # a layer knows whether it has read anything, not which of its states are used
            if slot.handed is not None:
                slot.raise_flags()
        outputs = forward()
        for slot in slots:
            slot.take_back(rows, step, self.num_rows, self.num_kept_steps)
        return outputs

    def keep(self, count: torch.Tensor) -> None:
        """Of each of the first N rows the state after the first `count` (N,) tokens of the block is kept."""
        if self.num_kept_steps:
            every_row = torch.arange(len(count), device=count.device)
            for slot in self.slots.values():
                if slot.states is not None:
                    slot.states[0, : len(count)] = slot.states[count, every_row]

    def hold(self) -> Callable[[], None]:
        """What puts back the kept states of all rows."""
        held = {slot: None if slot.states is None else slot.states[0].clone() for slot in self.slots.values()}

        def put_back() -> None:
            for slot, states in held.items():
                if states is None or slot.states is None:
                    slot.states = None
                else:
                    slot.states[0] = states

        return put_back

    def move_row(self, source: int, target: int) -> None:
        for slot in self.slots.values():
            if slot.states is not None:
                slot.states[0, target] = slot.states[0, source]

    def share_first_row(self) -> None:
        """What the first row has read, all prompts begin with: where `begin_rows` starts from now on."""
        for slot in self.slots.values():
            slot.beginning = None if slot.states is None else slot.states[0, 0].clone()
        self.begin_rows(range(self.num_rows))

    def forget_beginning(self) -> None:
        """Prompts share nothing, until `share_first_row` says so."""
        for slot in self.slots.values():
            slot.beginning = None

    @property
    def num_bytes(self) -> int:
        return sum(slot.states.nbytes for slot in self.slots.values() if slot.states is not None)

    def begin_rows(self, rows: Sequence[int]) -> None:
        """These rows are given to other prompts: they have read the beginning that all prompts share, or nothing."""
        for slot in self.slots.values():
            if slot.states is not None:
                index = torch.tensor(list(rows), device=slot.states.device)
                slot.states[0, index] = 0.0 if slot.beginning is None else slot.beginning


class _Slot:
    """One state of one mixer, for all rows: `states` (G + 1, B, ...), of which the first is what is kept."""

    def __init__(self, place: StatePlace, cache: Cache):
        self.states: torch.Tensor | None = None
        self.beginning: torch.Tensor | None = None
        self.handed: torch.Tensor | None = None
        self.flags: list[tuple[dict, int]] = []  # what a layer of transformers knows of its states
        if place.kind == "attribute":
            self.container, self.key = place.owner.__dict__, place.index
        elif place.kind == "passed":
            self.container, self.key = place.owner.values, place.index
        elif place.kind == "linear_cache":
            self.container, self.key = cache.linear_cache, place.owner
        else:
            layer = cache.layers[place.owner]
            self.container, self.key = getattr(layer, place.kind), place.index
            self.flags = [(layer.has_previous_state, place.index)]
            self.flags.append((getattr(layer, f"is_{place.kind}_initialized"), place.index))

    def reserve(self, num_steps: int) -> bool:
        if self.states is None or len(self.states) > num_steps:
            return False
        more = self.states.new_zeros(num_steps + 1 - len(self.states), *self.states.shape[1:])
        self.states = torch.cat([self.states, more])
        return True

    def hand_out(self, rows: slice | torch.Tensor, step: int | None, is_beginning: bool) -> None:
        """Gives the mixer its state: `None` if nothing was read before, else a tensor (N, ...) to be changed in place."""
        self.handed = None
        if self.states is not None and not is_beginning:
            if step is not None:
                self.states[step + 1, rows] = self.states[step, rows]
            self.handed = self.states[0 if step is None else step + 1, rows]
        self.container[self.key] = self.handed
        for flags, index in self.flags:
            flags[index] = False

    def raise_flags(self) -> None:
        for flags, index in self.flags:
            flags[index] = True

    def take_back(self, rows: slice | torch.Tensor, step: int | None, num_rows: int, num_steps: int) -> None:
        """Stores what the mixer has left."""
        new = self.container[self.key]
        self.container[self.key] = None
        if new is None or (new is self.handed and isinstance(rows, slice)):
            return
        if self.states is None:
            self.states = new.new_zeros(num_steps + 1, num_rows, *new.shape[1:])
        self.states[0 if step is None else step + 1, rows] = new


# One token of a block


def _column(values: Any, column: int, shape: torch.Size) -> Any:
    """Of all tensors (N, Q, ...) or (1, Q, ...) in arguments the column (., 1, ...)."""
    if isinstance(values, torch.Tensor):
        is_by_token = values.ndim > 1 and values.shape[1] == shape[1] and values.shape[0] in (1, shape[0])
        return values[:, column : column + 1] if is_by_token else values
    if type(values) in (tuple, list):
        return type(values)(_column(value, column, shape) for value in values)
    if type(values) is dict:
        return {name: _column(value, column, shape) for name, value in values.items()}
    return values


def _joined(outputs: list) -> Any:
    """Outputs (N, 1, ...) of each token as one (N, Q, ...)."""
    if isinstance(outputs[0], torch.Tensor):
        return torch.cat(outputs, dim=1)
    if isinstance(outputs[0], ModelOutput):
        return type(outputs[0])(**{name: _joined([values[name] for values in outputs]) for name in outputs[0]})
    if type(outputs[0]) in (tuple, list):
        return type(outputs[0])(_joined(list(values)) for values in zip(*outputs, strict=True))
    return outputs[-1]


@contextmanager
def _clamped_steps(mixers: list[nn.Module]):
    """Mamba 2 clamps its time steps where it reads several tokens, and forgets to where it reads one (transformers 5.24: a single
    token of Nemotron-H or Zamba 2 is off by up to 0.03). Sampling and training would be of two models."""
    name, limits = (
        "mamba2_selective_state_update",
        {tuple(getattr(mixer, "time_step_limit", None) or ()) for mixer in mixers},
    )
    modules = {sys.modules[type(mixer).__module__] for mixer in mixers}
    updates = [(module, getattr(module, name)) for module in modules if hasattr(module, name)]
    limit = next(iter(limits)) if len(limits) == 1 else ()
    if limit in ((), (0.0, float("inf"))):
        updates = []

    def clamped(update: Callable, state, hidden_states, dt, *args, dt_bias=None, dt_softplus=False, **kwargs):
        if "dt_limit" in kwargs or not dt_softplus:
            return update(state, hidden_states, dt, *args, dt_bias=dt_bias, dt_softplus=dt_softplus, **kwargs)
        dt = nn.functional.softplus(dt if dt_bias is None else dt + dt_bias.to(dt.dtype)).clamp(*limit)
        return update(state, hidden_states, dt, *args, dt_bias=None, dt_softplus=False, **kwargs)

    for module, update in updates:
        setattr(module, name, partial(clamped, update))
    try:
        yield
    finally:
        for module, update in updates:
            setattr(module, name, update)


@contextmanager
def _forward(module: nn.Module, run: Callable):
    """Lets `run(forward, ...)` take the place of a module's forward for a while; its hooks act as ever."""
    before = module.__dict__.get("forward")
    module.forward = partial(run, module.forward)
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before
