"""The student's step in a shape that never changes, so that `torch.compile`, and CUDA graphs with it, can take it.

A draft is G forwards of one token each, and on a GPU a small student spends them waiting for the launches of its kernels.
Elsewhere rows that end leave the batch and the attention reads no further than the longest row; both change the shapes of
every round. Here all rows of the cache take part and all slots are read, which costs a GPU little.

Shapes: B rows of the cache, N live ones, L slots, V vocabulary.
"""

import torch
from torch import nn
from transformers import Cache

from .ragged_cache import RaggedDecoder, attention_implementation


def compiled_step(decoder: RaggedDecoder, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """The logits (N, 1, V) after one more token (N, 1) of the first N rows, at `positions` (N, 1): what
    `decoder(tokens, positions)` gives, up to rounding.

    Compiled at the first call, and again for another model, another B or another L: give decoders a number of slots from
    [`whole_slots`], and the windows of a training share one graph.
    """
    if not decoder.layers[0].is_initialized:  # buffers have to be there before anything is traced
        return decoder(tokens, positions)[1]
    num_live, device = len(tokens), tokens.device
    all_tokens, all_positions = (
        torch.full((decoder.num_rows, 1), fill, dtype=torch.long, device=device)
        # A place that holds no row writes into its last slot: the first ones may hold a beginning that all prompts share.
        for fill in (0, decoder.num_slots - 1)
    )
    all_tokens[:num_live], all_positions[:num_live] = tokens, positions
    decoder.window.set(0, all_positions, decoder.num_slots)
    masks = decoder.masks(all_positions, decoder.num_slots)
    with attention_implementation(decoder.model, decoder.attn_implementation):
        if device.type == "cuda":
            torch.compiler.cudagraph_mark_step_begin()
        logits = _COMPILED[device.type == "cuda"](decoder.model, decoder.cache, all_tokens, masks, all_positions)
    return logits[:num_live].clone()  # the next replay of a graph writes over its output


def whole_slots(num_slots: int, multiple: int = 128) -> int:
    """At least `num_slots`, and few enough different numbers."""
    return -(-num_slots // multiple) * multiple


def _forward(model: nn.Module, cache: Cache, tokens, masks, positions) -> torch.Tensor:
    return model(
        input_ids=tokens, attention_mask=masks, position_ids=positions, past_key_values=cache, use_cache=True
    ).logits


# On CUDA "reduce-overhead" records CUDA graphs.
_COMPILED = {
    is_cuda: torch.compile(_forward, dynamic=False, mode="reduce-overhead" if is_cuda else "default")
    for is_cuda in (False, True)
}
