"""Compare base and tuned model on questions that neither was trained on, row by row, with intervals."""

import json
import math
import time
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

from transformers import GenerationConfig

from medibot import tracking
from medibot.data.columns import kept_name
from medibot.data.conversations import COLUMNS
from medibot.data.prepared import prepare
from medibot.data.splitting import sha256
from medibot.errors import RecipeError, explain_memory
from medibot.evaluation.metrics import choose_metrics, name_references, score_answer
from medibot.evaluation.page import evaluation_page
from medibot.evaluation.questions import (
    Questions,
    choose_questions,
    held_out_file,
    part_reference,
    question,
)
from medibot.evaluation.report import Report, difference_table, write_report
from medibot.evaluation.scores import FEWER_ROWS, Rows, model_loader, score_rows
from medibot.evaluation.statistics import CONFIDENCE, FIGURES, RESAMPLES, SEED, compare_scores, interval_text
from medibot.model.loading import identify_base, method_name
from medibot.model.thinking import opens_thinking, split_thinking
from medibot.model.tokenizer import load_saved_tokenizer, template_kwargs, tokenizer_fingerprint
from medibot.recipe import Recipe, load_recipe
from medibot.run import Run, find_finished_run, locked, read_json

# By likelihood: how the answers themselves read, the other metrics say
CLAIMS = {
    "better": "{} predicts the {} better than its base model",
    "worse": "{} predicts the {} worse than its base model",
    "no evidence": "no evidence that {} predicts the {} better or worse than its base model",
}


@explain_memory("eval", FEWER_ROWS)
def evaluate(name: str, rows: int | None = None, data: Path | None = None) -> Report:
    """Score base and tuned model of the run `name` on its test split, or on the file `data`, and write the result.

    `rows` asks only so many, chosen by a hash of their text. Results go to outputs/<name>/eval/, or eval-<data>/.
    """
    run = find_finished_run(name)
    with locked(run):
        recipe = load_recipe(str(run.recipe))
        # The run's own copy of tokenizer and template, so that what is asked cannot differ from training
        tokenizer, config = load_saved_tokenizer(run.weights), GenerationConfig.from_pretrained(run.weights)
        prepared = replace(prepare(recipe), tokenizer=tokenizer, generation=config)
        if prepared.split["fingerprint"] != read_json(run.folder / "split.json")["fingerprint"]:
            remedy = "bring back that data, or train again under another RUN=name"
            raise RecipeError.of(f"outputs/{name}", "the data is not what the run was split from", remedy)
        found, train, described = prepared.load("test"), None, f"test split of {recipe.data.described}"
        if data is not None:
            found, train, described = held_out_file(run, data, tokenizer), prepared.load("train"), data.name
        questions = choose_questions(prepared, found, rows, described, train)
        for row in questions.known:
            print(f"warning: row {row} of {questions.described} is in the training split")
        load, scored, seconds = model_loader(recipe, run, prepared.precision.dtype), {}, {}
        for which in ("base", "tuned"):
            started = time.monotonic()
            scored[which] = score_rows(which, load, recipe, run, questions, prepared.precision)
            seconds[which] = round(time.monotonic() - started, 1)
        lines = describe_rows(questions, scored, opens_thinking(tokenizer, template_kwargs(recipe)))
        results = summarize(recipe, run, questions, lines)
        results |= {"precision": prepared.precision.name, "seconds": seconds}
        table = difference_table(["metric"], [([m["label"]], m) for m in results["metrics"].values()])
        files = {"results.json": results, "rows.jsonl": lines, "report.html": evaluation_page(results, lines)}
        folder = run.folder / ("eval" if data is None else f"eval-{data.stem}")
        report = write_report(folder, files, results["verdict"], [table])
        mirror(recipe, run, report, lines)
    return report


def describe_rows(questions: Questions, scored: dict[str, Rows], opened: bool) -> Rows:
    """Return the lines of rows.jsonl: each row with its scores by either model; `opened`: see `split_thinking`.

    Only where a reference or an answer thinks do they tell of thinking.
    """
    parted = {which: [split_thinking(row["text"], opened) for row in rows] for which, rows in scored.items()}
    parted["reference"] = [part_reference(row) for row in questions.rows]
    thinks = any(trace for part in parted.values() for trace, _ in part)
    lines = []
    for place, row in enumerate(questions.rows):
        thought, expected = parted["reference"][place]
        line = {key: value for key, value in row.items() if key not in {*COLUMNS, "tokens"}}
        line |= {"question": question(row), "reference": expected}
        if thinks:
            line |= {"reference_thinking": thought, "reference_thinking_tokens": questions.count_tokens(thought)}
        for which, scores in scored.items():
            trace, answer = parted[which][place]
            # The likelihood is that of all labels, which hold the trace
            size = {"bits": scores[place]["nll"] / math.log(2), "bytes": len((thought + expected).encode())}
            line[which] = scores[place] | {"text": answer} | size | score_answer(answer, expected)
            if thinks:
                line[which] |= {"thinking": trace, "thinking_tokens": questions.count_tokens(trace)}
        lines.append(line)
    return lines


