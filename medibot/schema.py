"""What a recipe may say: the names, values and pairs of every section, checked against the constructor it goes to.

`training`, `lora` and `quantization` are read off trl, peft and transformers themselves, so a new release brings its
new settings along. What upstream leaves unchecked (choices that are any string, sizes below zero) is written here.
"""

import difflib
import inspect
import json
import re
import types
from collections.abc import Iterator
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, create_model

SECTIONS = ("model", "quantization", "lora", "data", "training", "evaluation", "tracking")
REQUIRED = ("model", "data", "training")
# Upstream's default is not null here, so null says something; everywhere else an override to null removes the key.
NULL_IS_A_VALUE = {"training.max_length", "training.pad_to_multiple_of"}


class Finding(NamedTuple):
    """One mistake, by the dotted key it stands at."""

    key: str
    what: str
    remedy: str = ""


Text = Annotated[str, Field(min_length=1)]
Count = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]
Share = Annotated[float, Field(ge=0, le=0.5)]


def whole_or_ratio(value: float) -> float:
    """Steps are a whole number, or a share of the run below 1."""
    if value > 1 and value != int(value):
        raise ValueError("must be a whole number, or below 1 for a share of the run")
    return int(value) if value >= 1 else value


Steps = Annotated[float, Field(gt=0), AfterValidator(whole_or_ratio)]
Warmup = Annotated[float, Field(ge=0), AfterValidator(whole_or_ratio)]

HUB_KERNEL = r"^[\w.-]+/[\w.-]+(@[\w.-]+)?(:[\w.-]+)?$"
PISSA_STEPS = r"^pissa_niter_\d+$"
LICENCE = r"^[a-z0-9][a-z0-9.+-]*$"
LANGUAGE = r"^[a-z]{2,3}$"
PATTERNS = {
    HUB_KERNEL: "a hub kernel (org/repo[@revision][:function])",
    PISSA_STEPS: "pissa_niter_<steps>",
    LANGUAGE: "a language as ISO 639 writes it, such as en",
    LICENCE: "a licence as the hub writes it, such as cc-by-4.0",
}


class Section(BaseModel):
    """Nothing is converted and nothing unknown passes: what the recipe says is what the constructor gets."""

    model_config = ConfigDict(
        strict=True, extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class ModelSection(Section):
    """Keyword arguments of AutoModelForCausalLM.from_pretrained."""

    pretrained_model_name_or_path: Text
    """Hub id or local folder of the base model."""
    revision: Text | None = None
    """Commit, tag or branch on the hub; a commit makes the run repeatable."""
    subfolder: Text | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] | None = None
    """Absent: the machine decides, and the resolved recipe says what it chose."""
    attn_implementation: (
        Literal["eager", "sdpa", "flash_attention_2", "flash_attention_3", "flash_attention_4", "flex_attention"]
        | Annotated[str, Field(pattern=HUB_KERNEL)]
        | None
    ) = None
    trust_remote_code: bool = False
    use_kernels: bool = False
    local_files_only: bool = False
    cache_dir: Text | None = None
    variant: Text | None = None


class DataSection(Section):
    """Where the rows come from and how they become conversations."""

    path: Text
    """Hub id, or a local file or folder."""
    name: Text | None = None
    """Configuration of the hub data set."""
    revision: Text | None = None
    """Commit, tag or branch of the hub data set."""
    split: Text = "train"
    """The upstream split to read; MediBot makes its own train, validation and test out of it."""
    prompt: Text
    """Column that holds the question."""
    completion: Text
    """Column that holds the answer: the loss covers it and nothing else."""
    system: Text | None = None
    """System message put before every question; null for none."""
    chat_template_kwargs: dict[str, Any] = {}
    """Arguments for the model's chat template, such as enable_thinking: false for a reasoning model."""
    clean: list[str | dict[str, Any]] = []
    """Cleaning rules in order: a rule's name, or the name with its arguments."""
    group_by: list[Text] = []
    """Columns whose equal values must never fall into different splits."""
    validation: Share = 0.05
    """Share of the groups kept for choosing checkpoints."""
    test: Share = 0.05
    """Share of the groups that only `evaluate` opens."""
    limit: Count | dict[Literal["train", "validation"], Count] | None = None
    """Use at most so many rows, of the training split or of each one named."""
    too_long: Literal["error", "drop"] = "error"
    """What happens to a conversation longer than training.max_length."""
    seed: Natural = 0
    """Decides the order of the rows and which groups are held out."""
    license: Annotated[str, Field(pattern=LICENCE)] | None = None
    """The data's licence, as the hub writes it (cc-by-4.0); without one, nothing made of the data is pushed."""
    language: Annotated[str, Field(pattern=LANGUAGE)] | None = None
    """Language of questions and answers, for the model card."""
    attribution: Text | None = None
    """Who made the data and where it is from, in the words that its licence asks for."""


