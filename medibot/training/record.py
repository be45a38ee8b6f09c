"""Record a training: every logged step, the answers to the fixed questions, and what it cost."""

import math
import time
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object
from peft import PeftModel
from transformers import PreTrainedModel, TrainerCallback
from transformers.trainer_pt_utils import get_model_param_count

from medibot import tracking
from medibot.data.prepared import Prepared
from medibot.errors import RecipeError, Stopped
from medibot.model.generation import generate_answers
from medibot.model.tokenizer import make_prompt, role_markers, template_kwargs
from medibot.planning.hardware import detect_hardware
from medibot.planning.plan import Plan
from medibot.run import Run, read_lines
from medibot.training.processes import from_first
from medibot.training.signals import Signals
from medibot.training.trainer import CountingTrainer


class Record(TrainerCallback):
    """Write metrics.jsonl and answers.jsonl, mirror them, and stop on a loss that is not a number or on a signal."""

    def __init__(
        self, trainer: CountingTrainer, run: Run, mirror: tracking.Mirror, prepared: Prepared, signals: Signals
    ) -> None:
        self.trainer, self.run, self.mirror, self.prepared, self.signals = trainer, run, mirror, prepared, signals
        trainer.started = time.monotonic()

    def on_train_begin(self, args: Any, state: Any, control: Any, model: PreTrainedModel, **kwargs: Any) -> None:
        self.trainer.restore_progress()
        # Evaluated, and then stopped before all was answered
        evaluated = any("eval_loss" in line and line["step"] == state.global_step for line in state.log_history)
        if state.global_step == 0 or evaluated:
            self.ask(model, state.global_step)
        self.stop_if_signalled(state)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop at a signal: here the step before is logged, evaluated and saved, which upstream's way would do again."""
        self.stop_if_signalled(state)
        self.step_started = time.monotonic()

    # Before upstream draws the rows of the next epoch, as a resume will do again
    on_epoch_begin = on_step_begin

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.training_seconds += time.monotonic() - self.step_started

    def on_evaluate(self, args: Any, state: Any, control: Any, model: PreTrainedModel, **kwargs: Any) -> None:
        self.ask(model, state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, model: PreTrainedModel, **kwargs: Any) -> None:
        if not self.ask(model, state.global_step):
            self.stop_if_signalled(state)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any) -> None:
        loss = logs.get("loss", logs.get("eval_loss"))
        if loss is not None and (not math.isfinite(loss) or loss == 0.0):
            remedy = "check the data" if loss == 0.0 else "lower training.learning_rate, or check the weights"
            raise RecipeError.of("training", f"loss is {loss} at step {state.global_step}", remedy)
        if not state.is_world_process_zero:
            return
        line = self.trainer.progress()
        self.run.append(self.run.metrics, line | logs)
        named = {f"eval/{k[5:]}" if k.startswith("eval_") else f"train/{k}": v for k, v in (logs | line).items()}
        self.mirror.log(named | {"train/global_step": state.global_step})
        if args.disable_tqdm and loss is not None:
            kind = "loss" if "loss" in logs else "validation loss"
            print(f"step {state.global_step}/{state.max_steps}  {kind} {loss:.4f}  {line['seconds']:.0f} s", flush=True)

    def signalled(self) -> bool:
        """Tell whether any process has received a signal."""
        return any(gather_object([self.signals.received]))

    def stop_if_signalled(self, state: Any) -> None:
        """Stop at any process's signal: the last step is in a checkpoint, and nothing of the run looks final."""
        if not self.signalled():
            return
        if state.global_step != self.trainer.saved_step:
            self.trainer._save_checkpoint(self.trainer.model, None)
        if state.is_world_process_zero:
            self.run.write("run.json", self.run.record() | {"status": "stopped", "step": state.global_step})
        at = f"{state.global_step} of {state.max_steps}"
        raise Stopped(f"stopped at step {at}; the same command goes on from there")

    def ask(self, model: PreTrainedModel, step: int) -> bool:
        """Ask the fixed questions once a step, a share in each process; return False if a signal came between batches."""
        recipe, tokenizer, file = self.prepared.recipe, self.prepared.tokenizer, self.run.answers
        questions, size = recipe.evaluation.questions, self.trainer.args.per_device_eval_batch_size
        if not questions or from_first(lambda: any(row["global_step"] == step for row in read_lines(file))):
            return True
        markers, answers = role_markers(tokenizer), {}
        asked = [(place, make_prompt(text, recipe.data.common_system, markers)) for place, text in enumerate(questions)]
        # Shards answer only together: every process asks as often, and the rest of a share asks the last one again
        sharded = detect_hardware().kind in {"FSDP2", "ZeRO-3"}
        settings = self.prepared.generation, template_kwargs(recipe), size, sharded
        with PartialState().split_between_processes(asked, apply_padding=True) as share:
            for start in range(0, len(share), size):
                if self.signalled():
                    return False
                places, prompts = zip(*share[start : start + size], strict=True)
                with self.trainer.accelerator.autocast():
                    answers |= zip(places, generate_answers(model, tokenizer, prompts, *settings), strict=True)
        answers = dict(gather_object(list(answers.items())))
        if PartialState().is_main_process:
            for place, question in enumerate(questions):
                got = answers[place]
                self.run.append(file, {"global_step": step, "question": question, "answer": got.pop("text"), **got})
            columns = ["global_step", "question", "answer", "tokens", "stopped"]
            self.mirror.table("answers", columns, [[row[column] for column in columns] for row in read_lines(file)])
        return True


def summarize(trainer: CountingTrainer, run: Run, plan: Plan) -> dict[str, Any]:
    """Return what a finished training came to: steps, losses, cost, and planned beside measured memory."""
    last, tokens = read_lines(run.metrics)[-1], trainer.num_supervised_tokens_seen
    # On a GPU what is reserved is measured, without the context
    planned = plan.memory()["peak"] - (plan.overhead if plan.device.gpu else 0)
    memory = {"planned_bytes": planned, "measured_bytes": last["peak_memory_bytes"]}
    summary = {"steps": trainer.state.global_step, "best_checkpoint": trainer.state.best_model_checkpoint}
    if losses := [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]:
        summary |= {"eval_loss_first": losses[0], "eval_loss_last": losses[-1], "eval_loss_best": min(losses)}
    summary["memory"] = memory | {"planned_over_measured": planned / last["peak_memory_bytes"]}
    # `training_seconds` is the steps alone, without evaluations, answers and saving
    summary["cost"] = {key: last[key] for key in ("seconds", "training_seconds", "peak_memory_bytes")} | {
        "supervised_tokens": tokens,
        "supervised_tokens_per_second": round(tokens / last["training_seconds"], 2),
        "trainable_parameters": count_parameters(trainer.model)[0],
        "weights_bytes": sum(file.stat().st_size for file in run.weights.glob("*.safetensors")),
    }
    return summary


def count_parameters(model: PreTrainedModel | PeftModel) -> tuple[int, int]:
    """Return (trainable, all) parameters, shards elsewhere included; a byte of 4-bit weights holds two values."""
    if isinstance(model, PeftModel):
        return model.get_nb_trainable_parameters()
    return get_model_param_count(model, trainable_only=True), get_model_param_count(model)
