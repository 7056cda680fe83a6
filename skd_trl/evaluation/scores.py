"""How near a student is to its teacher, and to the references, on held-out prompts.

Every metric is kept by prompt, so `comparison.py` can pair what was before with what is after. What needs no reference (the
divergences, texts compared with the teacher's, the student as a draft model) is there for prompts alone too.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .divergence import token_divergence
from .draft_model import Drafting, draft_acceptance
from .held_out import Decoding, HeldOut
from .text_metrics import TextMetric, scored, text_metrics
from .texts import decode, generate


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Metric:
    """How a metric is shown: its label, whether higher is better, digits after the point."""

    label: str
    higher_is_better: bool
    digits: int


METRICS = {
    "kl_teacher_text": Metric("KL on teacher's text", False, 2),
    "kl_student_samples": Metric("KL on student's samples", False, 2),
    "rouge1_teacher": Metric("ROUGE-1 to teacher", True, 1),
    "rouge2_teacher": Metric("ROUGE-2 to teacher", True, 1),
    "rougeL_teacher": Metric("ROUGE-L to teacher", True, 1),
    "rouge1_reference": Metric("ROUGE-1 to references", True, 1),
    "rouge2_reference": Metric("ROUGE-2 to references", True, 1),
    "rougeL_reference": Metric("ROUGE-L to references", True, 1),
    "draft_accepted_greedy": Metric("drafts accepted %, greedy", True, 1),
    "draft_tokens_per_forward_greedy": Metric("tokens/forward, greedy", True, 2),
    "draft_accepted_sampled": Metric("drafts accepted %, T=1", True, 1),
    "draft_tokens_per_forward_sampled": Metric("tokens/forward, T=1", True, 2),
}


@dataclass(frozen=True)
class Scores:
    """
    What a student did on each held-out prompt.

    `values` maps a metric's name to an array `(rows, 2)`: what the row adds to the metric, and the row's weight (1 for
    ROUGE, the number of tokens for a divergence, 0 where the row has no part). The metric is the sum of the first column over
    that of the second. `lower_is_better` names those of the user's metrics that say so.
    """

    responses: list[str]
    values: dict[str, np.ndarray]
    lower_is_better: frozenset[str] = frozenset()

    def means(self) -> dict[str, float]:
        """The metrics over all rows."""
        sums = {name: values.sum(0) for name, values in self.values.items()}
        return {name: float(total / weight) for name, (total, weight) in sums.items() if weight > 0}


@dataclass(frozen=True)
class Evaluation:
    """What is evaluated, and how.

    Attributes:
        tokenizer, decoding: how texts are written and read.
        metrics (`dict` of name and [`TextMetric`]): of the student's greedy texts. By default ROUGE, where it is installed.
        drafting ([`Drafting`], *optional*): how the student is measured as a draft model; not at all if `None`.
        divergence (`Callable`, *optional*): of student's and teacher's logits; KL(teacher || student) by default.
    """

    tokenizer: PreTrainedTokenizerBase
    decoding: Decoding
    metrics: dict[str, TextMetric] = field(default_factory=text_metrics)
    drafting: Drafting | None = None
    divergence: Callable | None = None


def evaluate(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    data: HeldOut,
    teacher_responses: list[list[int]],
    *,
    evaluation: Evaluation,
    name: str = "student",
) -> Scores:
    """Scores `student` on `data`; `teacher_responses` are the teacher's greedy ones, from `generate`. `name` is what progress bars
    call it."""
    decoding, tokenizer = evaluation.decoding, evaluation.tokenizer
    write = partial(generate, student, data.prompt_ids, decoding=decoding)
    greedy = write(description=f"{name}: greedy text")
    samples = write(do_sample=True, description=f"{name}: samples")
    compared = partial(
        token_divergence, student, teacher, data.prompt_ids, decoding=decoding, divergence=evaluation.divergence
    )
    responses = decode(tokenizer, greedy)
    targets = {"teacher": decode(tokenizer, teacher_responses), "reference": data.references}
    texts, lower_is_better = text_scores(evaluation.metrics, responses, targets)
    return Scores(
        responses=responses,
        values={
            "kl_teacher_text": compared(teacher_responses, description=f"{name}: KL on the teacher's text"),
            "kl_student_samples": compared(samples, description=f"{name}: KL on its own samples"),
            **texts,
            **as_draft_model(student, teacher, data, evaluation, name),
        },
        lower_is_better=lower_is_better,
    )


def text_scores(
    metrics: dict[str, TextMetric], responses: list[str], targets: dict[str, Sequence[str | None]]
) -> tuple[dict[str, np.ndarray], frozenset[str]]:
    """The columns of all metrics to each kind of target, and the names of those of metrics with `higher_is_better = False`."""
    columns, lower = {}, set()
    for suffix, texts in targets.items():
        for name, metric in metrics.items():
            found = scored({name: metric}, responses, texts, suffix)
            columns |= found
            if not getattr(metric, "higher_is_better", True):
                lower |= found.keys()
    return columns, frozenset(lower)


def as_draft_model(
    student: PreTrainedModel, teacher: PreTrainedModel, data: HeldOut, evaluation: Evaluation, name: str
) -> dict[str, np.ndarray]:
    """The columns of `evaluation.drafting`. None, with a warning, for models that the sampler cannot run: what they write alone is
    still worth comparing."""
    drafting, columns = evaluation.drafting, {}
    if drafting is None:
        return {}
    num_rows = min(drafting.num_rows or len(data), len(data))
    for temperature in drafting.temperatures:
        called = {0.0: "greedy", 1.0: "sampled"}.get(temperature, f"t{temperature:g}")
        try:
            found = draft_acceptance(
                student,
                teacher,
                data.prompt_ids[:num_rows],
                decoding=evaluation.decoding,
                num_draft_tokens=drafting.num_draft_tokens,
                temperature=temperature,
                description=f"{name}: drafts for the teacher, {called}",
            )
        except ValueError as error:
            logger.warning(f"The student was not measured as a draft model: {error}")
            return {}
        rest = np.zeros((len(data) - num_rows, 2))
        columns |= {f"draft_{key}_{called}": np.concatenate([values, rest]) for key, values in found.items()}
    return columns
