"""Read the chat template and check that it renders a conversation."""

from pathlib import Path
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from medibot.recipe import Recipe

SAMPLE_CHAT = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]


def read_template(recipe: Recipe, file: Path) -> str:
    """Return the template file that the recipe names."""
    if not file.is_file():
        raise recipe.error("training.chat_template_path", f"{str(file)!r} not found", "give a .jinja file")
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise recipe.error("training.chat_template_path", f"{file} is not UTF-8 text", "save it as UTF-8") from error


def require_working_template(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise RecipeError for a chat template that cannot render one question and its answer."""
    own = "training.chat_template_path" in recipe.places
    key = "training.chat_template_path" if own else "model.pretrained_model_name_or_path"
    remedy = "repair it" if own else "name a .jinja file in training.chat_template_path"
    try:
        text = tokenizer.apply_chat_template(SAMPLE_CHAT, tokenize=False)
    except (jinja2.TemplateError, ValueError, TypeError) as error:
        raise recipe.error(key, f"the chat template cannot be rendered: {error}", remedy) from error
    if not all(message["content"] in text for message in SAMPLE_CHAT):
        raise recipe.error(key, "the chat template leaves out what the messages say", remedy)


def template_kwargs(recipe: Recipe) -> dict[str, Any]:
    """Return the arguments of every rendering of a chat; control tokens in a message's content are plain text."""
    return {"sanitize_control_tokens": True} | recipe.data.chat_template_kwargs
