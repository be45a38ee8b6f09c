"""What upstream's constructors take and say is remembered, and is what they would say now."""

import json
import os
import subprocess
import sys
from enum import Enum
from typing import Any, Literal

import pytest
from conftest import ROOT

from medibot.recipe import constructors
from medibot.recipe.constructors import ask_constructor, decode, describe_constructors, encode, recall

# Checks every recipe and three wrong ones, and says which of the slow libraries that took
PROGRAM = """
import json, sys
from medibot.errors import RecipeError
from medibot.recipe import list_recipes, load_recipe
from medibot.recipe.schema import json_schema
said = []
for overrides in ([], ["training.optim=adamw_torhc"], ["lora.bias=some", "training.warmup_stepz=3"],
                  ["training.save_strategy=best", "training.eval_strategy=no"]):
    for name, _ in list_recipes():
        try:
            said.append(repr(load_recipe(name, overrides)))
        except RecipeError as error:
            said.append(str(error))
print(json.dumps([said, json_schema(), sorted({"torch", "trl", "peft", "transformers"} & sys.modules.keys())]))
"""

# A pattern for layers that are not named
WRONG = {"layers_pattern": "layers"}


@pytest.fixture
def memory(tmp_path, monkeypatch):
    """The file of a test's own."""
    file = tmp_path / "cache" / "constructors.json"
    monkeypatch.setattr(constructors, "memory", lambda: file)
    return file


def test_checks_say_the_same_from_memory_and_import_nothing_slow(tmp_path):
    def run() -> tuple[list[Any], str]:
        environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
        command = [sys.executable, "-c", PROGRAM]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
        return json.loads(done.stdout.splitlines()[-1]), done.stderr

    (first, asked), (second, recalled) = run(), run()
    assert first[:2] == second[:2] and any("adamw_torch" in said for said in first[0])
    assert first[2] and second[2] == []
    assert "once for their versions" in asked and recalled == ""


@pytest.mark.parametrize("damage", [b"", b"{}", b"0" * 64 + b"\n{}", b"\xff\x00"])
def test_a_damaged_memory_is_asked_anew_and_mended(memory, damage):
    described, words = describe_constructors(), ask_constructor("lora", WRONG)
    whole = recall()
    assert words and whole["parameters"] and words in whole["answers"].values()
    memory.write_bytes(damage or memory.read_bytes()[:-1])
    assert recall() == {}
    assert describe_constructors() == described and ask_constructor("lora", WRONG) == words
    assert recall() == whole


def test_a_memory_that_cannot_be_written_is_done_without(memory):
    memory.parent.write_text("no folder")
    assert describe_constructors()["lora"]["r"] == (int, 8)
    assert ask_constructor("lora", WRONG) and not ask_constructor("lora", {"r": 8})


def test_each_value_of_each_section_is_an_answer_of_its_own(memory):
    assert ask_constructor("lora", WRONG) and not ask_constructor("lora", {"r": 1})
    assert not ask_constructor("training", {"max_steps": 1})
    assert len(recall()["answers"]) == 3
    constructors.ANSWERS, most = 2, constructors.ANSWERS
    try:
        ask_constructor("lora", {"r": 2})
    finally:
        constructors.ANSWERS = most
    assert len(recall()["answers"]) == 2


class Color(Enum):
    RED = "red"


@pytest.mark.parametrize(
    ("hint", "read"),
    [
        (int | None, int | None),
        (Color | str, Literal["red"]),
        (dict[str, Any] | str | None, dict[str, Any] | None),
        (list[str] | str, list[str] | str),
        (list[tuple[int, int]], list[tuple[int, int]]),
        (Literal[False] | None, Literal[False] | None),
        (Any, Any),
        (bool, bool),
    ],
)
def test_a_type_is_read_as_a_recipe_may_fill_it(hint, read):
    assert decode(json.loads(json.dumps(encode(hint)))) == read
