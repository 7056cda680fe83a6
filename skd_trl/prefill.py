"""Which prompts to prefill together: every forward costs something of its own, and every prompt in it is padded to the longest.

Shapes: rows of prompts, cut into groups of neighbours after sorting by length.
"""

import torch


# Tokens in one forward, so that a window of many long prompts does not decide the peak of memory.
MOST_TOKENS = 16384


def prefill_groups(lengths: list[int], forward_cost: int, most_tokens: int = MOST_TOKENS) -> list[list[int]]:
    """
    Cuts prompts into groups with the lowest cost: for each group `forward_cost`, and its size times its longest length.

    The best groups are runs of the sorted lengths, so that the cheapest cut of the first j of them follows from the
    cheapest cuts of fewer.

    Args:
        lengths (`list[int]`):
            Tokens to prefill of each prompt.
        forward_cost (`int`):
            What one more forward costs, in tokens.
        most_tokens (`int`, *optional*, defaults to `16384`):
            No group has more tokens, padding included, unless it is one prompt.

    Returns:
        `list[list[int]]`: indices into `lengths`, the shortest first.
    """
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    costs, starts = [0], [0]
    for stop in range(1, len(order) + 1):
        longest = lengths[order[stop - 1]]
        best = None
        for start in range(stop - 1, -1, -1):
            num_tokens = (stop - start) * longest
            if num_tokens > most_tokens and start < stop - 1:
                break
            cost = costs[start] + forward_cost + num_tokens
            if best is None or cost < best[0]:
                best = cost, start
        assert best is not None
        costs.append(best[0])
        starts.append(best[1])
    groups, stop = [], len(order)
    while stop > 0:
        groups.append(order[starts[stop] : stop])
        stop = starts[stop]
    return groups[::-1]


def forward_cost(device: torch.device) -> int:
    """What one more forward costs in tokens, roughly: on CPU reading the weights; elsewhere also launching its kernels,
    while the device would have run many tokens more."""
    return 32 if device.type == "cpu" else 1024
