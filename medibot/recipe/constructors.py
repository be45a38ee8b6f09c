"""Describe upstream's constructors and ask them about settings; both are remembered, for their libraries import for seconds."""

import hashlib
import importlib.metadata
import inspect
import json
import sys
import tempfile
import types
from contextlib import suppress
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import platformdirs

# Their versions decide what the constructors take and say
PACKAGES = ("trl", "peft", "transformers", "accelerate", "bitsandbytes", "torch")
# So many answers are remembered
ANSWERS = 1000
# Types and their forms as they are written down
NAMES = {
    "bool": bool,
    "int": int,
    "float": float,
    "str": str,
    "list": list,
    "dict": dict,
    "None": type(None),
    "Any": Any,
}
FORMS: dict[str, Any] = {"list": list, "dict": dict, "tuple": tuple, "Union": Union, "Literal": Literal}


def constructors() -> dict[str, Any]:
    """Return the constructor of each section that goes to one."""
    if "trl" not in sys.modules:
        print("reading what trl, peft and transformers take, once for their versions", file=sys.stderr, flush=True)
    from peft import LoraConfig
    from transformers import BitsAndBytesConfig, GenerationConfig
    from trl import SFTConfig

    sections = {"training": SFTConfig, "lora": LoraConfig, "quantization": BitsAndBytesConfig}
    return sections | {"evaluation.generate": GenerationConfig}


def describe_constructors() -> dict[str, dict[str, tuple[Any, Any]]]:
    """Return the parameters of each section's constructor: name -> (type as a recipe may fill it, default or None)."""
    if not (remembered := recall()).get("parameters"):
        found = constructors()
        # It takes any keyword; what it stands for are its settings
        generation = dict.fromkeys(found.pop("evaluation.generate")().to_dict(), ("Any", None))
        remembered["parameters"] = {name: read_parameters(one) for name, one in found.items()}
        remembered["parameters"]["evaluation.generate"] = generation
        remember(remembered)
    return {
        section: {name: (decode(hint), default) for name, (hint, default) in parameters.items()}
        for section, parameters in remembered["parameters"].items()
    }


def read_parameters(constructor: Any) -> dict[str, tuple[Any, Any]]:
    """Return a constructor's parameters: name -> (type as `encode` writes it, default or None)."""
    hints, parameters = get_type_hints(constructor), {}
    for name, parameter in inspect.signature(constructor).parameters.items():
        if parameter.kind is not parameter.VAR_KEYWORD:
            default = parameter.default.value if isinstance(parameter.default, Enum) else parameter.default
            default = default if isinstance(default, bool | int | float | str) else None
            parameters[name] = (encode(hints.get(name, Any)), default)
    return parameters


def encode(hint: Any) -> Any:
    """Return a type hint as JSON, the way a recipe may fill it: enums by their values, no JSON strings, no config objects."""
    form, parts = get_origin(hint), [encode(part) for part in get_args(hint) if get_origin(hint) is not Literal]
    if form in (Union, types.UnionType):
        # `SchedulerType | str` and `dict | str` would let every typing error through
        typed = any(part[0] in ("Literal", "dict") or part == "dict" for part in parts)
        return ["Union", *(part for part in parts if not (typed and part == "str"))]
    if form is Literal:
        return ["Literal", *get_args(hint)]
    if form in (list, dict, tuple):
        return [form.__name__, *parts]
    if isinstance(hint, type) and issubclass(hint, Enum):
        return ["Literal", *(member.value for member in hint)]
    if isinstance(hint, type) and hint.__module__.split(".")[0] in ("peft", "trl", "transformers", "accelerate"):
        return ["dict", "str", "Any"]
    return next((name for name, known in NAMES.items() if hint is known), "Any")


def decode(written: Any) -> Any:
    """Return the type hint that `encode` wrote."""
    if isinstance(written, str):
        return NAMES[written]
    form, *parts = written
    return FORMS[form][tuple(parts) if form == "Literal" else tuple(map(decode, parts))]


def ask_constructor(section: str, values: dict[str, Any]) -> str:
    """Return what a section's constructor complains about, in its words; nothing if it takes the settings."""
    asked = hashlib.sha256(json.dumps([section, values], sort_keys=True, default=str).encode()).hexdigest()
    remembered = recall()
    answers = remembered.setdefault("answers", {})
    if asked not in answers:
        # The machine decides these, and nothing else may depend on where a recipe is checked
        machine = {"output_dir": "unused", "use_cpu": True, "bf16": False, "report_to": "none"}
        given = {key: value for key, value in values.items() if key != "chat_template_path"}
        words = ""
        try:
            constructors()[section](**given | (machine if section == "training" else {}))
        except (ValueError, TypeError, NotImplementedError) as error:
            words = " ".join(str(error).replace("--", "").replace("`", "").split())
        remembered["answers"] = dict([*answers.items(), (asked, words)][-ANSWERS:])
        remember(remembered)
        return words
    return answers[asked]


@cache
def memory() -> Path:
    """Return the file that holds what the constructors of these versions take and said."""
    # Our own source, too: an edit of what is written here asks anew
    known = [Path(__file__).read_text(encoding="utf-8"), sys.version, *map(importlib.metadata.version, PACKAGES)]
    name = hashlib.sha256(json.dumps(known).encode()).hexdigest()[:16]
    return Path(platformdirs.user_cache_dir("medibot")) / f"constructors-{name}.json"


def recall() -> dict[str, Any]:
    """Return what is remembered; nothing where there is no file, or a damaged one."""
    try:
        digest, _, body = memory().read_bytes().partition(b"\n")
    except OSError:
        return {}
    return json.loads(body) if hashlib.sha256(body).hexdigest().encode() == digest else {}


def remember(found: dict[str, Any]) -> None:
    """Write the file, at once by rename; where that cannot be, the next one asks again."""
    body = json.dumps(found).encode()
    with suppress(OSError):
        memory().parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=memory().parent, delete=False) as file:
            file.write(hashlib.sha256(body).hexdigest().encode() + b"\n" + body)
        Path(file.name).replace(memory())
