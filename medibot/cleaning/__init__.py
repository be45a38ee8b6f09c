"""Named, pure rules over rows, and the ledger that says what each of them did.

A row is a dict with the columns of its source, the question under "prompt", the answer under "completion" and its
0-based index under "row". A recipe names the rules in order, under `data.clean`; what one of them drops or changes is
one line of the ledger.
"""

import difflib
import inspect
from collections.abc import Callable
from typing import Any

from medibot.cleaning.ledger import LedgerLine, ledger_line
from medibot.cleaning.medquad import ROW_RULES as MEDQUAD_ROW_RULES
from medibot.cleaning.medquad import TABLE_RULES as MEDQUAD_TABLE_RULES
from medibot.cleaning.rules import ROW_RULES, TABLE_RULES, Row, TableRule, over_rows

RuleItem = str | dict[str, dict[str, Any]]


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


RULES: dict[str, TableRule] = {
    **{rule.__name__: over_rows(rule) for rule in ROW_RULES},
    **{rule.__name__: rule for rule in TABLE_RULES},
    **{f"medquad.{rule.__name__}": over_rows(rule) for rule in MEDQUAD_ROW_RULES},
    **{f"medquad.{rule.__name__}": rule for rule in MEDQUAD_TABLE_RULES},
}
