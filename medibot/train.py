"""Assemble TRL's SFTTrainer from a recipe, prove its loss mask, train, resume, save.

accelerate launch --config_file accelerate_configs/cpu.yaml -m medibot train quickstart
"""

import math
import os
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from peft import NoMatchingPeftModuleError
from safetensors import SafetensorError
from transformers import PreTrainedModel, PrinterCallback, TrainerCallback
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import rotate_checkpoints
from trl import SFTConfig, SFTTrainer

from medibot import cpu, tracking
from medibot.data.conversations import COLUMNS
from medibot.data.gate import Audit, audit_labels, refuse_faults
from medibot.data.prepared import Inputs, gather
from medibot.errors import RecipeError, Stopped
from medibot.model.generation import generate_answers
from medibot.model.loading import identify_base, load_base, method_name, weights_dtype
from medibot.model.precision import make_lora_config
from medibot.model.template import template_kwargs
from medibot.model.tokenizer import make_prompt, role_markers
from medibot.planning.conflicts import is_zero3
from medibot.planning.hardware import GB, detect_device, detect_layout
from medibot.planning.plan import Plan, make_plan, per_process
from medibot.recipe import Recipe
from medibot.run import (
    Run,
    checkpoint_step,
    describe_environment,
    dump_resolved_recipe,
    has_whole_weights,
    is_disk_error,
    locked,
    open_run,
    read_json,
    read_lines,
    refuse_changed,
    require_writable,
    rewind_record,
    run_fingerprint,
    sync_to_disk,
)
from medibot.serving.evidence import FILE, build_evidence, require_columns


def train(recipe: Recipe, name: str, anyway: bool = False) -> None:
    """Train `recipe` into outputs/<name>: start, go on from the last whole checkpoint, or say that it is done.

    What by the plan cannot fit this device is refused before the weights are loaded, unless `anyway`.
    """
    state = launched_world()
    this = open_run(name)
    inputs = gather(recipe)
    base = identify_base(recipe)
    key, parts = run_fingerprint(recipe, inputs.prepared.fingerprint, base, state.num_processes)
    refuse_changed(this, parts)
    if this.record().get("status") == "finished":
        say(f"outputs/{name} is finished and made from exactly this. To train again: another RUN=name, or delete it.")
        return
    require_writable(this)
    planned = make_plan(inputs, detect_device(inputs.precision.dtype), detect_layout(state.num_processes))
    if state.is_main_process and not anyway:
        planned.require_fit()
    started = this.folder.exists()
    try:
        trainer = build_trainer(inputs, this, lambda: load_weights(inputs))
        reports = check(trainer, inputs)
        require_columns(recipe, inputs.prepared.load("train"))
    except RecipeError:
        if not started and state.is_main_process:
            shutil.rmtree(this.folder, ignore_errors=True)
        raise
    describe(trainer, inputs, planned)
    with locked(this, state.is_main_process):
        checkpoint = begin(this, inputs, key, parts, reports, trainer)
        if state.is_main_process:
            this.write("plan.json", planned.as_dict())
        # An interrupted run was evaluated at its start already: a second time would stand in the record twice
        trainer.args.eval_on_start = trainer.args.eval_on_start and checkpoint is None
        state.wait_for_everyone()
        with (
            tracking.tracked(recipe, this, wandb_config(this, inputs), state.is_main_process) as mirror,
            explained(this, trainer, planned),
            Signals() as signals,
        ):
            record = Record(trainer, this, mirror, inputs, checkpoint, signals)
            trainer.add_callback(record)
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            if record.stopped:
                stop(trainer, this, record)
            save(trainer, inputs, this, mirror, planned)
    if state.is_main_process:
        farewell(this, inputs)


def launched_world() -> PartialState:
    """The processes that really run; refuses to start when they are not the ones that were launched."""
    on_cpu = not torch.cuda.is_available()
    state = PartialState(cpu=on_cpu)
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    wanted = int(os.environ.get("MEDIBOT_PROCESSES", launched))
    if not state.num_processes == launched == wanted:
        what = f"{wanted} processes were launched and {state.num_processes} found each other"
        raise RecipeError.of("accelerate", what, "on CPUs use accelerate_configs/cpu.yaml or cpu-2.yaml")
    return state


