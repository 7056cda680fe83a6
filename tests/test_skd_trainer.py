"""SKDTrainer: one update however the batch is cut, GKDTrainer's loss where GKDTrainer is right, and what people rely on."""

import copy
import itertools
import json
import math
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from datasets import Dataset, IterableDataset
from peft import AdaLoraConfig, LoraConfig, PromptTuningConfig, VeraConfig, get_peft_model
from tiny import ARCHITECTURES, byte_tokenizer, tiny_model
from transformers import FalconConfig, FalconForCausalLM, TrainerCallback

from skd_trl import SKDConfig, SKDTrainer, skd_trainer
from skd_trl.sampling.draft_length import Stopwatch
from skd_trl.training import sampled_steps


ROWS = [
    {
        "messages": [
            {"role": "user", "content": "q" * (3 + i)},
            {"role": "assistant", "content": "ab" * (1 + (5 * i) % 7)},
        ]
    }
    for i in range(8)
]


def make_trainer(tmp_path, rows=ROWS, model=None, teacher=None, trainer_class=SKDTrainer, **settings):
    objects = {
        name: settings.pop(name)
        for name in (
            "eval_dataset",
            "peft_config",
            "callbacks",
            "optimizers",
            "processing_class",
            "formatting_func",
            "compute_metrics",
        )
        if name in settings
    }
    defaults = {
        "output_dir": str(tmp_path / "out"),
        "use_cpu": True,
        "bf16": False,
        "report_to": [],
        "max_steps": 1,
        "logging_steps": 1,
        "save_strategy": "no",
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 3,
        "max_new_tokens": 16,
        "max_length": 128,
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        "num_draft_tokens": 5,  # "auto" follows a stopwatch, which no test should
        "temperature": 1.0,
        "student_top_p": 1.0,
        "teacher_temperature": 1.0,
        "teacher_top_p": 1.0,
    }
    if settings.get("rollout", trainer_class._config_class.rollout) == "interleaved" and "accept" not in settings:
        defaults["accept_top_k"] = 80  # of 259: two random models agree on some tokens and not on others
    return trainer_class(
        model=tiny_model(seed=1) if model is None else model,
        teacher_model=tiny_model(seed=2) if teacher is None else teacher,
        args=trainer_class._config_class(**{**defaults, **settings}),
        train_dataset=Dataset.from_list(rows) if isinstance(rows, list) else rows,
        processing_class=objects.pop("processing_class", byte_tokenizer()),
        **objects,
    )


def update_of(trainer):
    """How one optimizer step of plain SGD moves the parameters: the negative gradient, all in one vector."""
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.create_optimizer_and_scheduler = lambda num_training_steps: None
    trainer.optimizer = torch.optim.SGD(trainer.model.parameters(), lr=1.0)
    trainer.lr_scheduler = torch.optim.lr_scheduler.ConstantLR(trainer.optimizer, factor=1.0)
    trainer.train()
    return torch.cat([(p.detach() - before[name]).flatten() for name, p in trainer.model.named_parameters()])


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


# One update, however it is cut


@pytest.mark.parametrize("rollout", ["dataset", "interleaved", "student", "teacher"])
@pytest.mark.parametrize("batch_size, accumulation", [(4, 2), (2, 4), (1, 8)])
def test_eight_rows_give_one_update_however_they_are_accumulated(tmp_path, rollout, batch_size, accumulation):
    settings = {"rollout": rollout, "max_grad_norm": 0.0, "shuffle_dataset": False, "seed": 3}
    whole = make_trainer(tmp_path, per_device_train_batch_size=8, **settings)
    expected = update_of(whole)
    cut = make_trainer(
        tmp_path, per_device_train_batch_size=batch_size, gradient_accumulation_steps=accumulation, **settings
    )
    update = update_of(cut)
    assert expected.norm() > 0.1  # something was learned from
    # fp32 sums of a few thousand terms in another order
    assert (update - expected).norm() < 1e-4 * expected.norm()
    assert losses(cut)[0] == pytest.approx(losses(whole)[0], rel=1e-4)


