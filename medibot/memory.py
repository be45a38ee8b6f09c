"""What a training holds in memory, in bytes, from the config alone: no weight is read.

The model is built on the meta device by upstream's own code, quantized and given its adapters there, so that every
parameter's shape is the real one. What autograd keeps for the backward pass is asked of autograd: the forward pass of
the first one and two layers runs on fake tensors, and each further layer is taken to keep what the second one does.
"""

import math
from contextlib import nullcontext
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
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.integrations.bitsandbytes import replace_with_bnb_linear
from transformers.quantizers.base import HfQuantizer

from medibot import model
from medibot.recipe import Recipe

# bitsandbytes quantizes 64 weights with one constant, and with double quantization 256 constants with one more
BLOCK, NESTED = 64, 256
# trl/kernels/chunked_logprob.py: a tile of logits is at most so many positions by so many tokens of the vocabulary
TILE = (4096, 32768)
# Bytes of optimizer state for each trained value, as upstream's optimizers hold it; another one is taken for AdamW
STATE = {"sgd": 0, "adafactor": 0.1, "adagrad": 4, "rmsprop": 4, "lion_32bit": 4, "paged_lion_32bit": 4}
# What is kept of a layer that cannot be traced, in bytes a token for each hidden unit, at two bytes a value
# (Korthikanti et al., 2022, arXiv 2205.05198, without the attention matrix)
UNTRACED = 34


@dataclass(frozen=True)
class Parameters:
    """Bytes of the frozen or trained base model by what it is stored as, and what is trained."""

    base: dict[str, int]
    quantized: int
    adapters: int
    trainable: int
    total: int
    casts: int
    optimizer: int


@dataclass(frozen=True)
class Kept:
    """Bytes that a forward pass over `rows` x `length` tokens keeps: a layer, what is outside of layers, one hidden state.

    `freed` is what a layer allocates and frees again on its way.
    """

    layer: int
    outside: int
    state: int
    freed: int
    traced: bool


def text_config(recipe: Recipe) -> PretrainedConfig:
    return model.loading(recipe, "config", AutoConfig.from_pretrained)


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
    bits = model.quantization_config(recipe, dtype)
    if bits is not None and quantized:
        kept = HfQuantizer.get_modules_to_not_convert(whole, bits.llm_int8_skip_modules, whole._keep_in_fp32_modules)
        whole = replace_with_bnb_linear(whole, kept, bits)
    if recipe.lora is None:
        return whole.train()
    return with_adapters(recipe, whole, cut=layers is not None).train()


def with_adapters(recipe: Recipe, whole: torch.nn.Module, cut: bool) -> torch.nn.Module:
    lora: Any = model.lora_config(recipe)
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
    adapters = trainable = total = 0
    for parameter in whole.parameters():
        count, size = parameter.numel(), parameter.element_size()
        total += count
        trainable += count * parameter.requires_grad
        if id(parameter) in packed:
            for name, stored in quantized_bytes(packed[id(parameter)], double).items():
                base[name] = base.get(name, 0) + stored
        elif recipe.lora is not None and parameter.requires_grad:
            adapters += count * size
        else:
            name = str(parameter.dtype).removeprefix("torch.")
            base[name] = base.get(name, 0) + count * size
    quantized = sum(size for name, size in base.items() if name in {"4-bit blocks", "8-bit", "constants"})
    state = sum(state_bytes(p, recipe.training.get("optim", "adamw_torch_fused")) for p in trained(whole))
    return Parameters(base, quantized, adapters, trainable, total, casts(whole, compute), state)


