"""Scores against their oracles, and intervals that hold what they promise."""

import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu import sentence_chrf

from medibot.evaluation import statistics
from medibot.evaluation.metrics import METRICS, doses, numbers, repetition, score_answer
from medibot.evaluation.statistics import compare_scores, tails


def rouge_of(answer: str, reference: str) -> float:
    return score_answer(answer, reference)["rouge_l"]


ROUGE = RougeScorer(["rougeL"], use_stemmer=False)
WORDS = st.lists(st.sampled_from(["a", "b", "The", "fever,", "10", "Crohn's", "é", ""]), max_size=30).map(" ".join)


@settings(max_examples=300, deadline=None)
@given(WORDS, WORDS)
def test_rouge_l_is_that_of_rouge_score(answer, reference):
    assert score_answer(answer, reference)["rouge_l"] == pytest.approx(
        ROUGE.score(reference, answer)["rougeL"].fmeasure
    )


def test_rouge_l_of_real_sentences_is_that_of_rouge_score():
    a = "Anemia is a condition in which the blood carries too little oxygen. It can make you tired; see a doctor."
    b = "In anemia, your blood does not carry enough oxygen, so you may feel tired or weak."
    assert rouge_of(a, b) == pytest.approx(ROUGE.score(b, a)["rougeL"].fmeasure) and 0 < rouge_of(a, b) < 1


def test_chrf_is_that_of_sacrebleu_and_is_named_by_its_signature():
    a, b = "the blood carries oxygen", "blood carries too little oxygen"
    assert score_answer(a, b)["chrf"] == pytest.approx(sentence_chrf(a, [b], word_order=2).score)
    (definition,) = (metric.definition for metric in METRICS if metric.name == "chrf")
    assert "nw:2" in definition and "version:" in definition


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", 0.0),
        ("one two three four", 0.0),
        ("one two three four five", 0.0),
        ("a a a a a a", 2 / 3),
        ("Rest and drink water. Rest and drink water.", 1 / 5),
    ],
)
def test_repetition_is_the_share_of_four_grams_that_stood_before(text, expected):
    assert repetition(text) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1,000 of 1000", {1000.0}),
        ("2.50 and 2.5", {2.5}),
        ("1. Rest\n2) Drink\n10. Call", set()),
        ("vitamin B12 and COVID-19", set()),
        ("between 3 and 5 days.", {3.0, 5.0}),
        ("in 1998, 45% of them", {1998.0, 45.0}),
        ("no number", set()),
    ],
)
def test_numbers_of_a_text(text, expected):
    assert numbers(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("5mg, 5 mg and 5 milligrams", {(5.0, "mg")}),
        ("50 mg", {(50.0, "mg")}),
        ("10 mcg or 10 µg or 10 micrograms", {(10.0, "mcg")}),
        ("126 mg/dL", {(126.0, "mg/dl")}),
        ("1.5 mg/kg a day", {(1.5, "mg/kg")}),
        ("20 percent, 20%", {(20.0, "%")}),
        ("2 glasses, 3 meals, 4 years", set()),
        ("400 IU", {(400.0, "iu")}),
    ],
)
def test_doses_of_a_text(text, expected):
    assert doses(text) == expected


def test_a_dose_that_the_reference_lacks_is_counted():
    assert score_answer("Take 5 mg.", "Take 50 mg.")["foreign_doses"] == 1
    assert score_answer("Take 50 milligrams.", "Take 50 mg.")["foreign_doses"] == 0


