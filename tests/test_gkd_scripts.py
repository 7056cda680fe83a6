"""What scripts and subclasses written for TRL's GKDTrainer do to a trainer: it is followed, or refused by name before training."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset, load_dataset
from peft import LoraConfig, get_peft_model
from test_skd_trainer import ROWS, losses, make_trainer
from tiny import byte_tokenizer, save_models, tiny_model
from torch import nn
from transformers import (
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    GenerationConfig,
    LlavaConfig,
    T5Config,
    TrainerCallback,
)
from transformers.hyperparameter_search import ALL_HYPERPARAMETER_SEARCH_BACKENDS
from transformers.trainer_utils import HPSearchBackend
from trl import LogCompletionsCallback, ModelConfig, ScriptArguments, TrlParser, get_peft_config

from skd_trl import SKDConfig, SKDTrainer, SpecKDConfig, SpecKDTrainer
from skd_trl.data.batches import DataCollatorForDistillation


class Sets(TrainerCallback):
    """Sets attributes of a trainer at the end of the first step, or at the begin of the second."""

    def __init__(self, event="on_step_end", **attributes):
        self.event, self.attributes, self.trainer = event, attributes, None

    def _set(self, event, step):
        if event == self.event and step == 1:
            for name, value in self.attributes.items():
                setattr(self.trainer, name, value)

    def on_step_end(self, args, state, control, **kwargs):
        self._set("on_step_end", state.global_step)

    def on_step_begin(self, args, state, control, **kwargs):
        self._set("on_step_begin", state.global_step)


def trained(tmp_path, callback=None, **settings):
    settings = {"max_steps": 2, "learning_rate": 0.0, "shuffle_dataset": False, **settings}
    trainer = make_trainer(tmp_path, callbacks=[callback] if callback else None, **settings)
    if callback is not None:
        callback.trainer = trainer
    trainer.train()
    return losses(trainer)


# Numbers that a callback sets


@pytest.mark.parametrize("event", ["on_step_end", "on_step_begin"])
def test_a_beta_that_a_callback_sets_is_that_of_the_next_step(tmp_path, event):
    settings = {"rollout": "dataset", "divergence": "jsd"}
    low, high = (trained(tmp_path, beta=beta, **settings) for beta in (0.1, 0.9))
    moved = trained(tmp_path, Sets(event, beta=0.9), beta=0.1, **settings)
    assert moved == [low[0], pytest.approx(high[1], rel=1e-6)] and low[1] != pytest.approx(high[1], rel=1e-3)


def test_a_temperature_that_a_callback_sets_shapes_the_draws_of_the_next_step(tmp_path):
    plain, greedy = (trained(tmp_path, rollout="student", temperature=temperature) for temperature in (1.0, 0.0))
    moved = trained(tmp_path, Sets(temperature=0.0), rollout="student", temperature=1.0)
    assert moved == [plain[0], pytest.approx(greedy[1], rel=1e-6)] and plain[1] != pytest.approx(greedy[1], rel=1e-3)


def test_an_lmbda_that_a_callback_sets_decides_the_next_step(tmp_path):
    given = trained(tmp_path, rollout="dataset")
    moved = trained(tmp_path, Sets(lmbda=0.0))
    assert moved[0] == trained(tmp_path)[0] and moved[1] == pytest.approx(given[1], rel=1e-6)


def test_a_seq_kd_that_a_callback_sets_lets_the_teacher_write_the_next_step(tmp_path):
    settings = {"lmbda": 0.0, "accept_top_k": 25}
    given, written = (trained(tmp_path, seq_kd=seq_kd, **settings) for seq_kd in (False, True))
    moved = trained(tmp_path, Sets(seq_kd=True), **settings)
    assert moved == [given[0], pytest.approx(written[1], rel=1e-6)]
    assert given[1] != pytest.approx(written[1], rel=1e-3)


@pytest.mark.parametrize("name, first, second", [("temperature", 1.0, 0.0), ("teacher_temperature", 1.0, 0.0), ("accept_top_k", 80, 5)])  # fmt: skip
def test_an_argument_that_a_callback_sets_is_that_of_the_next_step(tmp_path, name, first, second):
    class SetsArgument(TrainerCallback):
        trainer = None

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 1:
                setattr(args, name, second)

    before, after = (trained(tmp_path, **{name: value}) for value in (first, second))
    moved = trained(tmp_path, SetsArgument(), **{name: first})
    assert moved == [before[0], pytest.approx(after[1], rel=1e-6)]
    assert before[1] != pytest.approx(after[1], rel=1e-4)


@pytest.mark.parametrize(
    "attributes, settings, message",
    [
        ({"beta": 0.3}, {}, "beta was set to 0.3, which would have no effect.*divergence='jsd'"),
        ({"temperature": -1.0}, {}, "temperature changed during training: .*temperature=-1.0"),
        ({"lmbda": 2.0}, {}, "lmbda changed during training: lmbda=2.0"),
        (
            {"lmbda": 0.5},
            {"schedules": {"lmbda": {"start": 0.5, "end": 1.0}}, "lmbda": 0.5},
            "while schedules move lmbda too",
        ),
    ],
)
def test_a_number_that_a_callback_cannot_set_is_refused_at_the_next_step(tmp_path, attributes, settings, message):
    attributes = attributes if "schedules" not in settings else {"lmbda": 0.7}
    with pytest.raises(ValueError, match=message):
        trained(tmp_path, Sets(**attributes), **settings)


def test_a_callback_that_asks_for_references_that_are_not_there_is_told(tmp_path):
    callback = Sets(lmbda=0.0)
    trainer = make_trainer(
        tmp_path, [{"messages": row["messages"][:1]} for row in ROWS], callbacks=[callback], max_steps=2
    )
    callback.trainer = trainer
    with pytest.raises(ValueError, match="Step 2 trains on references, as trainer.lmbda was set to 0.0"):
        trainer.train()


# Methods and attributes


@pytest.mark.parametrize("base", [SKDTrainer, SpecKDTrainer])
@pytest.mark.parametrize(
    "name, instead",
    [("generalized_jsd_loss", "`divergence`"), ("generate_on_policy_outputs", "`rollout`"), ("_prepare_dataset", "formatting_func")],
)  # fmt: skip
def test_a_method_that_nothing_would_call_is_refused_with_what_takes_its_place(tmp_path, base, name, instead):
    own_class = type("Own", (base,), {name: staticmethod(lambda *args, **kwargs: None)})
    with pytest.raises(ValueError, match=f"Own replaces {name}, which nothing here calls.*{instead}"):
        make_trainer(tmp_path, trainer_class=own_class)
    trainer = make_trainer(tmp_path, trainer_class=base)
    setattr(trainer, name, lambda *args, **kwargs: None)
    with pytest.raises(ValueError, match=f"the trainer object replaces {name}"):
        trainer.train()


def test_a_subclass_that_adds_to_what_is_called_is_taken(tmp_path):
    class Doubles(SKDTrainer):
        def compute_loss(self, *args, **kwargs):
            return 2 * super().compute_loss(*args, **kwargs)

    once, twice = (make_trainer(tmp_path, trainer_class=c, rollout="dataset") for c in (SKDTrainer, Doubles))
    once.train()
    twice.train()
    assert losses(twice)[0] == pytest.approx(2 * losses(once)[0], rel=1e-6)


@pytest.mark.parametrize("name", ["generation_config", "generation_kwargs"])
def test_what_generate_would_take_is_refused_by_name_when_read_and_when_set(tmp_path, name):
    trainer = make_trainer(tmp_path)
    with pytest.raises(AttributeError, match=f"SKDTrainer has no {name}.*student_top_p"):
        getattr(trainer, name).top_p = 0.9
    with pytest.raises(AttributeError, match=f"SKDTrainer has no {name}.*student_top_p"):
        setattr(trainer, name, {})


def test_a_collator_whose_batches_the_trainer_cannot_read_is_refused_by_name(tmp_path):
    def without_labels(rows):
        return {name: value for name, value in DataCollatorForDistillation(0)(rows).items() if name != "labels"}

    models = {"model": tiny_model(seed=1), "teacher_model": tiny_model(seed=2), "processing_class": byte_tokenizer()}
    models["args"] = SKDConfig(str(tmp_path), use_cpu=True, bf16=False, max_new_tokens=8, max_length=64, report_to=[])
    models["train_dataset"] = Dataset.from_list(ROWS)
    with pytest.raises(ValueError, match="data_collator=without_labels gives batches without labels, which"):
        SKDTrainer(**models, data_collator=without_labels)
    collator = DataCollatorForLanguageModeling(byte_tokenizer(), mlm=False)
    with pytest.raises(
        ValueError, match="data_collator=DataCollatorForLanguageModeling cannot make a batch of rows with prompt_ids"
    ):
        SKDTrainer(**models, data_collator=collator)
    SKDTrainer(**models, data_collator=DataCollatorForDistillation(0))


@pytest.mark.parametrize("as_stream", [False, True])
def test_a_collator_that_leaves_out_what_rows_have_of_the_teacher_is_refused_whichever_row_has_it(tmp_path, as_stream):
    def without_teachers_prompts(rows):
        batch = DataCollatorForDistillation(0)(rows)
        return {name: value for name, value in batch.items() if not name.startswith("teacher_")}

    config = SKDConfig(
        str(tmp_path), use_cpu=True, bf16=False, max_new_tokens=8, max_length=96, report_to=[], max_steps=1
    )
    rows = [{"prompt_ids": [5], "response_ids": [6], "teacher_prompt_ids": ids} for ids in ([7, 5], [])]
    rows = rows if as_stream else rows[::-1]
    dataset = Dataset.from_list(rows)
    models = {"model": tiny_model(seed=1), "teacher_model": tiny_model(seed=2), "processing_class": byte_tokenizer()}
    models |= {"args": config, "train_dataset": dataset.to_iterable_dataset() if as_stream else dataset}
    with pytest.raises(ValueError, match="gives batches without teacher_prompts, teacher_prompt_attention_mask"):
        SKDTrainer(**models, data_collator=without_teachers_prompts)
    SKDTrainer(**models, data_collator=DataCollatorForDistillation(0))


# Hyperparameter search


def test_a_batch_of_another_trainers_keys_is_refused_with_where_batches_come_from(tmp_path):
    """As scripts for TRL's DistillationTrainer make them, which lays prompt and completion out apart."""
    trainer = make_trainer(tmp_path)
    ids, mask = torch.full((2, 3), 5), torch.ones(2, 3, dtype=torch.long)
    batch = {"prompt_ids": ids, "prompt_mask": mask, "completion_ids": ids, "completion_mask": mask}
    with pytest.raises(ValueError, match="prompt_ids, .*completion_mask lacks input_ids, attention_mask, labels"):
        trainer.compute_loss(trainer.model, batch)
    own = trainer.data_collator([trainer.train_dataset[i] for i in range(2)])
    num_tokens = (own["labels"] != -100).sum()
    trainer.model.eval()
    with torch.no_grad():
        mean, half = (trainer.compute_loss(trainer.model, own, num_items_in_batch=n) for n in (None, 2 * num_tokens))
    assert half.item() == pytest.approx(mean.item() / 2) != 0


