"""A teacher's scores beside the rows: written, killed and gone on with, and trained on without the teacher."""

import gc
import re
import weakref

import numpy as np
import pytest
import torch
from datasets import Dataset, IterableDataset, load_dataset
from processes import launch
from test_mixed_batches import spy_on_trained_batches
from test_skd_trainer import losses, make_trainer, update_of
from test_teacher_prompt import ROWS as OWN_PROMPTS
from tiny import byte_tokenizer, tiny_model
from transformers import LlamaForCausalLM

from skd_trl import SKDTrainer, SpecKDTrainer
from skd_trl.__main__ import main
from skd_trl.commands.rows import load_rows
from skd_trl.data.recorded_scores import SCORES
from skd_trl.loss.teacher_signal import top_log_probs
from skd_trl.training import score as scoring
from skd_trl.training.score import ScoreOptions, score
from skd_trl.training.teachers import OneTeacher


TOKENIZER = byte_tokenizer()
K = 20
ROWS = [{k: v for k, v in row.items() if k != "privileged_context"} for row in OWN_PROMPTS]


def scored(directory, rows=ROWS, model=None, **options):
    model = tiny_model(seed=2) if model is None else model
    options = ScoreOptions(**{"top_k": K, "batch_size": 4, "rows_per_file": 4, **options})
    score(Dataset.from_list(rows), model, TOKENIZER, directory, options)
    return read(directory)


def read(directory):
    return load_dataset(
        "parquet", data_files=sorted(map(str, directory.glob("*.parquet"))), split="train",
        cache_dir=str(directory.parent / "cache" / str(len(list(directory.parent.glob("*"))))),
    )  # fmt: skip


class Coarse(OneTeacher):
    """A teacher in memory of which the loss is told k tokens."""

    def signal(self, batch, tokens):
        signal = super().signal(batch, tokens)
        return top_log_probs(signal.states, signal.head, tokens.labels, K, 259)

    def keep(self, batch, tokens, signal):
        """Nothing: the next `signal` runs the same forward again."""


def without_teacher(trainer_class):
    class Trainer(trainer_class):
        def __init__(self, teacher_model=None, **kwargs):
            super().__init__(**kwargs)

    return Trainer


def live(trainer_class):
    class Trainer(trainer_class):
        _statistics = tuple(name for name in trainer_class._statistics if name != "teacher_entropy")

        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self._teacher = Coarse(self._inner_teacher, self.teacher_model)

    return Trainer


IDEAS = [
    (SKDTrainer, {"divergence": "forward_kl"}, ROWS),
    (SKDTrainer, {"divergence": "jsd", "beta": 0.3}, ROWS),
    (SKDTrainer, {"divergence": "forward_kl"}, OWN_PROMPTS),
    (SpecKDTrainer, {"gate": "greedy_top_k", "gate_top_k": 5, "rollout": "dataset"}, ROWS),
    (SpecKDTrainer, {"gate": "spec_k", "gate_normalizer": "accepted", "rollout": "dataset"}, OWN_PROMPTS),
]


@pytest.mark.parametrize(
    "trainer_class, ideas, rows", IDEAS, ids=["forward_kl", "jsd", "two prompts", "greedy_top_k", "spec_k"]
)
def test_recorded_scores_give_the_bits_of_the_loss_and_the_gradient_of_a_coarse_teacher_in_memory(
    tmp_path, trainer_class, ideas, rows
):
    settings = {"rollout": "dataset", "max_grad_norm": 0.0, "shuffle_dataset": False, **ideas}
    # The rows of each forward are those that were scored together: other batches round differently.
    settings |= {"gradient_accumulation_steps": 2, "train_sampling_strategy": "sequential"}
    recorded = make_trainer(
        tmp_path, scored(tmp_path / "scores", rows), trainer_class=without_teacher(trainer_class), **settings
    )
    other = make_trainer(tmp_path, rows, trainer_class=live(trainer_class), **settings)
    batches = [spy_on_trained_batches(trainer) for trainer in (recorded, other)]
    updates = [update_of(recorded), update_of(other)]
    assert "teacher_top_ids" in batches[0][0] and "teacher_top_ids" not in batches[1][0]
    assert torch.equal(*updates) and updates[0].norm() > 0.01
    assert losses(recorded) == losses(other)


