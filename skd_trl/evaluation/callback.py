"""Evaluation inside a run: the student before its first step and after its last, and at each `trainer.evaluate()`.

Scored when training begins, because models are then wrapped and sharded as they will be trained: before, some engines cannot
run them.
"""

import json
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from torch import nn
from transformers import PreTrainedModel, TrainerCallback

from ..data.dataset import has_own_prompts
from ..skd_trainer import SKDTrainer
from ..training.distributed import agree_on_maximum, is_sharded
from ..training.run_files import BEFORE, as_json
from .comparison import compare
from .draft_model import Drafting
from .held_out import Decoding, HeldOut, held_out
from .scores import Evaluation, Scores, evaluate
from .text_metrics import TextMetric, scored, text_metrics
from .texts import decode, generate


logger = get_logger(__name__)


class HeldOutEvaluation(TrainerCallback):
    """
    Scores the student of a distillation trainer on held-out prompts: `before` when training begins, and by `score("after")` when
    it is over; with `at_evaluation` also whenever the trainer evaluates, among whose metrics they are then
    (`eval_kl_teacher_text` and so on).

    A resumed run takes the scores of before from `file`, which the first run wrote.

    Args:
        trainer ([`SKDTrainer`]): `trainer.add_callback(HeldOutEvaluation(trainer, rows))` does the rest.
        rows (`Dataset`): in any form that the trainer takes, prompts alone included.
        metrics (names or functions, *optional*): see `text_metrics.py`.
        drafting ([`Drafting`], *optional*): measures the student as a draft model too.
        at_evaluation (`bool`, *optional*, defaults to `True`): see above.
        file (`Path`, *optional*): by default `output_dir/before.json`.

    Raises:
        `ValueError`: for a teacher that cannot be compared with: recorded scores, several teachers, one that changes with the student,
            or one with prompts that differ from the student's.
    """

    def __init__(
        self,
        trainer: SKDTrainer,
        rows: Dataset,
        *,
        metrics: Iterable[str | TextMetric] | None = None,
        drafting: Drafting | None = None,
        at_evaluation: bool = True,
        file: Path | None = None,
    ):
        if reason := no_comparison_with(trainer):
            raise ValueError(
                f"Held-out prompts are compared with one teacher that reads what the student reads and stays as it is; {reason}. Leave "
                "the comparison out (skd train: --compare false), and compare afterwards with skd compare."
            )
        self.trainer, self.at_evaluation = trainer, at_evaluation
        self.file = file or Path(trainer.args.output_dir) / BEFORE
        args, tokenizer = trainer.args, trainer.processing_class
        longest = trainer._rules.max_prompt_length
        decoding = Decoding.of(
            tokenizer, self.student, self.teacher, args.max_new_tokens, args.per_device_eval_batch_size
        )
        self.data = held_out(
            rows, tokenizer, trainer.eos_token_ids, args.chat_template_kwargs, longest, decoding.vocab_size
        )
        self.evaluation = Evaluation(tokenizer, decoding, text_metrics(metrics), drafting)
        self.before: Scores | None = None
        self.teacher_responses: list[list[int]] = []
        self.seconds: dict[str, float] = {}

    @property
    def student(self) -> PreTrainedModel:
        return self.trainer.accelerator.unwrap_model(self.trainer.model)

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
        self.before = self.score("before")
        if state.is_world_process_zero:
            write_scores(self.file, self.data, self.before, self.teacher_responses, self.teacher_texts)

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        sets = self.trainer.eval_dataset
        # Of several evaluation sets, each of which calls this, the first is enough: the prompts here are the same.
        is_later = isinstance(sets, dict) and not any(
            key.startswith(f"eval_{next(iter(sets))}_") for key in metrics or ()
        )
        if not self.at_evaluation or metrics is None or is_later:
            return
        found = {f"eval_{name}": value for name, value in self.score("held-out").means().items()}
        metrics.update(found)
        self.trainer.log(found)

    def score(self, name: str) -> Scores:
        """The student's scores as it is now; collective."""
        start, decoding = time.perf_counter(), self.evaluation.decoding
        accelerator = self.trainer.accelerator
        if accelerator.num_processes > 1 and (is_sharded(self.student) or is_sharded(self.teacher)):
            decoding = replace(decoding, agree=agree_on_maximum(accelerator))
        if not self.teacher_responses:
            self.teacher_responses = generate(
                self.teacher, self.data.prompt_ids, decoding=decoding, description="teacher: greedy text"
            )
        evaluation = replace(self.evaluation, decoding=decoding)
        scores = evaluate(
            self.student, self.teacher, self.data, self.teacher_responses, evaluation=evaluation, name=name
        )
        seconds = self.seconds.get(f"evaluation_{name}", 0.0) + time.perf_counter() - start
        self.seconds[f"evaluation_{name}"] = round(seconds, 1)
        return scores

    @property
    def teacher_texts(self) -> list[str]:
        return decode(self.evaluation.tokenizer, self.teacher_responses)

    def compare_with(self, after: Scores) -> dict:
        """`comparison` for the table and metrics.json, and `examples` for the page."""
        answers = self.teacher_texts
        columns = (self.data.prompts, self.data.references, answers, self.before.responses, after.responses)
        names = ("prompt", "reference", "teacher", "before", "after")
        own = scored(self.evaluation.metrics, answers, self.data.references, "reference")
        comparison = compare(self.before, after, own)
        if self.evaluation.drafting is not None:
            comparison["num_draft_tokens"] = self.evaluation.drafting.num_draft_tokens
        return {
            "comparison": comparison,
            "examples": [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)],
        }


def no_comparison_with(trainer: SKDTrainer) -> str | None:
    """Why the teacher of this trainer is none to compare with, if it is not."""
    if not isinstance(trainer.teacher_model, nn.Module):
        return (
            "this run has several teachers"
            if trainer.teacher_model
            else "this run's is recorded scores, or behind a server"
        )
    if trainer.args.teacher_model_kind is not None:
        return f"this run's is the student itself (teacher_model_kind={trainer.args.teacher_model_kind!r})"
    if has_own_prompts(trainer.train_dataset):
        return "this run's reads prompts that differ from the student's"
    return None


def write_scores(
    file: Path, data: HeldOut, scores: Scores, teacher_responses: list[list[int]], teacher_texts: list[str]
) -> None:
    """Writes the scores of before, and what the page of an unfinished run shows of them: whole or not at all."""
    content = {
        "prompts": data.prompts,
        "references": data.references,
        "responses": scores.responses,
        "values": {name: array.tolist() for name, array in scores.values.items()},
        "teacher": teacher_responses,
        "teacher_texts": teacher_texts,
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    partial.write_text(as_json(content))
    partial.replace(file)


def read_scores(file: Path, data: HeldOut) -> tuple[Scores, list[list[int]]] | None:
    """What `write_scores` wrote, or `None` if it did not or did for other prompts."""
    if not file.exists():
        return None
    content = json.loads(file.read_text())
    if content["prompts"] != data.prompts:
        return None
    # A null, which stands for what is not a number, becomes one that is not.
    values = {name: np.array(array, dtype=np.float64) for name, array in content["values"].items()}
    return Scores(content["responses"], values), content["teacher"]
