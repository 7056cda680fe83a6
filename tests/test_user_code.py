"""What a user writes: a rule, a gate, a divergence and a schedule, as objects, and by name from Python, YAML and the command line.

`user_ideas.py` and `user_script.py` are the user's files. Each way trains two steps, and all of them take the same steps.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
import user_ideas
import user_script
import yaml
from test_examples import arguments_for, tiny_assets  # noqa: F401 (a fixture)
from tiny import byte_tokenizer, save_models

import skd_trl
from skd_trl import ACCEPTANCE_RULES, DIVERGENCES, GATES, Schedule, SpecKDConfig


TESTS = Path(__file__).parent
# What the script registers when it is imported. The tests of other files are not to see it.
REGISTERED = [
    (registry, name, registry.pop(name))
    for registry, name in ((ACCEPTANCE_RULES, "one_in"), (GATES, "only_replaced"), (DIVERGENCES, "brier"))
]
# Settings that every way has in common, as a YAML file would hold them.
COMMON = {
    "rollout": "interleaved", "max_steps": 2, "max_new_tokens": 12, "max_length": 64, "per_device_train_batch_size": 4,
    "num_draft_tokens": 3, "temperature": 1.0, "student_top_p": 1.0, "teacher_temperature": 1.0, "teacher_top_p": 1.0,
    "learning_rate": 1.0e-2, "logging_steps": 1, "save_strategy": "no", "report_to": "none", "use_cpu": True, "bf16": False,
    "disable_tqdm": True, "shuffle_dataset": False, "gradient_checkpointing": False,
}  # fmt: skip
# The references first, sampled texts after.
SCHEDULES = {"lmbda": {"start": 0.0, "end": 1.0, "shape": "step", "hold": 0.5}}
NAMED = {
    "accept": "one_in", "accept_kwargs": {"n": 2}, "gate": "only_replaced", "gate_floor": 0.5, "divergence": "brier",
    "schedules": SCHEDULES,
}  # fmt: skip
PATHS = {**NAMED, "accept": "user_ideas:OneIn", "gate": "user_ideas:only_replaced", "divergence": "user_ideas:brier"}


@pytest.fixture(scope="module", autouse=True)
def registered():
    with pytest.MonkeyPatch.context() as patch:
        for registry, name, idea in REGISTERED:
            patch.setitem(registry, name, idea)
        yield


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("models")
    save_models(directory, {"student": 1, "teacher": 2})
    return directory


def objects() -> dict:
    return {
        "accept": user_ideas.OneIn(2),
        "gate": user_ideas.only_replaced(floor=0.5),
        "divergence": user_ideas.brier,
        "schedules": {"lmbda": Schedule(0.0, 1.0, "step", 0.5)},
    }


class ByHand(user_script.RecordingTrainer):
    """Computes each step's loss as well as it can be read: on full logits, position by position."""

    by_hand: list

    def training_step(self, model, inputs, num_items_in_batch=None):
        mask = inputs["attention_mask"]
        places = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
        with torch.no_grad():
            student, teacher = (m(inputs["input_ids"], **places).logits for m in (self.model, self.teacher_model))
        total = 0.0
        for row, labels in enumerate(inputs["labels"]):
            for n, t in enumerate((labels != -100).nonzero().flatten().tolist()):
                p, q = teacher[row, t - 1].softmax(-1), student[row, t - 1].softmax(-1)
                is_replaced = "replaced" in inputs and bool(inputs["replaced"][row, n])
                total += (1.0 if is_replaced else 0.5) * 0.5 * ((p - q) ** 2).sum().item()
        self.by_hand.append(total / int((inputs["labels"] != -100).sum()))
        return super().training_step(model, inputs, num_items_in_batch)


@pytest.fixture(scope="module")
def with_objects(models, tmp_path_factory) -> user_script.RecordingTrainer:
    ByHand.by_hand = []
    return user_script.train(
        SpecKDConfig(str(tmp_path_factory.mktemp("objects")), **COMMON, **objects()), models, ByHand
    )


def test_the_schedule_takes_references_first_and_sampled_texts_after(with_objects):
    texts = user_script.outcome(with_objects)["texts"]
    tokenizer = byte_tokenizer()
    expected = [tokenizer(row["completion"]).input_ids + [tokenizer.eos_token_id] for row in user_script.ROWS]
    assert len(texts) == 8 and all(text in expected for text in texts[:4])
    assert not any(text in expected for text in texts[4:])
    assert ["replaced" in batch for batch in with_objects.batches] == [False, True]


