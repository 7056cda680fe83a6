"""SpecKDTrainer: the gate weighs the tokens it should, whatever writes the responses and however a step is cut."""

import logging
import math

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from test_skd_trainer import ROWS, KillAfter, Killed, losses, make_trainer, update_of

from skd_trl import GATES, Gate, SKDTrainer, SpecKDConfig, SpecKDTrainer
from skd_trl.loss.gates import GATE_CONTROLS


ROLLOUTS = ["dataset", "student", "teacher", "interleaved"]


def make(tmp_path, rows=ROWS, **settings):
    return make_trainer(tmp_path, rows, trainer_class=SpecKDTrainer, **settings)


@pytest.mark.parametrize("rollout", ROLLOUTS)
@pytest.mark.parametrize("normalizer", ["all", "accepted", "mean_one"])
def test_a_gate_of_ones_is_the_ungated_loss_and_update_bit_for_bit(tmp_path, rollout, normalizer):
    plain = make_trainer(tmp_path, rollout=rollout, max_grad_norm=0.0)
    gated = make(
        tmp_path, rollout=rollout, max_grad_norm=0.0, gate_top_k=259, gate_floor=1.0, gate_normalizer=normalizer
    )
    assert torch.equal(update_of(gated), update_of(plain))
    assert losses(gated) == losses(plain)


GATE_SETTINGS = {
    "spec_k": {"gate_top_k": 2},
    "greedy_top_k": {"gate_top_k": 60},
    **{control: {"gate": "greedy_top_k", "gate_control": control, "gate_top_k": 60} for control in GATE_CONTROLS},
    "min_prob": {"gate_kwargs": {"alpha": 0.01}},
}


@pytest.mark.parametrize("normalizer", ["all", "accepted", "mean_one"])
@pytest.mark.parametrize("gate", [*GATES, *GATE_CONTROLS])
def test_eight_rows_give_one_gated_update_however_they_are_accumulated(tmp_path, gate, normalizer):
    settings = {
        "rollout": "interleaved", "gate": gate, "gate_normalizer": normalizer, "max_grad_norm": 0.0,
        **GATE_SETTINGS.get(gate, {}),
    }  # fmt: skip
    whole = make(tmp_path, per_device_train_batch_size=8, **settings)
    expected = update_of(whole)
    assert expected.norm() > 0.01
    cut = make(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4, **settings)
    assert (update_of(cut) - expected).norm() < 1e-4 * expected.norm()
    assert losses(cut)[0] == pytest.approx(losses(whole)[0], rel=1e-4)


@pytest.mark.parametrize("rollout", ROLLOUTS)
def test_weights_are_the_gates_own_on_full_logits_and_the_divisor_is_what_the_normalizer_says(tmp_path, rollout):
    divisors = {}
    for normalizer in ("all", "accepted", "mean_one"):
        trainer = make(
            tmp_path, rollout=rollout, gate_top_k=60, gate_floor=0.1, gate_normalizer=normalizer, loss_chunk_size=7
        )
        seen = []
        original = trainer._distillation_loss

        def spy(student_hidden, teacher_signal, inputs, tokens, trainer=trainer, original=original, seen=seen):
            outcome = original(student_hidden, teacher_signal, inputs, tokens)
            student, teacher = trainer.model.lm_head, trainer.teacher_model.lm_head
            weights = GATES["greedy_top_k"](k=60, floor=0.1)(
                student_logits=student(student_hidden), teacher_logits=teacher(teacher_signal.states)
            )
            seen.append((outcome, weights))
            return outcome

        trainer._distillation_loss = spy
        trainer.train()
        ((outcome, expected),) = seen
        assert torch.equal(outcome.weight, expected)
        assert 0 < outcome.accepted.sum() < len(expected)
        total = (outcome.weight * outcome.divergence).sum().item()
        divisors[normalizer] = total / losses(trainer)[0]
        wanted = {"all": len(expected), "accepted": int(outcome.accepted.sum()), "mean_one": expected.sum().item()}
        assert divisors[normalizer] == pytest.approx(wanted[normalizer], rel=1e-4)
    assert len({round(d, 3) for d in divisors.values()}) == 3


