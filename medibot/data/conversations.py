"""Map columns and render conversations as TRL takes them."""

import itertools
import json

import jinja2
import pyarrow
from transformers import PreTrainedTokenizerBase

from medibot.cleaning.ledger import LedgerLine, compare_rows
from medibot.cleaning.rules import Row
from medibot.model.tokenizer import make_prompt, template_kwargs
from medibot.recipe import Recipe

# What the trainer gets to see of a prepared row
COLUMNS = ["prompt", "completion", "chat_template_kwargs"]
# Columns that the prepared data set has of its own
RESERVED = {*COLUMNS, "row", "group", "part", "tokens"}


def map_columns(recipe: Recipe, rows: list[Row]) -> list[Row]:
    """Return rows with the mapped columns under `prompt` and `completion`, and `row`, their index in the source."""
    data, columns = recipe.data, rows[0].keys()
    texts = {"prompt": data.prompt, "completion": data.completion}
    named = [(f"data.{key}", column) for key, column in texts.items()]
    for key, column in [*named, *(("data.group_by", column) for column in data.group_by if column not in texts)]:
        if column not in columns:
            raise recipe.error(key, f"{data.path} has no column {column!r}", f"it has {', '.join(columns)}")
    if data.prompt == data.completion:
        raise recipe.error("data.completion", "the same column as data.prompt", "name the answers' column")
    kept = {column: column for column in columns if column not in texts.values()}
    if clash := sorted(RESERVED & kept.keys()):
        raise recipe.error("data.path", f"column {clash[0]!r} has a name that MediBot gives", "rename it")
    for index, row in enumerate(rows):
        for column in texts.values():
            if not isinstance(row[column], str | None):
                what = f"row {index} holds {type(row[column]).__name__}, not text, in column {column!r}"
                raise recipe.error("data.path", what, "convert the column to text")
    return [
        {"row": index} | {key: row[column] for key, column in (texts | kept).items()} for index, row in enumerate(rows)
    ]


def fit_length(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, rows: list[Row]) -> tuple[list[Row], LedgerLine]:
    """Return rows with `tokens`, those of the whole chat by the template that the trainer will use.

    Rows over `training.max_length` are dropped, or refused under `too_long: error`.
    """
    limit, kwargs = recipe.training.get("max_length", 1024), template_kwargs(recipe)
    counted: list[Row] = []
    try:
        for start in range(0, len(rows), 1000):
            chunk = rows[start : start + 1000]
            chats = [list(itertools.chain(*messages(recipe, row).values())) for row in chunk]
            ids = tokenizer.apply_chat_template(chats, tokenize=True, return_dict=True, **kwargs)["input_ids"]
            counted += [row | {"tokens": len(found)} for row, found in zip(chunk, ids, strict=True)]
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


def messages(recipe: Recipe, row: Row) -> dict[str, list[dict[str, str]]]:
    """Return a row's prompt and completion as chat messages."""
    answer = {"role": "assistant", "content": row["completion"]}
    return {"prompt": make_prompt(row["prompt"], recipe.data.system, ()), "completion": [answer]}


def render(recipe: Recipe, rows: list[Row]) -> pyarrow.Table:
    """Return TRL's conversational prompt/completion rows, with the source's other columns beside them."""
    kwargs = {"chat_template_kwargs": template_kwargs(recipe)}
    rendered = []
    for row in rows:
        # Counts stay numbers, text stays text, anything else becomes JSON, so that one column has one type
        others = {key: value for key, value in row.items() if key not in COLUMNS}
        for key, value in others.items():
            if key not in ("row", "part", "tokens") and not isinstance(value, str | None):
                others[key] = json.dumps(value, ensure_ascii=False, default=str)
        rendered.append(others | messages(recipe, row) | kwargs)
    return pyarrow.Table.from_pylist(rendered)
