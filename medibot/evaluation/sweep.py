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

FOLDER = "recipes/sweeps"
ARGUMENTS, RUN_ID = "${args_no_hyphens}", "$WANDB_RUN_ID"
RECIPE, RUN = r"RECIPE=(\S+)", rf"RUN=(\S*){re.escape(RUN_ID)}"


def sweep(name: str, rows: int | None = None) -> Report | None:
    """Run the sweep file `name`; offline, return how the trainings compare on `rows` rows of the test split.

    Offline, every cell's overrides are checked before the first training starts.
    """
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
    parts = (("parameters", dict), ("command", list), ("method", str))
    wrong = [key for key, kind in parts if not isinstance(spec, dict) or not isinstance(spec.get(key), kind)]
    if wrong:
        raise RecipeError.of(str(file), f"needs {', '.join(wrong)}", "write it as recipes/sweeps/rank-and-rate.yaml")
    if ARGUMENTS not in spec["command"] or None in (in_command(spec, RECIPE), in_command(spec, RUN)):
        what = f"the command needs RECIPE=, RUN=…{RUN_ID} and {ARGUMENTS}"
        raise RecipeError.of(str(file), what, "write it as in recipes/sweeps/rank-and-rate.yaml")
    return spec


def in_command(spec: dict[str, Any], pattern: str) -> str | None:
    """Return what the command says where `pattern` looks, None if it says nothing there."""
    found = re.search(pattern, " ".join(map(str, spec["command"])))
    return found and found[1]


def grid_cells(file: Path, spec: dict[str, Any]) -> list[dict[str, Any]]:
    """Return {parameter: value} of each training of the grid, the last parameter changing fastest."""
    if spec["method"] != "grid":
        what, remedy = f"method {spec['method']} needs W&B's server", "write method: grid, or log in to W&B"
        raise RecipeError.of(str(file), what, remedy)
    columns = []
    for key, written in spec["parameters"].items():
        known = written if isinstance(written, dict) else {}
        values = known.get("values", [known["value"]] if "value" in known else [])
        if not isinstance(values, list) or not values:
            raise RecipeError.of(str(file), f"{key} has no values", f"write {key}: {{values: [a, b]}}")
        columns.append(values)
    return [dict(zip(spec["parameters"], cell, strict=True)) for cell in itertools.product(*columns)]


def cell_arguments(cell: dict[str, Any]) -> list[str]:
    """Return what W&B's agent puts in place of ${args_no_hyphens}."""
    return [f"{key}={value}" for key, value in cell.items()]


def cell_name(cell: dict[str, Any]) -> str:
    """Return what takes the place of W&B's run id here: the cell's own values."""
    return re.sub(r"[^\w.-]+", "-", "-".join(f"{key.rpartition('.')[2]}{value}" for key, value in cell.items()))


def run_here(file: Path, spec: dict[str, Any], rows: int | None) -> Report | None:
    """Train the whole grid, going on past a training that fails; then evaluate and compare what was trained."""
    grid = grid_cells(file, spec)
    for cell in grid:
        load_recipe(in_command(spec, RECIPE) or "", cell_arguments(cell))
    trained, failed = [], []
    for place, cell in enumerate(grid, start=1):
        name = (in_command(spec, RUN) or "") + cell_name(cell)
        print(f"[{place}/{len(grid)}] {name}", flush=True)
        command = [str(word) for word in spec["command"]]
        at = command.index(ARGUMENTS)
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