class EvaluationSection(Section):
    """What is asked during and after training."""

    questions: list[Text] = []
    """Fixed questions, answered at every evaluation."""
    generate: dict[str, Any] = {}
    """Settings of transformers.GenerationConfig; greedy unless do_sample is true."""
    max_new_tokens: Count = 256
    """The longest answer, in tokens."""
    by: list[Text] = []
    """Columns of the data whose values get figures of their own in an evaluation."""
    evidence: dict[Literal["topic", "source", "document", "url"], Text] = {}
    """Columns of the data that say what a training question is about and where it comes from, shown under answers."""
    caveat: Text | None = None
    """What people who read answers are told about the data, after the notice that this is no medical device."""
    emergency_notice: bool = True
    """Whether a question that describes an emergency is answered with where to call first."""


class TrackingSection(Section):
    """Keyword arguments of wandb.init that an author may choose."""

    project: Text | None = None
    entity: Text | None = None
    group: Text | None = None
    job_type: Text | None = None
    name: Text | None = None
    notes: Text | None = None
    tags: list[Text] | None = None
    mode: Literal["online", "offline", "disabled", "shared"] | None = None


def each(names: str, value: Any) -> dict[str, Any]:
    """The same value under several names."""
    return dict.fromkeys(names.split(), value)


TRAINING_TYPES: dict[str, Any] = {
    **each("per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps ddp_timeout", Count),
    **each(
        "max_length save_total_limit dataset_num_proc eval_accumulation_steps torch_empty_cache_steps", Count | None
    ),
    **each("dataloader_prefetch_factor ddp_bucket_cap_mb", Count | None),
    **each("weight_decay max_grad_norm eval_delay label_smoothing_factor", NotNegative),
    **each("neftune_noise_alpha router_aux_loss_coef", NotNegative | None),
    **each("adam_beta1 adam_beta2", BelowOne),
    **each("adam_epsilon num_train_epochs", Positive),
    **each("logging_steps save_steps", Steps),
    **each("log_level log_level_replica", Literal["debug", "info", "warning", "error", "critical", "passive"]),
    "learning_rate": Annotated[float, Field(gt=0, le=1)],
    "max_steps": Literal[-1] | Count,
    "warmup_steps": Warmup,
    "eval_steps": Steps | None,
    "debug": str,
    "seed": Seed,
    "data_seed": Seed | None,
    "dataloader_num_workers": Natural,
    "loss_type": Literal["nll", "dft"],
    "packing_strategy": Literal["bfd", "bfd_split", "wrapped"],
    "truncation_mode": Literal["keep_start", "keep_end"],
    "train_sampling_strategy": Literal["random", "sequential", "group_by_length", "batch_rebalance"],
    "pad_to_multiple_of": Count | Literal["auto"] | None,
    "include_num_input_tokens_seen": bool | Literal["all", "non_padding", "no"],
}
INITIALISATION = Literal["gaussian", "eva", "olora", "pissa", "corda", "loftq", "orthogonal", "mica", "lora_ga"]
LORA_TYPES: dict[str, Any] = {
    **each("r lora_alpha qalora_group_size", Count),
    **each("rank_pattern alpha_pattern", dict[str, Count]),
    "lora_dropout": BelowOne,
    "target_modules": Text | Annotated[list[Text], Field(min_length=1)] | None,
    "init_lora_weights": bool | INITIALISATION | Annotated[str, Field(pattern=PISSA_STEPS)],
    "layers_to_transform": Natural | list[Natural] | None,
    "layer_replication": list[list[Natural]] | None,  # strict mode wants real tuples, and YAML has none
}
QUANTIZATION_TYPES: dict[str, Any] = {
    **each("load_in_8bit load_in_4bit bnb_4bit_use_double_quant", bool),
    **each("llm_int8_enable_fp32_cpu_offload llm_int8_has_fp16_weight", bool),
    "llm_int8_threshold": NotNegative,
    "llm_int8_skip_modules": list[Text] | None,
    "bnb_4bit_compute_dtype": Literal["float32", "bfloat16", "float16"] | None,
    "bnb_4bit_quant_type": Literal["fp4", "nf4"],
    "bnb_4bit_quant_storage": Literal["uint8", "int8", "float16", "float32", "float64", "bfloat16"] | None,
}
GENERATION_TYPES: dict[str, Any] = {
    **each("do_sample use_cache renormalize_logits remove_invalid_values", bool),
    **each("temperature repetition_penalty", Positive),
    **each("top_p typical_p", Annotated[float, Field(gt=0, le=1)]),
    **each("top_k no_repeat_ngram_size min_new_tokens", Natural),
    "min_p": Annotated[float, Field(ge=0, le=1)],
    "num_beams": Count,
    "length_penalty": float,
    "early_stopping": bool | Literal["never"],
    "stop_strings": str | list[str],
}