def test_with_every_token_recorded_the_update_is_that_of_the_teacher_itself(tmp_path):
    settings = {"rollout": "dataset", "max_grad_norm": 0.0, "shuffle_dataset": False}
    rows = scored(tmp_path / "scores", top_k=259)
    update = update_of(make_trainer(tmp_path, rows, trainer_class=without_teacher(SKDTrainer), **settings))
    expected = update_of(make_trainer(tmp_path, ROWS, **settings))
    assert (update - expected).norm() < 1e-4 * expected.norm()


def test_an_evaluation_is_on_recorded_scores_too(tmp_path):
    rows = scored(tmp_path / "scores", top_k=259)
    settings = {"rollout": "dataset", "eval_dataset": rows}
    trainer = make_trainer(tmp_path, rows, trainer_class=without_teacher(SKDTrainer), **settings)
    expected = make_trainer(tmp_path, ROWS, rollout="dataset", eval_dataset=Dataset.from_list(ROWS))
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(expected.evaluate()["eval_loss"], rel=1e-4)
    assert "eval_student_entropy" in metrics and "eval_teacher_entropy" not in metrics


def test_no_teacher_is_in_memory_while_recorded_scores_are_trained_on(tmp_path):
    teacher = tiny_model(seed=2)
    watch = weakref.ref(teacher)
    rows = scored(tmp_path / "scores", model=teacher)
    del teacher
    gc.collect()
    assert watch() is None
    others = models_in_memory()  # of other tests
    trainer = make_trainer(tmp_path, rows, trainer_class=without_teacher(SKDTrainer), rollout="dataset")
    trainer.train()
    assert trainer.teacher_model is None and trainer._teacher.inner == []
    assert [x for x in models_in_memory() if not any(x is other for other in others)] == [trainer.model]


def models_in_memory():
    return [x for x in gc.get_objects() if type(x) is LlamaForCausalLM]


# Scoring


def test_what_is_written_is_the_teachers_top_k_beside_the_rows(tmp_path):
    rows, teacher = scored(tmp_path / "scores", OWN_PROMPTS, rows_per_file=3), tiny_model(seed=2)
    assert len(list((tmp_path / "scores").glob("*.parquet"))) == 3
    for row, given in zip(rows, OWN_PROMPTS, strict=True):
        assert row["completion"] == given["completion"]
        prompt, response = row["scored_prompt_ids"], row["scored_response_ids"]
        assert given["privileged_context"] in TOKENIZER.decode(prompt)
        with torch.no_grad():
            logits = teacher(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        values, ids = logits.topk(K)
        assert row["teacher_top_ids"] == ids.tolist()
        np.testing.assert_allclose(row["teacher_top_log_probs"], values, atol=1e-4)
        own = logits.gather(-1, torch.tensor(response)[:, None])[:, 0]
        np.testing.assert_allclose(row["teacher_label_log_probs"], own, atol=1e-4)


def test_a_column_of_the_rows_may_have_any_name(tmp_path):
    names = ("result", "row", "problem", "detail", "notes", "prompt_ids", "labels")
    rows = [{**row, **{name: f"{name} {number}" for name in names}} for number, row in enumerate(ROWS)]
    expected = scored(tmp_path / "plain").to_list()
    for number, (row, plain) in enumerate(zip(scored(tmp_path / "named", rows).to_list(), expected, strict=True)):
        assert row == {**plain, **{name: f"{name} {number}" for name in names}}


def test_a_killed_run_goes_on_where_it_was_with_any_number_of_processes(tmp_path, monkeypatch):
    whole = scored(tmp_path / "whole", rows_per_file=2)
    original, calls = scoring._scored, []

    def killed(*args):
        calls.append(None)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*args)

    options = ScoreOptions(top_k=K, batch_size=4, rows_per_file=2)
    arguments = Dataset.from_list(ROWS), tiny_model(seed=2), TOKENIZER, tmp_path / "killed", options
    monkeypatch.setattr(scoring, "_scored", killed)
    with pytest.raises(KeyboardInterrupt):
        score(*arguments)
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "killed").glob("*.parquet")}
    assert len(before) == 2
    with pytest.raises(
        ValueError, match=r"not scored to its end: 2 of its files are missing\. Give the same `skd score` again"
    ):
        load_rows(str(tmp_path / "killed"), "train")
    monkeypatch.setattr(scoring, "_scored", original)
    assert [score(*arguments, process=(rank, 3)) for rank in range(3)] == [2, 0, 2]  # block 3; none; block 2
    assert all(file.stat().st_mtime_ns == time for file, time in before.items())
    assert (
        read(tmp_path / "killed").to_list()
        == load_rows(str(tmp_path / "killed"), "train").to_list()
        == whole.to_list()
    )
    assert score(*arguments) == 0


