import contextlib
import hashlib
import json
import os
import random
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medibot.cleaning import NAMED_LISTS, Cleaning
from medibot.cleaning.rules import fold
from medibot.data import splitting
from medibot.data.near import NEAR, find_near_texts
from medibot.data.rows import Rows

COLUMNS = ["topic", "document", "prompt"]
MEDQUAD = Path(
    os.environ.get("MEDQUAD_PARQUET", Path(__file__).parents[3] / "shared" / "medquad" / "medquad-dev.parquet")
)
MEDQUAD_COLUMNS = ["question_focus", "document_url", "prompt", "umls_cui"]


def row(index, prompt="What is it?", completion="It is a disease.", **columns):
    return {"row": index, "prompt": prompt, "completion": completion, **columns}


def rows_of(topics, per_topic=3):
    return [
        row(place, f"What is {topic} {place}?", f"Answer number {place}.", topic=topic, document=f"d{topic}")
        for place, topic in enumerate(topics * per_topic)
    ]


def splits_of(train, validation, test):
    return {"train": train, "validation": validation, "test": test}


def split_of(splits):
    return {kept["row"]: name for name, rows in splits.items() for kept in rows}


@contextlib.contextmanager
def kept(parts, columns=()):
    """Yield the rows of several lists, kept on disk, and the places of each list's."""
    with tempfile.TemporaryDirectory() as folder:
        rows, places, start = Rows(Path(folder), list(columns)), [], 0
        for part in parts:
            for added in part:
                rows.add({"tokens": 1} | added)
            places.append(np.arange(start, len(rows)))
            start = len(rows)
        rows.close()
        yield rows, places


def read(rows, splits):
    without = ("tokens",)
    return {
        name: [
            {column: value for column, value in found.items() if column not in without}
            for batch in rows.read(places)
            for found in batch
        ]
        for name, places in splits.items()
    }


def group_rows(found, columns):
    with kept([found], columns) as (rows, (places,)):
        return splitting.group_rows(rows, places).tolist()


def split_rows(found, columns, validation, test, seed):
    with kept([found], columns) as (rows, (places,)):
        groups = splitting.group_rows(rows, places)
        splits = splitting.split_rows(rows, places, groups, validation, test, seed)
        named = read(rows, splits)
        for name, places in splits.items():
            named[name] = [one | {"group": key} for one, key in zip(named[name], groups[places].tolist(), strict=True)]
        return named


def with_splits(splits, columns, asked):
    with kept(splits.values(), columns) as (rows, places):
        return asked(rows, dict(zip(splits, places, strict=True)))


def drop_leaks(splits, threshold=NEAR):
    def asked(rows, places):
        left, lines = splitting.drop_leaks(rows, places, threshold)
        return read(rows, left), lines

    return with_splits(splits, [], asked)


def leak_report(splits, columns):
    return with_splits(splits, columns, splitting.leak_report)


def random_split_leaks(found, columns, share, seed):
    with kept([found], columns) as (rows, (places,)):
        return splitting.random_split_leaks(rows, places, share, seed)


def split_fingerprint(splits):
    return with_splits(splits, [], splitting.split_fingerprint)


def same_group(first, second, columns=("topic",)):
    keys = group_rows([row(0, "Why?", "Because.", **first), row(1, "How?", "Slowly.", **second)], list(columns))
    return keys[0] == keys[1]


@pytest.mark.parametrize("spelling", ["GOUT (acute)", " gout,  acute", "Gout-acute", "\uff27out acute"])
def test_values_that_differ_only_in_spelling_are_one_group(spelling):
    assert same_group({"topic": "Gout acute"}, {"topic": spelling})
    assert not same_group({"topic": "Gout"}, {"topic": spelling})


@pytest.mark.parametrize(
    "missing", [{}, {"topic": None}, {"topic": ""}, {"topic": " - "}, {"topic": []}, {"topic": [None]}]
)
def test_missing_values_tie_nothing(missing):
    assert not same_group(missing, missing)


def test_a_list_holds_several_values():
    assert same_group({"topic": ["C1", "C2"]}, {"topic": ["C2", "C3"]})
    assert same_group({"topic": ["C1", "C2"]}, {"topic": "c2"})
    assert not same_group({"topic": ["C1"]}, {"topic": ["C2"]})


def test_values_of_different_columns_tie_nothing():
    assert not same_group({"topic": "1"}, {"document": "1"}, ["topic", "document"])
    assert not same_group({"topic": "gout", "document": "a"}, {"topic": "a", "document": "gout"}, ["topic", "document"])


