"""Read a recipe: one YAML file whose sections are the keyword arguments of upstream's constructors.

A recipe's name or path comes in, with `section.key=value` overrides. A checked, frozen `Recipe` goes out, or every
mistake of the author at once, each with file, line and column. It never loads data or weights, and never fills in a
setting that nobody wrote.

    recipe = load_recipe("quickstart", ["training.learning_rate=1e-4", "quantization=null"])
"""

import copy
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from medibot.cleaning import rule_problem
from medibot.errors import Place, Problem, RecipeError
from medibot.recipe.document import ABSENT, apply_override, place_of, read_document
from medibot.recipe.files import find_by_name, names_data, search_folders
from medibot.recipe.refusals import check, flattened
from medibot.recipe.schema import section_models
from medibot.recipe.sections import DataSection, EvaluationSection, SourceSection
from medibot.recipe.suggestions import describe

__all__ = ["ABSENT", "DataSection", "EvaluationSection", "Recipe"]
__all__ += ["find_differences", "list_recipes", "load_recipe", "names_data"]


@dataclass(frozen=True)
class Recipe:
    """A checked recipe. Each section holds exactly what was written; None or defaults take an absent one's place."""

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
        """Make a mistake at `key`, to be raised; an absent key is placed at the nearest thing around it."""
        return RecipeError([Problem(*place_of(key, self.places, str(self.path)), key, what, remedy)])

    def rules(self) -> Iterator[tuple[str, list[Any]]]:
        """Yield each list of cleaning rules with its key."""
        yield "data.clean", self.data.clean
        for place, source in enumerate(self.data.sources):
            yield f"data.sources[{place}].clean", source.clean
        for name, held in (("validation", self.data.validation), ("test", self.data.test)):
            if isinstance(held, SourceSection):
                yield f"data.{name}.clean", held.clean

    def as_dict(self) -> dict[str, dict[str, Any]]:
        """Return what the recipe says as plain values: equal for two recipes that say the same, in any order."""
        return copy.deepcopy(dict(self.written))


def load_recipe(name: str, overrides: Sequence[str] = (), root: Path | None = None) -> Recipe:
    """Read and check the recipe of that name (in recipes/) or path, with `section.key=value` overrides applied.

    Raises RecipeError with all mistakes at once.
    """
    path = find_by_name("RECIPE", name, search_folders("recipes", root))
    document = read_document(path)
    if not isinstance(document.value, dict):
        what = "holds nothing" if document.value is None else f"must be a mapping, not {describe(document.value)}"
        remedy = "sections at the left margin: model, data, training, …"
        raise RecipeError(document.problems or [Problem(str(path), 1, 1, "", what, remedy)])
    for number, override in enumerate(overrides, start=1):
        apply_override(document, override, number)
    seen = {problem.key for problem in document.problems}
    problems = document.problems + [
        Problem(*place_of(finding.key, document.places, str(path)), *finding)
        for finding in check(document.value)
        if finding.key not in seen
    ]
    if problems:
        raise RecipeError(sorted(problems, key=lambda problem: (problem.line == 0, problem.line, problem.column)))
    # In the constructors' order and with numbers made uniform (1 where a float is meant is 1.0)
    written = section_models()[""].model_validate(document.value).model_dump(exclude_unset=True)
    sections: Any = written | {
        "data": DataSection(**written["data"]),
        "evaluation": EvaluationSection(**written.get("evaluation", {})),
    }
    recipe = Recipe(path.stem, path, places=document.places, written=written, **sections)
    for key, rules in recipe.rules():
        for place, item in enumerate(rules):
            if problem := rule_problem(item, path.parent):
                raise recipe.error(f"{key}[{place}]", problem)
    return recipe


def list_recipes(root: Path | None = None) -> list[tuple[str, str]]:
    """Return name and purpose (the first comment that is not for an editor) of every recipe, sorted by name."""
    recipes, folders = [], search_folders("recipes", root)
    for path in sorted(next(filter(Path.is_dir, folders), folders[0]).glob("*.y*ml")):
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        comments = itertools.takewhile(lambda line: line.startswith("#") or not line.strip(), lines)
        texts = [line.lstrip("#").strip() for line in comments if "yaml-language-server" not in line]
        recipes.append((path.stem, next(filter(None, texts), "")))
    return recipes


def find_differences(*sides: Mapping[str, Any]) -> list[tuple[Any, ...]]:
    """Return (dotted key, value in each side…) of all that they say differently; ABSENT where one says nothing."""
    leaves = [{key: x for key, x in flattened(side) if not (x and isinstance(x, dict))} for side in sides]
    rows = [(key, *(side.get(key, ABSENT) for side in leaves)) for key in dict.fromkeys(itertools.chain(*leaves))]
    return [
        (key, first, *others)
        for key, first, *others in rows
        if any(type(first) is not type(x) or first != x for x in others)
    ]
