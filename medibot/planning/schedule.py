"""Say how long a training is: steps, tokens, floating-point operations, hours by a GPU's data sheet, disk."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PretrainedConfig
from transformers.trainer_pt_utils import get_length_grouped_indices
from trl import SFTConfig

from medibot.planning.hardware import Device, Layout
from medibot.planning.memory import Parameters
from medibot.recipe import Recipe

# The share of a data sheet's TFLOPs that a fine-tuning is taken to reach; 0.3 to 0.45 is usual
UTILIZATION = 0.35


def setting(recipe: Recipe, name: str) -> Any:
    """Return what the recipe's training section says, or upstream's default."""
    return recipe.training.get(name, SFTConfig.__dataclass_fields__[name].default)


def is_flat(recipe: Recipe) -> bool:
    """Tell whether a batch is one sequence without padding."""
    return setting(recipe, "packing") or setting(recipe, "padding_free")


@dataclass(frozen=True)
class Schedule:
    """Steps; tokens, padding included, on all devices; hours as an estimate, None where no data sheet says the speed.

    `disk` are the bytes of the checkpoints that exist at once, the one being written included, and of the model.
    """

    steps: int
    tokens: int
    flops: float
    hours: float | None
    disk: int


def make_schedule(
    recipe: Recipe,
    lengths: np.ndarray,
    parameters: Parameters,
    config: PretrainedConfig,
    device: Device,
    layout: Layout,
    checkpointing: bool,
) -> Schedule:
    """Return the schedule of a training on rows of `lengths` tokens.

    A token takes two operations a weight forward; as many for the gradient of the inputs, for that of trained weights,
    and for what checkpointing computes twice (Kaplan et al., 2020, arXiv 2001.08361). Attention is over all pairs of a
    row.
    """
    accumulated, most = setting(recipe, "gradient_accumulation_steps"), setting(recipe, "max_steps")
    batch = setting(recipe, "per_device_train_batch_size") * layout.processes
    epoch = math.ceil(math.ceil(len(lengths) / batch) / accumulated)
    steps = most if most > 0 else math.ceil(epoch * setting(recipe, "num_train_epochs"))
    tokens = round(steps * accumulated * layout.processes * padded_tokens(recipe, lengths))
    embedding = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    linear = 2 * (parameters.total - embedding)
    # A token of a long row meets more others: the mean over tokens, not over rows
    met = float(np.average(lengths, weights=lengths))
    attention = 4 * config.num_hidden_layers * config.hidden_size * met
    forward = (linear + attention) * (2 if checkpointing else 1)
    flops = tokens * (forward + linear + 2 * attention + 2 * parameters.trainable)
    speed = (device.tflops or 0) * 1e12 * UTILIZATION * layout.processes
    hours = flops / speed / 3600 if speed else None
    return Schedule(steps, tokens, flops, hours, disk_bytes(recipe, parameters, steps))


def padded_tokens(recipe: Recipe, lengths: np.ndarray) -> float:
    """Return the tokens of a micro-batch, padding included: the mean over one epoch in the recipe's order."""
    size, generator = setting(recipe, "per_device_train_batch_size"), torch.Generator().manual_seed(0)
    order = torch.randperm(len(lengths), generator=generator).tolist()
    if setting(recipe, "train_sampling_strategy") == "group_by_length":
        order = get_length_grouped_indices(lengths.tolist(), size, generator=generator)
    batches = [lengths[order[start : start + size]] for start in range(0, len(order), size)]
    return float(np.mean([batch.sum() if is_flat(recipe) else len(batch) * batch.max() for batch in batches]))


def disk_bytes(recipe: Recipe, parameters: Parameters, steps: int) -> int:
    """Return the bytes of the checkpoints that exist at once, and of the model."""
    every, limit = setting(recipe, "save_steps"), setting(recipe, "save_total_limit")
    by_steps = steps // max(1, math.ceil(steps * every if every < 1 else every))
    by_strategy = {"no": 0, "epoch": math.ceil(setting(recipe, "num_train_epochs")), "steps": by_steps}
    saves = by_strategy.get(setting(recipe, "save_strategy"), 1)
    if limit:
        # The best one is kept beside the last one, and one is written before another goes
        saves = min(saves, max(limit, 2 if setting(recipe, "load_best_model_at_end") else 1) + 1)
    return saves * (parameters.trained + parameters.optimizer) + parameters.trained
