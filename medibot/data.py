"""Rows to conversations: load, map columns, clean, split, and keep the result under a fingerprint of all that made it."""

import csv
import hashlib
import io
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
from datasets import Dataset
from filelock import FileLock
from rich.progress import Progress
from transformers import PreTrainedTokenizerBase

from medibot import splitting
from medibot.cleaning import Row, clean
from medibot.cleaning.ledger import LedgerLine, row_key
from medibot.errors import RecipeError
from medibot.model.template import template_kwargs
from medibot.model.tokenizer import escape_markers, make_prompt, role_markers, tokenizer_fingerprint
from medibot.recipe import Recipe
from medibot.splitting import sha256

# The version of what cleaning, splitting and rendering do. Raise it by hand when prepared rows change: it makes cached
# sets and unfinished runs foreign, which a mere edit of our source must not. A test with golden rows says when.
PREPARED = 1
SUFFIXES = (".parquet", ".jsonl", ".csv")
SPLITS = ("train", "validation", "test")
# Columns that the prepared data set has of its own
RESERVED = {"prompt", "completion", "row", "group", "part", "tokens", "chat_template_kwargs"}


@dataclass(frozen=True)
class Prepared:
    """Conversations of one recipe, read from `folder`.

    Columns of each split: `row` (index in the source), `group`, `tokens` (of the whole chat), `prompt` and
    `completion` (lists of chat messages), and every other column of the source.
    """

    folder: Path
    fingerprint: str
    ledger: list[dict[str, Any]]
    leaks: dict[str, Any]
    split: dict[str, Any]

    def load(self, split: str) -> Dataset | None:
        """One of train, validation, test (test is for evaluation alone); None where the recipe gives it no rows."""
        return Dataset.load_from_disk(str(self.folder / split)) if self.split["rows"][split] else None


def prepare(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, progress: Callable[[str], None] = print) -> Prepared:
    """The recipe's conversations, made once per content fingerprint and then read by every process.

    Raises RecipeError where the data cannot be what the recipe says.
    """
    source_hash, rows = open_source(recipe)
    fingerprint = prepared_fingerprint(recipe, tokenizer, source_hash)
    folder = cache_folder() / fingerprint[:16]
    folder.parent.mkdir(parents=True, exist_ok=True)
    # A file lock, not a process-group barrier: it also holds between two trainings, and long cleaning cannot time out
    with FileLock(folder.with_suffix(".lock")):
        if not (folder / "prepared.json").is_file():
            progress(f"preparing {recipe.data.path}: reading rows")
            make(recipe, tokenizer, rows(), folder, progress)
    record = json.loads((folder / "prepared.json").read_text())
    return Prepared(folder=folder, fingerprint=fingerprint, **record)


def cache_folder() -> Path:
    return Path(os.environ.get("MEDIBOT_CACHE", ".cache/medibot")) / "prepared"


def prepared_fingerprint(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, source_hash: str) -> str:
    """Return the sha256 of what decides the prepared rows: data, recipe, tokenizer, length limit, and PREPARED."""
    # What a card says about the rows changes none of them
    said = {"license", "attribution", "language"}
    section = {key: value for key, value in recipe.as_dict()["data"].items() if key not in said}
    parts = [PREPARED, source_hash, section, tokenizer_fingerprint(tokenizer)]
    parts.append(recipe.training.get("max_length", 1024))
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def make(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, rows: list[Row], folder: Path, progress: Callable[[str], None]
) -> None:
    """Clean, split and render `rows`; everything lands in `folder` at once, by rename."""
    data = recipe.data
    progress(f"preparing {data.path}: {len(rows):,} rows, {len(data.clean)} rules")
    rows = map_columns(recipe, rows)
    with Progress(transient=True, disable=not sys.stdout.isatty()) as bar:
        task = bar.add_task("cleaning", total=len(data.clean))
        rows, ledger = clean(rows, data.clean, progress=lambda _: bar.advance(task))
    require_text(recipe, rows, ledger)
    rows, line = defuse_rows(rows, role_markers(tokenizer))
    ledger.append(line)
    progress(f"preparing {data.path}: {len(rows):,} conversations, counting tokens")
    rows, line = fit_length(recipe, tokenizer, rows)
    ledger.append(line)
    group_by = [{data.prompt: "prompt", data.completion: "completion"}.get(column, column) for column in data.group_by]
    splits = splitting.split_rows(rows, group_by, data.validation, data.test, data.seed)
    splits, lines = splitting.drop_leaks(splits)
    leaks = splitting.leak_report(splits, group_by)
    leaks["random_split"] = splitting.random_split_leaks(rows, group_by, data.validation + data.test, data.seed)
    chosen, limits = limit_rows(recipe, splits)
    ledger += [*lines, *limits]
    require_rows(recipe, chosen)
    sizes = {name: len(chosen[name]) for name in SPLITS}
    record = {
        "ledger": [asdict(line) for line in ledger],
        "leaks": leaks,
        "split": {"fingerprint": splitting.split_fingerprint(splits), "rows": sizes},
    }
    write(folder, {name: render(recipe, chosen[name]) for name in SPLITS if chosen[name]}, record)


