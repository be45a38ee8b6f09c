"""Find what is wrong with a recipe's values, all of it at once, and say what to write instead."""

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

from pydantic import ValidationError

from medibot.recipe.renames import REFUSED, REFUSED_VALUES
from medibot.recipe.schema import REQUIRED, SECTIONS, Finding, section_models
from medibot.recipe.suggestions import describe, expected, explain, is_secret, suggest


def check(values: dict[str, Any]) -> list[Finding]:
    """Return all mistakes of a recipe's values."""
    from medibot.cleaning import rule_problem

    findings = [*find_outline(values), *find_secrets("", values)]
    sections = {name: dict(values[name]) for name in SECTIONS if isinstance(values.get(name), dict)}
    for name, section in sections.items():
        findings += find_in_section(name, section)
    generate = sections.get("evaluation", {}).get("generate")
    if isinstance(generate, dict):
        findings += find_in_section("evaluation.generate", generate)
    rules = sections.get("data", {}).get("clean")
    for index, rule in enumerate(rules if isinstance(rules, list) else []):
        if isinstance(rule, str | dict) and (problem := rule_problem(rule)):
            findings.append(Finding(f"data.clean[{index}]", problem))
    flawed = {re.split(r"[.\[]", finding.key)[0] if finding.what != "no such section" else "" for finding in findings}
    for finding in findings:  # what follows may trust the types of what is left
        section, *setting = re.split(r"[.\[]", finding.key)[:2]
        for name in setting:
            sections.get(section, {}).pop(name, None)
    for key, value, reason in REFUSED_VALUES:
        section, _, name = key.partition(".")
        found = sections.get(section, {}).get(name)
        if type(found) is type(value) and found == value:
            findings.append(Finding(key, f"cannot be {json.dumps(value)}", reason))
    findings += find_training(sections.get("training", {}))
    findings += find_lora(sections.get("lora", {}))
    findings += find_between_sections(sections)
    findings += find_gaps(sections, flawed)
    told = {finding.key for finding in findings}
    for name in {"training", "lora", "quantization"} & sections.keys() - flawed:
        findings += [found for found in find_upstream(name, sections[name]) if found.key not in told]
    return list({finding.key: finding for finding in reversed(findings)}.values())


def find_outline(values: dict[str, Any]) -> Iterator[Finding]:
    """Yield sections that are unknown, missing, empty or not a mapping."""
    for name, section in values.items():
        if name not in SECTIONS:
            yield Finding(name, "no such section", suggest("", name))
        elif section is None:
            remedy = "fill it in" if name in REQUIRED else "leave it out, or write {} for upstream's defaults"
            yield Finding(name, "is empty", remedy)
        elif not isinstance(section, dict):
            yield Finding(name, f"must be a mapping, not {describe(section)}")
    for name in REQUIRED:
        if name not in values:
            yield Finding(name, "is required", f"add a section {name}")


def find_in_section(section: str, values: dict[str, Any]) -> Iterator[Finding]:
    """Yield unknown names and wrong values of one section."""
    try:
        section_models()[section].model_validate(values)
        return
    except ValidationError as error:
        grouped: dict[str, tuple[Any, list[Any]]] = {}
        for item in error.errors():
            key, value = locate(section, values, item)
            grouped.setdefault(key, (value, []))[1].append(item)
    for key, (value, errors) in grouped.items():
        if any(other.startswith((f"{key}.", f"{key}[")) for other in grouped):
            continue  # the mistake inside is the one to show, not that the whole is of another type
        if any(item["type"] == "missing" for item in errors):
            yield Finding(key, "is required")
        elif any(item["type"] == "extra_forbidden" for item in errors):
            name = key.removeprefix(f"{section}.")
            if key in REFUSED:
                yield Finding(key, "does not stand in a recipe", REFUSED[key])
            elif name == "<<":
                yield Finding(key, "merge keys are not read", "write the settings out")
            else:
                yield Finding(key, "no such setting", suggest(section, name))
        elif any(item["loc"][-1] == "[key]" for item in errors):
            yield Finding(key, "no such setting", f"there are {expected(errors[-1])}")
        else:
            yield explain(key, value, errors)


def locate(key: str, values: Any, error: Any) -> tuple[str, Any]:
    """Return the dotted key and the value of an error, whose location also names steps into a union's members."""
    for step in error["loc"]:
        if isinstance(values, dict) and step in values:
            key, values = f"{key}.{step}", values[step]
        elif isinstance(values, list) and isinstance(step, int):
            key, values = f"{key}[{step}]", values[step]
    return (f"{key}.{error['loc'][-1]}", None) if error["type"] == "missing" else (key, values)


def find_secrets(key: str, value: Any) -> Iterator[Finding]:
    """Yield values that look like API keys; a revision may be a commit."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from find_secrets(f"{key}.{name}" if key else name, inner)
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from find_secrets(f"{key}[{index}]", inner)
    elif isinstance(value, str) and is_secret(value) and not key.endswith(".revision"):
        yield Finding(key, "looks like an API key", "no secrets in recipes: `hf auth login`, `wandb login`")


def find_upstream(section: str, values: dict[str, Any]) -> Iterator[Finding]:
    """Yield what a section's own constructor complains about, in its words, at the setting that they name first."""
    from peft import LoraConfig
    from transformers import BitsAndBytesConfig
    from trl import SFTConfig

    # The machine decides these, and nothing else may depend on where a recipe is checked
    machine = {"output_dir": "unused", "use_cpu": True, "bf16": False, "report_to": "none"}
    written = {key: value for key, value in values.items() if key != "chat_template_path"}
    constructors: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
        "training": (SFTConfig, machine | written),
        "lora": (LoraConfig, {"task_type": "CAUSAL_LM"} | written),
        "quantization": (BitsAndBytesConfig, written),
    }
    constructor, arguments = constructors[section]
    try:
        constructor(**arguments)
    except (ValueError, TypeError, NotImplementedError) as error:
        words = " ".join(str(error).replace("--", "").replace("`", "").split())
        named = [(at.start(), key) for key in values if (at := re.search(rf"\b{re.escape(key)}\b", words))]
        yield Finding(f"{section}.{min(named)[1]}" if named else section, words)