@pytest.mark.parametrize("rollout", ["interleaved", "student", "teacher"])
def test_the_divisor_is_the_number_of_sampled_response_tokens(tmp_path, rollout):
    # References of 2 tokens each: GKDTrainer would divide by these.
    rows = [{"prompt": "q" * (i + 1), "completion": "x"} for i in range(8)]
    trainer = make_trainer(
        tmp_path, rows, rollout=rollout, per_device_train_batch_size=4, gradient_accumulation_steps=2
    )
    seen = []
    original = trainer.compute_loss

    def spy(model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = original(model, inputs, return_outputs, num_items_in_batch)
        seen.append((int((inputs["labels"] != -100).sum()), int(num_items_in_batch), loss.item()))
        return loss

    trainer.compute_loss = spy
    trainer.train()
    sampled = sum(count for count, _, _ in seen)
    assert sampled > 8 * 4
    assert [divisor for _, divisor, _ in seen] == [sampled, sampled]
    assert losses(trainer)[0] == pytest.approx(sum(loss for _, _, loss in seen), rel=1e-4)


# The same loss as GKDTrainer's divergence, on full logits


@pytest.mark.parametrize("divergence, beta", [("forward_kl", 0.0), ("reverse_kl", 1.0), ("jsd", 0.5), ("jsd", 0.1)])
@pytest.mark.parametrize(
    "architecture", sorted({"llama", "gemma2", "granite", "cohere", "gpt2", "gemma4_text"} & ARCHITECTURES.keys())
)
def test_on_the_data_sets_responses_loss_and_gradient_are_those_of_gkd_on_full_logits(
    tmp_path, architecture, divergence, beta
):
    gkd = pytest.importorskip("trl.experimental.gkd")
    student, teacher = tiny_model(architecture, seed=1), tiny_model(architecture, seed=2)
    plain = copy.deepcopy(student)
    trainer = make_trainer(
        tmp_path, model=student, teacher=teacher, rollout="dataset", divergence=divergence, max_grad_norm=0.0,
        per_device_train_batch_size=8, loss_chunk_size=5, **({"beta": beta} if divergence == "jsd" else {}),
    )  # fmt: skip
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(8)])
    mask = batch["attention_mask"]
    inputs = {
        "input_ids": batch["input_ids"],
        "attention_mask": mask,
        "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
    }
    with torch.no_grad():
        teacher_logits = teacher(**inputs).logits[:, :-1]
    expected = gkd.GKDTrainer.generalized_jsd_loss(
        plain(**inputs).logits[:, :-1], teacher_logits, labels=batch["labels"][:, 1:], beta=beta
    )
    expected.backward()
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for (name, ours), theirs in zip(trainer.model.named_parameters(), plain.parameters(), strict=True):
        if theirs.grad is None:
            assert ours.grad is None or ours.grad.abs().max() == 0, name
        else:
            assert (ours.grad - theirs.grad).norm() < 1e-4 * theirs.grad.norm() + 1e-7, name


def test_the_reused_teacher_gives_the_loss_of_a_fresh_teacher_forward(tmp_path):
    trainer = make_trainer(tmp_path)
    compared = []
    original = trainer.compute_loss

    def spy(model, inputs, return_outputs=False, num_items_in_batch=None):
        fresh = {name: value for name, value in inputs.items() if name != "teacher_hidden_states"}
        with torch.no_grad():
            compared.append((original(model, inputs).item(), original(model, fresh).item()))
        return original(model, inputs, return_outputs, num_items_in_batch)

    trainer.compute_loss = spy
    trainer.train()
    for reused, fresh in compared:
        assert reused == pytest.approx(fresh, rel=1e-4)


def test_with_nll_on_replaced_tokens_those_and_only_those_carry_the_likelihood(tmp_path):
    trainer = make_trainer(tmp_path, replaced_loss="nll")
    trainer._statistics = (*trainer._statistics, "student_nll")
    outcomes = []
    original = trainer._distillation_loss

    def spy(student_hidden, teacher_hidden, inputs, tokens):
        outcome = original(student_hidden, teacher_hidden, inputs, tokens)
        outcomes.append((outcome, tokens.pick(inputs["replaced"])))
        return outcome

    trainer._distillation_loss = spy
    trainer.train()
    (outcome, replaced) = outcomes[0]
    assert replaced.any() and not replaced.all()
    is_nll = torch.isclose(outcome.divergence, outcome.statistics["student_nll"], rtol=1e-6)
    assert torch.equal(is_nll, replaced)


# What users do


def test_lora_trains_the_adapter_alone_and_keeps_its_dropout(tmp_path):
    trainer = make_trainer(
        tmp_path, peft_config=LoraConfig(r=4, lora_dropout=0.3, target_modules=["q_proj", "v_proj"]), max_steps=2,
        learning_rate=1e-2, gradient_checkpointing=True,
    )  # fmt: skip
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    moved = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    assert moved and all("lora" in name for name in moved)
    dropouts = [m.p for name, m in trainer.model.named_modules() if "lora_dropout" in name and hasattr(m, "p")]
    assert set(dropouts) == {0.3}


def test_lora_with_a_trained_head_moves_the_head(tmp_path):
    peft_config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])
    trainer = make_trainer(tmp_path, peft_config=peft_config, learning_rate=1e-2)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    moved = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    assert any("lm_head.modules_to_save" in name for name in moved)


