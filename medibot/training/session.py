"""Train a recipe into its output folder: start, go on from the last whole checkpoint, or say that it is done."""

import shutil
from pathlib import Path
from typing import Any

from accelerate import PartialState

from medibot import tracking
from medibot.data.gate import Audit, audit_labels, refuse_faults
from medibot.data.prepared import Prepared, prepare
from medibot.errors import RecipeError, Stopped
from medibot.model.loading import identify_base, method_name, weights_dtype
from medibot.planning.hardware import GB, detect_device, detect_layout
from medibot.planning.plan import Plan, make_plan
from medibot.recipe import Recipe
from medibot.recipe.resolved import describe_environment, dump_resolved_recipe
from medibot.run import (
    Run,
    checkpoint_step,
    has_whole_weights,
    locked,
    open_run,
    read_lines,
    refuse_changed,
    require_writable,
    run_fingerprint,
    sync_to_disk,
)
from medibot.serving.evidence import FILE, build_evidence, require_columns
from medibot.training.record import Record, count_parameters, device_name, summarize, upload, wandb_config
from medibot.training.signals import Signals, explained
from medibot.training.trainer import CountingTrainer, build_trainer, load_weights, require_launched_world


def train(recipe: Recipe, name: str, anyway: bool = False) -> Run:
    """Train `recipe` into outputs/<name> and return the run; a finished run is left as it is.

    Raises RecipeError for what by the plan cannot fit this device, unless `anyway`, and for a folder that was made from
    something else. Raises Stopped where a signal ended the training and a whole checkpoint is there.
    """
    state = require_launched_world()
    run, prepared = open_run(name), prepare(recipe)
    key, parts = run_fingerprint(recipe, prepared.fingerprint, identify_base(recipe), state.num_processes)
    refuse_changed(run, parts)
    if run.record().get("status") == "finished":
        say(f"outputs/{name} is finished and made from exactly this. To train again: another RUN=name, or delete it.")
        return run
    require_writable(run)
    plan = make_plan(prepared, detect_device(prepared.precision.dtype), detect_layout(state.num_processes))
    if state.is_main_process and not anyway:
        plan.require_fit()
    trainer, audits = assemble(prepared, run)
    describe(trainer, prepared, plan)
    with locked(run, state.is_main_process):
        checkpoint = begin(run, prepared, key, parts, audits, trainer, plan)
        # An interrupted run was evaluated at its start already: a second time would be in the record twice
        trainer.args.eval_on_start = trainer.args.eval_on_start and checkpoint is None
        state.wait_for_everyone()
        with (
            tracking.tracked(recipe, run, wandb_config(run, prepared), state.is_main_process) as mirror,
            explained(run, trainer, plan),
            Signals() as signals,
        ):
            record = Record(trainer, run, mirror, prepared, checkpoint, signals)
            trainer.add_callback(record)
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            if record.stopped:
                stop(trainer, run, record)
            save(trainer, prepared, run, mirror, plan)
    return run


def say(text: str) -> None:
    """Print once, on the main process."""
    if PartialState().is_main_process:
        print(text, flush=True)


def assemble(prepared: Prepared, run: Run) -> tuple[CountingTrainer, list[Audit]]:
    """Build the trainer and pass the gate; remove the folder of a run that does not get through."""
    started = run.folder.exists()
    try:
        trainer = build_trainer(prepared, run, lambda: load_weights(prepared))
        audits = [
            audit
            for split, dataset in (("train", trainer.train_dataset), ("validation", trainer.eval_dataset))
            if dataset is not None
            for audit in [check(trainer, prepared, split, dataset)]
        ]
        require_columns(prepared.recipe, prepared.load("train"))
    except RecipeError:
        if not started and PartialState().is_main_process:
            shutil.rmtree(run.folder, ignore_errors=True)
        raise
    return trainer, audits


def check(trainer: CountingTrainer, prepared: Prepared, split: str, dataset: Any) -> Audit:
    """Audit what the trainer will really read of a split, every row of it."""
    stops, limit = prepared.generation.eos_token_id, trainer.args.max_length
    audit = audit_labels(dataset, prepared.load(split), prepared.tokenizer, stops, limit, split)
    refuse_faults(audit, dataset, prepared.tokenizer)
    return audit


def describe(trainer: CountingTrainer, prepared: Prepared, plan: Plan) -> None:
    """Print what is about to be trained, in the numbers that matter."""
    trainable, total = count_parameters(trainer.model)
    args, ways = trainer.args, PartialState().num_processes
    rows, accumulated = args.per_device_train_batch_size, args.gradient_accumulation_steps
    needed, capacity = plan.memory()["peak"] / GB, plan.device.capacity / GB
    batch = (
        f"{rows} per device x {accumulated} accumulated x {ways} processes = {rows * accumulated * ways} rows a step"
    )
    say(f"model      {prepared.recipe.model['pretrained_model_name_or_path']}, {method_name(prepared.recipe)}")
    say(f"precision  {prepared.precision.name}: {prepared.precision.reason}")
    say(f"trainable  {trainable:,} of {total:,} parameters ({trainable / total:.2%})")
    say(f"batch      {batch}")
    say(f"memory     {needed:.1f} GB planned for {plan.rows} rows of {plan.longest} tokens, {capacity:.1f} GB here")


