"""Weighted distillation loss from both models' last hidden states: sum over positions of weight x divergence.

Full logits `(N, V)` are never built. One pass goes over chunks of positions: logits of both heads, divergence, gate,
statistics, and at once the gradient with respect to the student's hidden states and its trainable head, so that
nothing is recomputed in backward. The caller chooses the positions (logits at t predict token t+1; prompts and padding
have no business here) and divides by their number over the whole optimizer step.

Shapes: N positions, V vocabulary, H hidden (each model its own), U uniforms per position.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from .chunks import chunks
from .divergences import at_labels, log_probs
from .gates import Gate
from .head_gradients import AttachGradients, HeadGradients
from .lm_head import LMHead
from .token_distributions import TokenDistributions
from .token_statistics import check_statistics, statistics_of


@dataclass(frozen=True)
class GateWeights:
    """
    Attributes:
        weight (`Tensor` `(N,)`, fp32):
            What each position's divergence is multiplied by; a constant, no gradient goes through it.
        accepted (`Tensor` `(N,)`, bool):
            What the gate said of the position, whatever became of its weight (a kept end of sequence, a warm-up).
    """

    weight: Tensor
    accepted: Tensor


@dataclass(frozen=True)
class DistillationLoss:
    """
    Attributes:
        loss (`Tensor`, scalar, fp32):
            Sum of weight x divergence over positions, not divided by anything; the only field with a gradient.
        divergence (`Tensor` `(N,)`):
            What was weighted: nats, or the negative log-likelihood at `nll_positions`.
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
    student_hidden: Tensor,
    student_head: LMHead,
    teacher_hidden: Tensor,
    teacher_head: LMHead,
    *,
    divergence: Callable[[Tensor, Tensor], Tensor],
    gate: Gate | None = None,
    weights: GateWeights | None = None,
    labels: Tensor | None = None,
    uniforms: Tensor | None = None,
    nll_positions: Tensor | None = None,
    keep: Tensor | None = None,
    vocab_size: int,
    chunk_size: int | None = None,
    statistics: Collection[str] = (),
) -> DistillationLoss:
    """
    Weighted divergence between two models at N positions.

    Differentiable (once, and by one backward) in `student_hidden` and the trainable tensors of `student_head`; the gradient is computed
    here, not in backward, unless gradients are off. Head gradients are summed over chunks in fp32. Under ZeRO-3 or
    FSDP the tensors of both heads must be whole during this call.

    Args:
        student_hidden (`Tensor` `(N, H)`), teacher_hidden (`Tensor` `(N, H')`):
            Last hidden states at the positions that predict the response's tokens. N may be 0.
        student_head, teacher_head (`LMHead`):
            What makes logits of them.
        divergence (`Divergence`):
            An entry of `DIVERGENCES`, made; or any function of student and teacher logits `(N, V)` that returns
            `(N,)`.
        gate (`Gate`, *optional*):
            Weighs the positions, in the same pass (a gate over a population costs a pass more, see `gate_weights`).
        weights (`GateWeights`, *optional*):
            Weights known beforehand, instead of a gate.
        labels (`Tensor` `(N,)`, *optional*):
            The response's tokens, below `vocab_size`.
        uniforms (`Tensor` `(N, U)`, *optional*):
            The gate's noise, `U = gate.num_uniforms`.
        nll_positions (`Tensor` `(N,)` bool, *optional*):
            Where the student's negative log-likelihood of the label takes the divergence's place (CA-OPD, IPD).
            Weights apply there too.
        keep (`Tensor` `(N,)` bool, *optional*):
            Where the weight is 1 whatever the gate says (ends of sequence).
        vocab_size (`int`):
            Tokens that both models share; logits beyond are cut before anything is computed.
        chunk_size (`int`, *optional*):
            Positions per chunk; default [`default_chunk_size`] (`chunks.py`).
        statistics (names, *optional*):
            Which of `STATISTICS` to compute along with it.

    Raises:
        `ValueError`: tensors of different lengths, both gate and weights, labels missing, logits of different widths, an
            unknown statistic.
    """
    if gate is not None and weights is not None:
        raise ValueError("Both gate and weights were given, and either alone sets the weights; drop one of them.")
    if nll_positions is not None and labels is None:
        raise ValueError("nll_positions was given without labels, whose likelihood it asks for; pass labels.")
    check_statistics(statistics, has_labels=labels is not None)
    heads = _Heads.whole(student_head, teacher_head, vocab_size)
    positions = _Positions(student_hidden, teacher_hidden, labels, uniforms, nll_positions, keep)
    if gate is not None and gate.select is not None:
        weights, gate = _gate_weights(positions, heads, gate, chunk_size), None
    if weights is not None:
        positions = replace(positions, weight=weights.weight.detach(), accepted=weights.accepted)
    trainable = _trainable(student_hidden, student_head)
    gradients = HeadGradients(student_hidden, student_head, heads.student) if trainable else None

    # Whether weights of 0 are worth looking for, which makes the host wait for the device.
    may_be_silent = gate.floor == 0 if gate is not None else weights is not None and bool((weights.weight == 0).any())

    table: dict[str, Tensor] = {}
    for rows in chunks(len(student_hidden), vocab_size, student_hidden.device, chunk_size):
        made = _chunk(positions, rows, heads, divergence, gate, statistics, gradients, may_be_silent)
        _move(table, positions, rows, made)
    total = (table["weight"] * table["divergence"]).sum()
    if gradients is not None:
        total = AttachGradients.apply(total, gradients.of(trainable), *trainable)
    return _assembled(total, table)


