"""What goes wrong while a trainer runs: nothing is spoilt, counted twice or silently left out, and each fault has its name."""

import json

import pytest
import torch
from datasets import Dataset
from processes import torchrun
from test_skd_trainer import ROWS, make_trainer
from tiny import tiny_model
from transformers import TrainerCallback

from skd_trl import SKDTrainer, SpecKDTrainer


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


def test_a_step_that_spoils_the_student_leaves_the_checkpoint_before_it(tmp_path):
    class Spoils(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                kwargs["model"].model.norm.weight.data[3] = float("nan")

    trainer = make_trainer(tmp_path, max_steps=4, save_strategy="steps", save_steps=1, callbacks=[Spoils()])
    with pytest.raises(FloatingPointError, match=r"Step 3: .*the student's \(weights model.norm.weight\)"):
        trainer.train()
    assert sorted(path.name for path in (tmp_path / "out").glob("checkpoint-*"))[0] == "checkpoint-1"
    good = tiny_model(seed=1).from_pretrained(tmp_path / "out" / "checkpoint-1")
    assert all(p.isfinite().all() for p in good.parameters())


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
    for row in trainer._prepare_eval(Dataset.from_list(rows)):
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


@pytest.mark.distributed
@pytest.mark.parametrize("num_rows", [3, 5, 8])
def test_on_two_processes_each_row_of_an_evaluation_counts_once(tmp_path, num_rows):
    torchrun([__file__.replace("test_trainer_faults", "evaluation_worker"), str(tmp_path), str(num_rows)], timeout=120)
    trainer = make_trainer(tmp_path)
    expected = token_means(trainer, ROWS[:num_rows])
    for rank in (0, 1):
        metrics = json.loads((tmp_path / f"{rank}.json").read_text())
        assert metrics["eval_loss"] == pytest.approx(expected["loss"], rel=1e-4)
        assert metrics["eval_student_entropy"] == pytest.approx(expected["student_entropy"], rel=1e-4)
