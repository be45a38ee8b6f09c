"""Describe what a training runs on: accelerate configs, GPUs by their data sheets, this machine."""

import os
import re
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import yaml

from medibot.errors import RecipeError, one_line
from medibot.recipe.files import read_data

if TYPE_CHECKING:
    import torch

GB = 1e9
# How each distributed_type, with its version, shares the work
KINDS = {"NO": "one process", "MULTI_GPU": "DDP", "FSDP 2": "FSDP2", "DEEPSPEED 2": "ZeRO-2", "DEEPSPEED 3": "ZeRO-3"}
REMEDIES = {
    "MULTI_CPU": "accelerate starts one process under MULTI_CPU, whatever num_processes says: take cpu-2",
    "FSDP": "FSDP1 is deprecated upstream: write fsdp_version: 2",
    "DEEPSPEED": "only ZeRO-2 and ZeRO-3 are supported",
}
GPUS: dict[str, tuple[float, float]] = read_data(__file__, "gpus.yaml")
# Assumed, not measured: CUDA context and library workspaces of a process, and NCCL's buffers where there are several
CONTEXT, NCCL = 600_000_000, 300_000_000


@dataclass(frozen=True)
class Device:
    """One device: its memory in bytes, TFLOPs as a data sheet says them or measured, and the dtype that it computes in."""

    name: str
    capacity: float
    tflops: float | None
    gpu: bool
    compute: "torch.dtype"


@dataclass(frozen=True)
class Hardware:
    """How `processes` share the work (a value of KINDS), and the name and settings of the accelerate config.

    DDP holds everything in each process, ZeRO-2 a share of optimizer and gradients, FSDP2 and ZeRO-3 of the weights, too.
    """

    kind: str = "one process"
    processes: int = 1
    settings: dict[str, Any] = field(default_factory=dict)
    name: str = ""

    @property
    def sharded(self) -> bool:
        """Tell whether a process holds only a share of something."""
        return self.kind not in ("one process", "DDP")


def read_hardware(file: Path) -> Hardware:
    """Read an accelerate config; raise RecipeError if it is none, or if upstream would not train as it says."""
    remedy = "take one of accelerate_configs/"
    try:
        written = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError.of("ACCELERATE", f"{file} is not YAML: {one_line(error)}", remedy) from error
    if not isinstance(written, dict):
        raise RecipeError.of("ACCELERATE", f"{file} is not an accelerate config", remedy)
    spread = written.get("distributed_type", "NO")
    plugin = {"FSDP": "fsdp_config", "DEEPSPEED": "deepspeed_config"}.get(spread, "")
    settings = written | (written.get(plugin) or {})
    version = {"FSDP": settings.get("fsdp_version", 1), "DEEPSPEED": settings.get("zero_stage", 2)}.get(spread, "")
    kind = KINDS.get(f"{spread} {version}".strip())
    if kind is None:
        what = f"{file}: distributed_type {spread} is not supported"
        raise RecipeError.of("ACCELERATE", what, REMEDIES.get(spread, remedy))
    return Hardware(kind, settings=settings, name=file.stem)


def find_device(written: str, dtype: str | None) -> Device:
    """Return the GPU called `written`: a size such as 24GB, or a name such as L4 or A100 80GB, whose speed is known."""
    import torch

    plain = re.sub(r"\W", "", written).upper()
    size: Any = re.fullmatch(r"(\d+(?:\.\d+)?) ?(?:GB|G)?", written.strip(), re.I)
    name = next((name for name in GPUS if re.sub(r"\W", "", name).upper() == plain), None)
    if name is None and size is None:
        raise RecipeError.of("GPU", f"{written!r} is not known", f"write a size such as 24GB, or: {', '.join(GPUS)}")
    capacity, tflops = GPUS[name] if name else (float(size[1]), None)
    half = torch.float16 if name == "T4" else torch.bfloat16
    compute = half if dtype in (None, "auto") else getattr(torch, dtype)
    return Device(name or f"{capacity:g} GB GPU", capacity * GB, tflops, True, compute)


def measure_tflops(compute: "torch.dtype", device: str, size: int = 4096, times: int = 20) -> float:
    """Return the TFLOPs that products of large matrices reach on `device`: a name may stand for slower variants, too."""
    import torch

    # Not torch's global generator: the draws of the training stay what they were
    generator = torch.Generator(device).manual_seed(0)
    matrix = torch.randn(size, size, device=device, generator=generator).to(compute)
    for repeats in (2, times):
        started = time.perf_counter()
        for _ in range(repeats):
            product = matrix @ matrix
        # A GPU works on when the call has returned: reading one value waits for it
        product[0, 0].item()
    return 2 * size**3 * times / (time.perf_counter() - started) / 1e12


def detect_device(compute: "torch.dtype") -> Device:
    """Return what this process may use: the GPU's free memory, or what the machine and its cgroups leave."""
    import torch

    if torch.cuda.is_available():
        capacity, tflops = torch.cuda.mem_get_info()[0] + CONTEXT, measure_tflops(compute, "cuda")
        torch.cuda.empty_cache()
        return Device(torch.cuda.get_device_name(), capacity, tflops, True, compute)
    free = psutil.virtual_memory().available
    group = re.search(r"^0::/(.*)$", Path("/proc/self/cgroup").read_text(), re.M) if sys.platform == "linux" else None
    here = Path("/sys/fs/cgroup") / (group[1] if group else "")
    for folder in (here, *here.parents):
        limit, used = folder / "memory.max", folder / "memory.current"
        if limit.is_file() and limit.read_text() != "max\n":
            free = min(free, max(0, int(limit.read_text()) - int(used.read_text())))
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return Device("this machine's CPU", psutil.Process().memory_info().rss + free / processes, None, False, compute)


def detect_hardware(processes: int = 1) -> Hardware:
    """Return what accelerate's launcher told this process."""
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        own = os.environ.get("FSDP_ACTIVATION_CHECKPOINTING") == "true"
        return Hardware("FSDP2", processes, {"fsdp_activation_checkpointing": own})
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        return Hardware(f"ZeRO-{os.environ.get('ACCELERATE_DEEPSPEED_ZERO_STAGE', '2')}", processes)
    return Hardware("DDP" if processes > 1 else "one process", processes)
