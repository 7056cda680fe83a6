"""What a person sees of a run while it goes on: lines, bars, completions in files and trackers, prompts sampled again, the card."""

import importlib.util
import io
import json
import os
import re
import sqlite3
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pytest
import torch
from datasets import Dataset
from rich.console import Console
from test_skd_trainer import ROWS, make_trainer
from tiny import byte_tokenizer, tiny_model
from transformers import TrainerState

from skd_trl import Execution, SKDConfig, SpecKDTrainer, interleaved_sample
from skd_trl.sampling.acceptance import ACCEPTANCE_RULES, TopK
from skd_trl.training import completions, console
from skd_trl.training.run_files import LogFile, read_logs


# Characters


@pytest.mark.parametrize("text", ["世界 🎉", "plain", "é\n世", "", "👩‍👩‍👧 x"])
def test_characters_of_several_tokens_stay_whole(text):
    tokenizer = byte_tokenizer()
    ids = tokenizer(text).input_ids
    texts, proposals = completions.token_texts(tokenizer, ids, ids)
    assert "".join(texts) == text and proposals == texts
    assert not any(completions.INCOMPLETE in piece for piece in texts)
    marked = list(completions.whole_pieces(texts, [i == 1 for i in range(len(ids))]))
    assert "".join(piece for piece, *_ in marked) == text
    assert sum(is_replaced for _, is_replaced, *_ in marked) == (len(ids) > 1)
    assert [start for *_, start, _ in marked[1:]] == [stop for *_, stop in marked[:-1]]


def test_bytes_that_are_no_character_are_not_waited_for():
    tokenizer = byte_tokenizer()
    broken = tokenizer("世").input_ids[:1] * 6  # first bytes without the rest
    texts, _ = completions.token_texts(tokenizer, broken + tokenizer("ab").input_ids, [-100] * 8)
    assert texts[-2:] == ["a", "b"] or "".join(texts).endswith("ab")
    assert "".join(texts).count(completions.INCOMPLETE) == 6


def test_a_replaced_token_shows_the_proposal_as_it_would_have_read_there():
    tokenizer = byte_tokenizer()
    ids, proposed = tokenizer("世b").input_ids, tokenizer("世c").input_ids
    assert completions.token_texts(tokenizer, ids, proposed)[1] == ["", "", "世", "c"]


def record(step=1, prompt="<|im_start|>ask | this", is_fixed=False):
    return {
        "step": step,
        "prompt": prompt,
        "response": "a世 b",
        "tokens": ["a", "", "", "世", " b"],
        "replaced": [False, True, False, False, True],
        "proposals": ["a", "", "", "x", " c"],
        "is_fixed": is_fixed,
    }


def test_the_table_in_a_file_marks_whole_characters():
    file = io.StringIO()
    completions.print_completions([record()], 1, 1, Console(file=file, width=80))
    assert "a⟦世⟧⟦ b⟧" in file.getvalue() and "40%" in file.getvalue()


# Lines and bars


def test_a_log_is_one_line_of_the_terminals_width_and_ends_with_the_time_left():
    logs = {"loss": 1.2345, "acceptance_rate": 0.71, "replaced_share": 0.29, "tokens_per_second": 43.2, "draft_length": 3.0,
            "teacher_rank": 2.5, "response_length": 28.0, "learning_rate": 2e-4}  # fmt: skip
    line = console.log_line(logs, 12, 32, 83.0, width=100)
    assert line.startswith("step 12/32  loss 1.234  accepted 71%  replaced 29%") or "loss 1.235" in line
    assert line.endswith("1:23 left")
    for width in (40, 60, 79):
        short = console.log_line(logs, 12, 32, 83.0, width=width)
        assert len(short) <= width and short.startswith("step 12/32") and short.endswith("1:23 left")
    assert console.log_line({"total_flos": 1.0}, 1, 2, 0.0) == ""
    assert [console.clock(seconds) for seconds in (7.2, 750, 3723)] == ["0:07", "12:30", "1:02:03"]


def test_an_evaluation_before_the_first_epoch_of_a_resumed_run_knows_no_time_left(monkeypatch, capsys):
    monkeypatch.setattr(console.time, "perf_counter", lambda: 1e6)
    state = TrainerState(max_steps=100, global_step=50, is_world_process_zero=True)
    line = console.LogLine(with_bar=False)
    line.on_train_begin(None, state, None)
    line.on_log(None, state, None, logs={"eval_loss": 1.0})
    assert " left" not in capsys.readouterr().out


