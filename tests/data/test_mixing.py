"""Several sources in one set, and splits that an author made: one split over all, nothing held out is learned."""

import json
from pathlib import Path

import pytest
from datasets import Dataset

from medibot.data.prepared import Prepared, prepare
from medibot.errors import RecipeError
from medibot.recipe import load_recipe

HEAD = """\
model:
  pretrained_model_name_or_path: MODEL
training:
  max_length: 512
data:
"""
SOURCES = """\
  sources:
    - {path: qa.jsonl, prompt: question, completion: answer, clean: [drop_short]}
    - {path: chat.json, name: talk, messages: conversations, system: Chat.}
  group_by: [topic]
  system: Be careful.
  validation: 0.2
  test: 0.2
"""
OWN = """\
  path: qa.jsonl
  prompt: question
  completion: answer
  group_by: [topic]
"""


def qa(start: int, end: int, kind: str = "sickness") -> list[dict]:
    return [
        {
            "topic": f"{kind} {n}",
            "question": f"What is {kind} number {n}?",
            "answer": f"{kind} {n} has the signs {n + 1}, {n + 2} and {n + 3}, of which each is seldom.",
        }
        for n in range(start, end)
    ]


def talks(count: int) -> list[dict]:
    def talk(n: int) -> list[dict]:
        texts = [
            f"Tell me of town {n}.",
            f"Town {n} lies by river {n}.",
            "And its bridge?",
            f"Bridge {n} is of stone {n}.",
        ]
        return [{"from": ("human", "gpt")[at % 2], "value": text} for at, text in enumerate(texts)]

    return [{"topic": f"town {n}", "conversations": talk(n)} for n in range(count)]


def write(name: str, rows: list[dict]) -> None:
    Path(name).parent.mkdir(exist_ok=True)
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def prepared_of(workplace, make_model, make_tokenizer):
    """prepared_of(section, *overrides): the conversations of a recipe with that data section."""
    write("qa.jsonl", [*qa(0, 60), {"topic": "x", "question": "Why?", "answer": "So."}])
    Path("chat.json").write_text(json.dumps(talks(40)))

    def make(section: str, *overrides: str) -> Prepared:
        Path("mine.yaml").write_text(HEAD.replace("MODEL", str(make_model())) + section)
        return prepare(load_recipe("mine.yaml", overrides), make_tokenizer("smollm2"), lambda _: None)

    return make


def rows_of(prepared: Prepared, split: str) -> list[dict]:
    found = prepared.load(split)
    return found.to_list() if found is not None else []


def line(prepared: Prepared, rule: str) -> dict:
    return next(line for line in prepared.ledger if line["rule"] == rule)


def test_sources_are_split_together_and_each_row_knows_its_source(prepared_of):
    prepared = prepared_of(SOURCES)
    topics = {}
    for split in ("train", "validation", "test"):
        rows = rows_of(prepared, split)
        assert {row["source"] for row in rows} == {"qa", "talk"}, split
        topics[split] = {row["topic"] for row in rows}
        for row in rows:
            assert row["prompt"][0]["content"] == {"qa": "Be careful.", "talk": "Chat."}[row["source"]]
    assert sum(map(len, topics.values())) == len(set.union(*topics.values())) == 100
    for pair in ("validation_in_train", "test_in_train", "test_in_validation"):
        assert prepared.leaks[pair]["topic"] == prepared.leaks[pair]["near_answer"] == 0


def test_each_source_has_its_own_rules_and_ledger_lines(prepared_of):
    prepared = prepared_of(SOURCES)
    assert line(prepared, "qa: drop_short")["dropped"] == 1
    assert line(prepared, "talk: one row for each answer")["added"] == 40
    assert not [one for one in prepared.ledger if one["rule"] == "talk: drop_short"]
    prepared = prepared_of(SOURCES, "data.clean=[drop_duplicates]")
    assert line(prepared, "drop_duplicates")["rows_in"] == 60 + 80


def test_weights_decide_the_sources_parts_of_the_training_rows(prepared_of):
    section = SOURCES.replace("drop_short]}", "drop_short], weight: 3}").replace("Chat.}", "Chat., weight: 1}")
    prepared, whole = prepared_of(section), prepared_of(SOURCES)
    rows = rows_of(prepared, "train")
    share = sum(row["source"] == "qa" for row in rows) / len(rows)
    assert 0.6 < share < 0.9
    keys = [(row["source"], row["row"], row["part"]) for row in rows]
    assert len(set(keys)) == len(keys) and len(keys) < len(rows_of(whole, "train"))
    assert line(prepared, "weights of sources")["dropped"] == len(rows_of(whole, "train")) - len(rows)
    assert rows_of(prepared, "test") == rows_of(whole, "test")
    with pytest.raises(RecipeError, match=r"data.sources\[1\].weight: is required where another source has one"):
        prepared_of(SOURCES.replace("drop_short]}", "drop_short], weight: 3}"))


