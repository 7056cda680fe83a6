"""Weighted distillation loss from both models' last hidden states: sum over positions of weight x divergence.

Full logits `(N, V)` are never built. One pass goes over chunks of positions: the student's logits, what the teacher's
signal says of the same positions, divergence, gate, statistics, and at once the gradient with respect to the student's
hidden states and its trainable head, so nothing is recomputed in backward. The caller chooses the positions (logits at t
predict token t+1; prompts and padding have no business here) and divides by their number over the whole optimizer step.

Shapes: N positions, V vocabulary, H hidden (each model its own).
"""

from collections.abc import Callable, Collection, Sized
from dataclasses import dataclass

import torch
from torch import Tensor

from .chunks import chunks
from .divergences import at_labels
from .gates import Gate, GateWeights
from .head_gradients import AttachGradients, HeadGradients
from .response_facts import ResponseFacts
from .teacher_signal import HiddenStates, TeacherSignal, check_signal
from .token_distributions import STATISTICS, check_statistics


REPLACED_LOSSES = ("divergence", "nll")


@dataclass(frozen=True)
class DistillationLoss:
    """
    Attributes:
        loss (`Tensor`, scalar, fp32):
            Sum of weight x divergence over positions, not divided by anything; the only field with a gradient.
        divergence (`Tensor` `(N,)`):
            What was weighted, nats; with `replaced_loss="nll"` the negative log-likelihood at replaced tokens.
        weight (`Tensor` `(N,)`), accepted (`Tensor` `(N,)`, bool):
            Ones and `True` without a gate.
        statistics (`dict` of `Tensor` `(N,)`):
            What was asked for, by name.
    """

    loss: Tensor
    divergence: Tensor
    weight: Tensor
    accepted: Tensor
    statistics: dict[str, Tensor]


def distillation_loss(
    student: HiddenStates,
    teacher: TeacherSignal,
    facts: ResponseFacts,
    *,
    divergence: Callable[[Tensor, Tensor], Tensor],
    gate: Gate | GateWeights | None = None,
    replaced_loss: str = "divergence",
    vocab_size: int,
    chunk_size: int | None = None,
    statistics: Collection[str] = (),
) -> DistillationLoss:
    """
    Weighted divergence between two models at N positions.

    Differentiable (once, and by one backward) in the student's hidden states and the trainable tensors of its head; the
    gradient is computed here, not in backward, unless gradients are off. Head gradients are summed over chunks in fp32.
    Under ZeRO-3 or FSDP the tensors of both heads must be whole during this call.

    Args:
        student (`HiddenStates`):
            The student's last hidden states `(N, H)` at the positions that predict the response's tokens, and its head.
            N may be 0.
        teacher (`HiddenStates` or `TopLogProbs`):
            What is known of the teacher at the same positions.
        facts (`ResponseFacts`):
            What is known of the response's tokens. Labels are below `vocab_size`.
        divergence (`Divergence`):
            An entry of `DIVERGENCES`, made; or any function of student and teacher logits `(N, V)` that returns
            `(N,)`. With `TopLogProbs` it gets the log-probabilities of the k + 1 outcomes.
        gate (`Gate` or `GateWeights`, *optional*):
            Weighs the positions, in the same pass (a gate over a population costs a pass more, see `gate_weights`); or
            weights known beforehand.
        replaced_loss (`str`, defaults to `"divergence"`):
            With `"nll"` the student's negative log-likelihood of the label takes the divergence's place where
            `facts.replaced` (CA-OPD, IPD). Weights apply there too.
        vocab_size (`int`):
            Tokens that both models share; logits beyond are cut before anything is computed.
        chunk_size (`int`, *optional*):
            Positions per chunk; default [`default_chunk_size`] (`chunks.py`).
        statistics (names, *optional*):
            Which of `STATISTICS` to compute along with it.

    Raises:
        `ValueError`: arguments about different numbers of positions, a head that is not whole, an unknown statistic or
            `replaced_loss`, and what the teacher's signal cannot give (see `check_signal`).
    """
    if replaced_loss not in REPLACED_LOSSES:
        raise ValueError(f"replaced_loss={replaced_loss!r} is unknown; choose one of {', '.join(REPLACED_LOSSES)}.")
    check_statistics(statistics)
    own_gate = gate if isinstance(gate, Gate) else None
    check_signal(teacher.top_k, vocab_size, gate=own_gate, divergence=divergence, statistics=statistics)
    if own_gate is not None and own_gate.select is not None:
        gate = gate_weights(student, teacher, facts, gate=own_gate, vocab_size=vocab_size, chunk_size=chunk_size)
    _check_positions(student=student, teacher=teacher, facts=facts, gate=gate)
    whole_student, whole_teacher = _prepared(student, teacher, vocab_size)

    gradients, trainable = None, []
    if torch.is_grad_enabled():
        trainable = ([student.states] if student.states.requires_grad else []) + student.head.trainable_parameters()
    if trainable:
        # Whether weights of 0 are worth looking for, which makes the host wait for the device.
        skip_zeros = gate.floor == 0 if isinstance(gate, Gate) else gate is not None and bool((gate.weight == 0).any())
        gradients = HeadGradients(student.states, student.head, whole_student.head, skip_zeros)

    table: dict[str, Tensor] = {}
    for rows in chunks(len(facts), vocab_size, student.states.device, chunk_size):
        weights_or_gate = gate[rows] if isinstance(gate, GateWeights) else gate
        columns = _chunk(
            rows, whole_student[rows], whole_teacher[rows], facts[rows], weights_or_gate,
            divergence, replaced_loss, statistics, gradients,
        )  # fmt: skip
        _move(table, rows, columns, len(facts))
    total = (table["weight"] * table["divergence"]).sum()
    if gradients is not None:
        total = AttachGradients.apply(total, gradients.sums_for(trainable), *trainable)
    own = {name: table.pop(name) for name in ("divergence", "weight", "accepted")}
    return DistillationLoss(loss=total, **own, statistics=table)


