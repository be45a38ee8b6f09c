"""Assemble TRL's SFTTrainer from a recipe, prove its loss mask, train, resume, save.

accelerate launch --config_file accelerate_configs/cpu.yaml -m medibot train quickstart
"""

import shutil
from pathlib import Path
from typing import Any

from accelerate import PartialState
from trl import SFTTrainer

from medibot import tracking
from medibot.data.gate import Audit, audit_labels, refuse_faults
from medibot.data.prepared import Prepared, prepare
from medibot.errors import RecipeError, Stopped
from medibot.model.loading import identify_base, method_name, weights_dtype
from medibot.planning.hardware import GB, detect_device, detect_layout
from medibot.planning.plan import Plan, make_plan
from medibot.recipe import Recipe
from medibot.run import (
    Run,
    checkpoint_step,
    describe_environment,
    dump_resolved_recipe,
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
from medibot.training.record import (
    Record,
    compare_memory,
    cost,
    count_parameters,
    device_name,
    global_batch_size,
    say,
    upload,
    wandb_config,
)
from medibot.training.signals import Signals, explained
from medibot.training.trainer import CountingTrainer, build_trainer, launched_world, load_weights


def train(recipe: Recipe, name: str, anyway: bool = False) -> None:
    """Train `recipe` into outputs/<name>: start, go on from the last whole checkpoint, or say that it is done.

    What by the plan cannot fit this device is refused before the weights are loaded, unless `anyway`.
    """
    state = launched_world()
    this = open_run(name)
    prepared = prepare(recipe)
    base = identify_base(recipe)
    key, parts = run_fingerprint(recipe, prepared.fingerprint, base, state.num_processes)
    refuse_changed(this, parts)
    if this.record().get("status") == "finished":
        say(f"outputs/{name} is finished and made from exactly this. To train again: another RUN=name, or delete it.")
        return
    require_writable(this)
    planned = make_plan(prepared, detect_device(prepared.precision.dtype), detect_layout(state.num_processes))
    if state.is_main_process and not anyway:
        planned.require_fit()
    started = this.folder.exists()
    try:
        trainer = build_trainer(prepared, this, lambda: load_weights(prepared))
        reports = check(trainer, prepared)
        require_columns(recipe, prepared.load("train"))
    except RecipeError:
        if not started and state.is_main_process:
            shutil.rmtree(this.folder, ignore_errors=True)
        raise
    describe(trainer, prepared, planned)
    with locked(this, state.is_main_process):
        checkpoint = begin(this, prepared, key, parts, reports, trainer)
        if state.is_main_process:
            this.write("plan.json", planned.as_dict())
        # An interrupted run was evaluated at its start already: a second time would stand in the record twice
        trainer.args.eval_on_start = trainer.args.eval_on_start and checkpoint is None
        state.wait_for_everyone()
        with (
            tracking.tracked(recipe, this, wandb_config(this, prepared), state.is_main_process) as mirror,
            explained(this, trainer, planned),
            Signals() as signals,
        ):
            record = Record(trainer, this, mirror, prepared, checkpoint, signals)
            trainer.add_callback(record)
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            if record.stopped:
                stop(trainer, this, record)
            save(trainer, prepared, this, mirror, planned)
    if state.is_main_process:
        print_next_steps(this, prepared)


def check(trainer: SFTTrainer, prepared: Prepared) -> list[Audit]:
    """The gate: audit what the trainer will really read, each split whole."""
    reports = []
    for split, dataset in (("train", trainer.train_dataset), ("validation", trainer.eval_dataset)):
        if dataset is not None:
            conversations = prepared.load(split)
            stops, limit = prepared.generation.eos_token_id, trainer.args.max_length
            report = audit_labels(dataset, conversations, prepared.tokenizer, stops, limit, split)
            refuse_faults(report, dataset, prepared.tokenizer)
            reports.append(report)
    return reports


def begin(
    this: Run, prepared: Prepared, key: str, parts: dict[str, Any], reports: list[Audit], trainer: SFTTrainer
) -> Path | None:
    """Make the outputs folder, or find the checkpoint to go on from."""
    checkpoint = this.last_checkpoint()
    if not PartialState().is_main_process:
        return checkpoint
    for name in this.set_torn_aside():
        print(f"{name} was never finished or is damaged: set aside in {this.checkpoints}/torn")
    if checkpoint:
        print(f"going on from {checkpoint}")
    environment = describe_environment(device_name())
    trainable, total = count_parameters(trainer.model)
    decided = {
        "dtype": prepared.precision.name,
        "weights_dtype": str(weights_dtype(prepared.recipe, prepared.precision.dtype)).removeprefix("torch."),
        "why": prepared.precision.reason,
        "processes": PartialState().num_processes,
        "global_batch_size": global_batch_size(trainer),
        "trainable_parameters": trainable,
        "parameters": total,
    }
    this.folder.mkdir(parents=True, exist_ok=True)
    this.write("recipe.yaml", dump_resolved_recipe(prepared.recipe, decided))
    this.write("ledger.json", {"ledger": prepared.ledger, "leaks": prepared.leaks})
    this.write("split.json", prepared.split | {"data": prepared.fingerprint})
    this.write("audit.json", [report.as_dict() for report in reports])
    this.write(FILE, build_evidence(prepared.recipe, prepared))
    this.write("environment.json", environment | decided)
    this.write("run.json", {"status": "running", "fingerprint": key, "parts": parts})
    return checkpoint


def save(trainer: CountingTrainer, prepared: Prepared, this: Run, mirror: tracking.Mirror, planned: Plan) -> None:
    """Write the trained weights with all that answering needs, then mark the run finished."""
    partial = this.folder / ".model.partial"
    trainer.save_model(str(partial))
    if not PartialState().is_main_process:
        return
    if not has_whole_weights(partial):
        remedy = "see `make strategies`; the last checkpoint is kept"
        raise RecipeError.of("accelerate", "the trained weights could not be gathered: nothing was saved", remedy)
    prepared.generation.save_pretrained(partial)
    sync_to_disk(partial)
    shutil.rmtree(this.weights, ignore_errors=True)
    partial.rename(this.weights)
    summary = {"steps": trainer.state.global_step, "best_checkpoint": trainer.state.best_model_checkpoint}
    evals = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    if evals:
        summary |= {"eval_loss_first": evals[0], "eval_loss_last": evals[-1], "eval_loss_best": min(evals)}
    summary["cost"] = cost(trainer, this)
    summary["memory"] = compare_memory(planned, summary["cost"]["peak_memory_bytes"])
    this.write("plan.json", planned.as_dict() | {"measured": summary["memory"]})
    mirror.summary(summary)
    this.write("run.json", this.record() | {"status": "finished", "summary": summary})
    upload(prepared, this, mirror)


def stop(trainer: CountingTrainer, this: Run, record: "Record") -> None:
    """End a training that a signal stopped: its last step is in a checkpoint, and nothing of it looks final."""
    step = trainer.state.global_step
    last = this.last_checkpoint()
    PartialState().wait_for_everyone()
    if last is None or checkpoint_step(last) != step:
        trainer._save_checkpoint(trainer.model, None)
    if PartialState().is_main_process:
        if not any(line["step"] == step for line in read_lines(this.metrics)):
            this.append(this.metrics, record.progress(trainer.state))
        this.write("run.json", this.record() | {"status": "stopped", "step": step})
    raise Stopped(f"stopped at step {step} of {trainer.state.max_steps}; the same command goes on from there")


def describe(trainer: SFTTrainer, prepared: Prepared, planned: Plan) -> None:
    """What is about to be trained, in the numbers that matter."""
    trainable, total = count_parameters(trainer.model)
    args = trainer.args
    each, ways = args.per_device_train_batch_size, PartialState().num_processes
    say(f"model      {prepared.recipe.model['pretrained_model_name_or_path']}, {method_name(prepared.recipe)}")
    say(f"precision  {prepared.precision.name}: {prepared.precision.reason}")
    say(f"trainable  {trainable:,} of {total:,} parameters ({trainable / total:.2%})")
    accumulated = args.gradient_accumulation_steps
    say(
        f"batch      {each} per device x {accumulated} accumulated x {ways} processes = {global_batch_size(trainer)} rows a step"
    )
    needed, there = planned.memory()["peak"] / GB, planned.device.capacity / GB
    say(f"memory     {needed:.1f} GB planned for {planned.rows} rows of {planned.longest} tokens, {there:.1f} GB here")


def print_next_steps(this: Run, prepared: Prepared) -> None:
    """Before and after, and what to do next."""
    rows = read_lines(this.folder / "answers.jsonl")
    steps = sorted({row["global_step"] for row in rows})
    for question in prepared.recipe.evaluation.questions:
        print(f"\n{question}")
        for step in (steps[0], steps[-1]):
            text = next(row["answer"] for row in rows if row["question"] == question and row["global_step"] == step)
            print(f"  step {step:>4}: {' '.join(text.split())[:300]}")
    summary = this.record()["summary"]
    if "eval_loss_first" in summary:
        print(f"\nvalidation loss {summary['eval_loss_first']:.4f} -> {summary['eval_loss_last']:.4f}")
    print(f"\nDone: {this.folder}  (recipe, ledger, split, metrics, answers; weights in {this.weights})")
    print(f'Next:  make ask RUN={this.name} Q="What is anemia?"    or  make chat RUN={this.name}')
