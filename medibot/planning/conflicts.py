"""Refuse, before a launch, what a fine-tuning method and an accelerate config cannot do together.

Each reason was read in the source it names, or seen: `tests/training/sharded.py` trains with real FSDP2 on CPU
processes. `accelerate_configs/README.md` shows them all in one table.
"""

import importlib.util
from collections.abc import Mapping
from typing import Any

from medibot.errors import RecipeError
from medibot.planning.hardware import Hardware
from medibot.recipe import Recipe
from medibot.recipe.schema import Finding

Section = Mapping[str, Any]
REENTRANT = "training.activation_checkpointing_kwargs"
# Key, reason and remedy of what `find_conflicts` finds.
CONFLICTS = {
    # transformers/trainer.py, create_accelerator_and_postprocess
    "best": ("training.save_only_model", "leaves no best model that shards could be loaded from", "leave out"),
    "twice": ("training.activation_checkpointing", "cannot be true beside fsdp_activation_checkpointing", "write one of them"),
    "size": ("training.auto_find_batch_size", "does not work with ZeRO-3", "leave it out"),
    # transformers/trainer.py, save_model
    "state": ("training", "the Trainer would save no model", "write fsdp_state_dict_type: FULL_STATE_DICT"),
    "16-bit": ("training", "the Trainer would save shards only", "write zero3_save_16bit_model: true"),
    # torch's DDP marks a parameter ready once; a reentrant backward pass comes to it twice
    "ddp": (REENTRANT, "DDP needs use_reentrant: false", "write false"),
    # trl/trainer/sft_trainer.py, SFTTrainer.__init__
    "reentrant": (REENTRANT, "LoRA under ZeRO-3 needs use_reentrant: true", "leave out"),
    # peft/tuners/tuners_utils.py, _get_adapter_state_dict: it looks for names without torch's wrapper in them
    "empty": ("lora", "fsdp_activation_checkpointing renames the layers, and peft would save an empty adapter",
              "write fsdp_activation_checkpointing: false; the recipe's own takes its place"),
    # Seen: two processes get another gradient than one
    "whole": ("lora.modules_to_save",
              "the gradient of a whole module beside LoRA is not summed over the processes under FSDP2",
              "leave it out, or ACCELERATE=multi-gpu"),
    # torch/nn/parameter.py: Int8Params.detach returns a plain tensor
    "8-bit": ("quantization.load_in_8bit", "8-bit weights cannot be made shards: torch refuses bitsandbytes' Int8Params",
              "load_in_4bit, or ACCELERATE=multi-gpu"),
    # accelerate/utils/fsdp_utils.py, fsdp2_prepare_model
    "4-bit": ("quantization.bnb_4bit_quant_storage",
              "4-bit weights stored as {storage} are left out of the shards: every GPU would hold all of them",
              "write {float}, or ACCELERATE=multi-gpu"),
}  # fmt: skip


def refuse_conflicts(recipe: Recipe, hardware: Hardware, gpus: int, machines: int = 1) -> None:
    """Raise RecipeError with all that this recipe cannot do on this hardware, or this machine cannot do at all."""
    name, deepspeed = f"ACCELERATE={hardware.name}", hardware.kind.startswith("ZeRO")
    errors = []
    if hardware.sharded and not gpus:
        # accelerate/state.py, AcceleratorState: only accelerators are promoted to FSDP or DeepSpeed
        what = f"{hardware.kind} needs GPUs: without them accelerate trains plain data parallel in silence"
        errors.append(RecipeError.of(name, what, "take cpu or cpu-2"))
    if deepspeed and importlib.util.find_spec("deepspeed") is None:
        remedy = "run: .venv/bin/python -m pip install deepspeed"
        errors.append(RecipeError.of(name, "DeepSpeed is not installed", remedy))
    if deepspeed and machines > 1 and hardware.settings.get("deepspeed_multinode_launcher") != "standard":
        # accelerate/utils/launch.py, prepare_deepspeed_cmd_env
        remedy = "write deepspeed_multinode_launcher: standard, and start it on each machine"
        errors.append(RecipeError.of(name, "accelerate would start the other machines itself, by pdsh", remedy))
    found = find_conflicts(hardware, recipe.training, recipe.quantization, recipe.lora, recipe.model)
    errors += [recipe.error(key, f"{what} ({name})", remedy) for key, what, remedy in found]
    if errors:
        raise RecipeError([problem for error in errors for problem in error.problems])


def find_conflicts(
    hardware: Hardware, training: Section, quantization: Section | None, lora: Section | None, model: Section
) -> list[Finding]:
    """Return what a method cannot do on this hardware, whatever the machine."""
    sharded, settings, bits = hardware.sharded, hardware.settings, quantization or {}
    fsdp, zero3, adapted = hardware.kind == "FSDP2", hardware.kind == "ZeRO-3", lora is not None
    full = settings.get("fsdp_state_dict_type") == "FULL_STATE_DICT"
    again, own = training.get("activation_checkpointing", True), fsdp and settings.get("fsdp_activation_checkpointing")
    reentrant = (training.get("activation_checkpointing_kwargs") or {}).get("use_reentrant")
    storage, dtype = bits.get("bnb_4bit_quant_storage") or "uint8", model.get("dtype", "auto")
    floats = ("bfloat16", "float16", "float32") if dtype == "auto" else (dtype,)
    applies = {
        "best": sharded and training.get("save_only_model") and training.get("load_best_model_at_end"),
        "ddp": hardware.kind == "DDP" and reentrant,
        "empty": own and adapted,
        "twice": own and again,
        "state": fsdp and not full,
        "whole": fsdp and adapted and (lora or {}).get("modules_to_save"),
        "8-bit": fsdp and bits.get("load_in_8bit"),
        "4-bit": fsdp and bits.get("load_in_4bit") and storage not in floats,
        "size": zero3 and training.get("auto_find_batch_size"),
        "16-bit": zero3 and not settings.get("zero3_save_16bit_model"),
        "reentrant": zero3 and adapted and reentrant is False and again,
    }
    words = {"storage": storage, "float": floats[0]}
    found = [CONFLICTS[name] for name, value in applies.items() if value]
    return [Finding(key, what.format_map(words), remedy.format_map(words)) for key, what, remedy in found]


def share_batch(recipe: Recipe, processes: int) -> dict[str, int]:
    """Return the settings with which each of `processes` takes its share of the recipe's batch.

    The recipe's numbers are those of one process. Each process gets its share of the rows, in the largest pieces that
    are no larger than the recipe's, so that the batch of a step stays the same on any hardware.
    """
    # Upstream's defaults, which are read without its seconds of import
    rows = recipe.training.get("per_device_train_batch_size", 8)
    batch = rows * recipe.training.get("gradient_accumulation_steps", 1)
    if batch % processes:
        fitting = ", ".join(str(count) for count in range(1, batch + 1) if batch % count == 0)
        what = f"{batch} rows a step do not divide among {processes} processes"
        remedy = f"start one of {fitting}, or change it here or in gradient_accumulation_steps"
        raise recipe.error("training.per_device_train_batch_size", what, remedy)
    share = batch // processes
    piece = max(size for size in range(1, min(rows, share) + 1) if share % size == 0)
    return {"per_device_train_batch_size": piece, "gradient_accumulation_steps": share // piece}
