"""Split rows so that no topic is on two sides, and prove it.

Rows that share a value of a `group_by` column are one group, and a hash of the group's key names its split: no random
state, no dependence on the order of rows, and a row that is added later moves no other unless it ties two groups
together.
"""

import hashlib
import itertools
import json
import math
import random
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from medibot.cleaning.ledger import LedgerLine, compare_rows, row_key
from medibot.cleaning.rules import Row, fold


@dataclass(frozen=True)
class Splits:
    """Rows of the three splits, each with its "group", in the order of the source."""

    train: list[Row]
    validation: list[Row]
    test: list[Row]


def group_rows(rows: list[Row], group_by: list[str]) -> list[str]:
    """Return a key for each row; rows tied by a shared value in a `group_by` column have the same key.

    Values are compared by their words; lists hold several values; an empty value ties nothing, nor do equal values of
    two columns. Without `group_by`, rows with the same question are a group.
    """
    columns = group_by or ["prompt"]
    values = [row_values(row, columns) for row in rows]
    places = {value: place for place, value in enumerate(dict.fromkeys(itertools.chain.from_iterable(values)))}
    ties = [(places[first], places[other]) for first, *others in filter(None, values) for other in others]
    graph = coo_array((np.ones(len(ties)), np.reshape(ties, (-1, 2)).T), shape=(len(places), len(places)))
    group_of = connected_components(graph, directed=False)[1]
    # The smallest hash among the values of the first column that the group has: more documents or questions on known
    # topics leave it as it is.
    names: dict[int, tuple[int, str]] = {}
    for (column, text), group in zip(places, group_of, strict=True):
        name = (column, sha256(f"{columns[column]}\0{text}"))
        names[group] = min(name, names.get(group, name))
    # A row without a value is a group of its own, named after its text
    own = (sha256(json.dumps([row["prompt"], row["completion"]])) for row in rows)
    return [names[group_of[places[found[0]]]][1] if found else key for found, key in zip(values, own, strict=True)]


def row_values(row: Row, columns: list[str]) -> list[tuple[int, str]]:
    """Return the row's values as (place of the column, folded text), empty ones left out."""
    values = []
    for place, column in enumerate(columns):
        value = row.get(column)
        entries = value if isinstance(value, (list, tuple)) else [value]
        values += [(place, fold(str(entry))) for entry in entries if entry is not None]
    return [(place, text) for place, text in values if text]


def sha256(text: str) -> str:
    """Return the sha256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()


def split_rows(rows: list[Row], group_by: list[str], validation: float, test: float, seed: int) -> Splits:
    """Assign whole groups to splits by a hash of seed and group key; `validation` and `test` are shares of groups."""
    parts: dict[str, list[Row]] = {"train": [], "validation": [], "test": []}
    for row, group in sorted(zip(rows, group_rows(rows, group_by), strict=True), key=lambda pair: row_key(pair[0])):
        place = int(sha256(f"{seed}:{group}")[:13], 16) / 16**13
        name = "test" if place < test else "validation" if place < test + validation else "train"
        parts[name].append({**row, "group": group})
    return Splits(**parts)


def drop_leaks(splits: Splits, threshold: float = 0.8) -> tuple[Splits, list[LedgerLine]]:
    """Drop validation and test rows that would measure memory instead of knowledge; train stays whole.

    These are answers equal or near (word 3-gram Jaccard of at least `threshold`) to one of an earlier split, and second
    answers to a question of the same split.
    """
    validation = without_known_answers(splits.validation, splits.train, threshold)
    test = without_known_answers(splits.test, [*splits.train, *validation], threshold)
    distinct = replace(splits, validation=validation, test=test)
    single = replace(distinct, validation=first_answers(validation), test=first_answers(test))
    whole, left, last = ([*each.train, *each.validation, *each.test] for each in (splits, distinct, single))
    return single, [
        compare_rows("splitting.near_answers", whole, left),
        compare_rows("splitting.second_answers", left, last),
    ]


def without_known_answers(rows: list[Row], earlier: list[Row], threshold: float) -> list[Row]:
    """Return the rows whose answer is not nearly one of `earlier`."""
    known = find_near_texts(folded(rows, "completion"), folded(earlier, "completion"), threshold)
    return [row for row, answer in zip(rows, folded(rows, "completion"), strict=True) if answer not in known]


def first_answers(rows: list[Row]) -> list[Row]:
    """Return the first row of each question."""
    first = dict(zip(reversed(folded(rows, "prompt")), reversed(rows), strict=True))
    return [row for row in rows if first[fold(row["prompt"] or "")] is row]


def folded(rows: list[Row], column: str) -> list[str]:
    """Return a column's texts, folded: what is equal here is an exact copy."""
    return [fold(row[column] or "") for row in rows]


