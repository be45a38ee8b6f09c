"""Say what an author may have meant, and what a wrong value should have been."""

import difflib
import json
import re
from typing import Any

from medibot.recipe.renames import ALIASES, REFUSED, RENAMED, SECTION_ALIASES
from medibot.recipe.schema import PATTERNS, SECTIONS, Finding, section_models

TYPE_NAMES = {
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "list_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
}


BOUNDS = {
    "greater_than": ("above", "gt"),
    "greater_than_equal": ("at least", "ge"),
    "less_than": ("below", "lt"),
    "less_than_equal": ("at most", "le"),
}


def suggest(section: str, name: str) -> str:
    """Return what the author may have meant: new name, another tool's name, another section, nearest spelling."""
    models = section_models()
    plain = name.lower().replace("-", "_")
    names = list(models[section].model_fields) if section else list(SECTIONS)
    if plain in names:
        return f"did you mean {plain}?"
    if not section and plain in SECTION_ALIASES:
        return f"did you mean {SECTION_ALIASES[plain]}?"
    if plain in RENAMED:
        return f"renamed: {RENAMED[plain].removeprefix(section + '.')}"
    if f"{section}.{plain}" in REFUSED:
        return REFUSED[f"{section}.{plain}"]
    if plain in ALIASES:
        return f"did you mean {ALIASES[plain].removeprefix(section + '.')}?"
    if homes := [home for home, model in models.items() if plain in model.model_fields]:
        return f"it stands in section {homes[0]}"
    close = difflib.get_close_matches(plain, names, n=1, cutoff=0.7)
    return f"did you mean {close[0]}?" if close else ""


def describe(value: Any) -> str:
    """Return a value as an error message may show it: short, and never a secret."""
    if isinstance(value, str):
        return "this text" if is_secret(value) else f"the text {value[:60]!r}"
    if isinstance(value, list | dict):
        return "a list" if isinstance(value, list) else "a mapping"
    return json.dumps(value)


def expected(error: Any) -> str:
    """Return what one pydantic error wanted to see."""
    kind, context = error["type"], error.get("ctx", {})
    if kind in BOUNDS:
        word, bound = BOUNDS[kind]
        return f"{word} {context[bound]:.10g}"
    if kind == "literal_error":
        return context["expected"].replace("'", "").replace(" or ", ", ")
    if kind == "string_pattern_mismatch":
        return PATTERNS[context["pattern"]]
    return TYPE_NAMES.get(kind, "something else")


def explain(key: str, value: Any, errors: list[Any]) -> Finding:
    """Return one finding for all that pydantic says about one value: a union gives an error for each member."""
    by_type = {error["type"]: error for error in errors}
    if "value_error" in by_type:
        return Finding(key, f"{by_type['value_error']['ctx']['error']}, not {describe(value)}")
    if "string_too_short" in by_type or "too_short" in by_type:
        return Finding(key, "must not be empty")
    choices = re.findall(r"'([^']*)'", by_type.get("literal_error", {}).get("ctx", {}).get("expected", ""))
    close = []
    if isinstance(value, str):
        # A choice that the text begins was probably meant, else the nearest spelling
        begun = [choice for choice in choices if value and choice.startswith(value)]
        close = begun[:1] or difflib.get_close_matches(value, choices, n=1)
    if close and len(choices) > 9:
        what = f"must be one of {len(choices)} choices, not {describe(value)}"
        return Finding(key, what, f"did you mean {close[0]}?")
    # A bound is broken by a value of the right type, so the other types of the union are beside the point
    bounds = [error for error in errors if error["type"] in BOUNDS]
    wanted = " or ".join(dict.fromkeys(expected(error) for error in bounds or errors))
    remedy = f"did you mean {close[0]}?" if close else spelling_remedy(value, by_type)
    return Finding(key, f"must be {wanted}, not {describe(value)}", remedy)


def spelling_remedy(value: Any, by_type: dict[str, Any]) -> str:
    """Return how to write the number or truth value that this text was meant to be."""
    if not isinstance(value, str) or "literal_error" in by_type:
        return ""
    if re.fullmatch(r"[-+]?\.?\d[\d.]*(e[-+]?\d+)?|true|false|null", value.strip(), re.IGNORECASE):
        return "leave the quotes out"
    return "write true or false" if value.lower() in ("yes", "no", "on", "off") and "bool_type" in by_type else ""


def is_secret(text: str) -> bool:
    """Tell whether a value looks like an API key: a known prefix, 40 hexadecimal digits, or something longer and random."""
    if re.fullmatch(r"[0-9a-f]{40,}|(hf_|sk-|wandb_v\d_)[\w-]{16,}", text):
        return True
    kinds = (re.search(kind, text) for kind in ("[a-z]", "[A-Z]", r"\d.*\d.*\d"))
    return re.fullmatch(r"[A-Za-z0-9]{41,}", text) is not None and all(kinds)
