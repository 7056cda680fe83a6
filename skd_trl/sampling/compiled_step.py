"""The student's step in a shape that never changes, so that `torch.compile`, and CUDA graphs with it, can take it.

A draft is G forwards of one token each, and on a GPU a small student spends them waiting for the launches of its kernels.
Elsewhere rows that end leave the batch and the attention reads no further than the longest row; both change the shapes of
every round. Here all rows of the cache take part and all slots are read, which costs a GPU little.

Shapes: B rows of the cache, N live ones, L slots, V vocabulary.
"""

from functools import cache

import torch
from torch import nn
from transformers import Cache

from .ragged_cache import RaggedDecoder, attention_implementation


class CompiledStudent:
    """A student's compiled step, with the cache that it runs on. Give the same object to every call of
    [`~skd_trl.interleaved_sample`] with the same student: a graph belongs to the sizes it was made for, and a recorded CUDA
    graph to the very memory, so the cache is kept between calls, and replaced only when one needs more rows or slots.
    """

    def __init__(self):
        self._decoder: RaggedDecoder | None = None
        self._is_marked = False

    @staticmethod
    def of(compile_student: "bool | CompiledStudent") -> "CompiledStudent | None":
        """What `interleaved_sample` runs for `False`, `True` (compiled for one call) or a kept object."""
        return CompiledStudent() if compile_student is True else compile_student or None

    def decoder(self, model: nn.Module, num_rows: int, num_slots: int) -> RaggedDecoder:
        """A decoder of at least so many rows and slots: the last one if it will do."""
        last = self._decoder if self._decoder is not None and self._decoder.model is model else None
        if last is None or last.num_rows < num_rows or last.num_slots < num_slots:
            if last is not None:
                # Each size is a compilation, of which dynamo does eight: twice the slots at least.
                num_rows = max(num_rows, last.num_rows)
                num_slots = last.num_slots if num_slots <= last.num_slots else max(num_slots, 2 * last.num_slots)
            num_slots = -(-num_slots // 128) * 128  # few different numbers
            self._decoder, self._is_marked = RaggedDecoder(model, num_rows, num_slots), False
        assert self._decoder is not None
        return self._decoder

    def step(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """The logits (N, 1, V) after one more token (N, 1) of the decoder's first N rows, at `positions` (N, 1): what
        `decoder(tokens, positions)` gives, up to rounding."""
        decoder = self._decoder
        assert decoder is not None
        if not decoder.layers[0].is_initialized:  # the buffers have to be there before anything is traced
            return decoder(tokens, positions)[1]
        if not self._is_marked:
            for layer in decoder.layers:
                if layer.is_initialized:  # a layer that uses another one's keys and values has none
                    for states in (layer.keys, layer.values):
                        torch._dynamo.mark_static_address(states)  # CUDA graphs may then write into them
            self._is_marked = True
        # A place without a row repeats the first one's input in a slot of its own, which whoever comes there overwrites.
        all_tokens, all_positions = (
            torch.cat([values, values[:1].expand(decoder.num_rows - len(values), 1)]) for values in (tokens, positions)
        )
        decoder.window.set(range(decoder.num_rows), all_positions, decoder.num_slots)
        masks = decoder.masks(all_positions, decoder.num_slots)
        on_cuda = tokens.device.type == "cuda"
        with attention_implementation(decoder.model, decoder.attn_implementation):
            if on_cuda:
                torch.compiler.cudagraph_mark_step_begin()
            forward = _compiled("reduce-overhead" if on_cuda else "default")  # the former records CUDA graphs
            logits = forward(decoder.model, decoder.cache_argument, all_tokens, masks, all_positions)
        return logits[: len(tokens)].clone()  # the next replay of a graph writes over its output


def _forward(model: nn.Module, cache: dict[str, Cache], tokens, masks, positions) -> torch.Tensor:
    return model(input_ids=tokens, attention_mask=masks, position_ids=positions, use_cache=True, **cache).logits


@cache
def _compiled(mode: str):
    return torch.compile(_forward, dynamic=False, mode=mode)
