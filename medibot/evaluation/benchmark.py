"""Ask base and tuned model multiple-choice questions by lm-eval: did the fine-tune cost knowledge?"""

import contextlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text
from transformers import AutoTokenizer

from medibot import tracking
from medibot.errors import RecipeError
from medibot.evaluation.metrics import ACCURACY
from medibot.evaluation.scores import batch_size, loaders
from medibot.evaluation.statistics import RESAMPLES, SEED, compare_scores, interval_text
from medibot.model.loading import silence_upstream
from medibot.model.precision import choose_precision
from medibot.recipe import Recipe, load_recipe
from medibot.recipe.files import find_file
from medibot.run import Run, find_finished_run, locked

TASKS = "benchmarks/tasks"
MEDICAL = (
    "medqa",
    "medmcqa",
    "pubmedqa",
    "mmlu_anatomy",
    "mmlu_clinical_knowledge",
    "mmlu_college_biology",
    "mmlu_college_medicine",
    "mmlu_medical_genetics",
    "mmlu_professional_medicine",
)


@dataclass(frozen=True)
class Benchmark:
    """What results.json in `folder` says; rows.jsonl is beside it."""

    results: dict[str, Any]
    folder: Path

    def __rich__(self) -> Group:
        """Return the verdict, and each task as a line of a table."""
        results = self.results
        table = Table("task", "questions", "base", "tuned", "difference", "95 % interval", "verdict")
        for task, found in [*results["tasks"].items(), ("all", results["all"])]:
            figures = (f"{found['baseline']:.3f}", f"{found['value']:.3f}", f"{found['difference']:+.3f}")
            table.add_row(task, str(found["rows"]), *figures, interval_text(found, 3), found["verdict"])
        quick = [f"A quick look: at most {results['limit']} questions of each task."] if results["limit"] else []
        written = f"written: {self.folder}/results.json, rows.jsonl"
        return Group(results["verdict"], *quick, table, Text(written, no_wrap=True, overflow="ignore"))


