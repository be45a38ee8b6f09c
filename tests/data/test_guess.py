"""A data file without a recipe: its shape is guessed, shown as it would be learned, and the printed section works."""

import csv
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from conftest import ROOT
from rich.console import Console

from medibot import cli
from medibot.data.guess import guess
from medibot.data.prepared import prepare
from medibot.errors import Place
from medibot.recipe import load_recipe, names_data
from medibot.recipe.document import parse
from medibot.training.inspection import inspect_recipe
from medibot.training.preview import Preview, preview_file

REST = "training:\n  max_length: 512\n  max_steps: 1\n"
ANSWERS = (
    "A swelling of the joints that number {} has.",
    "It is rare below {} years and often mild.",
    "Some {} people of a hundred have it at a time.",
)
COUNT = 60


def ask(number: int) -> str:
    return f"What is illness number {number}?"


def answer(number: int) -> str:
    words = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa"]
    return " ".join([ANSWERS[number % 3].format(number), *(words[int(digit)] for digit in str(number * 7919))])


def openai(number: int, turns: int = 2) -> list[dict]:
    numbers = range(10 * number, 10 * number + turns)
    pairs = [({"role": "user", "content": ask(n)}, {"role": "assistant", "content": answer(n)}) for n in numbers]
    return [message for pair in pairs for message in pair]


def sharegpt(number: int, turns: int = 2) -> list[dict]:
    names = {"user": "human", "assistant": "gpt"}
    return [{"from": names[message["role"]], "value": message["content"]} for message in openai(number, turns)]


