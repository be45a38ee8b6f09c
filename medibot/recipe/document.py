"""Read YAML strictly: plain values, where each was written, and every mistake at its place."""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import accumulate
from pathlib import Path
from typing import Any

import yaml

from medibot.errors import Place, Problem, RecipeError
from medibot.recipe.schema import NULL_IS_A_VALUE, SECTIONS
from medibot.recipe.suggestions import is_secret

# Tells an absent key from one that is null
ABSENT = StrEnum("Absent", {"ABSENT": "absent"}).ABSENT
MAX_BYTES, MAX_DEPTH = 1_000_000, 20
# YAML 1.2's core schema: `2e-4` is a number, `no` is a word, `010` is ten; YAML 1.1, as PyYAML reads it, differs in all
WORDS = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}
NUMBER = re.compile(r"(0o[0-7]+|0x[\da-fA-F]+|[-+]?(\.\d+|\d+(\.\d*)?)([eE][-+]?\d+)?|[-+]?\.(?i:inf|nan))\Z", re.ASCII)
# PyYAML's words for the usual mistakes, and what to say instead
COMPLAINTS = {
    r"'\\t'": ("a tab cannot indent", "use spaces"),
    "mapping values are not allowed": ("a second `:` in one line", "put text with a colon in quotes"),
    "<stream end>|end of stream": ("a bracket or a quote is never closed", "close it"),
    r"got '\?'": ("a bare `?` inside brackets", "put questions in quotes"),
}


@dataclass
class Document:
    """Plain values, where each was written, and what was wrong with the writing."""

    value: Any = None
    places: dict[str, Place] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)


