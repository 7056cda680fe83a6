"""A teacher that sends its top k, or its hidden states, against the same teacher in this process on the same noise."""

import pytest
import torch
from local_scorer import LocalScorer
from test_sampler import EOS, PROMPTS, V, left_padded, responses
from tiny import tiny_model

from skd_trl.loss.lm_head import LMHead
from skd_trl.sampling import interleaved
from skd_trl.sampling.acceptance import ACCEPTANCE_RULES, AcceptanceRule
from skd_trl.sampling.draft import Draft, Judgement
from skd_trl.sampling.interleaved import Execution, interleaved_sample
from skd_trl.sampling.nucleus import Nucleus
from skd_trl.sampling.participants import LocalParticipant
from skd_trl.sampling.sampling_params import SamplingParams, shaped_probs
from skd_trl.sampling.served_hidden_states import ServedHiddenStates
from skd_trl.sampling.served_teacher import ServedTeacher
from skd_trl.sampling.top_judgement import Scores, TopJudgement


GREEDY, FREE = SamplingParams(temperature=0.0), SamplingParams()
NUCLEI = Nucleus()  # finds them by sorting
SHARP, NUCLEUS = SamplingParams(0.2, 0.5), SamplingParams(1.0, 0.7)
MIXED = [PROMPTS[i % len(PROMPTS)] + [i] for i in range(7)]


def sampled(teacher, rule, sampling, num_draft_tokens, **execution):
    student = LocalParticipant(tiny_model("llama", seed=1), FREE)
    teacher.sampling = sampling
    return interleaved_sample(
        student,
        teacher,
        *left_padded(MIXED),
        accept=rule,
        max_new_tokens=12,
        eos_token_ids=[EOS, 7],
        noise=torch.rand(len(MIXED), 12, 3, generator=torch.Generator().manual_seed(3)),
        execution=Execution(num_draft_tokens, **execution),
    )


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama", seed=2)


@pytest.mark.parametrize("num_draft_tokens", [1, 4])
@pytest.mark.parametrize("execution", [{}, {"max_rows": 3}], ids=["all", "refilled"])
@pytest.mark.parametrize(
    ("rule", "sampling"),
    [
        (ACCEPTANCE_RULES["top_k"](k=100), GREEDY),
        (ACCEPTANCE_RULES["top_k"](k=100), SHARP),
        (ACCEPTANCE_RULES["top_k"](k=60), NUCLEUS),
        (ACCEPTANCE_RULES["min_prob"](alpha=0.01), SHARP),
        (ACCEPTANCE_RULES["top_p"](p=0.8), SHARP),
        (ACCEPTANCE_RULES["mixture"](gamma=0.5), NUCLEUS),
        (ACCEPTANCE_RULES["speculative"](), SHARP),
        (ACCEPTANCE_RULES["never"](), NUCLEUS),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, AcceptanceRule) else str(value.temperature),
)
def test_a_teacher_that_sends_its_top_k_writes_the_text_of_one_in_this_process(
    model, rule, sampling, num_draft_tokens, execution
):
    # The nucleus of this random teacher has up to 130 of the 259 tokens.
    here = sampled(LocalParticipant(model), rule, sampling, num_draft_tokens, **execution)
    served = sampled(ServedTeacher(LocalScorer(model, 200, V)), rule, sampling, num_draft_tokens, **execution)
    assert responses(served, MIXED) == responses(here, MIXED)
    assert torch.equal(served.replaced, here.replaced)
    assert torch.equal(served.teacher_rank, here.teacher_rank)


class ByLogits(AcceptanceRule):
    """A rule that looks at what only a teacher with all logits can show."""

    def __call__(self, draft: Draft) -> torch.Tensor:
        return draft.teacher_logits[..., ::2].logsumexp(-1) > draft.teacher_logits[..., 1::2].logsumexp(-1)


