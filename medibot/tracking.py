"""W&B as a mirror: one run per training, on the main process, never in the way. The local record is the truth."""

import hashlib
import netrc
import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from medibot.recipe import Recipe
from medibot.run import Run

# What a dashboard can put on the x-axis
AXES = (
    "train/global_step",
    "train/num_supervised_tokens_seen",
    "train/num_input_tokens_seen",
    "train/num_examples_seen",
    "train/epoch",
    "train/seconds",
)


class Mirror:
    """The W&B run, or nothing at all: every method is safe to call either way."""

    def __init__(self, wandb_run: Any = None) -> None:
        self.wandb_run = wandb_run

    def log(self, metrics: dict[str, Any]) -> None:
        if self.wandb_run is not None:
            self.wandb_run.log(metrics)

    def summary(self, values: dict[str, Any]) -> None:
        if self.wandb_run is not None:
            self.wandb_run.summary.update(values)

    def answers(self, rows: list[dict[str, Any]]) -> None:
        """All answers given so far to the fixed questions, as one table."""
        if self.wandb_run is not None:
            columns = ["global_step", "question", "answer", "tokens", "stopped"]
            self.table("answers", columns, [[row[column] for column in columns] for row in rows])

    def table(self, name: str, columns: list[str], rows: list[list[Any]]) -> None:
        """One table, under `name`."""
        if self.wandb_run is not None:
            import wandb

            self.wandb_run.log({name: wandb.Table(columns=columns, data=rows)})


@contextmanager
def tracked(
    recipe: Recipe, run: Run, config: dict[str, Any], main_process: bool, job_type: str = "train"
) -> Generator[Mirror]:
    """A `Mirror` for the duration of a training or an evaluation; silent where the recipe has no tracking section."""
    if recipe.tracking is None or not main_process:
        yield Mirror()
        return
    wandb_run = start(recipe.tracking, recipe.name, run, config, job_type)
    try:
        yield Mirror(wandb_run)
    except BaseException:
        if wandb_run is not None:
            wandb_run.finish(exit_code=1)
        raise
    if wandb_run is not None:
        wandb_run.finish()
        if wandb_run.settings.mode == "offline":
            print(f"W&B: kept offline; to upload: wandb sync {run.folder}/wandb/offline-run-*")


def start(tracking: dict[str, Any], group: str, run: Run, config: dict[str, Any], job_type: str) -> Any:
    """`wandb.init` with the recipe's tracking section; offline without a key, and offline again if the server fails."""
    # Staged artifacts and error reports would otherwise leave the run's folder
    os.environ.setdefault("WANDB_DATA_DIR", str(run.folder.absolute() / "wandb"))
    os.environ.setdefault("WANDB_SILENT", "true")
    import wandb

    settings = {
        "console": "off",
        "disable_code": True,
        "init_timeout": 20,
        "silent": True,
        "disable_job_creation": True,
    }
    options: dict[str, Any] = {
        "project": "medibot",
        "group": group,
        "job_type": job_type,
        "name": run.name if job_type == "train" else f"{run.name}-{job_type}",
        "dir": str(run.folder),
        "id": hashlib.sha256((run.record()["fingerprint"] + run.name + job_type).encode()).hexdigest()[:16],
        "resume": "allow",
        "config": config,
    } | tracking
    mode = options.pop("mode", None) or os.environ.get("WANDB_MODE") or ("online" if has_key() else "offline")
    try:
        wandb_run = wandb.init(mode=mode, settings=wandb.Settings(**settings), **options)
    except (wandb.Error, OSError) as error:
        print(f"W&B: {str(error).splitlines()[0]}; tracking offline instead")
        # The failed attempt would hold on to the run's id
        wandb.teardown()
        wandb_run = wandb.init(mode="offline", settings=wandb.Settings(**settings), **options)
    for axis in AXES:
        wandb_run.define_metric(axis)
    wandb_run.define_metric("*", step_metric="train/global_step")
    offline = wandb_run.settings.mode == "offline"
    print(f"W&B: {f'offline in {run.folder}/wandb' if offline else wandb_run.url}")
    return wandb_run


def has_key() -> bool:
    """Whether this machine is logged in to W&B (environment or netrc); asks no server."""
    import wandb

    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        logins = netrc.netrc(os.environ.get("NETRC") or Path.home() / ".netrc")
    except (OSError, netrc.NetrcParseError):
        return False
    return logins.authenticators(urlsplit(wandb.setup().settings.base_url).hostname) is not None
