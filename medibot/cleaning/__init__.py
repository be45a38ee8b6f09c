"""Clean rows by named, pure rules, and keep a ledger of what each of them did.

Rows come in, as dicts with the columns of their source, the question under "prompt", the answer under "completion" and
their 0-based index under "row". Fewer or changed rows go out, with one ledger line a rule. No rule looks outside of the
rows that it is given, and none drops or changes a row without being counted.

Use `Cleaning`, `rule_problem` and `describe_rules`; `data.clean` in a recipe names the rules in order.
"""

import difflib
import inspect
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from medibot.cleaning import medquad, own, rules
from medibot.cleaning.ledger import Comparison, LedgerLine, row_key
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


class Cleaning:
    """Rules that rows pass in order, one by one; when all have passed, `ledger` says what each rule did to them.

    A rule is a name in RULES or NAMED_LISTS, a function of an author's own ("file:function", in `folder`), or one of them
    with settings: {name: {keyword arguments}}.
    """

    def __init__(self, items: Iterable[RuleItem], folder: Path | None = None) -> None:
        self.folder, self.counts = folder or Path(), []
        self.items = list(expand(items))
        for item in self.items:
            if problem := rule_problem(item, folder):
                raise ValueError(problem)

    def __call__(self, rows: Iterable[Row]) -> Iterator[Row]:
        """Yield the rows that the rules leave. Raises RuleFailed for a rule of an author's own that fails."""
        for name, settings in map(split_item, self.items):
            count = Comparison(name)
            self.counts.append(count)
            rule = own.import_rule(name, self.folder) if ":" in name else RULES[name]
            rule, whole = partial(rule, **settings), takes_all(rule)
            if ":" in name:
                rows = own.apply_to_all(name, rule, rows, count) if whole else own.apply(name, rule, rows, count)
            else:
                rows = filter_all(rule, rows, count) if whole else filter_each(rule, rows, count)
        yield from rows

    def ledger(self) -> list[LedgerLine]:
        """Return one line a rule."""
        return [count.line() for count in self.counts]


def takes_all(rule: Callable[..., Any]) -> bool:
    """Tell whether a rule takes all rows at once."""
    return next(iter(inspect.signature(rule).parameters)) == "rows"


def filter_each(rule: Callable[[Row], Row | None], rows: Iterable[Row], count: Comparison) -> Iterator[Row]:
    """Yield what a rule makes of each row."""
    for row in rows:
        kept = rule(row)
        count.note(row, kept)
        if kept is not None:
            yield kept


def filter_all(rule: Callable[[Iterator[Row]], Iterator[Row]], rows: Iterable[Row], count: Comparison) -> Iterator[Row]:
    """Yield what a rule leaves of a stream of rows, whose order it keeps."""
    waiting: deque[Row] = deque()

    def watched() -> Iterator[Row]:
        for row in rows:
            waiting.append(row)
            yield row

    for kept in rule(watched()):
        while row_key(waiting[0]) != row_key(kept):
            count.note(waiting.popleft(), None)
        count.note(waiting.popleft(), kept)
        yield kept
    for row in waiting:
        count.note(row, None)


def split_item(item: RuleItem) -> tuple[str, dict[str, Any]]:
    """Return name and settings of an entry of `data.clean`."""
    name, settings = (item, {}) if isinstance(item, str) else next(iter(item.items()))
    return name, settings or {}


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
