"""Compare evaluated runs side by side: what differs in their recipes, curves, test metrics with paired intervals, cost."""

import itertools
import json
from typing import Any

from medibot.errors import RecipeError
from medibot.evaluation.page import comparison_page
from medibot.evaluation.report import Report, make_table, quick_look, write_report
from medibot.evaluation.scores import Rows
from medibot.evaluation.statistics import compare_scores, interval_text
from medibot.recipe import ABSENT, flattened, load_recipe
from medibot.run import Run, find_finished_run, outputs_folder, read_json, read_lines

# A token is something else to another tokenizer
BY_TOKEN = ["nll", "perplexity", "token_accuracy"]
# What a training took: (label, key, unit, format)
COSTS = (
    ("supervised tokens", "supervised_tokens", 1, ",.0f"),
    ("supervised tokens/s", "supervised_tokens_per_second", 1, ".1f"),
    ("wall time (min)", "seconds", 60, ".1f"),
    ("steps alone (min)", "training_seconds", 60, ".1f"),
    ("peak memory (GB)", "peak_memory_bytes", 1e9, ".2f"),
    ("trainable parameters", "trainable_parameters", 1, ",.0f"),
    ("weights saved (MB)", "weights_bytes", 1e6, ".1f"),
)


def compare(names: list[str], baseline: str = "base") -> Report:
    """Compare evaluated runs with each other and with `baseline` ("base", or one of them), and write the result.

    Raises RecipeError for runs that were not asked the same rows with the same decoding.
    """
    if len(set(names)) != len(names) or len(names) < 2:
        raise RecipeError.of("RUNS", "needs two or more different runs", 'write RUNS="a b"')
    if baseline not in {"base", *names}:
        raise RecipeError.of("BASELINE", f"{baseline!r} is none of the runs", f"choose base or {', '.join(names)}")
    runs = {name: find_finished_run(name) for name in names}
    results = {name: read_evaluation(run) for name, run in runs.items()}
    require_comparable(results, baseline)
    rows = {name: read_lines(run.folder / "eval" / "rows.jsonl") for name, run in runs.items()}
    first = results[names[0]]
    left_out = BY_TOKEN if any(found["tokenizer"] != first["tokenizer"] for found in results.values()) else []
    metrics = {name: pair(rows, name, baseline) for name in names if name != baseline}
    for left, found in itertools.product(left_out, metrics.values()):
        del found[left]
    cost = {name: run.record()["summary"]["cost"] for name, run in runs.items()}
    comparison = {
        "baseline": baseline,
        "runs": names,
        "sentence": verdict(rows, metrics, "bits_per_byte" if left_out else "nll", baseline),
        **{key: first[key] for key in ("fingerprint", "rows", "of", "groups")},
        "left_out": left_out,
        "differences": recipe_differences(runs),
        "metrics": metrics,
        "curves": {name: read_curves(run) for name, run in runs.items()},
        "cost": cost,
    }
    costs = [[label, *(f"{of[key] / unit:{form}}" for of in cost.values())] for label, key, unit, form in COSTS]
    files = {"comparison.json": comparison, "report.html": comparison_page(comparison, costs)}
    folder = outputs_folder() / "comparisons" / "-".join(names)
    return write_report(folder, files, comparison["sentence"], show_tables(comparison, costs))


def read_evaluation(run: Run) -> dict[str, Any]:
    file = run.folder / "eval" / "results.json"
    if not file.is_file():
        raise RecipeError.of("RUNS", f"{run.name!r} is not evaluated", f"run: make eval RUN={run.name}")
    return read_json(file)


