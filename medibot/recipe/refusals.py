"""What a recipe may say: the names, values and pairs of every section, checked against the constructor it goes to.

`training`, `lora` and `quantization` are read off trl, peft and transformers themselves, so a new release brings its
new settings along. What upstream leaves unchecked (choices that are any string, sizes below zero) is written here.
"""

import difflib
import json
import re
from collections.abc import Iterator
from typing import Any

from pydantic import ValidationError

from medibot.recipe.schema import PATTERNS, REFUSED, RENAMED, REQUIRED, SECTIONS, Finding, each, section_models

REFUSED_VALUES = (
    ("training.completion_only_loss", False, "the loss covers exactly the answer: leave it out"),
    ("training.assistant_only_loss", True, "the loss covers exactly the answer already: leave it out"),
    ("training.logging_nan_inf_filter", True, "it hides NaN losses: write false"),
    ("training.truncation_mode", "keep_end", "it cuts the question away, and trl removes it: write keep_start"),
    ("lora.init_lora_weights", "eva", "it needs a pass over the data first, which nobody makes"),
    ("lora.init_lora_weights", "corda", "it needs a pass over the data first, which nobody makes"),
    ("lora.init_lora_weights", "lora_ga", "it needs a pass over the data first, which nobody makes"),
)


# What axolotl, LLaMA-Factory, unsloth and habit call these.
ALIASES = {
    **each("lr learningrate", "training.learning_rate"),
    **each("sequence_len seq_length seq_len cutoff_len max_tokens model_max_length", "training.max_length"),
    **each("micro_batch_size batch_size train_batch_size", "training.per_device_train_batch_size"),
    **each("eval_batch_size", "training.per_device_eval_batch_size"),
    **each("num_epochs epochs n_epochs max_epochs", "training.num_train_epochs"),
    **each("optimizer", "training.optim"),
    **each("lr_scheduler scheduler", "training.lr_scheduler_type"),
    **each("sample_packing neat_packing", "training.packing"),
    **each("eval_every", "training.eval_steps"),
    **each("gradient_clipping grad_clip", "training.max_grad_norm"),
    **each("use_gradient_checkpointing", "training.activation_checkpointing"),
    **each("lora_r lora_rank rank", "lora.r"),
    **each("alpha", "lora.lora_alpha"),
    **each("dropout", "lora.lora_dropout"),
    **each("lora_target lora_target_modules lora_target_linear", "lora.target_modules"),
    **each("base_model model_name_or_path model_name model_id", "model.pretrained_model_name_or_path"),
    **each("flash_attention flash_attn attn_impl", "model.attn_implementation"),
    **each("model_revision", "model.revision"),
    **each("quant_type", "quantization.bnb_4bit_quant_type"),
    **each("compute_dtype", "quantization.bnb_4bit_compute_dtype"),
    **each("double_quant use_nested_quant double_quantization", "quantization.bnb_4bit_use_double_quant"),
    **each("dataset_name dataset_path dataset datasets", "data.path"),
    **each("question instruction field_instruction", "data.prompt"),
    **each("answer response field_output", "data.completion"),
    **each("system_prompt default_system", "data.system"),
    **each("val_set_size val_size validation_split test_split_size", "data.validation"),
    **each("max_samples max_train_samples num_of_sequences", "data.limit"),
    **each("wandb_project", "tracking.project"),
    **each("wandb_entity", "tracking.entity"),
    **each("wandb_name", "tracking.name"),
}


SECTION_ALIASES = {
    **each("peft adapter lora_config peft_config", "lora"),
    **each("sft trainer train training_args training_arguments sft_config", "training"),
    **each("dataset datasets", "data"),
    **each("wandb logging tracker", "tracking"),
    **each("bnb bitsandbytes bnb_config qlora quantization_config", "quantization"),
    **each("eval generation evaluate", "evaluation"),
}


def suggestion(section: str, name: str) -> str:
    """What the author may have meant: the new name, another tool's name, another section, the nearest spelling."""
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


