"""Read a recipe's sources, clean their rows and split them, with a ledger line for each step."""

import itertools
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from datasets import Dataset, interleave_datasets
from rich.progress import track
from transformers import PreTrainedTokenizerBase

from medibot.cleaning import clean, columns_read, expand, own, split_item
from medibot.cleaning.ledger import LedgerLine, Tally, compare_rows, row_key
from medibot.cleaning.own import RuleFailed
from medibot.cleaning.rules import Row
from medibot.data import splitting
from medibot.data.columns import kept_name
from medibot.data.conversations import fit_length
from medibot.data.sources import Source
from medibot.data.turns import Turns
from medibot.errors import one_line
from medibot.model.tokenizer import escape_markers, role_markers, writes_thinking
from medibot.recipe import Recipe
from medibot.recipe.sections import MixedSection


def prepare_rows(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, sources: list[Source], progress: Callable[[str], None]
) -> tuple[splitting.Splits, dict[str, Any]]:
    """Clean and split the rows; return the splits, and (ledger, leaks, split), the record of how they came about."""
    data, group_by, ledger = recipe.data, group_columns(recipe, sources), []
    # What an author holds out stays apart from the first row on
    pools: dict[str | None, list[Row]] = {None: []}
    opened = {file for source in sources for file in source.files}
    for source in sources:
        rows, lines = read_source(recipe, tokenizer, source, len(sources) > 1, progress)
        pools.setdefault(source.held_out, []).extend(rows)
        left = [
            Tally(f"not read: file {Path(file).name!r}").line(len(rows)) for file in source.beside if file not in opened
        ]
        ledger += [*left, *lines]
    columns = {column for rows in pools.values() for row in rows for column in row}
    for written, column in zip(data.group_by, group_by, strict=True):
        if column not in columns:
            remedy = f"it has {', '.join(sorted(columns))}"
            raise recipe.error("data.group_by", f"{data.described} has no column {written!r}", remedy)
    for held_out, rows in pools.items():
        pools[held_out], lines = clean_pool(recipe, tokenizer, rows, progress)
        ledger += [replace(line, rule=f"{held_out}: {line.rule}") if held_out else line for line in lines]
    shares = [0.0 if name in pools else vars(data)[name] for name in ("validation", "test")]
    every = list(itertools.chain(*pools.values()))
    share = sum(shares) + sum(len(rows) for name, rows in pools.items() if name) / len(every)
    random_split = splitting.random_split_leaks(every, group_by, min(share, 1.0), data.seed)
    del every
    splits = splitting.split_rows(pools[None], group_by, *shares, data.seed)
    for name in ("validation", "test"):
        if name in pools:
            splits, line = splitting.hold_out(splits, name, pools[name], group_by)
            ledger.append(line)
    pools.clear()
    splits, leaking = splitting.drop_leaks(splits)
    leaks = splitting.leak_report(splits, group_by) | {"random_split": random_split}
    if any(source.weight for source in data.sources):
        names = [source.name for source in sources if source.held_out is None]
        splits["train"], line = weigh_sources(recipe, dict(zip(names, data.sources, strict=True)), splits["train"])
        leaking.append(line)
    chosen, limits = limit_rows(recipe, splits)
    sizes = {name: len(rows) for name, rows in chosen.items()}
    return chosen, {
        "ledger": [asdict(line) for line in [*ledger, *leaking, *limits]],
        "leaks": leaks,
        "split": {"fingerprint": splitting.split_fingerprint(splits), "rows": sizes},
    }


def read_source(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, source: Source, several: bool, progress: Callable[[str], None]
) -> tuple[list[Row], list[LedgerLine]]:
    """Return a source's turns, cleaned by its own rules, and the ledger's lines for it; of `several` each row has a name."""
    progress(f"preparing {source.section.path}: reading rows")
    turns = Turns(recipe, source, writes_thinking(tokenizer, recipe.data.chat_template_kwargs))
    rows = [{"source": source.name} | row for row in turns] if several else list(turns)
    rules, asked = [*source.section.clean, *recipe.data.clean], recipe.evaluation
    read = {kept_name(name) for name in (*recipe.data.group_by, *asked.by, *asked.evidence.values())}
    try:
        rows, lines = clean(rows, source.section.clean, recipe.path.parent)
        lines = [*turns.ledger(read | columns_read(rules, recipe.path.parent)), *lines]
    except RuleFailed as error:
        raise recipe.error(f"{source.key}.clean", one_line(error), "mend the rule") from error
    return rows, [replace(line, rule=f"{source.name}: {line.rule}") for line in lines] if several else lines