@pytest.mark.parametrize("config, kind", [(T5Config(), "T5"), (LlavaConfig(), "Llava")])
def test_a_teacher_of_another_kind_of_model_is_refused_by_its_kind_and_not_by_a_list_of_all_others(
    tmp_path, config, kind
):
    config.save_pretrained(tmp_path / "teacher")
    with pytest.raises(ValueError, match=f"is a {kind}, which transformers does not load as a causal") as refusal:
        make_trainer(tmp_path, teacher=str(tmp_path / "teacher"))
    assert len(str(refusal.value)) < 400


class EachOnce:
    """A search backend that tries the values it is given, as transformers' own run their trials."""

    def ensure_available(self):
        pass

    def run(self, trainer, n_trials, direction, values):
        found = []
        for number, value in enumerate(values[:n_trials]):
            trainer.objective, trainer.model = None, None
            trainer.train(trial=SimpleNamespace(number=number, params=value))
            found.append((trainer.evaluate()["eval_loss"], losses(trainer)))
        return found


def search(trainer, monkeypatch, values, hp_space=lambda trial: trial.params):
    monkeypatch.setattr("transformers.integrations.hp_params", lambda trial: trial and trial.params)
    monkeypatch.setattr(trainer, "_report_to_hp_search", lambda *args: None)  # only for backends that are installed
    monkeypatch.setitem(ALL_HYPERPARAMETER_SEARCH_BACKENDS, HPSearchBackend.OPTUNA, EachOnce)
    return trainer.hyperparameter_search(hp_space, n_trials=len(values), backend="optuna", values=values)


