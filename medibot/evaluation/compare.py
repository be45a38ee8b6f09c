"""Compare evaluated runs side by side: what differs in their recipes, curves, test metrics with paired intervals, cost."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from medibot.errors import RecipeError
from medibot.evaluation.metrics import METRICS
from medibot.evaluation.page import comparison_page
from medibot.evaluation.statistics import compare_scores, interval_text, total
from medibot.recipe import ABSENT, flattened, load_recipe
from medibot.run import Run, find_finished_run, outputs_folder, read_json, read_lines

# A token is something else to another tokenizer
BY_TOKEN = {"nll", "perplexity", "token_accuracy"}
COSTS = {
    "supervised tokens": lambda cost: f"{cost['supervised_tokens']:,}",
    "supervised tokens/s": lambda cost: f"{cost['supervised_tokens_per_second']:.1f}",
    "wall time (min)": lambda cost: f"{cost['seconds'] / 60:.1f}",
    "steps alone (min)": lambda cost: f"{cost['training_seconds'] / 60:.1f}",
    "peak memory (GB)": lambda cost: f"{cost['peak_memory_bytes'] / 1e9:.2f}",
    "trainable parameters": lambda cost: f"{cost['trainable_parameters']:,}",
    "weights saved (MB)": lambda cost: f"{cost['weights_bytes'] / 1e6:.1f}",
}
Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Comparison:
    """What comparison.json in `folder` says; report.html is beside it."""

    results: dict[str, Any]
    folder: Path

    @property
    def verdict(self) -> str:
        """Return the winner, or that the data cannot tell."""
        return self.results["sentence"]

    def __rich__(self) -> Group:
        """Return the verdict, then what differs, metrics and cost as tables."""
        results = self.results
        runs, metrics = results["runs"], results["metrics"]
        parts: list[Any] = [self.verdict]
        if results["rows"] < results["of"]:
            parts.append(f"A quick look: {results['rows']} of {results['of']} rows.")
        if results["left_out"]:
            parts.append(f"left out, since the tokenizers differ: {', '.join(results['left_out'])}")
        if results["differences"]:
            parts.append(make_table("What differs", ["recipe", *runs], results["differences"]))
        rows = [
            [metric["label"], f"{metric['baseline']:.4f}", *(describe(metrics[name][key]) for name in metrics)]
            for key, metric in next(iter(metrics.values())).items()
        ]
        parts.append(make_table("Test metrics", ["metric", results["baseline"], *metrics], rows))
        parts.append(make_table("Cost", ["cost", *runs], cost_rows(results["cost"])))
        written = f"written: {self.folder}/comparison.json, report.html"
        return Group(*parts, Text(written, no_wrap=True, overflow="ignore"))


def make_table(title: str, header: list[str], rows: list[list[str]]) -> Table:
    """Return a table of plain text."""
    table = Table(*map(escape, header), title=title, title_justify="left")
    for row in rows:
        table.add_row(*map(escape, row))
    return table


def describe(found: dict[str, Any]) -> str:
    """Return a metric's value, verdict and interval."""
    return f"{found['value']:.4f}\n{found['verdict']} ({interval_text(found)})"


def compare(names: list[str], baseline: str = "base") -> Comparison:
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
    one_tokenizer = len({found["tokenizer"] for found in results.values()}) == 1
    metrics = {}
    for name in names:
        if name != baseline:
            against = [line["base"] for line in rows[name]] if baseline == "base" else tuned_scores(rows[baseline])
            found = pair(rows[name], against)
            metrics[name] = {key: found[key] for key in found if one_tokenizer or key not in BY_TOKEN}
    first = results[names[0]]
    comparison = {
        "baseline": baseline,
        "runs": names,
        "sentence": verdict(rows, metrics, "nll" if one_tokenizer else "bits_per_byte", baseline),
        **{key: first[key] for key in ("fingerprint", "rows", "of", "groups")},
        "left_out": [] if one_tokenizer else sorted(BY_TOKEN),
        "differences": recipe_differences(runs),
        "metrics": metrics,
        "curves": {name: read_curves(run) for name, run in runs.items()},
        "cost": {name: run.record()["summary"]["cost"] for name, run in runs.items()},
    }
    report = Run(outputs_folder() / "comparisons" / "-".join(names))
    report.folder.mkdir(parents=True, exist_ok=True)
    report.write("report.html", comparison_page(comparison, cost_rows(comparison["cost"])))
    report.write("comparison.json", comparison)
    return Comparison(comparison, report.folder)


def read_evaluation(run: Run) -> dict[str, Any]:
    """Return what results.json of a run says; raise RecipeError where it was not evaluated."""
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


def tuned_scores(rows: Rows) -> Rows:
    """Return the scores of the tuned answers."""
    return [line["tuned"] for line in rows]


def pair(rows: Rows, against: Rows) -> dict[str, dict[str, Any]]:
    """Return the tuned answers of `rows` compared with `against`, scores of the same rows."""
    found = compare_scores(against, tuned_scores(rows), [line["group"] for line in rows])
    return {metric.name: {"label": metric.label, "better": metric.better} | found[metric.name] for metric in METRICS}


def verdict(rows: dict[str, Rows], metrics: dict[str, Any], primary: str, baseline: str) -> str:
    """Return the winner by the likelihood of the reference answers, or that the data cannot tell."""
    values = {name: total(tuned_scores(lines))[primary] for name, lines in rows.items()}
    best, second, *_ = sorted(values, key=lambda name: values[name])
    found = pair(rows[best], tuned_scores(rows[second]))[primary]
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
    keys = [key for key in dict.fromkeys(key for found in leaves for key in found) if not key.startswith("tracking")]
    table = [[key, *(as_text(found.get(key, ABSENT)) for found in leaves)] for key in keys]
    return [row for row in table if len(set(row[1:])) > 1]


def as_text(value: Any) -> str:
    """Return a recipe's value as its author would write it."""
    return str(value) if isinstance(value, str) or value is ABSENT else json.dumps(value)


def read_curves(run: Run) -> dict[str, list[list[float]]]:
    """Return [supervised tokens, seconds, loss] of each logged step and of each evaluation."""
    lines = read_lines(run.metrics)
    return {
        name: [[line["num_supervised_tokens_seen"], line["seconds"], line[key]] for line in lines if key in line]
        for name, key in (("train", "loss"), ("validation", "eval_loss"))
    }


def cost_rows(cost: dict[str, dict[str, float]]) -> list[list[str]]:
    """Return what each training took, in units that people read."""
    return [[label, *(show(found) for found in cost.values())] for label, show in COSTS.items()]
