"""Say how long a training is: steps, tokens, hours by a GPU's data sheet, disk."""

import math
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers.trainer_pt_utils import get_length_grouped_indices
from trl import SFTConfig

from medibot.recipe import Recipe

if TYPE_CHECKING:
    from medibot.planning.plan import Plan

# The share of a data sheet's TFLOPs that a fine-tuning is taken to reach; 0.3 to 0.45 is usual
UTILIZATION = 0.35
# Operations that a GPU does while it reads a 16-bit weight, which a step of generation waits for: 300 (A100) to 800 (L4)
# by data sheets
READING = 500
SIZES = ("per_device_train_batch_size", "gradient_accumulation_steps", "num_train_epochs")


def setting(recipe: Recipe, name: str) -> Any:
    """Return what the recipe's training section says, or upstream's default."""
    return recipe.training.get(name, SFTConfig.__dataclass_fields__[name].default)


def is_flat(recipe: Recipe) -> bool:
    """Tell whether a batch is one sequence without padding."""
    return setting(recipe, "packing") or setting(recipe, "padding_free")


def make_schedule(plan: "Plan") -> dict[str, Any]:
    """Return a plan's steps; tokens, padding included, on all devices; hours, None at unknown speed; bytes on disk.

    A token takes two operations a weight forward; as many for the gradient of the inputs, for that of trained weights,
    and for what checkpointing computes twice (Kaplan et al., 2020, arXiv 2001.08361). Attention is over all pairs of a
    row, so that its mean is over tokens, not over rows.
    """
    recipe, lengths, config, processes = plan.recipe, plan.lengths, plan.config, plan.hardware.processes
    value, generator = partial(setting, recipe), torch.Generator().manual_seed(0)
    size, accumulated, epochs = map(value, SIZES)
    updates = math.ceil(math.ceil(len(lengths) / (size * processes)) / accumulated)
    steps = value("max_steps") if value("max_steps") > 0 else math.ceil(updates * epochs)
    # A micro-batch's mean over one epoch in the recipe's order
    order = torch.randperm(len(lengths), generator=generator).tolist()
    if value("train_sampling_strategy") == "group_by_length":
        order = get_length_grouped_indices(lengths.tolist(), size, generator=generator)
    batches = [lengths[order[start : start + size]] for start in range(0, len(order), size)]
    padded = np.mean([batch.sum() if is_flat(recipe) else len(batch) * batch.max() for batch in batches])
    tokens = round(steps * accumulated * processes * float(padded))
    embedding = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    linear, again = 2 * (plan.parameters.total - embedding), 2 if plan.checkpointing else 1
    attention = 4 * config.num_hidden_layers * config.hidden_size * float(np.average(lengths, weights=lengths))
    flops = tokens * ((again + 1) * linear + (again + 2) * attention + 2 * plan.parameters.trainable)
    evaluations, passes = count_evaluations(recipe, steps), count_passes(recipe, steps, processes)
    besides = evaluations * plan.validated * (linear + attention) / processes + passes * READING * plan.parameters.total
    an_hour = (plan.device.tflops or 0) * 1e12 * UTILIZATION * 3600
    hours, beside = ((work / an_hour if an_hour else None) for work in (flops / processes + besides, besides))
    # The checkpoints that exist at once, and the model
    every, limit, model = value("save_steps"), value("save_total_limit"), plan.parameters.trained
    by_steps = steps // max(1, math.ceil(steps * every if every < 1 else every))
    saves = {"no": 0, "epoch": math.ceil(epochs), "steps": by_steps}.get(value("save_strategy"), 1)
    if limit:
        # The best one is kept beside the last one, and one is written before another goes
        saves = min(saves, max(limit, 2 if value("load_best_model_at_end") else 1) + 1)
    disk = saves * (model + plan.parameters.optimizer) + model
    time = {"hours_estimated": hours, "hours_evaluating_and_answering": beside}
    return {"steps": steps, "tokens": tokens, **time, "disk_bytes": disk}


def count_evaluations(recipe: Recipe, steps: int) -> int:
    """Return how often a training of so many steps is scored on the validation split."""
    every = setting(recipe, "eval_steps") or setting(recipe, "logging_steps")
    by_steps = math.ceil(steps / max(1, math.ceil(steps * every if every < 1 else every)))
    counts = {"steps": by_steps, "epoch": math.ceil(setting(recipe, "num_train_epochs"))}
    return counts.get(setting(recipe, "eval_strategy"), 0) + bool(setting(recipe, "eval_on_start"))


def count_passes(recipe: Recipe, steps: int, processes: int) -> int:
    """Return how often a process reads all weights for its share of the fixed questions, one token a row each time.

    They are asked before the first step, at each evaluation and, where that was none, behind the last step.
    """
    times = 1 + max(1, count_evaluations(recipe, steps) - bool(setting(recipe, "eval_on_start")))
    share = math.ceil(len(recipe.evaluation.questions) / processes)
    batches = math.ceil(share / setting(recipe, "per_device_eval_batch_size"))
    return times * batches * recipe.evaluation.max_new_tokens
