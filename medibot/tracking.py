"""Mirror a run in W&B: one W&B run per training, on the main process, never in the way. The local record is the truth."""

import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from medibot.errors import RecipeError, one_line
from medibot.recipe import Recipe
from medibot.run import Run, outputs_folder, read_json

# What a dashboard can put on the x-axis
COUNTS = ("global_step", "num_supervised_tokens_seen", "num_input_tokens_seen", "num_examples_seen", "epoch", "seconds")
# Seconds that the beginning and the end of a run wait for a server that does not answer
INIT_TIMEOUT, FINISH_TIMEOUT = 20, 30


class Mirror:
    """The W&B run, or nothing: every method is safe to call either way, and none of them raises."""

    def __init__(self, wandb_run: Any = None) -> None:
        self.wandb_run = wandb_run
        self.failed: set[str] = set()

    def log(self, metrics: dict[str, Any]) -> None:
        """Send one step's metrics."""
        self.send("metrics", lambda _: self.wandb_run.log(metrics))

    def summary(self, values: dict[str, Any]) -> None:
        """Send values of the whole run."""
        self.send("summary", lambda _: self.wandb_run.summary.update(values))

    def table(self, name: str, columns: list[str], rows: list[list[Any]]) -> None:
        """Send one table under `name`, in the place of the one before."""
        self.send("tables and artifacts", lambda wandb: self.wandb_run.log({name: wandb.Table(columns, rows)}))

    def artifact(self, kind: str, name: str, files: list[Path], manifest: dict[str, Any], uses: dict[str, str]) -> None:
        """Send `files` (of a folder, all that it holds) as one artifact; `uses` are the {name: type} it was made from.

        W&B draws lineage online only: offline, `manifest` and `uses` say the same in the artifact's metadata.
        """

        def call(wandb: Any) -> None:
            online = self.wandb_run.settings.mode == "online"
            for used, its_kind in uses.items() if online else []:
                # One that was tracked offline and never synced is not there to be used
                with suppress(wandb.Error, ValueError):
                    self.wandb_run.use_artifact(f"{used}:latest", type=its_kind)
            # W&B takes no other characters in a name
            artifact = wandb.Artifact(re.sub(r"[^A-Za-z0-9_.-]", "-", name), kind, metadata=manifest | {"uses": uses})
            for file in files:
                # Immutable: they stay where they are, and no second copy is staged
                add = artifact.add_dir if file.is_dir() else artifact.add_file
                add(str(file), policy="immutable")
            record = self.wandb_run.use_artifact if online and kind == "dataset" else self.wandb_run.log_artifact
            record(artifact)

        self.send("tables and artifacts", call)

    def send(self, what: str, call: Callable[[Any], None]) -> None:
        """Call with wandb, unless there is no run or `what` failed before: a broken server costs a line, no training."""
        if self.wandb_run is None or what in self.failed:
            return
        import wandb

        try:
            call(wandb)
        except Exception as error:  # wandb's errors have no base of their own
            self.failed.add(what)
            print(f"W&B: {name_error(error)}; no more {what} are sent, the run's folder has them all")


def name_error(error: Exception) -> str:
    """Return an error's type and text as one line."""
    return f"{type(error).__name__}: {one_line(error)}"


@contextmanager
def tracked(
    recipe: Recipe, run: Run, config: dict[str, Any], main_process: bool, job_type: str = "train"
) -> Generator[Mirror]:
    """Give a `Mirror` for a training or an evaluation; an empty one where the recipe has no tracking section."""
    if recipe.tracking is None or not main_process:
        yield Mirror()
        return
    import wandb

    wandb_run, exit_code = start(recipe, run, config, job_type), 1
    try:
        yield Mirror(wandb_run)
        exit_code = 0
    finally:
        try:
            wandb_run.finish(exit_code)
            if wandb_run.settings.mode == "offline":
                print(f"W&B: kept offline; to upload: wandb sync {run.folder}/wandb/offline-run-*")
        except Exception as error:  # a timeout, or any of wandb's errors, which have no base of their own
            print(f"W&B: {name_error(error).rstrip('.')}; to upload the rest: wandb sync {wandb_run.settings.sync_dir}")
            # What wandb would do at exit, where its error would be a traceback
            with suppress(Exception):
                wandb.teardown()


