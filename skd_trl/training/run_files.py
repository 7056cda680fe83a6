"""What a run leaves in its output directory for its report, while it is still going on.

`logs.jsonl` has a line for each log, as the Trainer's state would have it at the end; `evaluation.json` the run's settings, and when
the run is over the comparison of before and after. So a run that was killed can be reported too.
"""

import json
import logging
import math
import os
from importlib.metadata import PackageNotFoundError, version
from itertools import count
from pathlib import Path
from typing import Any

from transformers import TrainerCallback


LOGS, EVALUATION, BEFORE, COMPLETIONS = "logs.jsonl", "evaluation.json", "before.json", "completions"
logger = logging.getLogger(__name__)
VERSIONS = ("skd_trl", "trl", "transformers", "torch", "datasets", "accelerate", "peft")
SETTINGS = (
    "rollout", "accept", "accept_top_k", "accept_kwargs", "num_draft_tokens", "temperature", "student_top_p",
    "teacher_temperature", "teacher_top_p", "divergence", "lmbda", "max_new_tokens", "gate", "gate_top_k", "gate_floor",
    "learning_rate", "max_steps", "seed",
)  # fmt: skip


class LogFile(TrainerCallback):
    """Appends each log to `output_dir/logs.jsonl` as it comes. A resumed run goes on after the step that it resumes from; a new run in the
    directory of another one puts that one's completions aside."""

    def on_train_begin(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        path = Path(args.output_dir) / LOGS
        path.parent.mkdir(parents=True, exist_ok=True)
        logs = read_logs(path) if state.global_step > 0 else []
        kept = [entry for entry in logs if entry.get("step", 0) <= state.global_step]
        partial = path.with_suffix(".partial")
        partial.write_text("".join(f"{as_json(entry)}\n" for entry in kept))
        os.replace(partial, path)
        completions = path.parent / COMPLETIONS
        if state.global_step == 0 and completions.is_dir() and any(completions.iterdir()):
            aside = next(name for i in count(1) if not (name := path.parent / f"{COMPLETIONS}-{i}").exists())
            completions.rename(aside)
            logger.warning(f"The completions of an earlier run are in {aside} now.")

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and logs:
            path = Path(args.output_dir) / LOGS
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a") as file:
                file.write(as_json({**logs, "step": state.global_step, "max_steps": state.max_steps}) + "\n")


def read_if_whole(path: Path) -> dict[str, Any] | None:
    """What a JSON file of a run holds; `None` if it is not there, or was cut when the run was killed or the disk was full."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def read_logs(path: Path) -> list[dict]:
    """The logs of a run so far; a line that was cut when the run was killed is left out."""
    entries = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            entries.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return entries


def as_json(content: Any, indent: int | None = None) -> str:
    """`content` as JSON, with null for each number that is not finite: JSON has no word for these, and strict readers refuse Python's."""
    return json.dumps(_without_infinite(content), indent=indent, allow_nan=False)


def _without_infinite(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _without_infinite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_without_infinite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def write_settings(output_dir: Path, settings: dict[str, Any], **more: Any) -> Path:
    """Writes `evaluation.json`, whole or not at all: `settings`, and what else there is by then."""
    output_dir.mkdir(parents=True, exist_ok=True)
    path = output_dir / EVALUATION
    partial = path.with_suffix(".partial")
    partial.write_text(as_json({"settings": settings, **more}, indent=2))
    os.replace(partial, path)
    return path


def run_settings(trainer) -> dict[str, Any]:
    """What a reader needs to place the figures of a run: settings of the method, rows of a step, device, versions."""
    args = trainer.args
    shown = args.to_dict()
    num_processes = trainer.accelerator.num_processes
    found = {name: shown[name] for name in SETTINGS if shown.get(name) is not None}
    found["num_draft_tokens"] = trainer.args.num_draft_tokens or "auto"
    return {
        **found,
        "rows_per_step": args.train_batch_size * args.gradient_accumulation_steps * num_processes,
        "device": str(args.device),
        "processes": num_processes,
        "versions": installed_versions(),
    }


def installed_versions(names: tuple[str, ...] = VERSIONS) -> dict[str, str]:
    """Versions of those packages that are installed."""
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            if name == "skd_trl":  # from a checkout
                import skd_trl

                found[name] = skd_trl.__version__
    return found