def test_a_pair_of_one_tokenizer_with_heads_padded_to_different_widths_trains(tmp_path):
    """Qwen2's sizes, 151936 and 152064, with tiny widths: GKDTrainer refuses the SKD paper's own pair."""
    narrow = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "tie_word_embeddings": True}
    trainer = make_trainer(
        tmp_path, ROWS[:4], model=tiny_model("qwen2", seed=1, vocab_size=151936, layer_types=["full_attention"], **narrow),
        teacher=tiny_model("qwen2", seed=2, vocab_size=152064, layer_types=["full_attention"], **narrow),
        accept_top_k=75_000, max_new_tokens=6,
    )  # fmt: skip
    trainer.train()
    assert trainer.vocab_size == 151936
    assert math.isfinite(losses(trainer)[0])


def test_a_pair_with_different_tokenizers_is_refused_before_training(tmp_path):
    teacher = tiny_model(seed=2, vocab_size=262)
    other = byte_tokenizer(num_extra_tokens=3)
    other.add_special_tokens({"additional_special_tokens": ["<|extra_0|>"]})
    vocabulary = json.loads(other._tokenizer.to_str())
    # Another tokenizer: two bytes have changed places.
    ids = vocabulary["model"]["vocab"]
    ids["A"], ids["B"] = ids["B"], ids["A"]
    other._tokenizer = type(other._tokenizer).from_str(json.dumps(vocabulary))
    teacher.save_pretrained(tmp_path / "teacher")
    other.save_pretrained(tmp_path / "teacher")
    with pytest.raises(ValueError, match="tokenizer"):
        make_trainer(tmp_path, teacher=str(tmp_path / "teacher"))


def test_names_and_paths_defaults_and_init_kwargs_work_as_in_sft(tmp_path):
    for name, seed in (("student", 1), ("teacher", 2)):
        tiny_model(seed=seed).save_pretrained(tmp_path / name)
        byte_tokenizer().save_pretrained(tmp_path / name)
    trainer = make_trainer(
        tmp_path, model=str(tmp_path / "student"), teacher=str(tmp_path / "teacher"), processing_class=None,
        teacher_model_init_kwargs={"dtype": "float64"}, model_init_kwargs={"dtype": "float32"},
    )  # fmt: skip
    assert trainer.teacher_model.dtype == torch.float64
    assert trainer.model.dtype == torch.float32
    assert trainer.processing_class.pad_token_id == 256
    by_config = SKDTrainer(
        model=str(tmp_path / "student"),
        args=SKDConfig(
            str(tmp_path / "x"), use_cpu=True, bf16=False, teacher_model_name_or_path=str(tmp_path / "teacher"),
            teacher_model_init_kwargs={"attn_implementation": "eager"},
        ),
        train_dataset=Dataset.from_list(ROWS),
    )  # fmt: skip
    assert by_config.teacher_model.config._attn_implementation == "eager"


def test_without_arguments_a_default_configuration_is_made_as_in_sft(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, seed in (("student", 1), ("teacher", 2)):
        tiny_model(seed=seed).save_pretrained(tmp_path / name)
        byte_tokenizer().save_pretrained(tmp_path / name)
    # SFTConfig's own default, bf16 on a GPU, refuses this machine.
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)
    trainer = SKDTrainer("student", "teacher", train_dataset=Dataset.from_list(ROWS))
    assert type(trainer.args) is SKDConfig
    assert trainer.args.output_dir == "student-SKD"


def test_the_callers_objects_stay_as_they_were(tmp_path):
    args = SKDConfig(
        str(tmp_path / "out"), use_cpu=True, bf16=False, report_to=[], max_steps=1, save_strategy="no", max_new_tokens=8,
        max_length=64, dataset_kwargs={"skip_prepare_dataset": False}, disable_tqdm=True,
    )  # fmt: skip
    dataset, teacher, tokenizer = Dataset.from_list(ROWS), tiny_model(seed=2).train(), byte_tokenizer()
    tokenizer.pad_token = None
    before = {
        "args": copy.deepcopy(args.to_dict()),
        "rows": dataset.to_list(),
        "teacher": {name: p.detach().clone() for name, p in teacher.named_parameters()},
        "config": teacher.config.to_dict(),
        "flags": [p.requires_grad for p in teacher.parameters()],
    }
    trainer = SKDTrainer(tiny_model(seed=1), teacher, args=args, train_dataset=dataset, processing_class=tokenizer)
    trainer.train()
    assert args.to_dict() == before["args"]
    assert dataset.to_list() == before["rows"]
    assert all(torch.equal(p, before["teacher"][name]) for name, p in teacher.named_parameters())
    assert teacher.config.to_dict() == before["config"]
    assert [p.requires_grad for p in teacher.parameters()] == before["flags"]
    assert teacher.training
    assert "forward" not in vars(teacher)
    assert not any(module._forward_hooks for module in teacher.modules())
    assert tokenizer.pad_token is None


