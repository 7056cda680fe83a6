"""Before and after: a student scored on the same held-out prompts before its first step and after its last.

Intervals are bootstrapped over prompts. The change has a paired interval: each resample takes the same prompts before and
after, so that what makes a prompt hard drops out.

    python examples/comparison.py --teacher examples/assets/teacher --before examples/assets/student-20 --after runs/demo
"""

import json
import time
from pathlib import Path

import numpy as np
from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedModel, TrainerCallback

from ..skd_trainer import SKDTrainer
from .scores import HeldOut, Scores, decode, decoding_for, evaluate, generate, held_out, rouge


logger = get_logger(__name__)

# Name in metrics.json -> (its row in the table, whether higher is better).
METRICS = {
    "kl_teacher_text": ("KL on teacher's text", False),
    "kl_student_samples": ("KL on student's samples", False),
    "rouge1_teacher": ("ROUGE-1 to teacher", True),
    "rouge2_teacher": ("ROUGE-2 to teacher", True),
    "rougeL_teacher": ("ROUGE-L to teacher", True),
    "rouge1_reference": ("ROUGE-1 to references", True),
    "rouge2_reference": ("ROUGE-2 to references", True),
    "rougeL_reference": ("ROUGE-L to references", True),
}
EXPLANATION = (
    "KL(teacher || student) in nats per token; texts are greedy, samples are drawn at temperature 1. In brackets: 95% "
    "paired bootstrap interval over prompts."
)


class HeldOutComparison(TrainerCallback):
    """
    Scores the student of a distillation trainer when training begins and, by `score("after")`, when it is over.

    When training begins, because models are then wrapped and sharded as they will be trained: before, some engines
    cannot run them. A resumed run takes the scores of before from `file`, which the first run wrote.
    """

    def __init__(self, trainer: SKDTrainer, rows: Dataset, file: Path):
        self.trainer, self.file = trainer, file
        self.tokenizer = trainer.processing_class
        self.data = held_out(rows, self.tokenizer)
        self.decoding = decoding_for(
            self.tokenizer,
            trainer.model,
            self.teacher,
            trainer.args.max_new_tokens,
            trainer.args.per_device_eval_batch_size,
        )
        self.before: Scores | None = None
        self.teacher_responses: list[list[int]] = []
        self.seconds: dict[str, float] = {}

    @property
    def teacher(self) -> PreTrainedModel:
        return self.trainer.accelerator.unwrap_model(self.trainer.teacher_model)

    def on_train_begin(self, args, state, control, **kwargs):
        saved = broadcast_object_list([read_scores(self.file, self.data) if state.global_step > 0 else None])[0]
        if saved is not None:
            self.before, self.teacher_responses = saved
            return
        if state.global_step > 0:
            logger.warning(f"{self.file} has no scores of these prompts: `before` is the checkpoint, not the start.")
        self.teacher_responses = generate(
            self.teacher, self.data.prompt_ids, decoding=self.decoding, description="teacher: greedy text"
        )
        self.before = self.score("before")
        if state.is_world_process_zero:
            write_scores(self.file, self.data, self.before, self.teacher_responses)

    def score(self, name: str) -> Scores:
        start = time.perf_counter()
        student = self.trainer.accelerator.unwrap_model(self.trainer.model)
        scores = evaluate(
            student,
            self.teacher,
            self.tokenizer,
            self.data,
            self.teacher_responses,
            decoding=self.decoding,
            name=name,
        )
        self.seconds[f"evaluation_{name}"] = round(time.perf_counter() - start, 1)
        return scores

    def compare_with(self, after: Scores) -> dict:
        """`comparison` for the table and metrics.json, and `examples` for the page."""
        answers = decode(self.tokenizer, self.teacher_responses)
        columns = (self.data.prompts, self.data.references, answers, self.before.responses, after.responses)
        names = ("prompt", "reference", "teacher", "before", "after")
        return {
            "comparison": compare(self.before, after, rouge(answers, self.data.references, suffix="reference")),
            "examples": [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)],
        }


def write_scores(file: Path, data: HeldOut, scores: Scores, teacher_responses: list[list[int]]) -> None:
    values = {name: array.tolist() for name, array in scores.values.items()}
    content = {"prompts": data.prompts, "responses": scores.responses, "values": values, "teacher": teacher_responses}
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(content))
    partial.replace(file)


