"""Split rows so that no topic is on two sides, and prove it.

Rows that share a value of a `group_by` column are one group, and a hash of the group's key names its split: no random
state, no dependence on the order of rows, and a row that is added later moves no other unless it ties two groups
together.
"""

import hashlib
import itertools
import json
import random

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from medibot.cleaning.ledger import LedgerLine
from medibot.data.near import NEAR, find_near
from medibot.data.rows import TEXTS, Places, Rows, hashes_of

# The places of the rows of train, validation and test, in the order of the source
Splits = dict[str, Places]


def sha256(text: str) -> str:
    """Return the sha256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()


def group_rows(rows: Rows, places: Places) -> np.ndarray:
    """Return a key of 32 bytes for each row; rows tied by a shared value in a `group_by` column have the same key.

    Values are compared by their words; lists hold several values; an empty value ties nothing, nor do equal values of
    two columns. Without `group_by`, rows with the same question are a group.
    """
    hashes, columns, _ = rows.distinct
    values, owners = rows.values_of(places)
    tying = columns[values] < rows.tying
    values, owners = values[tying], owners[tying]
    first = np.full(len(places), -1)
    first[owners[::-1]] = values[::-1]
    graph = coo_array((np.ones(len(values)), (first[owners], values)), shape=(len(hashes), len(hashes)))
    group_of = connected_components(graph, directed=False)[1]
    # The smallest hash among the values of the first column that the group has: more documents or questions on known
    # topics leave it as it is.
    present = np.unique(values)
    present = present[np.lexsort((present, columns[present]))]
    groups, smallest = np.unique(group_of[present], return_index=True)
    names = np.zeros(len(hashes), "S32")
    names[groups] = hashes[present[smallest]]
    return np.where(first < 0, hashes_of(rows.alone, 32)[places], names[group_of[first]])


def hexadecimal(hashed: bytes) -> str:
    """Return a hash as text; numpy cuts the zeros at its end."""
    return hashed.ljust(32, b"\0").hex()


def split_rows(rows: Rows, places: Places, groups: np.ndarray, validation: float, test: float, seed: int) -> Splits:
    """Assign whole groups to splits by a hash of seed and group key; `validation` and `test` are shares of groups."""
    places = rows.sort(places)
    keys, numbers = np.unique(groups[places], return_inverse=True)
    drawn = [int(sha256(f"{seed}:{hexadecimal(key)}")[:13], 16) / 16**13 for key in keys.tolist()]
    share = np.array(drawn)[numbers]
    held = {"validation": (test <= share) & (share < test + validation), "test": share < test}
    return {"train": places[share >= test + validation]} | {name: places[inside] for name, inside in held.items()}


def drop_leaks(rows: Rows, splits: Splits, threshold: float = NEAR) -> tuple[Splits, list[LedgerLine]]:
    """Drop validation and test rows that would measure memory instead of knowledge; train stays whole.

    These are answers equal or near to one of an earlier split, and second answers to a question of the same split.
    """
    train, validation, test = splits["train"], splits["validation"], splits["test"]
    near = near_answers(rows, np.append(validation, test), train, threshold)
    left = {"train": train, "validation": validation[~near[: len(validation)]]}
    known = near[len(validation) :] | near_answers(rows, test, left["validation"], threshold)
    left["test"] = test[~known]
    single = {name: found if name == "train" else first_questions(rows, found) for name, found in left.items()}
    parts = [np.concatenate(list(part.values())) for part in (splits, left, single)]
    names = ("splitting.near_answers", "splitting.second_answers")
    return single, [rows.dropped(name, *parts[place : place + 2]) for place, name in enumerate(names)]


def first_questions(rows: Rows, places: Places) -> Places:
    """Return the places of the first row of each question."""
    return places[np.sort(np.unique(hashes_of(rows.questions, 16)[places], return_index=True)[1])]


def near_answers(rows: Rows, places: Places, others: Places, threshold: float = NEAR) -> np.ndarray:
    """Return for each row whether its answer is equal or near to one of the others."""
    answers = hashes_of(rows.answers, 16)
    # Each answer is compared once
    _, first, numbers = np.unique(answers[places], return_index=True, return_inverse=True)
    order = np.argsort(places[first])
    distinct = np.unique(answers[others], return_index=True)[1]
    near = np.empty(len(first), dtype=bool)
    near[order] = find_near(rows.grams, places[first][order], np.sort(others[distinct]), threshold)
    return near[numbers]


def hold_out(rows: Rows, splits: Splits, name: str, held: Places) -> tuple[Splits, LedgerLine]:
    """Make the rows at `held`, which the author holds out, the split `name`; rows that share something with them go."""
    held = rows.sort(held)
    left = {other: drop_known(rows, found, held) for other, found in splits.items() if other != name}
    before, after = (np.concatenate([part[other] for other in left]) for part in (splits, left))
    return splits | left | {name: held}, rows.dropped(f"splitting.known_in_{name}", before, after)


def drop_known(rows: Rows, places: Places, held: Places, threshold: float = NEAR) -> Places:
    """Return the rows that share no value of a column, no question and no near answer with those `held` out by an author."""
    left = places[~share_values(rows, places, held).any(axis=0)]
    return left[~near_answers(rows, left, held, threshold)]


def share_values(rows: Rows, places: Places, others: Places) -> np.ndarray:
    """Return, for each compared column and each row, whether the row shares a value of it with one of the others."""
    values, owners = rows.values_of(places)
    shared = np.isin(values, rows.values_of(others)[0])
    found = np.zeros((len(rows.columns), len(places)), dtype=bool)
    found[rows.distinct[1][values[shared]], owners[shared]] = True
    return found


def leak_report(rows: Rows, splits: Splits) -> dict[str, dict[str, int]]:
    """Return, for each held-out split against each earlier one, how many of its rows share what with the other."""
    train, validation, test = splits["train"], splits["validation"], splits["test"]
    # One search in the training split, which is long
    shared = share_with(rows, np.append(validation, test), train)
    return {
        "validation_in_train": leak_counts({name: found[: len(validation)] for name, found in shared.items()}),
        "test_in_train": leak_counts({name: found[len(validation) :] for name, found in shared.items()}),
        "test_in_validation": leak_counts(share_with(rows, test, validation)),
    }


def share_with(rows: Rows, places: Places, others: Places) -> dict[str, np.ndarray]:
    """Return for each row whether it shares a column's value, the question, the exact or a near answer with the others."""
    answers = hashes_of(rows.answers, 16)
    return dict(zip(rows.columns, share_values(rows, places, others), strict=True)) | {
        "exact_answer": np.isin(answers[places], answers[others]),
        "near_answer": near_answers(rows, places, others),
    }


