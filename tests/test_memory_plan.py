"""The plan of a training's memory: within a tenth of what is measured, and acted on where it does not fit.

Measured is the most that PyTorch's allocator holds during `train()`, and the weights, which are there before it. What it does not see
are packed copies of weights, which are oneDNN's.
"""

import gc

import pytest
import torch
from accelerate import PartialState
from memory import peak_bytes
from peft import LoraConfig
from test_recorded import without_teacher
from test_skd_trainer import make_trainer
from tiny import tiny_model

from skd_trl import SKDTrainer
from skd_trl.sampling.packed_weights import packed_bytes
from skd_trl.training import machine, memory_places
from skd_trl.training.machine import Machine
from skd_trl.training.memory_advice import describe_plan, out_of_memory_advised
from skd_trl.training.memory_count import Window
from skd_trl.training.memory_places import places_now
from skd_trl.training.memory_plan import GIB, fitted_plan, shards_teacher


STUDENT = {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 3}
TEACHER = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4}


def trainer_of(tmp_path, num_prompt_tokens=80, **settings):
    # Prompts begin differently: what all share would be read once.
    rows = [
        {
            "messages": [
                {"role": "user", "content": chr(97 + i) + "q" * num_prompt_tokens},
                {"role": "assistant", "content": "ab"},
            ]
        }
        for i in range(16)
    ]
    models = [
        tiny_model(seed=seed, vocab_size=4096, initializer_range=0.02, **sizes)
        for seed, sizes in ((1, STUDENT), (2, TEACHER))
    ]
    return make_trainer(
        tmp_path,
        rows,
        *models,
        **{"max_new_tokens": 12, "max_length": 480, "max_steps": 2, "accept_top_k": 3000, **settings},
    )


def planned(trainer):
    longest = max(map(len, trainer.train_dataset["prompt_ids"]))
    return fitted_plan(trainer.model, trainer._inner_teacher, Machine.of(trainer.accelerator), trainer.args, longest)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"num_prompt_tokens": 300, "gradient_checkpointing": True},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 8, "loss_chunk_size": 8, "num_prompt_tokens": 200},
        {"gradient_accumulation_steps": 2, "rollout_batch_size": 2, "optim": "sgd", "divergence": "jsd"},
    ],
    ids=["plain", "checkpointed", "large window", "few places"],
)  # fmt: skip
def test_the_planned_peak_is_within_a_tenth_of_the_measured_one(tmp_path, settings):
    trainer = trainer_of(tmp_path, **settings)
    plan = planned(trainer)
    weights = sum(p.numel() * 4 for model in (trainer.model, trainer._inner_teacher) for p in model.parameters())
    gc.collect()  # what goes during the training was there before it
    measured = peak_bytes(trainer.train) + weights + trainer._rounds.packed.num_bytes
    if sum(plan.sampling.values()) > sum(plan.training.values()):
        measured += packed_bytes(trainer.model)
    assert plan.peak == pytest.approx(measured, rel=0.1)
    assert (sum(plan.sampling.values()) > sum(plan.training.values())) == (
        trainer.args.gradient_accumulation_steps == 8
    )


def test_rows_that_do_not_fit_at_once_take_turns_and_the_texts_are_the_same(tmp_path, monkeypatch, caplog):
    def responses(free, free_now):
        monkeypatch.setattr(machine, "free_bytes", lambda device, now=False: free_now if now else free)
        trainer, written = trainer_of(tmp_path, per_device_train_batch_size=16, max_steps=1, num_draft_tokens=3), []
        original = trainer.training_step
        trainer.training_step = lambda model, inputs, *rest: (
            written.append(inputs["labels"]) or original(model, inputs, *rest)
        )
        plan = planned(trainer)
        trainer.train()
        return plan, torch.cat(written)

    roomy, all_at_once = responses(GIB, GIB)
    assert roomy.num_places == 16 and "written at once" not in caplog.text
    needed = sum(roomy.sampling.values())
    tight, in_turns = responses(sum(roomy.held.values()) + needed, int(0.8 * needed))
    assert 1 < tight.num_places < 16 and sum(tight.sampling.values()) < 0.8 * sum(roomy.sampling.values())
    assert "are written at once" in caplog.text
    assert torch.equal(in_turns, all_at_once)


