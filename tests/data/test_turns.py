"""Shapes of a user's own data: templates over columns, conversations in each spelling, thinking; nothing goes unsaid."""

import datetime
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from medibot.data.columns import fill_template
from medibot.data.prepared import Prepared, prepare
from medibot.errors import RecipeError
from medibot.recipe import load_recipe

PAIR = "  prompt: question\n  completion: answer\n"
RECIPE = """\
model:
  pretrained_model_name_or_path: MODEL
data:
  path: rows.jsonl
SHAPE  validation: 0
  test: 0
training:
  max_length: 512
"""
QUESTIONS = ["What is gout?", "How long does it last?", "Can it come back?"]
ANSWERS = ["A swelling of joints.", "A week or two.", "It often does."]


@pytest.fixture
def prepared_of(workplace, make_model, make_tokenizer):
    """prepared_of(shape, rows, *overrides, family, file): a recipe's conversations."""

    def make(shape: str, rows: list[dict], *overrides: str, family: str = "smollm2", file: str = "rows.jsonl"):
        if file.endswith(".parquet"):
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
        else:
            Path(file).write_text("".join(json.dumps(row) + "\n" for row in rows))
        Path("mine.yaml").write_text(RECIPE.replace("MODEL", str(make_model())).replace("SHAPE", shape))
        recipe = load_recipe("mine.yaml", [f"data.path={file}", *overrides])
        return prepare(recipe, make_tokenizer(family), lambda _: None)

    return make


def pairs(prepared: Prepared, split: str = "train") -> list[tuple[str, str]]:
    return [(row["prompt"][-1]["content"], row["completion"][0]["content"]) for row in prepared.load(split)]


def line(prepared: Prepared, rule: str) -> dict:
    return next(line for line in prepared.ledger if line["rule"] == rule)


def rules(prepared: Prepared) -> list[str]:
    return [line["rule"] for line in prepared.ledger]


def openai(turns: int = 3, **first: str) -> list[dict]:
    chat = [{"role": "system", "content": text} for text in first.values()]
    for question, answer in zip(QUESTIONS[:turns], ANSWERS, strict=False):
        chat += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return chat


def sharegpt(turns: int = 3) -> list[dict]:
    names = {"user": "human", "assistant": "gpt"}
    return [{"from": names[message["role"]], "value": message["content"]} for message in openai(turns)]


# --- templates over columns -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "values", "text"),
    [
        ("{a}\n\n{b}", {"a": "one", "b": "two"}, "one\n\ntwo"),
        ("{a}\n\n{b}", {"a": "one", "b": ""}, "one"),
        ("{a}\n\n{b}", {"a": "", "b": "two"}, "two"),
        ("{a}\n\n{b}\n\n{c}", {"a": "one", "b": " ", "c": "three"}, "one\n\nthree"),
        ("Task: {a}\nInput: {b}", {"a": "one", "b": ""}, "Task: one"),
        ("{a} ({b})", {"a": "one", "b": ""}, "one ()"),
        ("Read:\n\n{a}", {"a": "one\n\n\n  two "}, "Read:\n\none\n\n\n  two "),
        ("{{{a}}}", {"a": "one"}, "{one}"),
    ],
)
def test_a_template_is_filled_and_empty_columns_leave_no_blank_lines(template, values, text):
    assert fill_template(template, values) == text


def test_alpaca_reads_instruction_and_input(prepared_of):
    rows = [
        {"instruction": "Name it.", "input": "It swells.", "output": "Gout."},
        {"instruction": "Say why.", "input": "", "output": "So."},
    ]
    prepared = prepared_of('  prompt: "{instruction}\\n\\n{input}"\n  completion: output\n', rows)
    assert pairs(prepared) == [("Name it.\n\nIt swells.", "Gout."), ("Say why.", "So.")]
    assert not [rule for rule in rules(prepared) if rule.startswith("not read")]


def test_a_column_that_nothing_reads_is_a_line_of_the_ledger(prepared_of):
    rows = [{"question": "Why?", "answer": "So.", "input": "lost?", "url": "x", "topic": "t", "page": 1}]
    settings = ["data.group_by=[topic]", "evaluation.evidence={url: url}"]
    prepared = prepared_of(PAIR, rows, *settings)
    assert [rule for rule in rules(prepared) if rule.startswith("not read")] == [
        "not read: column 'input'",
        "not read: column 'page'",
    ]
    prepared = prepared_of(PAIR, rows, *settings, "data.clean=[{drop_repeated_questions: {per: page}}]")
    assert "not read: column 'page'" not in rules(prepared)


def test_a_column_that_a_rule_reads_is_not_said_to_be_unread(prepared_of):
    rows = [{"question": "Why?", "answer": "So it is.", "document_source": "GARD"}]
    prepared = prepared_of(PAIR, rows, "data.clean=[medquad.cut_repeated_question]")
    assert "not read: column 'document_source'" not in rules(prepared)


