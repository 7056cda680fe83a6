import math
from dataclasses import replace

import pytest
import reference_losses as reference
import torch

from skd_trl.loss.distillation_loss import distillation_loss
from skd_trl.loss.divergences import DIVERGENCES
from skd_trl.loss.gates import GATE_CONTROLS, GATES
from skd_trl.loss.lm_head import LMHead
from skd_trl.loss.response_facts import ResponseFacts
from skd_trl.loss.teacher_signal import HiddenStates


# One row per gate (and per variant), with parameters that make it accept some and reject some of the random positions.
ROWS = [
    ("greedy_top_k", {"k": 3}),
    ("spec_k", {"k": 2}),
    ("spec_k", {"k": 3, "exact": True}),
    ("one_minus_tv", {}),
    ("hellinger", {}),
    ("min_prob", {"alpha": 0.1}),
    ("accept_ratio", {}),
    ("accept_ratio", {"exact": True}),
    ("entropy_gap", {}),
    ("student_entropy_top", {"share": 0.3}),
]


def _inputs(gate, num_positions=40, vocab_size=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(num_positions, vocab_size, generator=generator) * 1.5 for _ in range(2))
    labels = torch.randint(vocab_size, (num_positions,), generator=generator)
    facts = ResponseFacts.of(labels, uniforms=torch.rand(num_positions, gate.num_uniforms, generator=generator))
    return {"student_logits": student, "teacher_logits": teacher, "facts": facts}


def test_there_is_a_row_for_every_gate():
    assert {name for name, _ in ROWS} == set(GATES)


@pytest.mark.parametrize(("name", "parameters"), ROWS)
@pytest.mark.parametrize("floor", [0.0, 0.25])
def test_every_gate_gives_what_its_formula_says_position_by_position(name, parameters, floor):
    _assert_weights_follow_the_formula(GATES[name](**parameters, floor=floor), name, parameters)


@pytest.mark.parametrize("name", GATE_CONTROLS)
def test_every_control_gives_what_its_formula_says_position_by_position(name):
    _assert_weights_follow_the_formula(GATE_CONTROLS[name](GATES["greedy_top_k"](k=3, floor=0.25)), name, {"k": 3})


def _assert_weights_follow_the_formula(gate, name, parameters):
    inputs, floor = _inputs(gate), gate.floor
    p, q = (inputs[f"{role}_logits"].double().softmax(-1) for role in ("teacher", "student"))
    facts = inputs["facts"]
    acceptance = reference.acceptances(name, p, q, facts.labels, facts.uniforms, **parameters)
    weights = gate(**inputs)
    assert weights.dtype == torch.float32 and not weights.requires_grad
    assert 0 < acceptance.mean() < 1
    # fp32 probabilities of 8 tokens; the square root in Hellinger's distance doubles the digits lost.
    torch.testing.assert_close(weights.double(), floor + (1 - floor) * acceptance.double(), rtol=1e-5, atol=1e-5)


# Five positions, three tokens; student q, teacher p, both written as probabilities.
#
#        q                  p                  argmax q   its rank in p   TV = 1/2 sum |p - q|
#   1    .60 .30 .10        .60 .30 .10        0          0               0
#   2    .50 .30 .20        .30 .50 .20        0          1               (.20 + .20 + .00) / 2 = .20
#   3    .50 .25 .25        .10 .50 .40        0          2               (.40 + .25 + .15) / 2 = .40
#   4    .20 .20 .60        .40 .40 .20        2          2               (.20 + .20 + .40) / 2 = .40
#   5    .10 .80 .10        .20 .50 .30        1          0               (.10 + .30 + .20) / 2 = .30
STUDENT = torch.tensor([[0.6, 0.3, 0.1], [0.5, 0.3, 0.2], [0.5, 0.25, 0.25], [0.2, 0.2, 0.6], [0.1, 0.8, 0.1]])
TEACHER = torch.tensor([[0.6, 0.3, 0.1], [0.3, 0.5, 0.2], [0.1, 0.5, 0.4], [0.4, 0.4, 0.2], [0.2, 0.5, 0.3]])
# Forward KL = sum p ln(p / q):
#   1    0
#   2    .3 ln .6 + .5 ln(5/3)                 = .2 ln(5/3)                  = .102165
#   3    .1 ln .2 + .5 ln 2 + .4 ln 1.6        = -.160944 + .346574 + .188001 = .373631
#   4    .4 ln 2 + .4 ln 2 + .2 ln(1/3)        =  .554518 - .219722           = .334795
#   5    .2 ln 2 + .5 ln .625 + .3 ln 3        =  .138629 - .235002 + .329584 = .233212
FORWARD_KL = torch.tensor([0.0, 0.102165, 0.373631, 0.334795, 0.233212])


