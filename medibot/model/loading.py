"""Load weights: the base as the recipe says, the tuned model from a run's folder."""

import hashlib
import sys
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    core_model_loading,
)
from transformers.utils.import_utils import KERNELS_MIN_VERSION, is_kernels_available

from medibot.errors import is_out_of_memory, one_line
from medibot.model.precision import make_quantization_config
from medibot.recipe import Recipe

if TYPE_CHECKING:
    from peft import PeftModel

# Upstream hides why a weight cannot be quantized, such as memory that runs out, in a report that it logs
core_model_loading.log_conversion_errors = lambda *_, **__: nullcontext()
GPU_EXTRA = 'run: .venv/bin/python -m pip install -c constraints.txt -e ".[gpu]"'
# Files of a model folder that decide what it computes
IDENTIFYING = {".safetensors", ".json", ".jinja", ".model", ".txt", ".py"}


def source_kwargs(recipe: Recipe) -> dict[str, Any]:
    """Return `from_pretrained`'s keyword arguments that config, tokenizer and weights share."""
    shared = ("revision", "subfolder", "trust_remote_code", "local_files_only", "cache_dir")
    # Unset, upstream asks at the terminal whether to run the folder's code
    return {"trust_remote_code": False} | {key: recipe.model[key] for key in shared if key in recipe.model}


def model_path(recipe: Recipe) -> str:
    """Return the hub id or the local folder; raise RecipeError for a local folder that is not there."""
    path = recipe.model["pretrained_model_name_or_path"]
    if Path(path).expanduser().is_dir():
        return str(Path(path).expanduser())
    if path.startswith((".", "/", "~", "models/", "outputs/")) or path.count("/") != 1:
        remedy = "run: make model" if path.startswith("models/") else "write a hub id such as org/name, or a folder"
        raise recipe.error("model.pretrained_model_name_or_path", f"model folder {path!r} not found", remedy)
    return path


def call_loader(recipe: Recipe, what: str, load: Any, **kwargs: Any) -> Any:
    """Call an upstream loader; turn what it cannot find or reach into a RecipeError."""
    path = model_path(recipe)
    try:
        return load(path, **source_kwargs(recipe), **kwargs)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        if is_out_of_memory(error):
            raise
        remedy = "check the name, the revision, and that the hub or the folder is readable from here"
        if "safetensors" in what:
            remedy += ", or convert other weights to safetensors"
        if "trust_remote_code" in str(error):
            remedy = "it brings code of its own: read that, then write model.trust_remote_code: true"
        said = f"no {what} in {path!r}: {str(error).strip().splitlines()[0]}"
        raise recipe.error("model.pretrained_model_name_or_path", said, remedy) from error


def load_base(recipe: Recipe, dtype: torch.dtype, device: str | None = None) -> PreTrainedModel:
    """Load the base weights, safetensors only, quantized if the recipe says so; on `device`, or by upstream's rules."""
    kwargs = {
        key: recipe.model[key] for key in ("attn_implementation", "variant", "use_kernels") if key in recipe.model
    }
    kwargs |= {"dtype": dtype, "use_safetensors": True, "quantization_config": make_quantization_config(recipe, dtype)}
    kwargs |= {"device_map": {"": device}} if device else {}
    require_kernels(recipe)
    try:
        model = call_loader(recipe, "safetensors weights", AutoModelForCausalLM.from_pretrained, **kwargs)
    except ImportError as error:
        remedy = f"install it, or {GPU_EXTRA}, or leave it out: sdpa"
        raise recipe.error("model.attn_implementation", one_line(error), remedy) from error
    if recipe.quantization and not torch.cuda.is_available():
        keep_4bit_trainable(model)
    return model


def require_kernels(recipe: Recipe) -> None:
    """Raise RecipeError for kernels that this machine lacks or cannot run, where upstream ends in a traceback, or later."""
    key, name = "model.attn_implementation", recipe.model.get("attn_implementation") or ""
    least = 9 if name.endswith(("attention_4", "attn4")) else 8
    if "flash" in name and not (torch.cuda.is_available() and torch.cuda.get_device_capability()[0] >= least):
        raise recipe.error(key, f"{name} needs a GPU of compute capability {least}.0 or later", "leave it out: sdpa")
    if not is_kernels_available() and ("/" in name or recipe.model.get("use_kernels")):
        what = f"needs the package kernels, {KERNELS_MIN_VERSION} or later"
        raise recipe.error(key if "/" in name else "model.use_kernels", what, GPU_EXTRA)


def keep_4bit_trainable(model: PreTrainedModel) -> None:
    """Stop bitsandbytes from packing 4-bit weights for AVX512-BF16 inference: the packed product has no backward pass.

    The first evaluation would pack them, and most adapters silently get no gradient (0.50, Linear4bit.forward).
    """
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def load_tuned(recipe: Recipe, weights: Path, dtype: torch.dtype) -> "PreTrainedModel | PeftModel":
    """Load the trained model from a run's `weights` folder: base plus adapter, or the full fine-tuned weights."""
    if recipe.lora is None:
        model = AutoModelForCausalLM.from_pretrained(weights, dtype=dtype, use_safetensors=True)
    else:
        from peft import PeftModel

        model = PeftModel.from_pretrained(load_base(recipe, dtype), weights)
    if recipe.quantization is None and torch.cuda.is_available():
        model = model.to("cuda")
    return model.eval()


def identify_base(recipe: Recipe) -> dict[str, str]:
    """Identify the base model by its hub commit or by the sha256 of each file of a local folder."""
    path = model_path(recipe)
    if not Path(path).is_dir():
        config = call_loader(recipe, "config", AutoConfig.from_pretrained)
        return {"hub": path, "commit": str(config._commit_hash)}
    return {file.name: hash_file(file) for file in sorted(Path(path).iterdir()) if file.suffix in IDENTIFYING}


def hash_file(path: Path) -> str:
    """Return the sha256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def silence_upstream() -> None:
    """Silence upstream warnings that MediBot reports itself."""
    transformers.logging.set_verbosity_error()
    if not sys.stderr.isatty():
        transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|trl|peft|bitsandbytes")


def weights_dtype(recipe: Recipe, compute: torch.dtype) -> torch.dtype:
    """Return the dtype of the base weights: float32 masters for full fine-tuning, else what is computed in.

    A recipe may write bfloat16 for both. float16 it may not: torch refuses to unscale gradients of float16 weights.
    """
    masters = recipe.model.get("dtype", "auto") == "auto" or compute == torch.float16
    return torch.float32 if recipe.lora is None and masters else compute


def make_tiny_model(tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """Build a one-layer model, enough for the trainer to prepare its dataset."""
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    return AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=len(tokenizer), num_key_value_heads=1, **sizes))


def method_name(recipe: Recipe) -> str:
    """Return the fine-tuning method by its usual name."""
    if recipe.lora is None:
        return "full fine-tuning"
    lora = "DoRA" if recipe.lora.get("use_dora") else "rsLoRA" if recipe.lora.get("use_rslora") else "LoRA"
    bits = recipe.quantization or {}
    return lora + (" on 4-bit weights" if bits.get("load_in_4bit") else " on 8-bit weights" if bits else "")
