"""What a training says while it runs: one line a log, and a bar while responses are being sampled.

Both speak on the first process only. The bar is off where the Trainer's own is (`disable_tqdm`).
"""

import shutil
import time
from collections.abc import Callable

from tqdm.auto import tqdm
from transformers import ProgressCallback


# What a line shows of a log, in this order: its label and how the number is printed.
SHOWN = {
    "loss": ("loss", "{:.3f}"),
    "eval_loss": ("eval loss", "{:.3f}"),
    "acceptance_rate": ("accepted", "{:.0%}"),
    "token_acceptance_rate": ("gate", "{:.0%}"),
    "replaced_share": ("replaced", "{:.0%}"),
    "response_length": ("length", "{:.0f}"),
    "tokens_per_second": ("tok/s", "{:.0f}"),
    "draft_length": ("draft", "{:.1f}"),
    "teacher_rank": ("rank", "{:.1f}"),
    "learning_rate": ("lr", "{:.1e}"),
}


class LogLine(ProgressCallback):
    """The Trainer's progress bar, and for each log one line that fits the terminal, with the time left, in the place of a dictionary.

    Args:
        with_bar (`bool`, *optional*, defaults to `True`): whether to draw the bar; the lines are printed in any case.
    """

    def __init__(self, with_bar: bool = True):
        super().__init__()
        self.with_bar = with_bar
        self.first_step, self.start = 0, 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        self.first_step, self.start = state.global_step, 0.0

    def on_epoch_begin(self, args, state, control, **kwargs):
        """Only now: what other callbacks do when training begins, such as an evaluation, is no measure of the steps, and a step begins
        for the Trainer when its responses are already there."""
        if self.start:
            return
        self.first_step, self.start = state.global_step, time.perf_counter()
        if self.with_bar and state.is_world_process_zero:
            self.training_bar = tqdm(total=state.max_steps, initial=state.global_step, dynamic_ncols=True)
            self.current_step = state.global_step

    def on_step_end(self, args, state, control, **kwargs):
        if self.with_bar:
            super().on_step_end(args, state, control, **kwargs)

    def on_prediction_step(self, args, state, control, eval_dataloader=None, **kwargs):
        if self.with_bar:
            super().on_prediction_step(args, state, control, eval_dataloader=eval_dataloader, **kwargs)

    def on_train_end(self, args, state, control, **kwargs):
        if self.training_bar is not None:
            super().on_train_end(args, state, control, **kwargs)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or not logs:
            return
        num_done = state.global_step - self.first_step
        left = (state.max_steps - state.global_step) * (time.perf_counter() - self.start) / num_done if num_done else 0
        line = log_line(logs, state.global_step, state.max_steps, left)
        if line and self.training_bar is not None:
            self.training_bar.write(line)
        elif line:
            print(line, flush=True)


def log_line(logs: dict[str, float], step: int, num_steps: int, seconds_left: float, width: int | None = None) -> str:
    """A log as one line of at most `width` columns (by default the terminal's): what does not fit is left out from the right. Empty for
    a log of nothing that is shown."""
    width = width or shutil.get_terminal_size().columns - 1
    parts = [f"{label} {form.format(logs[name])}" for name, (label, form) in SHOWN.items() if name in logs]
    if not parts:
        return ""
    head = f"step {step}/{num_steps}"
    tail = f"{clock(seconds_left)} left" if seconds_left > 0 else ""
    shown = [head]
    for part in parts:
        if len("  ".join([*shown, part, *([tail] if tail else [])])) <= width:
            shown.append(part)
    return "  ".join([*shown, *([tail] if tail else [])])[:width]


def clock(seconds: float) -> str:
    """Such as 0:07, 12:30 or 1:02:03."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class SamplingBar:
    """Rows finished, tokens, tokens per second and time left of one sampling: give `observe` to [`Execution`].

    Nothing is drawn in the first seconds, nor after the last row. Rows end early, so the time left is an estimate: unfinished rows
    are expected to become as long as the finished ones that are longer than they are now, or as `max_new_tokens` if none is.
    """

    def __init__(self, max_new_tokens: int, description: str, disable: bool, delay: float = 2.0):
        self.max_new_tokens = max_new_tokens
        self.bar = tqdm(
            total=max_new_tokens,
            desc=description.rstrip(),
            unit="tok",
            leave=False,
            delay=delay,
            disable=disable,
            dynamic_ncols=True,
            bar_format="{desc}{postfix} {bar:10} {n_fmt} tokens, {rate_fmt}, {remaining} left",
        )

    def observe(self, written: list[int], live: list[int]) -> None:
        """Called after each round with the tokens written of each row, and which rows are being written."""
        if self.bar.disable:
            return
        unfinished = set(live)
        finished = [length for row, length in enumerate(written) if length and row not in unfinished]
        left = 0.0
        for row, length in enumerate(written):
            if row in unfinished or not length:
                longer = [other for other in finished if other > length]
                left += (sum(longer) / len(longer) if longer else self.max_new_tokens) - length
        self.bar.total = round(sum(written) + left)
        self.bar.set_postfix_str(f"{len(finished)}/{len(written)} rows", refresh=False)
        self.bar.update(sum(written) - self.bar.n)

    def __enter__(self) -> Callable[[list[int], list[int]], None]:
        return self.observe

    def __exit__(self, *_) -> None:
        self.bar.close()