def test_a_system_message_comes_from_the_recipe_or_from_a_column(prepared_of):
    rows = [{"question": "Why?", "answer": "So.", "persona": "Be brief."}, {"question": "How?", "answer": "Thus."}]
    prepared = prepared_of(PAIR + "  system: {column: persona}\n", rows)
    first, second = prepared.load("train")["prompt"]
    assert first[0] == {"role": "system", "content": "Be brief."} and [m["role"] for m in second] == ["user"]
    assert not [rule for rule in rules(prepared) if rule.startswith("not read")]


def test_values_that_are_not_text_become_text_by_one_rule_and_are_counted(prepared_of):
    day = datetime.date(2026, 11, 28)
    rows = [{"question": question, "answer": "So."} for question in (7, 1.5, True, ["a", "ü"], {"b": None}, "7", None)]
    prepared = prepared_of(PAIR, rows, "data.clean=[drop_unasked]")
    assert [asked for asked, _ in pairs(prepared)] == ["7", "1.5", "true", '["a", "ü"]', '{"b": null}', "7"]
    counted = line(prepared, "values that are not text made text")
    assert counted["changed"] == 5 and counted["examples"][0] == {"row": 0, "question": {"before": "7", "after": "7"}}
    prepared = prepared_of(PAIR, [{"question": day, "answer": 2.0}], file="rows.parquet")
    assert pairs(prepared) == [("2026-11-28", "2.0")]


@pytest.mark.parametrize("name", ["row", "self", "shown"])
def test_a_number_in_a_column_of_any_name_is_counted(prepared_of, name):
    prepared = prepared_of(f"  prompt: {name}\n  completion: answer\n", [{name: 7, "answer": "So."}])
    assert pairs(prepared) == [("7", "So.")]
    assert line(prepared, "values that are not text made text")["changed"] == 1


def test_a_conversation_of_questions_alone_is_malformed_and_not_also_cut(prepared_of):
    prepared = prepared_of("  messages: chat\n  malformed: drop\n", [{"chat": openai()}, {"chat": [USER]}])
    assert "last turns without an answer cut" not in rules(prepared)


OWN = ["row", "part", "source", "group", "tokens", "prompt", "completion", "history", "system", "thinking"]


@pytest.mark.parametrize("name", [*OWN, "chat_template_kwargs"])
def test_no_name_of_a_column_is_reserved(prepared_of, name):
    rows = [{"question": f"Why {n}?", "answer": f"So {n}.", name: f"value {n % 20}"} for n in range(60)]
    prepared = prepared_of(PAIR, rows, f"data.group_by=[{name}]", "data.test=0.4")
    train = prepared.load("train")
    assert train[f"{name}_"] == [f"value {row % 20}" for row in train["row"]]
    assert not set(prepared.load("test")[f"{name}_"]) & set(train[f"{name}_"])


def test_a_mapped_column_may_be_called_as_a_prepared_one(prepared_of):
    rows = [{"prompt": "Why?", "completion": "So.", "system": "Be brief."}]
    shape = "  prompt: prompt\n  completion: completion\n  system: {column: system}\n"
    (row,) = prepared_of(shape, rows).load("train")
    assert [message["content"] for message in row["prompt"] + row["completion"]] == ["Be brief.", "Why?", "So."]


# --- conversations ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spelling", [openai, sharegpt])
def test_each_answer_of_a_conversation_is_learned_with_all_before_it_as_its_prompt(prepared_of, spelling):
    prepared = prepared_of("  messages: chat\n", [{"chat": spelling()}, {"chat": spelling(1)}])
    train = prepared.load("train")
    assert pairs(prepared) == [*zip(QUESTIONS, ANSWERS, strict=True), (QUESTIONS[0], ANSWERS[0])]
    assert train["prompt"][2] == openai()[:5] and train["completion"][2] == openai()[5:]
    assert list(zip(train["row"], train["part"], strict=True)) == [(0, 0), (0, 1), (0, 2), (1, None)]
    counted = line(prepared, "one row for each answer")
    assert (counted["rows_in"], counted["added"], counted["rows_out"]) == (2, 2, 4)
    tokens = train["tokens"]
    spent = f"{sum(tokens) / (tokens[2] + tokens[3]):.1f} times the tokens of conversations read once"
    assert spent in rules(prepared) and not spent.startswith("1.0")


def test_only_the_last_answer_is_learned_when_the_recipe_says_so(prepared_of):
    prepared = prepared_of("  messages: chat\n  turns: last\n", [{"chat": openai()}, {"chat": openai(1)}])
    assert pairs(prepared) == [(QUESTIONS[2], ANSWERS[2]), (QUESTIONS[0], ANSWERS[0])]
    assert len(prepared.load("train")["prompt"][0]) == 5
    assert line(prepared, "answers not learned from")["changed"] == 2


