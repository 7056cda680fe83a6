"""Drafting through torch.compile writes the same texts, in one graph for all rounds and windows."""

import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_sampler import sample
from test_skd_trainer import losses, make_trainer
from tiny import tiny_model
from torch._dynamo.utils import counters

from skd_trl.sampling import compiled_step
from skd_trl.sampling.acceptance import ACCEPTANCE_RULES
from skd_trl.sampling.compiled_step import CompiledStudent


BEGINNING = list(range(100, 120))  # that all prompts share, long enough to be run once
PROMPTS = [[*BEGINNING, 5, 9, 200], [*BEGINNING, 7], [*BEGINNING, *range(1, 12)], [*BEGINNING, 30, 31, 32]]


def texts(student, teacher, prompts=PROMPTS, rule="top_k", **settings):
    arguments = {"k": 60} if rule == "top_k" else {}
    uniforms = torch.rand((len(prompts), 16, 3), generator=torch.Generator().manual_seed(0))
    return sample(
        student, teacher, prompts, ACCEPTANCE_RULES[rule](**arguments), max_new_tokens=16,
        eos_token_ids=range(0, 259, 9), noise=uniforms, **{"max_rows": 2, "num_draft_tokens": 5, **settings},
    ).labels  # fmt: skip


@pytest.fixture
def graphs(monkeypatch):
    """The graphs that are traced; they run as they are, so that compiling costs no minute."""
    torch._dynamo.reset()
    traced = []

    def backend(graph, inputs):
        traced.append(graph)
        return graph.forward

    compiled = torch.compile(compiled_step._forward, dynamic=False, fullgraph=True, backend=backend)
    monkeypatch.setattr(compiled_step, "_compiled", lambda mode: compiled)
    yield traced
    torch._dynamo.reset()


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma3_text", "gemma2", "gemma4_text", "gpt2", "phi3"])
@pytest.mark.parametrize("rule", ["top_k", "mixture", "always"])
def test_compiled_drafts_write_the_texts_of_plain_ones(graphs, architecture, rule):
    student, teacher = tiny_model(architecture, seed=1), tiny_model(architecture, seed=2)
    plain = texts(student, teacher, rule=rule)
    assert not graphs
    assert torch.equal(texts(student, teacher, rule=rule, compiled=CompiledStudent()), plain)
    assert graphs


def test_an_adapter_is_compiled_with_its_model(graphs):
    student = get_peft_model(tiny_model(seed=1), LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    teacher = tiny_model(seed=2)
    plain = texts(student, teacher)
    assert torch.equal(texts(student, teacher, compiled=CompiledStudent()), plain)
    assert graphs and not torch.equal(texts(tiny_model(seed=1), teacher), plain)


def test_slots_beyond_a_models_positions_are_never_used(graphs):
    student, teacher = (tiny_model("gpt2", seed=seed, max_position_embeddings=50) for seed in (1, 2))
    plain = texts(student, teacher)
    kept = CompiledStudent()
    assert torch.equal(texts(student, teacher, compiled=kept), plain)
    assert graphs and kept._decoder.num_slots > 50


def test_rounds_and_windows_run_the_same_graph_until_one_needs_more_room(graphs):
    student, teacher, kept = tiny_model(seed=1), tiny_model(seed=2), CompiledStudent()

    def compiled_is_plain(prompts, **settings):
        plain = texts(student, teacher, prompts, **settings)
        assert torch.equal(texts(student, teacher, prompts, compiled=kept, **settings), plain)
        return len(graphs)

    first = compiled_is_plain(PROMPTS, max_rows=3)
    assert 1 <= first <= 2  # the second with a cache that has been run on
    for prompts in (PROMPTS[:2], [prompt + [3] * 40 for prompt in PROMPTS], [[1], [2, 3], [4]], [[1], [2], [3]]):
        for num_draft_tokens in (1, 4, "auto"):
            assert compiled_is_plain(prompts, num_draft_tokens=num_draft_tokens) == first
    with torch.no_grad():
        for parameter in student.parameters():  # an optimizer's step
            parameter.mul_(1.01)
    assert compiled_is_plain(PROMPTS, max_rows=1) == first
    buffers = kept._decoder.layers[0].keys.data_ptr()
    grown = compiled_is_plain([prompt + [3] * 120 for prompt in PROMPTS])
    assert grown > first and kept._decoder.layers[0].keys.data_ptr() != buffers
    assert (kept._decoder.num_rows, kept._decoder.num_slots) == (3, 256)
    assert compiled_is_plain(PROMPTS, max_rows=3) == grown


@pytest.mark.parametrize("bf16", [False, True])
def test_a_trainer_compiles_once_and_trains_as_without(graphs, tmp_path, bf16):
    settings = {
        "max_steps": 3, "gradient_checkpointing": True, "bf16": bf16,
        "peft_config": LoraConfig(r=4, target_modules=["q_proj"]),
    }  # fmt: skip
    plain, compiled = (
        make_trainer(tmp_path, compile_student=compile_student, **settings) for compile_student in (False, True)
    )
    for trainer in (plain, compiled):
        trainer.train()
    if bf16:  # texts may part where two logits are one bit apart
        assert losses(compiled)[0] == pytest.approx(losses(plain)[0], rel=0.2)
    else:
        assert losses(compiled) == pytest.approx(losses(plain), rel=1e-5)
    assert 1 <= len(graphs) <= 2


@pytest.mark.slow
def test_torch_compile_takes_the_training_step_and_leaves_sampling_alone(tmp_path):
    torch._dynamo.reset()
    num_graphs = counters["stats"]

    def count(during):
        before = num_graphs["unique_graphs"]
        outcome = during()
        made.append(num_graphs["unique_graphs"] - before)
        return outcome

    plain, compiled = (
        make_trainer(tmp_path, max_steps=2, torch_compile=compile, torch_compile_backend="eager" if compile else None)
        for compile in (False, True)
    )
    original, made = compiled._sample, []
    compiled._sample = lambda *arguments: count(lambda: original(*arguments))
    plain.train()
    before = num_graphs["unique_graphs"]
    compiled.train()
    assert losses(compiled) == pytest.approx(losses(plain), rel=1e-5)
    assert made == [0, 0] and num_graphs["unique_graphs"] > before
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on CPU")
def test_the_code_that_torch_compile_makes_writes_the_same_texts():
    torch._dynamo.reset()
    student, teacher = tiny_model(seed=1), tiny_model(seed=2)
    assert torch.equal(texts(student, teacher, compiled=CompiledStudent()), texts(student, teacher))
    torch._dynamo.reset()