def test_a_search_trains_a_new_student_with_the_numbers_of_each_trial(tmp_path, monkeypatch):
    values = [{"learning_rate": 1e-2}, {"learning_rate": 1e-3}, {"temperature": 0.0}, {"accept_top_k": 3}]
    settings = {"max_steps": 2, "learning_rate": 1e-3, "eval_dataset": Dataset.from_list(ROWS)}
    trainer = make_trainer(tmp_path, **settings)
    trainer.model_init = lambda: tiny_model(seed=1)
    found = search(trainer, monkeypatch, values)
    now = settings
    for value, (eval_loss, logged) in zip(values, found, strict=True):
        now = {**now, **value}  # as in transformers: what a trial sets stays set
        alone = make_trainer(tmp_path, **now)
        alone.train()
        assert logged == pytest.approx(losses(alone), rel=1e-5)
        assert eval_loss == pytest.approx(alone.evaluate()["eval_loss"], rel=1e-5)


def test_a_search_whose_trial_has_an_impossible_number_or_another_kind_of_student_is_refused(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path)
    trainer.model_init = lambda: tiny_model(seed=1)
    with pytest.raises(ValueError, match="accept_top_k=0"):
        search(trainer, monkeypatch, [{"accept_top_k": 0}])
    adapter = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    trainer = make_trainer(tmp_path, peft_config=adapter, eval_dataset=Dataset.from_list(ROWS))
    trainer.model_init = lambda: tiny_model(seed=1)
    with pytest.raises(ValueError, match="model_init returned a model without an adapter"):
        search(trainer, monkeypatch, [{}])
    trainer.model_init = lambda: get_peft_model(tiny_model(seed=1), adapter)
    assert math.isfinite(search(trainer, monkeypatch, [{}])[0][0])


