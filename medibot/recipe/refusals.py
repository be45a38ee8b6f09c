"""Find what is wrong with a recipe's values, all of it at once, and say what to write instead."""

import json
import re
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from pydantic import ValidationError

from medibot.recipe.document import outwards
from medibot.recipe.renames import NEEDS, REFUSED_VALUES
from medibot.recipe.schema import NULL_IS_A_VALUE, SECTIONS, Finding, section_models
from medibot.recipe.suggestions import explain


def check(values: dict[str, Any]) -> list[Finding]:
    """Return all mistakes of a recipe's values, one for each key."""
    findings = list(find_wrong_values(values))
    flawed = {outer for finding in findings for outer in outwards(finding.key)}
    # What follows may trust the types of what is left
    settings = {
        key: value
        for key, value in flattened({section: values[section] for section in SECTIONS if section in values})
        if key in SECTIONS or (key not in flawed and (value is not None or key in NULL_IS_A_VALUE))
    }
    findings += find_clashes(settings)
    if all("." in key or key in SECTIONS for key in flawed):  # what is missing may stand in a misspelt section
        on = {key for key, value in settings.items() if value is not False}
        for key, others, what, remedy in NEEDS:
            if key in on and on.isdisjoint(others) and key.partition(".")[0] not in flawed:
                findings.append(Finding(key, what, remedy))
    for section in {"training", "lora", "quantization"} & values.keys() - flawed:
        findings += find_upstream(section, values[section])
    return list({finding.key: finding for finding in reversed(findings)}.values())


def flattened(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield dotted keys and values of nested mappings, each mapping before what stands in it."""
    for key, value in values.items():
        yield f"{prefix}{key}", value
        if isinstance(value, dict):
            yield from flattened(value, f"{prefix}{key}.")


def find_wrong_values(values: dict[str, Any]) -> Iterator[Finding]:
    """Yield unknown names, missing ones and values of a wrong type or size."""
    grouped: dict[str, tuple[Any, list[Any]]] = {}
    try:
        section_models()[""].model_validate(values)
    except ValidationError as error:
        for item in error.errors():
            key, value = "", values
            # The location also names steps into a union's members
            for step in item["loc"]:
                if isinstance(value, list) and isinstance(step, int):
                    key, value = f"{key}[{step}]", value[step]
                elif isinstance(value, dict) and (step in value or item["type"] == "missing"):
                    key, value = f"{key}.{step}".lstrip("."), value.get(step)
            grouped.setdefault(key, (value, []))[1].append(item)
    # The mistake inside is the one to show, not that the whole is of another type
    for key in grouped.keys() - {outer for inner in grouped for outer in outwards(inner) if outer != inner}:
        yield explain(key, *grouped[key])


def find_clashes(s: dict[str, Any]) -> Iterator[Finding]:
    """Yield settings that upstream accepts in silence, and that spoil the run or fail only with the model loaded."""
    for key, value, reason in REFUSED_VALUES:
        if s.get(key) == value:
            yield Finding(key, f"cannot be {json.dumps(value)}", reason)
    if not s.get("training.chat_template_path", ".jinja").endswith((".jinja", ".j2")):
        # A tokenizer there would add tokens and resize the embeddings
        yield Finding("training.chat_template_path", "must be a .jinja or .j2 file", "name the template alone")
    if s.get("training.warmup_steps", 0) > 1 and s["training.warmup_steps"] % 1:  # upstream would cut the rest off
        yield Finding("training.warmup_steps", "must be a whole number, or below 1 for a share of the run")
    if s.get("training.packing") and s.get("training.max_length", 1024) is None:
        yield Finding("training.packing", "needs a length to pack to", "give training.max_length a number")
    if s.get("training.padding_free") and not s.get("training.packing") and s.get("training.max_length", 1024):
        yield Finding("training.padding_free", "cannot cut to max_length", "write packing: true, or max_length: null")
    key = "training.activation_checkpointing_kwargs"
    if key in s and "use_reentrant" not in s[key]:  # upstream passes no value to torch
        yield Finding(key, "must say use_reentrant", "add use_reentrant: false")
    if s.get(f"{key}.selective") and "lora" in s:
        yield Finding(key, "selective checkpointing crashes on a LoRA model", "write use_reentrant: false alone")
    targets, start = s.get("lora.target_modules"), s.get("lora.init_lora_weights")
    if targets == "lm_head" or (isinstance(targets, list) and "lm_head" in targets):
        what = "cannot hold lm_head: trl's fused loss reads its weight directly"
        yield Finding("lora.target_modules", what, "train it whole: lora.modules_to_save: [lm_head]")
    if start == "orthogonal" and s.get("lora.r", 8) % 2:
        yield Finding("lora.r", "must be even for the orthogonal initialisation")
    if s.get("quantization.load_in_4bit") and str(start).startswith(("pissa", "mica", "orthogonal", "loftq")):
        what = f"{start} cannot be computed from 4-bit weights"
        yield Finding("lora.init_lora_weights", what, "leave one of them out")
    validation = s.get("data.validation", 0.05)
    if validation == 0 and s.get("training.eval_strategy", "no") != "no":
        yield Finding("training.eval_strategy", "evaluates, but data.validation is 0", "change one of them")
    if validation + s.get("data.test", 0.05) >= 1:
        yield Finding("data.test", "leaves no row to train on", "it must be below 1 together with data.validation")


def find_upstream(section: str, values: dict[str, Any]) -> Iterator[Finding]:
    """Yield what a section's own constructor complains about, in its words, at the setting that they name first."""
    from peft import LoraConfig
    from transformers import BitsAndBytesConfig
    from trl import SFTConfig

    # The machine decides these, and nothing else may depend on where a recipe is checked
    machine = {"output_dir": "unused", "use_cpu": True, "bf16": False, "report_to": "none"}
    constructors = {"training": partial(SFTConfig, **machine), "lora": LoraConfig, "quantization": BitsAndBytesConfig}
    try:
        constructors[section](**{key: value for key, value in values.items() if key != "chat_template_path"})
    except (ValueError, TypeError, NotImplementedError) as error:
        words = " ".join(str(error).replace("--", "").replace("`", "").split())
        named = [(at.start(), key) for key in values if (at := re.search(rf"\b{re.escape(key)}\b", words))]
        yield Finding(f"{section}.{min(named)[1]}" if named else section, words)
