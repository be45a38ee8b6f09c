"""Refuse, before a launch, what a fine-tuning method and an accelerate config cannot do together.

Each reason was read in the source it names, or seen: `tests/training/sharded.py` trains with real FSDP2 on CPU
processes. `accelerate_configs/README.md` shows them all in one table.
"""

import importlib.util
from collections.abc import Iterator, Mapping
from typing import Any

from medibot.errors import RecipeError
from medibot.planning.hardware import Hardware
from medibot.recipe import Recipe
from medibot.recipe.schema import Finding

Section = Mapping[str, Any]


def refuse_conflicts(recipe: Recipe, hardware: Hardware, gpus: int, machines: int = 1) -> None:
    """Raise RecipeError with all that this recipe cannot do on this hardware, or this machine cannot do at all."""
    name, sections = f"ACCELERATE={hardware.name}", (recipe.training, recipe.quantization, recipe.lora, recipe.model)
    errors = [RecipeError.of(name, what, remedy) for what, remedy in find_lacks(hardware, gpus, machines)]
    found = find_conflicts(hardware, *sections)
    errors += [recipe.error(key, f"{what} ({name})", remedy) for key, what, remedy in found]
    if errors:
        raise RecipeError([error.problems[0] for error in errors])


def find_lacks(hardware: Hardware, gpus: int, machines: int) -> Iterator[tuple[str, str]]:
    """Yield what the machine does not have, and what to do."""
    if hardware.sharded and not gpus:
        # accelerate/state.py, AcceleratorState: only accelerators are promoted to FSDP or DeepSpeed
        what = f"{hardware.kind} needs GPUs: without them accelerate trains plain data parallel in silence"
        yield what, "take cpu or cpu-2"
    if hardware.kind.startswith("ZeRO") and importlib.util.find_spec("deepspeed") is None:
        yield "DeepSpeed is not installed", "run: .venv/bin/python -m pip install deepspeed"
    by_pdsh = hardware.settings.get("deepspeed_multinode_launcher") != "standard"
    if hardware.kind.startswith("ZeRO") and machines > 1 and by_pdsh:
        # accelerate/utils/launch.py, prepare_deepspeed_cmd_env
        remedy = "write deepspeed_multinode_launcher: standard, and start it on each machine"
        yield "accelerate would start the other machines itself, by pdsh", remedy


def find_conflicts(
    hardware: Hardware, training: Section, quantization: Section | None, lora: Section | None, model: Section
) -> Iterator[Finding]:
    """Yield what a method cannot do on this hardware, whatever the machine: by key, with reason and remedy."""
    kind, settings, checkpointing = hardware.kind, hardware.settings, training.get("activation_checkpointing", True)
    if hardware.sharded and training.get("save_only_model") and training.get("load_best_model_at_end"):
        # transformers/trainer.py, create_accelerator_and_postprocess
        yield Finding("training.save_only_model", "leaves no best model that shards could be loaded from", "leave out")
    reentrant = (training.get("activation_checkpointing_kwargs") or {}).get("use_reentrant")
    if kind == "DDP" and reentrant:
        # torch's DDP marks a parameter ready once; a reentrant backward pass comes to it twice
        yield Finding("training.activation_checkpointing_kwargs", "DDP needs use_reentrant: false", "write false")
    if kind == "FSDP2":
        yield from find_fsdp_conflicts(settings, lora, quantization or {}, model, checkpointing)
    if kind == "ZeRO-3" and training.get("auto_find_batch_size"):
        # transformers/trainer.py, create_accelerator_and_postprocess
        yield Finding("training.auto_find_batch_size", "does not work with ZeRO-3", "leave it out")
    if kind == "ZeRO-3" and not settings.get("zero3_save_16bit_model"):
        # transformers/trainer.py, save_model
        yield Finding("training", "the Trainer would save shards only", "write zero3_save_16bit_model: true")
    if kind == "ZeRO-3" and lora is not None and reentrant is False and checkpointing:
        # trl/trainer/sft_trainer.py, SFTTrainer.__init__
        key = "training.activation_checkpointing_kwargs"
        yield Finding(key, "LoRA under ZeRO-3 needs use_reentrant: true", "leave out")


def find_fsdp_conflicts(
    settings: Section, lora: Section | None, quantization: Section, model: Section, checkpointing: bool
) -> Iterator[Finding]:
    """Yield what FSDP2 cannot do, and which quantized weights it cannot shard."""
    own = settings.get("fsdp_activation_checkpointing")
    if own and lora is not None:
        # peft/tuners/tuners_utils.py, _get_adapter_state_dict: it looks for names without torch's wrapper in them
        what = "fsdp_activation_checkpointing renames the layers, and peft would save an empty adapter"
        yield Finding("lora", what, "write fsdp_activation_checkpointing: false; the recipe's own takes its place")
    if own and checkpointing:
        # transformers/trainer.py, create_accelerator_and_postprocess
        what = "cannot be true beside fsdp_activation_checkpointing"
        yield Finding("training.activation_checkpointing", what, "write one of them")
    if settings.get("fsdp_state_dict_type", "SHARDED_STATE_DICT") != "FULL_STATE_DICT":
        # transformers/trainer.py, save_model
        yield Finding("training", "the Trainer would save no model", "write fsdp_state_dict_type: FULL_STATE_DICT")
    if lora is not None and lora.get("modules_to_save"):
        # Seen: two processes get another gradient than one
        what = "the gradient of a whole module beside LoRA is not summed over the processes under FSDP2"
        yield Finding("lora.modules_to_save", what, "leave it out, or ACCELERATE=multi-gpu")
    if quantization.get("load_in_8bit"):
        # torch/nn/parameter.py: Int8Params.detach returns a plain tensor
        what = "8-bit weights cannot be made shards: torch refuses bitsandbytes' Int8Params"
        yield Finding("quantization.load_in_8bit", what, "load_in_4bit, or ACCELERATE=multi-gpu")
    storage, dtype = quantization.get("bnb_4bit_quant_storage") or "uint8", model.get("dtype", "auto")
    same = storage == dtype if dtype != "auto" else storage in ("bfloat16", "float16", "float32")
    if quantization.get("load_in_4bit") and not same:
        # accelerate/utils/fsdp_utils.py, fsdp2_prepare_model
        what = f"4-bit weights stored as {storage} are left out of the shards: every GPU would hold all of them"
        remedy = f"write {'bfloat16' if dtype == 'auto' else dtype}, or ACCELERATE=multi-gpu"
        yield Finding("quantization.bnb_4bit_quant_storage", what, remedy)


def share_batch(recipe: Recipe, processes: int) -> dict[str, int]:
    """Return the settings with which each of `processes` takes its share of the recipe's batch.

    The recipe's numbers are those of one process. Each process gets its share of the rows, in the largest pieces that
    are no larger than the recipe's, so that the batch of a step stays the same on any hardware.
    """
    # Upstream's defaults
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
