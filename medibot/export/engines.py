"""Give the lines by which other programs serve a run as it was trained."""

import json
import shlex

from medibot.recipe import Recipe
from medibot.run import Run

# The ranks that vLLM knows (vllm/config/lora.py); without the flag it takes adapters up to 16
RANKS = (16, 32, 64, 128, 256, 320, 512)


def serving_lines(run: Run, recipe: Recipe) -> dict[str, str]:
    """Return a shell line for each program; where it takes whole weights or a GGUF file, the line makes them first."""
    name, whole = run.name, recipe.lora is None
    merge, gguf = "" if whole else f"make merge RUN={name} && ", f"make export-gguf RUN={name} && "
    folder = shlex.quote(str(run.weights if whole else run.merged))
    mount = f'-v "$(realpath {folder}):/model"'
    kwargs, image = recipe.data.chat_template_kwargs, "ghcr.io/huggingface/text-generation-inference --model-id /model"
    # llama.cpp gives templates an enable_thinking of its own, before which a default stands back
    thinking = f" --chat-template-kwargs {shlex.quote(json.dumps(kwargs))}" if kwargs else ""
    return {
        "vLLM": adapter_line(run, recipe) or f"{merge}vllm serve {folder} --host 127.0.0.1 --served-model-name {name}",
        "TGI": f"{merge}docker run --gpus all --shm-size 1g -p 127.0.0.1:8080:80 {mount} {image}",
        "llama.cpp": f"{gguf}llama-server -m {shlex.quote(str(run.gguf / f'{name}.gguf'))} --jinja{thinking}",
        "Ollama": f"{gguf}ollama create {name} -f {shlex.quote(str(run.gguf / 'Modelfile'))}",
    }


def adapter_line(run: Run, recipe: Recipe) -> str | None:
    """Return vLLM's line for base and adapter; None for what it refuses in an adapter, and for 8-bit bases."""
    lora, bits = recipe.lora, recipe.quantization or {}
    refused = ("use_dora", "modules_to_save", "trainable_token_indices", "target_parameters")
    if lora is None or any(lora.get(key) for key in refused) or lora.get("bias", "none") != "none":
        return None
    rank = max([lora.get("r", 8), *(lora.get("rank_pattern") or {}).values()])
    if rank > RANKS[-1] or (bits and bits.get("bnb_4bit_quant_type") != "nf4"):
        return None
    weights, base = shlex.quote(str(run.weights)), shlex.quote(recipe.model["pretrained_model_name_or_path"])
    parts = [f"vllm serve {base} --host 127.0.0.1"]
    if revision := recipe.model.get("revision"):
        parts.append(f"--revision {shlex.quote(revision)}")
    if bits:
        # The adapter was trained on 4-bit weights and fits them
        parts.append("--quantization bitsandbytes")
    parts.append(f"--enable-lora --lora-modules {run.name}={weights}")
    if rank > RANKS[0]:
        parts.append(f"--max-lora-rank {next(known for known in RANKS if known >= rank)}")
    # Of an adapter's folder vLLM reads the weights alone
    parts.append(f"--chat-template {weights}/chat_template.jinja --generation-config {weights}")
    return " ".join(parts)
