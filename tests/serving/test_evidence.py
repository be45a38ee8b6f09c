"""What counts as close is measured on the run's own data: known topics are told from unknown ones."""

import itertools
import json

import pytest

from medibot.data.prepared import prepare
from medibot.serving.evidence import Evidence, build_evidence

# Made-up diseases whose names share no part
NAMES = [
    a + b + c
    for a, b, c in itertools.product(("Bro", "Kli", "Wux"), ("man", "dof", "zeg", "tiv"), ("ia", "ose", "urp"))
]
ASKED = ("What is {}?", "What are the symptoms of {}?", "How is {} treated?", "Who gets {}?")


@pytest.fixture
def make_record(miniature, workplace):
    """make_record(validation, asked): the evidence of a run on rows that ask `asked` of each name."""

    def make(validation: float, asked: tuple[str, ...]) -> dict:
        rows = [
            {"question": text.format(name), "answer": f"Answer {number} about {name} in its own words.", "topic": name}
            for name in NAMES
            for number, text in enumerate(asked)
        ]
        (workplace / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        data = {"path": str(workplace / "rows.jsonl"), "prompt": "question", "completion": "answer", "clean": []}
        data |= {"group_by": ["topic"], "validation": validation, "test": 0.0}
        overrides = ["quantization=null", "training.eval_strategy=no", "training.load_best_model_at_end=false"]
        overrides += [f"data={json.dumps(data)}", "evaluation={evidence: {topic: topic}}"]
        recipe = miniature("quickstart", *overrides)
        return build_evidence(recipe, prepare(recipe))

    return make


@pytest.mark.parametrize("validation", [0.25, 0.0])
def test_the_threshold_is_measured_to_tell_known_topics_from_unknown_ones(make_record, validation):
    record = make_record(validation, ASKED)
    measured = record["measured"]
    assert measured["unseen_topics"] > 10 and measured["seen_topics"] > 10
    assert measured["unseen_below"] > 0.9 and measured["seen_close"] > 0.9
    evidence = Evidence(record["rows"], record["threshold"])
    known = record["rows"][0]["topic"]
    found = evidence.find([f"My aunt has {known}. Is that bad?"])
    assert found["close"] and {source["topic"] for source in found["sources"]} == {known}
    assert not evidence.find(["Where can I buy a bicycle?"])["close"]


def test_without_a_second_question_on_any_topic_most_unknown_ones_stay_below(make_record):
    record = make_record(0.25, ASKED[:1])
    measured = record["measured"]
    assert measured["seen_topics"] == 0 and measured["seen_close"] is None
    assert measured["unseen_topics"] > 5 and 0.5 < measured["unseen_below"] <= 0.9 and record["threshold"] < 1
