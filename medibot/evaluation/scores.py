"""Score base and tuned model on the same questions, batch by batch, kept and gone on with after a kill."""

import contextlib
import gc
import importlib.metadata
import json
import math
import sys
from collections.abc import Callable, Generator
from functools import cache
from typing import Any

import torch
from filelock import FileLock
from rich.progress import Progress
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from medibot.data.prepared import cache_folder
from medibot.data.splitting import sha256
from medibot.errors import RecipeError
from medibot.evaluation.questions import Questions
from medibot.model.generation import generate_answers
from medibot.model.loading import hash_file, identify_base, load_base, load_tuned
from medibot.model.precision import Precision
from medibot.model.tokenizer import template_kwargs, tokenizer_fingerprint
from medibot.recipe import Recipe
from medibot.run import Run, read_lines

# Padded tokens in one forward pass: their logits are held in memory at once
TOKENS_A_BATCH = 2048
# For memory that runs out while a model is scored
FEWER_ROWS = "lower training.per_device_eval_batch_size in the run's recipe.yaml, or end what else uses this memory"
# ("likelihood" | "answer", places of rows…)
Batch = tuple[Any, ...]
Rows = list[dict[str, Any]]
Loader = Callable[[str], contextlib.AbstractContextManager[PreTrainedModel]]


def model_loader(recipe: Recipe, run: Run, dtype: torch.dtype) -> Loader:
    """Return a context manager that gives "base" or "tuned"; an adapter's base is the same load with the adapter off."""
    load_once = cache(lambda: load_tuned(recipe, run.weights, dtype))

    @contextlib.contextmanager
    def load(which: str) -> Generator[PreTrainedModel]:
        if which == "tuned":
            yield load_once()
        elif recipe.lora:
            with load_once().disable_adapter():
                yield load_once()
        else:
            yield load_base(recipe, dtype).to("cuda" if torch.cuda.is_available() else "cpu").eval()
            gc.collect()

    return load


def score_rows(which: str, load: Loader, recipe: Recipe, run: Run, questions: Questions, precision: Precision) -> Rows:
    """Return likelihood and answer of each row, in order; each batch is kept on the disk as it is done."""
    folder, most = Run(cache_folder().with_name("scores")), recipe.training.get("per_device_eval_batch_size", 8)
    file_name, template = scores_name(which, recipe, run, questions, precision, most), template_kwargs(recipe)
    folder.folder.mkdir(parents=True, exist_ok=True)
    file, batches = folder.folder / f"{file_name}.jsonl", make_batches(questions, most)
    with FileLock(file.with_suffix(".lock")):
        done = {tuple(line["batch"]): line["scores"] for line in read_lines(file)}
        # A line that a killed evaluation never finished must not be continued
        lines = [json.dumps({"batch": b, "scores": s}, ensure_ascii=False) for b, s in done.items()]
        folder.write(file.name, "\n".join(lines))
        if done:
            print(f"{which}: {len(done)} of {len(batches)} batches are known already")
        left = [batch for batch in batches if batch not in done]
        # A bar on a terminal; elsewhere a line now and then
        bar = Progress(disable=not sys.stdout.isatty())
        with load(which) if left else contextlib.nullcontext() as model, bar:
            for batch in bar.track(left, len(batches), len(done), description=which):
                kind, *places = batch
                if kind == "likelihood":
                    done[batch] = likelihood(model, questions.tokens.select(places).to_list())
                else:
                    prompts = questions.rows.select(places)["prompt"]
                    found = generate_answers(model, questions.tokenizer, prompts, questions.config, template, most)
                    kept = {"text": "text", "answer_tokens": "tokens", "stopped": "stopped"}
                    done[batch] = [{key: answer[name] for key, name in kept.items()} for answer in found]
                folder.append(file, {"batch": batch, "scores": done[batch]})
                if bar.disable and len(done) % max(1, len(batches) // 10) == 0:
                    print(f"{which}: {len(done)} of {len(batches)} batches", flush=True)
    rows: Rows = [{} for _ in questions.rows]
    for batch in batches:
        for place, found in zip(batch[1:], done[batch], strict=True):
            rows[place] |= found
    return rows


def scores_name(which: str, recipe: Recipe, run: Run, questions: Questions, precision: Precision, most: int) -> str:
    """Return a sha256 of all that decides the scores, `most` rows a batch too; tuned weights only where asked."""
    adapter = sorted(run.weights.glob("*.safetensors")) if which == "tuned" else []
    decisive = [
        questions.fingerprint,
        tokenizer_fingerprint(questions.tokenizer),
        template_kwargs(recipe),
        questions.config.to_dict(),
        identify_base(recipe),
        recipe.quantization,
        precision.name,
        most,
        [importlib.metadata.version(name) for name in ("torch", "transformers", "peft", "bitsandbytes")],
        {file.name: hash_file(file) for file in adapter},
    ]
    return sha256(json.dumps(decisive, sort_keys=True, default=str))[:32]


def make_batches(questions: Questions, most: int) -> list[Batch]:
    """Return batches of rows of like length, the longest first, so that memory fails early."""
    texts = [len(row["input_ids"]) for row in questions.tokens]
    prompts = [sum(label == -100 for label in row["labels"]) for row in questions.tokens]
    batches: list[Batch] = []
    for kind, lengths in (("likelihood", texts), ("answer", prompts)):
        # Sorting is stable: rows of one length stay in order
        order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
        while order:
            size = max(1, min(most, TOKENS_A_BATCH // lengths[order[0]])) if kind == "likelihood" else most
            batches.append((kind, *order[:size]))
            order = order[size:]
    return batches


@torch.inference_mode()
def likelihood(model: PreTrainedModel, rows: Rows) -> Rows:
    """Return for each row of `input_ids` and `labels`: `nll` (nats, summed over its labels), `tokens`, `correct` (argmax)."""
    texts = [torch.tensor(row["input_ids"], device=model.device) for row in rows]
    ids, mask = (pad_sequence(part, batch_first=True) for part in (texts, [torch.ones_like(ids) for ids in texts]))
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    scores = []
    for row, every in zip(rows, logits, strict=True):
        labels = torch.tensor(row["labels"][1:], device=logits.device)
        kept = labels != -100
        predicted, labels = every[: len(labels)][kept].float(), labels[kept]
        nll = torch.nn.functional.cross_entropy(predicted, labels, reduction="sum").item()
        if not math.isfinite(nll):
            raise RecipeError.of("eval", f"an answer's likelihood is {nll}", "the weights are damaged: train again")
        scores.append({"nll": nll, "tokens": len(labels), "correct": int((predicted.argmax(-1) == labels).sum())})
    return scores
