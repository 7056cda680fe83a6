from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_sampler import PROMPTS, responses, sample
from tiny import tiny_model

from skd_trl import rollout
from skd_trl.acceptance import ACCEPTANCE_RULES
from skd_trl.prefill import prefill_groups


def cost(groups, lengths, forward_cost):
    return sum(forward_cost + len(group) * max(lengths[i] for i in group) for group in groups)


def partitions(items):
    """All ways to cut a set into groups."""
    if not items:
        yield []
        return
    first, rest = items[0], items[1:]
    for size in range(len(rest) + 1):
        for others in combinations(rest, size):
            remaining = [item for item in rest if item not in others]
            yield from ([[first, *others], *partition] for partition in partitions(remaining))


@settings(deadline=None, max_examples=150)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=6), st.integers(0, 30), st.integers(20, 90))
def test_no_way_to_cut_prompts_into_groups_is_cheaper(lengths, forward_cost, most_tokens):
    groups = prefill_groups(lengths, forward_cost, most_tokens)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))

    def is_allowed(groups):
        return all(len(g) == 1 or len(g) * max(lengths[i] for i in g) <= most_tokens for g in groups)

    assert is_allowed(groups)
    allowed = filter(is_allowed, partitions(list(range(len(lengths)))))
    assert cost(groups, lengths, forward_cost) == min(cost(g, lengths, forward_cost) for g in allowed)


def test_no_prompts_make_no_group():
    assert prefill_groups([], 32) == []


@pytest.fixture
def counted(monkeypatch):
    """Two models, and a list of the shapes that each is fed."""
    monkeypatch.setattr(rollout, "forward_cost", lambda device: 3)
    models, shapes = [], []
    for seed in (1, 2):
        model = tiny_model(seed=seed)
        shapes.append([])
        model.get_input_embeddings().register_forward_hook(
            lambda module, args, out, seen=shapes[-1]: seen.append(tuple(args[0].shape))
        )
        models.append(model)
    return models, shapes


@pytest.mark.parametrize("max_rows", [None, 3, 1])
def test_prompts_of_like_length_are_prefilled_together_and_texts_stay_the_same(counted, max_rows):
    (student, teacher), shapes = counted
    uniforms = torch.rand((4, 12, 3), generator=torch.Generator().manual_seed(3))
    rule = ACCEPTANCE_RULES["top_k"](k=60)
    together = responses(sample(student, teacher, rule=rule, uniforms=uniforms, max_rows=max_rows))
    # Without their last tokens the prompts have 2, 0, 10 and 4; with one place each is run alone, and 0 not at all.
    first = {None: [(2, 2), (1, 4), (1, 10)], 3: [(2, 2), (1, 10)], 1: [(1, 2)]}[max_rows]
    for seen in shapes:
        assert seen[: len(first)] == first
    for row, prompt in enumerate(PROMPTS):
        assert responses(sample(student, teacher, [prompt], rule, uniforms=uniforms[row : row + 1])) == [together[row]]


def test_a_rank_with_fewer_groups_idles_while_others_prefill(counted):
    (student, teacher), shapes = counted
    alone, behind = [], []

    def one_more(num_prefills, num_draft):
        return num_prefills + (num_prefills > 0), num_draft

    for agree, seen in ((lambda *numbers: numbers, alone), (one_more, behind)):
        generator = torch.Generator().manual_seed(0)
        rollout_ = sample(student, teacher, generator=generator, agree=agree)
        seen.append(responses(rollout_))
        for shape in shapes:
            seen.append(list(shape))
            shape.clear()
    assert behind[0] == alone[0]
    for with_idle, without in zip(behind[1:], alone[1:], strict=True):
        assert with_idle == [*without[:3], (1, 1), *without[3:]]