@torch.no_grad()
def gate_weights(
    student: HiddenStates,
    teacher: TeacherSignal,
    facts: ResponseFacts,
    *,
    gate: Gate,
    vocab_size: int,
    chunk_size: int | None = None,
    population: Callable[[Tensor], tuple[Tensor, slice]] | None = None,
) -> GateWeights:
    """
    The weights alone, without gradient: for normalisers that need their sum before the first backward, and for gates
    that compare positions with each other. These compare the N positions given here, or what `population` makes of their
    scores `(N, ...)`: the scores of all processes, and where one's own are among them. Other arguments, and what is
    raised, as in `distillation_loss`.
    """
    check_signal(teacher.top_k, vocab_size, gate=gate)
    _check_positions(student=student, teacher=teacher, facts=facts)
    student, teacher = _prepared(student, teacher, vocab_size)
    table: dict[str, Tensor] = {}
    for rows in chunks(len(facts), vocab_size, student.states.device, chunk_size):
        logits = student.head.logits(student.states[rows], vocab_size)
        distributions = teacher[rows].compare(logits, facts.labels[rows])
        with torch.autocast(logits.device.type, enabled=False):
            _move(table, rows, {"scores": gate.scores(distributions, facts[rows])}, len(facts))
        del logits, distributions  # or the next chunk's would be beside them
    together, own = table["scores"], slice(None)
    if gate.select is not None and population is not None:
        together, own = population(together)
    return gate.weights(gate.acceptance(together)[own], facts)


def _chunk(
    rows: slice,
    student: HiddenStates,
    teacher: TeacherSignal,
    facts: ResponseFacts,
    gate: Gate | GateWeights | None,
    divergence: Callable[[Tensor, Tensor], Tensor],
    replaced_loss: str,
    statistics: Collection[str],
    gradients: HeadGradients | None,
) -> dict[str, Tensor]:
    """Everything about one chunk, `rows` of all positions; its tensors of vocabulary width die with this function."""
    learning = gradients is not None
    through_module = learning and student.head.module is not None
    with torch.set_grad_enabled(through_module):
        hidden = student.states.detach().requires_grad_(through_module)
        raw = student.head.project(hidden)
    raw_leaf = raw.detach().requires_grad_(learning)
    without_autocast = torch.autocast(raw.device.type, enabled=False)  # it would take some reductions to bf16

    with torch.set_grad_enabled(learning):
        distributions = teacher.compare(student.head.shape_logits(raw_leaf), facts.labels)

    with torch.no_grad(), without_autocast:
        if isinstance(gate, Gate):
            weights = gate.weights(gate.acceptance(gate.scores(distributions, facts)), facts)
        elif gate is None:
            ones = torch.ones(len(facts), device=raw.device)
            weights = GateWeights(ones, ones.bool())
        else:
            weights = GateWeights(gate.weight.detach(), gate.accepted)

    with torch.set_grad_enabled(learning), without_autocast:
        of_log_probs = getattr(divergence, "from_log_probs", None)
        if of_log_probs is None:  # a plain function, which may not be one of distributions: a distance of logits
            values = divergence(*distributions.both_logits)
        else:
            values = of_log_probs(distributions.student_log_probs, distributions.teacher_log_probs)
        facts.check_one_each(f"divergence {getattr(divergence, '__name__', divergence)}", values)
        if replaced_loss == "nll":
            nll = -at_labels(distributions.all_student_log_probs, facts.labels)
            values = torch.where(facts.replaced, nll, values)
    if gradients is not None:
        (raw_gradient,) = torch.autograd.grad(values, raw_leaf, weights.weight.to(values.dtype))
        gradients.add(rows, hidden, raw, raw_gradient, weights.weight)

    columns = {"divergence": values.detach(), "weight": weights.weight, "accepted": weights.accepted}
    with torch.no_grad(), without_autocast:
        return columns | {name: STATISTICS[name](distributions, facts) for name in statistics}


def _check_positions(**arguments) -> None:
    lengths = {name: len(value) for name, value in arguments.items() if isinstance(value, Sized)}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"Rows per argument are {lengths}, but each row is one position; select the same positions.")


@torch.no_grad()
def _prepared(student: HiddenStates, teacher: TeacherSignal, vocab_size: int) -> tuple[HiddenStates, TeacherSignal]:
    """Both, cut to the shared vocabulary and cast once for all chunks."""
    for name, signal in (("student", student), ("teacher", teacher)):
        weight = signal.head.weight if isinstance(signal, HiddenStates) else None
        if weight is not None and len(weight) < vocab_size:
            raise ValueError(
                f"The {name}'s head has {len(weight)} rows, fewer than vocab_size={vocab_size}: either its "
                f"weight is a shard and has to be gathered around the loss, or vocab_size exceeds what both share."
            )
    return student.prepared(vocab_size), teacher.prepared(vocab_size)


def _move(table: dict[str, Tensor], rows: slice, columns: dict[str, Tensor], num_positions: int) -> None:
    """Puts a chunk's columns in their place, and empties `columns`. Small tensors that outlived their chunk would lie between
    what its large ones leave, and glibc could not give that to the next chunk's."""
    while columns:
        name, column = columns.popitem()
        if name not in table:
            table[name] = column.new_empty((num_positions, *column.shape[1:]))
        table[name][rows] = column