def test_a_model_whose_forward_cannot_be_counted_is_sampled_for_all_rows_at_once_with_one_warning(monkeypatch, caplog):
    monkeypatch.setattr(machine, "free_bytes", lambda device, now=False: 200_000)
    PartialState(cpu=True)  # for accelerate's logger
    student, cpu, window = tiny_model(seed=1), Machine(torch.device("cpu"), GIB), Window(8, 8, 16, 16, 8)
    assert places_now(student, tiny_model(seed=2), cpu, window) < 8
    assert places_now(student, tiny_model("rwkv", seed=2), cpu, window) < 8  # its configuration has no attention
    assert "could not be counted" not in caplog.text

    def no_kernel(*args, **kwargs):
        raise RuntimeError("no fake kernel of _grouped_mm for fp32")

    monkeypatch.setattr(memory_places, "sampling_bytes", no_kernel)
    assert [places_now(student, tiny_model(seed=2), cpu, window) for _ in range(3)] == [8] * 3
    said = [text for text in caplog.messages if "could not be counted" in text]
    assert len(said) == 1 and "all responses of a step are written at once" in said[0]


def test_a_longer_draft_takes_more(tmp_path):
    plans = [planned(trainer_of(tmp_path, num_draft_tokens=length)) for length in (2, 8)]
    assert (
        sum(plans[0].sampling.values()) < sum(plans[1].sampling.values()) and plans[0].per_place < plans[1].per_place
    )


@pytest.mark.parametrize("kind", ["base", "live", "ema"])
def test_what_the_students_own_teacher_shares_with_it_is_counted_once(tmp_path, kind):
    rows = [{"prompt": "q" * 9, "completion": "a" * 9, "privileged_context": "x"}]
    settings = {"teacher_model_kind": kind, "peft_config": LoraConfig(r=2, target_modules=["q_proj"])}
    trainer = make_trainer(tmp_path, rows, trainer_class=without_teacher(SKDTrainer), **settings)
    known = {p.untyped_storage().data_ptr() for p in (*trainer.model.parameters(), *trainer.model.buffers())}
    teacher = trainer._inner_teacher
    own = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for t in (*teacher.parameters(), *teacher.buffers())
    }
    assert planned(trainer).held["teacher"] == sum(size for key, size in own.items() if key not in known)
    assert planned(trainer).held["teacher"] < 0.05 * planned(trainer).held["student"]


def test_a_plan_that_does_not_fit_names_what_saves_most(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "free_bytes", lambda device, now=False: GIB // 64)
    trainer = trainer_of(tmp_path)
    plan = planned(trainer)
    text = describe_plan(plan, Machine.of(trainer.accelerator), trainer.args)
    assert not plan.fits and "That does not fit" in text
    assert "a smaller loss_chunk_size (saves about" in text and "gradient_checkpointing=True (saves about" in text


@pytest.mark.parametrize("moment, option", [("sampling", "rollout_batch_size"), ("training", "loss_chunk_size")])
def test_an_error_of_a_full_device_names_the_options(tmp_path, monkeypatch, moment, option):
    trainer = trainer_of(tmp_path)

    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.")

    if moment == "sampling":
        monkeypatch.setattr("skd_trl.training.sampled_steps.interleaved_sample", full)
    else:
        monkeypatch.setattr("skd_trl.skd_trainer.distillation_loss", full)
    with pytest.raises(torch.OutOfMemoryError, match=rf"20 GiB\.\n.*{option}"):
        trainer.train()


def test_a_teacher_is_whole_where_it_takes_less_than_half_of_a_device():
    teacher = tiny_model()
    size = sum(p.numel() * 4 for p in teacher.parameters())
    for memory, is_spread in ((3 * size, False), (int(1.5 * size), True)):
        two = Machine(torch.device("cpu"), memory, "FSDP", 2, 3)
        assert shards_teacher(None, teacher, two) is is_spread
        assert shards_teacher(True, teacher, two) and not shards_teacher(False, teacher, two)
    with out_of_memory_advised("sampling"):
        pass
