import math
import warnings

import pytest
import reference_losses as reference
import torch

from skd_trl.loss.divergences import DIVERGENCES


with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from trl.experimental.gkd import GKDTrainer

NAMES = list(DIVERGENCES)


def _random_logits(num_positions=7, vocab_size=11, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(num_positions, vocab_size, generator=generator, dtype=dtype) * 3 for _ in range(2))


@pytest.mark.parametrize("name", NAMES)
def test_every_divergence_is_the_sum_its_definition_writes(name):
    student, teacher = _random_logits()
    expected = [
        reference.DIVERGENCES[name](p, q)
        for p, q in zip(teacher.softmax(-1).tolist(), student.softmax(-1).tolist(), strict=True)
    ]
    # float64 sums of 11 terms of order 1: some hundred roundings of 2e-16.
    torch.testing.assert_close(DIVERGENCES[name]()(student, teacher).tolist(), expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", NAMES)
def test_every_gradient_is_the_one_finite_differences_give(name):
    student, teacher = _random_logits(3, 5)
    assert torch.autograd.gradcheck(lambda logits: DIVERGENCES[name]()(logits, teacher), student.requires_grad_())


@pytest.mark.parametrize(
    ("ours", "beta"),
    [
        (("forward_kl", {}), 0.0),
        (("reverse_kl", {}), 1.0),
        (("jsd", {"beta": 0.0}), 0.0),
        (("jsd", {"beta": 0.1}), 0.1),
        (("jsd", {}), 0.5),
        (("jsd", {"beta": 0.9}), 0.9),
        (("jsd", {"beta": 1.0}), 1.0),
    ],
)
def test_value_and_gradient_are_those_of_gkd_trainer(ours, beta):
    name, parameters = ours
    student, teacher = _random_logits(9, 300, dtype=torch.float32)
    theirs_student, ours_student = student.clone().requires_grad_(), student.clone().requires_grad_()
    theirs = GKDTrainer.generalized_jsd_loss(theirs_student[None], teacher[None], beta=beta, reduction="none").sum(-1)[
        0
    ]
    mine = DIVERGENCES[name](**parameters)(ours_student, teacher)
    # fp32, sums of 300 terms below 10 in another order: 300 x 6e-8 x 10 at the very worst, in practice its root.
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    theirs.sum().backward()
    mine.sum().backward()
    torch.testing.assert_close(ours_student.grad, theirs_student.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_a_student_that_equals_its_teacher_is_at_zero_and_stays_there(name):
    logits = _random_logits(dtype=torch.float32)[0].requires_grad_()
    divergence = DIVERGENCES[name]()(logits, logits.detach())
    divergence.sum().backward()
    # A mixture of two equal distributions is off by one rounding of a log-probability, 6e-8 x 16.
    torch.testing.assert_close(divergence.detach(), torch.zeros(7), rtol=0, atol=1e-6)
    torch.testing.assert_close(logits.grad, torch.zeros_like(logits), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_logits_are_judged_in_fp32(name):
    student, teacher = (logits.bfloat16() for logits in _random_logits(4, 500))
    divergence = DIVERGENCES[name]()(student, teacher)
    assert divergence.dtype == torch.float32
    torch.testing.assert_close(divergence, DIVERGENCES[name]()(student.float(), teacher.float()), rtol=0, atol=0)


def test_forward_and_reverse_kl_of_two_coins():
    # p = (1/2, 1/2), q = (1/4, 3/4):
    # KL(p||q) = 1/2 ln 2 + 1/2 ln(2/3) = 1/2 ln(4/3);  KL(q||p) = 1/4 ln(1/2) + 3/4 ln(3/2).
    student, teacher = torch.tensor([[0.25, 0.75]]).log(), torch.tensor([[0.5, 0.5]]).log()
    assert DIVERGENCES["forward_kl"]()(student, teacher).item() == pytest.approx(math.log(4 / 3) / 2, rel=1e-6)
    expected = math.log(1 / 2) / 4 + 3 * math.log(3 / 2) / 4
    assert DIVERGENCES["reverse_kl"]()(student, teacher).item() == pytest.approx(expected, rel=1e-6)


def test_skewed_divergences_end_in_the_plain_ones_and_are_bounded():
    student, teacher = _random_logits()
    for direction in ("forward", "reverse"):
        plain = DIVERGENCES[f"{direction}_kl"]()(student, teacher)
        skewed = DIVERGENCES[f"skew_{direction}_kl"]
        torch.testing.assert_close(skewed(alpha=0.0)(student, teacher), plain, rtol=0, atol=0)
        torch.testing.assert_close(skewed(alpha=1e-9)(student, teacher), plain, rtol=1e-4, atol=0)
        disjoint = torch.tensor([[60.0, 0.0]]), torch.tensor([[0.0, 60.0]])
        assert skewed(alpha=0.1)(*disjoint).item() == pytest.approx(math.log(10), rel=1e-5)


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("jsd", {"beta": -0.1}, r"beta=-0.1 is outside \[0, 1\]"),
        ("jsd", {"beta": 1.5}, r"beta=1.5 is outside \[0, 1\]"),
        ("jsd", {"beta": math.nan}, r"beta=nan is outside \[0, 1\]"),
        ("skew_forward_kl", {"alpha": 1}, "alpha=1 compares a distribution with itself"),
        ("skew_reverse_kl", {"alpha": 2}, r"alpha=2 is outside \[0, 1\]"),
    ],
)
def test_parameters_outside_their_range_are_refused(name, parameters, message):
    with pytest.raises(ValueError, match=message):
        DIVERGENCES[name](**parameters)
