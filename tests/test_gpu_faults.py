"""What failed or was wrong on GPUs, shown on a CPU: by structure, with stand-ins for kernels that only a GPU has, or by value."""

from contextlib import nullcontext

import pytest
import torch
from test_round import HostWaits
from test_skd_trainer import losses, make_trainer
from tiny import tiny_model
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from skd_trl.sampling import draft_length
from skd_trl.sampling.draft_length import AutoDraftLength, Round, expected_tokens
from skd_trl.sampling.ragged_cache import RaggedDecoder
from skd_trl.sampling.rows import Rows


# torch_compile: on a GPU the loss, traced with the model, ended in an IndexError


@pytest.mark.parametrize("rollout", ["interleaved", "dataset"])
def test_torch_compile_is_shown_the_backbone_alone_and_once_for_all_shapes(tmp_path, rollout):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    losses = {}
    for backend in (None, "eager"):
        trainer = make_trainer(
            tmp_path, rollout=rollout, max_steps=4, learning_rate=1e-2, torch_compile=backend is not None,
            torch_compile_backend=backend,
        )  # fmt: skip
        trainer.train()
        losses[backend] = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert losses["eager"] == pytest.approx(losses[None], abs=1e-5)
    # One graph for the first shape and one for all others, where the traced loss made 137 of them in four steps.
    counters = torch._dynamo.utils.counters
    assert counters["frames"]["total"] == counters["stats"]["unique_graphs"] == 2
    torch._dynamo.reset()


# Choosing a draft length took 2.4 ms a round at 256 rows


def test_choosing_a_draft_length_asks_once_for_all_rows_that_need_more_than_the_longest(monkeypatch):
    policy, asked = AutoDraftLength(), []
    for i in range(64):
        policy.observe(Round(256 - i, 3, 0.03, 0.02 + 1e-4 * i, 100, 80))
    remaining = [7 + i % 300 for i in range(256)]
    plain = min(range(1, 17), key=lambda length: policy.cost(length, remaining))
    monkeypatch.setattr(draft_length, "expected_tokens", lambda *pair: asked.append(pair) or expected_tokens(*pair))
    assert policy.choose(remaining) == plain
    assert len(asked) <= 16 * 16  # lengths times kinds of rows, where there were 16 times 256


# A window waited for the device about 15 times besides its rounds


def test_a_window_waits_once_a_round_once_for_each_models_prompts_and_once_for_its_batches(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, gradient_accumulation_steps=4, per_device_train_batch_size=2)
    batches = list(trainer.get_train_dataloader())[:4]
    rounds, read = [], Rows.read
    monkeypatch.setattr(Rows, "read", lambda rows, *arguments: (rounds.append(1), read(rows, *arguments)))
    for is_counted in (False, True):  # the models are proved in the first
        waits = HostWaits(monkeypatch)
        rounds.clear()
        with waits if is_counted else nullcontext():
            assert len(trainer._sample(batches, "interleaved")) == 4
    assert len(rounds) > 3 and len(waits.seen) <= len(rounds) + 3, waits.seen


# A prefill of one prompt of 16k tokens made a tensor of 2.1 GB in int64


class LargestIntegers(TorchDispatchMode):
    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor) and tensor.dtype == torch.int64:
                self.numel = max(self.numel, tensor.numel())
        return output


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "mistral"])
def test_a_prefill_makes_no_tensor_of_integers_for_each_pair_of_tokens(architecture):
    decoder, length = RaggedDecoder(tiny_model(architecture), 1, 96), 96
    tokens = torch.randint(3, 250, (1, length))
    with torch.no_grad(), LargestIntegers() as largest:
        decoder(tokens, torch.arange(length)[None], without_logits=True)
    assert 0 < largest.numel < 8 * length


# FP8, GPTQ and AWQ teachers, and flash attention: heads were verified before placement, in fp32, with the training attention


