"""Render turns as the conversations that TRL takes."""

import itertools
import re
from collections.abc import Iterator
from typing import Any

import jinja2
import pyarrow
from transformers import PreTrainedTokenizerBase

from medibot.cleaning.ledger import LedgerLine, compare_rows
from medibot.cleaning.rules import Row
from medibot.data.columns import as_text
from medibot.data.messages import Message
from medibot.model.tokenizer import template_kwargs
from medibot.recipe import Recipe

# What the trainer gets to see of a prepared row
COLUMNS = ["prompt", "completion", "chat_template_kwargs"]
NUMBERS = ("row", "part", "tokens")


def fit_length(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, rows: list[Row]) -> tuple[list[Row], LedgerLine]:
    """Return rows with `tokens`, those of the whole chat by the template that the trainer will use.

    Rows over `training.max_length` are dropped, or refused under `too_long: error`.
    """
    limit, kwargs = recipe.training.get("max_length", 1024), template_kwargs(recipe)
    counted: list[Row] = []
    try:
        for start in range(0, len(rows), 1000):
            chunk = rows[start : start + 1000]
            chats = [list(itertools.chain(*messages(row, bool(row.get("thinking"))).values())) for row in chunk]
            counts = count_tokens(tokenizer, chats, kwargs)
            counted += [row | {"tokens": count} for row, count in zip(chunk, counts, strict=True)]
    except (jinja2.TemplateError, ValueError) as error:
        what = f"the model's chat template refuses these conversations: {error}"
        raise recipe.error("data.system", what, "remove data.system if the template knows no system role") from error
    kept = [row for row in counted if limit is None or row["tokens"] <= limit]
    if len(kept) < len(rows) and recipe.data.too_long == "error":
        worst = max(counted, key=lambda row: row["tokens"])
        what = f"{len(rows) - len(kept):,} conversations are longer than {limit} tokens (row {worst['row']}: {worst['tokens']})"
        raise recipe.error("training.max_length", what, "raise it, or write data.too_long: drop")
    if not kept:
        raise recipe.error("training.max_length", f"every conversation is longer than {limit} tokens", "raise it")
    return kept, compare_rows("longer than max_length", counted, kept)


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


def render(recipe: Recipe, rows: list[Row], thinking: bool) -> Iterator[pyarrow.RecordBatch]:
    """Yield TRL's conversational prompt/completion rows, with the source's other columns beside them, in batches.

    Counts stay numbers, text stays text, anything else becomes JSON, so that one column has one type.
    """
    kwargs = {"chat_template_kwargs": template_kwargs(recipe)}
    names = dict.fromkeys(name for row in rows for name in row if name not in ("system", "history", "thinking"))
    message = {"role": pyarrow.string(), "content": pyarrow.string()}
    answer = message | ({"reasoning_content": pyarrow.string()} if thinking else {})
    types = {name: pyarrow.int64() if name in NUMBERS else pyarrow.string() for name in names}
    types |= {"prompt": pyarrow.list_(pyarrow.struct(message)), "completion": pyarrow.list_(pyarrow.struct(answer))}
    schema = pyarrow.schema(types | {name: pyarrow.infer_type([value]) for name, value in kwargs.items()})
    for start in range(0, len(rows), 1000):
        rendered = []
        for row in rows[start : start + 1000]:
            others = {name: row.get(name) for name in names}
            for name, value in others.items():
                if name not in NUMBERS and not isinstance(value, str | None):
                    others[name] = as_text(value)
            rendered.append(others | messages(row, thinking) | kwargs)
        yield pyarrow.RecordBatch.from_pylist(rendered, schema)
