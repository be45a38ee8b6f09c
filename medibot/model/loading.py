"""The recipe's model: tokenizer, precision, quantization, LoRA; loaded the same way for training and for answering."""

import hashlib
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from medibot.errors import RecipeError
from medibot.model.precision import make_quantization_config
from medibot.recipe import Recipe

# Files of a model folder that decide what it computes
IDENTIFYING = {".safetensors", ".json", ".jinja", ".model", ".txt", ".py"}


def source_kwargs(recipe: Recipe) -> dict[str, Any]:
    """Where config, tokenizer and weights come from: `from_pretrained`'s keyword arguments that all three share."""
    shared = ("revision", "subfolder", "trust_remote_code", "local_files_only", "cache_dir")
    # Unset, upstream asks at the terminal whether to run the folder's code
    return {"trust_remote_code": False} | {key: recipe.model[key] for key in shared if key in recipe.model}


def model_path(recipe: Recipe) -> str:
    """The hub id or the local folder; a folder that should be there and is not is the author's mistake."""
    path = recipe.model["pretrained_model_name_or_path"]
    looks_local = path.startswith((".", "/", "~", "models/", "outputs/")) or path.count("/") != 1
    if Path(path).expanduser().is_dir():
        return str(Path(path).expanduser())
    if looks_local:
        remedy = "run: make model" if path.startswith("models/") else "write a hub id such as org/name, or a folder"
        raise recipe.error("model.pretrained_model_name_or_path", f"no model folder {path!r}", remedy)
    return path


def call_loader(recipe: Recipe, what: str, load: Any, **kwargs: Any) -> Any:
    """Call an upstream loader; what it cannot find or reach is the author's to mend, in one line."""
    path = model_path(recipe)
    try:
        return load(path, **source_kwargs(recipe), **kwargs)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        first = str(error).strip().splitlines()[0]
        raise recipe.error(
            "model.pretrained_model_name_or_path", f"no {what} in {path!r}: {first}", loading_remedy(what, error)
        ) from error


def loading_remedy(what: str, error: Exception) -> str:
    """What the author can do about something that upstream could not load."""
    if "trust_remote_code" in str(error):
        return "it brings code of its own: read that, then write model.trust_remote_code: true"
    converted = ", or convert other weights to safetensors" if "safetensors" in what else ""
    return "check the name, the revision, and that the hub or the folder is readable from here" + converted


def load_base(recipe: Recipe, dtype: torch.dtype, device: str | None = None) -> PreTrainedModel:
    """The base model's weights, safetensors only, quantized if the recipe says so; on `device`, or by upstream's rules."""
    written = ("attn_implementation", "variant", "use_kernels")
    kwargs = {key: recipe.model[key] for key in written if key in recipe.model}
    kwargs |= {"dtype": dtype, "use_safetensors": True, "quantization_config": make_quantization_config(recipe, dtype)}
    kwargs |= {"device_map": {"": device}} if device else {}
    try:
        model = call_loader(recipe, "safetensors weights", AutoModelForCausalLM.from_pretrained, **kwargs)
    except ImportError as error:
        what = " ".join(str(error).split())
        raise recipe.error("model.attn_implementation", what, "install it, or leave the setting out: sdpa") from error
    if recipe.quantization and not torch.cuda.is_available():
        keep_4bit_trainable(model)
    return model


def keep_4bit_trainable(model: PreTrainedModel) -> None:
    """Stop bitsandbytes from packing 4-bit weights for AVX512-BF16 inference.

    The first evaluation would pack them in place, and the packed product has no backward pass: training would go on
    with the gradient of most adapters silently missing (bitsandbytes 0.50, nn/modules.py, Linear4bit.forward).
    """
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def load_tuned(recipe: Recipe, weights: Path, dtype: torch.dtype) -> PreTrainedModel | PeftModel:
    """The trained model from a run's `weights` folder: base plus adapter, or the full fine-tuned weights."""
    if recipe.lora is None:
        model = AutoModelForCausalLM.from_pretrained(weights, dtype=dtype, use_safetensors=True)
    else:
        model = PeftModel.from_pretrained(load_base(recipe, dtype), weights)
    if recipe.quantization is None and torch.cuda.is_available():
        model = model.to("cuda")
    return model.eval()


def identify_base(recipe: Recipe) -> dict[str, str]:
    """What pins the base model: the hub's commit, or the sha256 of each file of a local folder."""
    path = model_path(recipe)
    if not Path(path).is_dir():
        config = call_loader(recipe, "config", AutoConfig.from_pretrained)
        return {"hub": path, "commit": str(config._commit_hash)}
    names = sorted(p for p in Path(path).iterdir() if p.suffix in IDENTIFYING)
    return {file.name: hash_file(file) for file in names}


def hash_file(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def convert_gguf(file: Path, folder: Path) -> None:
    """Turn a GGUF file into a plain model folder (bfloat16 safetensors, tokenizer, template), whole or not at all.

    A README.md there says the licence that the file states: a model card of what is trained from it repeats it.
    """
    from gguf import GGUFReader
    from transformers import GgufConfig

    silence_progress_bars()
    if not file.is_file():
        raise RecipeError.of("model", f"no GGUF file {file}", "run: make model")
    if folder.exists():
        raise RecipeError.of("model", f"{folder} is there already", "delete it, or name another folder")
    partial = folder.with_name(f".{folder.name}.partial")
    kwargs = {"gguf_file": file.name}
    model = AutoModelForCausalLM.from_pretrained(
        file.parent, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16, **kwargs
    )
    model.save_pretrained(partial)
    AutoTokenizer.from_pretrained(file.parent, **kwargs).save_pretrained(partial)
    licence = GGUFReader(file).fields.get("general.license")
    if licence is not None:
        text = f"---\nlicense: {licence.contents()}\n---\n\nMade from {file.name} by `medibot convert-gguf`.\n"
        (partial / "README.md").write_text(text, encoding="utf-8")
    partial.rename(folder)


def silence_upstream() -> None:
    """One voice: no upstream warnings that repeat what MediBot reports itself."""
    transformers.logging.set_verbosity_error()
    silence_progress_bars()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|trl|peft|bitsandbytes")


def silence_progress_bars() -> None:
    """Progress bars, the training's own among them, belong on a terminal and nowhere else."""
    if not sys.stderr.isatty():
        transformers.logging.disable_progress_bar()


def weights_dtype(recipe: Recipe, compute: torch.dtype) -> torch.dtype:
    """What the base weights are held in: float32 master weights for full fine-tuning, else what is computed in."""
    full = recipe.lora is None and "dtype" not in recipe.model
    return torch.float32 if full else compute


def make_tiny_model(tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The smallest model there is: with it the trainer prepares its dataset and no weights are loaded."""
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), num_key_value_heads=1, **sizes))


def method_name(recipe: Recipe) -> str:
    """The fine-tuning method in its usual name."""
    if recipe.lora is None:
        return "full fine-tuning"
    lora = "DoRA" if recipe.lora.get("use_dora") else "rsLoRA" if recipe.lora.get("use_rslora") else "LoRA"
    bits = recipe.quantization or {}
    return lora + (" on 4-bit weights" if bits.get("load_in_4bit") else " on 8-bit weights" if bits else "")