@pytest.mark.parametrize("rows", [
    [{"prompt": "q" * (i + 1)} for i in range(8)],
    [{"prompt": [{"role": "user", "content": "q"}]} for i in range(8)],
    [{"prompt": "q", "completion": "a" * (i + 1)} for i in range(8)],
    [{"prompt": [{"role": "user", "content": "q"}], "completion": [{"role": "assistant", "content": "a"}]} for i in range(8)],
], ids=["prompt", "chat prompt", "prompt + completion", "chat prompt + completion"])  # fmt: skip
def test_every_form_of_data_set_trains_on_sampled_responses(tmp_path, rows):
    trainer = make_trainer(tmp_path, rows)
    trainer.train()
    assert math.isfinite(losses(trainer)[0])


def test_a_stream_trains_and_its_unusable_rows_are_counted_in_the_log(tmp_path):
    rows = [{"prompt": "q" * (i + 1)} for i in range(8)]
    rows[2]["prompt"] = rows[5]["prompt"] = ""
    stream = IterableDataset.from_generator(lambda: iter(rows * 4))
    trainer = make_trainer(tmp_path, stream, max_steps=3)
    trainer.train()
    logged = [entry["skipped_rows"] for entry in trainer.state.log_history if "loss" in entry]
    # Usable rows are 0 1 3 4, 6 7 8 9, 11 12 14 15: row 2 goes before 3, row 5 before 6, row 10 before 11, row 13 before 14.
    assert logged == [1, 1, 2]


def test_lmbda_mixes_steps_on_sampled_and_on_the_data_sets_responses_by_seed_and_step(tmp_path):
    trainer, again = (make_trainer(tmp_path, lmbda=0.5) for _ in range(2))
    kinds = [trainer._rollout_of_step(step) for step in range(400)]
    assert kinds == [again._rollout_of_step(step) for step in range(400)]
    # Binomial(400, 0.5) stays within 5 standard deviations (50) but for 6e-7.
    assert abs(kinds.count("interleaved") - 200) < 50
    assert set(kinds) == {"interleaved", "dataset"}
    with_seq_kd = make_trainer(tmp_path, lmbda=0.5, seq_kd=True)
    assert {with_seq_kd._rollout_of_step(step) for step in range(50)} == {"interleaved", "teacher"}


@pytest.mark.parametrize("rollout, expected", [("student", 0.0), ("teacher", 1.0)])
def test_rollouts_of_one_model_say_whose_tokens_they_are(tmp_path, rollout, expected, capsys):
    trainer = make_trainer(tmp_path, rollout=rollout, log_completions=True)
    trainer.train()
    assert trainer.state.log_history[0]["replaced_share"] == expected
    kept = pd.read_parquet(tmp_path / "out" / "completions" / "completions_00001.parquet").to_dict("records")
    assert all(set(row["replaced"]) == {bool(expected)} for row in kept)
    # A teacher's token is marked in what goes to a file, and the student proposed nothing in its place.
    assert ("⟦" in capsys.readouterr().out.partition("\n")[2]) == bool(expected)
    assert [row["proposals"] is None for row in kept] == [rollout == "teacher"] * len(kept)


def test_every_metric_is_logged_and_true_to_the_sampled_responses(tmp_path, monkeypatch):
    for module in (skd_trainer, sampled_steps):  # each reading of the clock is 1 s after the one before
        monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=itertools.count().__next__))
    trainer = make_trainer(
        tmp_path, gradient_accumulation_steps=2, log_completions=True, eval_dataset=Dataset.from_list(ROWS[:5]),
    )  # fmt: skip
    trainer.train()
    log = trainer.state.log_history[0]
    kept = pd.read_parquet(tmp_path / "out" / "completions" / "completions_00001.parquet")
    assert len(kept) == 8
    replaced = [flag for row in kept["replaced"] for flag in row]
    assert log["replaced_share"] == pytest.approx(sum(replaced) / len(replaced))
    assert log["acceptance_rate"] == pytest.approx(1 - log["replaced_share"])
    assert log["response_length"] == pytest.approx(len(replaced) / 8)
    assert 1 <= log["tokens_per_round"] <= 5
    assert log["truncated_share"] == sum(not row[-1].endswith("<|im_end|>") for row in kept["tokens"]) / 8
    assert 0 < log["teacher_rank"] < 259
    for name in ("student_entropy", "teacher_entropy"):
        assert 0 < log[name] < math.log(259)
    assert log["sampling_seconds"] == 1 and log["training_seconds"] == 2  # one reading before and one after each
    assert log["tokens_per_second"] == pytest.approx(len(replaced) / 3)
    metrics = trainer.evaluate()
    assert math.isfinite(metrics["eval_loss"]) and 0 < metrics["eval_student_entropy"] < math.log(259)


def test_evaluation_scores_reference_responses_token_by_token(tmp_path):
    trainer = make_trainer(tmp_path, eval_dataset=Dataset.from_list(ROWS), per_device_eval_batch_size=8)
    batch = trainer.data_collator([trainer.eval_dataset[i] for i in range(8)])
    with torch.no_grad():
        trainer.model.eval()
        expected = trainer.compute_loss(trainer.model, batch).item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)
    assert trainer.evaluate(Dataset.from_list(ROWS))["eval_loss"] == pytest.approx(expected, rel=1e-5)


