"""What goes wrong while a trainer runs: nothing is spoilt, counted twice or silently left out, and each fault has its name."""

import io
import json
import re
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from processes import torchrun
from rich.console import Console
from test_mixed_batches import spy_on_trained_batches
from test_skd_trainer import ROWS, KillAfter, Killed, losses, make_trainer
from tiny import ARCHITECTURES, BOS, EOS, byte_tokenizer, save_models, tiny_model
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, GenerationConfig, TrainerCallback
from trl import BEMACallback, LogCompletionsCallback, SFTConfig, WeaveCallback

from skd_trl import (
    ACCEPTANCE_RULES,
    LocalParticipant,
    SKDConfig,
    SKDTrainer,
    SpecKDConfig,
    SpecKDTrainer,
    interleaved_sample,
)
from skd_trl._compat import GKDConfig
from skd_trl.training.completions import print_completions
from skd_trl.training.finite_check import _is_bad_anywhere
from skd_trl.training.sampled_evaluation import row_noise
from skd_trl.training.whole_checkpoints import check_resumable


RENAMED = {
    "nemotron_h": {},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8},
}


@pytest.mark.parametrize("architecture", RENAMED)
def test_weights_that_are_saved_under_other_names_are_those_of_the_checkpoint_when_resumed_and_at_the_end(
    tmp_path, monkeypatch, architecture
):
    monkeypatch.setitem(ARCHITECTURES, architecture, ARCHITECTURES.get(architecture, {}))

    def run(directory, **settings):
        return make_trainer(
            directory, model=tiny_model(architecture, seed=1, **RENAMED[architecture]), rollout="dataset", max_steps=3,
            learning_rate=1e-2, save_strategy="steps", save_steps=1, eval_dataset=Dataset.from_list(ROWS), **settings,
        )  # fmt: skip

    whole = run(tmp_path / "whole")
    whole.train()
    resumed = run(tmp_path / "whole")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "out" / "checkpoint-2"))
    assert losses(resumed) == losses(whole)
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}
    chosen = run(tmp_path / "best", eval_strategy="steps", eval_steps=1, **best)
    chosen.train()
    found = AutoModelForCausalLM.from_pretrained(chosen.state.best_model_checkpoint).state_dict()
    assert chosen.state.best_model_checkpoint.endswith("checkpoint-1")
    for name, tensor in chosen.model.state_dict().items():
        assert torch.equal(tensor, found[name]), name


def test_a_run_that_is_over_is_not_resumed_for_one_step_more(tmp_path):
    make_trainer(tmp_path, max_steps=1, save_strategy="steps", save_steps=1).train()
    with pytest.raises(ValueError, match="checkpoint-1 is of step 1, and max_steps=1: that training is over"):
        make_trainer(tmp_path, max_steps=1).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("engine, files", [("DEEPSPEED", "global_step*"), ("FSDP", "pytorch_model_fsdp*")])
def test_an_engine_does_not_resume_from_weights_alone(tmp_path, engine, files):
    (tmp_path / "model.safetensors").touch()
    accelerator = SimpleNamespace(distributed_type=SimpleNamespace(value=engine))
    with pytest.raises(ValueError, match=f"has no {re.escape(files)}.*save_only_model=True"):
        check_resumable(tmp_path, accelerator, -1)
    (tmp_path / files.replace("*", "_0")).touch()
    check_resumable(tmp_path, accelerator, -1)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"capture_sampling": True}, "capture_sampling=True needs models on CUDA"),
        (
            {"dataloader_drop_last": True, "per_device_train_batch_size": 9},
            "dataloader_drop_last=True leaves no batch: .* 8",
        ),
    ],
)
def test_what_would_end_in_the_first_step_is_refused_before(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, **settings).train()


WRONG_TYPES = [
    ("lmbda", "5", "a number"), ("lmbda", None, "a number"), ("max_new_tokens", None, "a whole number"),
    ("teacher_top_k", 2.5, "a whole number"), ("teacher_update_rate", None, "a number"), ("gate_top_k", 5.0, "a whole number"),
    ("gate_top_k", True, "a whole number"), ("gate_warmup_steps", 2.5, "a whole number"), ("seq_kd", "x", "True or False"),
    ("teacher_prompt_template", None, "text"), ("teacher_device", 1.5, "text"), ("rollout", [], "text"),
]  # fmt: skip


@pytest.mark.parametrize("name, value, kind", WRONG_TYPES)
def test_a_value_of_another_type_is_refused_by_its_field(tmp_path, name, value, kind):
    with pytest.raises(ValueError, match=rf"^{name}={re.escape(repr(value))} must be {kind}"):
        SpecKDConfig(str(tmp_path), use_cpu=True, bf16=False, **{name: value})


def test_fields_of_a_users_subclass_are_the_users(tmp_path):
    @dataclass
    class Own(SKDConfig):
        layers: list[int] = field(default_factory=list)
        names: "Unknown" = None  # noqa: F821

    config = Own(str(tmp_path), use_cpu=True, bf16=False, layers=[1, 2], teacher_device=torch.device("cpu"))
    assert config.layers == [1, 2]


