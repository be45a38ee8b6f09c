"""W&B as a mirror: one run per training, on the main process, never in the way. The local record is the truth."""

import hashlib
import netrc
import os
import re
from collections.abc import Callable, Generator
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
# Seconds that the end of a run waits for a server that died
FINISH_TIMEOUT = 30


class Mirror:
    """The W&B run, or nothing at all: every method is safe to call either way, and none of them raises."""

    def __init__(self, wandb_run: Any = None) -> None:
        self.wandb_run = wandb_run
        self.failed: set[str] = set()

    def log(self, metrics: dict[str, Any]) -> None:
        self.send("metrics", lambda: self.wandb_run.log(metrics))

    def summary(self, values: dict[str, Any]) -> None:
        self.send("summary", lambda: self.wandb_run.summary.update(values))

    def answers(self, rows: list[dict[str, Any]]) -> None:
        """All answers given so far to the fixed questions, as one table."""
        columns = ["global_step", "question", "answer", "tokens", "stopped"]
        self.table("answers", columns, [[row[column] for column in columns] for row in rows])

    def table(self, name: str, columns: list[str], rows: list[list[Any]]) -> None:
        """One table, under `name`."""

        def call() -> None:
            import wandb

            self.wandb_run.log({name: wandb.Table(columns=columns, data=rows)})

        self.send("tables and artifacts", call)

    def artifact(self, kind: str, name: str, files: list[Path], manifest: dict[str, Any], uses: dict[str, str]) -> None:
        """`files` (a folder: all that it holds) as one artifact; `uses` are the {name: type} that it was made from.

        W&B draws lineage online only: offline, `manifest` and `uses` say the same in the artifact's metadata.
        """

        def call() -> None:
            import wandb

            online = self.wandb_run.settings.mode == "online"
            for used, its_kind in uses.items() if online else []:
                # One that was tracked offline and never synced is not there to be used
                with suppress(wandb.Error, ValueError):
                    self.wandb_run.use_artifact(f"{used}:latest", type=its_kind)
            # W&B takes no other characters in a name
            artifact = wandb.Artifact(re.sub(r"[^A-Za-z0-9_.-]", "-", name), kind, metadata=manifest | {"uses": uses})
            for file in files:
                # They stay where they are: no second copy is staged
                if file.is_dir():
                    artifact.add_dir(str(file), policy="immutable")
                else:
                    artifact.add_file(str(file), policy="immutable")
            if online and kind == "dataset":
                self.wandb_run.use_artifact(artifact)
            else:
                self.wandb_run.log_artifact(artifact)

        self.send("tables and artifacts", call)

    def send(self, what: str, call: Callable[[], None]) -> None:
        """`call`, unless there is no W&B run or `what` failed before: a broken server costs one line, not a training."""
        if self.wandb_run is None or what in self.failed:
            return
        try:
            call()
        except Exception as error:  # wandb's errors have no base of their own
            self.failed.add(what)
            why = " ".join(f"{type(error).__name__}: {error}".split())
            print(f"W&B: {why}; no more {what} are sent, the run's folder has them all")


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
        finish(wandb_run, run, exit_code=1)
        raise
    finish(wandb_run, run)


def finish(wandb_run: Any, run: Run, exit_code: int = 0) -> None:
    """End the W&B run; whatever it could not send stays in the folder, and one line says how to send it later."""
    import wandb

    try:
        wandb_run.finish(exit_code)
    except Exception as error:  # a timeout, or any of wandb's errors, which have no base of their own
        why = " ".join(f"{type(error).__name__}: {error}".split())
        print(f"W&B: {why.rstrip('.')}; to upload the rest: wandb sync {wandb_run.settings.sync_dir}")
        # What wandb would do at exit, where its error would be a traceback
        with suppress(Exception):
            wandb.teardown()
        return
    if wandb_run.settings.mode == "offline":
        print(f"W&B: kept offline; to upload: wandb sync {run.folder}/wandb/offline-run-*")


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
        "finish_timeout": FINISH_TIMEOUT,
        "finish_timeout_raises": True,
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