def summarize(recipe: Recipe, run: Run, questions: Questions, lines: Rows) -> dict[str, Any]:
    """Return the content of results.json; only runs with equal `fingerprint`, of rows and decoding, are compared."""
    config, by = questions.config, {}
    decoding = {"max_new_tokens": config.max_new_tokens, "do_sample": config.do_sample} | recipe.evaluation.generate
    whole = compare_lines(lines)
    nll, perplexity = whole["metrics"]["nll"], whole["metrics"]["perplexity"]
    verdict = (
        f"{CLAIMS[nll['verdict']].format(run.name, name_references(lines))}: {nll['difference']:+.3f} nats a token (95 %: {interval_text(nll, 3)}) "
        f"on {whole['rows']} questions of {whole['groups']} groups never seen in training; "
        f"perplexity {perplexity['baseline']:.2f} -> {perplexity['value']:.2f}."
    )
    for column in recipe.evaluation.by:
        # The name of a source, where there are several, before a column that is called so
        kept = column if column == "source" and "source" in lines[0] else kept_name(column)
        if kept not in lines[0]:
            print(f"warning: no column {column!r} to break the results down by")
            continue
        parts = sorted({str(line[kept]) for line in lines})
        by[column] = {part: compare_lines([line for line in lines if str(line[kept]) == part]) for part in parts}
    return {
        "run": run.name,
        "verdict": verdict,
        "model": recipe.model["pretrained_model_name_or_path"],
        "method": method_name(recipe),
        "data": questions.described,
        **whole,
        "of": questions.of,
        "fingerprint": sha256(json.dumps([questions.fingerprint, decoding], sort_keys=True)),
        "base": identify_base(recipe),
        "tokenizer": tokenizer_fingerprint(questions.tokenizer),
        "decoding": decoding,
        "seed": SEED,
        "resamples": RESAMPLES,
        "confidence": CONFIDENCE,
        "by": by,
        "found_in_training": questions.known,
    } | summarize_thinking(lines)


def summarize_thinking(lines: Rows) -> dict[str, float]:
    """Return how many tokens the references think for, mean over rows, where anything thinks."""
    if "reference_thinking" not in lines[0]:
        return {}
    return {"reference_thinking_tokens": fmean(line["reference_thinking_tokens"] for line in lines)}


def compare_lines(lines: Rows) -> dict[str, Any]:
    """Return how many rows there are, of how many groups of the split, and base against tuned on each metric."""
    base, tuned, group = ([line[key] for line in lines] for key in ("base", "tuned", "group"))
    asked = choose_metrics(lines)
    definitions = {metric.name: {"definition": metric.definition} for metric in asked}
    metrics = {name: found | definitions[name] for name, found in compare_scores(base, tuned, group, asked).items()}
    return {"rows": len(lines), "groups": len(set(group)), "metrics": metrics}


def mirror(recipe: Recipe, run: Run, report: Report, lines: Rows) -> None:
    """Send the same to W&B, as a run of its own beside the training's."""
    results, metrics, record = report.results, report.results["metrics"], run.record()
    manifest = {"run": run.name, "run_fingerprint": record["fingerprint"]}
    config = {"recipe": recipe.as_dict()} | manifest | {k: v for k, v in results.items() if k not in {"metrics", "by"}}
    thinking = ["thinking"] if "thinking" in lines[0]["tuned"] else []
    scored = ["text", *thinking, "nll", "tokens", "rouge_l", "stopped"]
    scores = [(which, key) for which in ("base", "tuned") for key in scored]
    shown = ("row", "group", "question", "reference")
    with tracking.tracked(recipe, run, config, True, job_type="eval") as mirrored:
        flat = {f"test/{name}/{key}": metric[key] for name, metric in metrics.items() for key in FIGURES}
        # The training's cost again, so that one chart can show it against quality
        mirrored.summary(flat | {"verdict": results["verdict"], "cost": record["summary"].get("cost", {})})
        table = [[name, *(metric[key] for key in FIGURES)] for name, metric in metrics.items()]
        mirrored.table("test/metrics", ["metric", *FIGURES], table)
        answers = [[*(line[key] for key in shown), *(line[which][key] for which, key in scores)] for line in lines]
        mirrored.table("test/answers", [*shown, *(f"{which}_{key}" for which, key in scores)], answers)
        uses = {f"{run.name}-adapter": "model"} if recipe.lora else {}
        mirrored.artifact("evaluation", f"{run.name}-{report.folder.name}", [report.folder], manifest, uses)
