"""Read the rows of files in each usual format; an error names file and line.

They are not read by datasets' builders, which infer types: "007" would become 7, "NA" nothing, and a broken line would
have no number.
"""

import csv
import io
import itertools
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import fsspec
import pyarrow.ipc
import pyarrow.parquet
from fsspec.compression import register_compression

from medibot.cleaning import Row
from medibot.errors import RecipeError, one_line
from medibot.recipe import Recipe

# What fsspec knows by itself, and zstandard by pyarrow's decoder
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")


def open_zstandard(file: Any, **_: Any) -> io.BufferedReader:
    """Return what a zstandard file holds, read by pyarrow's decoder."""
    return io.BufferedReader(pyarrow.CompressedInputStream(file, "zstd"))


register_compression("medibot-zst", open_zstandard, "zst", force=True)
# A row with the place that an error names: file and line
Placed = tuple[str, Row]


def suffix(file: str) -> str:
    """Return a file's suffix without that of its compression: ".jsonl" of rows.jsonl.gz."""
    path = Path(file)
    return (path.with_suffix("") if path.suffix in COMPRESSED else path).suffix.lower()


def read_files(recipe: Recipe, key: str, files: list[str]) -> Iterator[Placed]:
    """Yield the rows of all files; an error names file and line."""
    for file in files:
        shown, empty = shorten_path(file), True
        try:
            with fsspec.open(file, compression="medibot-zst" if file.endswith(".zst") else "infer") as opened:
                for place, row in READERS[suffix(file)](opened, shown):
                    empty = False
                    yield place, row
        except (pyarrow.ArrowException, OSError, EOFError) as error:
            what = f"{shown} cannot be read: {one_line(error)}"
            raise recipe.error(key, what, "name a whole, readable file") from error
        if empty:
            raise recipe.error(key, f"{shown} has no rows", "name a file with rows")


def shorten_path(file: str) -> str:
    """Return a file as an author knows it: a local one seen from here."""
    path = Path(file.removeprefix("file://"))
    if "://" in file and not file.startswith("file://"):
        return file
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def read_lines(file: IO[bytes], name: str) -> Iterator[tuple[int, str]]:
    """Yield (number, text) of each line; raise RecipeError at the line of what is no UTF-8 text."""
    for number, raw in enumerate(file, 1):
        try:
            # No text has a NUL, UTF-16 is full of them
            yield number, raw.replace(b"\0", b"\xff").decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            remedy = "save it as UTF-8, or name it after its compression, as in rows.jsonl.gz"
            raise RecipeError.of(f"{name}:{number}", "not UTF-8 text, or with a NUL character", remedy) from error


def check_row(place: str, row: Any, text: str) -> Row:
    """Return a row of JSON if it is one."""
    if "\\ud" in text.lower():
        json.dumps(row, ensure_ascii=False).encode()  # half an escaped pair is no character
    if not isinstance(row, dict):
        raise RecipeError.of(place, f"a {type(row).__name__}", "each row is a JSON object")
    return row


def read_jsonl(file: IO[bytes], name: str) -> Iterator[Placed]:
    """Yield the rows of a file of one JSON object a line."""
    for number, line in read_lines(file, name):
        if line.strip():
            try:
                row = check_row(f"{name}:{number}", json.loads(line), line)
            except (ValueError, RecursionError) as error:
                raise RecipeError.of(f"{name}:{number}", f"not JSON: {error}", "one JSON object a line") from error
            yield f"{name}:{number}", row


def read_json(file: IO[bytes], name: str) -> Iterator[Placed]:
    """Yield the rows of a JSON array, of the one array that an object holds, or of an object a line."""
    text = "".join(line for _, line in read_lines(file, name))
    start = re.match(r'\s*(\{\s*"[^"]*"\s*:\s*)?\[\s*(?=[{\]])', text)
    if not start:
        yield from read_jsonl(io.BytesIO(text.encode()), name)
        return
    decode, at, line = json.JSONDecoder().raw_decode, start.end(), text.count("\n", 0, start.end()) + 1
    while text[at : at + 1] not in ("]", ""):
        try:
            row, end = decode(text, at)
            row = check_row(f"{name}:{line}", row, text[at:end])
            after = re.compile(r"\s*(,\s*(?=[^\s\]])|(?=\]))").match(text, end)
            if after is None:
                json.loads(text)  # says what is wrong, and where
                raise ValueError("no comma between two rows")
        except (ValueError, RecursionError) as error:
            line = error.lineno if isinstance(error, json.JSONDecodeError) else line
            raise RecipeError.of(f"{name}:{line}", f"not JSON: {error}", "an array of JSON objects") from error
        yield f"{name}:{line}", row
        line, at = line + text.count("\n", at, after.end()), after.end()
    if not re.fullmatch(r"\]\s*\}?\s*", text[at:]):
        what = (
            "the array has no end" if at >= len(text) else "more stands behind the array of rows, which nothing reads"
        )
        raise RecipeError.of(f"{name}:{line}", f"not JSON of rows alone: {what}", "an array of JSON objects")


def read_csv(file: IO[bytes], name: str) -> Iterator[Placed]:
    """Yield the rows of a table of text, all of its cells text; an empty cell is None.

    The header says what separates cells: a comma, a semicolon or a tab.
    """
    csv.field_size_limit(1 << 27)
    lines = (part for _, line in read_lines(file, name) for part in re.findall(r"[^\r\n]*(?:\r\n?|\n)|[^\r\n]+", line))
    first = next(lines, "")
    separator = max(",;\t", key=first.count)
    header: list[str] = []
    records = csv.reader(itertools.chain([first], lines), delimiter=separator, strict=True)
    start = 1
    try:
        for cells in records:
            if not header:
                header = cells
                if len(set(header)) != len(header):
                    raise RecipeError.of(f"{name}:{start}", "a column name stands twice in the header", "rename one")
            elif cells and len(cells) != len(header):
                what = f"{len(cells)} cells under {len(header)} columns"
                raise RecipeError.of(f"{name}:{start}", what, "quote cells that hold separators or line breaks")
            elif cells:
                yield f"{name}:{start}", {column: cell or None for column, cell in zip(header, cells, strict=True)}
            start = records.line_num + 1
    except csv.Error as error:
        remedy = "close each quote, and double those inside a cell"
        raise RecipeError.of(f"{name}:{start}", f"not CSV: {error}", remedy) from error


def read_parquet(file: IO[bytes], name: str) -> Iterator[Placed]:
    """Yield the rows of a parquet file."""
    whole = file if file.seekable() else io.BytesIO(file.read())
    yield from number_rows(pyarrow.parquet.ParquetFile(whole).iter_batches(1000), name)


def read_arrow(file: IO[bytes], name: str) -> Iterator[Placed]:
    """Yield the rows of an Arrow file, or of a stream as datasets' `save_to_disk` writes it."""
    file = file if file.seekable() else io.BytesIO(file.read())
    if file.read(6) == b"ARROW1":
        opened = pyarrow.ipc.open_file(file)
        yield from number_rows(map(opened.get_batch, range(opened.num_record_batches)), name)
    else:
        file.seek(0)
        yield from number_rows(pyarrow.ipc.open_stream(file), name)


def number_rows(batches: Any, name: str) -> Iterator[Placed]:
    """Yield the rows of Arrow's batches."""
    number = 0
    for batch in batches:
        for row in batch.to_pylist():
            yield f"{name}: row {number}", row
            number += 1


READERS: dict[str, Callable[[IO[bytes], str], Iterator[Placed]]] = {
    ".parquet": read_parquet,
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": read_csv,
    ".arrow": read_arrow,
}