def test_equal_names_of_sources_are_told_apart(prepared_of):
    write("more/qa.jsonl", qa(60, 80))
    second = "    - {path: more/qa.jsonl, prompt: question, completion: answer}\n"
    prepared = prepared_of(SOURCES.replace("  group_by", second + "  group_by"))
    assert {row["source"] for row in rows_of(prepared, "train")} == {"qa", "talk", "qa+"}


def test_a_test_set_of_ones_own_is_not_split_and_what_leaks_into_training_goes(prepared_of):
    known = {
        "topic": "sickness 1",
        "question": "Another question on 1?",
        "answer": "An answer of other words than that.",
    }
    copied = {"topic": "new", "question": "Again?", "answer": qa(2, 3)[0]["answer"] + " Indeed."}
    write("held.jsonl", [*qa(60, 70), known, copied])
    prepared = prepared_of(OWN, "data.test={path: held.jsonl}", "data.validation=0")
    assert len(rows_of(prepared, "test")) == 12
    left = {row["topic"] for row in rows_of(prepared, "train")}
    assert "sickness 1" not in left and "sickness 2" not in left and "sickness 3" in left
    assert line(prepared, "splitting.known_in_test")["dropped"] == 2
    assert set(prepared.leaks["test_in_train"].values()) == {12, 0}
    assert {row["source"] for row in rows_of(prepared, "test")} == {"held/test"}


def test_a_held_out_set_may_have_columns_of_its_own_and_is_cleaned_like_the_rest(prepared_of):
    Path("held.json").write_text(json.dumps(talks(5)))
    write("dev.jsonl", [{"q": row["question"], "a": row["answer"]} for row in qa(70, 75)])
    settings = ["data.test={path: held.json, messages: conversations}", "data.clean=[drop_short]"]
    prepared = prepared_of(OWN, *settings, "data.validation={path: dev.jsonl, prompt: q, completion: a}")
    assert prepared.split["rows"] == {"train": 60, "validation": 5, "test": 10}
    assert line(prepared, "test: drop_short")["rows_in"] == 10


def test_splits_of_a_folder_or_of_a_saved_set_are_taken_as_they_are(prepared_of):
    for name, rows in (("train", qa(0, 20)), ("dev", qa(20, 24)), ("test", qa(24, 30))):
        write(f"set/{name}.jsonl", rows)
    held = ["data.validation={split: validation}", "data.test={split: test}"]
    prepared = prepared_of(OWN, "data.path=set", *held)
    assert prepared.split["rows"] == {"train": 20, "validation": 4, "test": 6}
    assert not [one for one in prepared.ledger if "not read: file" in one["rule"]]
    Dataset.from_list(qa(0, 20)).save_to_disk("saved/train")
    Dataset.from_list(qa(24, 30)).save_to_disk("saved/test")
    prepared = prepared_of(OWN, "data.path=saved/train", "data.test={path: saved/test}", "data.validation=0")
    assert prepared.split["rows"] == {"train": 20, "validation": 0, "test": 6}


def test_files_of_a_folder_of_splits_that_nothing_reads_are_said_and_never_learned(prepared_of):
    for name, rows in (("train_0", qa(0, 10)), ("Train-1", qa(10, 20)), ("test_0", qa(20, 24)), ("more", qa(24, 30))):
        write(f"set/{name}.jsonl", rows)
    prepared = prepared_of(OWN, "data.path=set", "data.validation=0", "data.test=0")
    assert prepared.split["rows"]["train"] == 20
    said = [one["rule"] for one in prepared.ledger if one["rule"].startswith("not read: file")]
    assert said == ["not read: file 'more.jsonl'", "not read: file 'test_0.jsonl'"]


def test_a_test_set_beside_a_share_for_validation_leaks_into_neither(prepared_of):
    write("held.jsonl", qa(0, 10))
    prepared = prepared_of(OWN, "data.test={path: held.jsonl}", "data.validation=0.3", "data.clean=[drop_short]")
    topics = {split: {row["topic"] for row in rows_of(prepared, split)} for split in ("train", "validation", "test")}
    assert (
        len(topics["test"]) == 10
        and topics["validation"]
        and not topics["test"] & (topics["train"] | topics["validation"])
    )


def test_the_fingerprint_follows_the_bytes_of_each_source(prepared_of):
    before = prepared_of(SOURCES).fingerprint
    Path("chat.json").write_text(json.dumps(talks(39)))
    assert prepared_of(SOURCES).fingerprint != before
