from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import ARCHITECTURES, tiny_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from skd_trl.loss.lm_head import LMHead, backbone


def _hidden_and_logits(model):
    input_ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        return backbone(model)(input_ids).last_hidden_state[0], model(input_ids).logits[0]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_head_makes_the_models_own_logits(architecture):
    model = tiny_model(architecture)
    head = LMHead.of(model)
    hidden, logits = _hidden_and_logits(model)
    assert head.verify(model)
    torch.testing.assert_close(head.logits(hidden), logits, rtol=1e-5, atol=1e-5 * logits.abs().max().item())
    torch.testing.assert_close(head.logits(hidden, 100), head.logits(hidden)[:, :100], rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize(
    ("architecture", "overrides"),
    [("llama", {"tie_word_embeddings": True}), ("gpt2", {"tie_word_embeddings": True}), ("phi3", {})],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tied_and_half_precision_heads_are_verified_too(architecture, overrides, dtype):
    model = tiny_model(architecture, **overrides).to(dtype)
    head = LMHead.of(model)
    assert head.verify(model)
    assert head.logits(_hidden_and_logits(model)[0]).dtype == torch.float32


def test_a_bias_in_the_head_is_part_of_the_logits():
    model = tiny_model("llama")
    model.lm_head = nn.Linear(32, 259)
    assert LMHead.of(model).verify(model)
    assert not replace(LMHead.of(model), bias=None).verify(model)


@pytest.mark.parametrize(
    ("architecture", "forgotten"),
    [("gemma2", {"softcap": None}), ("granite", {"scale": 1.0}), ("cohere", {"scale": 0.5})],
)
def test_verify_notices_what_is_forgotten_between_hidden_states_and_logits(architecture, forgotten):
    model = tiny_model(architecture)
    assert not replace(LMHead.of(model), **forgotten).verify(model)


def test_verify_notices_a_model_that_changes_what_it_gives_its_head():
    model = tiny_model("llama")
    model.lm_head.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    assert not LMHead.of(model).verify(model)


def test_verify_leaves_no_hook_behind_and_the_mode_as_it_was():
    model = tiny_model("llama").train()
    LMHead.of(model).verify(model)
    assert model.training and not backbone(model)._forward_hooks and not model.lm_head._forward_pre_hooks


def test_a_saved_module_of_peft_is_the_trained_copy_until_adapters_are_off():
    model = get_peft_model(tiny_model("llama"), LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    wrapper = model.get_output_embeddings()
    with torch.no_grad():
        wrapper.modules_to_save["default"].weight.mul_(2)
    head = LMHead.of(model)
    assert head.weight is wrapper.modules_to_save["default"].weight and head.verify(model)
    assert len(head.trainable_parameters()) == 1
    with model.disable_adapter():
        head = LMHead.of(model)
        assert head.weight is wrapper.original_module.weight and head.verify(model)


def test_a_head_under_lora_is_called_as_a_module_and_only_the_adapter_learns():
    torch.manual_seed(0)
    config = LoraConfig(target_modules=["lm_head"], r=4, init_lora_weights=False)
    model = get_peft_model(tiny_model("llama"), config)
    head = LMHead.of(model)
    assert head.weight is None and head.verify(model)
    assert sorted(parameter.shape for parameter in head.trainable_parameters()) == [(4, 32), (259, 4)]


def test_a_frozen_head_has_nothing_to_train_but_still_has_tensors_to_gather():
    head = LMHead.of(get_peft_model(tiny_model("llama"), LoraConfig(target_modules=["q_proj"])))
    assert head.trainable_parameters() == [] and len(head.parameters()) == 1


def test_autocast_decides_the_type_of_the_product_but_not_of_the_logits():
    model = tiny_model("llama")
    head, hidden = LMHead.of(model), torch.randn(3, 32)
    with torch.autocast("cpu", torch.bfloat16):
        logits = head.logits(hidden)
    assert logits.dtype == torch.float32
    expected = (hidden.bfloat16() @ model.lm_head.weight.bfloat16().T).float()
    torch.testing.assert_close(logits, expected, rtol=0, atol=0)


def test_a_model_without_a_head_is_refused():
    with pytest.raises(ValueError, match="LlamaModel has no output embeddings"):
        LMHead.of(tiny_model("llama").model)


@pytest.mark.parametrize(
    "architecture, sizes",
    [
        (
            "recurrent_gemma",
            {"logits_soft_cap": 2.0, "lru_width": 32, "attention_window_size": 8, "num_hidden_layers": 3},
        ),
        ("xlstm", {"output_logit_soft_cap": 2.0, "num_heads": 2, "num_hidden_layers": 2, "qk_dim_factor": 0.5}),
    ],
)
def test_soft_caps_of_other_names_are_followed(architecture, sizes):
    config = AutoConfig.for_model(
        architecture,
        vocab_size=259,
        hidden_size=32,
        intermediate_size=64,
        num_attention_heads=4,
        num_key_value_heads=1,
        **sizes,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    model.get_output_embeddings().weight.data.normal_()
    head = LMHead.of(model)
    assert head.softcap == 2.0 and head.verify(model)
    assert not replace(head, softcap=None).verify(model)
