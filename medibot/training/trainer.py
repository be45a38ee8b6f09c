"""Assemble TRL's SFTTrainer from prepared conversations."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from peft import NoMatchingPeftModuleError
from transformers import PreTrainedModel, PrinterCallback
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import rotate_checkpoints
from trl import SFTConfig, SFTTrainer

from medibot.data.conversations import COLUMNS
from medibot.data.prepared import Prepared
from medibot.errors import RecipeError
from medibot.model.loading import load_base, weights_dtype
from medibot.model.precision import make_lora_config
from medibot.planning.hardware import is_zero3
from medibot.planning.plan import per_process
from medibot.run import Run, sync_to_disk
from medibot.training.cpu import optimize_for_cpu


def require_launched_world() -> PartialState:
    """Return the processes that really run; raise RecipeError when they are not the ones that were launched."""
    on_cpu = not torch.cuda.is_available()
    state = PartialState(cpu=on_cpu)
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    wanted = int(os.environ.get("MEDIBOT_PROCESSES", launched))
    if not state.num_processes == launched == wanted:
        what = f"{wanted} processes were launched and {state.num_processes} found each other"
        raise RecipeError.of("accelerate", what, "on CPUs use accelerate_configs/cpu.yaml or cpu-2.yaml")
    return state


class SeededLengths(LengthGroupedSampler):
    """Put rows of like length together, in an order that the seed and the epoch alone decide.

    Upstream's draws from the stream that dropout and evaluations draw from too: a run that is resumed in the middle of
    an epoch would go on with other rows.
    """

    epoch = 0

    def __init__(self, *args: Any, seed: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seed = seed

    def set_epoch(self, epoch: int) -> None:
        """Note the epoch that comes next."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        self.generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return super().__iter__()


class CountingTrainer(SFTTrainer):
    """TRL's trainer, which counts the tokens that its loss has covered: the x-axis on which any two recipes compare."""

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
        """Make upstream's checkpoint under another name; it gets its own by one rename, when it is on the disk.

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


def build_trainer(
    prepared: Prepared, this: Run, load: Callable[[], PreTrainedModel], lora: bool = True
) -> CountingTrainer:
    """Build TRL's trainer over the prepared conversations; adapters in float32, so that resuming changes no dtype."""
    # Before the weights: under ZeRO-3 they are sharded while loading only if the arguments exist by then
    args = sft_config(prepared, this)
    if args.use_cpu:
        optimize_for_cpu()
    columns = {split: prepared.load(split) for split in ("train", "validation")}
    datasets = {split: rows.select_columns(COLUMNS) for split, rows in columns.items() if rows is not None}
    try:
        trainer = CountingTrainer(
            model=load(),
            args=args,
            train_dataset=datasets["train"],
            eval_dataset=datasets.get("validation"),
            processing_class=prepared.tokenizer,
            peft_config=make_lora_config(prepared.recipe) if lora else None,
        )
    except NoMatchingPeftModuleError as error:
        what = " ".join(str(error).split())
        raise prepared.recipe.error("lora.target_modules", what, "name modules that this model has") from error
    trainer.remove_callback(PrinterCallback)
    for parameter in trainer.model.parameters():
        # ZeRO-3 gathers parameters of one dtype only (deepspeed 0.19, _allgather_params_coalesced)
        if parameter.requires_grad and prepared.recipe.lora and not is_zero3():
            # TRL makes QLoRA's adapters bfloat16 and a resume makes them float32: the two would train differently
            parameter.data = parameter.data.float()
    return trainer


def sft_config(prepared: Prepared, this: Run) -> SFTConfig:
    """Return the recipe's training section with what run and machine decide; the batch of a step stays the recipe's."""
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
        **prepared.precision.training,
    }
    written = {key: value for key, value in prepared.recipe.training.items() if key != "chat_template_path"}
    if written.get("activation_checkpointing", True):
        # TRL asks for it where LoRA meets ZeRO-3, and writes it where the Trainer does not read it
        reentrant = is_zero3() and prepared.recipe.lora is not None
        written = {"activation_checkpointing_kwargs": {"use_reentrant": reentrant}} | written
    return SFTConfig(**(decided | written | per_process(prepared.recipe, PartialState().num_processes)))


def load_weights(prepared: Prepared) -> PreTrainedModel:
    """Load the base weights in the dtype that training holds them in."""
    return load_base(prepared.recipe, weights_dtype(prepared.recipe, prepared.precision.dtype))
