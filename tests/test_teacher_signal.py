"""A teacher of whom the k most probable tokens are known, against one whose hidden states are."""

import math
from dataclasses import replace

import pytest
import reference_losses as reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from skd_trl.loss.distillation_loss import distillation_loss, gate_weights
from skd_trl.loss.divergences import DIVERGENCES, Divergence
from skd_trl.loss.gates import GATE_CONTROLS, GATES, Gate
from skd_trl.loss.lm_head import LMHead
from skd_trl.loss.response_facts import ResponseFacts
from skd_trl.loss.teacher_signal import HiddenStates, TopLogProbs, check_signal, top_log_probs
from skd_trl.loss.token_distributions import STATISTICS


VOCAB = 50
# fp32 against float64 or another order of summing: V = 50 products and exponentials of order 1, then N = 17 positions.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
# Every divergence, and those with a parameter at another of its values.
EVERY_DIVERGENCE = [(name, {}) for name in DIVERGENCES] + [
    ("jsd", {"beta": 0.1}),
    ("jsd", {"beta": 0.9}),
    ("skew_forward_kl", {"alpha": 0.5}),
    ("skew_reverse_kl", {"alpha": 0.9}),
]
# Every gate that can live on a top-k signal of k = 7.
COARSE_GATES = {
    "greedy_top_k": {"k": 3},
    "spec_k": {"k": 2},
    "one_minus_tv": {},
    "hellinger": {},
    "min_prob": {"alpha": 0.1},
    "accept_ratio": {},
    "student_entropy_top": {"share": 0.3},
}


class Pair:
    """N positions of a student, a teacher with hidden states, and facts."""

    def __init__(self, num_positions=17, seed=1):
        generator = torch.Generator().manual_seed(seed)
        states = [torch.randn(num_positions, size, generator=generator) for size in (8, 12)]
        weights = [torch.randn(VOCAB, size, generator=generator) / size**0.5 * 2 for size in (8, 12)]
        self.student = HiddenStates(states[0].requires_grad_(), LMHead(weights[0].requires_grad_(), softcap=9.0))
        self.teacher = HiddenStates(states[1], LMHead(weights[1], scale=2.0))
        labels = torch.randint(VOCAB, (num_positions,), generator=generator)
        # Half of the labels are what the teacher would say: every gate accepts some.
        labels[::2] = self.teacher.head.logits(states[1])[::2].argmax(-1)
        self.facts = ResponseFacts.of(labels)

    def top(self, k, chunk_size=5):
        teacher = self.teacher
        return top_log_probs(teacher.states, teacher.head, self.facts.labels, k, VOCAB, chunk_size)

    def loss(self, teacher, divergence="forward_kl", parameters=None, facts=None, **options):
        divergence = DIVERGENCES[divergence](**(parameters or {})) if isinstance(divergence, str) else divergence
        options = {"vocab_size": VOCAB, "chunk_size": 5, **options}
        return distillation_loss(
            self.student, teacher, self.facts if facts is None else facts, divergence=divergence, **options
        )

    def gradients(self, loss):
        return torch.autograd.grad(loss, [self.student.states, self.student.head.weight])

    def reference_probs(self):
        """The student's, differentiable, and the teacher's, float64 `(N, V)`."""
        logits = (
            reference.logits(model.states, model.head.weight, None, model.head.scale, model.head.softcap)
            for model in (self.student, self.teacher)
        )
        student, teacher = (one.softmax(-1) for one in logits)
        return student, teacher.detach()


