"""How rounds are run: as they are, or captured once for each shape and replayed, which on a GPU is five to ten times as fast.

A round is a function over fixed buffers, so a CUDA graph of it does what it does. A graph belongs to the shapes and addresses it was
captured with: rows, slots and draft lengths come in few numbers, buffers and caches are kept for as long as they are large enough, and
weights change in place (where they were moved, graphs are captured again). The first round of a shape runs as it is and is the warm-up;
the second is captured, and replayed from then on. What cannot be captured (a rule that waits for the device, experts in a loop) is found
by trying (`cuda_graph.py`), and runs as it is.

Shapes: R places, L slots.
"""

import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers.utils import logging

from .cuda_graph import CudaGraph, Graph, without_autocast_cache
from .draft_length import Stopwatch
from .packed_weights import PackedWeights
from .ragged_cache import RaggedDecoder, has_shards


logger = logging.get_logger(__name__)
Signal = dict[str, torch.Tensor]

# Where shapes are to be few, slots are multiples of this.
SLOTS = 128
# Kept graphs; the least recently used ones go first. A rule whose numbers are scheduled has new ones in each step.
MOST_GRAPHS = 64
# Shapes that are known to have run once; forgotten in the same order.
MOST_WARM = 16 * MOST_GRAPHS
# Share of the device's memory that caches may keep between calls, where nobody knows how much is needed in between. Larger ones are given
# back, and their graphs with them.
KEPT_SHARE = 1 / 8


@dataclass(frozen=True, eq=False)
class Same:
    """An object as a part of a key: equal to itself alone, whatever `==` says. Whoever has the key keeps the object, so no other one can
    have its address."""

    value: object = field(repr=False)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


def by_value(rule: object) -> Hashable:
    """A rule as part of a key. One whose own class says which are equal, as a dataclass does, by value (one that holds a list by its
    repr). A class that only inherits `==` does not compare what it adds: then the class and what the rule holds, numbers by value and
    all else as the object that it is."""
    own = vars(type(rule))
    if "__eq__" in own:
        try:
            hash(rule)
            return rule
        except TypeError:
            return (type(rule), repr(rule)) if "__repr__" in own else Same(rule)
    if any(getattr(kind, "__slots__", ()) for kind in type(rule).__mro__):
        return Same(rule)
    held = vars(rule).items()
    return type(rule), *((name, x if isinstance(x, bool | int | float | str) else Same(x)) for name, x in held)


