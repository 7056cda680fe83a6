"""The student samples with a copy of its weights in the type that is computed in."""

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from tape import Recorder
from test_skd_trainer import losses, make_trainer
from tiny import tiny_model
from transformers.utils import logging

from skd_trl import SKDConfig
from skd_trl.training.machine import Machine
from skd_trl.training.memory_count import Window
from skd_trl.training.memory_plan import plan_memory
from skd_trl.training.sampling_copy import CopySettings, SamplingCopy, copied_bytes


BF16, MERGED = CopySettings(torch.bfloat16), CopySettings(merges_adapter=True)


def test_the_copy_follows_the_students_weights_in_place_and_leaves_the_student_alone():
    student, copies = tiny_model(seed=1), SamplingCopy()
    ids, before = torch.tensor([[1, 2, 3]]), {name: x.clone() for name, x in student.state_dict().items()}
    model = copies.of(student, BF16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16} and {p.dtype for p in student.parameters()} == {
        torch.float32
    }
    assert all(x.dtype == torch.float32 for x in model.buffers())  # the angles of positions
    addresses = [p.data_ptr() for p in model.parameters()]
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.mul_(1.5)
        assert copies.of(student, BF16) is model
        assert [p.data_ptr() for p in model.parameters()] == addresses
        cast = tiny_model(seed=1).to(torch.bfloat16)
        for own, weight in zip(cast.parameters(), student.parameters(), strict=True):
            own.copy_(weight)
        cast.model.rotary_emb = student.model.rotary_emb
        assert torch.equal(model(ids).logits, cast(ids).logits)
    assert all(torch.equal(x, before[name] * 1.5) for name, x in student.named_parameters())


def test_tied_weights_stay_tied_and_a_frozen_model_under_an_adapter_is_shared():
    tied = SamplingCopy().of(tiny_model(tie_word_embeddings=True), BF16)
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    base = tiny_model(seed=1).to(torch.bfloat16)
    student = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    model = SamplingCopy().of(student, BF16)
    for (name, own), weight in zip(model.named_parameters(), student.parameters(), strict=True):
        assert (own is weight) == ("lora" not in name), name
    with torch.no_grad():
        reference = student(torch.tensor([[1, 2, 3]])).logits
        assert torch.allclose(model(torch.tensor([[1, 2, 3]])).logits.float(), reference.float(), atol=0.3, rtol=0.05)


def test_a_forward_that_was_set_on_a_module_is_refused():
    student = tiny_model()
    student.model.layers[0].forward = student.model.layers[0].forward
    with pytest.raises(ValueError, match="sampling_copy=True cannot copy this LlamaForCausalLM"):
        SamplingCopy().of(student, BF16)


@pytest.mark.parametrize(
    "dtype, settings, words",
    [
        (torch.float32, {}, "mixed precision is 'no'"),
        (torch.bfloat16, {"bf16": True}, "the student has no fp32 weights to cast"),
    ],
    ids=["fp32", "bf16 weights"],
)
def test_a_copy_that_would_hold_the_same_is_refused_by_name(tmp_path, dtype, settings, words):
    with pytest.raises(ValueError, match=f"sampling_copy=True would have no effect: {words}"):
        make_trainer(tmp_path, model=tiny_model(seed=1).to(dtype), sampling_copy=True, **settings)


def test_a_trainer_samples_with_the_copy_and_trains_the_student(tmp_path):
    settings = {"max_steps": 3, "bf16": True, "num_draft_tokens": 3}
    plain, trainer = make_trainer(tmp_path, sampling_copy=False, **settings), make_trainer(tmp_path, **settings)
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


def test_the_copy_of_a_student_whose_adapter_is_tied_as_its_embeddings_are_follows_it():
    student = tiny_model("llama", seed=1, tie_word_embeddings=True)
    adapter = LoraConfig(
        r=4, target_modules=["q_proj", "embed_tokens"], ensure_weight_tying=True, init_lora_weights=False
    )
    student, copies = get_peft_model(student, adapter).eval(), SamplingCopy()
    for _ in range(2):
        found = logits(copies.of(student, BF16)).float()
        assert (found - logits(student)).abs().max() < 0.05 * logits(student).abs().max()
        with torch.no_grad():
            for parameter in student.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))


# An adapter merged


def adapted(architecture="llama", second=None, **settings):
    targets = ["c_attn", "wte"] if architecture == "gpt2" else ["q_proj", "down_proj", "embed_tokens"]
    settings = {"r": 4, "target_modules": targets, "init_lora_weights": False, **settings}
    student = get_peft_model(tiny_model(architecture, seed=1, tie_word_embeddings=True), LoraConfig(**settings)).eval()
    if second is not None:
        student.add_adapter("second", LoraConfig(r=2, target_modules=targets[:1], init_lora_weights=False, **second))
        student.base_model.set_adapter(["default", "second"])
    return student


def logits(model):
    with torch.no_grad():
        return model(torch.tensor([[1, 2, 3, 250]])).logits


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"architecture": "gpt2"},
        {"use_dora": True},
        {"use_rslora": True, "lora_alpha": 3},
        {"lora_bias": True, "target_modules": ["c_attn"], "architecture": "gpt2"},
        {"second": {}},
    ],
)
def test_a_merged_copy_has_the_adapters_logits_and_follows_the_optimizer_in_place(settings):
    student, copies = adapted(**settings), SamplingCopy()
    before = {name: x.clone() for name, x in student.state_dict().items()}
    model = copies.of(student, MERGED)
    assert not any(hasattr(module, "lora_A") for module in model.modules())
    addresses = [p.data_ptr() for p in model.parameters()]
    for _ in range(2):
        expected = logits(student)
        assert (logits(model) - expected).abs().max() < 1e-5 * expected.abs().max()
        assert all(torch.equal(x, before[name]) for name, x in student.state_dict().items())
        optimizer = torch.optim.SGD([p for p in student.parameters() if p.requires_grad], lr=0.1)
        student(torch.tensor([[1, 2, 3]])).logits.logsumexp(-1).sum().backward()
        optimizer.step()
        assert (logits(student) - expected).abs().max() > 0.01
        before = {name: x.clone() for name, x in student.state_dict().items()}
        assert copies.of(student, MERGED) is model and [p.data_ptr() for p in model.parameters()] == addresses


