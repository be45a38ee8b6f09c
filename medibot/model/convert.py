"""Turn a GGUF file into a model folder that recipes can name."""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, logging

from medibot.errors import RecipeError, explain_memory


@explain_memory("model", "end what else uses this memory")
def convert_gguf(file: Path, folder: Path) -> None:
    """Write a GGUF file as a plain model folder (bfloat16 safetensors, tokenizer, template), whole or not at all.

    Its README.md repeats the licence that the file states, for the model cards of what is trained from it.
    """
    from gguf import GGUFReader

    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    if not file.is_file():
        raise RecipeError.of("model", f"GGUF file {file} not found", "run: make model")
    if folder.exists():
        raise RecipeError.of("model", f"{folder} is there already", "delete it, or name another folder")
    partial, gguf = folder.with_name(f".{folder.name}.partial"), {"gguf_file": file.name}
    plain = {"quantization_config": GgufConfig(dequantize=True), "dtype": torch.bfloat16}
    AutoModelForCausalLM.from_pretrained(file.parent, **gguf, **plain).save_pretrained(partial)
    AutoTokenizer.from_pretrained(file.parent, **gguf).save_pretrained(partial)
    if licence := GGUFReader(file).fields.get("general.license"):
        text = f"---\nlicense: {licence.contents()}\n---\n\nMade from {file.name} by `medibot convert-gguf`.\n"
        (partial / "README.md").write_text(text, encoding="utf-8")
    partial.rename(folder)
