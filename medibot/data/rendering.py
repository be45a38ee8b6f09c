"""Render conversations by the tokenizer's own chat template, in batches, and read tokens back as text."""

import re
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy
from datasets import Dataset
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from medibot.model.thinking import CLOSE, OPEN

Row = dict[str, Any]
# Small enough that long conversations fit in memory, large enough that the tokenizer's threads have work
BATCH = 256
# Upstream puts these around a control token that stands in a message, and drops them from its text
IDS_ALONE = {"return_attention_mask": False}
MARKS = "[\U000f0000\U000f0001]"


class Skeleton(NamedTuple):
    """What a template writes around the texts of a chat.

    `controls` are its control tokens, `closing` is what it writes from the last of them on, empty where the answer stands
    behind that, and `between` is the text before and behind the thought, None where the template leaves the thought out;
    without a thought it is the empty block that a reasoning model's template writes before the answer, which the model
    has to generate, too. `whole` says that every message stands in it.
    """

    ids: list[int]
    controls: list[int]
    closing: list[int]
    between: list[str] | None
    whole: bool


class Renderer:
    """Give the token ids of conversations, and the text of token ids, as the trainer's tokenizer has them."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder
        # Special tokens, and added tokens that the chat template writes
        self.controls = {
            number
            for number, token in added.items()
            if token.special or (token.content.strip() and token.content in tokenizer.chat_template)
        }
        self.is_control = numpy.zeros(max(len(tokenizer), *added, 0) + 1, bool)
        self.is_control[list(self.controls)] = True
        tokens = [re.escape(token.content) for token in added.values() if token.special or token.content.strip()]
        self.typed = re.compile("|".join([MARKS, *tokens]))
        self.skeletons: dict[str, Skeleton] = {}
        # Decoded once for each token, not once for each row
        self.is_blank = cache(lambda token: not self.read([[token]])[0].strip())

    def encode(self, rows: list[Row], chats: list[list[dict[str, Any]]], prompt: bool = False) -> list[list[int]]:
        """Return the ids of each chat under its row's arguments; of each `prompt` up to where an answer begins."""
        groups: dict[str, list[int]] = {}
        typed = self.typed_in(chats)
        for place, row in enumerate(rows):
            groups.setdefault(repr((row["chat_template_kwargs"], typed[place])), []).append(place)
        encoded: dict[int, list[int]] = {}
        for places in groups.values():
            kwargs = {"add_generation_prompt": prompt} | rows[places[0]]["chat_template_kwargs"]
            # Upstream makes text of control tokens chat by chat; without any in it a chat is encoded with others at once
            if not typed[places[0]]:
                kwargs["sanitize_control_tokens"] = False
            chosen = [chats[place] for place in places]
            ids = self.tokenizer.apply_chat_template(chosen, return_dict=False, tokenizer_kwargs=IDS_ALONE, **kwargs)
            encoded.update(zip(places, ids, strict=True))
        return [encoded[place] for place in range(len(chats))]

    def typed_in(self, chats: list[list[dict[str, Any]]]) -> list[bool]:
        """Return of each chat whether a text in it may hold a control token."""
        texts = ["\0".join(text for message in chat for text in message.values() if text) for chat in chats]
        return [self.typed.search(text) is not None for text in texts]

    def read(self, spans: list[list[int]]) -> list[str]:
        """Return the exact text of each span of token ids."""
        return self.tokenizer.backend_tokenizer.decode_batch(spans, skip_special_tokens=False)

    def fold(self, text: str) -> str:
        """Return what the tokenizer makes of `text`, as plain text."""
        return self.read([self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)])[0]

    def controls_of(self, ids: NDArray[numpy.int64]) -> tuple[list[int], list[int]]:
        """Return the control tokens in `ids`, and all from the last of them on."""
        places = numpy.flatnonzero(self.is_control[ids])
        return ids[places].tolist(), ids[places[-1] :].tolist() if len(places) else []

    def skeleton(self, row: Row) -> Skeleton:
        """Return what the template writes around a row's texts; rows differ in roles, and in which messages think."""
        chat = [
            {key: f"x{key}x" if text and key != "role" else text for key, text in message.items()}
            for message in row["prompt"] + row["completion"]
        ]
        kind = repr([chat, row["chat_template_kwargs"]])
        if kind not in self.skeletons:
            (ids,), (prompt,) = self.encode([row], [chat]), self.encode([row], [chat[:-1]], prompt=True)
            thought = chat[-1].get("reasoning_content")
            lead = self.read([ids[len(prompt) :]])[0].partition("xcontentx")[0]
            between: list[str] | None = [lead.strip() if is_empty_thought(lead) else ""]
            if thought:
                around = lead.split(thought)
                between = [text.strip() for text in around] if len(around) == 2 else None
            controls, closing = self.controls_of(numpy.array(ids))
            closed = "xcontentx" not in self.read([closing])[0]
            whole = self.read([ids])[0].count("xcontentx") >= sum(bool(message["content"]) for message in chat)
            self.skeletons[kind] = Skeleton(ids, controls, closing if closed else [], between, whole)
        return self.skeletons[kind]


def is_empty_thought(text: str) -> bool:
    """Tell whether a text is nothing but the marks around a thought."""
    return "".join(text.split()) in {CLOSE, OPEN + CLOSE}


def read_rows(conversations: Dataset, places: Sequence[int]) -> list[Row]:
    """Return the rows of `conversations` at these ascending places."""
    if not places:
        return []
    # A range is one slice of the file
    run = places[-1] - places[0] + 1 == len(places)
    columns = conversations[places[0] : places[-1] + 1] if run else conversations[places]
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
