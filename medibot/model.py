"""The recipe's model: tokenizer, precision, quantization, LoRA; loaded the same way for training and for answering."""

import hashlib
import json
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import torch
import transformers
from peft import LoraConfig, PeftModel
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from medibot.errors import RecipeError
from medibot.recipe import Recipe

# What a chat template writes between angle or square brackets is a role or turn marker, whether or not it is a token of
# its own: TinyLlama's <|user|> is plain text to its tokenizer and would still forge a turn.
MARKER = re.compile(r"<\|?/?[A-Za-z_][\w ]*\|?>|<</?[A-Z]+>>|\[/?[A-Z_]+\]")
# Files of a model folder that decide what it computes
IDENTIFYING = {".safetensors", ".json", ".jinja", ".model", ".txt", ".py"}
PROBE = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]


@dataclass(frozen=True)
class Precision:
    """The dtype that the machine computes in, and SFTConfig's switches that say so."""

    dtype: torch.dtype
    reason: str

    @property
    def name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def training(self) -> dict[str, bool]:
        return {
            "use_cpu": not torch.cuda.is_available(),
            "bf16": self.dtype == torch.bfloat16,
            "fp16": self.dtype == torch.float16,
        }


def precision(written: str | None = None) -> Precision:
    """bfloat16 where the device computes in it natively, float16 on older GPUs, else float32; `written` wins."""
    if written and written != "auto":
        return Precision(getattr(torch, written), "the recipe's model.dtype")
    if torch.cuda.is_available():
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return Precision(torch.bfloat16, f"native on {torch.cuda.get_device_name()}")
        return Precision(torch.float16, f"{torch.cuda.get_device_name()} has no native bfloat16")
    if torch.cpu._is_amx_tile_supported():
        return Precision(torch.bfloat16, "native on this CPU (AMX)")
    # AVX512-BF16 alone is no matrix unit: torch's bfloat16 products ran 8 times slower than float32 there
    return Precision(torch.float32, "this CPU has no native bfloat16 matrix unit")


def source(recipe: Recipe) -> dict[str, Any]:
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


def loading(recipe: Recipe, what: str, load: Any, **kwargs: Any) -> Any:
    """Call an upstream loader; what it cannot find or reach is the author's to mend, in one line."""
    path = model_path(recipe)
    try:
        return load(path, **source(recipe), **kwargs)
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


def load_tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase:
    """The model's tokenizer with its own chat template (or the file that `training.chat_template_path` names)."""
    tokenizer = loading(recipe, "tokenizer", AutoTokenizer.from_pretrained)
    template = recipe.training.get("chat_template_path")
    if template:
        tokenizer.chat_template = read_template(recipe, Path(template))
    if not tokenizer.chat_template:
        raise recipe.error(
            "model.pretrained_model_name_or_path",
            "the tokenizer has no chat template",
            "take a chat model, or name a .jinja file in training.chat_template_path",
        )
    require_working_template(recipe, tokenizer)
    if tokenizer.eos_token_id is None:
        raise recipe.error("model.pretrained_model_name_or_path", "the tokenizer has no end token", "take a chat model")
    if tokenizer.pad_token is None:
        # Labels are padded by position and attention is masked, so sharing the end token costs nothing
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def read_template(recipe: Recipe, file: Path) -> str:
    if not file.is_file():
        raise recipe.error("training.chat_template_path", f"no file {str(file)!r}", "give a .jinja file")
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise recipe.error("training.chat_template_path", f"{file} is not UTF-8 text", "save it as UTF-8") from error