HARDWARE = "hardware stands in accelerate_configs/"
THE_RUN = "the run decides it"
REFUSED_NAMES = {
    ("model", HARDWARE): "device_map max_memory offload_folder tp_plan",
    ("model", "no secrets in recipes: `hf auth login`, or HF_TOKEN"): "token use_auth_token",
    ("model", "it has a section of its own: quantization"): "quantization_config",
    ("model", "always on: pickled weights can run code"): "use_safetensors",
    ("lora", "always LoRA for CAUSAL_LM"): "task_type peft_type auto_mapping",
    ("lora", "section model says it"): "base_model_name_or_path revision",
    ("lora", THE_RUN): "inference_mode peft_version runtime_config",
    ("lora", "MediBot trains one plain adapter"): "megatron_config megatron_core arrow_config use_bdlora",
    ("lora", "it needs a pass over the data first, which nobody makes"): "eva_config corda_config lora_ga_config",
    ("lora", "it crashes upstream on models with tied embeddings"): "trainable_token_indices",
    ("training", f"{THE_RUN}: outputs/<run>/, RUN=name"): "output_dir run_name logging_dir",
    ("training", "section tracking decides it"): (
        "report_to project trackio_space_id trackio_bucket_id trackio_static_space_id"
    ),
    ("training", "the machine decides it; the weights' own type is model.dtype"): (
        "use_cpu no_cuda bf16 fp16 bf16_full_eval fp16_full_eval tf32"
    ),
    ("training", HARDWARE): "deepspeed fsdp fsdp_config accelerator_config parallelism_config ddp_backend local_rank",
    ("training", "nothing leaves this machine while it trains"): (
        "push_to_hub push_to_hub_token hub_token hub_private_repo hub_model_id hub_strategy hub_always_push"
        " hub_revision"
    ),
    ("training", "the same command resumes an unfinished run"): "resume_from_checkpoint",
    ("training", "MediBot saves a whole checkpoint on a signal itself"): "enable_jit_checkpoint",
    ("training", "the command decides it"): "do_train do_eval do_predict",
    ("training", "it has a section of its own: model"): "model_init_kwargs trust_remote_code",
    ("training", "skip_prepare_dataset would switch off the check of the loss mask"): "dataset_kwargs",
    ("training", "rows are conversations: data.prompt and data.completion"): "dataset_text_field",
    ("training", "the tokenizer's own tokens are used"): "eos_token pad_token",
    ("training", "deprecated upstream: write model.use_kernels: true"): "use_liger_kernel liger_kernel_config",
    ("tracking", THE_RUN): (
        "dir id resume resume_from fork_from config config_include_keys config_exclude_keys reinit save_code force"
        " settings allow_val_change monitor_gym sync_tensorboard tensorboard anonymous"
    ),
    ("evaluation.generate", "write evaluation.max_new_tokens"): "max_new_tokens max_length",
    ("evaluation.generate", "the tokenizer decides it"): "eos_token_id pad_token_id bos_token_id",
    ("evaluation.generate", "one plain answer is compared for each question"): (
        "num_return_sequences return_dict_in_generate output_scores output_logits output_attentions"
        " output_hidden_states"
    ),
}
REFUSED = {f"{section}.{name}": reason for (section, reason), names in REFUSED_NAMES.items() for name in names.split()}
REFUSED_VALUES = (
    ("training.completion_only_loss", False, "the loss covers exactly the answer: leave it out"),
    ("training.assistant_only_loss", True, "the loss covers exactly the answer already: leave it out"),
    ("training.logging_nan_inf_filter", True, "it hides NaN losses: write false"),
    ("training.truncation_mode", "keep_end", "it cuts the question away, and trl removes it: write keep_start"),
    ("lora.init_lora_weights", "eva", "it needs a pass over the data first, which nobody makes"),
    ("lora.init_lora_weights", "corda", "it needs a pass over the data first, which nobody makes"),
    ("lora.init_lora_weights", "lora_ga", "it needs a pass over the data first, which nobody makes"),
)

