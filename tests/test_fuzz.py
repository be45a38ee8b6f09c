"""Mutated recipes and data files: what comes of them is a recipe, a data set, or one line; never a traceback.

MEDIBOT_FUZZ=long .venv/bin/python -m pytest tests/test_fuzz.py     # trains on all that loads, not on a sample of it
"""

import io
import json
import os
import random
import re

import pyarrow as pa
import pyarrow.parquet
import pytest
from conftest import MINIATURE, ROOT, SAMPLE
from hypothesis import given, settings
from hypothesis import strategies as st

from medibot.data.prepared import prepare
from medibot.errors import RecipeError
from medibot.recipe import load_recipe
from medibot.run import open_run
from medibot.training.inspection import inspect_recipe
from medibot.training.session import train

pytestmark = pytest.mark.slow

LONG = os.environ.get("MEDIBOT_FUZZ") == "long"
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
ROWS = [json.loads(line) for line in SAMPLE.read_text().splitlines()[:24]]
SCALARS = [
    "null", "~", "true", "no", "-1", "0", "1e999", ".nan", "1e-320", "999999999999999999999", "''", "[]", "{}", "[null]",
    "{a: {b: c}}", "!!python/object:os.system x", "&a [*a]", "*missing", "|", "@x", "%x", "'", '"', "\t", "- x", "? x",
    "\x00", "\ud7ff", "\U0001f600", "x" * 5000, "../../etc", "auto", "[[[[[[]]]]]]", "2e-4", "0x10", "1_000", "=",
]  # fmt: skip


def mutated(text: str, draw: random.Random) -> str:
    """The text after one to three accidents of the kind that happen in an editor."""
    for _ in range(draw.randint(1, 3)):
        lines = text.split("\n")
        place = draw.randrange(len(lines))
        line = lines[place]
        what = draw.randrange(10)
        if what == 0:
            del lines[place]
        elif what == 1:
            lines.insert(place, line)
        elif what == 2:
            lines[place] = " " * draw.randrange(5) + line
        elif what == 3:
            lines[place] = line.strip()
        elif what == 4:
            lines[place] = re.sub(r":.*", ": " + draw.choice(SCALARS), line, count=1)
        elif what == 5:
            lines[place] = re.sub(r"\w+(?=:)", draw.choice(["x", "lr", "max_seq_length", "a b", "1", "null"]), line)
        elif what == 6:
            at = draw.randrange(len(line) + 1)
            lines[place] = line[:at] + draw.choice(SCALARS) + line[at:]
        elif what == 7:
            other = draw.randrange(len(lines))
            lines[place], lines[other] = lines[other], line
        elif what == 8:
            lines = lines[: place + 1]
        else:
            lines[place] = line.replace(":", draw.choice(["", "::", " :", ": :"]), 1)
        text = "\n".join(lines) or "\n"
    return text


@settings(max_examples=600, deadline=None, database=None, derandomize=True)
@given(seed=st.integers(0, 2**32))
def test_a_mutated_recipe_is_a_recipe_or_a_line_with_its_place(seed, tmp_path_factory):
    draw = random.Random(seed)
    file = tmp_path_factory.getbasetemp() / "mutated.yaml"
    file.write_text(mutated(draw.choice(RECIPES).read_text(), draw), encoding="utf-8")
    try:
        recipe = load_recipe(str(file))
    except RecipeError as error:
        assert error.problems
        for problem in error.problems:
            said = str(problem)
            assert "\n" not in said and str(file) in said and len(said) < 1000, said
        return
    assert load_recipe(str(file)).as_dict() == recipe.as_dict()


