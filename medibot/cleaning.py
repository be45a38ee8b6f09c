"""Named, pure rules over rows, and the ledger that says what each of them did.

A row is a dict with the columns of its source, the question under "prompt", the answer under "completion" and its
0-based index under "row". A recipe names the rules in order, under `data.clean`; what one of them drops or changes is
one line of the ledger.
"""

import difflib
import functools
import inspect
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from medibot import medquad
from medibot.medquad import Row, folded, revised

RuleItem = str | dict[str, dict[str, Any]]
TableRule = Callable[..., list[Row]]


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


def clean(
    rows: list[Row], rules: list[RuleItem], progress: Callable[[LedgerLine], None] | None = None
) -> tuple[list[Row], list[LedgerLine]]:
    """Apply `rules` in order and return the rows left with one ledger line a rule.

    A rule is a name in RULES, or {name: {keyword arguments}}. `progress` is called with each line as it is known.
    """
    ledger = []
    for item in rules:
        if problem := rule_problem(item):
            raise ValueError(problem)
        name, settings = (item, {}) if isinstance(item, str) else next(iter(item.items()))
        cleaned = RULES[name](rows, **(settings or {}))
        ledger.append(ledger_line(name, rows, cleaned))
        rows = cleaned
        if progress:
            progress(ledger[-1])
    return rows, ledger