def test_a_directory_goes_on_as_it_was_begun_or_not_at_all(tmp_path):
    scored(tmp_path / "scores")
    for change, name in (
        ({"top_k": 5}, "options"),
        ({"rows": ROWS[:5]}, "num_rows"),
        ({"model": tiny_model(seed=2).half()}, "dtype"),
    ):
        with pytest.raises(ValueError, match=f"begun with another .*{name}"):
            scored(tmp_path / "scores", **change)


def test_the_command_scores_a_file_in_two_processes(tmp_path):
    model = tiny_model(seed=2)
    model.save_pretrained(tmp_path / "teacher")
    TOKENIZER.save_pretrained(tmp_path / "teacher")
    Dataset.from_list(ROWS).to_json(tmp_path / "rows.jsonl")
    command = ["skd_trl", "score", "--model", "teacher", "--dataset", "rows.jsonl", "--output_dir", "scores"]
    command = [str(tmp_path / part) if part in ("teacher", "rows.jsonl", "scores") else part for part in command]
    options = ["--top_k", str(K), "--rows_per_file", "4", "--batch_size", "4"]
    outcome = launch(["torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", *command, *options])
    assert "Process 2 of 2 scored 4 rows" in outcome.output
    rows = read(tmp_path / "scores")
    assert rows.to_list() == scored(tmp_path / "here").to_list()
    outcome = launch(["skd_trl", "score", *command[2:], "--top_k", "0"], expect_failure=True)
    assert outcome.returncode == 2 and "top_k=0" in outcome.output


