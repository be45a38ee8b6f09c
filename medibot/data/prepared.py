"""Prepare a recipe's conversations once, and keep them under a fingerprint of all that decided them."""

import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset, disable_progress_bars
from filelock import FileLock
from rich.progress import track
from transformers import GenerationConfig, PreTrainedTokenizerBase

from medibot.cleaning import clean, expand
from medibot.cleaning.ledger import LedgerLine, compare_rows, row_key
from medibot.cleaning.rules import Row
from medibot.data import splitting
from medibot.data.conversations import fit_length, map_columns, render
from medibot.data.sources import open_source
from medibot.model.generation import load_generation_config
from medibot.model.loading import silence_upstream
from medibot.model.precision import Precision, choose_precision
from medibot.model.tokenizer import escape_markers, load_tokenizer, role_markers, tokenizer_fingerprint
from medibot.recipe import Recipe

# The version of what cleaning, splitting and rendering do. Raise it by hand when prepared rows change: it makes cached
# sets and unfinished runs foreign, which a mere edit of our source must not. A test with golden rows says when.
PREPARED = 1


@dataclass(frozen=True)
class Prepared:
    """Everything that a training starts from, before a weight is loaded.

    The conversations are read from `folder`. Columns of each split: `row` (index in the source), `group`, `tokens` (of
    the whole chat), `prompt` and `completion` (lists of chat messages), and every other column of the source.
    """

    recipe: Recipe
    tokenizer: PreTrainedTokenizerBase = field(compare=False)
    generation: GenerationConfig = field(compare=False)
    precision: Precision
    folder: Path
    fingerprint: str
    ledger: list[dict[str, Any]]
    leaks: dict[str, Any]
    split: dict[str, Any]

    def load(self, split: str) -> Dataset | None:
        """Return the rows of train, validation or test (for evaluation alone); None where the recipe gives it none."""
        return Dataset.load_from_disk(str(self.folder / split)) if self.split["rows"][split] else None


def prepare(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase | None = None, progress: Callable[[str], None] = print
) -> Prepared:
    """Return the recipe's conversations, made once per content fingerprint and then read by every process.

    `tokenizer` stands in the place of the model's own, `progress` is told what takes time. Raises RecipeError where the
    data cannot be what the recipe says. Loads no weights.
    """
    silence_upstream()
    disable_progress_bars()
    tokenizer = tokenizer or load_tokenizer(recipe)
    generation = load_generation_config(recipe, tokenizer)
    source_hash, rows = open_source(recipe)
    # What a card says about the rows changes none of them
    said = {"license", "attribution", "language"}
    section = {key: value for key, value in recipe.as_dict()["data"].items() if key not in said}
    length = recipe.training.get("max_length", 1024)
    decisive = [PREPARED, source_hash, section, tokenizer_fingerprint(tokenizer), length]
    fingerprint = splitting.sha256(json.dumps(decisive, sort_keys=True))
    folder = cache_folder() / fingerprint[:16]
    folder.parent.mkdir(parents=True, exist_ok=True)
    # A file lock, not a process-group barrier: it also holds between two trainings, and long cleaning cannot time out
    with FileLock(folder.with_suffix(".lock")):
        if not (folder / "prepared.json").is_file():
            progress(f"preparing {recipe.data.path}: reading rows")
            splits, record = prepare_rows(recipe, tokenizer, rows(), progress)
            # Everything lands at once, by rename
            partial = folder.with_name(f".{folder.name}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            for name, found in splits.items():
                if found:
                    Dataset(render(recipe, found)).save_to_disk(str(partial / name))
            (partial / "prepared.json").write_text(json.dumps(record, ensure_ascii=False))
            shutil.rmtree(folder, ignore_errors=True)
            partial.rename(folder)
    record = json.loads((folder / "prepared.json").read_text())
    precision = choose_precision(recipe.model.get("dtype"))
    return Prepared(recipe, tokenizer, generation, precision, folder, fingerprint, **record)


def cache_folder() -> Path:
    """Return where prepared conversations are kept."""
    return Path(os.environ.get("MEDIBOT_CACHE", ".cache/medibot")) / "prepared"


def prepare_rows(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, rows: list[Row], progress: Callable[[str], None]
) -> tuple[splitting.Splits, dict[str, Any]]:
    """Clean and split `rows`; return the splits, and (ledger, leaks, split), the record of how they came about."""
    data, rules = recipe.data, list(expand(recipe.data.clean))
    progress(f"preparing {data.path}: {len(rows):,} rows, {len(rules)} rules")
    rows = map_columns(recipe, rows)
    rows, ledger = clean(rows, track(rules, "cleaning", transient=True, disable=not sys.stdout.isatty()))
    if not rows:
        last = next((line.rule for line in reversed(ledger) if line.dropped), "the rules")
        raise recipe.error("data.clean", f"no row is left after {last}", "see the ledger with: medibot inspect")
    for column, rule in (("prompt", "drop_unasked"), ("completion", "drop_unanswered")):
        if empty := sum(not (row[column] or "").strip() for row in rows):
            what = f"{empty:,} of {len(rows):,} rows have no {column}"
            raise recipe.error("data.clean", what, f"add the rule {rule}")
    # Text must not forge a turn of this model's template
    markers = role_markers(tokenizer)
    plain = [row | {key: escape_markers(row[key], markers) for key in ("prompt", "completion")} for row in rows]
    escaped = compare_rows("role markers made text", rows, plain)
    progress(f"preparing {data.path}: {len(plain):,} conversations, counting tokens")
    rows, fitted = fit_length(recipe, tokenizer, plain)
    group_by = [{data.prompt: "prompt", data.completion: "completion"}.get(column, column) for column in data.group_by]
    splits = splitting.split_rows(rows, group_by, data.validation, data.test, data.seed)
    splits, leaking = splitting.drop_leaks(splits)
    leaks = splitting.leak_report(splits, group_by)
    leaks["random_split"] = splitting.random_split_leaks(rows, group_by, data.validation + data.test, data.seed)
    chosen, limits = limit_rows(recipe, splits)
    sizes = {name: len(rows) for name, rows in chosen.items()}
    return chosen, {
        "ledger": [asdict(line) for line in [*ledger, escaped, fitted, *leaking, *limits]],
        "leaks": leaks,
        "split": {"fingerprint": splitting.split_fingerprint(splits), "rows": sizes},
    }


def limit_rows(recipe: Recipe, splits: splitting.Splits) -> tuple[splitting.Splits, list[LedgerLine]]:
    """Return `data.limit` rows of a split, and a ledger line for each limit; refuse a split that is left empty.

    Those with the smallest hash stay, so that a larger limit only adds rows.
    """
    data, chosen, lines = recipe.data, dict(splits), []
    limits = data.limit if isinstance(data.limit, dict) else {"train": data.limit} if data.limit else {}
    for name, most in limits.items():
        ordered = sorted(splits[name], key=lambda row: splitting.sha256(f"{data.seed}:{row['prompt']}:{row['row']}"))
        chosen[name] = sorted(ordered[:most], key=row_key)
        lines.append(compare_rows(f"limit {name} to {most:,}", splits[name], chosen[name]))
    for name, share in (("train", 1.0), ("validation", data.validation), ("test", data.test)):
        if share and not chosen[name]:
            what = f"the {name} split is empty ({sum(map(len, chosen.values())):,} rows in all)"
            key = "data.validation" if name == "train" else f"data.{name}"
            raise recipe.error(key, what, "change the share or add rows")
    return chosen, lines