def test_an_answer_of_weight_0_is_read_and_not_learned(prepared_of):
    chat = openai()
    chat[1] |= {"weight": 0}
    prepared = prepared_of("  messages: chat\n", [{"chat": chat}])
    assert [asked for asked, _ in pairs(prepared)] == QUESTIONS[1:]
    assert line(prepared, "answers not learned from")["examples"][0]["turn"]["before"] == ANSWERS[0]


def test_of_trls_conversational_pairs_only_the_completion_is_learned(prepared_of):
    rows = [{"prompt": openai()[:3], "completion": openai()[3:]}]
    prepared = prepared_of("  prompt: prompt\n  completion: completion\n", rows)
    assert pairs(prepared) == list(zip(QUESTIONS, ANSWERS, strict=True))[1:]
    rows = [{"prompt": openai()[:3], "completion": "In bed."}]
    prepared = prepared_of("  prompt: prompt\n  completion: completion\n", rows)
    assert pairs(prepared) == [(QUESTIONS[1], "In bed.")]


def test_a_conversation_keeps_its_own_system_message(prepared_of):
    rows = [{"chat": openai(system="Be kind.")}, {"chat": openai()}]
    prepared = prepared_of("  messages: chat\n  system: Be brief.\n", rows)
    assert [row["prompt"][0]["content"] for row in prepared.load("train")] == ["Be kind."] * 3 + ["Be brief."] * 3


def test_a_conversation_in_a_cell_of_a_table_is_json(prepared_of):
    prepared = prepared_of("  messages: chat\n", [{"chat": json.dumps(openai())}])
    assert len(pairs(prepared)) == 3


def test_a_last_question_without_an_answer_is_cut_and_counted(prepared_of):
    chat = [*openai(1), {"role": "user", "content": "Thanks?"}]
    prepared = prepared_of("  messages: chat\n", [{"chat": chat}])
    assert pairs(prepared) == [(QUESTIONS[0], ANSWERS[0])]
    assert line(prepared, "last turns without an answer cut")["examples"][0]["turn"]["before"] == "Thanks?"


def test_keys_of_messages_that_nothing_reads_are_lines_of_the_ledger(prepared_of):
    chat = [message | {"name": "Ann"} for message in openai()]
    assert "not read: messages' 'name'" in rules(prepared_of("  messages: chat\n", [{"chat": chat}]))


USER, ANSWER = openai(1)
BROKEN = {
    "no answer": [USER],
    "two questions": [USER, USER | {"content": "Well?"}, ANSWER],
    "two answers": [USER, ANSWER, ANSWER | {"content": "And red."}],
    "greeting": [ANSWER | {"content": "Hello!"}, USER, ANSWER],
    "empty turn": [USER, ANSWER, USER | {"content": " "}, ANSWER | {"content": "And red."}],
    "unknown role": [USER, {"role": "narrator", "content": "Then."}, ANSWER],
    "tool calls": [USER, ANSWER | {"tool_calls": [{"id": "1"}]}],
}


@pytest.mark.parametrize("name", BROKEN)
def test_malformed_conversations_are_dropped_with_a_count_and_the_reason(prepared_of, name):
    rows = [{"chat": openai()}, {"chat": BROKEN[name]}]
    prepared = prepared_of("  messages: chat\n  malformed: drop\n", rows)
    assert set(prepared.load("train")["row"]) == {0}
    counted = line(prepared, "malformed conversations dropped")
    assert (counted["rows_in"], counted["dropped"], counted["rows_out"]) == (2, 1, 1)
    assert counted["examples"][0]["row"] == 1 and counted["examples"][0]["conversation"]["before"]


MERGED = {
    "two questions": [("What is gout?\n\nWell?", ANSWERS[0])],
    "two answers": [(QUESTIONS[0], f"{ANSWERS[0]}\n\nAnd red.")],
    "greeting": [(QUESTIONS[0], ANSWERS[0])],
    "empty turn": [(QUESTIONS[0], f"{ANSWERS[0]}\n\nAnd red.")],
    "no answer": [],
    "unknown role": [],
    "tool calls": [],
}


@pytest.mark.parametrize("name", MERGED)
def test_merging_mends_what_it_can_and_drops_the_rest(prepared_of, name):
    rows = [{"chat": openai()}, {"chat": BROKEN[name]}]
    prepared = prepared_of("  messages: chat\n  malformed: merge\n", rows)
    assert pairs(prepared)[3:] == MERGED[name]
    done = "merged" if MERGED[name] else "dropped"
    assert line(prepared, f"malformed conversations {done}")["changed" if MERGED[name] else "dropped"] == 1


