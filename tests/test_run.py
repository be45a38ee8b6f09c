"""The outputs folder: names, whole files, whole checkpoints, and what makes two runs the same."""

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from safetensors.torch import save_file

from medibot.errors import RecipeError
from medibot.recipe import load_recipe
from medibot.recipe.resolved import describe_environment, dump_resolved_recipe
from medibot.run import (
    find_finished_run,
    locked,
    open_run,
    read_lines,
    refuse_changed,
    rewind_record,
    run_fingerprint,
)


def quickstart(*overrides: str):
    return load_recipe("quickstart", overrides, root=ROOT)


def fingerprint(*overrides: str, data: str = "d", processes: int = 1) -> str:
    return run_fingerprint(quickstart(*overrides), data, {"model": "m"}, processes)[0]


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../a", ".hidden", "a b", "-x", "a\n", "x" * 200])
def test_name_that_would_leave_the_outputs_folder_is_refused(name, workplace):
    with pytest.raises(RecipeError, match="is not a run name"):
        open_run(name)


@pytest.mark.parametrize("name", ["quickstart", "lr1e-4", "a.b_c-1"])
def test_plain_names_are_run_names(name, workplace):
    assert open_run(name).folder == workplace / "outputs" / name


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
    this = open_run("mine")
    this.folder.mkdir(parents=True)
    _, parts = run_fingerprint(quickstart(), "d", {}, 1)
    this.write("run.json", {"status": "running", "parts": parts})
    refuse_changed(this, parts)
    _, changed = run_fingerprint(quickstart("lora.r=4"), "d", {}, 1)
    with pytest.raises(RecipeError, match=r"lora\.r: was 16, is 4.*another RUN=name"):
        refuse_changed(this, changed)


def test_finished_run_names_the_runs_there_are(workplace):
    for name, status in (("done", "finished"), ("torn", "running")):
        this = open_run(name)
        this.folder.mkdir(parents=True)
        this.write("run.json", {"status": status})
    assert find_finished_run("done").name == "done"
    with pytest.raises(RecipeError, match="'torn' is not finished"):
        find_finished_run("torn")
    with pytest.raises(RecipeError, match="found: done, torn"):
        find_finished_run("none")


def test_rewind_forgets_what_a_resume_does_again(workplace):
    this = open_run("mine")
    this.folder.mkdir(parents=True)
    for step in range(5):
        this.append(this.metrics, {"step": step, "seconds": step * 10.0})
        this.append(this.folder / "answers.jsonl", {"global_step": step})
    rewind_record(this, 2)
    assert [line["step"] for line in read_lines(this.metrics)] == [0, 1, 2]
    assert [line["global_step"] for line in read_lines(this.folder / "answers.jsonl")] == [0, 1, 2]


def test_torn_checkpoint_is_passed_over(workplace):
    this = open_run("mine")
    for step, files in (
        (2, ["trainer_state.json", "adapter_model.safetensors"]),
        (10, ["trainer_state.json", "adapter_model.safetensors"]),
        (20, ["adapter_model.safetensors"]),
        (30, ["trainer_state.json"]),
    ):
        folder = this.checkpoints / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        for name in files:
            checkpoint_file(folder / name)
    assert this.last_checkpoint().name == "checkpoint-10"


def checkpoint_file(file: Path) -> None:
    """A small whole file of its kind."""
    if file.suffix == ".json":
        file.write_text("{}")
    elif file.suffix == ".safetensors":
        save_file({"a": torch.ones(1000)}, file)
    else:
        torch.save({"a": torch.ones(1000)}, file)


