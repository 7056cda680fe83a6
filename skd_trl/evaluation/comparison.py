"""Before and after: a student scored twice on the same held-out prompts, or two students of one teacher, as a table.

Intervals are bootstrapped over prompts (`bootstrap.py`). The dictionaries here are what metrics.json and the report hold.
"""

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from .bootstrap import estimate, paired_change, ratio, resampled_rows
from .scores import METRICS, Metric, Scores


EXPLANATION = (
    "{}; texts are greedy, samples are drawn at temperature 1. In brackets: 95% "
    "paired bootstrap interval over prompts."
)
KL = "KL(teacher || student) in nats per token"
OTHER_DIVERGENCE = "In the place of KL the divergence {}, in nats per token"
DRAFTS = "Drafts: the student drafts {} tokens for each forward of the teacher (speculative decoding)."
# Below six, even changes that all have one sign are more likely than one in twenty by chance (two sides: 2 / 2^5).
LEAST_PROMPTS = 6
TOO_FEW = "Of fewer than {} prompts no change is called better or worse."
COLOURS = {"better": "bold green", "worse": "bold red", "unclear": "dim"}


def compare(
    before: Scores, after: Scores, teacher: dict[str, np.ndarray], *, num_resamples: int = 2000, seed: int = 0
) -> dict:
    """
    Every metric before and after with its 95% bootstrap interval, the paired interval of the change, and the teacher's
    own value where it has one; a dictionary for metrics.json and for `comparison_table`.
    """
    rows = resampled_rows(len(before.responses), num_resamples, seed)
    metrics = {}
    for name in [name for name in before.values if name in after.values]:
        shown = shown_as(name)
        metrics[name] = {
            "before": estimate(before.values[name], rows),
            "after": estimate(after.values[name], rows),
            "change": paired_change(before.values[name], after.values[name], rows),
            "teacher": float(ratio(teacher[name])) if name in teacher else None,
            "better": "higher" if shown.higher_is_better and name not in after.lower_is_better else "lower",
            "num_prompts": int(((before.values[name] * after.values[name])[:, 1] > 0).sum()),
        }
    return {"num_prompts": len(before.responses), "metrics": metrics}


def shown_as(name: str) -> Metric:
    """How a metric is shown: as `METRICS` says, or by its name where it is a user's."""
    return METRICS.get(name) or Metric(name.replace("_", " "), True, 2)


def verdict(metric: dict) -> str:
    """`better`, `worse`, or `unclear` where the interval of the change holds 0, or is of fewer than `LEAST_PROMPTS` prompts, or where
    a number is not finite. The interval may be finite where the change is not: resamples without the prompt at fault are."""
    value, low, high = numbers_of(metric["change"])
    if is_of_few(metric) or not np.isfinite([value, low, high]).all() or low <= 0 <= high:
        return "unclear"
    return "better" if (low > 0) == (metric["better"] == "higher") else "worse"


def numbers_of(estimate: dict) -> tuple[float, float, float]:
    """Value, low and high of an estimate, also of one that was read from a file: there a null is not a number."""
    value, low, high = (np.nan if estimate[key] is None else estimate[key] for key in ("value", "low", "high"))
    return value, low, high


def explanation(comparison: dict) -> str:
    """How the columns of a comparison are read."""
    sentences = [EXPLANATION.format(divergence_in_words(comparison.get("divergence")))]
    if any(map(is_of_few, comparison["metrics"].values())):
        sentences.append(TOO_FEW.format(LEAST_PROMPTS))
    if "num_draft_tokens" in comparison:
        sentences.append(DRAFTS.format(comparison["num_draft_tokens"]))
    return " ".join(sentences)


def divergence_in_words(name: str | None) -> str:
    """What the rows of KL are: KL, which is not named, or another divergence."""
    return KL if name in (None, "forward_kl") else OTHER_DIVERGENCE.format(name)


def is_of_few(metric: dict) -> bool:
    """Whether a metric is of too few prompts to tell a direction. Files of the first version do not say of how many."""
    return metric.get("num_prompts", LEAST_PROMPTS) < LEAST_PROMPTS


def comparison_table(comparison: dict, title: str = "The student before and after") -> Table:
    """The comparison for a terminal of 80 columns; metrics.json has the intervals of before and after too."""
    metrics = comparison["metrics"]
    caption = explanation(comparison)
    own = {name: metric["teacher"] for name, metric in metrics.items() if metric["teacher"] is not None}
    if rouge := [f"{value:.1f}" for name, value in own.items() if name.startswith("rouge")]:
        caption += f" The teacher's own ROUGE-1/2/L to the references: {' / '.join(rouge)}."
    for name, value in own.items():
        if not name.startswith("rouge"):
            caption += f" The teacher's own {shown_as(name).label}: {value:.{shown_as(name).digits}f}."
    table = Table(
        title=f"{title}, on {num_prompts_in_words(comparison['num_prompts'])}",
        caption=caption,
        caption_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
    )
    for heading, justify in zip(("", "before", "after", "change", ""), ("left", *["right"] * 3, "left"), strict=True):
        table.add_column(heading, justify=justify, no_wrap=True)
    families = [name.rpartition("_")[2] if "rouge" in name else name.partition("_")[0] for name in metrics]
    for (name, metric), family, following in zip(metrics.items(), families, [*families[1:], None], strict=True):
        row = comparison_row(name, metric)
        table.add_row(
            *(Text(row[column]) for column in ("label", "before", "after", "change")),
            Text(row["verdict"], style=COLOURS[row["verdict"]]),
            end_section=family != following,
        )
    return table


def num_prompts_in_words(number: int) -> str:
    """Such as `40 held-out prompts`."""
    return f"{number} held-out prompt{'' if number == 1 else 's'}"


def comparison_row(name: str, metric: dict) -> dict[str, str]:
    """One metric as the texts of its table cells, for the terminal and for the page."""
    digits = f"z.{shown_as(name).digits}f"  # without a zero that has a sign
    value, low, high = numbers_of(metric["change"])
    before, after = (numbers_of(metric[name])[0] for name in ("before", "after"))
    return {
        "label": shown_as(name).label,
        "before": f"{before:{digits}}",
        "after": f"{after:{digits}}",
        "change": f"{value:+{digits}} [{low:+{digits}}, {high:+{digits}}]",
        "verdict": verdict(metric),
    }


def scores_table(scores: Scores, teacher: dict[str, np.ndarray], title: str, divergence: str | None = None) -> Table:
    """The scores of one student with their intervals, and the teacher's own where it has some."""
    rows = resampled_rows(len(scores.responses))
    table = Table(
        title=f"{title}, on {num_prompts_in_words(len(rows[0]))}",
        box=SIMPLE_HEAD,
        pad_edge=False,
        caption_justify="left",
    )
    table.caption = EXPLANATION.format(divergence_in_words(divergence)).replace("paired ", "")
    for heading, justify in (("", "left"), ("student", "right"), ("teacher", "right")):
        table.add_column(heading, justify=justify, no_wrap=True)
    for name, values in scores.values.items():
        shown, found = shown_as(name), estimate(values, rows)
        own = f"{float(ratio(teacher[name])):.{shown.digits}f}" if name in teacher else ""
        value, low, high = (f"{found[key]:.{shown.digits}f}" for key in ("value", "low", "high"))
        table.add_row(Text(shown.label), Text(f"{value} [{low}, {high}]"), own)
    return table
