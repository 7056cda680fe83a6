"""Models as people bring them: each trains, or is refused before training in words that say how to load it."""

import copy
import json
import math
import pickle
import shutil

import pytest
import torch
from datasets import Dataset
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from test_skd_trainer import ROWS, losses, make_trainer
from tiny import ARCHITECTURES, byte_tokenizer, save_models, tiny_model
from transformers import AutoModelForCausalLM, GenerationConfig, TrainerCallback
from trl import SFTConfig, SFTTrainer

from skd_trl.training import precision
from skd_trl.training.findings import Verdict
from skd_trl.training.precision import casts_of_teacher, lost_updates
from skd_trl.training.trained_parameters import check_trained_parameters


LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)


def moved_by(trainer) -> set[str]:
    """Names of the parameters that training has moved."""
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    return {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}


# Nothing to train


@pytest.fixture
def adapter(tmp_path):
    get_peft_model(tiny_model(seed=1), LORA).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def loaded_for_inference(adapter):
    return PeftModel.from_pretrained(tiny_model(seed=1), adapter)


def switched_off(adapter):
    model = PeftModel.from_pretrained(tiny_model(seed=1), adapter, is_trainable=True)
    model.base_model.disable_adapter_layers()
    return model


def merged(adapter):
    model = PeftModel.from_pretrained(tiny_model(seed=1), adapter, is_trainable=True)
    model.merge_adapter()
    return model


def frozen_by_hand(adapter):
    return tiny_model(seed=1).requires_grad_(False)


def trained_where_the_loss_does_not_look(adapter):
    model = tiny_model(seed=1).requires_grad_(False)
    model.unused = torch.nn.Linear(3, 3)
    return model


def only_the_other_adapter_is_trained(adapter):
    model = PeftModel.from_pretrained(tiny_model(seed=1), adapter)
    model.load_adapter(adapter, "other")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".other." in name)
    return model


def merged_and_unloaded(adapter):
    return merged(adapter).merge_and_unload()


@pytest.mark.parametrize(
    "bring, way_out",
    [
        (loaded_for_inference, "is_trainable=True"),
        (switched_off, r"enable_adapter_layers\(\)"),
        (merged, r"unmerge_adapter\(\)"),
        (frozen_by_hand, r"requires_grad_\(True\)"),
        (trained_where_the_loss_does_not_look, "unfreeze"),
        (only_the_other_adapter_is_trained, r"set_adapter\(name\)"),
        (merged_and_unloaded, "unfreeze"),
    ],
)
def test_a_student_without_a_parameter_to_train_is_refused_with_how_to_get_some(tmp_path, adapter, bring, way_out):
    with pytest.raises(ValueError, match=f"nothing to train: .*{way_out}"):
        make_trainer(tmp_path, ROWS[:4], model=bring(adapter), gradient_checkpointing=True)


def test_a_new_adapter_that_is_meant_for_inference_is_refused(tmp_path):
    with pytest.raises(ValueError, match="nothing to train: .*inference_mode"):
        make_trainer(tmp_path, ROWS[:4], peft_config=LoraConfig(r=4, target_modules=["q_proj"], inference_mode=True))


