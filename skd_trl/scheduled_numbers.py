"""The numbers of a configuration that move over a training: by its schedules, or because a callback sets them.

What a run uses decides which numbers there are (`accept_top_k` belongs to one rule, `beta` to one divergence): a schedule of any
other is refused. `schedules.py` holds the curve of one number; this module puts the values of a step into a configuration.
"""

import copy
from typing import Any

from .ideas import Number, is_default
from .schedules import Schedule


class ScheduledNumbers:
    """What [`SKDConfig`] inherits: its values at a step. The configuration itself says in `_numbers` which numbers it uses, and in
    `check_numbers` which values they can have."""

    schedules: dict[str, Any] | str | None

    def at(self, step: int, num_steps: int):
        """This configuration at an optimizer step (0 is the first) of `num_steps`: a copy with each scheduled number at its
        value of that step, and without schedules."""
        schedules = self.resolved_schedules()
        return self._with({path: schedule.at(step, num_steps) for path, schedule in schedules.items()})

    def range_of(self, name: str) -> tuple[float, float]:
        """The lowest and the highest value that a number has in the training."""
        settings, value = self._schedule_settings(), getattr(self, name)
        if name not in settings:
            return value, value
        schedule = Schedule.of(settings[name], value)
        return min(schedule.start, schedule.end), max(schedule.start, schedule.end)

    def resolved_schedules(self) -> dict[str, Schedule]:
        """The schedules by the number that each moves.

        Raises:
            `ValueError`: for a name that is no number, or none that this run uses; for a start beside another value of the field.
        """
        numbers, schedules = self.used_numbers(), {}
        for path, setting in self._schedule_settings().items():
            if path not in numbers:
                raise ValueError(f"schedules: {path!r} is no number that this run uses; it uses {', '.join(numbers)}.")
            try:
                schedules[path] = Schedule.of(setting, numbers[path].value)
            except ValueError as error:
                raise ValueError(f"schedules, {path!r}: {error}") from error
            name, _, parameter = path.partition(".")
            is_given = parameter in (getattr(self, name) or {}) if parameter else not is_default(self, name)
            if path in (self.schedules or {}) and is_given and schedules[path].start != numbers[path].value:
                raise ValueError(
                    f"schedules: {path!r} starts at {schedules[path].start}, and {path} is {numbers[path].value}. Leave one of them out."
                )
        return schedules

    def with_numbers(self, values: dict[str, float]):
        """This configuration with numbers that something else than a schedule has set while the training runs (a callback): a copy.

        Raises:
            `ValueError`: for a number that this run does not use, or a value that it cannot have.
        """
        changed = {name: value for name, value in values.items() if value != getattr(self, name)}
        for name, value in changed.items():
            if name not in self.used_numbers():
                raise ValueError(
                    f"{name} was set to {value}, which would have no effect: this run does not use it (it uses "
                    f"{', '.join(self.used_numbers())}). Choose an idea that does, such as divergence='jsd' for beta, or leave it "
                    f"at {getattr(self, name)}."
                )
        config = self._with(changed) if changed else self
        try:
            config.check_numbers()
        except ValueError as error:
            raise ValueError(f"{', '.join(changed)} changed during training: {error}") from error
        return config

    def _schedule_settings(self) -> dict[str, Any]:
        settings = self.schedules or {}
        if not isinstance(settings, dict):
            raise ValueError(f"schedules={self.schedules!r} is not a dict; write it as {{'lmbda': {{'end': 1.0}}}}.")
        return dict(settings)

    def used_numbers(self) -> dict[str, Number]:
        """The numbers that a schedule may move: those that this run uses."""
        raise NotImplementedError

    def check_numbers(self) -> None:
        """Raises `ValueError` for a number out of its range."""
        raise NotImplementedError

    def _with(self, values: dict[str, float]):
        """A copy with numbers replaced, whole ones rounded, and without schedules."""
        config, numbers = copy.copy(self), self.used_numbers()
        config.schedules = None
        for path, value in values.items():
            name, _, parameter = path.partition(".")
            value = round(value) if numbers[path].is_whole else float(value)
            setattr(config, name, {**(getattr(config, name) or {}), parameter: value} if parameter else value)
        return config