def test_ties_reach_through_a_chain_of_rows():
    chain = [row(place, f"Q{place}?", topic=[f"t{place}", f"t{place + 1}"]) for place in range(50)]
    assert len(set(group_rows(chain, ["topic"]))) == 1
    assert len(set(group_rows(chain[:20] + chain[21:], ["topic"]))) == 2


def test_without_columns_rows_with_one_question_are_a_group():
    first, second, third = group_rows([row(0, "Why?"), row(1, "why ?"), row(2, "How?")], [])
    assert first == second != third


def test_a_row_without_any_value_is_grouped_by_its_own_text():
    first, second, third = group_rows([row(0), row(1), row(2, completion="Another.")], ["topic"])
    assert first == second != third


def test_no_group_stands_in_two_splits():
    splits = split_rows(rows_of([f"t{number}" for number in range(200)]), COLUMNS, 0.2, 0.2, seed=1)
    groups = [{kept["group"] for kept in part} for part in (splits["train"], splits["validation"], splits["test"])]
    assert all(groups)
    assert sum(map(len, groups)) == len(set.union(*groups)) == 200


def test_the_shares_are_met_and_the_seed_moves_groups():
    rows = [row(number, f"What is topic {number}?", topic=f"topic {number}") for number in range(4000)]
    one, two = (split_rows(rows, ["topic"], 0.1, 0.2, seed) for seed in (1, 2))
    assert abs(len(one["validation"]) - 400) < 80
    assert abs(len(one["test"]) - 800) < 110
    assert split_of(one) != split_of(two)


def test_a_share_of_nothing_and_of_everything():
    rows = rows_of(["a", "b", "c"])
    assert len(split_rows(rows, COLUMNS, 0, 0, seed=0)["train"]) == 9
    assert len(split_rows(rows, COLUMNS, 0, 1, seed=0)["test"]) == 9


def test_the_split_does_not_depend_on_the_order_of_rows():
    rows = rows_of([f"t{number}" for number in range(60)])
    shuffled = random.Random(3).sample(rows, len(rows))
    assert split_rows(shuffled, COLUMNS, 0.2, 0.2, seed=0) == split_rows(rows, COLUMNS, 0.2, 0.2, seed=0)


def test_splitting_leaves_its_input_alone():
    rows = rows_of(["a", "b"])
    split_rows(rows, COLUMNS, 0.2, 0.2, seed=0)
    assert rows == rows_of(["a", "b"])


value = st.none() | st.sampled_from("abcdefgh")


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(value, value), min_size=1, max_size=12), st.data())
def test_groups_are_the_connected_components(pairs, data):
    rows = [row(place, f"Question {place}?", topic=one, document=two) for place, (one, two) in enumerate(pairs)]
    component = list(range(len(rows)))
    for _ in rows:  # the slow way: take over the smallest label of each tied row until nothing moves
        for here, (one, two) in enumerate(pairs):
            tied = [c for c, (a, b) in zip(component, pairs, strict=True) if (a and a == one) or (b and b == two)]
            component[here] = min([component[here], *tied])
    keys = group_rows(rows, ["topic", "document"])
    assert len(set(zip(keys, component, strict=True))) == len(set(keys)) == len(set(component))
    order = data.draw(st.permutations(range(len(rows))))
    assert group_rows([rows[place] for place in order], ["topic", "document"]) == [keys[place] for place in order]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abcdef"), st.sampled_from("uvwxyz")), min_size=1, max_size=15), st.data())
def test_rows_added_on_known_topics_move_nothing(pairs, data):
    rows = [row(place, f"Question {place}?", topic=one, document=two) for place, (one, two) in enumerate(pairs)]
    known = sorted({one for one, _ in pairs})
    topics = data.draw(st.lists(st.sampled_from([*known, "new topic"]), max_size=8))
    added = [
        row(100 + place, f"Added {place}?", topic=topic, document=f"new {place}") for place, topic in enumerate(topics)
    ]
    before = split_of(split_rows(rows, COLUMNS, 0.3, 0.3, seed=0))
    after = split_of(split_rows([*added, *rows], COLUMNS, 0.3, 0.3, seed=0))
    assert {index: after[index] for index in before} == before


def trigrams(text):
    words = text.split()
    return set(zip(words, words[1:], words[2:], strict=False)) or {tuple(words)}


def jaccard(one, two):
    return len(trigrams(one) & trigrams(two)) / len(trigrams(one) | trigrams(two))


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.text("abc ", min_size=1, max_size=40).map(fold), max_size=8),
    st.lists(st.text("abc ", min_size=1, max_size=40).map(fold), max_size=8),
    st.sampled_from([0.2, 0.6, 0.7, 0.8, 1.0]),
)
def test_near_texts_are_those_of_brute_force_on_tiny_vocabularies(queries, references, threshold):
    expected = {one for one in queries if any(jaccard(one, two) >= threshold for two in references)}
    assert find_near_texts(queries, references, threshold) == expected