def start(recipe: Recipe, run: Run, config: dict[str, Any], job_type: str) -> Any:
    """Start the W&B run by the recipe's tracking section; offline without a key, and where the server fails."""
    # Staged artifacts and error reports would otherwise leave the run's folder
    os.environ.setdefault("WANDB_DATA_DIR", str(run.folder.absolute() / "wandb"))
    os.environ.setdefault("WANDB_SILENT", "true")
    import wandb

    quiet = {"console": "off", "silent": True, "disable_code": True, "disable_job_creation": True}
    timeouts = {"init_timeout": INIT_TIMEOUT, "finish_timeout": FINISH_TIMEOUT, "finish_timeout_raises": True}
    settings = wandb.Settings(**quiet, **timeouts)
    identity = hashlib.sha256((run.record()["fingerprint"] + run.name + job_type).encode()).hexdigest()[:16]
    options: dict[str, Any] = {
        "project": "medibot",
        # What runs must share to be comparable: the data and its split, not the recipe
        "group": f"{Path(recipe.data.described).stem}-{read_json(run.folder / 'split.json')['fingerprint'][:8]}",
        "job_type": job_type,
        "name": run.name if job_type == "train" else f"{run.name}-{job_type}",
        "dir": str(run.folder),
        # A sweep's agent has given the run its id already
        "id": os.environ.get("WANDB_RUN_ID") if "WANDB_SWEEP_ID" in os.environ else identity,
        "resume": "allow",
        "config": config,
    } | (recipe.tracking or {})
    mode = options.pop("mode", None) or os.environ.get("WANDB_MODE") or ("offline" if offline() else "online")
    try:
        wandb_run = wandb.init(mode=mode, settings=settings, **options)
    except (wandb.Error, OSError) as error:
        print(f"W&B: {str(error).splitlines()[0]}; tracking offline instead")
        # The failed attempt would hold on to the run's id
        wandb.teardown()
        wandb_run = wandb.init(mode="offline", settings=settings, **options)
    for count in COUNTS:
        wandb_run.define_metric(f"train/{count}")
    wandb_run.define_metric("*", step_metric="train/global_step")
    print(f"W&B: {f'offline in {run.folder}/wandb' if wandb_run.settings.mode == 'offline' else wandb_run.url}")
    return wandb_run


def offline() -> bool:
    """Tell whether runs of this machine stay on it: by WANDB_MODE, or for want of a key (environment or netrc)."""
    import wandb
    from requests.utils import get_netrc_auth

    key = os.environ.get("WANDB_API_KEY") or get_netrc_auth(wandb.setup().settings.base_url)
    return os.environ.get("WANDB_MODE") in {"offline", "disabled"} or not key


def dashboard(project: str) -> None:
    """Save the project's view in W&B and print where it is; without a key, open `wandb leet` on the runs of outputs/."""
    import wandb

    if not offline():
        try:
            view = make_view(wandb.Api().default_entity, project)
            view.save()
        except ImportError as error:
            remedy = "run: make dashboard, or pip install -e '.[dashboard]'"
            raise RecipeError.of("dashboard", "wandb-workspaces is not installed", remedy) from error
        except Exception as error:  # wandb's and requests' errors have no base of their own
            remedy = "log in again, or WANDB_MODE=offline make dashboard"
            raise RecipeError.of("dashboard", f"W&B refused the view: {name_error(error)}", remedy) from error
        print(f"W&B: {view.url}")
        return
    folder, logs = outputs_folder() / ".leet", sorted(outputs_folder().glob("*/wandb/*run-*/run-*.wandb"))
    if not logs:
        raise RecipeError.of("dashboard", f"no W&B run in {outputs_folder()}", "run: make train")
    shutil.rmtree(folder, ignore_errors=True)
    # One folder a run, as leet wants them
    for log in logs:
        (folder / log.parent.name).mkdir(parents=True)
        (folder / log.parent.name / log.name).symlink_to(log.absolute())
    if not sys.stdout.isatty():
        remedy = f"open one, and: wandb leet {folder}"
        raise RecipeError.of("dashboard", "without a W&B key it needs a terminal", remedy)
    subprocess.run([sys.executable, "-m", "wandb", "leet", str(folder)], check=False)


def make_view(entity: str, project: str) -> Any:
    """Return the view that compares recipes: curves, cost against quality, what differs, answers; not saved yet."""
    import wandb_workspaces.reports.v2 as wr
    import wandb_workspaces.workspaces as ws

    tokens = "train/num_supervised_tokens_seen"
    axes = {"supervised tokens": tokens, "seconds": "train/seconds"}
    losses = {"validation loss": "eval/loss", "training loss": "train/loss"}
    quality = {"test nats a token": "test/nll/value", "difference from base": "test/nll/difference"}
    quality["best validation loss"] = "eval_loss_best"
    costs = {"seconds of steps": "cost.training_seconds", "peak bytes": "cost.peak_memory_bytes"}
    panels = {
        "Curves": [
            wr.LinePlot(title=f"{loss} by {name}", x=axis, y=[metric], max_runs_to_show=20)
            for loss, metric in losses.items()
            for name, axis in axes.items()
        ],
        "Cost against quality": [
            wr.ScatterPlot(title=f"{good} against {price}", x=wr.SummaryMetric(cost), y=wr.SummaryMetric(metric))
            for good, metric in quality.items()
            for price, cost in costs.items()
        ],
        "What differs": [wr.RunComparer(diff_only="split")],
        "Answers": [wr.WeavePanelSummaryTable(table_name=name) for name in ("test/metrics", "test/answers", "answers")],
    }
    sections = [ws.Section(name=name, panels=found, is_open=True) for name, found in panels.items()]
    about = {"entity": entity, "project": project, "name": "MediBot recipes compared"}
    return ws.Workspace(**about, sections=sections, settings=ws.WorkspaceSettings(x_axis=tokens))