def test_the_time_left_counts_the_sampling_of_the_first_step_and_not_what_comes_before_it(monkeypatch, capsys):
    seconds = [0.0]
    monkeypatch.setattr(console.time, "perf_counter", lambda: seconds[0])
    state = TrainerState(max_steps=5, global_step=2, is_world_process_zero=True)  # a resumed run
    line = console.LogLine(with_bar=False)
    for event, at in (("on_train_begin", 10.0), ("on_epoch_begin", 100.0)):
        seconds[0] = at
        getattr(line, event)(None, state, None)
    seconds[0], state.global_step = 107.0, 3  # responses were sampled before the Trainer called on_step_begin
    line.on_step_end(None, state, None)
    line.on_log(None, state, None, logs={"loss": 1.0})
    line.on_epoch_begin(None, state, None)  # of a second epoch
    seconds[0], state.global_step = 112.0, 4
    line.on_log(None, state, None, logs={"loss": 1.0})
    assert [line.split()[-2] for line in capsys.readouterr().out.splitlines()] == ["0:14", "0:06"]


def test_a_table_of_responses_does_not_begin_on_the_line_of_a_progress_bar(capsys):
    with console.tqdm(total=3, desc="steps", file=sys.stdout, mininterval=0) as bar:
        bar.update(1)
        completions.print_completions([record()], 1, 1, Console(file=sys.stdout, width=80))
    before = capsys.readouterr().out.partition("Sampled responses")[0]
    assert before.rpartition("\r")[2].strip() == "" and "steps" in before


def sampled(observe, num_rows=3):
    student, teacher = tiny_model(seed=1), tiny_model(seed=2)
    prompts = torch.randint(3, 250, (num_rows, 4), generator=torch.Generator().manual_seed(0))
    return interleaved_sample(
        student,
        teacher,
        prompts,
        torch.ones_like(prompts),
        accept=ACCEPTANCE_RULES["top_k"](k=60),
        max_new_tokens=6,
        eos_token_ids=[257],
        noise=torch.Generator().manual_seed(0),
        execution=Execution(2, max_rows=2, observe=observe),
    )


def test_a_sampling_tells_after_each_round_how_much_is_written_and_by_whom():
    seen = []
    rollout = sampled(lambda written, live: seen.append((written, live)))
    assert seen[-1] == ((rollout.labels != -100).sum(1).tolist(), [])
    totals = [sum(written) for written, _ in seen]
    assert totals == sorted(totals) and totals[0] > 0
    assert all(len(live) <= 2 for _, live in seen)


def test_the_bar_of_a_sampling_counts_rows_and_tokens_and_expects_the_rest_to_be_like_the_finished_ones(capsys):
    with console.SamplingBar(10, "sampling ", disable=False, delay=0.0) as observe:
        bar = observe.__self__.bar
        observe([4, 3, 0], [0, 1])
        assert (bar.n, bar.total) == (7, 7 + 6 + 7 + 10)
        observe([6, 3, 0], [1])
        assert (bar.n, bar.total) == (9, 9 + 3 + 6)
        observe([6, 8, 0], [1])  # longer than any finished one: the limit is what is known
        assert (bar.n, bar.total) == (14, 14 + 2 + 6)
        bar.refresh()
    assert "1/3 rows" in capsys.readouterr().err


def test_there_is_no_bar_where_the_trainers_own_is_off(capsys):
    with console.SamplingBar(10, "sampling ", disable=True, delay=0.0) as observe:
        sampled(observe)
    assert capsys.readouterr().err == ""


# What a run leaves