def _noise(gate, num_positions=17):
    return torch.rand(num_positions, gate.num_uniforms, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize(("name", "parameters"), EVERY_DIVERGENCE)
def test_all_tokens_in_any_order_give_the_value_and_gradient_of_the_full_vocabulary(name, parameters):
    pair, generator = Pair(), torch.Generator().manual_seed(3)
    top = pair.top(VOCAB)
    order = torch.stack([torch.randperm(VOCAB, generator=generator) for _ in range(17)])
    permuted = TopLogProbs(top.ids.gather(1, order), top.log_probs.gather(1, order), top.label_log_probs)
    full, coarse = (pair.loss(teacher, name, parameters) for teacher in (pair.teacher, permuted))
    torch.testing.assert_close(coarse.divergence, full.divergence, **CLOSE)
    torch.testing.assert_close(coarse.loss, full.loss, **CLOSE)
    for gradient, wanted in zip(pair.gradients(coarse.loss), pair.gradients(full.loss), strict=True):
        torch.testing.assert_close(gradient, wanted, **CLOSE)


@pytest.mark.parametrize("k", [1, 7])
@pytest.mark.parametrize(("name", "parameters"), EVERY_DIVERGENCE)
def test_value_and_gradient_are_those_of_the_coarsened_distributions(name, parameters, k):
    pair = Pair()
    top = pair.top(k)
    out = pair.loss(top, name, parameters)
    student, teacher = (reference.coarsened(probs, top.ids) for probs in pair.reference_probs())
    expected = reference.divergence(name, student.log(), teacher.log(), **parameters)
    torch.testing.assert_close(out.divergence.double(), expected, **CLOSE)
    for gradient, wanted in zip(pair.gradients(out.loss), pair.gradients(expected.sum()), strict=True):
        torch.testing.assert_close(gradient, wanted, **CLOSE)


@pytest.mark.parametrize("k", [7, 30, VOCAB])
@pytest.mark.parametrize(("name", "parameters"), EVERY_DIVERGENCE)
def test_tokens_beyond_the_shared_ones_are_part_of_the_rest(name, parameters, k):
    pair, num_shared = Pair(), 40
    top = pair.top(k)
    out = pair.loss(top, name, parameters, vocab_size=num_shared)
    logits = reference.logits(pair.student.states, pair.student.head.weight, None, 1.0, pair.student.head.softcap)
    students, teachers = logits[:, :num_shared].softmax(-1), pair.reference_probs()[1]
    expected, numbers = [], []
    for student, teacher, ids in zip(students, teachers, top.ids, strict=True):
        ids = ids[ids < num_shared][: num_shared - 1]  # the most probable come first
        outcomes = [torch.cat([probs[ids], 1 - probs[ids].sum(0, keepdim=True)]) for probs in (student, teacher)]
        expected.append(reference.divergence(name, *(probs[None].log() for probs in outcomes), **parameters))
        numbers.append(len(ids))
    expected = torch.cat(expected)
    assert max(numbers) <= min(k, num_shared - 1) and (k == VOCAB or len(set(numbers)) > 1)
    torch.testing.assert_close(out.divergence.double(), expected, **CLOSE)
    for gradient, wanted in zip(pair.gradients(out.loss), pair.gradients(expected.sum()), strict=True):
        torch.testing.assert_close(gradient, wanted, **CLOSE)


@pytest.mark.parametrize("k", [7, VOCAB])
@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd"])
def test_the_logarithm_of_no_probability_costs_what_a_very_small_one_does(name, k):
    """A server or a recording may say -inf, of the label too."""
    pair, outcomes = Pair(), []
    top = pair.top(k)
    for least in (-math.inf, -1e4):
        log_probs, labels = top.log_probs.clone(), top.label_log_probs.clone()
        log_probs[:, -1], labels[::3] = least, least
        signal = TopLogProbs(top.ids, log_probs, labels)
        out = pair.loss(signal, name, statistics=["teacher_nll"])
        outcomes.append([out.loss, out.divergence, out.statistics["teacher_nll"], *pair.gradients(out.loss)])
    for found, expected in zip(*outcomes, strict=True):
        assert found.isfinite().all() and torch.equal(found, expected)


def test_a_token_that_is_not_known_never_ranks_among_the_known_ones():
    pair = Pair()
    top, logits = pair.top(7).prepared(40), pair.student.head.logits(pair.student.states, 40).detach()
    ranks, argmax = top.compare(logits, pair.facts.labels.clamp(max=39)).student_argmax_rank, logits.argmax(-1)
    for row, ids in enumerate(pair.top(7).ids.tolist()):
        known = [token for token in ids if token < 40]
        assert ranks[row] == (known.index(argmax[row]) if argmax[row] in known else 7)
    assert 0 < (ranks == 7).sum() < len(ranks)


@st.composite
def logit_pairs(draw):
    """Logits `(1, V)` of student and teacher, far enough apart that either has tokens of nearly no probability; and k < V."""
    vocab_size = draw(st.integers(2, 12))
    row = st.lists(st.floats(-30, 30, width=32), min_size=vocab_size, max_size=vocab_size)
    return torch.tensor([draw(row)]), torch.tensor([draw(row)]), draw(st.integers(1, vocab_size - 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@settings(max_examples=150, deadline=None, derandomize=True)
@given(case=logit_pairs())
def test_a_coarse_divergence_is_never_above_the_full_one(dtype, case):
    student_logits, teacher_logits, k = case
    vocab_size = student_logits.shape[-1]
    head, labels = LMHead(torch.eye(vocab_size, dtype=dtype)), torch.zeros(1, dtype=torch.long)
    student, teacher = (HiddenStates(logits.to(dtype), head) for logits in (student_logits, teacher_logits))
    top = top_log_probs(teacher.states, head, labels, k, vocab_size)
    # The teacher's rest p is what k probabilities leave: with e the rounding of the type, off by d <= 2 (k + 1) e, and
    # never below e. That changes -q log p by at most q log(1 + d / p), and p log(p / q) by at most d (1 + |log(p / q)|).
    eps = torch.finfo(dtype).eps
    log_q = student_logits.double().log_softmax(-1)
    rest_q = log_q.scatter(-1, top.ids, -math.inf).logsumexp(-1)
    rest_p = torch.log1p(-top.log_probs.double().exp().sum(-1).clamp(max=1 - eps))
    deviation = 2 * (k + 1) * eps
    tolerance = rest_q.exp() * torch.log1p(deviation / rest_p.exp()) + deviation * (1 + (rest_p - rest_q).abs())
    # Else each of V terms is off by the rounding of log-probabilities up to 30 + 30 + log V < 63.
    tolerance = (tolerance + 4 * vocab_size * 63 * eps).item()
    facts = ResponseFacts.of(labels)
    for name, parameters in EVERY_DIVERGENCE:
        full, coarse = (
            distillation_loss(
                student, signal, facts, divergence=DIVERGENCES[name](**parameters), vocab_size=vocab_size
            ).divergence.item()
            for signal in (teacher, top)
        )
        assert coarse <= full + tolerance, (name, parameters)


def test_a_sure_student_still_has_a_rest_with_digits_and_a_gradient():
    # q = (1, e^-60, e^-61), of which 1 - q(0) is 0 in every float type; log q(rest) = -60 + log(1 + 1 / e).
    logits = torch.tensor([[0.0, -60.0, -61.0]], requires_grad=True)
    top = TopLogProbs(torch.tensor([[0]]), torch.tensor([[0.5]]).log(), torch.tensor([0.5]).log())
    student = HiddenStates(logits, LMHead(torch.eye(3)))
    facts = ResponseFacts.of(torch.tensor([0]))
    out = distillation_loss(student, top, facts, divergence=DIVERGENCES["forward_kl"](), vocab_size=3)
    # KL((.5, .5) || (1, rest)) = log .5 - .5 log rest
    assert out.loss.item() == pytest.approx(math.log(0.5) + 0.5 * (60 - math.log1p(math.exp(-1))), rel=1e-6)
    out.loss.backward()
    # d/d logits = q - p on the outcomes, and the rest's -.5 is shared as 1 : 1 / e.
    share = 1 / (1 + math.exp(-1))
    expected = torch.tensor([[0.5, -0.5 * share, -0.5 * (1 - share)]])
    torch.testing.assert_close(logits.grad, expected, rtol=1e-5, atol=0)


def test_a_sure_teacher_has_a_rest_of_one_rounding():
    # Two tokens whose probabilities sum to 1, or by rounding above it, in fp32 and half precision.
    sure = torch.tensor([[0.5, 0.5]]).log()
    for log_probs, rounding in ((sure, 2**-23), (torch.tensor([[-1e-9, -20.0]]), 2**-23), (sure.half(), 2**-10)):
        top = TopLogProbs(torch.tensor([[2, 0]]), log_probs, log_probs[:, 0])
        student_logits = torch.zeros(1, 3)
        distributions = top.compare(student_logits, torch.tensor([2]))
        assert distributions.teacher_log_probs[0, 2].item() == pytest.approx(math.log(rounding), rel=1e-6)


def test_a_recorded_signal_gives_the_bits_of_the_one_it_was_recorded_from():
    pair = Pair()
    live, again = pair.top(7), pair.top(7)
    recorded = TopLogProbs(
        *(torch.tensor(getattr(live, name).tolist()) for name in ("ids", "log_probs", "label_log_probs"))
    )
    first = pair.loss(live, "reverse_kl")
    for signal in (again, recorded):
        for name in ("ids", "log_probs", "label_log_probs"):
            assert torch.equal(getattr(signal, name), getattr(live, name))
        out = pair.loss(signal, "reverse_kl")
        assert torch.equal(out.divergence, first.divergence)
        for gradient, wanted in zip(pair.gradients(out.loss), pair.gradients(first.loss), strict=True):
            assert torch.equal(gradient, wanted)
        first = pair.loss(live, "reverse_kl")


def test_the_local_signal_is_the_top_of_the_teachers_log_probabilities():
    pair = Pair()
    top, (_, teacher) = pair.top(7), pair.reference_probs()
    values, ids = teacher.log().topk(7, dim=-1)
    assert torch.equal(top.ids, ids)
    torch.testing.assert_close(top.log_probs.double(), values, **CLOSE)
    expected = teacher.log().gather(-1, pair.facts.labels[:, None]).squeeze(-1)
    torch.testing.assert_close(top.label_log_probs.double(), expected, **CLOSE)
    none = top_log_probs(pair.teacher.states[:0], pair.teacher.head, pair.facts.labels[:0], 7, VOCAB)
    assert none.ids.shape == none.log_probs.shape == (0, 7)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        *(("greedy_top_k", {"k": k}) for k in range(1, 8)),
        ("min_prob", {"alpha": 0.1}),
        ("accept_ratio", {}),
        ("accept_ratio", {"exact": True}),
        ("student_entropy_top", {"share": 0.3}),
    ],
)
def test_gates_that_need_ranks_below_k_labels_or_the_student_are_exact(name, parameters):
    pair, gate = Pair(num_positions=200), GATES[name](**parameters)
    facts = replace(pair.facts, uniforms=_noise(gate, 200))
    full, coarse = (
        gate_weights(pair.student, teacher, facts, gate=gate, vocab_size=VOCAB, chunk_size=50)
        for teacher in (pair.teacher, pair.top(7, chunk_size=50))
    )
    assert 0 < full.weight.mean() < 1 and len(full.weight.unique()) > 1
    assert torch.equal(coarse.weight, full.weight) and torch.equal(coarse.accepted, full.accepted)


def test_statistics_of_the_student_and_the_labels_are_exact():
    pair = Pair()
    names = set(STATISTICS) - {"teacher_entropy", "tv"}
    full, coarse = (pair.loss(teacher, statistics=names).statistics for teacher in (pair.teacher, pair.top(7)))
    assert set(coarse) == {"student_entropy", "student_nll", "teacher_nll", "correct"}
    for name in names:
        assert torch.equal(coarse[name], full[name]), name


@pytest.mark.parametrize("name", COARSE_GATES)
def test_a_gate_over_outcomes_is_the_gate_on_the_coarsened_distributions(name):
    pair, parameters = Pair(), COARSE_GATES[name]
    gate, top = GATES[name](**parameters, floor=0.0), pair.top(7)
    facts = replace(pair.facts, uniforms=_noise(gate))
    out = pair.loss(top, gate=gate, facts=facts)
    probs = pair.reference_probs()
    if name in ("spec_k", "one_minus_tv", "hellinger"):
        probs = (reference.coarsened(one, top.ids) for one in probs)
    q, p = (one.detach() for one in probs)
    expected = reference.acceptances(name, p, q, facts.labels, facts.uniforms, **parameters)
    torch.testing.assert_close(out.weight.double(), expected.double(), **CLOSE)


def test_every_gate_either_lives_on_a_coarse_signal_or_is_refused_by_name():
    pair, top = Pair(), Pair().top(7)
    for name, make in GATES.items():
        gate = make(**COARSE_GATES.get(name, {}))
        facts = replace(pair.facts, uniforms=_noise(gate))
        if name in COARSE_GATES:
            assert pair.loss(top, gate=gate, facts=facts).weight.isfinite().all()
            continue
        for control in (gate, *(make_control(gate) for make_control in GATE_CONTROLS.values())):
            with pytest.raises(ValueError, match=f"7 most probable tokens, but the gate {name}.* needs the full"):
                pair.loss(top, gate=control, facts=facts)
            with pytest.raises(ValueError, match=f"gate {name}"):
                gate_weights(pair.student, top, facts, gate=control, vocab_size=VOCAB)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"gate": GATES["greedy_top_k"](k=8)}, "gate greedy_top_k needs 8: ask for a signal with k=8 or more"),
        ({"gate": GATES["entropy_gap"]()}, "gate entropy_gap needs the full vocabulary: .* a signal with k=50"),
        ({"statistics": ["tv", "teacher_entropy"]}, "statistic teacher_entropy needs the full vocabulary"),
        ({"divergence": Divergence(lambda q, p: (q - p).abs().sum(-1), needs_top_k=9)}, "divergence needs 9"),
        ({"gate": Gate(lambda distributions, facts: facts.replaced)}, "gate given needs the full vocabulary"),
    ],
)
def test_what_a_signal_cannot_give_is_refused_before_and_in_the_loss(asked, message):
    pair = Pair()
    with pytest.raises(ValueError, match=message):
        check_signal(7, VOCAB, **asked)
    with pytest.raises(ValueError, match=message):
        pair.loss(pair.top(7), **asked)
    for enough in (math.inf, VOCAB):
        check_signal(enough, VOCAB, **asked)
    assert pair.loss(pair.top(VOCAB), **asked).loss.isfinite()


