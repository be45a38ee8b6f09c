"""Merge a run's adapter into whole weights, and prove that they answer as the trained model does."""

import gc
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from rich.text import Text

from medibot.errors import RecipeError, explain_memory
from medibot.export.probe import Probe, load_whole
from medibot.model.loading import hash_file, load_base, load_tuned, silence_upstream
from medibot.model.precision import choose_precision
from medibot.recipe import Recipe, load_recipe
from medibot.run import Run, find_finished_run, locked, read_json, sync_to_disk

# What counts as the same model. Measured on SmolLM2-135M, trained on NF4 weights in float32: the dequantized merge chose
# the same in all of 512 tokens and moved no logit by more than 0.0001, the merge into the base as it came chose the same
# in 76 % and moved one by 14. In bfloat16, rounding alone costs 1 to 3 % and up to 2.9. The limits lie between.
LEAST_AGREEMENT, MOST_DIFFERENCE = 0.9, 6.0
# For memory that runs out with whole weights in it
MAIN_MEMORY = "hide the GPU (CUDA_VISIBLE_DEVICES=-1) to use main memory, or end what else uses this memory"
MODES = {"base": "the base as it came", "dequantized": "the base as it was trained on"}


@dataclass(frozen=True)
class Merge:
    """A folder of whole weights; `proof` is what merge.json says, None for a full fine-tune, which needs no merge."""

    folder: Path
    proof: dict[str, Any] | None
    made_now: bool

    def __rich__(self) -> Text | str:
        """Return the verdict, and what was measured."""
        proof = self.proof
        if proof is None:
            return f"nothing to merge: a full fine-tune, its weights in {self.folder} are whole"
        if not self.made_now:
            return f"merged already: {self.folder}"
        lines = ["compared with base and adapter on {tokens} tokens of {questions} questions ({asked})".format(**proof)]
        for mode, found in proof["modes"].items():
            figures = "same greedy token {greedy_agreement:.1%}, largest logit difference {max_logit_difference:.4f}, "
            figures = (figures + "{mean_kl:.2e} nats a token").format(**found)
            lines.append(f"merged into {MODES[mode]}{' (kept)' if mode == proof['kept'] else ''}: {figures}")
        written = f"written: {self.folder} ({proof['dtype']}; tokenizer, template and generation config are the run's)"
        return Text("\n".join([*lines, written]), no_wrap=True, overflow="ignore")


@explain_memory("merge", MAIN_MEMORY)
def merge(name: str) -> Merge:
    """Write outputs/<name>/merged/: the whole weights that are nearest to the trained model.

    An adapter that was trained on 4-bit weights fits them, not the weights that the base came with. Which base the
    merge should start from depends on the model, so both are tried. Raises RecipeError, and leaves nothing, where even
    the nearest chooses another token more than once in ten times, or moves a logit by 6.
    """
    run = find_finished_run(name)
    recipe = load_recipe(str(run.recipe))
    if recipe.lora is None:
        return Merge(run.weights, None, made_now=False)
    silence_upstream()
    with locked(run):
        adapter, written = hash_file(run.weights / "adapter_model.safetensors"), run.merged / "merge.json"
        if written.is_file() and read_json(written)["adapter"] == adapter:
            return Merge(run.merged, read_json(written), made_now=False)
        dtype = choose_precision(recipe.model.get("dtype")).dtype
        probe = Probe(load_tuned(recipe, run.weights, dtype), recipe, run.weights)
        modes = MODES if recipe.quantization else ["base"]
        folders = {mode: run.folder / f".merged-{mode}.partial" for mode in modes}
        measured = {mode: try_merge(run, recipe, dtype, probe, mode, folder) for mode, folder in folders.items()}
        kept = min(measured, key=lambda mode: measured[mode]["mean_kl"])
        found = measured[kept]
        if found["greedy_agreement"] < LEAST_AGREEMENT or found["max_logit_difference"] > MOST_DIFFERENCE:
            what = "the nearest merge ({}) chooses the trained model's token in {greedy_agreement:.1%} only, and moves "
            what = (what + "logits by up to {max_logit_difference:.2f}").format(kept, **found)
            allowed = f"at least {LEAST_AGREEMENT:.0%} and at most {MOST_DIFFERENCE} are required"
            raise RecipeError.of(f"outputs/{name}", what, f"{allowed}: use the adapter as it is, on its own base")
        proof = {"kept": kept, **probe.about, "dtype": str(dtype).removeprefix("torch."), "modes": measured}
        Run(folders[kept]).write("merge.json", proof | {"adapter": adapter})
        sync_to_disk(folders[kept])
        shutil.rmtree(run.merged, ignore_errors=True)
        folders[kept].rename(run.merged)
    return Merge(run.merged, proof, made_now=True)


def try_merge(run: Run, recipe: Recipe, dtype: torch.dtype, probe: Probe, mode: str, folder: Path) -> dict[str, float]:
    """Write base and adapter as one model, with the run's tokenizer; return how far it is from the trained model.

    "base" adds the adapter to the weights that the base model came with, "dequantized" to what 4-bit or 8-bit storage
    left of them, which is what the adapter was trained on.
    """
    # The model before this one may be held by a cycle
    gc.collect()
    if mode == "base":
        base = load_base(replace(recipe, quantization=None), dtype)
    else:
        base = load_base(recipe, dtype, device="cpu").dequantize(dtype)
    shutil.rmtree(folder, ignore_errors=True)
    PeftModel.from_pretrained(base, run.weights).merge_and_unload(safe_merge=True).save_pretrained(folder)
    left = shutil.ignore_patterns("adapter_*", "README.md", "training_args.bin")
    shutil.copytree(run.weights, folder, ignore=left, dirs_exist_ok=True)
    del base
    gc.collect()
    # What is proven is what was saved, read back as any program would
    return probe.compare(load_whole(folder, dtype=dtype, use_safetensors=True))