def test_predictions_are_scored_like_an_evaluation_and_leave_its_sums_alone(tmp_path):
    trainer = make_trainer(tmp_path, eval_dataset=Dataset.from_list(ROWS))
    evaluated = trainer.evaluate()
    predicted = trainer.predict(Dataset.from_list(ROWS[:5])).metrics
    assert math.isfinite(predicted["test_loss"])
    assert 0 < predicted["test_student_entropy"] < math.log(259)
    assert trainer.evaluate()["eval_student_entropy"] == evaluated["eval_student_entropy"]


@pytest.mark.parametrize("calls_ours", [True, False])
def test_a_subclass_with_its_own_loss_is_evaluated_by_it(tmp_path, calls_ours):
    class Mine(SKDTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            if calls_ours:
                loss = super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch) * 2
            else:
                loss = model(inputs["input_ids"]).logits.mean() * 0 + 3.0
            return (loss, {}) if return_outputs else loss

    sizes = {"rollout": "dataset", "per_device_eval_batch_size": 3, "eval_dataset": Dataset.from_list(ROWS)}
    ours = make_trainer(tmp_path, **sizes).evaluate()["eval_loss"]
    theirs = make_trainer(tmp_path, trainer_class=Mine, **sizes).evaluate()["eval_loss"]
    assert theirs == pytest.approx(2 * ours if calls_ours else 3.0, rel=1e-5)


@pytest.mark.parametrize("rollout", ["dataset", "student"])
def test_a_pass_over_a_stream_that_ends_within_a_window_ends_with_a_step(tmp_path, rollout):
    """As it does with batches of a whole step: 7 rows in steps of 4, two passes."""
    settings = {"max_steps": 4, "rollout": rollout, "optim": "sgd", "shuffle_dataset": False, "learning_rate": 0.1}
    rows = (ROWS * 2)[:7]
    stream = Dataset.from_list(rows).to_iterable_dataset()
    whole = make_trainer(tmp_path, stream, per_device_train_batch_size=4, **settings)
    whole.train()
    for size in (1, 2):
        cut = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 4 // size}
        trainer = make_trainer(tmp_path, stream, **settings, **cut)
        trainer.train()
        for name in ("loss", "grad_norm"):
            found = [log.get(name) for log in trainer.state.log_history if "loss" in log]
            assert found == pytest.approx(
                [log.get(name) for log in whole.state.log_history if "loss" in log], rel=1e-4
            )


def test_a_shuffled_data_set_is_shuffled_by_the_seed_a_stream_too(tmp_path):
    plain, shuffled, again, other = (
        make_trainer(tmp_path, seed=seed, shuffle_dataset=shuffle).train_dataset["prompt_ids"]
        for seed, shuffle in ((1, False), (1, True), (1, True), (2, True))
    )
    assert shuffled == again != plain
    assert other != shuffled and sorted(shuffled) == sorted(plain)
    stream = Dataset.from_list(ROWS).to_iterable_dataset()
    drawn = make_trainer(tmp_path, stream, seed=1, shuffle_dataset=True).train_dataset
    assert sorted(row["prompt_ids"] for row in drawn) == sorted(plain)
    assert [row["prompt_ids"] for row in drawn] != list(plain)


def test_the_tokenizers_options_hold_before_a_row_is_tokenized(tmp_path):
    template = tmp_path / "template.jinja"
    template.write_text("{% for message in messages %}<{{ message.content }}>{% endfor %}")
    rows = [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": f"b{i}"}]} for i in range(4)
    ]
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    trainer = make_trainer(
        tmp_path, rows, processing_class=tokenizer, chat_template_path=str(template), eos_token="q", pad_token="w",
        rollout="dataset",
    )  # fmt: skip
    eos, pad = tokenizer.convert_tokens_to_ids(["q", "w"])
    assert eos in trainer.eos_token_ids and trainer.processing_class.eos_token_id == eos
    assert trainer.train_dataset[0]["prompt_ids"] == tokenizer("<a>").input_ids
    assert trainer.processing_class.pad_token_id == pad == trainer.data_collator.pad_token_id
    assert tokenizer.chat_template is None and tokenizer.eos_token != "q"  # the caller's own stays as it was
    for settings, message in (
        ({"eos_token": "<nowhere>"}, "eos_token='<nowhere>' is not in"),
        ({"chat_template_path": "some/model"}, "chat_template_path='some/model' is not a .jinja file"),
    ):
        with pytest.raises(ValueError, match=message):
            make_trainer(tmp_path, rows, **settings)