def ledger_line(rule: str, before: list[Row], after: list[Row]) -> LedgerLine:
    """Compare the rows before and after a rule by "row" and "part" (the number of one of several made from a row)."""
    left = {row_key(row): row for row in after}
    remaining = {row["row"] for row in after}
    dropped = [row for row in before if row["row"] not in remaining]
    pairs = [(row, left[row_key(row)]) for row in before if row_key(row) in left]
    changed = [(old, new) for old, new in pairs if old is not new and old != new]
    affected = [*changed, *((row, None) for row in dropped)]
    # First, middle and last: the neighbours of a row often share its source and its defect.
    places = sorted({0, len(affected) // 2, len(affected) - 1}) if affected else []
    return LedgerLine(
        rule=rule,
        rows_in=len(before),
        dropped=len(dropped),
        changed=len(changed),
        added=len(after) - (len(before) - len(dropped)),
        rows_out=len(after),
        examples=[example(*affected[place]) for place in places],
    )


def row_key(row: Row) -> tuple[int, int]:
    """What names a row: its index in the source and its part."""
    return row["row"], row.get("part", 0)


def example(before: Row, after: Row | None) -> dict[str, Any]:
    """{"row": index, column: {"before", "after"}} of the question, the answer and what else changed."""
    shown: dict[str, Any] = {"row": before["row"]}
    others = [column for column, new in (after or {}).items() if column not in before or new != before[column]]
    for column in dict.fromkeys(["prompt", "completion", *others]):
        old = str(before.get(column) or "")
        new = str(after.get(column) or "") if after else None
        shown[column] = {"before": excerpt(old, new), "after": None if new is None else excerpt(new, old)}
    return shown


def excerpt(text: str, other: str | None, width: int = 400) -> str:
    """At most `width` characters of `text`, placed where it begins to differ from `other`."""
    # A cut at the end of a long answer would be invisible in an excerpt of its start.
    differ = [place for place, (one, two) in enumerate(zip(text, other or "", strict=False)) if one != two][:1]
    shared = differ[0] if differ else min(len(text), len(other or text))
    start = max(0, shared - width // 4) if text != other else 0
    return ("…" if start else "") + text[start : start + width] + ("…" if start + width < len(text) else "")


def rule_problem(item: Any) -> str | None:
    """What is wrong with an entry of `data.clean`, in one line, or None."""
    if isinstance(item, dict) and len(item) != 1:
        return f"a rule with settings has one key, as in {{drop_short: {{min_words: 5}}}}; here are {len(item)}"
    name, settings = next(iter(item.items())) if isinstance(item, dict) else (item, {})
    if not isinstance(name, str):
        return f"a rule is a name or {{name: {{setting: value}}}}, not {name!r}"
    if name not in RULES:
        near = difflib.get_close_matches(name, RULES, n=1)
        return f"no such rule: {name}" + (f" (did you mean {near[0]}?)" if near else f"; there are {', '.join(RULES)}")
    settings = {} if settings is None else settings
    if not isinstance(settings, dict):
        return f"{name}: settings are written {{setting: value}}, not {settings!r}"
    known = dict(list(inspect.signature(RULES[name]).parameters.items())[1:])
    problems = [setting_problem(key, value, known) for key, value in settings.items()]
    needed = [key for key, setting in known.items() if setting.default is setting.empty and key not in settings]
    problem = next(filter(None, [*problems, *(f"needs a value for {key}" for key in needed)]), None)
    return f"{name}: {problem}" if problem else None


def setting_problem(key: str, value: Any, known: dict[str, inspect.Parameter]) -> str | None:
    """What is wrong with one keyword argument of a rule, or None."""
    if key not in known:
        near = difflib.get_close_matches(str(key), known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(known) or 'none'}"
        return f"no such setting: {key} ({hint})"
    expected = known[key].annotation
    # `true` is an int to Python, but no author means a count by it; a whole number is a fine float.
    accepted = (int, float) if expected is float else expected
    if isinstance(value, bool) or not isinstance(value, accepted):
        return f"{key} must be {inspect.formatannotation(expected)}, not {value!r}"
    return None


def drop_unanswered(row: Row) -> Row | None:
    """Drop rows without an answer: missing, blank, or the word that some exports write for a missing value."""
    return None if (row["completion"] or "").strip().lower() in ("", "null", "none", "nan") else row


def drop_unasked(row: Row) -> Row | None:
    """Drop rows without a question."""
    return row if folded(row["prompt"] or "") else None


def normalise_whitespace(row: Row) -> Row:
    """One space between words, no space at the ends of lines, at most one blank line; the question on a single line."""
    answer = re.sub(r"[^\S\n]+", " ", (row["completion"] or "").replace("\r\n", "\n"))
    answer = re.sub(r"\n{3,}", "\n\n", re.sub(r" *\n *", "\n", answer)).strip()
    return revised(revised(row, "completion", answer), "prompt", " ".join((row["prompt"] or "").split()))


def drop_echoes(row: Row) -> Row | None:
    """Drop answers that only repeat the question, in its own words or as one other question."""
    answer = (row["completion"] or "").strip()
    echo = re.fullmatch(r"[^?.!]+\?", answer) or (answer and folded(answer) == folded(row["prompt"] or ""))
    return None if echo else row


def drop_short(row: Row, min_words: int = 5) -> Row | None:
    """Drop answers of fewer than `min_words` words."""
    return row if len((row["completion"] or "").split()) >= min_words else None


def drop_longer_than(row: Row, max_words: int) -> Row | None:
    """Drop answers of more than `max_words` words, which a short context would cut in the middle of a sentence."""
    return row if len((row["completion"] or "").split()) <= max_words else None


def drop_repetitive(row: Row, window: int = 8, share: float = 0.25) -> Row | None:
    """Drop answers of whose runs of `window` words a part of at least `share` stood there before."""
    words = folded(row["completion"] or "").split()
    windows = list(zip(*(words[start:] for start in range(window)), strict=False))
    repeats = len(windows) - len(set(windows))
    return None if repeats and repeats >= share * len(windows) else row


def drop_duplicates(rows: list[Row]) -> list[Row]:
    """Keep the first row of each pair of question and answer, compared by their words."""
    return first_copies(rows, lambda row: (folded(row["prompt"] or ""), folded(row["completion"] or "")), copies=1)


def drop_repeated_questions(rows: list[Row], per: str | None = None) -> list[Row]:
    """Keep the first row of each question; with `per`, of each question in each value of that column."""
    return first_copies(rows, lambda row: (folded(row["prompt"] or ""), row.get(per) if per else None), copies=1)


def limit_repeated_answers(rows: list[Row], copies: int = 3) -> list[Row]:
    """Keep the first `copies` rows of each answer, so that boilerplate is not learnt hundreds of times."""
    return first_copies(rows, lambda row: folded(row["completion"] or ""), copies)


def first_copies(rows: list[Row], identity: Callable[[Row], Any], copies: int) -> list[Row]:
    """The first `copies` rows of each identity, in their order."""
    seen: Counter[Any] = Counter()
    kept = []
    for row in rows:
        key = identity(row)
        seen[key] += 1
        kept += [row] if seen[key] <= copies else []
    return kept


def over_rows(rule: Callable[..., Row | None]) -> TableRule:
    """Lift a rule on one row to a rule on the whole list; None drops the row."""

    @functools.wraps(rule)
    def lifted(rows: list[Row], **settings: Any) -> list[Row]:
        return [kept for row in rows if (kept := rule(row, **settings)) is not None]

    return lifted


ROW_RULES = (
    drop_unanswered,
    drop_unasked,
    normalise_whitespace,
    drop_echoes,
    drop_short,
    drop_longer_than,
    drop_repetitive,
)
TABLE_RULES = (drop_duplicates, drop_repeated_questions, limit_repeated_answers)

RULES: dict[str, TableRule] = {
    **{rule.__name__: over_rows(rule) for rule in ROW_RULES},
    **{rule.__name__: rule for rule in TABLE_RULES},
    **{f"medquad.{rule.__name__}": over_rows(rule) for rule in medquad.ROW_RULES},
    **{f"medquad.{rule.__name__}": rule for rule in medquad.TABLE_RULES},
}
