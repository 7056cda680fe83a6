"""Acceptance rules: what each keeps, and for the ones that promise a distribution, that distribution."""

from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import pytest
import reference
import torch
from scipy.stats import chisquare
from test_sampler import sample
from tiny import tiny_model

from skd_trl import ACCEPTANCE_RULES, AcceptanceRule, SamplingParams, interleaved_sample
from skd_trl.sampling.draft import Draft, Judgement


def draft_of(tokens, teacher_logits, student_logits=None, coins=None):
    tokens = torch.tensor(tokens)
    return Draft(
        tokens,
        torch.zeros(*tokens.shape, 0) if student_logits is None else student_logits,
        Judgement(torch.as_tensor(teacher_logits).float(), {}),
        SamplingParams(),
        SamplingParams(),
        torch.zeros(tokens.shape) if coins is None else torch.tensor(coins),
    )


# Teacher: 0.5, 0.3, 0.15, 0.05 for tokens 0 to 3, at each of four places, one proposal each.
EVERY_TOKEN = draft_of([[0, 1, 2, 3]], torch.tensor([0.5, 0.3, 0.15, 0.05]).log().expand(1, 4, 4))


@pytest.mark.parametrize(
    "name, kwargs, kept",
    [
        ("top_k", {"k": 1}, [True, False, False, False]),
        ("top_k", {"k": 3}, [True, True, True, False]),
        ("top_k", {"k": 99}, [True] * 4),
        ("top_p", {"p": 0.5}, [True, False, False, False]),  # 0.5 is reached by the first alone
        ("top_p", {"p": 0.51}, [True, True, False, False]),
        ("top_p", {"p": 1.0}, [True] * 4),
        ("min_prob", {"alpha": 0.2}, [True, True, False, False]),
        ("min_prob", {"alpha": 0.0}, [True] * 4),
        ("always", {}, [True] * 4),
        ("never", {}, [False] * 4),
    ],
)
def test_a_rule_keeps_the_tokens_it_says(name, kwargs, kept):
    assert ACCEPTANCE_RULES[name](**kwargs)(EVERY_TOKEN)[0].tolist() == kept


def test_ties_in_the_teacher_count_for_the_proposal():
    draft = draft_of([[1, 2]], torch.tensor([3.0, 1.0, 1.0, 1.0]).expand(1, 2, 4))
    assert draft.teacher_rank.tolist() == [[1, 1]]
    assert ACCEPTANCE_RULES["top_k"](k=2)(draft).tolist() == [[True, True]]


def test_a_token_of_exactly_the_least_probability_is_accepted():
    assert ACCEPTANCE_RULES["min_prob"](alpha=0.25)(draft_of([[1]], torch.zeros(1, 1, 4))).item()


def test_a_nucleus_of_all_accepts_what_rounding_would_put_outside():
    logits = torch.cat([torch.zeros(50_000), torch.tensor([-30.0])]).expand(1, 1, -1)
    assert ACCEPTANCE_RULES["top_p"](p=1.0)(draft_of([[50_000]], logits)).item()


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0])
def test_a_proposal_that_its_own_nucleus_lost_to_rounding_is_judged_by_the_teacher(gamma):
    """The student's probability is 0 where it was drawn a moment ago: no division by it."""
    teacher = torch.tensor([0.5, 0.5, 0.0, 0.0]).log().expand(1, 2, 4)
    draft = replace(
        draft_of([[1, 2]], teacher, coins=[[0.9, 0.9]]),
        student_logits=torch.tensor([9.0, 1.0, 0.0, 0.0]).expand(1, 2, 4), student_sampling=SamplingParams(top_p=0.1),
    )  # fmt: skip
    assert ACCEPTANCE_RULES["mixture"](gamma=gamma)(draft).tolist() == [[gamma > 0, False]]


def test_a_token_that_equal_models_reject_by_rounding_is_replaced_by_the_teacher():
    logits = torch.tensor([0.6, 0.4, 0.0]).log().expand(1, 1, 3)
    draft, rule = draft_of([[1]], logits, logits, coins=[[1.0]]), ACCEPTANCE_RULES["mixture"](gamma=0.5)
    assert not rule(draft).item()
    assert [rule.replacement(draft, torch.tensor([noise])).item() for noise in (0.5, 0.7)] == [0, 1]


def test_ranks_are_of_raw_logits_where_warped_ones_would_tie_at_zero():
    """Nucleus 0.5 leaves one token with a probability, and 258 in a tie at zero: the authors' top 25 of these are chance."""
    logits = torch.arange(259.0).flip(0).expand(1, 1, 259)
    for token in (0, 24, 25, 200):
        assert ACCEPTANCE_RULES["top_k"](k=25)(draft_of([[token]], logits)).item() == (token < 25)


