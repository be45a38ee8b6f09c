"""Run a grid of trainings from a W&B sweep file: by W&B where this machine is logged in, else here in sequence."""

import itertools
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from medibot import tracking
from medibot.errors import RecipeError, one_line
from medibot.evaluation.compare import compare
from medibot.evaluation.evaluate import evaluate
from medibot.evaluation.report import Report
from medibot.recipe import load_recipe
from medibot.recipe.files import find_file

FOLDER, ARGUMENTS, RUN_ID = "recipes/sweeps", "${args_no_hyphens}", "$WANDB_RUN_ID"
RECIPE, RUN = r"RECIPE=(\S+)", rf"RUN=(\S*{re.escape(RUN_ID)})"


def sweep(name: str, rows: int | None = None) -> Report | None:
    """Run the sweep file `name`; offline, return how the trainings compare on `rows` rows of the test split."""
    file = Path(name) if name.endswith((".yaml", ".yml")) else find_file(f"{FOLDER}/{name}.yaml")
    spec = read_sweep(file)
    return run_here(file, spec, rows) if tracking.offline() else run_online(spec)


def read_sweep(file: Path) -> dict[str, Any]:
    """Return the file as W&B reads it; raise RecipeError for what cannot run here as it would there."""
    if not file.is_file():
        found = ", ".join(sorted(path.stem for path in find_file(FOLDER).glob("*.yaml")))
        raise RecipeError.of("SWEEP", f"{file} not found", f"there are: {found}")
    try:
        spec = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError.of(str(file), f"not YAML: {one_line(error)}", "mend it") from error
    parts = {"parameters": dict, "command": list, "method": str}
    what = ", ".join(key for key in parts if not isinstance(spec, dict) or not isinstance(spec.get(key), parts[key]))
    if not what and not (ARGUMENTS in spec["command"] and in_command(spec, RECIPE) and in_command(spec, RUN)):
        what = f"RECIPE=, RUN=…{RUN_ID} and {ARGUMENTS} in its command"
    if what:
        raise RecipeError.of(str(file), f"needs {what}", "write it as recipes/sweeps/rank-and-rate.yaml")
    return spec


def in_command(spec: dict[str, Any], pattern: str) -> str:
    """Return what the command says where `pattern` looks; nothing if it is not there."""
    found = re.search(pattern, " ".join(map(str, spec["command"])))
    return found[1] if found else ""


def grid_cells(file: Path, spec: dict[str, Any]) -> list[dict[str, Any]]:
    """Return {parameter: value} of each training of the grid, the last parameter changing fastest."""
    if spec["method"] != "grid":
        what, remedy = f"method {spec['method']} needs W&B's server", "write method: grid, or log in to W&B"
        raise RecipeError.of(str(file), what, remedy)
    columns = []
    for key, written in spec["parameters"].items():
        match written:
            case {"values": [_, *_] as values}:
                columns.append(values)
            case {"value": value}:
                columns.append([value])
            case _:
                raise RecipeError.of(str(file), f"{key} has no values", f"write {key}: {{values: [a, b]}}")
    return [dict(zip(spec["parameters"], cell, strict=True)) for cell in itertools.product(*columns)]


def cell_arguments(cell: dict[str, Any]) -> list[str]:
    """Return what W&B's agent puts in place of ${args_no_hyphens}."""
    return [f"{key}={value}" for key, value in cell.items()]


def cell_name(cell: dict[str, Any]) -> str:
    """Return what takes the place of W&B's run id here: the cell's own values."""
    return re.sub(r"[^\w.-]+", "-", "-".join(f"{key.rpartition('.')[2]}{value}" for key, value in cell.items()))


def run_here(file: Path, spec: dict[str, Any], rows: int | None) -> Report | None:
    """Check every cell, then train the grid, going on past a training that fails; evaluate and compare the rest."""
    grid, trained, failed = grid_cells(file, spec), [], []
    for cell in grid:
        load_recipe(in_command(spec, RECIPE), cell_arguments(cell))
    for place, cell in enumerate(grid, start=1):
        name = in_command(spec, RUN).replace(RUN_ID, cell_name(cell))
        print(f"[{place}/{len(grid)}] {name}", flush=True)
        at, command = spec["command"].index(ARGUMENTS), [str(word) for word in spec["command"]]
        command[at : at + 1] = cell_arguments(cell)
        done = subprocess.run(command, env=os.environ | {"WANDB_RUN_ID": cell_name(cell)})
        (failed if done.returncode else trained).append(name)
    for name in trained:
        print(f"evaluating {name}", flush=True)
        evaluate(name, rows)
    comparison = compare(trained) if len(trained) > 1 else None
    if failed:
        what = f"{len(failed)} of {len(grid)} trainings failed: {', '.join(failed)}"
        raise RecipeError.of("SWEEP", what, "see above; the same command again goes on")
    return comparison


def run_online(spec: dict[str, Any]) -> None:
    """Register the sweep with W&B and work on it until it is done; more machines join with the printed command."""
    import wandb

    project = spec.get("project", "medibot")
    try:
        made = wandb.sweep(spec, project=project)
    except Exception as error:  # wandb's and requests' errors have no base of their own
        what = f"W&B refused it: {tracking.name_error(error)}"
        raise RecipeError.of("SWEEP", what, "WANDB_MODE=offline runs it here") from error
    print(f"on another machine: wandb agent {project}/{made}")
    done = subprocess.run([sys.executable, "-m", "wandb", "agent", "--project", project, made])
    if done.returncode:
        raise RecipeError.of("SWEEP", f"W&B's agent ended with {done.returncode}", "see above")
