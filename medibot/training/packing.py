"""Prove that the rows of a flat batch do not see one another."""

import torch

from medibot.errors import one_line
from medibot.planning.hardware import detect_hardware
from medibot.recipe import Recipe
from medibot.training.trainer import CountingTrainer

# Tokens of each probing row, and how much of the influence of one's own row another may have: rounding
LENGTH, MOST = 16, 0.01


@torch.no_grad()
def require_rows_apart(trainer: CountingTrainer, recipe: Recipe) -> None:
    """Raise RecipeError where packed rows are computed from their neighbours; all depends on model and attention.

    A row is computed behind two others. If that moves it, measured by how much the same tokens move it when they stand
    in its own row, then it sees them.
    """
    # Shards cannot be asked before the training has begun
    if not trainer.padding_free or detect_hardware().sharded:
        return
    model, was_training = trainer.model, trainer.model.training
    row, *others = (trainer.train_dataset[0]["input_ids"][:LENGTH], *([token] * LENGTH for token in (0, 1)))

    def moved(rows: list[list[list[int]]]) -> float:
        """Return the largest difference of the row's logits between the two batches."""
        found = []
        for batch in rows:
            inputs = trainer.data_collator([{"input_ids": ids, "labels": ids} for ids in batch])
            inputs = trainer._prepare_inputs({key: value for key, value in inputs.items() if key != "labels"})
            with trainer.compute_loss_context_manager():
                found.append(model(**inputs, use_cache=False).logits[0, -len(row) :].float())
        return (found[0] - found[1]).abs().max().item()

    key = "training.packing" if recipe.training.get("packing") else "training.padding_free"
    remedy = "leave it out: train_sampling_strategy: group_by_length pads little"
    model.eval()
    try:
        apart, together = moved([[other, row] for other in others]), moved([[other + row] for other in others])
    except (ValueError, ImportError) as error:
        # Some models know that they cannot, without a kernel of their own
        raise recipe.error(key, one_line(error), remedy) from error
    finally:
        model.train(was_training)
    if apart > MOST * together:
        what = f"this model computes a row from the rows before it: they move it by {apart / together:.0%} of what"
        raise recipe.error(key, f"{what} its own text does", remedy)
