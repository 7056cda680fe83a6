"""Metrics of texts: functions of predictions and targets, one number per row.

Your own metric is a function `(predictions: list[str], targets: list[str])` that returns a list of numbers, or a dict of
such lists; give it as an object or by name, `"module:function"`. Higher is better, unless it says `higher_is_better = False`.
"""

import importlib
import importlib.util
import logging
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np


logger = logging.getLogger(__name__)


# Scripts that put no spaces between words, of which each character is a token of ROUGE. The long-vowel mark is of no script.
WITHOUT_SPACES = r"[[\p{Han}\p{Hiragana}\p{Katakana}ー\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]&&[\p{L}\p{Nl}]]"
WORDS = rf"(?V1){WITHOUT_SPACES}\p{{M}}*|[[\p{{L}}\p{{M}}\p{{Nd}}]--{WITHOUT_SPACES}]+"

TextMetric = Callable[[list[str], list[str]], Sequence[float] | Mapping[str, Sequence[float]]]


def rouge(predictions: list[str], targets: list[str]) -> dict[str, list[float]]:
    """ROUGE-1, 2 and L: F-measures in percent, with stemming of English words (needs the package rouge-score). Tokens are those of
    [`words`], as rouge-score's own know no letters but a to z."""
    from nltk.stem.porter import PorterStemmer
    from rouge_score.rouge_scorer import RougeScorer

    kinds = ("rouge1", "rouge2", "rougeL")
    scorer = RougeScorer(kinds, tokenizer=SimpleNamespace(tokenize=partial(words, stem=PorterStemmer().stem)))
    scores = [scorer.score(target, prediction) for prediction, target in zip(predictions, targets, strict=True)]
    return {kind: [100 * score[kind].fmeasure for score in scores] for kind in kinds}


def words(text: str, stem: Callable[[str], str]) -> list[str]:
    """The words of `text` in lower case: runs of letters and digits of any script, or single characters where a script has no
    spaces. Words of a to z and digits are what rouge-score makes of them: stemmed if they have more than three characters."""
    import regex  # nltk, and so rouge-score, needs it too

    found = regex.findall(WORDS, unicodedata.normalize("NFC", text.lower()))
    return [stem(word) if word.isascii() and len(word) > 3 else word for word in found]


def exact_match(predictions: list[str], targets: list[str]) -> list[float]:
    """100 where prediction and target are the same text, else 0."""
    return [100.0 * (prediction == target) for prediction, target in zip(predictions, targets, strict=True)]


TEXT_METRICS: dict[str, TextMetric] = {"rouge": rouge, "exact_match": exact_match}


def text_metrics(named: Iterable[str | TextMetric] | None = None) -> dict[str, TextMetric]:
    """Metrics by name, from names in `TEXT_METRICS`, `"module:function"` or functions. By default ROUGE, where rouge-score is
    installed.

    Raises:
        `ValueError`: for a name that is not one, or not of a function, and for ROUGE without rouge-score.
    """
    is_installed = importlib.util.find_spec("rouge_score") is not None
    metrics: dict[str, TextMetric] = {}
    if named is None and not is_installed:
        logger.warning("ROUGE is left out: pip install 'skd_trl[report]'.")
    for metric in named if named is not None else (["rouge"] if is_installed else []):
        if not isinstance(metric, str):
            metrics[getattr(metric, "__name__", type(metric).__name__)] = metric
            continue
        if metric == "rouge" and not is_installed:
            raise ValueError("The metric 'rouge' needs the package rouge-score: pip install rouge-score.")
        module, _, function = metric.partition(":")
        if not function and metric not in TEXT_METRICS:
            raise ValueError(
                f"metric {metric!r} is unknown; choose one of {', '.join(TEXT_METRICS)}, or name your own function as 'module:function'."
            )
        try:
            found: Any = TEXT_METRICS.get(metric) or getattr(importlib.import_module(module), function)
        except (ImportError, AttributeError) as error:
            raise ValueError(
                f"metric {metric!r} cannot be imported: {error}. Name a function as 'module:function', with the module installed "
                "or in the current folder."
            ) from error
        if not callable(found):
            raise ValueError(
                f"metric {metric!r} is of type {type(found).__name__}; give a function of predictions and targets."
            )
        metrics[metric.rpartition(":")[2]] = found
    return metrics


def scored(
    metrics: dict[str, TextMetric], predictions: list[str], targets: Sequence[str | None], suffix: str
) -> dict[str, np.ndarray]:
    """Each metric as `(rows, 2)`: its value and 1 for each row, or 0 and 0 where there is no target. A metric that returns one list
    is called `{name}_{suffix}`, one that returns a dict `{key}_{suffix}`. Nothing, if no row has a target."""
    rows = [row for row, target in enumerate(targets) if target is not None]
    columns: dict[str, np.ndarray] = {}
    for name, metric in metrics.items() if rows else ():
        found = metric([predictions[row] for row in rows], [str(targets[row]) for row in rows])
        for key, values in found.items() if isinstance(found, Mapping) else ((name, found),):
            if len(values) != len(rows):
                raise ValueError(f"The metric {name!r} returned {len(values)} numbers for {len(rows)} rows.")
            column = np.zeros((len(targets), 2))
            column[rows] = np.stack([np.asarray(values, dtype=np.float64), np.ones(len(rows))], axis=1)
            columns[f"{key}_{suffix}"] = column
    return columns
