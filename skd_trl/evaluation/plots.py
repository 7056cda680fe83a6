"""Curves of a training: one PNG for mails and papers, and panels for the page, as SVG that follows the page's colours.

Colours are of a set that colour-blind people tell apart (Okabe and Ito), and lines differ in their dashes too.
"""

import io
import re
from dataclasses import dataclass
from pathlib import Path

import matplotlib


matplotlib.use("Agg")  # noqa: E402 (before pyplot, which would ask for a display)

import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.ticker import MaxNLocator, PercentFormatter  # noqa: E402


BLACK, BLUE, GREEN, ORANGE, PURPLE = "#000000", "#0072B2", "#009E73", "#D55E00", "#CC79A7"
# What the page calls the colours, which have a value for each theme.
VARIABLES = {
    BLACK: "currentColor",
    BLUE: "var(--blue)",
    GREEN: "var(--green)",
    ORANGE: "var(--orange)",
    PURPLE: "var(--purple)",
}


@dataclass(frozen=True)
class Curve:
    """A logged quantity: name, label, colour, dashes."""

    name: str
    label: str
    colour: str = BLUE
    style: str = "-"


@dataclass(frozen=True)
class Panel:
    """Curves with one axis: title, how to read it, whether the axis is a share, and whether it begins at 0."""

    title: str
    caption: str
    curves: tuple[Curve, ...]
    is_share: bool = False


PANELS = (
    Panel(
        "Who wrote the tokens",
        "Accepted: proposals of the student that the teacher accepted. Replaced: tokens that the teacher wrote.",
        (Curve("acceptance_rate", "accepted", BLUE), Curve("replaced_share", "replaced", ORANGE, "--")),
        is_share=True,
    ),
    Panel(
        "Loss",
        "Divergence to the teacher per response token, in nats. Falls also because easier tokens are sampled.",
        (Curve("loss", "training", BLACK), Curve("eval_loss", "evaluation", PURPLE, "--")),
    ),
    Panel("Rank", "How many tokens the teacher ranks higher than the student's proposal, on average.", (Curve("teacher_rank", "rank"),)),
    Panel(
        "Drafts",
        "Tokens that the student drafts before the teacher looks, and tokens that a round leaves.",
        (Curve("draft_length", "drafted", BLUE), Curve("tokens_per_round", "kept", ORANGE, "--")),
    ),
    Panel(
        "Entropies",
        "Of the next-token distributions on the responses, in nats. A student's that falls to 0 repeats itself.",
        (Curve("student_entropy", "student", BLUE), Curve("teacher_entropy", "teacher", ORANGE, "--")),
    ),
    Panel(
        "Gate",
        "Tokens that the gate accepted, the weight that tokens have, and both gates' agreement where two are compared.",
        (
            Curve("token_acceptance_rate", "accepted", GREEN),
            Curve("gate_weight", "mean weight", PURPLE, "--"),
            Curve("gate_overlap", "overlap", BLUE, ":"),
        ),
        is_share=True,
    ),
    Panel(
        "Length",
        "Tokens of a response.",
        (Curve("response_length", "tokens"),),
    ),
    Panel("Cut", "Responses that reached the limit before their end.", (Curve("truncated_share", "cut", ORANGE),), is_share=True),
    Panel("Throughput", "Response tokens per second, sampling and training together.", (Curve("tokens_per_second", "tokens/s"),)),
    Panel(
        "Seconds of a step",
        "Sampling the responses, and training on them.",
        (Curve("sampling_seconds", "sampling", BLUE), Curve("training_seconds", "training", ORANGE, "--")),
    ),
)  # fmt: skip


def series(history: list[dict], name: str) -> tuple[list[int], list[float]]:
    """Steps and values of one logged quantity; a null of `logs.jsonl` is a value that is not a number."""
    logged = [(entry["step"], entry[name]) for entry in history if name in entry and "step" in entry]
    found = [(step, np.nan if value is None else float(value)) for step, value in logged if _is_number(value)]
    return [step for step, _ in found], [value for _, value in found]


def _is_number(value: object) -> bool:
    return value is None or isinstance(value, (int, float))


def panels(history: list[dict]) -> list[dict[str, str]]:
    """The panels that the log has data for: title, caption and SVG."""
    found = []
    for number, panel in enumerate(PANELS):
        curves = [curve for curve in panel.curves if series(history, curve.name)[0]]
        if curves:
            svg = _svg(history, panel, curves, number)
            found.append({"title": panel.title, "caption": panel.caption, "svg": svg, "number": str(number)})
    return found


