"""What a training may run on: GPUs by their data sheets, this machine, and how several processes share the work."""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from medibot.errors import RecipeError

GB = 1e9


# Memory in GB and dense bfloat16 (T4: float16) tensor TFLOPs with float32 accumulation, from NVIDIA's data sheets (H100
# and H200: the SXM modules)
GPUS = {
    "T4": (16, 65.0),
    "L4": (24, 121.0),
    "A10": (24, 125.0),
    "RTX 3090": (24, 71.0),
    "RTX 4090": (24, 165.2),
    "L40S": (48, 362.0),
    "A100 40GB": (40, 312.0),
    "A100 80GB": (80, 312.0),
    "H100 PCIe": (80, 756.0),
    "H100": (80, 989.0),
    "H200": (141, 989.0),
}


# Not measured here: CUDA context and library workspaces of a process, and NCCL's buffers where there are several
CONTEXT, NCCL = 600_000_000, 300_000_000


@dataclass(frozen=True)
class Device:
    """One device to plan for: its memory in bytes, TFLOPs where a data sheet says them, and the dtype that it computes in."""

    name: str
    capacity: float
    tflops: float | None
    gpu: bool
    compute: torch.dtype


@dataclass(frozen=True)
class Layout:
    """How many processes train, and what each holds: ddp all of it, zero2 a share of optimizer and gradients, fsdp2 and
    zero3 a share of the weights, too. `checkpointing`: FSDP's own, in the place of the recipe's."""

    strategy: str = "one process"
    processes: int = 1
    checkpointing: bool = False


def find_device(written: str, dtype: str | None) -> Device:
    """`24GB` (memory alone) or a name such as `L4` or `A100 80GB` (speed, too)."""
    size = re.fullmatch(r"(\d+(?:\.\d+)?) ?(?:GB|G)?", written.strip(), re.I)
    known = {re.sub(r"\W", "", name).upper(): name for name in GPUS}
    name = known.get(re.sub(r"\W", "", written).upper())
    if size is None and name is None:
        raise RecipeError.of("GPU", f"{written!r} is not known", f"write a size such as 24GB, or: {', '.join(GPUS)}")
    capacity, tflops = GPUS[name] if name else (float(size[1]), None)  # ty: ignore[not-subscriptable]
    compute = torch.float16 if name == "T4" else torch.bfloat16
    if dtype not in (None, "auto"):
        compute = getattr(torch, dtype)
    return Device(name or f"{capacity:g} GB GPU", capacity * GB, tflops, True, compute)


def detect_device(compute: torch.dtype) -> Device:
    """What this process may use: the GPU's free memory, or the memory that the machine and its cgroups leave."""
    if torch.cuda.is_available():
        return Device(torch.cuda.get_device_name(), torch.cuda.mem_get_info()[0] + CONTEXT, None, True, compute)
    used = psutil.Process().memory_info().rss
    shared = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    free = min([psutil.virtual_memory().available, *cgroup_free()])
    return Device("this machine's CPU", used + free / shared, None, False, compute)


def cgroup_free() -> list[int]:
    """Bytes that each memory limit around this process leaves (cgroup v2)."""
    file = Path("/proc/self/cgroup")
    lines = file.read_text().splitlines() if file.is_file() else []
    path = next((line[3:] for line in lines if line.startswith("0::")), "/")
    here, left = Path("/sys/fs/cgroup") / path.strip("/"), []
    for folder in (here, *here.parents):
        limit, used = folder / "memory.max", folder / "memory.current"
        if limit.is_file() and used.is_file() and (most := limit.read_text().strip()) != "max":
            left.append(max(0, int(most) - int(used.read_text())))
    return left


def detect_layout(processes: int) -> Layout:
    """What accelerate's launcher told this process."""
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        return Layout("fsdp2", processes, os.environ.get("FSDP_ACTIVATION_CHECKPOINTING") == "true")
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        return layout(int(os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")), processes)
    return layout(0, processes)


def layout(stage: int, processes: int) -> Layout:
    """The layout of a ZeRO stage; 0 is plain data parallel."""
    return Layout({2: "zero2", 3: "zero3"}.get(stage, "ddp" if processes > 1 else "one process"), processes)


def read_layout(config: dict[str, Any], processes: int) -> Layout:
    """The layout that an accelerate config asks for."""
    if config.get("distributed_type") == "FSDP":
        return Layout("fsdp2", processes, config.get("fsdp_config", {}).get("fsdp_activation_checkpointing", False))
    stage = config.get("deepspeed_config", {}).get("zero_stage", 2)
    return layout(stage if config.get("distributed_type") == "DEEPSPEED" else 0, processes)
