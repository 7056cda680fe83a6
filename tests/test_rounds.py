"""Captured and compiled rounds write the texts of plain ones, on memory that lives from window to window.

`tape.Tape` stands for a CUDA graph: it plays the operators of the capture on its memory, and Python is not run again.
"""

import shutil
from contextlib import nullcontext
from dataclasses import dataclass

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tape import Tape
from test_sampler import sample
from test_skd_trainer import losses, make_trainer
from tiny import tiny_model
from torch._dynamo.utils import counters
from transformers.utils import logging

from skd_trl.sampling import interleaved, nucleus, ragged_cache
from skd_trl.sampling import rounds as rounds_module
from skd_trl.sampling.acceptance import ACCEPTANCE_RULES, AcceptanceRule, TopK
from skd_trl.sampling.rounds import Rounds
from skd_trl.sampling.sampling_params import SamplingParams, on_device


BEGINNING = list(range(100, 120))  # that all prompts share, long enough to be run once
PROMPTS = [[*BEGINNING, 5, 9, 200], [*BEGINNING, 7], [*BEGINNING, *range(1, 12)], [*BEGINNING, 30, 31, 32]]


def texts(student, teacher, prompts=PROMPTS, rule="top_k", **settings):
    arguments = {"k": 60} if rule == "top_k" else {}
    uniforms = torch.rand((len(prompts), 16, 3), generator=torch.Generator().manual_seed(0))
    return sample(
        student, teacher, prompts, ACCEPTANCE_RULES[rule](**arguments), max_new_tokens=16,
        eos_token_ids=range(0, 259, 9), noise=uniforms, **{"max_rows": 2, "num_draft_tokens": 4, **settings},
    )  # fmt: skip


def captured():
    return Rounds(capture=True, make_graph=Tape)


