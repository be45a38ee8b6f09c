"""Compare the scores of two models on the same rows, with intervals."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.stats import norm, t

from medibot.evaluation.metrics import METRICS, Metric, Row

CONFIDENCE, RESAMPLES, SEED = 0.95, 10_000, 0
# Resamples x groups held in memory at once
CHUNK = 4_000_000


def total(scores: Sequence[Row]) -> dict[str, float]:
    """Return each metric's value on the rows."""
    sums = {metric.name: [np.array(sum(column)) for column in columns(metric, scores)] for metric in METRICS}
    return {metric.name: float(value(metric, *sums[metric.name])) for metric in METRICS}


def columns(metric: Metric, scores: Sequence[Row]) -> tuple[list[float], list[float]]:
    """Return the metric's numerators and denominators."""
    numerators = [float(row[metric.numerator]) for row in scores]
    return numerators, [float(row[metric.denominator]) if metric.denominator else 1.0 for row in scores]


def value(metric: Metric, numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Return the metric from its two sums; nothing by nothing is 0, and half a word keeps a ratio of words finite."""
    if metric.scale == "log_distance":
        return (numerator + 0.5) / (denominator + 0.5)
    ratio = np.divide(numerator, denominator, out=np.zeros_like(numerator, dtype=float), where=denominator != 0)
    return np.exp(np.minimum(ratio, 700.0)) if metric.scale == "exp" else ratio


def difference(metric: Metric, sums: np.ndarray) -> np.ndarray:
    """Return what b has more than a, from the four sums in the last axis: numerator and denominator of a, then of b."""
    a, b = (value(metric, sums[..., at], sums[..., at + 1]) for at in (0, 2))
    return np.abs(np.log(b)) - np.abs(np.log(a)) if metric.scale == "log_distance" else b - a


def compare_scores(
    a: Sequence[Row], b: Sequence[Row], groups: Sequence[str], metrics: Sequence[Metric] = METRICS
) -> dict[str, dict[str, Any]]:
    """Return for each metric `baseline` (of a), `value` (of b), `difference` with `low` and `high`, and `verdict`.

    a[i] and b[i] score the same row, of group groups[i]. The intervals are 95 % percentile intervals of a paired
    bootstrap that draws whole groups, since rows of one topic stand and fall together; the percentiles are widened for
    few groups (Hesterberg 2015, What Teachers Should Know About the Bootstrap). One group gives no interval.
    """
    names, member = np.unique(groups, return_inverse=True)
    sums = np.zeros((len(names), len(metrics), 4))
    for index, metric in enumerate(metrics):
        for part, column in enumerate([*columns(metric, a), *columns(metric, b)]):
            sums[:, index, part] = np.bincount(member, weights=column, minlength=len(names))
    drawn = resample(sums) if len(names) > 1 else None
    whole = sums.sum(axis=0)
    results = {}
    for index, metric in enumerate(metrics):
        low = high = None
        if drawn is not None:
            low, high = (float(q) for q in np.quantile(difference(metric, drawn[:, index]), tails(len(names))))
        results[metric.name] = {
            "baseline": float(value(metric, *whole[index, :2])),
            "value": float(value(metric, *whole[index, 2:])),
            "difference": float(difference(metric, whole[index])),
            "low": low,
            "high": high,
            "verdict": verdict(metric, low, high),
        }
    return results


def verdict(metric: Metric, low: float | None, high: float | None) -> str:
    """Return better, worse, or that the interval holds zero."""
    if low is None or high is None or low <= 0.0 <= high:
        return "no evidence"
    return "better" if (high < 0.0) == (metric.better == "lower") else "worse"


def resample(sums: np.ndarray) -> np.ndarray:
    """Return sums of as many groups as there are, drawn with replacement: [RESAMPLES, metrics, 4] of [groups, metrics, 4]."""
    generator = np.random.default_rng(SEED)
    count = len(sums)
    step = max(1, CHUNK // count)
    parts = [
        generator.multinomial(count, np.full(count, 1 / count), size=min(step, RESAMPLES - start))
        @ sums.reshape(count, -1)
        for start in range(0, RESAMPLES, step)
    ]
    return np.concatenate(parts).reshape(RESAMPLES, *sums.shape[1:])


def tails(groups: int) -> tuple[float, float]:
    """Return the two percentiles of the expanded percentile interval, as shares."""
    width = math.sqrt(groups / (groups - 1)) * t.ppf((1 + CONFIDENCE) / 2, groups - 1)
    return float(norm.cdf(-width)), float(norm.cdf(width))


def interval_text(found: dict[str, Any], digits: int = 4, scale: float = 1) -> str:
    """Return an interval as people read it."""
    if found["low"] is None:
        return "too few groups for an interval"
    return f"{scale * found['low']:+.{digits}f} to {scale * found['high']:+.{digits}f}"