def test_the_logs_of_a_run_are_in_its_directory_while_it_goes_on_and_a_resumed_run_continues_them(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=2, logging_steps=1, save_steps=1, save_strategy="steps")
    trainer.add_callback(LogFile())
    trainer.train()
    logs = read_logs(tmp_path / "out" / "logs.jsonl")
    assert [entry["step"] for entry in logs if "loss" in entry] == [1, 2]
    assert all(entry["max_steps"] == 2 for entry in logs)
    with (tmp_path / "out" / "logs.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')  # killed while it wrote
    again = make_trainer(tmp_path, max_steps=3, logging_steps=1, save_strategy="no")
    again.add_callback(LogFile())
    again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-1"))
    assert [entry["step"] for entry in read_logs(tmp_path / "out" / "logs.jsonl") if "loss" in entry] == [1, 2, 3]


def test_a_resumed_run_keeps_the_evaluation_before_its_first_step_and_a_new_run_has_its_own(tmp_path):
    settings = {"logging_steps": 1, "eval_on_start": True, "eval_dataset": Dataset.from_list(ROWS)}

    def evaluated(checkpoint=None, **more):
        trainer = make_trainer(tmp_path, **settings, **more)
        trainer.add_callback(LogFile())
        trainer.train(resume_from_checkpoint=checkpoint)
        logs = read_logs(tmp_path / "out" / "logs.jsonl")
        assert [entry["step"] for entry in logs if "loss" in entry] == list(range(1, trainer.state.global_step + 1))
        return [entry["eval_loss"] for entry in logs if "eval_loss" in entry and entry["step"] == 0]

    first = evaluated(max_steps=2, save_strategy="steps", save_steps=1)
    assert len(first) == 1
    assert evaluated(str(tmp_path / "out" / "checkpoint-1"), max_steps=3, save_strategy="no") == first
    other = evaluated(max_steps=1, model=tiny_model(seed=3))
    assert len(other) == 1 and other != first


def test_the_same_prompts_are_sampled_again_with_the_same_noise(tmp_path):
    trainer = make_trainer(
        tmp_path, max_steps=2, logging_steps=1, log_completions=True, log_fixed_prompts=2, learning_rate=0.0
    )
    trainer.train()
    first, second = (
        pd.read_parquet(tmp_path / "out" / "completions" / f"completions_{step:05d}.parquet") for step in (1, 2)
    )
    for name in ("prompt", "response"):
        assert first[first["is_fixed"]][name].tolist() == second[second["is_fixed"]][name].tolist()
    assert first["is_fixed"].tolist() == [True, True] + [False] * (len(first) - 2)
    assert first[~first["is_fixed"]]["response"].tolist() != second[~second["is_fixed"]]["response"].tolist()
    assert read_logs(tmp_path / "out" / "logs.jsonl")  # for the report of a run that is not over


def test_of_a_small_set_as_many_fixed_prompts_are_sampled_as_it_has(tmp_path):
    few = Dataset.from_list(ROWS[:2])
    trainer = make_trainer(tmp_path, log_completions=True, log_fixed_prompts=4, eval_dataset=few)
    trainer.train()
    kept = pd.read_parquet(tmp_path / "out" / "completions" / "completions_00001.parquet")
    assert kept["is_fixed"].tolist() == [True] * 2 + [False] * 4


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"log_fixed_prompts": 2}, "log_fixed_prompts=2 has no effect on this training: .* log_completions=True"),
        ({"log_completions_steps": 3}, "log_completions_steps=3 has no effect"),
        ({"num_completions_to_print": 9}, "num_completions_to_print=9 has no effect"),
        ({"rollout": "dataset", "compile_student": True}, "compile_student=True has no effect .* rollout='dataset'"),
        (
            {"rollout": "student", "lmbda": 0.0, "capture_sampling": True},
            "capture_sampling=True has no effect .* lmbda=0.0",
        ),
        ({"rollout": "dataset", "log_completions": True}, "log_completions=True has no effect"),
    ],
)
def test_a_setting_that_does_nothing_is_named_once(tmp_path, caplog, settings, words):
    make_trainer(tmp_path, **settings)
    said = [text for text in caplog.messages if "has no effect on this training" in text]
    assert len(said) == 1 and re.search(words, said[0])
    caplog.clear()
    make_trainer(tmp_path, **{name: value for name, value in settings.items() if name in ("rollout", "lmbda")})
    assert "has no effect" not in caplog.text


def test_a_number_of_fixed_prompts_below_zero_is_refused():
    with pytest.raises(ValueError, match="log_fixed_prompts=-1"):
        SKDConfig(output_dir="unused", log_fixed_prompts=-1, use_cpu=True, bf16=False)


def test_the_model_card_names_teacher_rule_draft_length_versions_and_command(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["/usr/bin/skd", "train", "--config", "my run.yaml"])
    trainer = make_trainer(tmp_path, accept="min_prob", accept_kwargs={"alpha": 0.3}, num_draft_tokens=4)
    trainer._inner_teacher.config._name_or_path = "org/teacher"
    trainer.create_model_card(model_name="tiny")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| teacher | `org/teacher` |" in card and "| acceptance rule | `min_prob` |" in card
    assert "| parameters of the rule | `{'alpha': 0.3}` |" in card and "K of the rule" not in card
    assert "| draft length | `4` |" in card and "skd_trl 0" in card
    assert "skd train --config 'my run.yaml'" in card
    assert "| student | `unnamed` |" in card and "None" not in card and f'model="{tmp_path / "out"}"' in card
    assert card.index("### Distillation") < card.index("### Framework versions") < card.index("## Citations")