@pytest.mark.parametrize("normalizer", ["all", "accepted", "mean_one"])
def test_a_gate_that_closes_everything_gives_a_finite_loss_no_update_and_a_warning(tmp_path, caplog, normalizer):
    trainer = make(
        tmp_path,
        gate="min_prob",
        gate_kwargs={"alpha": 1.0},
        gate_floor=0.0,
        gate_normalizer=normalizer,
        rollout="dataset",
    )
    with caplog.at_level(logging.WARNING):
        update = update_of(trainer)
    assert losses(trainer) == [0.0]
    assert update.abs().max() == 0
    assert trainer.state.log_history[0]["fully_rejected_share"] == 1
    assert "rejected every token" in caplog.text


def test_ends_of_sequence_weigh_one_where_they_are_kept(tmp_path):
    outcomes = {}
    for keep in (False, True):
        trainer = make(
            tmp_path,
            rollout="dataset",
            gate="min_prob",
            gate_kwargs={"alpha": 0.9},
            gate_floor=0.2,
            gate_keep_eos=keep,
        )
        batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
        seen = []
        original = trainer._distillation_loss
        trainer._distillation_loss = lambda *args, original=original, seen=seen: (
            seen.append(original(*args)) or seen[-1]
        )
        trainer.compute_loss(trainer.model, batch)
        outcomes[keep] = seen[0].weight
        is_eos = torch.isin(batch["labels"][batch["labels"] != -100], torch.tensor(trainer.eos_token_ids))
    assert is_eos.any()
    assert outcomes[True][is_eos].eq(1).all()
    assert torch.equal(outcomes[True][~is_eos], outcomes[False][~is_eos])
    assert outcomes[False][is_eos].lt(1).any()


def test_the_acceptance_of_ends_is_over_ends_alone(tmp_path):
    trainer = make(tmp_path, rollout="dataset", gate=Gate(lambda distributions, facts: facts.is_end))
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["token_acceptance_rate_eos"] == 1 and 0 < log["token_acceptance_rate"] < 1


def test_the_gate_closes_over_its_warm_up_and_follows_its_schedule_for_k():
    config = SpecKDConfig(
        "x", use_cpu=True, bf16=False, gate_top_k=20, gate_top_k_end=10, gate_warmup_steps=4, gate_floor=0.2
    )
    floors = [config.at(step, 11).make_gate().floor for step in range(6)]
    assert floors == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2, 0.2])
    # One student token of rank 14 in the teacher: inside at k = 20, 19, ..., 15, outside from there on.
    student, teacher = torch.zeros(1, 40), torch.arange(40.0).flip(0)[None]
    student[0, 14] = 1.0
    accepted = [
        config.at(step, 11).make_gate()(student_logits=student, teacher_logits=teacher).item() == 1.0
        for step in range(4, 11)
    ]
    assert accepted == [True, True, False, False, False, False, False]


def test_every_metric_of_the_gate_is_logged_and_adds_up(tmp_path):
    trainer = make(
        tmp_path, gate_top_k=60, gate_floor=0.1, gate_compare="spec_k", max_new_tokens=40, rollout="interleaved",
        eval_dataset=Dataset.from_list(ROWS),
    )  # fmt: skip
    trainer.train()
    log = trainer.state.log_history[0]
    rate = log["token_acceptance_rate"]
    assert 0 < rate < 1
    assert log["gate_weight"] == pytest.approx(0.1 + 0.9 * rate)
    # Four rows of 40 tokens: bins of 8, 24 and 8 tokens.
    bins = [log[f"token_acceptance_rate_{name}"] for name in ("0_7", "8_31", "32_127")]
    assert log["response_length"] == 40
    assert sum(b * n for b, n in zip(bins, (8, 24, 8), strict=True)) / 40 == pytest.approx(rate)
    # Without a floor the loss is the accepted tokens' part; it and the rejected tokens' part make up the whole.
    parts = rate * log["divergence_accepted"] + 0.1 * (1 - rate) * log["divergence_rejected"]
    assert log["loss"] == pytest.approx(parts, rel=1e-3)
    assert 0 < log["tv_accepted"] < log["tv_rejected"] <= 1
    assert log["fully_rejected_share"] == 0
    assert 0 < log["gate_overlap"] <= 1
    metrics = trainer.evaluate()
    assert math.isfinite(metrics["eval_loss"]) and 0 < metrics["eval_token_acceptance_rate"] <= 1
    assert 0 <= metrics["eval_token_acceptance_rate_eos"] <= 1


