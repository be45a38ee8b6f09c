"""Refuse, before a launch, what a fine-tuning method and an accelerate config cannot do together.

The reasons stand in `conflicts.yaml`; `tests/training/sharded.py` trains with real FSDP2 on CPU processes.
`accelerate_configs/README.md` shows them all in one table.
"""

import importlib.util
import os
from collections.abc import Mapping
from typing import Any

from medibot.errors import RecipeError
from medibot.planning.hardware import Hardware
from medibot.recipe import Recipe
from medibot.recipe.files import read_data
from medibot.recipe.schema import Finding

Section = Mapping[str, Any]
# The ways of accelerate's ParallelismConfig in which several processes take the same rows
SAME = ("cp", "tp", "sp")
FLOATS = ("bfloat16", "float16", "float32")
CONFLICTS: dict[str, tuple[str, str, str]] = read_data(__file__, "conflicts.yaml")


def refuse_conflicts(recipe: Recipe, hardware: Hardware, gpus: int, machines: int = 1) -> None:
    """Raise RecipeError with all that this recipe cannot do on this hardware, or this machine cannot do at all."""
    name, deepspeed, found = f"ACCELERATE={hardware.name}", hardware.kind.startswith("ZeRO"), []
    if hardware.sharded and not gpus:
        # accelerate/state.py, AcceleratorState: only accelerators are promoted to FSDP or DeepSpeed
        what = f"{hardware.kind} needs GPUs: without them accelerate trains plain data parallel in silence"
        found.append(RecipeError.of(name, what, "take cpu or cpu-2"))
    if deepspeed and importlib.util.find_spec("deepspeed") is None:
        remedy = "run: .venv/bin/python -m pip install deepspeed"
        found.append(RecipeError.of(name, "DeepSpeed is not installed", remedy))
    if deepspeed and machines > 1 and hardware.settings.get("deepspeed_multinode_launcher") != "standard":
        # accelerate/utils/launch.py, prepare_deepspeed_cmd_env
        remedy = "write deepspeed_multinode_launcher: standard, and start it on each machine"
        found.append(RecipeError.of(name, "accelerate would start the other machines itself, by pdsh", remedy))
    for key, what, remedy in find_conflicts(hardware, recipe.training, recipe.quantization, recipe.lora, recipe.model):
        found.append(recipe.error(key, f"{what} ({name})", remedy))
    if found:
        raise RecipeError([problem for error in found for problem in error.problems])


def find_conflicts(
    hardware: Hardware, training: Section, quantization: Section | None, lora: Section | None, model: Section
) -> list[Finding]:
    """Return what a method cannot do on this hardware, whatever the machine."""
    sharded, settings, bits, adapted = hardware.sharded, hardware.settings, quantization or {}, lora is not None
    fsdp, zero3 = hardware.kind == "FSDP2", hardware.kind == "ZeRO-3"
    again, own = training.get("activation_checkpointing", True), fsdp and settings.get("fsdp_activation_checkpointing")
    reentrant = (training.get("activation_checkpointing_kwargs") or {}).get("use_reentrant")
    storage, dtype = bits.get("bnb_4bit_quant_storage") or "uint8", model.get("dtype", "auto")
    applies = {
        "best": sharded and training.get("save_only_model") and training.get("load_best_model_at_end"),
        "ddp": hardware.kind == "DDP" and reentrant,
        "empty": own and adapted,
        "twice": own and again,
        "state": fsdp and settings.get("fsdp_state_dict_type") != "FULL_STATE_DICT",
        "whole": fsdp and adapted and (lora or {}).get("modules_to_save"),
        "8-bit": fsdp and bits.get("load_in_8bit"),
        "4-bit": fsdp and bits.get("load_in_4bit") and storage not in FLOATS,
        # What `auto` comes to is known in the launched process: `refuse_cast`
        "cast": fsdp and bits.get("load_in_4bit") and storage in FLOATS and dtype not in ("auto", storage),
        "parallel": any(
            (settings.get("parallelism_config") or {}).get(f"parallelism_config_{way}_size", 1) > 1 for way in SAME
        ),
        "file": "deepspeed_config_file" in settings,
        "16-bit": zero3 and not settings.get("zero3_save_16bit_model"),
        "reentrant": zero3 and adapted and reentrant is False and again,
    }
    words = {"storage": storage, "float": FLOATS[0] if dtype == "auto" else dtype}
    return [Finding(*(text.format_map(words) for text in CONFLICTS[name])) for name, value in applies.items() if value]


def refuse_cast(recipe: Recipe, hardware: Hardware, dtype: str) -> None:
    """Raise RecipeError, in a launched process that computes in `dtype`, where FSDP2 would cast packed 4-bit weights."""
    computed = {**recipe.model, "dtype": dtype}
    known = find_conflicts(hardware, recipe.training, recipe.quantization, recipe.lora, computed)
    for key, what, remedy in known:
        if key == CONFLICTS["cast"][0]:
            raise recipe.error(key, f"{what} (FSDP2)", remedy)


def refuse_same_rows() -> None:
    """Raise RecipeError, in a launched process, where several take the same rows, however the launcher was told so."""
    sizes = [os.environ.get(f"PARALLELISM_CONFIG_{way.upper()}_SIZE", "1") for way in SAME]
    if os.environ.get("ACCELERATE_USE_PARALLELISM_CONFIG", "").lower() == "true" and set(sizes) != {"1"}:
        raise RecipeError.of("accelerate", *CONFLICTS["parallel"][1:])


def rows_of_a_step(recipe: Recipe) -> int:
    """Return the recipe's batch; upstream's defaults are read without its seconds of import."""
    return recipe.training.get("per_device_train_batch_size", 8) * recipe.training.get("gradient_accumulation_steps", 1)


def share_batch(recipe: Recipe, processes: int) -> dict[str, int]:
    """Return the settings with which each of `processes` takes its share of the recipe's batch.

    The recipe's numbers are those of one process. Each process gets its share of the rows, in the largest pieces that
    are no larger than the recipe's, so that the batch of a step stays the same on any hardware.
    """
    rows, batch = recipe.training.get("per_device_train_batch_size", 8), rows_of_a_step(recipe)
    if batch % processes:
        fitting = ", ".join(str(count) for count in range(1, batch + 1) if batch % count == 0)
        what = f"{batch} rows a step do not divide among {processes} processes"
        remedy = f"start one of {fitting}, or change it here or in gradient_accumulation_steps"
        raise recipe.error("training.per_device_train_batch_size", what, remedy)
    share = batch // processes
    piece = max(size for size in range(1, min(rows, share) + 1) if share % size == 0)
    return {"per_device_train_batch_size": piece, "gradient_accumulation_steps": share // piece}
