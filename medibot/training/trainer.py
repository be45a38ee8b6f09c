"""Assemble TRL's SFTTrainer from prepared conversations."""

import os
import resource
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import PrinterCallback
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import rotate_checkpoints
from trl import SFTConfig, SFTTrainer

from medibot.data.audited import audit_once
from medibot.data.conversations import COLUMNS
from medibot.data.gate import Audit
from medibot.data.prepared import Prepared
from medibot.model.loading import load_base, make_tiny_model, weights_dtype
from medibot.model.precision import make_lora_config
from medibot.planning.conflicts import refuse_same_rows, share_batch
from medibot.planning.hardware import detect_hardware
from medibot.recipe import Recipe
from medibot.run import Run, sync_to_disk
from medibot.training.cpu import optimize_for_cpu


class CountingTrainer(SFTTrainer):
    """TRL's trainer, which counts what the loss has covered (supervised tokens), and counts on from a checkpoint."""

    num_supervised_tokens_seen = peak_memory = 0
    training_seconds = started = 0.0
    # The step whose checkpoint is on the disk
    saved_step = 0

    def progress(self) -> dict[str, Any]:
        """Return where the training is, on every axis that runs are compared on."""
        self.peak_memory = max(self.peak_memory, peak_memory())
        return {
            "step": self.state.global_step,
            "seconds": round(time.monotonic() - self.started, 3),
            "training_seconds": round(self.training_seconds, 3),
            "num_input_tokens_seen": self.state.num_input_tokens_seen,
            "num_supervised_tokens_seen": self.num_supervised_tokens_seen,
            "num_examples_seen": round((self.state.epoch or 0.0) * len(self.train_dataset)),
            "peak_memory_bytes": self.peak_memory,
        }

    def restore_progress(self) -> None:
        """Count on from the checkpoint that was loaded, and sum on for the next logged line."""
        self.saved_step = self.state.global_step
        if kept := self.state.stateful_callbacks.get("progress"):
            self.started -= kept["seconds"]
            self.training_seconds, self.peak_memory = kept["training_seconds"], kept["peak_memory_bytes"]
            self.num_supervised_tokens_seen = kept["num_supervised_tokens_seen"]
            self._tr_loss += kept["loss"]
            self._globalstep_last_logged, self._total_train_tokens = kept["since"], kept["num_tokens"]
            self._metrics["train"].update(kept["metrics"])

    def _get_train_sampler(self, *args: Any) -> Any:
        sampler = super()._get_train_sampler(*args)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed

        # Upstream's draws from the stream that dropout and evaluations draw from too: a run that is resumed in the middle
        # of an epoch would go on with other rows
        def set_epoch(epoch: int) -> None:
            sampler.generator = torch.Generator().manual_seed(seed + epoch)

        if isinstance(sampler, LengthGroupedSampler):
            set_epoch(0)
            sampler.set_epoch = set_epoch
        return sampler

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Make upstream's checkpoint under another name; it gets its own by one rename, when it is on the disk."""
        run = Run(Path(self.args.output_dir).parent)
        made, final = (folder / f"checkpoint-{self.state.global_step}" for folder in (run.writing, run.checkpoints))
        # Without what was summed since the last logged line, the next one of a resumed run would be the mean of fewer
        loss = self.accelerator.gather(self._tr_loss.detach().reshape(1)).mean().item()
        summed = {"loss": loss, "metrics": dict(self._metrics["train"]), "num_tokens": self._total_train_tokens}
        self.state.stateful_callbacks["progress"] = self.progress() | summed | {"since": self._globalstep_last_logged}
        self.args.output_dir = str(run.writing)
        super()._save_checkpoint(model, trial)
        self.args.output_dir = str(run.checkpoints)
        if self.state.best_model_checkpoint == str(made):
            self.state.best_model_checkpoint = str(final)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            self.state.save_to_json(str(made / "trainer_state.json"))
        # On a shared disk the first to come renames for all; without one, each machine its own
        if self.accelerator.is_local_main_process:
            with suppress(FileNotFoundError):
                sync_to_disk(made)
                made.rename(final)
                sync_to_disk(run.checkpoints)
        self.accelerator.wait_for_everyone()
        self.saved_step = self.state.global_step
        if self.args.should_save:
            # By number, not by time: clocks jump
            best, limit = self.state.best_model_checkpoint, self.args.save_total_limit
            rotate_checkpoints(self.args.output_dir, save_total_limit=limit, best_model_checkpoint=best)

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        # The number is already that of the whole window of accumulation, on all processes
        if num_items_in_batch is not None and self.accelerator.sync_gradients:
            self.num_supervised_tokens_seen += int(num_items_in_batch)
        return super().training_step(model, inputs, num_items_in_batch)


