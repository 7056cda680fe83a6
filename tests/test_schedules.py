"""Numbers that move over a training: their values by hand, what the configuration makes of them, and a run that follows one."""

import itertools
import json
import math
from typing import Optional

import pytest
import torch
from test_skd_trainer import ROWS, losses, make_trainer

from skd_trl import ACCEPTANCE_RULES, SKDConfig, SpecKDConfig
from skd_trl.schedules import Schedule


def config(config_class=SKDConfig, **settings):
    return config_class("x", use_cpu=True, bf16=False, **settings)


@pytest.mark.parametrize(
    "schedule, values",
    [
        (Schedule(0.0, 1.0), [0.0, 0.25, 0.5, 0.75, 1.0]),
        (Schedule(1.0, 0.0, "cosine"), [1.0, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2, 0.0]),
        (Schedule(0.0, 1.0, "step", hold=0.4), [0.0, 0.0, 1.0, 1.0, 1.0]),
        (Schedule(10.0, 20.0, hold=0.4), [10.0, 10.0, 10.0, 15.0, 20.0]),  # two steps held, two to move
        (Schedule(1.0, 0.2, num_steps=2), [1.0, 0.6, 0.2, 0.2, 0.2]),
        (Schedule(0.0, 1.0, hold=0.8), [0.0] * 4 + [1.0]),  # the last step is the end's, whatever is held
        (Schedule(0.0, 1.0, "cosine", hold=0.99), [0.0] * 4 + [1.0]),
        (Schedule(0.0, 1.0, "step", hold=0.99), [0.0] * 4 + [1.0]),
    ],
)
def test_a_schedule_has_the_values_of_its_formula(schedule, values):
    assert [schedule.at(step, 5) for step in range(5)] == pytest.approx(values)


@pytest.mark.parametrize(
    "hold, num_steps",
    [*itertools.product([0.1, 0.3, 0.7], [10, 30, 100]), (0.07, 100)],  # 0.07 x 100 = 7.000000000000001
)
def test_a_step_comes_after_exactly_the_held_share(num_steps, hold):
    values = [Schedule(0.0, 1.0, "step", hold).at(step, num_steps) for step in range(num_steps)]
    assert values == sorted(values) and values.count(0.0) == round(hold * num_steps)


@pytest.mark.parametrize("shape", ["linear", "cosine"])
def test_the_last_step_has_the_end_exactly_and_a_single_step_the_start(shape):
    schedule = Schedule(0.1, 0.7, shape, hold=0.25)
    assert schedule.at(0, 8) == 0.1 and schedule.at(7, 8) == 0.7 and schedule.at(9, 8) == 0.7
    assert schedule.at(0, 1) == 0.1


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"shape": "exponential"}, "shape='exponential'.*linear, cosine, step"),
        ({"hold": 1.0}, "hold=1.0"),
        ({"shape": "step"}, "Set hold above 0"),
        ({"end": "soon"}, "end='soon'"),
        ({"num_steps": 0}, "num_steps=0"),
    ],
)
def test_an_impossible_schedule_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Schedule(**{"start": 0.0, "end": 1.0, **fields})


def test_whole_numbers_stay_whole_and_others_do_not_become_so():
    schedules = {"accept_top_k": {"end": 20}, "lmbda": {"start": 0, "end": 1}}
    args = config(schedules=schedules)
    assert [args.at(step, 5).acceptance_rule().k for step in range(5)] == [25, 24, 22, 21, 20]
    assert all(isinstance(args.at(step, 5).accept_top_k, int) for step in range(5))
    assert [args.at(step, 5).lmbda for step in range(5)] == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert args.accept_top_k == 25 and args.lmbda == 1.0  # the configuration itself stays as it was


@pytest.mark.parametrize("default", [None, 25])
@pytest.mark.parametrize("annotation", [int | None, Optional[int], "int | None", "typing.Optional[int]"], ids=repr)  # noqa: UP045
def test_a_whole_number_that_may_be_none_stays_whole(annotation, default):
    def make_rule(rank=default):
        return ACCEPTANCE_RULES["top_k"](k=rank or 1)

    make_rule.__annotations__["rank"] = annotation
    args = config(accept=make_rule, schedules={"accept_kwargs.rank": {"start": 25, "end": 20}})
    assert [args.at(step, 5).acceptance_rule().k for step in range(5)] == [25, 24, 22, 21, 20]
    assert all(isinstance(args.at(step, 5).accept_kwargs["rank"], int) for step in range(5))


@pytest.mark.parametrize(
    "settings, value",
    [
        ({"accept": "min_prob", "schedules": {"accept_kwargs.alpha": {"end": 0.75}}}, lambda a: a.acceptance_rule().alpha),
        (
            {"accept": "min_prob", "accept_kwargs": {"alpha": 0.25}, "schedules": {"accept_kwargs.alpha": Schedule(0.25, 0.75)}},
            lambda a: a.acceptance_rule().alpha,
        ),
        ({"schedules": {"teacher_temperature": {"start": 0.25, "end": 0.75}}}, lambda a: a.teacher_sampling().temperature),
        ({"schedules": {"student_top_p": {"start": 0.25, "end": 0.75}}}, lambda a: a.student_sampling().top_p),
        ({"divergence": "jsd", "beta": 0.25, "schedules": {"beta": {"end": 0.75}}}, lambda a: a.beta),
    ],
)  # fmt: skip
def test_a_number_that_the_run_uses_can_move_wherever_it_is_set(settings, value):
    args = config(**settings)
    assert [value(args.at(step, 3)) for step in range(3)] == pytest.approx([0.25, 0.5, 0.75])