def test_a_folder_that_was_scored_into_is_a_data_set_of_the_train_command(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    for name, seed in (("student", 1), ("teacher", 2)):
        tiny_model(seed=seed).save_pretrained(tmp_path / name)
        TOKENIZER.save_pretrained(tmp_path / name)
    Dataset.from_list(ROWS).to_json(tmp_path / "rows.jsonl")
    paths = {name: str(tmp_path / name) for name in ("student", "teacher", "rows.jsonl", "scores", "out")}
    arguments = ["--model", paths["teacher"], "--dataset", paths["rows.jsonl"], "--output_dir", paths["scores"]]
    assert main(["score", *arguments, "--top_k", "5", "--rows_per_file", "3"]) == 0
    command = [
        "train",
        "--model_name_or_path",
        paths["student"],
        "--dataset_name",
        paths["scores"],
        "--rollout",
        "dataset",
    ]
    command += [
        "--output_dir",
        paths["out"],
        "--max_steps",
        "1",
        "--bf16",
        "false",
        "--use_cpu",
        "true",
        "--report_to",
        "none",
    ]
    command += ["--per_device_train_batch_size", "8", "--save_strategy", "no"]
    assert main([*command, "--compare", "false"]) == 0
    assert (tmp_path / "out" / "model.safetensors").exists()


# What is refused


def api_row(**changes):
    """A row with scores as an API gives them: no ids, no end of sequence."""
    response = TOKENIZER("ab").input_ids
    scores = [[response[i], 7, 8] for i in range(2)]
    log_probs = [[-0.5, -1.5, -3.0]] * 2
    return {
        "prompt": "q",
        "completion": "ab",
        "teacher_top_ids": scores,
        "teacher_top_log_probs": log_probs,
        **changes,
    }


def make_recorded(tmp_path, rows, **settings):
    return make_trainer(
        tmp_path, rows, trainer_class=without_teacher(SKDTrainer), **{"rollout": "dataset", **settings}
    )


def test_scores_of_somebody_else_work_and_the_unscored_end_is_counted(tmp_path, caplog):
    trainer = make_recorded(tmp_path, [api_row()] * 8)
    row = trainer.train_dataset[0]
    assert row["response_ids"] == TOKENIZER("ab").input_ids
    assert row["teacher_label_log_probs"] == [-0.5, -0.5]
    assert "In 8 of 8 rows of the train data set the end of sequence has no score" in caplog.text
    trainer.train()
    assert losses(trainer)[0] > 0


BAD = {
    "row 0: its scores are of 1|has 3 tokens and its scores are of 1": {"teacher_top_ids": [[1]], "teacher_top_log_probs": [[-1.0]]},
    "is not among the 3 scored there": {"teacher_top_ids": [[1, 2, 3]] * 2},
    "name a token twice": {"teacher_top_ids": [[64, 64, 3], [65, 1, 2]]},
    "sum to a probability of": {"teacher_top_log_probs": [[-0.1, -0.1, -0.1]] * 2},
    "NaN or values above 0": {"teacher_top_log_probs": [[0.5, -1.0, -1.0]] * 2},
    "name as many tokens at each position": {"teacher_top_ids": [[64], [65, 3]]},
    "its `teacher_top_log_probs` is empty": {"teacher_top_log_probs": None},
    "the id 1000; the last that can be used is 258": {"teacher_top_ids": [[64, 1000, 3], [65, 1, 2]]},
    "the teacher read another response: token 1 differs": {"scored_response_ids": [64, 64]},
    "the teacher read another prompt": {"scored_prompt_ids": [3]},
    "scored with another tokenizer": {"teacher_tokenizer": "0123"},
}  # fmt: skip


@pytest.mark.parametrize("message", BAD)
def test_scores_that_cannot_be_of_these_rows_are_refused_by_row(tmp_path, message):
    ids = TOKENIZER("ab").input_ids
    row = {name: BAD[message].get(name, value) for name, value in api_row().items()} | BAD[message]
    row["teacher_top_ids"] = [
        [ids[i - 64] if i in (64, 65) else i for i in position] for position in row["teacher_top_ids"]
    ]
    with pytest.raises(ValueError, match=re.compile(message, re.DOTALL)):
        make_recorded(tmp_path, [row])


def test_scores_without_those_of_the_first_token_are_not_taken_for_scores_without_the_end(tmp_path):
    row = {"prompt_ids": [1, 2], "response_ids": [5, 6, 7, 8], "teacher_label_log_probs": [-1.0] * 3}
    row |= {"teacher_top_ids": [[6], [7], [8]], "teacher_top_log_probs": [[-1.0]] * 3}
    with pytest.raises(ValueError, match="its response has 4 tokens and its scores are of 3"):
        make_recorded(tmp_path, [row])


@pytest.mark.parametrize("place", [1, 2])
def test_a_row_that_is_left_out_after_others_leaves_their_scores_as_they_are(tmp_path, caplog, place):
    rows = [api_row() for _ in range(3)]
    rows[place]["prompt"] = "q" * 30
    dataset = make_recorded(tmp_path, rows, max_prompt_length=10, shuffle_dataset=False).train_dataset
    assert "1 of 3 rows of the train data set" in caplog.text
    assert dataset[:] == make_recorded(tmp_path, [api_row()] * 2).train_dataset[:]


@pytest.mark.parametrize("place", [1, 2])
def test_a_row_with_scores_of_another_response_is_named_after_good_ones_too(tmp_path, place):
    rows = [api_row(scored_response_ids=TOKENIZER("ab").input_ids) for _ in range(3)]
    rows[place]["scored_response_ids"] = TOKENIZER("ac").input_ids
    with pytest.raises(ValueError, match=rf"\(row {place}: the teacher read another response: token 1 differs"):
        make_recorded(tmp_path, rows)


@pytest.mark.parametrize("ids", [TOKENIZER("ab").input_ids, [*TOKENIZER("ab").input_ids, TOKENIZER.eos_token_id]])
def test_scores_without_the_end_of_sequence_may_say_which_response_they_are_of(tmp_path, ids):
    expected = make_recorded(tmp_path, [api_row()]).train_dataset[:]
    assert make_recorded(tmp_path, [api_row(scored_response_ids=ids)]).train_dataset[:] == expected


def test_scores_that_a_formatting_func_leaves_out_are_those_of_the_row(tmp_path):
    rows = [{"question": row.pop("prompt"), "answer": row.pop("completion"), **row} for row in [api_row(), api_row()]]
    trainer = make_recorded(
        tmp_path, rows, formatting_func=lambda row: {"prompt": row["question"], "completion": row["answer"]}
    )
    assert trainer.train_dataset[:] == make_recorded(tmp_path, [api_row()] * 2).train_dataset[:]


def with_fewer(row, k=2):
    return {**row, **{name: [position[:k] for position in row[name]] for name in SCORES[:2]}}


def stream_of(rows):
    return Dataset.from_list(rows).to_iterable_dataset()


def test_a_stream_that_does_not_say_its_columns_is_known_by_its_first_row(tmp_path):
    trainer = make_recorded(tmp_path, IterableDataset.from_generator(lambda: iter([api_row()] * 2)))
    assert next(iter(trainer.train_dataset))["teacher_top_ids"] == api_row()["teacher_top_ids"]


def test_rows_with_different_numbers_of_scores_are_refused(tmp_path):
    rows = [api_row(), with_fewer(api_row())]
    with pytest.raises(ValueError, match=r"train data set have scores of \[2, 3\] tokens"):
        make_recorded(tmp_path, rows)
    evaluated = Dataset.from_list(rows)
    for given, name in ((evaluated, "eval"), ({"other": evaluated}, "other")):
        with pytest.raises(ValueError, match=rf"{name} data set have scores of \[2, 3\] tokens"):
            make_recorded(tmp_path, [api_row()], eval_dataset=given)
    with pytest.raises(ValueError, match=r"eval data set have scores of \[2, 3\] tokens"):
        make_recorded(tmp_path, [api_row()]).evaluate(evaluated)


def test_a_batch_of_streamed_rows_with_different_numbers_of_scores_is_refused(tmp_path):
    rows = [with_fewer(api_row()), api_row()]
    message = r"rows of a batch have scores of \[2, 3\] tokens"
    with pytest.raises(ValueError, match=message):
        make_recorded(tmp_path, stream_of(rows), per_device_train_batch_size=2).train()
    with pytest.raises(ValueError, match=message):
        make_recorded(tmp_path, [api_row()]).evaluate(stream_of(rows))


@pytest.mark.parametrize("make_set", [Dataset.from_list, stream_of])
def test_an_evaluation_set_with_fewer_scores_than_the_gate_needs_is_refused(tmp_path, make_set):
    settings = {"trainer_class": without_teacher(SpecKDTrainer), "rollout": "dataset", "gate_top_k": 3}
    few, message = make_set([with_fewer(api_row())]), "gate .*greedy_top_k needs 3"
    for given in (few, {"enough": Dataset.from_list([api_row()]), "few": few}):
        with pytest.raises(ValueError, match=message):
            make_trainer(tmp_path, [api_row()], eval_dataset=given, **settings)
    trainer = make_trainer(tmp_path, [api_row()], **settings)
    for ask in (trainer.evaluate, trainer.predict):
        with pytest.raises(ValueError, match=message):
            ask(few)


@pytest.mark.parametrize("schedule", [{"gate_top_k_end": 60}, {"schedules": {"gate_top_k": {"end": 60}}}])
def test_a_gate_that_comes_to_need_more_scores_than_there_are_is_refused_when_the_trainer_is_made(tmp_path, schedule):
    with pytest.raises(ValueError, match=f"{K} most probable tokens, but .*gate .*greedy_top_k needs 60"):
        make_trainer(
            tmp_path, scored(tmp_path / "scores", ROWS[:2]), trainer_class=without_teacher(SpecKDTrainer), rollout="dataset",
            gate_top_k=5, **schedule,
        )  # fmt: skip


def test_what_recorded_scores_cannot_give_is_refused_by_name_before_training(tmp_path):
    rows = scored(tmp_path / "scores", top_k=3)
    with pytest.raises(ValueError, match="judge no others: set rollout='dataset'"):
        make_recorded(tmp_path, rows, rollout="interleaved")
    with pytest.raises(ValueError, match="gate .*greedy_top_k needs 5"):
        make_trainer(tmp_path, rows, trainer_class=without_teacher(SpecKDTrainer), rollout="dataset", gate_top_k=5)
    with pytest.raises(ValueError, match="eval data set has no scores"):
        make_recorded(tmp_path, rows, eval_dataset=Dataset.from_list(ROWS))
    with pytest.raises(ValueError, match="There is no teacher"):
        make_recorded(tmp_path, ROWS)


def test_a_teacher_that_is_given_is_used_and_the_scores_are_not(tmp_path):
    settings = {"rollout": "dataset", "max_grad_norm": 0.0, "shuffle_dataset": False}
    rows = scored(tmp_path / "scores", top_k=3)
    assert torch.equal(
        update_of(make_trainer(tmp_path, rows, **settings)), update_of(make_trainer(tmp_path, ROWS, **settings))
    )