def build_trainer(prepared: Prepared, this: Run, tiny: bool = False) -> CountingTrainer:
    """Build TRL's trainer over the prepared conversations; around a tiny model for who needs its dataset alone."""
    # Before the weights: under ZeRO-3 they are sharded while loading only if the arguments exist by then
    args = sft_config(prepared, this, tiny)
    if args.use_cpu:
        optimize_for_cpu()
    rows = {f"{split}_dataset": prepared.load(name) for split, name in (("train", "train"), ("eval", "validation"))}
    rows = {split: found.select_columns(COLUMNS) for split, found in rows.items() if found is not None}
    recipe, dtype = prepared.recipe, weights_dtype(prepared.recipe, prepared.precision.dtype)
    if not tiny:
        require_backward(recipe, prepared.precision.dtype, args.use_cpu)
    model = make_tiny_model(prepared.tokenizer) if tiny else load_base(recipe, dtype)
    adapters = None if tiny else make_lora_config(recipe)
    # The Trainer makes its folder at once: what does not get through the gate shall leave none
    args.output_dir = tempfile.gettempdir()
    trainer = CountingTrainer(model, args, processing_class=prepared.tokenizer, peft_config=adapters, **rows)
    args.output_dir = str(this.checkpoints)
    trainer.remove_callback(PrinterCallback)
    # TRL makes QLoRA's adapters bfloat16 and a resume makes them float32: the two would train differently. ZeRO-3 gathers
    # parameters of one dtype only (deepspeed 0.19, _allgather_params_coalesced)
    if recipe.lora and detect_hardware().kind != "ZeRO-3":
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    return trainer


def require_backward(recipe: Recipe, compute: torch.dtype, cpu: bool) -> None:
    """Raise RecipeError for attention that can be loaded, and cannot be trained."""
    name, what = recipe.model.get("attn_implementation") or "", ""
    if name == "flex_attention" and cpu:
        what = "flex_attention has no backward pass on a CPU"
    if "flash" in name and compute == torch.float32 and not cpu:
        what = f"{name} computes in half precision alone, and model.dtype is float32"
    if what:
        raise recipe.error("model.attn_implementation", what, "leave it out: sdpa")


def sft_config(prepared: Prepared, this: Run, tiny: bool = False) -> SFTConfig:
    """Return the recipe's training section with what run and machine decide; the batch of a step stays the recipe's.

    What a tiny model is for needs no GPU.
    """
    refuse_same_rows()
    machine = {"use_cpu": True, "bf16": False, "fp16": False} if tiny else prepared.precision.training
    decided = {
        "output_dir": str(this.checkpoints),
        "run_name": this.name,
        "report_to": "none",
        "disable_tqdm": not sys.stderr.isatty(),
        "logging_nan_inf_filter": False,
        "include_num_input_tokens_seen": "non_padding",
        # A PEFT model makes the Trainer search for unused parameters in every step otherwise
        "ddp_find_unused_parameters": False,
        # TRL tokenizes row by row: a share of each processor where there are thousands
        "dataset_num_proc": min(os.cpu_count() or 1, prepared.split["rows"]["train"] // 2000) or None,
        "activation_checkpointing": True,
        **machine,
    }
    written = {key: value for key, value in prepared.recipe.training.items() if key != "chat_template_path"}
    if written.get("activation_checkpointing", True):
        # TRL asks for it where LoRA meets ZeRO-3, and writes it where the Trainer does not read it
        reentrant = detect_hardware().kind == "ZeRO-3" and prepared.recipe.lora is not None
        written = {"activation_checkpointing_kwargs": {"use_reentrant": reentrant}} | written
    shared = share_batch(prepared.recipe, PartialState(cpu=machine["use_cpu"]).num_processes)
    args = SFTConfig(**(decided | written | shared))
    # With several in sight the Trainer would take DataParallel, which TRL refuses
    args._n_gpu = min(args.n_gpu, 1)
    return args


def audit_splits(trainer: CountingTrainer, prepared: Prepared) -> list[Audit]:
    """Return what the gate found in the rows of each split, as the trainer will really read them, every row."""
    return [
        audit_once(prepared, split, rows, trainer.args.max_length)
        for split, rows in (("train", trainer.train_dataset), ("validation", trainer.eval_dataset))
        if rows is not None
    ]


def peak_memory() -> int:
    """Return bytes at the highest point: reserved on this process's GPU, or resident on a machine without one."""
    if torch.cuda.is_available():
        # What is reserved has to fit; what is allocated leaves out the holes between
        return torch.cuda.max_memory_reserved()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
