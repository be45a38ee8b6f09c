"""Show what a data file without a recipe holds: its guessed shape, its first conversations, and the section to write."""

import itertools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.rule import Rule
from rich.text import Text

from medibot.cleaning.rules import Row
from medibot.data.columns import kept_name
from medibot.data.guess import Guess, guess
from medibot.data.sources import open_source
from medibot.data.turns import Turns
from medibot.errors import Place, RecipeError, shorten
from medibot.recipe import DataSection, Recipe

LEARNED, OTHER = "bold green", "dim"
NEXT = "Next: write this in the place of a recipe's own data section (medibot list), then: medibot inspect mine.yaml"


@dataclass(frozen=True)
class Preview:
    """What a file holds: a verdict, its first rows' messages as (role, text, learned), notes, and the section as YAML."""

    verdict: str
    painted: dict[int, list[tuple[str, str, bool]]]
    notes: list[str]
    section: str

    def __rich__(self) -> Group:
        # A path that is cut into lines cannot be copied
        parts: list[Any] = [Text(self.verdict, overflow="ignore")]
        for row, messages in self.painted.items():
            parts.append(Rule(f"row {row}"))
            for role, text, learned in messages:
                # Without colours, as in a pipe, the word says it
                label = f"{role}, learned: " if learned else f"{role}: "
                parts.append(Text.assemble((label, OTHER), (shorten(text, 500), LEARNED if learned else OTHER)))
        # A comment cut into two lines would be no YAML any more
        section = Text(self.section, no_wrap=True, overflow="ignore")
        return Group(*parts, Rule(), *self.notes, "", section, "", NEXT)


def preview_file(path: str, bare: bool = True) -> Preview:
    """Guess the shape of a data file, read it as training would, and return what there is to see.

    The command must be `bare`: overrides and options are a recipe's.
    """
    if not bare:
        raise RecipeError.of(path, "data without a recipe takes no overrides, --html or --row", "leave them out")
    recipe = Recipe(path, Path(path), {}, DataSection(path=path), {}, places={"data": Place(path, 0, 0)})
    try:
        source = open_source(recipe, "data", recipe.data)
        placed = list(source.read())
    except RecipeError as error:
        # There is no such setting where no recipe is
        problems = [replace(problem, key=problem.key.removeprefix("data.path")) for problem in error.problems]
        raise RecipeError(problems) from error
    found = guess([row for _, row in placed])
    if found is None:
        has = ", ".join(dict.fromkeys(name for _, row in placed for name in row))
        what = "no column is known to hold questions, answers or conversations"
        remedy = f"it has {has}; name the right ones in a recipe's data section"
        if any(str(value).startswith("[{'") for value in placed[0][1].values()):
            remedy = "Python's text of lists, [{'…, is not JSON: write cells with json.dumps, or save as JSONL"
        raise RecipeError.of(path, what, remedy)
    section = DataSection(path=path, malformed="drop", **found.section)
    turns = Turns(replace(recipe, data=section), replace(source, section=section, read=lambda: iter(placed)), True)
    conversations = [list(parts) for _, parts in itertools.groupby(turns, key=lambda row: row["row"])]
    notes = [*doubt_rows(found, turns, conversations), *notes_of(turns, found)]
    firsts = {parts[0]["row"]: paint_conversation(parts) for parts in conversations[:3]}
    return Preview(verdict(path, found, len(placed), conversations), firsts, notes, found.as_yaml(path))


def verdict(path: str, found: Guess, rows: int, conversations: list[list[Row]]) -> str:
    """Return in a line how many rows there are, and what they are taken for."""
    sizes = [max(len(part.get("history", [])) for part in parts) + 2 for parts in conversations]
    turns = " to ".join(f"{size:,}" for size in sorted({min(sizes), max(sizes)}))
    shape, pair = f"conversations of {turns} turns", found.section
    if "messages" in pair:
        return f"{path}: {rows:,} rows, {shape} in column {pair['messages']!r} ({found.spelling})"
    columns = f"questions in {pair['prompt']!r}, answers in {pair['completion']!r}"
    guessed = " (a guess from their texts, no known names)" if found.doubts.keys() & {"prompt", "completion"} else ""
    return f"{path}: {rows:,} rows, {f'{shape}: ' if max(sizes) > 2 else ''}{columns}{guessed}"


def doubt_rows(found: Guess, turns: Turns, conversations: list[list[Row]]) -> list[str]:
    """Write what these rows need into the section, so that a recipe takes it; return notes on what was wrong."""
    notes = []
    if count := turns.malformed.count:
        (place, fault), first = turns.fault, turns.malformed.examples[0]["row"]
        if not conversations:
            raise RecipeError.of(place, f"{fault} (all {count:,} conversations are malformed)", "mend them")
        notes.append(
            f"malformed: {count:,} of {turns.rows:,} conversations; the first is row {first}, {place}: {fault}"
        )
        found.section["malformed"], found.doubts["malformed"] = "drop", f"{count:,} of {turns.rows:,}; merge keeps more"
    rows = list(itertools.chain(*conversations))
    for column, rule in (("prompt", "drop_unasked"), ("completion", "drop_unanswered")):
        if empty := sum(not (row[column] or "").strip() for row in rows):
            notes.append(f"empty: {empty:,} of {len(rows):,} rows have no {column}")
            found.section.setdefault("clean", []).append(rule)
    if len(conversations) < 200:
        share = 0.2 if len(conversations) >= 20 else 0
        found.section |= {"validation": share, "test": share}
        found.doubts["validation"] = (
            "of so few rows 0.05, the default, could be none" if share else "too few rows to hold some back"
        )
    return notes


def notes_of(turns: Turns, found: Guess) -> list[str]:
    """Return what reading the rows as training does changed or left out."""
    lines = turns.ledger(set(map(kept_name, found.section.get("group_by", []))))
    unread = [
        line.rule.removeprefix("not read: ").removeprefix("column ")
        for line in lines
        if line.rule.startswith("not read: ")
    ]
    changed = [f"{line.rule}: {line.changed:,}" for line in lines if line.changed]
    changed += [f"{line.rule}: {line.added:,} rows more" for line in lines if line.added]
    return changed + ([f"not read: {', '.join(unread)}"] if unread else [])


def paint_conversation(parts: list[Row]) -> list[tuple[str, str, bool]]:
    """Return (role, text, learned) of each message of a row; its last part holds all that was said before."""
    learned = {len(part.get("history", [])) + 1: part for part in parts}
    last = parts[-1]
    painted = [("system", last["system"], False)] if "system" in last else []
    said = [*last.get("history", []), {"role": "user", "content": last["prompt"]}, {"role": "assistant", "content": ""}]
    for place, message in enumerate(said):
        part = learned.get(place, {})
        painted += [("thinking", part["thinking"], True)] if "thinking" in part else []
        painted.append((message["role"], part.get("completion", message["content"]) or "", place in learned))
    return painted