def clean_pool(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, rows: list[Row], progress: Callable[[str], None]
) -> tuple[list[Row], list[LedgerLine]]:
    """Return the rows that the rules of section data leave and that are short enough, and a ledger line for each step."""
    data, rules = recipe.data, list(expand(recipe.data.clean))
    progress(f"preparing {data.described}: {len(rows):,} rows, {len(rules)} rules")
    try:
        watched = track(rules, "cleaning", transient=True, disable=not sys.stdout.isatty())
        rows, ledger = clean(rows, watched, recipe.path.parent)
    except RuleFailed as error:
        raise recipe.error("data.clean", one_line(error), "mend the rule") from error
    if not rows:
        last = next((line.rule for line in reversed(ledger) if line.dropped), "the rules")
        raise recipe.error("data.clean", f"no row is left after {last}", "see the ledger with: medibot inspect")
    for column, rule in (("prompt", "drop_unasked"), ("completion", "drop_unanswered")):
        if empty := sum(not (row[column] or "").strip() for row in rows):
            what = f"{empty:,} of {len(rows):,} rows have no {column}"
            raise recipe.error("data.clean", what, f"add the rule {rule}")
    # Text must not forge a turn of this model's template; what the recipe itself says is its author's own
    markers, plain, authored = role_markers(tokenizer), [], {section.system for section in (data, *data.sources)}
    for row in rows:
        texts = {key: row[key] for key in ("prompt", "completion", "thinking", "system") if key in row}
        if texts.get("system") in authored:
            texts.pop("system", None)
        changed: Row = {key: escape_markers(text, markers) for key, text in texts.items()}
        if "history" in row:
            changed["history"] = [m | {"content": escape_markers(m["content"], markers)} for m in row["history"]]
        plain.append(row | changed if any(row[key] != text for key, text in changed.items()) else row)
    escaped = compare_rows("role markers made text", rows, plain)
    progress(f"preparing {data.described}: {len(plain):,} conversations, counting tokens")
    rows, fitted = fit_length(recipe, tokenizer, plain)
    ledger += [escaped, fitted]
    if any("part" in row for row in rows):
        # The last turn of a conversation holds all of it
        whole = {row_key(row)[:2]: row["tokens"] for row in rows}
        spent = sum(row["tokens"] for row in rows) / sum(whole.values())
        ledger.append(Tally(f"{spent:.1f} times the tokens of conversations read once").line(len(rows)))
    return rows, ledger


def group_columns(recipe: Recipe, sources: list[Source]) -> list[str]:
    """Return the columns of `data.group_by` as prepared rows name them."""
    mapped = {source.section.prompt: "prompt" for source in sources}
    mapped |= {source.section.completion: "completion" for source in sources}
    return [mapped.get(column) or kept_name(column) for column in recipe.data.group_by]


def own_rule_files(recipe: Recipe) -> list[Path]:
    """Return the Python files beside the recipe whose functions it names as rules: they decide what is learned, too."""
    names = [split_item(item)[0] for _, rules in recipe.rules() for item in expand(rules)]
    return sorted({own.rule_file(name, recipe.path.parent) for name in names if ":" in name})


def weigh_sources(recipe: Recipe, sources: dict[str, MixedSection], rows: list[Row]) -> tuple[list[Row], LedgerLine]:
    """Return training rows drawn from each source by its weight until the first source has none left.

    No row is drawn twice; which rows of a source are drawn is decided as by `limit`.
    """
    weights = [source.weight or 0.0 for source in sources.values()]
    places: dict[str, list[int]] = {name: [] for name in sources}
    for place in sorted(range(len(rows)), key=lambda place: row_order(recipe, rows[place])):
        places[rows[place]["source"]].append(place)
    parts = [Dataset.from_dict({"place": found}) for found in places.values()]
    shares = [weight / sum(weights) for weight in weights]
    drawn = interleave_datasets(parts, probabilities=shares, seed=recipe.data.seed, stopping_strategy="first_exhausted")
    left = [rows[place] for place in sorted(drawn["place"])]
    return left, compare_rows("weights of sources", rows, left)


def row_order(recipe: Recipe, row: Row) -> str:
    """Return a hash that orders rows for those who take only some of them: a larger number only adds rows."""
    return splitting.sha256(f"{recipe.data.seed}:{row['prompt']}:{row['row']}")


def limit_rows(recipe: Recipe, splits: splitting.Splits) -> tuple[splitting.Splits, list[LedgerLine]]:
    """Return `data.limit` rows of a split, and a ledger line for each limit; refuse a split that is left empty.

    Those with the smallest hash stay, so that a larger limit only adds rows.
    """
    data, chosen, lines = recipe.data, dict(splits), []
    limits = data.limit if isinstance(data.limit, dict) else {"train": data.limit} if data.limit else {}
    for name, most in limits.items():
        ordered = sorted(splits[name], key=lambda row: row_order(recipe, row))
        chosen[name] = sorted(ordered[:most], key=row_key)
        lines.append(compare_rows(f"limit {name} to {most:,}", splits[name], chosen[name]))
    for name, wanted in (("train", 1.0), ("validation", data.validation), ("test", data.test)):
        if wanted and not chosen[name]:
            what = f"the {name} split is empty ({sum(map(len, chosen.values())):,} rows in all)"
            key = "data.validation" if name == "train" else f"data.{name}"
            raise recipe.error(key, what, "change the share or add rows")
    return chosen, lines