def test_noise_and_weights_keep_their_digits_where_the_engine_casts_a_batch(tmp_path, monkeypatch):
    """DeepSpeed has the Trainer cast every float of a batch to its own precision; the last uniform would become 1."""
    trainer = make(tmp_path, gate="spec_k", gate_top_k=2)

    def cast(batch):
        return {name: value.bfloat16() if value.is_floating_point() else value for name, value in batch.items()}

    monkeypatch.setattr(trainer, "_prepare_input", cast)
    noise, states = torch.tensor([[0.5, 1 - 2**-20]]), torch.ones(2)
    prepared = trainer._prepare_inputs({"gate_uniforms": noise, "teacher_hidden_states": states})
    assert torch.equal(prepared["gate_uniforms"], noise)
    assert prepared["teacher_hidden_states"].dtype == torch.bfloat16


def test_a_gate_that_draws_gives_an_evaluation_one_result_whatever_its_batch_size_and_order(tmp_path):
    settings = {"gate": "spec_k", "gate_compare": "accept_ratio", "eval_dataset": Dataset.from_list(ROWS)}
    found = [make(tmp_path, per_device_eval_batch_size=size, **settings).evaluate() for size in (1, 3, 8)]
    is_new = "train_sampling_strategy" in SpecKDConfig.__dataclass_fields__  # older transformers have a flag
    order = {"train_sampling_strategy": "group_by_length"} if is_new else {"group_by_length": True}
    by_length = make(tmp_path, **order, **settings)
    found += [by_length.evaluate(), by_length.evaluate()]
    for name in ("eval_loss", "eval_gate_weight", "eval_gate_overlap"):
        values = [metrics[name] for metrics in found]
        assert values == pytest.approx([values[0]] * 5, rel=1e-5)
    assert 0 < found[0]["eval_token_acceptance_rate"] < 1
    other = make(tmp_path, seed=5, **settings).evaluate()  # it is noise
    assert other["eval_loss"] != pytest.approx(found[0]["eval_loss"], rel=1e-5)


def test_the_ungated_loss_of_an_evaluation_follows_no_gate_and_chooses_the_best_model(tmp_path):
    rows = {"eval_dataset": Dataset.from_list(ROWS)}
    ungated = make_trainer(tmp_path, rollout="dataset", **rows).evaluate()["eval_loss"]
    for settings in (
        {},
        {"gate": "spec_k", "gate_floor": 0.0},
        {"gate_warmup_steps": 3},
        {"gate_normalizer": "accepted"},
    ):
        trainer = make(
            tmp_path, max_steps=2, learning_rate=1e-12, eval_strategy="steps", eval_steps=1, **rows, **settings
        )
        trainer.train()
        logs = [log for log in trainer.state.log_history if "eval_loss" in log]
        assert [log["eval_ungated_loss"] for log in logs] == pytest.approx([ungated] * 2, rel=1e-5)
        assert logs[-1]["eval_loss"] < logs[-1]["eval_ungated_loss"]
    chosen = make(tmp_path, load_best_model_at_end=True, eval_strategy="epoch", save_strategy="epoch", **rows).args
    assert (chosen.metric_for_best_model, chosen.greater_is_better) == ("ungated_loss", False)
    named = make(
        tmp_path,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        eval_strategy="epoch",
        save_strategy="epoch",
        **rows,
    )
    assert named.args.metric_for_best_model == "loss"