def scores(count: int, seed: int, shift: float = 0.0) -> list[dict]:
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        tokens = draw.randint(20, 200)
        nll = tokens * (draw.gauss(2.0, 0.3) + shift)
        row = {"nll": nll, "tokens": tokens, "bits": nll / math.log(2), "bytes": tokens * 4, "correct": tokens // 2}
        answer = " ".join(draw.choices(["rest", "water", "5 mg", "doctor", "7"], k=draw.randint(0, 30)))
        rows.append(row | {"stopped": draw.random() < 0.5} | score_answer(answer, "Drink water and rest for 7 days."))
    return rows


GROUPS = [f"g{row // 3}" for row in range(120)]


def test_likelihood_is_weighted_by_tokens_whatever_the_order():
    a, b = scores(120, 1), scores(120, 2)
    found = compare_scores(a, b, GROUPS)["nll"]
    assert found["baseline"] == pytest.approx(sum(row["nll"] for row in a) / sum(row["tokens"] for row in a))
    assert found["difference"] == pytest.approx(found["value"] - found["baseline"])
    order = random.Random(0).sample(range(120), 120)
    mixed = compare_scores([a[i] for i in order], [b[i] for i in order], [GROUPS[i] for i in order])
    for key, value in found.items():
        assert mixed["nll"][key] == (pytest.approx(value) if isinstance(value, float) else value)


def test_constant_gain_is_better_and_turned_around_worse():
    a = scores(120, 1)
    b = [row | {"nll": row["nll"] - 0.1 * row["tokens"], "rouge_l": row["rouge_l"] + 0.1} for row in a]
    there, back = compare_scores(a, b, GROUPS), compare_scores(b, a, GROUPS)
    assert there["nll"]["difference"] == pytest.approx(-0.1) and there["nll"]["verdict"] == "better"
    assert there["rouge_l"]["verdict"] == "better" and there["chrf"]["verdict"] == "no evidence"
    assert back["nll"]["verdict"] == back["rouge_l"]["verdict"] == "worse"


def test_equal_scores_differ_by_exactly_nothing():
    a = scores(120, 1)
    for found in compare_scores(a, a, GROUPS).values():
        assert found["difference"] == found["low"] == found["high"] == 0.0 and found["verdict"] == "no evidence"


def test_one_group_gives_no_interval():
    found = compare_scores(scores(9, 1), scores(9, 2), ["only"] * 9)
    assert all(value["low"] is None and value["verdict"] == "no evidence" for value in found.values())


def test_length_is_compared_by_its_distance_from_the_references():
    a = [row | {"answer_words": 30, "reference_words": 10} for row in scores(120, 1)]
    b = [row | {"answer_words": 8} for row in a]
    found = compare_scores(a, b, GROUPS)["length_ratio"]
    assert found["baseline"] > 2.9 and found["value"] < 0.9 and found["verdict"] == "better"


def test_nothing_said_and_nothing_counted_stays_finite():
    empty = [row | {"answer_words": 0, "tokens": 0, "nll": 0.0} for row in scores(12, 1)]
    for found in compare_scores(empty, scores(12, 1), GROUPS[:12]).values():
        assert all(math.isfinite(value) for value in found.values() if isinstance(value, float))


@pytest.mark.parametrize(("groups", "t"), [(2, 12.706), (3, 4.303), (6, 2.571), (11, 2.228), (101, 1.984)])
def test_percentiles_are_widened_for_few_groups_by_students_t(groups, t):
    low, high = tails(groups)
    assert low == pytest.approx(statistics.norm.cdf(-math.sqrt(groups / (groups - 1)) * t), abs=2e-5)
    assert low + high == pytest.approx(1) and (low < 0.025 or groups > 1000)


def test_interval_covers_the_truth_95_times_in_100_and_only_if_groups_are_drawn_whole(monkeypatch):
    """1,000 data sets of 60 groups with 1 to 5 rows, a true difference of -0.1 nats a token, and an effect of the group."""
    monkeypatch.setattr(statistics, "RESAMPLES", 600)
    nll = METRICS[:1]
    generator = np.random.default_rng(7)
    covered, covered_alone, repeats = 0, 0, 1000
    for repeat in range(repeats):
        monkeypatch.setattr(statistics, "SEED", repeat)
        a, b, groups = [], [], []
        for group in range(60):
            effect = generator.normal(0.0, 0.2)
            for _ in range(generator.integers(1, 6)):
                tokens = int(generator.integers(20, 200))
                gain = 0.1 + effect + generator.normal(0.0, 0.1)
                a.append({"nll": 2.0 * tokens, "tokens": tokens})
                b.append({"nll": (2.0 - gain) * tokens, "tokens": tokens})
                groups.append(str(group))
        found = compare_scores(a, b, groups, nll)["nll"]
        covered += found["low"] <= -0.1 <= found["high"]
        alone = compare_scores(a, b, [str(row) for row in range(len(a))], nll)["nll"]
        covered_alone += alone["low"] <= -0.1 <= alone["high"]
    assert 0.93 <= covered / repeats <= 0.97, covered / repeats
    assert covered_alone / repeats < 0.90, covered_alone / repeats
