"""A recipe: one YAML file, plus `section.key=value` overrides, read strictly into a checked, frozen `Recipe`.

    recipe = load_recipe("quickstart", ["training.learning_rate=1e-4", "quantization=null"])

Every mistake of the file is reported at once, each with its line and column, as one `RecipeError`.
"""

import copy
import difflib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from medibot import schema
from medibot.schema import DataSection, EvaluationSection, json_schema, write_schema

__all__ = [
    "ABSENT",
    "DataSection",
    "EvaluationSection",
    "Place",
    "Problem",
    "Recipe",
    "RecipeError",
    "diff_recipes",
    "json_schema",
    "list_recipes",
    "load_recipe",
    "write_schema",
]

MAX_BYTES = 1_000_000
MAX_DEPTH = 20
REPOSITORY = Path(__file__).resolve().parent.parent


class Place(NamedTuple):
    """Where something was written: a file's line and column, or an override (its own text, line 0, its number)."""

    file: str
    line: int
    column: int


@dataclass(frozen=True)
class Problem:
    """One mistake of an author: where, what, and what to write instead."""

    file: str
    line: int
    column: int
    key: str
    what: str
    remedy: str = ""

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}:{self.column}" if self.line else self.file
        text = ": ".join(part for part in (place, shortened(self.key), shortened(self.what)) if part)
        text += f" ({self.remedy})" if self.remedy else ""
        # a key may hold anything, and this goes to a terminal as one line
        return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def shortened(text: str, most: int = 600) -> str:
    """`text`, or its beginning: a value that someone pasted must not fill the screen."""
    return text if len(text) <= most else f"{text[: most - 30]}… ({len(text):,} characters)"


class RecipeError(Exception):
    """The author's mistakes, one a line; never a defect of MediBot."""

    def __init__(self, problems: Sequence[Problem]):
        self.problems = tuple(problems)
        super().__init__(self.problems)

    def __str__(self) -> str:
        return "\n".join(str(problem) for problem in self.problems)

    @classmethod
    def of(cls, subject: str, what: str, remedy: str = "") -> "RecipeError":
        """A mistake that stands at no place of a file: `data.path: no such file (…)`."""
        return cls([Problem("", 0, 0, subject, what, remedy)])


@dataclass(frozen=True)
class Recipe:
    """A checked recipe. Each section holds exactly what was written; None or defaults stand for an absent one."""

    name: str
    path: Path
    model: dict[str, Any]
    data: DataSection
    training: dict[str, Any]
    quantization: dict[str, Any] | None = None
    lora: dict[str, Any] | None = None
    evaluation: EvaluationSection = field(default_factory=EvaluationSection)
    tracking: dict[str, Any] | None = None
    places: Mapping[str, Place] = field(default_factory=dict, repr=False, compare=False)
    written: Mapping[str, dict[str, Any]] = field(default_factory=dict, repr=False, compare=False)

    def error(self, key: str, what: str, remedy: str = "") -> RecipeError:
        """A mistake at `key`, to be raised; an absent key is placed at the nearest thing around it."""
        return RecipeError([Problem(*place_of(key, self.places, str(self.path)), key, what, remedy)])

    def as_dict(self) -> dict[str, dict[str, Any]]:
        """What the recipe says as plain values: equal for two recipes that say the same, whatever their order."""
        return copy.deepcopy(dict(self.written))


class Absent(Enum):
    """Tells an absent key from one that is null."""

    ABSENT = "absent"

    def __str__(self) -> str:
        return self.value


ABSENT = Absent.ABSENT


def load_recipe(name: str, overrides: Sequence[str] = (), root: Path | None = None) -> Recipe:
    """Read and check the recipe of that name (in recipes/) or path, with `section.key=value` overrides applied."""
    path = find_recipe(name, root)
    document = read_document(read_text(path), str(path))
    require_sections(document, str(path))
    for number, override in enumerate(overrides, start=1):
        apply_override(document, override, number)
    seen = {problem.key for problem in document.problems}
    problems = document.problems + [
        Problem(*place_of(finding.key, document.places, str(path)), *finding)
        for finding in schema.check(document.value)
        if finding.key not in seen
    ]
    if problems:
        raise RecipeError(sorted(problems, key=lambda problem: (problem.line == 0, problem.line, problem.column)))
    return assemble(path, document)


def require_sections(document: "Document", file: str) -> None:
    """A recipe is a mapping; there is nothing else to check in a document that is none."""
    if not isinstance(document.value, dict):
        shape = f"must be a mapping, not {schema.described(document.value)}"
        what = "holds nothing" if document.value is None else shape
        raise RecipeError([Problem(file, 1, 1, "", what, "sections at the left margin: model, data, training, …")])


