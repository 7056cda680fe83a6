"""The student samples with a copy of its weights in the type that is computed in."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_skd_trainer import losses, make_trainer
from tiny import tiny_model

from skd_trl.training.sampling_copy import SamplingCopy


def test_the_copy_follows_the_students_weights_in_place_and_leaves_the_student_alone():
    student, copies = tiny_model(seed=1), SamplingCopy()
    ids, before = torch.tensor([[1, 2, 3]]), {name: x.clone() for name, x in student.state_dict().items()}
    model = copies.of(student, torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16} and {p.dtype for p in student.parameters()} == {
        torch.float32
    }
    assert all(x.dtype == torch.float32 for x in model.buffers())  # the angles of positions
    addresses = [p.data_ptr() for p in model.parameters()]
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.mul_(1.5)
        assert copies.of(student, torch.bfloat16) is model
        assert [p.data_ptr() for p in model.parameters()] == addresses
        cast = tiny_model(seed=1).to(torch.bfloat16)
        for own, weight in zip(cast.parameters(), student.parameters(), strict=True):
            own.copy_(weight)
        cast.model.rotary_emb = student.model.rotary_emb
        assert torch.equal(model(ids).logits, cast(ids).logits)
    assert all(torch.equal(x, before[name] * 1.5) for name, x in student.named_parameters())


def test_tied_weights_stay_tied_and_a_frozen_model_under_an_adapter_is_shared():
    tied = SamplingCopy().of(tiny_model(tie_word_embeddings=True), torch.bfloat16)
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    base = tiny_model(seed=1).to(torch.bfloat16)
    student = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    model = SamplingCopy().of(student, torch.bfloat16)
    for (name, own), weight in zip(model.named_parameters(), student.parameters(), strict=True):
        assert (own is weight) == ("lora" not in name), name
    with torch.no_grad():
        reference = student(torch.tensor([[1, 2, 3]])).logits
        assert torch.allclose(model(torch.tensor([[1, 2, 3]])).logits.float(), reference.float(), atol=0.3, rtol=0.05)


def test_a_forward_that_was_set_on_a_module_is_refused():
    student = tiny_model()
    student.model.layers[0].forward = student.model.layers[0].forward
    with pytest.raises(ValueError, match="sampling_copy=True cannot copy this LlamaForCausalLM"):
        SamplingCopy().of(student, torch.bfloat16)


def test_a_trainer_samples_with_the_copy_and_trains_the_student(tmp_path):
    settings = {"max_steps": 3, "bf16": True, "num_draft_tokens": 3}
    plain, trainer = make_trainer(tmp_path, **settings), make_trainer(tmp_path, sampling_copy=True, **settings)
    plain.train()
    before = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.train()
    assert plain._sampling_copy._student is None
    model = trainer._sampling_copy._model
    assert model is not trainer.model and not model.training
    # The copy is that of the last sampling, one step behind.
    assert any(not torch.equal(x, p) for x, p in zip(before, trainer.model.parameters(), strict=True))
    assert all(not p.requires_grad for p in model.parameters())
    assert losses(trainer)[0] == pytest.approx(losses(plain)[0], rel=0.2)
