"""Training with a teacher behind a server, against the same teacher in this process."""

import json
import threading
from functools import partial

import pytest
import torch
from datasets import Dataset
from local_scorer import LocalScorer
from processes import torchrun
from teacher_server import TeacherServer, serving
from test_mixed_batches import spy_on_trained_batches
from test_recorded import OWN_PROMPTS, ROWS, without_teacher
from test_skd_trainer import losses, make_trainer, update_of
from tiny import byte_tokenizer, tiny_model
from transformers import TrainerCallback

from skd_trl import (
    ACCEPTANCE_RULES,
    AcceptanceRule,
    SamplingParams,
    SKDConfig,
    SKDTrainer,
    SpecKDTrainer,
    interleaved_sample,
)
from skd_trl.loss.lm_head import LMHead
from skd_trl.sampling.interleaved import Execution
from skd_trl.sampling.participants import LocalParticipant
from skd_trl.serving.client import TeacherServerError
from skd_trl.training.served import RemoteHiddenStates, RemoteTeacher, failing_at_the_end


V = 259
SETTINGS = {"max_grad_norm": 0.0, "max_new_tokens": 12}


def served(tmp_path, server, rows=ROWS, trainer_class=SKDTrainer, **settings):
    settings = {**SETTINGS, "teacher_model_server_url": server.url, "teacher_top_k": server.top_k, **settings}
    return make_trainer(tmp_path, rows, trainer_class=without_teacher(trainer_class), **settings)