@pytest.mark.parametrize("compared", ["student_entropy_top", "spec_k"])
def test_the_overlap_with_another_gate_is_that_of_the_step_however_it_is_cut(tmp_path, compared):
    found = []
    for size in (8, 2):
        cut = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 8 // size, "shuffle_dataset": False}
        stream = Dataset.from_list(ROWS).to_iterable_dataset()
        trainer = make(tmp_path, stream, gate_compare=compared, **cut)
        trainer.train()
        found.append(trainer.state.log_history[0]["gate_overlap"])
    assert 0 < found[0] < 1 and found[1] == pytest.approx(found[0], rel=1e-5)


def test_lora_trains_under_a_gate(tmp_path):
    trainer = make(
        tmp_path, peft_config=LoraConfig(r=4, target_modules=["q_proj"]), gate_normalizer="mean_one", max_steps=2
    )
    trainer.train()
    assert all(math.isfinite(loss) for loss in losses(trainer))


def test_a_killed_run_with_a_drawn_gate_resumes_with_the_same_losses(tmp_path):
    settings = {
        "gate": "spec_k", "gate_top_k": 2, "max_steps": 4, "save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-3,
        "gate_warmup_steps": 3, "gate_normalizer": "accepted",
    }  # fmt: skip
    whole = make(tmp_path / "whole", **settings)
    whole.train()
    with pytest.raises(Killed):
        make(tmp_path / "killed", callbacks=[KillAfter(3)], **settings).train()
    resumed = make(tmp_path / "killed", **settings)
    resumed.train(resume_from_checkpoint=True)
    assert losses(resumed) == losses(whole)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"gate": "topk"}, "gate='topk' is unknown; choose one of greedy_top_k"),
        ({"gate_top_k": 0}, "gate_top_k=0"),
        ({"gate_top_k_end": -1}, "gate_top_k_end=-1"),
        ({"gate_floor": 1.5}, "gate_floor=1.5"),
        ({"gate_normalizer": "mean"}, "gate_normalizer='mean' is unknown"),
        ({"gate_warmup_steps": -1}, "gate_warmup_steps=-1"),
        ({"gate_kwargs": {"width": 3}}, "gate_kwargs.*width"),
        ({"gate": "random"}, "gate='random' is a control.*gate_control='random'"),
        ({"gate_control": "shuffled"}, "gate_control='shuffled' is unknown; choose one of random"),
        ({"gate_compare": "topk"}, "gate_compare='topk'"),
    ],
)
def test_a_wrong_gate_is_refused_by_name(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        SpecKDConfig(str(tmp_path), use_cpu=True, bf16=False, **settings)


def test_a_k_beyond_the_vocabulary_is_refused_before_training(tmp_path):
    with pytest.raises(ValueError, match="gate_top_k=300 exceeds the 259"):
        make(tmp_path, gate_top_k=300)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"gate_top_k": 5, "gate_top_k_end": 50}, "gate opens"),
        ({"gate_warmup_steps": 5, "max_steps": 3}, "never closes fully"),
    ],
)
def test_a_schedule_that_goes_backwards_or_never_ends_warns(tmp_path, caplog, settings, message):
    with caplog.at_level(logging.WARNING):
        make(tmp_path, **settings)
    assert message in caplog.text


def test_models_that_end_with_different_ids_warn_that_the_gate_may_reject_every_end(tmp_path, caplog):
    from tiny import tiny_model

    with caplog.at_level(logging.WARNING):
        make(tmp_path, model=tiny_model(seed=1, eos_token_id=257), teacher=tiny_model(seed=2, eos_token_id=258))
    assert "gate_keep_eos=True" in caplog.text


def test_speckd_is_skd_whose_student_writes_by_default():
    assert SpecKDTrainer.__mro__[1] is SKDTrainer
    assert SpecKDConfig("x", use_cpu=True, bf16=False).rollout == "student"