@pytest.mark.parametrize("execution", [{}, {"max_rows": 3}], ids=["all", "refilled"])
@pytest.mark.parametrize(
    ("rule", "sampling"),
    [
        (ByLogits(), FREE),
        (ACCEPTANCE_RULES["speculative"](), FREE),
        (ACCEPTANCE_RULES["never"](), SamplingParams(1.5)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, AcceptanceRule) else str(value.temperature),
)
def test_a_teacher_that_sends_hidden_states_writes_the_text_of_one_in_this_process_whatever_the_rule(
    model, rule, sampling, execution
):
    here = sampled(LocalParticipant(model), rule, sampling, 4, **execution)
    exact = ServedHiddenStates(LocalScorer(model, 1, V), LMHead.of(model).logits)
    served = sampled(exact, rule, sampling, 4, **execution)
    assert responses(served, MIXED) == responses(here, MIXED)
    assert torch.equal(served.replaced, here.replaced)
    torch.testing.assert_close(served.teacher_hidden_states, here.teacher_hidden_states, atol=1e-4, rtol=1e-4)


def test_each_text_is_sent_with_its_proposals_and_none_for_rows_that_ended(model):
    scorer = LocalScorer(model, 30, V)
    rollout = sampled(ServedTeacher(scorer), ACCEPTANCE_RULES["top_k"](k=20), GREEDY, 4, max_rows=3)
    texts = [prompt + response for prompt, response in zip(MIXED, responses(rollout, MIXED), strict=True)]
    for request in scorer.requests:
        for text in request:
            kept = text[:-4]
            assert any(full[: len(kept)] == kept and len(kept) < len(full) for full in texts)


class Tight(LocalScorer):
    """With room for the longest text and the token that vLLM generates, and no more."""

    def __init__(self, model, top_k):
        super().__init__(model, top_k, V)
        self.max_length = max(map(len, MIXED)) + 12 + 1

    def score(self, texts, num_scored, keys):
        assert max(map(len, texts)) < self.max_length
        return super().score(texts, num_scored, keys)

    def hidden_states(self, texts, num_scored, keys):
        assert max(map(len, texts)) < self.max_length
        return super().hidden_states(texts, num_scored, keys)


@pytest.mark.parametrize("num_draft_tokens", [5, 12])
@pytest.mark.parametrize("kind", ["top k", "hidden states"])
def test_no_text_is_longer_than_the_prompt_and_its_response_whatever_the_draft(model, kind, num_draft_tokens):
    rule, sampling = ACCEPTANCE_RULES["top_k"](k=100), SamplingParams(0.9)
    here = sampled(LocalParticipant(model, sampling), rule, sampling, num_draft_tokens)
    scorer = Tight(model, V)
    served = ServedTeacher(scorer, sampling)
    if kind == "hidden states":
        served = ServedHiddenStates(scorer, LMHead.of(model).logits, sampling, vocab_size=V)
    there = sampled(served, rule, sampling, num_draft_tokens)
    assert responses(there, MIXED) == responses(here, MIXED)
    assert torch.equal(there.replaced, here.replaced) and torch.equal(there.teacher_rank, here.teacher_rank)
    assert max(len(text) for request in scorer.requests for text in request) == scorer.max_length - 1


@pytest.mark.parametrize("kind", ["top k", "hidden states"])
def test_a_row_that_keeps_nothing_of_a_block_keeps_its_text(monkeypatch, model, kind):
    """Where the student's nucleus does not fit its candidates, the row is judged again from where it was."""
    student = LocalParticipant(tiny_model("llama", seed=1), SamplingParams(top_p=0.9))
    scorer, rollouts = LocalScorer(model, V, V), []
    if kind == "top k":
        served = ServedTeacher(scorer)
    else:
        served = ServedHiddenStates(scorer, LMHead.of(model).logits, vocab_size=V)
    missed, observe = [], Nucleus.observe
    monkeypatch.setattr(Nucleus, "observe", lambda self, num: missed.append(num) or observe(self, num))
    for candidates, teacher in (((), LocalParticipant(model)), ((), served), ((8,), served)):
        monkeypatch.setattr(interleaved, "CANDIDATES_ON_CPU", candidates)
        rollouts.append(
            interleaved_sample(
                student, teacher, *left_padded(MIXED), accept=ACCEPTANCE_RULES["top_k"](k=100), max_new_tokens=12,
                eos_token_ids=[EOS, 7], noise=torch.rand(len(MIXED), 12, 3, generator=torch.Generator().manual_seed(3)),
                execution=Execution(3, max_rows=4),
            )
        )  # fmt: skip
    here, all_fit, some_miss = rollouts
    assert responses(some_miss) == responses(all_fit) == responses(here)
    assert torch.equal(some_miss.teacher_rank, here.teacher_rank)
    assert some_miss.num_rounds == all_fit.num_rounds == here.num_rounds and sum(missed) > 0
    assert min(len(text) for request in scorer.requests for text in request) > min(map(len, MIXED))


@pytest.mark.parametrize("sampling", [GREEDY, FREE, SHARP, NUCLEUS, SamplingParams(1.5), SamplingParams(0.7, 0.9, 5)])
def test_with_all_tokens_known_the_shaped_distribution_is_that_of_logits(sampling):
    logits = torch.randn(3, 2, 40, generator=torch.Generator().manual_seed(0)) * 3
    tokens = torch.randint(40, (3, 2), generator=torch.Generator().manual_seed(1))
    top, dense = top_judgement(logits, tokens, 40), Judgement(logits, {})
    torch.testing.assert_close(top.shaped_probs(sampling, NUCLEI), shaped_probs(logits, sampling))
    shaped = [judgement.shaped_probability(tokens, sampling, NUCLEI) for judgement in (top, dense)]
    torch.testing.assert_close(*shaped)


def test_with_some_tokens_known_the_shaped_distribution_is_close_to_that_of_logits():
    logits = torch.randn(50, 1, 400, generator=torch.Generator().manual_seed(0)) * 4
    tokens = torch.randint(400, (50, 1), generator=torch.Generator().manual_seed(1))
    top, dense = top_judgement(logits, tokens, 64), Judgement(logits, {})
    exact = shaped_probs(logits, FREE).gather(-1, top.scores.ids)
    torch.testing.assert_close(top.shaped_probs(FREE, NUCLEI), exact)  # at temperature 1 what is outside is known
    at_half, at_more = (
        shaped_probs(logits, SamplingParams(temperature)).gather(-1, top.scores.ids) for temperature in (0.5, 1.5)
    )
    torch.testing.assert_close(top.shaped_probs(SamplingParams(0.5), NUCLEI), at_half, rtol=0.05, atol=1e-3)
    assert (top.shaped_probs(SamplingParams(0.5), NUCLEI) <= at_half + 1e-6).all()  # the bound is on one side
    assert (top.shaped_probs(SamplingParams(1.5), NUCLEI) <= at_more + 1e-6).all()
    torch.testing.assert_close(top.probability(tokens), dense.probability(tokens))
    assert (top.mass_above(tokens) <= dense.mass_above(tokens) + 1e-5).all()
    inside = (top.scores.ids == tokens[..., None]).any(-1)
    torch.testing.assert_close(top.mass_above(tokens)[inside], dense.mass_above(tokens)[inside])


def test_a_rule_that_reads_logits_is_told_what_it_can_read_instead(model):
    with pytest.raises(ValueError, match=r"30 most probable tokens. Use `draft.teacher_rank`"):
        sampled(ServedTeacher(LocalScorer(model, 30, V)), ByLogits(), GREEDY, 2)


@pytest.mark.parametrize("num_draft_tokens", [1, 3])
@pytest.mark.parametrize("top_k", [100, V + 200])
def test_tokens_that_the_student_has_not_are_left_out_as_by_a_teacher_in_this_process(top_k, num_draft_tokens):
    larger, rule = tiny_model("llama", seed=2, vocab_size=V + 200), ACCEPTANCE_RULES["top_k"](k=20)
    here = sampled(LocalParticipant(larger, vocab_size=V), rule, GREEDY, num_draft_tokens)
    scorer = LocalScorer(larger, top_k, V + 200)
    served = sampled(ServedTeacher(scorer, vocab_size=V), rule, GREEDY, num_draft_tokens)
    assert responses(served, MIXED) == responses(here, MIXED)
    assert torch.equal(served.replaced, here.replaced)
    if top_k > 100:  # those beyond that rank higher are all known
        assert torch.equal(served.teacher_rank, here.teacher_rank)
    ids, log_probs = (served.teacher_signal[name][0, 0] for name in ("teacher_top_ids", "teacher_top_log_probs"))
    assert ids.max() < V and ids.min() == -1 and torch.equal(ids < 0, log_probs.isinf())


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.5])
def test_what_is_left_out_has_no_part_in_a_draw_or_a_rank(temperature):
    logits = torch.randn(3, 2, 40, generator=torch.Generator().manual_seed(0)) * 3
    logits[0, 0, 35] = logits.max() + 1  # the favourite is one of these
    tokens = torch.randint(30, (3, 2), generator=torch.Generator().manual_seed(1))
    scores = top_judgement(logits, tokens, 40).scores.within(30)
    log_probs, sampling = logits.log_softmax(-1), SamplingParams(temperature)
    cut = Judgement(logits[..., :30], {})
    assert torch.equal(scores.token_ranks, cut.rank(tokens))
    judgement = TopJudgement(scores, 30)
    probs = judgement.shaped_probs(sampling, NUCLEI)
    assert probs.isfinite().all() and probs[..., 30:].eq(0).all()
    normal = probs[..., :30] / probs.sum(-1, keepdim=True)
    torch.testing.assert_close(normal, (logits[..., :30] / temperature).softmax(-1))
    own = log_probs.gather(-1, tokens[..., None])
    above = torch.where(log_probs[..., :30] > own, log_probs[..., :30].exp(), 0.0).sum(-1)
    torch.testing.assert_close(judgement.mass_above(tokens), above)
    judgement.decide(tokens)
    torch.testing.assert_close(judgement.signal["teacher_label_log_probs"], own.squeeze(-1))


def test_a_teacher_whose_known_tokens_are_all_beyond_is_refused():
    larger = tiny_model("llama", seed=2, vocab_size=V + 200)
    with pytest.raises(ValueError, match=r"1 most probable tokens are all beyond the 259 ids"):
        rule = ACCEPTANCE_RULES["top_k"](k=20)
        sampled(ServedTeacher(LocalScorer(larger, 1, V + 200), vocab_size=V), rule, GREEDY, 2)


def test_prompts_that_the_server_has_no_room_for_are_refused(model):
    scorer = LocalScorer(model, 30, V)
    scorer.max_length = 20
    with pytest.raises(ValueError, match=r"needs 25 positions, but the teacher's server takes 20"):
        sampled(ServedTeacher(scorer), ACCEPTANCE_RULES["top_k"](k=20), GREEDY, 2)


def top_judgement(logits, tokens, k):
    log_probs = logits.log_softmax(-1)
    ids = log_probs.topk(k, dim=-1).indices.sort(dim=-1).values
    own = log_probs.gather(-1, tokens[..., None])
    scores = Scores(ids, log_probs.gather(-1, ids), own.squeeze(-1), (log_probs > own).sum(-1))
    return TopJudgement(scores, logits.shape[-1])
