"""Configuration of `SpecKDTrainer`: SKDConfig and the gate."""

from dataclasses import dataclass, field, replace
from typing import Any

from transformers import SchedulerType

from .explained_options import explained
from .field_checks import check_choice, check_positive, check_types
from .ideas import IdeaField, make_idea, numbers_of
from .loss.gates import GATE_CONTROLS, GATES, Gate
from .skd_config import ROLLOUTS, SKDConfig


NORMALIZERS = ("all", "accepted", "mean_one")


def is_gate(value: Any) -> bool:
    return isinstance(value, Gate)


GATE = IdeaField("gate", GATES, "a Gate", is_gate, {"k": "gate_top_k", "floor": "gate_floor"})
COMPARED = IdeaField("gate_compare", GATES, "a Gate", is_gate, {"k": "gate_top_k"})


@explained
@dataclass
class SpecKDConfig(SKDConfig):
    """
    Configuration class for [`SpecKDTrainer`].

    This class includes only the parameters that are specific to SpecKD training (Huang et al., arXiv 2510.24021, in its
    second version called SelecTKD), and those of [`SKDConfig`] whose default differs. Defaults are the paper's.
    """

    _VALID_DICT_FIELDS = SKDConfig._VALID_DICT_FIELDS + ["gate_kwargs"]
    _IDEA_FIELDS = (*SKDConfig._IDEA_FIELDS, "gate", "gate_compare")

    rollout: str = field(
        default="student",
        metadata={
            "help": "Who writes the responses that the gate weighs; any of SKDConfig's. With 'interleaved' SKD makes the data and SpecKD the loss.",
            "choices": list(ROLLOUTS),
        },
    )
    gate: Gate | str | None = field(
        default="greedy_top_k",
        metadata={
            "help": f"Which tokens have full weight in the loss (paper: greedy_top_k): {', '.join(GATES)}, a name that you registered, "
            "module:attribute, or a Gate."
        },
    )
    gate_top_k: int = field(default=5, metadata={"help": "k of the gates greedy_top_k and spec_k (paper: 5)."})
    gate_top_k_end: int | None = field(
        default=None,
        metadata={
            "help": "k at the last step, reached linearly from gate_top_k: short for a schedule. Default: none."
        },
    )
    gate_floor: float = field(default=0.01, metadata={"help": "Weight of a rejected token (the paper's beta: 0.01)."})
    gate_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Other parameters of the gate, such as '{\"exact\": true}' for spec_k."}
    )
    gate_control: str | None = field(
        default=None,
        metadata={
            "help": f"Puts a control in the gate's place, to tell its effect from that of a smaller step: {', '.join(GATE_CONTROLS)} (the same "
            "acceptances shuffled, 1 - acceptance, their mean everywhere). Default: the gate itself."
        },
    )
    gate_normalizer: str = field(
        default="all",
        metadata={
            "help": "What the weighted sum is divided by: 'all' response tokens (as published), 'accepted' tokens, or "
            "'mean_one', the sum of the weights. The last two need one more forward of the student before the first backward of a step.",
            "choices": list(NORMALIZERS),
        },
    )
    gate_keep_eos: bool = field(
        default=False,
        metadata={
            "help": "Whether end-of-sequence tokens always weigh 1 (as published: no). A gate that rejects them teaches the student not to stop."
        },
    )
    gate_warmup_steps: int = field(
        default=0,
        metadata={
            "help": "Steps over which the gate closes linearly, from weights of 1 to its own: short for a schedule of gate_floor."
        },
    )
    gate_compare: Gate | str | None = field(
        default=None, metadata={"help": "A second gate, computed for the metric gate_overlap only."}
    )

    def __post_init__(self):
        check_types(self)
        check_choice("gate_normalizer", self.gate_normalizer, NORMALIZERS)
        if isinstance(self.gate, str) and self.gate in GATE_CONTROLS and self.gate not in GATES:
            raise ValueError(
                f"gate={self.gate!r} is a control, which is made of a gate: set gate_control={self.gate!r}, and gate to one of "
                f"{', '.join(GATES)}."
            )
        if self.gate_control is not None:
            check_choice("gate_control", self.gate_control, GATE_CONTROLS)
        for name in ("gate_top_k", "gate_top_k_end"):
            check_positive(name, getattr(self, name))
        if self.gate_warmup_steps < 0:
            raise ValueError(f"gate_warmup_steps={self.gate_warmup_steps} must be 0 (no warm-up) or above.")
        chooses = self.load_best_model_at_end or self.lr_scheduler_type == SchedulerType.REDUCE_ON_PLATEAU
        if self.metric_for_best_model is None and chooses:
            # In the loss rejected tokens weigh next to nothing, so a student of which all are rejected would be the best.
            self.metric_for_best_model = "ungated_loss"
        super().__post_init__()

    def make_gate(self) -> Gate:
        gate = make_idea(GATE, self)
        gate = replace(gate, keep_eos=gate.keep_eos or self.gate_keep_eos)
        return gate if self.gate_control is None else GATE_CONTROLS[self.gate_control](gate)

    def make_compared_gate(self) -> Gate | None:
        return None if self.gate_compare is None else make_idea(COMPARED, self)

    @property
    def _ideas(self) -> list[IdeaField]:
        return [*super()._ideas, GATE, *self._compared]

    @property
    def _compared(self) -> list[IdeaField]:
        return [] if self.gate_compare is None else [COMPARED]

    def _schedule_settings(self) -> dict[str, Any]:
        """Those of `schedules`, and those that `gate_top_k_end` and `gate_warmup_steps` are short for."""
        settings, shorthands = super()._schedule_settings(), {}
        if self.gate_top_k_end is not None:
            shorthands["gate_top_k_end"] = ("gate_top_k", {"end": self.gate_top_k_end})
        if self.gate_warmup_steps:
            warm_up = {"start": 1.0, "end": self.gate_floor, "num_steps": self.gate_warmup_steps}
            shorthands["gate_warmup_steps"] = ("gate_floor", warm_up)
        for shorthand, (name, setting) in shorthands.items():
            if not any(name in numbers_of(idea, self) for idea in (GATE, *self._compared)):
                raise ValueError(
                    f"{shorthand} would have no effect: it moves {name}, and gate={self.gate!r} takes none."
                )
            if name in settings:
                raise ValueError(f"{shorthand} and schedules both move {name}. Leave one of them out.")
            settings[name] = setting
        return settings
