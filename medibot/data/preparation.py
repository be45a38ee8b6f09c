"""Read a recipe's sources, clean their rows and split them, with a ledger line for each step."""

import itertools
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, interleave_datasets
from rich.progress import track
from transformers import PreTrainedTokenizerBase

from medibot.cleaning import Cleaning, columns_read, expand, own, split_item
from medibot.cleaning.ledger import Comparison, LedgerLine, Tally
from medibot.cleaning.own import RuleFailed
from medibot.cleaning.rules import Row
from medibot.data import splitting
from medibot.data.columns import kept_name
from medibot.data.conversations import Fitting
from medibot.data.rows import Places, Rows
from medibot.data.sources import Source
from medibot.data.turns import Turns
from medibot.errors import one_line
from medibot.model.tokenizer import escape_markers, role_markers, writes_thinking
from medibot.recipe import Recipe

# Where a row stands: with those that MediBot splits, or in a split that its author holds out
POOLS = (None, "validation", "test")


@dataclass(frozen=True)
class Chosen:
    """The cleaned rows on disk, the places of each split's, every row's group, and the record of how they came about."""

    rows: Rows
    splits: splitting.Splits
    groups: np.ndarray
    record: dict[str, Any]


def prepare_rows(
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    sources: list[Source],
    folder: Path,
    progress: Callable[[str], None],
) -> Chosen:
    """Clean and split the rows, which stay on disk in `folder`; the record's keys are ledger, leaks and split."""
    data, ledger = recipe.data, []
    rows = Rows(folder, group_columns(recipe, sources), data.seed)
    for number in range(len(POOLS)):
        ledger += add_pool(recipe, tokenizer, sources, rows, number, progress)
    rows.close()
    for written, column in zip(data.group_by, group_columns(recipe, sources), strict=True):
        if column not in rows.names:
            remedy = f"it has {', '.join(sorted(rows.names.keys() - {'tokens'}))}"
            raise recipe.error("data.group_by", f"{data.described} has no column {written!r}", remedy)
    progress(f"preparing {data.described}: {len(rows):,} conversations, splitting")
    splits, groups, lines, leaks = split_pools(recipe, rows)
    if any(source.weight for source in data.sources):
        splits["train"], line = weigh_sources(recipe, rows, splits["train"])
        lines.append(line)
    chosen_rows, limits = limit_rows(recipe, rows, splits)
    sizes = {name: len(places) for name, places in chosen_rows.items()}
    record = {
        "ledger": [asdict(line) for line in [*ledger, *lines, *limits]],
        "leaks": leaks,
        "split": {"fingerprint": splitting.split_fingerprint(rows, splits), "rows": sizes},
    }
    return Chosen(rows, chosen_rows, groups, record)


def add_pool(
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    sources: list[Source],
    rows: Rows,
    number: int,
    progress: Callable[[str], None],
) -> list[LedgerLine]:
    """Clean the rows of the sources in a pool, add them to `rows`, and return the ledger's lines."""
    data, held_out = recipe.data, POOLS[number]
    reading = [Reading(recipe, tokenizer, source, sources) for source in sources if source.held_out == held_out]
    if not reading:
        return []
    progress(f"preparing {data.described}: reading and cleaning {f'{held_out} ' if held_out else ''}rows")
    cleaning, escape, fit = (
        Cleaning(data.clean, recipe.path.parent),
        Escape(recipe, tokenizer),
        Fitting(recipe, tokenizer),
    )
    watched = track(itertools.chain(*reading), "rows", transient=True, disable=not sys.stdout.isatty())
    start = len(rows)
    try:
        for row in fit(escape(cleaning(watched))):
            rows.add(row, number)
            if len(rows) % 100_000 == 0:
                progress(f"preparing {data.described}: {len(rows):,} conversations")
    except RuleFailed as error:
        raise recipe.error("data.clean", one_line(error), "mend the rule") from error
    ledger = cleaning.ledger()
    escape.refuse_missing(ledger)
    fit.refuse()
    ledger += [escape.count.line(), fit.count.line(), *repeated(rows, np.arange(start, len(rows)))]
    ledger = [replace(line, rule=f"{held_out}: {line.rule}") if held_out else line for line in ledger]
    return [*itertools.chain(*(one.ledger() for one in reading)), *ledger]