def find_near_texts(queries: Iterable[str], references: Iterable[str], threshold: float) -> set[str]:
    """Return the folded texts of `queries` that equal a reference or have a word 3-gram Jaccard of `threshold` with one.

    Exact, by the prefix filter of Chaudhuri, Ganti and Kaushik (ICDE 2006): a near text shares at least
    ceil(threshold * n) of n 3-grams, and so at least one of any n - ceil(threshold * n) + 1 of them.
    """
    references = dict.fromkeys(references)
    near = {query for query in queries if query in references}
    grams = {query: trigrams(query) for query in dict.fromkeys(queries) if query not in near}
    frequency = Counter(gram for found in grams.values() for gram in found)
    index = defaultdict(list)
    for query, found in grams.items():
        # The rarest ones: boilerplate would make every text a candidate. The 3-gram itself settles ties.
        rare = sorted(found, key=lambda gram: (frequency[gram], gram))
        # The margin keeps 0.7 * 10 = 7.000000000000001 from asking for eight.
        for gram in rare[: len(found) - math.ceil(threshold * len(found) - 1e-9) + 1]:
            index[gram].append(query)
    for reference in references:
        found = trigrams(reference)
        for query in {query for gram in index.keys() & found for query in index[gram]} - near:
            shared = len(grams[query] & found)
            if shared / (len(grams[query]) + len(found) - shared) >= threshold:
                near.add(query)
    return near


def trigrams(text: str) -> set[tuple[str, ...]]:
    """Return the word 3-grams of a folded text; a shorter text is one gram of its own."""
    words = text.split()
    return set(zip(words, words[1:], words[2:], strict=False)) or {tuple(words)}


def leak_report(splits: Splits, group_by: list[str], threshold: float = 0.8) -> dict[str, dict[str, int]]:
    """Return, for each held-out split against each earlier one, how many of its rows share what with the other."""
    pairs = (("validation", "train"), ("test", "train"), ("test", "validation"))
    parts = vars(splits)
    return {f"{one}_in_{two}": leak_counts(parts[one], parts[two], group_by, threshold) for one, two in pairs}


def leak_counts(rows: list[Row], earlier: list[Row], group_by: list[str], threshold: float) -> dict[str, int]:
    """Return how many of `rows` share a column's value, the question, the exact or a near answer with `earlier`."""
    counts = {"rows": len(rows)}
    for column in [*group_by, *({"prompt"} - set(group_by))]:
        known = {value for row in earlier for value in row_values(row, [column])}
        counts[column] = sum(not known.isdisjoint(row_values(row, [column])) for row in rows)
    own, others = folded(rows, "completion"), folded(earlier, "completion")
    exact, near = set(others), find_near_texts(own, others, threshold)
    counts["exact_answer"] = sum(answer in exact for answer in own)
    counts["near_answer"] = sum(answer in near for answer in own)
    return counts


def random_split_leaks(
    rows: list[Row], group_by: list[str], share: float, seed: int, threshold: float = 0.8
) -> dict[str, int]:
    """Return `leak_report`'s counts for a test split of `share` of the rows drawn one by one: what grouping prevents."""
    ordered = sorted(rows, key=row_key)
    drawn = set(random.Random(seed).sample(range(len(ordered)), round(share * len(ordered))))
    test = [row for place, row in enumerate(ordered) if place in drawn]
    train = [row for place, row in enumerate(ordered) if place not in drawn]
    return leak_counts(test, train, group_by, threshold)


def split_fingerprint(splits: Splits) -> str:
    """Return a sha256 over which text is in which split; any moved, edited, added or dropped row changes it."""
    texts = ((name, row) for name, rows in vars(splits).items() for row in rows)
    lines = sorted(json.dumps([name, *row_key(row), row["prompt"], row["completion"]]) for name, row in texts)
    return sha256("\n".join(lines))
