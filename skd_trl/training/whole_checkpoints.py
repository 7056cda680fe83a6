"""Checkpoints that a run can be resumed from.

The Trainer writes `trainer_state.json` last, so a run that was killed while it saved, or whose disk was full, leaves a checkpoint
without that file, or with a piece of it. Such a checkpoint is left out. The weights are not looked at.
"""

import re
from pathlib import Path

from accelerate import Accelerator
from accelerate.logging import get_logger
from transformers.trainer import TRAINER_STATE_NAME

from .run_files import read_if_whole


logger = get_logger(__name__)


def last_whole_checkpoint(output_dir: str | Path) -> Path | None:
    """The newest checkpoint that is whole, `None` if there is none. Newer ones that are left out are named in a warning."""
    for path in reversed(_checkpoints(output_dir)):
        if is_whole(path):
            return path
        found = "cannot be read to its end" if (path / TRAINER_STATE_NAME).exists() else "is missing"
        logger.warning(
            f"{path} is left out: its {TRAINER_STATE_NAME} {found}, so the run ended while it saved. An older checkpoint is resumed, "
            "if there is one."
        )
    return None


def whole_checkpoints(output_dir: str | Path) -> list[Path]:
    """The checkpoints in a run's output directory that are whole, oldest first."""
    return [path for path in _checkpoints(output_dir) if is_whole(path)]


def is_whole(checkpoint: Path) -> bool:
    """Whether the Trainer's state is there to its end."""
    return read_if_whole(checkpoint / TRAINER_STATE_NAME) is not None


def check_resumable(checkpoint: str | Path, accelerator: Accelerator, max_steps: int) -> None:
    """Refuses a checkpoint of weights alone under an engine that resumes from files of its kind, and one of the last of `max_steps`, after
    which the Trainer would train one more; the same on all ranks.

    Raises:
        `ValueError`: with what to do.
    """
    step = (read_if_whole(Path(checkpoint) / TRAINER_STATE_NAME) or {}).get("global_step", 0)
    if 0 < max_steps <= step:
        raise ValueError(
            f"{checkpoint} is of step {step}, and max_steps={max_steps}: that training is over. Raise max_steps to go on."
        )
    files = {"DEEPSPEED": "global_step*", "FSDP": "pytorch_model_fsdp*"}.get(str(accelerator.distributed_type.value))
    if files and Path(checkpoint).is_dir() and not any(Path(checkpoint).glob(files)):
        engine = "DeepSpeed" if files.startswith("global") else "FSDP"
        raise ValueError(
            f"{checkpoint} has no {files}, from which {engine} resumes: it was saved with save_only_model=True, or by another engine. Give "
            "it as `model` and start without resume_from_checkpoint."
        )


def _checkpoints(output_dir: str | Path) -> list[Path]:
    by_step = {
        int(found[1]): path
        for path in Path(output_dir).glob("checkpoint-*")
        if (found := re.fullmatch(r"checkpoint-(\d+)", path.name))
    }
    return [by_step[step] for step in sorted(by_step)]