def require_working_template(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a chat template that cannot render one question and its answer."""
    own = "training.chat_template_path" in recipe.places
    key = "training.chat_template_path" if own else "model.pretrained_model_name_or_path"
    remedy = "repair it" if own else "name a .jinja file in training.chat_template_path"
    try:
        text = tokenizer.apply_chat_template(PROBE, tokenize=False)
    except (jinja2.TemplateError, ValueError, TypeError) as error:
        raise recipe.error(key, f"the chat template cannot be rendered: {error}", remedy) from error
    if not all(message["content"] in text for message in PROBE):
        raise recipe.error(key, "the chat template leaves out what the messages say", remedy)


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 over the tokenizer's own serialisation and its chat template."""
    # Padding and truncation are call-time state that transformers leaves in the backend
    state = json.loads(tokenizer.backend_tokenizer.to_str()) | {"padding": None, "truncation": None}
    text = json.dumps([state, tokenizer.chat_template, tokenizer.bos_token, tokenizer.eos_token], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def template_kwargs(recipe: Recipe) -> dict[str, Any]:
    """Arguments of every rendering of a chat; a message's content is text, whatever control token it looks like."""
    return {"sanitize_control_tokens": True} | recipe.data.chat_template_kwargs


def role_markers(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """The chat template's role and turn markers that are plain text to the tokenizer, longest first.

    Markers that are tokens need no care here: upstream's `sanitize_control_tokens` reads them in a message as text.
    """
    tokens = {token.content for token in tokenizer.added_tokens_decoder.values()}
    return tuple(sorted(set(MARKER.findall(tokenizer.chat_template)) - tokens, key=len, reverse=True))


def defuse(text: str, markers: Sequence[str]) -> str:
    """`text` with a space behind the first character of each plain-text marker, so that it cannot open a turn."""
    for marker in markers:
        text = text.replace(marker, f"{marker[0]} {marker[1:]}")
    return text


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Id of the token with which the chat template closes an assistant's turn; None if it closes with plain text.

    Where it writes several, as Phi-3 does, it is the one right behind the answer.
    """
    end = None
    for token in reversed(tokenizer.apply_chat_template(PROBE, tokenize=True, return_dict=True)["input_ids"]):
        if not tokenizer.decode([token]).strip():
            continue
        if token not in tokenizer.added_tokens_decoder:
            break
        end = token
    return end


def generation_config(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
    """The model's generation config, stopping at the template's end of turn too, padding as the tokenizer does.

    Adapters are saved without one upstream, and several chat models name only the end of text: both never stop.
    """
    try:
        config = GenerationConfig.from_pretrained(model_path(recipe), **source(recipe))
    except OSError:
        config = GenerationConfig.from_model_config(loading(recipe, "config", AutoConfig.from_pretrained))
    known = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    stops = {token for token in (*known, tokenizer.eos_token_id, end_of_turn(tokenizer)) if token is not None}
    sampling = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    config.update(**sampling)
    config.update(eos_token_id=sorted(stops), pad_token_id=tokenizer.pad_token_id, **recipe.evaluation.generate)
    config.update(max_new_tokens=recipe.evaluation.max_new_tokens, max_length=None)
    return config


def quantization_config(recipe: Recipe, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """bitsandbytes' config; computes in the machine's dtype unless the recipe writes another."""
    if recipe.quantization is None:
        return None
    compute = {"bnb_4bit_compute_dtype": dtype} if recipe.quantization.get("load_in_4bit") else {}
    return BitsAndBytesConfig(**(compute | recipe.quantization))


def lora_config(recipe: Recipe) -> LoraConfig | None:
    """peft's config; None for full fine-tuning."""
    return None if recipe.lora is None else LoraConfig(task_type="CAUSAL_LM", **recipe.lora)


def load_base(recipe: Recipe, dtype: torch.dtype, device: str | None = None) -> PreTrainedModel:
    """The base model's weights, safetensors only, quantized if the recipe says so; on `device`, or by upstream's rules."""
    written = ("attn_implementation", "variant", "use_kernels")
    kwargs = {key: recipe.model[key] for key in written if key in recipe.model}
    kwargs |= {"dtype": dtype, "use_safetensors": True, "quantization_config": quantization_config(recipe, dtype)}
    kwargs |= {"device_map": {"": device}} if device else {}
    try:
        model = loading(recipe, "safetensors weights", AutoModelForCausalLM.from_pretrained, **kwargs)
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


def base_identity(recipe: Recipe) -> dict[str, str]:
    """What pins the base model: the hub's commit, or the sha256 of each file of a local folder."""
    path = model_path(recipe)
    if not Path(path).is_dir():
        config = loading(recipe, "config", AutoConfig.from_pretrained)
        return {"hub": path, "commit": str(config._commit_hash)}
    names = sorted(p for p in Path(path).iterdir() if p.suffix in IDENTIFYING)
    return {file.name: file_sha256(file) for file in names}


def file_sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


# Not inference_mode: FSDP2 keeps the buffers that it gathers weights in, and training could not write into them
@torch.no_grad()
def answer(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[dict[str, str]]],
    config: GenerationConfig,
    template: dict[str, Any],
    batch_size: int = 8,
) -> Iterator[dict[str, Any]]:
    """Answer each prompt (a list of chat messages): yields `text`, `tokens`, and `stopped` (ended by itself).

    Prompts go through the chat template as in training (`template`: see template_kwargs), left-padded in batches.
    """
    was_training = model.training
    stops = set(config.eos_token_id)
    model.eval()
    try:
        for start in range(0, len(prompts), batch_size):
            batch = tokenizer.apply_chat_template(
                list(prompts[start : start + batch_size]),
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                padding=True,
                tokenizer_kwargs={"padding_side": "left"},
                **template,
            ).to(model.device)
            output = model.generate(**batch, generation_config=config, tokenizer=tokenizer)
            for ids in output[:, batch["input_ids"].shape[1] :].tolist():
                ends = [place for place, token in enumerate(ids) if token in stops]
                kept = ids[: ends[0]] if ends else ids
                text = tokenizer.decode(kept, skip_special_tokens=True).strip()
                yield {"text": text, "tokens": len(kept), "stopped": bool(ends)}
    finally:
        model.train(was_training)


def prompt_messages(question: str, system: str | None, markers: Sequence[str]) -> list[dict[str, str]]:
    """The prompt of one question, exactly as training rows have it."""
    user = [{"role": "user", "content": defuse(question, markers)}]
    return ([{"role": "system", "content": system}] if system else []) + user


def convert_gguf(file: Path, folder: Path) -> None:
    """Turn a GGUF file into a plain model folder (bfloat16 safetensors, tokenizer, template), whole or not at all.

    A README.md there says the licence that the file states: a model card of what is trained from it repeats it.
    """
    from gguf import GGUFReader
    from transformers import GgufConfig

    quiet_bars()
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


def quiet_upstream() -> None:
    """One voice: no upstream warnings that repeat what MediBot reports itself."""
    transformers.logging.set_verbosity_error()
    quiet_bars()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|trl|peft|bitsandbytes")


def quiet_bars() -> None:
    """Progress bars, the training's own among them, belong on a terminal and nowhere else."""
    if not sys.stderr.isatty():
        transformers.logging.disable_progress_bar()
