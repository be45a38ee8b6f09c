"""Runs side by side: what differs in their recipes, their curves, their test metrics with paired intervals, their cost.

medibot compare lora dora --baseline base
"""

import json
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from medibot.errors import RecipeError
from medibot.evaluation.evaluate import RESAMPLES, SEED
from medibot.evaluation.metrics import METRICS
from medibot.evaluation.page import comparison_page
from medibot.evaluation.statistics import compare_scores, total
from medibot.recipe import ABSENT, flattened, load_recipe
from medibot.run import Run, find_finished_run, outputs_folder, read_json, read_lines

# What a token is differs from one tokenizer to another
BY_TOKEN = {"nll", "perplexity", "token_accuracy"}


def compare(names: list[str], baseline: str = "base") -> dict[str, Any]:
    """Compare evaluated runs with each other and with `baseline` ("base", or one of them); write and show the result.

    Refuses runs that were not asked the same rows with the same decoding.
    """
    if len(set(names)) != len(names) or len(names) < 2:
        raise RecipeError.of("RUNS", "needs two or more different runs", 'write RUNS="a b"')
    if baseline not in {"base", *names}:
        raise RecipeError.of("BASELINE", f"{baseline!r} is none of the runs", f"choose base or {', '.join(names)}")
    runs = {name: find_finished_run(name) for name in names}
    results = {name: evaluated(this) for name, this in runs.items()}
    require_comparable(results, baseline)
    rows = {name: read_lines(this.folder / "eval" / "rows.jsonl") for name, this in runs.items()}
    one_tokenizer = len({found["tokenizer"] for found in results.values()}) == 1
    kept = [metric.name for metric in METRICS if one_tokenizer or metric.name not in BY_TOKEN]
    compared = {}
    for name in names:
        if name != baseline:
            against = [line["base"] for line in rows[name]] if baseline == "base" else tuned(rows[baseline])
            compared[name] = {key: value for key, value in paired(rows[name], against).items() if key in kept}
    first = results[names[0]]
    comparison = {
        "baseline": baseline,
        "runs": names,
        "sentence": sentence(rows, compared, "nll" if one_tokenizer else "bits_per_byte", baseline),
        "fingerprint": first["fingerprint"],
        "rows": first["rows"],
        "of": first["of"],
        "groups": first["groups"],
        "left_out": [] if one_tokenizer else sorted(BY_TOKEN),
        "differences": recipe_differences(runs),
        "metrics": compared,
        "curves": {name: curves(this) for name, this in runs.items()},
        "cost": {name: this.record()["summary"]["cost"] for name, this in runs.items()},
    }
    folder = Run(outputs_folder() / "comparisons" / "-".join(names))
    folder.folder.mkdir(parents=True, exist_ok=True)
    folder.write(
        "report.html", comparison_page(comparison, [[label, *cells] for label, cells in cost_table(comparison["cost"])])
    )
    folder.write("comparison.json", comparison)
    show(comparison, folder)
    return comparison


def evaluated(this: Run) -> dict[str, Any]:
    file = this.folder / "eval" / "results.json"
    if not file.is_file():
        raise RecipeError.of("RUNS", f"{this.name!r} is not evaluated", f"run: make eval RUN={this.name}")
    if "cost" not in this.record()["summary"]:
        raise RecipeError.of("RUNS", f"{this.name!r} was trained before costs were recorded", "train it again")
    return read_json(file)


def require_comparable(results: dict[str, dict[str, Any]], baseline: str) -> None:
    first, *others = results
    for other in others:
        a, b = results[first]["fingerprint"], results[other]["fingerprint"]
        if a != b:
            what = f"{first} ({a[:16]}) and {other} ({b[:16]}) were not asked the same rows with the same decoding"
            raise RecipeError.of("RUNS", what, "evaluate both with equal ROWS, data and max_new_tokens")
        if baseline == "base" and results[first]["base"] != results[other]["base"]:
            what = f"{first} and {other} have different base models"
            raise RecipeError.of("BASELINE", what, f"name a run: BASELINE={first}")