@pytest.mark.parametrize("name", ["trainer_state.json", "adapter_model.safetensors", "optimizer.pt", "rng_state.pth"])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_checkpoint_with_a_file_that_ends_early_is_named_and_set_aside(name, share, mine):
    for step in (2, 4):
        folder = mine.checkpoints / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        for each in ("trainer_state.json", "adapter_model.safetensors", "optimizer.pt", "rng_state.pth"):
            checkpoint_file(folder / each)
    assert mine.last_checkpoint() == folder and mine.set_torn_aside(mine.last_checkpoint()) == []
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: int(len(content) * share)])
    (mine.writing / "checkpoint-6").mkdir(parents=True)
    assert mine.last_checkpoint().name == "checkpoint-2"
    assert sorted(mine.set_torn_aside(mine.last_checkpoint())) == ["checkpoint-4", "checkpoint-6"]
    assert sorted(path.name for path in (mine.checkpoints / "torn").iterdir()) == ["checkpoint-4", "checkpoint-6"]
    assert [path.name for path in mine.all_checkpoints()] == ["checkpoint-2"]


def test_resolved_recipe_reads_back_as_the_same(workplace):
    recipe = quickstart("data.system='2e-4'", "training.learning_rate=1e-5", "tracking.notes='no'", "quantization=null")
    (workplace / "recipe.yaml").write_text(dump_resolved_recipe(recipe, {"dtype": "float32", "processes": 1}))
    assert load_recipe("recipe.yaml").as_dict() == recipe.as_dict()


def test_files_appear_whole(workplace):
    this = open_run("mine")
    this.folder.mkdir(parents=True)
    this.write("ledger.json", {"a": 1})
    with pytest.raises(TypeError):
        this.write("ledger.json", {"a": object()})
    assert json.loads((this.folder / "ledger.json").read_text()) == {"a": 1}
    assert [file.name for file in this.folder.iterdir()] == ["ledger.json"]


@pytest.fixture
def mine(workplace):
    """A run with an empty folder."""
    (workplace / "outputs" / "mine").mkdir(parents=True)
    return open_run("mine")


def test_interrupted_write_leaves_the_file_as_it_was(mine, monkeypatch):
    mine.write("run.json", {"status": "running"})

    def killed(file, target):
        assert json.loads(file.read_text()) == {"status": "finished"} and target.name == "run.json"
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "replace", killed)
        mine.write("run.json", {"status": "finished"})
    assert mine.record() == {"status": "running"}
    mine.write("run.json", {"status": "finished"})
    assert mine.record() == {"status": "finished"}


def test_appended_lines_are_read_back_whatever_they_hold(mine):
    assert read_lines(mine.metrics) == []
    lines = [{"step": 1, "text": "a\u2028b\x85c\x0cd\r\ne"}, {"step": 2}]
    for line in lines:
        mine.append(mine.metrics, line)
    assert read_lines(mine.metrics) == lines
    rewind_record(mine, 2)
    assert read_lines(mine.metrics) == lines


def test_half_a_last_line_is_forgotten(mine):
    mine.append(mine.metrics, {"step": 1, "seconds": 2.0})
    with mine.metrics.open("a") as stream:
        stream.write('{"step": 2, "sec')
    assert read_lines(mine.metrics) == [{"step": 1, "seconds": 2.0}]
    rewind_record(mine, 1)
    assert mine.metrics.read_text().count("\n") == 1
    mine.append(mine.metrics, {"step": 2})
    assert [line["step"] for line in read_lines(mine.metrics)] == [1, 2]


def test_rewind_of_a_run_without_records_writes_none(mine):
    rewind_record(mine, 5)
    assert list(mine.folder.iterdir()) == []


def test_only_numbered_folders_are_checkpoints(mine):
    for name in ("checkpoint-2", "checkpoint-2-copy", "checkpoint-best", "checkpoint-"):
        folder = mine.checkpoints / name
        folder.mkdir(parents=True)
        checkpoint_file(folder / "trainer_state.json")
        checkpoint_file(folder / "model-00001-of-00002.safetensors")
    assert mine.last_checkpoint() == mine.checkpoints / "checkpoint-2"


def test_second_training_in_a_folder_is_refused_while_the_first_runs(mine):
    with locked(mine):
        said = rf"another training is writing it now \(process {os.getpid()} on .* since 20.*\)"
        with pytest.raises(RecipeError, match=said), locked(mine):
            pass
    with locked(mine):
        pass


