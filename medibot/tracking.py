"""W&B as a mirror: one run per training, on the main process, never in the way. The local record is the truth."""

import hashlib
import netrc
import os
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from medibot.recipe import Recipe
from medibot.run import Run, read_json

# What a dashboard can put on the x-axis
AXES = (
    "train/global_step",
    "train/num_supervised_tokens_seen",
    "train/num_input_tokens_seen",
    "train/num_examples_seen",
    "train/epoch",
    "train/seconds",
)
# Seconds
FINISH_TIMEOUT = 30


class Mirror:
    """The W&B run, or nothing at all: every method is safe to call either way."""

    def __init__(self, wandb_run: Any = None) -> None:
        self.wandb_run = wandb_run
        self.failed = False

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

    def artifact(self, kind: str, name: str, files: list[Path], manifest: dict[str, Any], uses: list[str]) -> None:
        """`files` (a folder: all that it holds) as one artifact; `uses` are the "name:type" that it was made from.

        W&B draws lineage online only: offline, `manifest` says the same in the artifact's metadata.
        """
        if self.wandb_run is None or self.failed:
            return
        import wandb

        online = self.wandb_run.settings.mode == "online"
        for used in uses if online else []:
            # One that was tracked offline and never synced is not there to be used
            with suppress(wandb.Error, ValueError):
                self.wandb_run.use_artifact(used.partition(":")[0] + ":latest", type=used.partition(":")[2])
        artifact = wandb.Artifact(name, kind, metadata=manifest | {"uses": uses})
        for file in files:
            if file.is_dir():
                # The folder stays where it is: no second copy is staged
                artifact.add_dir(str(file), policy="immutable")
            else:
                artifact.add_file(str(file), policy="immutable")
        with self.never_in_the_way():
            if online and kind == "dataset":
                self.wandb_run.use_artifact(artifact)
            else:
                self.wandb_run.log_artifact(artifact)

    def table(self, name: str, columns: list[str], rows: list[list[Any]]) -> None:
        """One table, under `name`."""
        if self.wandb_run is not None and not self.failed:
            import wandb

            with self.never_in_the_way():
                self.wandb_run.log({name: wandb.Table(columns=columns, data=rows)})

    @contextmanager
    def never_in_the_way(self) -> Generator[None]:
        """Tables and artifacts ask the server while the training waits: after one failure no more of them are sent."""
        try:
            yield
        except Exception as error:
            self.failed = True
            print(f"W&B: {str(error).splitlines()[0]}; no more tables or artifacts, the run's folder has them all")


@contextmanager
def tracked(
    recipe: Recipe, run: Run, config: dict[str, Any], main_process: bool, job_type: str = "train"
) -> Generator[Mirror]:
    """A `Mirror` for the duration of a training or an evaluation; silent where the recipe has no tracking section."""
    if recipe.tracking is None or not main_process:
        yield Mirror()
        return
    wandb_run = start(recipe, run, config, job_type)
    try:
        yield Mirror(wandb_run)
    except BaseException:
        if wandb_run is not None:
            wandb_run.finish(exit_code=1)
        raise
    finish(wandb_run, run)


def finish(wandb_run: Any, run: Run) -> None:
    """End the W&B run; whatever it could not send stays in the folder, and one line says how to send it later."""
    started = time.monotonic()
    wandb_run.finish()
    if wandb_run.settings.mode == "offline":
        print(f"W&B: kept offline; to upload: wandb sync {run.folder}/wandb/offline-run-*")
    elif time.monotonic() - started > FINISH_TIMEOUT - 1:
        print(f"W&B: the server did not take everything; to upload: wandb sync {wandb_run.settings.sync_dir}")


def group(recipe: Recipe, run: Run) -> str:
    """What runs must share to be comparable: the data and its split, not the recipe."""
    return f"{Path(recipe.data.path).stem}-{read_json(run.folder / 'split.json')['fingerprint'][:8]}"


def start(recipe: Recipe, run: Run, config: dict[str, Any], job_type: str) -> Any:
    """`wandb.init` with the recipe's tracking section; offline without a key, and offline again if the server fails."""
    # Staged artifacts and error reports would otherwise leave the run's folder
    os.environ.setdefault("WANDB_DATA_DIR", str(run.folder.absolute() / "wandb"))
    os.environ.setdefault("WANDB_SILENT", "true")
    import wandb

    settings = {
        "console": "off",
        "disable_code": True,
        "init_timeout": 20,
        # A server that dies during the run is waited for so long at its end, and no longer
        "finish_timeout": FINISH_TIMEOUT,
        "silent": True,
        "disable_job_creation": True,
    }
    options: dict[str, Any] = {
        "project": "medibot",
        "group": group(recipe, run),
        "job_type": job_type,
        "name": run.name if job_type == "train" else f"{run.name}-{job_type}",
        "dir": str(run.folder),
        "id": hashlib.sha256((run.record()["fingerprint"] + run.name + job_type).encode()).hexdigest()[:16],
        "resume": "allow",
        "config": config,
    } | (recipe.tracking or {})
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
