"""What a model thinks, parted from what it answers: whole, in pieces, and by every template that opens a trace."""

from collections.abc import Callable
from pathlib import Path

import pytest
import trl
from hypothesis import given
from hypothesis import strategies as st

from medibot.model.thinking import CLOSE, OPEN, opens_thinking, settled, split_thinking, stream_thinking


@pytest.mark.parametrize(
    ("text", "opened", "trace", "answer"),
    [
        ("<think>\nHm.\n\nYes.\n</think>\n\nGout.", False, "Hm.\n\nYes.", "Gout."),
        # Some models write the mark again that their prompt has written
        ("\n<think>\nHm.\n</think>\nGout.", True, "Hm.", "Gout."),
        ("Hm.\n</think>\n\nGout.", True, "Hm.", "Gout."),
        # White space inside, and the indentation of the first line, is the trace's own
        ("<think>\n  a\n\tb  \n</think>c", False, "  a\n\tb  ", "c"),
        # Cut by the limit
        ("<think>\nHm, and", False, "Hm, and", ""),
        ("Hm, and </thi", True, "Hm, and </thi", ""),
        # Switched off, or nothing to think about
        ("<think>\n\n</think>\n\nGout.", False, "", "Gout."),
        # Only the first trace is one
        ("<think>a</think>b <think>c</think>", False, "a", "b <think>c</think>"),
        # Text that speaks of the marks
        ("The mark <think> opens, </think> closes.", False, "", "The mark <think> opens, </think> closes."),
        ("</think> closes.", False, "", "</think> closes."),
        (" Gout. \n", False, "", " Gout. \n"),
        ("", False, "", ""),
        ("", True, "", ""),
    ],
)
def test_trace_and_answer_are_parted_at_the_marks(text: str, opened: bool, trace: str, answer: str) -> None:
    assert split_thinking(text, opened) == (trace, answer)


PIECES = st.lists(st.sampled_from(["<", "think", ">", "/", OPEN, CLOSE, "a", "</thin", " ", "\n", "b\n"]), max_size=14)


@given(PIECES, st.booleans())
def test_pieces_joined_are_what_the_whole_text_gives(pieces: list[str], opened: bool) -> None:
    found = list(stream_thinking(pieces, opened))
    assert all(any(parts) for parts in found)
    joined = tuple("".join(part) for part in zip(*found, strict=True)) or ("", "")
    assert joined == split_thinking("".join(pieces), opened)


def test_what_is_known_to_be_trace_or_answer_is_not_held_back() -> None:
    pieces = iter(["<thi", "nk>", "\nHm", ", yes", "\n</th", "ink>\n", "\nGo", "ut."])
    taken: list[str] = []
    found = [(trace, answer, len(taken)) for trace, answer in stream_thinking(taken.append(p) or p for p in pieces)]
    assert found == [("Hm", "", 3), (", yes", "", 4), ("", "Go", 7), ("", "ut.", 8)]
    # Without a trace, every piece as it comes
    assert list(stream_thinking(["Gout", " is < 3", " <b>"])) == [("", "Gout"), ("", " is < 3"), ("", " <b>")]
    assert settled("a <") == "a " and settled("a <x") == "a <x" and settled("a") == "a"


TEMPLATES = Path(trl.__file__).parent / "chat_templates"
OFF = {"enable_thinking": False}


@pytest.mark.parametrize(
    ("name", "template", "opens"),
    [
        ("qwen3", {}, False),
        # Its prompt holds a whole empty trace
        ("qwen3", OFF, False),
        ("qwen3_8", {}, True),
        ("qwen3_8", OFF, False),
        ("deepseek_r1_distill", {}, True),
        ("deepseek_r1_distill", OFF, True),
        ("nemotron_3_nano", {}, True),
        ("nemotron_3_nano", OFF, False),
        ("llama3_1", {}, False),
    ],
)
def test_a_prompt_opens_the_trace_only_where_it_ends_inside_it(
    make_tokenizer: Callable, name: str, template: dict[str, bool], opens: bool
) -> None:
    tokenizer = make_tokenizer("qwen")
    tokenizer.chat_template = (TEMPLATES / f"{name}.jinja").read_text()
    # As template_kwargs gives them
    assert opens_thinking(tokenizer, {"sanitize_control_tokens": True} | template) is opens


def test_marks_that_are_tokens_stand_in_decoded_text(make_tokenizer: Callable) -> None:
    tokenizer = make_tokenizer("qwen")
    tokenizer.add_tokens([OPEN, CLOSE])
    ids = tokenizer.encode("<think>\nHm.\n</think>\n\nGout.<|im_end|>")
    assert tokenizer.convert_tokens_to_ids(OPEN) in ids
    assert split_thinking(tokenizer.decode(ids, skip_special_tokens=True)) == ("Hm.", "Gout.")