def leak_counts(shared: dict[str, np.ndarray]) -> dict[str, int]:
    """Return the number of rows, and how many of them share what."""
    return {"rows": len(shared["near_answer"])} | {name: int(found.sum()) for name, found in shared.items()}


def random_split_leaks(rows: Rows, places: Places, share: float, seed: int) -> dict[str, int]:
    """Return the leaks of a test split of `share` of the rows drawn one by one: what grouping prevents."""
    ordered = rows.sort(places)
    drawn = np.zeros(len(ordered), dtype=bool)
    drawn[random.Random(seed).sample(range(len(ordered)), round(share * len(ordered)))] = True
    return leak_counts(share_with(rows, ordered[drawn], ordered[~drawn]))


def split_fingerprint(rows: Rows, splits: Splits) -> str:
    """Return a sha256 over which text is in which split; any moved, edited, added or dropped row changes it."""
    # Sorted as if all of each text were there, of which only the beginning is kept
    keyed = sorted(
        (json.dumps([name, *key])[:-1], place)
        for name, places in splits.items()
        for place, key in zip(places.tolist(), rows.keys_of(places), strict=True)
    )
    places = np.array([place for _, place in keyed], dtype=np.int64)
    texts = itertools.chain.from_iterable(rows.read(places, [*TEXTS, "history"]))
    found, first = hashlib.sha256(), True
    for begin, same in itertools.groupby(zip(keyed, texts, strict=True), key=lambda pair: pair[0][0]):
        extra = ("system", "history", "thinking")
        for text in sorted(json.dumps([row["prompt"], row["completion"], *map(row.get, extra)]) for _, row in same):
            found.update(f"{'' if first else chr(10)}{begin}, {text[1:]}".encode())
            first = False
    return found.hexdigest()
