"""What a user can get wrong: one line on stderr with the place and the remedy, exit code 2, and nothing written."""

import gzip
import io
import json
import re
import shlex
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from medibot import cli
from medibot.training import launch

RECIPE = """\
# A small recipe for the tests.
model:
  pretrained_model_name_or_path: ./model
lora:
  r: 2
  target_modules: all-linear
data:
  path: rows.jsonl
  prompt: question
  completion: answer
  system: Be careful.
  clean: [drop_unanswered]
  group_by: [topic]
  validation: 0.3
  test: 0
training:
  max_length: 256
  max_steps: 1
  save_strategy: no
"""
TOPICS = [
    "anemia",
    "asthma",
    "gout",
    "mumps",
    "scurvy",
    "rickets",
    "measles",
    "eczema",
    "croup",
    "tetanus",
    "cholera",
    "malaria",
]
ROWS = [
    {"topic": t, "question": f"What is {t}?", "answer": f"Known as {t}, it is number {n}."}
    for n, t in enumerate(TOPICS)
]


def jsonl(rows: list) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def csv_of(rows: list[dict]) -> str:
    return "\n".join([",".join(rows[0]), *(",".join(f'"{cell}"' for cell in row.values()) for row in rows)]) + "\n"


def parquet(rows: list[dict], count: int | None = None) -> bytes:
    stream = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows).slice(0, count), stream)
    return stream.getvalue()


def with_row(number: int, **changes) -> dict[str, str]:
    """ROWS as rows.jsonl, one of them changed."""
    return {"rows.jsonl": jsonl([row | changes if n == number else row for n, row in enumerate(ROWS)])}


def chats(*changed: list) -> dict[str, str]:
    """Twelve conversations as rows.jsonl in the column `chat`, the first ones changed."""
    good = [[{"role": "user", "content": f"Why {n}?"}, {"role": "assistant", "content": f"So {n}."}] for n in range(12)]
    return {"rows.jsonl": jsonl([{"chat": chat} for chat in [*changed, *good[len(changed) :]]])}


@dataclass(frozen=True)
class Mistake:
    """A command on a good recipe, rows and model, after `edits` of the recipe and `files` written (None: deleted)."""

    command: str
    says: tuple[str, ...]
    """What the one line must hold; `at` is the text of the recipe whose line and column it must begin with."""
    at: str = ""
    edits: dict[str, str] = field(default_factory=dict)
    files: dict[str, str | bytes | None] = field(default_factory=dict)


def case(name: str, command: str, *says: str, **settings):
    return pytest.param(Mistake(command, says, **settings), id=name.replace(" ", "-"))


def in_recipe(
    name: str, old: str, new: str, *says: str, at: str | None = None, verb: str = "train", more: str = "", **settings
):
    """A recipe with `old` replaced by `new`; the line must point there, or to `at`."""
    at = new.strip().splitlines()[0] if at is None else at
    return case(name, f"{verb} mine.yaml {more}", *says, at=at, edits={old: new}, **settings)


def in_rows(name: str, suffix: str, content: str | bytes, *says: str, **settings):
    """A data file with this suffix and content."""
    file = f"rows{suffix}"
    return case(name, "train mine.yaml", *says, edits={"rows.jsonl": file}, files={file: content}, **settings)


def in_content(name: str, files: dict[str, str], *says: str, at: str = "path: rows", **settings):
    """Rows that can be read and not used."""
    return case(name, "inspect mine.yaml", *says, at=at, files=files, **settings)


def in_model(name: str, files: dict[str, str | bytes | None], *says: str, at: str = "pretrained_model", **settings):
    """A model folder with these files written or (None) taken away."""
    files = {f"model/{file}": content for file, content in files.items()}
    return case(name, "train mine.yaml", *says, at=at, files=files, **settings)


ONE, TWO = {"a.yaml": "num_processes: 1"}, {"a.yaml": "num_processes: 2\nuse_cpu: true"}
STARTED = '{"status": "running", "fingerprint": "0", "parts": {"lora": {"r": 1}}}'
BARE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
LATIN = "question,answer\nWas heißt Anämie?,Blutarmut\n".encode("latin-1")
LATIN_JSON = b'{"question": "Why?", "answer": "So."}\n' + '{"question": "Wo heißt es so?"}\n'.encode("latin-1")
USER, ANSWER = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}
PAIR = "  prompt: question\n  completion: answer\n"
SOURCES = "  sources:\n    - {path: rows.jsonl, prompt: question, completion: answer}\n"
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
LONG = "word " * 400
RULE = "drop_unanswered"

