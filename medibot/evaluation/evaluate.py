"""Compare base and tuned model on questions that neither was trained on, row by row, with intervals."""

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text
from transformers import AutoTokenizer, GenerationConfig

from medibot import tracking
from medibot.data.conversations import COLUMNS
from medibot.data.prepared import prepare
from medibot.data.splitting import sha256
from medibot.errors import RecipeError
from medibot.evaluation.metrics import METRICS, definitions, score_answer
from medibot.evaluation.page import evaluation_page
from medibot.evaluation.questions import Questions, choose_questions, held_out_file, question, reference
from medibot.evaluation.scores import Scorer, loaders
from medibot.evaluation.statistics import CONFIDENCE, RESAMPLES, SEED, compare_scores, interval_text
from medibot.model.loading import identify_base, method_name
from medibot.model.tokenizer import tokenizer_fingerprint
from medibot.recipe import Recipe, load_recipe
from medibot.run import Run, find_finished_run, locked, read_json


@dataclass(frozen=True)
class Evaluation:
    """What results.json in `folder` says; rows.jsonl and report.html are beside it."""

    results: dict[str, Any]
    folder: Path

    def __rich__(self) -> Group:
        """Return the verdict, the metrics as a table, and where the rest is."""
        results = self.results
        table = Table("metric", "base", "tuned", "difference", "95 % interval", "verdict")
        for metric in results["metrics"].values():
            figures = (f"{metric['baseline']:.4f}", f"{metric['value']:.4f}", f"{metric['difference']:+.4f}")
            table.add_row(metric["label"], *figures, interval_text(metric), metric["verdict"])
        few = results["rows"] < results["of"]
        quick = [f"A quick look: {results['rows']} of {results['of']} rows."] if few else []
        written = f"written: {self.folder}/results.json, rows.jsonl, report.html"
        return Group(results["verdict"], *quick, table, Text(written, no_wrap=True, overflow="ignore"))


def evaluate(name: str, rows: int | None = None, data: Path | None = None) -> Evaluation:
    """Score base and tuned model of the run `name` on its test split, or on the file `data`, and write the result.

    `rows` asks only so many, chosen by a hash of their text. Results go to outputs/<name>/eval/, or eval-<data>/.
    """
    run = find_finished_run(name)
    with locked(run, True):
        recipe = load_recipe(str(run.recipe))
        # The run's own copy of tokenizer and template, so that what is asked cannot differ from training
        tokenizer = AutoTokenizer.from_pretrained(run.weights)
        config = GenerationConfig.from_pretrained(run.weights)
        prepared = prepare(recipe)
        if prepared.split["fingerprint"] != read_json(run.folder / "split.json")["fingerprint"]:
            remedy = "bring back that data, or train again under another RUN=name"
            raise RecipeError.of(f"outputs/{name}", "the data is not what the run was split from", remedy)
        if data is None:
            described = f"test split of {recipe.data.path}"
            questions = choose_questions(tokenizer, config, prepared.load("test"), rows, described)
        else:
            found, train = held_out_file(run, data, tokenizer), prepared.load("train")
            questions = choose_questions(tokenizer, config, found, rows, data.name, train)
        for row in questions.known:
            print(f"warning: row {row} of {questions.described} is in the training split")
        scorer = Scorer(recipe, run, questions, tokenizer, config, prepared.precision)
        raw, seconds = {}, {}
        for which, load in loaders(recipe, run, prepared.precision.dtype).items():
            started = time.monotonic()
            raw[which] = scorer.score(which, load)
            seconds[which] = round(time.monotonic() - started, 1)
        lines = join_scores(questions, raw)
        results = summarize(scorer, lines, seconds)
        report = Run(run.folder / ("eval" if data is None else f"eval-{data.stem}"))
        write_report(report, results, lines)
        mirror(recipe, run, report, results, lines)
    return Evaluation(results, report.folder)


