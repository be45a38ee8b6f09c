"""Train a recipe into its output folder: start, go on from the last whole checkpoint, or say that it is done."""

import os
import shutil
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from safetensors import SafetensorError

from medibot import run as runs
from medibot import tracking
from medibot.data.preparation import own_rule_files
from medibot.data.prepared import Prepared, prepare
from medibot.errors import RecipeError, explain_memory, is_out_of_memory
from medibot.export.engines import serving_lines
from medibot.model.loading import identify_base, method_name, weights_dtype
from medibot.model.tokenizer import save_tokenizer
from medibot.planning.conflicts import refuse_cast
from medibot.planning.gpus import ask_torch, require_usable_gpus
from medibot.planning.hardware import detect_device, detect_hardware
from medibot.planning.plan import Plan, make_plan
from medibot.recipe import Recipe
from medibot.recipe.resolved import describe_environment, dump_resolved_recipe
from medibot.serving.evidence import FILE, build_evidence, require_columns
from medibot.training.packing import require_rows_apart
from medibot.training.processes import common_checkpoint, from_first, holding, require_same, together
from medibot.training.record import Record, count_parameters, summarize
from medibot.training.signals import Signals
from medibot.training.trainer import CountingTrainer, audit_splits, build_trainer

# A collective that lost a process, as gloo and nccl say it
PEER_LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited")
# What makes a model that is loaded smaller
LESS = "end what else uses this memory, add a section quantization, or take a smaller model"


def train(recipe: Recipe, name: str, anyway: bool = False) -> runs.Run:
    """Train `recipe` into outputs/<name> and return the run; a finished run is left as it is.

    Raises RecipeError for what by the plan cannot fit this device, unless `anyway`, and for a folder that was made from
    something else. Raises Stopped where a signal ended the training, its last step in a whole checkpoint.
    """
    state = join_processes()
    main = state.is_main_process
    with together():
        run, prepared = runs.open_run(name), prepare(recipe)
        key, parts = runs.run_fingerprint(recipe, prepared.fingerprint, identify_base(recipe), state.num_processes)
        runs.refuse_changed(run, parts)
    require_same(parts)
    if from_first(lambda: run.record().get("status") == "finished"):
        if main:
            print(f"outputs/{name} is finished, made from exactly this; to train again: another RUN=name, or delete it")
        return run
    with holding(run) as keeps:
        plan = make_plan(prepared, detect_device(prepared.precision.dtype), detect_hardware(state.num_processes))
        with together():
            refuse_cast(recipe, plan.hardware, prepared.precision.name)
            refuse_machine(plan, keeps, anyway)
        with explained(run, plan), explain_memory("training", f"by the plan, {plan}: {LESS}"):
            trainer = build_trainer(prepared, run)
            require_rows_apart(trainer, recipe)
        audits = audit_splits(trainer, prepared)
        for audit in audits:
            audit.refuse_faults()
        require_columns(recipe, prepared.load("train"))
        checkpoint, config = common_checkpoint(run), {}
        trainer.args.save_on_each_node = keeps
        if main:
            config = begin(trainer, prepared, plan, run, checkpoint)
            run.write("audit.json", [audit.as_dict() for audit in audits])
        if keeps:
            run.folder.mkdir(parents=True, exist_ok=True)
            run.set_torn_aside(checkpoint)
            run.write("run.json", {"status": "running", "fingerprint": key, "parts": parts})
        # An interrupted run was evaluated at its start already: a second time would be in the record twice
        trainer.args.eval_on_start = trainer.args.eval_on_start and checkpoint is None
        state.wait_for_everyone()
        with tracking.tracked(recipe, run, config, main) as mirror, explained(run, plan), Signals() as signals:
            trainer.add_callback(Record(trainer, run, mirror, prepared, signals))
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            save(trainer, prepared, run, mirror, plan)
    if main:
        print_next_steps(run, recipe)
    return run


def refuse_machine(plan: Plan, keeps: bool, anyway: bool) -> None:
    """Raise RecipeError for what by the plan cannot fit here, and where shards could not be resumed."""
    if keeps and not PartialState().is_main_process and plan.hardware.sharded:
        what = f"{plan.hardware.kind} writes checkpoints on the first machine alone, and another shares no disk with it"
        raise RecipeError.of("accelerate", what, "set MEDIBOT_OUTPUTS to a folder that all machines share")
    if not anyway and (doubt := plan.require_fit()) and PartialState().is_main_process:
        print(f"warning: {doubt}", file=sys.stderr, flush=True)


def join_processes() -> PartialState:
    """Return accelerate's state of this process; raise RecipeError for an unusable GPU, or processes that did not meet."""
    require_usable_gpus(ask_torch())
    state = PartialState(cpu=not torch.cuda.is_available())
    wanted = int(os.environ.get("MEDIBOT_PROCESSES", os.environ.get("WORLD_SIZE", "1")))
    if state.num_processes != wanted:
        what = f"{wanted} processes were launched and {state.num_processes} found each other"
        raise RecipeError.of("accelerate", what, "on CPUs use accelerate_configs/cpu.yaml or cpu-2.yaml")
    return state