@torch.no_grad()
def gate_weights(
    student_hidden: Tensor,
    student_head: LMHead,
    teacher_hidden: Tensor,
    teacher_head: LMHead,
    *,
    gate: Gate,
    labels: Tensor | None = None,
    uniforms: Tensor | None = None,
    keep: Tensor | None = None,
    vocab_size: int,
    chunk_size: int | None = None,
    population: Callable[[Tensor], tuple[Tensor, slice]] | None = None,
) -> GateWeights:
    """
    The weights alone, without gradient: for normalisers that need their sum before the first backward, and for gates
    that compare positions with each other. These compare the N positions given here, or what `population` makes of their
    scores `(N, ...)`: the scores of all processes, and where one's own stand in them. Other arguments as
    `distillation_loss`.
    """
    heads = _Heads.whole(student_head, teacher_head, vocab_size)
    positions = _Positions(student_hidden, teacher_hidden, labels, uniforms, None, keep)
    return _gate_weights(positions, heads, gate, chunk_size, population)


@dataclass(frozen=True)
class _Heads:
    """Both heads cut to the shared vocabulary."""

    student: LMHead
    teacher: LMHead
    vocab_size: int

    @classmethod
    def whole(cls, student: LMHead, teacher: LMHead, vocab_size: int) -> "_Heads":
        for name, head in (("student", student), ("teacher", teacher)):
            if head.weight is not None and len(head.weight) < vocab_size:
                raise ValueError(
                    f"The {name}'s head has {len(head.weight)} rows, fewer than vocab_size={vocab_size}: either its "
                    f"weight is a shard and has to be gathered around the loss, or vocab_size exceeds what both share."
                )
        with torch.no_grad():
            return cls(student.prepared(vocab_size), teacher.prepared(vocab_size), vocab_size)


@dataclass(frozen=True)
class _Positions:
    """Everything that has a row per position."""

    student_hidden: Tensor
    teacher_hidden: Tensor
    labels: Tensor | None
    uniforms: Tensor | None
    nll_positions: Tensor | None
    keep: Tensor | None
    weight: Tensor | None = None
    accepted: Tensor | None = None

    def __post_init__(self):
        lengths = {name: len(value) for name, value in self._given().items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(
                f"Rows per tensor are {lengths}, but each row is one position; select the same positions."
            )

    def rows(self, rows: slice) -> "_Positions":
        return replace(self, **{name: value[rows] for name, value in self._given().items()})

    def _given(self) -> dict[str, Tensor]:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value is not None}


def _trainable(student_hidden: Tensor, student_head: LMHead) -> list[Tensor]:
    if not torch.is_grad_enabled():
        return []
    hidden = [student_hidden] if student_hidden.requires_grad else []
    return hidden + student_head.trainable_parameters()


