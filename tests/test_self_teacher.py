"""The student as its own teacher: equal to second copies by value, moved as a plain average, and without their memory."""

import copy
import gc

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from test_mixed_batches import spy_on_trained_batches
from test_skd_trainer import KillAfter, Killed, losses, make_trainer
from test_teacher_prompt import ROWS
from tiny import tiny_model
from torch import nn
from transformers import TrainerCallback

from skd_trl import SKDConfig, SKDTrainer
from skd_trl.training.self_teacher import StudentAverage, self_teacher


PLAIN_ROWS = [{k: v for k, v in row.items() if k != "privileged_context"} for row in ROWS]
ADAPTERS = {
    "all-linear": {"target_modules": "all-linear"},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "saved head": {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["lm_head"]},
}

LORA = LoraConfig(r=4, target_modules="all-linear")
RESUMED = [("ema", None), ("ema", LORA), ("base", LORA), ("live", None)]


class SelfTaught(SKDTrainer):
    """Without a teacher_model."""

    def __init__(self, teacher_model=None, **kwargs):
        super().__init__(teacher_model=teacher_model if kwargs["args"].teacher_model_kind is None else None, **kwargs)


def make(tmp_path, rows=ROWS, **settings):
    trainer = make_trainer(tmp_path, rows, trainer_class=SelfTaught, **{"learning_rate": 1e-2, **settings})
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # an adapter that is new changes nothing
        for name, parameter in trainer.model.named_parameters():
            if "lora_B" in name or "modules_to_save" in name:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return trainer


def trained(trainer):
    """Everything that a run leaves: responses, losses, weights."""
    seen = spy_on_trained_batches(trainer)
    trainer.train()
    responses = [labels[labels != -100].tolist() for batch in seen for labels in batch["labels"]]
    return responses, losses(trainer), {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def assert_same(run, other):
    assert run[:2] == other[:2]
    assert all(torch.equal(run[2][name], other[2][name]) for name in other[2])


@pytest.mark.parametrize("rows", [PLAIN_ROWS, ROWS], ids=["one prompt", "two prompts"])
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_without_its_adapter_the_student_is_bit_for_bit_a_second_copy_of_the_base_model(tmp_path, adapter, rows):
    settings = {"max_steps": 2, "peft_config": LoraConfig(r=4, lora_alpha=8, **ADAPTERS[adapter])}
    own = make(tmp_path, rows, teacher_model_kind="base", **settings)
    other = make(tmp_path, rows, teacher=tiny_model(seed=1), **settings)
    first, second = trained(own), trained(other)
    assert_same(first, second)
    assert min(first[1]) > 0.01


@pytest.mark.parametrize("rollout", ["dataset", "student"])
def test_other_rollouts_with_an_adapter_are_those_of_a_second_copy_too(tmp_path, rollout):
    settings = {"max_steps": 2, "rollout": rollout, "peft_config": LoraConfig(r=4, target_modules="all-linear")}
    own = make(tmp_path, teacher_model_kind="base", **settings)
    assert_same(trained(own), trained(make(tmp_path, teacher=tiny_model(seed=1), **settings)))


def test_a_student_without_an_adapter_has_the_one_that_training_started_from_as_base(tmp_path):
    own = make(tmp_path, teacher_model_kind="base", max_steps=2)
    assert_same(trained(own), trained(make(tmp_path, teacher=tiny_model(seed=1), max_steps=2)))


def test_the_base_of_a_student_that_came_with_an_adapter_is_the_model_inside(tmp_path):
    def student():
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return get_peft_model(tiny_model(seed=1), LoraConfig(r=4, target_modules="all-linear"))

    own = make(tmp_path, PLAIN_ROWS, model=student(), teacher_model_kind="base", max_steps=2)
    assert_same(
        trained(own), trained(make(tmp_path, PLAIN_ROWS, model=student(), teacher=tiny_model(seed=1), max_steps=2))
    )


@pytest.mark.parametrize("begin", ["pissa", "pissa_niter_2", "olora", "orthogonal", "gaussian", True, False])
@pytest.mark.parametrize("comes_with_it", [True, False])
def test_a_base_of_which_the_adapter_took_a_part_is_refused(tmp_path, begin, comes_with_it):
    adapter = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=begin)
    given = {"model": get_peft_model(tiny_model(seed=1), adapter)} if comes_with_it else {"peft_config": adapter}
    if str(begin).startswith(("pissa", "olora")):
        with pytest.raises(ValueError, match="without the adapter it is another model.*as teacher_model"):
            make(tmp_path, teacher_model_kind="base", **given)
        return
    teacher = make(tmp_path, teacher_model_kind="base", **given)._inner_teacher
    ids = torch.arange(1, 20)[None]
    assert torch.equal(teacher(input_ids=ids).logits, tiny_model(seed=1)(input_ids=ids).logits)


