"""`SpecKDTrainer`: SKDTrainer whose loss weighs each token by a gate.

Glue: gates are `loss/gates.py`, the weighted loss is `loss/distillation_loss.py`. Shapes: N response tokens of a micro-batch, U uniform numbers
per token that the gate asks for.
"""

import textwrap
from dataclasses import replace

import torch
from accelerate.logging import get_logger

from .data.batches import IGNORE_INDEX, Key, ResponseTokens
from .data.vocabulary import describe_end_of_sequence_difference
from .loss.distillation_loss import DistillationLoss, gate_weights
from .loss.gates import Gate, GateWeights
from .loss.response_facts import ResponseFacts
from .loss.teacher_signal import HiddenStates, TeacherSignal, check_signal
from .sampling.ragged_cache import eval_mode
from .skd_trainer import METRICS, SKDTrainer
from .speckd_config import SpecKDConfig
from .training.distributed import gather_rows, keyed_generator
from .training.teachers import whole_signal


logger = get_logger(__name__)

POSITION_BINS = ((0, 8), (8, 32), (32, 128), (128, None))
POSITION_NAMES = tuple(f"token_acceptance_rate_{a}_{'on' if b is None else b - 1}" for a, b in POSITION_BINS)


class SpecKDTrainer(SKDTrainer):
    """
    Trainer for SpecKD, token-gated knowledge distillation (Huang et al., [SpecKD: Speculative Decoding for Effective
    Knowledge Distillation of LLMs](https://huggingface.co/papers/2510.24021); its second version is called SelecTKD).

    At every response token the student's proposal is compared with the teacher's distribution; the divergence has
    weight 1 where it is accepted and a small weight where it is rejected:
    `loss = 1 / |y| sum_t V_t D(teacher_t || student_t)`, `V_t` without gradient.

    The only change with respect to [`SKDTrainer`] is the weight of each token, which the gate of [`SpecKDConfig`] gives,
    and with `gate_normalizer` the divisor. Arguments and data are [`SKDTrainer`]'s; `rollout` defaults to `"student"`.

    Raises:
        `ValueError`: what [`SKDTrainer`] raises, and for a gate that these models cannot have.
    """

    _tag_names = ["trl", "speckd"]
    _name = "SpecKD"
    _paper = {
        "title": "SpecKD: Speculative Decoding for Effective Knowledge Distillation of LLMs",
        "id": "2510.24021",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @article{huang2025speckd,
                title   = {{SpecKD: Speculative Decoding for Effective Knowledge Distillation of LLMs}},
                author  = {Huang and others},
                year    = 2025,
                eprint  = {arXiv:2510.24021},
            }"""),
    }
    _config_class = SpecKDConfig
    # What the Trainer holds, as this class knows it.
    args: SpecKDConfig  # type: ignore[assignment]
    _metric_names = (
        *METRICS,
        "token_acceptance_rate",
        *POSITION_NAMES,
        "token_acceptance_rate_eos",
        "gate_weight",
        "ungated_loss",
        "fully_rejected_share",
        "tv_accepted",
        "tv_rejected",
        "divergence_accepted",
        "divergence_rejected",
        "gate_overlap",
    )
    _statistics = (*SKDTrainer._statistics, "tv")

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        config = self.args
        largest = config.range_of("gate_top_k")[1]
        if largest > self.vocab_size:
            raise ValueError(
                f"gate_top_k={largest} exceeds the {self.vocab_size} tokens that both models share, so every token would pass. "
                "Lower it (and gate_top_k_end or its schedule)."
            )
        if config.at(1, 2).gate_top_k > config.at(0, 2).gate_top_k:
            logger.warning(
                f"gate_top_k ends at {largest}, above its start: the gate opens while the student comes nearer to the teacher "
                "and needs it less. The usual schedule goes the other way."
            )
        if 0 < config.max_steps <= config.gate_warmup_steps:
            logger.warning(
                f"gate_warmup_steps={config.gate_warmup_steps} is not below max_steps={config.max_steps}: the gate never "
                "closes fully. Shorten the warm-up."
            )
        student = self._inner_student()
        differences = [
            describe_end_of_sequence_difference(student, one, self.processing_class) for one in self._teacher.inner
        ]
        if any(differences) and not config.gate_keep_eos:
            logger.warning(
                "The gate may reject every end of sequence, and the student would forget how to stop: set gate_keep_eos=True."
            )

    def _check_scores(self, top_k: int) -> None:
        super()._check_scores(top_k)
        for config in (self.args.at(0, 2), self.args.at(1, 2)):  # of the first step, and of the last
            for gate in filter(None, (config.make_gate(), config.make_compared_gate())):
                check_signal(top_k, self.vocab_size, gate=gate)

    # One optimizer step: its noise, and where the divisor depends on the weights, its weights

    def _enter_step(self, step: int, num_steps: int) -> None:
        super()._enter_step(step, num_steps)
        self._gate = self._args_of_step.make_gate()
        self._compared_gate = self._args_of_step.make_compared_gate()

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        step = self.state.global_step
        batches, num_tokens = super().get_batch_samples(epoch_iterator, num_batches, device)
        # The noise that the gates ask for, token by token in the order of the rows, however they are cut into batches.
        for name, num_uniforms in self._num_uniforms.items():
            generator = keyed_generator(name, self.args.seed, step, self.accelerator.process_index)
            for batch in batches:
                num_labels = int((batch[Key.LABELS] != IGNORE_INDEX).sum())
                batch[name] = torch.rand((num_labels, num_uniforms), generator=generator)
        gates = filter(None, (self._gate, self._compared_gate))
        if batches and (self.args.gate_normalizer != "all" or any(gate.select is not None for gate in gates)):
            num_tokens = self._weigh_window(batches, num_tokens)
        return batches, num_tokens

    @property
    def _num_uniforms(self) -> dict[str, int]:
        """U of each gate that draws, by the entry of a batch that has its noise."""
        gates = {Key.GATE_UNIFORMS: self._gate, Key.COMPARED_UNIFORMS: self._compared_gate}
        return {name: gate.num_uniforms for name, gate in gates.items() if gate is not None and gate.num_uniforms > 0}

    def _weigh_window(self, batches: list[dict], num_tokens: torch.Tensor) -> torch.Tensor:
        """Weights of all micro-batches, from a forward without gradient each, and the divisor they make. A gate that
        compares tokens with each other compares those of the whole step, on all processes."""
        hidden, signals = [], []
        with eval_mode(self.model), torch.no_grad(), self.compute_loss_context_manager():
            for batch in batches:
                tokens = ResponseTokens.of(batch)
                student = self._forward_with(
                    self.model_wrapped, batch, lambda states, tokens=tokens: {"hidden": tokens.predicted_by(states)}
                )
                hidden.append(student["hidden"])
                signals.append(self._teacher_signal(batch, tokens))
                self._teacher.keep(batch, tokens, signals[-1])
        teacher = type(signals[0]).cat(signals)
        facts = ResponseFacts.cat([self._facts(batch, ResponseTokens.of(batch)) for batch in batches])
        weights = self._weights(self._gate, torch.cat(hidden), teacher, facts)
        sizes = list(map(len, hidden))
        for batch, weight, accepted in zip(
            batches, weights.weight.split(sizes), weights.accepted.split(sizes), strict=True
        ):
            batch[Key.GATE_WEIGHT], batch[Key.GATE_ACCEPTED] = weight, accepted
        if self._compared_gate is not None:
            parts = [self._facts(batch, ResponseTokens.of(batch), Key.COMPARED_UNIFORMS) for batch in batches]
            other = self._weights(self._compared_gate, torch.cat(hidden), teacher, ResponseFacts.cat(parts))
            for batch, accepted in zip(batches, other.accepted.split(sizes), strict=True):
                batch[Key.COMPARED_ACCEPTED] = accepted
        if self.args.gate_normalizer == "all":
            return num_tokens
        total = weights.accepted.sum() if self.args.gate_normalizer == "accepted" else weights.weight.sum()
        if self.args.average_tokens_across_devices:
            total = self.accelerator.reduce(total.float(), reduction="sum")
        if total > 0:
            return total
        logger.warning(
            f"Step {self.state.global_step + 1}: the gate rejected every token, so there is nothing to normalise by; the "
            "step divides by all response tokens."
        )
        return num_tokens

    @torch.no_grad()
    def _weights(self, gate: Gate, student_hidden, teacher: TeacherSignal, facts: ResponseFacts) -> GateWeights:
        """Weights (N,) of `gate`, without a loss."""
        with self._teacher_products(), self._student_head() as student_head, whole_signal(teacher) as whole_teacher:
            return gate_weights(
                HiddenStates(student_hidden, student_head),
                whole_teacher,
                facts,
                gate=gate,
                vocab_size=self.vocab_size,
                chunk_size=self.args.loss_chunk_size,
                population=lambda scores: gather_rows(scores, self.accelerator),
            )

    # The loss

    def _facts(self, inputs, tokens: ResponseTokens, noise: str = Key.GATE_UNIFORMS) -> ResponseFacts:
        facts = super()._facts(inputs, tokens)
        return replace(facts, uniforms=inputs[noise].to(facts.labels.device)) if noise in inputs else facts

    def _gate_for(self, inputs) -> Gate | GateWeights:
        if Key.GATE_WEIGHT in inputs:
            return GateWeights(inputs[Key.GATE_WEIGHT], inputs[Key.GATE_ACCEPTED])
        return self._gate

    def _distillation_loss(self, student_hidden, teacher, inputs, tokens: ResponseTokens) -> DistillationLoss:
        if Key.GATE_WEIGHT not in inputs and not self.model.training:
            # The noise of an evaluation, for the last step's gate: a row's depends on its place alone, as that of a response sampled
            # for it does.
            lengths = (inputs[Key.LABELS] != IGNORE_INDEX).sum(dim=1).tolist()
            places = inputs[Key.PLACE].tolist() if Key.PLACE in inputs else range(len(lengths))
            for name, num_uniforms in self._num_uniforms.items():
                generators = [keyed_generator(name, self.args.seed, "evaluation", place) for place in places]
                pairs = zip(lengths, generators, strict=True)
                inputs[name] = torch.cat([torch.rand((length, num_uniforms), generator=own) for length, own in pairs])
        outcome = super()._distillation_loss(student_hidden, teacher, inputs, tokens)
        if self._compared_gate is not None and Key.COMPARED_ACCEPTED not in inputs:
            facts = self._facts(inputs, tokens, Key.COMPARED_UNIFORMS)
            inputs[Key.COMPARED_ACCEPTED] = self._weights(
                self._compared_gate, student_hidden.detach(), teacher, facts
            ).accepted
        return outcome

    # What people see

    def _add_loss_metrics(self, mode: str, outcome: DistillationLoss, inputs: dict, tokens: ResponseTokens) -> None:
        super()._add_loss_metrics(mode, outcome, inputs, tokens)
        metrics, accepted = self._ratios[mode], outcome.accepted
        metrics.add_mean("token_acceptance_rate", accepted)
        metrics.add_mean("gate_weight", outcome.weight)
        metrics.add_mean("ungated_loss", outcome.divergence)
        for name, (start, stop) in zip(POSITION_NAMES, POSITION_BINS, strict=True):
            inside = (tokens.positions >= start) & (tokens.positions < (stop or tokens.shape[1]))
            metrics.add_mean(name, accepted[inside])
        metrics.add_mean("token_acceptance_rate_eos", accepted[self._is_eos(tokens.labels)])
        for name, of in (("accepted", accepted), ("rejected", ~accepted)):
            metrics.add_mean(f"tv_{name}", outcome.statistics["tv"][of])
            metrics.add_mean(f"divergence_{name}", outcome.divergence[of])
        num_accepted = torch.zeros(tokens.shape[0], device=accepted.device).index_add(0, tokens.rows, accepted.float())
        metrics.add_mean("fully_rejected_share", num_accepted[tokens.rows.unique()] == 0)
        if Key.COMPARED_ACCEPTED in inputs:
            other = inputs[Key.COMPARED_ACCEPTED]
            metrics.add("gate_overlap", (accepted & other).sum(), (accepted | other).sum())

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        super().log(logs, start_time)
        if logs.get("token_acceptance_rate") == 0.0:
            logger.warning(
                f"Step {self.state.global_step}: the gate {self.args.gate!r} rejected every token since the last log; they weigh "
                f"{logs['gate_weight']:.3g} on average. Raise gate_top_k or gate_floor, choose another gate, or start from a "
                "student nearer to the teacher."
            )
