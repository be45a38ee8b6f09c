"""Make text out of a source's columns."""

import datetime
import json
import string
from collections.abc import Mapping
from typing import Any

from medibot.recipe import Recipe

# Columns that a prepared row has of its own; a source's column of such a name is kept with "_" behind it
OWN = {"row", "part", "source", "group", "tokens", "prompt", "completion", "history", "system", "thinking"}
OWN |= {"chat_template_kwargs"}


def kept_name(column: str) -> str:
    """Return the name under which prepared rows keep a source's column."""
    return f"{column}_" if column in OWN else column


def as_text(value: Any) -> str | None:
    """Return a value as text: itself, a date or time in ISO 8601, anything else as JSON."""
    if isinstance(value, str | None):
        return value
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    return json.dumps(value, ensure_ascii=False, default=str)


def template_columns(recipe: Recipe, key: str, template: str) -> list[str]:
    """Return the columns that a template such as "{instruction}\\n\\n{input}" names; text without braces is a column."""
    try:
        fields = [name for _, name, *_ in string.Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise recipe.error(key, f"no template: {error}", "write {column}, and {{ for a brace") from error
    if "" in fields:
        raise recipe.error(key, "a pair of braces without a column", "write {column}, and {{ for a brace")
    return list(dict.fromkeys(fields)) or [template]


def fill_template(template: str, values: Mapping[str, str]) -> str:
    """Return the template with its columns filled in; a line whose columns are all empty goes, with the blank ones below.

    A line of the template goes with what labels it: "Input: {input}" without an input leaves nothing.
    """
    lines: list[tuple[str, bool]] = []
    gone = False
    for line in template.split("\n"):
        pieces = [(text, values.get(name or ""), name) for text, name, *_ in string.Formatter().parse(line)]
        named = [value for _, value, name in pieces if name]
        if named and not any(value and value.strip() for value in named):
            gone = True
        elif line.strip() or not gone:
            lines.append(("".join(text + (value or "") for text, value, _ in pieces), bool(line.strip())))
            gone = False
    # Blank lines that stood before what has gone
    while lines and not lines[-1][1]:
        lines.pop()
    return "\n".join(text for text, _ in lines)
