"""Split rows so that no topic is on two sides, and prove it.

Rows that share a value of a `group_by` column are one group, and a hash of the group's key names its split: no random
state, no dependence on the order of rows, and a row that is added later moves no other unless it ties two groups
together.
"""

import hashlib
import itertools
import json
import random
from collections.abc import Iterable, Sequence
from operator import itemgetter

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from medibot.cleaning.ledger import LedgerLine, compare_rows, row_key
from medibot.cleaning.rules import Row, drop_repeated_questions, fold

# The rows of train, validation and test, each with its "group", in the order of the source
Splits = dict[str, list[Row]]
# Two answers are near with this Jaccard index of their word 3-grams
NEAR = 0.8
# The last bits of a hash, by which a table says that it is in no query; and an odd number that tells words' places apart
LAST_BITS, ODD = np.uint64((1 << 25) - 1), np.uint64(0x9E3779B97F4A7C15)


def group_rows(rows: list[Row], group_by: list[str]) -> list[str]:
    """Return a key for each row; rows tied by a shared value in a `group_by` column have the same key.

    Values are compared by their words; lists hold several values; an empty value ties nothing, nor do equal values of
    two columns. Without `group_by`, rows with the same question are a group.
    """
    columns = group_by or ["prompt"]
    # Each value is kept once, and a row has its number
    places: dict[tuple[int, str], int] = {}
    values = [[places.setdefault(value, len(places)) for value in row_values(row, columns)] for row in rows]
    ties = [(first, other) for first, *others in filter(None, values) for other in others]
    graph = coo_array((np.ones(len(ties)), np.reshape(ties, (-1, 2)).T), shape=(len(places), len(places)))
    group_of = connected_components(graph, directed=False)[1]
    # The smallest hash among the values of the first column that the group has: more documents or questions on known
    # topics leave it as it is.
    names: dict[int, tuple[int, str]] = {}
    for (column, text), group in zip(places, group_of, strict=True):
        name = (column, sha256(f"{columns[column]}\0{text}"))
        names[group] = min(name, names.get(group, name))
    # A row without a value is a group of its own, named after its text; a conversation's turns after how it opens
    return [
        names[group_of[found[0]]][1]
        if found
        else sha256(json.dumps([opening(row)] if "part" in row else [row["prompt"], row["completion"]]))
        for row, found in zip(rows, values, strict=True)
    ]


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
    texts = {name: [folded_answer(row) for row in splits[name]] for name in ("validation", "test")}
    near = find_near_texts(itertools.chain(*texts.values()), map(folded_answer, splits["train"]), threshold)
    distinct = {"train": splits["train"]}
    for name, found in texts.items():
        distinct[name] = [row for row, text in zip(splits[name], found, strict=True) if text not in near]
        if name == "validation":
            near |= find_near_texts(texts["test"], map(folded_answer, distinct[name]), threshold)
    single = {name: rows if name == "train" else drop_repeated_questions(rows) for name, rows in distinct.items()}
    whole, left, last = (list(itertools.chain(*parts.values())) for parts in (splits, distinct, single))
    lines = [compare_rows("splitting.near_answers", whole, left), compare_rows("splitting.second_answers", left, last)]
    return single, lines


def folded_answer(row: Row) -> str:
    """Return a row's answer by its words."""
    return fold(row["completion"])


def find_near_texts(queries: Iterable[str], references: Iterable[str], threshold: float = NEAR) -> set[str]:
    """Return the folded texts of `queries` that equal a reference or have a word 3-gram Jaccard of `threshold` with one.

    Exact, by the prefix filter of Chaudhuri, Ganti and Kaushik (ICDE 2006): a near text shares at least
    ceil(threshold * n) of n 3-grams, and so at least one of any n - ceil(threshold * n) + 1 of them. References are read
    once and none is kept.
    """
    texts, rest = list(dict.fromkeys(queries)), iter(references)
    asked, near = set(texts), set()
    flat, starts = hash_trigrams(texts)
    grams = [np.unique(flat[start:end]) for start, end in itertools.pairwise(starts)]
    index, of_text = index_rare(grams, threshold)
    # Most 3-grams of most references are in no query
    known = np.zeros(int(LAST_BITS) + 1, dtype=bool)
    known[index & LAST_BITS] = True
    while batch := list(itertools.islice(rest, 1000)):
        near |= asked.intersection(batch)
        flat, starts = hash_trigrams(batch)
        places = np.flatnonzero(known[flat & LAST_BITS])
        first, last = (np.searchsorted(index, flat[places], side) for side in ("left", "right"))
        owners = np.searchsorted(starts, places, "right") - 1
        found = (owners[first < last].tolist(), first[first < last].tolist(), last[first < last].tolist())
        pairs = {(owner, text) for owner, low, high in zip(*found, strict=True) for text in of_text[low:high].tolist()}
        for owner, candidates in itertools.groupby(sorted(pairs), key=lambda pair: pair[0]):
            own = np.unique(flat[starts[owner] : starts[owner + 1]])
            for _, text in candidates:
                if texts[text] not in near and are_near(grams[text], own, threshold):
                    near.add(texts[text])
    return near


