"""Write a recipe as it ran, and what a reader needs to run it again."""

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from medibot.recipe import Recipe
from medibot.recipe.document import NUMBER

# Whose versions decide what is learned
PACKAGES = ("torch", "transformers", "trl", "peft", "datasets", "accelerate", "bitsandbytes")


class RecipeDumper(yaml.SafeDumper):
    """Write what recipes read back: text that YAML 1.2 takes for a number, and PyYAML does not, in quotes."""


RecipeDumper.add_implicit_resolver("tag:yaml.org,2002:float", NUMBER, None)


def dump_resolved_recipe(recipe: Recipe, decided: dict[str, Any]) -> str:
    """Return the recipe with its overrides applied, and what the machine decided as a comment."""
    comment = "".join(f"# {line}\n" for line in yaml.safe_dump(decided, sort_keys=False).splitlines())
    body = yaml.dump(recipe.as_dict(), Dumper=RecipeDumper, sort_keys=False, allow_unicode=True, width=120)
    head = f"# Resolved from {recipe.path.name}, overrides included.\n# Decided by the machine and the run:\n"
    return head + comment + body


def describe_environment(device: str) -> dict[str, Any]:
    """Return versions, commit (of MediBot's own clone, if it is one), hardware and command."""
    commit = ""
    if shutil.which("git"):
        git = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        commit = subprocess.run(git, cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in (*PACKAGES, "wandb", "medibot")},
        "commit": commit[:40] or None,
        "uncommitted": commit.endswith("-dirty"),
        "machine": platform.platform(),
        "cpus": os.cpu_count(),
        "device": device,
    }
