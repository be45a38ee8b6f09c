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

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from medibot.cleaning.ledger import LedgerLine, compare_rows, row_key
from medibot.cleaning.rules import Row, drop_repeated_questions, fold

# The rows of train, validation and test, each with its "group", in the order of the source
Splits = dict[str, list[Row]]
# Two answers are near with this Jaccard index of their word 3-grams
NEAR = 0.8


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
    # A row without a value is a group of its own, named after its text; a conversation's turns after how it opens
    texts = ([opening(row)] if "part" in row else [row["prompt"], row["completion"]] for row in rows)
    own = (sha256(json.dumps(text)) for text in texts)
    return [names[group_of[places[found[0]]]][1] if found else key for found, key in zip(values, own, strict=True)]


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


def sha256(text: str) -> str:
    """Return the sha256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()


def split_rows(rows: list[Row], group_by: list[str], validation: float, test: float, seed: int) -> Splits:
    """Assign whole groups to splits by a hash of seed and group key; `validation` and `test` are shares of groups."""
    parts: Splits = {"train": [], "validation": [], "test": []}
    for row, group in sorted(zip(rows, group_rows(rows, group_by), strict=True), key=lambda pair: row_key(pair[0])):
        place = int(sha256(f"{seed}:{group}")[:13], 16) / 16**13
        name = "test" if place < test else "validation" if place < test + validation else "train"
        parts[name].append({**row, "group": group})
    return parts


def drop_leaks(splits: Splits, threshold: float = NEAR) -> tuple[Splits, list[LedgerLine]]:
    """Drop validation and test rows that would measure memory instead of knowledge; train stays whole.

    These are answers equal or near to one of an earlier split, and second answers to a question of the same split.
    """
    distinct, known = {"train": splits["train"]}, [fold(row["completion"]) for row in splits["train"]]
    for name in ("validation", "test"):
        texts = [fold(row["completion"]) for row in splits[name]]
        near = find_near_texts(texts, known, threshold)
        distinct[name] = [row for row, text in zip(splits[name], texts, strict=True) if text not in near]
        known += [text for text in texts if text not in near]
    single = {name: rows if name == "train" else drop_repeated_questions(rows) for name, rows in distinct.items()}
    whole, left, last = (list(itertools.chain(*parts.values())) for parts in (splits, distinct, single))
    lines = [compare_rows("splitting.near_answers", whole, left), compare_rows("splitting.second_answers", left, last)]
    return single, lines


def find_near_texts(queries: Iterable[str], references: Iterable[str], threshold: float = NEAR) -> set[str]:
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


def hold_out(splits: Splits, name: str, rows: list[Row], group_by: list[str]) -> tuple[Splits, LedgerLine]:
    """Make `rows`, which the author holds out, the split `name`; rows of other splits that share something with them go."""
    held = [row | {"group": group} for row, group in zip(rows, group_rows(rows, group_by), strict=True)]
    held.sort(key=row_key)
    left = {other: drop_known(found, held, group_by) for other, found in splits.items() if other != name}
    before, after = (list(itertools.chain(*(part[other] for other in left))) for part in (splits, left))
    return splits | left | {name: held}, compare_rows(f"splitting.known_in_{name}", before, after)


def drop_known(rows: list[Row], held: list[Row], group_by: list[str], threshold: float = NEAR) -> list[Row]:
    """Return the rows that share no value of a column, no question and no near answer with those `held` out by an author."""
    columns = list(dict.fromkeys([*group_by, "prompt"]))
    known = {value for row in held for value in row_values(row, columns)}
    left = [row for row in rows if known.isdisjoint(row_values(row, columns))]
    texts = [fold(row["completion"]) for row in left]
    near = find_near_texts(texts, [fold(row["completion"]) for row in held], threshold)
    return [row for row, text in zip(left, texts, strict=True) if text not in near]


def leak_report(splits: Splits, group_by: list[str]) -> dict[str, dict[str, int]]:
    """Return, for each held-out split against each earlier one, how many of its rows share what with the other."""
    pairs = (("validation", "train"), ("test", "train"), ("test", "validation"))
    return {f"{one}_in_{two}": leak_counts(splits[one], splits[two], group_by) for one, two in pairs}


def leak_counts(rows: list[Row], earlier: list[Row], group_by: list[str]) -> dict[str, int]:
    """Return how many of `rows` share a column's value, the question, the exact or a near answer with `earlier`."""
    counts = {"rows": len(rows)}
    for column in dict.fromkeys([*group_by, "prompt"]):
        known = {value for row in earlier for value in row_values(row, [column])}
        counts[column] = sum(not known.isdisjoint(row_values(row, [column])) for row in rows)
    own, others = ([fold(row["completion"]) for row in part] for part in (rows, earlier))
    for key, known in (("exact_answer", set(others)), ("near_answer", find_near_texts(own, others))):
        counts[key] = sum(answer in known for answer in own)
    return counts


def random_split_leaks(rows: list[Row], group_by: list[str], share: float, seed: int) -> dict[str, int]:
    """Return `leak_counts` of a test split of `share` of the rows drawn one by one: what grouping prevents."""
    drawn = random.Random(seed).sample(sorted(rows, key=row_key), round(share * len(rows)))
    keys = {row_key(row) for row in drawn}
    return leak_counts(drawn, [row for row in rows if row_key(row) not in keys], group_by)


def split_fingerprint(splits: Splits) -> str:
    """Return a sha256 over which text is in which split; any moved, edited, added or dropped row changes it."""
    extra = ("system", "history", "thinking")
    texts = [
        [name, *row_key(row), row["prompt"], row["completion"], *map(row.get, extra)]
        for name, rows in splits.items()
        for row in rows
    ]
    return sha256("\n".join(sorted(map(json.dumps, texts))))