def test_compute_metrics_gets_the_full_logits_of_the_evaluated_batches(tmp_path):
    seen = []

    def compute_metrics(prediction):
        seen.append(prediction)
        return {"share_of_prompts": float((prediction.label_ids == -100).mean())}

    trainer = make_trainer(
        tmp_path, eval_dataset=Dataset.from_list(ROWS), compute_metrics=compute_metrics, per_device_eval_batch_size=8
    )
    metrics = trainer.evaluate()
    batch = trainer.data_collator([trainer.eval_dataset[i] for i in range(8)])
    assert seen[0].predictions.shape == (*batch["input_ids"].shape, 259)
    assert metrics["eval_share_of_prompts"] == pytest.approx((batch["labels"] == -100).float().mean().item())


# Killed and resumed


class Killed(Exception):
    pass


class KillAfter(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise Killed


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_a_killed_run_resumes_from_its_checkpoint_with_the_losses_of_an_uninterrupted_one(tmp_path, adapter):
    def run(directory, **more):
        settings = {
            "max_steps": 6, "save_strategy": "steps", "save_steps": 2, "lmbda": 0.7, "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2, "learning_rate": 1e-3, **more,
        }  # fmt: skip
        if adapter:
            settings["peft_config"] = LoraConfig(r=4, target_modules=["q_proj"], lora_dropout=0.1)
        return make_trainer(directory, **settings)

    whole = run(tmp_path / "whole")
    whole.train()
    killed = run(tmp_path / "killed", callbacks=[KillAfter(5)])
    with pytest.raises(Killed):
        killed.train()
    resumed = run(tmp_path / "killed")
    resumed.train(resume_from_checkpoint=True)
    assert len(losses(resumed)) == 6
    assert losses(resumed) == losses(whole)
    for ours, theirs in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


class StoppedWatch(Stopwatch):
    """Always tells the same."""

    reading = [1.0, 1.0, 0.0]

    def seconds(self):
        return self.reading


def test_a_resumed_run_drafts_as_it_would_have_whatever_the_stopwatch_says_by_then(tmp_path, monkeypatch):
    def run(**more):
        trainer = make_trainer(
            tmp_path,
            max_steps=3,
            save_strategy="steps",
            save_steps=1,
            num_draft_tokens="auto",
            accept_top_k=200,
            **more,
        )
        trainer._draft_length.num_measured_rounds = 4
        return trainer

    def third_step(trainer):
        logs = next(entry for entry in trainer.state.log_history if entry.get("step") == 3 and "loss" in entry)
        return {name: logs[name] for name in ("loss", "grad_norm", "draft_length", "tokens_per_round")}

    monkeypatch.setattr("skd_trl.sampling.rounds.Stopwatch", StoppedWatch)
    monkeypatch.setattr(StoppedWatch, "reading", [1.0, 100.0, 0.0])  # a costly teacher: long drafts
    whole = run()
    whole.train()
    assert third_step(whole)["draft_length"] > 3
    monkeypatch.setattr(StoppedWatch, "reading", [100.0, 1.0, 0.0])
    resumed = run()
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert third_step(resumed) == third_step(whole)
    fresh = run(output_dir=str(tmp_path / "fresh"))
    fresh.train()
    assert third_step(fresh)["draft_length"] < 2  # so that the state it was saved with told


def test_the_model_card_names_the_method_and_its_paper(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.create_model_card(model_name="student")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Speculative Knowledge Distillation" in card and "2410.11325" in card and "SKD" in card


# Bad input: one clear error, before training, that names the field or the row


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"accept_top_k": -1}, "accept_top_k=-1"),
        ({"accept": "topk"}, "accept='topk' is unknown; choose one of top_k"),
        ({"divergence": "kl"}, "divergence='kl' is unknown; choose one of forward_kl"),
        ({"rollout": "mixed"}, "rollout='mixed' is unknown; choose one of interleaved"),
        ({"replaced_loss": "ce"}, "replaced_loss='ce' is unknown"),
        ({"num_draft_tokens": 0}, "num_draft_tokens=0"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"teacher_temperature": -0.1}, "teacher_temperature"),
        ({"temperature": -1.0}, "temperature"),
        ({"teacher_top_p": 0.0}, "teacher_top_p"),
        ({"student_top_p": 1.5}, "student_top_p"),
        ({"lmbda": 1.5}, "lmbda"),
        ({"loss_chunk_size": 0}, "loss_chunk_size=0"),
        ({"rollout_batch_size": -2}, "rollout_batch_size=-2"),
        ({"max_new_tokens": 128, "max_length": 128}, "max_new_tokens=128 leaves no room"),
        ({"divergence": "skew_forward_kl", "divergence_kwargs": {"alpha": 2.0}}, "divergence_kwargs"),
        ({"max_prompt_length": 1024, "max_length": 1024}, "max_prompt_length=1024 leaves no room for a response"),
        # Inherited options that have no place here
        ({"packing": True}, "packing=True would have no effect"),
        ({"eval_packing": True}, "eval_packing=True"),
        ({"padding_free": True}, "padding_free=True"),
        ({"assistant_only_loss": True}, "assistant_only_loss=True"),
        ({"completion_only_loss": False}, "completion_only_loss=False"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor=0.1"),
        ({"loss_type": "dft"}, "loss_type='dft'"),
        ({"router_aux_loss_coef": 0.01}, "router_aux_loss_coef=0.01"),
        ({"truncation_mode": "keep_end"}, "truncation_mode='keep_end' would have no effect.*max_prompt_length"),
        ({"dataset_text_field": "content"}, "dataset_text_field='content'.*rename_column"),
        ({"packing_strategy": "wrapped"}, "packing_strategy='wrapped'"),
        (
            {"dataset_kwargs": {"skip_prepare_dataset": True, "add_special_tokens": False}},
            "holds 'add_special_tokens'",
        ),
        ({"beta": 1.0}, "beta=1.0 would have no effect.*divergence='jsd'"),
        ({"seq_kd": True}, "seq_kd=True would have no effect.*rollout='teacher'"),
        ({"pad_to_multiple_of": 8}, "pad_to_multiple_of=8.*rollout='dataset'"),
    ],
)
def test_a_wrong_setting_is_refused_by_name(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        SKDConfig(str(tmp_path), use_cpu=True, bf16=False, **settings)


@pytest.mark.parametrize(
    "rows, settings, message",
    [
        ([], {}, "empty"),
        ([{"prompt": "a"}, {"prompt": ""}], {}, "[Rr]ows? 1"),
        ([{"prompt": "a"}, {"prompt": "b"}], {"rollout": "dataset"}, "reference"),
        ([{"prompt": "a"}, {"prompt": "b"}], {"lmbda": 0.5}, "reference"),
        ([{"prompt": "a" * 300}], {}, "max_prompt_length"),
        ([{"text": "a"}], {}, "prompt"),
    ],
    ids=["no rows", "empty prompt", "no reference", "no reference for some steps", "no room", "another form"],
)
def test_wrong_rows_are_refused_by_number_before_training(tmp_path, rows, settings, message):
    dataset = Dataset.from_list(rows) if rows else Dataset.from_dict({"prompt": []})
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, dataset, **settings)


