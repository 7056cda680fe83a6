"""What a run looked like: metrics.json, training.png and samples.html, from the files the run left behind.

Reads the log (`trainer_state.json`, or `logs.jsonl` of a run that is not over), `completions/*.parquet` (sampled responses) and, where
`skd train` wrote them, `evaluation.json` and `before.json`. A run that is still going on or was killed is reported up to where it is.
The page needs nothing but itself: no network, no script (`page.py`, `plots.py`).
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from ..training.run_files import BEFORE, EVALUATION, LOGS, as_json, read_if_whole, read_logs
from .page import render_page
from .plots import plot_training, series


STATE = "trainer_state.json"
# A run's end writes its log and its state within this time.
SAME_RUN_SECONDS = 60.0
COLUMNS = ["step", "prompt", "response", "tokens", "replaced", "proposals", "is_fixed"]


@dataclass(frozen=True)
class Run:
    """What a run's directory holds. `examples` have prompt, reference, teacher, before, and after where the run is over."""

    name: str
    history: list[dict]
    completions: pd.DataFrame
    evaluation: dict
    examples: list[dict]

    @property
    def last_step(self) -> int:
        return max((entry.get("step", 0) for entry in self.history), default=0)

    @property
    def num_steps(self) -> int:
        """Steps of the whole training, as far as is known."""
        known = [entry["max_steps"] for entry in self.history if entry.get("max_steps", 0) > 0]
        return known[-1] if known else self.last_step

    @property
    def is_over(self) -> bool:
        """Whether a training has ended at the last step: one that was made longer and resumed has older ends."""
        return any("train_runtime" in entry for entry in self.history if entry.get("step", 0) == self.last_step)


def write_report(run_dir: Path) -> list[Path]:
    """Writes the three files into `run_dir`, and returns their paths.

    Raises:
        `FileNotFoundError`: if the directory holds no log.
    """
    run = read_run(run_dir)
    metrics, plot, page = (run_dir / name for name in ("metrics.json", "training.png", "samples.html"))
    metrics.write_text(as_json(summarize(run), indent=2))
    plot_training(run.history, plot, title=f"{run.name}: loss, and who wrote the tokens")
    page.write_text(render_page(run), encoding="utf-8")
    return [metrics, plot, page]


def read_run(run_dir: Path) -> Run:
    """All that the report shows of a run."""
    evaluation = read_if_whole(run_dir / EVALUATION) or {}
    return Run(
        name=run_dir.resolve().name,
        history=read_history(run_dir),
        completions=read_completions(run_dir),
        evaluation={key: value for key, value in evaluation.items() if key != "examples"},
        examples=evaluation.get("examples") or examples_before(read_if_whole(run_dir / BEFORE) or {}),
    )


def read_history(run_dir: Path) -> list[dict]:
    """The log of the run that was made last in this directory: that of its end, or the one that was written while it went on, and only
    where neither is there a checkpoint's. A state that was cut, as by a full disk, is left out."""
    for paths in ([run_dir / LOGS, run_dir / STATE], [*run_dir.glob(f"checkpoint-*/{STATE}")]):
        found = [(path.stat().st_mtime, log) for path in paths if (log := _read_log(path))]
        if found:
            newest = max(time for time, _ in found)
            # Both are of one run where they were written together, or copied.
            logs = [log for time, log in found if newest - time < SAME_RUN_SECONDS]
            return max(logs, key=lambda log: (max(entry.get("step", 0) for entry in log), len(log)))
    raise FileNotFoundError(
        f"{run_dir} holds no logs.jsonl and no trainer_state.json that can be read, nor does a checkpoint in it, so there is no log to "
        "report. Give the output directory of a run by `skd train`, or of one that called trainer.save_state() or saved a checkpoint."
    )


def _read_log(path: Path) -> list[dict]:
    """The entries of a `logs.jsonl` or of a Trainer's state; none if it is not there or holds no step."""
    if path.name == LOGS:
        log = read_logs(path)
    else:
        state = read_if_whole(path) or {"log_history": []}
        log = [*state["log_history"], {"max_steps": state.get("max_steps", 0)}]
    return log if any("step" in entry for entry in log) else []


def read_completions(run_dir: Path) -> pd.DataFrame:
    files = sorted((run_dir / "completions").glob("*.parquet"))
    if not files:
        return pd.DataFrame(columns=COLUMNS)
    rows = pd.concat([pd.read_parquet(file) for file in files], ignore_index=True)
    # Files of earlier releases do not know prompts that are sampled again and again.
    return rows.assign(is_fixed=rows["is_fixed"].eq(True) if "is_fixed" in rows else False)


def examples_before(before: dict) -> list[dict]:
    """The held-out prompts of a run that has not been scored at its end."""
    names = {"prompts": "prompt", "references": "reference", "teacher_texts": "teacher", "responses": "before"}
    if not all(name in before for name in names):
        return []
    return [dict(zip(names.values(), row, strict=True)) for row in zip(*map(before.get, names), strict=True)]


def summarize(run: Run) -> dict:
    """
    The content of metrics.json: the evaluation's comparison and settings, and of every logged quantity its first and
    last value and its mean over the run.
    """
    training = {}
    for name in sorted({name for entry in run.history for name in entry} - {"step", "epoch", "max_steps"}):
        values = series(run.history, name)[1]
        if len(values):
            training[name] = {"first": values[0], "last": values[-1], "mean": float(np.mean(values))}
    progress = {"step": run.last_step, "num_steps": run.num_steps, "is_over": run.is_over}
    return {**run.evaluation, "progress": progress, "training": training}
