"""Ask base and tuned model multiple-choice questions by lm-eval: did the fine-tune cost knowledge?"""

import contextlib
import itertools
import logging
from typing import Any

from medibot import tracking
from medibot.errors import RecipeError, explain_memory, one_line
from medibot.evaluation.metrics import Metric
from medibot.evaluation.report import Report, difference_table, write_report
from medibot.evaluation.scores import FEWER_ROWS, Rows, model_loader
from medibot.evaluation.statistics import FIGURES, RESAMPLES, SEED, compare_scores, interval_text
from medibot.model.loading import silence_upstream
from medibot.model.precision import Precision, choose_precision
from medibot.model.tokenizer import load_saved_tokenizer
from medibot.recipe import Recipe, load_recipe
from medibot.recipe.files import find_file
from medibot.run import Run, find_finished_run, locked

TASKS = "benchmarks/tasks"
ACCURACY = Metric("accuracy", "accuracy", "right", "higher", "Share of questions answered rightly.")
SUBJECTS = ("anatomy", "clinical_knowledge", "college_biology", "college_medicine", "medical_genetics")
MEDICAL = ("medqa", "medmcqa", "pubmedqa", *(f"mmlu_{name}" for name in (*SUBJECTS, "professional_medicine")))
CLAIMS = {
    "better": "{} answers more of these questions than its base model",
    "worse": "{} cost knowledge: it answers fewer of these questions than its base model",
    "no evidence": "no evidence that {} gained or lost knowledge",
}


@explain_memory("benchmark", FEWER_ROWS)
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
        parts: dict[str, dict[str, Any]] = {}
        for task in (*managers, "all"):
            asked = [row for row in rows if task in {row["task"], "all"}]
            base, tuned = ([{"right": row[which]} for row in asked] for which in ("base", "tuned"))
            questions = [f"{row['task']} {row['doc']}" for row in asked]
            found = compare_scores(base, tuned, questions, (ACCURACY,))["accuracy"]
            parts[task] = {"rows": len(asked)} | {key: found[key] for key in FIGURES}
        whole, interval = parts["all"], interval_text(parts["all"], 1, scale=100)
        claim = CLAIMS[whole["verdict"]].format(name)
        verdict = f"{claim}: {100 * whole['difference']:+.1f} points (95 %: {interval}) on {whole['rows']} questions."
        results: dict[str, Any] = {"run": name, "limit": limit, "precision": precision.name}
        results |= {"seed": SEED, "resamples": RESAMPLES, "tasks": {task: parts[task] for task in managers}}
        results |= {"all": whole, "verdict": verdict}
        quick = [f"A quick look: at most {limit} questions of each task."] if limit else []
        lines = [([task, str(part["rows"])], part) for task, part in parts.items()]
        shown = [*quick, difference_table(["task", "questions"], lines, 3)]
        report = write_report(run.folder / "benchmark", {"results.json": results, "rows.jsonl": rows}, verdict, shown)
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
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    load, tokenizer = model_loader(recipe, run, precision.dtype), load_saved_tokenizer(run.weights)
    settings = {"batch_size": recipe.training.get("per_device_eval_batch_size", 8)}
    settings |= {"chat_template_args": recipe.data.chat_template_kwargs}
    asked = {"num_fewshot": 0, "limit": limit, "bootstrap_iters": 0, "verbosity": "ERROR"}
    asked |= {"apply_chat_template": True, "system_instruction": recipe.data.common_system}
    rows: dict[tuple[str, int], dict[str, Any]] = {}
    for which in ("base", "tuned"):
        with load(which) as model:
            asker = HFLM(pretrained=model, tokenizer=tokenizer, **settings)
            for task, manager in managers.items():
                print(f"{which}: {task}", flush=True)
                try:
                    # Task files name their rows as seen from the folder that holds benchmarks/
                    with contextlib.chdir(find_file(TASKS).resolve().parents[1]):
                        found = simple_evaluate(asker, tasks=[task], task_manager=manager, **asked)
                except (OSError, ValueError, ImportError) as error:
                    what = f"{task} cannot be loaded: {one_line(error) or type(error).__name__}"
                    remedy = "check that the hub is reachable; offline there is TASKS=sample"
                    raise RecipeError.of("TASKS", what, remedy) from error
                for sample in itertools.chain.from_iterable(found["samples"].values()):
                    if "acc" not in sample:
                        remedy = "name tasks that lm-eval scores by acc"
                        raise RecipeError.of("TASKS", f"{task} is not multiple choice", remedy)
                    row = rows.setdefault((task, sample["doc_id"]), {"task": task, "doc": sample["doc_id"]})
                    row |= {which: int(sample["acc"]), "prompt": sample["arguments"][0][0]}
    return list(rows.values())
