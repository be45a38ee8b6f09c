"""How a training is spread over processes: which method goes with which accelerate config, and each process's rows.

What is refused here is refused before a launch and before a weight is loaded. Each reason was read in the source it
names, or seen: `tests/sharded.py` trains with real FSDP2 on CPU processes.
"""

import importlib.util
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from medibot.errors import RecipeError
from medibot.recipe import Recipe
from medibot.recipe.schema import Finding

CONFIGS = Path("accelerate_configs")


# TrainingArguments' own defaults
ROWS, ACCUMULATED = 8, 1


@dataclass(frozen=True)
class Hardware:
    """What an accelerate config says: its name, its way of sharing the work, and the settings of that."""

    name: str
    kind: str
    settings: dict[str, Any]

    @property
    def sharded(self) -> bool:
        return self.kind not in ("one process", "DDP")


def read_hardware(file: Path) -> Hardware:
    """The accelerate config of that file; RecipeError if it is none, or of a kind that trains something else."""
    try:
        written = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        what = f"{file} is not YAML: {' '.join(str(error).split())}"
        raise RecipeError.of("ACCELERATE", what, "take one of accelerate_configs/") from error
    if not isinstance(written, dict):
        raise RecipeError.of("ACCELERATE", f"{file} is no accelerate config", "take one of accelerate_configs/")
    plugin = {"FSDP": "fsdp_config", "DEEPSPEED": "deepspeed_config"}.get(written.get("distributed_type", "NO"), "")
    settings = written | (written.get(plugin) or {})
    return Hardware(file.stem, kind_of(file, settings), settings)


def kind_of(file: Path, settings: Mapping[str, Any]) -> str:
    written = settings.get("distributed_type", "NO")
    if written == "FSDP" and settings.get("fsdp_version", 1) == 2:
        return "FSDP2"
    if written == "DEEPSPEED" and settings.get("zero_stage", 2) in (2, 3):
        return f"ZeRO-{settings.get('zero_stage', 2)}"
    if written in ("NO", "MULTI_GPU"):
        return {"NO": "one process", "MULTI_GPU": "DDP"}[written]
    reasons = {
        "MULTI_CPU": "accelerate starts one process under MULTI_CPU, whatever num_processes says: take cpu-2",
        "FSDP": "FSDP1 is deprecated upstream: write fsdp_version: 2",
        "DEEPSPEED": "ZeRO-2 and ZeRO-3 are the stages that are known here",
    }
    remedy = reasons.get(written, "take one of accelerate_configs/")
    raise RecipeError.of("ACCELERATE", f"{file} spreads a training by {written}", remedy)


def refuse_conflicts(recipe: Recipe, hardware: Hardware, gpus: int, machines: int = 1) -> None:
    """Raise RecipeError with all that this recipe and this hardware cannot do together, or this machine cannot do."""
    lacking = list(lacks(hardware, gpus, machines))
    found = list(find_conflicts(hardware, recipe.training, recipe.quantization, recipe.lora, recipe.model))
    problems = [RecipeError.of(f"ACCELERATE={hardware.name}", *finding[1:]).problems[0] for finding in lacking]
    problems += [
        recipe.error(key, f"{what} (ACCELERATE={hardware.name})", remedy).problems[0] for key, what, remedy in found
    ]
    if problems:
        raise RecipeError(problems)


def lacks(hardware: Hardware, gpus: int, machines: int) -> Iterator[Finding]:
    """What the machine does not have."""
    if hardware.sharded and not gpus:
        # accelerate/state.py, AcceleratorState: only accelerators are promoted to FSDP or DeepSpeed
        what = f"{hardware.kind} needs GPUs: without them accelerate trains plain data parallel in silence"
        yield Finding("", what, "take cpu or cpu-2")
    if hardware.kind.startswith("ZeRO"):
        if importlib.util.find_spec("deepspeed") is None:
            yield Finding("", "DeepSpeed is not installed", "run: .venv/bin/python -m pip install deepspeed")
        if machines > 1 and hardware.settings.get("deepspeed_multinode_launcher") != "standard":
            # accelerate/utils/launch.py, prepare_deepspeed_cmd_env
            what = "accelerate would start the other machines itself, by pdsh"
            yield Finding("", what, "write deepspeed_multinode_launcher: standard, and start it on each machine")


Section = Mapping[str, Any]


def find_conflicts(
    hardware: Hardware, training: Section, quantization: Section | None, lora: Section | None, model: Section
) -> Iterator[Finding]:
    """What a method cannot do on this hardware, whatever the machine: by key, with reason and remedy."""
    if hardware.sharded and training.get("save_only_model") and training.get("load_best_model_at_end"):
        # transformers/trainer.py, create_accelerator_and_postprocess
        yield Finding("training.save_only_model", "leaves no best model that shards could be loaded from", "leave out")
    if hardware.kind == "DDP":
        yield from ddp_clashes(training)
    elif hardware.kind == "FSDP2":
        yield from fsdp_clashes(hardware.settings, training, lora)
        yield from fsdp_quantization_clashes(quantization or {}, model)
    elif hardware.kind == "ZeRO-3":
        yield from zero3_clashes(hardware.settings, training, lora)


def ddp_clashes(training: Section) -> Iterator[Finding]:
    if (training.get("activation_checkpointing_kwargs") or {}).get("use_reentrant"):
        # torch's DDP marks a parameter ready once; a reentrant backward pass comes to it twice
        yield Finding("training.activation_checkpointing_kwargs", "DDP needs use_reentrant: false", "write false")