@pytest.mark.parametrize("seed", range(10))
def test_near_texts_are_those_of_brute_force_on_edited_copies(seed):
    draw = random.Random(seed)
    words = [f"w{number}" for number in range(60)]
    references = [" ".join(draw.choices(words, k=draw.randint(3, 60))) for _ in range(40)]
    queries = []
    for text in references:
        copy = text.split()
        for _ in range(draw.randint(0, 4)):
            copy[draw.randrange(len(copy))] = draw.choice(words)
        queries.append(" ".join(copy))
    expected = {one for one in queries if any(jaccard(one, two) >= 0.8 for two in references)}
    assert find_near_texts(queries, references, 0.8) == expected
    assert 0 < len(expected) < len(queries)


def test_a_near_text_is_found_though_all_that_it_adds_is_rare():
    shared = " ".join(f"w{number}" for number in range(10))
    assert jaccard(f"a1 a2 {shared}", shared) == 0.8
    assert find_near_texts([f"a1 a2 {shared}"], [shared], 0.8) == {f"a1 a2 {shared}"}


def test_a_near_text_is_found_among_any_number_of_references():
    draw = random.Random(0)
    references = [" ".join(draw.choices([f"w{number}" for number in range(300)], k=30)) for _ in range(2300)]
    for place in (0, 999, 1000, 2299):
        near = f"{references[place]} more"
        assert find_near_texts([near, "another text"], iter(references), 0.8) == {near}


LONG = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen"


def test_answers_known_from_an_earlier_split_are_dropped():
    splits = splits_of(
        train=[row(0, "A?", LONG), row(1, "B?", "Rest.")],
        validation=[row(2, "C?", LONG.upper() + "!"), row(3, "D?", "Sleep well.")],
        test=[row(4, "E?", f"{LONG} seventeen"), row(5, "F?", "Sleep, well"), row(6, "G?", "Walk a lot.")],
    )
    kept, (near, second) = drop_leaks(splits)
    assert split_of(kept) == {0: "train", 1: "train", 3: "validation", 6: "test"}
    assert (near.rows_in, near.dropped, near.rows_out, second.dropped) == (7, 3, 4, 0)
    assert split_of(drop_leaks(splits, threshold=1.0)[0])[4] == "test"


def test_an_answer_that_validation_itself_lost_does_not_cost_test_a_row():
    splits = splits_of(
        train=[row(0, "A?", "a b c d e f g h i j")],
        validation=[row(1, "B?", "a b c d e f g h i k")],
        test=[row(2, "C?", "a b c x e f g h i k")],
    )
    assert split_of(drop_leaks(splits, threshold=0.7)[0]) == {0: "train", 2: "test"}


def test_second_answers_are_dropped_within_validation_and_test_but_not_in_train():
    splits = splits_of(
        train=[row(0, "A?", "Rest."), row(1, "a ?", "Sleep.")],
        validation=[row(2, "B?", "Walk."), row(3, "b", "Run.")],
        test=[row(4, "C?", "Eat."), row(5, "C?", "Drink."), row(6, "D?", "Swim.")],
    )
    kept, (near, second) = drop_leaks(splits)
    assert split_of(kept) == {0: "train", 1: "train", 2: "validation", 4: "test", 6: "test"}
    assert (near.dropped, second.dropped) == (0, 2)


def test_the_leak_report_counts_rows_that_share_something():
    splits = splits_of(
        train=[row(0, "A?", LONG, topic="gout", document="d1")],
        validation=[row(1, "a", "Rest.", topic="Gout!", document="d2")],
        test=[
            row(2, "B?", LONG, topic="Flu", document="d1"),
            row(3, "C?", f"{LONG} more", topic="gout", document="d2"),
            row(4, "D?", "Sleep.", topic=None, document=None),
        ],
    )
    report = leak_report(splits, ["topic", "document"])
    assert report == {
        "validation_in_train": {"rows": 1, "topic": 1, "document": 0, "prompt": 1, "exact_answer": 0, "near_answer": 0},
        "test_in_train": {"rows": 3, "topic": 1, "document": 1, "prompt": 0, "exact_answer": 1, "near_answer": 2},
        "test_in_validation": {"rows": 3, "topic": 1, "document": 1, "prompt": 0, "exact_answer": 0, "near_answer": 0},
    }