def test_a_gates_shorthands_are_schedules():
    short = config(SpecKDConfig, gate_top_k=20, gate_top_k_end=10, gate_floor=0.2, gate_warmup_steps=4)
    schedules = {"gate_top_k": {"end": 10}, "gate_floor": {"start": 1.0, "end": 0.2, "num_steps": 4}}
    long = config(SpecKDConfig, gate_top_k=20, schedules=schedules)
    for step in range(11):
        for name in ("gate_top_k", "gate_floor"):
            assert getattr(short.at(step, 11), name) == getattr(long.at(step, 11), name)
    with pytest.raises(ValueError, match="gate_top_k_end and schedules both move gate_top_k"):
        config(SpecKDConfig, gate_top_k_end=3, schedules={"gate_top_k": {"end": 4}})


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"schedules": {"accept_topk": {"end": 5}}}, "'accept_topk' is no number that this run uses; it uses lmbda.*accept_top_k"),
        ({"schedules": {"divergence": {"end": 5}}}, "'divergence' is no number"),
        ({"schedules": {"learning_rate": {"end": 0}}}, "'learning_rate' is no number"),
        ({"schedules": {"accept_top_k": {"end": 5}}, "accept": "min_prob"}, "'accept_top_k' is no number.*accept_kwargs.alpha"),
        ({"schedules": {"accept_top_k": {"end": 5}}, "rollout": "student"}, "'accept_top_k' is no number"),
        ({"schedules": {"lmbda": {"end": 0.5}}, "rollout": "dataset"}, "'lmbda' is no number"),
        ({"schedules": {"accept_top_k": {"ned": 5}}}, "'accept_top_k': {'ned': 5}.*start, end, shape, hold"),
        ({"schedules": {"accept_top_k": {"start": 5}}}, "does not say where the schedule ends"),
        ({"schedules": {"accept_top_k": {"end": 0}}}, "at their end: accept='top_k', accept_top_k=0"),
        ({"schedules": {"lmbda": {"end": 1.5}}}, "at their end: lmbda=1.5"),
        ({"schedules": {"accept_top_k": {"start": 50, "end": 5}}, "accept_top_k": 10}, "starts at 50, and accept_top_k is 10"),
        ({"schedules": [1]}, "not a dict"),
    ],
)  # fmt: skip
def test_a_schedule_without_effect_or_sense_is_refused_with_the_names_there_are(settings, message):
    with pytest.raises(ValueError, match=message):
        config(**settings)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"gate": "hellinger", "gate_top_k_end": 3}, "gate_top_k_end would have no effect"),
        ({"gate": "hellinger", "schedules": {"gate_top_k": {"end": 3}}}, "'gate_top_k' is no number.*gate_floor"),
    ],
)
def test_a_gates_number_that_the_gate_does_not_take_cannot_move(settings, message):
    with pytest.raises(ValueError, match=message):
        config(SpecKDConfig, **settings)


def test_schedules_are_read_from_json_and_shown_as_json():
    text = '{"lmbda": {"start": 0.0, "end": 1.0, "shape": "step", "hold": 0.3}}'
    args = config(schedules=text)
    assert args.schedules == json.loads(text)
    shown = json.loads(config(schedules={"lmbda": Schedule(0.0, 1.0, "step", 0.3)}).to_json_string())
    assert shown["schedules"] == {"lmbda": {**json.loads(text)["lmbda"], "num_steps": None}}


def test_mixed_training_is_supervised_first_and_on_policy_after(tmp_path):
    """The SKD paper's mixed training, in one configuration."""
    schedules = {"lmbda": {"start": 0.0, "end": 1.0, "shape": "step", "hold": 0.5}}
    trainer = make_trainer(tmp_path, schedules=schedules, max_steps=4)
    seen, original = [], trainer.training_step
    trainer.training_step = lambda model, inputs, *rest: (
        seen.append("replaced" in inputs) or original(model, inputs, *rest)
    )
    trainer.train()
    assert seen == [False, False, True, True]
    assert trainer.args.samples
    with pytest.raises(ValueError, match="reference"):  # of the first steps
        make_trainer(tmp_path, [{"prompt": row["messages"][0]["content"]} for row in ROWS], schedules=schedules)


def test_a_run_whose_number_moves_takes_each_step_as_a_run_with_that_number(tmp_path):
    """259 is all of the vocabulary: the first step is trained on the student's text, the last nearly on the teacher's."""
    moved = make_trainer(tmp_path, schedules={"accept_top_k": {"start": 259, "end": 1}}, accept_top_k=259, max_steps=3)
    moved.train()
    shares = [entry["replaced_share"] for entry in moved.state.log_history if "replaced_share" in entry]
    assert shares[0] == 0.0 and shares[0] < shares[1] < shares[2] and shares[2] > 0.8
    fixed = make_trainer(tmp_path, accept_top_k=259, max_steps=3)
    fixed.train()
    assert losses(moved)[0] == losses(fixed)[0] and losses(moved)[1:] != losses(fixed)[1:]


def test_a_divergence_whose_parameter_moves_is_made_for_each_step(tmp_path):
    settings = {"rollout": "dataset", "divergence": "jsd", "max_grad_norm": 0.0, "shuffle_dataset": False}
    fixed = make_trainer(tmp_path, beta=0.1, max_steps=2, **settings)
    moved = make_trainer(tmp_path, beta=0.1, schedules={"beta": {"end": 0.9}}, max_steps=2, **settings)
    fixed.train()
    moved.train()
    assert losses(moved)[0] == losses(fixed)[0] and losses(moved)[1] != losses(fixed)[1]
    student, teacher = torch.randn(2, 5, 259, generator=torch.Generator().manual_seed(0))
    expected = config(divergence="jsd", beta=0.9).make_divergence()(student, teacher)
    assert torch.equal(moved.divergence(student, teacher), expected)
