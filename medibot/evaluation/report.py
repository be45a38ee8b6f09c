"""Write down what a measurement found, and print it."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from medibot.evaluation.statistics import interval_text
from medibot.run import Run


@dataclass(frozen=True)
class Report:
    """What was measured: `results` is the content of the first of `files` in `folder`; `shown` is what people read."""

    results: dict[str, Any]
    folder: Path
    files: list[str]
    verdict: str
    shown: list[Any]

    def __rich__(self) -> Group:
        written = f"written: {self.folder}/{', '.join(self.files)}"
        return Group(self.verdict, *self.shown, Text(written, no_wrap=True, overflow="ignore"))


def write_report(folder: Path, files: dict[str, Any], verdict: str, shown: list[Any]) -> Report:
    """Write {name: content}; the first are the results, which come last, so that they are there only with the rest."""
    results = next(iter(files.values()))
    if results.get("rows", 0) < results.get("of", 0):
        shown = [f"A quick look: {results['rows']} of {results['of']} rows.", *shown]
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in reversed(files.items()):
        if name.endswith(".jsonl"):
            content = "\n".join(json.dumps(line, ensure_ascii=False) for line in content)
        Run(folder).write(name, content)
    return Report(results, folder, list(files), verdict, shown)


def make_table(header: list[str], rows: list[list[str]], title: str | None = None) -> Table:
    """Return a table whose cells are plain text, whatever brackets they hold."""
    table = Table(*header, title=title, title_justify="left")
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def difference_table(header: list[str], rows: list[tuple[list[str], dict[str, Any]]], digits: int = 4) -> Table:
    """Return a table of base against tuned: the first cells of each row, and its figures."""
    cells, signs = [], {"baseline": "", "value": "", "difference": "+"}
    for first, found in rows:
        figures = [f"{found[key]:{sign}.{digits}f}" for key, sign in signs.items()]
        cells.append([*first, *figures, interval_text(found, digits), found["verdict"]])
    return make_table([*header, "base", "tuned", "difference", "95 % interval", "verdict"], cells)
