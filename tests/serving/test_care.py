"""What is said before an answer: the rules see who is in danger now, and not who asks, remembers or jokes."""

import emergencies
import pytest

from medibot import care
from medibot.serving.assistant import ask_both

LINES = emergencies.lines("emergencies")
URGENT = [line[2:] for line in LINES if line[0] == "+"]


@pytest.mark.parametrize(
    ("table", "recall", "precision"), [("emergencies", 0.95, 0.985), ("emergencies-held-out", 0.85, 0.975)]
)
def test_the_rules_see_emergencies_and_leave_the_rest_alone(table, recall, precision):
    found = emergencies.figures(table)
    assert found.urgent >= 120 <= found.other
    assert found.recall >= recall and found.precision >= precision, found


def test_no_message_stands_twice():
    everything = [line for table in ("emergencies", "emergencies-held-out") for line in emergencies.lines(table)]
    assert len({line[2:] for line in everything}) == len(everything)


@pytest.mark.parametrize(
    "change", [str.upper, lambda m: m.replace("'", "\u2019"), lambda m: f"  {m}\n\n", lambda m: f"Hello. {m}"]
)
def test_case_quotes_and_space_hide_no_emergency(change):
    seen = [message for message in URGENT if care.danger(message)]
    assert [message for message in seen if care.danger(change(message)) is None] == []


def test_whoever_may_harm_themselves_is_told_whom_to_talk_to():
    assert care.emergency_notice("I want to kill myself") == care.CRISIS and "988" in care.CRISIS
    assert care.emergency_notice("I can't breathe") == care.EMERGENCY and "112" in care.EMERGENCY


def test_the_notice_stands_before_the_answers_unless_the_recipe_says_no(trained, capsys):  # noqa: F811
    trained("mine", "quantization=null")
    trained("quiet", "quantization=null", "evaluation.emergency_notice=false")
    capsys.readouterr()
    ask_both("mine", "My dad has chest pain right now", 2)
    said = capsys.readouterr().out
    assert 0 < said.index(care.EMERGENCY) < said.index("[base]")
    ask_both("mine", "What causes chest pain?", 2)
    ask_both("quiet", "My dad has chest pain right now", 2)
    assert care.EMERGENCY not in capsys.readouterr().out
