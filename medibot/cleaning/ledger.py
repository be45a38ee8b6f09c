"""Count what a rule dropped, changed and added, and show three examples."""

from dataclasses import dataclass
from typing import Any

from medibot.cleaning.rules import Row


@dataclass(frozen=True)
class LedgerLine:
    """What one rule did: counts of rows, and up to three examples with excerpts around the first difference."""

    rule: str
    rows_in: int
    dropped: int
    changed: int
    added: int
    rows_out: int
    examples: list[dict[str, Any]]


def row_key(row: Row) -> tuple[int, int]:
    """Return what names a row: its index in the source and its part (the number of one of several made from a row)."""
    return row["row"], row.get("part", 0)


def compare_rows(rule: str, before: list[Row], after: list[Row]) -> LedgerLine:
    """Compare the rows before and after a rule by "row" and "part"."""
    left = {row_key(row): row for row in after}
    remaining = {row["row"] for row in after}
    dropped = [row for row in before if row["row"] not in remaining]
    pairs = [(row, left[row_key(row)]) for row in before if row_key(row) in left]
    changed = [(old, new) for old, new in pairs if old is not new and old != new]
    affected = [*changed, *((row, None) for row in dropped)]
    # First, middle and last: the neighbours of a row often share its source and its defect
    places = sorted({0, len(affected) // 2, len(affected) - 1}) if affected else []
    return LedgerLine(
        rule=rule,
        rows_in=len(before),
        dropped=len(dropped),
        changed=len(changed),
        added=len(after) - (len(before) - len(dropped)),
        rows_out=len(after),
        examples=[make_example(*affected[place]) for place in places],
    )


def make_example(before: Row, after: Row | None) -> dict[str, Any]:
    """Return {"row": index, column: {"before", "after"}} of question, answer and what else changed."""
    shown: dict[str, Any] = {"row": before["row"]}
    others = [column for column, new in (after or {}).items() if column not in before or new != before[column]]
    for column in dict.fromkeys(["prompt", "completion", *others]):
        old = str(before.get(column) or "")
        new = str(after.get(column) or "") if after else None
        shown[column] = {"before": excerpt(old, new), "after": None if new is None else excerpt(new, old)}
    return shown


def excerpt(text: str, other: str | None, width: int = 400) -> str:
    """Return at most `width` characters of `text`, placed where it begins to differ from `other`."""
    # A cut at the end of a long answer would be invisible in an excerpt of its start
    pairs = enumerate(zip(text, other or text, strict=False))
    shared = next((place for place, (one, two) in pairs if one != two), min(len(text), len(other or text)))
    start = max(0, shared - width // 4) if text != other else 0
    return ("…" if start else "") + text[start : start + width] + ("…" if start + width < len(text) else "")
