"""Describe every section of a recipe, from the constructor that its settings go to.

`training`, `lora` and `quantization` are read off trl, peft and transformers, so a release brings its settings along.
What upstream leaves unchecked (choices that are any string, sizes below zero) is typed here.
"""

from functools import cache
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field, create_model

from medibot.recipe.constructors import describe_constructors
from medibot.recipe.renames import REFUSED, RENAMED
from medibot.recipe.sections import (
    PISSA_STEPS,
    BelowOne,
    Count,
    DataSection,
    EvaluationSection,
    ModelSection,
    Natural,
    NotNegative,
    Positive,
    Section,
    Seed,
    Steps,
    Text,
    TrackingSection,
)

SECTIONS = ("model", "quantization", "lora", "data", "training", "evaluation", "tracking")
REQUIRED = ("model", "data", "training")
# Upstream's default is not null here, so null says something; everywhere else an override to null removes the key.
NULL_IS_A_VALUE = {"training.max_length", "training.pad_to_multiple_of"}


class Finding(NamedTuple):
    """One mistake, at a dotted key."""

    key: str
    what: str
    remedy: str = ""


def each(names: str, value: Any) -> dict[str, Any]:
    """Return the same value under several names."""
    return dict.fromkeys(names.split(), value)


TRAINING_TYPES: dict[str, Any] = {
    **each("per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps ddp_timeout", Count),
    **each("max_length save_total_limit dataset_num_proc eval_accumulation_steps", Count | None),
    **each("torch_empty_cache_steps dataloader_prefetch_factor ddp_bucket_cap_mb", Count | None),
    **each("weight_decay max_grad_norm eval_delay", NotNegative),
    **each("neftune_noise_alpha router_aux_loss_coef", NotNegative | None),
    **each("adam_beta1 adam_beta2", BelowOne),
    **each("adam_epsilon num_train_epochs", Positive),
    **each("logging_steps save_steps", Steps),
    **each("log_level log_level_replica", Literal["debug", "info", "warning", "error", "critical", "passive"]),
    "learning_rate": Annotated[float, Field(gt=0, le=1)],
    "max_steps": Literal[-1] | Count,
    "warmup_steps": Annotated[int | float, Field(ge=0)],
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


def constructor_section(name: str, doc: str, ours: dict[str, Any]) -> type[Section]:
    """Make a section of its constructor's parameters, less those that a recipe may not decide."""
    fields: Any = {
        key: (ours.get(key, hint), default)
        for key, (hint, default) in describe_constructors()[name].items()
        if f"{name}.{key}" not in REFUSED and key not in RENAMED
    }
    model = f"{name.capitalize()}Section" if "." not in name else "GenerationSettings"
    return create_model(model, __base__=Section, __doc__=doc, **fields)


@cache
def section_models() -> dict[str, type[Section]]:
    """Return every section's model, and at "" the whole recipe's."""
    doc = "Settings of transformers.GenerationConfig; greedy unless do_sample is true."
    generation = constructor_section("evaluation.generate", doc, GENERATION_TYPES)
    generate: Any = (generation, {})
    doc = EvaluationSection.__doc__
    models: dict[str, type[Section]] = {
        "model": ModelSection,
        "quantization": constructor_section(
            "quantization", "Keyword arguments of BitsAndBytesConfig.", QUANTIZATION_TYPES
        ),
        "lora": constructor_section("lora", "Keyword arguments of LoraConfig.", LORA_TYPES),
        "data": DataSection,
        "training": constructor_section("training", "Keyword arguments of SFTConfig.", TRAINING_TYPES),
        "evaluation": create_model("EvaluationSection", __base__=EvaluationSection, __doc__=doc, generate=generate),
        "tracking": TrackingSection,
    }
    sections: Any = {name: (model, ... if name in REQUIRED else {}) for name, model in models.items()}
    whole = create_model("Recipe", __base__=Section, __doc__="A MediBot recipe.", **sections)
    return models | {"evaluation.generate": generation, "": whole}


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema of a recipe for editors, made from the same models that check it."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **section_models()[""].model_json_schema()}
