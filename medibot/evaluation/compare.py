"""Compare evaluated runs side by side: what differs in their recipes, curves, test metrics with paired intervals, cost."""

import itertools
import json
from typing import Any

from medibot.errors import RecipeError
from medibot.evaluation.metrics import MEASURES, METRICS, Metric, name_references
from medibot.evaluation.page import comparison_page
from medibot.evaluation.report import Report, make_table, write_report
from medibot.evaluation.scores import Rows
from medibot.evaluation.statistics import compare_scores, interval_text
from medibot.recipe import find_differences, load_recipe
from medibot.recipe.files import read_data
from medibot.run import Run, find_finished_run, outputs_folder, read_json, read_lines

# What a training took: [label, key, unit, format]
COSTS = read_data(__file__, "costs.yaml")


def compare(names: list[str], baseline: str = "base") -> Report:
    """Compare runs that were asked the same with each other and with `baseline` ("base", or one of them)."""
    if len(set(names)) != len(names) or len(names) < 2:
        raise RecipeError.of("RUNS", "needs two or more different runs", 'write RUNS="a b"')
    if baseline not in {"base", *names}:
        raise RecipeError.of("BASELINE", f"{baseline!r} is none of the runs", f"choose base or {', '.join(names)}")
    runs = {name: find_finished_run(name) for name in names}
    first, asked, left_out = read_comparable(list(runs.values()), baseline)
    rows = {name: read_lines(run.folder / "eval" / "rows.jsonl") for name, run in runs.items()}
    which = "base" if baseline == "base" else "tuned"
    against = rows if baseline == "base" else dict.fromkeys(names, rows[baseline])
    compared = {name: pair(rows[name], against[name], asked, which) for name in names}
    # Without the keys that only name a run in W&B
    differences = find_differences(
        *(load_recipe(str(run.recipe)).as_dict() | {"tracking": None} for run in runs.values())
    )
    curves: dict[str, dict[str, Any]] = {name: {} for name in names}
    cost = {name: run.record()["summary"]["cost"] for name, run in runs.items()}
    seen, losses = "num_supervised_tokens_seen", (("train", "loss"), ("validation", "eval_loss"))
    for (name, run), (kind, key) in itertools.product(runs.items(), losses):
        logged = [line for line in read_lines(run.metrics) if key in line]
        curves[name][kind] = [[line[seen], line["seconds"], line[key]] for line in logged]
    comparison = {
        "baseline": baseline,
        "runs": names,
        "sentence": verdict(rows, compared, baseline, asked),
        **{key: first[key] for key in ("fingerprint", "rows", "of", "groups")},
        "left_out": left_out,
        "differences": [[v if isinstance(v, str) else json.dumps(v) for v in row] for row in differences],
        "metrics": {name: metrics for name, metrics in compared.items() if name != baseline},
        # Each [supervised tokens, seconds, loss]
        "curves": curves,
        "cost": cost,
    }
    costs = [[label, *(f"{of[key] / unit:{form}}" for of in cost.values())] for label, key, unit, form in COSTS]
    files = {"comparison.json": comparison, "report.html": comparison_page(comparison, costs)}
    folder = outputs_folder() / "comparisons" / "-".join(names)
    return write_report(folder, files, comparison["sentence"], show_tables(comparison, costs))


def read_comparable(runs: list[Run], baseline: str) -> tuple[dict[str, Any], list[Metric], list[str]]:
    """Return the first run's results, the metrics that all share, and those that only differing tokenizers leave out.

    Refuse other questions, or another base.
    """
    found, name = [], runs[0].name
    for run in runs:
        file = run.folder / "eval" / "results.json"
        if not file.is_file():
            raise RecipeError.of("RUNS", f"{run.name!r} is not evaluated", f"run: make eval RUN={run.name}")
        found.append(read_json(file))
        a, b = (each["fingerprint"] for each in (found[0], found[-1]))
        if a != b:
            what = f"{name} ({a[:16]}) and {run.name} ({b[:16]}) were not asked the same rows with the same decoding"
            raise RecipeError.of("RUNS", what, "evaluate both with equal ROWS, data and max_new_tokens")
        if baseline == "base" and found[0]["base"] != found[-1]["base"]:
            what = f"{name} and {run.name} have different base models"
            raise RecipeError.of("BASELINE", what, f"name a run: BASELINE={name}")
    shared = [metric for metric in MEASURES if all(metric.name in each["metrics"] for each in found)]
    one_tokenizer = all(each["tokenizer"] == found[0]["tokenizer"] for each in found)
    # A token is something else to another tokenizer
    asked = [metric for metric in shared if one_tokenizer or not metric.counts_tokens]
    return found[0], asked, [metric.name for metric in shared if metric not in asked]


def pair(rows: Rows, others: Rows, asked: list[Metric], which: str = "tuned") -> dict[str, dict[str, Any]]:
    """Return the tuned answers of `rows` compared with those of `others`."""
    a, b, groups = [line[which] for line in others], [line["tuned"] for line in rows], [line["group"] for line in rows]
    return compare_scores(a, b, groups, asked)


def verdict(rows: dict[str, Rows], compared: dict[str, Any], baseline: str, asked: list[Metric]) -> str:
    """Return the winner by the likelihood of the reference answers, or that the data cannot tell."""
    key, unit = ("nll", "nats a token") if METRICS[0] in asked else ("bits_per_byte", "bits a byte")
    best, second, *_ = sorted(rows, key=lambda name: compared[name][key]["value"])
    found, against = pair(rows[best], rows[second], asked)[key], compared[best][key]
    by = f"{found['difference']:+.4f} {unit} (95 %: {interval_text(found)})"
    expected = name_references(rows[best])
    text = f"The data cannot tell {best} from {second}: {by}"
    if found["verdict"] == "better":
        text = f"{best} predicts the {expected} best, {by} against {second}"
    if best != baseline:
        text += f"; {against['difference']:+.4f} (95 %: {interval_text(against)}) against {baseline}"
        text += f", {against['verdict']}"
    return text + f". {len(rows[best])} questions."


def show_tables(comparison: dict[str, Any], costs: list[list[str]]) -> list[Any]:
    """Return what differs, metrics and cost as people read them in a terminal."""
    runs, metrics = comparison["runs"], comparison["metrics"]
    shown: list[Any] = []
    if comparison["left_out"]:
        shown.append(f"left out, since the tokenizers differ: {', '.join(comparison['left_out'])}")
    if comparison["differences"]:
        shown.append(make_table(["recipe", *runs], comparison["differences"], "What differs"))
    rows = []
    for found in zip(*(of_run.values() for of_run in metrics.values()), strict=True):
        cells = [f"{m['value']:.4f}\n{m['verdict']} ({interval_text(m)})" for m in found]
        rows.append([found[0]["label"], f"{found[0]['baseline']:.4f}", *cells])
    header = ["metric", comparison["baseline"], *metrics]
    return [*shown, make_table(header, rows, "Test metrics"), make_table(["cost", *runs], costs, "Cost")]
