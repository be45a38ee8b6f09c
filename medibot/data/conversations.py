"""Map columns and render conversations as TRL takes them."""

import json
from typing import Any

import pyarrow.parquet
from transformers import PreTrainedTokenizerBase

from medibot.cleaning.ledger import LedgerLine, compare_rows
from medibot.cleaning.rules import Row
from medibot.model.tokenizer import escape_markers, make_prompt, template_kwargs
from medibot.recipe import Recipe

# What the trainer gets to see of a prepared row
COLUMNS = ["prompt", "completion", "chat_template_kwargs"]
# Columns that the prepared data set has of its own
RESERVED = {"prompt", "completion", "row", "group", "part", "tokens", "chat_template_kwargs"}


def map_columns(recipe: Recipe, rows: list[Row]) -> list[Row]:
    """Return rows with the mapped columns under `prompt` and `completion`, and `row`, their index in the source."""
    data = recipe.data
    columns = rows[0].keys()
    mapped = {"prompt": data.prompt, "completion": data.completion}
    wanted = [("data.prompt", data.prompt), ("data.completion", data.completion)]
    for key, column in wanted + [("data.group_by", column) for column in data.group_by if column not in mapped]:
        if column not in columns:
            raise recipe.error(key, f"{data.path} has no column {column!r}", f"it has {', '.join(columns)}")
    if data.prompt == data.completion:
        raise recipe.error("data.completion", "the same column as data.prompt", "name the answers' column")
    kept = [column for column in columns if column not in mapped.values()]
    if clash := RESERVED & set(kept):
        raise recipe.error("data.path", f"column {sorted(clash)[0]!r} has a name that MediBot gives", "rename it")
    for index, row in enumerate(rows):
        for column in mapped.values():
            if not isinstance(row[column], str | None):
                what = f"row {index} holds {type(row[column]).__name__}, not text, in column {column!r}"
                raise recipe.error("data.path", what, "convert the column to text")
    taken = {**mapped, **{column: column for column in kept}}
    return [{"row": index, **{key: row[column] for key, column in taken.items()}} for index, row in enumerate(rows)]


def require_text(recipe: Recipe, rows: list[Row], ledger: list[LedgerLine]) -> None:
    """Raise RecipeError where the rules left no row, or rows without question or answer."""
    if not rows:
        last = next((line.rule for line in reversed(ledger) if line.dropped), "the rules")
        raise recipe.error("data.clean", f"no row is left after {last}", "see the ledger with: medibot inspect")
    for column, rule in (("prompt", "drop_unasked"), ("completion", "drop_unanswered")):
        empty = sum(1 for row in rows if not (row[column] or "").strip())
        if empty:
            raise recipe.error(
                "data.clean", f"{empty:,} of {len(rows):,} rows have no {column}", f"add the rule {rule}"
            )


def escape_rows(rows: list[Row], markers: tuple[str, ...]) -> tuple[list[Row], LedgerLine]:
    """Return rows whose text cannot forge a turn of this model's template, and the ledger line that counts them."""
    after = [row | {key: escape_markers(row[key], markers) for key in ("prompt", "completion")} for row in rows]
    return after, compare_rows("role markers made text", rows, after)


def fit_length(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, rows: list[Row]) -> tuple[list[Row], LedgerLine]:
    """Return rows with `tokens`; those over `training.max_length` are dropped, or refused under `too_long: error`."""
    limit = recipe.training.get("max_length", 1024)
    counts = count_tokens(recipe, tokenizer, [prompt_of(recipe, row) + completion_of(row) for row in rows])
    counted = [row | {"tokens": tokens} for row, tokens in zip(rows, counts, strict=True)]
    kept = [row for row in counted if limit is None or row["tokens"] <= limit]
    if len(kept) < len(rows) and recipe.data.too_long == "error":
        worst = max(counted, key=lambda row: row["tokens"])
        what = f"{len(rows) - len(kept):,} conversations are longer than {limit} tokens (row {worst['row']}: {worst['tokens']})"
        raise recipe.error("training.max_length", what, "raise it, or write data.too_long: drop")
    if not kept:
        raise recipe.error("training.max_length", f"every conversation is longer than {limit} tokens", "raise it")
    return kept, compare_rows("longer than max_length", counted, kept)


def count_tokens(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, chats: list[list[dict[str, str]]]) -> list[int]:
    """Return the tokens of each whole chat, by the chat template that the trainer will use."""
    import jinja2

    lengths: list[int] = []
    kwargs = template_kwargs(recipe)
    try:
        for start in range(0, len(chats), 1000):
            chunk = chats[start : start + 1000]
            encoded = tokenizer.apply_chat_template(chunk, tokenize=True, return_dict=True, **kwargs)
            lengths += map(len, encoded["input_ids"])
    except (jinja2.TemplateError, ValueError) as error:
        what = f"the model's chat template refuses these conversations: {error}"
        raise recipe.error("data.system", what, "remove data.system if the template knows no system role") from error
    return lengths


def prompt_of(recipe: Recipe, row: Row) -> list[dict[str, str]]:
    """Return a row's prompt as chat messages."""
    return make_prompt(row["prompt"], recipe.data.system, ())


def completion_of(row: Row) -> list[dict[str, str]]:
    """Return a row's completion as chat messages."""
    return [{"role": "assistant", "content": row["completion"]}]


def render(recipe: Recipe, rows: list[Row]) -> pyarrow.Table:
    """Return TRL's conversational prompt/completion rows, with the source's other columns beside them."""
    columns: dict[str, list[Any]] = {}
    for column in [name for name in rows[0] if name not in {"prompt", "completion"}]:
        values = [row.get(column) for row in rows]
        # Counts stay numbers, text stays text, anything else becomes JSON, so that one column has one type
        is_count = column in {"row", "part", "tokens"}
        columns[column] = [
            value if is_count or isinstance(value, str | None) else json.dumps(value, ensure_ascii=False, default=str)
            for value in values
        ]
    columns["prompt"] = [prompt_of(recipe, row) for row in rows]
    columns["completion"] = [completion_of(row) for row in rows]
    columns["chat_template_kwargs"] = [template_kwargs(recipe)] * len(rows)
    return pyarrow.table(columns)