def _five_positions(gate, uniforms=None):
    """Loss and gradient to the student's logits: hidden states are log-probabilities, both heads the identity."""
    student = STUDENT.log().requires_grad_()
    head = LMHead(torch.eye(3))
    facts = ResponseFacts.of(torch.zeros(5, dtype=torch.long), uniforms=uniforms)
    out = distillation_loss(
        HiddenStates(student, head), HiddenStates(TEACHER.log(), head), facts, divergence=DIVERGENCES["forward_kl"](),
        gate=gate, vocab_size=3, chunk_size=2,
    )  # fmt: skip
    out.loss.backward()
    return out, student.grad


def test_greedy_top_k_on_five_positions_by_hand():
    # k = 2, floor = .01: ranks 0, 1, 2, 2, 0 are below 2 at positions 1, 2, 5.
    weights = torch.tensor([1.0, 1.0, 0.01, 0.01, 1.0])
    # loss = 0 + .102165 + .01 x .373631 + .01 x .334795 + .233212 = .342461
    out, gradient = _five_positions(GATES["greedy_top_k"](k=2, floor=0.01))
    torch.testing.assert_close(out.weight, weights, rtol=0, atol=1e-8)
    assert out.accepted.tolist() == [True, True, False, False, True]
    torch.testing.assert_close(out.divergence, FORWARD_KL, rtol=0, atol=1e-6)
    assert out.loss.item() == pytest.approx(0.342461, abs=2e-6)
    # d KL(p||q) / d logits = q - p, times the weight, which is a constant.
    expected = torch.tensor(
        [[0, 0, 0], [0.2, -0.2, 0], [0.004, -0.0025, -0.0015], [-0.002, -0.002, 0.004], [-0.1, 0.3, -0.2]]
    )
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-6)


def test_exact_spec_k_on_five_positions_by_hand():
    # k = 2, floor = .01: A = 1 - TV^2 = 1, .96, .84, .84, .91; w = .01 + .99 A.
    weights = torch.tensor([1.0, 0.9604, 0.8416, 0.8416, 0.9109])
    # loss = .9604 x .102165 + .8416 x (.373631 + .334795) + .9109 x .233212 = .098119 + .596211 + .212433 = .906763
    out, gradient = _five_positions(GATES["spec_k"](k=2, floor=0.01, exact=True))
    torch.testing.assert_close(out.weight, weights, rtol=0, atol=1e-6)
    assert out.loss.item() == pytest.approx(0.906763, abs=3e-6)
    torch.testing.assert_close(gradient, weights[:, None] * (STUDENT - TEACHER), rtol=0, atol=1e-6)
    torch.testing.assert_close(gradient[1], torch.tensor([0.19208, -0.19208, 0.0]), rtol=0, atol=1e-6)