@pytest.mark.parametrize("kind", ["base", "ema", "live"])
def test_a_student_whose_adapter_is_tied_as_its_embeddings_are_is_its_own_teacher(kind):
    model, ids = tiny_model(seed=1, tie_word_embeddings=True), torch.arange(1, 20)[None]
    base = model(input_ids=ids).logits
    adapter = {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True, "task_type": "CAUSAL_LM"}
    student = get_peft_model(model, LoraConfig(r=4, init_lora_weights=False, **adapter)).eval()
    before = student(input_ids=ids).logits
    teacher = self_teacher(student, kind).eval()
    with torch.no_grad():
        student.get_input_embeddings().lora_embedding_B["default"].mul_(2)
    expected = {"base": base, "ema": before, "live": student(input_ids=ids).logits}[kind]
    assert torch.equal(teacher(input_ids=ids).logits, expected)
    assert not torch.equal(before, student(input_ids=ids).logits) and not torch.equal(before, base)


# Teachers that move


class Watch(TrainerCallback):
    """Keeps the weights of student and teacher before each step and after the last."""

    def __init__(self):
        self.student, self.teacher = [], []

    def on_step_begin(self, args, state, control, **kwargs):
        self.student.append({name: p.detach().clone() for name, p in self.trainer.model.named_parameters()})
        self.teacher.append({name: p.detach().clone() for name, p in self.trainer._inner_teacher.named_parameters()})

    on_train_end = on_step_begin


def watched(tmp_path, **settings):
    watch = Watch()
    trainer = make(tmp_path, callbacks=[watch], **settings)
    watch.trainer = trainer
    return trainer, watch


@pytest.mark.parametrize("peft_config", [None, LoraConfig(r=4, target_modules="all-linear")], ids=["full", "lora"])
@pytest.mark.parametrize("rate, every", [(0.05, 1), (0.3, 2), (1.0, 1)])
def test_an_average_is_moved_by_its_rate_after_every_so_many_steps(tmp_path, peft_config, rate, every):
    trainer, watch = watched(
        tmp_path, teacher_model_kind="ema", teacher_update_rate=rate, teacher_sync_steps=every, max_steps=4,
        peft_config=peft_config,
    )  # fmt: skip
    trainer.train()
    average = watch.teacher[0]
    for name, value in average.items():
        assert torch.equal(value, watch.student[0][name]) != ("lora_B" in name)  # `make` moved these afterwards
    for step in range(1, 5):
        if step % every == 0:
            average = {name: (1 - rate) * value + rate * watch.student[step][name] for name, value in average.items()}
        for name, value in watch.teacher[step].items():
            torch.testing.assert_close(value, average[name], atol=1e-6, rtol=1e-5)
    moved = [name for name in average if not torch.equal(watch.teacher[0][name], watch.teacher[4][name])]
    assert moved and (peft_config is None or all("lora_" in name for name in moved))


@pytest.mark.parametrize("rollout", ["interleaved", "dataset"])
@pytest.mark.parametrize("kind", ["ema", "live"])
def test_each_step_learns_from_the_teacher_of_its_beginning(tmp_path, kind, rollout):
    trainer, watch = watched(
        tmp_path, teacher_model_kind=kind, max_steps=3, rollout=rollout, **({"teacher_update_rate": 0.5} if kind == "ema" else {})
    )  # fmt: skip
    seen = spy_on_trained_batches(trainer)
    trainer.train()
    assert losses(trainer)[2] != losses(trainer)[0]
    for step, batch in enumerate(seen):
        models = []
        for weights in (watch.student[step], watch.teacher[step]):
            models.append(tiny_model(seed=1))
            models[-1].load_state_dict(weights)
        terms = []
        for i, labels in enumerate(batch["labels"]):
            response, q_p = labels[labels != -100].tolist(), []
            for model, name in zip(models, ("prompts", "teacher_prompts"), strict=True):
                mask = batch[name.removesuffix("s") + "_attention_mask"][i] == 1
                ids = batch[name][i][mask].tolist()
                with torch.no_grad():
                    q_p.append(model(torch.tensor([ids + response])).logits[0, len(ids) - 1 : -1].log_softmax(-1))
            terms.append((q_p[1].exp() * (q_p[1] - q_p[0])).sum(-1))
        assert losses(trainer)[step] == pytest.approx(torch.cat(terms).mean().item(), rel=1e-4)
    same = [torch.equal(watch.teacher[3][name], watch.student[3][name]) for name in watch.student[3]]
    assert all(same) if kind == "live" else not any(same)