def write(name: str, rows: list[dict]) -> str:
    file = Path(name)
    if file.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    elif file.suffix == ".json":
        file.write_text(json.dumps(rows))
    elif file.suffix == ".jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        with file.open("w", newline="", encoding="utf-8") as opened:
            writer = csv.DictWriter(opened, rows[0], delimiter="\t" if file.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    return name


def settings(preview: Preview) -> dict:
    """The printed section, read as strictly as a recipe is."""
    document = parse(preview.section, "", Place("printed", 1, 1))
    assert not document.problems
    return document.value["data"]


ROWS = {
    "pairs.csv": [{"question": ask(n), "answer": answer(n)} for n in range(COUNT)],
    "alpaca.json": [
        {"instruction": ask(n), "input": "I am old." if n % 2 else "", "output": answer(n)} for n in range(COUNT)
    ],
    "sharegpt.json": [{"id": str(n), "conversations": sharegpt(n, 1 + n % 3)} for n in range(COUNT)],
    "openai.jsonl": [
        {"messages": [{"role": "system", "content": "Be brief."}, *openai(n)], "url": f"u/{n // 2}"}
        for n in range(COUNT)
    ],
    "trl.jsonl": [{"prompt": openai(n)[:3], "completion": openai(n)[3:]} for n in range(COUNT)],
    "german.tsv": [
        {"nr": n, "antwort": answer(n), "frage": ask(n), "quelle": f"https://example.org/{n} {n}"} for n in range(COUNT)
    ],
    "thinking.parquet": [
        {"Question": ask(n), "Complex_CoT": f"I count to {n}.", "Response": answer(n), "persona": "Be kind: always."}
        for n in range(COUNT)
    ],
    "json.csv": [{"n": n, "chat": json.dumps(openai(n))} for n in range(COUNT)],
    "odd names.jsonl": [
        {"Yes: or # no?": f"{'Really. ' * 20}{ask(n)}", "null": answer(n), "": 1, "{x}": "two words"}
        for n in range(COUNT)
    ],
}
PAIR = {"prompt": "question", "completion": "answer"}
SECTIONS = {
    "pairs.csv": PAIR,
    "alpaca.json": {"prompt": "{instruction}\n\n{input}", "completion": "output"},
    "sharegpt.json": {"messages": "conversations"},
    "openai.jsonl": {"messages": "messages", "group_by": ["url"]},
    "trl.jsonl": {"prompt": "prompt", "completion": "completion"},
    "german.tsv": {"prompt": "frage", "completion": "antwort"},
    "thinking.parquet": {
        "prompt": "Question",
        "completion": "Response",
        "thinking": "Complex_CoT",
        "system": {"column": "persona"},
    },
    "json.csv": {"messages": "chat"},
    "odd names.jsonl": {"prompt": "Yes: or # no?", "completion": "null"},
}
VERDICTS = {
    "pairs.csv": "60 rows, questions in 'question', answers in 'answer'",
    "sharegpt.json": "60 rows, conversations of 2 to 6 turns in column 'conversations' (ShareGPT)",
    "openai.jsonl": "60 rows, conversations of 4 turns in column 'messages' (OpenAI)",
    "trl.jsonl": "60 rows, conversations of 4 turns: questions in 'prompt', answers in 'completion'",
    "german.tsv": "60 rows, questions in 'frage', answers in 'antwort' (a guess from their texts, no known names)",
}


@pytest.mark.parametrize("name", ROWS)
def test_the_printed_section_is_a_recipes_and_learns_what_was_shown(name, workplace, make_model):
    preview = preview_file(write(name, ROWS[name]))
    shape = settings(preview)
    assert shape == {"path": name} | SECTIONS[name] | {"validation": 0.2, "test": 0.2}
    assert preview.verdict.startswith(f"{name}: {VERDICTS.get(name, '')}")
    model = make_model("thinking" if "thinking" in shape else "smollm2")
    Path("mine.yaml").write_text(f"model:\n  pretrained_model_name_or_path: {model}\n{preview.section}\n{REST}")
    assert inspect_recipe(load_recipe("mine.yaml")).prepared.split["rows"]["test"]
    train = prepare(load_recipe("mine.yaml", ["data.validation=0", "data.test=0"])).load("train")
    assert list(preview.painted) == [0, 1, 2]
    for number, painted in preview.painted.items():
        turns = [row for row in train if row["row"] == number]
        answers = [message for row in turns for message in row["completion"]]
        assert [text for role, text, learned in painted if learned and role == "assistant"] == [
            message["content"] for message in answers
        ]
        assert [text for role, text, _ in painted if role == "thinking"] == [
            message["reasoning_content"] for message in answers if message.get("reasoning_content")
        ]
        shown = [(role, text) for role, text, _ in painted if role != "thinking"][:-1]
        assert shown == [(message["role"], message["content"]) for message in turns[-1]["prompt"]]


@pytest.mark.parametrize(
    ("rows", "section"),
    [
        ([{"Prompt": "Say it.", "RESPONSE": "So."}], {"prompt": "Prompt", "completion": "RESPONSE"}),
        ([{"question": "Why?", "answer": "So.", "input": "x"}], PAIR),
        ([{"input": "Why?", "output": "So."}], {"prompt": "input", "completion": "output"}),
        ([{"patient": "Ouch.", "doctor": "Rest."}], {"prompt": "patient", "completion": "doctor"}),
        # Longer, but it asks
        (
            [{"a": "Because it is.", "b": "Why is it so, after all this time?"}],
            {"prompt": "b", "completion": "a"},
        ),
        ([{"a": "It is long and says much.", "b": "Say more"}], {"prompt": "b", "completion": "a"}),
        ([{"question": "Why?", "text": "It is so."}], {"prompt": "question", "completion": "text"}),
        ([{"a": "为什么", "b": "因为它就是这样的"}], {"prompt": "a", "completion": "b"}),
        ([{"a": "Two words", "question": None, "answer": "", "b": "Is it so?"}], {"prompt": "b", "completion": "a"}),
        ([{"messages": openai(1), "question": "Why?", "answer": "So."}], {"messages": "messages"}),
        (
            [{"prompt": openai(1)[:1], "reasoning": "Hm.", "answer": "So."}],
            {"prompt": "prompt", "completion": "answer"},
        ),
        ([{"id": "a1", "text": "A long text without any question."}], None),
        ([{"a": "[{'role': 'user', 'content': 'Why so?'}]", "question": "Why so?"}], None),
        ([{"url": "https://example.org/a b", "answer": "So."}], None),
        ([{"question": {"en": "Why?"}, "answer": "So."}], None),
        ([{}], None),
    ],
)
def test_names_decide_first_and_texts_where_no_name_does(rows, section):
    found = guess(rows)
    assert (found and found.section) == section


def test_columns_that_repeat_keep_rows_together_or_get_figures():
    rows = []
    for n in range(120):
        others = {"url": f"u/{n % 50}", "topic": f"t{n % 40}", "kind": f"k{n % 3}", "number": n % 30, "unique_id": n}
        rows.append({"question": f"Why {n}?", "answer": f"So {n}.", "source": "one"} | others)
    found = guess(rows)
    assert found is not None
    assert found.section == PAIR | {"group_by": ["topic"]} and found.by == ["kind"]
    assert "40 values" in found.doubts["group_by"]


def test_a_column_of_one_large_group_is_no_suggestion():
    rows = [{"question": f"Why {n}?", "answer": f"So {n}.", "topic": f"t{max(n, 90)}"} for n in range(120)]
    found = guess(rows)
    assert found is not None and found.section == PAIR


def test_malformed_conversations_are_counted_and_the_section_says_so(workplace):
    rows = [{"chat": openai(n)} for n in range(COUNT)]
    for number in (7, 9):
        rows[number]["chat"].insert(1, {"role": "user", "content": "Hello?"})
    preview = preview_file(write("chats.jsonl", rows))
    assert (
        "malformed: 2 of 60 conversations; the first is row 7, chats.jsonl:8: two user turns in a row" in preview.notes
    )
    assert settings(preview)["malformed"] == "drop"


def test_rows_without_an_answer_are_counted_and_the_section_cleans_them(workplace, make_tokenizer, make_model):
    rows = [{"question": ask(n), "answer": None if n < 9 else answer(n), "page": n} for n in range(COUNT)]
    preview = preview_file(write("rows.jsonl", rows))
    assert preview.notes == ["empty: 9 of 60 rows have no completion", "not read: 'page'"]
    Path("mine.yaml").write_text(f"model:\n  pretrained_model_name_or_path: {make_model()}\n{preview.section}\n{REST}")
    prepared = prepare(load_recipe("mine.yaml", ["data.validation=0", "data.test=0"]), make_tokenizer("smollm2"))
    assert prepared.split["rows"]["train"] == COUNT - 9


def test_what_is_not_learned_is_painted_apart(workplace):
    chat = openai(1)
    chat[1]["weight"] = 0
    rows = [{"messages": [*chat, {"role": "user", "content": "And then?"}], "system": "Be brief."}]
    preview = preview_file(write("rows.jsonl", rows))
    assert preview.painted == {
        0: [
            ("system", "Be brief.", False),
            ("user", ask(10), False),
            ("assistant", answer(10), False),
            ("user", ask(11), False),
            ("assistant", answer(11), True),
        ]
    }
    assert {"last turns without an answer cut: 1", "answers not learned from: 1"} <= set(preview.notes)
    console = Console(width=80, record=True, file=io.StringIO(), force_terminal=True)
    console.print(preview)
    said = console.export_text(styles=True)
    assert "\x1b[1;32m" + answer(11)[:20] in said and "\x1b[2m" + answer(10)[:20] in said


@pytest.mark.parametrize("count", [5, 60, 300])
def test_few_rows_get_shares_that_hold_some_back(count, workplace):
    rows = [{"question": ask(n), "answer": answer(n)} for n in range(count)]
    shares = {5: {"validation": 0, "test": 0}, 60: {"validation": 0.2, "test": 0.2}, 300: {}}
    assert settings(preview_file(write("rows.jsonl", rows))) == {"path": "rows.jsonl"} | PAIR | shares[count]


@pytest.mark.parametrize("given", ["rows.csv", "folder", "folder/*.csv", "file://HERE/folder/b.csv", "none.csv"])
def test_data_is_told_from_a_recipe(given, workplace):
    given = given.replace("HERE", str(workplace))
    Path("folder").mkdir()
    for name in ("rows.csv", "folder/a.csv", "folder/b.csv"):
        write(name, ROWS["pairs.csv"])
    assert names_data(given)
    if given != "none.csv":
        rows = 120 if given.startswith("folder") else 60
        assert preview_file(given).verdict.startswith(f"{given}: {rows} rows, questions in 'question'")


def test_a_recipe_wins_over_a_folder_of_its_name(workplace):
    for name in ("quickstart", "mine"):
        Path(name).mkdir()
    Path("my.yaml").touch()
    assert not names_data("quickstart") and not names_data("my.yaml") and not names_data("qwen2.5-3b")
    assert not names_data("") and not names_data("none") and names_data("mine")


def test_the_section_is_not_cut_into_lines_of_a_narrow_terminal(workplace, monkeypatch, capsys):
    rows = [
        {"question": ask(n), "answer": answer(n), "a_very_long_name_of_a_topic": f"t{n // 2}"} for n in range(COUNT)
    ]
    monkeypatch.setenv("COLUMNS", "40")
    cli.inspect(write("rows.jsonl", rows))
    section = preview_file("rows.jsonl").section
    assert max(map(len, section.splitlines())) > 80 and f"\n\n{section}\n\n" in capsys.readouterr().out


def test_a_file_is_inspected_without_a_heavy_import(workplace):
    write("rows.csv", ROWS["pairs.csv"])
    heavy = {"torch", "transformers", "trl", "datasets", "pandas"}
    program = (
        f"import sys; sys.argv = ['medibot', 'inspect', 'rows.csv']; from medibot.cli import main\n"
        f"try: main()\nexcept SystemExit as end: print(end.code, sorted({heavy} & sys.modules.keys()))"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "80"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.stdout.endswith("0 []\n"), done.stdout + done.stderr
    assert done.stdout.startswith("rows.csv: 60 rows") and f"\nuser: {ask(0)}\n" in done.stdout
    assert f"\nassistant, learned: {answer(0)[:30]}" in done.stdout and "\ndata:\n  path: rows.csv\n" in done.stdout
