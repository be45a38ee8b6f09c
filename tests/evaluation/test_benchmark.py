"""Multiple choice by lm-eval: our task files ask what their data sets hold, and its scores are those of the weights."""

import json
import sys

import pytest
import torch
import yaml
from conftest import ROOT
from transformers import AutoTokenizer

from medibot import cli
from medibot.errors import RecipeError
from medibot.evaluation.benchmark import MEDICAL, TASKS, benchmark
from medibot.model.loading import load_tuned
from medibot.recipe import load_recipe
from medibot.run import read_json, read_lines

# One row in the columns of each data set as published
MEDQA = {"sent1": "Which one?", "sent2": "", "label": 2} | {f"ending{n}": f"option {n}" for n in range(4)}
MEDMCQA = {"question": "Which one?", "cop": 2} | {f"op{letter}": f"option {n}" for n, letter in enumerate("abcd")}
MMLU = {"question": " Which one? ", "subject": "anatomy", "answer": 2, "choices": [f"option {n}" for n in range(4)]}
PUBMEDQA = {
    "question": "Which one?",
    "context": {"contexts": ["First part.", "Second part."], "labels": ["A", "B"], "meshes": []},
    "final_decision": "maybe",
}


@pytest.fixture
def at_root(trained, monkeypatch):
    """A trained run, seen from the repository, where the task files are."""

    def make(name: str, *overrides: str):
        this = trained(name, "quantization=null", *overrides)
        monkeypatch.chdir(ROOT)
        return this

    return make


def test_every_medical_task_has_its_file():
    files = {path.stem for path in (ROOT / "benchmarks" / "tasks").glob("*.yaml")}
    assert files == {*MEDICAL, "sample", "_mmlu"}


@pytest.mark.parametrize("task", MEDICAL)
def test_task_asks_what_its_data_set_holds(task, tmp_path):
    from lm_eval.api.task import ConfigurableTask

    folder = ROOT / "benchmarks" / "tasks"
    config = yaml.safe_load((folder / f"{task}.yaml").read_text())
    config = yaml.safe_load((folder / config.pop("include")).read_text()) | config if "include" in config else config
    row = {"medqa": MEDQA, "medmcqa": MEDMCQA, "pubmedqa": PUBMEDQA}.get(task, MMLU)
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    local = {"data_files": {config["test_split"]: str(tmp_path / "rows.jsonl")}}
    made = ConfigurableTask(config=config | {"dataset_path": "json", "dataset_kwargs": local})
    (asked,) = made.test_docs()
    text, options = made.doc_to_text(asked), made.doc_to_choice(asked)
    assert "Which one?" in text and text.endswith("Answer:") and "{{" not in text
    if task == "pubmedqa":
        assert options == ["yes", "no", "maybe"] and "First part.\nSecond part." in text
        assert made.doc_to_target(asked) in ("maybe", 2)
    else:
        assert [f"{letter}. option {n}" in text for n, letter in enumerate("ABCD")] == [True] * 4
        assert made.doc_to_target(asked) == 2 and options == list("ABCD")


def test_sample_is_well_formed_and_its_answers_are_spread():
    rows = [json.loads(line) for line in (ROOT / "benchmarks" / "tasks" / "sample.jsonl").read_text().splitlines()]
    assert len(rows) == 30 == len({row["question"] for row in rows})
    assert all(len(set(row["options"])) == 4 and 0 <= row["answer"] < 4 for row in rows)
    assert {sum(row["answer"] == place for row in rows) for place in range(4)} <= {7, 8}


def test_scores_are_those_of_base_and_tuned_weights_behind_the_chat_template(at_root):
    this = at_root("mine", "training.max_steps=4", "training.learning_rate=0.05")
    done = benchmark("mine", ["sample"])
    found = done.results
    lines = read_lines(this.folder / "benchmark" / "rows.jsonl")
    recipe = load_recipe(str(this.recipe))
    tokenizer = AutoTokenizer.from_pretrained(this.weights)
    weights = load_tuned(recipe, this.weights, torch.float32)
    questions = [json.loads(line) for line in (ROOT / TASKS / "sample.jsonl").read_text().splitlines()]
    assert len(lines) == len(questions) == found["all"]["rows"]
    for line, question in zip(lines, questions, strict=True):
        assert recipe.data.system in line["prompt"] and question["options"][3] in line["prompt"]
        ids = tokenizer(line["prompt"], add_special_tokens=False)["input_ids"]
        letters = [tokenizer(line["prompt"] + c, add_special_tokens=False)["input_ids"][len(ids)] for c in "ABCD"]
        for which in ("base", "tuned"):
            with torch.inference_mode(), weights.disable_adapter() if which == "base" else torch.no_grad():
                logits = weights(input_ids=torch.tensor([ids])).logits[0, -1, letters]
            assert line[which] == int(logits.argmax() == question["answer"]), (which, question)
    for which, key in (("base", "baseline"), ("tuned", "value")):
        assert found["all"][key] == pytest.approx(sum(line[which] for line in lines) / len(lines))
    assert [line["base"] for line in lines] != [line["tuned"] for line in lines]
    assert found["verdict"] == done.__rich__().renderables[0] and "points" in found["verdict"]
    assert read_json(this.folder / "benchmark" / "results.json") == found


def test_an_untrained_adapter_costs_exactly_nothing_and_a_limit_is_said(at_root):
    at_root("mine", "training.learning_rate=1e-30")
    done = benchmark("mine", ["sample"], limit=5)
    found = done.results
    assert found["all"]["difference"] == 0.0 == found["all"]["low"] == found["all"]["high"]
    assert found["all"]["rows"] == 5 and found["verdict"].startswith("no evidence that mine gained or lost knowledge")
    assert done.__rich__().renderables[1].startswith("A quick look: at most 5 questions")


def test_what_cannot_be_asked_is_said_in_a_line(at_root, monkeypatch, capsys):
    at_root("mine")
    with pytest.raises(RecipeError, match=r"neither benchmarks/tasks nor lm-eval has a task 'medqq'.*medqa"):
        benchmark("mine", ["sample", "medqq"])
    with pytest.raises(RecipeError, match=r"medqa cannot be loaded: .*TASKS=sample"):
        benchmark("mine", ["medqa"])
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    monkeypatch.setattr(sys, "argv", ["medibot", "benchmark", "sample", "--run", "mine"])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2 and "lm-eval is not installed (run: make benchmark" in capsys.readouterr().err
