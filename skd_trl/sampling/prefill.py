"""Which prompts to prefill together: every forward has a fixed cost, and every prompt in it is padded to the longest.

Shapes: N rows, Q tokens of a prefill.
"""

import math

import torch


# Tokens in one forward, so a window of many long prompts does not decide the peak of memory.
MOST_TOKENS = 16384


def prefill_groups(lengths: list[int], cost_of_forward: int, most_tokens: int = MOST_TOKENS) -> list[list[int]]:
    """
    Cuts prompts into groups with the lowest cost: for each group `cost_of_forward`, and its size times its longest length.

    The best groups are runs of the sorted lengths, so the cheapest cut of the first prompts follows from the cheapest
    cuts of fewer.

    Args:
        lengths (`list[int]`):
            Tokens to prefill of each prompt.
        cost_of_forward (`int`):
            What one more forward costs, in tokens.
        most_tokens (`int`, *optional*, defaults to `16384`):
            No group has more tokens, padding included, unless it is one prompt.

    Returns:
        `list[list[int]]`: indices into `lengths`, the shortest first.
    """
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    # Of the first prompts, by their number: the lowest cost, and where its last group starts.
    cuts: list[tuple[float, int]] = [(0, 0)]
    for stop, prompt in enumerate(order, start=1):
        longest = lengths[prompt]
        most = max(1, most_tokens // max(1, longest))
        starts = range(max(0, stop - most), stop)
        if stop < len(order) and lengths[order[stop]] == longest:
            # Of prompts of equal length a later one costs this group no more than the next: only a full group parts them.
            starts = starts[:1] if len(starts) == most else starts[:0]
        costs = ((cuts[start][0] + cost_of_forward + (stop - start) * longest, start) for start in starts)
        cuts.append(min(costs, default=(math.inf, 0)))
    groups, stop = [], len(order)
    while stop > 0:
        start = cuts[stop][1]
        groups.append(order[start:stop])
        stop = start
    return groups[::-1]


def groups_of_equal_length(lengths: list[int], most_tokens: int = MOST_TOKENS) -> list[list[int]]:
    """Prompts that need no padding, for models whose state would keep it: indices into `lengths`, the shortest first."""
    groups = []
    for length in sorted(set(lengths)):
        same = [prompt for prompt, other in enumerate(lengths) if other == length]
        size = max(1, most_tokens // max(1, length))
        groups += [same[start : start + size] for start in range(0, len(same), size)]
    return groups


def left_padded(
    tokens: torch.Tensor, positions: torch.Tensor, lengths: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Moves the padding of right-padded `tokens` (N, Q) and their `positions` (N, Q) to the left, with its positions: what it writes
    into the key/value cache still lies beyond the end of the prompt. Also returns a mask (N, Q), 0 at padding."""
    column = torch.arange(tokens.shape[1], device=tokens.device) - (tokens.shape[1] - lengths)[:, None]
    source = column % tokens.shape[1]
    return tokens.gather(1, source), positions.gather(1, source), (column >= 0).long()


def cost_of_forward(device: torch.device) -> int:
    """What one more forward costs in tokens, roughly: on CPU reading the weights; elsewhere also launching its kernels,
    while the device would have run many tokens more."""
    return 32 if device.type == "cpu" else 1024