def write(folder: Path, tables: dict[str, pyarrow.Table], record: dict[str, Any]) -> None:
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    for name, table in tables.items():
        Dataset(table).save_to_disk(str(partial / name))
    (partial / "prepared.json").write_text(json.dumps(record, ensure_ascii=False))
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


# --- source: hub data set, file or folder -----------------------------------------------------------------------------


def open_source(recipe: Recipe) -> tuple[str, Callable[[], list[Row]]]:
    """(hash of the data's bytes, a function that reads its rows): nothing is parsed if the cache already has it."""
    files = local_files(recipe)
    if files is None:
        rows = hub_rows(recipe)
        return hashlib.sha256(json.dumps(rows, default=str).encode()).hexdigest(), lambda: rows
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest(), lambda: read_files(recipe, files)


def local_files(recipe: Recipe) -> list[Path] | None:
    """The files that `data.path` names, sorted; None if it is a hub id."""
    path = Path(recipe.data.path).expanduser()
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if p.suffix in SUFFIXES)
        if not files:
            raise recipe.error("data.path", f"folder {path} holds no {', '.join(SUFFIXES)} file", "name another folder")
        return files
    if path.is_file():
        if path.suffix not in SUFFIXES:
            raise recipe.error(
                "data.path", f"cannot read {path.suffix or 'a file without suffix'}", "use " + ", ".join(SUFFIXES)
            )
        return [path]
    written = recipe.data.path
    if path.suffix in SUFFIXES or written.startswith((".", "/", "~")) or written.count("/") != 1:
        raise recipe.error("data.path", f"no file or folder {recipe.data.path!r}", "check the path, seen from here")
    return None


