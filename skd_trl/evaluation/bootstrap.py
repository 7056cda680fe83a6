"""Intervals by resampling prompts: what a metric, or its change, would be on other prompts of the same kind.

A metric is a ratio of sums over rows (`Scores.values`). The change has a paired interval: each resample takes the same prompts
before and after, so what makes a prompt hard drops out. Letters: R rows, S resamples.
"""

import numpy as np


LEVEL = 0.95


def resampled_rows(num_rows: int, num_resamples: int = 2000, seed: int = 0) -> np.ndarray:
    """Row numbers (S, R), drawn with replacement."""
    return np.random.default_rng(seed).integers(num_rows, size=(num_resamples, num_rows))


def ratio(values: np.ndarray, rows: np.ndarray | None = None) -> np.ndarray:
    """The metric of `values` (R, 2) on all rows, or on each choice of `rows` (S, R). Not a number where no row has a weight."""
    total, weight = (values if rows is None else values[rows]).sum(-2).T
    return np.divide(total, weight, out=np.full_like(np.asarray(total, dtype=np.float64), np.nan), where=weight > 0)


def interval(value: float, resampled: np.ndarray) -> dict[str, float]:
    """`value` with the ends of its 95% interval, `low` and `high`."""
    tail = (1 - LEVEL) / 2
    low, high = np.nanquantile(resampled, (tail, 1 - tail))
    return {"value": float(value), "low": float(low), "high": float(high)}


def estimate(values: np.ndarray, rows: np.ndarray) -> dict[str, float]:
    """A metric with its interval; `rows` are those of [`resampled_rows`]."""
    return interval(float(ratio(values)), ratio(values, rows))


def paired_change(before: np.ndarray, after: np.ndarray, rows: np.ndarray) -> dict[str, float]:
    """`after` less `before`, with its paired interval."""
    return interval(float(ratio(after) - ratio(before)), ratio(after, rows) - ratio(before, rows))