def test_a_missing_or_shared_teacher_is_refused(tmp_path):
    student = tiny_model(seed=1)
    with pytest.raises(ValueError, match="no teacher"):
        SKDTrainer(
            student, None, SKDConfig(str(tmp_path), use_cpu=True, bf16=False), train_dataset=Dataset.from_list(ROWS)
        )
    with pytest.raises(ValueError, match="same object"):
        make_trainer(tmp_path, model=student, teacher=student)


def test_a_teacher_inside_the_adapted_student_is_refused(tmp_path):
    base = tiny_model(seed=1)
    student = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"]))
    for teacher in (base, student.get_base_model()):
        with pytest.raises(ValueError, match="shares weights with the student.*second time"):
            make_trainer(tmp_path, model=student, teacher=teacher)


@pytest.mark.parametrize("whose", ["student", "teacher"])
def test_a_model_that_is_split_or_not_loaded_is_refused(tmp_path, whose):
    split = tiny_model(seed=3)
    split.hf_device_map = {"model": 0, "lm_head": 1}
    empty = tiny_model(seed=3).to("meta")
    for model, message in ((split, "split over .'0', '1'.*device_map"), (empty, "meta device.*ram_efficient")):
        with pytest.raises(ValueError, match=f"The {whose} (is|has).*{message}"):
            make_trainer(tmp_path, **{"model" if whose == "student" else "teacher": model})


def test_a_student_given_by_name_is_loaded_onto_one_device(tmp_path, monkeypatch):
    from skd_trl.training import models

    tiny_model(seed=1).save_pretrained(tmp_path / "student")
    seen = []
    original = models.create_model_from_path
    monkeypatch.setattr(
        models, "create_model_from_path", lambda name, **kwargs: seen.append(kwargs) or original(name, **kwargs)
    )
    make_trainer(tmp_path, model=str(tmp_path / "student"))
    assert [kwargs["device_map"] for kwargs in seen] == [None]


@pytest.mark.parametrize("rollout", ["dataset", "interleaved"])
def test_prompt_learning_is_refused_before_training(tmp_path, rollout):
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(ValueError, match="prompt-learning.*Use LoRA"):
        make_trainer(tmp_path, peft_config=config, rollout=rollout)
    with pytest.raises(ValueError, match="prompt-learning.*Use LoRA"):
        make_trainer(tmp_path, model=get_peft_model(tiny_model(seed=1), config), rollout=rollout)


@pytest.mark.parametrize("rollout", ["dataset", "interleaved"])
def test_an_adapter_that_looks_for_its_invocation_is_refused_before_training(tmp_path, rollout):
    config = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", alora_invocation_tokens=[5, 6])
    with pytest.raises(ValueError, match="alora_invocation_tokens.*Leave them out"):
        make_trainer(tmp_path, peft_config=config, rollout=rollout)
    with pytest.raises(ValueError, match="alora_invocation_tokens.*Leave them out"):
        make_trainer(tmp_path, model=get_peft_model(tiny_model(seed=1), config), rollout=rollout)