RECIPES = [
    in_recipe("typo", "  max_steps: 1", "  max_step: 1", "training.max_step: no such", "did you mean max_steps?"),
    in_recipe("renamed setting", "  max_length: 256", "  max_seq_length: 256", "renamed: max_length"),
    in_recipe(
        "text for a number", "  max_steps: 1", "  max_steps: one", "a whole number, not the text 'one'", verb="inspect"
    ),
    in_recipe("number for text", "  system: Be careful.", "  system: 5", "data.system", "must be text"),
    in_recipe("unknown section", "lora:\n", "adapter:\n", "did you mean lora?"),
    in_recipe("share above a half", "  validation: 0.3", "  validation: 3", "must be at most 0.5"),
    in_recipe("hardware in the recipe", "  max_steps: 1", "  bf16: true", "the machine decides it"),
    in_recipe("tab", "  max_steps: 1", "\tmax_steps: 1", "a tab cannot indent", "use spaces", at=""),
    in_recipe("key twice", "  max_steps: 1", "  max_length: 512", "is repeated", "first on line 17"),
    in_recipe("open bracket", "[topic]", "[topic", "mine.yaml:14:", at=""),
    in_recipe("required key left out", "  path: rows.jsonl\n", "", "data.path", at="data"),
    in_recipe("not a mapping", RECIPE, "- model\n", "must be a mapping, not a list", at="- model"),
    in_recipe("nothing in it", RECIPE, "# to do\n", "holds nothing", "sections at the left margin", at="# to do"),
    in_recipe(
        "unknown rule", "[drop_unanswered]", "[drop_unanswerd]", "did you mean drop_unanswered?", at="drop_unanswerd"
    ),
    in_recipe("unknown rule setting", RULE, "{drop_short: {words: 3}}", "min_words", at="{drop_short"),
    in_recipe(
        "text in a rule setting", RULE, "{drop_short: {min_words: few}}", "must be int, not 'few'", at="{drop_sh"
    ),
    in_recipe("rule setting left out", RULE, "drop_longer_than", "missing a required argument: 'max_words'"),
    in_recipe("two rules in one", RULE, "{drop_short: {}, drop_echoes: {}}", "has one key", at="{drop_short"),
    case("recipe not UTF-8", "train mine.yaml", "mine.yaml:2:3", "save it as UTF-8", files={"mine.yaml": b"a\nb:\xff"}),
    case("override without =", "train mine.yaml max_steps", "max_steps: is not an override", "section.key=value"),
    case("override typo", "train mine.yaml training.lr=1", "training.lr=1: training.lr", "did you mean learning_rate?"),
    case("override of a wrong type", "inspect mine.yaml lora.r=big", "lora.r=big: lora.r", "must be a whole number"),
    case("override takes away nothing", "train mine.yaml data.name=null", "data.name=null", "nothing to take away"),
    case("unknown recipe", "train quickstrat", "RECIPE: quickstrat not found", "did you mean quickstart?"),
    case(
        "no recipe file",
        "inspect recipes/none.yaml",
        "RECIPE: recipes/none.yaml not found",
        "there are: ",
        "quickstart",
    ),
    case("data file that is not there", "inspect rows.csv", "rows.csv: no file or folder 'rows.csv'", "check the path"),
    case(
        "data of an unknown suffix", "inspect a.docx", "a.docx: cannot read .docx (use .parquet", files={"a.docx": "PK"}
    ),
    case("data without a row", "inspect a.csv", "a.csv: a.csv has no rows", files={"a.csv": "question,answer\n"}),
    case("broken data", "inspect a.jsonl", "a.jsonl:2: not JSON", files={"a.jsonl": '{"a": 1}\n{'}),
    case(
        "data of an unknown shape",
        "inspect a.csv",
        "a.csv: no column is known to hold questions, answers or conversations (it has name, age; name the right ones",
        files={"a.csv": "name,age\nAnn,7\n"},
    ),
    case(
        "lists as Python writes them",
        "inspect a.csv",
        "a.csv: no column is known",
        "write cells with json.dumps",
        files={"a.csv": "id,chat\n1,\"[{'role': 'user', 'content': 'Why so?'}]\"\n"},
    ),
    case(
        "only malformed conversations",
        "inspect a.jsonl",
        "a.jsonl:1: it begins with an assistant turn (all 2 conversations are malformed)",
        files={"a.jsonl": jsonl([{"chat": [ANSWER, USER]}] * 2)},
    ),
    case("override of a data file", "inspect rows.jsonl data.turns=last", "rows.jsonl: data without a recipe takes no"),
    case("row of a data file", "inspect rows.jsonl --row 3", "rows.jsonl: data without a recipe takes no", "--row"),
    case("unknown recipe to compare", "diff mine.yaml none", "RECIPE: none not found"),
    case("unknown recipe to check", "validate none", "RECIPE: none not found"),
]
PATH = "path: rows.jsonl"
FILES = [
    in_recipe("no data file", PATH, "path: row.jsonl", "data.path: no file or folder 'row.jsonl'", "check the path"),
    in_recipe("no data folder", PATH, "path: ./data", "data.path: no file or folder './data'", "check the path"),
    in_recipe("other suffix", PATH, "path: rows.xlsx", "cannot read .xlsx", ".csv", files={"rows.xlsx": "PK"}),
    in_recipe("no suffix", PATH, "path: ./rows", "a file without suffix", ".jsonl", files={"rows": "{}"}),
    in_recipe(
        "text named gzip",
        PATH,
        "path: rows.jsonl.gz",
        "cannot be read: Not a gzipped file",
        files={"rows.jsonl.gz": "{}"},
    ),
    in_recipe("no file of a pattern", PATH, "path: rows*.csv", "rows*.csv holds no", at="path: rows"),
    in_recipe("protocol that nobody knows", PATH, "path: tape://rows.csv", "cannot be read", "access"),
    in_recipe(
        "folder without the split",
        PATH,
        "path: folder\n  split: test",
        "folder has no file for split 'test'",
        at="path: folder",
        files={"folder/train.jsonl": "{}"},
    ),
    in_recipe("empty folder", PATH, "path: folder", "holds no .parquet, .jsonl", files={"folder/": None}),
    in_recipe("folder of other files", PATH, "path: folder", "holds no .parquet", files={"folder/a.txt": "a"}),
    in_recipe(
        "one bad file in a folder",
        PATH,
        "path: folder",
        "folder/b.jsonl:1: not JSON",
        "one JSON object a line",
        at="",
        files={"folder/a.jsonl": jsonl(ROWS), "folder/b.jsonl": "{"},
    ),
    in_recipe(
        "hub data offline", PATH, "path: org/rows", "cannot load 'org/rows' from the hub", "name, revision and network"
    ),
    in_rows("empty file", ".jsonl", "", "rows.jsonl has no rows", "name a file with rows", at="path: rows"),
    in_rows("blank lines only", ".jsonl", "\n \n", "rows.jsonl has no rows", at="path: rows"),
    in_rows("empty CSV", ".csv", "", "rows.csv has no rows", at="path: rows"),
    in_rows("CSV of a header", ".csv", "topic,question,answer\n", "rows.csv has no rows", at="path: rows"),
    in_rows("parquet without rows", ".parquet", parquet(ROWS, 0), "rows.parquet has no rows", at="path: rows"),
    in_rows("JSON lines not UTF-8", ".jsonl", LATIN_JSON, "rows.jsonl:2: not UTF-8", "save it as UTF-8"),
    in_rows("CSV not UTF-8", ".csv", LATIN, "rows.csv:2: not UTF-8", "save it as UTF-8"),
    in_rows("UTF-16", ".csv", "question,answer\na,b\n".encode("utf-16"), "rows.csv:1: not UTF-8"),
    in_rows("NUL in JSON lines", ".jsonl", '{"a": "\0"}\n', "rows.jsonl:1: ", "NUL"),
    in_rows("NUL in CSV", ".csv", "question,answer\na,b\0\n", "rows.csv:2: ", "NUL"),
    in_rows(
        "truncated parquet",
        ".parquet",
        parquet(ROWS)[:-50],
        "rows.parquet cannot be read",
        "name a whole, readable file",
        at="path: rows",
    ),
    in_rows(
        "text named parquet",
        ".parquet",
        jsonl(ROWS),
        "rows.parquet cannot be read",
        "name a whole, readable file",
        at="path: rows",
    ),
    in_rows("empty parquet", ".parquet", "", "rows.parquet cannot be read", at="path: rows"),
    in_rows("gzip named JSON lines", ".jsonl", gzip.compress(b"{}", mtime=0), "rows.jsonl:1: not UTF-8"),
    in_rows("gzip named CSV", ".csv", gzip.compress(b"a,b", mtime=0), "rows.csv:1: not UTF-8"),
    in_rows(
        "malformed line",
        ".jsonl",
        jsonl(ROWS[:2]) + '\n{"a": 1,}\n',
        "rows.jsonl:4: not JSON",
        "one JSON object a line",
    ),
    in_rows("line without end", ".jsonl", jsonl(ROWS) + '{"question": "What', "rows.jsonl:13: not JSON"),
    in_rows(
        "JSON over several lines",
        ".jsonl",
        json.dumps(ROWS, indent=1),
        "rows.jsonl:1: not JSON",
        "one JSON object a line",
    ),
    in_rows("JSON array", ".jsonl", json.dumps(ROWS), "rows.jsonl:1: a list", "each row is a JSON object"),
    in_rows(
        "array of texts",
        ".json",
        '[{"question": "Why?", "answer": "So."},\n "So."]',
        "rows.json:2: a str",
        "each row is a JSON object",
    ),
    in_rows(
        "array without a comma", ".json", '[{"a": 1}\n\n{"a": 2}]', "rows.json:3: not JSON", "an array of JSON objects"
    ),
    in_rows("array without an end", ".json", json.dumps(ROWS[:2])[:-1].replace("}, ", "},\n"), "rows.json:2: not JSON"),
    in_rows("array of nothing", ".json", "[]", "rows.json has no rows", at="path: rows"),
    in_rows("ragged TSV", ".tsv", "question\tanswer\na\tb\tc\n", "rows.tsv:2: 3 cells under 2 columns"),
    in_rows("text named Arrow", ".arrow", jsonl(ROWS), "rows.arrow cannot be read", at="path: rows"),
    in_rows("bottomless JSON", ".jsonl", jsonl(ROWS[:1]) + "[" * 100_000, "rows.jsonl:2: not JSON"),
    in_rows("lone surrogate", ".jsonl", jsonl([ROWS[0] | {"answer": "\ud83d"}]), "rows.jsonl:1: not JSON", "surrogate"),
    in_rows(
        "ragged CSV", ".csv", csv_of(ROWS[:2]) + "gout,What is it, really?,No\n", "rows.csv:4: 4 cells under 3 columns"
    ),
    in_rows("short CSV line", ".csv", csv_of(ROWS) + "gout\n", "rows.csv:14: 1 cells under 3", "quote cells"),
    in_rows(
        "column twice in CSV",
        ".csv",
        "question,answer,answer\na,b,c\n",
        "rows.csv:1: a column name stands twice",
        "rename one",
    ),
    in_rows("quote never closed", ".csv", csv_of(ROWS) + '"gout,What is it?,No\n', "rows.csv:14: ", "quote"),
    in_rows("quote closed early", ".csv", csv_of(ROWS) + '"a"b,c,d\n', "rows.csv:14: ", "quote"),
]
CONTENT = [
    in_recipe(
        "no such question column",
        "question",
        "asked",
        "rows.jsonl has no column 'asked'",
        "it has topic, question, answer",
        at="prompt",
    ),
    in_recipe("no such answer column", "n: answer", "n: reply", "no column 'reply'", at="completion"),
    in_recipe(
        "no such group column", "[topic]", "[focus]", "data.group_by: rows.jsonl has no column 'focus'", at="group_by"
    ),
    in_recipe("one column for both", "n: answer", "n: question", "the same column as data.prompt", at="completion"),
    *(
        in_recipe(
            name,
            PAIR,
            "  messages: chat\n",
            f"rows.jsonl:1: {says}",
            "1 of 12",
            at="",
            files=chats(chat),
        )
        for name, chat, says in (
            ("no answer", [USER], "it has no assistant turn"),
            ("two questions", [USER, USER, ANSWER], "two user turns in a row"),
            ("two answers", [USER, ANSWER, ANSWER], "two assistant turns in a row"),
            ("unknown role", [USER, {"role": "narrator", "content": "Then."}], "unknown role 'narrator'"),
            ("empty turn", [USER, {"role": "assistant", "content": " "}], "an empty assistant turn"),
            ("greeting", [ANSWER, USER, ANSWER], "it begins with an assistant turn"),
            (
                "system inside",
                [USER, {"role": "system", "content": "Be kind."}, ANSWER],
                "a system turn after the first",
            ),
            ("tool calls", [USER, ANSWER | {"tool_calls": [{"id": "1"}]}], "it calls tools, which are not trained"),
            (
                "picture",
                [{"role": "user", "content": [{"type": "image_url"}]}, ANSWER],
                "a user turn holds list, not text",
            ),
            ("no list", "Why?", "it is no list of messages"),
        )
    ),
    in_recipe(
        "no such chat column",
        PAIR,
        "  messages: talk\n",
        "no column 'talk'",
        "it has chat",
        at="messages",
        files=chats(),
    ),
    in_recipe(
        "chat and question",
        "  prompt: question\n",
        "  prompt: question\n  messages: chat\n",
        "cannot stand beside prompt",
        at="messages",
    ),
    in_recipe(
        "answer left out", "  completion: answer\n", "", "data.completion: is required", "or messages", at="data"
    ),
    in_recipe(
        "template without column", "prompt: question", 'prompt: "{}"', "a pair of braces without a column", at="prompt"
    ),
    in_recipe(
        "template not closed", "prompt: question", 'prompt: "{question"', "no template", "{{ for a brace", at="prompt"
    ),
    in_recipe(
        "no such template column", "prompt: question", 'prompt: "{question} {more}"', "no column 'more'", at="prompt"
    ),
    in_recipe(
        "no such system column", "system: Be careful.", "system: {column: persona}", "no column 'persona'", at="system"
    ),
    in_recipe(
        "system column of a number",
        "system: Be careful.",
        "system: {column: 5}",
        "data.system.column: must be text",
        at="column: 5",
    ),
    in_recipe(
        "thinking that the template drops",
        "  prompt: question\n",
        "  prompt: question\n  thinking: thought\n",
        "does not write reasoning_content",
        "take a reasoning model",
        at="thinking",
        files=with_row(2, thought="Let me see."),
    ),
    in_recipe("sources beside a path", PAIR, SOURCES, "cannot stand beside data.sources", at="path: rows"),
    in_recipe(
        "held out nothing",
        "  validation: 0.3",
        "  validation: {name: x}",
        "says neither path nor split",
        at="validation",
    ),
    in_recipe(
        "held out typo",
        "  validation: 0.3",
        "  validation: {pat: x}",
        "data.validation.pat: no such",
        "did you mean path?",
        at="pat: x",
    ),
    in_recipe(
        "held out file missing",
        "  validation: 0.3",
        "  validation: {path: more.jsonl}",
        "no file or folder 'more.jsonl'",
        at="path: more",
    ),
    in_recipe("own rule out of the folder", RULE, "..mine:drop", "is written file:function", at="..mine:drop"),
    in_recipe("own rule without a file", RULE, "mine:drop", "mine:drop: there is no file", at="mine:drop"),
    *(
        in_recipe(f"own rule {name}", RULE, "mine:drop", says, at=at, files={"mine.py": code})
        for name, code, says, at in (
            ("without a function", "def keep(row): ...", "defines no function drop; it has keep", "mine:drop"),
            ("that is no Python", "def drop(row:", "is not Python", "mine:drop"),
            ("of another form", "def drop(text): ...", "the first parameter of drop must be row or rows", "mine:drop"),
            (
                "that raises",
                "def drop(row): return row['status']",
                "mine:drop failed at row 0: KeyError: 'status'",
                "clean",
            ),
            ("that returns text", "def drop(row): return row['prompt']", "must return a row with text", "clean"),
            ("that raises on import", "import nothing_here\ndef drop(row): ...", "ModuleNotFoundError", "clean"),
        )
    ),
    in_recipe(
        "every row dropped", RULE, "{drop_short: {min_words: 99}}", "no row is left after drop_short", at="clean"
    ),
    in_recipe(
        "answers missing",
        RULE,
        "",
        "1 of 12 rows have no completion",
        "add the rule drop_unanswered",
        at="clean",
        files=with_row(5, answer=None),
    ),
    in_recipe(
        "questions missing",
        RULE,
        "",
        "1 of 12 rows have no prompt",
        "add the rule drop_unasked",
        at="clean",
        files=with_row(5, question=" "),
    ),
    in_content(
        "one row too long",
        with_row(4, answer=LONG),
        "1 conversations are longer than 256 tokens (row 4:",
        "data.too_long: drop",
        at="max_length",
    ),
    in_recipe(
        "all rows too long", "max_length: 256", "max_length: 8", "12 conversations are longer than 8", "raise it"
    ),
    in_recipe(
        "all rows too long and dropped",
        "  max_length: 256",
        "  max_length: 8",
        "every conversation is longer than 8 tokens",
        "raise it",
        more="data.too_long=drop",
    ),
    case(
        "validation left empty",
        "train mine.yaml",
        "data.validation: the validation split is empty (12 rows in all)",
        "change the share",
        at="validation",
        edits={"validation: 0.3": "validation: 0.0001"},
    ),
    case(
        "test left empty",
        "train mine.yaml",
        "data.test: the test split is empty",
        at="test:",
        edits={"test: 0": "test: 0.0001"},
    ),
    in_content(
        "one group for all",
        {"rows.jsonl": jsonl([row | {"topic": "a"} for row in ROWS])},
        "split is empty (12 rows in all)",
        at="validation",
    ),
]
MODELS = [
    in_recipe(
        "no model folder",
        "./model",
        "./modle",
        "model folder './modle' not found",
        "or a folder",
        at="pretrained_model",
    ),
    in_recipe(
        "model not made",
        "./model",
        "models/none",
        "model folder 'models/none' not found",
        "run: make model",
        at="pretrained_model",
    ),
    in_recipe("hub model offline", "./model", "org/none", "no tokenizer in 'org/none'", "hub", at="pretrained_model"),
    in_model("no config", {"config.json": None}, "in 'model'", "config.json"),
    in_model("broken config", {"config.json": "{"}, "in 'model'", "config.json"),
    in_model("unknown architecture", {"config.json": '{"model_type": "none"}'}, "in 'model'", "none"),
    in_model("no tokenizer", {"tokenizer.json": None, "tokenizer_config.json": None}, "no tokenizer in 'model'"),
    in_model("broken tokenizer", {"tokenizer.json": '{"model": '}, "no tokenizer in 'model'"),
    in_model(
        "not a tokenizer",
        {"tokenizer.json": "[]"},
        "no tokenizer in 'model'",
    ),
    in_model("no chat template", {"chat_template.jinja": None}, "no chat template", "take a chat model"),
    in_model(
        "broken template",
        {"chat_template.jinja": "{% for %}"},
        "chat template",
        "chat_template_path",
    ),
    in_model(
        "template of nothing",
        {"chat_template.jinja": "{{ '' }}"},
        "chat template",
    ),
    in_model("template without a stop token", {"chat_template.jinja": BARE}, "does not stop generation", at=""),
    in_model(
        "template without system role",
        {"chat_template.jinja": NO_SYSTEM + BARE},
        "no system role",
        "remove data.system",
        at="system",
    ),
    in_model(
        "only pickled weights",
        {"model.safetensors": None, "pytorch_model.bin": b"x"},
        "no safetensors weights in 'model'",
    ),
    in_model("no weights", {"model.safetensors": None}, "no safetensors weights in 'model'"),
    in_model(
        "corrupted weights",
        {"model.safetensors": b"\xff" * 64},
        "no safetensors weights in 'model'",
    ),
    in_model(
        "empty weights",
        {"model.safetensors": b""},
        "no safetensors weights in 'model'",
    ),
    in_recipe(
        "no template file",
        "  max_steps: 1",
        "  chat_template_path: t.jinja",
        "'t.jinja' not found",
        "give a .jinja file",
    ),
    in_recipe(
        "broken template file",
        "  max_steps: 1",
        "  chat_template_path: t.jinja",
        "chat template",
        files={"t.jinja": "{% for %}"},
    ),
    in_recipe(
        "template file not UTF-8",
        "  max_steps: 1",
        "  chat_template_path: t.jinja",
        "UTF-8",
        files={"t.jinja": b"\xff"},
    ),
    in_recipe(
        "no such module to adapt",
        "all-linear",
        "[query]",
        "lora.target_modules",
        "query",
        at="target_modules",
    ),
    in_recipe(
        "attention of a GPU",
        "/model\n",
        "/model\n  attn_implementation: flash_attention_2\n",
        "flash_attention_2 needs a GPU",
        "leave it out",
        at="attn_implementation",
    ),
    in_recipe(
        "attention that cannot learn on a CPU",
        "/model\n",
        "/model\n  attn_implementation: flex_attention\n",
        "flex_attention has no backward pass on a CPU",
        "leave it out",
        at="attn_implementation",
    ),
]
RUNS = [
    case("run with a slash", "train mine.yaml --run a/b", "RUN: 'a/b' is not a run name", "use letters"),
    case("run above the outputs", "train mine.yaml --run ..", "RUN: '..' is not a run name"),
    case("run of no name", "ask --run ''", "RUN: '' is not a run name"),
    case("hidden run", "ask --run .git", "RUN: '.git' is not a run name"),
    case("unknown run", "ask --run none", "run 'none' not found in ", "run: make train"),
    case(
        "misspelt run", "ask --run min", "run 'min' not found in ", "found: mine", files={"outputs/mine/run.json": "{}"}
    ),
    case(
        "unfinished run",
        "ask --run mine",
        "'mine' is not finished",
        "it goes on",
        files={"outputs/mine/run.json": STARTED},
    ),
    case("damaged run", "ask --run mine", "outputs/mine/run.json", "not JSON", files={"outputs/mine/run.json": "{"}),
    case(
        "run of another recipe",
        "train mine.yaml",
        "outputs/mine: made from something else (",
        "another RUN=name",
        files={"outputs/mine/run.json": STARTED},
    ),
    case("empty question", "ask --run mine -q ' '", "Q: the question is empty", 'write Q="What is anemia?"'),
    case("row beyond the end", "inspect mine.yaml --row 12", "--row: no row 12", "rows 0 to "),
    case("row below zero", "inspect mine.yaml --row -1", "--row: no row -1", "rows 0 to "),
    case(
        "page in no folder",
        "inspect mine.yaml --html none/page.html",
        "none/page.html: cannot be written here",
        "in a folder that is there",
    ),
    case("page that is a folder", "inspect mine.yaml --html model", "model: cannot be written here", "name a file"),
    case("no GGUF file", "convert-gguf none.gguf there", "GGUF file none.gguf not found", "make model"),
    case("schema elsewhere", "schema", "recipes"),
]

