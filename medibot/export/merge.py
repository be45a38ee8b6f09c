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
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel

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
        probe = probe_trained(run, recipe, dtype)
        kept, measured = keep_nearest(run, recipe, probe, dtype)
        require_faithful(run, kept, measured[kept])
        proof = {"kept": kept, **probe.as_dict(), "dtype": str(dtype).removeprefix("torch."), "modes": measured}
        folder = candidate_folder(run, kept)
        Run(folder).write("merge.json", proof | {"adapter": adapter})
        sync_to_disk(folder)
        shutil.rmtree(run.merged, ignore_errors=True)
        folder.rename(run.merged)
    return Merge(name, run.merged, proof, made_now=True)


def is_merged(run: Run, adapter: str) -> bool:
    """Tell whether merged/ was made from the adapter with this hash."""
    proof = run.merged / "merge.json"
    return proof.is_file() and read_json(proof)["adapter"] == adapter


def candidate_folder(run: Run, mode: str) -> Path:
    """Return where the weights of one way to merge are written before one of them is kept."""
    return run.folder / f".merged-{mode}.partial"


def probe_trained(run: Run, recipe: Recipe, dtype: torch.dtype) -> Probe:
    """Ask the model as it was trained: quantized base and adapter."""
    trained = load_tuned(recipe, run.weights, dtype)
    tokenizer = AutoTokenizer.from_pretrained(run.weights)
    probe = make_probe(trained, recipe, tokenizer, GenerationConfig.from_pretrained(run.weights))
    del trained
    gc.collect()
    return probe


def keep_nearest(run: Run, recipe: Recipe, probe: Probe, dtype: torch.dtype) -> tuple[str, dict[str, dict[str, float]]]:
    """Write each way to merge, measure it, and keep the nearest; return (its mode, what each mode measured).

    An adapter that was trained on 4-bit weights fits them, not the weights that the base came with. Which base the
    merge should start from depends on the model, so both are tried.
    """
    kept, measured = "", {}
    for mode in MODES if recipe.quantization else ("base",):
        folder = candidate_folder(run, mode)
        shutil.rmtree(folder, ignore_errors=True)
        merge_weights(recipe, run, dtype, mode).save_pretrained(folder)
        copy_tokenizer(run.weights, folder)
        gc.collect()
        # What is proven is what was saved, read back as any program would
        device = {"device_map": "auto"} if torch.cuda.is_available() else {}
        saved = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, use_safetensors=True, **device).eval()
        measured[mode] = probe.distance(saved)
        del saved
        gc.collect()
        if kept and measured[kept]["mean_kl"] <= measured[mode]["mean_kl"]:
            shutil.rmtree(folder)
            continue
        if kept:
            shutil.rmtree(candidate_folder(run, kept))
        kept = mode
    return kept, measured


def merge_weights(recipe: Recipe, run: Run, dtype: torch.dtype, mode: str) -> PreTrainedModel:
    """Return base and adapter as one model, on the CPU, in the training's precision.

    "base" adds the adapter to the weights that the base model came with, "dequantized" to what 4-bit or 8-bit storage
    left of them, which is what the adapter was trained on.
    """
    if mode == "base":
        base = load_base(dataclasses.replace(recipe, quantization=None), dtype)
    else:
        base = load_base(recipe, dtype, device="cpu").dequantize(dtype)
    return PeftModel.from_pretrained(base, run.weights).merge_and_unload(safe_merge=True)


def copy_tokenizer(weights: Path, folder: Path) -> None:
    """Copy tokenizer, chat template and generation config of the run, over what upstream wrote."""
    for file in weights.iterdir():
        if not file.name.startswith(NOT_COPIED):
            shutil.copyfile(file, folder / file.name)


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
