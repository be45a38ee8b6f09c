"""Recipes that turn a chat model into a medical question-answering assistant, with TRL's SFTTrainer.

A recipe's name comes in. A run's folder, results and answers go out, as plain values. Nothing is printed but progress,
and nothing heavy is imported before it is called:

    import medibot

    recipe = medibot.load_recipe("quickstart", ["training.max_steps=20"])
    prepared = medibot.prepare(recipe)
    run = medibot.train(recipe, "mine")
    print(medibot.evaluate("mine", rows=10).results["verdict"])
    for piece in medibot.Assistant("mine").reply([{"role": "user", "content": "What is anemia?"}]):
        print(piece, end="")
"""

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from medibot.data.prepared import prepare
    from medibot.evaluation.compare import compare
    from medibot.evaluation.evaluate import evaluate
    from medibot.export.merge import merge
    from medibot.recipe import load_recipe
    from medibot.serving.assistant import Assistant
    from medibot.training.session import train

# On its import it advises a package from the hub that nothing here needs
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
__all__ = ["Assistant", "compare", "evaluate", "load_recipe", "merge", "prepare", "train"]
MODULES = {
    "Assistant": "medibot.serving.assistant",
    "compare": "medibot.evaluation.compare",
    "evaluate": "medibot.evaluation.evaluate",
    "load_recipe": "medibot.recipe",
    "merge": "medibot.export.merge",
    "prepare": "medibot.data.prepared",
    "train": "medibot.training.session",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used (PEP 562): torch alone takes seconds."""
    if name not in MODULES:
        raise AttributeError(f"module 'medibot' has no attribute {name!r}")
    return getattr(import_module(MODULES[name]), name)