@pytest.mark.parametrize(
    "name, kwargs, message",
    [
        ("top_k", {"k": 0}, "k=0.*never"),
        ("top_k", {"k": -3}, "k=-3"),
        ("top_k", {"k": 2.5}, "k=2.5"),
        ("top_p", {"p": 0.0}, "p=0.0"),
        ("min_prob", {"alpha": 1.5}, "alpha=1.5"),
        ("mixture", {"gamma": -0.1}, "gamma=-0.1"),
    ],
)
def test_a_parameter_out_of_range_is_refused(name, kwargs, message):
    with pytest.raises(ValueError, match=message):
        ACCEPTANCE_RULES[name](**kwargs)


@pytest.mark.parametrize("num_draft_tokens", [1, 3])
@pytest.mark.parametrize("name, kwargs, teacher_share", [("speculative", {}, 1.0), ("mixture", {"gamma": 0.3}, 0.3)])
def test_speculative_texts_are_the_teachers_and_mixture_texts_the_mixtures(
    name, kwargs, teacher_share, num_draft_tokens
):
    """Chi-square over 36 two-token texts, 20,000 of them; rejects a true sampler with probability 1e-5 in each case."""
    num_texts, prompt = 20_000, [1, 4, 2]
    small = {"vocab_size": 6, "initializer_range": 0.3}
    student, teacher = tiny_model("llama", seed=5, **small), tiny_model("llama", seed=6, **small)
    rollout = sample(
        student, teacher, [prompt] * num_texts, ACCEPTANCE_RULES[name](**kwargs),
        num_draft_tokens=num_draft_tokens, max_new_tokens=2, eos_token_ids=[],
        student_sampling=SamplingParams(temperature=0.8), teacher_sampling=SamplingParams(top_p=0.9),
        noise=torch.Generator().manual_seed(num_draft_tokens),
    )  # fmt: skip
    exact = [reference.in_float64(model) for model in (student, teacher)]

    def mixture(tokens):
        own = reference.probabilities(reference.next_logits(exact[0], tokens), temperature=0.8)
        other = reference.probabilities(reference.next_logits(exact[1], tokens), top_p=0.9)
        return (1 - teacher_share) * own + teacher_share * other

    first = mixture(prompt)
    expected = num_texts * torch.stack([first[t] * mixture(prompt + [t]) for t in range(6)]).flatten()
    counts = torch.bincount(rollout.labels[:, 3] * 6 + rollout.labels[:, 4], minlength=36).double()
    assert counts[expected == 0].sum() == 0
    common = expected >= 5
    observed = torch.cat([counts[common], counts[~common].sum()[None]])
    wanted = torch.cat([expected[common], expected[~common].sum()[None]])
    keep = wanted > 0
    assert keep.sum() > 5
    assert chisquare(observed[keep].numpy(), wanted[keep].numpy()).pvalue > 1e-5


@dataclass(frozen=True)
class Everything(AcceptanceRule):
    judges: ClassVar[bool] = False

    def __call__(self, draft):
        return torch.ones_like(draft.tokens, dtype=torch.bool)


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(),
        SamplingParams(temperature=0.0),
        SamplingParams(temperature=0.7, top_p=1.0),
        SamplingParams(top_p=0.9),
    ],
)
def test_a_users_rule_that_does_not_judge_gives_the_students_own_text(sampling):
    student, teacher = tiny_model("llama", seed=1), tiny_model("llama", seed=2)
    noise = torch.rand((4, 12, 3), generator=torch.Generator().manual_seed(0))
    settings = {"noise": noise, "student_sampling": sampling, "teacher_sampling": sampling}
    always, own = (
        sample(student, teacher, rule=rule, **settings) for rule in (ACCEPTANCE_RULES["always"](), Everything())
    )
    assert torch.equal(own.labels, always.labels) and not own.replaced.any()


@pytest.mark.parametrize("ask", [Draft.probability, partial(Draft.probability, shaped=False), Draft.shaped_probs])
@pytest.mark.parametrize(
    "of, message",
    [("student", "not kept.*needs_student = True"), ("Student", "of='Student' is neither 'student' nor")],
)
def test_a_rule_that_asks_for_a_probability_that_is_not_there_is_told_so(of, message, ask):
    class Sure(AcceptanceRule):
        def __call__(self, draft):
            return (ask(draft, of=of) > 0.5).view(*draft.tokens.shape, -1).any(-1)

    with pytest.raises(ValueError, match=message):
        sample(tiny_model("llama", seed=1), tiny_model("llama", seed=2), rule=Sure())


def test_a_rule_that_holds_a_list_is_run_as_any_other():
    @dataclass(frozen=True)
    class OneOf(AcceptanceRule):
        tokens: list

        def __call__(self, draft):
            return torch.isin(draft.tokens, torch.tensor(self.tokens))

    model, prompt = tiny_model("llama", seed=1), torch.tensor([[5, 9, 200]])
    rollout = interleaved_sample(
        model, tiny_model("llama", seed=2), prompt, torch.ones_like(prompt), accept=OneOf([1, 2]), max_new_tokens=4,
        eos_token_ids=[], noise=torch.Generator().manual_seed(0),
    )  # fmt: skip
    assert rollout.num_tokens == 4 and rollout.num_replaced >= 1
