"""Does this pair work? Every check of models, tokenizer and settings that comes before training.

`check_pair` needs the loaded pair alone; `check_launch` (launch_check.py) what a launcher has set up around it. Some kernels (FP8,
GPTQ, AWQ, flash attention) run on a GPU alone, or in 16 bits alone. What is found by running a model is found by `check_placed`
then, when the model is where it will be used, and if need be under autocast.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..skd_config import SKDConfig
from .distributed import is_sharded
from .findings import Finding, Verdict, finding_of
from .pair_checks import PAIR_CHECKS, RUN_CHECKS, Pair
from .router_logits import without_router_logits


def check_pair(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    args: SKDConfig | None = None,
    peft_config: Any = None,
) -> list[Finding]:
    """One finding for each of `PAIR_CHECKS`, in their order, on the models as they were loaded: not wrapped, not moved.

    Args:
        student, teacher ([`~transformers.PreTrainedModel`]): the pair; a `PeftModel` may be the student.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): the student's.
        args ([`SKDConfig`], *optional*): how they will be trained; by default a default configuration.
        peft_config ([`~peft.PeftConfig`], *optional*): the adapter that the student will get.

    Both models run a few tokens, unless something shards their parameters, or a model does not run where it was loaded.
    """
    if args is None:
        args = SKDConfig("unused", bf16=False, use_cpu=not torch.cuda.is_available())
    pair = Pair(student, teacher, tokenizer, args, peft_config)
    with without_router_logits(student, teacher):
        return [finding_of(topic, check, pair) for topic, check in PAIR_CHECKS.items()]


def check_placed(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    args: SKDConfig,
    accelerator: Accelerator,
) -> list[Finding]:
    """What `check_pair` left for later, with models on the device of `accelerator` and in its precision. A student that its engine has not
    moved yet is moved for this."""
    pair = Pair(student, teacher, tokenizer, args, None, is_placed=True)
    with (
        accelerator.autocast(),
        without_router_logits(student, teacher),
        _moved_to(student, accelerator.device),
        _moved_to(teacher, accelerator.device),
    ):
        return [finding_of(topic, PAIR_CHECKS[topic], pair) for topic in RUN_CHECKS]


@contextmanager
def _moved_to(model: PreTrainedModel, device: torch.device) -> Iterator[None]:
    before = model.device
    if before.type == device.type or is_sharded(model):
        yield
        return
    try:
        model.to(device)  # type: ignore[arg-type]
        yield
    finally:
        model.to(before)  # type: ignore[arg-type]


def check_teacher_differs(kind: str, has_own_prompts: bool) -> Finding:
    """Whether a student that is its own teacher (`teacher_model_kind`) has anything to learn from it."""
    topic, missing = "teacher", "and no row says that it reads another prompt (`privileged_context`, `teacher_prompt`)"
    if kind == "live" and not has_own_prompts:
        return Finding(
            topic,
            Verdict.REFUSED,
            f"teacher_model_kind='live': the teacher is the student as it is, {missing}, so the two never differ and every loss is 0. "
            "Add one of these columns, or choose 'base' or 'ema'.",
        )
    if not has_own_prompts:
        return Finding(
            topic,
            Verdict.WARNING,
            f"teacher_model_kind={kind!r}: the teacher is the student that training starts from, {missing}. A new student equals it, "
            "and then nothing is learned: the loss is 0 and has no gradient.",
        )
    return Finding(topic, Verdict.GOOD, f"The teacher is the student ({kind}) with its own prompts.")
