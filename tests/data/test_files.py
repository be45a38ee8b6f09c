"""A user's own files: every shape in every usual format becomes the same conversations, or one line that says why not."""

import bz2
import csv
import datetime
import functools
import gzip
import http.server
import io
import json
import lzma
import threading
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from datasets import Dataset

from medibot.data.sources import open_sources
from medibot.errors import RecipeError
from medibot.recipe import load_recipe

RECIPE = """\
model:
  pretrained_model_name_or_path: unused
data:
  path: rows.jsonl
  prompt: question
  completion: answer
  validation: 0
  test: 0
training:
  max_length: 512
"""
ROWS = [
    {"question": 'Is it "gout", or not?', "answer": "Näh:\n  no.\u2028", "year": 2020},
    {"question": "Why; or when?", "answer": "007", "year": None},
    {"question": "NA", "answer": "\t1.50 ", "year": 2021},
]
TEXT = [{name: None if value is None else str(value) for name, value in row.items()} for row in ROWS]


def lines(rows: list[dict]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def table(delimiter: str) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, ROWS[0], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(ROWS)
    return text.getvalue().encode()


def parquet() -> bytes:
    stream = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), stream)
    return stream.getvalue()


def arrow(new: str) -> bytes:
    stream, content = io.BytesIO(), pyarrow.Table.from_pylist(ROWS)
    with vars(pyarrow.ipc)[new](stream, content.schema) as writer:
        writer.write_table(content)
    return stream.getvalue()


def zstd(content: bytes) -> bytes:
    packed = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(packed, "zstd") as stream:
        stream.write(content)
    return packed.getvalue().to_pybytes()


FORMATS = {
    "jsonl": (lines(ROWS), ROWS),
    "ndjson": (lines(ROWS), ROWS),
    "json": (json.dumps(ROWS).encode(), ROWS),
    "pretty.json": (json.dumps(ROWS, indent=2, ensure_ascii=False).encode(), ROWS),
    "keyed.json": (json.dumps({"data": ROWS}).encode(), ROWS),
    "lines.json": (lines(ROWS), ROWS),
    "csv": (table(","), TEXT),
    "semicolons.csv": (table(";"), TEXT),
    "tsv": (table("\t"), TEXT),
    "old-mac.csv": (b"question,answer\rWhy?,So.\r", [{"question": "Why?", "answer": "So."}]),
    "bom.csv": (b"\xef\xbb\xbf" + table(","), TEXT),
    "bom.jsonl": (b"\xef\xbb\xbf" + lines(ROWS), ROWS),
    "parquet": (parquet(), ROWS),
    "arrow": (arrow("new_file"), ROWS),
    "stream.arrow": (arrow("new_stream"), ROWS),
}
COMPRESSIONS = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd}


@pytest.fixture
def rows_of(tmp_path, monkeypatch):
    """rows_of(path, *overrides): the rows of that path, read in an empty working folder."""
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text(RECIPE)

    def read(path: str, *overrides: str) -> list[dict]:
        recipe = load_recipe("mine.yaml", [f"data.path={path}", *overrides])
        return [row for source in open_sources(recipe) for _, row in source.read()]

    return read


@pytest.mark.parametrize("name", FORMATS)
def test_each_format_gives_its_rows_unchanged(rows_of, name):
    content, rows = FORMATS[name]
    Path(f"rows.{name}").write_bytes(content)
    assert rows_of(f"rows.{name}") == rows


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("name", ["jsonl", "json", "csv", "tsv", "parquet", "arrow"])
def test_each_format_is_read_compressed(rows_of, name, compression):
    content, rows = FORMATS[name]
    content = COMPRESSIONS[compression](content)
    Path(f"rows.{name}{compression}").write_bytes(content)
    assert rows_of(f"rows.{name}{compression}") == rows


def test_a_pattern_and_a_folder_are_read_in_the_order_of_names(rows_of):
    for name in ("b", "a", "c"):
        Path("data").mkdir(exist_ok=True)
        Path(f"data/{name}.jsonl").write_bytes(lines([{"question": name}]))
    Path("data/notes.md").write_text("no data")
    assert rows_of("data") == [{"question": "a"}, {"question": "b"}, {"question": "c"}]
    assert rows_of("'data/[ab]*.jsonl'") == [{"question": "a"}, {"question": "b"}]


def test_a_folder_with_a_file_for_each_split_gives_the_split_that_is_asked_for(rows_of):
    Path("data").mkdir()
    for name in ("train", "dev", "test"):
        Path(f"data/{name}.jsonl").write_bytes(lines([{"question": name}]))
    assert rows_of("data") == [{"question": "train"}]
    assert rows_of("data", "data.split=validation") == [{"question": "dev"}]
    with pytest.raises(RecipeError, match="data has no file for split 'holdout'"):
        rows_of("data", "data.split=holdout")


def test_a_set_that_datasets_saved_is_read_without_its_own_records(rows_of):
    Dataset.from_list(ROWS).save_to_disk("saved")
    assert rows_of("saved") == ROWS


def test_a_file_is_read_over_the_network_and_a_changed_one_is_another(rows_of, tmp_path):
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    Path("rows.jsonl").write_bytes(lines(ROWS))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=tmp_path))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/rows.jsonl"
    try:
        recipe = load_recipe("mine.yaml", [f"data.path={url}"])
        (source,) = open_sources(recipe)
        assert [row for _, row in source.read()] == ROWS
        Path("rows.jsonl").write_bytes(lines(ROWS[:2]))
        assert open_sources(recipe)[0].digest != source.digest
        with pytest.raises(RecipeError, match=r"data.path: .*gone.jsonl' cannot be read"):
            rows_of(url.replace("rows", "gone"))
    finally:
        server.shutdown()


@pytest.mark.parametrize(
    ("name", "content", "place"),
    [
        ("rows.jsonl", lines(ROWS[:2]) + b"{\n", "rows.jsonl:3"),
        ("rows.jsonl.gz", gzip.compress(lines(ROWS[:2]) + b"{\n"), "rows.jsonl.gz:3"),
        ("rows.json", b'[{"a": 1},\n\n {"a": 2},\n {"a": }]', "rows.json:4"),
        ("rows.json", b'{"train": [{"a": 1}],\n "test": [{"a": 2}]}', "rows.json:1"),
        ("rows.csv", b'question,answer\n"a\nb",c\nd\n', "rows.csv:4"),
        ("rows.tsv", b"question\tanswer\na\tb\nc\n", "rows.tsv:3"),
        ("rows.csv", "question,answer\na,b\nc,ß\n".encode("latin-1"), "rows.csv:3"),
        ("rows.json", '[{"a": "ß"}]'.encode("utf-16"), "rows.json:1"),
    ],
)
def test_what_cannot_be_read_is_placed_by_file_and_line(rows_of, name, content, place):
    Path(name).write_bytes(content)
    with pytest.raises(RecipeError) as caught:
        rows_of(name)
    assert str(caught.value).startswith(f"{place}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("cut", [10, -10])
def test_a_damaged_archive_is_said_in_a_line(rows_of, cut):
    Path("rows.jsonl.gz").write_bytes(gzip.compress(lines(ROWS * 100))[:cut])
    with pytest.raises(
        RecipeError, match=r"data.path: rows.jsonl.gz cannot be read: .* \(name a whole, readable file\)"
    ):
        rows_of("rows.jsonl.gz")


def test_dates_and_decimals_of_parquet_are_values(rows_of):
    day = datetime.date(2026, 11, 28)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"question": day, "answer": 1.5}]), "rows.parquet")
    assert rows_of("rows.parquet") == [{"question": day, "answer": 1.5}]
