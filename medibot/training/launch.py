"""Start a training in processes of its own on this machine's hardware, and bring back its exit code."""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from medibot.errors import RecipeError
from medibot.planning.conflicts import refuse_conflicts, share_batch
from medibot.planning.hardware import Hardware, find_config, read_hardware
from medibot.recipe import load_recipe

# Seconds that a training has to come to the end of its step after a signal
DEADLINE = 300
# An accelerate config that asks for nothing but one process on the CPU, and what its launcher then sets
ONE_CPU_PROCESS = {
    "compute_environment": "LOCAL_MACHINE",
    "distributed_type": "NO",
    "use_cpu": True,
    "num_machines": 1,
    "num_processes": 1,
    "mixed_precision": "no",
}
LAUNCHED_ON_CPU = {"ACCELERATE_USE_CPU": "True", "ACCELERATE_MIXED_PRECISION": "no"}


def launch(recipe: str, overrides: list[str], options: list[str], accelerate: str | None, more: list[str]) -> int:
    """Run `medibot train` under `accelerate launch` and return the training's own exit code.

    `options` are those of the training, `more` those of the launcher. One process on a CPU is started as accelerate's
    launcher would start it, without the seconds in which that imports torch.
    """
    config = hardware_config(accelerate)
    hardware = read_hardware(config)
    processes = launched_processes(hardware, more)
    if processes > 1 or hardware.sharded:
        check_once(recipe, overrides, hardware, processes, more)
    threads = os.environ.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    environment, command = {"MEDIBOT_PROCESSES": str(processes)}, [sys.executable]
    if hardware.settings == ONE_CPU_PROCESS and not more:
        environment |= LAUNCHED_ON_CPU | {"OMP_NUM_THREADS": threads}
    else:
        command += ["-m", "accelerate.commands.launch", "--quiet", "--config_file", str(config)]
        command += [] if "--num_processes" in more else ["--num_processes", str(processes)]
        command += ["--num_cpu_threads_per_process", threads, *more]
    command += ["-m", "medibot", "train", recipe, *overrides, *options]
    with tempfile.TemporaryDirectory() as folder:
        return run_launcher(command, environment, Path(folder))


def check_once(recipe: str, overrides: list[str], hardware: Hardware, processes: int, more: list[str]) -> None:
    """Say in one process what is wrong before several do, and leave the prepared data for all of them."""
    checked = load_recipe(recipe, overrides)
    machines = read_option("--num_machines", more) or hardware.settings.get("num_machines", 1)
    refuse_conflicts(checked, hardware, visible_gpus(), machines)
    share_batch(checked, processes)
    from medibot.data.prepared import prepare

    prepare(checked)


def run_launcher(command: list[str], environment: dict[str, str], folder: Path) -> int:
    """Run the command, pass signals on to what it starts, and return the exit code that the training left."""
    code = folder / "code"
    # A session of its own: what is signalled to this process reaches the training only by the forwarder
    environment = os.environ | environment | {"MEDIBOT_EXIT": str(code)}
    launcher = subprocess.Popen(command, env=environment, start_new_session=True)
    forwarder = Forwarder(launcher, folder)
    finished = launcher.wait()
    if code.is_file():
        # The launcher turns every failure into 1
        return int(code.read_text())
    if forwarder.received:
        return 128 + forwarder.received
    if finished:
        # A process that was killed says nothing itself, and torchrun ends the others before they can
        how = f"with exit code {finished} (see above)" if finished > 0 else f"by signal {-finished}"
        how += " (9 is often the system's, out of memory)" if finished == -signal.SIGKILL else ""
        print(f"training ended {how}; run the same command to resume", file=sys.stderr)
    return 128 - finished if finished < 0 else finished


class Forwarder:
    """Pass the first signal on to the training's processes, which save and stop.

    accelerate's launcher of one process would not pass it on. Another signal a second later ends everything at once, as
    does a step that does not end within DEADLINE.
    """

    def __init__(self, launcher: subprocess.Popen, folder: Path) -> None:
        self.launcher, self.folder = launcher, folder
        self.received = 0
        self.first = 0.0
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self.forward)

    def forward(self, number: int, _: Any) -> None:
        """Handle a signal."""
        if self.received:
            if time.monotonic() - self.first > 1:
                self.end()
            return
        self.received, self.first = number, time.monotonic()
        processes = [int(file.read_text() or 0) for file in self.folder.glob("process-*")]
        for process in filter(None, processes):
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGTERM)
        if not processes:
            self.end()
            return
        print("stopping at the end of this step; again ends at once", file=sys.stderr, flush=True)
        timer = threading.Timer(DEADLINE, self.end_late)
        timer.daemon = True
        timer.start()

    def end(self) -> None:
        """Kill everything."""
        with suppress(ProcessLookupError):
            os.killpg(self.launcher.pid, signal.SIGKILL)

    def end_late(self) -> None:
        """Kill a training whose step does not end."""
        if self.launcher.poll() is None:
            print(f"no step ended within {DEADLINE} s: ended; the last whole checkpoint is kept", file=sys.stderr)
            self.end()


def is_launched() -> bool:
    """Tell whether this process was started by a launcher; every accelerate launcher sets this variable."""
    return "ACCELERATE_MIXED_PRECISION" in os.environ


def register_process() -> None:
    """Tell the launcher which process to signal."""
    if "MEDIBOT_EXIT" in os.environ:
        name = f"process-{os.environ.get('LOCAL_RANK', '0')}"
        Path(os.environ["MEDIBOT_EXIT"]).with_name(name).write_text(str(os.getpid()))


def leave_exit_code(code: int) -> bool:
    """Leave the exit code where the launcher cannot lose it; return whether this process is the first that ends.

    The first process to fail has the reason; what the others meet afterwards is only that it is gone.
    """
    if "MEDIBOT_EXIT" not in os.environ:
        return True
    try:
        with Path(os.environ["MEDIBOT_EXIT"]).open("x") as file:
            file.write(str(code))
    except FileExistsError:
        return False
    return True


def hardware_config(name: str | None) -> Path:
    """Return the accelerate config called `name`, or the one for what this machine has."""
    return find_config(name or {0: "cpu", 1: "single-gpu"}.get(visible_gpus(), "multi-gpu"))


def split_launch(launch: str) -> list[str]:
    """Return `--launch`'s text as arguments; `--option=value` as two."""
    try:
        words = shlex.split(launch)
    except ValueError as error:
        raise RecipeError.of("LAUNCH", f"cannot be split: {error}", "close the quote") from error
    return [part for word in words for part in (word.split("=", 1) if word.startswith("--") else [word])]


def launched_processes(hardware: Hardware, more: list[str]) -> int:
    """Return how many processes the launch will start in all; a config without a number takes every GPU."""
    return read_option("--num_processes", more) or hardware.settings.get("num_processes") or max(1, visible_gpus())


def read_option(name: str, more: list[str]) -> int | None:
    """Return the whole number that the launch's own arguments give `name`."""
    if name not in more:
        return None
    number = "".join(more[more.index(name) + 1 :][:1])
    if not number.isdecimal() or int(number) < 1:
        raise RecipeError.of("LAUNCH", f"{name} {number}".rstrip(), "give a whole number from 1")
    return int(number)


def visible_gpus() -> int:
    """Return how many GPUs a training may use; asks the driver, since importing torch takes seconds."""
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return len([name for name in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if name.strip() not in {"", "-1"}])
    if shutil.which("nvidia-smi") is None:
        return 0
    return subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True).stdout.count("GPU ")
