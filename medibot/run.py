"""The output folder of a run: its names, its lock, its record, its checkpoints."""

import fcntl
import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import sys
import time
import zipfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from medibot.errors import RecipeError, one_line
from medibot.recipe import ABSENT, Recipe, find_differences
from medibot.recipe.resolved import PACKAGES


class Run:
    """`outputs/<name>/`: `run.json` says how far it came; the rest is named below."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.name = folder, folder.name
        # The recipe as it ran, every logged step, and the answers to the fixed questions
        self.recipe, self.metrics = folder / "recipe.yaml", folder / "metrics.jsonl"
        self.answers = folder / "answers.jsonl"
        # The trained adapter (or full model) with all that answering needs; made of it: whole weights, a GGUF file
        self.weights, self.merged, self.gguf = (folder / name for name in ("model", "merged", "gguf"))
        # A checkpoint is made in `writing`, before it gets its name
        self.checkpoints, self.writing = folder / "checkpoints", folder / "checkpoints" / ".writing"

    def record(self) -> dict[str, Any]:
        """Return what `run.json` says; nothing if this run was never started."""
        file = self.folder / "run.json"
        try:
            return read_json(file) if file.is_file() else {}
        except ValueError as error:
            remedy = "delete the folder, or choose another RUN=name"
            raise RecipeError.of(f"outputs/{self.name}/run.json", f"not JSON: {error}", remedy) from error

    def write(self, name: str, content: Any) -> None:
        """Write `name` whole: the file is visible only when it is complete."""
        text = content if isinstance(content, str) else json.dumps(content, indent=1, ensure_ascii=False)
        partial = self.folder / f".{name}.partial"
        partial.write_text(text + "\n" if text else "", encoding="utf-8")
        sync_to_disk(partial)
        partial.replace(self.folder / name)

    def append(self, file: Path, line: dict[str, Any]) -> None:
        """Add a line to a JSON lines file."""
        with file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line, ensure_ascii=False) + "\n")

    def last_checkpoint(self) -> Path | None:
        """Return the newest checkpoint that is whole; None if there is none."""
        return max(self.whole_checkpoints(), key=checkpoint_step, default=None)

    def whole_checkpoints(self) -> list[Path]:
        """Return every checkpoint that is whole."""
        return [folder for folder in self.all_checkpoints() if is_whole(folder)]

    def all_checkpoints(self) -> list[Path]:
        """Return every folder that has a checkpoint's name."""
        return [folder for folder in self.checkpoints.glob("checkpoint-*") if folder.name.split("-", 1)[1].isdigit()]

    def set_torn_aside(self, last: Path | None) -> list[str]:
        """Move checkpoints that were never finished, are damaged or newer than `last` to checkpoints/torn/; name them."""
        step, torn = checkpoint_step(last) if last else -1, [*self.writing.glob("checkpoint-*")]
        torn += [folder for folder in self.all_checkpoints() if checkpoint_step(folder) > step or not is_whole(folder)]
        for folder in torn:
            aside = self.checkpoints / "torn" / folder.name
            shutil.rmtree(aside, ignore_errors=True)
            aside.parent.mkdir(exist_ok=True)
            folder.rename(aside)
        return [folder.name for folder in torn]


def checkpoint_step(folder: Path) -> int:
    """Return the step that a checkpoint was made at."""
    return int(folder.name.rpartition("-")[2])


def is_whole(checkpoint: Path) -> bool:
    """Tell whether everything that a checkpoint needs is there and none of its files ends early."""
    try:
        read_json(checkpoint / "trainer_state.json")
        # DeepSpeed's are in a folder below
        saved = (file for kind in ("*.pt", "*.pth", "*.bin") for file in checkpoint.rglob(kind))
        return has_whole_weights(checkpoint) and all(zipfile.is_zipfile(file) for file in saved)
    except (OSError, ValueError):
        return False


def has_whole_weights(folder: Path) -> bool:
    """Tell whether a folder holds weights: at least one safetensors file, none that ends early or holds no tensor."""
    files = list(folder.glob("*.safetensors"))
    try:
        return bool(files) and all(safe_open(file, framework="np").keys() for file in files)
    except (OSError, SafetensorError):
        return False


def sync_to_disk(path: Path) -> None:
    """Wait until a file, or all of a folder, is on the disk and not only in memory."""
    for part in [*path.rglob("*"), path]:
        descriptor = os.open(part, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def outputs_folder() -> Path:
    """Return the folder of all runs."""
    return Path(os.environ.get("MEDIBOT_OUTPUTS", "outputs"))


def open_run(name: str) -> Run:
    """Return the run called `name`, started or not; raise RecipeError for a name that would leave the outputs folder."""
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]{0,99}", name):
        raise RecipeError.of("RUN", f"{name!r} is not a run name", "use letters, digits, '-', '_' and '.'")
    return Run(outputs_folder() / name)