def benchmark(name: str, tasks: list[str], limit: int | None = None) -> Benchmark:
    """Return the accuracy of base and tuned model on each task, the medical ones by default, with paired intervals.

    Zero-shot, through the run's own chat template and system prompt; `limit` asks the first so many of each task.
    Writes outputs/<name>/benchmark/{results.json, rows.jsonl}. Only tasks with a single correct option count ("acc").
    """
    managers = task_managers(list(dict.fromkeys(tasks or MEDICAL)))
    run = find_finished_run(name)
    recipe = load_recipe(str(run.recipe))
    with locked(run, True):
        silence_upstream()
        rows = ask_both(run, recipe, managers, limit)
        parts = {task: [row for row in rows if row["task"] == task] for task in managers}
        together = compare_rows(rows)
        results = {
            "run": name,
            "limit": limit,
            "precision": choose_precision(recipe.model.get("dtype")).name,
            "seed": SEED,
            "resamples": RESAMPLES,
            "tasks": {task: compare_rows(part) for task, part in parts.items()},
            "all": together,
            "verdict": verdict(name, together),
        }
        report = Run(run.folder / "benchmark")
        report.folder.mkdir(exist_ok=True)
        report.write("rows.jsonl", "\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
        report.write("results.json", results)
        config = {"recipe": recipe.as_dict(), "run": name, "run_fingerprint": run.record()["fingerprint"]}
        with tracking.tracked(recipe, run, config, True, job_type="benchmark") as mirrored:
            found = results["tasks"] | {"all": together}
            mirrored.summary({f"benchmark/{task}/{key}": v for task, part in found.items() for key, v in part.items()})
    return Benchmark(results, report.folder)


def task_managers(tasks: list[str]) -> dict[str, Any]:
    """Return lm-eval's manager for each task: ours come first, whatever lm-eval has under the same name."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        remedy = "run: make benchmark, or pip install -e '.[benchmark]'"
        raise RecipeError.of("benchmark", "lm-eval is not installed", remedy) from error
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    ours = TaskManager(include_path=str(find_file(TASKS)), include_defaults=False)
    others = TaskManager() if set(tasks) - set(ours.all_tasks) else ours
    managers = {task: ours if task in ours.all_tasks else others for task in tasks}
    for task, manager in managers.items():
        if task not in manager.all_tasks:
            what = f"neither {TASKS} nor lm-eval has a task {task!r}"
            raise RecipeError.of("TASKS", what, f"there are: {', '.join(sorted(ours.all_tasks))}, and lm-eval's own")
    return managers


def ask_both(run: Run, recipe: Recipe, managers: dict[str, Any], limit: int | None) -> list[dict[str, Any]]:
    """Return a row for each question: whether base and tuned model chose rightly, and the prompt that they saw."""
    from lm_eval.models.huggingface import HFLM

    tokenizer = AutoTokenizer.from_pretrained(run.weights)
    dtype = choose_precision(recipe.model.get("dtype")).dtype
    answered: dict[str, list[dict[str, Any]]] = {}
    for which, load in loaders(recipe, run, dtype).items():
        with load() as model:
            template = recipe.data.chat_template_kwargs
            asker = HFLM(
                pretrained=model, tokenizer=tokenizer, batch_size=batch_size(recipe), chat_template_args=template
            )
            answered[which] = []
            for task, manager in managers.items():
                print(f"{which}: {task}", flush=True)
                answered[which] += ask(asker, task, manager, recipe.data.system, limit)
    return [
        {
            "task": base["task"],
            "doc": base["doc_id"],
            "base": int(base["acc"]),
            "tuned": int(tuned["acc"]),
            "prompt": base["arguments"][0][0],
        }
        for base, tuned in zip(answered["base"], answered["tuned"], strict=True)
    ]


def ask(asker: Any, task: str, manager: Any, system: str | None, limit: int | None) -> list[dict[str, Any]]:
    """Return lm-eval's sample of each question, in order, under its task."""
    from lm_eval import simple_evaluate

    try:
        # Task files name their rows as seen from the folder that holds benchmarks/
        with contextlib.chdir(find_file(TASKS).resolve().parents[1]):
            found = simple_evaluate(
                asker,
                tasks=[task],
                task_manager=manager,
                num_fewshot=0,
                limit=limit,
                bootstrap_iters=0,
                apply_chat_template=True,
                system_instruction=system,
                verbosity="ERROR",
            )
    except (OSError, ValueError, ImportError) as error:
        why = " ".join(str(error).split()) or type(error).__name__
        remedy = "check that the hub is reachable; offline there is TASKS=sample"
        raise RecipeError.of("TASKS", f"{task} cannot be loaded: {why}", remedy) from error
    samples = [sample | {"task": task} for of_task in found["samples"].values() for sample in of_task]
    if not all("acc" in sample for sample in samples):
        raise RecipeError.of("TASKS", f"{task} is not multiple choice", "name tasks that lm-eval scores by acc")
    return samples


def compare_rows(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return how many rows there are, and the paired difference of their accuracy."""
    base, tuned = ([{"right": row[which]} for row in rows] for which in ("base", "tuned"))
    questions = [f"{row['task']} {row['doc']}" for row in rows]
    return {"rows": len(rows)} | compare_scores(base, tuned, questions, (ACCURACY,))["accuracy"]


def verdict(name: str, found: dict[str, Any]) -> str:
    """Return the answer in one sentence."""
    claim = {
        "better": f"{name} answers more of these questions than its base model",
        "worse": f"{name} cost knowledge: it answers fewer of these questions than its base model",
        "no evidence": f"no evidence that {name} gained or lost knowledge",
    }[found["verdict"]]
    interval = interval_text(found, 1, scale=100)
    return f"{claim}: {100 * found['difference']:+.1f} points (95 %: {interval}) on {found['rows']} questions."
