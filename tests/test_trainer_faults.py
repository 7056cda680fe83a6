"""What goes wrong while a trainer runs: nothing is spoilt, counted twice or silently left out, and each fault has its name."""

import pytest
import torch
from test_skd_trainer import make_trainer
from tiny import tiny_model
from transformers import TrainerCallback


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
