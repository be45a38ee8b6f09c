"""The outputs folder: what a run is, what it was made from, how far it came."""

import errno
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open

from medibot.errors import RecipeError
from medibot.recipe import ABSENT, Recipe, flattened
from medibot.recipe.document import scalar

PACKAGES = ("torch", "transformers", "trl", "peft", "datasets", "accelerate", "bitsandbytes", "wandb", "medibot")


@dataclass(frozen=True)
class Run:
    """`outputs/<name>/`: `run.json` says how far it came; everything else is named below."""

    folder: Path

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def weights(self) -> Path:
        """The trained adapter (or full model), with tokenizer, chat template and generation config: a loadable folder."""
        return self.folder / "model"

    @property
    def merged(self) -> Path:
        """Whole weights made of base and adapter, with the same tokenizer, template and generation config."""
        return self.folder / "merged"

    @property
    def gguf(self) -> Path:
        """One GGUF file of the whole weights, and Ollama's Modelfile for it."""
        return self.folder / "gguf"

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def metrics(self) -> Path:
        return self.folder / "metrics.jsonl"

    @property
    def recipe(self) -> Path:
        return self.folder / "recipe.yaml"

    def record(self) -> dict[str, Any]:
        """What `run.json` says; nothing if this run was never started."""
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
        with file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line, ensure_ascii=False) + "\n")

    def last_checkpoint(self) -> Path | None:
        """The newest checkpoint that is whole; None if there is none."""
        return max(filter(is_whole, self.all_checkpoints()), key=checkpoint_step, default=None)

    def all_checkpoints(self) -> list[Path]:
        found = self.checkpoints.glob("checkpoint-*")
        return [folder for folder in found if re.fullmatch(r"checkpoint-\d+", folder.name)]

    @property
    def writing(self) -> Path:
        """Where a checkpoint is made, before it gets its name."""
        return self.checkpoints / ".writing"

    def set_torn_aside(self) -> list[str]:
        """Move checkpoints that were never finished, or are damaged, to checkpoints/torn/; returns their names."""
        torn = [
            *self.writing.glob("checkpoint-*"),
            *(folder for folder in self.all_checkpoints() if not is_whole(folder)),
        ]
        for folder in torn:
            aside = self.checkpoints / "torn" / folder.name
            shutil.rmtree(aside, ignore_errors=True)
            aside.parent.mkdir(exist_ok=True)
            folder.rename(aside)
        return [folder.name for folder in torn]


def checkpoint_step(folder: Path) -> int:
    return int(folder.name.rpartition("-")[2])


def is_whole(checkpoint: Path) -> bool:
    """Whether everything that a checkpoint needs is there and none of its files ends early."""
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        # DeepSpeed's lie in a folder below
        saved = (file for kind in ("*.pt", "*.pth", "*.bin") for file in checkpoint.rglob(kind))
        return has_whole_weights(checkpoint) and all(zipfile.is_zipfile(file) for file in saved)
    except (OSError, ValueError):
        return False


def has_whole_weights(folder: Path) -> bool:
    """Whether a folder holds weights: at least one safetensors file, none that ends early, none without a tensor."""
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
    return Path(os.environ.get("MEDIBOT_OUTPUTS", "outputs"))


def open_run(name: str) -> Run:
    """The run called `name`, started or not; a name that would leave the outputs folder is refused."""
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]{0,99}", name):
        raise RecipeError.of("RUN", f"{name!r} is no run name", "use letters, digits, '-', '_' and '.'")
    return Run(outputs_folder() / name)


def find_finished_run(name: str) -> Run:
    """The trained run called `name`, or a RecipeError that says which runs there are."""
    run = open_run(name)
    record = run.record()
    if not record:
        there = sorted(file.parent.name for file in outputs_folder().glob("*/run.json"))
        raise RecipeError.of(
            "RUN", f"no run {name!r}", f"there are: {', '.join(there)}" if there else "run: make train"
        )
    if record["status"] != "finished":
        raise RecipeError.of("RUN", f"{name!r} is not finished", "run the same make train again: it goes on")
    return run


def require_writable(run: Run) -> None:
    """Refuse an outputs folder in which nothing can be made, before any work."""
    try:
        run.folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=run.folder.parent):
            pass
    except OSError as error:
        what = f"cannot be written: {error.strerror}"
        raise RecipeError.of(str(run.folder.parent), what, "set MEDIBOT_OUTPUTS to a folder that can") from error


@contextmanager
def locked(run: Run, main_process: bool) -> Generator[None]:
    """Hold the outputs folder for one training: a second one at the same time is refused."""
    if not main_process:
        yield
        return
    owner = run.folder.with_name(f".{run.name}.owner")
    require_writable(run)
    try:
        lock = FileLock(run.folder.with_name(f".{run.name}.lock"), timeout=0).acquire()
    except Timeout as error:
        remedy = "wait for it, or choose another RUN=name"
        who = f" ({owner.read_text(encoding='utf-8').strip()})" if owner.is_file() else ""
        raise RecipeError.of(f"outputs/{run.name}", f"another training is writing it now{who}", remedy) from error
    with lock:
        command = " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])
        since = datetime.now(UTC).isoformat(timespec="seconds")
        owner.write_text(
            f"process {os.getpid()} on {socket.gethostname()} since {since}: {command}\n", encoding="utf-8"
        )
        try:
            yield
        finally:
            owner.unlink(missing_ok=True)