def fsdp_clashes(settings: Section, training: Section, lora: Section | None) -> Iterator[Finding]:
    own = bool(settings.get("fsdp_activation_checkpointing"))
    if own and lora is not None:
        # peft/tuners/tuners_utils.py, _get_adapter_state_dict: it looks for names without torch's wrapper in them
        what = "fsdp_activation_checkpointing renames the layers, and peft would save an empty adapter"
        yield Finding("lora", what, "write fsdp_activation_checkpointing: false; the recipe's own takes its place")
    if own and training.get("activation_checkpointing", True):
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


def fsdp_quantization_clashes(quantization: Section, model: Section) -> Iterator[Finding]:
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


def zero3_clashes(settings: Section, training: Section, lora: Section | None) -> Iterator[Finding]:
    if training.get("auto_find_batch_size"):
        # transformers/trainer.py, create_accelerator_and_postprocess
        yield Finding("training.auto_find_batch_size", "does not work with ZeRO-3", "leave it out")
    if not settings.get("zero3_save_16bit_model"):
        # transformers/trainer.py, save_model
        yield Finding("training", "the Trainer would save shards only", "write zero3_save_16bit_model: true")
    reentrant = (training.get("activation_checkpointing_kwargs") or {}).get("use_reentrant")
    if lora is not None and reentrant is False and training.get("activation_checkpointing", True):
        # trl/trainer/sft_trainer.py, SFTTrainer.__init__
        yield Finding(
            "training.activation_checkpointing_kwargs", "LoRA under ZeRO-3 needs use_reentrant: true", "leave out"
        )


def share_batch(recipe: Recipe, processes: int) -> tuple[int, int]:
    """(rows on a device, steps accumulated) with which `processes` train on the recipe's batch: its product stays.

    The recipe's numbers are those of one process. Each process gets its share of the rows, in the largest pieces that
    are no larger than the recipe's.
    """
    rows = recipe.training.get("per_device_train_batch_size", ROWS)
    batch = rows * recipe.training.get("gradient_accumulation_steps", ACCUMULATED)
    if batch % processes:
        fitting = ", ".join(str(count) for count in range(1, batch + 1) if batch % count == 0)
        what = f"{batch} rows a step cannot be shared by {processes} processes"
        remedy = f"start one of {fitting}, or change it here or in gradient_accumulation_steps"
        raise recipe.error("training.per_device_train_batch_size", what, remedy)
    share = batch // processes
    piece = max(size for size in range(1, min(rows, share) + 1) if share % size == 0)
    return piece, share // piece


def is_zero3() -> bool:
    """Whether accelerate launched this process for DeepSpeed's ZeRO-3."""
    environment = os.environ
    return (environment.get("ACCELERATE_USE_DEEPSPEED"), environment.get("ACCELERATE_DEEPSPEED_ZERO_STAGE")) == (
        "true",
        "3",
    )


FOUR_BIT = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


# What a method says in the sections quantization and lora
METHODS: dict[str, tuple[dict[str, Any] | None, dict[str, Any] | None]] = {
    "LoRA": (None, {}),
    "DoRA": (None, {"use_dora": True}),
    "LoRA and whole modules": (None, {"modules_to_save": ["lm_head"]}),
    "QLoRA, 4-bit": (FOUR_BIT, {}),
    "QLoRA, 4-bit, float storage": (FOUR_BIT | {"bnb_4bit_quant_storage": "bfloat16"}, {}),
    "QLoRA, 8-bit": ({"load_in_8bit": True}, {}),
    "full": (None, None),
}


def evidence(mark: str, *methods: str) -> dict[str, str]:
    return dict.fromkeys(methods, mark)


TWO_PROCESSES = evidence("on CPU", "LoRA")


EVIDENCE: dict[str, dict[str, str]] = {
    "cpu": evidence("tested", "LoRA", "DoRA", "QLoRA, 4-bit", "QLoRA, 4-bit, float storage", "full")
    | evidence("tried", "LoRA and whole modules", "QLoRA, 8-bit"),
    "cpu-2": evidence("tested", "LoRA") | evidence("tried", "full"),
    "single-gpu": {},
    "multi-gpu": TWO_PROCESSES | evidence("tried", "full"),
    "multi-node": TWO_PROCESSES,
    "fsdp2": evidence("on CPU", "LoRA", "QLoRA, 4-bit, float storage", "full") | evidence("tried", "DoRA"),
    "zero2": evidence("tried", "LoRA", "QLoRA, 4-bit", "QLoRA, 8-bit", "full"),
    "zero3": evidence("tried", "LoRA", "QLoRA, 4-bit", "full"),
}


LEGEND = """\
tested    a test of this repository trains it so
on CPU    a test trains it so with CPU processes (gloo) in the place of GPUs
tried     trained so once by hand with CPU processes in the place of GPUs, in no test
upstream  not run here: it should work by what upstream's source and documents say
-         refused, before anything is loaded; the reason stands below"""


def matrix(folder: Path = CONFIGS) -> tuple[list[str], list[tuple[str, list[str]]], list[str]]:
    """(accelerate configs, (method, mark under each), reasons of what is refused)."""
    hardware = [read_hardware(folder / f"{name}.yaml") for name in EVIDENCE]
    rows, reasons = [], []
    for method, (quantization, lora) in METHODS.items():
        marks = []
        for one in hardware:
            found = list(find_conflicts(one, {}, quantization, lora, {}))
            reasons += [f"{method} under {one.kind}: {what} ({remedy})" for _, what, remedy in found]
            marks.append("-" if found else EVIDENCE[one.name].get(method, "upstream"))
        rows.append((method, marks))
    return list(EVIDENCE), rows, list(dict.fromkeys(reasons))
