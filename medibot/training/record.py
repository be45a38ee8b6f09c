"""Record a training: every logged step, the answers to the fixed questions, and what it cost."""

import math
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import PreTrainedModel, TrainerCallback

from medibot import tracking
from medibot.data.prepared import Prepared
from medibot.errors import RecipeError
from medibot.model.generation import generate_answers
from medibot.model.template import template_kwargs
from medibot.model.tokenizer import make_prompt, role_markers
from medibot.planning.plan import Plan
from medibot.run import Run, checkpoint_step, read_json, read_lines, rewind_record
from medibot.training.signals import Signals
from medibot.training.trainer import CountingTrainer


class Record(TrainerCallback):
    """Write metrics.jsonl and answers.jsonl, mirror them, and stop on a loss that is not a number or on a signal."""

    def __init__(
        self,
        trainer: CountingTrainer,
        run: Run,
        mirror: tracking.Mirror,
        prepared: Prepared,
        checkpoint: Path | None,
        signals: Signals,
    ) -> None:
        self.trainer, self.run, self.mirror, self.prepared = trainer, run, mirror, prepared
        self.checkpoint, self.signals, self.stopped, self.saved = checkpoint, signals, False, -1
        # Without a checkpoint everything is done again, the start included
        step = checkpoint_step(checkpoint) if checkpoint else -1
        before = rewind_record(run, step) if PartialState().is_main_process else {}
        self.started = time.monotonic() - before.get("seconds", 0.0)
        self.training_seconds = before.get("training_seconds", 0.0)
        self.peak_memory = int(before.get("peak_memory_bytes", 0))
        trainer.num_supervised_tokens_seen = int(before.get("num_supervised_tokens_seen", 0))

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.step_started = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.training_seconds += time.monotonic() - self.step_started
        if self.asked_to_stop() and state.global_step < state.max_steps:
            self.stopped = control.should_training_stop = True
            # The best model is loaded when the training is over, not now
            args.load_best_model_at_end = False
            # Saved now: TRL's last log, after the training, empties what the next line is the mean of. At the end of an
            # epoch on_epoch_end asks for it, behind the evaluation that belongs to the epoch
            control.should_save = control.should_save or bool(state.epoch % 1)
        if control.should_save and not control.should_log and state.is_world_process_zero:
            # A resume from the checkpoint that is about to be written counts on from here
            self.run.append(self.run.metrics, self.progress(state))

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.stopped and state.epoch % 1:
            # Upstream calls this the end of an epoch, and would evaluate
            control.should_log = control.should_evaluate = control.should_save = False
        elif self.stopped:
            control.should_save = self.saved != state.global_step

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.saved = state.global_step

    def asked_to_stop(self) -> bool:
        """Tell whether any process of the run has got a signal."""
        asked = self.signals.received is not None
        if PartialState().num_processes == 1:
            return asked
        flag = torch.tensor([float(asked)], device=self.trainer.accelerator.device)
        return bool(self.trainer.accelerator.gather(flag).max().item())

    def progress(self, state: Any) -> dict[str, Any]:
        """Return where the training is, on every axis that runs are compared on."""
        self.peak_memory = max(self.peak_memory, peak_memory())
        return {
            "step": state.global_step,
            "seconds": round(time.monotonic() - self.started, 3),
            "training_seconds": round(self.training_seconds, 3),
            "num_input_tokens_seen": state.num_input_tokens_seen,
            "num_supervised_tokens_seen": self.trainer.num_supervised_tokens_seen,
            "num_examples_seen": round((state.epoch or 0.0) * len(self.trainer.train_dataset)),
            "peak_memory_bytes": self.peak_memory,
        }

    def on_train_begin(self, args: Any, state: Any, control: Any, model: PreTrainedModel, **kwargs: Any) -> None:
        window = self.checkpoint / "window.json" if self.checkpoint else None
        if window and window.is_file():
            kept = read_json(window)
            self.trainer._tr_loss += kept["loss"]
            self.trainer._globalstep_last_logged = kept["since"]
            self.trainer._metrics["train"].update(kept["metrics"])
            self.trainer._total_train_tokens = kept["num_tokens"]
        if state.global_step == 0:
            self.ask(model, 0)

    def on_evaluate(self, args: Any, state: Any, control: Any, model: PreTrainedModel, **kwargs: Any) -> None:
        self.ask(model, state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, model: PreTrainedModel, **kwargs: Any) -> None:
        if not self.stopped:
            self.ask(model, state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any) -> None:
        loss = logs.get("loss", logs.get("eval_loss"))
        if loss is not None and (not math.isfinite(loss) or loss == 0.0):
            why = (
                "lower training.learning_rate, or check the weights"
                if loss != 0.0
                else "nothing was learned from: check the data"
            )
            raise RecipeError.of("training", f"loss is {loss} at step {state.global_step}", why)
        # What upstream sums up at the end is no end where a signal stopped
        if not state.is_world_process_zero or (self.stopped and "train_loss" in logs):
            return
        line = self.progress(state)
        self.run.append(self.run.metrics, line | logs)
        named = {k if k.startswith("eval_") else f"train/{k}": v for k, v in (logs | line).items()}
        named = {k.replace("eval_", "eval/", 1): v for k, v in named.items()}
        self.mirror.log(named | {"train/global_step": state.global_step})
        if args.disable_tqdm and ("loss" in logs or "eval_loss" in logs):
            kind = "loss" if "loss" in logs else "validation loss"
            print(f"step {state.global_step}/{state.max_steps}  {kind} {loss:.4f}  {line['seconds']:.0f} s", flush=True)

    def ask(self, model: PreTrainedModel, step: int) -> None:
        """Ask the fixed questions, once for each step; every process answers, since shards answer only together."""
        recipe, tokenizer = self.prepared.recipe, self.prepared.tokenizer
        questions, file = recipe.evaluation.questions, self.run.answers
        if not questions or any(row["global_step"] == step for row in read_lines(file)):
            return
        markers = role_markers(tokenizer)
        prompts = [make_prompt(question, recipe.data.system, markers) for question in questions]
        answers = generate_answers(model, tokenizer, prompts, self.prepared.generation, template_kwargs(recipe))
        for question, got in zip(questions, answers, strict=True):
            if PartialState().is_main_process:
                self.run.append(file, {"global_step": step, "question": question, "answer": got.pop("text"), **got})
        columns = ["global_step", "question", "answer", "tokens", "stopped"]
        self.mirror.table("answers", columns, [[row[column] for column in columns] for row in read_lines(file)])