def repeated(rows: Rows, places: Places) -> list[LedgerLine]:
    """Return a line that says how often a conversation's tokens are read, where one is several rows."""
    if "part" not in rows.names:
        return []
    places = rows.sort(places)
    tokens, numbers = np.frombuffer(rows.tokens, np.int64)[places], rows.numbers[places, :2]
    # The last turn of a conversation holds all of it
    last = np.append((numbers[1:] != numbers[:-1]).any(axis=1), True)
    return [
        Tally(f"{tokens.sum() / tokens[last].sum():.1f} times the tokens of conversations read once").line(len(places))
    ]


class Reading:
    """The turns of one of the sources, cleaned by its own rules; where there are others each row has its source's name."""

    def __init__(
        self, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, source: Source, sources: list[Source]
    ) -> None:
        self.recipe, self.source, self.several = recipe, source, len(sources) > 1
        self.opened = {file for one in sources for file in one.files}
        self.turns = Turns(recipe, source, writes_thinking(tokenizer, recipe.data.chat_template_kwargs))
        self.cleaning = Cleaning(source.section.clean, recipe.path.parent)

    def __iter__(self) -> Iterator[Row]:
        rows = ({"source": self.source.name} | row for row in self.turns) if self.several else self.turns
        try:
            yield from self.cleaning(rows)
        except RuleFailed as error:
            raise self.recipe.error(f"{self.source.key}.clean", one_line(error), "mend the rule") from error

    def ledger(self) -> list[LedgerLine]:
        """Return the ledger's lines, when all rows are read."""
        recipe, source = self.recipe, self.source
        rules, asked = [*source.section.clean, *recipe.data.clean], recipe.evaluation
        read = {kept_name(name) for name in (*recipe.data.group_by, *asked.by, *asked.evidence.values())}
        read |= columns_read(rules, recipe.path.parent)
        beside = [Path(file).name for file in source.beside if file not in self.opened]
        lines = [Tally(f"not read: file {name!r}").line(self.turns.turns) for name in beside]
        lines += [
            replace(line, rule=f"{source.name}: {line.rule}") if self.several else line
            for line in [*self.turns.ledger(read), *self.cleaning.ledger()]
        ]
        return lines


