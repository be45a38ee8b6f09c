"""Merge a run's adapter into whole weights, and prove on held-out questions that they answer as the trained model does.

medibot merge --run quickstart
"""

import dataclasses
import gc
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from medibot.data.prepared import prepare
from medibot.errors import RecipeError
from medibot.model.loading import hash_file, load_base, load_tuned, silence_upstream
from medibot.model.precision import choose_precision
from medibot.model.template import template_kwargs
from medibot.model.tokenizer import make_prompt, role_markers
from medibot.recipe import Recipe, load_recipe
from medibot.run import Run, find_finished_run, locked, read_json, removed_on_failure, sync_to_disk

# How much is asked: questions, and tokens of each greedy answer
QUESTIONS, TOKENS = 16, 32


# Limits of what counts as the same model; require_faithful says why
LEAST_AGREEMENT, MOST_DIFFERENCE = 0.9, 6.0


MODES = {"base": "the base as it came", "dequantized": "the base as it was trained on"}


# What a folder of weights needs beside them, and is copied byte by byte; the adapter's own files stay behind
NOT_COPIED = ("adapter_", "README.md", "training_args.bin")


@dataclass(frozen=True)
class Probe:
    """Held-out prompts with the trained model's own greedy answers (token ids), and its logits over them.

    `logits` is float32, one row for each answer token of all questions, one column for each token of the vocabulary.
    """

    asked: str
    sequences: list[tuple[list[int], list[int]]]
    logits: torch.Tensor


def merge(name: str) -> Path:
    """Write outputs/<name>/merged/, the whole weights nearest to the trained model; returns the folder.

    Refuses with a RecipeError, and leaves nothing, where even those are further from it than `require_faithful` allows.
    A full fine-tune is whole already: its own folder is returned.
    """
    this = find_finished_run(name)
    recipe = load_recipe(str(this.recipe))
    if recipe.lora is None:
        print(f"{name} is a full fine-tune: nothing to merge, its weights in {this.weights} are whole")
        return this.weights
    silence_upstream()
    with locked(this, True), removed_on_failure(this):
        adapter = {"adapter": hash_file(this.weights / "adapter_model.safetensors")}
        if is_merged(this, adapter):
            print(f"{name} is merged already: {this.merged}")
            return this.merged
        dtype = choose_precision(recipe.model.get("dtype")).dtype
        tokenizer = AutoTokenizer.from_pretrained(this.weights)
        probe = ask(this, recipe, tokenizer, dtype)
        best, measured = nearest(this, recipe, probe, dtype)
        require_faithful(this, best, measured)
        proof: dict[str, Any] = {
            "kept": best,
            "asked": probe.asked,
            "questions": len(probe.sequences),
            "tokens": len(probe.logits),
        }
        proof |= {"dtype": str(dtype).removeprefix("torch."), "modes": measured} | adapter
        Run(candidate(this, best)).write("merge.json", proof)
        sync_to_disk(candidate(this, best))
        shutil.rmtree(this.merged, ignore_errors=True)
        candidate(this, best).rename(this.merged)
    show(this, proof)
    return this.merged


def is_merged(this: Run, adapter: dict[str, str]) -> bool:
    """Whether merged/ is there and was made from this very adapter."""
    proof = this.merged / "merge.json"
    return proof.is_file() and read_json(proof)["adapter"] == adapter["adapter"]


def candidate(this: Run, mode: str) -> Path:
    return this.folder / f".merged-{mode}.partial"


def ask(this: Run, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype) -> Probe:
    """What the trained model, quantized base and adapter as in training, answers to held-out questions."""
    asked, prompts = held_out(recipe, tokenizer)
    trained = load_tuned(recipe, this.weights, dtype)
    config = GenerationConfig.from_pretrained(this.weights)
    sequences = greedy(trained, tokenizer, prompts, config, template_kwargs(recipe))
    probe = Probe(asked, sequences, logits(trained, sequences))
    del trained
    gc.collect()
    return probe


def held_out(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> tuple[str, list[list[dict[str, str]]]]:
    """(where from, prompts): of the validation split, or the recipe's fixed questions where its data cannot be had.

    The test split stays closed: which merge is kept is a choice.
    """
    try:
        rows = prepare(recipe).load("validation")
    except RecipeError as error:
        print(f"warning: the run's data cannot be read, so its fixed questions are asked instead: {error}")
        rows = None
    if rows is not None:
        chosen = rows.select(range(min(QUESTIONS, len(rows))))
        return "validation split", [row["prompt"] for row in chosen]
    markers = role_markers(tokenizer)
    questions = recipe.evaluation.questions
    if not questions:
        remedy = "bring back the data, or write evaluation.questions in the run's recipe.yaml"
        raise RecipeError.of("merge", "no validation split and no fixed question to prove a merge on", remedy)
    return "fixed questions", [make_prompt(text, recipe.data.system, markers) for text in questions]


@torch.inference_mode()
def greedy(
    weights: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[dict[str, str]]],
    config: GenerationConfig,
    template: dict[str, Any],
) -> list[tuple[list[int], list[int]]]:
    """(prompt, answer) of each prompt as token ids: up to TOKENS of the most likely ones, a stop token included."""
    kwargs = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    batch = tokenizer.apply_chat_template(
        prompts, padding=True, tokenizer_kwargs={"padding_side": "left"}, **kwargs, **template
    ).to(weights.device)
    plain = GenerationConfig(
        do_sample=False,
        max_new_tokens=TOKENS,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
    )
    output = weights.generate(**batch, generation_config=plain)
    sequences = []
    for ids, mask, answer in zip(
        batch["input_ids"], batch["attention_mask"], output[:, batch["input_ids"].shape[1] :].tolist(), strict=True
    ):
        ends = [place for place, token in enumerate(answer) if token in config.eos_token_id]
        sequences.append((ids[mask.bool()].tolist(), answer[: ends[0] + 1] if ends else answer))
    return sequences


