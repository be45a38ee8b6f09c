"""The parameters of a training in bytes, from the config alone: no weight is read.

The model is built on the meta device by upstream's own code, quantized and given its adapters there, so that every
parameter's shape is the real one.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from peft import NoMatchingPeftModuleError, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.integrations.bitsandbytes import replace_with_bnb_linear
from transformers.quantizers.base import HfQuantizer

from medibot.model.loading import call_loader, model_path
from medibot.model.precision import make_lora_config, make_quantization_config
from medibot.recipe import Recipe

# bitsandbytes quantizes 64 weights with one constant, and with double quantization 256 constants with one more
BLOCK, NESTED = 64, 256


QUANTIZED = ("4-bit blocks", "8-bit", "constants")


# Bytes of optimizer state for each trained value, as upstream's optimizers hold it; another one is taken for AdamW
STATE = {"sgd": 0, "adafactor": 0.1, "adagrad": 4, "rmsprop": 4, "lion_32bit": 4, "paged_lion_32bit": 4}


@dataclass(frozen=True)
class Parameters:
    """Bytes: `base` by what it is stored as, `quantized` of it, `adapters`, what is `trained`, autocast's copies (`casts`),
    the optimizer's state. Values: `trainable`, `total`, one `layer`, the input `embedding`.
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


def text_config(recipe: Recipe) -> PretrainedConfig:
    return call_loader(recipe, "config", AutoConfig.from_pretrained)


def skeleton(recipe: Recipe, dtype: torch.dtype, layers: int | None = None, quantized: bool = True) -> torch.nn.Module:
    """The recipe's model on the meta device, with its adapters; `layers` cuts it to its first ones.

    Raises RecipeError where the adapters match no module.
    """
    config = text_config(recipe)
    text = config.get_text_config()
    if layers is not None:
        kinds = text.to_dict().get("layer_types")
        text.num_hidden_layers = layers
        if kinds:
            text.layer_types = kinds[:layers]
    eager = recipe.model.get("attn_implementation") == "eager"
    trusted = recipe.model.get("trust_remote_code", False)
    with torch.device("meta"):
        whole = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation="eager" if eager else "sdpa", trust_remote_code=trusted
        )
    bits = make_quantization_config(recipe, dtype)
    if bits is not None and quantized:
        kept = HfQuantizer.get_modules_to_not_convert(whole, bits.llm_int8_skip_modules, whole._keep_in_fp32_modules)
        whole = replace_with_bnb_linear(whole, kept, bits)
    if recipe.lora is None:
        return whole.train()
    return with_adapters(recipe, whole, cut=layers is not None).train()


def with_adapters(recipe: Recipe, whole: torch.nn.Module, cut: bool) -> torch.nn.Module:
    lora: Any = make_lora_config(recipe)
    # An initialisation by the weights needs their values; shapes do not depend on it
    lora.init_lora_weights = True
    if cut:
        lora.layers_to_transform = lora.layer_replication = None
    try:
        adapted = get_peft_model(whole, lora)
    except NoMatchingPeftModuleError as error:
        what = " ".join(str(error).split())
        raise recipe.error("lora.target_modules", what, "name modules that this model has") from error
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return adapted


def parameters(recipe: Recipe, dtype: torch.dtype, compute: torch.dtype) -> Parameters:
    """Count the skeleton's parameters: exactly what the loaded model will hold."""
    whole = skeleton(recipe, dtype)
    double = bool((recipe.quantization or {}).get("bnb_4bit_use_double_quant"))
    packed = {id(m.weight): m for m in whole.modules() if isinstance(m, Linear4bit | Linear8bitLt)}
    base: dict[str, int] = {}
    for parameter in whole.parameters():
        count, adapter = parameter.numel(), recipe.lora is not None and parameter.requires_grad
        sizes = {} if adapter else {str(parameter.dtype).removeprefix("torch."): count * parameter.element_size()}
        if id(parameter) in packed:
            sizes = quantized_bytes(packed[id(parameter)], double)
        for name, size in sizes.items():
            base[name] = base.get(name, 0) + size
    total = sum(parameter.numel() for parameter in whole.parameters())
    learned = [parameter for parameter in whole.parameters() if parameter.requires_grad]
    trained = sum(parameter.numel() * parameter.element_size() for parameter in learned)
    embedding, layers = (
        whole.get_input_embeddings().weight.numel(),
        text_config(recipe).get_text_config().num_hidden_layers,
    )
    return Parameters(
        base=base,
        quantized=sum(base.get(name, 0) for name in QUANTIZED),
        adapters=0 if recipe.lora is None else trained,
        trained=trained,
        casts=casts(whole, compute),
        optimizer=sum(state_bytes(p, recipe.training.get("optim", "adamw_torch_fused")) for p in learned),
        trainable=sum(parameter.numel() for parameter in learned),
        total=total,
        layer=(total - embedding) // layers,
        embedding=embedding,
    )


def quantized_bytes(module: torch.nn.Module, double: bool) -> dict[str, int]:
    """Bytes of one quantized weight and its constants, as bitsandbytes 0.50 lays them out."""
    count = module.weight.numel()
    if isinstance(module, Linear8bitLt):
        return {"8-bit": count, "constants": 4 * module.out_features}
    blocks = math.ceil(count / BLOCK)
    # The sixteen values of the type, and with double quantization an offset
    constants = blocks + 4 * math.ceil(blocks / NESTED) + 4 if double else 4 * blocks
    return {"4-bit blocks": math.ceil(count / 2), "constants": constants + 64}


def state_bytes(parameter: torch.nn.Parameter, optimizer: str) -> int:
    """Bytes of optimizer state of one trained parameter."""
    count = parameter.numel()
    if "8bit" in optimizer and count >= 4096:
        # One byte a value and moment, and a constant a block of 256; smaller parameters keep 32 bits
        moments = 1 if "lion" in optimizer or "rmsprop" in optimizer else 2
        return moments * (count + 4 * math.ceil(count / 256))
    return int(STATE.get(optimizer, 2 * parameter.element_size()) * count)


def stored(recipe: Recipe) -> dict[str, int] | None:
    """Bytes of the model's safetensors files by dtype, read from their headers; None where they are not here yet."""
    files = sorted(Path(model_path(recipe), recipe.model.get("subfolder", "")).glob("*.safetensors"))
    sizes: dict[str, int] = {}
    for file in files:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(min(length, 100_000_000)))
        for tensor in (value for name, value in header.items() if name != "__metadata__"):
            start, end = tensor["data_offsets"]
            sizes[tensor["dtype"]] = sizes.get(tensor["dtype"], 0) + end - start
    return sizes if files else None


def casts(whole: torch.nn.Module, compute: torch.dtype) -> int:
    """Bytes of the copies that autocast makes of trained float32 weights, and keeps for the backward pass."""
    if compute == torch.float32:
        return 0
    linear = [module for module in whole.modules() if type(module) is torch.nn.Linear]
    return sum(2 * m.weight.numel() for m in linear if m.weight.requires_grad and m.weight.dtype == torch.float32)
