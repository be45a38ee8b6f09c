"""Base against tuned on questions that neither was trained on, row by row, with intervals.

medibot eval --run quickstart
"""

import contextlib
import gc
import hashlib
import importlib.metadata
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from filelock import FileLock
from peft import PeftModel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn
from transformers import AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

from medibot import metrics, tracking
from medibot.cleaning.rules import fold
from medibot.data.conversations import COLUMNS
from medibot.data.gate import audit_labels, refuse_faults
from medibot.data.prepared import cache_folder, gather, prepare
from medibot.data.splitting import find_near_texts, sha256
from medibot.errors import RecipeError
from medibot.model.generation import generate_answers
from medibot.model.loading import hash_file, identify_base, load_base, load_tuned, make_tiny_model, method_name
from medibot.model.template import template_kwargs
from medibot.model.tokenizer import tokenizer_fingerprint
from medibot.page import evaluation_page
from medibot.recipe import Recipe, load_recipe
from medibot.run import Run, find_finished_run, locked, read_json, read_lines

# A file that someone hands over is taken as it is: what cannot be asked or compared is left out, and counted
AS_IT_IS = [
    "data.clean=[drop_unanswered, drop_unasked]",
    "data.group_by=[]",
    "data.validation=0.0",
    "data.test=0.0",
    "data.too_long=drop",
    "training.eval_strategy=no",
    "training.eval_on_start=false",
    "training.load_best_model_at_end=false",
]
# Padded tokens in one forward pass: their logits are held in memory at once
TOKENS_A_BATCH = 2048
RESAMPLES, SEED = 10_000, 0


@dataclass(frozen=True)
class Questions:
    """The rows that are asked: conversations, and their `input_ids` and `labels` as TRL makes them for training."""

    rows: Dataset
    tokens: Dataset
    of: int
    described: str
    known: list[int]

    @property
    def fingerprint(self) -> str:
        return sha256(json.dumps([[row["prompt"], row["completion"]] for row in self.rows]))


def evaluate(name: str, rows: int | None = None, data: Path | None = None) -> dict[str, Any]:
    """Score base and tuned model of the run `name` on its test split, or on the file `data`; write and return results.

    `rows` asks only so many, chosen by a hash of their text. Results stand in outputs/<name>/eval/, or eval-<data>/.
    """
    this = find_finished_run(name)
    with locked(this, True):
        recipe = load_recipe(str(this.recipe))
        inputs = gather(recipe)
        if inputs.prepared.split["fingerprint"] != read_json(this.folder / "split.json")["fingerprint"]:
            remedy = "bring back that data, or train again under another RUN=name"
            raise RecipeError.of(f"outputs/{name}", "the data is not what the run was split from", remedy)
        # The run's own copy of tokenizer and template, so that what is asked cannot differ from training
        tokenizer = AutoTokenizer.from_pretrained(this.weights)
        config = GenerationConfig.from_pretrained(this.weights)
        known = inputs.prepared.load("train")
        if data is None:
            found, described = inputs.prepared.load("test"), f"test split of {recipe.data.path}"
        else:
            found, described = held_out_file(this, data, tokenizer), data.name
        questions = choose(tokenizer, config, found, known, rows, described, check_known=data is not None)
        for row in questions.known:
            print(f"warning: row {row} of {described} stands in the training split")
        seconds: dict[str, float] = {}
        raw = {"base": [], "tuned": []}
        for which, load in loaders(recipe, this, inputs.precision.dtype).items():
            started = time.monotonic()
            key = score_key(recipe, this, questions, tokenizer, config, which, inputs.precision.name)
            raw[which] = scored(key, which, load, recipe, questions, tokenizer, config)
            seconds[which] = round(time.monotonic() - started, 1)
        lines = joined(questions, raw)
        results = summarise(recipe, this, questions, config, lines, inputs.precision.name, seconds)
        report = Run(this.folder / ("eval" if data is None else f"eval-{data.stem}"))
        report.folder.mkdir(exist_ok=True)
        report.write("rows.jsonl", "\n".join(json.dumps(line, ensure_ascii=False) for line in lines))
        report.write("report.html", evaluation_page(results, lines))
        report.write("results.json", results)
        mirror(recipe, this, report, results, lines)
        show(results, report.folder)
    return results


# --- the rows ---------------------------------------------------------------------------------------------------------


