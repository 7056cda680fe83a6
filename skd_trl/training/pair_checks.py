"""The checks of a pair of models, by topic: `PAIR_CHECKS`, in the order of this file. A new one is a function of a `Pair` with a topic.

A check that runs models runs those of `Pair.running()`, and ends with `Pair.later()` if one was left out.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
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
from .distributed import is_sharded
from .findings import Verdict
from .limits import room_for_prompts
from .models import pad_token_id
from .padding_check import check_padding
from .router_logits import describe_left_out_loss
from .trained_parameters import reached_parameters


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
        waiting = {}
        if self.is_placed:
            return waiting
        for name, model in self.models.items():
            try:
                check_kind(model)
            except ValueError:  # it never runs
                continue
            try:
                with torch.no_grad(), eval_mode(model), attention_implementation(model, sampling_attention(model)):
                    ids = torch.tensor([[1, 2]], device=model.device)
                    model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
            except Exception as error:  # whatever a kernel says that is not for this device or type
                waiting[name] = error
        return waiting

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


PAIR_CHECKS: dict[str, Callable[[Pair], tuple[Verdict, str]]] = {}


def pair_check(topic: str):
    """Puts a check under its topic."""
    return lambda check: PAIR_CHECKS.setdefault(topic, check)


@pair_check("placement")
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


@pair_check("adapters")
def _check_adapters(pair: Pair) -> tuple[Verdict, str]:
    adapters = [pair.peft_config, *(getattr(model, "active_peft_config", None) for model in pair.models.values())]
    for adapter in adapters:
        check_adapter(adapter)
    kinds = [
        str(getattr(adapter.peft_type, "value", adapter.peft_type)) for adapter in adapters if adapter is not None
    ]
    return Verdict.GOOD, f"{', '.join(kinds) or 'None'}; no adapter adds tokens."


@pair_check("trained parameters")
def _check_trained_parameters(pair: Pair) -> tuple[Verdict, str]:
    if pair.peft_config is not None:
        return Verdict.UNCHECKED, "The trainer puts an adapter into the student, and looks at what that trains."
    return reached_parameters(pair.student)


@pair_check("sampling")
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


@pair_check("vocabulary")
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


@pair_check("ends of sequence")
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


@pair_check("room for prompts")
def _check_room(pair: Pair) -> tuple[Verdict, str]:
    room = room_for_prompts(pair.args, pair.student, pair.teacher)
    beside = f"beside max_new_tokens={pair.args.max_new_tokens}" if pair.args.samples else "and their references"
    if room is None:
        return Verdict.GOOD, f"Neither model nor the settings limit the prompts {beside}."
    return Verdict.GOOD, f"Prompts of up to {room} tokens {beside}; rows with longer ones are left out."


@pair_check("padding")
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


@pair_check("heads")
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


@pair_check("experts")
def _check_experts(pair: Pair) -> tuple[Verdict, str]:
    left_out = describe_left_out_loss(pair.student, pair.args.router_aux_loss_coef)
    return (Verdict.GOOD, "The divergence is the whole loss.") if left_out is None else (Verdict.WARNING, left_out)


# Those that run the models.
RUN_CHECKS = ("sampling", "padding", "heads")
