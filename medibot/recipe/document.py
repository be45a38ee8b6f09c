"""Read YAML strictly: plain values, where each was written, and every mistake at its place."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
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


class Absent(StrEnum):
    """Tell an absent key from one that is null."""

    ABSENT = "absent"


ABSENT = Absent.ABSENT


@dataclass
class Document:
    """Plain values, where each was written, and what was wrong with the writing."""

    value: Any = None
    places: dict[str, Place] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)


def read_document(path: Path) -> Document:
    """Read one strict YAML document; raise RecipeError for a file that is none."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise RecipeError.of(str(path), f"is larger than {MAX_BYTES:,} bytes", "a recipe is a page of settings")
        text = path.read_text(encoding="utf-8-sig", errors="surrogateescape")
    except OSError as error:
        raise RecipeError.of(str(path), f"cannot be read: {error.strerror}") from error
    document = Document()
    node = compose(text, str(path))
    if node is not None:
        document.value = read_node(node, "", Place(str(path), 1, 1), document)
    return document


def place_of(key: str, places: Mapping[str, Place], file: str) -> Place:
    """Return the place of a dotted key, or of the nearest thing around it."""
    while key and key not in places:
        key = key[: max(key.rfind("."), key.rfind("["), 0)]
    return places.get(key, Place(file, 1, 1))


class NodeLoader(yaml.BaseLoader):
    """Compose plain nodes; refuse what a reader of the file would have to look up elsewhere."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Refuse indirection and bottomless nesting before the node is built."""
        event = self.peek_event()
        if event.anchor is not None:
            what, remedy = "anchors and aliases are not read", "write the value out, or quote text"
        elif event.tag is not None:
            what, remedy = "tags are not read", "leave it out, or put text in quotes"
        elif self.depth >= MAX_DEPTH:
            what, remedy = "is nested too deep", ""
        else:
            self.depth += 1
            node = super().compose_node(parent, index)
            self.depth -= 1
            return node
        raise yaml.MarkedYAMLError(problem=what, problem_mark=event.start_mark, note=remedy)


def compose(text: str, file: str) -> yaml.Node | None:
    """Return the node of a YAML document; raise RecipeError for text that is none."""
    loader: Any = None
    try:
        loader = NodeLoader(text)
        return loader.get_single_node()
    except yaml.reader.ReaderError as error:
        what, remedy = f"holds the control character U+{error.character:04X}", "remove it"
        if 0xDC80 <= error.character <= 0xDCFF:  # a byte that Python could not decode
            what, remedy = "is not UTF-8 text", "save it as UTF-8"
        before = text[: error.position].split("\n")
        raise RecipeError([Problem(file, len(before), len(before[-1]) + 1, "", what, remedy)]) from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        said = error.problem or error.context or "cannot be read"
        known = [(what, remedy) for words, what, remedy in COMPLAINTS if words in f"{error.context}\n{said}"]
        ours = (f"is not YAML: {said}", "") if error.note is None else (said, error.note)
        raise RecipeError([Problem(file, mark.line + 1, mark.column + 1, "", *(known or [ours])[0])]) from error
    except (ValueError, OverflowError) as error:  # PyYAML turns the number of an escape into a character unchecked
        raise RecipeError([Problem(file, loader.line + 1, loader.column + 1, "", "escape is no character")]) from error


def read_node(node: yaml.Node, key: str, place: Place, document: Document) -> Any:
    """Return the node's value; the places inside it and its problems go to the document."""
    if isinstance(node, yaml.ScalarNode):
        try:
            value = scalar(node.value) if node.style is None else plain_text(node.value)
        except ValueError as error:
            document.problems.append(Problem(*place, key, str(error)))
            return None
        if isinstance(value, str) and is_secret(value) and not key.endswith(".revision"):  # which may be a commit
            remedy = "no secrets in recipes: `hf auth login`, `wandb login`"
            document.problems.append(Problem(*place, key, "looks like an API key", remedy))
        return value
    if isinstance(node, yaml.SequenceNode):
        items = {f"{key}[{index}]": item for index, item in enumerate(node.value)}
        document.places |= {inner: place_within(item, place) for inner, item in items.items()}
        return [read_node(item, inner, document.places[inner], document) for inner, item in items.items()]
    mapping: dict[str, Any] = {}
    for name_node, value_node in node.value:
        at = place_within(name_node, place)
        name = read_node(name_node, key, at, document) if isinstance(name_node, yaml.ScalarNode) else None
        inner = f"{key}.{name}" if key else str(name)
        if not isinstance(name, str):
            document.problems.append(Problem(*at, key, "a key must be text", "put it in quotes"))
        elif name in mapping:
            first = document.places[inner].line
            document.problems.append(Problem(*at, inner, "is repeated", f"first on line {first}" if first else ""))
        else:
            document.places[inner] = at
            mapping[name] = read_node(value_node, inner, at, document)
    return mapping


def place_within(node: yaml.Node, outer: Place) -> Place:
    """Return where the node begins, counted from 1; all of an override (line 0) stands at one place."""
    mark = node.start_mark
    return Place(outer.file, mark.line + 1, mark.column + 1) if outer.line else outer


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
    """Write `section.key=value` into the document; null takes the key or the whole section away.

    A list, a mapping or quoted text is YAML, every other value one plain scalar.
    """
    key, equals, written = (part.strip() for part in override.partition("="))
    secret = any(map(is_secret, re.findall(r"[\w-]+", written)))
    place = Place(f"{key}=…" if secret else override, 0, number)
    *outer, last = key.split(".")
    if not equals or not last or not all(outer):
        document.problems.append(Problem(*place, "", "is not an override", "write section.key=value"))
        return
    parsed, node = Document(), yaml.ScalarNode("", written)
    try:
        node = compose(written, place.file) if written.startswith(("[", "{", '"', "'")) else node
        parsed.value = read_node(node, key, place, parsed)
    except RecipeError as error:
        parsed.problems = [Problem(*place, key, problem.what, problem.remedy) for problem in error.problems]
    values = document.value
    for depth, step in enumerate(outer, start=1):
        document.places.setdefault(".".join(outer[:depth]), place)
        values = values.setdefault(step, {})
        if not isinstance(values, dict):
            parsed.problems = [Problem(*place, key, f"{'.'.join(outer[:depth])} is not a mapping")]
            break
    if parsed.problems:
        document.problems += parsed.problems
        return
    # What the override replaces is neither a place nor a problem any more
    old = re.compile(rf"{re.escape(key)}([.\[].*)?", re.DOTALL)
    document.places = {name: at for name, at in document.places.items() if not old.fullmatch(name)}
    document.problems = [found for found in document.problems if found.line == 0 or not old.fullmatch(found.key)]
    if parsed.value is not None or (written and key in NULL_IS_A_VALUE):
        document.places |= {key: place} | parsed.places
        values[last] = parsed.value
    elif values.pop(last, ABSENT) is ABSENT and key not in SECTIONS:
        document.problems.append(Problem(*place, key, "is not in the recipe", "nothing to take away"))
