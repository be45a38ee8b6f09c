"""Load the tokenizer and its chat template, and keep user text from forging a turn."""

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
