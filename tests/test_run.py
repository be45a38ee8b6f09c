"""The outputs folder: names, whole files, whole checkpoints, and what makes two runs the same."""

import json

import pytest
from conftest import ROOT

from medibot import run
from medibot.recipe import RecipeError, load_recipe


def quickstart(*overrides: str):
    return load_recipe("quickstart", overrides, root=ROOT)


def fingerprint(*overrides: str, data: str = "d", processes: int = 1) -> str:
    return run.fingerprint(quickstart(*overrides), data, {"model": "m"}, processes)[0]


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../a", ".hidden", "a b", "-x", "a\n", "x" * 200])
def test_name_that_would_leave_the_outputs_folder_is_refused(name, workplace):
    with pytest.raises(RecipeError, match="is no run name"):
        run.open_run(name)


@pytest.mark.parametrize("name", ["quickstart", "lr1e-4", "a.b_c-1"])
def test_plain_names_are_run_names(name, workplace):
    assert run.open_run(name).folder == workplace / "outputs" / name


def test_fingerprint_covers_what_decides_the_weights_and_nothing_else():
    same = fingerprint()
    assert fingerprint("tracking=null") == same
    assert fingerprint("evaluation.max_new_tokens=7") == same
    changes = [
        fingerprint("training.learning_rate=1e-3"),
        fingerprint("lora.r=4"),
        fingerprint("quantization=null"),
        fingerprint(data="other"),
        fingerprint(processes=2),
    ]
    assert len({same, *changes}) == 6


def test_changed_run_is_refused_by_name(workplace):
    this = run.open_run("mine")
    this.folder.mkdir(parents=True)
    _, parts = run.fingerprint(quickstart(), "d", {}, 1)
    this.write("run.json", {"status": "running", "parts": parts})
    run.refuse_changed(this, parts)
    _, changed = run.fingerprint(quickstart("lora.r=4"), "d", {}, 1)
    with pytest.raises(RecipeError, match=r"lora\.r: was 16, is 4.*another RUN=name"):
        run.refuse_changed(this, changed)


def test_finished_run_names_the_runs_there_are(workplace):
    for name, status in (("done", "finished"), ("torn", "running")):
        this = run.open_run(name)
        this.folder.mkdir(parents=True)
        this.write("run.json", {"status": status})
    assert run.finished_run("done").name == "done"
    with pytest.raises(RecipeError, match="'torn' is not finished"):
        run.finished_run("torn")
    with pytest.raises(RecipeError, match="there are: done, torn"):
        run.finished_run("none")


def test_rewind_forgets_what_a_resume_does_again(workplace):
    this = run.open_run("mine")
    this.folder.mkdir(parents=True)
    for step in range(5):
        this.append(this.metrics, {"step": step, "seconds": step * 10.0})
        this.append(this.folder / "answers.jsonl", {"global_step": step})
    assert run.rewind(this, 2) == 20.0
    assert [line["step"] for line in run.read_lines(this.metrics)] == [0, 1, 2]
    assert [line["global_step"] for line in run.read_lines(this.folder / "answers.jsonl")] == [0, 1, 2]


def test_torn_checkpoint_is_passed_over(workplace):
    this = run.open_run("mine")
    for step, files in (
        (2, ["trainer_state.json", "adapter_model.safetensors"]),
        (10, ["trainer_state.json", "adapter_model.safetensors"]),
        (20, ["adapter_model.safetensors"]),
        (30, ["trainer_state.json"]),
    ):
        folder = this.checkpoints / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        for name in files:
            (folder / name).touch()
    assert this.last_checkpoint().name == "checkpoint-10"


def test_resolved_recipe_reads_back_as_the_same(workplace):
    recipe = quickstart("data.system='2e-4'", "training.learning_rate=1e-5", "tracking.notes='no'", "quantization=null")
    (workplace / "recipe.yaml").write_text(run.resolved_yaml(recipe, {"dtype": "float32", "processes": 1}))
    assert load_recipe("recipe.yaml").as_dict() == recipe.as_dict()


def test_files_appear_whole(workplace):
    this = run.open_run("mine")
    this.folder.mkdir(parents=True)
    this.write("ledger.json", {"a": 1})
    with pytest.raises(TypeError):
        this.write("ledger.json", {"a": object()})
    assert json.loads((this.folder / "ledger.json").read_text()) == {"a": 1}
    assert [file.name for file in this.folder.iterdir()] == ["ledger.json"]
