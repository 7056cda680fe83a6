"""Which modules of a model keep recurrent states (its mixers), and where these are: found by running the model.

Nothing here knows an architecture. Most mixers read and write states in a cache of transformers, layer by layer; some keep them as
attributes (RecurrentGemma); and some decoders are given all of their states in one argument and return them (RWKV
a list, xLSTM an object). `recurrent_state` keeps them for each row.

Shapes: N rows of one forward.
"""

import copy
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicCache


# Kinds of layer whose modules keep a state, alone or beside keys and values.
STATEFUL_KINDS = {"linear_attention", "conv", "hybrid", "hybrid_sliding", "recurrent"}
# Of each model, its mixers: found once.
_MIXERS: "WeakKeyDictionary[nn.Module, list[Mixer]]" = WeakKeyDictionary()


@dataclass(frozen=True)
class StatePlace:
    """Where one state is: `(layer, index)` of a cache, `(module, attribute)` if the module itself keeps it, or `(mixer, index)` among
    what a decoder is given as an argument."""

    kind: str
    owner: Any
    index: Any


class Mixer:
    """A module that reads and writes states."""

    rows_apart = False  # whether a token of several rows takes a forward for each of them

    def __init__(self, module: nn.Module, places: tuple[StatePlace, ...]):
        self.module, self.places = module, places

    def run(self, forward: Callable, *args, **kwargs) -> Any:
        """The module's forward, with the states where it looks for them."""
        return forward(*args, **kwargs)


class StatesAsArgument(Mixer):
    """A decoder that is given its states as `argument` and returns them under the same name: in lists, dicts or one object, like
    `example`, tensors with two dimensions or more, rows first. `values` are what it is given next, and what it has left.

    `rows_apart`: a token of several rows is read row by row. RWKV mixes the rows of a batch where it reads one token of each
    (transformers 5.24 forgets a dimension of the token before).
    """

    def __init__(self, module: nn.Module, argument: str, example: Any, rows_apart: bool = False):
        self.argument, self.example, self.rows_apart = argument, example, rows_apart
        self.values: list[torch.Tensor | None] = [None] * len(_states_in(example))
        super().__init__(module, tuple(StatePlace("passed", self, index) for index in range(len(self.values))))

    def run(self, forward: Callable, *args, **kwargs) -> Any:
        num_rows, num_tokens = (args[0] if args else kwargs["input_ids"]).shape
        if not self.rows_apart or num_rows == 1 or num_tokens > 1:
            outputs, self.values[:] = self._run(forward, args, kwargs, self.values)
            return outputs
        parts, left = [], []
        for row in range(num_rows):
            own_args = [_of_row(value, row, num_rows) for value in args]
            own_kwargs = {name: _of_row(value, row, num_rows) for name, value in kwargs.items()}
            outputs, states = self._run(
                forward, own_args, own_kwargs, [_of_row(state, row, num_rows) for state in self.values]
            )
            parts.append(outputs)
            left.append(states)
        self.values[:] = [torch.cat(states) for states in zip(*left, strict=True)]
        names = [name for name, value in parts[0].items() if isinstance(value, torch.Tensor)]
        return type(parts[0])(**{name: torch.cat([part[name] for part in parts]) for name in names})

    def _run(self, forward: Callable, args, kwargs, states: list) -> tuple[Any, list[torch.Tensor]]:
        """The decoder's output without its states, and these."""
        following = iter(states)
        given = None if states[0] is None else _with_states(self.example, lambda _: next(following))
        outputs = forward(*args, **{**kwargs, self.argument: given})
        left = _states_in(outputs[self.argument])
        outputs[self.argument] = None
        return outputs, left


def _of_row(value: Any, row: int, num_rows: int) -> Any:
    """Of a tensor (N, ...) the row (1, ...)."""
    return value[row : row + 1] if isinstance(value, torch.Tensor) and value.shape[:1] == (num_rows,) else value


def has_stateful_layers(config) -> bool:
    """Whether layers of this configuration keep a state (of a class that can, but need not)."""
    return bool(STATEFUL_KINDS & set(getattr(config, "layer_types", None) or ()))


def is_stateful(model: nn.Module) -> bool:
    """Whether a model keeps states: in some of its layers, or, where its configuration knows no kinds of layer, by its class."""
    config = model.config.get_text_config()
    if getattr(config, "layer_types", None) is None:
        return getattr(model, "_is_stateful", False)
    return has_stateful_layers(config)


