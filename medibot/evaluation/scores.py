"""TODO."""

import contextlib
import gc
import hashlib
import importlib.metadata
import json
import math
import sys
from collections.abc import Callable, Generator
from functools import cache
from typing import Any

import torch
from filelock import FileLock
from peft import PeftModel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from medibot.data.prepared import cache_folder
from medibot.errors import RecipeError
from medibot.evaluation.questions import Questions
from medibot.model.generation import generate_answers
from medibot.model.loading import hash_file, identify_base, load_base, load_tuned
from medibot.model.template import template_kwargs
from medibot.model.tokenizer import tokenizer_fingerprint
from medibot.recipe import Recipe
from medibot.run import Run, read_lines

# Padded tokens in one forward pass: their logits are held in memory at once
TOKENS_A_BATCH = 2048


def loaders(
    recipe: Recipe, this: Run, dtype: torch.dtype
) -> dict[str, Callable[[], contextlib.AbstractContextManager[PreTrainedModel]]]:
    """How to get each model, base first; an adapter's base is the same load with the adapter off."""

    @cache
    def load_once() -> PreTrainedModel | PeftModel:
        return load_tuned(recipe, this.weights, dtype)

    @contextlib.contextmanager
    def base() -> Generator[PreTrainedModel]:
        if recipe.lora:
            with load_once().disable_adapter():
                yield load_once()
        else:
            yield load_base(recipe, dtype).to("cuda" if torch.cuda.is_available() else "cpu").eval()
            gc.collect()

    @contextlib.contextmanager
    def tuned() -> Generator[PreTrainedModel]:
        yield load_once()

    return {"base": base, "tuned": tuned}


def score_key(
    recipe: Recipe,
    this: Run,
    questions: Questions,
    tokenizer: PreTrainedTokenizerBase,
    config: GenerationConfig,
    which: str,
    precision: str,
) -> str:
    """sha256 of everything that decides a model's scores: with the same key they are not computed again."""
    packages = ("torch", "transformers", "peft", "bitsandbytes")
    parts = [
        questions.fingerprint,
        tokenizer_fingerprint(tokenizer),
        template_kwargs(recipe),
        config.to_dict(),
        identify_base(recipe),
        recipe.quantization,
        precision,
        batch_size(recipe),
        [importlib.metadata.version(name) for name in packages],
        {f.name: hash_file(f) for f in sorted(this.weights.glob("*.safetensors"))} if which == "tuned" else {},
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def batch_size(recipe: Recipe) -> int:
    return recipe.training.get("per_device_eval_batch_size", 8)


def scored(
    key: str,
    which: str,
    load: Callable[[], contextlib.AbstractContextManager[PreTrainedModel]],
    recipe: Recipe,
    questions: Questions,
    tokenizer: PreTrainedTokenizerBase,
    config: GenerationConfig,
) -> list[dict[str, Any]]:
    """Likelihood and answer of each row, in order; kept batch by batch under `key`, and gone on with from there."""
    folder = Run(cache_folder().with_name("scores"))
    folder.folder.mkdir(parents=True, exist_ok=True)
    file = folder.folder / f"{key[:32]}.jsonl"
    with FileLock(file.with_suffix(".lock")):
        done = {tuple(line["batch"]): line["scores"] for line in read_lines(file)}
        # A line that a killed evaluation never finished must not be continued
        folder.write(file.name, "".join(dumped(batch, scores) + "\n" for batch, scores in done.items()).rstrip("\n"))
        work = batches(questions, batch_size(recipe))
        left = [batch for batch in work if batch not in done]
        if len(left) < len(work):
            print(f"{which}: {len(work) - len(left)} of {len(work)} batches are known already")
        if left:
            template = template_kwargs(recipe)
            columns = (which, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            with load() as weights, Progress(*columns, disable=not sys.stdout.isatty()) as bar:
                for batch in bar.track(left):
                    places = list(batch[1:])
                    if batch[0] == "likelihood":
                        scores = likelihood(weights, questions.tokens.select(places).to_list())
                    else:
                        prompts = [questions.rows[place]["prompt"] for place in places]
                        given = generate_answers(weights, tokenizer, prompts, config, template, len(prompts))
                        scores = [
                            {"text": a["text"], "answer_tokens": a["tokens"], "stopped": a["stopped"]} for a in given
                        ]
                    done[batch] = scores
                    with file.open("a", encoding="utf-8") as stream:
                        stream.write(dumped(batch, scores) + "\n")
                    if bar.disable and (len(work) - len(done)) % max(1, len(work) // 10) == 0:
                        print(f"{which}: {len(done)} of {len(work)} batches", flush=True)
    rows: list[dict[str, Any]] = [{} for _ in questions.rows]
    for batch in work:
        for place, score in zip(batch[1:], done[batch], strict=True):
            rows[place] |= score
    return rows


def dumped(batch: tuple[Any, ...], scores: list[dict[str, Any]]) -> str:
    return json.dumps({"batch": batch, "scores": scores}, ensure_ascii=False)


def batches(questions: Questions, most: int) -> list[tuple[Any, ...]]:
    """("likelihood" | "answer", places of rows…): rows of like length together, the longest first so that memory fails early."""
    lengths = [len(row["input_ids"]) for row in questions.tokens]
    prompts = [sum(label == -100 for label in row["labels"]) for row in questions.tokens]
    work: list[tuple[Any, ...]] = []
    order = sorted(range(len(lengths)), key=lambda place: (-lengths[place], place))
    while order:
        size = max(1, min(most, TOKENS_A_BATCH // lengths[order[0]]))
        work.append(("likelihood", *order[:size]))
        order = order[size:]
    order = sorted(range(len(lengths)), key=lambda place: (-prompts[place], place))
    return work + [("answer", *order[start : start + most]) for start in range(0, len(order), most)]


@torch.inference_mode()
def likelihood(weights: PreTrainedModel, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each row of `input_ids` and `labels`: `nll` (nats, summed over its labels), `tokens`, `correct` (argmax)."""
    width = max(len(row["input_ids"]) for row in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for place, row in enumerate(rows):
        ids[place, : len(row["input_ids"])] = torch.tensor(row["input_ids"])
        mask[place, : len(row["input_ids"])] = 1
    logits = weights(input_ids=ids.to(weights.device), attention_mask=mask.to(weights.device), use_cache=False).logits
    scores = []
    for place, row in enumerate(rows):
        labels = torch.tensor(row["labels"][1:], device=logits.device)
        kept = labels != -100
        predicted = logits[place, : len(labels)][kept].float()
        nll = torch.nn.functional.cross_entropy(predicted, labels[kept], reduction="sum").item()
        if not math.isfinite(nll):
            raise RecipeError.of(
                "eval", f"the likelihood of an answer is {nll}", "the weights are damaged: train again"
            )
        correct = int((predicted.argmax(-1) == labels[kept]).sum())
        scores.append({"nll": nll, "tokens": int(kept.sum()), "correct": correct})
    return scores
