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
from medibot.recipe.files import find_by_name, search_folders

ARGUMENTS, RUN_ID = "${args_no_hyphens}", "$WANDB_RUN_ID"
RECIPE, RUN = re.compile(r"RECIPE=(\S+)"), re.compile(rf"RUN=(\S*{re.escape(RUN_ID)})")


def sweep(name: str, rows: int | None = None) -> Report | None:
    """Run the sweep file `name`; offline, return how the trainings compare on `rows` rows of the test split.

    Online, W&B's agent works on it, and more machines join with the printed command. Here every cell is checked before
    the first is trained, and a training that fails does not stop the others.
    """
    file = find_by_name("SWEEP", name, search_folders("recipes/sweeps"))
    spec = read_sweep(file)
    if not tracking.offline():
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
        return None
    command = [str(word) for word in spec["command"]]
    recipe, run = (pattern.findall(" ".join(command))[0] for pattern in (RECIPE, RUN))
    cells, trained, failed, at = grid_cells(file, spec), [], [], command.index(ARGUMENTS)
    for arguments in cells.values():
        load_recipe(recipe, arguments)
    for place, (cell, arguments) in enumerate(cells.items(), start=1):
        # In the place of W&B's run id: the cell's own values
        name, given = run.replace(RUN_ID, cell), [*command[:at], *arguments, *command[at + 1 :]]
        print(f"[{place}/{len(cells)}] {name}", flush=True)
        done = subprocess.run(given, env=os.environ | {"WANDB_RUN_ID": cell})
        (failed if done.returncode else trained).append(name)
    for name in trained:
        print(f"evaluating {name}", flush=True)
        evaluate(name, rows)
    comparison = compare(trained) if len(trained) > 1 else None
    if failed:
        what = f"{len(failed)} of {len(cells)} trainings failed: {', '.join(failed)}"
        raise RecipeError.of("SWEEP", what, "see above; the same command again goes on")
    return comparison


def read_sweep(file: Path) -> dict[str, Any]:
    """Return the file as W&B reads it; raise RecipeError for what cannot run here as it would there."""
    try:
        spec = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError.of(str(file), f"not YAML: {one_line(error)}", "mend it") from error
    wanted, found = {"parameters": dict, "method": str, "command": list}, spec if isinstance(spec, dict) else {}
    lacks = [key for key, kind in wanted.items() if not isinstance(found.get(key), kind)]
    text = "" if lacks else " ".join(map(str, found["command"]))
    if lacks or not (ARGUMENTS in found["command"] and RECIPE.search(text) and RUN.search(text)):
        what = f"needs {', '.join(lacks or ['command'])}, with RECIPE=, RUN=…{RUN_ID} and {ARGUMENTS} in the command"
        raise RecipeError.of(str(file), what, "write it as recipes/sweeps/rank-and-rate.yaml")
    return spec


def grid_cells(file: Path, spec: dict[str, Any]) -> dict[str, list[str]]:
    """Return each training's `parameter=value` arguments under a name made of the values, the last changing fastest."""
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
    cells = {}
    for values in itertools.product(*columns):
        settings = dict(zip(spec["parameters"], values, strict=True))
        name = "-".join(f"{key.rpartition('.')[2]}{value}" for key, value in settings.items())
        cells[re.sub(r"[^\w.-]+", "-", name)] = [f"{key}={value}" for key, value in settings.items()]
    return cells
