"""`medibot inspect` and `medibot plan`: what a recipe will train on and what it will need, before a weight is loaded."""

import tempfile
from pathlib import Path
from typing import Any

from jinja2 import Environment
from rich.console import Console
from rich.table import Table

from medibot.data.gate import NAMES, Audit, audit_labels, refuse_faults
from medibot.data.painting import choose_examples, paint, paint_html, paint_text
from medibot.data.prepared import Prepared, prepare
from medibot.errors import RecipeError
from medibot.model.loading import make_tiny_model, method_name
from medibot.recipe import Recipe
from medibot.run import Run
from medibot.training.trainer import build_trainer

PAGE = Environment(autoescape=True).from_string(
    """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{{ recipe.name }}: what it trains on</title><style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 64rem; margin: 2rem auto; padding: 0 1rem; color: #1b1f24; }
table { border-collapse: collapse; margin: 1rem 0; } th, td { padding: .25rem .75rem; text-align: right; border-bottom: 1px solid #d8dee4; }
th:first-child, td:first-child { text-align: left; } caption { text-align: left; font-weight: 600; padding: .5rem 0; }
pre { white-space: pre-wrap; background: #f6f8fa; padding: 1rem; border-radius: 6px; line-height: 1.7; }
.masked { color: #6e7781; } .trained { background: #c8f0d0; } .stop { background: #cf222e; color: #fff; font-weight: 700; }
span { border-radius: 2px; box-shadow: inset -1px 0 #fff8; } details { margin: .25rem 0; } summary { cursor: pointer; }
</style></head><body><h1>{{ recipe.name }}</h1>
<p>{{ recipe.data.path }} through the chat template of {{ recipe.model.pretrained_model_name_or_path }}.
No weights were loaded. Data fingerprint {{ prepared.fingerprint[:16] }}, split fingerprint {{ prepared.split.fingerprint[:16] }}.</p>
{% for title, header, rows in tables %}<table><caption>{{ title }}</caption><tr>{% for h in header %}<th>{{ h }}</th>{% endfor %}</tr>
{% for row in rows %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table>{% endfor %}
<h2>What each rule did</h2>{% for line in prepared.ledger if line.examples %}<details><summary>{{ line.rule }}</summary>
{% for e in line.examples %}<pre>{{ e | pprint }}</pre>{% endfor %}</details>{% endfor %}
<h2>Painted rows</h2><p><span class="masked">masked</span> <span class="trained">trained</span> <span class="stop">stop token</span></p>
{% for title, body in rows %}<h3>{{ title }}</h3><pre>{{ body | safe }}</pre>{% endfor %}
</body></html>
"""
)


def inspect_recipe(recipe: Recipe, page: Path | None, row: int | None) -> None:
    """Print ledger, leak report, loss-mask report and painted rows; raise RecipeError where training would refuse."""
    prepared = prepare(recipe)
    with tempfile.TemporaryDirectory() as folder:
        trainer = build_trainer(
            prepared, Run(Path(folder) / "inspect"), lambda: make_tiny_model(prepared.tokenizer), lora=False
        )
    dataset, stops = trainer.train_dataset, prepared.generation.eos_token_id
    pairs = [("train", dataset), ("validation", trainer.eval_dataset)]
    limit = trainer.args.max_length
    reports = [
        audit_labels(rows, prepared.load(split), prepared.tokenizer, stops, limit, split)
        for split, rows in pairs
        if rows
    ]
    if row is not None and not 0 <= row < len(dataset):
        raise RecipeError.of("--row", f"no row {row}", f"the training split has rows 0 to {len(dataset) - 1}")
    tables = [ledger_table(prepared), leak_table(prepared), mask_table(reports)]
    pieces = {
        f"{name} (row {index}, {len(dataset[index]['input_ids'])} tokens)": paint(
            dataset[index], prepared.tokenizer, stops
        )
        for name, index in choose_examples(dataset, row).items()
    }
    show(prepared, tables, pieces)
    if page:
        rows = [(name, paint_html(piece)) for name, piece in pieces.items()]
        text = PAGE.render(recipe=recipe, prepared=prepared, tables=tables, rows=rows)
        page.write_text(text, encoding="utf-8")
        print(f"\nwritten: {page}")
    for (_, rows), report in zip(pairs, reports, strict=False):
        refuse_faults(report, rows, prepared.tokenizer)


def show(prepared: Prepared, tables: list[Any], pieces: dict[str, Any]) -> None:
    console = Console(highlight=False, markup=False)
    console.print(
        f"{prepared.recipe.name}: {method_name(prepared.recipe)} of {prepared.recipe.model['pretrained_model_name_or_path']}"
    )
    console.print(f"precision here: {prepared.precision.name} ({prepared.precision.reason})")
    names = [repr(prepared.tokenizer.decode([token])) for token in prepared.generation.eos_token_id]
    console.print(f"generation stops at {', '.join(names)}")
    for title, header, rows in tables:
        table = Table(*header, title=title, title_justify="left")
        table.columns[0].overflow = "fold"
        for column in table.columns[1:]:
            column.justify = "right"
        for cells in rows:
            table.add_row(*map(str, cells))
        console.print(table)
    for name, piece in pieces.items():
        console.rule(name)
        console.print(paint_text(piece))


def ledger_table(prepared: Prepared) -> tuple[str, list[str], list[list[Any]]]:
    lines = [
        [line["rule"], *(f"{line[key]:,}" for key in ("rows_in", "dropped", "changed", "added", "rows_out"))]
        for line in prepared.ledger
    ]
    sizes = prepared.split["rows"]
    lines.append(["split: " + ", ".join(f"{name} {count:,}" for name, count in sizes.items()), "", "", "", "", ""])
    return "Ledger", ["rule", "rows in", "dropped", "changed", "added", "rows out"], lines


def leak_table(prepared: Prepared) -> tuple[str, list[str], list[list[Any]]]:
    """Rows that share something with an earlier split: here, and what a random split of these rows would leak."""
    leaks = prepared.leaks
    kinds = list(dict.fromkeys(kind for counts in leaks.values() for kind in counts))
    rows = [[kind, *(counts.get(kind, "") for counts in leaks.values())] for kind in kinds]
    return "Leak report (rows)", ["shared", *(name.replace("_", " ") for name in leaks)], rows


def mask_table(reports: list[Audit]) -> tuple[str, list[str], list[list[Any]]]:
    keys = ["rows_in", "rows_out", "tokens", "longest", "supervised", "supervised_share"]
    counts = [report.as_dict() for report in reports]
    rows = [[key.replace("_", " "), *(f"{c[key]:,}" for c in counts)] for key in keys]
    rows += [[text, *(c["violations"][key] for c in counts)] for key, text in NAMES.items()]
    return "Loss mask", ["", *(report.split for report in reports)], rows
