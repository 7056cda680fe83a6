"""The layers of a key/value cache in which every row has its own length: keys and values in slots, beside recurrent states if any.

A row writes the keys and values of the token at position `p` into slot `p` of a preallocated buffer. What lies beyond a row's length is
masked by whoever runs the model, and overwritten later.

Shapes: B rows of the cache, N rows of one forward, Q new tokens of each of these rows, L slots.
"""

from collections.abc import Sequence

import torch
from transformers import cache_utils
from transformers.cache_utils import CacheLayerMixin

from .mixers import has_stateful_layers


def ragged_layers(config, num_rows: int, num_slots: int, window: "Window") -> list:
    """For each layer what transformers would take, with keys and values in slots."""
    layers = [RaggedLayer(num_rows, num_slots, window) for _ in range(config.num_hidden_layers)]
    if not has_stateful_layers(config):
        return layers
    for number, layer in enumerate(cache_utils.DynamicCache(config=config).layers):
        if isinstance(layer, cache_utils.LinearAttentionLayer):
            has_attention = isinstance(layer, CacheLayerMixin)
            layers[number] = (
                RaggedHybridLayer(num_rows, num_slots, window, layer.number_of_states) if has_attention else layer
            )
    return layers


class RaggedLayer(CacheLayerMixin):
    """Keys and values of one layer, (B, heads, L, head size), written at (row, position) of the current forward."""

    is_sliding = False
    is_compileable = False

    def __init__(self, num_rows: int, num_slots: int, window: "Window"):
        super().__init__()
        self.num_rows, self.num_slots, self.window = num_rows, num_slots, window
        self.indexer_keys: torch.Tensor | None = None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        # Zeros, not empty: a masked slot's probability is 0, and 0 x NaN is NaN.
        self.keys, self.values = (
            states.new_zeros(self.num_rows, states.shape[1], self.num_slots, states.shape[3])
            for states in (key_states, value_states)
        )
        self.is_initialized = True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        row, column, stop = self.window.index, self.window.positions, self.window.num_slots_in_use
        self.keys[row, :, column] = key_states.transpose(1, 2).to(self.keys.dtype)
        self.values[row, :, column] = value_states.transpose(1, 2).to(
            self.values.dtype
        )  # under autocast not the keys'
        return self.keys[self.window.rows, :, :stop], self.values[self.window.rows, :, :stop]

    def update_indexer(self, indexer_key_states: torch.Tensor) -> torch.Tensor:
        """The keys (N, L, size) by which indexed attention chooses what it sees, kept as the others are."""
        if self.indexer_keys is None:
            size = self.num_rows, self.num_slots, indexer_key_states.shape[-1]
            self.indexer_keys = indexer_key_states.new_zeros(size)
        self.indexer_keys[self.window.index, self.window.positions] = indexer_key_states.to(self.indexer_keys.dtype)
        return self.indexer_keys[self.window.rows, : self.window.num_slots_in_use]

    def move_row(self, source: int, target: int) -> None:
        for states in (self.keys, self.values, self.indexer_keys):
            if states is not None:
                states[target] = states[source]

    def spread_first_row(self, num_slots: int) -> None:
        if self.is_initialized:
            for states in (self.keys, self.values):
                states[1:, :, :num_slots] = states[:1, :, :num_slots]
        if self.indexer_keys is not None:
            self.indexer_keys[1:, :num_slots] = self.indexer_keys[:1, :num_slots]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.window.num_slots_in_use, 0

    def get_seq_length(self) -> int:
        return 0  # rows differ: positions and masks are always given

    def get_max_length(self) -> int:
        return self.num_slots

    get_max_cache_shape = get_max_length  # its name before transformers 5.13


if hasattr(cache_utils, "LinearAttentionLayer"):

    class RaggedHybridLayer(cache_utils.LinearAttentionLayer, RaggedLayer):
        """A layer with keys and values in slots, and states beside them."""

        is_compileable = False

        def __init__(self, num_rows: int, num_slots: int, window: "Window", number_of_states: int):
            RaggedLayer.__init__(self, num_rows, num_slots, window)
            cache_utils.LinearAttentionLayer.__init__(self, number_of_states=number_of_states)

        def lazy_initialization(self, *args, **kwargs) -> None:
            # transformers gives keys and values by position, states by name.
            owner = RaggedLayer if args else cache_utils.LinearAttentionLayer
            owner.lazy_initialization(self, *args, **kwargs)

        def get_max_length(self) -> int:
            return RaggedLayer.get_max_length(self)


class Window:
    """Where the current forward reads and writes; shared by all layers of one cache."""

    def __init__(self, every_row: torch.Tensor):
        self.every_row = every_row

    def set(self, rows: Sequence[int], positions: torch.Tensor, num_slots_in_use: int) -> None:
        self.positions, self.num_slots_in_use = positions, num_slots_in_use
        if isinstance(rows, range) or list(rows) == list(range(rows[0], rows[-1] + 1)):
            # Neighbours are read where they are.
            self.rows: slice | torch.Tensor = slice(rows[0], rows[-1] + 1)
            index = self.every_row[self.rows]
        else:
            self.rows = index = torch.tensor(rows, device=positions.device)
        self.index = index[:, None]