def test_a_student_of_model_init_has_a_compiled_backbone_of_its_own(tmp_path):
    torch._dynamo.reset()
    settings = {"max_steps": 2, "learning_rate": 1e-2, "rollout": "dataset", "save_strategy": "no"}
    moved, logged = [], []
    for compiles in (False, True):
        backend = {"torch_compile": True, "torch_compile_backend": "eager"} if compiles else {}
        trainer = make_trainer(tmp_path, **settings, **backend)
        trainer.model_init = lambda: tiny_model(seed=5)
        trainer.train()
        now = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
        before = dict(tiny_model(seed=5).named_parameters())
        moved.append([name for name, p in now.named_parameters() if not torch.equal(p, before[name])])
        logged.append(losses(trainer))
    assert len(moved[0]) > 10 and moved[1] == moved[0]
    assert logged[1] == pytest.approx(logged[0], rel=1e-5)
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "smaller, words",
    [
        (
            {"vocab_size": 200},
            "a student with 200 ids, and the trainer was constructed with one whose rows need 259 ids",
        ),
        (
            {"max_position_embeddings": 64},
            "room for prompts of 48 tokens, and .* whose rows need prompts of up to 112",
        ),
    ],
    ids=["ids", "positions"],
)
def test_a_student_of_model_init_that_the_rows_do_not_fit_is_refused(tmp_path, smaller, words):
    trainer = make_trainer(tmp_path)
    trainer.model_init = lambda: tiny_model(seed=1, **smaller)
    with pytest.raises(ValueError, match=words):
        trainer.train()


# 4-bit students on a CPU