def _chunk(
    positions: _Positions,
    rows: slice,
    heads: _Heads,
    divergence: Callable[[Tensor, Tensor], Tensor],
    gate: Gate | None,
    statistics: Collection[str],
    gradients: HeadGradients | None,
    may_be_silent: bool,
) -> dict[str, Tensor]:
    """Everything about one chunk; its tensors of vocabulary width die with this function."""
    chunk, learning = positions.rows(rows), gradients is not None
    through_module = learning and heads.student.module is not None
    with torch.set_grad_enabled(through_module):
        hidden = chunk.student_hidden.detach().requires_grad_(through_module)
        raw = heads.student.project(hidden, heads.vocab_size)
    raw_leaf = raw.detach().requires_grad_(learning)
    raw_teacher = _raw_teacher_logits(chunk, heads)
    # Autocast would take some of the reductions to bf16.
    with torch.autocast(raw.device.type, enabled=False), torch.set_grad_enabled(learning):
        student_logits = heads.student.shape_logits(raw_leaf)
        student_log_probs = log_probs(student_logits)
        distributions = _distributions(student_logits, student_log_probs, heads.teacher.shape_logits(raw_teacher))
        weights = _weights_of_chunk(chunk, distributions, gate)
        values = _per_position_loss(student_log_probs, distributions.teacher_log_probs, divergence, chunk)
        if learning:
            (raw_gradient,) = torch.autograd.grad(values, raw_leaf, weights.weight.to(values.dtype))
    if learning:
        gradients.add(rows, hidden, raw, raw_gradient, weights.weight if may_be_silent else None)
    column = {"divergence": values.detach(), "weight": weights.weight, "accepted": weights.accepted}
    return column | statistics_of(distributions, chunk.labels, statistics)


@torch.no_grad()
def _raw_teacher_logits(chunk: _Positions, heads: _Heads) -> Tensor:
    return heads.teacher.project(chunk.teacher_hidden, heads.vocab_size)


@torch.no_grad()
def _distributions(student_logits: Tensor, student_log_probs: Tensor, teacher_logits: Tensor) -> TokenDistributions:
    return TokenDistributions(
        student_logits.detach(), teacher_logits, student_log_probs.detach(), log_probs(teacher_logits)
    )


def _weights_of_chunk(chunk: _Positions, distributions: TokenDistributions, gate: Gate | None) -> GateWeights:
    if chunk.weight is not None:
        return GateWeights(_kept(chunk.weight, chunk.keep), chunk.accepted)
    if gate is None:
        ones = torch.ones(len(chunk.student_hidden), device=chunk.student_hidden.device)
        return GateWeights(ones, ones.bool())
    with torch.no_grad():
        scores = gate.scores(distributions, chunk.labels, chunk.uniforms)
        return _gated(gate, gate.acceptance(scores), chunk.keep)


def _gated(gate: Gate, acceptance: Tensor, keep: Tensor | None) -> GateWeights:
    return GateWeights(_kept(gate.weight(acceptance), keep), acceptance >= 0.5)


def _kept(weight: Tensor, keep: Tensor | None) -> Tensor:
    return weight if keep is None else weight.masked_fill(keep, 1.0)


def _per_position_loss(
    student_log_probs: Tensor, teacher_log_probs: Tensor, divergence: Callable, chunk: _Positions
) -> Tensor:
    # Log-probabilities are logits too, so a plain function of logits only costs a second log-softmax.
    values = getattr(divergence, "from_log_probs", divergence)(student_log_probs, teacher_log_probs)
    if chunk.nll_positions is None:
        return values
    return torch.where(chunk.nll_positions, -at_labels(student_log_probs, chunk.labels), values)


def _move(table: dict[str, Tensor], positions: _Positions, rows: slice, columns: dict[str, Tensor]) -> None:
    """Puts a chunk's columns in their place, and empties `columns`. Small tensors that outlived their chunk would lie between
    what its large ones leave, and glibc could not give that to the next chunk's."""
    while columns:
        name, column = columns.popitem()
        if name not in table:
            table[name] = column.new_empty((len(positions.student_hidden), *column.shape[1:]))
        table[name][rows] = column


def _assembled(total: Tensor, table: dict[str, Tensor]) -> DistillationLoss:
    own = {name: table.pop(name) for name in ("divergence", "weight", "accepted")}
    return DistillationLoss(loss=total, **own, statistics=table)


def _gate_weights(
    positions: _Positions, heads: _Heads, gate: Gate, chunk_size: int | None, population: Callable | None = None
) -> GateWeights:
    table: dict[str, Tensor] = {}
    hidden = positions.student_hidden
    with torch.no_grad():
        for rows in chunks(len(hidden), heads.vocab_size, hidden.device, chunk_size):
            chunk = positions.rows(rows)
            raw = heads.student.project(chunk.student_hidden, heads.vocab_size)
            raw_teacher = _raw_teacher_logits(chunk, heads)
            with torch.autocast(raw.device.type, enabled=False):
                student_logits = heads.student.shape_logits(raw)
                distributions = TokenDistributions.from_logits(student_logits, heads.teacher.shape_logits(raw_teacher))
                _move(table, positions, rows, {"scores": gate.scores(distributions, chunk.labels, chunk.uniforms)})
        together, own = table["scores"], slice(None)
        if gate.select is not None and population is not None:
            together, own = population(together)
        return _gated(gate, gate.acceptance(together)[own], positions.keep)
