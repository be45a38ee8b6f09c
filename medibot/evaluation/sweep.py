"""A grid of trainings from a W&B sweep file: W&B runs it where this machine is logged in, else it runs here in sequence.

medibot sweep rank-and-rate
"""

import itertools
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from medibot import tracking
from medibot.errors import RecipeError
from medibot.evaluation.compare import compare
from medibot.evaluation.evaluate import evaluate
from medibot.recipe import load_recipe

FOLDER = Path("recipes/sweeps")


ARGUMENTS, RUN_ID = "${args_no_hyphens}", "$WANDB_RUN_ID"


RECIPE, RUN = r"RECIPE=(\S+)", rf"RUN=(\S*){re.escape(RUN_ID)}"


def sweep(name: str, rows: int | None = None) -> None:
    """Run the sweep file `name`; offline, every cell's overrides are checked before the first training starts."""
    file = Path(name) if name.endswith((".yaml", ".yml")) else FOLDER / f"{name}.yaml"
    spec = read_sweep(file)
    if tracking.offline():
        run_here(file, spec, rows)
    else:
        run_online(spec)


def read_sweep(file: Path) -> dict[str, Any]:
    """The file as W&B reads it; refuses what cannot be run here as it would be run there."""
    if not file.is_file():
        there = ", ".join(sorted(found.stem for found in FOLDER.glob("*.yaml")))
        raise RecipeError.of("SWEEP", f"no file {file}", f"there are: {there}")
    try:
        spec = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError.of(str(file), f"not YAML: {' '.join(str(error).split())}", "mend it") from error
    parts = (("parameters", dict), ("command", list), ("method", str))
    wrong = [key for key, kind in parts if not isinstance(spec, dict) or not isinstance(spec.get(key), kind)]
    if wrong:
        raise RecipeError.of(str(file), f"needs {', '.join(wrong)}", "write it as recipes/sweeps/rank-and-rate.yaml")
    if ARGUMENTS not in spec["command"] or named(spec, RECIPE) is None or named(spec, RUN) is None:
        what = f"the command needs RECIPE=, RUN=…{RUN_ID} and {ARGUMENTS}"
        raise RecipeError.of(str(file), what, "write it as in recipes/sweeps/rank-and-rate.yaml")
    return spec


def named(spec: dict[str, Any], pattern: str) -> str | None:
    """What the command says there, if it does."""
    found = re.search(pattern, " ".join(map(str, spec["command"])))
    return found and found[1]


def cells(file: Path, spec: dict[str, Any]) -> list[dict[str, Any]]:
    """{parameter: value} of each training of the grid, the last parameter changing fastest."""
    if spec["method"] != "grid":
        remedy = "write method: grid, or log in to W&B"
        raise RecipeError.of(str(file), f"method {spec['method']} needs W&B's server", remedy)
    columns = []
    for key, written in spec["parameters"].items():
        given = written if isinstance(written, dict) else {}
        values = (
            given["values"] if isinstance(given.get("values"), list) else [given["value"]] if "value" in given else []
        )
        if not values:
            raise RecipeError.of(str(file), f"{key} has no values", f"write {key}: {{values: [a, b]}}")
        columns.append([(key, value) for value in values])
    return [dict(cell) for cell in itertools.product(*columns)]


def arguments(cell: dict[str, Any]) -> list[str]:
    """What W&B's agent puts in place of ${args_no_hyphens}."""
    return [f"{key}={value}" for key, value in cell.items()]


def label(cell: dict[str, Any]) -> str:
    """What stands here for W&B's run id: the cell's own values."""
    return re.sub(r"[^\w.-]+", "-", "-".join(f"{key.rpartition('.')[2]}{value}" for key, value in cell.items()))


def command(spec: dict[str, Any], cell: dict[str, Any]) -> list[str]:
    words = [[str(word)] if word != ARGUMENTS else arguments(cell) for word in spec["command"]]
    return list(itertools.chain(*words))


def run_here(file: Path, spec: dict[str, Any], rows: int | None) -> None:
    """Train the whole grid, going on past a training that fails; then evaluate and compare what was trained."""
    recipe, prefix = named(spec, RECIPE) or "", named(spec, RUN) or ""
    grid = cells(file, spec)
    for cell in grid:
        load_recipe(recipe, arguments(cell))
    trained, failed = [], []
    for place, cell in enumerate(grid, 1):
        run = prefix + label(cell)
        print(f"[{place}/{len(grid)}] {run}", flush=True)
        done = subprocess.run(command(spec, cell), env=os.environ | {"WANDB_RUN_ID": label(cell)})
        (failed if done.returncode else trained).append(run)
    for run in trained:
        print(f"evaluating {run}", flush=True)
        evaluate(run, rows)
    if len(trained) > 1:
        compare(trained)
    if failed:
        what = f"{len(failed)} of {len(grid)} trainings failed: {', '.join(failed)}"
        raise RecipeError.of("SWEEP", what, "see above; the same command again goes on")


def run_online(spec: dict[str, Any]) -> None:
    """Register the sweep with W&B and work on it until it is done; more machines join with the printed command."""
    import wandb

    project = spec.get("project", "medibot")
    try:
        made = wandb.sweep(spec, project=project)
    except Exception as error:  # wandb's and requests' errors have no base of their own
        why = " ".join(f"{type(error).__name__}: {error}".split())
        raise RecipeError.of("SWEEP", f"W&B did not take it: {why}", "WANDB_MODE=offline runs it here") from error
    print(f"on another machine: wandb agent {project}/{made}")
    done = subprocess.run([sys.executable, "-m", "wandb", "agent", "--project", project, made])
    if done.returncode:
        raise RecipeError.of("SWEEP", f"W&B's agent ended with {done.returncode}", "see above")