def assemble(path: Path, document: "Document") -> Recipe:
    """The Recipe of a document without problems."""
    written = {
        name: schema.as_written(name, document.value[name]) for name in schema.SECTIONS if name in document.value
    }
    sections: dict[str, Any] = {
        **written,
        "data": DataSection.model_validate(written["data"]),
        "evaluation": EvaluationSection.model_validate(written.get("evaluation", {})),
    }
    return Recipe(name=path.stem, path=path, places=document.places, written=written, **sections)


def list_recipes(root: Path | None = None) -> list[tuple[str, str]]:
    """Name and purpose (the first comment line) of every recipe, sorted by name."""
    folder = next((folder for folder in recipe_folders(root) if folder.is_dir()), None)
    if folder is None:
        return []
    paths = sorted(path for pattern in ("*.yaml", "*.yml") for path in folder.glob(pattern))
    return [(path.stem, purpose(path)) for path in paths]


def purpose(path: Path) -> str:
    """The first comment that speaks to a reader rather than to an editor."""
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        text = line.lstrip("#").strip()
        if line.startswith("#") and text and not text.startswith("yaml-language-server"):
            return text
        if not line.startswith("#") and line.strip():
            break
    return ""


def diff_recipes(a: Recipe, b: Recipe) -> list[tuple[str, Any, Any]]:
    """Dotted key, value in a, value in b of all that the two say differently; ABSENT where one says nothing."""
    left, right = dict(flattened(a.as_dict())), dict(flattened(b.as_dict()))
    keys = list(left) + [key for key in right if key not in left]
    pairs = ((key, left.get(key, ABSENT), right.get(key, ABSENT)) for key in keys)
    return [(key, x, y) for key, x, y in pairs if type(x) is not type(y) or x != y]


def flattened(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values of nested mappings; an empty mapping is a value."""
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from flattened(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def recipe_folders(root: Path | None) -> list[Path]:
    """Where recipes of a name are looked for."""
    return [Path("recipes"), REPOSITORY / "recipes"] if root is None else [root / "recipes"]


def find_recipe(name: str, root: Path | None) -> Path:
    """The file of a recipe's name or path."""
    if name.endswith((".yaml", ".yml")):
        candidates = [Path(name)]
    else:
        candidates = [folder / f"{name}{end}" for folder in recipe_folders(root) for end in (".yaml", ".yml")]
    for path in candidates:
        if "\0" not in name and path.is_file():
            return path
    known = [known for known, _ in list_recipes(root)]
    close = difflib.get_close_matches(Path(name).stem, known, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]}? " if close else ""
    raise RecipeError.of(name, "no such recipe", f"{hint}there are: {', '.join(known) or 'none'}")


def read_text(path: Path) -> str:
    """The file as text; what cannot be text is an error at its place."""
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
    """A mistake at a position of the text."""
    line = text.count("\n", 0, position) + 1
    return RecipeError([Problem(file, line, position - text.rfind("\n", 0, position), "", what, remedy)])


@dataclass
class Document:
    """Plain values, where each was written, and what was wrong with the writing."""

    value: Any
    places: dict[str, Place]
    problems: list[Problem]


def place_of(key: str, places: Mapping[str, Place], file: str) -> Place:
    """The place of a dotted key, or of the nearest thing around it."""
    while key:
        if key in places:
            return places[key]
        key = key[: max(key.rfind("."), key.rfind("["), 0)]
    return Place(file, 1, 1)


class NodeLoader(yaml.BaseLoader):
    """Composes plain nodes only: what a reader of the file would have to look up elsewhere is refused."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Refuse indirection and bottomless nesting before the node is built."""
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
            self.refuse(event, "anchors and aliases are not read", "write the value out, or put text in quotes")
        if not isinstance(event, yaml.AliasEvent) and event.tag is not None:
            self.refuse(event, "tags are not read", "leave it out, or put text in quotes")
        if self.depth >= MAX_DEPTH:
            self.refuse(event, "is nested too deep")
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def refuse(self, event: yaml.Event, what: str, remedy: str = "") -> None:
        """Stop at the event."""
        raise yaml.MarkedYAMLError(problem=what, problem_mark=event.start_mark, note=remedy)


def read_document(text: str, file: str) -> Document:
    """Parse one strict YAML document; RecipeError if it is none."""
    loader: Any = None
    try:
        loader = NodeLoader(text)
        node = loader.get_single_node()
    except yaml.reader.ReaderError as error:
        what = f"holds the control character U+{error.character:04X}"
        raise syntax_error(file, text, error.position, what, "remove it") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise RecipeError([Problem(file, mark.line + 1, mark.column + 1, "", *yaml_complaint(error))]) from error
    except (ValueError, OverflowError) as error:  # PyYAML turns the number of an escape into a character unchecked
        raise RecipeError([Problem(file, loader.line + 1, loader.column + 1, "", "escape is no character")]) from error
    document = Document(None, {}, [])
    if node is not None:
        document.value = plain_value(node, "", document, file)
    return document


