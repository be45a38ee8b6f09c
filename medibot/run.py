"""The output folder of a run: its names, its lock, its record, its checkpoints."""

import errno
import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import socket
import sys
import tempfile
import zipfile
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open

from medibot.errors import RecipeError, one_line
from medibot.recipe import ABSENT, Recipe, flattened

# Whose versions decide what is learned
PACKAGES = ("torch", "transformers", "trl", "peft", "datasets", "accelerate", "bitsandbytes")


@dataclass(frozen=True)
class Run:
    """`outputs/<name>/`: `run.json` says how far it came; the rest is named below."""

    folder: Path

    @property
    def name(self) -> str:
        """Return the run's name."""
        return self.folder.name

    @property
    def weights(self) -> Path:
        """Return the trained adapter (or full model), with tokenizer, chat template and generation config."""
        return self.folder / "model"

    @property
    def merged(self) -> Path:
        """Return the whole weights made of base and adapter."""
        return self.folder / "merged"

    @property
    def gguf(self) -> Path:
        """Return the folder of the GGUF file and its Modelfile."""
        return self.folder / "gguf"

    @property
    def checkpoints(self) -> Path:
        """Return the folder of the checkpoints."""
        return self.folder / "checkpoints"

    @property
    def writing(self) -> Path:
        """Return where a checkpoint is made, before it gets its name."""
        return self.checkpoints / ".writing"

    @property
    def metrics(self) -> Path:
        """Return the file of every logged step."""
        return self.folder / "metrics.jsonl"

    @property
    def answers(self) -> Path:
        """Return the file of the answers to the fixed questions."""
        return self.folder / "answers.jsonl"

    @property
    def recipe(self) -> Path:
        """Return the recipe as it ran."""
        return self.folder / "recipe.yaml"

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
        return max(filter(is_whole, self.all_checkpoints()), key=checkpoint_step, default=None)

    def all_checkpoints(self) -> list[Path]:
        """Return every folder that has a checkpoint's name."""
        found = self.checkpoints.glob("checkpoint-*")
        return [folder for folder in found if re.fullmatch(r"checkpoint-\d+", folder.name)]

    def set_torn_aside(self) -> list[str]:
        """Move checkpoints that were never finished, or are damaged, to checkpoints/torn/; return their names."""
        damaged = [folder for folder in self.all_checkpoints() if not is_whole(folder)]
        torn = [*self.writing.glob("checkpoint-*"), *damaged]
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
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        # DeepSpeed's are in a folder below
        saved = (file for kind in ("*.pt", "*.pth", "*.bin") for file in checkpoint.rglob(kind))
        return has_whole_weights(checkpoint) and all(zipfile.is_zipfile(file) for file in saved)
    except (OSError, ValueError):
        return False


def has_whole_weights(folder: Path) -> bool:
    """Tell whether a folder holds weights: at least one safetensors file, none that ends early or holds no tensor."""
    files = list(folder.glob("*.safetensors"))
    try:
        for file in files:
            with safe_open(file, framework="np") as opened:
                if not opened.keys():
                    return False
    except (OSError, SafetensorError):
        return False
    return bool(files)


def sync_to_disk(path: Path) -> None:
    """Wait until a file, or all of a folder, is on the disk and not only in memory."""
    for part in [*path.rglob("*"), path]:
        descriptor = os.open(part, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
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
    record = run.record()
    if not record:
        found = ", ".join(sorted(file.parent.name for file in outputs_folder().glob("*/run.json")))
        remedy = f"found: {found}" if found else "run: make train"
        raise RecipeError.of("", f"run {name!r} not found in {outputs_folder()}/", remedy)
    if record["status"] != "finished":
        raise RecipeError.of("", f"run {name!r} is not finished", "run the same make train again: it goes on")
    return run


def require_writable(run: Run) -> None:
    """Raise RecipeError, before any work, for an outputs folder in which nothing can be made."""
    try:
        run.folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=run.folder.parent):
            pass
    except OSError as error:
        what = f"cannot be written: {error.strerror}"
        raise RecipeError.of(str(run.folder.parent), what, "set MEDIBOT_OUTPUTS to a folder that can") from error


