"""Find what is wrong with a recipe's values, all of it at once, and say what to write instead."""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import ValidationError

from medibot.recipe.constructors import ask_constructor
from medibot.recipe.document import outwards
from medibot.recipe.renames import NEEDS, REFUSED_VALUES
from medibot.recipe.schema import NULL_IS_A_VALUE, SECTIONS, Finding, section_models
from medibot.recipe.suggestions import explain

# The columns that make a conversation
SHAPE = ("prompt", "completion", "messages", "thinking")


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
    if isinstance(values.get("data"), dict):
        findings += find_shapes(values["data"], flawed)
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
            last = len(item["loc"]) - 1
            for place, step in enumerate(item["loc"]):
                if isinstance(value, list) and isinstance(step, int):
                    key, value = f"{key}[{step}]", value[step]
                elif isinstance(value, dict) and (step in value or (item["type"] == "missing" and place == last)):
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
    validation, test = s.get("data.validation", 0.05), s.get("data.test", 0.05)
    if validation == 0 and s.get("training.eval_strategy", "no") != "no":
        yield Finding("training.eval_strategy", "evaluates, but data.validation is 0", "change one of them")
    if isinstance(validation, float) and isinstance(test, float) and validation + test >= 1:
        yield Finding("data.test", "leaves no row to train on", "it must be below 1 together with data.validation")


def find_shapes(data: dict[str, Any], flawed: set[str]) -> Iterator[Finding]:
    """Yield what is missing, or said twice, of where rows come from and which columns make a conversation."""
    sources = data.get("sources") or []
    mixed = [("data", name) for name in (*SHAPE, "path", "name", "revision", "split") if sources and data.get(name)]
    for key, name in mixed:
        yield Finding(f"{key}.{name}", "cannot stand beside data.sources", "write it in each of them")
    weighed = [bool(isinstance(source, dict) and source.get("weight")) for source in sources]
    if any(weighed) and not all(weighed):
        what = "is required where another source has one"
        yield Finding(f"data.sources[{weighed.index(False)}].weight", what, "weigh each source, or none")
    sections = [(f"data.sources[{place}]", source) for place, source in enumerate(sources)] or [("data", data)]
    whole = [*sections]
    for name in ("validation", "test"):
        if isinstance(held := data.get(name), dict) and f"data.{name}" not in flawed:
            if not held.get("path") and not held.get("split"):
                yield Finding(f"data.{name}", "says neither path nor split", "write {path: …} or {split: …}")
            if sources or held.keys() & {"prompt", "completion", "messages"}:
                whole.append((f"data.{name}", held))
    for key, section in whole:
        if flawed & {f"{key}.{name}" for name in SHAPE} or not isinstance(section, dict):
            continue
        if not section.get("path") and key == "data":
            yield Finding(f"{key}.path", "is required", "name a hub data set, a file or a folder")
        chat, pair = section.get("messages"), [name for name in ("prompt", "completion") if section.get(name)]
        if chat and (pair or section.get("thinking")):
            what = f"cannot stand beside {(pair or ['thinking'])[0]}"
            yield Finding(
                f"{key}.messages", what, "name the column of whole conversations, or those of question and answer"
            )
        elif not chat and len(pair) < 2:
            missing = "completion" if pair == ["prompt"] else "prompt"
            yield Finding(f"{key}.{missing}", "is required", "or messages, the column of whole conversations")
        elif pair and section["prompt"] == section["completion"]:
            yield Finding(f"{key}.completion", f"the same column as {key}.prompt", "name the answers' column")


def find_upstream(section: str, values: dict[str, Any]) -> Iterator[Finding]:
    """Yield what a section's own constructor complains about, in its words, at the setting that they name first."""
    if words := ask_constructor(section, values):
        named = [(at.start(), key) for key in values if (at := re.search(rf"\b{re.escape(key)}\b", words))]
        yield Finding(f"{section}.{min(named)[1]}" if named else section, words)