def begin(
    trainer: CountingTrainer, prepared: Prepared, plan: Plan, run: runs.Run, checkpoint: Path | None
) -> dict[str, Any]:
    """Print what is about to be trained, write what it is made from, and return that for the mirror."""
    recipe, precision, args = prepared.recipe, prepared.precision, trainer.args
    rows, steps, ways = args.per_device_train_batch_size, args.gradient_accumulation_steps, args.world_size
    (trainable, total), batch = count_parameters(trainer.model), rows * steps * ways
    print(f"model      {recipe.model['pretrained_model_name_or_path']}, {method_name(recipe)}")
    print(f"precision  {precision.name}: {precision.reason}")
    print(f"trainable  {trainable:,} of {total:,} parameters ({trainable / total:.2%})")
    print(f"batch      {rows} per device x {steps} accumulated x {ways} processes = {batch} rows a step")
    print(f"memory     {plan}")
    for name in run.set_torn_aside(checkpoint):
        print(f"{name} was never finished or is damaged: set aside in {run.checkpoints}/torn")
    if checkpoint:
        print(f"going on from {checkpoint}", flush=True)
    # Without a checkpoint everything is done again, the start included
    runs.rewind_record(run, runs.checkpoint_step(checkpoint) if checkpoint else -1)
    decided = {
        "dtype": precision.name,
        "weights_dtype": str(weights_dtype(recipe, precision.dtype)).removeprefix("torch."),
        "why": precision.reason,
        "processes": ways,
        "global_batch_size": batch,
        "trainable_parameters": trainable,
        "parameters": total,
    }
    environment = describe_environment(torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu") | decided
    shown = {"split": prepared.split | {"data": prepared.fingerprint}, "environment": environment}
    ledger = {"ledger": prepared.ledger, "leaks": prepared.leaks}
    run.folder.mkdir(parents=True, exist_ok=True)
    run.write("recipe.yaml", dump_resolved_recipe(recipe, decided))
    # The recipe's own rules stand beside it, there as here
    for file in own_rule_files(recipe):
        copy = run.folder / file.relative_to(recipe.path.parent)
        if copy.resolve() != file.resolve():
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copy)
    run.write(FILE, build_evidence(recipe, prepared))
    for name, content in (shown | {"ledger": ledger, "plan": plan.as_dict()}).items():
        run.write(f"{name}.json", content)
    # Counts only: the ledger's examples are rows
    counted = [{key: value for key, value in line.items() if key != "examples"} for line in prepared.ledger]
    return shown | ledger | {"ledger": counted, "recipe": recipe.as_dict()}


@contextmanager
def explained(run: runs.Run, plan: Plan) -> Generator[None]:
    """Turn what a machine runs out of into a RecipeError: memory, disk, the right to write, another process."""
    try:
        yield
    except (OSError, RuntimeError, MemoryError, SafetensorError) as error:
        last = run.last_checkpoint()
        kept = f"{last.name} is whole" if last else "no checkpoint is whole yet"
        if is_out_of_memory(error):
            raise RecipeError.of("training", f"out of memory ({kept}); by the plan, {plan}", plan.advice()) from error
        runs.refuse_full_disk(run, error, f"{kept}; make room: the same command then goes on")
        if PartialState().num_processes > 1 and any(words in str(error) for words in PEER_LOST):
            what = f"another process of this run ended, or cannot be reached ({kept})"
            raise RecipeError.of("accelerate", what, "what it said is above; the same command goes on") from error
        raise


def save(trainer: CountingTrainer, prepared: Prepared, run: runs.Run, mirror: tracking.Mirror, plan: Plan) -> None:
    """Write the trained weights with all that answering needs, mark the run finished, and send what it came to."""
    partial = run.folder / ".model.partial"
    # The first machine keeps the model; what the others keep is what a resume needs
    trainer.args.save_on_each_node = False
    trainer.save_model(str(partial))
    if not PartialState().is_main_process:
        return
    if not runs.has_whole_weights(partial):
        remedy = "see accelerate_configs/README.md; the last checkpoint is kept"
        raise RecipeError.of("accelerate", "the trained weights could not be gathered: nothing was saved", remedy)
    save_tokenizer(prepared.tokenizer, prepared.recipe, partial)
    prepared.generation.save_pretrained(partial)
    runs.sync_to_disk(partial)
    shutil.rmtree(run.weights, ignore_errors=True)
    partial.rename(run.weights)
    summary, record = summarize(trainer, run, plan), run.record()
    run.write("plan.json", plan.as_dict() | {"measured": summary["memory"]})
    mirror.summary(summary)
    run.write("run.json", record | {"status": "finished", "summary": summary})
    # As W&B artifacts; a full model is too large to go unasked
    data = f"data-{prepared.fingerprint[:12]}"
    found = {"data_fingerprint": prepared.fingerprint, "split_fingerprint": prepared.split["fingerprint"]}
    mirror.artifact("dataset", data, [run.folder / name for name in ("ledger.json", "split.json")], found, {})
    if prepared.recipe.lora:
        of_run = {"run": run.name, "run_fingerprint": record["fingerprint"], "base": record["parts"]["base"]}
        mirror.artifact("model", f"{run.name}-adapter", [run.weights], found | of_run, {data: "dataset"})


def print_next_steps(run: runs.Run, recipe: Recipe) -> None:
    """Print the fixed questions' answers before and after, and what to do next."""
    rows, summary = runs.read_lines(run.answers), run.record()["summary"]
    for question in dict.fromkeys(row["question"] for row in rows):
        said = [row for row in rows if row["question"] == question]
        print(f"\n{question}")
        for row in (said[0], said[-1]):
            print(f"  step {row['global_step']:>4}: {' '.join(row['answer'].split())[:300]}")
    if "eval_loss_first" in summary:
        print(f"\nvalidation loss {summary['eval_loss_first']:.4f} -> {summary['eval_loss_last']:.4f}")
    print(f"\nDone: {run.folder}  (recipe, ledger, split, metrics, answers; weights in {run.weights})")
    print(f'Next:  make ask RUN={run.name} Q="What is anemia?"    or  make chat RUN={run.name}')
    print("Serve: by another program, as it was trained (docs/serving.md)")
    for program, line in serving_lines(run, recipe).items():
        print(f"       {program:<9}  {line}")
