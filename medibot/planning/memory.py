"""Count the bytes of a training's parameters from the model's config alone.

The model is built on the meta device by upstream's own code, quantized and given its adapters there, so that every
parameter's shape is the real one.
"""

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from peft import NoMatchingPeftModuleError, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.integrations.bitsandbytes import replace_with_bnb_linear
from transformers.quantizers.base import HfQuantizer

from medibot.errors import one_line
from medibot.model.loading import call_loader
from medibot.model.precision import make_lora_config, make_quantization_config
from medibot.recipe import Recipe

# bitsandbytes quantizes 64 weights with one constant, and with double quantization 256 constants with one more
BLOCK, NESTED = 64, 256
QUANTIZED = ("4-bit blocks", "8-bit", "constants")
# Bytes of optimizer state for each trained value; an optimizer that is not here counts as AdamW
STATE = {"sgd": 0, "adafactor": 0.1, "adagrad": 4, "rmsprop": 4, "lion_32bit": 4, "paged_lion_32bit": 4}


@dataclass(frozen=True)
class Parameters:
    """Bytes: `base` by storage, `quantized` of it, `adapters`, what is `trained`, autocast's `casts`, the `optimizer`.

    Counts of values: `trainable`, `total`, one `layer`, the input `embedding`.
    """

    base: dict[str, int]
    quantized: int
    adapters: int
    trained: int
    casts: int
    optimizer: int
    trainable: int
    total: int
    layer: int
    embedding: int


def load_config(recipe: Recipe) -> PretrainedConfig:
    """Return the model's config."""
    return call_loader(recipe, "config", AutoConfig.from_pretrained)


def build_skeleton(
    recipe: Recipe, dtype: torch.dtype, layers: int | None = None, quantized: bool = True
) -> torch.nn.Module:
    """Return the recipe's model on the meta device, with its adapters in float32; `layers` keeps only its first ones.

    Raises RecipeError where the adapters match no module.
    """
    config, bits = load_config(recipe), make_quantization_config(recipe, dtype)
    text = config.get_text_config()
    if layers is not None:
        text.num_hidden_layers = layers
        if kinds := text.to_dict().get("layer_types"):
            text.layer_types = kinds[:layers]
    attention = "eager" if recipe.model.get("attn_implementation") == "eager" else "sdpa"
    written = {"attn_implementation": attention, "trust_remote_code": recipe.model.get("trust_remote_code", False)}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, **written)
    if bits is not None and quantized:
        kept = HfQuantizer.get_modules_to_not_convert(model, bits.llm_int8_skip_modules, model._keep_in_fp32_modules)
        model = replace_with_bnb_linear(model, kept, bits)
    lora: Any = make_lora_config(recipe)
    if lora is None:
        return model.train()
    # An initialisation by the weights needs their values; shapes do not depend on it
    lora.init_lora_weights = True
    if layers is not None:
        lora.layers_to_transform = lora.layer_replication = None
    try:
        adapted = get_peft_model(model, lora)
    except NoMatchingPeftModuleError as error:
        raise recipe.error("lora.target_modules", one_line(error), "name modules that this model has") from error
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return adapted.train()


def count_bytes(recipe: Recipe, dtype: torch.dtype, compute: torch.dtype) -> Parameters:
    """Count the skeleton's parameters: exactly what the loaded model will hold."""
    model = build_skeleton(recipe, dtype)
    double = bool((recipe.quantization or {}).get("bnb_4bit_use_double_quant"))
    packed = {id(m.weight): m for m in model.modules() if isinstance(m, Linear4bit | Linear8bitLt)}
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    adapters = {id(parameter) for parameter in learned} if recipe.lora is not None else set()
    base: Counter[str] = Counter()
    for parameter in model.parameters():
        if id(parameter) in packed:
            base.update(quantized_bytes(packed[id(parameter)], double))
        elif id(parameter) not in adapters:
            base[str(parameter.dtype).removeprefix("torch.")] += parameter.nbytes
    total = sum(parameter.numel() for parameter in model.parameters())
    embedding = model.get_input_embeddings().weight.numel()
    trained = sum(parameter.nbytes for parameter in learned)
    return Parameters(
        base=base,
        quantized=sum(base[name] for name in QUANTIZED),
        adapters=trained if adapters else 0,
        trained=trained,
        casts=cast_bytes(model, compute),
        optimizer=sum(state_bytes(p, recipe.training.get("optim", "adamw_torch_fused")) for p in learned),
        trainable=sum(parameter.numel() for parameter in learned),
        total=total,
        layer=(total - embedding) // load_config(recipe).get_text_config().num_hidden_layers,
        embedding=embedding,
    )


def quantized_bytes(module: torch.nn.Module, double: bool) -> dict[str, int]:
    """Return the bytes of one quantized weight and its constants, as bitsandbytes 0.50 lays them out."""
    count = module.weight.numel()
    if isinstance(module, Linear8bitLt):
        return {"8-bit": count, "constants": 4 * module.out_features}
    blocks = math.ceil(count / BLOCK)
    # The sixteen values of the type, and with double quantization an offset
    constants = blocks + 4 * math.ceil(blocks / NESTED) + 4 if double else 4 * blocks
    return {"4-bit blocks": math.ceil(count / 2), "constants": constants + 64}


def state_bytes(parameter: torch.nn.Parameter, optimizer: str) -> int:
    """Return the bytes of optimizer state of one trained parameter."""
    count = parameter.numel()
    if "8bit" in optimizer and count >= 4096:
        # One byte a value and moment, and a constant a block of 256; smaller parameters keep 32 bits
        moments = 1 if "lion" in optimizer or "rmsprop" in optimizer else 2
        return moments * (count + 4 * math.ceil(count / 256))
    return int(STATE.get(optimizer, 2 * parameter.element_size()) * count)


def cast_bytes(model: torch.nn.Module, compute: torch.dtype) -> int:
    """Return the bytes of autocast's copies of trained float32 weights, which live until the backward pass."""
    if compute == torch.float32:
        return 0
    weights = [module.weight for module in model.modules() if type(module) is torch.nn.Linear]
    return sum(2 * weight.numel() for weight in weights if weight.requires_grad and weight.dtype == torch.float32)