@pytest.mark.parametrize("kind, peft_config", RESUMED, ids=["ema", "ema-lora", "base-lora", "live"])
def test_a_killed_run_resumes_with_the_teacher_that_it_had(tmp_path, kind, peft_config):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "teacher_model_kind": kind}
    settings["peft_config"] = peft_config
    if kind == "ema":
        settings["teacher_update_rate"] = 0.5
    whole = make(tmp_path / "whole", **settings)
    whole.train()
    with pytest.raises(Killed):
        make(tmp_path / "killed", callbacks=[KillAfter(3)], **settings).train()
    resumed = make(tmp_path / "killed", **settings)
    resumed.train(resume_from_checkpoint=True)
    assert len(set(losses(whole))) == 4
    assert losses(resumed) == losses(whole)


def test_at_the_end_the_teacher_is_the_average_of_the_best_checkpoint(tmp_path):
    """Best by the greatest loss, which the last checkpoint does not have."""
    trainer = make(
        tmp_path, teacher_model_kind="ema", teacher_update_rate=0.5, max_steps=3, save_strategy="steps", save_steps=1,
        eval_dataset=Dataset.from_list(ROWS), eval_strategy="steps", eval_steps=1, load_best_model_at_end=True,
        metric_for_best_model="eval_loss", greater_is_better=True,
    )  # fmt: skip
    trainer.train()
    found = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert max(found) == trainer.state.best_metric != found[-1]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.state.best_metric, rel=1e-5)


def test_a_best_checkpoint_of_weights_alone_leaves_the_average_as_it_is_and_says_so(tmp_path, caplog):
    trainer = make(
        tmp_path, teacher_model_kind="ema", max_steps=2, save_strategy="steps", save_steps=1, save_only_model=True,
        eval_dataset=Dataset.from_list(ROWS), eval_strategy="steps", eval_steps=1, load_best_model_at_end=True,
    )  # fmt: skip
    trainer.train()
    assert "the average that teaches stays that of the last step" in caplog.text


def test_an_average_of_16_bits_moves_by_less_than_their_rounding():
    student, teacher = (nn.Linear(4, 4, bias=False).bfloat16() for _ in range(2))
    with torch.no_grad():
        student.weight.fill_(1.0 + 2**-7)
        teacher.weight.fill_(1.0)
    average = StudentAverage(teacher, student, 0.05, 1)
    average.on_train_begin(None, None, None)
    for step in range(1, 60):
        average.on_step_end(None, type("State", (), {"global_step": step}), None)
    assert torch.equal(teacher.weight, student.weight)


def test_a_resumed_average_beside_an_engine_of_16_bits_keeps_all_its_digits(tmp_path):
    def started(checkpoint=None):
        """A run whose engine has cast the student by the time it begins, as DeepSpeed's does; a checkpoint is loaded before that."""
        torch.manual_seed(0)
        student, teacher = nn.Linear(4, 4), nn.Linear(4, 4)
        average = StudentAverage(teacher, student, 0.05, 1)
        student.to(torch.bfloat16)
        if checkpoint is not None:
            average.load(checkpoint)
        average.on_train_begin(None, None, None)
        return student, teacher, average

    student, teacher, average = started()
    for step in range(1, 4):
        average.on_step_end(None, type("State", (), {"global_step": step}), None)
    average.save(tmp_path)
    _, resumed_teacher, resumed = started(tmp_path)
    kept = {name: value for name, value in average.precise.items() if not torch.equal(value, value.bfloat16().float())}
    assert kept.keys() == {"weight", "bias"}
    assert all(torch.equal(resumed.precise[name], value) for name, value in kept.items())
    assert torch.equal(resumed_teacher.weight, teacher.weight) and teacher.weight.dtype == torch.bfloat16


# Memory


def num_bytes(*models):
    """Of all parameters of these models, each tensor counted once."""
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for m in models for p in m.parameters()}
    return sum(storages.values())


