"""Compare the scores of two models on the same rows, with intervals."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.stats import norm, t

from medibot.evaluation.metrics import METRICS, Metric, Row

CONFIDENCE, RESAMPLES, SEED = 0.95, 10_000, 0
# Resamples x groups held in memory at once
CHUNK = 4_000_000
FIGURES = ("baseline", "value", "difference", "low", "high", "verdict")


def compare_scores(
    a: Sequence[Row], b: Sequence[Row], groups: Sequence[str], metrics: Sequence[Metric] = METRICS
) -> dict[str, dict[str, Any]]:
    """Return for each metric `label`, `better`, `baseline` (of a), `value` (of b), `difference`, `low`, `high`, `verdict`.

    a[i] and b[i] score the same row, of group groups[i]. The intervals are 95 % percentile intervals of a paired
    bootstrap that draws whole groups, since rows of one topic stand and fall together; the percentiles are widened for
    few groups (Hesterberg 2015, What Teachers Should Know About the Bootstrap). One group gives no interval.
    """
    names, member = np.unique(groups, return_inverse=True)
    count = len(names)
    # Numerator and denominator of a, then of b
    sums = np.zeros((count, len(metrics), 4))
    for index, metric in enumerate(metrics):
        for part, (rows, key) in enumerate(itertools.product((a, b), (metric.numerator, metric.denominator))):
            column = [row[key] if key else 1 for row in rows]
            sums[:, index, part] = np.bincount(member, weights=column, minlength=count)
    whole, generator, step = sums.sum(axis=0), np.random.default_rng(SEED), max(1, CHUNK // count)
    # Sums of as many groups as there are, drawn with replacement: [resamples, metrics, 4]
    sizes = [min(step, RESAMPLES - start) for start in range(0, RESAMPLES, step)] if count > 1 else []
    parts = [generator.multinomial(count, np.full(count, 1 / count), size) @ sums.reshape(count, -1) for size in sizes]
    drawn = np.concatenate(parts).reshape(-1, *sums.shape[1:]) if parts else None
    results = {}
    for index, metric in enumerate(metrics):
        of_a, of_b, gained = map(float, measure(metric, whole[index]))
        low, high, verdict = None, None, "no evidence"
        if drawn is not None:
            low, high = np.quantile(measure(metric, drawn[:, index])[2], tails(count)).tolist()
            if not low <= 0.0 <= high:
                gain = "better" if (high < 0.0) == (metric.better == "lower") else "worse"
                verdict = "differs" if metric.better == "neither" else gain
        figures = dict(zip(FIGURES, (of_a, of_b, gained, low, high, verdict), strict=True))
        results[metric.name] = {"label": metric.label, "better": metric.better} | figures
    return results


def measure(metric: Metric, sums: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the metric of a, of b, and what b has more, from the four sums in the last axis."""
    numerator, denominator = np.moveaxis(sums, -1, 0)[::2], np.moveaxis(sums, -1, 0)[1::2]
    if metric.scale == "log_distance":
        # Half a word keeps a ratio of words finite
        a, b = (numerator + 0.5) / (denominator + 0.5)
        return a, b, np.abs(np.log(b)) - np.abs(np.log(a))
    # Nothing by nothing is 0
    ratio = np.divide(numerator, denominator, out=np.zeros_like(numerator), where=denominator != 0)
    a, b = np.exp(np.minimum(ratio, 700.0)) if metric.scale == "exp" else ratio
    return a, b, b - a


def tails(groups: int) -> tuple[float, float]:
    """Return the two percentiles of the expanded percentile interval, as shares."""
    width = math.sqrt(groups / (groups - 1)) * t.ppf((1 + CONFIDENCE) / 2, groups - 1)
    return float(norm.cdf(-width)), float(norm.cdf(width))


def interval_text(found: dict[str, Any], digits: int = 4, scale: float = 1) -> str:
    """Return an interval as people read it."""
    if found["low"] is None:
        return "too few groups for an interval"
    return f"{scale * found['low']:+.{digits}f} to {scale * found['high']:+.{digits}f}"
