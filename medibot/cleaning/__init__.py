"""Clean rows by named, pure rules, and keep a ledger of what each of them did.

Rows come in, as dicts with the columns of their source, the question under "prompt", the answer under "completion" and
their 0-based index under "row". Fewer or changed rows go out, with one ledger line a rule. No rule looks outside of the
rows that it is given, and none drops or changes a row without being counted.

Use `clean`, `rule_problem` and `describe_rules`; `data.clean` in a recipe names the rules in order.
"""

import difflib
import inspect
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml

from medibot.cleaning import medquad, rules
from medibot.cleaning.ledger import LedgerLine, compare_rows
from medibot.cleaning.rules import Row

RuleItem = str | dict[str, dict[str, Any]]


def rules_of(module: ModuleType) -> dict[str, Callable[..., Any]]:
    """Return the module's own functions that are a rule: whose first parameter is `row` or `rows`."""
    own = [
        found for found in vars(module).values() if inspect.isfunction(found) and found.__module__ == module.__name__
    ]
    return {rule.__name__: rule for rule in own if next(iter(inspect.signature(rule).parameters)) in ("row", "rows")}


RULES = {**rules_of(rules), **{f"medquad.{name}": rule for name, rule in rules_of(medquad).items()}}
# One name for a list that several recipes share
NAMED_LISTS: dict[str, list[RuleItem]] = yaml.safe_load(
    Path(__file__).with_name("lists.yaml").read_text(encoding="utf-8")
)


def expand(items: list[RuleItem]) -> list[RuleItem]:
    """Return the rules with each name of a list replaced by what it stands for."""
    return [rule for item in items for rule in (NAMED_LISTS.get(item, [item]) if isinstance(item, str) else [item])]


def clean(
    rows: list[Row], items: list[RuleItem], progress: Callable[[LedgerLine], None] | None = None
) -> tuple[list[Row], list[LedgerLine]]:
    """Apply rules in order and return the rows left with one ledger line a rule.

    A rule is a name in RULES or NAMED_LISTS, or {name: {keyword arguments}}. `progress` is called with each line.
    """
    ledger = []
    for item in expand(items):
        if problem := rule_problem(item):
            raise ValueError(problem)
        name, settings = (item, {}) if isinstance(item, str) else next(iter(item.items()))
        cleaned = apply_rule(name, rows, **(settings or {}))
        ledger.append(compare_rows(name, rows, cleaned))
        rows = cleaned
        if progress:
            progress(ledger[-1])
    return rows, ledger


def apply_rule(name: str, rows: list[Row], **settings: Any) -> list[Row]:
    """Return the rows that a rule leaves, whether it takes one row or all of them."""
    rule = RULES[name]
    if next(iter(inspect.signature(rule).parameters)) == "rows":
        return rule(rows, **settings)
    return [kept for row in rows if (kept := rule(row, **settings)) is not None]


def rule_problem(item: Any) -> str | None:
    """Return what is wrong with an entry of `data.clean`, in one line, or None."""
    if isinstance(item, dict) and len(item) != 1:
        return f"a rule with settings has one key, as in {{drop_short: {{min_words: 5}}}}; here are {len(item)}"
    name, settings = next(iter(item.items())) if isinstance(item, dict) else (item, {})
    if not isinstance(name, str):
        return f"a rule is a name or {{name: {{setting: value}}}}, not {name!r}"
    if name in NAMED_LISTS:
        return f"{name} stands for several rules and has no settings" if settings else None
    if name not in RULES:
        known = [*NAMED_LISTS, *RULES]
        near = difflib.get_close_matches(name, known, n=1)
        return f"no such rule: {name}" + (f" (did you mean {near[0]}?)" if near else f"; there are {', '.join(known)}")
    if not isinstance(settings, dict | None):
        return f"{name}: settings are written {{setting: value}}, not {settings!r}"
    signature = inspect.signature(RULES[name])
    try:
        given = signature.bind(None, **(settings or {})).arguments
    except TypeError as error:
        has = ", ".join(map(str, list(signature.parameters.values())[1:]))
        unknown = [str(key) for key in settings or {} if key not in signature.parameters]
        near = difflib.get_close_matches(unknown[0], list(signature.parameters)[1:], n=1) if unknown else []
        hint = f"did you mean {near[0]}? " if near else ""
        return f"{name}: {error} ({hint}it has {has or 'no settings'})"
    for key, value in list(given.items())[1:]:
        wanted = signature.parameters[key].annotation
        # `true` is an int to Python, but no author means a count by it; a whole number is a fine float
        if isinstance(value, bool) or not isinstance(value, (int, float) if wanted is float else wanted):
            return f"{name}: {key} must be {inspect.formatannotation(wanted)}, not {value!r}"
    return None


def describe_rules(name: str | None = None) -> list[tuple[str, str]]:
    """Return (rule, what it does) of every rule, or of those that `name` stands for."""
    if name and name not in {*NAMED_LISTS, *RULES}:
        return [(name, rule_problem(name) or "")]
    items = expand([name]) if name else list(RULES)
    names = [item if isinstance(item, str) else next(iter(item)) for item in items]
    described = [(one, (inspect.getdoc(RULES[one]) or "").splitlines()[0]) for one in names]
    return described + ([] if name else [(one, "a list") for one in NAMED_LISTS])