@contextmanager
def removed_on_failure(this: Run) -> Generator[None]:
    """Remove the folders that this run has half-written if what writes them ends early; a full disk is said in a line."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if not is_disk_error(error):
            raise
        free = shutil.disk_usage(this.folder).free
        what = f"cannot be written, {free / 1e9:.1f} GB free: {' '.join(str(error).split())}"
        raise RecipeError.of(str(this.folder), what, "make room; the same command then starts over") from error
    finally:
        for folder in this.folder.glob(".*.partial"):
            shutil.rmtree(folder, ignore_errors=True)


def is_disk_error(error: Exception) -> bool:
    """A full or read-only disk, as Python, torch and safetensors say it."""
    numbers = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO}
    said = ("PytorchStreamWriter", "No space left", "File too large", "Disk quota", "Read-only file system")
    known = isinstance(error, OSError) and error.errno in numbers
    return known or any(words in str(error) for words in said)


def run_fingerprint(recipe: Recipe, data: str, base: dict[str, str], processes: int) -> tuple[str, dict[str, Any]]:
    """(sha256, its parts): everything that decides the weights. Tracking and evaluation do not."""
    sections = {key: value for key, value in recipe.as_dict().items() if key not in {"tracking", "evaluation", "data"}}
    versions = {name: importlib.metadata.version(name) for name in PACKAGES if name not in {"wandb", "medibot"}}
    parts = sections | {"data": data, "base": base, "processes": processes, "versions": versions}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest(), parts


def refuse_changed(run: Run, parts: dict[str, Any]) -> None:
    """A run goes on only as what it began as; the error names what is different."""
    record = run.record()
    parts = json.loads(json.dumps(parts))
    if not record or record["parts"] == parts:
        return
    before, after = dict(flattened(record["parts"])), dict(flattened(parts))
    changed = [key for key in before | after if before.get(key, ABSENT) != after.get(key, ABSENT)]
    was, now = ("absent" if changed[0] not in leaves else repr(leaves[changed[0]]) for leaves in (before, after))
    first = f"{changed[0]}: was {was}, is {now}"
    more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
    raise RecipeError.of(f"outputs/{run.name}", f"made from something else ({first}{more})", "choose another RUN=name")


def read_json(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The objects of a JSON lines file; none if it is not there yet."""
    if not file.is_file():
        return []
    # Not splitlines: an answer may hold a U+2028. What follows the last line end is a line that was never finished
    return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n")[:-1]]


def rewind_record(run: Run, step: int) -> dict[str, float]:
    """Forget what was recorded after `step`, which a resume will do again; the highest of each number up to there."""
    highest: dict[str, float] = {}
    for file, key in ((run.metrics, "step"), (run.folder / "answers.jsonl", "global_step")):
        lines = [line for line in read_lines(file) if line[key] <= step]
        if file.is_file():
            run.write(file.name, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).rstrip("\n"))
        for line in lines:
            for name, value in line.items():
                if isinstance(value, int | float):
                    highest[name] = max(value, highest.get(name, value))
    return highest


def describe_environment(device: str) -> dict[str, Any]:
    """Versions, commit, hardware and command: what a reader needs to run it again."""
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "python": platform.python_version(),
        "versions": versions,
        "commit": git_output("rev-parse", "HEAD"),
        "uncommitted": bool(git_output("status", "--porcelain")),
        "machine": platform.platform(),
        "cpus": os.cpu_count(),
        "device": device,
    }


def git_output(*args: str) -> str | None:
    try:
        here = Path(__file__).parent
        return subprocess.run(["git", *args], cwd=here, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


class RecipeDumper(yaml.SafeDumper):
    """Writes what recipes read back: text that YAML 1.2 takes for a number, and PyYAML does not, in quotes."""


def represent_text(dumper: RecipeDumper, text: str) -> yaml.Node:
    try:
        style = None if isinstance(scalar(text), str) else "'"
    except ValueError:
        style = "'"
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


RecipeDumper.add_representer(str, represent_text)


def dump_resolved_recipe(recipe: Recipe, resolved: dict[str, Any]) -> str:
    """The recipe as it ran: overrides applied, and what the machine decided as a comment."""
    decided = "".join(f"# {line}\n" for line in yaml.safe_dump(resolved, sort_keys=False).splitlines())
    body = yaml.dump(recipe.as_dict(), Dumper=RecipeDumper, sort_keys=False, allow_unicode=True, width=120)
    return f"# Resolved from {recipe.path.name}, overrides included.\n# Decided by the machine and the run:\n{decided}{body}"
