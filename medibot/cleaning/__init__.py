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

from medibot.cleaning import medquad, own, rules
from medibot.cleaning.ledger import LedgerLine, compare_rows, row_key
from medibot.cleaning.own import RuleFailed
from medibot.cleaning.rules import Row

RuleItem = str | dict[str, dict[str, Any]]
# A function is a rule when its first parameter is `row` or `rows`
RULES: dict[str, Callable[..., Any]] = {
    prefix + name: found
    for prefix, module in (("", rules), ("medquad.", medquad))
    for name, found in vars(module).items()
    if inspect.isfunction(found) and next(iter(inspect.signature(found).parameters)) in own.FIRST
}
# One name for a list that several recipes share
NAMED_LISTS: dict[str, list[RuleItem]] = yaml.safe_load(Path(__file__).with_name("lists.yaml").read_bytes())


def expand(items: Iterable[RuleItem]) -> Iterator[RuleItem]:
    """Yield the rules with each name of a list replaced by what it stands for."""
    for item in items:
        yield from NAMED_LISTS.get(item, [item]) if isinstance(item, str) else [item]


def clean(rows: list[Row], items: Iterable[RuleItem], folder: Path | None = None) -> tuple[list[Row], list[LedgerLine]]:
    """Apply rules in order and return the rows left with one ledger line a rule.

    A rule is a name in RULES or NAMED_LISTS, a function of an author's own ("file:function", in `folder`), or one of them
    with settings: {name: {keyword arguments}}.
    """
    ledger = []
    for item in expand(items):
        if problem := rule_problem(item, folder):
            raise ValueError(problem)
        name, settings = split_item(item)
        cleaned = apply_rule(name, rows, folder, **settings)
        ledger.append(compare_rows(name, rows, cleaned))
        rows = cleaned
    return rows, ledger


def split_item(item: RuleItem) -> tuple[str, dict[str, Any]]:
    """Return name and settings of an entry of `data.clean`."""
    name, settings = (item, {}) if isinstance(item, str) else next(iter(item.items()))
    return name, settings or {}


def apply_rule(name: str, rows: list[Row], folder: Path | None = None, **settings: Any) -> list[Row]:
    """Return the rows that a rule leaves, whether it takes one row or all of them."""
    if ":" in name:
        return apply_own_rule(name, rows, folder or Path(), settings)
    rule = RULES[name]
    if next(iter(inspect.signature(rule).parameters)) == "rows":
        return rule(rows, **settings)
    return [kept for row in rows if (kept := rule(row, **settings)) is not None]


def apply_own_rule(name: str, rows: list[Row], folder: Path, settings: dict[str, Any]) -> list[Row]:
    """Return the rows that an author's own rule leaves; it works on copies, so that what it changes is counted."""
    rule, where = own.import_rule(name, folder), ""
    kept: Any = []
    try:
        if next(iter(inspect.signature(rule).parameters)) == "rows":
            kept = rule([dict(row) for row in rows], **settings)
        else:
            for row in rows:
                where = f" at row {row['row']}"
                kept += [left] if (left := rule(dict(row), **settings)) is not None else []
    except Exception as error:  # an author's code may raise anything
        raise RuleFailed(f"{name} failed{where}: {type(error).__name__}: {error}") from error
    for left in kept if isinstance(kept, list) else [kept]:
        texts = [left.get(column) for column in ("prompt", "completion")] if isinstance(left, dict) else [0]
        if not all(isinstance(text, str | None) for text in texts) or "row" not in left:
            raise RuleFailed(
                f"{name} must return a row with text as prompt and completion, or None; it gave {left!r:.200}"
            )
    # A row that is left as it was shall not count as changed
    before = {row_key(row): row for row in rows}
    return [before[row_key(left)] if before.get(row_key(left)) == left else left for left in kept]


def columns_read(items: Iterable[RuleItem], folder: Path | None = None) -> set[str]:
    """Return every text in the rules' code and settings that could be the name of a column that they read."""
    found: set[str] = set()
    for name, settings in map(split_item, expand(items)):
        rule: Any = own.import_rule(name, folder or Path()) if ":" in name else RULES[name]
        codes = [rule.__code__]
        for code in codes:
            codes += [part for part in code.co_consts if inspect.iscode(part)]
            found |= {part for part in code.co_consts if isinstance(part, str)}
        found |= {value for value in settings.values() if isinstance(value, str)}
    return found


def rule_problem(item: Any, folder: Path | None = None) -> str | None:
    """Return what is wrong with an entry of `data.clean`, in one line, or None.

    Without the recipe's `folder` a rule of an author's own passes.
    """
    if isinstance(item, dict) and len(item) != 1:
        return f"a rule with settings has one key, as in {{drop_short: {{min_words: 5}}}}; here are {len(item)}"
    name, settings = next(iter(item.items())) if isinstance(item, dict) else (item, {})
    if not isinstance(name, str):
        return f"a rule is a name or {{name: {{setting: value}}}}, not {name!r}"
    if name in NAMED_LISTS:
        return f"{name} stands for several rules and has no settings" if settings else None
    if ":" in name:
        return own.own_rule_problem(name, folder) if folder else None
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
