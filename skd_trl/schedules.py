"""A number that moves over a training: from `start` to `end`, after a share of the steps in which it is held.

Schedules know no configuration: `SKDConfig.schedules` says which of its numbers move, and `SKDConfig.at` sets them.
"""

import math
from dataclasses import dataclass, fields
from typing import Any


SHAPES = ("linear", "cosine", "step")


@dataclass(frozen=True)
class Schedule:
    """
    A number that moves from `start` to `end`.

    Attributes:
        start, end (`float`):
            The value of the first step, and that of the last.
        shape (`str`):
            `"linear"`; `"cosine"`, half a period, slow at both ends; or `"step"`, `end` at once after `hold`.
        hold (`float`):
            The share of the steps, in [0, 1), in which it stays at `start`.
        num_steps (`int` or `None`):
            How many steps after the first it reaches `end`. `None`: at the last step of the training.
    """

    start: float
    end: float
    shape: str = "linear"
    hold: float = 0.0
    num_steps: int | None = None

    def __post_init__(self):
        for name in ("start", "end", "hold"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise ValueError(f"{name}={value!r} of a schedule must be a number.")
        if self.shape not in SHAPES:
            raise ValueError(f"shape={self.shape!r} of a schedule is unknown; choose one of {', '.join(SHAPES)}.")
        if not 0 <= self.hold < 1:
            raise ValueError(f"hold={self.hold} of a schedule must be a share of the training, from 0 to below 1.")
        if self.shape == "step" and self.hold == 0:
            raise ValueError(
                "A schedule of shape='step' changes once, after the share `hold` of the training, and hold=0 leaves no step "
                "before it. Set hold above 0, or give the number itself."
            )
        if self.num_steps is not None and (not isinstance(self.num_steps, int) or self.num_steps < 1):
            raise ValueError(f"num_steps={self.num_steps!r} of a schedule must be a whole number of at least 1.")

    @classmethod
    def of(cls, setting: Any, start: float | None) -> "Schedule":
        """A schedule from a dict of its fields; `start` where it gives none.

        Raises:
            `ValueError`: for what is not a dict of these fields, or where `start` or `end` is missing.
        """
        if isinstance(setting, cls):
            return setting
        names = [field.name for field in fields(cls)]
        if not isinstance(setting, dict) or not set(setting) <= set(names):
            raise ValueError(f"{setting!r} is not a schedule; write a dict of {', '.join(names)}.")
        setting = {"start": start, **setting}
        if setting["start"] is None or "end" not in setting:
            raise ValueError(
                f"{setting!r} does not say where the schedule {'starts' if 'end' in setting else 'ends'}."
            )
        return cls(**setting)

    def at(self, step: int, num_steps: int) -> float:
        """The value at `step` (0 is the first) of a training of `num_steps`."""
        last = num_steps - 1 if self.num_steps is None else self.num_steps
        held = min(self.hold * (last + 1), last)  # the last step is the end's
        if self.shape == "step":
            # 0.07 x 100 in floats is 7.000000000000001, and step 7 is not held.
            return self.end if last > 0 and step >= held - 1e-9 else self.start
        if last > held:
            progress = min(max((step - held) / (last - held), 0.0), 1.0)
        else:
            progress = float(step >= last > 0)
        if self.shape == "cosine":
            progress = (1 - math.cos(math.pi * progress)) / 2
        # Exact at the end, where the sum may be off by a rounding.
        return self.end if progress == 1 else self.start + (self.end - self.start) * progress