def test_what_adalora_adds_to_another_loss_is_warned_about(tmp_path, caplog):
    for weight in (0.5, 0.0):
        caplog.clear()
        config = AdaLoraConfig(r=4, target_modules=["q_proj"], total_step=10, orth_reg_weight=weight or 1e-9)
        config.orth_reg_weight = weight
        make_trainer(tmp_path, peft_config=config)
        assert ("orth_reg_weight has no effect" in caplog.text) is (weight > 0)


@pytest.mark.parametrize("rows", [ROWS, tuple(ROWS), None], ids=["list", "tuple", "None"])
def test_rows_that_are_no_data_set_are_refused_by_their_type(tmp_path, rows):
    args = SKDConfig(str(tmp_path), use_cpu=True, bf16=False, report_to=[], max_new_tokens=8)
    with pytest.raises((TypeError, ValueError), match=type(rows).__name__.removesuffix("Type")):
        SKDTrainer(tiny_model(seed=1), tiny_model(seed=2), args, train_dataset=rows, processing_class=byte_tokenizer())


def test_a_beginning_that_ran_out_of_memory_has_no_part_in_the_metrics(tmp_path):
    class SmallMemory(SKDTrainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            if len(inputs["input_ids"]) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
            return super().training_step(model, inputs, num_items_in_batch)

    settings = {"trainer_class": SmallMemory, "auto_find_batch_size": True, "per_device_train_batch_size": 8}
    found, small = (
        make_trainer(tmp_path, max_steps=2, **settings),
        make_trainer(tmp_path, max_steps=2, per_device_train_batch_size=2),
    )
    logs = []
    for trainer in (found, small):
        trainer.train()
        logs.append(
            [
                {name: log[name] for name in ("loss", "response_length", "tokens_per_round")}
                for log in trainer.state.log_history[:2]
            ]
        )
    assert logs[0] == logs[1]


def test_models_that_cannot_be_sampled_from_are_refused_with_a_way_out(tmp_path):
    from transformers import OpenAIGPTConfig, OpenAIGPTLMHeadModel

    without_cache = OpenAIGPTLMHeadModel(OpenAIGPTConfig(vocab_size=259, n_embd=32, n_layer=1, n_head=2))
    with pytest.raises(ValueError, match="rollout='dataset'"):
        make_trainer(tmp_path, model=without_cache)


@pytest.mark.parametrize(
    ("architecture", "settings"),
    [
        ("opt", {"dropout": 0.1, "attention_dropout": 0.1}),
        ("llama", {"attention_dropout": 0.3}),
        ("starcoder2", {"attention_dropout": 0.1, "residual_dropout": 0.1, "embedding_dropout": 0.1}),
        ("gpt2", {"attn_pdrop": 0.1, "resid_pdrop": 0.1, "embd_pdrop": 0.1}),
    ],
)
def test_a_student_is_trained_without_dropout_wherever_its_class_keeps_it(tmp_path, caplog, architecture, settings):
    def logits(model):
        return model(input_ids=torch.arange(1, 41)[None], use_cache=False).logits

    model = tiny_model(architecture, seed=1, **settings).train()
    assert not torch.equal(logits(model), logits(model))
    trainer = make_trainer(tmp_path, model=model)
    expected = logits(trainer.model.eval())
    assert torch.equal(logits(trainer.model.train()), expected)
    assert "disable_dropout" not in caplog.text


@pytest.mark.parametrize("share", [0.0, 0.2])
def test_dropout_that_a_class_reads_from_its_config_is_warned_about(tmp_path, caplog, share):
    sizes = {"vocab_size": 259, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = FalconForCausalLM(FalconConfig(**sizes, max_position_embeddings=256, hidden_dropout=share))
    make_trainer(tmp_path, model=model, rollout="dataset")
    message = "FalconForCausalLM reads its dropout from its config in each forward (hidden_dropout=0.2)"
    assert (message in caplog.text) is (share > 0)


@pytest.mark.parametrize(
    "adapter",
    [
        LoraConfig(r=4, target_modules=["q_proj"], lora_dropout=0.2),
        VeraConfig(r=4, target_modules=["q_proj"], vera_dropout=0.2),
    ],
    ids=["LoRA", "VeRA"],
)
def test_dropout_goes_but_an_adapters_own_stays(tmp_path, caplog, adapter):
    trainer = make_trainer(tmp_path, model=tiny_model(seed=1, attention_dropout=0.3), peft_config=adapter)
    assert {module.p for module in trainer.model.modules() if isinstance(module, torch.nn.Dropout)} == {0.2}
    layers = trainer.model.get_base_model().model.layers
    assert [layer.self_attn.attention_dropout for layer in layers] == [0.0, 0.0]
    assert "disable_dropout" not in caplog.text
