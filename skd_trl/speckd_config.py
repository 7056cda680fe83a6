"""Configuration of `SpecKDTrainer`: SKDConfig and the gate."""

from dataclasses import dataclass, field, replace
from typing import Any

from .loss.gates import GATE_CONTROLS, GATES, Gate
from .skd_config import ROLLOUTS, SKDConfig, check_choice, check_positive


NORMALIZERS = ("all", "accepted", "mean_one")


@dataclass
class SpecKDConfig(SKDConfig):
    """
    Configuration class for [`SpecKDTrainer`].

    This class includes only the parameters that are specific to SpecKD training (Huang et al., arXiv 2510.24021, in its
    second version called SelecTKD), and those of [`SKDConfig`] whose default differs. Defaults are the paper's.

    Args:
        rollout (`str`, *optional*, defaults to `"student"`):
            Who writes the responses that the gate weighs; any of `SKDConfig`'s. With `"interleaved"` SKD makes the data
            and SpecKD the loss.
        gate (`str`, *optional*, defaults to `"greedy_top_k"`):
            Which tokens the loss listens to, one of `GATES`.
        gate_top_k (`int`, *optional*, defaults to `5`):
            k of the gates `greedy_top_k` and `spec_k` (also inside the controls `random`, `inverted` and `same_mean`).
        gate_top_k_end (`int`, *optional*):
            k at the last step, reached linearly from `gate_top_k`.
        gate_floor (`float`, *optional*, defaults to `0.01`):
            Weight of a rejected token (the paper's beta).
        gate_kwargs (`dict`, *optional*):
            Other parameters of the gate, such as `{"exact": true}` for `spec_k` or `{"gate": "spec_k"}` for `random`.
        gate_normalizer (`str`, *optional*, defaults to `"all"`):
            What the weighted sum is divided by, over the whole optimizer step: `"all"` response tokens, as published (a
            closed gate then also shortens the step); `"accepted"` tokens; or `"mean_one"`, the sum of the weights. The
            last two need one more forward of the student, without gradient, before the first backward of a step.
        gate_keep_eos (`bool`, *optional*, defaults to `False`):
            Whether end-of-sequence tokens always weigh 1. A gate that rejects them teaches the student not to stop.
        gate_warmup_steps (`int`, *optional*, defaults to `0`):
            Steps over which the gate closes linearly, from weights of 1 to its own.
        gate_compare (`str`, *optional*):
            A second gate, computed beside the first for the metric `gate_overlap` only.
    """

    _VALID_DICT_FIELDS = SKDConfig._VALID_DICT_FIELDS + ["gate_kwargs"]

    rollout: str = field(
        default="student",
        metadata={
            "help": "Who writes the responses that the gate weighs.",
            "choices": list(ROLLOUTS),
        },
    )
    gate: str = field(
        default="greedy_top_k",
        metadata={
            "help": "Which tokens the loss listens to (paper: greedy_top_k).",
            "choices": [*GATES, *GATE_CONTROLS],
        },
    )
    gate_top_k: int = field(
        default=5, metadata={"help": "k of the gates greedy_top_k and spec_k (paper: 5), also inside the controls."}
    )
    gate_top_k_end: int | None = field(
        default=None, metadata={"help": "k at the last step, reached linearly from gate_top_k. Default: no schedule."}
    )
    gate_floor: float = field(default=0.01, metadata={"help": "Weight of a rejected token (the paper's beta: 0.01)."})
    gate_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Other parameters of the gate, such as {'exact': true} for spec_k."}
    )
    gate_normalizer: str = field(
        default="all",
        metadata={
            "help": "What the weighted sum is divided by: 'all' response tokens (as published), 'accepted' tokens, or "
            "'mean_one', the sum of the weights.",
            "choices": list(NORMALIZERS),
        },
    )
    gate_keep_eos: bool = field(
        default=False, metadata={"help": "Whether end-of-sequence tokens always weigh 1 (as published: no)."}
    )
    gate_warmup_steps: int = field(
        default=0, metadata={"help": "Steps over which the gate closes linearly, from weights of 1 to its own."}
    )
    gate_compare: str | None = field(
        default=None, metadata={"help": "A second gate, computed for the metric gate_overlap only."}
    )

    def __post_init__(self):
        super().__post_init__()
        check_choice("gate", self.gate, [*GATES, *GATE_CONTROLS])
        check_choice("gate_normalizer", self.gate_normalizer, NORMALIZERS)
        if self.gate_compare is not None:
            check_choice("gate_compare", self.gate_compare, [*GATES, *GATE_CONTROLS])
        check_positive("gate_top_k", self.gate_top_k)
        check_positive("gate_top_k_end", self.gate_top_k_end)
        if not 0.0 <= self.gate_floor <= 1.0:
            raise ValueError(
                f"gate_floor={self.gate_floor} must be from 0 (rejected tokens are ignored) to 1 (the gate is off)."
            )
        if self.gate_warmup_steps < 0:
            raise ValueError(f"gate_warmup_steps={self.gate_warmup_steps} must be 0 (no warm-up) or above.")
        try:
            self.make_gate(0, 1)
        except (ValueError, TypeError) as error:
            raise ValueError(f"gate, gate_kwargs: {error}") from error

    def make_gate(self, step: int, num_steps: int) -> Gate:
        """The gate of an optimizer step (0 is the first) of `num_steps`: k and warm-up as scheduled."""
        k = self.gate_top_k
        if self.gate_top_k_end is not None:
            k = round(k + (self.gate_top_k_end - k) * min(step / max(num_steps - 1, 1), 1.0))
        closed = min(step / self.gate_warmup_steps, 1.0) if self.gate_warmup_steps else 1.0
        floor = 1 - closed * (1 - self.gate_floor)
        return replace(self._gate(self.gate, k, self.gate_kwargs, floor=floor), keep_eos=self.gate_keep_eos)

    def make_compared_gate(self) -> Gate:
        return replace(self._gate(self.gate_compare, self.gate_top_k, None), keep_eos=self.gate_keep_eos)

    @staticmethod
    def _gate(name: str, k: int, kwargs: dict | None, **floor: float) -> Gate:
        """The named gate, or the named control of the gate that `kwargs` names."""
        kwargs = dict(kwargs or {})
        inner = kwargs.pop("gate", "greedy_top_k") if name in GATE_CONTROLS else name
        check_choice("gate", inner, GATES)
        top_k = {"k": k} if inner in ("greedy_top_k", "spec_k") else {}
        gate = GATES[inner](**floor, **top_k, **kwargs)
        return GATE_CONTROLS[name](gate) if name in GATE_CONTROLS else gate
