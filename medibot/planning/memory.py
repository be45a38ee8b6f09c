"""Count what a training holds on a device from the model's config alone; nothing is computed, no weight is read.

The model is built on the meta device by upstream's own code, quantized and given its adapters there, so that every
parameter's shape is the real one. What a forward pass keeps is asked of autograd, on fake tensors.
"""

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from peft import NoMatchingPeftModuleError, get_peft_model
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedOperatorException,
)
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.integrations.bitsandbytes import replace_with_bnb_linear
from transformers.quantizers.base import HfQuantizer

from medibot.errors import one_line
from medibot.model.loading import call_loader
from medibot.model.precision import make_lora_config, make_quantization_config
from medibot.recipe import Recipe

# bitsandbytes quantizes 64 weights with one constant, and with double quantization 256 constants with one more
BLOCK, NESTED = 64, 256
# Values of optimizer state for each trained one; an optimizer that is not here counts as AdamW, with two
MOMENTS = {"sgd": 0, "adafactor": 0.025, "adagrad": 1, "rmsprop": 1, "lion": 1}
# Positions that the head of medibot/training/cpu.py scores at a time
CPU_TILE = 128
# What a layer that cannot be traced keeps, in bytes a token for each hidden unit, at two bytes a value
# (Korthikanti et al., 2022, arXiv 2205.05198, without the attention matrix)
UNTRACED = 34


@dataclass(frozen=True)
class Parameters:
    """Bytes, `base` by storage, `casts` those of autocast's copies; `trainable` and `total` are counts of values."""

    base: dict[str, int]
    adapters: int
    trained: int
    casts: int
    optimizer: int
    trainable: int
    total: int


@dataclass(frozen=True)
class Kept:
    """Bytes that a forward pass keeps for the backward pass: a layer, what is outside of layers, one hidden state."""

    layer: int
    outside: int
    state: int
    traced: bool = True


def load_config(recipe: Recipe) -> PretrainedConfig:
    """Return the model's config."""
    return call_loader(recipe, "config", AutoConfig.from_pretrained)


def build_skeleton(recipe: Recipe, dtype: torch.dtype, layers: int | None = None) -> torch.nn.Module:
    """Return the recipe's model on the meta device, with its adapters; or its first `layers` alone, not quantized.

    Raises RecipeError where the adapters match no module.
    """
    config, options = load_config(recipe), {"trust_remote_code": recipe.model.get("trust_remote_code", False)}
    if layers is not None:
        config.get_text_config().num_hidden_layers = layers
    attention = "eager" if recipe.model.get("attn_implementation") == "eager" else "sdpa"
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention, **options)
    bits = make_quantization_config(recipe, dtype)
    if bits is not None and layers is None:
        kept = HfQuantizer.get_modules_to_not_convert(model, bits.llm_int8_skip_modules, model._keep_in_fp32_modules)
        model = replace_with_bnb_linear(model, kept, bits)
    if recipe.lora is not None:
        lora: Any = make_lora_config(recipe)
        # An initialisation by the weights needs their values; shapes do not depend on it
        lora.init_lora_weights = True
        if layers is not None:
            lora.layers_to_transform = lora.layer_replication = None
        try:
            model = get_peft_model(model, lora)
        except NoMatchingPeftModuleError as error:
            raise recipe.error("lora.target_modules", one_line(error), "name modules that this model has") from error
        for parameter in model.parameters():
            if parameter.requires_grad:
                # As in training
                parameter.data = parameter.data.float()
    return model.train()