LAUNCHES = [
    case("no accelerate config", "train mine.yaml --accelerate gpu", "ACCELERATE: gpu not found"),
    case(
        "no accelerate file", "train mine.yaml --accelerate a/b.yaml", "ACCELERATE: a/b.yaml not found", "there are: "
    ),
    case(
        "broken accelerate file", "train mine.yaml --accelerate a.yaml", "a.yaml is not YAML", files={"a.yaml": "a: [1"}
    ),
    case("accelerate file not UTF-8", "train mine.yaml --accelerate a.yaml", "not YAML", files={"a.yaml": b"a: \xff"}),
    case(
        "empty accelerate file",
        "train mine.yaml --accelerate a.yaml",
        "a.yaml is not an accelerate config",
        files={"a.yaml": ""},
    ),
    case(
        "launch quote",
        "train mine.yaml --accelerate a.yaml --launch '\"x'",
        "LAUNCH: No closing quotation",
        "every quote is closed",
        files=ONE,
    ),
    case(
        "no process",
        "train mine.yaml --accelerate a.yaml --launch=--num_processes=0",
        "LAUNCH: --num_processes=0 starts nothing",
        "a whole number from 1",
        files=ONE,
    ),
    case(
        "few processes",
        "train mine.yaml --accelerate a.yaml --launch '--num_processes few'",
        "--num_processes: invalid int value: 'few'",
        "a whole number",
        files=ONE,
    ),
    case(
        "processes left out",
        "train mine.yaml --accelerate a.yaml --launch=--num_processes",
        "--num_processes: expected one argument",
        "a whole number",
        files=ONE,
    ),
    case("typo before two processes", "train mine.yaml lora.s=1 --accelerate a.yaml", "lora.s: no such", files=TWO),
    case(
        "no data before two processes", "train mine.yaml data.path=none.csv --accelerate a.yaml", "none.csv", files=TWO
    ),
]