def hub_rows(recipe: Recipe) -> list[Row]:
    """Rows of a hub data set (`path`, `name`, `revision`, `split` as `datasets.load_dataset` takes them)."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    data = recipe.data
    try:
        return load_dataset(data.path, data.name, revision=data.revision, split=data.split).to_list()
    except (OSError, ValueError, DatasetsError) as error:
        first = str(error).strip().splitlines()[0]
        remedy = "check name, revision and network; or point data.path to a local file"
        raise recipe.error("data.path", f"cannot load {data.path!r} from the hub: {first}", remedy) from error


def read_files(recipe: Recipe, files: list[Path]) -> list[Row]:
    """Rows of all files, each with every column of any of them."""
    rows = [row for file in files for row in read_file(recipe, file)]
    columns = list(dict.fromkeys(column for row in rows for column in row))
    return [{column: row.get(column) for column in columns} for row in rows]


def read_file(recipe: Recipe, file: Path) -> list[Row]:
    """Rows of one parquet, JSON lines or CSV file; a malformed one is refused with its line."""
    readers = {".parquet": read_parquet, ".jsonl": read_jsonl, ".csv": read_csv}
    try:
        rows = readers[file.suffix](file)
    except (pyarrow.ArrowException, OSError) as error:
        what = f"{file} cannot be read: {str(error).splitlines()[0]}"
        raise recipe.error("data.path", what, "name a whole, readable file") from error
    if not rows:
        raise recipe.error("data.path", f"{file} has no rows", "name a file with rows")
    return rows


def read_parquet(file: Path) -> list[Row]:
    return pyarrow.parquet.read_table(file).to_pylist()


def read_jsonl(file: Path) -> list[Row]:
    rows = []
    for number, line in enumerate(io.StringIO(read_text(file)), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if re.search(r"\\u[dD][89a-fA-F]", line):
                json.dumps(row, ensure_ascii=False).encode()  # half an escaped pair is no character
        except (ValueError, RecursionError) as error:
            raise RecipeError.of(f"{file}:{number}", f"not JSON: {error}", "one JSON object a line") from error
        if not isinstance(row, dict):
            raise RecipeError.of(f"{file}:{number}", f"a {type(row).__name__}", "one JSON object a line")
        rows.append(row)
    return rows


def read_csv(file: Path) -> list[Row]:
    records = csv_records(file)
    start, header = next(records, (1, []))
    if len(set(header)) != len(header):
        raise RecipeError.of(f"{file}:{start}", "a column name stands twice in the header", "rename one")
    rows = []
    for start, cells in records:
        if len(cells) != len(header):
            what = f"{len(cells)} cells under {len(header)} columns"
            raise RecipeError.of(f"{file}:{start}", what, "quote cells that hold commas or line breaks")
        rows.append({column: cell or None for column, cell in zip(header, cells, strict=True)})
    return rows


def csv_records(file: Path) -> Iterator[tuple[int, list[str]]]:
    """(the line that it begins on, its cells) of each record; blank lines are none."""
    csv.field_size_limit(1 << 27)
    records = csv.reader(io.StringIO(read_text(file), newline=""), strict=True)
    while True:
        start = records.line_num + 1
        try:
            cells = next(records, None)
        except csv.Error as error:
            what = f"not CSV: {error}"
            raise RecipeError.of(f"{file}:{start}", what, "close each quote, and double those inside a cell") from error
        if cells is None:
            return
        if cells:
            yield start, cells


def read_text(file: Path) -> str:
    """The file as UTF-8 text; what is none is refused with its line."""
    content = file.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise RecipeError.of(f"{file}:{line}", "not UTF-8 text", "save it as UTF-8, not compressed") from error
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise RecipeError.of(f"{file}:{line}", "holds a NUL character, which no text has", "save it as UTF-8 text")
    return text


# --- rows to conversations --------------------------------------------------------------------------------------------


def map_columns(recipe: Recipe, rows: list[Row]) -> list[Row]:
    """Rows with the mapped columns under `prompt` and `completion`, and `row`, their index in the source."""
    data = recipe.data
    columns = rows[0].keys()
    wanted = [("data.prompt", data.prompt), ("data.completion", data.completion)]
    generic = {"prompt": data.prompt, "completion": data.completion}
    wanted += [("data.group_by", column) for column in data.group_by if column not in generic]
    for key, column in wanted:
        if column not in columns:
            raise recipe.error(key, f"{data.path} has no column {column!r}", f"it has {', '.join(columns)}")
    if data.prompt == data.completion:
        raise recipe.error("data.completion", "the same column as data.prompt", "name the answers' column")
    kept = [column for column in columns if column not in generic.values()]
    if clash := RESERVED & set(kept):
        raise recipe.error("data.path", f"column {sorted(clash)[0]!r} has a name that MediBot gives", "rename it")
    mapped = []
    for index, row in enumerate(rows):
        for column in generic.values():
            if not isinstance(row[column], str | None):
                what = f"row {index} holds {type(row[column]).__name__}, not text, in column {column!r}"
                raise recipe.error("data.path", what, "convert the column to text")
        mapped.append(
            {"row": index} | {key: row[column] for key, column in generic.items()} | {c: row[c] for c in kept}
        )
    return mapped


def require_text(recipe: Recipe, rows: list[Row], ledger: list[LedgerLine]) -> None:
    if not rows:
        last = next((line.rule for line in reversed(ledger) if line.dropped), "the rules")
        raise recipe.error("data.clean", f"no row is left after {last}", "see the ledger with: medibot inspect")
    for column, rule in (("prompt", "drop_unasked"), ("completion", "drop_unanswered")):
        empty = sum(1 for row in rows if not (row[column] or "").strip())
        if empty:
            raise recipe.error(
                "data.clean", f"{empty:,} of {len(rows):,} rows have no {column}", f"add the rule {rule}"
            )


def defuse_rows(rows: list[Row], markers: tuple[str, ...]) -> tuple[list[Row], LedgerLine]:
    """Rows whose text cannot forge a turn of this model's template, and the ledger line that counts them."""
    after = [row | {key: escape_markers(row[key], markers) for key in ("prompt", "completion")} for row in rows]
    changed = [(old, new) for old, new in zip(rows, after, strict=True) if old != new]
    examples = [
        {"row": old["row"], "before": old["completion"], "after": new["completion"]} for old, new in changed[:3]
    ]
    return after, LedgerLine("role markers made text", len(rows), 0, len(changed), 0, len(rows), examples)