def test_the_full_vocabulary_as_a_top_k_signal_gives_every_statistic():
    pair = Pair()
    full, coarse = (
        pair.loss(teacher, statistics=STATISTICS).statistics for teacher in (pair.teacher, pair.top(VOCAB))
    )
    for name in STATISTICS:
        torch.testing.assert_close(coarse[name], full[name], **CLOSE)


def test_a_gate_that_reads_the_teachers_entropy_without_saying_so_is_refused():
    gate = Gate(lambda distributions, facts: distributions.teacher_entropy, needs_top_k=1)
    pair = Pair()
    with pytest.raises(ValueError, match="7 of its 50 tokens are known"):
        pair.loss(pair.top(7), gate=gate)


def test_a_users_divergence_gets_log_probabilities_of_the_outcomes():
    pair, shapes = Pair(), []

    def total_variation(student, teacher):
        shapes.append((student.shape, teacher.shape))
        return (student.softmax(-1) - teacher.softmax(-1)).abs().sum(-1) / 2

    out = pair.loss(pair.top(7), total_variation, statistics=["tv"], chunk_size=17)
    assert shapes == [((17, 8), (17, 8))]
    torch.testing.assert_close(out.divergence, out.statistics["tv"], **CLOSE)


def test_a_gate_may_look_at_every_fact():
    pair = Pair()
    facts = replace(
        pair.facts,
        replaced=torch.arange(17) % 3 == 0,
        teacher_rank=torch.arange(17) % 5,
        is_end=torch.arange(17) == 16,
        position=torch.arange(17) % 9,
    )

    def score(distributions, facts):
        return facts.replaced | (facts.teacher_rank == 4) | facts.is_end | (facts.position < 2)

    gate = Gate(score, needs_top_k=1)
    expected = [i % 3 == 0 or i % 5 == 4 or i == 16 or i % 9 < 2 for i in range(17)]
    for teacher in (pair.teacher, pair.top(7)):
        assert pair.loss(teacher, gate=gate, facts=facts, chunk_size=4).accepted.tolist() == expected
    logits = torch.randn(17, VOCAB)
    assert gate(student_logits=logits, teacher_logits=logits, facts=facts).tolist() == [float(x) for x in expected]