def test_sampled_spec_k_on_five_positions_by_hand():
    # k = 2: two numbers draw tokens from q, two judge them against p / q.
    #   1   q sums to .6, .9, 1    .10 -> 0, .95 -> 2    p/q = 1, 1      .99 < 1                        accepted
    #   2   .5, .8, 1              .20 -> 0, .40 -> 0    .6, .6          .70, .65 not below             rejected
    #   3   .5, .75, 1             .30 -> 0, .60 -> 1    .2, 2           .50 not below .2, .90 below 2  accepted
    #   4   .2, .4, 1              .50 -> 2, .90 -> 2    1/3, 1/3        .40 not below, .30 below       accepted
    #   5   .1, .9, 1              .50 -> 1, .20 -> 1    .625, .625      .63, .90 not below             rejected
    uniforms = torch.tensor(
        [
            [0.10, 0.95, 0.99, 0.99],
            [0.20, 0.40, 0.70, 0.65],
            [0.30, 0.60, 0.50, 0.90],
            [0.50, 0.90, 0.40, 0.30],
            [0.50, 0.20, 0.63, 0.90],
        ]
    )
    # loss = 0 + .01 x .102165 + .373631 + .334795 + .01 x .233212 = .711780
    out, gradient = _five_positions(GATES["spec_k"](k=2, floor=0.01), uniforms)
    assert out.accepted.tolist() == [True, False, True, True, False]
    assert out.loss.item() == pytest.approx(0.711780, abs=2e-6)
    torch.testing.assert_close(gradient[1], torch.tensor([0.002, -0.002, 0.0]), rtol=0, atol=1e-7)
    torch.testing.assert_close(gradient[2], torch.tensor([0.4, -0.25, -0.15]), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "parameters", "spread"),
    [("spec_k", {"k": 1}, 1), ("spec_k", {"k": 2}, 1), ("spec_k", {"k": 5}, 2), ("accept_ratio", {}, 0.7)],
)
def test_sampled_gates_accept_as_often_as_their_exact_weight_says(name, parameters, spread):
    # 6 positions, each drawn n = 20,000 times; z = (share - A) / sqrt(A (1 - A) / n) is standard normal. |z| > 4.5 has
    # probability 6.8e-6, and below 4e-5 where only 80 rejections are expected (a Poisson count's longer tail): over
    # the 24 comparisons of the four cases, a correct gate fails with probability below 1e-3.
    num_draws = 20_000
    generator = torch.Generator().manual_seed(3)
    sampled, exact = GATES[name](**parameters, floor=0.0), GATES[name](**parameters, floor=0.0, exact=True)
    for _ in range(6):
        student, teacher = (torch.randn(1, 8, generator=generator) * spread for _ in range(2))
        # A label that the student likes more than the teacher does, or accept_ratio would be certain.
        labels = (student.softmax(-1) - teacher.softmax(-1)).argmax(-1)
        chance = exact(student_logits=student, teacher_logits=teacher, facts=ResponseFacts.of(labels)).item()
        share = (
            sampled(
                student_logits=student.expand(num_draws, -1),
                teacher_logits=teacher.expand(num_draws, -1),
                facts=ResponseFacts.of(
                    labels.expand(num_draws),
                    uniforms=torch.rand(num_draws, sampled.num_uniforms, generator=generator),
                ),
            )
            .mean()
            .item()
        )
        assert 0.02 < chance < 0.996  # at least 80 acceptances and 80 rejections are expected
        assert abs(share - chance) < 4.5 * math.sqrt(chance * (1 - chance) / num_draws)


def test_a_uniform_number_that_was_rounded_to_one_draws_no_token_of_probability_zero():
    # q = (1/2, 1/2, 0), p / q = 1.6, .2 and beyond 1: the draw is token 1, and .5 is not below .2.
    student, teacher = torch.tensor([[0.5, 0.5, 0.0]]).log(), torch.tensor([[0.8, 0.1, 0.1]]).log()
    facts = ResponseFacts.of(torch.tensor([0]), uniforms=torch.tensor([[1.0, 0.5]]))
    assert GATES["spec_k"](k=1, floor=0.0)(student_logits=student, teacher_logits=teacher, facts=facts).item() == 0


def test_controls_keep_what_the_gate_is_beside_its_acceptances():
    gate = replace(GATES["greedy_top_k"](k=3, floor=0.2), keep_eos=True)
    for control in GATE_CONTROLS.values():
        made = control(gate)
        assert (made.floor, made.keep_eos, made.needs_top_k) == (0.2, True, 3)
        inputs = _inputs(made)
        facts = replace(inputs["facts"], is_end=torch.arange(40) % 2 == 0)
        assert made(**{**inputs, "facts": facts})[::2].eq(1).all()


def test_an_acceptance_of_one_half_counts_as_accepted():
    acceptance, facts = torch.tensor([0.0, 0.49, 0.5, 1.0]), ResponseFacts.of(torch.zeros(4))
    assert GATES["hellinger"]().weights(acceptance, facts).accepted.tolist() == [False, False, True, True]


@pytest.mark.parametrize("floor", [0.0, 0.01, 0.3, 1.0])
def test_accepted_positions_weigh_exactly_one_and_rejected_ones_exactly_the_floor(floor):
    gate = GATES["greedy_top_k"](k=3, floor=floor)
    weights = gate(**_inputs(gate))
    assert set(weights.tolist()) == {1.0, torch.tensor(floor).item()}


def test_ties_in_the_teacher_count_as_inside_its_top_k():
    student, teacher = torch.tensor([[0.0, 0.0, 9.0]]), torch.tensor([[1.0, 1.0, 1.0]])
    assert GATES["greedy_top_k"](k=1, floor=0.0)(student_logits=student, teacher_logits=teacher).item() == 1


