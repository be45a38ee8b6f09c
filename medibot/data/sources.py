"""Read rows from a hub data set, a file or a folder of files."""

import csv
import hashlib
import io
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet
from datasets import load_dataset
from datasets.exceptions import DatasetsError

from medibot.cleaning import Row
from medibot.errors import RecipeError
from medibot.recipe import Recipe
from medibot.recipe.files import find_file

SUFFIXES = (".parquet", ".jsonl", ".csv")


def open_source(recipe: Recipe) -> tuple[str, Callable[[], list[Row]]]:
    """Return (hash of the data's bytes, a function that reads its rows): nothing is parsed if the cache has it."""
    data, path = recipe.data, find_file(recipe.data.path)
    if not path.exists():
        if path.suffix in SUFFIXES or data.path.startswith((".", "/", "~")) or data.path.count("/") != 1:
            raise recipe.error("data.path", f"no file or folder {data.path!r}", "check the path, seen from here")
        try:
            rows = load_dataset(data.path, data.name, revision=data.revision, split=data.split).to_list()
        except (OSError, ValueError, DatasetsError) as error:
            what = f"cannot load {data.path!r} from the hub: {str(error).strip().splitlines()[0]}"
            remedy = "check name, revision and network; or point data.path to a local file"
            raise recipe.error("data.path", what, remedy) from error
        return hashlib.sha256(json.dumps(rows, default=str).encode()).hexdigest(), lambda: rows
    files = sorted(file for file in (path.iterdir() if path.is_dir() else [path]) if file.suffix in SUFFIXES)
    if not files:
        kinds, suffix = ", ".join(SUFFIXES), path.suffix or "a file without suffix"
        what = f"folder {path} holds no {kinds} file" if path.is_dir() else f"cannot read {suffix}"
        raise recipe.error("data.path", what, f"use {kinds}")
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest(), lambda: read_files(recipe, files)


def read_files(recipe: Recipe, files: list[Path]) -> list[Row]:
    """Return the rows of all files, each with every column of any of them; an error names file and line."""
    readers = {".parquet": lambda file: pyarrow.parquet.read_table(file).to_pylist(), ".jsonl": read_jsonl}
    found: list[Row] = []
    for file in files:
        try:
            rows = readers.get(file.suffix, read_csv)(file)
        except (pyarrow.ArrowException, OSError) as error:
            what = f"{file} cannot be read: {str(error).splitlines()[0]}"
            raise recipe.error("data.path", what, "name a whole, readable file") from error
        if not rows:
            raise recipe.error("data.path", f"{file} has no rows", "name a file with rows")
        found += rows
    columns = list(dict.fromkeys(column for row in found for column in row))
    return [{column: row.get(column) for column in columns} for row in found]


def read_jsonl(file: Path) -> list[Row]:
    """Return the rows of a file of one JSON object a line."""
    rows = []
    for number, line in enumerate(read_text(file).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if "\\ud" in line.lower():
                json.dumps(row, ensure_ascii=False).encode()  # half an escaped pair is no character
        except (ValueError, RecursionError) as error:
            raise RecipeError.of(f"{file}:{number}", f"not JSON: {error}", "one JSON object a line") from error
        if not isinstance(row, dict):
            raise RecipeError.of(f"{file}:{number}", f"a {type(row).__name__}", "one JSON object a line")
        rows.append(row)
    return rows


def read_csv(file: Path) -> list[Row]:
    """Return the rows of a CSV file, all of them text; an empty cell is None."""
    csv.field_size_limit(1 << 27)
    records = csv.reader(io.StringIO(read_text(file), newline=""), strict=True)
    header: list[str] = []
    rows, start = [], 1
    try:
        for cells in records:
            header = header or cells
            if len(set(header)) != len(header):
                raise RecipeError.of(f"{file}:{start}", "a column name stands twice in the header", "rename one")
            if cells and len(cells) != len(header):
                what = f"{len(cells)} cells under {len(header)} columns"
                raise RecipeError.of(f"{file}:{start}", what, "quote cells that hold commas or line breaks")
            if cells:
                rows.append({column: cell or None for column, cell in zip(header, cells, strict=True)})
            start = records.line_num + 1
    except csv.Error as error:
        remedy = "close each quote, and double those inside a cell"
        raise RecipeError.of(f"{file}:{start}", f"not CSV: {error}", remedy) from error
    return rows[1:]  # the header is the first of them


def read_text(file: Path) -> str:
    """Return the file as UTF-8 text; raise RecipeError at the line of what is none."""
    try:
        return (
            file.read_bytes().replace(b"\0", b"\xff").decode("utf-8-sig")
        )  # no text has a NUL, UTF-16 is full of them
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        remedy = "save it as UTF-8, not compressed"
        raise RecipeError.of(f"{file}:{line}", "not UTF-8 text, or with a NUL character", remedy) from error