def begin(
    run: Run,
    prepared: Prepared,
    key: str,
    parts: dict[str, Any],
    audits: list[Audit],
    trainer: CountingTrainer,
    plan: Plan,
) -> Path | None:
    """Write what the run is made from; return the checkpoint to go on from, None for a start."""
    checkpoint = run.last_checkpoint()
    if not PartialState().is_main_process:
        return checkpoint
    for name in run.set_torn_aside():
        print(f"{name} was never finished or is damaged: set aside in {run.checkpoints}/torn")
    if checkpoint:
        print(f"going on from {checkpoint}")
    trainable, total = count_parameters(trainer.model)
    args, processes = trainer.args, PartialState().num_processes
    dtype = weights_dtype(prepared.recipe, prepared.precision.dtype)
    decided = {
        "dtype": prepared.precision.name,
        "weights_dtype": str(dtype).removeprefix("torch."),
        "why": prepared.precision.reason,
        "processes": processes,
        "global_batch_size": args.per_device_train_batch_size * args.gradient_accumulation_steps * processes,
        "trainable_parameters": trainable,
        "parameters": total,
    }
    run.folder.mkdir(parents=True, exist_ok=True)
    run.write("recipe.yaml", dump_resolved_recipe(prepared.recipe, decided))
    run.write("ledger.json", {"ledger": prepared.ledger, "leaks": prepared.leaks})
    run.write("split.json", prepared.split | {"data": prepared.fingerprint})
    run.write("audit.json", [audit.as_dict() for audit in audits])
    run.write(FILE, build_evidence(prepared.recipe, prepared))
    run.write("environment.json", describe_environment(device_name()) | decided)
    run.write("run.json", {"status": "running", "fingerprint": key, "parts": parts})
    run.write("plan.json", plan.as_dict())
    return checkpoint


def save(trainer: CountingTrainer, prepared: Prepared, run: Run, mirror: tracking.Mirror, plan: Plan) -> None:
    """Write the trained weights with all that answering needs, then mark the run finished."""
    partial = run.folder / ".model.partial"
    trainer.save_model(str(partial))
    if not PartialState().is_main_process:
        return
    if not has_whole_weights(partial):
        remedy = "see accelerate_configs/README.md; the last checkpoint is kept"
        raise RecipeError.of("accelerate", "the trained weights could not be gathered: nothing was saved", remedy)
    prepared.generation.save_pretrained(partial)
    sync_to_disk(partial)
    shutil.rmtree(run.weights, ignore_errors=True)
    partial.rename(run.weights)
    summary = summarize(trainer, run, plan)
    run.write("plan.json", plan.as_dict() | {"measured": summary["memory"]})
    mirror.summary(summary)
    run.write("run.json", run.record() | {"status": "finished", "summary": summary})
    upload(prepared, run, mirror)


def stop(trainer: CountingTrainer, run: Run, record: Record) -> None:
    """End a training that a signal stopped: its last step is in a checkpoint, and nothing of it looks final."""
    step = trainer.state.global_step
    last = run.last_checkpoint()
    PartialState().wait_for_everyone()
    # Under save_strategy: best an evaluation that is worse has taken the save back
    if last is None or checkpoint_step(last) != step:
        trainer._save_checkpoint(trainer.model, None)
    if PartialState().is_main_process:
        if not any(line["step"] == step for line in read_lines(run.metrics)):
            run.append(run.metrics, record.progress(trainer.state))
        run.write("run.json", run.record() | {"status": "stopped", "step": step})
    raise Stopped(f"stopped at step {step} of {trainer.state.max_steps}; the same command goes on from there")


def print_next_steps(run: Run) -> None:
    """Print the fixed questions' answers before and after, and what to do next."""
    rows = read_lines(run.answers)
    steps = sorted({row["global_step"] for row in rows})
    for question in dict.fromkeys(row["question"] for row in rows):
        print(f"\n{question}")
        for step in (steps[0], steps[-1]):
            text = next(row["answer"] for row in rows if row["question"] == question and row["global_step"] == step)
            print(f"  step {step:>4}: {' '.join(text.split())[:300]}")
    summary = run.record()["summary"]
    if "eval_loss_first" in summary:
        print(f"\nvalidation loss {summary['eval_loss_first']:.4f} -> {summary['eval_loss_last']:.4f}")
    print(f"\nDone: {run.folder}  (recipe, ledger, split, metrics, answers; weights in {run.weights})")
    print(f'Next:  make ask RUN={run.name} Q="What is anemia?"    or  make chat RUN={run.name}')
