"""Prepare a recipe's conversations once, and keep them under a fingerprint of all that decided them."""

import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow
from datasets import Dataset, disable_progress_bars
from filelock import FileLock
from transformers import GenerationConfig, PreTrainedTokenizerBase

from medibot.data.conversations import render
from medibot.data.preparation import own_rule_files, prepare_rows
from medibot.data.sources import Source, open_sources
from medibot.data.splitting import sha256
from medibot.model.generation import load_generation_config
from medibot.model.loading import silence_upstream
from medibot.model.precision import Precision, choose_precision
from medibot.model.tokenizer import load_tokenizer, require_served_as_trained, tokenizer_fingerprint
from medibot.recipe import Recipe

# The version of what cleaning, splitting and rendering do. Raise it by hand when prepared rows change: it makes cached
# sets and unfinished runs foreign, which a mere edit of our source must not. A test with golden rows says when.
PREPARED = 2


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
    sources = open_sources(recipe)
    # What a card says about the rows changes none of them
    said = {"license", "attribution", "language"}
    section = {key: value for key, value in recipe.as_dict()["data"].items() if key not in said}
    length = recipe.training.get("max_length", 1024)
    hashes = [[source.name, source.digest] for source in sources]
    hashes += [[file.name, sha256(file.read_text(encoding="utf-8"))] for file in own_rule_files(recipe)]
    decisive = [PREPARED, hashes, section, tokenizer_fingerprint(tokenizer), length]
    fingerprint = sha256(json.dumps(decisive, sort_keys=True))
    folder = cache_folder() / fingerprint[:16]
    folder.parent.mkdir(parents=True, exist_ok=True)
    # A file lock, not a process-group barrier: it also holds between two trainings, and long cleaning cannot time out
    with FileLock(folder.with_suffix(".lock")):
        if not (folder / "prepared.json").is_file():
            write_folder(recipe, tokenizer, sources, folder, progress)
    require_served_as_trained(tokenizer, recipe)
    record = json.loads((folder / "prepared.json").read_text())
    precision = choose_precision(recipe.model.get("dtype"))
    return Prepared(recipe, tokenizer, generation, precision, folder, fingerprint, **record)


def write_folder(
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    sources: list[Source],
    folder: Path,
    progress: Callable[[str], None],
) -> None:
    """Prepare the rows and write them to `folder`, where everything lands at once, by rename, or nothing at all."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        with tempfile.TemporaryDirectory(dir=partial) as spool:
            chosen = prepare_rows(recipe, tokenizer, sources, Path(spool), progress)
            for name, places in chosen.splits.items():
                if len(places):
                    save_rows(render(recipe, chosen.rows, places, chosen.groups[places]), partial / name)
        (partial / "prepared.json").write_text(json.dumps(chosen.record, ensure_ascii=False))
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def save_rows(batches: Iterator[pyarrow.RecordBatch], folder: Path) -> None:
    """Write a split as `Dataset.load_from_disk` reads it, batch by batch: all of it at once would take the memory twice."""
    first, written = next(batches), folder.with_suffix(".arrow")
    with pyarrow.ipc.new_stream(str(written), first.schema) as stream:
        for batch in itertools.chain([first], batches):
            stream.write_batch(batch)
    Dataset.from_file(str(written)).save_to_disk(str(folder))
    written.unlink()


def cache_folder() -> Path:
    """Return where prepared conversations are kept."""
    return Path(os.environ.get("MEDIBOT_CACHE", ".cache/medibot")) / "prepared"
