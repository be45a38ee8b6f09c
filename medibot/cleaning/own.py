"""Find rules of an author's own: functions in a Python file beside the recipe."""

import ast
import re
import types
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from medibot.cleaning.ledger import Comparison
from medibot.cleaning.rules import Row


class RuleFailed(Exception):
    """A rule of an author's own that cannot be imported, that raises, or that returns something else than rows."""


# The first parameter of a rule: one row, or all of them
FIRST = ("row", "rows")


def rule_file(name: str, folder: Path) -> Path:
    """Return the file of a rule such as "my_rules:drop_drafts"."""
    return folder / f"{name.partition(':')[0].replace('.', '/')}.py"


def own_rule_problem(name: str, folder: Path) -> str | None:
    """Return what is wrong with a rule of an author's own, in one line, or None; reads its file and runs nothing."""
    if not re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*", name):
        return f"{name}: a rule of your own is written file:function, its file without .py and beside the recipe"
    file, function = rule_file(name, folder), name.partition(":")[2]
    if not file.is_file():
        return f"{name}: there is no file {file}"
    try:
        body = ast.parse(file.read_bytes()).body
    except (SyntaxError, ValueError) as error:
        return f"{name}: {file} is not Python: {error}"
    defined = {node.name: node for node in body if isinstance(node, ast.FunctionDef)}
    if function not in defined:
        return f"{name}: {file} defines no function {function}; it has {', '.join(defined) or 'none'}"
    first = [argument.arg for argument in defined[function].args.args[:1]]
    if first not in (["row"], ["rows"]):
        return f"{name}: the first parameter of {function} must be row or rows"
    return None


def import_rule(name: str, folder: Path) -> Callable[..., Any]:
    """Return the function that a rule of an author's own names; raise RuleFailed for what its file raises."""
    file = rule_file(name, folder)
    module = types.ModuleType(file.stem)
    try:
        exec(compile(file.read_bytes(), str(file), "exec"), vars(module))
    except Exception as error:  # an author's code may raise anything
        raise RuleFailed(f"{file} failed: {type(error).__name__}: {error}") from error
    return vars(module)[name.partition(":")[2]]


def apply(name: str, rule: Callable[[Row], Row | None], rows: Iterable[Row], count: Comparison) -> Iterator[Row]:
    """Yield what an author's rule makes of each row; it works on copies, so that what it changes is counted."""
    for row in rows:
        try:
            kept = rule(dict(row))
        except Exception as error:  # an author's code may raise anything
            raise RuleFailed(f"{name} failed at row {row['row']}: {type(error).__name__}: {error}") from error
        count.note(row, kept if kept is None else check_row(name, kept))
        if kept is not None:
            # A row that is left as it was shall not count as changed
            yield row if kept == row else kept


def apply_to_all(
    name: str, rule: Callable[[list[Row]], list[Row]], rows: Iterable[Row], count: Comparison
) -> Iterator[Row]:
    """Yield what an author's rule makes of all rows, in its own order; it is given a list of copies."""
    before = list(rows)
    try:
        kept = list(rule([dict(row) for row in before]))
    except Exception as error:  # an author's code may raise anything
        raise RuleFailed(f"{name} failed: {type(error).__name__}: {error}") from error
    count.note_all(before, [check_row(name, row) for row in kept])
    yield from kept


def check_row(name: str, row: Any) -> Row:
    """Return what a rule of an author's own gave, if it is a row."""
    texts = [row.get(column) for column in ("prompt", "completion")] if isinstance(row, dict) else [0]
    if not all(isinstance(text, str | None) for text in texts) or "row" not in row:
        raise RuleFailed(f"{name} must return a row with text as prompt and completion, or None; it gave {row!r:.200}")
    return row
