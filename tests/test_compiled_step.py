"""Drafting through torch.compile writes the same texts, in one graph for all rounds and windows."""

import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_sampler import left_padded
from test_skd_trainer import losses, make_trainer
from tiny import tiny_model

from skd_trl import SKDConfig, compiled_step
from skd_trl.acceptance import ACCEPTANCE_RULES
from skd_trl.sampler import interleaved_sample


BEGINNING = list(range(100, 120))  # that all prompts share, long enough to be run once
PROMPTS = [[*BEGINNING, 5, 9, 200], [*BEGINNING, 7], [*BEGINNING, *range(1, 12)], [*BEGINNING, 30, 31, 32]]


def texts(student, teacher, prompts=PROMPTS, rule="top_k", **settings):
    arguments = {"k": 60} if rule == "top_k" else {}
    ids, mask = left_padded(prompts)
    return interleaved_sample(
        student, teacher, ids, mask, accept=ACCEPTANCE_RULES[rule](**arguments), max_new_tokens=16, pad_token_id=256,
        eos_token_ids=range(0, 259, 9), max_rows=2, uniforms=torch.rand((len(prompts), 16, 3), generator=torch.Generator().manual_seed(0)),
        **settings,
    ).labels  # fmt: skip


@pytest.fixture
def graphs(monkeypatch):
    """Compiles for nothing but tracing, and counts."""
    torch._dynamo.reset()
    traced = []

    def backend(graph, inputs):
        traced.append(graph)
        return graph.forward

    compiled = torch.compile(compiled_step._forward, dynamic=False, fullgraph=True, backend=backend)
    monkeypatch.setitem(compiled_step._COMPILED, False, compiled)
    yield traced
    torch._dynamo.reset()


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma3_text", "gemma2", "gpt2", "phi3"])
@pytest.mark.parametrize("rule", ["top_k", "mixture", "always"])
def test_compiled_drafts_write_the_texts_of_plain_ones(graphs, architecture, rule):
    student, teacher = tiny_model(architecture, seed=1), tiny_model(architecture, seed=2)
    plain = texts(student, teacher, rule=rule)
    assert not graphs
    assert torch.equal(texts(student, teacher, rule=rule, compile_student=True), plain)
    assert graphs


def test_an_adapter_is_compiled_with_its_model(graphs):
    student = get_peft_model(tiny_model(seed=1), LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    teacher = tiny_model(seed=2)
    plain = texts(student, teacher)
    assert torch.equal(texts(student, teacher, compile_student=True), plain)
    assert not torch.equal(texts(tiny_model(seed=1), teacher), plain)


def test_all_rounds_and_windows_run_the_same_graph_whatever_the_lengths(graphs):
    student, teacher = tiny_model(seed=1), tiny_model(seed=2)
    texts(student, teacher, compile_student=True)
    num_graphs = len(graphs)
    for prompts in (PROMPTS[:2], [prompt + [3] * 40 for prompt in PROMPTS], [[1], [2, 3], [4]], [[1], [2], [3]]):
        for num_draft_tokens in (1, 4, "auto"):
            texts(student, teacher, prompts, compile_student=True, num_draft_tokens=num_draft_tokens)
    with torch.no_grad():
        for parameter in student.parameters():  # an optimizer's step
            parameter.mul_(1.01)
    texts(student, teacher, compile_student=True)
    assert len(graphs) == num_graphs <= 2


def test_a_trainer_compiles_what_it_samples_with_and_not_what_it_trains(graphs, tmp_path):
    settings = {
        "max_steps": 3,
        "gradient_checkpointing": True,
        "peft_config": LoraConfig(r=4, target_modules=["q_proj"]),
    }
    plain, compiled = (
        make_trainer(tmp_path, compile_student=compile_student, **settings) for compile_student in (False, True)
    )
    for trainer in (plain, compiled):
        trainer.train()
    assert losses(compiled) == pytest.approx(losses(plain), rel=1e-5)
    assert 1 <= len(graphs) <= 2


@pytest.mark.timeout(300)
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on CPU")
def test_the_code_that_torch_compile_makes_writes_the_same_texts():
    torch._dynamo.reset()
    student, teacher = tiny_model(seed=1), tiny_model(seed=2)
    assert torch.equal(texts(student, teacher, compile_student=True), texts(student, teacher))
    torch._dynamo.reset()


def test_a_student_that_stays_sharded_cannot_be_compiled():
    with pytest.raises(ValueError, match="ds3_gather_for_generation"):
        SKDConfig("out", bf16=False, compile_student=True, ds3_gather_for_generation=False)


@pytest.mark.parametrize("num_slots, rounded", [(1, 128), (128, 128), (129, 256)])
def test_numbers_of_slots_are_rounded_up(num_slots, rounded):
    assert compiled_step.whole_slots(num_slots) == rounded