@pytest.mark.parametrize(
    "peft_config",
    [LORA, IA3Config(target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"])],
    ids=["lora", "ia3"],
)
def test_an_adapter_that_is_loaded_for_training_moves(tmp_path, peft_config):
    get_peft_model(tiny_model(seed=1), peft_config).save_pretrained(tmp_path / "adapter")
    student = PeftModel.from_pretrained(tiny_model(seed=1), tmp_path / "adapter", is_trainable=True)
    trainer = make_trainer(tmp_path, model=student, gradient_checkpointing=True, learning_rate=1e-2)
    moved, names = moved_by(trainer), {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert moved and moved == names


def test_what_a_loss_reaches_is_counted():
    model = tiny_model(seed=1).requires_grad_(False)
    model.lm_head.requires_grad_(True)
    model.model.norm.requires_grad_(True)
    assert check_trained_parameters(model) == 2
    assert not model.training and all(p.grad is None for p in model.parameters())


# Objects that a trainer has had before


def fit(tmp_path, student, teacher, **settings):
    """One step in bf16, TRL's default, on weights in fp32."""
    settings = {"bf16": True, "learning_rate": 1e-2, **settings}
    trainer = make_trainer(tmp_path, ROWS[:4], model=student, teacher=teacher, **settings)
    trainer.train()
    return trainer


def nothing_before(tmp_path, student, teacher):
    pass


def the_same_cell_twice(tmp_path, student, teacher):
    fit(tmp_path, student, teacher, learning_rate=0.0)


def warmed_up_on_given_texts(tmp_path, student, teacher):
    fit(tmp_path, student, teacher, rollout="dataset", learning_rate=0.0)


def one_teacher_for_two_trainers(tmp_path, student, teacher):
    fit(tmp_path, tiny_model(seed=3), teacher)


def the_teacher_was_a_student(tmp_path, student, teacher):
    fit(tmp_path, teacher, tiny_model(seed=3), learning_rate=0.0)


def warmed_up_by_sft(tmp_path, student, teacher):
    args = SFTConfig(
        str(tmp_path / "sft"), use_cpu=True, bf16=True, max_steps=1, learning_rate=0.0, report_to=[], save_strategy="no",
        disable_tqdm=True, per_device_train_batch_size=2,
    )  # fmt: skip
    rows = Dataset.from_list([{"prompt": "q", "completion": "ab"}] * 4)
    SFTTrainer(student, args, train_dataset=rows, processing_class=byte_tokenizer()).train()


def unwrapped_from_precision(tmp_path, student, teacher):
    for model in (student, teacher):
        before = fit(tmp_path, model, tiny_model(seed=3), learning_rate=0.0)
        before.accelerator.unwrap_model(model, keep_fp32_wrapper=False)


def trained_in_fp32_before(tmp_path, student, teacher):
    fit(tmp_path, student, teacher, learning_rate=0.0, bf16=False)


BEFORE = [
    nothing_before,
    the_same_cell_twice,
    warmed_up_on_given_texts,
    one_teacher_for_two_trainers,
    the_teacher_was_a_student,
    warmed_up_by_sft,
    unwrapped_from_precision,
    trained_in_fp32_before,
]


@pytest.fixture(scope="module")
def first_run(tmp_path_factory):
    """Losses and weights of one step of two models that no trainer has had, by precision."""
    runs = {}
    for bf16 in (True, False):
        student, teacher = tiny_model(seed=1), tiny_model(seed=2)
        trainer = fit(tmp_path_factory.mktemp("first"), student, teacher, bf16=bf16)
        runs[bf16] = losses(trainer), student.state_dict()
    assert runs[True][0] != runs[False][0]  # the precision shows
    return runs


@pytest.mark.parametrize("bf16", [True, False])
@pytest.mark.parametrize("before", BEFORE)
def test_a_trainer_takes_the_same_step_whoever_had_the_models_before(tmp_path, first_run, before, bf16):
    student, teacher = tiny_model(seed=1), tiny_model(seed=2)
    before(tmp_path, student, teacher)
    trainer = fit(tmp_path, student, teacher, bf16=bf16)
    expected_losses, expected = first_run[bf16]
    assert losses(trainer) == expected_losses
    assert all(torch.equal(p, expected[name]) for name, p in student.state_dict().items())


# Copies


def logits_of(model):
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(3, 9)[None]).logits


@pytest.mark.parametrize("peft_config", [None, LORA], ids=["whole", "lora"])
@pytest.mark.parametrize("bf16", [True, False])
@pytest.mark.parametrize(
    "copy_of", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_a_copy_made_during_training_is_a_model_by_itself(tmp_path, copy_of, bf16, peft_config):
    if bf16 and copy_of is not copy.deepcopy:
        pytest.skip("accelerate refuses to pickle its autocast, in its own words")
    copies = []

    class Copies(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            copies.append(
                (copy_of(kwargs["model"]), {name: p.clone() for name, p in kwargs["model"].state_dict().items()})
            )

    trainer = make_trainer(
        tmp_path, ROWS, bf16=bf16, max_steps=3, learning_rate=1e-2, callbacks=[Copies()], peft_config=peft_config
    )
    trainer.train()
    for model, weights in copies:
        assert all(torch.equal(p, weights[name]) for name, p in model.state_dict().items())
        plain = tiny_model(seed=9)
        plain = plain if peft_config is None else get_peft_model(plain, peft_config)
        plain.load_state_dict(weights)
        difference = (logits_of(model) - logits_of(plain)).abs().max()
        assert difference < (0.1 if bf16 else 1e-5) * logits_of(plain).abs().max()
    assert not torch.allclose(logits_of(copies[0][0]), logits_of(trainer.model), rtol=0.05)


@pytest.mark.parametrize("first", ["skd", "sft"])
def test_a_copy_of_a_trained_student_teaches_with_its_own_weights(tmp_path, first):
    student = tiny_model(seed=1)
    (fit if first == "skd" else warmed_up_by_sft)(tmp_path, student, tiny_model(seed=2))
    teacher = copy.deepcopy(student)
    plain = tiny_model(seed=9)
    plain.load_state_dict(student.state_dict())
    student.requires_grad_(True).lm_head.weight.data.mul_(-1.0)
    trainer = make_trainer(tmp_path, ROWS[:4], model=student, teacher=teacher)
    assert torch.equal(logits_of(trainer.teacher_model), logits_of(plain))
    trainer.train()


@pytest.mark.parametrize("peft_config", [None, LORA], ids=["whole", "lora"])
def test_nothing_is_left_on_the_models_of_a_training_in_fp32(tmp_path, peft_config):
    student, teacher = tiny_model(seed=1), tiny_model(seed=2)
    trainer = make_trainer(tmp_path, ROWS[:4], model=student, teacher=teacher, peft_config=peft_config)
    trainer.train()
    trainer.evaluate(Dataset.from_list(ROWS[:2]))
    for model in (student, teacher, trainer.model):
        assert not [name for name, module in model.named_modules() if "forward" in module.__dict__]


# Mixtures of experts


def mixture(seed, architecture="mixtral", **settings):
    sizes = {"num_local_experts": 4} if architecture == "mixtral" else {"num_experts": 4, "moe_intermediate_size": 16}
    return tiny_model(architecture, seed=seed, num_experts_per_tok=2, **sizes, **settings)


@pytest.fixture
def mixtures(monkeypatch):
    for name in ("mixtral", "qwen3_moe", "olmoe"):
        monkeypatch.setitem(ARCHITECTURES, name, {})


@pytest.mark.parametrize("rollout", ["interleaved", "dataset"])
@pytest.mark.parametrize("asks", [False, True])
@pytest.mark.parametrize("architecture", ["mixtral", "qwen3_moe", "olmoe"])
def test_a_mixture_of_experts_trains_on_the_divergence_alone_and_is_saved_as_it_was_loaded(
    tmp_path, mixtures, architecture, asks, rollout
):
    def make(asks):
        student, teacher = (mixture(seed, architecture, output_router_logits=asks, router_aux_loss_coef=0.5) for seed in (1, 2))  # fmt: skip
        return make_trainer(tmp_path, ROWS[:4], model=student, teacher=teacher, rollout=rollout, learning_rate=1e-2)

    trainer, plain = make(asks), make(False)
    trainer.train(), plain.train()
    assert losses(trainer) == losses(plain)
    assert all(map(torch.equal, trainer.model.parameters(), plain.model.parameters()))
    trainer.save_model(str(tmp_path / "saved"))
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert (saved.config.output_router_logits, saved.config.router_aux_loss_coef) == (asks, 0.5)
    assert trainer.teacher_model.config.output_router_logits is asks
    if not asks:
        assert saved.generate(torch.arange(3, 9).view(2, 3), max_new_tokens=3, do_sample=False).shape == (2, 6)
    assert math.isfinite(trainer.evaluate(Dataset.from_list(ROWS[:4]))["eval_loss"])


# Ends of sequence


def ends_of(student, teacher):
    """A pair of models with these ends in their generation_config, and settings that sample some steps."""
    models = {"model": tiny_model(seed=1), "teacher": tiny_model(seed=2)}
    models["model"].generation_config.eos_token_id = student
    models["teacher"].generation_config.eos_token_id = teacher
    return models


@pytest.mark.parametrize("peft_config", [None, LORA], ids=["whole", "lora"])
@pytest.mark.parametrize("student, teacher", [(257, 258), ([257, 5], [258, 5]), (None, [258, 6]), (257, 257)])
def test_what_training_stopped_at_is_saved_with_the_student(tmp_path, student, teacher, peft_config):
    models = ends_of(student, teacher)
    given = models["model"].generation_config, models["teacher"].generation_config
    trainer = make_trainer(
        tmp_path, ROWS[:4], **models, peft_config=peft_config, save_strategy="steps", save_steps=1, rollout="dataset"
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    for folder in (tmp_path / "saved", tmp_path / "out" / "checkpoint-1"):
        saved = GenerationConfig.from_pretrained(folder).eos_token_id
        assert set([saved] if isinstance(saved, int) else saved) == set(trainer.eos_token_ids)
    assert models["teacher"].generation_config is given[1] and given[1].eos_token_id == teacher


def test_a_student_stops_where_it_was_taught_to(tmp_path):
    """The teacher ends with a token that the student's own configuration does not name."""
    trainer = make_trainer(tmp_path, ROWS[:4], **ends_of(257, 65))
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    student.lm_head.weight.data.zero_()
    student.lm_head.weight.data[65] = 1.0
    student.model.norm.weight.data.fill_(1.0)
    prompts = torch.arange(3, 30)[:, None]
    written = student.generate(prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=5, do_sample=False)
    of_end = (written[:, 1] == 65).nonzero().flatten()
    assert len(of_end) > 3 and (written[of_end, 2:] != 65).all()  # ended: what follows is padding


def test_a_generation_config_of_a_run_that_trained_nothing_stays_as_it_was(tmp_path):
    models = ends_of(257, 258)
    make_trainer(tmp_path, ROWS[:4], **models)
    assert models["model"].generation_config.eos_token_id == 257


# Adapters


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A student with its tokenizer, and an adapter of it by which it writes other texts; neither has the other's files."""
    directory = tmp_path_factory.mktemp("saved")
    save_models(directory, {"student": 1, "teacher": 2})
    model = AutoModelForCausalLM.from_pretrained(directory / "student")
    get_peft_model(model, LORA).save_pretrained(directory / "adapter")
    return directory


@pytest.mark.parametrize("with_tokenizer", [False, True])
def test_the_folder_of_an_adapter_is_a_student_that_goes_on_training_it(tmp_path, saved, with_tokenizer):
    folder = shutil.copytree(saved / "adapter", tmp_path / "adapter")
    if with_tokenizer:
        byte_tokenizer(num_extra_tokens=0).save_pretrained(folder)
    trainer = make_trainer(
        tmp_path,
        ROWS[:4],
        model=str(folder),
        teacher=str(saved / "teacher"),
        processing_class=None,
        learning_rate=1e-2,
    )
    by_hand = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(saved / "student"), folder)
    assert torch.equal(logits_of(trainer.model), logits_of(by_hand))
    moved = moved_by(trainer)
    assert moved and all("lora" in name for name in moved)
    trainer.save_model(str(tmp_path / "again"))
    again = make_trainer(tmp_path, ROWS[:4], model=str(tmp_path / "again"), teacher=str(saved / "teacher"))
    assert torch.allclose(logits_of(again.model), logits_of(trainer.model), atol=1e-6)


def test_the_folder_of_an_adapter_is_a_teacher(tmp_path, saved):
    trainer = make_trainer(tmp_path, ROWS[:4], teacher=str(saved / "adapter"))
    by_hand = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(saved / "student"), saved / "adapter")
    assert torch.allclose(logits_of(trainer.teacher_model), logits_of(by_hand), atol=1e-6)
    trainer.train()
    assert torch.allclose(logits_of(trainer.teacher_model), logits_of(by_hand), atol=1e-6)


def test_an_adapter_that_does_not_name_its_model_is_refused_with_the_way_to_load_it(tmp_path, saved):
    folder = shutil.copytree(saved / "adapter", tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": None}))
    with pytest.raises(ValueError, match="base_model_name_or_path.*is_trainable=True"):
        make_trainer(tmp_path, ROWS[:4], model=str(folder))


@pytest.mark.parametrize("given", ["peft_config", "PeftModel"])
@pytest.mark.parametrize("use_dora", [False, True])
def test_an_adapter_on_the_head_learns_from_the_loss_as_with_full_logits(tmp_path, use_dora, given):
    config = LoraConfig(r=4, target_modules=["q_proj", "lm_head"], use_dora=use_dora, init_lora_weights=False)
    student = tiny_model(seed=1)
    student = get_peft_model(student, config) if given == "PeftModel" else student
    trainer = make_trainer(
        tmp_path, ROWS[:4], model=student, rollout="dataset", peft_config=config if given == "peft_config" else None
    )
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    trainer.compute_loss(trainer.model.train(), batch).backward()
    found = {name: p.grad for name, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.model.zero_grad(set_to_none=True)
    q, p = (model(**inputs).logits[:, :-1].log_softmax(-1) for model in (trainer.model, trainer.teacher_model))
    (p.exp() * (p - q)).sum(-1)[batch["labels"][:, 1:] != -100].mean().backward()
    assert any("lm_head" in name for name in found)
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad:
            assert (found[name] - parameter.grad).norm() < 1e-4 * parameter.grad.norm() + 1e-7, name
    assert (
        type(trainer._inner_student()).get_output_embeddings(trainer._inner_student())
        is trainer._inner_student().lm_head
    )


# Weights in 16 bits


def test_a_student_in_bf16_is_warned_about_because_its_weights_hardly_move(tmp_path, caplog):
    shares = []
    for dtype in (torch.bfloat16, torch.float32):
        caplog.clear()
        trainer = make_trainer(
            tmp_path, model=tiny_model(seed=1).to(dtype), bf16=True, max_steps=3, learning_rate=2e-5, rollout="dataset"
        )
        assert ("100% of the weights that are trained are bfloat16" in caplog.text) is (dtype == torch.bfloat16)
        before = [p.detach().clone() for p in trainer.model.parameters()]
        trainer.train()
        moved = sum((p != b).sum().item() for p, b in zip(trainer.model.parameters(), before, strict=True))
        shares.append(moved / sum(b.numel() for b in before))
    assert shares[0] < 0.2 and shares[1] > 0.5  # what the warning is about


def test_a_student_in_bf16_by_model_init_kwargs_is_warned_about(tmp_path, saved, caplog):
    make_trainer(tmp_path, model=str(saved / "student"), model_init_kwargs={"dtype": "bfloat16"})
    assert "of the weights that are trained are bfloat16" in caplog.text


def test_an_adapter_in_fp32_around_a_model_in_bf16_is_not_warned_about(tmp_path, caplog):
    make_trainer(tmp_path, model=tiny_model(seed=1).to(torch.bfloat16), peft_config=LORA, bf16=True)
    assert "of the weights that are trained" not in caplog.text


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_teacher_that_autocast_casts_in_each_forward_is_warned_about(dtype, tmp_path, caplog):
    teacher = tiny_model(seed=2).to(dtype)
    trainer = make_trainer(tmp_path, teacher=teacher, bf16=True)
    assert ("The teacher's weights are float32" in caplog.text) is (dtype == torch.float32)
    student = trainer.model  # its own teacher shares what it trains
    assert casts_of_teacher(student, student, trainer.accelerator)[0] == Verdict.GOOD
    caplog.clear()
    make_trainer(tmp_path, teacher=teacher)  # without mixed precision
    assert "The teacher's weights are float32" not in caplog.text


@pytest.mark.parametrize("seconds_in_bf16", (0.5, 1.2, 2.0))
def test_mixed_precision_on_a_cpu_is_warned_about_where_products_in_it_are_slower(
    seconds_in_bf16, tmp_path, caplog, monkeypatch
):
    seconds = {torch.float32: 1.0, torch.bfloat16: seconds_in_bf16}
    monkeypatch.setattr(precision, "seconds_of_product", seconds.__getitem__)
    make_trainer(tmp_path, bf16=True)
    is_slow = seconds_in_bf16 == 2.0
    assert ("a product in bfloat16 takes 2.0 times as long" in caplog.text) is is_slow
    caplog.clear()
    make_trainer(tmp_path)  # in fp32
    assert "times as long" not in caplog.text


def test_the_trial_of_a_product_takes_milliseconds_once_in_each_type():
    precision.seconds_of_product.cache_clear()
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        first = precision.seconds_of_product(dtype)
        assert 0 < first < 5 and precision.seconds_of_product(dtype) == first


def test_one_layer_in_16_bits_is_warned_about_with_its_share(tmp_path, caplog):
    student = tiny_model(seed=1).requires_grad_(False)
    student.lm_head.to(torch.float16).requires_grad_(True)
    student.model.norm.requires_grad_(True)
    accelerator = make_trainer(tmp_path).accelerator
    verdict, warning = lost_updates(student, accelerator)
    share = student.lm_head.weight.numel() / (student.lm_head.weight.numel() + 32)
    assert verdict == Verdict.WARNING and warning.startswith(
        f"{share:.0%} of the weights that are trained are float16"
    )