RENAMED = {
    "max_seq_length": "training.max_length",
    "warmup_ratio": "training.warmup_steps, where a number below 1 is a ratio",
    "evaluation_strategy": "training.eval_strategy",
    "group_by_length": "training.train_sampling_strategy: group_by_length",
    "gradient_checkpointing": "training.activation_checkpointing",
    "gradient_checkpointing_kwargs": "training.activation_checkpointing_kwargs",
    "per_gpu_train_batch_size": "training.per_device_train_batch_size",
    "per_gpu_eval_batch_size": "training.per_device_eval_batch_size",
    "torch_dtype": "model.dtype",
    "use_flash_attention_2": "model.attn_implementation: flash_attention_2",
}
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


def narrowed(hint: Any) -> Any:
    """A constructor's type hint as a recipe may fill it: enums by their values, no JSON strings, no config objects."""
    if get_origin(hint) in (Union, types.UnionType):
        parts = [narrowed(part) for part in get_args(hint)]
        # `SchedulerType | str` and `dict | str` would let every typing error through
        typed = any(get_origin(part) in (Literal, dict) or part is dict for part in parts)
        return Union[tuple(part for part in parts if not (typed and part is str))]  # noqa: UP007
    if isinstance(hint, type) and issubclass(hint, Enum):
        return Literal[tuple(member.value for member in hint)]  # ty: ignore[invalid-type-form]
    if isinstance(hint, type) and hint.__module__.split(".")[0] in ("peft", "trl", "transformers", "accelerate"):
        return dict[str, Any]
    return hint


def constructor_section(name: str, constructor: Any, hints: dict[str, Any]) -> type[Section]:
    """The section whose settings are the constructor's parameters, less those that a recipe may not decide."""
    fields: dict[str, Any] = {}
    for parameter in inspect.signature(constructor).parameters.values():
        key = parameter.name
        if parameter.kind is parameter.VAR_KEYWORD or f"{name}.{key}" in REFUSED or key in RENAMED:
            continue
        default = parameter.default if isinstance(parameter.default, bool | int | float | str) else None
        fields[key] = (hints.get(key, Any), default.value if isinstance(default, Enum) else default)
    return create_model(
        f"{name.capitalize()}Section",
        __base__=Section,
        __doc__=f"Keyword arguments of {constructor.__name__}.",
        **fields,
    )


@cache
def section_models() -> dict[str, type[Section]]:
    """Every section's model; importing the libraries behind three of them takes seconds, so not at the top."""
    from peft import LoraConfig
    from transformers import BitsAndBytesConfig, GenerationConfig
    from trl import SFTConfig

    def hints(constructor: Any, ours: dict[str, Any]) -> dict[str, Any]:
        return {name: narrowed(hint) for name, hint in get_type_hints(constructor).items()} | ours

    generation = {
        name: (GENERATION_TYPES.get(name, Any), None)
        for name in vars(GenerationConfig())
        if not name.startswith("_") and name != "transformers_version" and f"evaluation.generate.{name}" not in REFUSED
    }
    return {
        "model": ModelSection,
        "quantization": constructor_section("quantization", BitsAndBytesConfig, QUANTIZATION_TYPES),
        "lora": constructor_section("lora", LoraConfig, hints(LoraConfig, LORA_TYPES)),
        "data": DataSection,
        "training": constructor_section("training", SFTConfig, hints(SFTConfig, TRAINING_TYPES)),
        "evaluation": EvaluationSection,
        "evaluation.generate": create_model("GenerationSettings", __base__=Section, **generation),  # ty: ignore[no-matching-overload]
        "tracking": TrackingSection,
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


def as_written(name: str, values: dict[str, Any]) -> dict[str, Any]:
    """A checked section in the constructor's order with its numbers made uniform (1 where a float is meant is 1.0)."""
    return section_models()[name].model_validate(values).model_dump(exclude_unset=True)


def json_schema() -> dict[str, Any]:
    """JSON Schema of a recipe for editors, made from the same models that check it."""
    models = section_models()
    sections = {name: (models[name], ... if name in REQUIRED else Field(default_factory=dict)) for name in SECTIONS}
    schema = create_model("Recipe", __base__=Section, __doc__="A MediBot recipe.", **sections).model_json_schema()  # ty: ignore[no-matching-overload]
    generate = schema["$defs"]["EvaluationSection"]["properties"]["generate"]
    generate |= models["evaluation.generate"].model_json_schema() | {"description": generate["description"]}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def write_schema(path: Path) -> None:
    """Write the JSON Schema that the first line of every recipe names."""
    path.write_text(json.dumps(json_schema(), indent=1, sort_keys=True) + "\n", encoding="utf-8")
