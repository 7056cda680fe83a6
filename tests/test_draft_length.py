"""The draft length follows the cost model, is near the best fixed one, and never changes a text."""

import json
from dataclasses import replace

import pytest
import torch
from test_sampler import sample
from tiny import tiny_model
from trl import TrlParser

from skd_trl import SKDConfig
from skd_trl.sampling.acceptance import ACCEPTANCE_RULES
from skd_trl.sampling.draft_length import AutoDraftLength, DraftLength, ForwardCost, Round, Stopwatch, expected_tokens


class Machine:
    """Rows of a given acceptance on a made-up pair of models: forwards cost fixed + marginal x tokens, times a jitter."""

    def __init__(self, acceptance, student, teacher, jitter=0.0, seed=0):
        self.acceptance, self.student, self.teacher, self.jitter = acceptance, student, teacher, jitter
        self.generator = torch.Generator().manual_seed(seed)

    def seconds(self, line, num_tokens):
        # What else a machine does only ever adds time.
        return (line[0] + line[1] * num_tokens) * (1 + self.jitter * self.uniform() ** 4)

    def uniform(self):
        return float(torch.rand((), generator=self.generator))

    def cost_per_token(self, policy, num_rows=8, num_tokens=64, num_windows=12):
        """Seconds per token of sampling that many windows with `policy`."""
        total = 0.0
        for _ in range(num_windows):
            remaining = [num_tokens] * num_rows
            while remaining:
                length = policy.choose(remaining)
                assert 1 <= length <= max(remaining)
                student = sum(self.seconds(self.student, len(remaining)) for _ in range(length))
                teacher = self.seconds(self.teacher, len(remaining) * length)
                judged = accepted = 0
                for row, rest in enumerate(remaining):
                    run = 0
                    while run < min(length, rest) and self.uniform() < self.acceptance:
                        run += 1
                    written = min(run + 1, length, rest)
                    judged, accepted = judged + written, accepted + min(run, written)
                    remaining[row] -= written
                policy.observe(Round(len(remaining), length, student, teacher, judged, accepted))
                remaining = [rest for rest in remaining if rest > 0]
                total += student + teacher
        return total / (num_windows * num_rows * num_tokens)


MACHINES = {  # student's and teacher's (fixed, marginal) seconds
    "two like models, compute-bound": ((0.5, 0.06), (0.8, 0.1)),
    "memory-bound, large teacher": ((1.0, 0.002), (12.0, 0.03)),
    "between": ((0.6, 0.05), (2.4, 0.2)),
}


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("acceptance", [0.3, 0.7, 0.9, 0.97])
@pytest.mark.parametrize("jitter", [0.0, 2.0])
def test_the_automatic_length_costs_at_most_a_tenth_more_than_the_best_fixed_one(machine, acceptance, jitter):
    """3,000 to 6,000 tokens each, so that the cost of one policy is known to about 2%; its own first rounds included."""

    def cost(policy):
        return Machine(acceptance, *MACHINES[machine], jitter).cost_per_token(policy)

    best = min(cost(DraftLength(length)) for length in (1, 2, 3, 4, 5, 6, 8, 10, 12, 16))
    assert cost(AutoDraftLength()) <= 1.1 * best


def test_it_finds_c_rho_and_the_acceptance():
    policy = AutoDraftLength()
    student, teacher = (0.6, 0.05), (2.4, 0.2)
    Machine(0.9, student, teacher).cost_per_token(policy)
    step, block = 0.6 + 0.05 * 8, 2.4 + 0.2 * 8
    assert policy.c(8) == pytest.approx(block / step, rel=0.02)
    assert policy.rho(8) == pytest.approx(0.2 * 8 / block, rel=0.05)
    assert policy.acceptance == pytest.approx(0.9, abs=0.04)  # 230 proposals weigh in: standard error 0.02


def test_the_best_length_solves_the_cost_models_equation():
    """a^-G = 1 + (G + r) ln(1/a), r = c (1 - rho) / (1 + c rho), for rows that have far to go."""
    policy = AutoDraftLength()
    for size in (8, 80):
        policy.student.add(size, 0.6 + 0.05 * size)
        policy.teacher.add(size, 2.4 + 0.2 * size)
    policy.num_rounds, policy.num_judged, policy.num_accepted = 100, 1000.0, 900.0
    c, rho, a = policy.c(8), policy.rho(8), policy.acceptance
    r = c * (1 - rho) / (1 + c * rho)
    exact = torch.linspace(1, 16, 2000, dtype=torch.float64)
    best = exact[(a**-exact - 1 + (exact + r) * torch.tensor(a).double().log()).abs().argmin()]
    assert abs(policy.choose([1000] * 8) - float(best)) <= 0.5 + 1e-2


def test_a_rounds_cost_counts_what_each_row_still_needs_and_going_back():
    policy = AutoDraftLength()
    policy.num_rounds = 100
    policy.student.add(8, 1.0)
    policy.teacher.add(8, 10.0)
    assert policy.cost(4, [1] * 7 + [4]) == pytest.approx(14 / (7 + expected_tokens(0.75, 4)))
    assert policy.choose([1000] * 8) > 1
    policy.going_back.add(8, 100.0)
    assert policy.cost(4, [1000] * 8) == pytest.approx(114 / (8 * expected_tokens(0.75, 4)))
    assert policy.choose([1000] * 8) == 1


