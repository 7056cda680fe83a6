"""A teacher on another device than the student: the same texts, losses and updates, and nothing of one device in the other's operators.

The other device is PyTorch's lazy one, which every build has: it computes on the CPU, and its tensors take no operand of another device.
"""

from dataclasses import replace

import pytest
import torch
import torch._lazy.ts_backend
from datasets import Dataset
from test_mixed_batches import spy_on_trained_batches
from test_several_teachers import ROWS as ROWS_OF_TWO
from test_skd_trainer import ROWS, losses, make_trainer, update_of
from test_teacher_prompt import ROWS as ROWS_WITH_CONTEXT
from tiny import byte_tokenizer, tiny_model

from skd_trl import SKDConfig
from skd_trl.evaluation.callback import HeldOutEvaluation
from skd_trl.evaluation.draft_model import Drafting, draft_acceptance
from skd_trl.training import teacher_weights
from skd_trl.training.machine import Machine
from skd_trl.training.teacher_weights import check_teacher_device, load_teacher


@pytest.fixture(scope="module")
def other():
    torch._lazy.ts_backend.init()
    return "lazy:0"


def trained(trainer):
    """Responses, losses and the update of a step."""
    seen = spy_on_trained_batches(trainer)
    update = update_of(trainer)
    responses = [labels[labels != -100].tolist() for batch in seen for labels in batch["labels"]]
    return responses, losses(trainer), update


RUNS = [
    (ROWS, {}),
    (ROWS_WITH_CONTEXT, {"rollout": "dataset"}),
    (ROWS_OF_TWO, {}),
    (ROWS_OF_TWO, {"rollout": "dataset"}),
]


@pytest.mark.parametrize("rows, settings", RUNS, ids=["interleaved", "dataset", "several", "several, dataset"])
def test_a_teacher_elsewhere_writes_and_teaches_what_one_beside_the_student_does(tmp_path, other, rows, settings):
    settings = {"max_grad_norm": 0.0, "max_new_tokens": 4, "num_draft_tokens": 2, **settings}

    def teacher():
        models = {"first": tiny_model(seed=2), "second": tiny_model("qwen3", seed=3)}
        return models if rows is ROWS_OF_TWO else models["first"]

    own = make_trainer(tmp_path / "own", rows, teacher=teacher(), **settings)
    there = make_trainer(tmp_path / "there", rows, teacher=teacher(), teacher_device=other, **settings)
    assert {p.device.type for p in there._inner_teacher.parameters()} == {"lazy"}
    assert {p.device.type for p in there.model.parameters()} == {"cpu"}
    here, elsewhere = trained(own), trained(there)
    assert here[0] == elsewhere[0]
    assert elsewhere[1] == pytest.approx(here[1], rel=1e-4)
    assert (elsewhere[2] - here[2]).norm() < 1e-4 * here[2].norm()
    assert {p.device.type for p in there._inner_teacher.parameters()} == {"lazy"}


def test_an_evaluation_asks_a_teacher_elsewhere_too(tmp_path, other):
    settings = {"eval_dataset": Dataset.from_list(ROWS[:4])}
    there = make_trainer(tmp_path / "there", ROWS, teacher_device=other, **settings)
    here = make_trainer(tmp_path / "here", ROWS, **settings)
    assert there.evaluate()["eval_loss"] == pytest.approx(here.evaluate()["eval_loss"], rel=1e-4)


def test_an_evaluation_drafts_for_a_teacher_elsewhere_too(tmp_path, other):
    found = []
    for name, settings in (("here", {}), ("there", {"teacher_device": other})):
        trainer = make_trainer(tmp_path / name, max_new_tokens=4, **settings)
        held_out = HeldOutEvaluation(trainer, Dataset.from_list(ROWS[:3]), metrics=[], drafting=Drafting(2))
        decoding = replace(held_out.evaluation.decoding, batch_size=2)
        prompts = held_out.data.prompt_ids
        found.append(
            draft_acceptance(held_out.student, held_out.teacher, prompts, decoding=decoding, num_draft_tokens=2)
        )
    here, there = found
    assert here["accepted"][:, 1].sum() > 3
    assert all((there[name] == values).all() for name, values in here.items())


def test_a_teacher_that_is_named_is_read_to_its_device_and_nowhere_else(tmp_path, monkeypatch, other):
    tiny_model(seed=2).save_pretrained(tmp_path / "teacher")
    byte_tokenizer().save_pretrained(tmp_path / "teacher")
    there = load_teacher(str(tmp_path / "teacher"), config(tmp_path, teacher_device=other))
    assert {p.device.type for p in there.parameters()} == {"lazy"}
    whole = tiny_model(seed=2).state_dict()
    assert all(torch.equal(values.cpu(), whole[name]) for name, values in there.state_dict().items())

    # On a GPU, which is not here: what transformers is asked for.
    asked = []
    original = teacher_weights.AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(
        teacher_weights.AutoModelForCausalLM, "from_pretrained",
        lambda name, **kwargs: asked.append(kwargs.pop("device_map", None)) or original(name, **kwargs),
    )  # fmt: skip
    gpu = Machine(torch.device("cuda:1"), 2**36, "MULTI_GPU", 2)
    monkeypatch.setattr(teacher_weights, "machine_of", lambda args: gpu)
    load_teacher(str(tmp_path / "teacher"), config(tmp_path))
    load_teacher(str(tmp_path / "teacher"), config(tmp_path, teacher_device="cpu"))
    assert asked == [{"": "cuda:1"}, None]


def config(tmp_path, **settings):
    return SKDConfig(str(tmp_path), bf16=False, use_cpu=True, **settings)


def test_what_contradicts_a_device_of_the_teachers_own_is_refused(tmp_path):
    for settings, message in (
        ({"teacher_device": "nowhere"}, "is no device"),
        ({"teacher_device": "cpu", "shard_teacher": True}, "Drop one of them"),
        ({"teacher_device": "cpu", "teacher_model_kind": "live"}, "Drop one of them"),
        ({"teacher_device": "cpu", "teacher_model_server_url": ["http://x"]}, "Drop one of them"),
    ):
        with pytest.raises(ValueError, match=message):
            config(tmp_path, **settings)
    with pytest.raises(ValueError, match=r"sees \d+ GPU\(s\), counted from 0"):
        make_trainer(tmp_path, ROWS, teacher_device="cuda:7")
    with pytest.raises(ValueError, match="device_map"):
        args = config(tmp_path, teacher_device="cpu", teacher_model_init_kwargs={"device_map": "auto"})
        check_teacher_device(args)


@pytest.mark.parametrize("engine", ["DEEPSPEED", "FSDP", "MULTI_GPU"])
def test_engines_that_place_weights_themselves_refuse_it_by_name(tmp_path, monkeypatch, engine):
    machine = Machine(torch.device("cpu"), 2**36, engine, 2)
    monkeypatch.setattr(teacher_weights, "machine_of", lambda args: machine)
    message = "each of 2 processes" if engine == "MULTI_GPU" else f"under {engine} the engine decides"
    with pytest.raises(ValueError, match=message):
        check_teacher_device(config(tmp_path, teacher_device="lazy:0"))
    if engine == "MULTI_GPU":
        check_teacher_device(config(tmp_path, teacher_device="cpu"))
