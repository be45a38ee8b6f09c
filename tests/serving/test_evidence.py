"""What counts as close is measured on the run's own data: known topics are told from unknown ones."""

import itertools
import json

import numpy as np
import pytest

from medibot.data.prepared import prepare
from medibot.serving.evidence import Evidence, build_evidence, choose_threshold

# Made-up diseases whose names share no part
NAMES = [
    a + b + c
    for a, b, c in itertools.product(("Bro", "Kli", "Wux"), ("man", "dof", "zeg", "tiv"), ("ia", "ose", "urp"))
]
ASKED = ("What is {}?", "What are the symptoms of {}?", "How is {} treated?", "Who gets {}?")


@pytest.fixture(params=[0.25, 0.0], ids=["validation split", "no validation split"])
def record(request, miniature, workplace):
    rows = [
        {"question": text.format(name), "answer": f"Answer {number} about {name} in its own words.", "topic": name}
        for name in NAMES
        for number, text in enumerate(ASKED)
    ]
    (workplace / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"path": str(workplace / "rows.jsonl"), "prompt": "question", "completion": "answer", "clean": []}
    data |= {"group_by": ["topic"], "validation": request.param, "test": 0.0}
    overrides = ["quantization=null", "training.eval_strategy=no", "training.load_best_model_at_end=false"]
    overrides += [f"data={json.dumps(data)}", "evaluation={evidence: {topic: topic}}"]
    recipe = miniature("quickstart", *overrides)
    return build_evidence(recipe, prepare(recipe))


def test_the_threshold_is_measured_to_tell_known_topics_from_unknown_ones(record):
    measured = record["measured"]
    assert measured["unseen_topics"] > 10 and measured["seen_topics"] > 10
    assert measured["unseen_below"] > 0.9 and measured["seen_close"] > 0.9
    evidence = Evidence(record["rows"], record["threshold"])
    known = record["rows"][0]["topic"]
    found = evidence.find([f"My aunt has {known}. Is that bad?"])
    assert found["close"] and {source["topic"] for source in found["sources"]} == {known}
    assert not evidence.find(["Where can I buy a bicycle?"])["close"]


def test_the_threshold_lies_between_what_was_trained_on_and_what_was_not():
    unseen, seen = np.array([0.1, 0.2, 0.3, 0.4]), np.array([0.7, 0.8, 0.9, 1.0])
    assert choose_threshold(unseen, seen) == 0.7
    # One of them alone: what 9 of 10 unknown questions stay below; with nothing known, only a whole topic is close
    assert choose_threshold(unseen, np.array([])) == pytest.approx(0.37)
    assert choose_threshold(np.array([]), seen) == 1.0
