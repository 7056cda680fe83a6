"""One way to make an idea: what it takes, what it refuses, and what is shown of it."""

import io
import json
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from skd_trl import ACCEPTANCE_RULES, DIVERGENCES, GATES, SKDConfig, SpecKDConfig
from skd_trl.ideas import IdeaField, check_used, describe, make_idea, numbers_of
from skd_trl.loss.gates import Gate
from skd_trl.sampling.acceptance import AcceptanceRule, TopK


@dataclass(frozen=True)
class Shape:
    sides: int = 4
    size: float = 1.0
    name: str = "square"


def circle(radius: float, *, centre=(0, 0)) -> Shape:
    if radius < 0:
        raise ValueError(f"radius={radius} is negative.")
    return Shape(0, radius, "circle")


@dataclass
class Drawing:
    shape: Any = "square"
    shape_kwargs: dict | None = None
    shape_size: float = 1.0
    pen: str = field(default="red")


FIELD = IdeaField(
    "shape",
    {"square": Shape, "circle": circle},
    "a Shape",
    lambda value: isinstance(value, Shape),
    {"size": "shape_size"},
)


def make(**settings):
    drawing = Drawing(**settings)
    check_used(drawing, [FIELD])
    return make_idea(FIELD, drawing)


def test_a_named_idea_gets_its_kwargs_and_the_fields_that_its_factory_takes():
    assert make(shape_size=2.0, shape_kwargs={"sides": 3}) == Shape(3, 2.0)
    assert make(shape="circle", shape_kwargs={"radius": 5.0}) == Shape(0, 5.0, "circle")


def test_an_object_a_factory_and_a_path_are_taken_like_names():
    square = Shape(7)
    assert make(shape=square) is square
    assert make(shape=Shape, shape_size=3.0) == Shape(4, 3.0)
    assert make(shape="test_ideas:circle", shape_kwargs={"radius": 1.0}) == Shape(0, 1.0, "circle")


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"shape": "squircle"}, "shape='squircle' is unknown; choose one of square, circle"),
        ({"shape": None}, "shape=None is not a Shape"),
        ({"shape": "nowhere:circle"}, "shape='nowhere:circle' cannot be imported: No module named 'nowhere'"),
        ({"shape": "test_ideas:oval"}, "shape='test_ideas:oval' cannot be imported.*oval"),
        ({"shape": "math:pi"}, "shape='math:pi' is of type float, and shape needs a Shape"),
        ({"shape": "builtins:dict"}, "shape='builtins:dict': no signature found.*Wrap it in a function"),
        ({"shape": lambda: 3}, "makes an object of type int, and shape needs a Shape"),
        ({"shape_kwargs": {"sdies": 3}}, r"unexpected 'sdies'; square takes sides, size \(set by shape_size\), name"),
        ({"shape_kwargs": {"size": 3}}, "size is set by shape_size"),
        ({"shape_kwargs": "sides"}, "shape_kwargs='sides' is not a dict"),
        ({"shape": "circle"}, "shape='circle' needs radius: set it in shape_kwargs"),
        ({"shape": "circle", "shape_kwargs": {"radius": -1}}, "shape_kwargs={'radius': -1}: radius=-1 is negative"),
        ({"shape": "circle", "shape_kwargs": {"radius": 1}, "shape_size": 2.0},
         "shape_size=2.0 would have no effect beside shape='circle': circle takes radius, centre. It belongs to shape='square'"),
        ({"shape": Shape(), "shape_kwargs": {"sides": 3}}, "shape_kwargs={'sides': 3} would have no effect"),
        ({"shape": Shape(), "shape_size": 3.0}, "shape_size=3.0 would have no effect.*it is an object"),
    ],
)  # fmt: skip
def test_what_would_have_no_effect_or_does_not_exist_is_refused_by_name(settings, message):
    with pytest.raises(ValueError, match=message):
        make(**settings)


def test_the_numbers_of_an_idea_are_known_by_where_they_are_set():
    numbers = numbers_of(FIELD, Drawing(shape_kwargs={"sides": 6}))
    assert {path: (number.value, number.is_whole) for path, number in numbers.items()} == {
        "shape_kwargs.sides": (6, True),
        "shape_size": (1.0, False),
    }
    assert numbers_of(FIELD, Drawing(shape="circle"))["shape_kwargs.radius"].value is None
    assert numbers_of(FIELD, Drawing(shape=Shape())) == {}


# The package's own fields


def config(config_class=SKDConfig, **settings):
    return config_class("x", use_cpu=True, bf16=False, **settings)


@pytest.mark.parametrize("name", ACCEPTANCE_RULES)
def test_every_rule_is_made_from_its_name(name):
    assert config(accept=name).acceptance_rule() == ACCEPTANCE_RULES[name]()


@pytest.mark.parametrize("name", DIVERGENCES)
def test_every_divergence_is_made_from_its_name(name):
    student, teacher = torch.randn(2, 3, 11, generator=torch.Generator().manual_seed(0))
    made = config(divergence=name).make_divergence()
    assert torch.equal(made(student, teacher), DIVERGENCES[name]()(student, teacher))