def fit_length(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, rows: list[Row]) -> tuple[list[Row], LedgerLine]:
    """Rows with `tokens`; those over `training.max_length` are dropped, or refused under `too_long: error`."""
    limit = recipe.training.get("max_length", 1024)
    chats = [prompt_of(recipe, row) + completion_of(row) for row in rows]
    counted = [
        row | {"tokens": tokens} for row, tokens in zip(rows, count_tokens(recipe, tokenizer, chats), strict=True)
    ]
    long = [row for row in counted if limit is not None and row["tokens"] > limit]
    if long and recipe.data.too_long == "error":
        worst = max(long, key=lambda row: row["tokens"])
        what = f"{len(long):,} conversations are longer than {limit} tokens (row {worst['row']}: {worst['tokens']})"
        raise recipe.error("training.max_length", what, "raise it, or write data.too_long: drop")
    kept = [row for row in counted if limit is None or row["tokens"] <= limit]
    if not kept:
        raise recipe.error("training.max_length", f"every conversation is longer than {limit} tokens", "raise it")
    examples = [{"row": row["row"], "before": row["completion"], "after": None} for row in long[:3]]
    return kept, LedgerLine("longer than max_length", len(rows), len(long), 0, 0, len(kept), examples)


def count_tokens(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, chats: list[list[dict[str, str]]]) -> list[int]:
    """Tokens of each whole chat, by the chat template that the trainer will use."""
    import jinja2

    lengths: list[int] = []
    kwargs = template_kwargs(recipe)
    try:
        for start in range(0, len(chats), 1000):
            chunk = chats[start : start + 1000]
            encoded = tokenizer.apply_chat_template(chunk, tokenize=True, return_dict=True, **kwargs)
            lengths += map(len, encoded["input_ids"])
    except (jinja2.TemplateError, ValueError) as error:
        what = f"the model's chat template refuses these conversations: {error}"
        raise recipe.error("data.system", what, "remove data.system if the template knows no system role") from error
    return lengths


def limit_rows(recipe: Recipe, splits: splitting.Splits) -> tuple[dict[str, list[Row]], list[LedgerLine]]:
    """`data.limit` rows of a split: those with the smallest hash, so that a larger limit only adds rows."""
    limit = recipe.data.limit
    limits = limit if isinstance(limit, dict) else {"train": limit} if limit else {}
    chosen = {name: getattr(splits, name) for name in SPLITS}
    lines = []
    for name, most in limits.items():
        rows = chosen[name]
        first = sorted(rows, key=lambda row: sha256(f"{recipe.data.seed}:{row['prompt']}:{row['row']}"))[:most]
        chosen[name] = sorted(first, key=row_key)
        lines.append(LedgerLine(f"limit {name} to {most:,}", len(rows), len(rows) - len(first), 0, 0, len(first), []))
    return chosen, lines


def require_rows(recipe: Recipe, chosen: dict[str, list[Row]]) -> None:
    for name, share in (("train", 1.0), ("validation", recipe.data.validation), ("test", recipe.data.test)):
        if share and not chosen[name]:
            what = f"the {name} split is empty ({sum(map(len, chosen.values())):,} rows in all)"
            key = "data.validation" if name == "train" else f"data.{name}"
            raise recipe.error(key, what, "change the share or add rows")


def prompt_of(recipe: Recipe, row: Row) -> list[dict[str, str]]:
    return make_prompt(row["prompt"], recipe.data.system, ())


def completion_of(row: Row) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": row["completion"]}]


def render(recipe: Recipe, rows: list[Row]) -> pyarrow.Table:
    """TRL's conversational prompt/completion rows, with the source's other columns beside them."""
    counts = {"row", "part", "tokens"}
    extra = [column for column in rows[0] if column not in {"prompt", "completion"}]
    columns = {c: [row.get(c) if c in counts else as_text(row.get(c)) for row in rows] for c in extra}
    columns["prompt"] = [prompt_of(recipe, row) for row in rows]
    columns["completion"] = [completion_of(row) for row in rows]
    columns["chat_template_kwargs"] = [template_kwargs(recipe)] * len(rows)
    return pyarrow.table(columns)


def as_text(value: Any) -> str | None:
    """Text as it is and anything else as JSON, so that one column has one type."""
    return value if isinstance(value, str | None) else json.dumps(value, ensure_ascii=False, default=str)