# NaN and infinity


def spoil(model, part, value):
    """Spoils tokens of the texts that are in none of the few that models are checked with before training."""
    (model.model.embed_tokens if part == "embeddings" else model.lm_head).weight.data[60:90] = value


@pytest.mark.parametrize("rollout", ["interleaved", "dataset"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("part", ["embeddings", "lm_head"])
@pytest.mark.parametrize("name", ["student", "teacher"])
def test_weights_that_are_not_finite_stop_the_step_before_it_is_taken(tmp_path, name, part, value, rollout):
    # Two micro-batches a step: the first is looked at with the second.
    trainer = make_trainer(
        tmp_path, rollout=rollout, per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=2,
        save_strategy="steps", save_steps=1,
    )  # fmt: skip
    spoil(trainer.model if name == "student" else trainer.teacher_model, part, value)
    before = {key: p.detach().clone() for key, p in trainer.model.named_parameters()}
    weights = "model.embed_tokens.weight" if part == "embeddings" else "lm_head.weight"
    with pytest.raises(FloatingPointError, match=rf"Step 1: .*the {name}'s \(weights {weights}\) distributions"):
        trainer.train()
    for key, p in trainer.model.named_parameters():
        assert torch.equal(p.nan_to_num(), before[key].nan_to_num()), key
    assert not list((tmp_path / "out").glob("checkpoint-*"))


class Spoils(TrainerCallback):
    """Makes a weight of the student NaN after the second step."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2:
            kwargs["model"].model.norm.weight.data[3] = float("nan")


@pytest.mark.parametrize(
    "save_steps, message", [(1, "After step 2 the student's weights hold NaN or infinity"), (3, "Step 3: the loss")]
)
def test_a_step_that_spoils_the_student_leaves_the_checkpoint_before_it(tmp_path, save_steps, message):
    trainer = make_trainer(
        tmp_path, max_steps=4, save_strategy="steps", save_steps=save_steps, callbacks=[Spoils()], save_total_limit=1
    )
    with pytest.raises(FloatingPointError, match=rf"{message}.*\((weights )?model.norm.weight\)"):
        trainer.train()
    kept = [path.name for path in (tmp_path / "out").glob("checkpoint-*")]
    assert kept == (["checkpoint-1"] if save_steps == 1 else [])
    for name in kept:
        assert all(
            p.isfinite().all() for p in tiny_model(seed=1).from_pretrained(tmp_path / "out" / name).parameters()
        )


def test_a_run_is_resumed_from_the_checkpoint_before_one_that_was_cut(tmp_path, caplog):
    settings = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    make_trainer(tmp_path, **settings).train()
    state = tmp_path / "out" / "checkpoint-2" / "trainer_state.json"
    state.write_bytes(state.read_bytes()[:100])
    resumed = make_trainer(tmp_path, **settings)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 2
    assert any("checkpoint-2 is left out" in message for message in caplog.messages)
    for step in (1, 2):
        (tmp_path / "out" / f"checkpoint-{step}" / "trainer_state.json").write_text("")
    with pytest.raises(ValueError, match="has no whole checkpoint to resume from"):
        make_trainer(tmp_path, **settings).train(resume_from_checkpoint=True)


LENGTHS = [{"prompt": "q" * (1 + 5 * i % 7), "completion": "ab" * (1 + i)} for i in range(12)]


@pytest.mark.parametrize("killed_after", [5, 8])
def test_a_run_of_rows_grouped_by_length_resumes_within_a_later_epoch_with_the_same_rows(tmp_path, killed_after):
    settings = {
        "train_sampling_strategy": "group_by_length", "per_device_train_batch_size": 4, "max_steps": 9, "rollout": "dataset",
        "save_strategy": "steps", "save_steps": 1, "learning_rate": 1e-3,
    }  # fmt: skip
    whole = make_trainer(tmp_path / "whole", LENGTHS, **settings)
    order = spy_on_trained_batches(whole)
    whole.train()
    with pytest.raises(Killed):
        make_trainer(tmp_path / "killed", LENGTHS, callbacks=[KillAfter(killed_after)], **settings).train()
    resumed = make_trainer(tmp_path / "killed", LENGTHS, **settings)
    torch.manual_seed(99)
    resumed.train(resume_from_checkpoint=True)
    assert losses(resumed) == losses(whole)
    for name, parameter in whole.model.named_parameters():
        assert torch.equal(resumed.model.get_parameter(name), parameter)
    epochs = [[batch["input_ids"].tolist() for batch in order[start : start + 3]] for start in (0, 3, 6)]
    assert epochs[0] != epochs[1] != epochs[2]


@pytest.mark.distributed
def test_on_two_processes_a_run_resumes_within_a_later_epoch_with_the_rows_that_were_left(tmp_path):
    """In accelerate's own order of rows, and in that of their lengths."""
    strategies = ["random", "group_by_length"]
    torchrun([__file__.replace("test_trainer_faults", "resuming_worker"), str(tmp_path), *strategies])
    for rank in (0, 1):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        for strategy in strategies:
            whole, resumed = found[strategy]["whole"], found[strategy]["resumed"]
            assert resumed["batches"] == whole["batches"][5:], strategy
            assert resumed["losses"] == whole["losses"]
            assert len(whole["losses"]) == 9


@pytest.mark.parametrize("killed_after, is_later", [(2, False), (3, True)])
def test_a_stream_that_is_resumed_in_a_later_pass_says_that_its_rows_are_others(
    tmp_path, caplog, killed_after, is_later
):
    settings = {"max_steps": 5, "save_strategy": "steps", "save_steps": 1, "rollout": "dataset"}
    stream = Dataset.from_list(ROWS).to_iterable_dataset()
    with pytest.raises(Killed):
        make_trainer(tmp_path, stream, callbacks=[KillAfter(killed_after + 1)], **settings).train()
    make_trainer(tmp_path, stream, **settings).train(resume_from_checkpoint=True)
    assert ("is from a later pass over the stream" in caplog.text) is is_later


def test_a_student_that_is_not_finite_is_not_saved_over_a_good_one(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.save_model()
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    trainer.model.lm_head.weight.data[5, 5] = float("inf")
    with pytest.raises(
        FloatingPointError, match=r"weights hold NaN or infinity \(lm_head.weight\). Nothing was saved"
    ):
        trainer.save_model()
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
def test_a_gradient_that_is_not_finite_under_a_finite_loss_stops_the_step(tmp_path, max_grad_norm):
    def root(student_logits, teacher_logits):  # 0, with an infinite slope
        return (student_logits - student_logits.detach()).pow(2).sum(-1).sqrt()

    trainer = make_trainer(tmp_path, divergence=root, rollout="dataset", max_grad_norm=max_grad_norm)
    before = {key: p.detach().clone() for key, p in trainer.model.named_parameters()}
    with pytest.raises(FloatingPointError, match=r"Step 1: the loss is finite and its gradient is not \(.*keep roots"):
        trainer.train()
    assert all(torch.equal(p, before[key]) for key, p in trainer.model.named_parameters())


@pytest.mark.parametrize(("number", "is_bad"), [(1e30, False), (float("inf"), True), (float("nan"), True)])
def test_a_gradient_is_bad_where_a_number_is_and_not_where_its_norm_overflows(number, is_bad):
    gradients = [torch.zeros(3, dtype=torch.bfloat16), torch.tensor([1.0, number]), torch.empty(0)]
    assert _is_bad_anywhere(gradients, Accelerator(cpu=True), is_collective=True) is is_bad


def test_a_divergence_that_is_not_finite_is_named(tmp_path):
    def broken(student_logits, teacher_logits):
        return (student_logits - student_logits.max(-1, keepdim=True).values).sum(-1) / 0.0

    with pytest.raises(FloatingPointError, match="Step 1: .*so the divergence makes it"):
        make_trainer(tmp_path, divergence=broken, rollout="dataset").train()


@pytest.mark.parametrize("name", ["student", "teacher"])
def test_a_head_that_is_not_finite_is_no_unknown_architecture(tmp_path, name):
    models = {"model": tiny_model(seed=1), "teacher": tiny_model(seed=2)}
    spoil(models["model" if name == "student" else "teacher"], "lm_head", float("nan"))
    with pytest.raises(ValueError, match=f"The {name}'s head, of LlamaForCausalLM, has NaN or infinite weights"):
        make_trainer(tmp_path, **models)


# Evaluations


def token_means(trainer, rows):
    """Loss and student's entropy over the tokens of `rows`, from full logits, row by row."""
    divergences, entropies = [], []
    for row in trainer._prepare_eval(Dataset.from_list(rows), trainer.model):
        batch = trainer.data_collator([row])
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        with torch.no_grad():
            q, p = (m.eval()(**inputs).logits[0, :-1].log_softmax(-1) for m in (trainer.model, trainer.teacher_model))
        is_response = batch["labels"][0, 1:] != -100
        divergences.append((p.exp() * (p - q)).sum(-1)[is_response])
        entropies.append(-(q.exp() * q).sum(-1)[is_response])
    return {"loss": torch.cat(divergences).mean().item(), "student_entropy": torch.cat(entropies).mean().item()}


SETS = {"a": ROWS[:3], "b": ROWS[3:8]}


@pytest.mark.parametrize("trainer_class", [SKDTrainer, SpecKDTrainer])
def test_each_evaluation_set_has_its_own_metrics_under_its_own_name(tmp_path, trainer_class):
    eval_dataset = {name: Dataset.from_list(rows) for name, rows in SETS.items()}
    trainer = make_trainer(tmp_path, eval_dataset=eval_dataset, trainer_class=trainer_class, rollout="dataset")
    metrics = trainer.evaluate()
    for name, rows in SETS.items():
        expected = token_means(trainer, rows)
        assert metrics[f"eval_{name}_student_entropy"] == pytest.approx(expected["student_entropy"], rel=1e-4)
        if trainer_class is SKDTrainer:
            assert metrics[f"eval_{name}_loss"] == pytest.approx(expected["loss"], rel=1e-4)
        else:
            assert 0 <= metrics[f"eval_{name}_token_acceptance_rate"] <= 1
    assert not any(name.startswith("eval_student") for name in metrics)
    logged = {name for entry in trainer.state.log_history for name in entry}
    assert {"eval_a_student_entropy", "eval_b_student_entropy"} <= logged and "eval_student_entropy" not in logged


def test_the_best_model_may_be_chosen_by_a_metric_of_one_set(tmp_path):
    trainer = make_trainer(
        tmp_path, eval_dataset={name: Dataset.from_list(rows) for name, rows in SETS.items()}, max_steps=2, rollout="dataset",
        eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1, load_best_model_at_end=True,
        metric_for_best_model="a_student_entropy", greater_is_better=True, learning_rate=1e-2,
    )  # fmt: skip
    trainer.train()
    entropies = [
        entry["eval_a_student_entropy"] for entry in trainer.state.log_history if "eval_a_student_entropy" in entry
    ]
    assert trainer.state.best_metric == max(entropies) and len(set(entropies)) == 2
    assert trainer.evaluate()["eval_a_student_entropy"] == pytest.approx(max(entropies), rel=1e-5)


@pytest.mark.parametrize("prefix", ["valid", "eval_before"])
def test_a_prefix_is_followed_and_metrics_of_training_are_not_taken_along(tmp_path, prefix):
    trainer = make_trainer(tmp_path, rollout="dataset")
    trainer.train()
    expected = token_means(trainer, ROWS)
    metrics = trainer.evaluate(Dataset.from_list(ROWS), metric_key_prefix=prefix)
    predicted = trainer.predict(Dataset.from_list(ROWS), metric_key_prefix=prefix).metrics
    for found in (metrics, predicted):
        assert found[f"{prefix}_student_entropy"] == pytest.approx(expected["student_entropy"], rel=1e-4)
        assert found[f"{prefix}_loss"] == pytest.approx(expected["loss"], rel=1e-4)
        assert all(name.startswith(prefix) or name == "epoch" for name in found)


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_the_loss_of_an_evaluation_does_not_depend_on_its_batch_size(tmp_path, batch_size):
    trainer = make_trainer(tmp_path, per_device_eval_batch_size=batch_size)
    expected = token_means(trainer, ROWS)
    metrics = trainer.evaluate(Dataset.from_list(ROWS))
    assert metrics["eval_loss"] == pytest.approx(expected["loss"], rel=1e-4)
    assert metrics["eval_student_entropy"] == pytest.approx(expected["student_entropy"], rel=1e-4)


PROMPTS = [{"messages": row["messages"][:1]} for row in ROWS]


def students_texts(trainer, rows, first=0):
    """`rows` with what the student writes, one by one, on the noise of their places in the evaluation."""
    written = []
    for place, row in enumerate(rows, start=first):
        batch = trainer.data_collator([trainer._prepare_eval(Dataset.from_list([row]), trainer.model)[0]])
        rollout = interleaved_sample(
            LocalParticipant(trainer.model, trainer.args.student_sampling()), trainer.teacher_model, batch["prompts"],
            batch["prompt_attention_mask"], accept=ACCEPTANCE_RULES["always"](), max_new_tokens=trainer.args.max_new_tokens,
            eos_token_ids=trainer.eos_token_ids, noise=row_noise([place], trainer.args.max_new_tokens, trainer.args.seed),
        )  # fmt: skip
        ids, is_response = rollout.input_ids[0], rollout.labels[0] != -100
        written.append({"input_ids": ids.tolist(), "completion_mask": is_response.int().tolist()})
    return written


@pytest.mark.parametrize("rollout", ["interleaved", "dataset", "teacher"])
@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_prompts_alone_are_evaluated_on_the_students_own_text_whatever_the_batch_size(tmp_path, rollout, batch_size):
    trainer = make_trainer(
        tmp_path, eval_dataset=Dataset.from_list(PROMPTS), rollout=rollout, per_device_eval_batch_size=batch_size
    )
    expected = token_means(trainer, students_texts(trainer, PROMPTS))
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(expected["loss"], rel=1e-4)
    assert metrics["eval_student_entropy"] == pytest.approx(expected["student_entropy"], rel=1e-4)
    assert metrics["eval_sampled_share"] == 1 and 1 < metrics["eval_response_length"] <= 16
    again = trainer.evaluate(Dataset.from_list(PROMPTS).to_iterable_dataset())
    assert again["eval_loss"] == pytest.approx(expected["loss"], rel=1e-4)
    assert trainer.predict(Dataset.from_list(PROMPTS)).metrics["test_loss"] == pytest.approx(
        expected["loss"], rel=1e-4
    )


def test_in_a_mixed_set_rows_without_a_reference_are_sampled_and_counted(tmp_path, caplog):
    rows = [*PROMPTS[:1], *ROWS[1:4], *PROMPTS[4:5]]
    trainer = make_trainer(tmp_path, eval_dataset=Dataset.from_list(rows))
    assert any("In 2 of 5 rows of the eval data set there is no reference" in text for text in caplog.messages)
    written = [students_texts(trainer, [rows[i]], first=i)[0] for i in (0, 4)]
    metrics = trainer.evaluate()
    assert metrics["eval_sampled_share"] == pytest.approx(0.4)
    length = [sum(row["completion_mask"]) for row in written]
    assert metrics["eval_response_length"] == sum(length) / 2
    parts = [token_means(trainer, written)["loss"], token_means(trainer, rows[1:4])["loss"]]
    num_given = sum(len(row["response_ids"]) for row in trainer.eval_dataset)
    expected = (parts[0] * sum(length) + parts[1] * num_given) / (sum(length) + num_given)
    assert metrics["eval_loss"] == pytest.approx(expected, rel=1e-4)
    assert "eval_sampled_share" not in trainer.evaluate(Dataset.from_list(ROWS))


def test_evaluations_during_training_use_the_same_noise_and_leave_training_as_it_is(tmp_path):
    settings = {"max_steps": 3, "learning_rate": 0.0, "save_strategy": "no", "num_draft_tokens": "auto"}
    trainer = make_trainer(
        tmp_path, eval_dataset={"prompts": Dataset.from_list(PROMPTS), "given": Dataset.from_list(ROWS)},
        eval_strategy="steps", eval_steps=1, **settings,
    )  # fmt: skip
    trainer.train()
    evaluated = [e["eval_prompts_loss"] for e in trainer.state.log_history if "eval_prompts_loss" in e]
    assert len(evaluated) == 3 and evaluated == [pytest.approx(evaluated[0], rel=1e-6)] * 3
    plain = make_trainer(tmp_path, **settings)
    plain.train()
    logged = [[e["loss"] for e in t.state.log_history if "loss" in e] for t in (trainer, plain)]
    assert logged[0] == pytest.approx(logged[1], rel=1e-5)


class Evaluates(TrainerCallback):
    """After each step, by itself."""

    def on_step_end(self, args, state, control, **kwargs):
        self.trainer.evaluate()
        control.should_log = True  # the log of an evaluation takes it back


SAMPLING = ("acceptance_rate", "response_length", "tokens_per_round", "student_entropy", "teacher_entropy")


def training_logs(trainer):
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def test_logs_of_training_have_its_metrics_although_a_callback_evaluates_after_each_step(tmp_path):
    settings = {"max_steps": 3, "eval_dataset": Dataset.from_list(ROWS)}
    callback = Evaluates()
    callback.trainer = trainer = make_trainer(tmp_path, callbacks=[callback], **settings)
    plain = make_trainer(tmp_path, **settings)
    for one in (trainer, plain):
        one.train()
    found, expected = ([[log[name] for name in SAMPLING] for log in training_logs(one)] for one in (trainer, plain))
    assert len(expected) == 3
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    assert not any("response_length" in entry for entry in trainer.state.log_history if "eval_loss" in entry)


def test_the_metrics_of_an_epochs_log_are_of_its_steps_whatever_was_evaluated_in_between(tmp_path):
    settings = {"max_steps": 4, "learning_rate": 1e-3, "per_device_train_batch_size": 4}
    each = make_trainer(tmp_path, **settings)
    by_epoch = make_trainer(
        tmp_path, logging_strategy="epoch", eval_dataset=Dataset.from_list(ROWS), eval_strategy="steps", eval_steps=1, **settings
    )  # fmt: skip
    for trainer in (each, by_epoch):
        trainer.train()
    steps, epochs = training_logs(each), training_logs(by_epoch)
    assert [entry["step"] for entry in epochs] == [2, 4]  # eight rows in batches of four
    for epoch, of_epoch in zip(epochs, (steps[:2], steps[2:]), strict=True):
        numbers = [log["response_length"] for log in of_epoch]
        assert epoch["response_length"] == pytest.approx(sum(numbers) / 2)
        for name in ("acceptance_rate", "student_entropy", "teacher_entropy"):
            mean = sum(log[name] * number for log, number in zip(of_epoch, numbers, strict=True)) / sum(numbers)
            assert epoch[name] == pytest.approx(mean, rel=1e-5) and of_epoch[0][name] != of_epoch[1][name]


def test_a_gate_weighs_the_students_text_of_an_evaluation_too(tmp_path):
    trainer = make_trainer(tmp_path, trainer_class=SpecKDTrainer, eval_dataset=Dataset.from_list(PROMPTS))
    metrics = trainer.evaluate()
    assert metrics["eval_sampled_share"] == 1 and 0 <= metrics["eval_token_acceptance_rate"] <= 1
    assert metrics["eval_loss"] < token_means(trainer, students_texts(trainer, PROMPTS))["loss"]


def test_prompts_without_room_for_a_sampled_response_are_refused_before_training(tmp_path):
    short = {"model": tiny_model("gpt2", 1, max_position_embeddings=40), "teacher": tiny_model("gpt2", 2)}
    rows = [{"prompt": "q" * 30}, {"prompt": "q" * 10}]
    with pytest.raises(
        ValueError, match="1 prompts of the eval data set have no reference.*30 tokens, of 40 positions"
    ):
        make_trainer(tmp_path, eval_dataset=Dataset.from_list(rows), rollout="dataset", max_length=None, **short)


def test_references_that_a_run_never_reads_are_not_spoken_of(tmp_path, caplog):
    rows = [{"prompt": "2+2=", "completion": "four" * 9}, {"prompt": "3", "completion": f"six{EOS} and more"}]
    make_trainer(tmp_path, rows, max_response_length=8)
    assert not any("reference" in text for text in caplog.messages)
    make_trainer(tmp_path, rows, max_response_length=8, rollout="dataset")
    assert sum("reference" in text for text in caplog.messages) == 2
    caplog.clear()
    make_trainer(tmp_path, rows, max_response_length=8, eval_dataset=Dataset.from_list(rows))
    assert [("eval data set" in text) for text in caplog.messages if "reference" in text] == [True, True]


@pytest.mark.distributed
@pytest.mark.parametrize("num_rows", [3, 5])
def test_on_two_processes_each_row_of_an_evaluation_counts_once(tmp_path, num_rows):
    torchrun([__file__.replace("test_trainer_faults", "evaluation_worker"), str(tmp_path), str(num_rows)])
    trainer = make_trainer(tmp_path)
    expected = token_means(trainer, ROWS[:num_rows])
    sampled = token_means(trainer, students_texts(trainer, PROMPTS[:num_rows]))
    drawing = make_trainer(tmp_path, trainer_class=SpecKDTrainer, gate="spec_k")
    gated = drawing.evaluate(Dataset.from_list(ROWS[:num_rows]))["eval_loss"]
    training = make_trainer(
        tmp_path, Dataset.from_list(ROWS[:num_rows]), per_device_train_batch_size=4, max_steps=4, rollout="dataset",
        shuffle_dataset=False, train_sampling_strategy="sequential",
    )  # fmt: skip
    training.train()
    for rank in (0, 1):
        metrics = json.loads((tmp_path / f"{rank}.json").read_text())
        if num_rows == 8:  # else rows of the beginning fill up the last batch of a pass
            assert metrics["losses"] == pytest.approx(losses(training), rel=1e-3)
        assert metrics["eval_loss"] == pytest.approx(expected["loss"], rel=1e-4)
        assert metrics["stream_loss"] == pytest.approx(expected["loss"], rel=1e-4)
        assert metrics["prompt_stream_loss"] == pytest.approx(sampled["loss"], rel=1e-4)
        assert metrics["prompt_stream_sampled_share"] == 1
        assert metrics["eval_student_entropy"] == pytest.approx(expected["student_entropy"], rel=1e-4)
        assert metrics["prompts_loss"] == pytest.approx(sampled["loss"], rel=1e-4)
        assert metrics["prompts_sampled_share"] == 1
        assert metrics["gated_loss"] == pytest.approx(gated, rel=1e-4)


# Callbacks and tables


@pytest.mark.parametrize("adds_bos", [False, True])
def test_trls_callback_for_completions_writes_to_the_prompts_of_the_evaluation_set(tmp_path, adds_bos):
    tokenizer = byte_tokenizer(chat_template=None)
    if adds_bos:
        tokenizer.bos_token = BOS
        tokenizer._tokenizer.post_processor = TemplateProcessing(
            single=f"{tokenizer.bos_token} $A", special_tokens=[(tokenizer.bos_token, tokenizer.bos_token_id)]
        )
    rows = [{"prompt": f"count {i} " + "x" * i, "completion": " ab"} for i in range(4)]
    trainer = make_trainer(
        tmp_path, rows, eval_dataset=Dataset.from_list(rows), processing_class=tokenizer, max_steps=2, learning_rate=0.0,
        gradient_checkpointing=True,
    )  # fmt: skip
    assert (trainer.eval_dataset[0]["prompt_ids"][0] == tokenizer.bos_token_id) is adds_bos
    generation = GenerationConfig(max_new_tokens=5, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    callback = LogCompletionsCallback(trainer, generation, num_prompts=3, freq=2)
    trainer.add_callback(callback)
    trainer.train()
    expected = []
    for row in trainer.eval_dataset.select(range(3)):
        prompt = torch.tensor([row["prompt_ids"]])
        written = trainer.model.eval().generate(prompt, generation_config=generation)[0, prompt.shape[1] :]
        expected.append(["2", tokenizer.decode(written, skip_special_tokens=True)])
    assert [[step, completion] for step, _, completion in map(list, callback.table)] == expected
    assert [prompt for _, prompt, _ in callback.table] == [row["prompt"] for row in rows[:3]]


@pytest.mark.parametrize("callback_class", [LogCompletionsCallback, WeaveCallback])
@pytest.mark.parametrize("kind", ["dict", "IterableDataset"])
def test_a_callback_that_cannot_have_prompts_is_refused_when_it_is_added(tmp_path, callback_class, kind):
    sets = {name: Dataset.from_list(rows) for name, rows in SETS.items()}
    trainer = make_trainer(tmp_path, eval_dataset=sets if kind == "dict" else sets["a"].to_iterable_dataset())
    callback = callback_class(trainer)
    with pytest.raises(ValueError, match=f"evaluation set that is of type {kind}; it needs one Dataset"):
        trainer.add_callback(callback)


class Predictions:
    """In the place of Weave's EvaluationLogger, which needs a server: keeps what it is given, and the scores of it."""

    def __init__(self, kept, **about):
        self.kept = kept
        kept.append(about["eval_attributes"]["training_step"])

    def log_prediction(self, inputs, output):
        self.kept.append((inputs["prompt"], output))
        return self

    def log_score(self, scorer, score):
        self.kept.append((scorer, score))

    def log_summary(self, summary):
        self.kept.append(summary["avg_length"])

    def finish(self):
        pass


def test_trls_callback_for_weave_scores_what_is_written_to_the_prompts_of_the_evaluation_set(tmp_path):
    rows = [{"prompt": f"count {i} " + "x" * i, "completion": " ab"} for i in range(3)]
    trainer = make_trainer(
        tmp_path, rows, eval_dataset=Dataset.from_list(rows), learning_rate=0.0, eval_strategy="steps", eval_steps=1
    )
    generation = GenerationConfig(
        max_new_tokens=5, do_sample=False, pad_token_id=trainer.processing_class.pad_token_id
    )
    lengths = {"length": lambda prompt, completion: len(completion)}
    callback = WeaveCallback(trainer, scorers=lengths, generation_config=generation, model_name="student")
    kept = []
    callback._weave_initialized, callback._EvaluationLogger = True, partial(Predictions, kept)
    trainer.add_callback(callback)
    trainer.train()
    completions = []
    for row in trainer.eval_dataset:
        prompt = torch.tensor([row["prompt_ids"]])
        written = trainer.model.eval().generate(prompt, generation_config=generation)[0, prompt.shape[1] :]
        completions.append(trainer.processing_class.decode(written, skip_special_tokens=True))
    expected = [1]
    for row, completion in zip(rows, completions, strict=True):
        expected += [(row["prompt"], completion), ("length", len(completion))]
    assert kept == [*expected, sum(map(len, completions)) / 3]


@pytest.mark.parametrize("rollout", ["interleaved", "dataset"])
def test_the_average_that_trls_callback_keeps_is_that_of_the_students_steps(tmp_path, rollout):
    """BEMA: theta_0 and the average begin after `update_after` steps; then ema + alpha (theta - theta_0)."""
    weights = []

    class Keeps(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            weights.append({name: p.detach().clone() for name, p in kwargs["model"].named_parameters()})

    average = BEMACallback(update_freq=1, update_after=1, ema_power=0.5, bias_power=0.2, lag=10)
    trainer = make_trainer(tmp_path, rollout=rollout, max_steps=3, learning_rate=1e-2, callbacks=[Keeps(), average])
    trainer.train()
    saved = dict(tiny_model(seed=9).from_pretrained(tmp_path / "out" / "bema").named_parameters())
    for name, first in weights[0].items():
        ema = first.clone()
        for step, now in enumerate(weights[1:], start=2):
            beta = (10 + step) ** -0.5
            ema = (1 - beta) * ema + beta * now[name]
        expected = ema + (10 + 3) ** -0.2 * (weights[2][name] - first)
        torch.testing.assert_close(saved[name].data, expected, atol=1e-6, rtol=1e-5)
        assert not torch.equal(expected, first)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_a_table_is_printed_on_a_console_of_any_encoding(encoding):
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    record = {"prompt": "Größe 東京 🙂", "tokens": ["a", "ﬁ", "東"], "replaced": [False, True, False]}
    print_completions([record], 1, 1, Console(file=file, width=80))
    file.seek(0)
    shown = file.read()
    opening, closing = ("⟦", "⟧") if encoding == "utf-8" else ("[", "]")
    assert f"a{opening}{'ﬁ' if encoding == 'utf-8' else '?'}{closing}" in shown
    assert ("東京" in shown) is (encoding == "utf-8")


@pytest.mark.parametrize("error", [OSError("No space left on device"), ValueError("I/O operation on closed file")])
@pytest.mark.parametrize("function", ["save_completions", "print_completions"])
def test_completions_that_cannot_be_kept_or_shown_do_not_stop_training(tmp_path, monkeypatch, caplog, function, error):
    def fail(*args):
        raise error

    monkeypatch.setattr(f"skd_trl.training.shown_run.{function}", fail)
    trainer = make_trainer(tmp_path, log_completions=True, max_steps=2)
    trainer.train()
    assert trainer.state.global_step == 2
    assert f"could not be kept or shown ({error})" in caplog.text


# What is given to a trainer that is not for it


class OwnSKDConfig(SKDConfig):
    pass


class OwnSpecKDConfig(SpecKDConfig):
    pass


@pytest.mark.parametrize("config_class", [SpecKDConfig, OwnSpecKDConfig])
def test_the_arguments_of_a_trainer_with_a_gate_are_not_taken_by_one_without(tmp_path, config_class):
    with pytest.raises(TypeError, match="args is a SpecKDConfig.*Use SpecKDTrainer, or construct a SKDConfig"):
        SKDTrainer(tiny_model(), tiny_model(seed=2), config_class(str(tmp_path), use_cpu=True, bf16=False))


@pytest.mark.parametrize(
    "config_class, trainer_class", [(SFTConfig, SKDTrainer), (GKDConfig, SKDTrainer), (SKDConfig, SpecKDTrainer)]
)
def test_arguments_that_lack_a_trainers_fields_are_refused_by_the_class_that_has_them(
    tmp_path, config_class, trainer_class
):
    needed = trainer_class._config_class.__name__
    with pytest.raises(TypeError, match=f"args is of type {config_class.__name__}; this trainer needs a {needed} "):
        trainer_class(tiny_model(), tiny_model(seed=2), config_class(str(tmp_path), use_cpu=True, bf16=False))


@pytest.mark.parametrize("config_class, trainer_class", [(OwnSKDConfig, SKDTrainer), (OwnSpecKDConfig, SpecKDTrainer)])
def test_arguments_of_a_class_by_the_user_are_taken(tmp_path, config_class, trainer_class):
    args = config_class(str(tmp_path), use_cpu=True, bf16=False, report_to=[], max_steps=1)
    trainer = trainer_class(
        tiny_model(),
        tiny_model(seed=2),
        args,
        train_dataset=Dataset.from_list(ROWS),
        processing_class=byte_tokenizer(),
    )
    assert type(trainer.args) is config_class


@pytest.mark.parametrize(
    "name, value",
    [("model", {"a": "b"}), *((name, value) for name in ("model", "teacher") for value in ([], ["a", "b"], 3))],
)
def test_what_is_no_model_is_refused_by_name(tmp_path, name, value):
    argument = {"model": "model", "teacher": "teacher_model"}[name]
    with pytest.raises(TypeError, match=f"{argument} is of type {type(value).__name__}, which is no model"):
        make_trainer(tmp_path, **{name: value})


def test_paths_are_taken_as_models(tmp_path):
    save_models(tmp_path, {"student": 1, "teacher": 2})
    trainer = make_trainer(tmp_path, model=tmp_path / "student", teacher=tmp_path / "teacher", processing_class=None)
    trainer.train()
    assert trainer.state.global_step == 1


def test_several_gpus_in_one_process_are_refused_before_a_model_is_loaded(tmp_path):
    args = SKDConfig(str(tmp_path), use_cpu=True, bf16=False)
    args._n_gpu = 2
    with pytest.raises(
        ValueError, match="One process sees 2 GPUs.*nn.DataParallel.*accelerate launch.*CUDA_VISIBLE_DEVICES"
    ):
        SKDTrainer("no/such/student", "no/such/teacher", args, train_dataset=Dataset.from_list(ROWS))


@pytest.mark.distributed
def test_processes_that_do_not_know_of_each_other_are_refused(tmp_path):
    worker = __file__.replace("test_trainer_faults", "evaluation_worker")
    with pytest.raises(AssertionError, match="The launcher started 2 processes, and this one is in a group of 1"):
        torchrun([worker, str(tmp_path), "4", "without use_cpu"])


@pytest.mark.parametrize("gate", [{"gate": "one_minus_tv", "gate_floor": 0.0}, {"gate_warmup_steps": 100}, {}])
def test_a_gate_that_rejects_everything_is_reported_with_the_weights_that_count(tmp_path, caplog, gate):
    trainer = make_trainer(tmp_path, trainer_class=SpecKDTrainer, **gate)
    trainer._ratios["train"].add("token_acceptance_rate", 0.0, 1.0)
    trainer._ratios["train"].add("gate_weight", 0.4321, 1.0)
    trainer.log({"loss": 1.0})
    assert "rejected every token since the last log; they weigh 0.432 on average" in caplog.text