def are_near(one: np.ndarray, two: np.ndarray, threshold: float) -> bool:
    """Tell whether two sorted sets have a Jaccard index of `threshold`."""
    if min(len(one), len(two)) < threshold * max(len(one), len(two)) - 1e-9:
        return False
    shared = len(np.intersect1d(one, two, assume_unique=True))
    return shared / (len(one) + len(two) - shared) >= threshold


def hash_trigrams(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return the word 3-grams of folded texts in one array, and where each text's begin; a shorter text is one of its own.

    A 3-gram is 64 bits of hash: that any two of a billion are mistaken for each other has a chance of 3 %, that this
    decides about a text none worth a thought.
    """
    words = [text.split() for text in texts]
    words = [found if len(found) > 2 else [*found, "", "", ""][:3] for found in words]
    ends = np.cumsum([len(found) for found in words], dtype=np.int64)
    hashes = np.fromiter(map(hash, itertools.chain.from_iterable(words)), np.int64).view(np.uint64)
    # What begins at the last two words of a text would reach into the next
    within = np.ones(len(hashes), dtype=bool)
    within[ends - 1] = within[ends - 2] = False
    grams = (hashes[:-2] * ODD + hashes[1:-1]) * ODD + hashes[2:]
    return grams[within[:-2]], np.concatenate([[0], ends - 2 * np.arange(1, len(ends) + 1)])


def index_rare(grams: list[np.ndarray], threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the 3-grams by which a text is found, sorted, and the number of the text beside each."""
    sizes = np.array([len(found) for found in grams], dtype=np.int64)
    flat, owners = np.concatenate([np.empty(0, np.uint64), *grams]), np.repeat(np.arange(len(grams)), sizes)
    _, inverse, counts = np.unique(flat, return_inverse=True, return_counts=True)
    # The rarest ones: boilerplate would make every text a candidate. The 3-gram itself settles ties.
    order = np.lexsort((inverse, counts[inverse], owners))
    rank = np.arange(len(flat)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    # The margin keeps 0.7 * 10 = 7.000000000000001 from asking for eight.
    needed = sizes - np.ceil(threshold * sizes - 1e-9).astype(np.int64) + 1
    rare = order[rank < np.repeat(needed, sizes)]
    rare = rare[np.argsort(inverse[rare])]
    return flat[rare], owners[rare]


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
    texts = [folded_answer(row) for row in left]
    near = find_near_texts(texts, map(folded_answer, held), threshold)
    return [row for row, text in zip(left, texts, strict=True) if text not in near]


def leak_report(splits: Splits, group_by: list[str]) -> dict[str, dict[str, int]]:
    """Return, for each held-out split against each earlier one, how many of its rows share what with the other."""
    validation, test = splits["validation"], splits["test"]
    one, two = leak_counts([validation, test], splits["train"], group_by)
    (three,) = leak_counts([test], validation, group_by)
    return {"validation_in_train": one, "test_in_train": two, "test_in_validation": three}


def leak_counts(parts: list[list[Row]], earlier: list[Row], group_by: list[str]) -> list[dict[str, int]]:
    """Return how many rows of each part share a column's value, the question, the exact or a near answer with `earlier`."""
    counts = [{"rows": len(rows)} for rows in parts]
    for column in dict.fromkeys([*group_by, "prompt"]):
        own = [[row_values(row, [column]) for row in rows] for rows in parts]
        known = set(itertools.chain.from_iterable(itertools.chain(*own)))
        known.intersection_update(value for row in earlier for value in row_values(row, [column]))
        for count, values in zip(counts, own, strict=True):
            count[column] = sum(not known.isdisjoint(found) for found in values)
    answers = [[folded_answer(row) for row in rows] for rows in parts]
    asked = set(itertools.chain(*answers))
    exact = asked.intersection(map(folded_answer, earlier))
    for key, known in (("exact_answer", exact), ("near_answer", find_near_texts(asked, map(folded_answer, earlier)))):
        for count, texts in zip(counts, answers, strict=True):
            count[key] = sum(text in known for text in texts)
    return counts


def random_split_leaks(rows: list[Row], group_by: list[str], share: float, seed: int) -> dict[str, int]:
    """Return `leak_counts` of a test split of `share` of the rows drawn one by one: what grouping prevents."""
    ordered = sorted(rows, key=row_key)
    places = random.Random(seed).sample(range(len(rows)), round(share * len(rows)))
    drawn = [ordered[place] for place in places]
    # What is drawn is taken out
    for place in places:
        ordered[place] = {}
    return leak_counts([drawn], list(filter(None, ordered)), group_by)[0]


def split_fingerprint(splits: Splits) -> str:
    """Return a sha256 over which text is in which split; any moved, edited, added or dropped row changes it."""
    extra = ("system", "history", "thinking")
    found, first = hashlib.sha256(), True
    # Sorted as if all of each text were there, of which only the beginning is kept
    keyed = sorted(
        ((json.dumps([name, *row_key(row)])[:-1], row) for name, rows in splits.items() for row in rows),
        key=itemgetter(0),
    )
    for begin, same in itertools.groupby(keyed, key=itemgetter(0)):
        for text in sorted(json.dumps([row["prompt"], row["completion"], *map(row.get, extra)]) for _, row in same):
            found.update(f"{'' if first else chr(10)}{begin}, {text[1:]}".encode())
            first = False
    return found.hexdigest()
