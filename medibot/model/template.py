"""Read the chat template and check that it renders a conversation."""

from pathlib import Path
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from medibot.recipe import Recipe

SAMPLE_CHAT = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]


def set_template(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> None:
    """Put the recipe's template in the place of the model's; raise RecipeError for one that renders no chat."""
    key, remedy = "model.pretrained_model_name_or_path", "name a .jinja file in training.chat_template_path"
    if written := recipe.training.get("chat_template_path"):
        key, remedy = "training.chat_template_path", "repair it"
        try:
            tokenizer.chat_template = Path(written).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise recipe.error(key, f"{written} is not UTF-8 text", "save it as UTF-8") from error
        except OSError as error:
            raise recipe.error(key, f"{written!r} not found", "give a .jinja file") from error
    if not tokenizer.chat_template:
        raise recipe.error(key, "the tokenizer has no chat template", f"take a chat model, or {remedy}")
    try:
        text = tokenizer.apply_chat_template(SAMPLE_CHAT, tokenize=False)
    except (jinja2.TemplateError, ValueError, TypeError) as error:
        raise recipe.error(key, f"the chat template cannot be rendered: {error}", remedy) from error
    if not all(message["content"] in text for message in SAMPLE_CHAT):
        raise recipe.error(key, "the chat template leaves out what the messages say", remedy)


def template_kwargs(recipe: Recipe) -> dict[str, Any]:
    """Return the arguments of every rendering of a chat; control tokens in a message's content are plain text."""
    return {"sanitize_control_tokens": True} | recipe.data.chat_template_kwargs
