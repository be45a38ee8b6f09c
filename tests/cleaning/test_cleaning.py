import copy
import dataclasses
import json
import re

import pytest

from medibot.cleaning import NAMED_LISTS, RULES, Cleaning, describe_rules, rule_problem


def row(completion="Rest and drink plenty of water.", prompt="How is a cold treated?", index=0, **columns):
    return {"row": index, "prompt": prompt, "completion": completion, **columns}


def clean(rows, items):
    cleaning = Cleaning(items)
    return list(cleaning(rows)), cleaning.ledger()


def apply(rule, *rows, **settings):
    return clean(rows, [{rule: settings}])[0]


def rows_left(rule, *rows, **settings):
    return [left["row"] for left in apply(rule, *rows, **settings)]


def answer(rule, completion, **columns):
    return apply(rule, row(completion, **columns))[0]["completion"]


@pytest.mark.parametrize("missing", [None, "", "  \n", "null", "None", " NaN "])
def test_rows_without_an_answer_are_dropped(missing):
    assert rows_left("drop_unanswered", row(missing), row("None of them helps.", index=1)) == [1]


@pytest.mark.parametrize("missing", [None, "", " ? "])
def test_rows_without_a_question_are_dropped(missing):
    assert rows_left("drop_unasked", row(prompt=missing), row(index=1)) == [1]


def test_white_space_is_normalised_and_lines_and_paragraphs_are_kept():
    messy = " First\t line \r\n   - item\xa0 one\n   \n \n\n  Last line.  "
    assert answer("normalise_whitespace", messy) == "First line\n- item one\n\nLast line."
    assert apply("normalise_whitespace", row(prompt=" What \n is it? "))[0]["prompt"] == "What is it?"


def test_an_answer_that_only_repeats_the_question_is_dropped():
    echoes = [row("How might colds be treated?"), row("HOW is a cold treated", index=1)]
    honest = [row("Should you rest? Yes, for a day.", index=2), row("", index=3)]
    assert rows_left("drop_echoes", *echoes, *honest) == [2, 3]


def test_short_answers_are_dropped_at_the_limit():
    assert rows_left("drop_short", row("Four words are few."), row("Five words are quite enough.", index=1)) == [1]
    assert rows_left("drop_short", row("Four words are few."), min_words=4) == [0]


def test_long_answers_are_dropped_above_the_limit():
    assert rows_left("drop_longer_than", row("one two three"), row("one two", index=1), max_words=2) == [1]


def test_repetitive_answers_are_dropped():
    words = [f"word{number}" for number in range(39)]
    once, twice = " ".join(words), " ".join(words + words)
    quarter = " ".join([*words, *words[:20]])
    tenth = " ".join([*words, *words[:12]])
    assert rows_left("drop_repetitive", row(once), row(twice, index=1), row(tenth, index=2)) == [0, 2]
    assert rows_left("drop_repetitive", row(quarter)) == []
    assert rows_left("drop_repetitive", row(quarter), share=0.26) == [0]


def test_duplicates_need_the_same_question_and_the_same_answer():
    rows = [row(), row("Rest, and drink plenty of water", index=1), row("Wait.", index=2), row(prompt="Why?", index=3)]
    assert rows_left("drop_duplicates", *rows) == [0, 2, 3]


def test_the_first_answer_to_a_question_is_kept_in_each_source():
    rows = [row(index=0, source="A"), row("Wait.", index=1, source="A"), row("Sleep.", index=2, source="B")]
    assert rows_left("drop_repeated_questions", *rows) == [0]
    assert rows_left("drop_repeated_questions", *rows, per="source") == [0, 2]


def test_an_answer_is_kept_three_times():
    rows = [row(prompt=f"What is topic {index}?", index=index) for index in range(5)]
    assert rows_left("limit_repeated_answers", *rows) == [0, 1, 2]
    assert rows_left("limit_repeated_answers", *rows, copies=1) == [0]


AWKWARD = [
    row(None, prompt=None, index=0),
    row("", prompt="", index=1),
    row("What is gout? Gout is a kind of arthritis.", "What is (are) Gout ?", 2, document_source="GARD"),
    row("Summary : You can\n   - rest   - drink    Visit our page.", "How to prevent Colds ?", 3, umls_cui="C1|C2"),
    row("Dont smoke. Click here.  Food and Drug Administration", "Is it ?", 4, document_source="MPlusHealthTopics"),
    row("One of - rest - sleep rest sleep Good.", "Who is at risk for ? ?", 5, document_source="NIHSeniorHealth"),
]


@pytest.mark.parametrize("rule", RULES)
def test_rules_leave_their_input_alone_and_repeat_themselves(rule):
    settings = {"max_words": 4} if rule == "drop_longer_than" else {}
    rows = copy.deepcopy(AWKWARD)
    first = clean(rows, [{rule: settings}])[0]
    assert rows == AWKWARD
    assert clean(rows, [{rule: settings}])[0] == first


@pytest.mark.parametrize("rule", RULES)
def test_rules_can_be_named_in_a_recipe_and_keep_the_order_of_rows(rule):
    item = {rule: {"max_words": 4}} if rule == "drop_longer_than" else rule
    assert rule_problem(item) is None
    left, _ = clean(AWKWARD, [item])
    assert [kept["row"] for kept in left] == sorted(kept["row"] for kept in left)