@contextmanager
def locked(run: Run, main_process: bool) -> Generator[None]:
    """Hold the outputs folder; raise RecipeError where another process holds it, naming that one."""
    if not main_process:
        yield
        return
    owner = run.folder.with_name(f".{run.name}.owner")
    require_writable(run)
    try:
        lock = FileLock(run.folder.with_name(f".{run.name}.lock"), timeout=0).acquire()
    except Timeout as error:
        who = f" ({owner.read_text(encoding='utf-8').strip()})" if owner.is_file() else ""
        what = f"another training is writing it now{who}"
        raise RecipeError.of(f"outputs/{run.name}", what, "wait for it, or choose another RUN=name") from error
    with lock:
        command = " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])
        since = datetime.now(UTC).isoformat(timespec="seconds")
        who = f"process {os.getpid()} on {socket.gethostname()} since {since}: {command}\n"
        owner.write_text(who, encoding="utf-8")
        try:
            yield
        finally:
            owner.unlink(missing_ok=True)


@contextmanager
def removed_on_failure(run: Run) -> Generator[None]:
    """Remove the folders that are half-written when the body ends early; say a full disk in a line."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if is_disk_error(error):
            raise disk_error(run.folder, error, "make room; the same command then starts over") from error
        raise
    finally:
        for folder in run.folder.glob(".*.partial"):
            shutil.rmtree(folder, ignore_errors=True)


def is_disk_error(error: Exception) -> bool:
    """Tell a full or read-only disk, as Python, torch and safetensors say it."""
    numbers = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO}
    words = ("PytorchStreamWriter", "No space left", "File too large", "Disk quota", "Read-only file system")
    return (isinstance(error, OSError) and error.errno in numbers) or any(word in str(error) for word in words)


def disk_error(folder: Path, error: Exception, remedy: str) -> RecipeError:
    """Return the error for a folder that cannot be written."""
    free = shutil.disk_usage(folder).free / 1e9
    return RecipeError.of(str(folder), f"cannot be written, {free:.1f} GB free: {one_line(error)}", remedy)


def run_fingerprint(recipe: Recipe, data: str, base: dict[str, str], processes: int) -> tuple[str, dict[str, Any]]:
    """Return (sha256, its parts) of everything that decides the weights. Tracking and evaluation do not."""
    sections = {key: value for key, value in recipe.as_dict().items() if key not in {"tracking", "evaluation", "data"}}
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    parts = sections | {"data": data, "base": base, "processes": processes, "versions": versions}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest(), parts


def refuse_changed(run: Run, parts: dict[str, Any]) -> None:
    """Raise RecipeError, which names what is different, where a run would go on as something else."""
    record = run.record()
    parts = json.loads(json.dumps(parts))
    if not record or record["parts"] == parts:
        return
    before, after = dict(flattened(record["parts"])), dict(flattened(parts))
    changed = [key for key in before | after if before.get(key, ABSENT) != after.get(key, ABSENT)]
    was, now = ("absent" if changed[0] not in leaves else repr(leaves[changed[0]]) for leaves in (before, after))
    more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
    what = f"made from something else ({changed[0]}: was {was}, is {now}{more})"
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


def rewind_record(run: Run, step: int) -> dict[str, float]:
    """Forget what was recorded after `step`, which a resume will do again; return each number's highest up to there."""
    highest: dict[str, float] = {}
    for file, key in ((run.metrics, "step"), (run.answers, "global_step")):
        lines = [line for line in read_lines(file) if line[key] <= step]
        if file.is_file():
            run.write(file.name, "\n".join(json.dumps(line, ensure_ascii=False) for line in lines))
        for line in lines:
            for name, value in line.items():
                if isinstance(value, int | float):
                    highest[name] = max(value, highest.get(name, value))
    return highest
