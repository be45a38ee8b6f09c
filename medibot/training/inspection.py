"""Show what a recipe will train on, before a weight is loaded."""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from datasets import Dataset
from rich.console import Group
from rich.rule import Rule
from rich.table import Table

from medibot.data.gate import NAMES, Audit, audit_labels, refuse_faults
from medibot.data.painting import choose_examples, paint, paint_html, paint_text
from medibot.data.prepared import Prepared, prepare
from medibot.errors import RecipeError
from medibot.model.loading import make_tiny_model, method_name
from medibot.recipe import Recipe
from medibot.run import Run
from medibot.training.trainer import build_trainer

# (title, header, rows)
Cells = tuple[str, list[str], list[list[Any]]]


@dataclass(frozen=True)
class Inspection:
    """Ledger, leak report, loss-mask report and painted rows of a recipe.

    `audits` are (split, the trainer's rows, what the gate found); `painted` are (text, kind) pieces of each shown row.
    """

    prepared: Prepared
    audits: list[tuple[Dataset, Audit]]
    painted: dict[str, list[tuple[str, str]]]

    @property
    def tables(self) -> list[Cells]:
        """Return the three reports."""
        return [ledger_table(self.prepared), leak_table(self.prepared), mask_table([audit for _, audit in self.audits])]

    def refuse_faults(self) -> None:
        """Raise RecipeError where training would refuse."""
        for rows, audit in self.audits:
            refuse_faults(audit, rows, self.prepared.tokenizer)

    def html(self) -> str:
        """Return the same as a page."""
        templates = jinja2.Environment(loader=jinja2.PackageLoader("medibot"), autoescape=True)
        rows = [(name, paint_html(pieces)) for name, pieces in self.painted.items()]
        values = {"recipe": self.prepared.recipe, "prepared": self.prepared, "tables": self.tables, "rows": rows}
        return templates.get_template("inspect.html.j2").render(values)

    def __rich__(self) -> Group:
        """Return the reports as tables, and the painted rows."""
        prepared = self.prepared
        stops = ", ".join(repr(prepared.tokenizer.decode([token])) for token in prepared.generation.eos_token_id)
        model = prepared.recipe.model["pretrained_model_name_or_path"]
        parts: list[Any] = [
            f"{prepared.recipe.name}: {method_name(prepared.recipe)} of {model}",
            f"precision here: {prepared.precision.name} ({prepared.precision.reason})",
            f"generation stops at {stops}",
        ]
        for title, header, rows in self.tables:
            table = Table(*header, title=title, title_justify="left")
            table.columns[0].overflow = "fold"
            for column in table.columns[1:]:
                column.justify = "right"
            for cells in rows:
                table.add_row(*map(str, cells))
            parts.append(table)
        for name, pieces in self.painted.items():
            parts += [Rule(name), paint_text(pieces)]
        return Group(*parts)


def inspect_recipe(recipe: Recipe, row: int | None = None) -> Inspection:
    """Prepare a recipe's rows as training would, and read back what the loss covers; `row` is painted, too."""
    prepared = prepare(recipe)
    with tempfile.TemporaryDirectory() as folder:
        run = Run(Path(folder) / "inspect")
        trainer = build_trainer(prepared, run, lambda: make_tiny_model(prepared.tokenizer), lora=False)
    dataset, stops, limit = trainer.train_dataset, prepared.generation.eos_token_id, trainer.args.max_length
    audits = [
        (rows, audit_labels(rows, prepared.load(split), prepared.tokenizer, stops, limit, split))
        for split, rows in (("train", dataset), ("validation", trainer.eval_dataset))
        if rows
    ]
    if row is not None and not 0 <= row < len(dataset):
        raise RecipeError.of("--row", f"no row {row}", f"the training split has rows 0 to {len(dataset) - 1}")
    painted = {
        f"{name} (row {index}, {len(dataset[index]['input_ids'])} tokens)": paint(
            dataset[index], prepared.tokenizer, stops
        )
        for name, index in choose_examples(dataset, row).items()
    }
    return Inspection(prepared, audits, painted)


def ledger_table(prepared: Prepared) -> Cells:
    """Return what each rule did."""
    keys = ("rows_in", "dropped", "changed", "added", "rows_out")
    lines: list[list[Any]] = [[line["rule"], *(f"{line[key]:,}" for key in keys)] for line in prepared.ledger]
    sizes = ", ".join(f"{name} {count:,}" for name, count in prepared.split["rows"].items())
    lines.append([f"split: {sizes}", "", "", "", "", ""])
    return "Ledger", ["rule", "rows in", "dropped", "changed", "added", "rows out"], lines


def leak_table(prepared: Prepared) -> Cells:
    """Return how many rows share something with an earlier split: here, and had the rows been split at random."""
    leaks = prepared.leaks
    kinds = list(dict.fromkeys(kind for counts in leaks.values() for kind in counts))
    rows = [[kind, *(counts.get(kind, "") for counts in leaks.values())] for kind in kinds]
    return "Leak report (rows)", ["shared", *(name.replace("_", " ") for name in leaks)], rows


def mask_table(audits: list[Audit]) -> Cells:
    """Return what the loss covers, and what the gate found."""
    keys = ["rows_in", "rows_out", "tokens", "longest", "supervised", "supervised_share"]
    counts = [audit.as_dict() for audit in audits]
    rows = [[key.replace("_", " "), *(f"{found[key]:,}" for found in counts)] for key in keys]
    rows += [[text, *(found["violations"][key] for found in counts)] for key, text in NAMES.items()]
    return "Loss mask", ["", *(audit.split for audit in audits)], rows
