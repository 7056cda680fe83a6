"""A user's training script: registers ideas under names, reads the command line or a YAML file, trains, writes what happened.

`python user_script.py --models DIR --output_dir OUT [--config FILE] --gate ...` writes `OUT/outcome.json`.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import user_ideas
from datasets import Dataset
from trl import TrlParser

from skd_trl import ACCEPTANCE_RULES, DIVERGENCES, GATES, SpecKDConfig, SpecKDTrainer


ROWS = [{"prompt": "q" * (3 + i), "completion": "ab" * (1 + (5 * i) % 7)} for i in range(8)]

ACCEPTANCE_RULES["one_in"] = user_ideas.OneIn
GATES["only_replaced"] = user_ideas.only_replaced
DIVERGENCES["brier"] = lambda: user_ideas.brier


class RecordingTrainer(SpecKDTrainer):
    """Keeps what it was trained on."""

    batches: list

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.batches.append(inputs)
        return super().training_step(model, inputs, num_items_in_batch)


def train(
    args: SpecKDConfig, models: Path, trainer_class: type[RecordingTrainer] = RecordingTrainer
) -> RecordingTrainer:
    trainer = trainer_class(
        model=str(models / "student"), teacher_model=str(models / "teacher"), args=args,
        train_dataset=Dataset.from_list(ROWS),
    )  # fmt: skip
    trainer.batches = []
    trainer.train()
    return trainer


def outcome(trainer: RecordingTrainer) -> dict:
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    texts = [labels[labels != -100].tolist() for batch in trainer.batches for labels in batch["labels"]]
    return {"losses": [entry["loss"] for entry in logs], "texts": texts}


@dataclass
class Arguments:
    models: str = field(default="", metadata={"help": "Directory of the models student and teacher."})


if __name__ == "__main__":
    arguments, args = TrlParser((Arguments, SpecKDConfig)).parse_args_and_config()
    result = outcome(train(args, Path(arguments.models)))
    (Path(args.output_dir) / "outcome.json").write_text(json.dumps(result))
