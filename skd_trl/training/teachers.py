"""The trainer's teacher, whatever it is: who judges what is sampled, and what the loss is told.

A teacher gives a participant for the sampling and a `TeacherSignal` for each micro-batch. The signal is made before the student's
forward, as the forward of a sharded teacher is collective; heads are made whole around the loss (`whole_signal`).

Shapes: B rows, S columns, T the longest response, N response tokens of a micro-batch, H hidden.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import reduce

import torch
from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedModel

from ..data.batches import Key, ResponseTokens, as_teacher_reads, model_inputs, teacher_prompts_of
from ..loss.lm_head import LMHead
from ..loss.several_teachers import HiddenStatesOfSeveral
from ..loss.teacher_signal import HiddenStates, TeacherSignal, TopLogProbs
from ..sampling.other_device import OnOtherDevice
from ..sampling.participants import LocalParticipant, Participant
from ..sampling.prompts import Prompts
from ..sampling.ragged_cache import eval_mode
from ..sampling.sampling_params import SamplingParams
from ..sampling.several_teachers import SeveralTeachers
from .distributed import agree_on_maximum, whole_head
from .last_hidden_states import last_hidden_states


# What the forward of a teacher on given responses needs of a batch, by row.
READ = (
    Key.INPUT_IDS,
    Key.ATTENTION_MASK,
    Key.LABELS,
    Key.PROMPTS,
    Key.PROMPT_ATTENTION_MASK,
    Key.TEACHER_PROMPTS,
    Key.TEACHER_PROMPT_ATTENTION_MASK,
)


class Teacher(ABC):
    """What a trainer asks of its teacher."""

    inner: list[PreTrainedModel]  # the models in this process, without their wrappers

    @abstractmethod
    def participant(
        self, window: dict[str, torch.Tensor], sampling: SamplingParams, vocab_size: int, accelerator: Accelerator
    ) -> Participant:
        """Who judges responses to the prompts of a `window` of micro-batches."""

    @abstractmethod
    def signal(self, batch: dict[str, torch.Tensor], tokens: ResponseTokens) -> TeacherSignal:
        """What is known of the teacher at the N response tokens of a micro-batch: from the sampling, if it judged them. Heads may
        be sharded."""

    @abstractmethod
    def keep(self, batch: dict[str, torch.Tensor], tokens: ResponseTokens, signal: TeacherSignal) -> None:
        """Leaves a micro-batch's signal in it: the next `signal` costs no forward."""


class OneTeacher(Teacher):
    """A model in this process; `prepared` is what an engine made of it, `device` where it is, if not where the batches are."""

    def __init__(self, inner: PreTrainedModel, prepared: nn.Module, device: torch.device | None = None):
        self.inner, self.prepared, self.device = [inner], prepared, device

    def participant(self, window, sampling, vocab_size, accelerator) -> Participant:
        prompts = Prompts(*(values.to(self.device) for values in teacher_prompts_of(window)))
        model = accelerator.unwrap_model(self.prepared)
        return LocalParticipant(model, sampling, prompts=prompts, vocab_size=vocab_size)

    def signal(self, batch, tokens) -> HiddenStates:
        if Key.TEACHER_HIDDEN_STATES in batch:
            states = tokens.pick(batch[Key.TEACHER_HIDDEN_STATES])
        else:
            states = hidden_states(self.inner[0], self.prepared, batch, tokens, self.device)
        return HiddenStates(states, LMHead.of(self.inner[0]))

    def keep(self, batch, tokens, signal) -> None:
        assert isinstance(signal, HiddenStates)
        batch[Key.TEACHER_HIDDEN_STATES] = tokens.as_rows(signal.states)


class RecordedTeacher(Teacher):
    """Scores that lie beside the rows: no model at all. It judges nothing."""

    inner = []

    def participant(self, window, sampling, vocab_size, accelerator) -> Participant:
        raise NotImplementedError("Recorded scores are of given responses; the configuration refuses to sample.")

    def signal(self, batch, tokens) -> TopLogProbs:
        names = Key.TEACHER_TOP_IDS, Key.TEACHER_TOP_LOG_PROBS, Key.TEACHER_LABEL_LOG_PROBS
        return TopLogProbs(*(tokens.pick(batch[name]) for name in names))

    def keep(self, batch, tokens, signal) -> None:
        """It is in the batch."""