def test_a_random_split_leaks_what_groups_keep_together():
    rows = rows_of([f"t{number}" for number in range(100)])
    leaks = random_split_leaks(rows, ["topic"], 0.1, seed=0)
    assert leaks["rows"] == 30
    assert leaks["topic"] > 20
    assert leaks == random_split_leaks(rows[::-1], ["topic"], 0.1, seed=0)
    assert leak_report(split_rows(rows, ["topic"], 0.1, 0.1, seed=0), ["topic"])["test_in_train"]["topic"] == 0


def test_the_fingerprint_changes_with_split_and_text_only():
    first, second = row(0, "A?"), row(1, "B?")
    fingerprint = split_fingerprint(splits_of([first, second], [], []))
    assert split_fingerprint(splits_of([second, {**first, "topic": "gout"}], [], [])) == fingerprint
    assert split_fingerprint(splits_of([first], [second], [])) != fingerprint
    assert split_fingerprint(splits_of([first, {**second, "completion": "It is."}], [], [])) != fingerprint
    assert split_fingerprint(splits_of([first], [], [])) != fingerprint


@pytest.fixture(scope="module")
def cleaned():
    if not MEDQUAD.exists():
        pytest.skip(f"MedQuAD is not at {MEDQUAD}; set MEDQUAD_PARQUET to its path")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [
        {**source, "prompt": source["question"], "completion": source["answer"], "row": index}
        for index, source in enumerate(parquet.read_table(MEDQUAD).to_pylist())
    ]
    cleaning = Cleaning(NAMED_LISTS["medquad"])
    return list(cleaning(rows)), cleaning.ledger()


def test_medquad_shows_its_known_defects(cleaned):
    lines = {line.rule: line for line in cleaned[1]}
    assert (lines["drop_unanswered"].rows_in, lines["drop_unanswered"].dropped) == (46_636, 30_893)
    assert lines["drop_unanswered"].rows_out == 15_743
    known = {
        "drop_echoes": 16,
        "medquad.drop_link_lists": 1_047,
        "medquad.drop_page_dumps": 11,
        "medquad.drop_topicless_questions": 1,
        "medquad.cut_symptom_table": 1_889,
        "medquad.drop_damaged_quantities": 13,
    }
    assert {rule: lines[rule].dropped for rule in known} == known
    assert all(line.rows_in + line.added - line.dropped == line.rows_out for line in cleaned[1])
    assert all(line.dropped or line.changed for line in cleaned[1] if line.rule != "drop_unasked")


def test_cleaned_medquad_holds_none_of_its_boilerplate(cleaned):
    for text in (
        "Human Phenotype Ontology provides",
        "Key Points\n",
        "Summary :",
        "Press the Escape",
        "These resources address",
    ):
        assert not [kept["row"] for kept in cleaned[0] if text in kept["completion"]]
    assert not [kept["row"] for kept in cleaned[0] if "(are)" in kept["prompt"] or kept["prompt"].endswith(" ?")]


def test_no_split_of_medquad_leaks(cleaned):
    splits, _ = drop_leaks(split_rows(cleaned[0], MEDQUAD_COLUMNS, 0.05, 0.05, seed=0))
    sizes = [len(splits["train"]), len(splits["validation"]), len(splits["test"])]
    assert sizes[0] > 9_500 and min(sizes) > 350
    for pair in leak_report(splits, MEDQUAD_COLUMNS).values():
        assert {pair.pop(column) for column in list(pair) if column != "rows"} == {0}


def test_a_random_split_of_medquad_leaks(cleaned):
    leaks = random_split_leaks(cleaned[0], MEDQUAD_COLUMNS, 0.1, seed=0)
    assert leaks["question_focus"] > 0.8 * leaks["rows"]
    assert leaks["near_answer"] > leaks["exact_answer"] > 0


def test_a_fingerprint_does_not_depend_on_how_much_of_it_is_held_at_once():
    rows = [row(number, f"Q{number}?") for number in (10, 1, 101, 2)]
    rows += [row(7, "How?", part=part) for part in (10, 1, 2)] + [row(1, "An added one?"), row(3, source="b")]
    splits = splits_of(rows[:5], rows[5:], [])
    texts = [
        [
            name,
            one.get("source", ""),
            one["row"],
            one.get("part", 0),
            one["prompt"],
            one["completion"],
            None,
            None,
            None,
        ]
        for name, found in splits.items()
        for one in found
    ]
    whole = "\n".join(sorted(map(json.dumps, texts)))
    assert split_fingerprint(splits) == hashlib.sha256(whole.encode()).hexdigest()
