"""The batched, cached, block-wise sampler against the specification in `reference.py`."""


import pytest
import reference
import torch
from tiny import ARCHITECTURES, tiny_model

from skd_trl.acceptance import ACCEPTANCE_RULES
from skd_trl.sampler import interleaved_sample
from skd_trl.sampling_params import SamplingParams


PAD, EOS, V = 256, 257, 259
GREEDY = SamplingParams(temperature=0.0)
PROMPTS = [[5, 9, 200], [7], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11], [30, 31, 32, 33, 34]]


def left_padded(prompts):
    width = max(map(len, prompts))
    ids = torch.tensor([[PAD] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    return ids, mask


def sample(student, teacher, prompts=PROMPTS, rule=None, **kwargs):
    settings = {"num_draft_tokens": 3, "max_new_tokens": 12, "eos_token_ids": [EOS], "pad_token_id": PAD, **kwargs}
    return interleaved_sample(
        student, teacher, *left_padded(prompts), accept=rule or ACCEPTANCE_RULES["top_k"](k=3), **settings
    )


def responses(rollout, prompts=PROMPTS):
    return [row[row != -100].tolist() for row in rollout.labels]


def greedy_text(model, prompt, length):
    model, tokens = reference.in_float64(model), []
    while len(tokens) < length and (not tokens or tokens[-1] != EOS):
        tokens.append(int(reference.next_logits(model, prompt + tokens).argmax()))
    return tokens


@pytest.fixture(scope="module", params=ARCHITECTURES)
def pair(request):
    return tiny_model(request.param, seed=1), tiny_model(request.param, seed=2)


@pytest.mark.parametrize("num_draft_tokens", [1, 3, 6])
def test_accepting_all_of_the_vocabulary_greedily_is_the_students_greedy_text(pair, num_draft_tokens):
    student, teacher = pair
    rollout = sample(
        student,
        teacher,
        rule=ACCEPTANCE_RULES["top_k"](k=V),
        num_draft_tokens=num_draft_tokens,
        student_sampling=GREEDY,
        teacher_sampling=GREEDY,
    )
    assert responses(rollout) == [greedy_text(student, prompt, 12) for prompt in PROMPTS]
    assert not rollout.replaced.any()


@pytest.mark.parametrize("num_draft_tokens", [1, 3, 6])
def test_accepting_only_the_teachers_favourite_greedily_is_the_teachers_greedy_text(pair, num_draft_tokens):
    student, teacher = pair
    rollout = sample(
        student,
        teacher,
        rule=ACCEPTANCE_RULES["top_k"](k=1),
        num_draft_tokens=num_draft_tokens,
        student_sampling=GREEDY,
        teacher_sampling=GREEDY,
    )
    assert responses(rollout) == [greedy_text(teacher, prompt, 12) for prompt in PROMPTS]
    assert rollout.replaced.any()


def test_kept_tokens_are_in_the_teachers_top_k_and_saved_hidden_states_are_those_of_a_fresh_forward(pair):
    student, teacher = pair
    k, seen_kept, seen_replaced = 80, 0, 0
    rollout = sample(student, teacher, rule=ACCEPTANCE_RULES["top_k"](k=k), generator=torch.Generator().manual_seed(0))
    heads_input = []
    hook = teacher.get_output_embeddings().register_forward_pre_hook(lambda module, args: heads_input.append(args[0]))
    for row, prompt in enumerate(PROMPTS):
        response = responses(rollout)[row]
        with torch.no_grad():
            logits = teacher(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        fresh = heads_input[-1][0, len(prompt) - 1 : -1]
        reused = rollout.teacher_hidden_states[row, : len(response)]
        assert (reused - fresh).abs().max() < 2e-5 * fresh.abs().max()
        for position, token in enumerate(response):
            rank = int((logits[position] > logits[position, token]).sum())
            if rollout.replaced[row, position]:
                seen_replaced += 1
                assert rollout.teacher_rank[row, position] >= k
            else:
                seen_kept += 1
                assert rank < k
                assert rank == rollout.teacher_rank[row, position]
    hook.remove()
    assert seen_kept > 4 and seen_replaced > 4


SETTINGS = [  # student's and teacher's sampling
    ({}, {}),
    ({"temperature": 0.5, "top_p": 0.5}, {"temperature": 0.2, "top_p": 0.5}),  # the paper's
    ({"temperature": 1.3, "top_k": 7}, {"temperature": 0.8, "top_p": 0.9, "top_k": 40}),
]


@pytest.mark.parametrize("student_sampling, teacher_sampling", SETTINGS)
@pytest.mark.parametrize("num_draft_tokens, max_rows", [(1, None), (4, None), (5, 2), (6, 1)])
def test_every_row_equals_the_one_row_token_at_a_time_cache_free_reference(
    num_draft_tokens, max_rows, student_sampling, teacher_sampling
):
    student, teacher = tiny_model("llama", seed=1), tiny_model("llama", seed=2)
    uniforms = torch.rand((len(PROMPTS), 20, 3), generator=torch.Generator().manual_seed(3))
    eos = set(range(0, 259, 9))  # many, so that rows end early and at different lengths
    rollout = sample(
        student,
        teacher,
        rule=ACCEPTANCE_RULES["top_k"](k=25),
        num_draft_tokens=num_draft_tokens,
        max_rows=max_rows,
        max_new_tokens=20,
        eos_token_ids=eos,
        uniforms=uniforms,
        student_sampling=SamplingParams(**student_sampling),
        teacher_sampling=SamplingParams(**teacher_sampling),
    )
    models = reference.in_float64(student), reference.in_float64(teacher)
    for row, prompt in enumerate(PROMPTS):
        tokens, replaced = reference.interleave(
            *models,
            prompt,
            accepts=reference.top_k_accepts(25),
            max_new_tokens=20,
            eos_token_ids=eos,
            uniforms=uniforms[row],
            student_sampling=student_sampling,
            teacher_sampling=teacher_sampling,
        )
        assert responses(rollout)[row] == tokens
        assert rollout.replaced[row, : len(tokens)].tolist() == replaced
    assert rollout.replaced.any() and len({len(r) for r in responses(rollout)}) > 1