def read_document(path: Path) -> Document:
    """Read one YAML file; raise RecipeError for a file that cannot be read."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise RecipeError.of(str(path), f"is larger than {MAX_BYTES:,} bytes", "a recipe is a page of settings")
        text = path.read_text(encoding="utf-8-sig", errors="surrogateescape")
    except OSError as error:
        raise RecipeError.of(str(path), f"cannot be read: {error.strerror}") from error
    return parse(text, "", Place(str(path), 1, 1))


def outwards(key: str) -> Iterator[str]:
    """Yield a dotted key, and then all that it stands in."""
    while key:
        yield key
        key = key[: max(key.rfind("."), key.rfind("["), 0)]


def place_of(key: str, places: Mapping[str, Place], file: str) -> Place:
    """Return the place of a dotted key, or of the nearest thing around it."""
    return next((places[outer] for outer in outwards(key) if outer in places), Place(file, 1, 1))


def parse(text: str, key: str, place: Place) -> Document:
    """Read one strict YAML document, or an override's value (line 0), all of which stands at one place.

    There, a list, a mapping or quoted text is YAML, every other value one plain scalar.
    """
    document = Document()
    if not place.line and not text.startswith(("[", "{", '"', "'")):
        document.value = read_scalar(text, True, key, place, document)
        return document
    loader: Any = None
    try:
        loader = yaml.BaseLoader(text)
        loader.get_event()
        if not loader.check_event(yaml.StreamEndEvent):
            loader.get_event()
            document.value = read_value(loader, key, place, document)
            loader.get_event()
        if not loader.check_event(yaml.StreamEndEvent):
            what, mark = "a recipe is one document", loader.peek_event().start_mark
            raise yaml.MarkedYAMLError(problem=what, problem_mark=mark, note="remove the `---`")
        return document
    except yaml.reader.ReaderError as error:
        before = text[: error.position].split("\n")
        line, column = len(before) - 1, len(before[-1])
        what, remedy = f"holds the control character U+{error.character:04X}", "remove it"
        if 0xDC80 <= error.character <= 0xDCFF:  # a byte that Python could not decode
            what, remedy = "is not UTF-8 text", "save it as UTF-8"
    except yaml.MarkedYAMLError as error:
        line, column = error.problem_mark.line, error.problem_mark.column
        what, remedy = error.problem, error.note
        if remedy is None:
            known = [say for words, say in COMPLAINTS.items() if re.search(words, f"{error.context}\n{what}")]
            what, remedy = known[0] if known else (f"is not YAML: {what}", "")
    except (ValueError, OverflowError):  # PyYAML turns the number of an escape into a character unchecked
        line, column, what, remedy = loader.line, loader.column, "escape is no character", ""
    at = Place(place.file, line + 1, column + 1) if place.line else place
    return Document(problems=[Problem(*at, key, what, remedy)])


def read_value(loader: Any, key: str, place: Place, document: Document, depth: int = 0) -> Any:
    """Return the value that comes next; the places inside it and its problems go to the document."""
    event = loader.get_event()
    what, remedy = "", ""
    if event.anchor is not None:
        what, remedy = "anchors and aliases are not read", "write the value out, or quote text"
    elif event.tag is not None:
        what, remedy = "tags are not read", "leave it out, or put text in quotes"
    elif depth == MAX_DEPTH:
        what = "is nested too deep"
    if what:
        raise yaml.MarkedYAMLError(problem=what, problem_mark=event.start_mark, note=remedy)
    if isinstance(event, yaml.ScalarEvent):
        return read_scalar(event.value, event.style is None, key, place, document)
    values: dict[Any, Any] = {}
    is_list = isinstance(event, yaml.SequenceStartEvent)
    while not loader.check_event(yaml.CollectionEndEvent):
        mark = loader.peek_event().start_mark
        at = Place(place.file, mark.line + 1, mark.column + 1) if place.line else place
        name = len(values) if is_list else read_value(loader, key, at, document, depth + 1)
        inner = f"{key}[{name}]" if is_list else f"{key}.{name}" if key else str(name)
        first = document.places.setdefault(inner, at).line
        value = read_value(loader, inner, at, document, depth + 1)
        if not is_list and not isinstance(name, str):
            document.problems.append(Problem(*at, key, "a key must be text", "put it in quotes"))
        elif name in values:
            document.problems.append(Problem(*at, inner, "is repeated", f"first on line {first}" if first else ""))
        else:
            values[name] = value
    loader.get_event()
    return list(values.values()) if is_list else values


def read_scalar(text: str, plain: bool, key: str, place: Place, document: Document) -> bool | int | float | str | None:
    """Return the value of one scalar, quoted or plain; None where it is a problem."""
    what, remedy = "", ""
    if plain and text in WORDS:
        return WORDS[text]
    if plain and NUMBER.match(text):
        if len(text) > 40:
            what = "is too long for a number"
        elif text.lstrip("+-").isdecimal() or text.startswith(("0o", "0x")):
            return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))
        elif text[-1] not in "fFnN" and math.isfinite(float(text)):
            return float(text)
        else:
            what = "must be a finite number"
    elif re.search(r"[\0\ud800-\udfff]", text):  # which a quoted text's escapes can put in, and no file can hold
        what = "holds a character that is not text"
    elif is_secret(text) and not key.endswith(".revision"):  # which may be a commit
        what, remedy = "looks like an API key", "no secrets in recipes: `hf auth login`, `wandb login`"
    else:
        return text
    document.problems.append(Problem(*place, key, what, remedy))
    return None


def apply_override(document: Document, override: str, number: int) -> None:
    """Write `section.key=value` into the document; null takes the key or the whole section away."""
    key, equals, written = (part.strip() for part in override.partition("="))
    secret = any(map(is_secret, re.findall(r"[\w-]+", written)))
    place = Place(f"{key}=…" if secret else override, 0, number)
    *outer, last = key.split(".")
    if not equals or not last or not all(outer):
        document.problems.append(Problem(*place, "", "is not an override", "write section.key=value"))
        return
    parsed, values = parse(written, key, place), document.value
    for step, path in zip(outer, accumulate(outer, "{}.{}".format), strict=True):
        document.places.setdefault(path, place)
        values = values.setdefault(step, {})
        if not isinstance(values, dict):
            parsed.problems = [Problem(*place, key, f"{path} is not a mapping")]
            break
    if parsed.problems:
        document.problems += parsed.problems
        return
    # What the override replaces is neither a place nor a problem any more
    document.places = {name: at for name, at in document.places.items() if key not in outwards(name)}
    document.problems = [found for found in document.problems if found.line == 0 or key not in outwards(found.key)]
    if parsed.value is not None or (written and key in NULL_IS_A_VALUE):
        document.places |= {key: place} | parsed.places
        values[last] = parsed.value
    elif values.pop(last, ABSENT) is ABSENT and key not in SECTIONS:
        document.problems.append(Problem(*place, key, "is not in the recipe", "nothing to take away"))
