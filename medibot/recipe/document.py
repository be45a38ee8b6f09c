"""Read YAML strictly: plain values, where each was written, and every mistake at its place."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import yaml

from medibot.errors import Place, Problem, RecipeError
from medibot.recipe.schema import NULL_IS_A_VALUE, SECTIONS
from medibot.recipe.suggestions import is_secret

MAX_BYTES, MAX_DEPTH = 1_000_000, 20
# YAML 1.2's core schema: `2e-4` is a number, `no` is a word, `010` is ten; YAML 1.1, as PyYAML reads it, differs in all
WORDS = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}
INTEGER = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
# PyYAML's words for the usual mistakes, and what to say instead
COMPLAINTS = (
    ("'\\t'", "a tab cannot indent", "use spaces"),
    ("single document", "a recipe is one document", "remove the `---`"),
    ("mapping values are not allowed", "a second `:` in one line", "put text with a colon in quotes"),
    ("<stream end>", "a bracket or a quote is never closed", "close it"),
    ("end of stream", "a bracket or a quote is never closed", "close it"),
    ("got '?'", "a bare `?` inside brackets", "put questions in quotes"),
)


class Absent(Enum):
    """Tell an absent key from one that is null."""

    ABSENT = "absent"

    def __str__(self) -> str:
        return self.value


ABSENT = Absent.ABSENT


@dataclass
class Document:
    """Plain values, where each was written, and what was wrong with the writing."""

    value: Any
    places: dict[str, Place]
    problems: list[Problem]


def read_text(path: Path) -> str:
    """Return the file as text; raise RecipeError at the place of what is not text."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise RecipeError.of(str(path), f"cannot be read: {error.strerror}") from error
    if len(data) > MAX_BYTES:
        raise RecipeError.of(str(path), f"is larger than {MAX_BYTES:,} bytes", "a recipe is a page of settings")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = data[: error.start].decode("utf-8", errors="replace")
        raise syntax_error(str(path), before, len(before), "is not UTF-8 text", "save it as UTF-8") from error


def syntax_error(file: str, text: str, position: int, what: str, remedy: str = "") -> RecipeError:
    """Return the error for a position in the text."""
    line = text.count("\n", 0, position) + 1
    return RecipeError([Problem(file, line, position - text.rfind("\n", 0, position), "", what, remedy)])


def place_of(key: str, places: Mapping[str, Place], file: str) -> Place:
    """Return the place of a dotted key, or of the nearest thing around it."""
    while key:
        if key in places:
            return places[key]
        key = key[: max(key.rfind("."), key.rfind("["), 0)]
    return Place(file, 1, 1)


class NodeLoader(yaml.BaseLoader):
    """Compose plain nodes; refuse what a reader of the file would have to look up elsewhere."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Refuse indirection and bottomless nesting before the node is built."""
        event, refused = self.peek_event(), None
        if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
            refused = "anchors and aliases are not read", "write the value out, or quote text"
        elif event.tag is not None:
            refused = "tags are not read", "leave it out, or put text in quotes"
        elif self.depth >= MAX_DEPTH:
            refused = "is nested too deep", ""
        if refused:
            raise yaml.MarkedYAMLError(problem=refused[0], problem_mark=event.start_mark, note=refused[1])
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


def read_document(text: str, file: str) -> Document:
    """Parse one strict YAML document; raise RecipeError for text that is none."""
    loader: Any = None
    try:
        loader = NodeLoader(text)
        node = loader.get_single_node()
    except yaml.reader.ReaderError as error:
        what = f"holds the control character U+{error.character:04X}"
        raise syntax_error(file, text, error.position, what, "remove it") from error
    except yaml.MarkedYAMLError as error:
        mark, problem = error.problem_mark or error.context_mark, error.problem or error.context or "cannot be read"
        said = (f"is not YAML: {problem}", "") if error.note is None else (problem, error.note)
        usual = (words[1:] for words in COMPLAINTS if words[0] in f"{error.context}\n{problem}")
        raise RecipeError([Problem(file, mark.line + 1, mark.column + 1, "", *next(usual, said))]) from error
    except (ValueError, OverflowError) as error:  # PyYAML turns the number of an escape into a character unchecked
        raise RecipeError([Problem(file, loader.line + 1, loader.column + 1, "", "escape is no character")]) from error
    document = Document(None, {}, [])
    if node is not None:
        document.value = read_node(node, "", document, file)
    return document