@pytest.mark.parametrize("rows", [ROWS, OWN_PROMPTS], ids=["one prompt", "two prompts"])
@pytest.mark.parametrize(
    "settings",
    [
        {"gradient_accumulation_steps": 2},
        {"rollout": "dataset"},
        {"rollout": "student", "divergence": "reverse_kl"},
        {"rollout": "teacher"},
        {"lmbda": 0.5, "lmbda_unit": "prompt"},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_with_every_token_sent_the_update_is_that_of_the_teacher_in_this_process(tmp_path, settings, rows):
    with serving(tiny_model(seed=2), top_k=V) as server:
        remote = served(tmp_path, server, rows, **settings)
        here = make_trainer(tmp_path, rows, **SETTINGS, **settings)
        batches = [spy_on_trained_batches(trainer) for trainer in (remote, here)]
        updates = [update_of(remote), update_of(here)]
    for one, other in zip(*batches, strict=True):
        assert torch.equal(one["labels"], other["labels"])
    assert updates[1].norm() > 0.01
    assert (updates[0] - updates[1]).norm() < 1e-3 * updates[1].norm()


EXACT = {"teacher_signal": "hidden_states", "teacher_top_k": 64}


@pytest.mark.parametrize(
    "trainer_class, rows, settings",
    [
        (SKDTrainer, OWN_PROMPTS, {"gradient_accumulation_steps": 2}),
        (SKDTrainer, OWN_PROMPTS, {"rollout": "dataset", "divergence": "skew_forward_kl"}),
        (SpecKDTrainer, ROWS, {"rollout": "student", "gate": "spec_k"}),
        (SpecKDTrainer, ROWS, {"gate": "greedy_top_k", "gate_top_k": 200, "gate_normalizer": "accepted"}),
    ],
    ids=["skd", "given", "spec_k", "greedy_top_k"],
)
def test_with_hidden_states_sent_the_update_is_that_of_the_teacher_in_this_process(
    tmp_path, trainer_class, rows, settings
):
    with serving(tiny_model(seed=2), top_k=1) as server:
        remote = served(tmp_path, server, rows, trainer_class, **EXACT, **settings)
        here = make_trainer(tmp_path, rows, trainer_class=trainer_class, **SETTINGS, **settings)
        batches = [spy_on_trained_batches(trainer) for trainer in (remote, here)]
        updates = [update_of(remote), update_of(here)]
    for one, other in zip(*batches, strict=True):
        assert torch.equal(one["labels"], other["labels"])
    assert updates[1].norm() > 0.01
    assert (updates[0] - updates[1]).norm() < 1e-3 * updates[1].norm()
    entropies = [trainer.state.log_history[0]["teacher_entropy"] for trainer in (remote, here)]
    assert entropies[0] == pytest.approx(entropies[1], rel=1e-3)
    assert "teacher_mass_outside" not in remote.state.log_history[0]


def test_a_rule_that_reads_logits_is_admitted_with_hidden_states(tmp_path):
    class ByLogits(AcceptanceRule):
        def __call__(self, draft):
            return draft.teacher_logits[..., 0] > 0

    with serving(tiny_model(seed=2), top_k=1) as server:
        served(tmp_path, server, accept=ByLogits(), **EXACT).train()


@pytest.mark.parametrize("rollout", ["interleaved", "dataset"])
def test_a_teacher_with_a_wider_head_trains_and_what_lies_beyond_is_outside(tmp_path, rollout):
    teacher, outside = tiny_model(seed=2, vocab_size=V + 61), []
    with serving(teacher, vocab_size=V + 61, top_k=64) as server:
        trainer = served(tmp_path, server, ROWS, rollout=rollout, teacher_top_k=64, max_steps=1)
        seen = spy_on_trained_batches(trainer)
        trainer.train()
    for batch in seen:
        for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"].bool(), batch["labels"], strict=True):
            with torch.no_grad():
                top = teacher(ids[mask][None]).logits[0, :-1].softmax(-1)[labels[mask][1:] != -100].topk(64)
            assert (top.indices >= V).any()
            outside += (1 - torch.where(top.indices < V, top.values, 0).sum(-1)).tolist()
    mass = next(logs["teacher_mass_outside"] for logs in trainer.state.log_history if "teacher_mass_outside" in logs)
    assert mass == pytest.approx(sum(outside) / len(outside), rel=1e-3)
    assert all(torch.isfinite(torch.tensor(value)) for value in losses(trainer))


def test_hidden_states_that_do_not_make_the_servers_scores_are_refused(tmp_path):
    with serving(tiny_model(seed=2), top_k=1) as server:
        scorer = server.scorer
        server.hidden_states = lambda texts, num_scored: 3 * scorer.hidden_states(texts, num_scored, texts)
        with pytest.raises(ValueError, match=r"make other log-probabilities than its own, by \d+\.\d+ nats"):
            served(tmp_path, server, **EXACT)
        server.why_no_hidden_states = "its head is quantised"
        with pytest.raises(ValueError, match="gives no hidden states: its head is quantised"):
            served(tmp_path, server, **EXACT)


def test_with_some_tokens_sent_the_loss_is_a_little_less_and_the_rest_is_a_metric(tmp_path):
    with serving(tiny_model(seed=2), top_k=100) as server:
        remote = served(tmp_path, server, rollout="student")
        remote.train()
    here = make_trainer(tmp_path, ROWS, rollout="student", **SETTINGS)
    here.train()
    assert 0.9 * losses(here)[0] < losses(remote)[0] < losses(here)[0]
    outside = [entry["teacher_mass_outside"] for entry in remote.state.log_history if "teacher_mass_outside" in entry]
    assert 0 < outside[0] < 0.3


@pytest.mark.parametrize("signal", [{}, EXACT], ids=["top_k", "hidden_states"])
def test_an_evaluation_asks_the_server_too(tmp_path, signal):
    with serving(tiny_model(seed=2), top_k=V) as server:
        remote = served(tmp_path, server, **signal).evaluate(make_dataset())
    here = make_trainer(tmp_path, ROWS, **SETTINGS).evaluate(make_dataset())
    assert remote["eval_loss"] == pytest.approx(here["eval_loss"], rel=1e-4)


def make_dataset():
    return Dataset.from_list(ROWS[:3])


class At(TrainerCallback):
    """Does something at the beginning of an optimizer step."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.action()


def test_a_run_that_gives_up_its_server_has_left_a_checkpoint_that_resumes(tmp_path):
    settings = {"max_steps": 4, "save_strategy": "no", "teacher_server_patience": 0.5, "logging_steps": 1}
    model = tiny_model(seed=2)
    with serving(model, top_k=100) as server:
        whole = served(tmp_path / "whole", server, **settings)
        whole.train()
    server = TeacherServer(model, top_k=100)
    cut = served(tmp_path / "cut", server, **settings)
    cut.add_callback(At(2, server.stop))
    with pytest.raises(TeacherServerError, match="resume from the last checkpoint"):
        cut.train()
    assert (tmp_path / "cut" / "out" / "checkpoint-2").is_dir()
    with serving(model, top_k=100) as server:
        resumed = served(tmp_path / "cut", server, **settings)
        resumed.train(resume_from_checkpoint=True)
    assert losses(resumed)[-2:] == losses(whole)[-2:]


@pytest.mark.parametrize("rows", [ROWS[:3], [{"prompt": "q" * 5}]], ids=["references", "prompts alone"])
def test_a_server_that_is_given_up_in_an_evaluation_leaves_a_checkpoint_that_resumes(tmp_path, rows):
    settings = {
        "max_steps": 3, "teacher_server_patience": 0.5, "eval_strategy": "steps", "eval_steps": 2, "eval_dataset": Dataset.from_list(rows),
    }  # fmt: skip
    with serving(tiny_model(seed=2), top_k=64) as server:
        whole = served(tmp_path / "whole", server, **settings)
        whole.train()
        cut = served(tmp_path / "cut", server, **settings)
        cut.add_callback(At(2, lambda: setattr(server, "fault", "error")))
        with pytest.raises(TeacherServerError, match="resume from the last checkpoint"):
            cut.train()
        assert [folder.name for folder in (tmp_path / "cut" / "out").glob("checkpoint-*")] == ["checkpoint-2"]
        with pytest.raises(TeacherServerError):  # no training is under way: there is nothing to save
            served(tmp_path / "alone", server, **settings).evaluate()
        assert not list((tmp_path / "alone").glob("out/checkpoint-*"))
        server.fault = ""
        resumed = served(tmp_path / "cut", server, **settings)
        resumed.train(resume_from_checkpoint=True)
    assert losses(resumed)[-1] == losses(whole)[-1]


@pytest.mark.distributed
def test_on_two_processes_of_which_one_loses_its_server_both_end_with_a_checkpoint(tmp_path):
    torchrun([__file__.replace("test_served_training", "served_worker"), str(tmp_path)])
    said = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert said[0] == ["Another process has given up the teacher's server.", 1]
    assert "resume from the last checkpoint" in said[1][0] and said[1][1] == 1
    assert [folder.name for folder in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-1"]


class Counted:
    """How often the processes of a sampling agree, as one of them counts it."""

    def __init__(self):
        self.rounds = []

    def __call__(self, *numbers):
        self.rounds.append(numbers)
        return numbers


@pytest.mark.parametrize("signal", ["top_k", "hidden_states"])
def test_a_process_whose_server_is_gone_samples_on_until_the_others_need_no_forward_of_it(signal):
    model = tiny_model(seed=2)
    scorer, head = LocalScorer(model, 20, V), LMHead.of(model)
    teacher = RemoteTeacher(scorer) if signal == "top_k" else RemoteHiddenStates(scorer, head)
    ids = torch.tensor([[5, 9, 200], [7, 8, 9]])
    window = {"prompts": ids, "prompt_attention_mask": torch.ones_like(ids)}
    asked, agree = [], Counted()

    def fails_later(ask, *arguments):
        asked.append(arguments)
        if len(asked) > 2:
            raise TeacherServerError("gone")
        return ask(*arguments)

    for name in ("score", "hidden_states"):
        setattr(scorer, name, partial(fails_later, getattr(scorer, name)))
    participant = teacher.participant(window, SamplingParams(), V, None)
    with pytest.raises(TeacherServerError, match="gone"), failing_at_the_end(participant, teacher):
        interleaved_sample(
            LocalParticipant(tiny_model(seed=1)), participant, *window.values(), accept=ACCEPTANCE_RULES["top_k"](k=20),
            max_new_tokens=24, eos_token_ids=[], noise=torch.rand(2, 24, 3), execution=Execution(2, agree=agree),
        )  # fmt: skip
    assert len(asked) == 3  # and never again
    assert agree.rounds[-1] == (0, 0, 0) and len(agree.rounds) > 4  # nobody has a row left


def test_rows_that_the_server_has_no_room_for_are_left_out_before_training(tmp_path, caplog):
    rows = [{"prompt": "q" * (10 + 8 * i)} for i in range(8)]
    with serving(tiny_model(seed=2), top_k=50, max_length=64) as server:
        trainer = served(tmp_path, server, rows, max_steps=4, per_device_train_batch_size=2)
        assert max(map(len, trainer.train_dataset["prompt_ids"])) == 50  # 64 - 12 - 1 = 51
        assert any("2 of 8 rows" in text for text in caplog.messages)
        trainer.train()
        assert trainer.state.global_step == 4
        given = [{"prompt": "q" * 30, "completion": "a" * 50}]
        assert len(served(tmp_path, server, given, rollout="dataset").train_dataset[0]["response_ids"]) == 33
        own = [{"prompt": "q", "teacher_prompt": "q" * n} for n in (51, 52)]
        assert len(served(tmp_path, server, own).train_dataset) == 1
        with pytest.raises(
            ValueError, match="the teacher has no room for a response: the longest has 55 tokens, of 63"
        ):
            served(tmp_path, server, given, rollout="dataset", eval_dataset=Dataset.from_list([{"prompt": "q" * 55}]))
        with pytest.raises(
            ValueError, match="max_new_tokens=63 leaves no room for a prompt: the teacher's server takes 64"
        ):
            served(tmp_path, server, rows, max_new_tokens=63)


@pytest.mark.parametrize(("event", "signal"), [("restarts", EXACT), ("replica gone", {})], ids=["restarts", "gone"])
def test_a_run_that_survives_its_server_has_the_losses_of_one_that_was_not_disturbed(tmp_path, event, signal):
    settings = {"max_steps": 2, "logging_steps": 1, **signal}
    model = tiny_model(seed=2)
    with serving(model, top_k=64) as server:
        whole = served(tmp_path / "whole", server, **settings)
        whole.train()
    gone, with_it = TeacherServer(model, top_k=64), []

    def restart():
        with_it.append(TeacherServer(model, top_k=64, port=gone.http.server_port))

    def stop():
        gone.stop()
        if event == "restarts":
            threading.Timer(0.3, restart).start()

    if event == "replica gone":
        with_it.append(TeacherServer(model, top_k=64))
        settings["teacher_model_server_url"] = [gone.url, with_it[0].url]
    disturbed = served(tmp_path / "disturbed", gone, **settings)
    disturbed.add_callback(At(1, stop))
    disturbed.train()
    assert with_it[0].num_texts > 0
    with_it[0].stop()
    assert losses(disturbed) == losses(whole)


def test_a_key_that_is_refused_in_the_middle_leaves_a_checkpoint(tmp_path):
    with serving(tiny_model(seed=2), top_k=100) as server:
        cut = served(tmp_path, server, max_steps=2)
        cut.add_callback(At(1, lambda: setattr(server, "api_key", "new")))
        with pytest.raises(ValueError, match="refuses the API key"):
            cut.train()
    assert (tmp_path / "out" / "checkpoint-1").is_dir()


def test_what_the_top_k_cannot_give_is_refused_by_name(tmp_path):
    class ByLogits(AcceptanceRule):
        def __call__(self, draft):
            return draft.teacher_logits[..., 0] > 0

    with serving(tiny_model(seed=2), top_k=20) as server:
        with pytest.raises(ValueError, match="The rule asks for the teacher's logits"):
            served(tmp_path, server, accept=ByLogits())
        with pytest.raises(ValueError, match=r"gate greedy_top_k needs 30: ask for a signal with k=30"):
            served(tmp_path, server, trainer_class=SpecKDTrainer, gate="greedy_top_k", gate_top_k=30)
        with pytest.raises(ValueError, match="says who the teacher is, and a teacher_model was given too"):
            make_trainer(tmp_path, ROWS, **{**SETTINGS, "teacher_model_server_url": server.url, "teacher_top_k": 20})


def test_a_server_with_another_tokenizer_is_refused(tmp_path):
    other = byte_tokenizer(num_extra_tokens=1)
    other.add_tokens(["fox"])
    with (
        serving(tiny_model(seed=2), top_k=20, tokenizer=other) as server,
        pytest.raises(ValueError, match="Serve a teacher with the student's tokenizer"),
    ):
        served(tmp_path, server)


def test_options_of_a_server_without_one_and_beside_another_teacher_are_refused(tmp_path):
    local = {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False}
    with pytest.raises(ValueError, match="teacher_top_k=5 would have no effect"):
        SKDConfig(**local, teacher_top_k=5)
    with pytest.raises(ValueError, match="teacher_signal='hidden_states' would have no effect"):
        SKDConfig(**local, teacher_signal="hidden_states")
    for options, words in (
        ({"teacher_signal": "hidden"}, "teacher_signal='hidden' is unknown; choose one of top_k, hidden_states"),
        ({"teacher_signal": "hidden_states", "teacher_top_k": 5}, "all tokens are known"),
    ):
        with pytest.raises(ValueError, match=words):
            SKDConfig(**local, teacher_model_server_url=["http://x"], **options)
    with pytest.raises(ValueError, match="is about one in this process"):
        SKDConfig(
            output_dir=str(tmp_path),
            use_cpu=True,
            bf16=False,
            teacher_model_server_url=["http://x"],
            teacher_model_kind="base",
        )
