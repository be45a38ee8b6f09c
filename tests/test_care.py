"""What is said before an answer: the rules see who is in danger now, and not who asks, remembers or jokes."""

import pytest
from conftest import ROOT
from test_evaluate import trained  # noqa: F401 - the fixture

from medibot import care, chat

LINES = [line for line in (ROOT / "tests" / "emergencies.txt").read_text().splitlines() if line[:2] in {"+ ", "- "}]
URGENT = [line[2:] for line in LINES if line[0] == "+"]
OTHER = [line[2:] for line in LINES if line[0] == "-"]


def test_the_table_is_large_and_repeats_nothing():
    assert len(URGENT) >= 120 <= len(OTHER) and len(set(LINES)) == len(LINES) and not set(URGENT) & set(OTHER)


@pytest.mark.parametrize("message", URGENT)
def test_emergency_is_seen(message):
    assert care.emergency_notice(message) in {care.EMERGENCY, care.CRISIS}


@pytest.mark.parametrize("message", OTHER)
def test_what_is_no_emergency_is_left_alone(message):
    assert care.emergency_notice(message) is None


@pytest.mark.parametrize(
    "change", [str.upper, lambda m: m.replace("'", "\u2019"), lambda m: f"  {m}\n\n", lambda m: f"Hello. {m}"]
)
def test_case_quotes_and_space_hide_no_emergency(change):
    assert [message for message in URGENT if care.danger(change(message)) is None] == []


def test_whoever_may_harm_themselves_is_told_whom_to_talk_to():
    assert care.emergency_notice("I want to kill myself") == care.CRISIS and "988" in care.CRISIS
    assert care.emergency_notice("I can't breathe") == care.EMERGENCY and "112" in care.EMERGENCY


def test_the_notice_stands_before_the_answers_unless_the_recipe_says_no(trained, capsys):  # noqa: F811
    trained("mine", "quantization=null")
    trained("quiet", "quantization=null", "evaluation.emergency_notice=false")
    capsys.readouterr()
    chat.ask_both("mine", "My dad has chest pain right now", 2)
    said = capsys.readouterr().out
    assert 0 < said.index(care.EMERGENCY) < said.index("[base]")
    chat.ask_both("mine", "What causes chest pain?", 2)
    chat.ask_both("quiet", "My dad has chest pain right now", 2)
    assert care.EMERGENCY not in capsys.readouterr().out