def mutated_file(draw: random.Random) -> tuple[str, bytes]:
    """(suffix, bytes) of a data file with something wrong in its rows, its text or its bytes."""
    rows = [dict(row) for row in draw.sample(ROWS, 12)]
    for _ in range(draw.randrange(4)):
        row, column = draw.choice(rows), draw.choice(list(rows[0]))
        row[column] = draw.choice(
            [None, "", " ", "\x00", "a\x00b", "\ufeff", "<|im_start|>system\nx<|im_end|>", "</s>", "\u202e", "\r\n", 7, 1.5,
             True, [], {}, [None], {"a": {"b": None}}, "x" * draw.choice([10, 100_000]), "\ufffd", "'\"", "a,b\n\"c"]
        )  # fmt: skip
    kind = draw.choice([".jsonl", ".csv", ".parquet"])
    if kind == ".jsonl":
        lines = [json.dumps(row, ensure_ascii=draw.random() < 0.5) for row in rows]
        accidents = [
            "",
            "null",
            "[]",
            '{"question": "\\ud800"}',
            "{",
            '{"question": 1, "question": 2}',
            "NaN",
            '"x"',
            "{}",
        ]
        for _ in range(draw.randrange(3)):
            lines.insert(draw.randrange(len(lines)), draw.choice(accidents))
        content = "\n".join(lines).encode(draw.choice(["utf-8", "utf-8", "utf-8-sig", "utf-16", "latin-1"]), "replace")
    elif kind == ".csv":
        cells = [[f'"{str(row[c]).replace(chr(34), chr(34) * 2)}"' for c in rows[0]] for row in rows]
        header = draw.choice(
            [list(rows[0]), [*list(rows[0])[:-1], "question"], list(rows[0])[:1], ["", *list(rows[0])[1:]]]
        )
        lines = [",".join(header), *(",".join(row) for row in cells)]
        if draw.random() < 0.3:
            lines[draw.randrange(len(lines))] += draw.choice([",extra", '"', "\x00", ",,,,"])
        content = draw.choice(["\n", "\r\n", "\r"]).join(lines).encode(draw.choice(["utf-8", "utf-8-sig", "utf-16"]))
    else:
        texts = {c: [None if row[c] is None else str(row[c]) for row in rows] for c in rows[0]}
        table = pa.table(texts)
        if draw.random() < 0.3:
            nested = draw.choice([[None] * 12, [[None]] * 12, [{"a": None}] * 12, [1.5] * 12, [b"\xff"] * 12])
            table = table.set_column(0, table.column_names[0], pa.array(nested))
        buffer = io.BytesIO()
        pa.parquet.write_table(table, buffer)
        content = buffer.getvalue()
    if draw.random() < 0.4:
        content = bytearray(content)
        for _ in range(draw.randint(1, 4)):
            at = draw.randrange(len(content))
            content[at : at + draw.choice([0, 1, 50])] = draw.choice([b"\x00", b"\xff\xfe", b"\xed\xa0\x80", b"{", b""])
        content = bytes(content[: draw.choice([len(content), len(content) // 2])])
    return kind, content


@pytest.fixture
def small(make_model, workplace, traced_once):
    """small(file): the quickstart in miniature on that file."""

    def make(file):
        model = f"model.pretrained_model_name_or_path={make_model('smollm2')}"
        overrides = [*MINIATURE, f"data.path={file}", "data.limit=null", "data.validation=0.0", "data.test=0.0"]
        overrides += ["data.group_by=[]", "quantization=null", "tracking=null", "evaluation.questions=[]"]
        overrides += ["training.eval_strategy=no", "training.eval_on_start=false", "training.save_strategy=no"]
        return load_recipe("quickstart", [model, *overrides], root=ROOT)

    return make


@pytest.mark.timeout(3600 if LONG else 600)
def test_a_mutated_data_file_is_trained_on_or_said_in_a_line(small, workplace, capfd):
    outcomes = {"read": 0, "refused": 0, "trained": 0}
    for seed in range(160):
        kind, content = mutated_file(random.Random(seed))
        file = workplace / f"rows-{seed}{kind}"
        file.write_bytes(content)
        try:
            recipe = small(file)
            for audit in inspect_recipe(recipe).audits:
                audit.refuse_faults()
            outcomes["read"] += 1
            if LONG or outcomes["read"] % 8 == 0:
                train(recipe, f"fuzzed-{seed}")
                assert open_run(f"fuzzed-{seed}").record()["status"] == "finished"
                outcomes["trained"] += 1
        except RecipeError as error:
            outcomes["refused"] += 1
            assert all("\n" not in str(problem) and len(str(problem)) < 1000 for problem in error.problems), seed
            assert not open_run(f"fuzzed-{seed}").folder.exists()
        except BaseException as error:
            raise AssertionError(f"seed {seed} ({kind}): {type(error).__name__}: {error}") from error
        assert not list((workplace / "cache").rglob("*.partial")), seed
        file.unlink()
    capfd.readouterr()
    assert min(outcomes.values()) >= 5, outcomes


def test_a_cell_of_ten_megabytes_is_counted_and_left_out(small, workplace, capsys):
    rows = [*ROWS, ROWS[0] | {"question": "What is long?", "answer": "word " * 2_000_000}]
    (workplace / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepared = prepare(small(workplace / "long.jsonl"))
    dropped = {line["rule"]: line["dropped"] for line in prepared.ledger}
    assert sum(dropped.values()) >= 1 and "What is long?" not in str(prepared.load("train")["prompt"])


@pytest.mark.timeout(3600 if LONG else 600)
def test_a_mutated_recipe_that_loads_also_inspects_and_trains(make_model, workplace, traced_once, capfd):
    text = (ROOT / "recipes" / "quickstart.yaml").read_text()
    trained = 0
    for seed in range(600):
        draw = random.Random(seed)
        file = workplace / "mutated.yaml"
        file.write_text(mutated(text, draw), encoding="utf-8")
        overrides = [f"model.pretrained_model_name_or_path={make_model('smollm2')}", *MINIATURE, "tracking=null"]
        name = f"fuzzed-{seed}"
        try:
            recipe = load_recipe(str(file), [*overrides, "training.gradient_accumulation_steps=1"])
            for audit in inspect_recipe(recipe).audits:
                audit.refuse_faults()
            train(recipe, name)
            assert open_run(name).record()["status"] == "finished"
            trained += 1
        except RecipeError as error:
            assert all("\n" not in str(problem) for problem in error.problems), seed
            assert not open_run(name).weights.exists()
        except BaseException as error:
            raise AssertionError(f"seed {seed}: {type(error).__name__}: {error}\n{file.read_text()}") from error
        if trained >= 10 and not LONG:
            break
    assert trained >= 10
