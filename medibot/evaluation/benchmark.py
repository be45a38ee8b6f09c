"""Ask base and tuned model multiple-choice questions by lm-eval: did the fine-tune cost knowledge?"""

import contextlib
import logging
from typing import Any

from transformers import AutoTokenizer

from medibot import tracking
from medibot.errors import RecipeError, one_line
from medibot.evaluation.metrics import Metric
from medibot.evaluation.report import Report, difference_table, write_report
from medibot.evaluation.scores import Rows, batch_size, model_loader
from medibot.evaluation.statistics import FIGURES, RESAMPLES, SEED, compare_scores, interval_text
from medibot.model.loading import silence_upstream
from medibot.model.precision import Precision, choose_precision
from medibot.recipe import Recipe, load_recipe
from medibot.recipe.files import find_file
from medibot.run import Run, find_finished_run, locked

TASKS = "benchmarks/tasks"
ACCURACY = Metric("accuracy", "accuracy", "right", "higher", "Share of questions answered rightly.")
SUBJECTS = ("anatomy", "clinical_knowledge", "college_biology", "college_medicine", "medical_genetics")
MEDICAL = ("medqa", "medmcqa", "pubmedqa", *(f"mmlu_{name}" for name in (*SUBJECTS, "professional_medicine")))


def benchmark(name: str, tasks: list[str], limit: int | None = None) -> Report:
    """Return the accuracy of base and tuned model on each task, the medical ones by default, with paired intervals.

    Zero-shot, through the run's own chat template and system prompt; `limit` asks the first so many of each task.
    Writes outputs/<name>/benchmark/{results.json, rows.jsonl}. Only tasks with a single correct option count ("acc").
    """
    managers = task_managers(list(dict.fromkeys(tasks or MEDICAL)))
    run = find_finished_run(name)
    recipe = load_recipe(str(run.recipe))
    precision = choose_precision(recipe.model.get("dtype"))
    with locked(run):
        silence_upstream()
        rows = ask_both(run, recipe, precision, managers, limit)
        compared = {task: compare_rows([row for row in rows if row["task"] == task]) for task in managers}
        parts = compared | {"all": compare_rows(rows)}
        results: dict[str, Any] = {"run": name, "limit": limit, "precision": precision.name}
        results |= {"seed": SEED, "resamples": RESAMPLES, "tasks": compared, "all": parts["all"]}
        results["verdict"] = verdict(name, parts["all"])
        quick = [f"A quick look: at most {limit} questions of each task."] if limit else []
        lines = [([task, str(found["rows"])], found) for task, found in parts.items()]
        shown = [*quick, difference_table(["task", "questions"], lines, 3)]
        files = {"results.json": results, "rows.jsonl": rows}
        report = write_report(run.folder / "benchmark", files, results["verdict"], shown)
        config = {"recipe": recipe.as_dict(), "run": name, "run_fingerprint": run.record()["fingerprint"]}
        with tracking.tracked(recipe, run, config, True, job_type="benchmark") as mirrored:
            mirrored.summary({f"benchmark/{task}/{key}": v for task, part in parts.items() for key, v in part.items()})
    return report


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
    for task in set(tasks).difference(ours.all_tasks, others.all_tasks):
        what = f"neither {TASKS} nor lm-eval has a task {task!r}"
        raise RecipeError.of("TASKS", what, f"there are: {', '.join(sorted(ours.all_tasks))}, and lm-eval's own")
    return {task: ours if task in ours.all_tasks else others for task in tasks}


def ask_both(run: Run, recipe: Recipe, precision: Precision, managers: dict[str, Any], limit: int | None) -> Rows:
    """Return a row for each question: whether base and tuned model chose rightly, and the prompt that they saw."""
    from lm_eval.models.huggingface import HFLM

    load, tokenizer = model_loader(recipe, run, precision.dtype), AutoTokenizer.from_pretrained(run.weights)
    settings = {"batch_size": batch_size(recipe), "chat_template_args": recipe.data.chat_template_kwargs}
    asked = {"num_fewshot": 0, "limit": limit, "bootstrap_iters": 0, "verbosity": "ERROR"}
    asked |= {"apply_chat_template": True, "system_instruction": recipe.data.system}
    rows: dict[tuple[str, int], dict[str, Any]] = {}
    for which in ("base", "tuned"):
        with load(which) as model:
            asker = HFLM(pretrained=model, tokenizer=tokenizer, **settings)
            for task, manager in managers.items():
                print(f"{which}: {task}", flush=True)
                for sample in ask(asker, task, {"task_manager": manager} | asked):
                    row = rows.setdefault((task, sample["doc_id"]), {"task": task, "doc": sample["doc_id"]})
                    row |= {which: int(sample["acc"]), "prompt": sample["arguments"][0][0]}
    return list(rows.values())


def ask(asker: Any, task: str, settings: dict[str, Any]) -> Rows:
    """Return lm-eval's sample of each question, in order."""
    from lm_eval import simple_evaluate

    try:
        # Task files name their rows as seen from the folder that holds benchmarks/
        with contextlib.chdir(find_file(TASKS).resolve().parents[1]):
            found = simple_evaluate(asker, tasks=[task], **settings)
    except (OSError, ValueError, ImportError) as error:
        what = f"{task} cannot be loaded: {one_line(error) or type(error).__name__}"
        raise RecipeError.of("TASKS", what, "check that the hub is reachable; offline there is TASKS=sample") from error
    samples = [sample for of_task in found["samples"].values() for sample in of_task]
    if not all("acc" in sample for sample in samples):
        raise RecipeError.of("TASKS", f"{task} is not multiple choice", "name tasks that lm-eval scores by acc")
    return samples


def compare_rows(rows: Rows) -> dict[str, Any]:
    """Return how many rows there are, and the paired difference of their accuracy."""
    base, tuned = ([{"right": row[which]} for row in rows] for which in ("base", "tuned"))
    questions = [f"{row['task']} {row['doc']}" for row in rows]
    found = compare_scores(base, tuned, questions, (ACCURACY,))["accuracy"]
    return {"rows": len(rows)} | {key: found[key] for key in FIGURES}


def verdict(name: str, found: dict[str, Any]) -> str:
    """Return the answer in one sentence."""
    claim = {
        "better": f"{name} answers more of these questions than its base model",
        "worse": f"{name} cost knowledge: it answers fewer of these questions than its base model",
        "no evidence": f"no evidence that {name} gained or lost knowledge",
    }[found["verdict"]]
    interval = interval_text(found, 1, scale=100)
    return f"{claim}: {100 * found['difference']:+.1f} points (95 %: {interval}) on {found['rows']} questions."
