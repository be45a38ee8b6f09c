"""Start a training in processes of its own on this machine's hardware, and bring back its exit code."""

import argparse
import os
import shlex
import signal
import sys
import tempfile
from contextlib import suppress
from functools import partial
from pathlib import Path

import psutil

from medibot.errors import RecipeError, one_line
from medibot.planning.conflicts import refuse_conflicts, rows_of_a_step, share_batch
from medibot.planning.gpus import HIDDEN, find_gpus, first_gpu, require_usable_gpus
from medibot.planning.hardware import Hardware, read_hardware
from medibot.recipe import Recipe, load_recipe
from medibot.recipe.files import find_by_name, search_folders
from medibot.training.signals import Signals

# The accelerate config that asks for nothing but one process on the CPU, and what accelerate's launcher then sets
ONE_CPU_PROCESS = {"compute_environment": "LOCAL_MACHINE", "distributed_type": "NO", "num_machines": 1}
ONE_CPU_PROCESS |= {"num_processes": 1, "use_cpu": True, "mixed_precision": "no"}
LAUNCHED_ON_CPU = {"ACCELERATE_USE_CPU": "True", "ACCELERATE_MIXED_PRECISION": "no"}


def launch(recipe: str, overrides: list[str], options: list[str], accelerate: str | None, text: str) -> int:
    """Run `medibot train` under `accelerate launch` and return the training's own exit code.

    `options` are those of the training, `text` those of the launcher. One process on a CPU is started as accelerate's
    launcher would start it, without the seconds in which that imports torch.
    """
    config, hardware = choose_hardware(accelerate)
    more, processes, machines = parse_launch(text, hardware)
    gpus = count_gpus(hardware)
    if processes > 1 or hardware.sharded:
        # Say in one process what is wrong before several do, and leave the prepared data for all of them
        checked = load_recipe(recipe, overrides)
        refuse_conflicts(checked, hardware, gpus, machines)
        processes = fit_processes(checked, hardware, processes, more)
        share_batch(checked, processes)
        from medibot.data.prepared import prepare

        prepare(checked)
    command, environment = [sys.executable], make_environment(gpus, processes)
    if hardware.settings == ONE_CPU_PROCESS and not more:
        environment |= LAUNCHED_ON_CPU
    else:
        command += ["-m", "accelerate.commands.launch", "--quiet", "--config_file", str(config)]
        # argparse takes the last of an option that is given twice
        command += ["--num_processes", str(processes), *more]
    command += ["-m", "medibot", "train", recipe, *overrides, *options]
    with tempfile.TemporaryDirectory() as folder:
        code = Path(folder) / "code"
        environment["MEDIBOT_EXIT"] = str(code)
        # A session of its own: what is signalled to this process reaches the training only through it
        launcher = psutil.Popen(command, env=environment, start_new_session=True)
        with Signals(partial(stop, launcher), partial(stop, launcher, kill=True)) as signals:
            finished = launcher.wait()
        if code.is_file():
            # The launcher turns every failure into 1
            return int(code.read_text())
    if signals.received:
        return 128 + signals.received
    if finished:
        # A process that was killed says nothing itself, and torchrun ends the others before they can
        how = f"with exit code {finished} (see above)"
        if finished < 0:
            how = f"by signal {-finished} (9 is often the system's, out of memory)"
        print(f"training ended {how}; run the same command to resume", file=sys.stderr)
    return 128 - finished if finished < 0 else finished


def make_environment(gpus: int, processes: int) -> dict[str, str]:
    """Return the environment in which `processes` train."""
    # accelerate's launcher passes OMP_NUM_THREADS on
    environment = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // processes))} | os.environ
    if gpus and not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        # Rows of many lengths leave holes that blocks of fixed sizes cannot use
        environment["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    return environment | {"MEDIBOT_PROCESSES": str(processes)} | (first_gpu() if gpus > 1 and processes == 1 else {})


def stop(launcher: psutil.Popen, kill: bool = False) -> None:
    """Signal the training's processes, which save and stop, since accelerate's launcher would not; or `kill` everything."""
    processes = launcher.children() if "accelerate.commands.launch" in launcher.args else [launcher]
    kill = kill or not processes
    for process in [*launcher.children(recursive=True), launcher] if kill else processes:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGKILL if kill else signal.SIGTERM)
    if not kill:
        print("stopping at the end of this step; again ends at once", file=sys.stderr, flush=True)


def leave_exit_code(code: int) -> bool:
    """Leave the exit code where the launcher cannot lose it; return whether this process is the first: it has the reason."""
    if "MEDIBOT_EXIT" in os.environ:
        try:
            with Path(os.environ["MEDIBOT_EXIT"]).open("x") as file:
                file.write(str(code))
        except FileExistsError:
            return False
    return True


def choose_hardware(name: str | None) -> tuple[Path, Hardware]:
    """Return the accelerate config called `name`, or the one for what this machine has; one for a CPU hides the GPUs."""
    here = name or {0: "cpu", 1: "single-gpu"}.get(find_gpus()["count"], "multi-gpu")
    config = find_by_name("ACCELERATE", here, search_folders("accelerate_configs"))
    hardware = read_hardware(config)
    # One that nobody named is for a machine without GPUs, or with one that is going to be refused
    if name and hardware.settings.get("use_cpu"):
        os.environ.update(HIDDEN)
    return config, hardware


def count_gpus(hardware: Hardware) -> int:
    """Return how many GPUs torch can use here; raise RecipeError where the accelerate config asks for one that it cannot."""
    gpus = require_usable_gpus(find_gpus())
    if not (gpus or hardware.sharded or hardware.settings.get("use_cpu")):
        what = "no GPU was found that torch can use (Apple's are not supported)"
        raise RecipeError.of(f"ACCELERATE={hardware.name}", what, "take cpu or cpu-2, or write use_cpu: true")
    return gpus


def parse_launch(text: str, hardware: Hardware) -> tuple[list[str], int, int]:
    """Return `--launch`'s text as arguments, and how many processes and machines these or the config start in all."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    # A config without a number takes every GPU
    started = hardware.settings.get("num_processes") or max(1, find_gpus()["count"])
    parser.add_argument("--num_processes", type=int, default=started)
    parser.add_argument("--num_machines", type=int, default=hardware.settings.get("num_machines", 1))
    try:
        words = shlex.split(text)
        known, _ = parser.parse_known_args(words)
        if min(known.num_processes, known.num_machines) < 1:
            raise ValueError(f"{text} starts nothing")
    except (ValueError, argparse.ArgumentError) as error:
        remedy = "--num_processes and --num_machines take a whole number from 1, and every quote is closed"
        raise RecipeError.of("LAUNCH", one_line(error), remedy) from error
    return words, known.num_processes, known.num_machines


def fit_processes(recipe: Recipe, hardware: Hardware, processes: int, words: list[str]) -> int:
    """Return how many `processes` to start: where nobody wrote a number, no more than can share the recipe's batch."""
    if "num_processes" in hardware.settings or "--num_processes" in " ".join(words):
        return processes
    rows = rows_of_a_step(recipe)
    fitting = max(count for count in range(1, processes + 1) if rows % count == 0)
    if fitting < processes:
        print(
            f"{fitting} of {processes} GPUs train: the {rows} rows of a step do not divide among {processes} processes"
        )
    return fitting
