"""Rows on disk: what was added is read back, in any order, and memory holds none of the texts."""

import datetime
import tracemalloc

import numpy as np
import pytest

from medibot.cleaning.rules import fold
from medibot.data.near import Grams
from medibot.data.rows import BATCH, Rows


@pytest.fixture
def rows(tmp_path):
    return Rows(tmp_path, ["topic"])


def row(number, **columns):
    return {"row": number, "prompt": f"What is {number}?", "completion": f"It is {number}.", "tokens": 9, **columns}


def test_rows_are_read_back_as_they_were_added(rows):
    history = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho ☃"}]
    added = [
        row(0),
        row(1, source="a", part=0, system="Be brief.", history=history, thinking=" \n hm\t"),
        row(2, topic=None, url="u/ü", prompt="", completion="None"),
    ]
    for one in added:
        rows.add(one)
    rows.close()
    assert list(rows.read(np.arange(3))) == [added]


def test_what_is_no_text_becomes_text(rows):
    rows.add(row(0, day=datetime.date(2026, 1, 2), codes=["C1", "C2"], rate=0.5, sure=True))
    rows.close()
    ((read,),) = rows.read(np.arange(1))
    assert {name: read[name] for name in ("day", "codes", "rate", "sure")} == {
        "day": "2026-01-02",
        "codes": '["C1", "C2"]',
        "rate": "0.5",
        "sure": "true",
    }


def test_rows_are_read_in_any_order_across_batches(rows):
    for number in range(2 * BATCH + 5):
        rows.add(row(number))
    rows.close()
    places = np.random.default_rng(0).permutation(len(rows))
    read = [one["row"] for batch in rows.read(places) for one in batch]
    assert read == places.tolist()
    assert [one for batch in rows.read(places[:7], ["tokens"]) for one in batch] == [{"tokens": 9}] * 7


def test_memory_holds_no_texts(rows):
    tracemalloc.start()
    for number in range(2 * BATCH):
        rows.add(row(number, completion=f"{number} {'many words stand here ' * 400}", topic=f"topic {number}"))
    rows.close()
    # The last texts are remembered, however many there were
    fold.cache_clear()
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # 2,000 texts of 9,000 characters
    assert rows.file.stat().st_size > 15e6
    assert held < 2e6


def test_grams_are_read_alone_and_in_runs(tmp_path):
    texts = [" ".join(f"w{word}" for word in range(start, start + start % 7)) for start in range(3000)]
    one, other = Grams(tmp_path), Grams(tmp_path)
    one.add(texts)
    other.add(texts[:10])
    other.add(texts[10:])
    for places in (np.arange(3000), np.arange(0, 3000, 7), np.array([3, 4, 5, 2999]), np.array([8])):
        flat, starts = one.read(places)
        again, same = other.read(places)
        assert flat.tolist() == again.tolist()
        assert starts.tolist() == same.tolist() == [0, *np.cumsum([max(1, place % 7 - 2) for place in places])]
    assert sorted(set(flat.tolist())) == one.distinct(8).tolist()