def tuned(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [line["tuned"] for line in rows]


def paired(rows: list[dict[str, Any]], against: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The tuned answers of `rows` compared with `against`, scores of the same rows."""
    found = compare_scores(against, tuned(rows), [line["group"] for line in rows], SEED, RESAMPLES)
    return {metric.name: {"label": metric.label, "better": metric.better} | found[metric.name] for metric in METRICS}


def sentence(rows: dict[str, Any], compared: dict[str, Any], primary: str, baseline: str) -> str:
    """The winner by the likelihood of the reference answers, or that the data cannot tell."""
    values = {name: total(tuned(lines))[primary] for name, lines in rows.items()}
    best, second, *_ = sorted(values, key=lambda name: values[name])
    found = paired(rows[best], tuned(rows[second]))[primary]
    unit = "nats a token" if primary == "nll" else "bits a byte"
    by = f"{found['difference']:+.4f} {unit} ({interval(found)})"
    told = f"{best} predicts the reference answers best, {by} against {second}"
    unsure = f"The data cannot tell {best} from {second}: {by}"
    text = told if found["verdict"] == "better" else unsure
    if best in compared:
        found = compared[best][primary]
        text += f"; {found['difference']:+.4f} ({interval(found)}) against {baseline}, {found['verdict']}"
    return text + f". {len(rows[best])} questions."


def interval(found: dict[str, Any]) -> str:
    return "too few groups" if found["low"] is None else f"95 %: {found['low']:+.4f} to {found['high']:+.4f}"


def recipe_differences(runs: dict[str, Run]) -> list[list[str]]:
    """[key, value in each run…] of the recipe keys that differ; what only names a run in W&B is left out."""
    leaves = {
        name: {
            key: value
            for key, value in flattened(load_recipe(str(this.recipe)).as_dict())
            if not key.startswith("tracking")
        }
        for name, this in runs.items()
    }
    keys = list(dict.fromkeys(key for found in leaves.values() for key in found))
    table = [[key, *(plain(found.get(key, ABSENT)) for found in leaves.values())] for key in keys]
    return [row for row in table if len(set(row[1:])) > 1]


def plain(value: Any) -> str:
    return value if isinstance(value, str) else str(value) if value is ABSENT else json.dumps(value)


def curves(this: Run) -> dict[str, list[list[float]]]:
    """[supervised tokens, seconds, loss] of each logged step and of each evaluation."""
    lines = read_lines(this.metrics)
    return {
        name: [[line["num_supervised_tokens_seen"], line["seconds"], line[key]] for line in lines if key in line]
        for name, key in (("train", "loss"), ("validation", "eval_loss"))
    }


def show(comparison: dict[str, Any], folder: Run) -> None:
    console = Console(highlight=False)
    runs = comparison["runs"]
    if comparison["differences"]:
        table = Table("recipe", *map(escape, runs), title="What differs", title_justify="left")
        for row in comparison["differences"]:
            table.add_row(*map(escape, row))
        console.print(table)
    against = [name for name in runs if name in comparison["metrics"]]
    table = Table("metric", comparison["baseline"], *map(escape, against), title="Test metrics", title_justify="left")
    for key, metric in comparison["metrics"][against[0]].items():
        cells = [comparison["metrics"][name][key] for name in against]
        table.add_row(
            metric["label"],
            f"{metric['baseline']:.4f}",
            *(f"{cell['value']:.4f}\n{cell['verdict']} ({interval(cell)})" for cell in cells),
        )
    console.print(table)
    table = Table("cost", *map(escape, runs), title_justify="left")
    for label, cells in cost_table(comparison["cost"]):
        table.add_row(label, *cells)
    console.print(table)
    if comparison["left_out"]:
        console.print(f"left out, since the tokenizers differ: {', '.join(comparison['left_out'])}")
    if comparison["rows"] < comparison["of"]:
        console.print(f"A quick look: {comparison['rows']} of {comparison['of']} rows.")
    print(comparison["sentence"])
    print(f"written: {folder.folder}/comparison.json, report.html")


def cost_table(cost: dict[str, dict[str, float]]) -> list[tuple[str, list[str]]]:
    """What each training took, in units that people read."""
    shown = {
        "supervised tokens": lambda c: f"{c['supervised_tokens']:,}",
        "supervised tokens/s": lambda c: f"{c['supervised_tokens_per_second']:.1f}",
        "wall time (min)": lambda c: f"{c['seconds'] / 60:.1f}",
        "steps alone (min)": lambda c: f"{c['training_seconds'] / 60:.1f}",
        "peak memory (GB)": lambda c: f"{c['peak_memory_bytes'] / 1e9:.2f}",
        "trainable parameters": lambda c: f"{c['trainable_parameters']:,}",
        "weights saved (MB)": lambda c: f"{c['weights_bytes'] / 1e6:.1f}",
    }
    return [(label, [give(found) for found in cost.values()]) for label, give in shown.items()]