class Packs(nn.Linear):
    """As bitsandbytes' Linear4bit on a CPU with AVX512-BF16: packed by the first forward in eval mode, then without a gradient."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features, bias=False)
        self.weight.data = linear.weight.data
        self.weight.requires_grad_(False)
        self.support_avx512bf16_for_cpu = True
        self.weight.quant_state = SimpleNamespace(packing_format_for_cpu=False)

    def forward(self, x):
        state = self.weight.quant_state
        state.packing_format_for_cpu |= self.support_avx512bf16_for_cpu and not self.training and not x.requires_grad
        return super().forward(x.detach() if state.packing_format_for_cpu else x)


def packing_student():
    student = get_peft_model(tiny_model(seed=1), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    for layer in student.get_base_model().model.layers:
        layer.self_attn.o_proj, layer.mlp.down_proj = Packs(layer.self_attn.o_proj), Packs(layer.mlp.down_proj)
    return student


def test_a_4_bit_student_on_a_cpu_trains_all_of_its_adapter(tmp_path):
    trainer = make_trainer(tmp_path, model=packing_student(), max_steps=2, learning_rate=1e-2)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    moved = [
        name for name, p in trainer.model.named_parameters() if p.requires_grad and not torch.equal(p, before[name])
    ]
    assert len(before) == 4 and moved == list(before)


def test_a_4_bit_student_that_has_run_on_a_cpu_before_is_refused(tmp_path):
    student = packing_student().eval()
    with torch.no_grad():
        student(torch.tensor([[1, 2, 3]]))
    with pytest.raises(ValueError, match="4-bit weights .*o_proj.* were packed for inference"):
        make_trainer(tmp_path, model=student)


# A script of the form of TRL's own for GKD


@pytest.mark.parametrize("config_class, trainer_class", [(SKDConfig, SKDTrainer), (SpecKDConfig, SpecKDTrainer)])
def test_a_script_of_trls_form_runs_with_two_names_changed(tmp_path, config_class, trainer_class):
    save_models(tmp_path, {"student": 1, "teacher": 2})
    for split in ("train", "test"):
        rows = [{"prompt": row["messages"][:1], "completion": row["messages"][1:]} for row in ROWS]
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    script_args, training_args, model_args = TrlParser(
        (ScriptArguments, config_class, ModelConfig)
    ).parse_args_and_config(
        f"--dataset_name {tmp_path} --model_name_or_path {tmp_path}/student --teacher_model_name_or_path {tmp_path}/teacher "
        f"--output_dir {tmp_path}/out --max_steps 2 --eval_strategy steps --eval_steps 1 --max_new_tokens 8 --max_length 64 "
        "--dtype float32 --use_cpu true --bf16 false --report_to none --use_peft --lora_r 2 --lora_target_modules q_proj v_proj".split()
    )
    loading = {"revision": model_args.model_revision, "dtype": model_args.dtype}
    training_args.model_init_kwargs = {**loading, "use_cache": not training_args.gradient_checkpointing}
    training_args.teacher_model_init_kwargs = {**loading, "use_cache": True}
    tokenizer = AutoTokenizer.from_pretrained(model_args.model_name_or_path, padding_side="left")
    dataset = load_dataset("json", data_files={s: str(tmp_path / f"{s}.jsonl") for s in ("train", "test")})
    trainer = trainer_class(
        model=model_args.model_name_or_path,
        teacher_model=training_args.teacher_model_name_or_path,
        args=training_args,
        train_dataset=dataset[script_args.dataset_train_split],
        eval_dataset=dataset[script_args.dataset_test_split],
        processing_class=tokenizer,
        peft_config=get_peft_config(model_args),
    )
    generation = GenerationConfig(
        max_new_tokens=training_args.max_new_tokens, do_sample=True, temperature=training_args.temperature
    )
    callback = LogCompletionsCallback(trainer, generation, num_prompts=8)
    trainer.add_callback(callback)
    trainer.train()
    trainer.save_model(training_args.output_dir)
    assert len(callback.table) == 8 * 2  # after each of the two steps
    assert [entry["step"] for entry in trainer.state.log_history if "eval_loss" in entry] == [1, 2]
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()