def check_same(one, other):
    for name in ("input_ids", "labels", "replaced", "proposals", "teacher_rank"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name
    assert one.teacher_signal.keys() == other.teacher_signal.keys()
    for name, values in one.teacher_signal.items():
        assert torch.allclose(values, other.teacher_signal[name], atol=1e-4), name


@pytest.mark.parametrize("architecture", ["llama", "gemma4_text", "gpt2"])
@pytest.mark.parametrize("rule", ["top_k", "mixture", "always", "never"])
def test_captured_rounds_write_the_texts_of_plain_ones(architecture, rule):
    student, teacher = tiny_model(architecture, seed=1), tiny_model(architecture, seed=2)
    plain, rounds, before = texts(student, teacher, rule=rule), captured(), Tape.num_replays
    check_same(texts(student, teacher, rule=rule, rounds=rounds), plain)
    assert rounds.graphs and Tape.num_replays > before + 1 and rounds.reason is None


def test_graphs_live_from_window_to_window_until_one_needs_more_room():
    student, teacher, rounds = tiny_model(seed=1), tiny_model(seed=2), captured()

    def captured_is_plain(prompts, **settings):
        plain, before = texts(student, teacher, prompts, **settings), Tape.num_captures
        check_same(texts(student, teacher, prompts, rounds=rounds, **settings), plain)
        return Tape.num_captures - before

    assert captured_is_plain(PROMPTS, max_rows=3) > 0
    keys = rounds.decoders["student"].layers[0].keys.data_ptr()
    captured_is_plain(PROMPTS, max_rows=3)  # every shape is warm now
    assert captured_is_plain(PROMPTS, max_rows=3) == 0
    with torch.no_grad():
        for parameter in student.parameters():  # an optimizer's step
            parameter.mul_(1.05)
    for prompts in (PROMPTS, [[3, 4, *prompt[5:]] for prompt in PROMPTS]):  # whose rows may end otherwise
        assert captured_is_plain(prompts, max_rows=3) <= 1
    assert rounds.decoders["student"].layers[0].keys.data_ptr() == keys
    for parameter in student.parameters():
        parameter.data = parameter.data * 0.9  # moved
    assert captured_is_plain(PROMPTS, max_rows=3) > 0
    assert captured_is_plain([prompt + [3] * 120 for prompt in PROMPTS], max_rows=3) > 0
    assert rounds.decoders["student"].layers[0].keys.data_ptr() != keys
    assert (rounds.decoders["student"].num_rows, rounds.decoders["student"].num_slots) == (3, 256)
    assert captured_is_plain(PROMPTS * 3, max_rows=7) > 0
    for num_draft_tokens in (1, "auto"):
        captured_is_plain(PROMPTS, num_draft_tokens=num_draft_tokens)
    captured_is_plain(PROMPTS, student_sampling=SamplingParams(0.5, 0.9))


def test_a_tape_finds_a_number_of_pythons_that_a_round_would_need_to_change():
    """What the tests above rest on: a graph repeats the numbers of its capture."""
    counter, total, tape = iter(range(1, 9)), torch.zeros(1), Tape()
    tape.capture(lambda: total.add_(next(counter)))
    assert total.item() == 0
    tape.replay()
    tape.replay()
    assert total.item() == 2 and next(counter) == 2


class Asks(TopK):
    def __call__(self, draft):
        accepted = super().__call__(draft)
        return accepted if bool(accepted.any()) else accepted.clone()


def test_what_cannot_be_captured_runs_as_it_is_and_is_said_once(caplog):
    student, teacher, rounds = tiny_model(seed=1), tiny_model(seed=2), captured()
    uniforms = torch.rand((2, 16, 3), generator=torch.Generator().manual_seed(0))
    settings = {"prompts": PROMPTS[:2], "noise": uniforms, "max_new_tokens": 16}
    logging.enable_propagation()
    for _ in range(2):
        check_same(
            sample(student, teacher, rule=Asks(60), rounds=rounds, **settings),
            sample(student, teacher, rule=TopK(60), **settings),
        )
    logging.disable_propagation()
    said = [record.message for record in caplog.records if "not captured" in record.message]
    assert len(said) == 1 and "stream is capturing (_local_scalar_dense)" in said[0]
    assert not rounds.graphs


LORA = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
CHANGES = {
    "disable_adapter": lambda model: model.disable_adapter(),
    "set_adapter": lambda model: model.set_adapter("two"),
    "merge_adapter": lambda model: model.merge_adapter(),
    "a forward hook": lambda model: model.get_input_embeddings().register_forward_hook(lambda m, i, out: 2 * out),
}


@pytest.mark.parametrize("whose", ["student", "teacher"])
@pytest.mark.parametrize("change", CHANGES)
def test_rounds_are_captured_again_where_an_adapter_or_a_hook_changes_a_model_and_only_there(change, whose):
    models, rounds = {"student": tiny_model(seed=1), "teacher": tiny_model(seed=2)}, captured()
    torch.manual_seed(0)
    models[whose] = model = get_peft_model(models[whose], LORA)
    model.add_adapter("two", LORA)

    def captured_is_fresh():
        before = Tape.num_captures
        check_same(texts(**models, rounds=rounds), texts(**models))
        return Tape.num_captures - before

    assert captured_is_fresh() > 0
    with CHANGES[change](model) or nullcontext():
        assert [captured_is_fresh() > 0 for _ in range(3)] == [True, False, False]
    captured_is_fresh()


MODES = {
    "autocast": [(torch.float32, lambda: torch.autocast("cpu", torch.bfloat16)), (torch.float32, nullcontext)],
    "other types": [(dtype, nullcontext) for dtype in (torch.float32, torch.bfloat16, torch.float32)],
    "inference mode": [(torch.float32, torch.inference_mode), (torch.float32, nullcontext)],
}


@pytest.mark.parametrize("modes", MODES)
def test_kept_rounds_work_after_a_call_in_another_precision_or_in_inference_mode(modes):
    models, rounds = (tiny_model(seed=1), tiny_model(seed=2)), captured()
    for dtype, mode in MODES[modes]:
        for model in models:
            model.to(dtype)
        with mode():
            fresh = texts(*models, rounds=captured())  # in half precision texts depend on the shapes
            for _ in range(2):
                check_same(texts(*models, rounds=rounds), fresh)
    assert rounds.graphs and rounds.reason is None


def test_capturing_on_a_cpu_is_refused():
    with pytest.raises(ValueError, match="capture=True needs models on CUDA"):
        texts(tiny_model(seed=1), tiny_model(seed=2), rounds=Rounds(capture=True))


def test_nothing_is_kept_where_nothing_is_captured():
    rounds = Rounds()
    texts(tiny_model(seed=1), tiny_model(seed=2), rounds=rounds)
    assert not rounds.buffers and not rounds.decoders


def test_one_model_as_student_and_teacher_has_two_caches():
    model, rounds = tiny_model(seed=1), captured()
    check_same(texts(model, model, rounds=rounds), texts(model, model))


@pytest.mark.parametrize("with_graphs", [False, True])
def test_a_row_whose_nucleus_does_not_fit_is_written_again_and_has_the_text_of_a_sort(monkeypatch, with_graphs):
    """Flat distributions over 2,000 ids, 8 candidates: most draws miss at first."""
    student, teacher = (tiny_model(seed=seed, vocab_size=2000, initializer_range=0.15) for seed in (1, 2))
    settings = {"student_sampling": SamplingParams(top_p=0.7), "teacher_sampling": SamplingParams(top_p=0.6)}
    levels, observe = [], nucleus.Nucleus.observe
    monkeypatch.setattr(nucleus.Nucleus, "PATIENCE", 2)
    monkeypatch.setattr(nucleus, "LEAST_SHARE", 2)
    monkeypatch.setattr(
        nucleus.Nucleus, "observe", lambda n, missed: (levels.append((n.level, missed)), observe(n, missed))
    )
    for rule in ("top_k", "mixture"):
        monkeypatch.setattr(interleaved, "CANDIDATES_ON_CPU", ())
        plain = texts(student, teacher, rule=rule, **settings)
        assert not any(missed for _, missed in levels)
        levels.clear()
        monkeypatch.setattr(interleaved, "CANDIDATES_ON_CPU", (8, 100))
        rounds = captured() if with_graphs else None
        check_same(texts(student, teacher, rule=rule, rounds=rounds, **settings), plain)
        assert {level for level, _ in levels} == {0, 1, 2}
        assert all(missed == 0 for level, missed in levels if level == 2) and any(missed for _, missed in levels)
        levels.clear()


class Within(AcceptanceRule):
    """A rule that is no dataclass: it inherits an `==` that knows nothing of its number."""

    def __init__(self, k):
        self.k = k

    def __call__(self, draft):
        return draft.teacher_rank < self.k


@dataclass(frozen=True)
class AmongSome(AcceptanceRule):
    """One that cannot be hashed."""

    ranks: list

    def __call__(self, draft):
        return draft.teacher_rank < max(self.ranks)


@pytest.mark.parametrize("make", [Within, lambda k: AmongSome([k])], ids=["no dataclass", "no hash"])
def test_a_rule_with_another_number_is_no_replay_of_the_first(make):
    student, teacher, rounds = tiny_model(seed=1), tiny_model(seed=2), captured()
    noise = torch.rand((4, 8, 3), generator=torch.Generator().manual_seed(0))
    for k in (1, 200):
        settings = {"rule": make(k), "noise": noise, "max_new_tokens": 8}
        check_same(sample(student, teacher, **settings, rounds=rounds), sample(student, teacher, **settings))
    assert rounds.graphs and rounds.reason is None
    num_captures = []
    for _ in range(2):  # a trainer makes its rule in each step; after the first of these, all shapes are captured
        sample(student, teacher, rule=make(200), noise=noise, max_new_tokens=8, rounds=rounds)
        num_captures.append(Tape.num_captures)
    assert num_captures[0] == num_captures[1]


def test_a_rule_whose_number_is_set_between_two_calls_is_no_replay_of_the_first():
    student, teacher, rounds, rule = tiny_model(seed=1), tiny_model(seed=2), captured(), Within(1)
    noise = torch.rand((4, 8, 3), generator=torch.Generator().manual_seed(0))
    for rule.k in (1, 200):
        settings = {"rule": rule, "noise": noise, "max_new_tokens": 8}
        check_same(sample(student, teacher, **settings, rounds=rounds), sample(student, teacher, **settings))


def test_what_is_kept_for_scheduled_numbers_is_bounded(monkeypatch):
    """A temperature and a rule with new numbers in each of many steps: what was captured for the first ones is given up, and is right
    when they come back."""
    student, teacher, rounds = tiny_model(seed=1).bfloat16(), tiny_model(seed=2).bfloat16(), captured()
    monkeypatch.setattr(rounds_module, "MOST_GRAPHS", 4)
    monkeypatch.setattr(rounds_module, "MOST_WARM", 8)
    size = on_device.cache_info().maxsize
    noise = torch.rand((4, 4, 3), generator=torch.Generator().manual_seed(0))

    def sampled(step, kept):
        return sample(
            student, teacher, student_sampling=SamplingParams(0.5 + step / 1000), noise=noise, max_new_tokens=4,
            rule=TopK(k=20 + step), num_draft_tokens=2, rounds=kept,
        )  # fmt: skip

    for step in (1, 2, 3, 4, 5, 0):
        sampled(step, rounds)
    for step in range(6, 6 + 2 * size):  # as many steps more leave no number of before
        on_device(0.5 + step / 1000, noise.device)
    for step in (0, 5):  # in half precision, whose texts depend on the shapes: captured rounds on both sides
        check_same(sampled(step, rounds), sampled(step, captured()))
    assert rounds.reason is None and 0 < len(rounds.graphs) <= 4 and 0 < len(rounds.warm) <= 8
    assert on_device.cache_info().currsize <= size


# Compiled


@pytest.fixture
def graphs(monkeypatch):
    """The graphs that are traced; they run as they are, so that compiling costs no minute."""
    torch._dynamo.reset()
    traced = []

    def backend(graph, inputs):
        traced.append(graph)
        return graph.forward

    compiled = torch.compile(ragged_cache._forward, dynamic=False, fullgraph=True, backend=backend)
    monkeypatch.setattr(ragged_cache, "_compiled", lambda: compiled)
    yield traced
    torch._dynamo.reset()


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "gemma2", "gemma4_text", "gpt2"])
def test_compiled_rounds_write_the_texts_of_plain_ones_and_both_models_compile_once(graphs, architecture):
    student, teacher = tiny_model(architecture, seed=1), tiny_model(architecture, seed=2)
    plain, rounds = texts(student, teacher), Rounds(compile=True)
    assert not graphs
    for _ in range(2):
        check_same(texts(student, teacher, rounds=rounds), plain)
    assert len(graphs) == 2
    rounds.release()
    assert not student.get_output_embeddings()._forward_pre_hooks


