"""Keep cleaned rows on disk, with the few numbers of each by which they are ordered, grouped and compared in memory."""

import hashlib
import json
from array import array
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow

from medibot.cleaning.ledger import LedgerLine, make_example
from medibot.cleaning.rules import Row, asked, digest, fold
from medibot.data.columns import as_text
from medibot.data.near import Grams, ranges

TEXTS = ("prompt", "completion", "system", "thinking")
NUMBERS = ("row", "part", "tokens")
# A row's history and the source's other columns stand as JSON, since no two sources have the same
SCHEMA = pyarrow.schema(
    dict.fromkeys(("source", *TEXTS, "history", "others"), pyarrow.string()) | dict.fromkeys(NUMBERS, pyarrow.int64())
)
# Rows of one batch in the file
BATCH = 1000
# Indices of rows in the order in which they were added
Places = np.ndarray


class Rows:
    """Rows in an Arrow file in `folder`, and per row in arrays: its values in the `group_by` columns, hashes of its texts.

    Add rows, then call `close`; from then on places name rows by the order in which they were added.
    """

    def __init__(self, folder: Path, group_by: list[str], seed: int = 0) -> None:
        self.file, self.seed, self.grams = folder / "rows.arrow", seed, Grams(folder)
        # The first columns tie rows into groups, without any the question does; it is compared in any case
        self.columns, self.tying = list(dict.fromkeys([*group_by, "prompt"])), len(set(group_by)) or 1
        self.sink = pyarrow.OSFile(str(self.file), "wb")
        self.writer = pyarrow.ipc.new_file(self.sink, SCHEMA)
        self.waiting: list[Row] = []
        self.names: dict[str, None] = {}
        self.sources: dict[str, int] = {}
        self.keys, self.value_ends, self.value_columns = array("q"), array("q", [0]), array("b")
        self.tokens, self.orders, self.pools = array("q"), array("Q"), array("b")
        self.values, self.answers, self.questions, self.alone = (bytearray() for _ in range(4))

    def __len__(self) -> int:
        return len(self.tokens)

    def add(self, row: Row, pool: int = 0) -> None:
        """Append a row with `tokens`; `pool` tells apart those that an author holds out."""
        self.names |= dict.fromkeys(row)
        self.keys.extend(
            (self.sources.setdefault(row.get("source", ""), len(self.sources)), row["row"], row.get("part", 0))
        )
        values = row_values(row, self.columns)
        for place, text in values:
            self.value_columns.append(place)
            self.values += hash_text(f"{self.columns[place]}\0{text}")
        self.value_ends.append(len(self.value_columns))
        # A row without a value is a group of its own, named after its text; a conversation's turns after how it opens
        tied = any(place < self.tying for place, _ in values)
        named = [opening(row)] if "part" in row else [row["prompt"], row["completion"]]
        self.alone += bytes(32) if tied else hash_text(json.dumps(named))
        self.answers += digest(fold(row["completion"]))
        self.questions += digest(asked(row))
        self.orders.append(int.from_bytes(hash_text(f"{self.seed}:{row['prompt']}:{row['row']}")[:8]))
        self.tokens.append(row["tokens"])
        self.pools.append(pool)
        self.waiting.append(row)
        if len(self.waiting) == BATCH:
            self.write()

    def write(self) -> None:
        """Write the rows that wait."""
        own, others = {*TEXTS, *NUMBERS, "source", "history"}, []
        for row in self.waiting:
            # Counts stay numbers, text stays text, anything else becomes JSON, so that one column has one type
            left = {name: as_text(value) for name, value in row.items() if name not in own}
            others.append(json.dumps(left))
        columns: dict[str, list[Any]] = {
            name: [row.get(name) for row in self.waiting] for name in ("source", *TEXTS, *NUMBERS)
        }
        history = [json.dumps(row["history"]) if "history" in row else None for row in self.waiting]
        self.writer.write_batch(
            pyarrow.RecordBatch.from_pydict(columns | {"history": history, "others": others}, SCHEMA)
        )
        self.grams.add([fold(row["completion"]) for row in self.waiting])
        self.waiting.clear()

    def close(self) -> None:
        """Write what waits; no row can be added any more."""
        if self.waiting:
            self.write()
        self.writer.close()
        self.sink.close()

    def read(self, places: Places, columns: Sequence[str] = SCHEMA.names) -> Iterator[list[Row]]:
        """Yield the rows at these places in their order, some at a time; as text what is neither a count nor a message."""
        with pyarrow.OSFile(str(self.file)) as file:
            opened = pyarrow.ipc.open_file(file)
            for start in range(0, len(places), BATCH):
                some = places[start : start + BATCH]
                found: dict[int, Row] = {}
                for number in np.unique(some // BATCH).tolist():
                    inside = some[some // BATCH == number]
                    batch = opened.get_batch(number).select(columns)
                    taken = batch.take(pyarrow.array(inside - number * BATCH)).to_pylist()
                    found |= zip(inside.tolist(), map(read_row, taken), strict=True)
                yield [found[place] for place in some.tolist()]

    def keys_of(self, places: Places) -> list[tuple[str, int, int]]:
        """Return what names each row: its source, its index in it, and its part."""
        names = list(self.sources)
        return [(names[source], row, part) for source, row, part in self.numbers[places].tolist()]

    def sort(self, places: Places) -> Places:
        """Return places in the order of sources' names, rows and parts."""
        rank = np.argsort(np.argsort(np.array(list(self.sources), dtype=object)))
        source, row, part = self.numbers[places].T
        return places[np.lexsort((part, row, rank[source]))]

    @property
    def numbers(self) -> np.ndarray:
        """Return each row's source, its index in it, and its part."""
        return np.frombuffer(self.keys, np.int64).reshape(-1, 3)

    @cached_property
    def distinct(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the distinct values' hashes, ascending, the column of each, and for every row's values which one it is."""
        hashes, first, numbers = np.unique(hashes_of(self.values, 32), return_index=True, return_inverse=True)
        return hashes, np.frombuffer(self.value_columns, np.int8)[first], numbers

    def values_of(self, places: Places) -> tuple[np.ndarray, np.ndarray]:
        """Return the numbers of the distinct values at these places, row after row, and beside each whose it is."""
        ends = np.frombuffer(self.value_ends, np.int64)
        starts, ends = ends[places], ends[places + 1]
        return self.distinct[2][ranges(starts, ends)], np.repeat(np.arange(len(places)), ends - starts)

    def dropped(self, rule: str, before: Places, after: Places) -> LedgerLine:
        """Return the ledger's line for the rows at `before` of which those at `after` are left."""
        gone = before[~np.isin(before, after)]
        shown = sorted({0, len(gone) // 2, len(gone) - 1}) if len(gone) else []
        examples = [make_example(row, None) for place in shown for (row,) in self.read(gone[place : place + 1])]
        return LedgerLine(rule, len(before), len(gone), 0, 0, len(after), examples)


def read_row(written: Row) -> Row:
    """Return a row as it was added, but for what became text."""
    others, history = written.pop("others", None), written.pop("history", None)
    row = {name: value for name, value in written.items() if value is not None}
    return row | ({"history": json.loads(history)} if history else {}) | (json.loads(others) if others else {})


def row_values(row: Row, columns: list[str]) -> list[tuple[int, str]]:
    """Return the row's values as (place of the column, folded text), empty ones left out."""
    values = []
    for place, column in enumerate(columns):
        value = opening(row) if column == "prompt" else row.get(column)
        entries = value if isinstance(value, list) else [value]
        values += [(place, fold(str(entry))) for entry in entries if entry is not None]
    return [(place, text) for place, text in values if text]


def opening(row: Row) -> str:
    """Return the question that a row's conversation opens with: a later one, such as "And then?", tells nothing apart."""
    return row["history"][0]["content"] if row.get("history") else row["prompt"]


def hash_text(text: str) -> bytes:
    """Return the 32 bytes of a text's sha256."""
    return hashlib.sha256(text.encode()).digest()


def hashes_of(joined: bytearray, size: int) -> np.ndarray:
    """Return hashes of `size` bytes each as an array."""
    return np.frombuffer(joined, f"S{size}")
