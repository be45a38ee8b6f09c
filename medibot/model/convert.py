"""Turn a GGUF file into a model folder that recipes can name."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from medibot.errors import RecipeError
from medibot.model.loading import silence_progress_bars


def convert_gguf(file: Path, folder: Path) -> None:
    """Write a GGUF file as a plain model folder (bfloat16 safetensors, tokenizer, template), whole or not at all.

    Its README.md repeats the licence that the file states, for the model cards of what is trained from it.
    """
    from gguf import GGUFReader

    silence_progress_bars()
    if not file.is_file():
        raise RecipeError.of("model", f"GGUF file {file} not found", "run: make model")
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