class Rounds:
    """Runs rounds, and keeps between calls of [`~skd_trl.interleaved_sample`] what captured or compiled ones belong to: give the
    same object to every call with the same models.

    Args:
        capture (`bool`, *optional*):
            Whether rounds are captured as CUDA graphs. By default where the models are on CUDA.
        compile (`bool`, *optional*, defaults to `False`):
            Whether both models' forwards in a round go through `torch.compile`: a minute or two at first, for long runs. With
            `capture` its kernels are inside the graphs.
        make_graph (`Callable`, *optional*): makes a [`Graph`] for a device, instead of a CUDA graph.

    Attributes:
        most_kept (`int`, *optional*):
            Bytes of caches that may be kept between calls on a GPU. By default an eighth of its memory.
    """

    def __init__(
        self, capture: bool | None = None, compile: bool = False, make_graph: Callable[[], Graph] | None = None
    ):
        self.capture, self.compile, self.make_graph = capture, compile, make_graph
        self.most_kept: int | None = None
        self.packed = PackedWeights()
        self.buffers: dict[str, torch.Tensor] = {}
        self.decoders: dict[str, RaggedDecoder] = {}
        self.graphs: OrderedDict[Hashable, tuple[Graph, Stopwatch, Signal]] = OrderedDict()
        self.warm: OrderedDict[Hashable, None] = OrderedDict()
        self.mode: tuple | None = None  # of the last call, in which buffers and caches were made
        self.reason: str | None = None  # why something was not captured
        self.has_failed = False  # then nothing is tried any more
        self.is_tried = False  # whether a round has run in which a wait is an error
        self.is_capturing, self.pool, self.stream = False, None, None

    @contextmanager
    def session(self, device: torch.device, can_be_captured: bool):
        """The time of one call. What is no use to the next one is given back."""
        wanted = device.type == "cuda" if self.capture is None else self.capture
        if wanted and not can_be_captured:
            self._say_once("weights are sharded or forwards collective, or a participant is not made for it")
        self.is_capturing = wanted and can_be_captured and not self.has_failed
        is_autocast = torch.is_autocast_enabled(device.type)
        precision = torch.get_autocast_dtype(device.type) if is_autocast else None
        mode = device, precision, torch.is_inference_mode_enabled()
        if self.mode not in (None, mode):  # caches would be of another type, or tensors that may not be written to
            self.release()
        self.mode = mode
        if self.is_capturing and self.make_graph is None and device.type != "cuda":
            raise ValueError(f"capture=True needs models on CUDA, and these are on {device.type}. Leave it None.")
        try:
            yield
        finally:
            if not self.has_fixed_shapes or self.num_kept_bytes > self._most_kept(device):
                self.release()

    @property
    def num_kept_bytes(self) -> int:
        """Bytes of the caches that are there."""
        return sum(decoder.num_bytes for decoder in self.decoders.values())

    def _most_kept(self, device: torch.device) -> float:
        if self.most_kept is not None:
            return self.most_kept
        if device.type != "cuda":
            return float("inf")
        return torch.cuda.get_device_properties(device).total_memory * KEPT_SHARE

    def products(self, model: nn.Module):
        """The time in which a CPU multiplies with packed copies of a model's weights; what is compiled has products of its compiler."""
        return nullcontext() if self.compile else self.packed.products(model)

    @property
    def has_fixed_shapes(self) -> bool:
        """Whether few different shapes are worth more than small ones."""
        return self.is_capturing or self.compile

    def release(self) -> None:
        """Gives back caches, buffers and graphs."""
        self.forget_graphs()
        for name in list(self.decoders):
            self._drop(name)
        self.buffers = {}

    def _drop(self, name: str) -> None:
        self.forget_graphs()
        self.decoders.pop(name).head_input.close()

    def forget_graphs(self) -> None:
        self.graphs.clear()
        self.warm.clear()
        self.pool = None  # torch refuses one whose graphs are gone for as long as there is memory in it

    # Shapes

    def num_rows(self, num_live: int, num_places: int) -> int:
        """Places in use where `num_live` rows are written: powers of two and the numbers half-way between them."""
        if not self.has_fixed_shapes:
            return num_live
        if self.compile:  # each number is a compilation
            return num_places
        power = 1 << max(num_live - 1, 0).bit_length()
        return min(num_places, power * 3 // 4 if power >= 4 and num_live <= power * 3 // 4 else power)

    def num_slots(self, num_needed: int, num_slots: int) -> int:
        """Slots that attention reads, of a cache with `num_slots`."""
        if not self.has_fixed_shapes:
            return num_needed
        unit = SLOTS
        while self.compile and unit < num_needed:  # each is a compilation
            unit *= 2
        return min(-(-num_needed // unit) * unit, num_slots)

    def num_draft(self, num_draft: int, lengths: tuple[int, ...]) -> int:
        """The draft length of a round for which `num_draft` was chosen, one of `lengths`. A block may run over the end of its rows."""
        return min(length for length in lengths if length >= num_draft) if self.has_fixed_shapes else num_draft

    # What is kept

    def buffer(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Memory of at least this shape, under a name: what is in it is anything. The same as in the last call if that will do."""
        kept = self.buffers.get(name)
        if kept is not None and kept.dtype == dtype and kept.device == device and kept.ndim == len(shape):
            if all(have >= need for have, need in zip(kept.shape, shape, strict=True)):
                return kept
            shape = tuple(max(sizes) for sizes in zip(kept.shape, shape, strict=True))
        if kept is not None:
            self.forget_graphs()
        self.buffers[name] = torch.zeros(shape, dtype=dtype, device=device)
        return self.buffers[name]

    def decoder(self, name: str, model: nn.Module, num_rows: int, num_slots: int) -> RaggedDecoder:
        """A decoder of at least so many rows and slots for a participant called `name`: the last one if it will do."""
        last = self.decoders.get(name)
        if last is not None:
            if last.model is model and last.dtype == next(model.parameters()).dtype:
                if last.num_rows >= num_rows and last.num_slots >= num_slots:
                    if last.has_model_changed():
                        self.forget_graphs()
                    return last
                num_rows, num_slots = max(num_rows, last.num_rows), max(num_slots, last.num_slots)
            del last  # before the next one is allocated
            self._drop(name)
        if self.has_fixed_shapes:
            num_slots = -(-num_slots // SLOTS) * SLOTS
        compile = self.compile and not has_shards(model)
        self.decoders[name] = decoder = RaggedDecoder(model, num_rows, num_slots, compile)
        decoder.has_model_changed()
        return decoder

    # One round

    def run(
        self,
        key: Hashable,
        play: Callable[[Stopwatch], Signal],
        device: torch.device,
        hold: Callable[[], Callable[[], None]],
    ) -> tuple[Stopwatch, Signal, bool]:
        """Runs `play`, a round of the shape `key`; `hold` returns what puts back all that a round changes and reads. Returns the stopwatch with
        its marks, what `play` returns, and whether this was a warm-up, whose times say nothing of the rounds to come."""
        if self.is_capturing and key in self.graphs:
            return self._replay(key)
        with without_autocast_cache() if self.has_fixed_shapes else nullcontext():
            is_new = key not in self.warm
            if self.is_capturing and not is_new:
                if not self.is_tried:
                    found = self._try(play, device, hold)
                    if found is not None:
                        return *found, True
                elif self._capture(key, play, device):
                    return self._replay(key)
            self.warm[key] = None
            while len(self.warm) > MOST_WARM:
                self.warm.popitem(last=False)
            stopwatch, before = Stopwatch(device), self.packed.num_bytes
            signal = play(stopwatch)
            return stopwatch, signal, (is_new and self.has_fixed_shapes) or self.packed.num_bytes > before

    def _replay(self, key: Hashable) -> tuple[Stopwatch, Signal, bool]:
        self.graphs.move_to_end(key)
        graph, stopwatch, signal = self.graphs[key]
        graph.replay()
        return stopwatch, signal, False

    def _try(
        self, play: Callable[[Stopwatch], Signal], device: torch.device, hold: Callable[[], Callable[[], None]]
    ) -> tuple[Stopwatch, Signal] | None:
        """A round as it is, in which a wait for the device is an error. `None` if there is one, with all as it was before the round."""
        self.is_tried, stopwatch, put_back = True, Stopwatch(device), hold()
        try:
            with self._new_graph(device).trial():
                return stopwatch, play(stopwatch)
        except Exception as error:  # whatever a forward or a rule may do that no graph can
            put_back()
            self._give_up(error)
            return None

    def _capture(self, key: Hashable, play: Callable[[Stopwatch], Signal], device: torch.device) -> bool:
        start, stopwatch, signals = time.perf_counter(), Stopwatch(device, in_graph=True), []
        graph = self._new_graph(device)
        try:
            graph.capture(lambda: signals.append(play(stopwatch)))
        except Exception as error:  # a library that asks the device in its own way
            self._give_up(error)
            return False
        self.graphs[key] = graph, stopwatch, signals[0]
        while len(self.graphs) > MOST_GRAPHS:
            self.graphs.popitem(last=False)
        logger.info(f"Captured the sampling round {key} in {time.perf_counter() - start:.1f} s.")
        return True

    def _new_graph(self, device: torch.device) -> Graph:
        if self.make_graph is not None:
            return self.make_graph()
        # Libraries keep a workspace for each stream, and give it back when a graph of it goes: no others may capture on this one.
        self.stream = self.stream or torch.cuda.Stream(device)
        self.pool = self.pool or torch.cuda.graph_pool_handle()
        return CudaGraph(self.pool, self.stream)

    def _give_up(self, error: BaseException) -> None:
        self.is_capturing, self.has_failed = False, True
        while error.__context__ is not None:  # ending a capture that failed raises once more
            error = error.__context__
        self._say_once(f"{type(error).__name__}: {error}".strip().splitlines()[0][:300])

    def _say_once(self, reason: str) -> None:
        if self.reason is None:
            self.reason = reason
            logger.warning(f"Sampling rounds are not captured as CUDA graphs and run slower: {reason}.")
