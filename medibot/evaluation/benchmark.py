"""Did the fine-tune cost knowledge? Base and tuned model on multiple-choice questions, asked by lm-eval.

medibot benchmark sample --run quickstart
"""

import json
import logging
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from medibot import tracking
from medibot.errors import RecipeError
from medibot.evaluation.evaluate import RESAMPLES, SEED
from medibot.evaluation.metrics import ACCURACY
from medibot.evaluation.scores import batch_size, loaders
from medibot.evaluation.statistics import compare_scores
from medibot.model.loading import silence_upstream
from medibot.model.precision import choose_precision
from medibot.recipe import load_recipe
from medibot.run import Run, find_finished_run, locked

TASKS = Path("benchmarks/tasks")


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


def benchmark(name: str, tasks: list[str], limit: int | None = None) -> dict[str, Any]:
    """Accuracy of base and tuned model on each task (the medical ones by default), with a paired 95 % interval.

    Zero-shot, through the run's own chat template and system prompt; `limit` asks the first so many of each task.
    Writes outputs/<name>/benchmark/{results.json, rows.jsonl}. Only a single correct option counts ("acc").
    """
    tasks = list(dict.fromkeys(tasks or MEDICAL))
    managers = task_managers(tasks)
    this = find_finished_run(name)
    recipe = load_recipe(str(this.recipe))
    with locked(this, True):
        silence_upstream()
        tokenizer = AutoTokenizer.from_pretrained(this.weights)
        precision = choose_precision(recipe.model.get("dtype"))
        answered: dict[str, dict[str, list[dict[str, Any]]]] = {}
        for which, load in loaders(recipe, this, precision.dtype).items():
            with load() as weights:
                asker = language_model(weights, tokenizer, batch_size(recipe), recipe.data.chat_template_kwargs)
                answered[which] = {}
                for task, manager in managers.items():
                    print(f"{which}: {task}", flush=True)
                    answered[which][task] = ask(asker, task, manager, recipe.data.system, limit)
        rows = [
            {"task": task, "doc": base["doc_id"], "base": right(base), "tuned": right(tuned), "prompt": prompt(base)}
            for task in tasks
            for base, tuned in zip(answered["base"][task], answered["tuned"][task], strict=True)
        ]
        parts = {task: [row for row in rows if row["task"] == task] for task in tasks}
        results = {
            "run": name,
            "limit": limit,
            "precision": precision.name,
            "seed": SEED,
            "resamples": RESAMPLES,
            "tasks": {task: {"rows": len(part)} | compared(part) for task, part in parts.items()},
            "all": {"rows": len(rows)} | compared(rows),
        }
        results["verdict"] = verdict(name, results["all"])
        report = Run(this.folder / "benchmark")
        report.folder.mkdir(exist_ok=True)
        report.write("rows.jsonl", "\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
        report.write("results.json", results)
        config = {"recipe": recipe.as_dict(), "run": name, "run_fingerprint": this.record()["fingerprint"]}
        with tracking.tracked(recipe, this, config, True, job_type="benchmark") as mirrored:
            found = results["tasks"] | {"all": results["all"]}
            mirrored.summary({f"benchmark/{task}/{key}": v for task, part in found.items() for key, v in part.items()})
    show(results, report.folder)
    return results


def task_managers(tasks: list[str]) -> dict[str, Any]:
    """lm-eval's manager for each task: ours come from benchmarks/tasks, whatever lm-eval has under the same name."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        remedy = "run: make benchmark, or pip install -e '.[benchmark]'"
        raise RecipeError.of("benchmark", "lm-eval is not installed", remedy) from error
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    ours = TaskManager(include_path=str(TASKS), include_defaults=False)
    others = TaskManager() if set(tasks) - set(ours.all_tasks) else ours
    managers = {task: ours if task in ours.all_tasks else others for task in tasks}
    for task, manager in managers.items():
        if task not in manager.all_tasks:
            what = f"neither {TASKS} nor lm-eval has a task {task!r}"
            raise RecipeError.of("TASKS", what, f"there are: {', '.join(sorted(ours.all_tasks))}, and lm-eval's own")
    return managers


def language_model(weights: Any, tokenizer: Any, batch: int, template: dict[str, Any]) -> Any:
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=weights, tokenizer=tokenizer, batch_size=batch, chat_template_args=template)


def ask(asker: Any, task: str, manager: Any, system: str | None, limit: int | None) -> list[dict[str, Any]]:
    """lm-eval's sample of each question, in order."""
    from lm_eval import simple_evaluate

    try:
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
    samples = [sample for of_task in found["samples"].values() for sample in of_task]
    if not all("acc" in sample for sample in samples):
        raise RecipeError.of("TASKS", f"{task} is no multiple choice", "name tasks that lm-eval scores by acc")
    return samples


def right(sample: dict[str, Any]) -> int:
    return int(sample["acc"])


def prompt(sample: dict[str, Any]) -> str:
    """What the model saw before the option."""
    return sample["arguments"][0][0]


def compared(rows: list[dict[str, Any]]) -> dict[str, Any]:
    base, tuned = ([{"right": row[which]} for row in rows] for which in ("base", "tuned"))
    asked = [f"{row['task']} {row['doc']}" for row in rows]
    return compare_scores(base, tuned, asked, SEED, RESAMPLES, (ACCURACY,))["accuracy"]


def verdict(name: str, found: dict[str, Any]) -> str:
    """The answer in one sentence."""
    claim = {
        "better": f"{name} answers more of these questions than its base model",
        "worse": f"{name} cost knowledge: it answers fewer of these questions than its base model",
        "no evidence": f"no evidence that {name} gained or lost knowledge",
    }[found["verdict"]]
    interval = "one question has no interval"
    if found["low"] is not None:
        interval = f"95 %: {100 * found['low']:+.1f} to {100 * found['high']:+.1f}"
    return f"{claim}: {100 * found['difference']:+.1f} points ({interval}) on {found['rows']} questions."


def show(results: dict[str, Any], folder: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("task", "questions", "base", "tuned", "difference", "95 % interval", "verdict")
    for task, found in [*results["tasks"].items(), ("all", results["all"])]:
        interval = "-" if found["low"] is None else f"{found['low']:+.3f} to {found['high']:+.3f}"
        figures = (f"{found['baseline']:.3f}", f"{found['value']:.3f}", f"{found['difference']:+.3f}")
        table.add_row(task, str(found["rows"]), *figures, interval, found["verdict"])
    Console(markup=False, highlight=False).print(table)
    if results["limit"]:
        print(f"A quick look: at most {results['limit']} questions of each task.")
    print(results["verdict"])
    print(f"written: {folder}/results.json, rows.jsonl")