def test_the_ledger_counts_each_rule_and_adds_up():
    rows = [row(None), row("  Rest  and drink plenty of water.", index=1), row(index=2)]
    left, ledger = clean(rows, ["drop_unanswered", "normalise_whitespace", {"drop_duplicates": None}])
    assert [(line.rule, line.rows_in, line.dropped, line.changed, line.added, line.rows_out) for line in ledger] == [
        ("drop_unanswered", 3, 1, 0, 0, 2),
        ("normalise_whitespace", 2, 0, 1, 0, 2),
        ("drop_duplicates", 2, 1, 0, 0, 1),
    ]
    assert [kept["row"] for kept in left] == [1]
    json.dumps([dataclasses.asdict(line) for line in ledger])


def test_the_ledger_counts_the_parts_a_rule_makes_of_one_row(tmp_path):
    (tmp_path / "mine.py").write_text(
        "def halves(rows):\n"
        "    return [{**one, 'completion': text, 'part': part} for one in rows for part, text in enumerate('ab')]\n"
    )
    cleaning = Cleaning(["mine:halves"], tmp_path)
    assert len(list(cleaning([row("ab"), row("ab", index=1)]))) == 4
    (line,) = cleaning.ledger()
    assert (line.dropped, line.changed, line.added, line.rows_out) == (0, 2, 2, 4)


def test_rows_stream_through_the_rules_one_by_one():
    taken = []

    def source():
        for index in range(100):
            taken.append(index)
            yield row(f"{index} rest and drink plenty of water.", index=index)

    stream = Cleaning(["drop_unanswered", "drop_duplicates", {"limit_repeated_answers": {"copies": 1}}])(source())
    assert next(stream)["row"] == 0
    assert taken == [0]


def test_examples_show_before_and_after_where_the_text_differs():
    long = "A sentence that stays. " * 60
    _, (cut, dropped) = clean(
        [row(long + "See   this.")], ["normalise_whitespace", {"drop_longer_than": {"max_words": 3}}]
    )
    change = cut.examples[0]["completion"]
    assert change["before"].endswith("See   this.") and change["after"].endswith("See this.")
    assert len(change["before"]) < 500
    assert dropped.examples[0]["completion"]["after"] is None
    assert dropped.examples[0]["row"] == 0


def test_examples_are_at_most_three_and_spread_over_the_rows():
    _, (line,) = clean([row(None, index=index) for index in range(9)], ["drop_unanswered"])
    assert [shown["row"] for shown in line.examples] == [0, 3, 8]


@pytest.mark.parametrize(
    ("item", "problem"),
    [
        ("drop_unanwsered", "no such rule: drop_unanwsered (did you mean drop_unanswered?)"),
        ("medquad.cut_summary", "did you mean medquad.cut_summary_prefix?"),
        (
            {"drop_short": {"min_word": 5}},
            "drop_short: got an unexpected keyword argument 'min_word' (did you mean min_words? it has min_words: int = 5)",
        ),
        ({"drop_short": {"min_words": "5"}}, "drop_short: min_words must be int, not '5'"),
        ({"drop_short": {"min_words": True}}, "drop_short: min_words must be int, not True"),
        ({"drop_repetitive": {"share": "all"}}, "drop_repetitive: share must be float, not 'all'"),
        ({"drop_short": 5}, "drop_short: settings are written {setting: value}, not 5"),
        ({"drop_short": {}, "drop_echoes": {}}, "a rule with settings has one key"),
        ("drop_longer_than", "drop_longer_than: missing a required argument: 'max_words' (it has max_words: int)"),
        (5, "a rule is a name or {name: {setting: value}}, not 5"),
        ({}, "a rule with settings has one key"),
    ],
)
def test_a_wrong_entry_is_explained_in_one_line(item, problem):
    found = rule_problem(item)
    assert problem in found
    assert "\n" not in found
    with pytest.raises(ValueError, match=re.escape(found)):
        clean([], [item])


@pytest.mark.parametrize(
    "item",
    ["drop_short", {"drop_short": None}, {"drop_repetitive": {"share": 1}}, {"drop_repeated_questions": {"per": None}}],
)
def test_a_right_entry_has_no_problem(item):
    assert rule_problem(item) is None


def test_a_named_list_does_what_its_rules_written_out_do():
    rows = [
        row(f"Anemia number {at} is a lack of red cells in the blood.", f"What is (are) Anemia {at} ?")
        for at in range(9)
    ]
    rows += [
        row("", "What is gout?"),
        row("Summary : It is a disease of the joints and hurts.", "What is (are) Gout ?"),
    ]
    named, long = clean(list(rows), ["medquad"]), clean(list(rows), NAMED_LISTS["medquad"])
    assert named == long and len(named[1]) == len(NAMED_LISTS["medquad"]) and len(named[0]) < len(rows)


def test_rules_are_described_in_a_line_each():
    assert [name for name, _ in describe_rules()][: len(RULES)] == list(RULES)
    assert [name for name, _ in describe_rules("medquad")] == [
        item if isinstance(item, str) else next(iter(item)) for item in NAMED_LISTS["medquad"]
    ]
    assert all(purpose.endswith(".") for _, purpose in describe_rules("medquad"))
    ((_, said),) = describe_rules("medqaud")
    assert "medquad" in said