def test_the_turns_of_a_conversation_stand_in_one_split_though_nothing_groups_them(prepared_of):
    def chat(n: int) -> list[dict]:
        texts = [
            f"What is topic {n}?",
            f"It is number {n}.",
            "And then?",
            f"Then {n} comes.",
            "Thanks!",
            f"Ask {n} again.",
        ]
        return [{"role": ("user", "assistant")[at % 2], "content": text} for at, text in enumerate(texts)]

    prepared = prepared_of(
        "  messages: chat\n", [{"chat": chat(n)} for n in range(60)], "data.test=0.3", "data.validation=0.2"
    )
    found = {name: set(prepared.load(name)["row"]) for name in ("train", "validation", "test")}
    assert all(found.values()) and sum(map(len, found.values())) == 60
    assert prepared.split["rows"]["test"] == 3 * len(found["test"])


def test_control_text_of_earlier_turns_is_made_plain(prepared_of):
    chat = openai(system="<|user|> Be kind.")
    chat[1]["content"] = "<|user|> What is it?</s>"
    prepared = prepared_of("  messages: chat\n", [{"chat": chat}], family="tinyllama")
    assert all("<|user|>" not in message["content"] for row in prepared.load("train") for message in row["prompt"])


# --- thinking ---------------------------------------------------------------------------------------------------------

TRACE = "First,  let me see:\n\n    gout?\n\tYes."


@pytest.mark.parametrize(
    ("shape", "row"),
    [
        (PAIR + "  thinking: thought\n", {"question": "Why?", "answer": "So.", "thought": TRACE}),
        (PAIR, {"question": "Why?", "answer": f"<think>{TRACE}</think>\n\nSo."}),
        (
            "  messages: chat\n",
            {"chat": [USER, {"role": "assistant", "content": "So.", "reasoning_content": TRACE}]},
        ),
    ],
)
def test_thinking_stands_apart_from_the_answer_with_its_white_space(prepared_of, shape, row):
    prepared = prepared_of(shape, [row], "data.clean=[normalise_whitespace]", family="thinking")
    (message,) = prepared.load("train")["completion"][0]
    assert message == {"role": "assistant", "content": "So.", "reasoning_content": TRACE}


def test_thinking_that_the_template_does_not_write_stays_in_the_answer_and_is_said(prepared_of):
    answer = f"<think>{TRACE}</think>\n\nSo."
    prepared = prepared_of(PAIR, [{"question": "Why?", "answer": answer}])
    assert pairs(prepared) == [("Why?", answer)]
    assert line(prepared, "thinking left in the answer")["changed"] == 1


def test_earlier_turns_are_read_without_their_thinking(prepared_of):
    chat = [message | ({"reasoning_content": TRACE} if message["role"] == "assistant" else {}) for message in openai(2)]
    last = prepared_of("  messages: chat\n", [{"chat": chat}], family="thinking").load("train")[1]
    assert last["completion"][0]["reasoning_content"] == TRACE
    assert all(not message.get("reasoning_content") for message in last["prompt"])


# --- rules of an author's own -----------------------------------------------------------------------------------------

OWN_RULES = '''
def drop_drafts(row, status="draft"):
    """Drop what is not finished."""
    return None if row["status"] == status else row


def shout(row):
    row["completion"] = row["completion"].upper()
    return row


def first(rows, count: int = 1):
    return rows[:count]
'''


def test_a_rule_of_ones_own_is_a_ledger_line_like_any_other(prepared_of):
    Path("my_rules.py").write_text(OWN_RULES)
    rows = [{"question": f"Why {n}?", "answer": f"So {n}.", "status": "draft" if n == 1 else "done"} for n in range(4)]
    clean = "data.clean=['my_rules:drop_drafts', 'my_rules:shout', {'my_rules:first': {count: 2}}]"
    prepared = prepared_of(PAIR, rows, clean)
    assert pairs(prepared) == [("Why 0?", "SO 0."), ("Why 2?", "SO 2.")]
    counts = [(line(prepared, f"my_rules:{name}")) for name in ("drop_drafts", "shout", "first")]
    assert [(one["dropped"], one["changed"]) for one in counts] == [(1, 0), (0, 3), (1, 0)]
    assert "not read: column 'status'" not in rules(prepared)


def test_the_text_of_an_own_rule_is_part_of_the_fingerprint(prepared_of):
    Path("my_rules.py").write_text(OWN_RULES)
    rows, clean = [{"question": "Why?", "answer": "So.", "status": "done"}], "data.clean=['my_rules:drop_drafts']"
    before = prepared_of(PAIR, rows, clean)
    assert prepared_of(PAIR, rows, clean).fingerprint == before.fingerprint
    Path("my_rules.py").write_text(OWN_RULES.replace('"draft"', '"done"'))
    with pytest.raises(RecipeError, match="no row is left after my_rules:drop_drafts"):
        prepared_of(PAIR, rows, clean)
