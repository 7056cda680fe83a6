"""What a run looked like: metrics.json, training.png and samples.html, from the files the run left behind.

Reads `trainer_state.json` (the log), `completions/*.parquet` (sampled responses) and, where train_summarization.py wrote
it, `evaluation.json`. The page needs nothing but itself: no network, no script. Replaced tokens differ in weight and in
an underline, not in colour alone.

    python examples/report.py out
"""

import base64
import json
from collections.abc import Iterator
from pathlib import Path

import matplotlib


matplotlib.use("Agg")  # noqa: E402 (before pyplot, which would ask for a display)

import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402
from jinja2 import Environment, FileSystemLoader  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.ticker import MaxNLocator, PercentFormatter  # noqa: E402

from .comparison import EXPLANATION, comparison_row  # noqa: E402


# Curves of the lower plot, where the log has them: label, colour (of a set that colour-blind people tell apart), style.
SHARES = {
    "acceptance_rate": ("acceptance rate", "#0072B2", "-"),
    "token_acceptance_rate": ("acceptance rate of the gate", "#009E73", "-."),
}
# What the page says of the responses, by `rollout`.
WHO_WROTE = {
    "interleaved": "Each response was written by the student and the teacher together: the student proposed every token, and "
    "where the teacher did not accept the proposal, it put a token of its own in its place.",
    "student": "Each response was written by the student alone.",
    "teacher": "Each response was written by the teacher alone.",
}
MAX_STEPS, MAX_SAMPLES, MAX_EXAMPLES = 12, 4, 12


def write_report(run_dir: Path) -> list[Path]:
    """Write the three files into `run_dir`, and return their paths."""
    history = read_history(run_dir)
    evaluation = read_json(run_dir / "evaluation.json")
    metrics, plot, page = (run_dir / name for name in ("metrics.json", "training.png", "samples.html"))

    metrics.write_text(json.dumps(summarize(history, evaluation), indent=2))
    figure = plot_training(history, title=f"{run_dir.resolve().name}: loss, and who wrote the tokens")
    figure.savefig(plot, dpi=120)
    plt.close(figure)
    page.write_text(
        render_page(read_completions(run_dir), evaluation, plot.read_bytes(), name=run_dir.resolve().name),
        encoding="utf-8",
    )
    return [metrics, plot, page]


def read_history(run_dir: Path) -> list[dict]:
    """The trainer's log, from the run's end, or else from its newest checkpoint."""
    states = [
        *run_dir.glob("trainer_state.json"),
        *sorted(run_dir.glob("checkpoint-*/trainer_state.json"), key=step_of)[::-1],
    ]
    if not states:
        raise FileNotFoundError(
            f"{run_dir} holds no trainer_state.json, nor does a checkpoint in it, so there is no log to report. Give the "
            "output directory of a run that called trainer.save_state() or saved a checkpoint."
        )
    return json.loads(states[0].read_text())["log_history"]


def step_of(state: Path) -> int:
    return int(state.parent.name.rpartition("-")[2])


def read_json(path: Path) -> dict:
    return json.loads(path.read_text()) if path.exists() else {}


def read_completions(run_dir: Path) -> pd.DataFrame:
    files = sorted((run_dir / "completions").glob("*.parquet"))
    columns = ["step", "prompt", "response", "tokens", "replaced"]
    return pd.concat([pd.read_parquet(file) for file in files]) if files else pd.DataFrame(columns=columns)


def summarize(history: list[dict], evaluation: dict) -> dict:
    """
    The content of metrics.json: the evaluation's comparison and settings, and of every logged quantity its first and
    last value and its mean over the run.
    """
    training = {}
    for name in sorted({name for entry in history for name in entry} - {"step", "epoch"}):
        values = series(history, name)[1]
        if len(values):
            training[name] = {"first": values[0], "last": values[-1], "mean": float(np.mean(values))}
    return {**{key: value for key, value in evaluation.items() if key != "examples"}, "training": training}


def series(history: list[dict], name: str) -> tuple[list[int], list[float]]:
    """Steps and values of one logged quantity."""
    entries = [entry for entry in history if isinstance(entry.get(name), (int, float))]
    return [entry["step"] for entry in entries], [float(entry[name]) for entry in entries]