class TeachersByRow(Teacher):
    """Several models in this process; `teacher_index` of a batch (B,) says which of them a row belongs to.

    Where a forward is collective (`is_collective`), each of them runs as often on every process: idle where it has no row."""

    def __init__(
        self,
        inner: list[PreTrainedModel],
        prepared: list[nn.Module],
        is_collective: bool,
        device: torch.device | None = None,
    ):
        self.inner, self.prepared, self.is_collective, self.device = inner, prepared, is_collective, device

    def participant(self, window, sampling, vocab_size, accelerator) -> Participant:
        (ids, mask), which = teacher_prompts_of(window), window[Key.TEACHER_INDEX]
        teachers = [
            LocalParticipant(
                accelerator.unwrap_model(model),
                sampling,
                prompts=Prompts(ids[which == i].to(self.device), mask[which == i].to(self.device)),
                vocab_size=vocab_size,
            )
            for i, model in enumerate(self.prepared)
        ]
        agree = agree_on_maximum(accelerator) if self.is_collective else None
        return SeveralTeachers(teachers, which.tolist(), agree)

    def signal(self, batch, tokens) -> HiddenStatesOfSeveral:
        which, parts, positions = batch[Key.TEACHER_INDEX], [], []
        kept = batch.get(Key.TEACHER_HIDDEN_STATES)
        for i, inner in enumerate(self.inner):
            positions.append((which[tokens.rows] == i).nonzero().flatten())
            if kept is not None:
                width = inner.config.get_text_config().hidden_size
                states = tokens.pick(kept)[positions[-1], :width].to(inner.dtype)
            else:
                states = self._forward(i, batch)
            parts.append(HiddenStates(states, LMHead.of(inner)))
        return HiddenStatesOfSeveral(tuple(parts), tuple(positions), len(tokens.labels))

    def _forward(self, teacher: int, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """The hidden states (M, H) of one teacher at the response tokens of its rows."""
        is_own = batch[Key.TEACHER_INDEX] == teacher
        is_idle = not bool(is_own.any())
        if is_idle and not self.is_collective:
            inner = self.inner[teacher]
            width = inner.config.get_text_config().hidden_size
            return torch.empty((0, width), dtype=inner.dtype, device=is_own.device)
        chosen = torch.ones_like(is_own) if is_idle else is_own
        own = {name: values[chosen] for name, values in batch.items() if name in READ}
        tokens = ResponseTokens.of(own)
        states = hidden_states(self.inner[teacher], self.prepared[teacher], own, tokens, self.device)
        return states[:0] if is_idle else states

    def keep(self, batch, tokens, signal) -> None:
        assert isinstance(signal, HiddenStatesOfSeveral)
        width = max(part.states.shape[-1] for part in signal.parts)
        dtype = reduce(torch.promote_types, (part.states.dtype for part in signal.parts))
        states = torch.zeros((len(signal), width), dtype=dtype, device=tokens.labels.device)
        for part, own in zip(signal.parts, signal.positions, strict=True):
            states[own, : part.states.shape[-1]] = part.states.to(dtype)
        batch[Key.TEACHER_HIDDEN_STATES] = tokens.as_rows(states)


class TeacherElsewhere(Teacher):
    """A teacher whose models are on another device than the student's, its `device`. What it reads goes there, its judgement and its
    hidden states come back, and the loss has a copy of its head (of each, if there are several) beside the student's."""

    def __init__(self, teacher: OneTeacher | TeachersByRow):
        self.teacher, self.inner = teacher, teacher.inner
        self.heads: dict[int, LMHead] = {}

    def participant(self, window, sampling, vocab_size, accelerator) -> Participant:
        prompts = Prompts(*(values.to(self.teacher.device) for values in teacher_prompts_of(window)))
        teacher = self.teacher.participant(window, sampling, vocab_size, accelerator)
        return OnOtherDevice(teacher, prompts, window[Key.PROMPTS].device)

    def signal(self, batch, tokens) -> TeacherSignal:
        return self.teacher.signal(batch, tokens).with_heads(lambda head: self._beside(head, tokens.labels.device))

    def keep(self, batch, tokens, signal) -> None:
        self.teacher.keep(batch, tokens, signal)

    @torch.no_grad()
    def _beside(self, head: LMHead, device: torch.device) -> LMHead:
        key = id(head.module if head.weight is None else head.weight)
        if key not in self.heads:
            tensors = {"weight": head.weight, "bias": head.bias}
            moved = {name: tensor.detach().to(device) for name, tensor in tensors.items() if tensor is not None}
            module = None if head.module is None else copy.deepcopy(head.module).to(device)
            self.heads[key] = replace(head, **moved, module=module)
        return self.heads[key]


def hidden_states(
    inner: PreTrainedModel,
    prepared: nn.Module,
    batch: dict[str, torch.Tensor],
    tokens: ResponseTokens,
    device: torch.device | None = None,
) -> torch.Tensor:
    """The hidden states (N, H) that predict the response tokens of a batch, by a forward on what the teacher reads; it runs on
    `device`, if not where the batch is."""
    own = as_teacher_reads(batch)
    inputs = {name: values.to(device) for name, values in model_inputs(own).items()}
    with eval_mode(prepared):
        hidden = last_hidden_states(prepared, inner, **inputs).to(tokens.labels.device)
    return (tokens if own is batch else ResponseTokens.of(own)).predicted_by(hidden)


@contextmanager
def whole_signal(signal: TeacherSignal) -> Iterator[TeacherSignal]:
    """The signal with its heads whole, whatever shards them."""
    with ExitStack() as stack:
        yield signal.with_heads(lambda head: stack.enter_context(whole_head(head)))