def _svg(history: list[dict], panel: Panel, curves: list[Curve], number: int) -> str:
    # Text stays text, which has the page's font; the salt keeps the ids of two panels apart.
    with plt.rc_context({"svg.fonttype": "none", "svg.hashsalt": f"panel-{number}", "font.size": 11}):
        figure, axis = plt.subplots(figsize=(4.6, 2.7), layout="constrained")
        for curve in curves:
            _draw(axis, *series(history, curve.name), curve)
        _dress(axis, panel.is_share)
        if len(curves) > 1:
            axis.legend(frameon=False, loc="best", fontsize=10)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
        plt.close(figure)
    svg = buffer.getvalue()
    for colour, variable in VARIABLES.items():
        svg = re.sub(re.escape(colour), variable, svg, flags=re.IGNORECASE)
    # From the element on, without the file's head. matplotlib leaves black out where it is SVG's default.
    svg = re.sub(r"\A.*?<svg ", '<svg role="img" aria-hidden="true" fill="currentColor" ', svg, flags=re.DOTALL)
    svg = re.sub(r' (width|height)="[\d.]+pt"', "", svg)
    return re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", svg)


def _dress(axis: Axes, is_share: bool) -> None:
    if is_share:
        axis.set_ylim(0, 1.02)
        axis.yaxis.set_major_formatter(PercentFormatter(1.0))
    else:
        axis.set_ylim(bottom=min(0.0, axis.get_ylim()[0]))
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    axis.grid(alpha=0.25, color=BLACK, linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)


def plot_training(history: list[dict], path: Path, *, title: str) -> None:
    """Writes a PNG: loss above, shares of accepted and of replaced tokens below, over optimizer steps."""
    figure, (loss_axis, share_axis) = plt.subplots(2, 1, figsize=(8, 6.4), sharex=True, layout="constrained")
    figure.suptitle(title)
    _draw(loss_axis, *series(history, "loss"), Curve("loss", "training loss", BLACK))
    evaluated = series(history, "eval_loss")
    if evaluated[0]:
        loss_axis.plot(*evaluated, "s", color=PURPLE, label="loss on the evaluation set")
        loss_axis.legend(frameon=False)
    loss_axis.set_ylabel("training loss\n(nats per token)")
    _dress(loss_axis, is_share=False)

    steps, replaced = series(history, "replaced_share")
    if replaced:
        kept = 1 - smooth(replaced)
        share_axis.fill_between(steps, kept, 1, color=ORANGE, alpha=0.25, hatch="//")
        share_axis.fill_between(steps, 0, kept, color=BLUE, alpha=0.12)
        box = {"boxstyle": "round,pad=0.25", "facecolor": "white", "edgecolor": "none", "alpha": 0.8}
        for height, side, text in ((0.95, "top", "replaced by the teacher"), (0.05, "bottom", "the student's own")):
            share_axis.text(0.98, height, text, transform=share_axis.transAxes, ha="right", va=side, bbox=box)
    for curve in (
        Curve("acceptance_rate", "acceptance rate"),
        Curve("token_acceptance_rate", "acceptance rate of the gate", GREEN, "-."),
    ):
        _draw(share_axis, *series(history, curve.name), curve)
    _dress(share_axis, is_share=True)
    share_axis.set_ylabel("share of tokens")
    share_axis.set_xlabel("optimizer step")
    if share_axis.get_legend_handles_labels()[1]:
        share_axis.legend(loc="lower left")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _draw(axis: Axes, steps: list[int], values: list[float], curve: Curve) -> None:
    """The values as they are, faint, and smoothed; a single one as a point."""
    if not values:
        return
    axis.plot(steps, values, color=curve.colour, alpha=0.3, linewidth=1, marker="o" if len(values) == 1 else None)
    axis.plot(steps, smooth(values), curve.style, color=curve.colour, linewidth=2, label=curve.label)


def smooth(values: list[float]) -> np.ndarray:
    """The running mean over a twentieth of the run."""
    return np.asarray(pd.Series(values).rolling(window(values), min_periods=1, center=True).mean())


def window(values: list[float]) -> int:
    """How many values a running mean is over; below 40 values it is one, and nothing is smoothed."""
    return max(1, len(values) // 20)
