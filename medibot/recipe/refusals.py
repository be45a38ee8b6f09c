"""Find what is wrong with a recipe's values, all of it at once, and say what to write instead."""

import json
import re
from collections.abc import Iterator
from functools import partial
from typing import Any

from pydantic import ValidationError

from medibot.recipe.renames import REFUSED_VALUES
from medibot.recipe.schema import NULL_IS_A_VALUE, SECTIONS, Finding, section_models
from medibot.recipe.suggestions import explain

KWARGS = "training.activation_checkpointing_kwargs"


def check(values: dict[str, Any]) -> list[Finding]:
    """Return all mistakes of a recipe's values, one for each key."""
    findings = list(find_wrong_values(values))
    told = [finding.key for finding in findings]
    flawed = {re.split(r"[.\[]", key)[0] for key in told}
    # What follows may trust the types of what is left: sections by name, and settings by dotted key
    settings = {section: values[section] for section in SECTIONS if section in values}
    for section in [section for section in settings if isinstance(values[section], dict)]:
        for name, value in values[section].items():
            key = f"{section}.{name}"
            mistaken = any(other == key or other.startswith((f"{key}.", f"{key}[")) for other in told)
            if not mistaken and (value is not None or key in NULL_IS_A_VALUE):
                settings[key] = value
    findings += find_clashes(settings)
    if flawed <= set(SECTIONS):  # what is missing may stand in a section whose name is misspelt
        findings += [gap for gap in find_gaps(settings) if gap.key.partition(".")[0] not in flawed]
    for section in {"training", "lora", "quantization"} & values.keys() - flawed:
        findings += find_upstream(section, values[section])
    return list({finding.key: finding for finding in reversed(findings)}.values())


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
    for key, (value, errors) in grouped.items():
        # The mistake inside is the one to show, not that the whole is of another type
        if not any(other.startswith((f"{key}.", f"{key}[")) for other in grouped):
            yield explain(key, value, errors)


def find_clashes(s: dict[str, Any]) -> Iterator[Finding]:
    """Yield settings that upstream accepts in silence, and that spoil the run or fail only once the model is loaded."""
    for key, value, reason in REFUSED_VALUES:
        if s.get(key) == value:
            yield Finding(key, f"cannot be {json.dumps(value)}", reason)
    if not s.get("training.chat_template_path", ".jinja").endswith((".jinja", ".j2")):
        # A tokenizer there would add tokens and resize the embeddings
        yield Finding("training.chat_template_path", "must be a .jinja or .j2 file", "name the template alone")
    if s.get("training.label_smoothing_factor"):
        yield Finding("training.label_smoothing_factor", "costs a second forward pass", "leave it out")
    if s.get("training.packing") and s.get("training.max_length", 1024) is None:
        yield Finding("training.packing", "needs a length to pack to", "give training.max_length a number")
    kwargs = s.get(KWARGS)
    if kwargs is not None and "use_reentrant" not in kwargs:  # upstream passes no value to torch
        yield Finding(KWARGS, "must say use_reentrant", "add use_reentrant: false")
    if kwargs and kwargs.get("selective") and "lora" in s:
        yield Finding(KWARGS, "selective checkpointing crashes on a LoRA model", "write use_reentrant: false alone")
    targets, start = s.get("lora.target_modules"), s.get("lora.init_lora_weights")
    if targets == "lm_head" or (isinstance(targets, list) and "lm_head" in targets):
        what = "cannot hold lm_head: trl's fused loss reads its weight directly"
        yield Finding("lora.target_modules", what, "train it whole: lora.modules_to_save: [lm_head]")
    if targets in ("all_linear", "all", "linear"):
        yield Finding("lora.target_modules", f"{targets} would match no module", "did you mean all-linear?")
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


def find_gaps(s: dict[str, Any]) -> Iterator[Finding]:
    """Yield settings that need another one which is absent."""
    if s.get(KWARGS) and not s.get("training.activation_checkpointing"):
        yield Finding(KWARGS, "has no effect by itself", "add activation_checkpointing: true")
    if s.get("training.padding_free") and not s.get("training.packing") and s.get("training.max_length", 1024):
        yield Finding("training.padding_free", "cannot cut to max_length", "write packing: true, or max_length: null")
    four = s.get("quantization.load_in_4bit")
    if "quantization" in s and not four and not s.get("quantization.load_in_8bit"):
        yield Finding("quantization", "quantizes nothing", "write load_in_4bit: true, or leave the section out")
    if four and "quantization.bnb_4bit_quant_type" not in s:  # upstream leaves it at fp4
        yield Finding("quantization.load_in_4bit", "needs bnb_4bit_quant_type", "write nf4, or fp4")
    if "quantization" in s and "lora" not in s:
        yield Finding("quantization", "quantized weights cannot be trained themselves", "add a section lora")
    generate = s.get("evaluation.generate", {})
    for name in {"temperature", "top_p", "top_k", "min_p", "typical_p"} & generate.keys():
        if not generate.get("do_sample"):
            yield Finding(f"evaluation.generate.{name}", "has no effect: answers are greedy", "add do_sample: true")


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