def test_an_adapter_is_compiled_with_its_model(graphs):
    student = get_peft_model(tiny_model(seed=1), LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    teacher = tiny_model(seed=2)
    plain = texts(student, teacher)
    check_same(texts(student, teacher, rounds=Rounds(compile=True)), plain)
    assert graphs and not torch.equal(texts(tiny_model(seed=1), teacher).labels, plain.labels)


def test_slots_beyond_a_models_positions_are_never_used(graphs):
    student, teacher = (tiny_model("gpt2", seed=seed, max_position_embeddings=50) for seed in (1, 2))
    rounds = Rounds(compile=True)
    check_same(texts(student, teacher, rounds=rounds), texts(student, teacher))
    assert graphs and rounds.decoders["student"].num_slots > 50


@pytest.mark.parametrize("bf16", [False, True])
def test_a_trainer_compiles_once_and_trains_as_without(graphs, tmp_path, bf16):
    settings = {
        "max_steps": 3, "gradient_checkpointing": True, "bf16": bf16, "num_draft_tokens": 3,
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
    assert len(graphs) == 2


def test_a_trainer_captures_once_and_trains_as_without(tmp_path):
    settings = {"max_steps": 4, "num_draft_tokens": 3, "gradient_checkpointing": True}
    plain, trainer = make_trainer(tmp_path, **settings), make_trainer(tmp_path, **settings)
    trainer._rounds = captured()
    plain.train()
    trainer.train()
    assert losses(trainer) == pytest.approx(losses(plain), rel=1e-5)
    assert trainer._rounds.graphs and trainer._rounds.reason is None


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
    check_same(texts(student, teacher, rounds=Rounds(compile=True)), texts(student, teacher))
    torch._dynamo.reset()
