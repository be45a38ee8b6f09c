"""Merge a run's adapter into whole weights, and prove that they answer as the trained model does."""

import dataclasses
import gc
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from rich.console import Group
from rich.table import Table
from rich.text import Text
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from medibot.errors import RecipeError
from medibot.export.probe import Probe, make_probe
from medibot.model.loading import hash_file, load_base, load_tuned, silence_upstream
from medibot.model.precision import choose_precision
from medibot.recipe import Recipe, load_recipe
from medibot.run import Run, find_finished_run, locked, read_json, removed_on_failure, sync_to_disk

# What counts as the same model; require_faithful says why
LEAST_AGREEMENT, MOST_DIFFERENCE = 0.9, 6.0
MODES = {"base": "the base as it came", "dequantized": "the base as it was trained on"}
# The adapter's own files stay behind; everything else in the run's model folder is copied byte by byte
NOT_COPIED = ("adapter_", "README.md", "training_args.bin")


@dataclass(frozen=True)
class Merge:
    """A folder of whole weights; `proof` is what merge.json says, None for a full fine-tune, which needs no merge."""

    run: str
    folder: Path
    proof: dict[str, Any] | None
    made_now: bool

    def __rich__(self) -> Group | str:
        """Return the verdict, and the measurements as a table."""
        if self.proof is None:
            return f"nothing to merge: {self.run} is a full fine-tune, its weights in {self.folder} are whole"
        if not self.made_now:
            return f"{self.run} is merged already: {self.folder}"
        proof = self.proof
        table = Table("merged into", "same greedy token", "largest logit difference", "nats a token")
        for mode, found in proof["modes"].items():
            kept = " (kept)" if mode == proof["kept"] else ""
            figures = (f"{found['max_logit_difference']:.4f}", f"{found['mean_kl']:.2e}")
            table.add_row(MODES[mode] + kept, f"{found['greedy_agreement']:.1%}", *figures)
        asked = f"compared with base and adapter on {proof['tokens']} tokens of {proof['questions']} questions"
        written = f"written: {self.folder} ({proof['dtype']}; tokenizer, template and generation config are the run's)"
        return Group(table, f"{asked} ({proof['asked']})", Text(written, no_wrap=True, overflow="ignore"))


def merge(name: str) -> Merge:
    """Write outputs/<name>/merged/: the whole weights that are nearest to the trained model.

    Raises RecipeError, and leaves nothing, where even those are further from it than `require_faithful` allows.
    """
    run = find_finished_run(name)
    recipe = load_recipe(str(run.recipe))
    if recipe.lora is None:
        return Merge(name, run.weights, None, made_now=False)
    silence_upstream()
    with locked(run, True), removed_on_failure(run):
        adapter = hash_file(run.weights / "adapter_model.safetensors")
        if is_merged(run, adapter):
            return Merge(name, run.merged, read_json(run.merged / "merge.json"), made_now=False)
        dtype = choose_precision(recipe.model.get("dtype")).dtype
        # The model as it was trained: quantized base and adapter
        trained, tokenizer = load_tuned(recipe, run.weights, dtype), AutoTokenizer.from_pretrained(run.weights)
        probe = make_probe(trained, recipe, tokenizer, GenerationConfig.from_pretrained(run.weights))
        del trained
        # An adapter that was trained on 4-bit weights fits them, not the weights that the base came with. Which base
        # the merge should start from depends on the model, so both are tried.
        folders = {
            mode: run.folder / f".merged-{mode}.partial" for mode in (MODES if recipe.quantization else ["base"])
        }
        measured = {mode: write_merge(run, recipe, mode, folder, probe, dtype) for mode, folder in folders.items()}
        kept = min(measured, key=lambda mode: measured[mode]["mean_kl"])
        require_faithful(run, kept, measured[kept])
        proof = {"kept": kept, **probe.as_dict(), "dtype": str(dtype).removeprefix("torch."), "modes": measured}
        Run(folders[kept]).write("merge.json", proof | {"adapter": adapter})
        sync_to_disk(folders[kept])
        shutil.rmtree(run.merged, ignore_errors=True)
        folders[kept].rename(run.merged)
    return Merge(name, run.merged, proof, made_now=True)


def is_merged(run: Run, adapter: str) -> bool:
    """Tell whether merged/ was made from the adapter with this hash."""
    proof = run.merged / "merge.json"
    return proof.is_file() and read_json(proof)["adapter"] == adapter


def write_merge(
    run: Run, recipe: Recipe, mode: str, folder: Path, probe: Probe, dtype: torch.dtype
) -> dict[str, float]:
    """Write base and adapter as one model, in the training's precision; return how far it is from the trained one.

    "base" adds the adapter to the weights that the base model came with, "dequantized" to what 4-bit or 8-bit storage
    left of them, which is what the adapter was trained on.
    """
    gc.collect()
    shutil.rmtree(folder, ignore_errors=True)
    if mode == "base":
        base = load_base(dataclasses.replace(recipe, quantization=None), dtype)
    else:
        base = load_base(recipe, dtype, device="cpu").dequantize(dtype)
    PeftModel.from_pretrained(base, run.weights).merge_and_unload(safe_merge=True).save_pretrained(folder)
    del base
    gc.collect()
    # Tokenizer, chat template and generation config are the run's, over what upstream wrote
    for file in run.weights.iterdir():
        if not file.name.startswith(NOT_COPIED):
            shutil.copyfile(file, folder / file.name)
    # What is proven is what was saved, read back as any program would
    device = {"device_map": "auto"} if torch.cuda.is_available() else {}
    return probe.distance(AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, use_safetensors=True, **device))


def require_faithful(run: Run, mode: str, found: dict[str, float]) -> None:
    """Raise RecipeError for a merge that chooses another token more than once in ten times, or moves a logit by 6.

    Measured on SmolLM2-135M (logits from -31 to 41). Trained on NF4 weights in float32, the dequantized merge chose the
    same in all of 512 tokens and moved no logit by more than 0.0001; the merge into the base as it came chose the same
    in 76 %, and moved one by 14, where the training itself had moved 11 % of the tokens. In bfloat16 rounding alone, of
    weights and of activations, costs 1 to 3 % and up to 2.9. The limits lie between.
    """
    if found["greedy_agreement"] < LEAST_AGREEMENT or found["max_logit_difference"] > MOST_DIFFERENCE:
        what = f"the nearest merge ({mode}) chooses the trained model's token in {found['greedy_agreement']:.1%} only, "
        what += f"and moves logits by up to {found['max_logit_difference']:.2f}"
        allowed = f"at least {LEAST_AGREEMENT:.0%} and at most {MOST_DIFFERENCE} are required"
        raise RecipeError.of(f"outputs/{run.name}", what, f"{allowed}: use the adapter as it is, on its own base")