def test_a_disk_that_is_full_elsewhere_is_named_and_not_the_runs(mine, tmp_path):
    for error, named in (
        (OSError(errno.ENOSPC, "No space left on device"), str(mine.folder)),
        (OSError(errno.EACCES, "Permission denied", str(tmp_path / "cache" / "gone" / "x.json")), "cache/gone/x.json"),
        (RuntimeError("PytorchStreamWriter failed writing file data/12"), str(mine.folder)),
    ):
        said = rf"{named}: cannot be written, [\d.]+ GB free: .*make room, then give the same command again"
        with pytest.raises(RecipeError, match=said), locked(mine):
            raise error


@pytest.mark.parametrize(
    ("before", "after", "says"),
    [
        ([], ["lora.target_modules=[q_proj]"], "lora.target_modules: was 'all-linear', is ['q_proj'])"),
        (["lora.bias=none"], [], "lora.bias: was 'none', is absent)"),
        (["training.max_length="], ["training.max_length=null"], "training.max_length: was absent, is None)"),
        (["quantization=null", "lora=null"], ["quantization=null", "lora={}"], "lora: was absent, is {})"),
        ([], ["lora.r=4", "training.seed=3"], "lora.r: was 16, is 4 and 1 more)"),
    ],
)
def test_what_changed_is_named_even_where_it_was_absent(mine, before, after, says):
    mine.write("run.json", {"parts": run_fingerprint(quickstart(*before), "d", {}, 1)[1]})
    with pytest.raises(RecipeError) as caught:
        refuse_changed(mine, run_fingerprint(quickstart(*after), "d", {}, 1)[1])
    assert says in str(caught.value)


TEXTS = [
    "2e-4", "1e5", "12e03", "0o17", "0x1F", "010", "1_000", ".5", "1.", "-3", "+1.5E3", ".inf", ".nan", "60:30", "9" * 30 + "." + "9" * 30,
    "no", "yes", "on", "off", "y", "true", "False", "null", "~", "2001-01-01", "=", "<<", "- a", "a: b", "a #b", "#",
    "[a]", "{a}", "*a", "&a", "!a", "%a", "@a", "`a", "|", ">", "?", "'", '"', "a'b\"c", " a ", "a\nb\n\nc\n", "a\tb", "\\n",
    "Anämie\u2028\u00a0\ufeff", "word " * 60,
]  # fmt: skip


@pytest.mark.parametrize("text", TEXTS)
def test_resolved_recipe_keeps_text_as_text(workplace, text):
    recipe = quickstart(f"data.system={json.dumps(text)}")
    assert recipe.data.system == text
    (workplace / "again.yaml").write_text(dump_resolved_recipe(recipe, {"dtype": "float32"}), encoding="utf-8")
    assert load_recipe("again.yaml").as_dict() == recipe.as_dict()


def test_resolved_recipe_keeps_keys_numbers_and_nothing(workplace):
    recipe = quickstart(
        "training.learning_rate=1e-05",
        "training.max_length=null",
        "training.lr_scheduler_kwargs={'2e-4': 1, 'no': [], small: 1e-300, large: 1e+22, whole: 2.0, none: null}",
        "lora={}",
        "data.clean=[drop_unanswered, {drop_short: {min_words: 3}}]",
    )
    (workplace / "again.yaml").write_text(dump_resolved_recipe(recipe, {"why": "line\nbreak"}), encoding="utf-8")
    again = load_recipe("again.yaml")
    assert json.dumps(again.as_dict()) == json.dumps(recipe.as_dict())
    assert again.data == recipe.data


def test_environment_names_versions_commit_and_hardware():
    known = describe_environment("cpu")
    assert known["device"] == "cpu" and known["cpus"] >= 1
    assert {"torch", "trl", "medibot"} <= set(known["versions"])
    assert known["commit"] is None or len(known["commit"]) == 40
    json.dumps(known)