def test_the_model_card_has_the_numbers_that_a_run_uses_and_no_others(tmp_path, monkeypatch):
    @dataclass(frozen=True)
    class Few(TopK):
        """As `top_k`."""

    monkeypatch.setitem(ACCEPTANCE_RULES, "few", Few)
    make_trainer(tmp_path / "k", accept="few", accept_top_k=10).create_model_card()
    card = (tmp_path / "k" / "out" / "README.md").read_text()
    assert (
        "| K of the rule | `10` |" in card and "| teacher's temperature |" in card and "# Model Card for out" in card
    )
    student = make_trainer(tmp_path / "student", trainer_class=SpecKDTrainer, gate="one_minus_tv", rollout="student")
    student.create_model_card()
    card = (tmp_path / "student" / "out" / "README.md").read_text()
    assert "| gate | `one_minus_tv` |" in card and "K of the gate" not in card and "teacher's temperature" not in card
    make_trainer(tmp_path / "given", rollout="dataset").create_model_card()
    card = (tmp_path / "given" / "out" / "README.md").read_text()
    assert not any(row in card for row in ("share of sampled responses", "their longest", "draft length"))


# Trackers: read back from offline runs


def test_completions_arrive_in_tensorboard_as_text(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path)) as writer:
        completions.send_completions([record(step=3)], 3, ["tensorboard"], writer)
    events = EventAccumulator(str(tmp_path)).Reload()
    (event,) = events.Tensors("completions/text_summary")
    text = event.tensor_proto.string_val[0].decode()
    assert event.step == 3
    assert "| &lt;|im_start\\|>ask \\| this | a⟦世⟧⟦ b⟧ | 40% |".replace("&lt;|im", "&lt;\\|im") in text


def test_a_trainer_that_reports_to_tensorboard_sends_its_completions_there(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "logs"))
    make_trainer(tmp_path, max_steps=1, log_completions=True, report_to=["tensorboard"]).train()
    (file,) = (tmp_path / "logs").rglob("events*")
    events = EventAccumulator(str(file.parent)).Reload()
    (event,) = events.Tensors("completions/text_summary")
    saved = pd.read_parquet(tmp_path / "out" / "completions" / "completions_00001.parquet")
    text = event.tensor_proto.string_val[0].decode()
    assert text.count("\n") == 1 + len(saved)


def test_completions_arrive_in_an_offline_run_of_weights_and_biases(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = wandb.init(project="test", dir=str(tmp_path), settings=wandb.Settings(console="off"))
    completions.send_completions([record(step=3), record(step=3, is_fixed=True)], 3, ["wandb"])
    run.finish()
    (table,) = tmp_path.rglob("completions*.table.json")
    content = json.loads(table.read_text())
    rows = [dict(zip(content["columns"], row, strict=True)) for row in content["data"]]
    assert [row["marked"] for row in rows] == ["a⟦世⟧⟦ b⟧"] * 2
    assert [(row["step"], row["is_fixed"]) for row in rows] == [(3, False), (3, True)]


def test_completions_arrive_in_trackio(tmp_path):
    if importlib.util.find_spec("trackio") is None:
        pytest.skip("trackio is not installed")
    script = (
        "import trackio; from test_watching import record; from skd_trl.training.completions import send_completions; "
        "trackio.init(project='test', name='run', embed=False); send_completions([record(step=3)], 3, ['trackio']); trackio.finish()"
    )
    # Its folder is read from the environment when it is imported, which may have happened here.
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    environment = {**os.environ, "TRACKIO_DIR": str(tmp_path), "PYTHONPATH": path}
    subprocess.run([sys.executable, "-c", script], env=environment, check=True, capture_output=True)
    with sqlite3.connect(tmp_path / "test.db") as connection:
        ((stored,),) = connection.execute("select metrics from metrics")
    (row,) = json.loads(stored)["completions"]["_value"]
    assert (row["step"], row["marked"], row["completion"]) == (3, "a⟦世⟧⟦ b⟧", "a世 b")