def described(value: Any) -> str:
    """A value as an error message may show it: short, and never a secret."""
    if isinstance(value, str):
        return "this text" if is_secret(value) else f"the text {value[:60]!r}"
    if isinstance(value, list | dict):
        return "a list" if isinstance(value, list) else "a mapping"
    return json.dumps(value)


def expected(error: Any) -> str:
    """What one pydantic error wanted to see."""
    kind, context = error["type"], error.get("ctx", {})
    if kind in BOUNDS:
        word, bound = BOUNDS[kind]
        return f"{word} {context[bound]:.10g}"
    if kind == "literal_error":
        return context["expected"].replace("'", "").replace(" or ", ", ")
    if kind == "string_pattern_mismatch":
        return PATTERNS[context["pattern"]]
    return TYPE_NAMES.get(kind, "something else")


def explained(key: str, value: Any, errors: list[Any]) -> Finding:
    """One finding for all that pydantic says about one value: a union gives an error for each of its members."""
    by_type = {error["type"]: error for error in errors}
    if "value_error" in by_type:
        return Finding(key, f"{by_type['value_error']['ctx']['error']}, not {described(value)}")
    if "string_too_short" in by_type or "too_short" in by_type:
        return Finding(key, "must not be empty")
    choices = re.findall(r"'([^']*)'", by_type.get("literal_error", {}).get("ctx", {}).get("expected", ""))
    close = nearest(value, choices) if isinstance(value, str) else []
    if close and len(choices) > 9:
        return Finding(
            key, f"must be one of {len(choices)} choices, not {described(value)}", f"did you mean {close[0]}?"
        )
    # a bound is broken by a value of the right type, so the other types of the union are beside the point
    bounds = [error for error in errors if error["type"] in BOUNDS]
    wanted = " or ".join(dict.fromkeys(expected(error) for error in bounds or errors))
    remedy = f"did you mean {close[0]}?" if close else spelling_remedy(value, by_type)
    return Finding(key, f"must be {wanted}, not {described(value)}", remedy)


def nearest(value: str, choices: list[str]) -> list[str]:
    """The choice that a wrong one was probably meant to be: the first that it begins, or the nearest spelling."""
    begun = [choice for choice in choices if value and choice.startswith(value)]
    return begun[:1] or difflib.get_close_matches(value, choices, n=1)


def spelling_remedy(value: Any, by_type: dict[str, Any]) -> str:
    """How to write the number or truth value that this text was meant to be."""
    if not isinstance(value, str) or "literal_error" in by_type:
        return ""
    if re.fullmatch(r"[-+]?\.?\d[\d.]*(e[-+]?\d+)?|true|false|null", value.strip(), re.IGNORECASE):
        return "leave the quotes out"
    return "write true or false" if value.lower() in ("yes", "no", "on", "off") and "bool_type" in by_type else ""


def located(key: str, values: Any, error: Any) -> tuple[str, Any]:
    """The dotted key and the value an error is about; steps into a union's members are left out of its location."""
    for step in error["loc"]:
        if isinstance(values, dict) and step in values:
            key, values = f"{key}.{step}", values[step]
        elif isinstance(values, list) and isinstance(step, int):
            key, values = f"{key}[{step}]", values[step]
    return (f"{key}.{error['loc'][-1]}", None) if error["type"] == "missing" else (key, values)


def section_findings(section: str, values: dict[str, Any]) -> Iterator[Finding]:
    """Unknown names and wrong values of one section."""
    try:
        section_models()[section].model_validate(values)
    except ValidationError as error:
        grouped: dict[str, tuple[Any, list[Any]]] = {}
        for item in error.errors():
            key, value = located(section, values, item)
            grouped.setdefault(key, (value, []))[1].append(item)
    else:
        return
    for key, (value, errors) in grouped.items():
        if any(other.startswith((f"{key}.", f"{key}[")) for other in grouped):
            continue  # the mistake inside is the one to show, not that the whole is of another type
        if any(item["type"] == "missing" for item in errors):
            yield Finding(key, "is required")
        elif any(item["type"] == "extra_forbidden" for item in errors):
            yield unknown(section, key)
        elif any(item["loc"][-1] == "[key]" for item in errors):
            yield Finding(key, "no such setting", f"there are {expected(errors[-1])}")
        else:
            yield explained(key, value, errors)


