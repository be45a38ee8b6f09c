"""Measure what a training brought.

Finished runs and held-out questions come in. Paired differences with intervals, pages and one verdict each go out: base
against tuned, runs side by side, multiple-choice benchmarks, grids. It never trains on what it asks, and never names a
winner that the interval does not name.

Use `evaluate.evaluate`, `compare.compare`, `benchmark.benchmark` and `sweep.sweep`.
"""