def test_the_line_through_the_measurements_has_no_negative_part_and_ignores_outliers():
    cost = ForwardCost()
    assert cost.seconds(8) > 0  # nothing measured
    for size in (8, 16, 24):
        for seconds in (1 + size, 1 + size, 1 + size, 100 * (1 + size)):
            cost.add(size, seconds)
    assert cost.line() == pytest.approx((1.0, 1.0))
    falling, steep = ForwardCost(), ForwardCost()
    for size, seconds in ((8, 2.0), (16, 1.0)):
        falling.add(size, seconds)
        steep.add(size, 1 / seconds**3)
    assert falling.line() == pytest.approx((1.5, 0.0))
    assert steep.line()[0] >= 0


def test_tokens_expected_of_a_round():
    assert expected_tokens(0.5, 3) == pytest.approx(1 + 0.5 + 0.25)
    assert expected_tokens(0.0, 5) == 1


def test_it_never_drafts_beyond_what_any_row_needs():
    policy = AutoDraftLength()
    for _ in range(100):
        assert policy.choose([1, 2, 1]) <= 2
        policy.observe(Round(3, 2, 1.0, 100.0, 6, 6))


class Erratic(DraftLength):
    """A stopwatch gone mad."""

    def __init__(self, seed):
        super().__init__(7)
        self.generator = torch.Generator().manual_seed(seed)

    def choose(self, remaining):
        return min(int(torch.randint(1, 8, (), generator=self.generator)), max(remaining))


def test_whatever_the_stopwatch_says_the_texts_are_the_same():
    student, teacher = tiny_model(seed=1), tiny_model(seed=2)
    prompts = torch.randint(0, 250, (4, 6), generator=torch.Generator().manual_seed(0)).tolist()
    uniforms = torch.rand((4, 20, 3), generator=torch.Generator().manual_seed(1))

    def labels(num_draft_tokens):
        return sample(
            student, teacher, prompts, ACCEPTANCE_RULES["top_k"](k=60), noise=uniforms, max_new_tokens=20,
            eos_token_ids=range(0, 259, 9), num_draft_tokens=num_draft_tokens, max_rows=3,
        ).labels  # fmt: skip

    fixed = labels(3)
    kept = AutoDraftLength()
    for policy in ("auto", kept, kept, Erratic(0), Erratic(1)):
        assert torch.equal(labels(policy), fixed)
    assert kept.num_rounds > 4 and kept.student.measured and kept.teacher.measured


def test_marks_are_read_as_seconds():
    stopwatch = Stopwatch(torch.device("cpu"))
    for _ in range(3):
        stopwatch.mark()
    assert len(stopwatch.seconds()) == 2 and min(stopwatch.seconds()) >= 0


def test_once_it_has_measured_the_same_tokens_make_the_same_choices():
    """A policy restored from text chooses as the one that was saved, though every forward now takes another time."""
    saved = AutoDraftLength(num_measured_rounds=30)
    Machine(0.8, (0.6, 0.05), (2.4, 0.2), jitter=2.0).cost_per_token(saved)
    assert not saved.is_measuring
    restored = AutoDraftLength(num_measured_rounds=30)
    restored.load_state_dict(json.loads(json.dumps(saved.state_dict())))
    for judged, accepted in ((8, 2), (24, 20), (5, 0), (40, 39)) * 20:
        lengths = [policy.choose([30, 50, 50]) for policy in (saved, restored)]
        assert lengths[0] == lengths[1]
        saved.observe(Round(3, lengths[0], 1.0, 2.0, judged, accepted))
        restored.observe(Round(3, lengths[1], 9.0, 0.1, judged, accepted))


def test_by_default_a_run_drafts_automatically_unless_it_has_to_repeat_to_the_last_bit():
    default = SKDConfig("out", bf16=False)
    assert isinstance(default.draft_length(), AutoDraftLength)
    assert replace(default, full_determinism=True).draft_length().choose([100]) == 5
    assert SKDConfig("out", bf16=False, full_determinism=True, num_draft_tokens=3).draft_length().choose([100]) == 3
    with pytest.raises(ValueError, match="num_draft_tokens='auto'.*full_determinism"):
        SKDConfig("out", bf16=False, full_determinism=True, num_draft_tokens="auto")


@pytest.mark.parametrize("wrong", [0, -1, 2.5, "automatic", True])
def test_anything_but_a_length_is_refused_by_sampler_and_config(wrong):
    with pytest.raises(ValueError, match="num_draft_tokens"):
        DraftLength.of(wrong)
    with pytest.raises(ValueError, match="num_draft_tokens"):
        SKDConfig("out", num_draft_tokens=wrong, bf16=False)


@pytest.mark.parametrize("text, value", [("auto", "auto"), ("3", 3)])
def test_the_command_line_takes_a_number_and_auto(text, value):
    (args,) = TrlParser(SKDConfig).parse_args_and_config(
        ["--output_dir", "out", "--bf16", "False", "--num_draft_tokens", text]
    )
    assert args.num_draft_tokens == value
