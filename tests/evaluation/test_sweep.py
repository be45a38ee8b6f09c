"""A grid of trainings: read as W&B reads it, checked whole before it starts, run here through its own command."""

import shutil
import sys

import pytest
import yaml
from conftest import OVERRIDES, ROOT

from medibot import cli
from medibot.errors import RecipeError
from medibot.evaluation.sweep import RECIPE, grid_cells, read_sweep, sweep
from medibot.recipe import load_recipe
from medibot.run import open_run, read_json

FILES = sorted((ROOT / "recipes" / "sweeps").glob("*.yaml"))


@pytest.fixture
def write(tmp_path, make_model, monkeypatch):
    """write(**changes): a sweep file of two miniature trainings."""
    monkeypatch.setenv("MEDIBOT_OUTPUTS", str(tmp_path / "outputs"))
    monkeypatch.setenv("MEDIBOT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(ROOT)
    small = [f"model.pretrained_model_name_or_path={make_model()}", "quantization=null", *OVERRIDES]

    def make(**changes):
        line = f'make train RECIPE=quickstart RUN=mini-$WANDB_RUN_ID ARGS="{" ".join(small)} $*"'
        spec = {
            "method": "grid",
            "parameters": {"lora.r": {"values": [4, 8]}, "training.seed": {"value": 1}},
            "command": ["bash", "-c", line, "make", "${args_no_hyphens}"],
        }
        file = tmp_path / "mini.yaml"
        file.write_text(yaml.safe_dump(spec | changes))
        return str(file)

    return make


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_sweep_on_disk_is_a_grid_of_recipes_that_load(file, monkeypatch):
    monkeypatch.chdir(ROOT)
    spec = read_sweep(file)
    grid = grid_cells(file, spec)
    assert len(grid) == 4
    for arguments in grid.values():
        recipe = load_recipe(RECIPE.search(" ".join(spec["command"]))[1], arguments)
        for argument in arguments:
            key, _, value = argument.partition("=")
            section, _, setting = key.partition(".")
            assert str(recipe.as_dict()[section][setting]) == value
    assert spec["metric"] == {"name": "eval/loss", "goal": "minimize"}


def test_the_command_is_the_one_that_wandbs_agent_makes():
    from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

    spec = read_sweep(ROOT / "recipes" / "sweeps" / "rank-and-rate.yaml")
    for arguments in grid_cells(ROOT, spec).values():
        settings = dict(argument.split("=") for argument in arguments)
        theirs = create_sweep_command_args({"args": {key: {"value": value} for key, value in settings.items()}})
        assert theirs["args_no_hyphens"] == arguments
        assert "${args_no_hyphens}" in create_sweep_command(spec["command"])


@pytest.mark.slow
def test_a_grid_trains_evaluates_and_compares_here(write, tmp_path, capfd):
    comparison = sweep(write(), rows=4)
    names = ["mini-r4-seed1", "mini-r8-seed1"]
    for name, rank in zip(names, (4, 8), strict=True):
        assert load_recipe(str(open_run(name).recipe)).lora["r"] == rank
        assert read_json(open_run(name).folder / "eval" / "results.json")["rows"] == 4
    compared = read_json(tmp_path / "outputs" / "comparisons" / "-".join(names) / "comparison.json")
    assert compared["differences"] == [["lora.r", "4", "8"]]
    said = capfd.readouterr().out
    assert (
        "[1/2] mini-r4-seed1" in said and "[2/2] mini-r8-seed1" in said and comparison.verdict == compared["sentence"]
    )


def test_a_mistake_in_the_last_cell_stops_the_sweep_before_the_first(write, tmp_path):
    with pytest.raises(RecipeError, match=r"lora\.r"):
        sweep(write(parameters={"lora.r": {"values": [4, "many"]}}))
    assert not (tmp_path / "outputs").exists()


@pytest.mark.slow
def test_a_training_that_fails_does_not_stop_the_others(write, trained_once, tmp_path, capfd):
    made = trained_once("quantization=null")
    shutil.copytree(made / "cache", tmp_path / "cache")
    # A sweep knows of a training its exit code and its folder: the first leaves the one, the second the other
    line = f"""case "$*" in *lora.r=4*) exit 3;; esac  # in the place of make train RECIPE=quickstart
        mkdir -p {tmp_path}/outputs && cp -r {made}/outputs/run {tmp_path}/outputs/$0-$WANDB_RUN_ID  # RUN=mini-$WANDB_RUN_ID"""
    command = ["bash", "-c", line, "mini", "${args_no_hyphens}"]
    with pytest.raises(RecipeError, match=r"1 of 2 trainings failed: mini-r4"):
        sweep(write(parameters={"lora.r": {"values": [4, 16]}}, command=command), rows=4)
    assert (tmp_path / "outputs" / "mini-r16" / "eval" / "results.json").is_file()
    assert not (tmp_path / "outputs" / "mini-r4").exists() and "[2/2] mini-r16" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"method": "bayes"}, "method bayes needs W&B's server (write method: grid, or log in"),
        ({"parameters": {"lora.r": {"min": 1, "max": 8}}}, "lora.r has no values"),
        ({"parameters": {"lora.r": 8}}, "lora.r has no values"),
        ({"parameters": None}, "needs parameters"),
        ({"command": 8}, "needs command"),
        ({"parameters": {"lora.r": {"values": [], "other": 1}}}, "lora.r has no values"),
        (
            {"command": ["make", "train", "RECIPE=quickstart"]},
            "needs command, with RECIPE=, RUN=…$WANDB_RUN_ID and ${args_no_hyphens} in the command",
        ),
    ],
)
def test_what_cannot_be_swept_is_said_in_a_line(write, changes, said, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["medibot", "sweep", write(**changes)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2 and said in capsys.readouterr().err


def test_unknown_and_broken_files_are_said_in_a_line(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(RecipeError, match=r"there are: method, rank-and-rate"):
        sweep("none")
    (tmp_path / "broken.yaml").write_text("method: [grid")
    with pytest.raises(RecipeError, match=r"not YAML"):
        sweep(str(tmp_path / "broken.yaml"))


@pytest.mark.slow
def test_a_server_that_refuses_the_sweep_is_said_in_a_line(write, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_MODE", "online")
    with pytest.raises(RecipeError, match=r"W&B refused it: .*WANDB_MODE=offline runs it here"):
        sweep(write())