def test_a_users_gate_finds_a_tokens_outcome_on_either_signal():
    """The teacher's probability of the student's favourite, or of all tokens that are not known where it is none of these."""
    gate = Gate(
        lambda distributions, facts: distributions.teacher_probs.gather(
            -1, distributions.outcome_of(distributions.student_argmax)[:, None]
        ).squeeze(-1),
        needs_top_k=1,
    )
    pair = Pair(num_positions=60)
    top, (student, teacher) = pair.top(7), pair.reference_probs()
    favourite = student.argmax(-1, keepdim=True)
    is_known = (top.ids == favourite).any(-1)
    assert 0 < is_known.sum() < 60
    own = teacher.gather(-1, favourite).squeeze(-1)
    expected = torch.where(is_known, own, reference.coarsened(teacher, top.ids)[:, -1])
    torch.testing.assert_close(pair.loss(pair.teacher, gate=gate).weight.double(), own, **CLOSE)
    torch.testing.assert_close(pair.loss(top, gate=gate).weight.double(), expected, **CLOSE)


def test_replaced_tokens_cost_their_full_negative_log_likelihood_on_a_coarse_signal():
    pair = Pair()
    facts = replace(pair.facts, replaced=torch.arange(17) % 3 == 0)
    # accept_ratio reads the label's log-probability without gradient first.
    gate = GATES["accept_ratio"](exact=True)
    full, coarse = (
        pair.loss(teacher, facts=replace(facts, replaced=torch.ones(17).bool()), gate=gate, replaced_loss="nll")
        for teacher in (pair.teacher, pair.top(7))
    )
    assert torch.equal(full.divergence, coarse.divergence)
    for gradient, wanted in zip(pair.gradients(coarse.loss), pair.gradients(full.loss), strict=True):
        assert torch.equal(gradient, wanted) and gradient.ne(0).any()
    mixed, plain = pair.loss(pair.top(7), facts=facts, replaced_loss="nll"), pair.loss(pair.top(7), facts=facts)
    expected = torch.where(facts.replaced, coarse.divergence, plain.divergence)
    torch.testing.assert_close(mixed.divergence, expected, rtol=0, atol=0)


