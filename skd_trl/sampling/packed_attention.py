"""Attention that never copies a key or a value for the query heads that share it (grouped-query attention, Ainslie et al., 2023).

transformers' `sdpa` repeats keys and values per query head wherever there are a mask and several queries: half of what a GPU did in a
round. Here the queries of a group are packed into the query axis. A long block is read once for each member of
the group instead, since the packed mask would be as large as the copies. The model keeps its name for attention, `sdpa`, because some
models look at it.

Shapes: N rows, A query heads, K key heads, n = A / K, Q queries, L slots, D head size.
"""

from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


# Queries of a group beyond which packing copies more of the mask than it saves: a draft is shorter, a prompt is longer.
MOST_PACKED_QUERIES = 128
# On CPU SDPA reads shared heads by itself, which is as fast from here on (SmolLM2's heads, 300 slots).
MOST_PACKED_QUERIES_ON_CPU = 16


@contextmanager
def packed_query_groups():
    """Has models that attend by transformers' `sdpa` attend by [`packed_attention`] for a while; another function that was
    registered under that name stays."""
    if ALL_ATTENTION_FUNCTIONS["sdpa"] is not sdpa_attention_forward:
        yield
        return
    ALL_ATTENTION_FUNCTIONS["sdpa"] = packed_attention
    try:
        yield
    finally:
        ALL_ATTENTION_FUNCTIONS["sdpa"] = sdpa_attention_forward


def packed_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **settings,
) -> tuple[torch.Tensor, None]:
    """What transformers' `sdpa` gives, up to rounding: `query` (N, A, Q, D), `key` and `value` (N, K, L, D), a mask (N, 1 or A, Q, L);
    the output is (N, Q, A, D). Calls without a mask, with dropout or with a position bias are left to it."""
    group_size, num_queries = query.shape[1] // key.shape[1], query.shape[2]
    is_plain = attention_mask is not None and not settings.get("dropout") and settings.get("position_bias") is None
    if not is_plain or settings.get("softcap") is not None or group_size == 1:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **settings)
    on_cpu, arguments = query.device.type == "cpu", (query, key, value, attention_mask, scaling)
    if group_size * num_queries <= (MOST_PACKED_QUERIES_ON_CPU if on_cpu else MOST_PACKED_QUERIES):
        output = attend_packed(*arguments)
    elif on_cpu:
        output = scaled_dot_product_attention(
            query, key, value, attn_mask=attention_mask, scale=scaling, enable_gqa=True
        )
    else:
        output = attend_by_member(*arguments)
    return output.transpose(1, 2).contiguous(), None


def attend_packed(query, key, value, mask: torch.Tensor, scaling: float | None) -> torch.Tensor:
    """All queries of a group as one long block: (N, A, Q, D)."""
    num_groups, group_size = key.shape[1], query.shape[1] // key.shape[1]
    if mask.shape[1] > 1:
        mask = mask.unflatten(1, (num_groups, group_size)).flatten(2, 3)
    elif query.shape[2] > 1:  # SDPA broadcasts a mask for one query
        mask = mask.repeat(1, 1, group_size, 1)
    packed = query.unflatten(1, (num_groups, group_size)).flatten(2, 3)
    output = scaled_dot_product_attention(packed, key, value, attn_mask=mask, scale=scaling)
    return output.unflatten(2, (group_size, query.shape[2])).flatten(1, 2)


def attend_by_member(query, key, value, mask: torch.Tensor, scaling: float | None) -> torch.Tensor:
    """The first head of every group, then the second, and so on: (N, A, Q, D)."""
    num_groups, group_size = key.shape[1], query.shape[1] // key.shape[1]
    queries = query.unflatten(1, (num_groups, group_size)).unbind(2)
    masks = mask.expand(-1, query.shape[1], -1, -1).unflatten(1, (num_groups, group_size)).unbind(2)
    outputs = [
        scaled_dot_product_attention(own, key, value, attn_mask=mask, scale=scaling)
        for own, mask in zip(queries, masks, strict=True)
    ]
    return torch.stack(outputs, dim=2).flatten(1, 2)