def trained(whole: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [parameter for parameter in whole.parameters() if parameter.requires_grad]


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


def casts(whole: torch.nn.Module, compute: torch.dtype) -> int:
    """Bytes of the copies that autocast makes of trained float32 weights, and keeps for the backward pass."""
    if compute == torch.float32:
        return 0
    linear = [module for module in whole.modules() if type(module) is torch.nn.Linear]
    return sum(2 * m.weight.numel() for m in linear if m.weight.requires_grad and m.weight.dtype == torch.float32)


# --- what autograd keeps ----------------------------------------------------------------------------------------------


class Allocated(TorchDispatchMode):
    """Every storage that an operation makes; holding on to them keeps their identity."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, torch.UntypedStorage] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.storages[storage._cdata] = storage
        return made


class GPUDropout(torch.nn.Module):
    """Dropout as a GPU does it, which keeps one byte a value; torch on a CPU keeps the scaled noise."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return torch.native_dropout(values, self.share, True)[0]


def kept(recipe: Recipe, dtype: torch.dtype, compute: torch.dtype, gpu: bool, rows: int, length: int) -> Kept:
    """Trace the first one and two layers over `rows` x `length` tokens."""
    try:
        one, two = (traced(recipe, dtype, compute, gpu, layers, rows, length) for layers in (1, 2))
    except (DataDependentOutputException, DynamicOutputShapeException, UnsupportedOperatorException):
        hidden = text_config(recipe).get_text_config().hidden_size
        values = rows * length * hidden
        size = compute.itemsize
        return Kept(values * UNTRACED * size // 2, values * size, values * size, values * UNTRACED * size, traced=False)
    layer = two.layer - one.layer
    return Kept(layer, max(0, one.layer - layer), two.state, two.freed - one.freed, traced=True)


def traced(
    recipe: Recipe, dtype: torch.dtype, compute: torch.dtype, gpu: bool, layers: int, rows: int, length: int
) -> Kept:
    """One forward pass of the backbone on fake tensors: `layer` is all that it keeps."""
    whole = skeleton(recipe, dtype, layers, quantized=False)
    if gpu:
        for name, module in list(whole.named_modules()):
            if isinstance(module, torch.nn.Dropout):
                whole.set_submodule(name, GPUDropout(module.p))
    backbone = (whole.get_base_model() if recipe.lora is not None else whole).base_model
    keeps: dict[int, torch.UntypedStorage] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in held:
            keeps[storage._cdata] = storage
        return tensor

    # Half precision of either kind is as large, and bfloat16 is the one that every CPU can name
    autocast = nullcontext() if compute == torch.float32 else torch.autocast("cpu", dtype=torch.bfloat16)
    with FakeTensorMode(allow_non_fake_inputs=True):
        values = {
            name: torch.empty(value.shape, dtype=value.dtype, requires_grad=value.requires_grad)
            for name, value in [*backbone.named_parameters(), *backbone.named_buffers()]
        }
        held = {value.untyped_storage()._cdata for value in values.values()}
        ids = torch.zeros(rows, length, dtype=torch.long)
        # A single row is never padded, and upstream then drops the mask
        mask = torch.ones_like(ids) if rows > 1 else None
        inputs = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
        with Allocated() as allocated, autocast, torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            made = torch.func.functional_call(backbone, values, kwargs=inputs)
        state = made.last_hidden_state.nbytes
        saved = sum(storage.nbytes() for storage in keeps.values()) - casts(backbone, compute)
        everything = sum(storage.nbytes() for key, storage in allocated.storages.items() if key not in held)
    return Kept(saved, 0, state, everything - saved, traced=True)


def head(gpu: bool, positions: int, supervised: int, config: PretrainedConfig, compute: torch.dtype, full: bool) -> int:
    """Bytes that TRL's fused head and loss need on top, at the highest point of their backward pass.

    On a GPU it takes the supervised positions alone and one tile of logits at a time; on a CPU it takes all positions,
    and its torch operations hold nine float32 tiles at once.
    """
    hidden, vocabulary = config.hidden_size, config.vocab_size
    scored = supervised if gpu else positions
    width = min(TILE[1], vocabulary)
    tile = min(TILE[0], scored) * width
    logits = tile * compute.itemsize if gpu else 9 * 4 * tile
    weight = (4 * vocabulary * hidden if full else 0) + (width * hidden * compute.itemsize if full else 0)
    return logits + scored * hidden * (4 + 2 * compute.itemsize) + weight