def find_training(training: dict[str, Any]) -> Iterator[Finding]:
    """Yield training settings that upstream accepts together in silence, and that do not work together."""
    template = training.get("chat_template_path")
    if template is not None and not template.endswith((".jinja", ".j2")):
        remedy = "a tokenizer there would add tokens and resize the embeddings"
        yield Finding("training.chat_template_path", "must be a .jinja or .j2 file", remedy)
    if training.get("label_smoothing_factor"):
        what = "costs a second forward pass and is deprecated"
        yield Finding("training.label_smoothing_factor", what, "leave it out")
    if training.get("packing") and training.get("max_length", 1024) is None:
        yield Finding("training.packing", "needs a length to pack to", "give training.max_length a number")
    kwargs = training.get("activation_checkpointing_kwargs")
    if kwargs is not None and "use_reentrant" not in kwargs:
        what = "must say use_reentrant: upstream passes no value to torch"
        yield Finding("training.activation_checkpointing_kwargs", what, "add use_reentrant: false")
    if training.get("lr_scheduler_type") == "greedy" and training.get("eval_strategy", "no") == "no":
        yield Finding("training.lr_scheduler_type", "needs evaluations", "set training.eval_strategy")


def find_lora(lora: dict[str, Any]) -> Iterator[Finding]:
    """Yield LoRA settings that fail only once the model is loaded."""
    targets = lora.get("target_modules")
    if targets == "lm_head" or (isinstance(targets, list) and "lm_head" in targets):
        what = "cannot hold lm_head: trl's fused loss reads its weight directly"
        yield Finding("lora.target_modules", what, "train it whole: lora.modules_to_save: [lm_head]")
    if targets in ("all_linear", "all", "linear"):
        yield Finding("lora.target_modules", f"{targets} would match no module", "did you mean all-linear?")
    if lora.get("init_lora_weights") == "orthogonal" and lora.get("r", 8) % 2:
        yield Finding("lora.r", "must be even for the orthogonal initialisation")


def find_between_sections(sections: dict[str, Any]) -> Iterator[Finding]:
    """Yield settings of different sections that do not work together."""
    training, lora, data = sections.get("training", {}), sections.get("lora"), sections.get("data", {})
    start = (lora or {}).get("init_lora_weights")
    needs_weights = isinstance(start, str) and start.startswith(("pissa", "mica", "orthogonal", "loftq"))
    if sections.get("quantization", {}).get("load_in_4bit") and needs_weights:
        what = f"{start} cannot be computed from 4-bit weights"
        yield Finding("lora.init_lora_weights", what, "leave it out, or leave section quantization out")
    if lora is not None and (training.get("activation_checkpointing_kwargs") or {}).get("selective"):
        what = "selective checkpointing crashes on a LoRA model"
        yield Finding("training.activation_checkpointing_kwargs", what, "write use_reentrant: false alone")
    validation, test = data.get("validation", 0.05), data.get("test", 0.05)
    if validation == 0 and training.get("eval_strategy", "no") != "no":
        remedy = "write eval_strategy: no, or keep validation rows"
        yield Finding("training.eval_strategy", "evaluates, but data.validation is 0", remedy)
    if validation + test >= 1:
        remedy = "data.validation and data.test must be below 1 together"
        yield Finding("data.test", "leaves no row to train on", remedy)


def find_gaps(sections: dict[str, Any], flawed: set[str]) -> Iterator[Finding]:
    """Yield settings that need another one which is absent; silent on flawed sections, where it may only be misspelt."""
    training, quantization, lora = (sections.get(name) for name in ("training", "quantization", "lora"))
    if training and "training" not in flawed:
        if training.get("activation_checkpointing_kwargs") and not training.get("activation_checkpointing"):
            remedy = "add activation_checkpointing: true"
            yield Finding("training.activation_checkpointing_kwargs", "has no effect by itself", remedy)
        if training.get("padding_free") and not training.get("packing") and training.get("max_length", 1024):
            remedy = "write packing: true, or max_length: null"
            yield Finding("training.padding_free", "cannot cut to max_length", remedy)
    if quantization is not None and "quantization" not in flawed:
        four = quantization.get("load_in_4bit")
        if not four and not quantization.get("load_in_8bit"):
            yield Finding("quantization", "quantizes nothing", "write load_in_4bit: true, or leave the section out")
        if four and "bnb_4bit_quant_type" not in quantization:
            what = "needs bnb_4bit_quant_type, which upstream leaves at fp4"
            yield Finding("quantization.load_in_4bit", what, "write bnb_4bit_quant_type: nf4, or fp4")
        if lora is None and not flawed & {"", "lora"}:
            yield Finding("quantization", "quantized weights cannot be trained themselves", "add a section lora")
    generate = sections.get("evaluation", {}).get("generate", {})
    if "evaluation" not in flawed and not generate.get("do_sample"):
        for name in ("temperature", "top_p", "top_k", "min_p", "typical_p"):
            if name in generate:
                yield Finding(f"evaluation.generate.{name}", "has no effect: answers are greedy", "add do_sample: true")
