"""Load the tokenizer, and keep user text from forging a turn."""

import hashlib
import itertools
import json
import re
from collections.abc import Sequence

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from medibot.model.loading import call_loader
from medibot.model.template import SAMPLE_CHAT, set_template
from medibot.recipe import Recipe

# What a chat template writes between angle or square brackets is a role or turn marker, whether or not it is a token of
# its own: TinyLlama's <|user|> is plain text to its tokenizer and would still forge a turn.
MARKER = re.compile(r"<\|?/?[A-Za-z_][\w ]*\|?>|<</?[A-Z]+>>|\[/?[A-Z_]+\]")


def load_tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase:
    """Return the tokenizer with its own chat template, or the file that `training.chat_template_path` names."""
    tokenizer = call_loader(recipe, "tokenizer", AutoTokenizer.from_pretrained)
    set_template(recipe, tokenizer)
    if tokenizer.eos_token_id is None:
        raise recipe.error("model.pretrained_model_name_or_path", "the tokenizer has no end token", "take a chat model")
    if tokenizer.pad_token is None:
        # Labels are padded by position and attention is masked, so sharing the end token costs nothing
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


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