@pytest.fixture
def medibot(workplace: Path, make_model: Callable, monkeypatch, capfd) -> Callable:
    """medibot(command): run it here as a launched process would, and return (exit code, lines on stderr)."""
    (workplace / "mine.yaml").write_text(RECIPE)
    (workplace / "rows.jsonl").write_text(jsonl(ROWS))
    shutil.copytree(make_model(), workplace / "model")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")

    def run(command: str) -> tuple[int, list[str]]:
        capfd.readouterr()
        monkeypatch.setattr(sys, "argv", ["medibot", *shlex.split(command)])
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = stop.code
        return code, capfd.readouterr().err.splitlines()

    return run


def files_of(folder: Path) -> list[str]:
    """Every file and folder but locks and whole prepared data, which a mistake found later leaves for the next try."""
    found = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        whole = re.match(r"cache/prepared/[0-9a-f]{16}(/|$)", name)
        if whole and (folder / whole[0] / "prepared.json").is_file():
            continue
        if path.suffix != ".lock" and name not in {"cache", "cache/prepared", "outputs"}:
            found.append(name)
    return found


def arrange(folder: Path, mistake: Mistake) -> None:
    recipe = folder / "mine.yaml"
    for old, new in mistake.edits.items():
        assert RECIPE.count(old) == 1, old
        recipe.write_text(recipe.read_text().replace(old, new))
    for name, content in mistake.files.items():
        file = folder / name
        if name.endswith("/"):
            file.mkdir(parents=True)
        elif content is None:
            file.unlink()
        else:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content if isinstance(content, bytes) else content.encode())