class Escape:
    """Rows whose text forges no turn of the model's template; what the recipe itself says is its author's own.

    Rows without a prompt or a completion do not pass: there must be none.
    """

    def __init__(self, recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> None:
        self.recipe, self.markers, self.count = recipe, role_markers(tokenizer), Comparison("role markers made text")
        self.authored = {section.system for section in (recipe.data, *recipe.data.sources)}
        self.missing, self.rows = {"prompt": 0, "completion": 0}, 0

    def __call__(self, rows: Iterator[Row]) -> Iterator[Row]:
        """Yield the rows."""
        for row in rows:
            self.rows += 1
            missing = [column for column in self.missing if not (row[column] or "").strip()]
            for column in missing:
                self.missing[column] += 1
            if not missing:
                plain = self.escape(row)
                self.count.note(row, plain)
                yield plain

    def escape(self, row: Row) -> Row:
        """Return the row, or a copy whose texts are escaped."""
        texts = {key: row[key] for key in ("prompt", "completion", "thinking", "system") if key in row}
        if texts.get("system") in self.authored:
            texts.pop("system", None)
        changed: Row = {key: escape_markers(text, self.markers) for key, text in texts.items()}
        if "history" in row:
            changed["history"] = [m | {"content": escape_markers(m["content"], self.markers)} for m in row["history"]]
        return row | changed if any(row[key] != text for key, text in changed.items()) else row

    def refuse_missing(self, ledger: list[LedgerLine]) -> None:
        """Raise RecipeError where the rules, of which `ledger` tells, left no row, or one without prompt or completion."""
        if not self.rows:
            last = next((line.rule for line in reversed(ledger) if line.dropped), "the rules")
            raise self.recipe.error(
                "data.clean", f"no row is left after {last}", "see the ledger with: medibot inspect"
            )
        for column, rule in (("prompt", "drop_unasked"), ("completion", "drop_unanswered")):
            if empty := self.missing[column]:
                what = f"{empty:,} of {self.rows:,} rows have no {column}"
                raise self.recipe.error("data.clean", what, f"add the rule {rule}")


def split_pools(recipe: Recipe, rows: Rows) -> tuple[splitting.Splits, np.ndarray, list[LedgerLine], dict[str, Any]]:
    """Return the splits, each row's group, ledger lines for what leaked, and the leak report."""
    data = recipe.data
    pool = np.frombuffer(rows.pools, np.int8)
    places = {name: np.flatnonzero(pool == number) for number, name in enumerate(POOLS)}
    groups = np.zeros(len(rows), "S32")
    for found in places.values():
        groups[found] = splitting.group_rows(rows, found)
    own = {name: places[name] for name in ("validation", "test") if len(places[name])}
    shares = [0.0 if name in own else vars(data)[name] for name in ("validation", "test")]
    share = min(sum(shares) + sum(map(len, own.values())) / len(rows), 1.0)
    splits = splitting.split_rows(rows, places[None], groups, *shares, data.seed)
    lines = []
    for name, found in own.items():
        splits, line = splitting.hold_out(rows, splits, name, found)
        lines.append(line)
    splits, leaking = splitting.drop_leaks(rows, splits)
    leaks: dict[str, Any] = splitting.leak_report(rows, splits)
    leaks["random_split"] = splitting.random_split_leaks(rows, np.arange(len(rows)), share, data.seed)
    return splits, groups, [*lines, *leaking], leaks


def group_columns(recipe: Recipe, sources: list[Source]) -> list[str]:
    """Return the columns of `data.group_by` as prepared rows name them."""
    mapped = {source.section.prompt: "prompt" for source in sources}
    mapped |= {source.section.completion: "completion" for source in sources}
    return [mapped.get(column) or kept_name(column) for column in recipe.data.group_by]


def own_rule_files(recipe: Recipe) -> list[Path]:
    """Return the Python files beside the recipe whose functions it names as rules: they decide what is learned, too."""
    names = [split_item(item)[0] for _, rules in recipe.rules() for item in expand(rules)]
    return sorted({own.rule_file(name, recipe.path.parent) for name in names if ":" in name})


def weigh_sources(recipe: Recipe, rows: Rows, train: Places) -> tuple[Places, LedgerLine]:
    """Return training rows drawn from each source by its weight until the first source has none left.

    No row is drawn twice; which rows of a source are drawn is decided as by `limit`.
    """
    weights = [source.weight or 0.0 for source in recipe.data.sources]
    ordered = by_order(rows, train)
    # Sources were read in the order of the recipe
    source = rows.numbers[ordered, 0]
    parts = [Dataset.from_dict({"place": ordered[source == number]}) for number in range(len(weights))]
    shares = [weight / sum(weights) for weight in weights]
    drawn = interleave_datasets(parts, probabilities=shares, seed=recipe.data.seed, stopping_strategy="first_exhausted")
    left = rows.sort(np.array(drawn["place"], dtype=np.int64))
    return left, rows.dropped("weights of sources", train, left)


def by_order(rows: Rows, places: Places) -> Places:
    """Return places in the order in which those who take only some rows take them: a larger number only adds rows."""
    return places[np.argsort(np.frombuffer(rows.orders, np.uint64)[places], kind="stable")]


def limit_rows(recipe: Recipe, rows: Rows, splits: splitting.Splits) -> tuple[splitting.Splits, list[LedgerLine]]:
    """Return `data.limit` rows of a split, and a ledger line for each limit; refuse a split that is left empty."""
    data, chosen, lines = recipe.data, dict(splits), []
    limits = data.limit if isinstance(data.limit, dict) else {"train": data.limit} if data.limit else {}
    for name, most in limits.items():
        chosen[name] = rows.sort(by_order(rows, splits[name])[:most])
        lines.append(rows.dropped(f"limit {name} to {most:,}", splits[name], chosen[name]))
    for name, wanted in (("train", 1.0), ("validation", data.validation), ("test", data.test)):
        if wanted and not len(chosen[name]):
            what = f"the {name} split is empty ({sum(map(len, chosen.values())):,} rows in all)"
            key = "data.validation" if name == "train" else f"data.{name}"
            raise recipe.error(key, what, "change the share or add rows")
    return chosen, lines