def held_out_file(this: Run, file: Path, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """The rows of a file in the schema of the run's data, prepared as its own are."""
    if not file.is_file():
        raise RecipeError.of("DATA", f"no file {str(file)!r}", "give a .jsonl, .csv or .parquet file")
    unlimited = ["data.limit=null"] if load_recipe(str(this.recipe)).data.limit else []
    recipe = load_recipe(str(this.recipe), [*AS_IT_IS, *unlimited, f"data.path={json.dumps(str(file))}"])
    prepared = prepare(recipe, tokenizer)
    for line in prepared.ledger:
        if line["dropped"]:
            print(f"{file.name}: {line['dropped']} rows dropped by {line['rule']}")
    return prepared.load("train")


def choose(
    tokenizer: PreTrainedTokenizerBase,
    config: GenerationConfig,
    found: Dataset | None,
    train: Dataset,
    most: int | None,
    described: str,
    check_known: bool,
) -> Questions:
    """The rows to ask, with labels that are proven to cover each answer and its stop token and nothing else."""
    if found is None:
        raise RecipeError.of("eval", "the recipe keeps no test split (data.test is 0)", "give DATA=file.jsonl")
    order = sorted(range(len(found)), key=lambda place: sha256(f"{question(found[place])}\0{found[place]['row']}"))
    rows = found.select(sorted(order[:most]))
    tokens = tokenized(tokenizer, rows)
    report = audit_labels(tokens, rows, tokenizer, config.eos_token_id, None, "test")
    refuse_faults(report, tokens, tokenizer)
    known = known_rows(rows, train) if check_known else []
    return Questions(rows, tokens, len(found), described, known)


def tokenized(tokenizer: PreTrainedTokenizerBase, rows: Dataset) -> Dataset:
    """`input_ids` and `labels` of each row by TRL's own preparation, so that what is scored is what was trained."""
    with tempfile.TemporaryDirectory() as folder:
        switches = {"report_to": "none", "bf16": False, "max_length": None, "disable_tqdm": True}
        args = SFTConfig(folder, use_cpu=True, activation_checkpointing=False, **switches)
        chosen = rows.select_columns(COLUMNS)
        trainer = SFTTrainer(make_tiny_model(tokenizer), args=args, train_dataset=chosen, processing_class=tokenizer)
        return trainer.train_dataset


def known_rows(rows: Dataset, train: Dataset) -> list[int]:
    """Which of `rows` have a question, or nearly an answer, of the training split."""
    questions = {fold(question(row)) for row in train}
    near = find_near_texts([fold(reference(row)) for row in rows], [fold(reference(row)) for row in train], 0.8)
    return [row["row"] for row in rows if fold(question(row)) in questions or fold(reference(row)) in near]


def question(row: dict[str, Any]) -> str:
    return row["prompt"][-1]["content"]


def reference(row: dict[str, Any]) -> str:
    return row["completion"][0]["content"]


# --- the scores -------------------------------------------------------------------------------------------------------


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


# --- the results ------------------------------------------------------------------------------------------------------


def joined(questions: Questions, raw: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """One line for each row: question, reference, source columns, and the scores of base and tuned."""
    lines = []
    for place, row in enumerate(questions.rows):
        others = {key: value for key, value in row.items() if key not in {*COLUMNS, "tokens"}}
        line = others | {"question": question(row), "reference": reference(row)}
        for which, scores in raw.items():
            score = scores[place]
            size = {"bits": score["nll"] / math.log(2), "bytes": len(reference(row).encode())}
            line[which] = score | size | metrics.score_answer(score["text"], reference(row))
        lines.append(line)
    return lines


def summarise(
    recipe: Recipe,
    this: Run,
    questions: Questions,
    config: GenerationConfig,
    lines: list[dict[str, Any]],
    precision: str,
    seconds: dict[str, float],
) -> dict[str, Any]:
    """What results.json says; `fingerprint` is that of the rows and the decoding: only equal ones compare."""
    decoding = {"max_new_tokens": config.max_new_tokens, "do_sample": config.do_sample} | recipe.evaluation.generate
    compared = differences(lines)
    by = {}
    for column in recipe.evaluation.by:
        if column not in lines[0]:
            print(f"warning: no column {column!r} to break the results down by")
            continue
        values = sorted({str(line[column]) for line in lines})
        parts = {value: [line for line in lines if str(line[column]) == value] for value in values}
        by[column] = {
            value: {"rows": len(part), "groups": groups(part), "metrics": differences(part)}
            for value, part in parts.items()
        }
    return {
        "run": this.name,
        "verdict": verdict(this.name, compared, len(lines), groups(lines)),
        "model": recipe.model["pretrained_model_name_or_path"],
        "method": method_name(recipe),
        "data": questions.described,
        "rows": len(lines),
        "of": questions.of,
        "groups": groups(lines),
        "fingerprint": sha256(json.dumps([questions.fingerprint, decoding], sort_keys=True)),
        "base": identify_base(recipe),
        "tokenizer": tokenizer_fingerprint(AutoTokenizer.from_pretrained(this.weights)),
        "decoding": decoding,
        "precision": precision,
        "seed": SEED,
        "resamples": RESAMPLES,
        "confidence": 0.95,
        "metrics": compared,
        "by": by,
        "found_in_training": questions.known,
        "seconds": seconds,
    }


def differences(lines: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Base against tuned on each metric, with what the metric is."""
    base, tuned, group = ([line[key] for line in lines] for key in ("base", "tuned", "group"))
    compared = metrics.compare_scores(base, tuned, group, SEED, RESAMPLES)
    definitions = metrics.definitions()
    return {
        metric.name: {"label": metric.label, "definition": definitions[metric.name], "better": metric.better}
        | compared[metric.name]
        for metric in metrics.METRICS
    }


def groups(lines: list[dict[str, Any]]) -> int:
    return len({line["group"] for line in lines})


def verdict(name: str, compared: dict[str, dict[str, Any]], rows: int, groups: int) -> str:
    """The answer in one sentence, by likelihood alone: how the answers themselves read, the other metrics say."""
    nll, perplexity = compared["nll"], compared["perplexity"]
    claim = {
        "better": f"{name} predicts the reference answers better than its base model",
        "worse": f"{name} predicts the reference answers worse than its base model",
        "no evidence": f"no evidence that {name} predicts the reference answers better or worse than its base model",
    }[nll["verdict"]]
    interval = "too few groups for an interval" if nll["low"] is None else f"{nll['low']:+.3f} to {nll['high']:+.3f}"
    return (
        f"{claim}: {nll['difference']:+.3f} nats a token (95 %: {interval}) on {rows} questions of {groups} groups "
        f"never seen in training; perplexity {perplexity['baseline']:.2f} -> {perplexity['value']:.2f}."
    )


def mirror(recipe: Recipe, this: Run, report: Run, results: dict[str, Any], lines: list[dict[str, Any]]) -> None:
    """The same in W&B, as a run of its own beside the training's."""
    config = {"recipe": recipe.as_dict(), "run": this.name, "run_fingerprint": this.record()["fingerprint"]}
    config |= {key: value for key, value in results.items() if key not in {"metrics", "by"}}
    with tracking.tracked(recipe, this, config, True, job_type="eval") as mirrored:
        flat = {
            f"test/{name}/{key}": value
            for name, metric in results["metrics"].items()
            for key, value in metric.items()
            if key not in {"label", "definition", "better"}
        }
        # The training's cost again, so that one chart can show it against quality
        cost = this.record()["summary"].get("cost", {})
        mirrored.summary(flat | {"verdict": results["verdict"], "cost": cost})
        keys = ("baseline", "value", "difference", "low", "high", "verdict")
        rows = [[name, *(metric[key] for key in keys)] for name, metric in results["metrics"].items()]
        mirrored.table("test/metrics", ["metric", *keys], rows)
        columns = ["row", "group", "question", "reference"]
        rows = [
            [*(line[column] for column in columns)]
            + [
                line[which][key]
                for which in ("base", "tuned")
                for key in ("text", "nll", "tokens", "rouge_l", "stopped")
            ]
            for line in lines
        ]
        named = [
            f"{which}_{key}" for which in ("base", "tuned") for key in ("text", "nll", "tokens", "rouge_l", "stopped")
        ]
        mirrored.table("test/answers", columns + named, rows)
        manifest = {"run": this.name, "run_fingerprint": this.record()["fingerprint"]}
        uses = {f"{this.name}-adapter": "model"} if recipe.lora else {}
        mirrored.artifact("evaluation", f"{this.name}-{report.name}", [report.folder], manifest, uses)


def show(results: dict[str, Any], folder: Path) -> None:
    """The table and the verdict on the terminal."""
    from rich.console import Console
    from rich.table import Table

    table = Table("metric", "base", "tuned", "difference", "95 % interval", "verdict")
    for metric in results["metrics"].values():
        interval = "-" if metric["low"] is None else f"{metric['low']:+.4f} to {metric['high']:+.4f}"
        figures = (f"{metric['baseline']:.4f}", f"{metric['value']:.4f}", f"{metric['difference']:+.4f}")
        table.add_row(metric["label"], *figures, interval, metric["verdict"])
    console = Console(markup=False, highlight=False)
    console.print(table)
    if results["rows"] < results["of"]:
        print(f"A quick look: {results['rows']} of {results['of']} rows.")
    print(results["verdict"])
    print(f"written: {folder}/results.json, rows.jsonl, report.html")