def test_the_rule_keeps_even_tokens_alone(with_objects):
    (batch,) = with_objects.batches[1:]
    tokens = torch.cat([labels[labels != -100] for labels in batch["labels"]])
    replaced = torch.cat([flags[: (labels != -100).sum()] for flags, labels in zip(batch["replaced"], batch["labels"], strict=True)])  # fmt: skip
    assert 0.2 < replaced.float().mean() < 0.8
    assert (tokens[~replaced] % 2 == 0).all() and (tokens[replaced] % 2 == 1).any()


def test_the_gate_weighs_replaced_tokens_and_the_loss_is_the_divergences(with_objects):
    logs = [entry for entry in with_objects.state.log_history if "loss" in entry]
    assert [entry["token_acceptance_rate"] for entry in logs] == [0.0, pytest.approx(logs[1]["replaced_share"])]
    assert logs[1]["gate_weight"] == pytest.approx(0.5 + 0.5 * logs[1]["replaced_share"])
    # Logged losses have six digits at most; fp32 sums of 259 terms.
    assert [entry["loss"] for entry in logs] == pytest.approx(with_objects.by_hand, rel=1e-4)


def test_objects_are_shown_in_the_arguments_and_saved_with_the_model(with_objects, tmp_path):
    with_objects.save_model(str(tmp_path))
    saved = torch.load(tmp_path / "training_args.bin", weights_only=False)
    assert (saved.accept, saved.divergence) == ("OneIn(n=2)", "user_ideas:brier")
    assert json.loads(with_objects.args.to_json_string())["accept"] == "OneIn(n=2)"
    assert with_objects.args.accept == user_ideas.OneIn(2)


@pytest.mark.parametrize("settings", [NAMED, PATHS], ids=["registered", "module:attribute"])
def test_a_name_in_python_takes_the_same_steps_as_the_object(models, with_objects, tmp_path, settings):
    trainer = user_script.train(SpecKDConfig(str(tmp_path), **COMMON, **settings), models)
    assert user_script.outcome(trainer) == user_script.outcome(with_objects)


def run(command: list[str]) -> str:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)]),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.mark.parametrize("way", ["command line", "yaml", "yaml, module:attribute"])
def test_a_name_from_outside_takes_the_same_steps_as_the_object(models, with_objects, tmp_path, way):
    settings = {**COMMON, **(PATHS if "module" in way else NAMED), "output_dir": str(tmp_path), "models": str(models)}
    if way == "command line":
        values = {name: json.dumps(v) if isinstance(v, dict) else str(v) for name, v in settings.items()}
        arguments = [part for name, value in values.items() for part in (f"--{name}", value)]
    else:
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
        arguments = ["--config", str(tmp_path / "config.yaml")]
    run([str(TESTS / "user_script.py"), *arguments])
    assert json.loads((tmp_path / "outcome.json").read_text()) == user_script.outcome(with_objects)


def test_the_packages_own_script_takes_a_users_ideas_by_their_paths(tiny_assets):  # noqa: F811
    settings = {name: json.dumps(v) if isinstance(v, dict) else v for name, v in PATHS.items()}
    values = {**settings, "trainer": "speckd", "rollout": "interleaved", "num_eval_rows": 2, "max_new_tokens": 16}
    run([str(TESTS.parent / "examples" / "train_summarization.py"), *arguments_for(tiny_assets, **values)])
    history = json.loads((tiny_assets / "run" / "trainer_state.json").read_text())["log_history"]
    first, second = (entry for entry in history if "loss" in entry)
    assert first["token_acceptance_rate"] == 0.0 and first["gate_weight"] == 0.5 and "replaced_share" not in first
    assert 0 < second["replaced_share"] < 1
    assert second["token_acceptance_rate"] == pytest.approx(second["replaced_share"])
    assert (
        json.loads((tiny_assets / "run" / "evaluation.json").read_text())["settings"]["gate"]
        == "user_ideas:only_replaced"
    )
    kept = pd.read_parquet(next((tiny_assets / "run" / "completions").glob("*.parquet")))
    assert any(flag for flags in kept["replaced"] for flag in flags)


def test_the_users_files_import_public_names_only():
    for file in ("user_ideas.py", "user_script.py"):
        lines = [line for line in (TESTS / file).read_text().splitlines() if "skd_trl" in line and "import" in line]
        names = {name.strip() for line in lines for name in line.split(" import ")[1].split(",")}
        assert lines and all(line.startswith("from skd_trl import") for line in lines)
        assert names <= set(skd_trl.__all__)