def summarize(trainer: CountingTrainer, run: Run, plan: Plan) -> dict[str, Any]:
    """Return what a finished training came to: steps, losses, cost, and planned beside measured memory."""
    last, tokens = read_lines(run.metrics)[-1], trainer.num_supervised_tokens_seen
    measured, planned = last["peak_memory_bytes"], plan.planned_peak()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    summary = {"steps": trainer.state.global_step, "best_checkpoint": trainer.state.best_model_checkpoint}
    if losses:
        summary |= {"eval_loss_first": losses[0], "eval_loss_last": losses[-1], "eval_loss_best": min(losses)}
    # `training_seconds` is the steps alone, without evaluations, answers and saving
    cost = {
        "seconds": last["seconds"],
        "training_seconds": last["training_seconds"],
        "supervised_tokens": tokens,
        "supervised_tokens_per_second": round(tokens / last["training_seconds"], 2),
        "peak_memory_bytes": measured,
        "trainable_parameters": count_parameters(trainer.model)[0],
        "weights_bytes": sum(file.stat().st_size for file in run.weights.glob("*.safetensors")),
    }
    memory = {"planned_bytes": planned, "measured_bytes": measured, "planned_over_measured": planned / measured}
    return summary | {"cost": cost, "memory": memory}


def upload(prepared: Prepared, run: Run, mirror: tracking.Mirror) -> None:
    """Send what was trained on and what came of it as W&B artifacts; a full model is too large to go unasked."""
    record, data = run.record(), f"data-{prepared.fingerprint[:12]}"
    made_from = {"data_fingerprint": prepared.fingerprint, "split_fingerprint": prepared.split["fingerprint"]}
    mirror.artifact("dataset", data, [run.folder / name for name in ("ledger.json", "split.json")], made_from, {})
    if prepared.recipe.lora:
        of_run = {"run": run.name, "run_fingerprint": record["fingerprint"], "base": record["parts"]["base"]}
        mirror.artifact("model", f"{run.name}-adapter", [run.weights], of_run | made_from, {data: "dataset"})


def wandb_config(run: Run, prepared: Prepared) -> dict[str, Any]:
    """Return the recipe under one key, and what identifies data, split, machine and code."""
    if not PartialState().is_main_process:
        return {}
    # Counts only: the ledger's examples are rows
    counted = [{key: value for key, value in line.items() if key != "examples"} for line in prepared.ledger]
    return {
        "recipe": prepared.recipe.as_dict(),
        "split": prepared.split | {"data": prepared.fingerprint},
        "environment": read_json(run.folder / "environment.json"),
        "ledger": counted,
        "leaks": prepared.leaks,
    }


def count_parameters(model: PreTrainedModel) -> tuple[int, int]:
    """Return (trainable, all) parameters, shards elsewhere included; a byte of 4-bit weights holds two values."""
    counts = {True: 0, False: 0}
    for parameter in model.parameters():
        packed = 2 * parameter.element_size() if parameter.__class__.__name__ == "Params4bit" else 1
        # DeepSpeed notes on what it has sharded how large that is in all
        counts[parameter.requires_grad] += vars(parameter).get("ds_numel", parameter.numel()) * packed
    return counts[True], counts[True] + counts[False]


def peak_memory() -> int:
    """Return bytes at the highest point: allocated on this process's GPU, or resident on a machine without one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def device_name() -> str:
    """Return what this process trains on."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