def mixers_of(model: nn.Module) -> list[Mixer]:
    """The modules that read and write states, found by running two tokens: the innermost module that runs when a state of the cache
    is touched, and the outermost of those that keep states as attributes."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if base not in _MIXERS:
        has_layers = has_stateful_layers(base.config.get_text_config())
        _MIXERS[base] = _find_mixers(base) if has_layers else [_find_passed_states(base)]
    return _MIXERS[base]


@torch.no_grad()
def _find_mixers(model: nn.Module) -> list[Mixer]:
    touched: dict[nn.Module, dict[StatePlace, None]] = {}
    running: list[nn.Module] = []

    def touch(kinds: tuple[str, ...], owner: int, index: int | None = None) -> None:
        if running:
            places = (StatePlace(kind, owner, index) for kind in kinds)
            touched.setdefault(running[-1], {}).update(dict.fromkeys(places))

    cache = new_cache(model)
    for number, layer in enumerate(cache.layers):
        for kind in ("conv_states", "recurrent_states", "has_previous_state"):
            if hasattr(layer, kind):
                own_touch = partial(touch, ("conv_states", "recurrent_states"), number)
                setattr(layer, kind, _Watched(getattr(layer, kind), own_touch))
    if hasattr(cache, "linear_cache"):
        cache.linear_cache = _WatchedList(cache.linear_cache, partial(touch, ("linear_cache",)))

    def start(module: nn.Module, *_) -> None:
        running.append(module)

    def stop(*_) -> None:
        running.pop()

    handles = []
    for module in model.modules():
        handles.append(module.register_forward_pre_hook(start))
        handles.append(module.register_forward_hook(stop, always_call=True))
    device, num_rows = next(model.parameters()).device, 3
    keeping = {"use_cache": True, cache_argument(model): cache}
    before = {module: dict(module.__dict__) for module in model.modules()}
    try:
        # Two forwards: the second one on what the first has left.
        for position in range(2):
            tokens = torch.full((num_rows, 1), 3, device=device)
            model(input_ids=tokens, position_ids=torch.full_like(tokens, position), **keeping)
    finally:
        for handle in handles:
            handle.remove()
        own = _states_on_modules(model, before, num_rows)
    return [Mixer(module, tuple(places)) for module, places in touched.items()] + own


class _Watched(dict):
    """A dict that tells which of its keys are read or written."""

    def __init__(self, values: dict, touch: Callable[[Any], None]):
        super().__init__(values)
        self.touch = touch

    def __getitem__(self, key):
        self.touch(key)
        return super().__getitem__(key)

    def __setitem__(self, key, value):
        self.touch(key)
        super().__setitem__(key, value)


class _WatchedList(list):
    def __init__(self, values: list, touch: Callable[[Any], None]):
        super().__init__(values)
        self.touch = touch

    def __getitem__(self, key):
        self.touch(key)
        return super().__getitem__(key)


def _states_on_modules(model: nn.Module, before: dict[nn.Module, dict], num_rows: int) -> list[Mixer]:
    """Tensors, rows first, that a forward has left as plain attributes. The attributes are put back."""
    places: dict[nn.Module, list[StatePlace]] = {}
    for module in model.modules():
        for name, value in list(module.__dict__.items()):
            if isinstance(value, torch.Tensor) and value.ndim > 1 and len(value) == num_rows:
                if value is not before[module].get(name):
                    places.setdefault(module, []).append(StatePlace("attribute", module, name))
                    module.__dict__[name] = before[module].get(name)
    inner = {part for module in places for part in module.modules() if part is not module}
    return [
        Mixer(module, tuple(place for part in module.modules() for place in places.get(part, ())))
        for module in places
        if module not in inner
    ]


@torch.no_grad()
def _find_passed_states(model: nn.Module) -> StatesAsArgument:
    """What the decoder of `model` makes and returns where it is given no states and told to keep them."""
    decoder = model.base_model
    tokens = torch.tensor([[3], [4], [5]], device=next(model.parameters()).device)
    outputs = decoder(input_ids=tokens, use_cache=True)
    for argument in inspect.signature(decoder.forward).parameters:
        example = outputs.get(argument)
        if example is not None and _states_in(example):
            alone = torch.cat([decoder(input_ids=token, use_cache=True)[0] for token in tokens.split(1)])
            is_same = outputs[0].shape == alone.shape and torch.allclose(outputs[0], alone, rtol=1e-2, atol=1e-2)
            return StatesAsArgument(decoder, argument, example, rows_apart=not is_same)
    raise ValueError(
        f"{type(model).__name__} keeps states, but neither in a cache nor in an argument that it returns."
    )


def _states_in(value: Any) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    _with_states(value, lambda tensor: found.append(tensor) or tensor)
    return found


def _with_states(value: Any, change: Callable[[torch.Tensor], Any]) -> Any:
    """A copy of what states are passed in, with others in their places."""
    if isinstance(value, torch.Tensor):
        return change(value) if value.ndim > 1 else value
    if type(value) in (tuple, list):
        return type(value)(_with_states(part, change) for part in value)
    if type(value) is dict:
        return {key: _with_states(part, change) for key, part in value.items()}
    if type(value).__module__.startswith("transformers.models") and not hasattr(
        value, "model_type"
    ):  # no configuration
        changed = copy.copy(value)
        vars(changed).update({key: _with_states(part, change) for key, part in vars(value).items()})
        return changed
    return value


def new_cache(model: nn.Module, layers: list | None = None) -> Cache:
    """The cache that transformers would make for `model`, with other `layers`. MiniMax has its own class."""
    model_class = type(model.get_decoder() if hasattr(model, "get_decoder") else model)
    own = [
        value
        for value in vars(sys.modules[model_class.__module__]).values()
        if isinstance(value, type) and issubclass(value, Cache) and value.__module__ == model_class.__module__
    ]
    config = model.config.get_text_config()
    if layers is None:
        layers = DynamicCache(config=config).layers
    if not own:
        return Cache(layers=layers)
    cache = own[0]()
    cache.layers = layers
    if hasattr(cache, "linear_cache"):
        cache.linear_cache = [None] * config.num_hidden_layers
    return cache


def cache_argument(model: nn.Module) -> str:
    """What the forward of `model` calls its cache."""
    # Its name before transformers 5.24 or so, and of models that have it from elsewhere.
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