def count_bytes(recipe: Recipe, dtype: torch.dtype, compute: torch.dtype) -> Parameters:
    """Count the skeleton's parameters: exactly what the loaded model will hold."""
    model = build_skeleton(recipe, dtype)
    double = bool((recipe.quantization or {}).get("bnb_4bit_use_double_quant"))
    packed = {id(m.weight): m for m in model.modules() if isinstance(m, Linear4bit | Linear8bitLt)}
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    base: Counter[str] = Counter()
    for parameter in model.parameters():
        module, count = packed.get(id(parameter)), parameter.numel()
        # As bitsandbytes 0.50 lays out quantized weights and their constants
        if isinstance(module, Linear8bitLt):
            base.update({"8-bit": count, "constants": 4 * module.out_features})
        elif isinstance(module, Linear4bit):
            blocks = math.ceil(count / BLOCK)
            # The sixteen values of the type, and with double quantization an offset
            constants = blocks + 4 * math.ceil(blocks / NESTED) + 4 if double else 4 * blocks
            base.update({"4-bit blocks": math.ceil(count / 2), "constants": constants + 64})
        elif recipe.lora is None or not parameter.requires_grad:
            base[str(parameter.dtype).removeprefix("torch.")] += parameter.nbytes
    trained = sum(parameter.nbytes for parameter in learned)
    name = recipe.training.get("optim", "adamw_torch_fused")
    # An 8-bit optimizer's constants, one a block of 256 values, are left out
    state = trained / 4 if "8bit" in name else trained
    return Parameters(
        base=dict(base),
        adapters=0 if recipe.lora is None else trained,
        trained=trained,
        casts=cast_bytes(model, compute),
        optimizer=math.ceil(MOMENTS.get(name.removeprefix("paged_").split("_")[0], 2) * state),
        trainable=sum(parameter.numel() for parameter in learned),
        total=sum(parameter.numel() for parameter in model.parameters()),
    )


def cast_bytes(model: torch.nn.Module, compute: torch.dtype) -> int:
    """Return the bytes of autocast's copies of trained float32 weights, which live until the backward pass."""
    if compute == torch.float32:
        return 0
    weights = [module.weight for module in model.modules() if type(module) is torch.nn.Linear]
    return sum(2 * weight.numel() for weight in weights if weight.requires_grad and weight.dtype == torch.float32)


class GPUDropout(torch.nn.Dropout):
    """Dropout as on a GPU, which keeps one byte a value; torch on a CPU keeps the scaled noise."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return torch.native_dropout(input, self.p, self.training)[0]


def trace(recipe: Recipe, dtype: torch.dtype, compute: torch.dtype, gpu: bool, rows: int, length: int) -> Kept:
    """Run the first one and two layers on `rows` x `length` fake tokens; each further layer keeps what the second does.

    A model that cannot be traced is estimated.
    """
    kept: list[int] = []
    # Half precision of either kind is as large, and bfloat16 is the one that every CPU can name; mixed they are float32
    dtype = torch.bfloat16 if dtype == torch.float16 else dtype
    autocast = torch.autocast("cpu", dtype=torch.bfloat16, enabled=compute != torch.float32)
    for layers in (1, 2):
        model, saved = build_skeleton(recipe, dtype, layers), []
        for name, module in list(model.named_modules()) if gpu else []:
            if isinstance(module, torch.nn.Dropout):
                model.set_submodule(name, GPUDropout(module.p))
        backbone = (model.get_base_model() if recipe.lora is not None else model).base_model
        with FakeTensorMode(allow_non_fake_inputs=True):
            backbone.to_empty(device="cpu")
            held = {tensor.untyped_storage()._cdata for tensor in (*backbone.parameters(), *backbone.buffers())}
            ids = torch.zeros(rows, length, dtype=torch.long)
            try:
                # Nothing runs backward: what would be saved need not come back
                with autocast, torch.autograd.graph.saved_tensors_hooks(saved.append, lambda _: None):
                    made = backbone(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
            except (DataDependentOutputException, DynamicOutputShapeException, UnsupportedOperatorException):
                state = rows * length * load_config(recipe).get_text_config().hidden_size * compute.itemsize
                return Kept(state * UNTRACED // 2, state, state, traced=False)
            storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in saved}
        new = sum(size for key, size in storages.items() if key not in held)
        kept.append(new - cast_bytes(backbone, compute))
    first, both = kept
    return Kept(both - first, max(0, 2 * first - both), made.last_hidden_state.nbytes)