def plot_training(history: list[dict], *, title: str) -> Figure:
    """Loss above, shares of accepted and of replaced tokens below, over optimizer steps."""
    figure, (loss_axis, share_axis) = plt.subplots(2, 1, figsize=(8, 6.4), sharex=True, layout="constrained")
    figure.suptitle(title)
    draw(loss_axis, *series(history, "loss"), label="training loss", colour="#000000")
    evaluated = series(history, "eval_loss")
    if evaluated[0]:
        loss_axis.plot(*evaluated, "s", color="#CC79A7", label="loss on held-out references")
        loss_axis.legend(frameon=False)
    loss_axis.set_ylabel("training loss\n(nats per token)")
    loss_axis.set_ylim(bottom=0)

    steps, replaced = series(history, "replaced_share")
    if replaced:
        kept = 1 - smooth(replaced)
        share_axis.fill_between(steps, kept, 1, color="#D55E00", alpha=0.25, hatch="//")
        share_axis.fill_between(steps, 0, kept, color="#0072B2", alpha=0.12)
        box = {"boxstyle": "round,pad=0.25", "facecolor": "white", "edgecolor": "none", "alpha": 0.8}
        for height, side, text in ((0.95, "top", "replaced by the teacher"), (0.05, "bottom", "the student's own")):
            share_axis.text(0.98, height, text, transform=share_axis.transAxes, ha="right", va=side, bbox=box)
    for name, (label, colour, style) in SHARES.items():
        draw(share_axis, *series(history, name), label=label, colour=colour, style=style)
    share_axis.set_ylim(0, 1)
    share_axis.yaxis.set_major_formatter(PercentFormatter(1.0))
    share_axis.set_ylabel("share of tokens")
    share_axis.set_xlabel("optimizer step")
    share_axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    if share_axis.get_legend_handles_labels()[1]:
        share_axis.legend(loc="lower left")
    for axis in (loss_axis, share_axis):
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    return figure


def draw(axis: Axes, steps: list[int], values: list[float], *, label: str, colour: str, style: str = "-") -> None:
    """The values as they are, faint, and smoothed."""
    if not values:
        return
    axis.plot(steps, values, color=colour, alpha=0.25, linewidth=1)
    axis.plot(steps, smooth(values), style, color=colour, linewidth=2, label=label)


def smooth(values: list[float]) -> np.ndarray:
    """The running mean over a twentieth of the run."""
    return np.asarray(pd.Series(values).rolling(max(1, len(values) // 20), min_periods=1, center=True).mean())


def render_page(completions: pd.DataFrame, evaluation: dict, plot: bytes, *, name: str) -> str:
    """The HTML page as one string; every text in it is escaped."""
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent / "templates"), autoescape=True)
    comparison = evaluation.get("comparison")
    return environment.get_template("samples.html.jinja").render(
        title=f"Distillation run: {name}",
        settings=flattened(evaluation.get("settings", {})),
        comparison=comparison,
        comparison_rows=[comparison_row(*item) for item in comparison["metrics"].items()] if comparison else [],
        explanation=EXPLANATION,
        plot=base64.b64encode(plot).decode(),
        steps=list(shown_steps(completions)),
        who_wrote=WHO_WROTE.get(
            evaluation.get("settings", {}).get("rollout"), "Responses as they were sampled in training."
        ),
        examples=evaluation.get("examples", [])[:MAX_EXAMPLES],
    )


def shown_steps(completions: pd.DataFrame) -> Iterator[dict]:
    """Up to `MAX_STEPS` of the saved steps, evenly spread with the first and the last, and a few responses of each."""
    steps = sorted(completions["step"].unique())
    chosen = np.unique(np.linspace(0, len(steps) - 1, min(MAX_STEPS, len(steps))).round().astype(int)) if steps else []
    for index in chosen:
        rows = completions[completions["step"] == steps[index]]
        replaced = np.concatenate([np.asarray(row, dtype=bool) for row in rows["replaced"]])
        yield {
            "step": int(steps[index]),
            "num_responses": len(rows),
            "replaced_share": float(replaced.mean()) if len(replaced) else 0.0,
            "samples": [shown_sample(row) for row in rows.head(MAX_SAMPLES).to_dict("records")],
        }


def shown_sample(row: dict) -> dict:
    proposals = row.get("proposals")
    proposals = [None] * len(row["tokens"]) if proposals is None else proposals
    tokens = []
    for position, (text, replaced, proposal) in enumerate(
        zip(row["tokens"], row["replaced"], proposals, strict=True), start=1
    ):
        shown = visible(proposal) if replaced and proposal is not None else ""
        who = "the student's"
        if replaced:
            who = f"the teacher's, in place of the student's “{shown}”" if shown else "the teacher's"
        tokens.append(
            {
                "text": visible(text),
                "after": "\n" * text.count("\n"),
                "replaced": bool(replaced),
                "proposal": shown,
                "special": text.startswith("<") and text.endswith(">"),
                "title": f"token {position}: {who}",
            }
        )
    return {"prompt": row["prompt"], "tokens": tokens, "num_replaced": sum(token["replaced"] for token in tokens)}


def visible(token: str) -> str:
    """The text of a token that takes up room on the page, whatever it is."""
    return token.replace("\n", "↵") or "∅"


def flattened(settings: dict) -> dict[str, object]:
    pairs = ((key, value) for key, value in settings.items() if not isinstance(value, dict))
    nested = (pair for value in settings.values() if isinstance(value, dict) for pair in value.items())
    return {key.replace("_", " "): value for key, value in (*pairs, *nested)}