def unknown(section: str, key: str) -> Finding:
    """A name that the section does not have: never wanted, or not known."""
    if key in REFUSED:
        return Finding(key, "does not stand in a recipe", REFUSED[key])
    name = key.removeprefix(f"{section}.")
    if name == "<<":
        return Finding(key, "merge keys are not read", "write the settings out")
    return Finding(key, "no such setting", suggestion(section, name))


def is_secret(text: str) -> bool:
    """Whether a value looks like an API key: a known prefix, 40 hexadecimal digits, or something longer and random."""
    if re.fullmatch(r"[0-9a-f]{40,}|(hf_|sk-|wandb_v\d_)[\w-]{16,}", text):
        return True
    kinds = (re.search(kind, text) for kind in ("[a-z]", "[A-Z]", r"\d.*\d.*\d"))
    return re.fullmatch(r"[A-Za-z0-9]{41,}", text) is not None and all(kinds)


def secrets(key: str, value: Any) -> Iterator[Finding]:
    """Values that look like API keys; a revision may be a commit."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from secrets(f"{key}.{name}" if key else name, inner)
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from secrets(f"{key}[{index}]", inner)
    elif isinstance(value, str) and is_secret(value) and not key.endswith(".revision"):
        yield Finding(key, "looks like an API key", "no secrets in recipes: `hf auth login`, `wandb login`")


def refused_values(sections: dict[str, Any]) -> Iterator[Finding]:
    """Values that upstream takes and that would spoil the run."""
    for key, value, reason in REFUSED_VALUES:
        section, _, name = key.partition(".")
        found = sections.get(section, {}).get(name)
        if type(found) is type(value) and found == value:
            yield Finding(key, f"cannot be {json.dumps(value)}", reason)


def cleaning_findings(data: dict[str, Any]) -> Iterator[Finding]:
    """Cleaning rules that medibot.cleaning does not know, or not so."""
    if not isinstance(data.get("clean"), list):
        return
    from medibot.cleaning import rule_problem

    for index, rule in enumerate(data["clean"]):
        if isinstance(rule, str | dict) and (problem := rule_problem(rule)):
            yield Finding(f"data.clean[{index}]", problem)


def training_clashes(training: dict[str, Any]) -> Iterator[Finding]:
    """Training settings that do not work together."""
    evaluates = training.get("eval_strategy", "no") != "no"
    template = training.get("chat_template_path")
    if template is not None and not template.endswith((".jinja", ".j2")):
        remedy = "a tokenizer there would add tokens and resize the embeddings"
        yield Finding("training.chat_template_path", "must be a .jinja or .j2 file", remedy)
    if training.get("label_smoothing_factor"):
        yield Finding(
            "training.label_smoothing_factor", "costs a second forward pass and is deprecated", "leave it out"
        )
    if training.get("packing") and training.get("max_length", 1024) is None:
        yield Finding("training.packing", "needs a length to pack to", "give training.max_length a number")
    kwargs = training.get("activation_checkpointing_kwargs")
    if kwargs is not None and "use_reentrant" not in kwargs:
        what = "must say use_reentrant: upstream passes no value to torch"
        yield Finding("training.activation_checkpointing_kwargs", what, "add use_reentrant: false")
    if training.get("load_best_model_at_end") and not evaluates:
        yield Finding("training.load_best_model_at_end", "needs evaluations to choose by", "set training.eval_strategy")
    elif training.get("load_best_model_at_end"):
        yield from best_checkpoint_clashes(training)
    if training.get("lr_scheduler_type") in ("reduce_lr_on_plateau", "greedy") and not evaluates:
        yield Finding("training.lr_scheduler_type", "needs evaluations", "set training.eval_strategy")
    if training.get("dataloader_prefetch_factor") and not training.get("dataloader_num_workers"):
        yield Finding("training.dataloader_prefetch_factor", "needs workers", "set training.dataloader_num_workers")


def best_checkpoint_clashes(training: dict[str, Any]) -> Iterator[Finding]:
    """The best checkpoint can only be loaded if every evaluation that may be the best one is saved."""
    key = "training.load_best_model_at_end"
    saves, evaluates = training.get("save_strategy", "steps"), training["eval_strategy"]
    if saves == "best":
        return
    if saves != evaluates:
        what = f"saves by {saves} but evaluates by {evaluates}"
        yield Finding(key, what, "make training.save_strategy and training.eval_strategy equal")
    elif saves == "steps":
        save, every = training.get("save_steps", 500), training.get("eval_steps") or training.get("logging_steps", 10)
        scale = 1_000_000 if save < 1 and every < 1 else 1  # shares of the run: 0.3 % 0.1 is not 0 in floating point
        if (save < 1) != (every < 1) or round(save * scale) % max(1, round(every * scale)):
            what = f"saves every {save} steps but evaluates every {every}"
            yield Finding(key, what, "make training.save_steps a multiple of training.eval_steps")


def lora_clashes(lora: dict[str, Any]) -> Iterator[Finding]:
    """LoRA settings that peft or trl refuse once the model is loaded."""
    targets, start = lora.get("target_modules"), lora.get("init_lora_weights")
    if targets == "lm_head" or (isinstance(targets, list) and "lm_head" in targets):
        what = "cannot hold lm_head: trl's fused loss reads its weight directly"
        yield Finding("lora.target_modules", what, "train it whole: lora.modules_to_save: [lm_head]")
    if targets in ("all_linear", "all", "linear"):
        yield Finding("lora.target_modules", f"{targets} would match no module", "did you mean all-linear?")
    for name in ("layers_to_transform", "layers_pattern"):
        if isinstance(targets, str) and lora.get(name) is not None:
            yield Finding(f"lora.{name}", "needs lora.target_modules to be a list", "name the modules")
    if lora.get("lora_bias") and (lora.get("use_dora") or isinstance(start, str)):
        yield Finding("lora.lora_bias", "works neither with DoRA nor with an initialisation by name", "leave it out")
    if start == "orthogonal" and lora.get("r", 8) % 2:
        yield Finding("lora.r", "must be even for the orthogonal initialisation")


def section_clashes(sections: dict[str, Any]) -> Iterator[Finding]:
    """Settings of different sections that do not work together."""
    training, lora, data = sections.get("training", {}), sections.get("lora"), sections.get("data", {})
    quantization, start = sections.get("quantization", {}), (lora or {}).get("init_lora_weights")
    if quantization.get("load_in_4bit") and quantization.get("load_in_8bit"):
        yield Finding("quantization.load_in_8bit", "cannot be true beside load_in_4bit", "choose one")
    needs_weights = isinstance(start, str) and start.startswith(("pissa", "mica", "orthogonal", "loftq"))
    if quantization.get("load_in_4bit") and needs_weights:
        what = f"{start} cannot be computed from 4-bit weights"
        yield Finding("lora.init_lora_weights", what, "leave it out, or leave section quantization out")
    kwargs = training.get("activation_checkpointing_kwargs") or {}
    if lora is not None and kwargs.get("selective"):
        what = "selective checkpointing crashes on a LoRA model"
        yield Finding("training.activation_checkpointing_kwargs", what, "write use_reentrant: false alone")
    validation, test = data.get("validation", 0.05), data.get("test", 0.05)
    if validation == 0 and training.get("eval_strategy", "no") != "no":
        remedy = "write eval_strategy: no, or keep validation rows"
        yield Finding("training.eval_strategy", "evaluates, but data.validation is 0", remedy)
    if validation + test >= 1:
        yield Finding(
            "data.test", "leaves no row to train on", "data.validation and data.test must be below 1 together"
        )


def gaps(sections: dict[str, Any], flawed: set[str]) -> Iterator[Finding]:
    """Settings that need another one which is absent; silent on flawed sections, where it may only be misspelt."""
    if "training" not in flawed:
        yield from training_gaps(sections.get("training", {}))
    quantization, lora = sections.get("quantization"), sections.get("lora")
    if quantization is not None and "quantization" not in flawed:
        four = quantization.get("load_in_4bit")
        if not four and not quantization.get("load_in_8bit"):
            yield Finding("quantization", "quantizes nothing", "write load_in_4bit: true, or leave the section out")
        if four and "bnb_4bit_quant_type" not in quantization:
            what = "needs bnb_4bit_quant_type, which upstream leaves at fp4"
            yield Finding("quantization.load_in_4bit", what, "write bnb_4bit_quant_type: nf4, or fp4")
        if lora is None and not flawed & {"", "lora"}:
            yield Finding("quantization", "quantized weights cannot be trained themselves", "add a section lora")
    if (
        lora is not None
        and lora.get("init_lora_weights") == "loftq"
        and "lora" not in flawed
        and not lora.get("loftq_config")
    ):
        yield Finding("lora.init_lora_weights", "loftq needs loftq_config", "write loftq_config: {loftq_bits: 4}")
    generate = sections.get("evaluation", {}).get("generate", {})
    if "evaluation" not in flawed and not generate.get("do_sample"):
        for name in ("temperature", "top_p", "top_k", "min_p", "typical_p"):
            if name in generate:
                yield Finding(f"evaluation.generate.{name}", "has no effect: answers are greedy", "add do_sample: true")


def training_gaps(training: dict[str, Any]) -> Iterator[Finding]:
    """Training settings that need another training setting."""
    if training.get("activation_checkpointing_kwargs") and not training.get("activation_checkpointing"):
        remedy = "add activation_checkpointing: true"
        yield Finding("training.activation_checkpointing_kwargs", "has no effect by itself", remedy)
    if training.get("padding_free") and not training.get("packing") and training.get("max_length", 1024):
        yield Finding("training.padding_free", "cannot cut to max_length", "write packing: true, or max_length: null")


def outline_findings(values: dict[str, Any]) -> Iterator[Finding]:
    """Sections that are unknown, missing, empty or no mapping."""
    for name, section in values.items():
        if name not in SECTIONS:
            yield Finding(name, "no such section", suggestion("", name))
        elif section is None:
            remedy = "fill it in" if name in REQUIRED else "leave it out, or write {} for upstream's defaults"
            yield Finding(name, "is empty", remedy)
        elif not isinstance(section, dict):
            yield Finding(name, f"must be a mapping, not {described(section)}")
    for name in REQUIRED:
        if name not in values:
            yield Finding(name, "is required", f"add a section {name}")


def section_of(key: str) -> list[str]:
    """The section and the setting that a dotted key lies in."""
    return re.split(r"[.\[]", key)[:2]


def check(values: dict[str, Any]) -> list[Finding]:
    """All mistakes of a recipe's values at once."""
    findings = list(outline_findings(values)) + list(secrets("", values))
    sections = {name: dict(values[name]) for name in SECTIONS if isinstance(values.get(name), dict)}
    for name, section in sections.items():
        findings += section_findings(name, section)
    if isinstance(sections.get("evaluation", {}).get("generate"), dict):
        findings += section_findings("evaluation.generate", sections["evaluation"]["generate"])
    findings += cleaning_findings(sections.get("data", {}))
    flawed = {section_of(finding.key)[0] if finding.what != "no such section" else "" for finding in findings}
    for finding in findings:  # the rules below may trust the types of what is left
        section, *setting = section_of(finding.key)
        for name in setting:
            sections.get(section, {}).pop(name, None)
    findings += refused_values(sections)
    findings += training_clashes(sections.get("training", {}))
    findings += lora_clashes(sections.get("lora", {}))
    findings += section_clashes(sections)
    findings += gaps(sections, flawed)
    return list({finding.key: finding for finding in reversed(findings)}.values())
