"""Say how long a training is: steps, tokens, floating-point operations, hours by a GPU's data sheet, disk."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from trl import SFTConfig

from medibot.recipe import Recipe

if TYPE_CHECKING:
    from medibot.planning.plan import Plan

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


def make_schedule(plan: "Plan") -> Schedule:
    """Return the schedule of a planned training."""
    recipe, processes = plan.recipe, plan.layout.processes
    accumulated = setting(recipe, "gradient_accumulation_steps")
    batch = setting(recipe, "per_device_train_batch_size") * processes
    epoch = math.ceil(math.ceil(len(plan.lengths) / batch) / accumulated)
    most = setting(recipe, "max_steps")
    steps = most if most > 0 else math.ceil(epoch * setting(recipe, "num_train_epochs"))
    tokens = round(steps * accumulated * processes * padded_tokens(recipe, plan.lengths))
    flops = tokens * flops_per_token(plan)
    speed = (plan.device.tflops or 0) * 1e12 * UTILIZATION * processes
    return Schedule(steps, tokens, flops, flops / speed / 3600 if speed else None, disk_bytes(plan, steps))


def padded_tokens(recipe: Recipe, lengths: np.ndarray) -> float:
    """Return the tokens of a micro-batch, padding included: the mean over one epoch in the recipe's order."""
    size = setting(recipe, "per_device_train_batch_size")
    order = np.random.default_rng(setting(recipe, "seed")).permutation(lengths)
    if setting(recipe, "train_sampling_strategy") == "group_by_length":
        # transformers.trainer_pt_utils: sorted within 50 batches
        chunks = [order[start : start + 50 * size] for start in range(0, len(order), 50 * size)]
        order = np.concatenate([np.sort(chunk)[::-1] for chunk in chunks])
    batches = [order[start : start + size] for start in range(0, len(order), size)]
    return float(np.mean([batch.sum() if is_flat(recipe) else len(batch) * batch.max() for batch in batches]))


def flops_per_token(plan: "Plan") -> float:
    """Return the floating-point operations of one token, forward and backward.

    Two a weight forward; as many for the gradient of the inputs, for that of trained weights, and for what checkpointing
    computes twice (Kaplan et al., 2020, arXiv 2001.08361). Attention as upstream computes it, over all pairs of a row.
    """
    config, parameters, lengths = plan.config, plan.parameters, plan.lengths
    weights = parameters.total - (0 if config.tie_word_embeddings else parameters.embedding)
    head = config.to_dict().get("head_dim") or config.hidden_size // config.num_attention_heads
    # A token of a long row meets more others: the mean over tokens, not over rows
    met = float(np.average(lengths, weights=lengths))
    linear, attention = 2 * weights, 4 * config.num_hidden_layers * config.num_attention_heads * head * met
    forward = linear + attention
    return forward * (2 if plan.checkpointing else 1) + linear + 2 * attention + 2 * parameters.trainable


def disk_bytes(plan: "Plan", steps: int) -> int:
    """Return the bytes of the checkpoints that exist at once, and of the model."""
    recipe, trained = plan.recipe, plan.parameters.trained
    every = setting(recipe, "save_steps")
    saves = {
        "no": 0,
        "epoch": math.ceil(setting(recipe, "num_train_epochs")),
        "steps": steps // max(1, math.ceil(steps * every) if every < 1 else int(every)),
    }.get(setting(recipe, "save_strategy"), 1)
    limit = setting(recipe, "save_total_limit")
    # The best one is kept beside the last one, and one is written before another goes
    least = 2 if setting(recipe, "load_best_model_at_end") else 1
    at_once = min(saves, max(limit, least) + 1) if limit else saves
    return at_once * (trained + plan.parameters.optimizer) + trained
