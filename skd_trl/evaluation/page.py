"""The page of a run, as one HTML file: what convinces most first. Every text in it is escaped.

Replaced tokens differ in weight and in an underline, not in colour alone; light and dark follow the reader's system; it fits a phone.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup

from ..training.completions import whole_pieces
from .comparison import comparison_row, explanation, num_prompts_in_words
from .plots import panels, series, window


if TYPE_CHECKING:
    from .report import Run

# What the page says of the responses, by `rollout`.
WHO_WROTE = {
    "interleaved": "Each response was written by the student and the teacher together: the student proposed every token, and "
    "where the teacher did not accept the proposal, it put its own token in its place.",
    "student": "Each response was written by the student alone.",
    "teacher": "Each response was written by the teacher alone.",
}
MAX_STEPS, MAX_SAMPLES, MAX_EXAMPLES = 12, 4, 12


def render_page(run: "Run") -> str:
    """The HTML page as one string."""
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent / "templates"), autoescape=True)
    comparison, settings = run.evaluation.get("comparison"), run.evaluation.get("settings", {})
    fixed = run.completions[run.completions["is_fixed"].astype(bool)]
    return environment.get_template("samples.html.jinja").render(
        title=f"Distillation run: {run.name}",
        run=run,
        command=settings.get("command"),
        settings=flattened({key: value for key, value in settings.items() if key != "command"}),
        comparison=comparison,
        comparison_rows=[comparison_row(*item) for item in comparison["metrics"].items()] if comparison else [],
        explanation=explanation(comparison) if comparison else "",
        num_prompts=num_prompts_in_words(comparison["num_prompts"]) if comparison else "",
        panels=[{**panel, "svg": Markup(panel["svg"])} for panel in panels(run.history)],
        is_smoothed=window(series(run.history, "loss")[1]) > 1,
        fixed=list(shown_prompts(fixed)),
        steps=list(shown_steps(run.completions[~run.completions["is_fixed"].astype(bool)])),
        who_wrote=WHO_WROTE.get(settings.get("rollout"), "Responses as they were sampled in training."),
        examples=run.examples[:MAX_EXAMPLES],
        num_examples=len(run.examples),
    )


def chosen_steps(completions: pd.DataFrame) -> list[int]:
    """Up to `MAX_STEPS` of the saved steps, evenly spread with the first and the last."""
    steps = sorted(completions["step"].unique())
    index = np.unique(np.linspace(0, len(steps) - 1, min(MAX_STEPS, len(steps))).round().astype(int))
    return [int(steps[i]) for i in index]


def shown_prompts(fixed: pd.DataFrame) -> Iterator[dict]:
    """The prompts that were sampled again and again, each with what was written at some of the steps."""
    steps = chosen_steps(fixed)
    for prompt, rows in fixed.groupby("prompt", sort=False):
        records = rows.loc[rows["step"].isin(steps)].to_dict("records")
        yield {"prompt": prompt, "samples": [{"step": row["step"], **shown_sample(row)} for row in records]}


def shown_steps(completions: pd.DataFrame) -> Iterator[dict]:
    """Some of the saved steps, and a few responses of each."""
    for step in chosen_steps(completions):
        rows = completions[completions["step"] == step]
        replaced = np.concatenate([np.asarray(row, dtype=bool) for row in rows["replaced"]])
        yield {
            "step": step,
            "num_responses": len(rows),
            "replaced_share": float(replaced.mean()) if len(replaced) else 0.0,
            "samples": [shown_sample(row) for row in rows.head(MAX_SAMPLES).to_dict("records")],
        }


def shown_sample(row: dict) -> dict:
    """A response as pieces that are whole characters, with what the page says of each."""
    tokens, replaced = list(row["tokens"]), [bool(by_teacher) for by_teacher in row["replaced"]]
    proposals = row.get("proposals")
    proposals = [None] * len(tokens) if proposals is None else list(proposals)
    pieces = []
    for text, by_teacher, start, stop in whole_pieces(tokens, replaced, marker="∅"):
        proposed = [str(proposals[i]) for i in range(start, stop) if replaced[i] and proposals[i] is not None]
        shown = visible("".join(proposed)) if proposed else ""
        who = "the student's"
        if by_teacher:
            who = f"the teacher's, in place of the student's “{shown}”" if shown else "the teacher's"
        place = f"token {stop}" if stop - start == 1 else f"tokens {start + 1} to {stop}"
        pieces.append(
            {
                "text": visible(text),
                "after": "\n" * text.count("\n"),
                "replaced": by_teacher,
                "proposal": shown,
                "special": text.startswith("<") and text.endswith(">"),
                "title": f"{place}: {who}",
            }
        )
    return {"prompt": row["prompt"], "pieces": pieces, "num_tokens": len(tokens), "num_replaced": sum(replaced)}


def visible(text: str) -> str:
    """The text with something to see, whatever it is."""
    return text.replace("\n", "↵") or "∅"


def flattened(settings: dict) -> dict[str, object]:
    """Settings without nesting: those of a nested dict under its name, but for versions, whose names say enough."""
    flat = {key: value for key, value in settings.items() if not isinstance(value, dict)}
    for key, value in settings.items():
        if isinstance(value, dict):
            flat |= {name if key == "versions" else f"{key}.{name}": inner for name, inner in value.items()}
    return {name.replace("_", " "): value for name, value in flat.items()}
