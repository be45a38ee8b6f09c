"""Base against tuned on questions that neither was trained on, row by row, with intervals.

medibot eval --run quickstart
"""

import json
import math
import time
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, GenerationConfig

from medibot import tracking
from medibot.data.conversations import COLUMNS
from medibot.data.prepared import prepare
from medibot.data.splitting import sha256
from medibot.errors import RecipeError
from medibot.evaluation.metrics import METRICS, definitions, score_answer
from medibot.evaluation.page import evaluation_page
from medibot.evaluation.questions import Questions, choose, held_out_file, question, reference
from medibot.evaluation.scores import loaders, score_key, scored
from medibot.evaluation.statistics import compare_scores
from medibot.model.loading import identify_base, method_name
from medibot.model.tokenizer import tokenizer_fingerprint
from medibot.recipe import Recipe, load_recipe
from medibot.run import Run, find_finished_run, locked, read_json

RESAMPLES, SEED = 10_000, 0


def evaluate(name: str, rows: int | None = None, data: Path | None = None) -> dict[str, Any]:
    """Score base and tuned model of the run `name` on its test split, or on the file `data`; write and return results.

    `rows` asks only so many, chosen by a hash of their text. Results stand in outputs/<name>/eval/, or eval-<data>/.
    """
    this = find_finished_run(name)
    with locked(this, True):
        recipe = load_recipe(str(this.recipe))
        prepared = prepare(recipe)
        if prepared.split["fingerprint"] != read_json(this.folder / "split.json")["fingerprint"]:
            remedy = "bring back that data, or train again under another RUN=name"
            raise RecipeError.of(f"outputs/{name}", "the data is not what the run was split from", remedy)
        # The run's own copy of tokenizer and template, so that what is asked cannot differ from training
        tokenizer = AutoTokenizer.from_pretrained(this.weights)
        config = GenerationConfig.from_pretrained(this.weights)
        known = prepared.load("train")
        if data is None:
            found, described = prepared.load("test"), f"test split of {recipe.data.path}"
        else:
            found, described = held_out_file(this, data, tokenizer), data.name
        questions = choose(tokenizer, config, found, known, rows, described, check_known=data is not None)
        for row in questions.known:
            print(f"warning: row {row} of {described} stands in the training split")
        seconds: dict[str, float] = {}
        raw = {"base": [], "tuned": []}
        for which, load in loaders(recipe, this, prepared.precision.dtype).items():
            started = time.monotonic()
            key = score_key(recipe, this, questions, tokenizer, config, which, prepared.precision.name)
            raw[which] = scored(key, which, load, recipe, questions, tokenizer, config)
            seconds[which] = round(time.monotonic() - started, 1)
        lines = joined(questions, raw)
        results = summarise(recipe, this, questions, config, lines, prepared.precision.name, seconds)
        report = Run(this.folder / ("eval" if data is None else f"eval-{data.stem}"))
        report.folder.mkdir(exist_ok=True)
        report.write("rows.jsonl", "\n".join(json.dumps(line, ensure_ascii=False) for line in lines))
        report.write("report.html", evaluation_page(results, lines))
        report.write("results.json", results)
        mirror(recipe, this, report, results, lines)
        show(results, report.folder)
    return results


def joined(questions: Questions, raw: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """One line for each row: question, reference, source columns, and the scores of base and tuned."""
    lines = []
    for place, row in enumerate(questions.rows):
        others = {key: value for key, value in row.items() if key not in {*COLUMNS, "tokens"}}
        line = others | {"question": question(row), "reference": reference(row)}
        for which, scores in raw.items():
            score = scores[place]
            size = {"bits": score["nll"] / math.log(2), "bytes": len(reference(row).encode())}
            line[which] = score | size | score_answer(score["text"], reference(row))
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
    compared = compare_scores(base, tuned, group, SEED, RESAMPLES)
    defined = definitions()
    return {
        metric.name: {"label": metric.label, "definition": defined[metric.name], "better": metric.better}
        | compared[metric.name]
        for metric in METRICS
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