def read_node(node: yaml.Node, key: str, document: Document, file: str) -> Any:
    """Return the node's value; places and problems go to the document."""
    if isinstance(node, yaml.ScalarNode):
        try:
            return read_scalar(node)
        except ValueError as error:
            document.problems.append(Problem(*place_of(key, document.places, file), key, str(error)))
            return None
    if isinstance(node, yaml.SequenceNode):
        values = []
        for index, item in enumerate(node.value):
            document.places[f"{key}[{index}]"] = mark_place(item, file)
            values.append(read_node(item, f"{key}[{index}]", document, file))
        return values
    mapping: dict[str, Any] = {}
    for name_node, value_node in node.value:
        place = mark_place(name_node, file)
        try:
            name = read_scalar(name_node)
        except ValueError:
            name = None
        inner = f"{key}.{name}" if key else str(name)
        if not isinstance(name, str):
            document.problems.append(Problem(*place, key, "a key must be text", "put it in quotes"))
        elif name in mapping:
            first = document.places[inner].line
            document.problems.append(Problem(*place, inner, "is repeated", f"first on line {first}"))
        else:
            document.places[inner] = place
            mapping[name] = read_node(value_node, inner, document, file)
    return mapping


def mark_place(node: yaml.Node, file: str) -> Place:
    """Return where the node begins, counted from 1."""
    return Place(file, node.start_mark.line + 1, node.start_mark.column + 1)


def read_scalar(node: yaml.Node) -> bool | int | float | str | None:
    """Return a scalar's value: text where it is quoted; None for a list or a mapping, which no key can be."""
    if not isinstance(node, yaml.ScalarNode):
        return None
    return scalar(node.value) if node.style is None else plain_text(node.value)


def scalar(plain: str) -> bool | int | float | str | None:
    """Return the value of an unquoted scalar; raise ValueError for a number that is none."""
    if plain in WORDS:
        return WORDS[plain]
    if not FLOAT.fullmatch(plain) and not INTEGER.fullmatch(plain):
        return plain_text(plain)
    if len(plain) > 40:
        raise ValueError("is too long for a number")
    if INTEGER.fullmatch(plain):
        return int(plain, {"0o": 8, "0x": 16}.get(plain[:2], 10))
    value = math.inf if plain[-1] in "fFnN" else float(plain)
    if not math.isfinite(value):
        raise ValueError("must be a finite number")
    return value


def plain_text(value: str) -> str:
    """Return the text; raise ValueError for what a quoted one's escapes can put in and no file can hold."""
    if re.search(r"[\0\ud800-\udfff]", value):
        raise ValueError("holds a character that is not text")
    return value


def apply_override(document: Document, override: str, number: int) -> None:
    """Write `section.key=value` into the document; null takes the key or the whole section away."""
    key, equals, written = (part.strip() for part in override.partition("="))
    place = Place(f"{key}=…" if is_secret(written) else override, 0, number)
    steps = key.split(".")
    if not equals or not all(steps):
        document.problems.append(Problem(*place, "", "is not an override", "write section.key=value"))
        return
    value = read_override(document, key, written, place)
    values = document.value
    for depth, step in enumerate(steps[:-1], start=1):
        outer = ".".join(steps[:depth])
        if step not in values:
            document.places[outer] = place
        values = values.setdefault(step, {})
        if not isinstance(values, dict):
            document.problems.append(Problem(*place, key, f"{outer} is not a mapping"))
            return
    # What the override replaces is neither a place nor a problem any more
    within = (key, f"{key}.", f"{key}[")
    document.places = {old: at for old, at in document.places.items() if old != key and not old.startswith(within[1:])}
    document.problems = [
        old for old in document.problems if old.line == 0 or (old.key != key and not old.key.startswith(within[1:]))
    ]
    if value is not None or (written and key in NULL_IS_A_VALUE):
        document.places[key] = place
        values[steps[-1]] = value
    elif values.pop(steps[-1], ABSENT) is ABSENT and key not in SECTIONS:
        document.problems.append(Problem(*place, key, "is not in the recipe", "nothing to take away"))


def read_override(document: Document, key: str, written: str, place: Place) -> Any:
    """Return the value of an override: a list, a mapping or quoted text is YAML, the rest one plain scalar."""
    try:
        if not written.startswith(("[", "{", '"', "'")):
            return scalar(written)
        parsed = read_document(written, place.file)
    except ValueError as error:
        document.problems.append(Problem(*place, key, str(error)))
        return json.dumps(written)
    except RecipeError as error:
        document.problems += [Problem(*place, key, problem.what, problem.remedy) for problem in error.problems]
        return json.dumps(written)
    document.problems += [
        Problem(*place, f"{key}.{problem.key}" if problem.key else key, problem.what) for problem in parsed.problems
    ]
    return parsed.value