class Kernel(nn.Linear):
    """A stand-in for a quantised layer: its kernel runs on a GPU alone (here: once the model was moved), in 16 bits alone."""

    is_placed = False

    @classmethod
    def put_into(cls, model):
        for name, layer in list(model.named_modules()):
            if type(layer) is nn.Linear and "lm_head" not in name:
                layer.__class__ = cls
                layer.weight.requires_grad_(False)
        return model

    def _apply(self, *args, **kwargs):
        self.is_placed = True
        return super()._apply(*args, **kwargs)

    def forward(self, x):
        if not self.is_placed:
            raise RuntimeError("no kernel image is available for the CPU")
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
        if dtype == torch.float32:
            raise ValueError("fp8 kernels take bfloat16, and this is float32")
        return functional.linear(x.to(dtype), self.weight.to(dtype))


@pytest.fixture
def flash(monkeypatch):
    """A stand-in for flash attention: 16 bits, a GPU, no mask of four dimensions."""

    def attention(module, query, key, value, attention_mask, **settings):
        if torch.is_autocast_enabled("cpu"):  # as transformers does around it
            query, key, value = (states.to(torch.get_autocast_dtype("cpu")) for states in (query, key, value))
        if query.dtype == torch.float32:
            raise RuntimeError("FlashAttention only support fp16 and bf16 data type")
        if not module.is_placed:
            raise RuntimeError("FlashAttention only supports CUDA")
        if attention_mask is not None and attention_mask.ndim == 4:
            raise ValueError("FlashAttention does not support a 4D mask")
        if attention_mask is not None:
            attention_mask = (
                attention_mask[:, None, None].bool() & torch.ones(query.shape[2], key.shape[2]).bool().tril()
            )
        called.append(module)
        return sdpa_attention_forward(module, query, key, value, attention_mask, **settings)

    called = []
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "flash_attention_2", attention)

    def put_into(model):
        model.set_attn_implementation = None  # which would look for the real one
        for module in model.modules():
            if hasattr(module, "config"):
                module.config._attn_implementation = "flash_attention_2"
            if type(module).__name__.endswith("Attention"):
                kind = type(module)
                module.__class__ = type(kind.__name__, (_Placed, kind), {})
        return model

    yield put_into, called


class _Placed:
    is_placed = False

    def _apply(self, *args, **kwargs):
        self.is_placed = True
        return super()._apply(*args, **kwargs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_quantised_teacher_is_verified_where_its_kernels_run(tmp_path, dtype):
    teacher = Kernel.put_into(tiny_model(seed=2).to(dtype))
    for layer in teacher.modules():
        layer.__dict__.pop("is_placed", None)
    trainer = make_trainer(tmp_path, teacher=teacher, bf16=True)
    assert teacher.model.layers[0].mlp.up_proj.is_placed
    trainer.train()
    plain = make_trainer(tmp_path, teacher=tiny_model(seed=2).to(dtype), bf16=True)
    plain.train()
    assert losses(trainer) == pytest.approx(losses(plain), rel=0.1)


def test_a_quantised_teacher_is_still_refused_where_its_logits_are_not_those_of_its_head(tmp_path):
    teacher = Kernel.put_into(tiny_model(seed=2).to(torch.bfloat16))
    for layer in teacher.modules():
        layer.__dict__.pop("is_placed", None)
    teacher.lm_head.register_forward_hook(lambda module, args, output: output * 1.5)
    with pytest.raises(ValueError, match="teacher, LlamaForCausalLM, does not compute its logits as a linear map"):
        make_trainer(tmp_path, teacher=teacher, bf16=True)


def test_a_teacher_whose_kernels_do_not_run_on_its_device_either_is_refused_with_what_they_say(tmp_path):
    teacher = Kernel.put_into(tiny_model(seed=2))
    with pytest.raises(ValueError, match="does not run on the sampler's cache .*fp8 kernels take bfloat16"):
        make_trainer(tmp_path, teacher=teacher, bf16=False)


def test_flash_attention_trains_and_neither_checks_nor_samples(tmp_path, flash):
    put_into, called = flash
    student, teacher = put_into(tiny_model(seed=1)), put_into(tiny_model(seed=2))
    trainer = make_trainer(tmp_path, model=student, teacher=teacher, bf16=True)
    assert not called
    trainer.train()
    assert {id(module) for module in called} == {id(layer.self_attn) for layer in student.model.layers}
    plain = make_trainer(tmp_path, bf16=True)
    plain.train()
    assert losses(trainer) == pytest.approx(losses(plain), rel=0.1)
