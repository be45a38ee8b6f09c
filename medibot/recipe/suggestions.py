"""Say what an author may have meant, and what a wrong value should have been."""

import difflib
import json
import re
from typing import Any

from medibot.recipe.renames import ALIASES, REFUSED, RENAMED, SECTION_ALIASES
from medibot.recipe.schema import REQUIRED, SECTIONS, Finding, section_models
from medibot.recipe.sections import PATTERNS, MixedSection, SourceSection, SystemColumn

# What pydantic wanted to see, by the type of its error
WANTED = {
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "list_type": "a list",
    **dict.fromkeys(("dict_type", "model_type", "model_attributes_type"), "a mapping"),
    "greater_than": "above {gt:.10g}",
    "greater_than_equal": "at least {ge:.10g}",
    "less_than": "below {lt:.10g}",
    "less_than_equal": "at most {le:.10g}",
}


def explain(key: str, value: Any, errors: list[Any]) -> Finding:
    """Return one finding for all that pydantic says about one value: a union gives an error for each member."""
    by_type = {error["type"]: error for error in errors}
    if "missing" in by_type:
        return Finding(key, "is required", f"add a section {key}" if key in SECTIONS else "")
    if "extra_forbidden" in by_type:
        return unknown_name(key, errors[-1]["loc"][-1])
    if errors[-1]["loc"][-1] == "[key]":
        return Finding(key, "no such setting", f"there are {expected(errors[-1])}")
    if value is None and key in SECTIONS:
        remedy = "fill it in" if key in REQUIRED else "leave it out, or write {} for upstream's defaults"
        return Finding(key, "is empty", remedy)
    if "value_error" in by_type:
        return Finding(key, str(by_type["value_error"]["ctx"]["error"]))
    if "string_too_short" in by_type or "too_short" in by_type:
        return Finding(key, "must not be empty")
    choices = re.findall(r"'([^']*)'", by_type.get("literal_error", {}).get("ctx", {}).get("expected", ""))
    # A choice that the text begins was probably meant, else the nearest spelling
    begun = [choice for choice in choices if value and choice.startswith(str(value))]
    close = begun[:1] or difflib.get_close_matches(str(value), choices, n=1)
    # A bound is broken by a value of the right type, so the other types of the union are beside the point
    bounds = [error for error in errors if error["type"].startswith(("greater", "less"))]
    wanted = " or ".join(dict.fromkeys(expected(error) for error in bounds or errors))
    remedy = ""
    if close:
        wanted = wanted if len(choices) < 10 else f"one of {len(choices)} choices"
        remedy = f"did you mean {close[0]}?"
    elif isinstance(value, str) and re.fullmatch(r"[-+]?\.?\d[\d.]*(e[-+]?\d+)?|true|false|null", value, re.IGNORECASE):
        remedy = "leave the quotes out"
    elif value in ("yes", "no", "on", "off") and "bool_type" in by_type:
        remedy = "write true or false"
    return Finding(key, f"must be {wanted}, not {describe(value)}", remedy)


def expected(error: Any) -> str:
    """Return what one pydantic error wanted to see."""
    context = error.get("ctx", {})
    if error["type"] == "literal_error":
        return context["expected"].replace("'", "").replace(" or ", ", ")
    if error["type"] == "string_pattern_mismatch":
        return PATTERNS[context["pattern"]]
    return WANTED.get(error["type"], "something else").format(**context)


def describe(value: Any) -> str:
    """Return a value as an error message may show it: short, and never a secret."""
    if isinstance(value, str):
        return "this text" if is_secret(value) else f"the text {value[:60]!r}"
    return {list: "a list", dict: "a mapping"}.get(type(value)) or json.dumps(value)


def unknown_name(key: str, written: str) -> Finding:
    """Return the finding for a name that the section does not have, and what the author may have meant."""
    section, name = key.removesuffix(written).rstrip("."), written.lower().replace("-", "_")
    if f"{section}.{name}" in REFUSED:
        return Finding(key, "does not stand in a recipe", REFUSED[f"{section}.{name}"])
    if name == "<<":
        return Finding(key, "merge keys are not read", "write the settings out")
    models = section_models()
    # Sections of one shape inside of section data: {column: …}, and where rows come from
    inner = {"system": SystemColumn, "sources": MixedSection, "validation": SourceSection, "test": SourceSection}
    last = re.sub(r"\[\d+\]", "", section.rpartition(".")[2])
    names = list((models[section] if section in models else inner[last]).model_fields)
    known = ALIASES | ({} if section else SECTION_ALIASES) | {ours: ours for ours in names}
    homes = [home for home, model in models.items() if home and name in model.model_fields]
    remedy = ""
    if name in RENAMED:
        remedy = f"renamed: {RENAMED[name].removeprefix(section + '.')}"
    elif name in known:
        remedy = f"did you mean {known[name].removeprefix(section + '.')}?"
    elif homes:
        remedy = f"it stands in section {homes[0]}"
    elif close := difflib.get_close_matches(name, names, n=1, cutoff=0.7):
        remedy = f"did you mean {close[0]}?"
    return Finding(key, f"no such {'setting' if section else 'section'}", remedy)


def is_secret(text: str) -> bool:
    """Tell whether a value looks like an API key: a known prefix, 40 hexadecimal digits, or something longer and random."""
    known = r"[0-9a-f]{40,}|(hf_|sk-|wandb_v\d_)[\w-]{16,}"
    random = r"(?=.*[a-z])(?=.*[A-Z])(?=.*\d.*\d.*\d)[A-Za-z0-9]{41,}"
    return re.fullmatch(f"{known}|{random}", text) is not None
