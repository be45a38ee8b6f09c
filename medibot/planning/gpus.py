"""Find the GPUs that torch can use here, and say why it cannot use one that is there."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import warnings
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from medibot.errors import RecipeError

# AMD's runtime reads its own name first
NAMES = ("HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES")
HIDDEN = dict.fromkeys(NAMES, "")
# Index of torch 2.13's wheels: the driver that it needs, and the compute capabilities that it has kernels for
WHEELS = {"cu130": (580, (7, 5), (12, 9)), "cu126": (525, (5, 0), (9, 9))}
ASK = "import json; from medibot.planning.gpus import ask_torch; print(json.dumps(ask_torch()))"


def ask_torch() -> dict[str, Any]:
    """Return how many GPUs this process's torch can use, its version, and what it cannot use for which reason."""
    import torch

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    kernels, old = re.findall(r"(sm|compute)_(\d+)", " ".join(torch.cuda.get_arch_list())), []
    for place in [] if torch.version.hip else range(count):
        own = torch.cuda.get_device_capability(place)
        made = [(kind, divmod(int(digits), 10)) for kind, digits in kernels]
        # A kernel runs on later cards of its generation; `compute_` is compiled for any later card when it is loaded
        if not any(own >= least and (kind == "compute" or own[0] == least[0]) for kind, least in made):
            old.append([torch.cuda.get_device_name(place), *own])
    reason = " ".join(str(said[-1].message).split()).partition(". ")[0] if said else ""
    built = torch.version.hip or torch.version.cuda
    return {"count": count, "version": torch.__version__, "built": built, "reason": reason, "old": old}


def find_gpus() -> dict[str, Any]:
    """Return what `ask_torch` says in a process of its own: the import of torch takes seconds."""
    installed = version("torch")
    if are_hidden() or installed.endswith("+cpu"):
        return {"count": 0, "version": installed, "built": None, "reason": "", "old": []}
    return ask_elsewhere(frozenset(os.environ.items()))


@cache
def ask_elsewhere(environment: frozenset[tuple[str, str]]) -> dict[str, Any]:
    """Ask torch once in each environment."""
    command = [sys.executable, "-c", ASK]
    done = subprocess.run(command, env=dict(environment), stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def are_hidden() -> bool:
    """Tell whether the environment leaves no GPU in sight."""
    return any(os.environ.get(name, "0").strip() in {"", "-1"} for name in NAMES)


def first_gpu() -> dict[str, str]:
    """Return the environment of a process that sees one GPU: with several the Trainer would take DataParallel."""
    name = next((name for name in NAMES if name in os.environ), NAMES[1])
    return {name: os.environ.get(name, "0").split(",")[0]}


def query_driver() -> list[str]:
    """Return [name, driver's version, compute capability] of the first GPU that NVIDIA's driver sees, or nothing."""
    # Drivers before 510 do not know the last of them
    for fields in ("name,driver_version,compute_cap", "name,driver_version") if shutil.which("nvidia-smi") else ():
        command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
        if (done := subprocess.run(command, capture_output=True, text=True)).returncode == 0:
            return done.stdout.partition("\n")[0].split(", ")
    return []


def require_usable_gpus(found: dict[str, Any]) -> int:
    """Return how many GPUs `ask_torch` found; raise RecipeError for one that it cannot use, with the wheel that could.

    GPUs that the environment hides are none. One that can be used needs what Triton compiles with.
    """
    seen = [] if are_hidden() or (found["count"] and not found["old"]) else query_driver()
    if are_hidden() or not (seen or found["count"]):
        return 0
    if not (seen or found["old"]):
        require_compiler()
        return found["count"]
    name, driver, *capability = seen or ["", "of unknown version"]
    if found["old"]:
        name, *capability = found["old"][0]
    own = tuple(int(digits) for part in capability for digits in re.findall(r"\d+", str(part))) or (8, 0)
    branch, built = int(re.sub(r"\D.*", "", driver) or 1000), found["built"]
    fitting = (index for index, (least, first, last) in WHEELS.items() if branch >= least and first <= own <= last)
    index, public = next(fitting, None), found["version"].partition("+")[0]
    remedy = "look at what nvidia-smi and CUDA_VISIBLE_DEVICES say"
    if index is None:
        remedy = f"update the driver, to {WHEELS['cu130'][0]} or newer"
    elif index != "cu" + (built or "").replace(".", ""):
        at = f"--index-url https://download.pytorch.org/whl/{index}"
        remedy = f"run: .venv/bin/python -m pip install {at} torch=={public}+{index}"
    why = found["reason"] or (f"built for CUDA {built}" if built else "built without CUDA")
    if found["old"]:
        why += f" without kernels for compute capability {own[0]}.{own[1]}"
    what = f"torch {public} cannot use it under driver {driver}: {why}"
    raise RecipeError.of(f"GPU {name}", what, f"{remedy}; or hide it: CUDA_VISIBLE_DEVICES= or ACCELERATE=cpu")


def require_compiler() -> None:
    """Raise RecipeError where Triton, which TRL's loss is written in, cannot compile what it loads kernels with."""
    header = Path(sysconfig.get_path("include", "posix_prefix"), "Python.h")
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    missing = [name for name, found in (("C compiler", compiler), (str(header), header.is_file())) if not found]
    if missing and importlib.util.find_spec("triton"):
        what = f"Triton, which computes TRL's loss there, finds no {' and no '.join(missing)}"
        raise RecipeError.of(
            "GPU", what, "install gcc and python3-dev, or what your system calls them; or ACCELERATE=cpu"
        )
