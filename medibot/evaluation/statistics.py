"""TODO."""

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import Any

import numpy as np

from medibot.evaluation.metrics import METRICS, Metric, Row

CONFIDENCE = 0.95


# Resamples x groups held in memory at once
CHUNK = 4_000_000


def total(scores: Sequence[Row]) -> dict[str, float]:
    """Each metric's value on the rows."""
    return {
        metric.name: float(value(metric, *(np.array(sum(column)) for column in columns(metric, scores))))
        for metric in METRICS
    }


def columns(metric: Metric, scores: Sequence[Row]) -> tuple[list[float], list[float]]:
    return (
        [float(row[metric.numerator]) for row in scores],
        [float(row[metric.denominator]) if metric.denominator else 1.0 for row in scores],
    )


def value(metric: Metric, numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """The metric from its two sums; nothing by nothing is 0, and of word counts half a word keeps the ratio finite."""
    if metric.scale == "log_distance":
        return (numerator + 0.5) / (denominator + 0.5)
    ratio = np.divide(numerator, denominator, out=np.zeros_like(numerator, dtype=float), where=denominator != 0)
    return np.exp(np.minimum(ratio, 700.0)) if metric.scale == "exp" else ratio


def compared(metric: Metric, numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """The number whose difference is taken."""
    found = value(metric, numerator, denominator)
    return np.abs(np.log(found)) if metric.scale == "log_distance" else found


def compare_scores(
    a: Sequence[Row],
    b: Sequence[Row],
    groups: Sequence[str],
    seed: int = 0,
    resamples: int = 10_000,
    measured: Sequence[Metric] = METRICS,
) -> dict[str, dict[str, Any]]:
    """For each metric: `baseline` (of a), `value` (of b), `difference` with `low` and `high`, and `verdict`.

    a[i] and b[i] score the same row, of group groups[i]. The intervals are 95 % percentile intervals of a paired
    bootstrap that draws whole groups, since rows of one topic stand and fall together; the percentiles are widened for
    few groups (Hesterberg 2015, What Teachers Should Know About the Bootstrap). One group gives no interval.
    """
    names = sorted(set(groups))
    place = {name: index for index, name in enumerate(names)}
    member = np.array([place[name] for name in groups])
    sums = np.zeros((len(names), len(measured), 4))
    for index, metric in enumerate(measured):
        for offset, scores in ((0, a), (2, b)):
            for part, column in enumerate(columns(metric, scores)):
                sums[:, index, offset + part] = np.bincount(member, weights=column, minlength=len(names))
    drawn = resampled(sums, seed, resamples) if len(names) > 1 else None
    whole = sums.sum(axis=0)
    results = {}
    for index, metric in enumerate(measured):
        baseline, new = value(metric, *whole[index, :2]), value(metric, *whole[index, 2:])
        difference = float(compared(metric, *whole[index, 2:]) - compared(metric, *whole[index, :2]))
        low = high = None
        if drawn is not None:
            of = drawn[:, index]
            differences = compared(metric, of[:, 2], of[:, 3]) - compared(metric, of[:, 0], of[:, 1])
            low, high = (float(q) for q in np.quantile(differences, tails(len(names))))
        results[metric.name] = {
            "baseline": float(baseline),
            "value": float(new),
            "difference": difference,
            "low": low,
            "high": high,
            "verdict": verdict(metric, low, high),
        }
    return results


def verdict(metric: Metric, low: float | None, high: float | None) -> str:
    if low is None or high is None or low <= 0.0 <= high:
        return "no evidence"
    return "better" if (high < 0.0) == (metric.better == "lower") else "worse"


def resampled(sums: np.ndarray, seed: int, resamples: int) -> np.ndarray:
    """Sums of as many groups as there are, drawn with replacement: (resamples, metrics, 4) of (groups, metrics, 4)."""
    generator = np.random.default_rng(seed)
    count = len(sums)
    flat = sums.reshape(count, -1)
    step = max(1, CHUNK // count)
    parts = [
        generator.multinomial(count, np.full(count, 1 / count), size=min(step, resamples - start)) @ flat
        for start in range(0, resamples, step)
    ]
    return np.concatenate(parts).reshape(resamples, *sums.shape[1:])


def tails(groups: int) -> tuple[float, float]:
    """The two percentiles of the expanded percentile interval, as shares."""
    width = math.sqrt(groups / (groups - 1)) * t_quantile((1 + CONFIDENCE) / 2, groups - 1)
    tail = NormalDist().cdf(-width)
    return tail, 1 - tail


def t_quantile(share: float, df: int) -> float:
    """Quantile of Student's t above the median, by bisection of its distribution function."""
    if df > 1000:
        return NormalDist().inv_cdf(share)
    low, high = 0.0, 1000.0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if (1 + within(middle, df)) / 2 < share else (low, middle)
    return low


def within(t: float, df: int) -> float:
    """P(|T| <= t) for a whole number of degrees of freedom (Abramowitz and Stegun 26.7.3 and 26.7.4)."""
    angle = math.atan(t / math.sqrt(df))
    odd = df % 2
    term, series = (math.cos(angle), math.cos(angle)) if odd else (1.0, 1.0)
    for k in range(2 + odd, df - 1, 2):
        term *= math.cos(angle) ** 2 * (k - 1) / k
        series += term
    if odd:
        return (angle + (math.sin(angle) * series if df > 1 else 0.0)) * 2 / math.pi
    return math.sin(angle) * series
