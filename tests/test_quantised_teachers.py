"""Teachers of experts, and of quantised weights as far as a CPU runs them: what the sampling keeps of them is what they say without a cache.

bitsandbytes and torchao are not among the packages that the suite needs; where they are missing, their rows are skipped.
"""

import importlib.util

import pytest
import torch
from test_mixed_batches import spy_on_trained_batches
from test_skd_trainer import ROWS, losses, make_trainer
from tiny import byte_tokenizer, tiny_model

from skd_trl.data.batches import Key, ResponseTokens


EXPERTS = {
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 8},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8},
}


def bitsandbytes_4bit():
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)


def bitsandbytes_8bit():
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_8bit=True)


def torchao_int8():
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


# How to load, and the largest relative difference between hidden states with the sampler's cache and without one.
QUANTISERS = {
    "bitsandbytes 4-bit": ("bitsandbytes", bitsandbytes_4bit, 1e-4),
    "bitsandbytes 8-bit": ("bitsandbytes", bitsandbytes_8bit, 1e-2),
    "torchao int8": ("torchao", torchao_int8, 1e-4),
}


def check(trainer, limit):
    """One step of training; the teacher's hidden states that it kept against those of a forward on the whole texts."""
    seen = spy_on_trained_batches(trainer)
    trainer.train()
    assert 0 < losses(trainer)[0] < 20
    (batch,) = seen
    tokens = ResponseTokens.of(batch)
    kept = trainer._teacher.signal(batch, tokens)
    batch = {name: values for name, values in batch.items() if name != Key.TEACHER_HIDDEN_STATES}
    with torch.no_grad():
        fresh = trainer._teacher.signal(batch, tokens)
    error = (kept.states - fresh.states).norm(dim=-1) / fresh.states.norm(dim=-1)
    print(f"largest relative difference {error.max():.1e}")
    assert error.max() < limit
    assert batch["replaced"].any() and not batch["replaced"].all()


@pytest.mark.parametrize("architecture", EXPERTS)
def test_a_teacher_of_experts_is_kept_as_it_is_without_a_cache(tmp_path, architecture):
    teacher = tiny_model(architecture, seed=2, **EXPERTS[architecture])
    check(make_trainer(tmp_path, ROWS, teacher=teacher), 1e-4)


@pytest.mark.parametrize("name", QUANTISERS)
def test_a_quantised_teacher_is_kept_as_it_is_without_a_cache(tmp_path, name):
    package, quantiser, limit = QUANTISERS[name]
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    tiny_model(seed=2, hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "teacher")
    byte_tokenizer().save_pretrained(tmp_path / "teacher")
    loading = {"quantization_config": quantiser()}
    trainer = make_trainer(
        tmp_path, ROWS, teacher=str(tmp_path / "teacher"), teacher_model_init_kwargs=loading, max_new_tokens=8
    )
    whole = tiny_model(seed=2, hidden_size=64, intermediate_size=128)
    ids = torch.tensor([[1, 2, 3, 4, 5]])
    with torch.no_grad():
        difference = (trainer._inner_teacher(ids).logits - whole(ids).logits).abs().max()
    assert difference > 1e-4  # it is quantised
    check(trainer, limit)
