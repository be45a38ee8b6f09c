"""Show what a recipe will train on, before a weight is loaded."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from rich.console import Group
from rich.rule import Rule
from rich.table import Column, Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from medibot.data.gate import IGNORED, NAMES, Audit
from medibot.data.prepared import Prepared, prepare
from medibot.errors import RecipeError
from medibot.model.loading import method_name
from medibot.recipe import Recipe
from medibot.run import Run
from medibot.training.trainer import audit_splits, build_trainer

STYLES = {"masked": "dim", "trained": "bold green", "stop": "bold white on red"}


@dataclass(frozen=True)
class Inspection:
    """What a recipe trains on: what the gate found in each split, and the (text, kind) pieces of each painted row."""

    prepared: Prepared
    audits: list[Audit]
    painted: dict[str, list[tuple[str, str]]]

    @property
    def tables(self) -> list[tuple[str, list[str], list[list[Any]]]]:
        """Return (title, header, rows) of what each rule did, what splits share, and what the loss covers."""
        keys = ["rows_in", "dropped", "changed", "added", "rows_out"]
        ledger: list[list[Any]] = [[line["rule"], *(f"{line[key]:,}" for key in keys)] for line in self.prepared.ledger]
        sizes = ", ".join(f"{name} {count:,}" for name, count in self.prepared.split["rows"].items())
        ledger.append([f"split: {sizes}", *[""] * len(keys)])
        # Here, and had the rows been split at random
        leaks, counts = self.prepared.leaks, [audit.as_dict() for audit in self.audits]
        shared = [[kind, *(found[kind] for found in leaks.values())] for kind in leaks["random_split"]]
        measures = ["rows_in", "rows_out", "tokens", "longest", "supervised", "supervised_share"]
        mask = [[key.replace("_", " "), *(f"{found[key]:,}" for found in counts)] for key in measures]
        mask += [[text, *(found["violations"][key] for found in counts)] for key, text in NAMES.items()]
        tables = [
            ("Ledger", ["rule", *keys], ledger),
            ("Leak report (rows)", ["shared", *leaks], shared),
            ("Loss mask", ["", *(audit.split for audit in self.audits)], mask),
        ]
        return [(title, [name.replace("_", " ") for name in header], rows) for title, header, rows in tables]

    def html(self) -> str:
        """Return the same as a page."""
        templates = jinja2.Environment(loader=jinja2.PackageLoader("medibot"), autoescape=True)
        content = vars(self) | {"recipe": self.prepared.recipe, "tables": self.tables}
        return templates.get_template("inspect.html.j2").render(content)

    def __rich__(self) -> Group:
        prepared, recipe, precision = self.prepared, self.prepared.recipe, self.prepared.precision
        stops = ", ".join(repr(prepared.tokenizer.decode([token])) for token in prepared.generation.eos_token_id)
        parts: list[Any] = [
            f"{recipe.name}: {method_name(recipe)} of {recipe.model['pretrained_model_name_or_path']}",
            f"precision here: {precision.name} ({precision.reason})\ngeneration stops at {stops}",
        ]
        for title, (first, *rest), rows in self.tables:
            columns = [Column(first, overflow="fold"), *(Column(name, justify="right") for name in rest)]
            table = Table(*columns, title=title, title_justify="left")
            for cells in rows:
                table.add_row(*map(str, cells))
            parts.append(table)
        for name, pieces in self.painted.items():
            parts += [Rule(name), Text.assemble(*((text, STYLES[kind]) for text, kind in pieces))]
        return Group(*parts)


def paint(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, stops: list[int]) -> list[tuple[str, str]]:
    """Return (text, masked | trained | stop) pieces of one trainer row, whole characters only: joined, they are its text."""
    ids = row["input_ids"]
    kinds = [
        "masked" if label == IGNORED else "stop" if token in stops else "trained"
        for token, label in zip(ids, row["labels"], strict=True)
    ]
    pieces: list[tuple[str, str]] = []
    # Each piece is decoded behind the one before it: SentencePiece drops a space at the start of what it decodes
    start = read = 0
    for end in range(1, len(ids) + 1):
        before, text = (tokenizer.decode(ids[start:e], clean_up_tokenization_spaces=False) for e in (read, end))
        # An unfinished character waits for the tokens that spell its rest, but not beyond its own kind
        if text.endswith("�") and kinds[end : end + 1] == [kinds[end - 1]]:
            continue
        pieces.append((text[len(before) :], kinds[end - 1]))
        start, read = read, end
    return pieces


def inspect_recipe(recipe: Recipe, row: int | None = None) -> Inspection:
    """Prepare a recipe's rows as training would, and read back what the loss covers.

    Painted are the shortest row, the median, the longest, and `row` (an index in the training split).
    """
    prepared = prepare(recipe)
    trainer = build_trainer(prepared, Run(Path("inspect")), tiny=True)
    rows, audits = trainer.train_dataset, audit_splits(trainer, prepared)
    if row is not None and not 0 <= row < len(rows):
        raise RecipeError.of("--row", f"no row {row}", f"the training split has rows 0 to {len(rows) - 1}")
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]["input_ids"]))
    chosen = {"shortest": order[0], "median": order[len(order) // 2], "longest": order[-1]}
    painted = {}
    for name, index in (chosen if row is None else chosen | {f"row {row}": row}).items():
        title = f"{name} (row {index}, {len(rows[index]['input_ids'])} tokens)"
        painted[title] = paint(rows[index], prepared.tokenizer, prepared.generation.eos_token_id)
    return Inspection(prepared, audits, painted)