def join_scores(questions: Questions, raw: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Return one line for each row: question, reference, source columns, and the scores of base and tuned."""
    lines = []
    for place, row in enumerate(questions.rows):
        others = {key: value for key, value in row.items() if key not in {*COLUMNS, "tokens"}}
        expected = reference(row)
        line = others | {"question": question(row), "reference": expected}
        for which in ("base", "tuned"):
            found = raw[which][place]
            nats = {"bits": found["nll"] / math.log(2), "bytes": len(expected.encode())}
            line[which] = found | nats | score_answer(found["text"], expected)
        lines.append(line)
    return lines


def summarize(scorer: Scorer, lines: list[dict[str, Any]], seconds: dict[str, float]) -> dict[str, Any]:
    """Return the content of results.json; only runs with equal `fingerprint`, of rows and decoding, are compared."""
    recipe, config, questions = scorer.recipe, scorer.config, scorer.questions
    decoding = {"max_new_tokens": config.max_new_tokens, "do_sample": config.do_sample} | recipe.evaluation.generate
    metrics = compare_lines(lines)
    return {
        "run": scorer.run.name,
        "verdict": verdict(scorer.run.name, metrics, len(lines), count_groups(lines)),
        "model": recipe.model["pretrained_model_name_or_path"],
        "method": method_name(recipe),
        "data": questions.described,
        "rows": len(lines),
        "of": questions.of,
        "groups": count_groups(lines),
        "fingerprint": sha256(json.dumps([questions.fingerprint, decoding], sort_keys=True)),
        "base": identify_base(recipe),
        "tokenizer": tokenizer_fingerprint(scorer.tokenizer),
        "decoding": decoding,
        "precision": scorer.precision.name,
        "seed": SEED,
        "resamples": RESAMPLES,
        "confidence": CONFIDENCE,
        "metrics": metrics,
        "by": break_down(recipe, lines),
        "found_in_training": questions.known,
        "seconds": seconds,
    }


def break_down(recipe: Recipe, lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the figures of each value of the columns in `evaluation.by`."""
    found = {}
    for column in recipe.evaluation.by:
        if column not in lines[0]:
            print(f"warning: no column {column!r} to break the results down by")
            continue
        parts: dict[str, list[dict[str, Any]]] = {}
        for line in sorted(lines, key=lambda line: str(line[column])):
            parts.setdefault(str(line[column]), []).append(line)
        found[column] = {
            value: {"rows": len(part), "groups": count_groups(part), "metrics": compare_lines(part)}
            for value, part in parts.items()
        }
    return found


def compare_lines(lines: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return base against tuned on each metric, with what the metric is."""
    base, tuned, group = ([line[key] for line in lines] for key in ("base", "tuned", "group"))
    compared, defined = compare_scores(base, tuned, group), definitions()
    return {
        metric.name: {"label": metric.label, "definition": defined[metric.name], "better": metric.better}
        | compared[metric.name]
        for metric in METRICS
    }


def count_groups(lines: list[dict[str, Any]]) -> int:
    """Return how many groups of the split the rows come from."""
    return len({line["group"] for line in lines})


def verdict(name: str, metrics: dict[str, dict[str, Any]], rows: int, groups: int) -> str:
    """Return the answer in one sentence, by likelihood: how the answers themselves read, the other metrics say."""
    nll, perplexity = metrics["nll"], metrics["perplexity"]
    claim = {
        "better": f"{name} predicts the reference answers better than its base model",
        "worse": f"{name} predicts the reference answers worse than its base model",
        "no evidence": f"no evidence that {name} predicts the reference answers better or worse than its base model",
    }[nll["verdict"]]
    return (
        f"{claim}: {nll['difference']:+.3f} nats a token (95 %: {interval_text(nll, 3)}) on {rows} questions of {groups} "
        f"groups never seen in training; perplexity {perplexity['baseline']:.2f} -> {perplexity['value']:.2f}."
    )


def write_report(report: Run, results: dict[str, Any], lines: list[dict[str, Any]]) -> None:
    """Write rows, page and results; the results come last, so that they are there only with the rest."""
    report.folder.mkdir(exist_ok=True)
    report.write("rows.jsonl", "\n".join(json.dumps(line, ensure_ascii=False) for line in lines))
    report.write("report.html", evaluation_page(results, lines))
    report.write("results.json", results)


def mirror(recipe: Recipe, run: Run, report: Run, results: dict[str, Any], lines: list[dict[str, Any]]) -> None:
    """Send the same to W&B, as a run of its own beside the training's."""
    record = run.record()
    config = {"recipe": recipe.as_dict(), "run": run.name, "run_fingerprint": record["fingerprint"]}
    config |= {key: value for key, value in results.items() if key not in {"metrics", "by"}}
    keys = ("baseline", "value", "difference", "low", "high", "verdict")
    scores = [(which, key) for which in ("base", "tuned") for key in ("text", "nll", "tokens", "rouge_l", "stopped")]
    shown = ("row", "group", "question", "reference")
    with tracking.tracked(recipe, run, config, True, job_type="eval") as mirrored:
        flat = {f"test/{name}/{key}": metric[key] for name, metric in results["metrics"].items() for key in keys}
        # The training's cost again, so that one chart can show it against quality
        mirrored.summary(flat | {"verdict": results["verdict"], "cost": record["summary"].get("cost", {})})
        table = [[name, *(metric[key] for key in keys)] for name, metric in results["metrics"].items()]
        mirrored.table("test/metrics", ["metric", *keys], table)
        answers = [[*(line[key] for key in shown), *(line[which][key] for which, key in scores)] for line in lines]
        mirrored.table("test/answers", [*shown, *(f"{which}_{key}" for which, key in scores)], answers)
        manifest = {"run": run.name, "run_fingerprint": record["fingerprint"]}
        uses = {f"{run.name}-adapter": "model"} if recipe.lora else {}
        mirrored.artifact("evaluation", f"{run.name}-{report.name}", [report.folder], manifest, uses)
