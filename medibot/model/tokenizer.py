"""Load the tokenizer and its chat template, and keep user text from forging a turn."""

import copy
import hashlib
import itertools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from medibot.model.loading import call_loader
from medibot.recipe import Recipe

SAMPLE_CHAT = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
# What a chat template writes between angle or square brackets is a role or turn marker, whether or not it is a token of
# its own: TinyLlama's <|user|> is plain text to its tokenizer and would still forge a turn.
MARKER = re.compile(r"<\|?/?[A-Za-z_][\w ]*\|?>|<</?[A-Z]+>>|\[/?[A-Z_]+\]")
# Ends the defaults before a saved template. A block, because every engine drops the line end behind one
DEFAULTS_END = "{%- if true %}{# the defaults of training end here #}{% endif %}\n"


def load_tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase:
    """Return the tokenizer with its own chat template, or the file that `training.chat_template_path` names."""
    tokenizer = call_loader(recipe, "tokenizer", AutoTokenizer.from_pretrained)
    key, remedy = "model.pretrained_model_name_or_path", "name a .jinja file in training.chat_template_path"
    if tokenizer.eos_token_id is None:
        raise recipe.error(key, "the tokenizer has no end token", "take a chat model")
    if tokenizer.pad_token is None:
        # Labels are padded by position and attention is masked, so sharing the end token costs nothing
        tokenizer.pad_token = tokenizer.eos_token
    if written := recipe.training.get("chat_template_path"):
        key, remedy = "training.chat_template_path", "repair it"
        try:
            tokenizer.chat_template = Path(written).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            wrong = "is not UTF-8 text" if isinstance(error, UnicodeDecodeError) else "not found"
            raise recipe.error(key, f"{written!r} {wrong}", "give a .jinja file, save it as UTF-8") from error
    if not tokenizer.chat_template:
        raise recipe.error(key, "the tokenizer has no chat template", f"take a chat model, or {remedy}")
    try:
        text = tokenizer.apply_chat_template(SAMPLE_CHAT, tokenize=False)
    except (jinja2.TemplateError, ValueError, TypeError) as error:
        raise recipe.error(key, f"the chat template cannot be rendered: {error}", remedy) from error
    if not all(message["content"] in text for message in SAMPLE_CHAT):
        raise recipe.error(key, "the chat template leaves out what the messages say", remedy)
    return tokenizer


def served_template(tokenizer: PreTrainedTokenizerBase, recipe: Recipe) -> str:
    """Return the chat template with the recipe's arguments and system message before it, as defaults."""
    defaults = "".join(
        f"{{%- if {name} is not defined %}}{{% set {name} = {value!r} %}}{{% endif %}}\n"
        for name, value in recipe.data.chat_template_kwargs.items()
    )
    if system := recipe.data.common_system:
        put = f"{{% set messages = [{{'role': 'system', 'content': {system!r}}}] + messages %}}"
        defaults += f"{{%- if messages and messages[0].role != 'system' %}}{put}{{% endif %}}\n"
    # Defaults that the base model brings from a training of its own belong to its template
    needed = defaults or DEFAULTS_END in tokenizer.chat_template
    return defaults + DEFAULTS_END + tokenizer.chat_template if needed else tokenizer.chat_template


def require_served_as_trained(tokenizer: PreTrainedTokenizerBase, recipe: Recipe) -> None:
    """Raise RecipeError where the template that will be saved, given the messages alone, gives other ids than training."""
    system, rendering = recipe.data.common_system, {"add_generation_prompt": True, "return_dict": False}
    trained = tokenizer.apply_chat_template(make_prompt("question", system, ()), **rendering | template_kwargs(recipe))
    saved, asked, why = served_template(tokenizer, recipe), SAMPLE_CHAT[:1], "other tokens"
    try:
        served = tokenizer.apply_chat_template(asked, chat_template=saved, **rendering)
    except (jinja2.TemplateError, ValueError, TypeError) as error:
        served, why = None, str(error)
    if served != trained:
        key = "data.system" if system else "data.chat_template_kwargs"
        what = f"a chat template that brings it with it does not render as in training: {why}"
        raise recipe.error(key, what, "write it without control tokens, arguments as text, numbers, true or false")


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, recipe: Recipe, folder: Path) -> None:
    """Write a tokenizer whose chat template, given the messages alone, renders them as training did."""
    saved = copy.deepcopy(tokenizer)
    saved.chat_template = served_template(tokenizer, recipe)
    # TGI reads the template in tokenizer_config.json only (its issue 3247), others the file
    saved.save_pretrained(folder, save_jinja_files=False)
    (folder / "chat_template.jinja").write_text(saved.chat_template, encoding="utf-8")


def load_saved_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Return a run's tokenizer with the template of its training, without the defaults for other programs."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    before, end, after = tokenizer.chat_template.partition(DEFAULTS_END)
    tokenizer.chat_template = after if end else before
    return tokenizer


def template_kwargs(recipe: Recipe) -> dict[str, Any]:
    """Return the arguments of every rendering of a chat; control tokens in a message's content are plain text."""
    return {"sanitize_control_tokens": True} | recipe.data.chat_template_kwargs


def writes_thinking(tokenizer: PreTrainedTokenizerBase, kwargs: dict[str, Any]) -> bool:
    """Tell whether the chat template writes a message's `reasoning_content`, as reasoning models' templates do."""
    question, answer = SAMPLE_CHAT
    chat = [question, answer | {"reasoning_content": "reason"}]
    return "reason" in tokenizer.apply_chat_template(chat, tokenize=False, **kwargs)


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a sha256 over the tokenizer's own serialization and its chat template."""
    # Padding and truncation are call-time state that transformers leaves in the backend
    state = json.loads(tokenizer.backend_tokenizer.to_str()) | {"padding": None, "truncation": None}
    text = json.dumps([state, tokenizer.chat_template, tokenizer.bos_token, tokenizer.eos_token], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def role_markers(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """Return the chat template's role and turn markers that are plain text to the tokenizer, longest first.

    Markers that are tokens are harmless: upstream's `sanitize_control_tokens` reads them in a message as text.
    """
    tokens = {token.content for token in tokenizer.added_tokens_decoder.values()}
    return tuple(sorted(set(MARKER.findall(tokenizer.chat_template)) - tokens, key=len, reverse=True))


def escape_markers(text: str, markers: Sequence[str]) -> str:
    """Return `text` with a space behind the first character of each plain-text marker, so that it opens no turn."""
    for marker in markers:
        text = text.replace(marker, f"{marker[0]} {marker[1:]}")
    return text


def end_of_turn_token(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the id of the token that closes an assistant's turn; None if the chat template closes it with plain text.

    Where it writes several, as Phi-3 does, it is the one right behind the answer.
    """
    ids = tokenizer.apply_chat_template(SAMPLE_CHAT, tokenize=True, return_dict=True)["input_ids"]
    said = [token for token in ids if tokenizer.decode([token]).strip()]
    closing = list(itertools.takewhile(tokenizer.added_tokens_decoder.__contains__, reversed(said)))
    return closing[-1] if closing else None


def make_prompt(question: str, system: str | None, markers: Sequence[str]) -> list[dict[str, str]]:
    """Return the prompt of one question, exactly as training rows have it."""
    user = [{"role": "user", "content": escape_markers(question, markers)}]
    return ([{"role": "system", "content": system}] if system else []) + user
