"""Models as people bring them: each trains, or is refused before training in words that say how to load it."""

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from test_skd_trainer import ROWS, make_trainer
from tiny import tiny_model

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