@pytest.mark.parametrize("name", GATES)
def test_every_gate_is_made_from_its_name_with_the_configurations_floor_and_its_own_k(name):
    gate = config(SpecKDConfig, gate=name, gate_floor=0.3).make_gate()
    assert (gate.name, gate.floor, gate.keep_eos) == (name, 0.3, False)
    assert config(SpecKDConfig, gate=name, gate_keep_eos=True).make_gate().keep_eos


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"accept": "min_prob", "accept_kwargs": {"alhpa": 0.1}}, "unexpected 'alhpa'; min_prob takes alpha"),
        ({"accept_kwargs": {"k": 3}}, "k is set by accept_top_k"),
        ({"accept": "min_prob", "accept_top_k": 3}, "accept_top_k=3 .*min_prob takes alpha. It belongs to accept='top_k'"),
        ({"accept": TopK(3), "accept_top_k": 3}, "accept_top_k=3 .*it is an object"),
        ({"accept": "speculative", "accept_kwargs": {"gamma": 0.5}}, "unexpected 'gamma'; speculative takes no parameters"),
        ({"divergence": "jsd", "divergence_kwargs": {"beta": 0.1}}, "beta is set by beta"),
        ({"divergence": torch.dist}, "divergence=.*no signature found.*Wrap it in a function"),
        ({"rollout": "student", "accept": "min_prob"}, "accept='min_prob' would have no effect: no proposal is judged"),
        ({"rollout": "teacher", "accept_top_k": 3}, "accept_top_k=3 would have no effect"),
        ({"rollout": "dataset", "accept_kwargs": {"k": 3}}, "accept_kwargs={'k': 3} would have no effect"),
        ({"lmbda": 0.0, "accept_top_k": 3}, "accept_top_k=3 would have no effect"),
        ({"rollout": "student", "replaced_loss": "nll"}, "replaced_loss='nll' would have no effect"),
        ({"rollout": "dataset", "replaced_loss": "nll"}, "replaced_loss='nll' would have no effect"),
        ({"accept": "always", "replaced_loss": "nll"}, "replaced_loss='nll' would have no effect"),
    ],
)  # fmt: skip
def test_a_setting_without_effect_on_the_responses_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        config(**settings)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"gate": "hellinger", "gate_top_k": 3}, "gate_top_k=3 .*It belongs to gate='greedy_top_k', gate='spec_k'"),
        ({"gate_kwargs": {"floor": 0.5}}, "floor is set by gate_floor"),
        ({"gate": GATES["hellinger"](), "gate_floor": 0.5}, "gate_floor=0.5 .*it is an object"),
        ({"gate": GATES["hellinger"](), "gate_kwargs": {"alpha": 1}}, "would have no effect"),
    ],
)
def test_a_setting_without_effect_on_the_gate_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        config(SpecKDConfig, **settings)


def test_a_field_that_only_the_compared_gate_takes_is_its():
    args = config(SpecKDConfig, gate="hellinger", gate_top_k=3, gate_compare="greedy_top_k")
    student, teacher = torch.zeros(1, 9), torch.arange(9.0).flip(0)[None]
    student[0, 3] = 1.0  # rank 3: outside of the top 3, inside of the default's 5
    assert args.make_compared_gate()(student_logits=student, teacher_logits=teacher).item() < 1


def tempered(temperature, floor):
    return lambda student, teacher: (student - teacher).abs().sum(-1) / temperature + floor


@pytest.mark.parametrize(
    "settings", [{"divergence_kwargs": {"temperature": 2.0, "floor": 0.0}}, {"beta": 0.1}], ids=str
)
def test_a_factory_of_a_divergence_that_is_taken_for_one_is_told_to_have_defaults(settings):
    with pytest.raises(ValueError, match="is an object, which has its parameters .*they need defaults"):
        config(divergence=tempered, **settings)


def test_where_the_teacher_writes_all_tokens_their_likelihood_can_be_the_loss():
    assert config(rollout="teacher", replaced_loss="nll").rollouts == {"teacher"}
    assert config(rollout="dataset", seq_kd=True, replaced_loss="nll").rollouts == {"teacher"}


def test_objects_are_shown_by_name_or_repr_and_arguments_with_them_can_be_saved():
    args = config(
        SpecKDConfig,
        rollout="interleaved",
        accept=TopK(3),
        divergence=torch.nn.functional.kl_div,
        gate=Gate(lambda distributions, facts: distributions.student_entropy, name="mine"),
    )
    shown = json.loads(args.to_json_string())
    assert shown["accept"] == "TopK(k=3)" and shown["divergence"] == "torch.nn.functional:kl_div"
    assert shown["gate"].startswith("Gate(") and "name='mine'" in shown["gate"]
    assert args.to_sanitized_dict()["accept"] == "TopK(k=3)"
    buffer = io.BytesIO()
    torch.save(args.described(), buffer)
    buffer.seek(0)
    assert torch.load(buffer, weights_only=False).accept == "TopK(k=3)"
    assert args.accept == TopK(3)
    assert describe(AcceptanceRule) == "skd_trl.sampling.acceptance:AcceptanceRule"
