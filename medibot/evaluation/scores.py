"""Score base and tuned model on the same questions, batch by batch, kept and gone on with after a kill."""

import contextlib
import gc
import hashlib
import importlib.metadata
import json
import math
import sys
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
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
from medibot.model.precision import Precision
from medibot.model.template import template_kwargs
from medibot.model.tokenizer import tokenizer_fingerprint
from medibot.recipe import Recipe
from medibot.run import Run, read_lines

# Padded tokens in one forward pass: their logits are held in memory at once
TOKENS_A_BATCH = 2048
# ("likelihood" | "answer", places of rows…)
Batch = tuple[Any, ...]


def loaders(
    recipe: Recipe, run: Run, dtype: torch.dtype
) -> dict[str, Callable[[], contextlib.AbstractContextManager[PreTrainedModel]]]:
    """Return how to get each model, base first; an adapter's base is the same load with the adapter off."""

    @cache
    def load_once() -> PreTrainedModel | PeftModel:
        return load_tuned(recipe, run.weights, dtype)

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


@dataclass(frozen=True)
class Scorer:
    """What decides a model's scores: with the same key they are not computed again."""

    recipe: Recipe
    run: Run
    questions: Questions
    tokenizer: PreTrainedTokenizerBase
    config: GenerationConfig
    precision: Precision

    def key(self, which: str) -> str:
        """Return a sha256 of questions, tokenizer, template, decoding, base, precision, versions, and tuned weights."""
        packages = ("torch", "transformers", "peft", "bitsandbytes")
        adapter = sorted(self.run.weights.glob("*.safetensors")) if which == "tuned" else []
        parts = [
            self.questions.fingerprint,
            tokenizer_fingerprint(self.tokenizer),
            template_kwargs(self.recipe),
            self.config.to_dict(),
            identify_base(self.recipe),
            self.recipe.quantization,
            self.precision.name,
            batch_size(self.recipe),
            [importlib.metadata.version(name) for name in packages],
            {file.name: hash_file(file) for file in adapter},
        ]
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()

    def score(self, which: str, load: Callable[[], Any]) -> list[dict[str, Any]]:
        """Return likelihood and answer of each row, in order; each batch is kept on the disk as it is done."""
        folder = Run(cache_folder().with_name("scores"))
        folder.folder.mkdir(parents=True, exist_ok=True)
        file = folder.folder / f"{self.key(which)[:32]}.jsonl"
        with FileLock(file.with_suffix(".lock")):
            done = {tuple(line["batch"]): line["scores"] for line in read_lines(file)}
            # A line that a killed evaluation never finished must not be continued
            lines = [json.dumps({"batch": b, "scores": s}, ensure_ascii=False) for b, s in done.items()]
            folder.write(file.name, "\n".join(lines))
            work = make_batches(self.questions, batch_size(self.recipe))
            left = [batch for batch in work if batch not in done]
            if len(left) < len(work):
                print(f"{which}: {len(work) - len(left)} of {len(work)} batches are known already")
            if left:
                with load() as model:
                    for batch in show_progress(which, left, len(work)):
                        done[batch] = self.score_batch(model, batch)
                        folder.append(file, {"batch": batch, "scores": done[batch]})
        rows: list[dict[str, Any]] = [{} for _ in self.questions.rows]
        for batch in work:
            for place, score in zip(batch[1:], done[batch], strict=True):
                rows[place] |= score
        return rows

    def score_batch(self, model: PreTrainedModel, batch: Batch) -> list[dict[str, Any]]:
        """Return the scores of the rows of one batch."""
        kind, *places = batch
        if kind == "likelihood":
            return likelihood(model, self.questions.tokens.select(places).to_list())
        prompts = [self.questions.rows[place]["prompt"] for place in places]
        template = template_kwargs(self.recipe)
        answers = generate_answers(model, self.tokenizer, prompts, self.config, template, len(prompts))
        return [{"text": a["text"], "answer_tokens": a["tokens"], "stopped": a["stopped"]} for a in answers]


def show_progress(which: str, left: list[Batch], total: int) -> Iterator[Batch]:
    """Yield the batches with a bar on a terminal, and with a line now and then elsewhere."""
    bar_columns = (which, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*bar_columns, disable=not sys.stdout.isatty()) as bar:
        for number, batch in enumerate(bar.track(left), start=1):
            yield batch
            missing = len(left) - number
            if bar.disable and missing % max(1, total // 10) == 0:
                print(f"{which}: {total - missing} of {total} batches", flush=True)


def batch_size(recipe: Recipe) -> int:
    """Return the rows of a batch, which are part of what decides the scores."""
    return recipe.training.get("per_device_eval_batch_size", 8)


def make_batches(questions: Questions, most: int) -> list[Batch]:
    """Return ("likelihood" | "answer", places of rows…): rows of like length together.

    The longest come first, so that memory fails early.
    """
    lengths = [len(row["input_ids"]) for row in questions.tokens]
    prompts = [sum(label == -100 for label in row["labels"]) for row in questions.tokens]
    work: list[Batch] = []
    order = sorted(range(len(lengths)), key=lambda place: (-lengths[place], place))
    while order:
        size = max(1, min(most, TOKENS_A_BATCH // lengths[order[0]]))
        work.append(("likelihood", *order[:size]))
        order = order[size:]
    order = sorted(range(len(lengths)), key=lambda place: (-prompts[place], place))
    return work + [("answer", *order[start : start + most]) for start in range(0, len(order), most)]


@torch.inference_mode()
def likelihood(model: PreTrainedModel, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return for each row of `input_ids` and `labels`: `nll` (nats, summed over its labels), `tokens`, `correct` (argmax)."""
    width = max(len(row["input_ids"]) for row in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for place, row in enumerate(rows):
        ids[place, : len(row["input_ids"])] = torch.tensor(row["input_ids"])
        mask[place, : len(row["input_ids"])] = 1
    logits = model(input_ids=ids.to(model.device), attention_mask=mask.to(model.device), use_cache=False).logits
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
