"""The house: imports go down only, files and functions stay short, and nothing heavy is imported before it is used."""

import ast
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT
from importlinter import cli as importlinter

import medibot

FILES = sorted((ROOT / "medibot").rglob("*.py"))
ROOMS = sorted(file.parent.name for file in FILES if file.name == "__init__.py" and file.parent.name != "medibot")


def functions() -> list[tuple[str, int]]:
    found = []
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                found.append((f"{file.relative_to(ROOT)}: {node.name}", node.end_lineno - node.lineno + 1))
    return found


def test_imports_go_down_only(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert importlinter.lint_imports(no_cache=True) == 0


def test_a_contract_that_an_import_breaks_fails(tmp_path, monkeypatch):
    # A copy of the package in which the lowest floor imports the highest
    target = tmp_path / "medibot"
    for file in FILES:
        copy = target / file.relative_to(ROOT / "medibot")
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(file.read_text())
    (target / "errors.py").write_text("import medibot.cli\n" + (target / "errors.py").read_text())
    (tmp_path / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text())
    command = [sys.executable, "-m", "importlinter.cli", "lint-imports", "--no-cache"]
    program = "import sys; sys.path.insert(0, '.'); from importlinter.cli import lint_imports_command as run; run()"
    done = subprocess.run([command[0], "-c", program, "--no-cache"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and "medibot.errors -> medibot.cli" in done.stdout, done.stdout + done.stderr


def test_every_room_is_there_and_says_what_it_does():
    named = {"recipe", "cleaning", "model", "data", "planning", "training", "evaluation", "serving", "export"}
    assert set(ROOMS) == named
    for room in ROOMS:
        text = ast.get_docstring(ast.parse((ROOT / "medibot" / room / "__init__.py").read_text()))
        sentences = re.findall(r"[^.]{20,}\.(?=\s|$)", text or "")
        assert len(sentences) >= 3, room


def test_the_package_is_short():
    # The house took 7,500; the rest is data of one's own (shapes, files, sources, thinking, a million rows) and GPUs
    lines = {file: len(file.read_text().splitlines()) for file in FILES}
    assert sum(lines.values()) <= 10_700
    assert [file.name for file, count in lines.items() if count > 300] == []
    assert [name for name, count in functions() if count > 50] == []


def test_no_python_stands_in_a_template_and_no_page_in_python():
    templates = [file for file in (ROOT / "medibot" / "templates").iterdir() if file.name != "README.md"]
    assert templates and all(file.suffix in {".j2", ".html", ".css"} for file in templates)
    assert [file.name for file in FILES if "<!doctype" in file.read_text()] == []


@pytest.mark.parametrize("module", ["medibot", "medibot.cli", "medibot.recipe", "medibot.errors", "medibot.run"])
def test_import_brings_nothing_heavy(module):
    program = (
        f"import sys, {module}; print(sorted({{'torch', 'transformers', 'trl', 'datasets'}} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_public_names_are_what_they_say():
    assert set(medibot.__all__) == {"load_recipe", "prepare", "train", "evaluate", "compare", "merge", "Assistant"}
    for name in medibot.__all__:
        found = getattr(medibot, name)
        assert callable(found) and found.__module__.startswith("medibot.") and found.__doc__
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        medibot.nothing  # noqa: B018


@pytest.mark.slow
def test_public_api_trains_evaluates_compares_merges_and_answers(make_model, workplace):
    from conftest import OVERRIDES

    weights = f"model.pretrained_model_name_or_path={make_model('smollm2')}"
    recipe = medibot.load_recipe("quickstart", [weights, *OVERRIDES, "quantization=null"], root=ROOT)
    prepared = medibot.prepare(recipe)
    assert len(prepared.load("train")) == prepared.split["rows"]["train"] > 0
    run = medibot.train(recipe, "mine")
    assert run.weights.is_dir() and run.record()["status"] == "finished"
    evaluation = medibot.evaluate("mine", rows=4)
    assert evaluation.results["rows"] == 4 and (evaluation.folder / "results.json").is_file()
    shutil.copytree(run.folder, run.folder.with_name("twin"))
    assert medibot.compare(["mine", "twin"]).verdict.startswith("The data cannot tell")
    merged = medibot.merge("mine")
    assert merged.proof["modes"][merged.proof["kept"]]["greedy_agreement"] == 1.0 and merged.folder.is_dir()
    reply = medibot.Assistant("mine").reply([{"role": "user", "content": "What is anemia?"}])
    assert isinstance("".join(reply), str) and reply.completion_tokens > 0