def yaml_complaint(error: yaml.MarkedYAMLError) -> tuple[str, str]:
    """PyYAML's message in a line, with a remedy for the usual ones."""
    problem = error.problem or error.context or "cannot be read"
    if "'\\t'" in problem:
        return "a tab cannot indent", "use spaces"
    if "single document" in (error.context or ""):
        return "a recipe is one document", "remove the `---`"
    if "mapping values are not allowed" in problem:
        return "a second `:` in one line", "put text with a colon in quotes"
    if "<stream end>" in problem or "end of stream" in problem:
        return "a bracket or a quote is never closed", "close it"
    if problem.endswith("got '?'"):
        return "a bare `?` inside brackets", "put questions in quotes"
    if error.note is not None:
        return problem, error.note
    return f"is not YAML: {problem}", ""


def plain_value(node: yaml.Node, key: str, document: Document, file: str) -> Any:
    """The node's value; places and problems go to the document."""
    if isinstance(node, yaml.ScalarNode):
        try:
            return scalar(node.value) if node.style is None else plain_text(node.value)
        except ValueError as error:
            document.problems.append(Problem(*place_of(key, document.places, file), key, str(error)))
            return None
    if isinstance(node, yaml.SequenceNode):
        values = []
        for index, item in enumerate(node.value):
            document.places[f"{key}[{index}]"] = mark_place(item, file)
            values.append(plain_value(item, f"{key}[{index}]", document, file))
        return values
    mapping: dict[str, Any] = {}
    for name_node, value_node in node.value:
        place, name = mark_place(name_node, file), key_name(name_node)
        inner = f"{key}.{name}" if key else str(name)
        if name is None:
            document.problems.append(Problem(*place, key, "a key must be text", "put it in quotes"))
        elif name in mapping:
            first = document.places[inner].line
            document.problems.append(Problem(*place, inner, "is repeated", f"first on line {first}"))
        else:
            document.places[inner] = place
            mapping[name] = plain_value(value_node, inner, document, file)
    return mapping


def mark_place(node: yaml.Node, file: str) -> Place:
    """Where the node begins, counted from 1."""
    return Place(file, node.start_mark.line + 1, node.start_mark.column + 1)


def key_name(node: yaml.Node) -> str | None:
    """A mapping's key, or None where it is not text."""
    if not isinstance(node, yaml.ScalarNode):
        return None
    try:
        name = scalar(node.value) if node.style is None else plain_text(node.value)
    except ValueError:
        return None
    return name if isinstance(name, str) else None


WORDS = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}
INTEGER = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")


def scalar(plain: str) -> bool | int | float | str | None:
    """An unquoted scalar by YAML 1.2's core schema: `2e-4` is a number, `no` is a word, `010` is ten."""
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
    """The text itself; the escapes of a quoted one can put in what no file can hold."""
    if re.search(r"[\0\ud800-\udfff]", value):
        raise ValueError("holds a character that is not text")
    return value


def apply_override(document: Document, override: str, number: int) -> None:
    """Write `section.key=value` into the document; null takes the key or the whole section away."""
    key, equals, written = (part.strip() for part in override.partition("="))
    place = Place(f"{key}=…" if schema.is_secret(written) else override, 0, number)
    steps = key.split(".")
    if not equals or not all(steps):
        document.problems.append(Problem(*place, "", "is not an override", "write section.key=value"))
        return
    value = override_value(document, key, written, place)
    values = document.value
    for depth, step in enumerate(steps[:-1], start=1):
        outer = ".".join(steps[:depth])
        if step not in values:
            document.places[outer] = place
        values = values.setdefault(step, {})
        if not isinstance(values, dict):
            document.problems.append(Problem(*place, key, f"{outer} is not a mapping"))
            return
    document.places = {old: at for old, at in document.places.items() if not within(old, key)}
    document.problems = [old for old in document.problems if old.line == 0 or not within(old.key, key)]
    if value is not None or (written and key in schema.NULL_IS_A_VALUE):
        document.places[key] = place
        values[steps[-1]] = value
    elif values.pop(steps[-1], ABSENT) is ABSENT and key not in schema.SECTIONS:
        document.problems.append(Problem(*place, key, "is not in the recipe", "nothing to take away"))


def within(key: str, outer: str) -> bool:
    """Whether a dotted key is the outer one or lies in it."""
    return key == outer or key.startswith((f"{outer}.", f"{outer}["))


def override_value(document: Document, key: str, written: str, place: Place) -> Any:
    """The value of an override: a list, a mapping or quoted text is YAML, the rest one plain scalar to its end."""
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