def find_finished_run(name: str) -> Run:
    """Return the trained run called `name`; raise RecipeError, which says what there is, where it is not."""
    run = open_run(name)
    if not (record := run.record()):
        found = ", ".join(sorted(file.parent.name for file in outputs_folder().glob("*/run.json")))
        remedy = f"found: {found}" if found else "run: make train"
        raise RecipeError.of("", f"run {name!r} not found in {outputs_folder()}/", remedy)
    if record["status"] != "finished":
        raise RecipeError.of("", f"run {name!r} is not finished", "run the same make train again: it goes on")
    return run


@contextmanager
def locked(run: Run) -> Generator[None]:
    """Hold the run, and remove its half-written folders at the end.

    Raises RecipeError where outputs cannot be written, or another process holds the run, naming that one.
    """
    file = run.folder.with_name(f".{run.name}.lock")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        lock = file.open("a+", encoding="utf-8")
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        what = f"another training is writing it now ({file.read_text(encoding='utf-8')})"
        raise RecipeError.of(f"outputs/{run.name}", what, "wait for it, or choose another RUN=name") from error
    except OSError as error:
        what, remedy = f"cannot be written: {error.strerror}", "set MEDIBOT_OUTPUTS to a folder that can"
        raise RecipeError.of(str(file.parent), what, remedy) from error
    with lock:
        lock.truncate(0)
        who, since = f"process {os.getpid()} on {os.uname().nodename}", time.strftime("%Y-%m-%dT%H:%M:%S%z")
        print(f"{who} since {since}:", *sys.argv, end="", file=lock, flush=True)
        try:
            yield
        except (OSError, RuntimeError, SafetensorError) as error:
            refuse_full_disk(run, error, "make room, then give the same command again")
            raise
        finally:
            for folder in run.folder.glob(".*.partial"):
                shutil.rmtree(folder, ignore_errors=True)


def refuse_full_disk(run: Run, error: Exception, remedy: str) -> None:
    """Raise RecipeError if the error is a full or read-only disk, as Python, torch and safetensors say it."""
    said = "PytorchStreamWriter|No space left|Disk quota|File too large|Read-only file|Permission denied|Input/output error"
    if re.search(said, str(error)):
        # It may be a cache or a hub's folder that is full
        named = error.filename if isinstance(error, OSError) and isinstance(error.filename, str) else run.folder
        there = next(folder for folder in (Path(named), *Path(named).absolute().parents) if folder.is_dir())
        what = f"cannot be written, {shutil.disk_usage(there).free / 1e9:.1f} GB free: {one_line(error)}"
        raise RecipeError.of(str(named), what, remedy) from error


def run_fingerprint(recipe: Recipe, data: str, base: dict[str, str], processes: int) -> tuple[str, dict[str, Any]]:
    """Return (sha256, its parts) of everything that decides the weights. Tracking and evaluation do not."""
    sections = {key: value for key, value in recipe.as_dict().items() if key not in {"tracking", "evaluation", "data"}}
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    parts = sections | {"data": data, "base": base, "processes": processes, "versions": versions}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest(), parts


def refuse_changed(run: Run, parts: dict[str, Any]) -> None:
    """Raise RecipeError, which names what is different, where a run would go on as something else."""
    parts = json.loads(json.dumps(parts))
    if changed := find_differences(run.record().get("parts", parts), parts):
        was, now = (value if value is ABSENT else repr(value) for value in changed[0][1:])
        more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
        what = f"made from something else ({changed[0][0]}: was {was}, is {now}{more})"
        raise RecipeError.of(f"outputs/{run.name}", what, "choose another RUN=name")


def read_json(file: Path) -> Any:
    """Return what a JSON file holds."""
    return json.loads(file.read_text(encoding="utf-8"))


def read_lines(file: Path) -> list[dict[str, Any]]:
    """Return the objects of a JSON lines file; none if it is not there yet."""
    if not file.is_file():
        return []
    # Not splitlines: an answer may hold a U+2028. What follows the last line end is a line that was never finished
    return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n")[:-1]]


def rewind_record(run: Run, step: int) -> None:
    """Forget what was recorded after `step`, which a resume will do again."""
    for file, key in ((run.metrics, "step"), (run.answers, "global_step")):
        if file.is_file():
            lines = [json.dumps(line, ensure_ascii=False) for line in read_lines(file) if line[key] <= step]
            run.write(file.name, "\n".join(lines))
