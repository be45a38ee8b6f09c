"""Count what a rule dropped, changed and added, and show three examples."""

from dataclasses import dataclass, field
from os.path import commonprefix
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


@dataclass
class Tally:
    """A ledger line in the making: how many rows something happened to, with the first three as examples."""

    rule: str
    count: int = 0
    examples: list[dict[str, Any]] = field(default_factory=list)

    def note(self, row: int, shown: dict[str, tuple[Any, Any]]) -> None:
        """Count a row, of which an example shows columns before and after."""
        self.count += 1
        if len(self.examples) < 3:
            texts = {name: [None if one is None else str(one)[:400] for one in pair] for name, pair in shown.items()}
            self.examples.append(
                {"row": row} | {name: dict(zip(("before", "after"), pair, strict=True)) for name, pair in texts.items()}
            )

    def line(self, rows: int, dropped: int = 0, changed: int = 0, added: int = 0) -> LedgerLine:
        """Return the ledger's line for `rows` rows."""
        return LedgerLine(self.rule, rows, dropped, changed, added, rows - dropped + added, self.examples)


def row_key(row: Row) -> tuple[str, int, int]:
    """Return what names a row: its source, its index in it, and its part (the number of one of several made from a row)."""
    return row.get("source", ""), row["row"], row.get("part", 0)


class Comparison:
    """A ledger line in the making: rows are shown as they were and as a rule left them, and few are kept as examples."""

    def __init__(self, rule: str) -> None:
        self.rule = rule
        self.rows = self.dropped = self.changed = self.added = 0
        self.kept: dict[int, tuple[Row, Row | None]] = {}

    def note(self, before: Row, after: Row | None) -> None:
        """Count a row, and what it became; None if it was dropped."""
        self.rows += 1
        # Most rows are the same objects, and need no comparison
        if after is before or after == before:
            return
        self.dropped += after is None
        self.changed += after is not None
        number = self.dropped + self.changed
        # The last one moves; where the middle will be nobody knows yet, but a power of two is always near it
        if (number - 1) & (number - 2):
            self.kept.pop(number - 1, None)
        self.kept[number] = (before, after)

    def note_all(self, before: list[Row], after: list[Row]) -> None:
        """Count rows by "row" and "part", in whatever order a rule left them."""
        left = {row_key(row): row for row in after}
        for row in before:
            self.note(row, left.get(row_key(row)))
        self.added = len(after) - self.rows + self.dropped

    def line(self) -> LedgerLine:
        """Return the line; the first, a middle and the last row are its examples: neighbours often share their defect."""
        count = self.dropped + self.changed
        middle = min(self.kept, key=lambda number: abs(2 * number - count - 1), default=0)
        examples = [make_example(*self.kept[number]) for number in sorted({1, middle, count} if count else ())]
        left = self.rows - self.dropped + self.added
        return LedgerLine(self.rule, self.rows, self.dropped, self.changed, self.added, left, examples)


def make_example(before: Row, after: Row | None) -> dict[str, Any]:
    """Return {"row": index, column: {"before", "after"}} of question, answer and what else changed."""
    shown: dict[str, Any] = {"row": before["row"]}
    changed = [column for column, new in (after or {}).items() if new != before.get(column)]
    for column in dict.fromkeys(["prompt", "completion", *changed]):
        old, new = (str((row or {}).get(column) or "") for row in (before, after))
        shown[column] = {"before": excerpt(old, new), "after": excerpt(new, old) if after else None}
    return shown


def excerpt(text: str, other: str, width: int = 400) -> str:
    """Return at most `width` characters of `text`, placed where it begins to differ from `other`."""
    # A cut at the end of a long answer would be invisible in an excerpt of its start
    shared = commonprefix([text, other])  # noqa: RUF071
    start = max(0, len(shared) - width // 4) if text != other else 0
    return ("…" if start else "") + text[start : start + width] + ("…" if start + width < len(text) else "")