def read_scores(file: Path, data: HeldOut) -> tuple[Scores, list[list[int]]] | None:
    """What `write_scores` wrote, or `None` if it did not or did for other prompts."""
    if not file.exists():
        return None
    content = json.loads(file.read_text())
    if content["prompts"] != data.prompts:
        return None
    values = {name: np.array(array) for name, array in content["values"].items()}
    return Scores(content["responses"], values), content["teacher"]


def compare(
    before: Scores, after: Scores, teacher: dict[str, np.ndarray], *, num_resamples: int = 2000, seed: int = 0
) -> dict:
    """
    Every metric before and after with its 95% bootstrap interval, the paired interval of the change, and the teacher's
    own value where it has one; a dictionary for metrics.json and for `comparison_table`.
    """
    num_rows = len(before.responses)
    resamples = np.random.default_rng(seed).integers(num_rows, size=(num_resamples, num_rows))

    def interval(value: float, resampled: np.ndarray) -> dict[str, float]:
        low, high = np.quantile(resampled, (0.025, 0.975))
        return {"value": float(value), "low": float(low), "high": float(high)}

    def ratio(values: np.ndarray, rows: np.ndarray) -> np.ndarray:
        total, weight = values[rows].sum(-2).T
        return total / np.maximum(weight, 1e-9)

    everything = np.arange(num_rows)
    metrics = {}
    for name, (_, higher_is_better) in METRICS.items():
        old, new = before.values[name], after.values[name]
        old_value, new_value = ratio(old, everything), ratio(new, everything)
        old_resampled, new_resampled = ratio(old, resamples), ratio(new, resamples)
        metrics[name] = {
            "before": interval(old_value, old_resampled),
            "after": interval(new_value, new_resampled),
            "change": interval(new_value - old_value, new_resampled - old_resampled),
            "teacher": float(ratio(teacher[name], everything)) if name in teacher else None,
            "better": "higher" if higher_is_better else "lower",
        }
    return {"num_prompts": num_rows, "metrics": metrics}


def verdict(metric: dict) -> str:
    """`better`, `worse`, or `unclear` where the interval of the change holds 0."""
    low, high = metric["change"]["low"], metric["change"]["high"]
    if low <= 0 <= high:
        return "unclear"
    return "better" if (low > 0) == (metric["better"] == "higher") else "worse"


def comparison_table(comparison: dict) -> Table:
    """The comparison for a terminal of 80 columns; metrics.json has the intervals of before and after too."""
    metrics = comparison["metrics"]
    own = [f"{metric['teacher']:.1f}" for metric in metrics.values() if metric["teacher"] is not None]
    table = Table(
        title=f"The student before and after, on {comparison['num_prompts']} held-out prompts",
        caption=f"{EXPLANATION} The teacher's own ROUGE-1/2/L to the references: {' / '.join(own)}.",
        caption_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
    )
    for heading, justify in zip(("", "before", "after", "change", ""), ("left", *["right"] * 3, "left"), strict=True):
        table.add_column(heading, justify=justify, no_wrap=True)
    colours = {"better": "bold green", "worse": "bold red", "unclear": "dim"}
    for name, metric in metrics.items():
        row = comparison_row(name, metric)
        table.add_row(
            *(Text(row[column]) for column in ("label", "before", "after", "change")),
            Text(row["verdict"], style=colours[row["verdict"]]),
            end_section=name in ("kl_student_samples", "rougeL_teacher"),
        )
    return table


def comparison_row(name: str, metric: dict) -> dict[str, str]:
    """One metric as the texts of its table cells, for the terminal and for the page."""
    digits = ".1f" if name.startswith("rouge") else ".2f"
    value, low, high = (metric["change"][key] for key in ("value", "low", "high"))
    return {
        "label": METRICS[name][0],
        "before": f"{metric['before']['value']:{digits}}",
        "after": f"{metric['after']['value']:{digits}}",
        "change": f"{value:+{digits}} [{low:+{digits}}, {high:+{digits}}]",
        "verdict": verdict(metric),
    }