def require_comparable(results: dict[str, dict[str, Any]], baseline: str) -> None:
    """Raise RecipeError for runs that answered other questions, or against another base."""
    first, *others = results
    for other in others:
        a, b = results[first]["fingerprint"], results[other]["fingerprint"]
        if a != b:
            what = f"{first} ({a[:16]}) and {other} ({b[:16]}) were not asked the same rows with the same decoding"
            raise RecipeError.of("RUNS", what, "evaluate both with equal ROWS, data and max_new_tokens")
        if baseline == "base" and results[first]["base"] != results[other]["base"]:
            what = f"{first} and {other} have different base models"
            raise RecipeError.of("BASELINE", what, f"name a run: BASELINE={first}")


def pair(rows: dict[str, Rows], name: str, baseline: str) -> dict[str, dict[str, Any]]:
    """Return the tuned answers of a run compared with those of another, or with its own base's."""
    against, which = (rows[name], "base") if baseline == "base" else (rows[baseline], "tuned")
    tuned, groups = ([line[key] for line in rows[name]] for key in ("tuned", "group"))
    return compare_scores([line[which] for line in against], tuned, groups)


def verdict(rows: dict[str, Rows], metrics: dict[str, Any], primary: str, baseline: str) -> str:
    """Return the winner by the likelihood of the reference answers, or that the data cannot tell."""
    of_baseline = next(iter(metrics.values()))[primary]["baseline"]
    values = {name: metrics[name][primary]["value"] if name in metrics else of_baseline for name in rows}
    best, second, *_ = sorted(values, key=lambda name: values[name])
    found = pair(rows, best, second)[primary]
    unit = "nats a token" if primary == "nll" else "bits a byte"
    by = f"{found['difference']:+.4f} {unit} (95 %: {interval_text(found)})"
    text = f"The data cannot tell {best} from {second}: {by}"
    if found["verdict"] == "better":
        text = f"{best} predicts the reference answers best, {by} against {second}"
    if best in metrics:
        found = metrics[best][primary]
        text += f"; {found['difference']:+.4f} (95 %: {interval_text(found)}) against {baseline}, {found['verdict']}"
    return text + f". {len(rows[best])} questions."


def recipe_differences(runs: dict[str, Run]) -> list[list[str]]:
    """Return [key, value in each run…] of the recipe keys that differ, without those that only name a run in W&B."""
    leaves = [dict(flattened(load_recipe(str(run.recipe)).as_dict())) for run in runs.values()]
    keys = dict.fromkeys(key for found in leaves for key in found if not key.startswith("tracking"))
    table = []
    for key in keys:
        values = [found.get(key, ABSENT) for found in leaves]
        cells = [str(v) if v is ABSENT or isinstance(v, str) else json.dumps(v) for v in values]
        if len(set(cells)) > 1:
            table.append([key, *cells])
    return table


def read_curves(run: Run) -> dict[str, list[list[float]]]:
    """Return [supervised tokens, seconds, loss] of each logged step and of each evaluation."""
    lines = read_lines(run.metrics)
    return {
        name: [[line["num_supervised_tokens_seen"], line["seconds"], line[key]] for line in lines if key in line]
        for name, key in (("train", "loss"), ("validation", "eval_loss"))
    }


def show_tables(comparison: dict[str, Any], costs: list[list[str]]) -> list[Any]:
    """Return what differs, metrics and cost as people read them in a terminal."""
    runs, metrics = comparison["runs"], comparison["metrics"]
    shown: list[Any] = list(quick_look(comparison))
    if comparison["left_out"]:
        shown.append(f"left out, since the tokenizers differ: {', '.join(comparison['left_out'])}")
    if comparison["differences"]:
        shown.append(make_table(["recipe", *runs], comparison["differences"], "What differs"))
    rows = []
    for key, metric in next(iter(metrics.values())).items():
        found = [of_run[key] for of_run in metrics.values()]
        cells = [f"{m['value']:.4f}\n{m['verdict']} ({interval_text(m)})" for m in found]
        rows.append([metric["label"], f"{metric['baseline']:.4f}", *cells])
    header = ["metric", comparison["baseline"], *metrics]
    return [*shown, make_table(header, rows, "Test metrics"), make_table(["cost", *runs], costs, "Cost")]