class SeededLengths(LengthGroupedSampler):
    """Rows of like length together, in an order that the seed and the epoch alone decide.

    Upstream's draws from the stream that dropout and evaluations draw from too: a run that is resumed in the middle of
    an epoch would go on with other rows.
    """

    epoch = 0

    def __init__(self, *args: Any, seed: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seed = seed

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        self.generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return super().__iter__()


class CountingTrainer(SFTTrainer):
    """TRL's trainer, and how many tokens its loss has covered: the x-axis on which any two recipes compare."""

    num_supervised_tokens_seen = 0
    writing: str | None = None

    def _get_train_sampler(self, *args: Any) -> Any:
        sampler = super()._get_train_sampler(*args)
        if not isinstance(sampler, LengthGroupedSampler):
            return sampler
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return SeededLengths(sampler.batch_size, lengths=sampler.lengths, seed=seed)

    def _get_output_dir(self, trial: Any) -> str:
        return self.writing or super()._get_output_dir(trial)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Upstream's checkpoint, made under another name: it gets its own by one rename, when it is on the disk.

        What was summed up since the last logged line goes with it, or the next line of a resumed run would be the mean
        of fewer steps.
        """
        this = Run(Path(self.args.output_dir).parent)
        made = this.writing / f"checkpoint-{self.state.global_step}"
        final = this.checkpoints / made.name
        summed = self.accelerator.gather(self._tr_loss.detach().reshape(1)).mean().item()
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        self.writing = str(this.writing)
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.writing, self.args.save_total_limit = None, limit
        if self.state.best_model_checkpoint == str(made):
            self.state.best_model_checkpoint = str(final)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            self.state.save_to_json(str(made / "trainer_state.json"))
            window = {"loss": summed, "since": self._globalstep_last_logged, "metrics": self._metrics["train"]}
            Run(made).write("window.json", window | {"num_tokens": self._total_train_tokens})
        # On a shared disk the first to come renames for all; without one, each machine its own
        if self.accelerator.is_local_main_process:
            with suppress(FileNotFoundError):
                sync_to_disk(made)
                made.rename(final)
                sync_to_disk(this.checkpoints)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            # By number, not by time: clocks jump
            best = self.state.best_model_checkpoint
            rotate_checkpoints(self.args.output_dir, save_total_limit=limit, best_model_checkpoint=best)

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        # The number is already that of the whole window of accumulation, on all processes
        if num_items_in_batch is not None and self.accelerator.sync_gradients:
            self.num_supervised_tokens_seen += int(num_items_in_batch)
        return super().training_step(model, inputs, num_items_in_batch)


def build_trainer(inputs: Inputs, this: Run, load: Callable[[], PreTrainedModel], lora: bool = True) -> CountingTrainer:
    """TRL's trainer over the prepared conversations; adapters in float32, so that resuming changes no dtype."""
    # Before the weights: under ZeRO-3 they are sharded while loading only if the arguments exist by then
    args = sft_config(inputs, this)
    if args.use_cpu:
        cpu.hasten()
    columns = {split: inputs.prepared.load(split) for split in ("train", "validation")}
    datasets = {split: rows.select_columns(COLUMNS) for split, rows in columns.items() if rows is not None}
    try:
        trainer = CountingTrainer(
            model=load(),
            args=args,
            train_dataset=datasets["train"],
            eval_dataset=datasets.get("validation"),
            processing_class=inputs.tokenizer,
            peft_config=make_lora_config(inputs.recipe) if lora else None,
        )
    except NoMatchingPeftModuleError as error:
        what = " ".join(str(error).split())
        raise inputs.recipe.error("lora.target_modules", what, "name modules that this model has") from error
    trainer.remove_callback(PrinterCallback)
    for parameter in trainer.model.parameters():
        # ZeRO-3 gathers parameters of one dtype only (deepspeed 0.19, _allgather_params_coalesced)
        if parameter.requires_grad and inputs.recipe.lora and not is_zero3():
            # TRL makes QLoRA's adapters bfloat16 and a resume makes them float32: the two would train differently
            parameter.data = parameter.data.float()
    return trainer


def sft_config(inputs: Inputs, this: Run) -> SFTConfig:
    """The recipe's training section, and what the run and the machine decide; the batch of a step stays the recipe's."""
    decided = {
        "output_dir": str(this.checkpoints),
        "run_name": this.name,
        "report_to": "none",
        "disable_tqdm": not sys.stderr.isatty(),
        "logging_nan_inf_filter": False,
        "include_num_input_tokens_seen": "non_padding",
        # A PEFT model makes the Trainer search for unused parameters in every step otherwise
        "ddp_find_unused_parameters": False,
        "activation_checkpointing": True,
        **inputs.precision.training,
    }
    written = {key: value for key, value in inputs.recipe.training.items() if key != "chat_template_path"}
    if written.get("activation_checkpointing", True):
        # TRL asks for it where LoRA meets ZeRO-3, and writes it where the Trainer does not read it
        reentrant = is_zero3() and inputs.recipe.lora is not None
        written = {"activation_checkpointing_kwargs": {"use_reentrant": reentrant}} | written
    return SFTConfig(**(decided | written | per_process(inputs.recipe, PartialState().num_processes)))


def load_weights(inputs: Inputs) -> PreTrainedModel:
    return load_base(inputs.recipe, weights_dtype(inputs.recipe, inputs.precision.dtype))


def check(trainer: SFTTrainer, inputs: Inputs) -> list[Audit]:
    """The gate: audit what the trainer will really read, each split whole."""
    reports = []
    for split, dataset in (("train", trainer.train_dataset), ("validation", trainer.eval_dataset)):
        if dataset is not None:
            conversations = inputs.prepared.load(split)
            stops, limit = inputs.generation.eos_token_id, trainer.args.max_length
            report = audit_labels(dataset, conversations, inputs.tokenizer, stops, limit, split)
            refuse_faults(report, dataset, inputs.tokenizer)
            reports.append(report)
    return reports


def begin(
    this: Run, inputs: Inputs, key: str, parts: dict[str, Any], reports: list[Audit], trainer: SFTTrainer
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
    trainable, total = parameter_counts(trainer.model)
    decided = {
        "dtype": inputs.precision.name,
        "weights_dtype": str(weights_dtype(inputs.recipe, inputs.precision.dtype)).removeprefix("torch."),
        "why": inputs.precision.reason,
        "processes": PartialState().num_processes,
        "global_batch_size": global_batch_size(trainer),
        "trainable_parameters": trainable,
        "parameters": total,
    }
    this.folder.mkdir(parents=True, exist_ok=True)
    this.write("recipe.yaml", dump_resolved_recipe(inputs.recipe, decided))
    this.write("ledger.json", {"ledger": inputs.prepared.ledger, "leaks": inputs.prepared.leaks})
    this.write("split.json", inputs.prepared.split | {"data": inputs.prepared.fingerprint})
    this.write("audit.json", [report.as_dict() for report in reports])
    this.write(FILE, build_evidence(inputs.recipe, inputs.prepared))
    this.write("environment.json", environment | decided)
    this.write("run.json", {"status": "running", "fingerprint": key, "parts": parts})
    return checkpoint


def save(trainer: CountingTrainer, inputs: Inputs, this: Run, mirror: tracking.Mirror, planned: Plan) -> None:
    """Write the trained weights with all that answering needs, then mark the run finished."""
    partial = this.folder / ".model.partial"
    trainer.save_model(str(partial))
    if not PartialState().is_main_process:
        return
    if not has_whole_weights(partial):
        remedy = "see `make strategies`; the last checkpoint is kept"
        raise RecipeError.of("accelerate", "the trained weights could not be gathered: nothing was saved", remedy)
    inputs.generation.save_pretrained(partial)
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
    upload(inputs, this, mirror)


def compare_memory(planned: Plan, measured: float) -> dict[str, float]:
    """Planned against measured peak memory of this process."""
    expected = planned.planned_peak()
    return {"planned_bytes": expected, "measured_bytes": measured, "planned_over_measured": expected / measured}


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


class Signals:
    """SIGTERM, SIGINT and SIGHUP ask for a stop at the next step boundary; another one a second later ends at once."""

    def __init__(self) -> None:
        self.received: float | None = None

    def __enter__(self) -> "Signals":
        self.before = {number: signal.signal(number, self.note) for number in SIGNALS if heeded(number)}
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def note(self, number: int, _: Any) -> None:
        # Whoever signals a process group often reaches a process twice
        if self.received and time.monotonic() - self.received > 1:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.received = self.received or time.monotonic()


SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def heeded(number: int) -> bool:
    """Whether the signal is not ignored, as nohup ignores SIGHUP."""
    return signal.getsignal(number) != signal.SIG_IGN


@contextmanager
def explained(this: Run, trainer: CountingTrainer, planned: Plan) -> Generator[None]:
    """What a machine runs out of, in one line: memory, disk, or the right to write."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        last = this.last_checkpoint()
        kept = f"{last.name} is whole" if last else "no checkpoint is whole yet"
        if out_of_memory(error):
            rows, needed = trainer.args.per_device_train_batch_size, planned.memory()["peak"] / GB
            what = f"out of memory at {rows} rows of up to {planned.longest} tokens ({kept})"
            remedy = f"the plan was {needed:.1f} of {planned.device.capacity / GB:.1f} GB: {planned.advice()}"
            raise RecipeError.of("training", what, remedy) from error
        if is_disk_error(error):
            free = shutil.disk_usage(this.folder).free
            why = " ".join(str(error).split())
            what = f"cannot be written, {free / 1e9:.1f} GB free: {why} ({kept})"
            raise RecipeError.of(str(this.folder), what, "make room; the same command then goes on") from error
        if PartialState().num_processes > 1 and peer_lost(error):
            what = f"another process of this run ended, or cannot be reached ({kept})"
            raise RecipeError.of("accelerate", what, "what it said stands above; the same command goes on") from error
        raise


def out_of_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def peer_lost(error: Exception) -> bool:
    """A collective that lost a process, as gloo and nccl say it."""
    said = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited")
    return any(words in str(error) for words in said)


def upload(inputs: Inputs, this: Run, mirror: tracking.Mirror) -> None:
    """What was trained on and what came of it, as W&B artifacts; a full model is too large to go without being asked."""
    record = this.record()
    data = f"data-{inputs.prepared.fingerprint[:12]}"
    made_from = {
        "data_fingerprint": inputs.prepared.fingerprint,
        "split_fingerprint": inputs.prepared.split["fingerprint"],
    }
    mirror.artifact("dataset", data, [this.folder / name for name in ("ledger.json", "split.json")], made_from, {})
    if inputs.recipe.lora:
        of_run = {"run": this.name, "run_fingerprint": record["fingerprint"], "base": record["parts"]["base"]}
        mirror.artifact("model", f"{this.name}-adapter", [this.weights], of_run | made_from, {data: "dataset"})


def cost(trainer: CountingTrainer, this: Run) -> dict[str, float]:
    """What the training took; `training_seconds` is the steps alone, without evaluations, answers and saving."""
    last = read_lines(this.metrics)[-1]
    tokens = trainer.num_supervised_tokens_seen
    return {
        "seconds": last["seconds"],
        "training_seconds": last["training_seconds"],
        "supervised_tokens": tokens,
        "supervised_tokens_per_second": round(tokens / last["training_seconds"], 2),
        "peak_memory_bytes": last["peak_memory_bytes"],
        "trainable_parameters": parameter_counts(trainer.model)[0],
        "weights_bytes": sum(file.stat().st_size for file in this.weights.glob("*.safetensors")),
    }


class Record(TrainerCallback):
    """The local record (metrics.jsonl, answers.jsonl), its mirror, and the stop on a loss that is no loss."""

    def __init__(
        self,
        trainer: CountingTrainer,
        this: Run,
        mirror: tracking.Mirror,
        inputs: Inputs,
        checkpoint: Path | None,
        signals: Signals,
    ) -> None:
        self.trainer, self.this, self.mirror, self.inputs = trainer, this, mirror, inputs
        self.checkpoint, self.signals, self.stopped = checkpoint, signals, False
        # Without a checkpoint everything is done again, the start included
        step = int(checkpoint.name.rpartition("-")[2]) if checkpoint else -1
        before = rewind_record(this, step) if PartialState().is_main_process else {}
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
        if control.should_save and not control.should_log and state.is_world_process_zero:
            # A resume from the checkpoint that is about to be written counts on from here
            self.this.append(self.this.metrics, self.progress(state))

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.stopped and state.epoch % 1:
            # Upstream calls this the end of an epoch, and would evaluate
            control.should_log = control.should_evaluate = control.should_save = False

    def asked_to_stop(self) -> bool:
        """Whether any process of the run has got a signal."""
        asked = self.signals.received is not None
        if PartialState().num_processes == 1:
            return asked
        flag = torch.tensor([float(asked)], device=self.trainer.accelerator.device)
        return bool(self.trainer.accelerator.gather(flag).max().item())

    def progress(self, state: Any) -> dict[str, Any]:
        """Where the training stands, on every axis that runs are compared on."""
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
        self.this.append(self.this.metrics, line | logs)
        named = {k if k.startswith("eval_") else f"train/{k}": v for k, v in (logs | line).items()}
        named = {k.replace("eval_", "eval/", 1): v for k, v in named.items()}
        self.mirror.log(named | {"train/global_step": state.global_step})
        if args.disable_tqdm and ("loss" in logs or "eval_loss" in logs):
            kind = "loss" if "loss" in logs else "validation loss"
            print(f"step {state.global_step}/{state.max_steps}  {kind} {loss:.4f}  {line['seconds']:.0f} s", flush=True)

    def ask(self, weights: PreTrainedModel, step: int) -> None:
        """The recipe's fixed questions, once for each step; every process answers, since shards answer only together."""
        questions = self.inputs.recipe.evaluation.questions
        file = self.this.folder / "answers.jsonl"
        if not questions or any(row["global_step"] == step for row in read_lines(file)):
            return
        system, tokenizer = self.inputs.recipe.data.system, self.inputs.tokenizer
        markers = role_markers(tokenizer)
        prompts = [make_prompt(question, system, markers) for question in questions]
        template = template_kwargs(self.inputs.recipe)
        answers = generate_answers(weights, tokenizer, prompts, self.inputs.generation, template)
        for question, got in zip(questions, answers, strict=True):
            if PartialState().is_main_process:
                self.this.append(file, {"global_step": step, "question": question, "answer": got.pop("text"), **got})
        self.mirror.answers(read_lines(file))


def say(text: str) -> None:
    if PartialState().is_main_process:
        print(text, flush=True)


def describe(trainer: SFTTrainer, inputs: Inputs, planned: Plan) -> None:
    """What is about to be trained, in the numbers that matter."""
    trainable, total = parameter_counts(trainer.model)
    args = trainer.args
    each, ways = args.per_device_train_batch_size, PartialState().num_processes
    say(f"model      {inputs.recipe.model['pretrained_model_name_or_path']}, {method_name(inputs.recipe)}")
    say(f"precision  {inputs.precision.name}: {inputs.precision.reason}")
    say(f"trainable  {trainable:,} of {total:,} parameters ({trainable / total:.2%})")
    accumulated = args.gradient_accumulation_steps
    say(
        f"batch      {each} per device x {accumulated} accumulated x {ways} processes = {global_batch_size(trainer)} rows a step"
    )
    needed, there = planned.memory()["peak"] / GB, planned.device.capacity / GB
    say(f"memory     {needed:.1f} GB planned for {planned.rows} rows of {planned.longest} tokens, {there:.1f} GB here")


def global_batch_size(trainer: SFTTrainer) -> int:
    args = trainer.args
    return args.per_device_train_batch_size * args.gradient_accumulation_steps * PartialState().num_processes


def parameter_counts(weights: PreTrainedModel) -> tuple[int, int]:
    """(trainable, all) parameters, shards elsewhere included; a byte of 4-bit weights holds two values."""
    counts = {True: 0, False: 0}
    for parameter in weights.parameters():
        packed = 2 * parameter.element_size() if parameter.__class__.__name__ == "Params4bit" else 1
        # DeepSpeed notes on what it has sharded how large that is in all
        counts[parameter.requires_grad] += vars(parameter).get("ds_numel", parameter.numel()) * packed
    return counts[True], counts[True] + counts[False]


def peak_memory() -> int:
    """Bytes at the highest point: allocated on this process's GPU, or resident on a machine without one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def wandb_config(this: Run, inputs: Inputs) -> dict[str, Any]:
    """The recipe under one key, and what identifies data, split, machine and code."""
    if not PartialState().is_main_process:
        return {}
    environment = read_json(this.folder / "environment.json")
    split = inputs.prepared.split | {"data": inputs.prepared.fingerprint}
    # Counts alone: the ledger's examples are rows
    counted = [{key: value for key, value in line.items() if key != "examples"} for line in inputs.prepared.ledger]
    ledger = {"ledger": counted, "leaks": inputs.prepared.leaks}
    return {"recipe": inputs.recipe.as_dict(), "split": split, "environment": environment} | ledger


def farewell(this: Run, inputs: Inputs) -> None:
    """Before and after, and what to do next."""
    rows = read_lines(this.folder / "answers.jsonl")
    steps = sorted({row["global_step"] for row in rows})
    for question in inputs.recipe.evaluation.questions:
        print(f"\n{question}")
        for step in (steps[0], steps[-1]):
            text = next(row["answer"] for row in rows if row["question"] == question and row["global_step"] == step)
            print(f"  step {step:>4}: {' '.join(text.split())[:300]}")
    summary = this.record()["summary"]
    if "eval_loss_first" in summary:
        print(f"\nvalidation loss {summary['eval_loss_first']:.4f} -> {summary['eval_loss_last']:.4f}")
    print(f"\nDone: {this.folder}  (recipe, ledger, split, metrics, answers; weights in {this.weights})")
    print(f'Next:  make ask RUN={this.name} Q="What is anemia?"    or  make chat RUN={this.name}')
