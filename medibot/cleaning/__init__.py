"""Clean rows by named, pure rules, and keep a ledger of what each of them did.

Rows come in, as dicts with the columns of their source, the question under "prompt", the answer under "completion" and
their 0-based index under "row". Fewer or changed rows go out, with one ledger line a rule. No rule looks outside of the
rows that it is given, and none drops or changes a row without being counted.

Use `clean`, `rule_problem` and `describe_rules`; `data.clean` in a recipe names the rules in order.
"""

import difflib
import inspect
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml

from medibot.cleaning import medquad, rules
from medibot.cleaning.ledger import LedgerLine, compare_rows
from medibot.cleaning.rules import Row

RuleItem = str | dict[str, dict[str, Any]]
# A function is a rule when its first parameter is `row` or `rows`
RULES: dict[str, Callable[..., Any]] = {
    prefix + name: found
    for prefix, module in (("", rules), ("medquad.", medquad))
    for name, found in vars(module).items()
    if inspect.isfunction(found) and next(iter(inspect.signature(found).parameters)) in ("row", "rows")
}
# One name for a list that several recipes share
NAMED_LISTS: dict[str, list[RuleItem]] = yaml.safe_load(Path(__file__).with_name("lists.yaml").read_bytes())


def expand(items: Iterable[RuleItem]) -> Iterator[RuleItem]:
    """Yield the rules with each name of a list replaced by what it stands for."""
    for item in items:
        yield from NAMED_LISTS.get(item, [item]) if isinstance(item, str) else [item]


def clean(rows: list[Row], items: Iterable[RuleItem]) -> tuple[list[Row], list[LedgerLine]]:
    """Apply rules in order and return the rows left with one ledger line a rule.

    A rule is a name in RULES or NAMED_LISTS, or {name: {keyword arguments}}.
    """
    ledger = []
    for item in expand(items):
        if problem := rule_problem(item):
            raise ValueError(problem)
        name, settings = (item, {}) if isinstance(item, str) else next(iter(item.items()))
        cleaned = apply_rule(name, rows, **(settings or {}))
        ledger.append(compare_rows(name, rows, cleaned))
        rows = cleaned
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
    signature, settings = inspect.signature(RULES[name]), settings or {}
    known = dict(list(signature.parameters.items())[1:])
    try:
        signature.bind(None, **settings)
    except TypeError as error:
        has = ", ".join(map(str, known.values())) or "no settings"
        near = [close for key in settings if key not in known for close in difflib.get_close_matches(str(key), known)]
        return f"{name}: {error} ({f'did you mean {near[0]}? ' if near else ''}it has {has})"
    for key, value in settings.items():
        wanted = known[key].annotation
        # `true` is an int to Python, but no author means a count by it; a whole number is a fine float
        if isinstance(value, bool) or not isinstance(value, (int, float) if wanted is float else wanted):
            return f"{name}: {key} must be {inspect.formatannotation(wanted)}, not {value!r}"
    return None


def describe_rules(name: str | None = None) -> list[tuple[str, str]]:
    """Return (rule, what it does) of every rule, or of those that `name` stands for."""
    purposes = {one: (inspect.getdoc(rule) or "").splitlines()[0] for one, rule in RULES.items()}
    purposes |= dict.fromkeys(NAMED_LISTS, "a list")
    items = expand([name]) if name else purposes
    names = [item if isinstance(item, str) else next(iter(item)) for item in items]
    return [(one, purposes.get(one) or rule_problem(one) or "") for one in names]