@torch.inference_mode()
def logits(weights: PreTrainedModel, sequences: list[tuple[list[int], list[int]]]) -> torch.Tensor:
    """The logits behind every answer token, [tokens, vocabulary], float32; unpadded, so that no batch changes them."""
    rows = []
    for prompt, answer in sequences:
        ids = torch.tensor([prompt + answer], device=weights.device)
        found = weights(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
        rows.append(found.float().cpu())
    return torch.cat(rows)


def nearest(
    this: Run, recipe: Recipe, probe: Probe, dtype: torch.dtype
) -> tuple[str, dict[str, dict[str, float | int]]]:
    """(the mode whose saved weights are nearest to the trained model, what each mode measured)."""
    best, measured = "", {}
    for mode in MODES if recipe.quantization else ("base",):
        folder = candidate(this, mode)
        shutil.rmtree(folder, ignore_errors=True)
        merged_weights(recipe, this, dtype, mode).save_pretrained(folder)
        copy_rest(this.weights, folder)
        gc.collect()
        # What is proven is what was saved, read back as any program would
        device = {"device_map": "auto"} if torch.cuda.is_available() else {}
        saved = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, use_safetensors=True, **device).eval()
        measured[mode] = distance(probe.logits, logits(saved, probe.sequences))
        del saved
        gc.collect()
        worse = best and measured[best]["mean_kl"] <= measured[mode]["mean_kl"]
        if worse or best:
            shutil.rmtree(folder if worse else candidate(this, best))
        best = best if worse else mode
    return best, measured


def merged_weights(recipe: Recipe, this: Run, dtype: torch.dtype, mode: str) -> PreTrainedModel:
    """Base and adapter as one, on the CPU, in the precision of the training.

    "base" adds the adapter to the weights that the base model came with, "dequantized" to what 4-bit or 8-bit storage
    left of them, which is what the adapter was trained on.
    """
    if mode == "base":
        base = load_base(dataclasses.replace(recipe, quantization=None), dtype)
    else:
        base = load_base(recipe, dtype, device="cpu").dequantize(dtype)
    return PeftModel.from_pretrained(base, this.weights).merge_and_unload(safe_merge=True)


def copy_rest(weights: Path, folder: Path) -> None:
    """Tokenizer, chat template and generation config of the run: the same bytes, whatever upstream wrote there."""
    for file in weights.iterdir():
        if not file.name.startswith(NOT_COPIED):
            shutil.copyfile(file, folder / file.name)


def distance(trained: torch.Tensor, other: torch.Tensor) -> dict[str, float | int]:
    """How far `other` is from the trained model, both logits [tokens, vocabulary] over the trained model's answers.

    `greedy_agreement` is the share of tokens for which both choose the same, `max_logit_difference` the largest of all,
    `mean_kl` the Kullback-Leibler divergence in nats a token.
    """
    divergence = torch.nn.functional.kl_div(
        other.log_softmax(-1), trained.log_softmax(-1), log_target=True, reduction="batchmean"
    )
    return {
        "greedy_agreement": (trained.argmax(-1) == other.argmax(-1)).float().mean().item(),
        "max_logit_difference": (trained - other).abs().max().item(),
        "mean_kl": divergence.item(),
    }


def require_faithful(this: Run, best: str, measured: dict[str, dict[str, float | int]]) -> None:
    """Refuse a merge that chooses another token more than once in ten times, or moves a logit by more than 6.

    Measured on SmolLM2-135M (logits from -31 to 41). Trained on NF4 weights in float32, the dequantized merge chose the
    same in all of 512 tokens and moved no logit by more than 0.0001; the merge into the base as it came chose the same
    in 76 %, and moved one by 14, where the training itself had moved 11 % of the tokens. In bfloat16 rounding alone, of
    weights and of activations, costs 1 to 3 % and up to 2.9. The limits lie between.
    """
    found = measured[best]
    if found["greedy_agreement"] < LEAST_AGREEMENT or found["max_logit_difference"] > MOST_DIFFERENCE:
        what = f"the nearest merge ({best}) answers like the trained model in {found['greedy_agreement']:.1%} of the "
        what += f"tokens only, and moves logits by up to {found['max_logit_difference']:.2f}"
        allowed = f"at least {LEAST_AGREEMENT:.0%} and at most {MOST_DIFFERENCE} are asked for"
        raise RecipeError.of(f"outputs/{this.name}", what, f"{allowed}: use the adapter as it is, on the base it knows")


def show(this: Run, proof: dict[str, Any]) -> None:
    """The measurements as a table, and what was kept."""
    from rich.console import Console
    from rich.table import Table

    table = Table("merged into", "same greedy token", "largest logit difference", "nats a token")
    for mode, found in proof["modes"].items():
        kept = " (kept)" if mode == proof["kept"] else ""
        figures = (f"{found['max_logit_difference']:.4f}", f"{found['mean_kl']:.2e}")
        table.add_row(MODES[mode] + kept, f"{found['greedy_agreement']:.1%}", *figures)
    Console(markup=False, highlight=False).print(table)
    print(f"against base and adapter on {proof['tokens']} tokens of {proof['questions']} questions ({proof['asked']})")
    print(
        f"written: {this.merged} ({proof['dtype']}; tokenizer, template and generation config are the run's own bytes)"
    )