def test_top_k_of_the_whole_vocabulary_accepts_everything():
    gate = GATES["greedy_top_k"](k=8, floor=0.0)
    assert gate(**_inputs(gate)).eq(1).all()


def test_one_minus_tv_is_exact_spec_k_with_one_draw():
    inputs = _inputs(GATES["one_minus_tv"]())
    torch.testing.assert_close(
        GATES["one_minus_tv"]()(**inputs), GATES["spec_k"](k=1, floor=0.0, exact=True)(**inputs), rtol=0, atol=0
    )


@pytest.mark.parametrize("inner", [("greedy_top_k", {"k": 3}), ("one_minus_tv", {}), ("accept_ratio", {})])
def test_the_random_control_has_the_gates_weights_in_another_order(inner):
    name, parameters = inner
    gate = GATES[name](**parameters)
    control = GATE_CONTROLS["random"](gate)
    assert control.num_uniforms == gate.num_uniforms + 1
    inputs = _inputs(control)
    weights = gate(**{**inputs, "facts": replace(inputs["facts"], uniforms=inputs["facts"].uniforms[:, :-1])})
    shuffled = control(**inputs)
    assert not torch.equal(shuffled, weights)
    torch.testing.assert_close(shuffled.sort().values, weights.sort().values, rtol=0, atol=0)


@pytest.mark.parametrize("inner", [("greedy_top_k", {"k": 3}), ("hellinger", {}), ("student_entropy_top", {})])
def test_the_inverted_control_accepts_where_the_gate_rejects(inner):
    name, parameters = inner
    gate = GATES[name](**parameters, floor=0.2)
    control = GATE_CONTROLS["inverted"](gate)
    inputs = _inputs(gate)
    torch.testing.assert_close(gate(**inputs) + control(**inputs), torch.full((40,), 1.2), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("share", "kept"), [(0.0, 0), (0.2, 1), (0.4, 2), (0.41, 3), (1.0, 5)])
def test_student_entropy_top_keeps_the_share_rounded_up_and_the_least_certain(share, kept):
    # Five coins, from certain to fair: the last ones have the largest entropy.
    student = torch.tensor([[4.0, 0.0], [3.0, 0.0], [2.0, 0.0], [1.0, 0.0], [0.0, 0.0]])
    weights = GATES["student_entropy_top"](share=share)(student_logits=student, teacher_logits=student)
    assert weights.tolist() == [0.0] * (5 - kept) + [1.0] * kept


def test_a_share_that_rounding_puts_above_a_whole_number_keeps_that_number():
    assert 0.55 * 100 > 55
    assert GATES["student_entropy_top"](share=0.55).acceptance(torch.arange(100.0)).sum() == 55


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GATES["greedy_top_k"](k=0), "k=0 is outside 1..the vocabulary size"),
        (lambda: GATES["spec_k"](k=-3), "k=-3 is outside"),
        (lambda: GATES["greedy_top_k"](floor=-0.1), r"floor=-0.1 is outside \[0, 1\]"),
        (lambda: GATES["hellinger"](floor=1.1), r"floor=1.1 is outside \[0, 1\]"),
        (lambda: GATES["min_prob"](alpha=1.5), r"alpha=1.5 is outside \[0, 1\]"),
        (lambda: GATES["student_entropy_top"](share=-1), r"share=-1 is outside \[0, 1\]"),
        (lambda: GATES["greedy_top_k"](k=9)(**_inputs(GATES["greedy_top_k"]())), "k=9 is outside 1..8"),
        (lambda: GATES["spec_k"](k=9, exact=True)(**_inputs(GATES["hellinger"]())), "k=9 is outside 1..8"),
        (lambda: GATES["spec_k"](k=2)(**_inputs(GATES["spec_k"](k=3))), r"uniforms has shape \(40, 6\)"),
        (
            lambda: GATE_CONTROLS["random"](GATES["greedy_top_k"](k=2))(**_inputs(GATES["hellinger"]())),
            r"uniforms has shape \(40, 0\), but the gate greedy_top_k \(random\) draws; .*torch.rand\(40, 1\)",
        ),
        (
            lambda: GATES["min_prob"]()(**{**_inputs(GATES["hellinger"]()), "facts": None}),
            "min_prob judges the response's own token.*pass facts=ResponseFacts.of",
        ),
    ],
)
def test_what_cannot_work_is_refused_with_a_reason(make, message):
    with pytest.raises(ValueError, match=message):
        make()
