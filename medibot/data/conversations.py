"""Render turns as the conversations that TRL takes."""

import itertools
import re
from collections.abc import Iterator
from operator import itemgetter
from typing import Any

import jinja2
import numpy as np
import pyarrow
from pyarrow import RecordBatch
from transformers import PreTrainedTokenizerBase

from medibot.cleaning.ledger import Comparison
from medibot.cleaning.rules import Row
from medibot.data.messages import Message
from medibot.data.rows import NUMBERS, Places, Rows
from medibot.model.tokenizer import template_kwargs
from medibot.recipe import Recipe

# What the trainer gets to see of a prepared row
COLUMNS = ["prompt", "completion", "chat_template_kwargs"]
# So many chats are tokenized at once: enough for the tokenizer's threads, few enough that what is folded is remembered
BATCH = 256


class Fitting:
    """Rows that get `tokens`, those of the whole chat by the template that the trainer will use.

    Rows over `training.max_length` are dropped, or refused at the end under `too_long: error`.
    """

    def __init__(self, recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> None:
        self.recipe, self.tokenizer, self.kwargs = recipe, tokenizer, template_kwargs(recipe)
        self.limit, self.count = recipe.training.get("max_length", 1024), Comparison("longer than max_length")
        self.longest: Row = {"tokens": 0}

    def __call__(self, rows: Iterator[Row]) -> Iterator[Row]:
        """Yield the rows that are short enough."""
        while chunk := list(itertools.islice(rows, BATCH)):
            chats = [list(itertools.chain(*messages(row, bool(row.get("thinking"))).values())) for row in chunk]
            try:
                counts = count_tokens(self.tokenizer, chats, self.kwargs)
            except (jinja2.TemplateError, ValueError) as error:
                what = f"the model's chat template refuses these conversations: {error}"
                remedy = "remove data.system if the template knows no system role"
                raise self.recipe.error("data.system", what, remedy) from error
            for row, tokens in zip(chunk, counts, strict=True):
                counted = row | {"tokens": tokens}
                self.longest = max(self.longest, counted, key=itemgetter("tokens"))
                fits = self.limit is None or tokens <= self.limit
                self.count.note(counted, counted if fits else None)
                if fits:
                    yield counted

    def refuse(self) -> None:
        """Raise RecipeError for rows that are too long where that is an error, or where no other is left."""
        dropped = self.count.dropped
        if dropped and self.recipe.data.too_long == "error":
            what = f"{dropped:,} conversations are longer than {self.limit} tokens"
            what += f" (row {self.longest['row']}: {self.longest['tokens']})"
            raise self.recipe.error("training.max_length", what, "raise it, or write data.too_long: drop")
        if dropped == self.count.rows:
            what = f"every conversation is longer than {self.limit} tokens"
            raise self.recipe.error("training.max_length", what, "raise it")


def count_tokens(tokenizer: PreTrainedTokenizerBase, chats: list[list[Message]], kwargs: dict[str, Any]) -> list[int]:
    """Return the number of tokens of each chat.

    Upstream reads chats one by one to find control tokens in their texts. Where there are none, many at once are the same.
    """
    added = (token for token in tokenizer.added_tokens_decoder.values() if token.special or token.content.strip())
    # Upstream's own marks, which it takes out of texts, are characters of private use
    control = re.compile("|".join(["[\U000f0000-\U0010ffff]", *(re.escape(token.content) for token in added)]))
    settings = [str(value) for value in kwargs.values()]
    texts = tokenizer.apply_chat_template(chats, tokenize=False, **kwargs | {"sanitize_control_tokens": False})
    ids = tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"]
    for place, chat in enumerate(chats):
        said = [value for message in chat for value in message.values() if value]
        if control.search("\n".join([*settings, *said])):
            ids[place] = tokenizer.apply_chat_template(chat, tokenize=True, return_dict=True, **kwargs)["input_ids"]
    return list(map(len, ids))


def messages(row: Row, thinking: bool) -> dict[str, list[Message]]:
    """Return a turn's prompt and completion as chat messages; `thinking` says whether any turn of the data has some."""
    system = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    prompt = [*system, *row.get("history", []), {"role": "user", "content": row["prompt"]}]
    answer = {"role": "assistant", "content": row["completion"]}
    return {"prompt": prompt, "completion": [answer | ({"reasoning_content": row.get("thinking")} if thinking else {})]}


def render(recipe: Recipe, rows: Rows, places: Places, groups: np.ndarray) -> Iterator[RecordBatch]:
    """Yield TRL's conversational prompt/completion rows, with the source's other columns beside them, in batches."""
    kwargs, thinking = {"chat_template_kwargs": template_kwargs(recipe)}, "thinking" in rows.names
    names = [name for name in (*rows.names, "group") if name not in ("system", "history", "thinking")]
    message = {"role": pyarrow.string(), "content": pyarrow.string()}
    answer = message | ({"reasoning_content": pyarrow.string()} if thinking else {})
    types = {name: pyarrow.int64() if name in NUMBERS else pyarrow.string() for name in names}
    types |= {"prompt": pyarrow.list_(pyarrow.struct(message)), "completion": pyarrow.list_(pyarrow.struct(answer))}
    schema = pyarrow.schema(types | {name: pyarrow.infer_type([value]) for name, value in kwargs.items()})
    group = (key.ljust(32, b"\0").hex() for key in groups.tolist())  # numpy cuts zeros at the end
    for batch in rows.read(places):
        rendered = [row | {"group": next(group)} | messages(row, thinking) | kwargs for row in batch]
        yield RecordBatch.from_pydict({name: [row.get(name) for row in rendered] for name in schema.names}, schema)