def place(folder: Path, text: str) -> str:
    """Line and column of this text of the recipe."""
    before, found, _ = (folder / "mine.yaml").read_text().partition(text)
    assert found, text
    return f"mine.yaml:{before.count(chr(10)) + 1}:{len(before) - before.rfind(chr(10))}: "


@pytest.mark.parametrize("mistake", [*RECIPES, *FILES, *CONTENT, *MODELS, *RUNS])
def test_mistake_is_one_line_with_place_and_remedy(mistake: Mistake, medibot: Callable, workplace: Path):
    arrange(workplace, mistake)
    before = files_of(workplace)
    code, lines = medibot(mistake.command)
    print(*lines, sep="\n")
    assert code == 2
    assert len(lines) == 1
    for text in mistake.says:
        assert text in lines[0]
    if mistake.at:
        assert lines[0].startswith(place(workplace, mistake.at))
    assert files_of(workplace) == before


@pytest.mark.parametrize("mistake", LAUNCHES)
def test_mistake_before_the_launch_starts_nothing(
    mistake: Mistake, medibot: Callable, workplace: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION")
    monkeypatch.setattr(launch.psutil, "Popen", lambda command, **_: pytest.fail(f"started {command}"))
    arrange(workplace, mistake)
    before = files_of(workplace)
    code, lines = medibot(mistake.command)
    assert code == 2
    assert len(lines) == 1
    for text in mistake.says:
        assert text in lines[0]
    assert files_of(workplace) == before


def test_every_mistake_of_a_recipe_has_its_line(medibot, workplace):
    arrange(workplace, Mistake("", (), edits={"  r: 2": "  rank: 2", "  max_steps: 1": "  max_steps: one\n  lr: 1"}))
    code, lines = medibot("train mine.yaml lora.lora_dropout=much")
    assert code == 2
    assert len(lines) == 4
    for line, start in zip(
        lines, ("mine.yaml:5:3", "mine.yaml:18:3", "mine.yaml:19:3", "lora.lora_dropout=much"), strict=True
    ):
        assert line.startswith(f"{start}: ")


def test_validate_reports_every_bad_recipe(medibot, workplace):
    (workplace / "first.yaml").write_text(RECIPE.replace("max_steps", "steps"))
    (workplace / "second.yaml").write_text(RECIPE.replace("lora:", "peft:").replace("max_length", "max_len"))
    code, lines = medibot("validate first.yaml mine.yaml second.yaml")
    assert code == 2
    assert [line.split(":")[0] for line in lines] == ["first.yaml", "second.yaml", "second.yaml"]


def test_finished_run_of_another_recipe_names_what_changed(medibot, workplace):
    assert medibot("train mine.yaml training.logging_steps=1") == (0, [])
    before = files_of(workplace)
    code, lines = medibot("train mine.yaml training.logging_steps=1 training.learning_rate=1e-3 lora.r=4")
    assert code == 2
    assert len(lines) == 1
    assert "outputs/mine: made from something else (lora.r: was 2, is 4 and 1 more)" in lines[0]
    assert "choose another RUN=name" in lines[0]
    assert files_of(workplace) == before
