"""The options of `skd train`: those of its trainer's configuration, TRL's `ModelConfig`, and `TrainArguments`."""

import argparse
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from .._compat import ModelConfig, ScriptArguments
from ..evaluation.text_metrics import text_metrics
from ..skd_config import SKDConfig
from ..skd_trainer import SKDTrainer
from ..speckd_config import SpecKDConfig
from ..speckd_trainer import SpecKDTrainer
from .options import Command
from .rows import RowTemplates


TRAINERS = {"skd": (SKDConfig, SKDTrainer), "speckd": (SpecKDConfig, SpecKDTrainer)}


@dataclass
class TrainArguments(RowTemplates, ScriptArguments):
    """What `skd train` takes beside the configuration of its trainer and TRL's `ModelConfig`; each is explained in its help."""

    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "A data set of the hub, a .jsonl, .json, .parquet or .csv file, or a folder with a file for each split."
        },
    )
    trainer: str = field(default="skd", metadata={"help": "Which trainer.", "choices": list(TRAINERS)})
    teacher_sft: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Fine-tune the whole teacher on the references first: fields of SFTConfig, such as "
            '\'{"max_steps": 80, "learning_rate": 2e-4}\'.'
        },
    )
    student_sft: dict[str, Any] | str | None = field(default=None, metadata={"help": "The same for the student."})
    num_train_rows: int = field(default=0, metadata={"help": "Rows to train on, a random sample; 0 is all."})
    num_eval_rows: int = field(
        default=200,
        metadata={
            "help": "Held-out prompts for the comparison before and after, a random sample; 0 is all. Without a test split they are "
            "taken out of the training rows, a tenth of these at most."
        },
    )
    compare: bool | None = field(
        default=None,
        metadata={
            "help": "Whether to compare the student before and after on held-out prompts. Default: where the run has one teacher, in this "
            "process."
        },
    )
    compare_at_evaluation: bool = field(
        default=False,
        metadata={"help": "Whether the held-out prompts are also scored at each evaluation (see eval_strategy)."},
    )
    metrics: list[str] | None = field(
        default=None,
        metadata={
            "help": "Metrics of the student's texts: rouge, exact_match, or your own as module:function. Default: rouge, where "
            "rouge-score is installed."
        },
    )
    draft_rows: int = field(
        default=16,
        metadata={
            "help": "On how many held-out prompts the student is measured as the teacher's draft model; 0 is none of them."
        },
    )

    def __post_init__(self):
        if self.trainer not in TRAINERS:
            raise ValueError(f"trainer={self.trainer!r} is unknown; choose one of {', '.join(TRAINERS)}.")
        if not self.dataset_name:
            raise ValueError(
                "dataset_name is not set; give a data set of the hub, a .jsonl, .json, .parquet or .csv file, or a folder of them."
            )
        for name in ("num_train_rows", "num_eval_rows", "draft_rows"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} has to be 0 or more.")
        for name in ("teacher_sft", "student_sft"):
            value = getattr(self, name)
            setattr(self, name, json.loads(value) if isinstance(value, str) else value)
        if self.compare is not False:
            text_metrics(self.metrics)  # an unknown one is told before models are loaded


def train_command(trainer: str = "skd") -> Command:
    """`skd train` for one trainer's configuration."""
    of_speckd = set(SpecKDConfig.__dataclass_fields__) - set(SKDConfig.__dataclass_fields__)
    return Command(
        "train",
        "Distils a teacher into a student: SKD, or with --trainer speckd SpecKD. Options may stand in a YAML file; the command "
        "line overrides it.",
        (TrainArguments, TRAINERS[trainer][0], ModelConfig),
        "  skd train --model_name_or_path STUDENT --teacher_model_name_or_path TEACHER \\\n"
        "      --dataset_name rows.jsonl --output_dir out",
        lambda name: "It belongs to SpecKD's trainer: add --trainer speckd." if name in of_speckd else None,
    )


def chosen_trainer(arguments: list[str]) -> str:
    """`--trainer` of the command line, or else of the file, or else SKD; which fields there are depends on it."""
    parser = argparse.ArgumentParser(prog="skd train", usage=train_command().usage, add_help=False, allow_abbrev=False)
    parser.add_argument("--trainer", choices=list(TRAINERS))
    parser.add_argument("--config", type=Path)
    known, _ = parser.parse_known_args(arguments)
    if known.trainer is None and known.config is not None and known.config.is_file():
        with train_command().one_line_errors():
            settings = yaml.safe_load(known.config.read_text())
        known.trainer = settings.get("trainer") if isinstance(settings, dict) else None
    return known.trainer if known.trainer in TRAINERS else "skd"
