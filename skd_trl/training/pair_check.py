"""Does this pair work? Every check of models, tokenizer and settings that comes before training, by topic.

`check_pair` needs the loaded pair alone; `check_launch` what a launcher has set up around it. A check returns a verdict with
its detail, or raises `ValueError` for a pair that cannot be trained: what was found, why it cannot work, what to change. The
trainers raise the first refusal; `python -m skd_trl check` prints all findings.

Some kernels (FP8, GPTQ, AWQ, flash attention) run on a GPU alone, or in 16 bits alone. What is found by running a model is found by
`check_placed` then, when the model is where it will be used, and if need be under autocast.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.vocabulary import (
    check_vocabularies,
    describe_end_of_sequence_difference,
    end_of_sequence_ids,
    shared_vocab_size,
)
from ..loss.lm_head import LMHead
from ..sampling.admission import check_adapter, check_kind, check_one_device, prove
from ..sampling.ragged_cache import attention_implementation, eval_mode, sampling_attention
from ..skd_config import SKDConfig
from .distributed import check_connected, check_engine, check_head, is_sharded
from .engine_settings import check_settings
from .limits import room_for_prompts
from .models import pad_token_id
from .padding_check import check_padding
from .router_logits import describe_left_out_loss, without_router_logits
from .trained_parameters import check_trained_parameters, describe_lost_updates


logger = get_logger(__name__)


class Verdict(StrEnum):
    GOOD = "good"
    WARNING = "warning"
    REFUSED = "refused"
    LATER = "checked once the models are placed"
    UNCHECKED = "not checked"


@dataclass(frozen=True)
class Finding:
    """What a check found about one topic; `detail` is a sentence for people."""

    topic: str
    verdict: Verdict
    detail: str


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
        return [_finding(topic, check, pair) for topic, check in PAIR_CHECKS.items()]


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
        return [_finding(topic, PAIR_CHECKS[topic], pair) for topic in RUN_CHECKS]


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


def is_incomplete(findings: list[Finding]) -> bool:
    """Whether something is left for `check_placed`."""
    return any(finding.verdict == Verdict.LATER for finding in findings)


def check_launch(
    student: PreTrainedModel, teacher: PreTrainedModel, args: SKDConfig, accelerator: Accelerator
) -> list[Finding]:
    """Whether the engine that was launched can train the pair, and what it trains, in which precision. `student` has its adapter by
    then."""
    return [
        _finding("engine", _check_engine, student, teacher, args, accelerator),
        _finding("trained parameters", _check_trained, student),
        _finding("precision", _check_precision, student, accelerator),
    ]


def require(findings: list[Finding]) -> None:
    """Logs warnings, and raises `ValueError` with the detail of the first refusal."""
    for finding in findings:
        if finding.verdict == Verdict.REFUSED:
            raise ValueError(finding.detail)
        if finding.verdict == Verdict.WARNING:
            logger.warning(finding.detail)


def _finding(topic: str, check: Callable[..., tuple[Verdict, str]], *args) -> Finding:
    try:
        return Finding(topic, *check(*args))
    except ValueError as error:
        return Finding(topic, Verdict.REFUSED, str(error))
    except Exception as error:  # whatever a model raises that cannot run on plain rows of tokens
        logger.debug(f"The check of {topic} failed.", exc_info=True)
        return Finding(
            topic,
            Verdict.REFUSED,
            f"The check of {topic} ended with {type(error).__name__}: {error}. Training would fail in the same way: use "
            "causal language models that take rows of input_ids and an attention_mask, or report this pair.",
        )


@dataclass(frozen=True)
class Pair:
    """What the checks look at. Models that are placed run, or are refused."""

    student: PreTrainedModel
    teacher: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    args: SKDConfig
    peft_config: Any
    is_placed: bool = False

    @property
    def models(self) -> dict[str, PreTrainedModel]:
        return {"student": self.student, "teacher": self.teacher}

    @cached_property
    def waiting(self) -> dict[str, Exception]:
        """By name, the models that could be trained by their kind and do not run two tokens where they were loaded, and why."""
        if self.is_placed:
            return {}
        return {name: error for name, model in self.models.items() if (error := _error_of(model)) is not None}

    def later(self) -> tuple[Verdict, str]:
        """The finding of a check that could not run all models."""
        name, error = next(iter(self.waiting.items()))
        said = f"{type(error).__name__}: {error}".strip().splitlines()[0][:200]
        detail = (
            f"The {name} does not run where it was loaded ({said}); it is run again on its device, as it is trained."
        )
        return Verdict.LATER, detail

    def running(self) -> dict[str, PreTrainedModel]:
        """The models that run where they are."""
        return {name: model for name, model in self.models.items() if name not in self.waiting}


def _error_of(model: PreTrainedModel) -> Exception | None:
    try:
        check_kind(model)
    except ValueError:  # it never runs
        return None
    try:
        with torch.no_grad(), eval_mode(model), attention_implementation(model, sampling_attention(model)):
            ids = torch.tensor([[1, 2]], device=model.device)
            model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    except Exception as error:  # whatever a kernel says that is not for this device or type
        return error
    return None


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


def _check_placement(pair: Pair) -> tuple[Verdict, str]:
    if pair.teacher is pair.student:
        check_one_device("The student", pair.student)
        return Verdict.GOOD, "The student is its own teacher, on one device."
    of_student = {id(parameter) for parameter in pair.student.parameters()}
    if any(id(parameter) in of_student for parameter in pair.teacher.parameters()):
        raise ValueError(
            "The teacher shares weights with the student (an adapter is put into the model that it is given, which is then "
            "the student too), and would change with every step. Load it a second time for the teacher."
        )
    for name, model in pair.models.items():
        check_one_device(f"The {name}", model)
        if any(parameter.is_meta for parameter in model.parameters()) and not is_sharded(model):
            raise ValueError(
                f"The {name} has weights on the meta device: they were never loaded in this process. Under FSDP set "
                "fsdp_cpu_ram_efficient_loading: false in the accelerate config (examples/accelerate/fsdp2.yaml), or load the "
                "model before the trainer is made."
            )
    return Verdict.GOOD, "Two models that share no weights, each on one device."


def _check_adapters(pair: Pair) -> tuple[Verdict, str]:
    adapters = [pair.peft_config, *(getattr(model, "active_peft_config", None) for model in pair.models.values())]
    for adapter in adapters:
        check_adapter(adapter)
    kinds = [
        str(getattr(adapter.peft_type, "value", adapter.peft_type)) for adapter in adapters if adapter is not None
    ]
    return Verdict.GOOD, f"{', '.join(kinds) or 'None'}; no adapter adds tokens."


def _check_trained_parameters(pair: Pair) -> tuple[Verdict, str]:
    if pair.peft_config is not None:
        return Verdict.UNCHECKED, "The trainer puts an adapter into the student, and looks at what that trains."
    return _check_trained(pair.student)


def _check_trained(student: PreTrainedModel) -> tuple[Verdict, str]:
    return Verdict.GOOD, f"The loss reaches {check_trained_parameters(student)} parameters of the student."


def _check_sampling(pair: Pair) -> tuple[Verdict, str]:
    if not pair.args.samples:
        return Verdict.UNCHECKED, "No step of this run samples responses (rollout='dataset' or lmbda=0)."
    if any(map(is_sharded, pair.models.values())):
        for model in pair.models.values():
            check_kind(model)
        return (
            Verdict.UNCHECKED,
            "Parameters are sharded: the models are proved at the first sampling, when an engine runs them.",
        )
    proofs = {name: prove(model) for name, model in pair.running().items()}
    if pair.waiting:
        return pair.later()
    figures = "; ".join(
        f"{name} {proof.error:.1e} (rounding: below {proof.limit:.1e})" for name, proof in proofs.items()
    )
    return Verdict.GOOD, f"Hidden states on the sampler's cache are those without a cache: {figures}."


def _check_vocabulary(pair: Pair) -> tuple[Verdict, str]:
    loading: Any = pair.args.teacher_model_init_kwargs or {}
    doubt = check_vocabularies(
        pair.student,
        pair.teacher,
        pair.tokenizer,
        revision=loading.get("revision"),
        trust_remote_code=pair.args.trust_remote_code,
    )
    sizes = [model.config.get_text_config().vocab_size for model in pair.models.values()]
    shared = f"The student's head has {sizes[0]} ids, the teacher's {sizes[1]}; the first {min(sizes)} are compared."
    return (Verdict.GOOD, shared) if doubt is None else (Verdict.WARNING, doubt)


def _check_ends(pair: Pair) -> tuple[Verdict, str]:
    ids = end_of_sequence_ids(pair.student, pair.teacher, pair.tokenizer)
    if not ids:
        return Verdict.WARNING, (
            "Neither model nor the tokenizer names an end of sequence, so every response runs to max_new_tokens. Set "
            "`tokenizer.eos_token`, or `generation_config.eos_token_id` of the models."
        )
    difference = describe_end_of_sequence_difference(pair.student, pair.teacher, pair.tokenizer)
    if difference is not None:
        return Verdict.WARNING, difference
    return Verdict.GOOD, "Responses end at " + ", ".join(
        f"{i} ({pair.tokenizer.convert_ids_to_tokens(i)!r})" for i in ids
    )


def _check_room(pair: Pair) -> tuple[Verdict, str]:
    room = room_for_prompts(pair.args, pair.student, pair.teacher)
    beside = f"beside max_new_tokens={pair.args.max_new_tokens}" if pair.args.samples else "and their references"
    if room is None:
        return Verdict.GOOD, f"Neither model nor the settings limit the prompts {beside}."
    return Verdict.GOOD, f"Prompts of up to {room} tokens {beside}; rows with longer ones are left out."


def _check_padding(pair: Pair) -> tuple[Verdict, str]:
    for name, model in pair.models.items():
        if is_sharded(model):
            return Verdict.UNCHECKED, f"The {name}'s parameters are sharded, and the check would need them whole."
    vocab_size = shared_vocab_size(pair.student, pair.teacher)
    special, padding = set(pair.tokenizer.all_special_ids), pad_token_id(pair.tokenizer, vocab_size)
    ids = [i for i in range(vocab_size) if i not in special]
    errors = [check_padding(name, model, ids, padding) for name, model in pair.running().items()]
    if pair.waiting:
        return pair.later()
    return Verdict.GOOD, f"A row's hidden states do not depend on what follows it (difference {max(errors):.1e})."


def _check_heads(pair: Pair) -> tuple[Verdict, str]:
    for name, model in pair.models.items():
        if is_sharded(model):
            return Verdict.UNCHECKED, f"The {name}'s parameters are sharded, and the check would need them whole."
    for name, model in pair.running().items():
        with attention_implementation(model, sampling_attention(model)):
            is_known = LMHead.of(model).verify(model)
        if not is_known:
            if any(not p.isfinite().all() for p in LMHead.of(model).parameters() if p.is_floating_point()):
                raise ValueError(
                    f"The {name}'s head, of {type(model).__name__}, has NaN or infinite weights. Load its weights again, or a "
                    "checkpoint from before they were damaged."
                )
            raise ValueError(
                f"The {name}, {type(model).__name__}, does not compute its logits as a linear map of its last hidden states with a "
                "scale and a soft cap, "
                "so the loss would be computed on wrong logits. Use another architecture, or report this one."
            )
    if pair.waiting:
        return pair.later()
    return Verdict.GOOD, "The logits that the loss makes from hidden states are the models' own."


def _check_experts(pair: Pair) -> tuple[Verdict, str]:
    left_out = describe_left_out_loss(pair.student, pair.args.router_aux_loss_coef)
    return (Verdict.GOOD, "The divergence is the whole loss.") if left_out is None else (Verdict.WARNING, left_out)


PAIR_CHECKS: dict[str, Callable[[Pair], tuple[Verdict, str]]] = {
    "placement": _check_placement,
    "adapters": _check_adapters,
    "trained parameters": _check_trained_parameters,
    "sampling": _check_sampling,
    "vocabulary": _check_vocabulary,
    "ends of sequence": _check_ends,
    "room for prompts": _check_room,
    "padding": _check_padding,
    "heads": _check_heads,
    "experts": _check_experts,
}


# Those that run the models.
RUN_CHECKS = ("sampling", "padding", "heads")


def _check_engine(
    student: PreTrainedModel, teacher: PreTrainedModel, args: SKDConfig, accelerator: Accelerator
) -> tuple[Verdict, str]:
    check_connected(accelerator)
    check_engine(accelerator, args.shard_teacher, args.compile_student)
    check_settings(args, accelerator, student, teacher)
    for name, model in (("student", student), ("teacher", teacher)):
        check_head(LMHead.of(model), name, accelerator)
    kind = getattr(accelerator.distributed_type, "value", accelerator.distributed_type)
    engine = "without an engine that shards" if kind in ("NO", "MULTI_CPU", "MULTI_GPU") else f"under {kind}"
    return Verdict.GOOD, f"{accelerator.num_processes} process(es) {engine}."


def _check_precision(student: PreTrainedModel, accelerator: Accelerator) -> tuple[Verdict, str]:
    lost = describe_lost_updates(student, accelerator)
    return (Verdict.GOOD, "The optimizer moves weights in fp32.") if lost is None else (Verdict.WARNING, lost)