@pytest.mark.parametrize("kind", ["base", "ema", "live"])
def test_the_second_models_memory_is_gone_but_for_what_is_averaged(tmp_path, kind):
    trainer = make(
        tmp_path, teacher_model_kind=kind, peft_config=LoraConfig(r=4, target_modules="all-linear"), max_steps=1
    )
    trainer.train()
    student, teacher = trainer.model, trainer._inner_teacher
    trained_bytes = sum(p.numel() * 4 for p in student.parameters() if p.requires_grad)
    assert num_bytes(student, teacher) - num_bytes(student) == (trained_bytes if kind == "ema" else 0)
    assert num_bytes(student, tiny_model(seed=1)) > 1.5 * num_bytes(student)


def bytes_of_all_parameters():
    """Of every parameter that is alive in this process, wherever it is referred to from."""
    gc.collect()
    alive = [x for x in gc.get_objects() if type(x) is nn.Parameter]
    return sum({p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in alive}.values())


def test_beside_a_second_copy_a_process_has_one_model_less(tmp_path):
    settings = {"peft_config": LORA, "max_steps": 1}
    held = {}
    for name, teacher in (("base", {"teacher_model_kind": "base"}), ("copy", {"teacher": tiny_model(seed=1)})):
        size = num_bytes(tiny_model(seed=1))
        before = bytes_of_all_parameters() - (size if name == "copy" else 0)
        trainer = make(tmp_path, **teacher, **settings)
        trainer.train()
        held[name] = bytes_of_all_parameters() - before
        teacher.clear()
        del trainer
    assert held["copy"] - held["base"] == size


# What is refused


def test_a_live_teacher_that_reads_what_the_student_reads_is_refused_and_others_warn(tmp_path, caplog):
    with pytest.raises(ValueError, match="every loss is 0"):
        make(tmp_path, PLAIN_ROWS, teacher_model_kind="live")
    make(tmp_path, PLAIN_ROWS, teacher_model_kind="base")
    assert "nothing is learned" in caplog.text


def test_settings_that_contradict_each_other_are_refused(tmp_path):
    config = {"bf16": False, "use_cpu": True}
    for settings, message in (
        ({"teacher_model_kind": "mean"}, "choose one of base, ema, live"),
        ({"teacher_model_kind": "base", "teacher_model_name_or_path": "x"}, "Drop one of them"),
        ({"teacher_model_kind": "live", "teacher_update_rate": 0.1}, "would have no effect"),
        ({"teacher_sync_steps": 3}, "would have no effect"),
        ({"teacher_model_kind": "ema", "teacher_update_rate": 0.0}, "above 0"),
        ({"teacher_model_kind": "ema", "teacher_sync_steps": 0}, "at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            SKDConfig(str(tmp_path), **config, **settings)
    args = SKDConfig(str(tmp_path), **config, teacher_model_kind="base")
    with pytest.raises(ValueError, match="a teacher_model was given"):
        SKDTrainer(tiny_model(seed=1), tiny_model(seed=2), args)


def test_a_base_whose_own_weights_are_trained_is_refused():
    student = get_peft_model(tiny_model(seed=1), LoraConfig(r=4, target_modules="all-linear"))
    student.get_base_model().model.norm.weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"model\.norm\.weight.*bias='none'"):
        self_teacher(student, "base")


def test_a_student_whose_weights_were_unfrozen_beside_an_average_is_refused_when_training_begins(tmp_path):
    student = tiny_model(seed=1)
    student.model.embed_tokens.requires_grad_(False)
    trainer = make(tmp_path, model=student, teacher_model_kind="ema")
    student.model.embed_tokens.requires_grad_(True)
    before = student.model.embed_tokens.weight.detach().clone()
    with pytest.raises(RuntimeError, match=r"model\.embed_tokens\.weight \(1 in all\) was frozen.*Unfreeze it before"):
        trainer.train()
    assert torch.equal(student.model.embed_tokens.weight, before)


@pytest.mark.parametrize("kind", ["live", "base"])
def test_a_student_whose_tensors_were_replaced_is_noticed(tmp_path, kind):
    adapter = None if kind == "live" else LoraConfig(r=4, target_modules=["q_proj"])
    trainer = make(tmp_path, teacher_model_kind=kind, peft_config=adapter)
    head = trainer._inner_student().lm_head
    head.weight = nn.Parameter(copy.deepcopy(head.weight.data))
    with pytest.raises(RuntimeError, match="lm_head.weight.*no longer moves with it"):
        trainer.train()
