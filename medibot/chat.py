"""Answer one conversation with a finished run, exactly as it was trained."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import AutoTokenizer, GenerationConfig

from medibot import care, model
from medibot.recipe import Recipe, RecipeError, load_recipe
from medibot.run import finished_run


def ask_both(run_name: str, question: str, max_new_tokens: int = 256) -> None:
    """Print the base model's and the tuned model's answer to `question`, from one load where there is an adapter."""
    if not question.strip():
        raise RecipeError.of("Q", "the question is empty", 'write Q="What is anemia?"')
    this = finished_run(run_name)
    model.quiet_upstream()
    recipe = load_recipe(str(this.recipe))
    print(f"\n{question}")
    warning = care.emergency_notice(question) if recipe.evaluation.emergency_notice else None
    if warning:
        print(f"\n{warning}", flush=True)
    for name, text in answers(recipe, this.weights, question, max_new_tokens):
        print(f"\n[{name}]\n{text}")


def answers(recipe: Recipe, weights: Path, question: str, max_new_tokens: int) -> Iterator[tuple[str, str]]:
    """("base", text) and ("tuned", text) for one question: same prompt, same decoding."""
    dtype = model.precision(recipe.model.get("dtype")).dtype
    # The run's own copy of tokenizer and template, so that use cannot differ from training
    tokenizer = AutoTokenizer.from_pretrained(weights)
    config = GenerationConfig.from_pretrained(weights)
    config.max_new_tokens = max_new_tokens
    template = model.template_kwargs(recipe)
    prompts = [model.prompt_messages(question, recipe.data.system, model.role_markers(tokenizer))]
    tuned = model.load_tuned(recipe, weights, dtype)
    if isinstance(tuned, PeftModel):
        with tuned.disable_adapter():
            yield "base", answer_text(tuned, tokenizer, prompts, config, template)
    else:
        yield "base", answer_text(model.load_base(recipe, dtype).to(tuned.device), tokenizer, prompts, config, template)
    yield "tuned", answer_text(tuned, tokenizer, prompts, config, template)


def answer_text(
    weights: Any, tokenizer: Any, prompts: list[Any], config: GenerationConfig, template: dict[str, Any]
) -> str:
    got = next(model.answer(weights, tokenizer, prompts, config, template))
    return got["text"] + ("" if got["stopped"] else f" … [cut at {got['tokens']} tokens]")