def test_an_adapter_that_is_off_is_not_merged():
    student, copies = adapted(), SamplingCopy()
    with student.disable_adapter():
        model, expected = copies.of(student, MERGED), logits(student)
        assert torch.equal(logits(model), expected)
    copies.of(student, MERGED)
    assert (logits(model) - expected).abs().max() > 0.01


def test_only_the_weights_that_are_merged_take_memory():
    student = adapted(target_modules=["q_proj"])
    model, own = SamplingCopy().of(student, MERGED), {p.data_ptr() for p in student.parameters()}
    copied = [(name, p) for name, p in model.named_parameters() if p.data_ptr() not in own]
    assert len(copied) == 2 and all("q_proj" in name for name, _ in copied)
    assert sum(p.nbytes for _, p in copied) == copied_bytes(student, MERGED) > 0
    for settings in (BF16, CopySettings(torch.bfloat16, True)):
        model = SamplingCopy().of(student, settings)
        assert sum(p.nbytes for p in model.parameters() if p.data_ptr() not in own) == copied_bytes(student, settings)
        expected = logits(student)
        assert (logits(model) - expected).abs().max() < 0.1 * expected.abs().max()


def test_layers_that_peft_merges_otherwise_than_it_runs_stay_by_name(caplog):
    student = adapted(second={"use_dora": True})
    logging.enable_propagation()
    with caplog.at_level("WARNING"):
        Accelerator()  # the log of accelerate's needs one
        model = SamplingCopy().of(student, MERGED)
    logging.disable_propagation()
    said = [record.message for record in caplog.records if "unmerged" in record.message]
    assert len(said) == 1 and "2 of the adapter's layers" in said[0]
    assert "q_proj (several adapters with DoRA among them)" in said[0]
    assert (logits(model) - logits(student)).abs().max() < 1e-5 * logits(student).abs().max()
    assert {name.split(".")[-1] for name, m in model.named_modules() if hasattr(m, "lora_A")} == {"q_proj"}


def test_a_token_takes_no_operator_of_the_adapter():
    def num_operators(model):
        with Recorder() as recorder, torch.no_grad():
            model(torch.tensor([[1]]))
        return len(recorder.calls)

    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    student = adapted(target_modules=targets)
    plain = num_operators(tiny_model(seed=1))
    assert num_operators(SamplingCopy().of(student, MERGED)) == plain < 0.75 * num_operators(student)


def test_a_trainer_samples_with_the_merged_copy_and_saves_nothing_of_it(tmp_path):
    settings = {"max_steps": 3, "num_draft_tokens": 3, "learning_rate": 1e-2, "gradient_checkpointing": True}
    settings["peft_config"] = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    plain = make_trainer(tmp_path, merge_adapter=False, **settings)
    trainer = make_trainer(tmp_path, merge_adapter=True, **settings)
    for name, one in (("plain", plain), ("merged", trainer)):
        one.train()
        one.save_model(str(tmp_path / name))
    assert plain._sampling_copy._student is None and trainer._sampling_copy._student is not None
    assert losses(trainer) == pytest.approx(losses(plain), rel=1e-4)
    files = [
        sorted(p.name for p in path.iterdir() if p.is_file()) for path in (tmp_path / "plain", tmp_path / "merged")
    ]
    assert files[0] == files[1] and "adapter_model.safetensors" in files[0]
    assert trainer.model.state_dict().keys() == plain.model.state_dict().keys()


def test_by_default_an_adapter_is_merged_on_a_gpu_alone_and_planned_for():
    args, student, window = SKDConfig("out", report_to=[], bf16=False, use_cpu=True), adapted(), Window(2, 2, 8, 8, 2)
    machine = Machine(torch.device("cpu"), 0)
    assert not CopySettings.of(student, args, "no", is_gpu=False).is_needed
    plans = []
    for args.merge_adapter in (False, True):
        plans.append(plan_memory(student, tiny_model(seed=2), machine, args, window, False).held)
    assert plans[1].pop("student's copy for sampling") == copied_bytes(student, MERGED)
    assert plans[0] == plans[1]
    args.merge_adapter = None
    assert CopySettings.of(student, args, "bf16", is_gpu=True) == CopySettings(torch.bfloat16, True)
    for is_gpu in (True, False):
        assert CopySettings.of(tiny_model(), args, "bf16", is_gpu) == BF16


@pytest.mark.parametrize("is_adapted", [False, True])
def test_merging_where_there_is_nothing_to_merge_is_refused_with_the_reason(tmp_path, is_adapted):
    settings = {}
    if is_adapted:
        from peft import IA3Config

        settings["peft_config"] = IA3Config(target_modules=["q_proj"], feedforward_modules=[])
    with pytest.raises(
        ValueError, match="no adapter layer to merge" + (r" \(q_proj is a ia3.Linear" if is_adapted else "")
    ):
        make_trainer(tmp_path, merge_adapter=True, **settings)