def test_a_coarse_loss_under_autocast_and_from_half_precision_scores_is_fp32():
    pair = Pair()
    top = pair.top(7)
    halves = TopLogProbs(top.ids, top.log_probs.half(), top.label_log_probs.half())
    exact = pair.loss(top, statistics=["teacher_nll"])
    with torch.autocast("cpu", torch.bfloat16):
        out = pair.loss(halves, statistics=["teacher_nll"])
    assert out.divergence.dtype == out.statistics["teacher_nll"].dtype == torch.float32
    # bf16 keeps 8 bits of logits up to 9, half 11 bits of log-probabilities below 16.
    torch.testing.assert_close(out.loss, exact.loss, rtol=0.05, atol=0)


def test_without_positions_a_coarse_loss_is_zero_and_gives_zero_gradients():
    pair = Pair(num_positions=0)
    for name, parameters in COARSE_GATES.items():
        gate = GATES[name](**parameters)
        facts = replace(pair.facts, uniforms=_noise(gate, 0))
        out = pair.loss(pair.top(7), gate=gate, facts=facts, statistics=["tv"])
        assert out.loss.item() == 0 and all(gradient.eq(0).all() for gradient in pair.gradients(out.loss))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TopLogProbs(torch.ones(3, 2).long(), torch.ones(3, 3), torch.ones(3)), r"'log_probs': \(3, 3\)"),
        (lambda: TopLogProbs(torch.ones(3, 2).long(), torch.ones(3, 2), torch.ones(2)), r"'label_log_probs': \(2,\)"),
        (lambda: TopLogProbs(torch.ones(3, 0).long(), torch.ones(3, 0), torch.ones(3)), "k of 1 or more"),
        (lambda: Pair().top(VOCAB + 1), "k=51 is outside 1..50"),
        (lambda: Pair().top(0), "k=0 is outside 1..50"),
        (lambda: Pair().loss(Pair(num_positions=3).top(7)), "'student': 17, 'teacher': 3, 'facts': 17"),
        (lambda: Pair().loss(Pair().top(1), vocab_size=9), "1 most probable tokens are all beyond the 9 ids"),
    ],
)
def test_signals_that_cannot_be_right_are_refused_with_a_reason(make, message):
    with pytest.raises(ValueError, match=message):
        make()
