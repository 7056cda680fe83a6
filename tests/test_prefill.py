from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_sampler import PROMPTS, responses, sample
from tiny import ARCHITECTURES, tiny_model

from skd_trl.sampling import participants
from skd_trl.sampling.acceptance import ACCEPTANCE_RULES
from skd_trl.sampling.admission import prove
from skd_trl.sampling.prefill import prefill_groups


def cost(groups, lengths, cost_of_forward):
    return sum(cost_of_forward + len(group) * max(lengths[i] for i in group) for group in groups)


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
@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=6)
    | st.lists(st.sampled_from([7, 8, 30]), min_size=4, max_size=7),
    st.integers(0, 30),
    st.integers(20, 90),
)
def test_no_way_to_cut_prompts_into_groups_is_cheaper(lengths, cost_of_forward, most_tokens):
    groups = prefill_groups(lengths, cost_of_forward, most_tokens)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))

    def is_allowed(groups):
        return all(len(g) == 1 or len(g) * max(lengths[i] for i in g) <= most_tokens for g in groups)

    assert is_allowed(groups)
    allowed = filter(is_allowed, partitions(list(range(len(lengths)))))
    assert cost(groups, lengths, cost_of_forward) == min(cost(g, lengths, cost_of_forward) for g in allowed)


def test_no_prompts_make_no_group():
    assert prefill_groups([], 32) == []


@pytest.fixture
def fed(monkeypatch):
    """Runs `sample` on two models; gives its rollout, and for each model the shapes of tokens that it was fed and how many
    of their positions went through its head."""
    monkeypatch.setattr(participants, "cost_of_forward", lambda device: 5)

    def run(architecture="llama", **kwargs):
        models, seen = [], []
        for seed in (1, 2):
            model, calls = tiny_model(architecture, seed=seed), []
            prove(model)  # whose forwards are not to be seen below
            model.get_input_embeddings().register_forward_hook(
                lambda module, args, out, calls=calls: calls.append([tuple(args[0].shape)])
            )
            model.get_output_embeddings().register_forward_hook(
                lambda module, args, out, calls=calls: calls[-1].append(out.shape[1])
            )
            models.append(model)
            seen.append(calls)
        return sample(*models, **kwargs), *([tuple(call) for call in calls] for calls in seen)

    return run


# Without their last tokens PROMPTS have 2, 0, 10 and 4.
@pytest.mark.parametrize("max_rows, first", [(None, [(3, 4), (1, 10)]), (3, [(2, 2), (1, 10)]), (1, [(1, 2)])])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_prompts_of_like_length_are_prefilled_together_without_logits_and_texts_stay_the_same(
    fed, architecture, max_rows, first
):
    uniforms = torch.rand((4, 12, 3), generator=torch.Generator().manual_seed(3))
    rule = ACCEPTANCE_RULES["top_k"](k=60)
    sampled, *calls = fed(architecture, rule=rule, noise=uniforms, max_rows=max_rows)
    for seen in calls:
        assert seen[: len(first)] == [(shape, 0) for shape in first]
        assert seen[len(first)][1] > 0
    for row, prompt in enumerate(PROMPTS):
        alone, *_ = fed(architecture, prompts=[prompt], rule=rule, noise=uniforms[row : row + 1])
        assert responses(alone) == [responses(sampled)[row]]


IDLE = ((1, 1), 1)


def test_a_rank_with_fewer_groups_waits_while_others_prefill(fed):
    def one_more(*numbers):
        return *(number + (number > 0) for number in numbers[:2]), numbers[2]

    (alone, *calls), (behind, *calls_behind) = (
        fed(noise=torch.Generator().manual_seed(0), agree=agree) for agree in (lambda *numbers: numbers, one_more)
    )
    assert responses(alone) == responses(behind)
    for seen, seen_behind in zip(calls, calls_behind, strict=True):
        assert seen_behind == [IDLE, *seen]


def test_a_prompt_of_one_token_needs_no_prefill(fed):
    _, *calls = fed(prompts=[[7]], max_new_tokens=1)
    assert calls == [[((1, 1), 1)]] * 2


def test_a_rank_without_a_prompt_runs_the_forwards_of_the_others(fed):
    """Two rounds of other ranks: two prefills of the student, one of the teacher, drafts of three and of two tokens."""
    others = iter([(2, 1, 3), (0, 0, 2), (0, 0, 0)])
    rollout, *calls = fed(prompts=[], agree=lambda *numbers: next(others))
    # The teacher's idle forwards have as many tokens as the others' blocks: modules may gather their weights for each.
    assert calls == [[IDLE] * 7, [IDLE, ((1, 3), 3), ((1, 2), 2)]]
    assert rollout.input_ids.shape == (0, 0)
