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
    # Numerator and denominator of a, then of b
    sums = np.zeros((len(names), len(metrics), 4))
    for index, metric in enumerate(metrics):
        for part, (rows, key) in enumerate(itertools.product((a, b), (metric.numerator, metric.denominator))):
            column = [row[key] if key else 1 for row in rows]
            sums[:, index, part] = np.bincount(member, weights=column, minlength=len(names))
    whole, drawn = sums.sum(axis=0), resample(sums) if len(names) > 1 else None
    results = {}
    for index, metric in enumerate(metrics):
        low, high, verdict = None, None, "no evidence"
        if drawn is not None:
            low, high = np.quantile(difference(metric, drawn[:, index]), tails(len(names))).tolist()
            if not low <= 0.0 <= high:
                verdict = "better" if (high < 0.0) == (metric.better == "lower") else "worse"
        of_a, of_b = (float(value(metric, *whole[index, at : at + 2])) for at in (0, 2))
        figures = (of_a, of_b, float(difference(metric, whole[index])), low, high, verdict)
        results[metric.name] = {
            "label": metric.label,
            "better": metric.better,
            **dict(zip(FIGURES, figures, strict=True)),
        }
    return results


def value(metric: Metric, numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Return the metric from its two sums; nothing by nothing is 0, and half a word keeps a ratio of words finite."""
    if metric.scale == "log_distance":
        return (numerator + 0.5) / (denominator + 0.5)
    ratio = np.divide(numerator, denominator, out=np.zeros_like(numerator, dtype=float), where=denominator != 0)
    return np.exp(np.minimum(ratio, 700.0)) if metric.scale == "exp" else ratio


def difference(metric: Metric, sums: np.ndarray) -> np.ndarray:
    """Return what b has more than a, from the four sums in the last axis."""
    a, b = (value(metric, sums[..., at], sums[..., at + 1]) for at in (0, 2))
    return np.abs(np.log(b)) - np.abs(np.log(a)) if metric.scale == "log_distance" else b - a


def resample(sums: np.ndarray) -> np.ndarray:
    """Return sums of as many groups as there are, drawn with replacement: [RESAMPLES, metrics, 4] of [groups, metrics, 4]."""
    generator, count = np.random.default_rng(SEED), len(sums)
    step, shares = max(1, CHUNK // count), np.full(count, 1 / count)
    sizes = [min(step, RESAMPLES - start) for start in range(0, RESAMPLES, step)]
    parts = [generator.multinomial(count, shares, size) @ sums.reshape(count, -1) for size in sizes]
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
