"""The Makefile takes what people paste into its variables as text, and runs none of it."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

# The verb's place is taken by what writes its words down, and no environment is made
RECORDER = """#!{python}
import json, sys
json.dump(sys.argv[1:], open("words.json", "w"))
"""
NASTY = [
    "x; touch owned",
    "$(touch owned)",
    "$(shell touch owned)",
    "${shell touch owned}",
    "`touch owned`",
    '"; touch owned; "',
    "'; touch owned; '",
    "costs $5 and $$6",
    "two\ntouch owned\nlines",
    "& touch owned # | * ~ \\",
]
# The words of a variable's value among those of a verb
ONE_WORD = [
    ("train", "RECIPE"),
    ("plan", "RECIPE"),
    ("inspect", "RECIPE"),
    ("inspect", "FILE"),
    ("train", "RUN"),
    ("ask", "RUN"),
    ("train", "ACCELERATE"),
    ("train", "LAUNCH"),
    ("plan", "GPU"),
    ("eval", "ROWS"),
    ("eval", "DATA"),
    ("compare", "BASELINE"),
    ("benchmark", "LIMIT"),
    ("sweep", "SWEEP"),
    ("ask", "Q"),
    ("ask", "TOKENS"),
    ("serve", "PORT"),
    ("card", "HTML"),
    ("push", "REPO"),
    ("push", "FOLDER"),
    ("rules", "RULES"),
    ("diff", "A"),
    ("diff", "B"),
]
SWITCHES = [("train", "ANYWAY"), ("push", "PUBLIC"), ("push", "YES")]


@pytest.fixture
def make(tmp_path):
    """make(*words, **environment): run make in a project whose verbs only write down their words; return them."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/python").symlink_to(sys.executable)
    (tmp_path / ".venv/bin/medibot").write_text(RECORDER.format(python=sys.executable))
    (tmp_path / ".venv/bin/medibot").chmod(0o755)
    for name in (".ready", ".benchmark"):
        (tmp_path / ".venv" / name).touch()
    before = set(tmp_path.iterdir())

    def run(*words: str, **environment: str) -> list[str]:
        subprocess.run(["make", *words], cwd=tmp_path, env=os.environ | environment, check=True, capture_output=True)
        record = tmp_path / "words.json"
        found = json.loads(record.read_text())
        record.unlink()
        assert set(tmp_path.iterdir()) == before, "something was run"
        return found

    return run


@pytest.mark.parametrize(("verb", "name"), ONE_WORD)
def test_a_value_arrives_as_it_was_typed(make, verb, name):
    for value in NASTY:
        assert value in make(verb, f"{name}={value}"), value
        # PORT, Q and RECIPE of the environment count as well
        assert value in make(verb, **{name: value}), value


@pytest.mark.parametrize(("verb", "name"), SWITCHES)
def test_a_switch_is_on_whatever_its_value(make, verb, name):
    for value in NASTY:
        assert f"--{name.lower()}" in make(verb, f"{name}={value}")


def test_arguments_are_split_as_a_shell_splits_words_and_none_is_run(make):
    for value in NASTY:
        assert make("train", f"ARGS=a.b=1 {shlex.quote(value)}")[-2:] == ["a.b=1", value]
    assert make("train", "ARGS=x; $(touch owned) `touch owned` *")[-6:] == [
        "x;",
        "$(touch",
        "owned)",
        "`touch",
        "owned`",
        "*",
    ]
    with pytest.raises(subprocess.CalledProcessError) as failed:
        make("train", "ARGS=data.system='half")
    said = failed.value.stderr.decode().splitlines()
    assert said[0] == "ARGS: No closing quotation: data.system='half" and len(said) == 2


@pytest.mark.parametrize(("verb", "name"), [("compare", "RUNS"), ("benchmark", "TASKS")])
def test_a_list_is_split_at_blanks_and_nowhere_else(make, verb, name):
    for value in NASTY:
        words = value.split()
        assert make(verb, f"{name}={value}")[-len(words) :] == words


def test_every_variable_that_the_makefile_names_is_tried():
    named = next(line for line in (ROOT / "Makefile").read_text().splitlines() if line.startswith("VALUES :="))
    tried = {name for _, name in [*ONE_WORD, *SWITCHES]} | {"ARGS", "RUNS", "TASKS"}
    assert set(named.split()[2:]) == tried


def test_a_recipe_of_the_small_model_makes_it_first_whatever_its_name(make, tmp_path):
    (tmp_path / "recipes").mkdir()
    for value in ("x; touch owned", "$(shell touch owned)", '"`touch owned`"'):
        recipe = Path(tmp_path / "recipes" / f"{value}.yaml")
        recipe.write_text("model: {pretrained_model_name_or_path: models/SmolLM2-135M-Instruct}")
        with pytest.raises(subprocess.CalledProcessError) as failed:
            make("train", f"RECIPE={value}")
        assert b"recipes/smollm2.txt" in failed.value.stderr
        assert not (tmp_path / "owned").exists()
        recipe.unlink()
