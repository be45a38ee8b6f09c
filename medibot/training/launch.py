"""TODO."""

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


def launch_training(recipe: str, overrides: list[str], own: list[str], accelerate: str | None, more: list[str]) -> int:
    """Start `accelerate launch` on this machine's hardware and hand back the training's own exit code.

    `own` are options of the training itself, `more` those of the launcher. One process on a CPU is started as
    accelerate's launcher would start it, without the seconds in which that imports torch.
    """
    config = hardware_config(accelerate)
    hardware = read_hardware(config)
    processes = launched_processes(hardware, more)
    if processes > 1 or hardware.sharded:
        checked = load_recipe(recipe, overrides)
        machines = option("--num_machines", more) or hardware.settings.get("num_machines", 1)
        refuse_conflicts(checked, hardware, visible_gpus(), machines)
        share_batch(checked, processes)
        # One process says what is wrong before several do, and leaves the prepared data for all of them
        from medibot.data.prepared import prepare

        prepare(checked)
    with tempfile.TemporaryDirectory() as folder:
        code = Path(folder) / "code"
        count = ["--num_processes", str(processes)] if "--num_processes" not in more else []
        threads = os.environ.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
        count += ["--num_cpu_threads_per_process", threads]
        environment = os.environ | {"MEDIBOT_EXIT": str(code), "MEDIBOT_PROCESSES": str(processes)}
        command = [sys.executable]
        if hardware.settings == ONE_CPU_PROCESS and not more:
            environment |= LAUNCHED_ON_CPU | {"OMP_NUM_THREADS": threads}
        else:
            command += ["-m", "accelerate.commands.launch", "--quiet", "--config_file", str(config), *count, *more]
        command += ["-m", "medibot", "train", recipe, *overrides, *own]
        # A session of its own: what is signalled to this process reaches the training through `forward` alone
        launcher = subprocess.Popen(command, env=environment, start_new_session=True)
        received = forward(launcher, Path(folder))
        finished = launcher.wait()
        if code.is_file():
            # The launcher turns every failure into 1
            return int(code.read_text())
        if received:
            return 128 + received[0]
        if finished:
            # A process that was killed says nothing itself, and torchrun ends the others before they can
            how = f"with code {finished}: what stands above says why" if finished > 0 else f"by signal {-finished}"
            how += " (9 is often the system's, out of memory)" if finished == -signal.SIGKILL else ""
            print(f"the training was ended {how}; the same command goes on", file=sys.stderr)
        return 128 - finished if finished < 0 else finished


def forward(launcher: subprocess.Popen, folder: Path) -> list[int]:
    """Pass the first signal on to the training's processes, which save and stop; returns the list it will be put in.

    accelerate's launcher of one process would not pass it on. Another signal a second later ends everything at once, as
    does a step that does not end within DEADLINE.
    """
    received: list[int] = []
    times: list[float] = []

    def end() -> None:
        with suppress(ProcessLookupError):
            os.killpg(launcher.pid, signal.SIGKILL)

    def too_late() -> None:
        if launcher.poll() is None:
            print(f"no step ended within {DEADLINE} s: ended; the last whole checkpoint is kept", file=sys.stderr)
            end()

    def note(number: int, _: Any) -> None:
        times.append(time.monotonic())
        if received and times[-1] - times[0] > 1:
            end()
        if received:
            return
        received.append(number)
        training = [int(file.read_text() or 0) for file in folder.glob("process-*")]
        for process in filter(None, training):
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGTERM)
        if training:
            print("stopping at the end of this step; again ends at once", file=sys.stderr, flush=True)
            timer = threading.Timer(DEADLINE, too_late)
            timer.daemon = True
            timer.start()
        else:
            end()

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, note)
    return received


def hardware_config(name: str | None) -> Path:
    """The accelerate config that `name` says, or the one for what this machine has."""
    chosen = name or {0: "cpu", 1: "single-gpu"}.get(visible_gpus(), "multi-gpu")
    return find_config(chosen)


def split_launch(launch: str) -> list[str]:
    """`--launch`'s text as arguments; `--option=value` as two."""
    try:
        words = shlex.split(launch)
    except ValueError as error:
        raise RecipeError.of("LAUNCH", f"cannot be split: {error}", "close the quote") from error
    return [part for word in words for part in (word.split("=", 1) if word.startswith("--") else [word])]


def launched_processes(hardware: Hardware, more: list[str]) -> int:
    """How many processes the launch will start in all; a config without a number takes every GPU."""
    return option("--num_processes", more) or hardware.settings.get("num_processes") or max(1, visible_gpus())


def option(name: str, more: list[str]) -> int | None:
    """The whole number that the launch's own arguments give `name`."""
    if name not in more:
        return None
    number = "".join(more[more.index(name) + 1 :][:1])
    if not number.isdecimal() or int(number) < 1:
        raise RecipeError.of("LAUNCH", f"{name} {number}".rstrip(), "give a whole number from 1")
    return int(number)


def visible_gpus() -> int:
    """GPUs that a training may use; asks the driver, since importing torch takes seconds."""
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return len([name for name in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if name.strip() not in {"", "-1"}])
    if shutil.which("nvidia-smi") is None:
        return 0
    return subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True).stdout.count("GPU ")
