"""Paint rows with what the loss covers."""

import html
from typing import Any

from datasets import Dataset
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from medibot.data.gate import IGNORED

STYLES = {"masked": "dim", "trained": "bold green", "stop": "bold white on red"}


def paint(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, stops: list[int]) -> list[tuple[str, str]]:
    """Return (text, masked | trained | stop) pieces of one trainer row, whole characters only: joined, they are its text."""
    ids = row["input_ids"]
    kinds = [
        "masked" if label == IGNORED else "stop" if token in stops else "trained"
        for token, label in zip(ids, row["labels"], strict=True)
    ]
    pieces: list[tuple[str, str]] = []
    # Each piece is decoded behind the one before it: SentencePiece drops a space at the start of what it decodes
    start = read = 0
    for end in range(1, len(ids) + 1):
        before, text = (tokenizer.decode(ids[start:e], clean_up_tokenization_spaces=False) for e in (read, end))
        # An unfinished character waits for the tokens that spell its rest, but not beyond its own kind
        if text.endswith("�") and kinds[end : end + 1] == [kinds[end - 1]]:
            continue
        pieces.append((text[len(before) :], kinds[end - 1]))
        start, read = read, end
    return pieces


def choose_examples(dataset: Dataset, row: int | None = None) -> dict[str, int]:
    """Return which rows to paint: the shortest, the median, the longest, and `row` (an index in `dataset`)."""
    order = sorted(range(len(dataset)), key=lambda i: len(dataset[i]["input_ids"]))
    chosen = {"shortest": order[0], "median": order[len(order) // 2], "longest": order[-1]}
    return chosen | ({f"row {row}": row} if row is not None else {})


def paint_text(pieces: list[tuple[str, str]]) -> Text:
    """Return one row for the terminal."""
    return Text.assemble(*((text, STYLES[kind]) for text, kind in pieces))


def paint_html(pieces: list[tuple[str, str]]) -> str:
    """Return one row as HTML: a span a token, its class saying whether it is masked, trained or a stop token."""
    return "".join(f'<span class="{kind}">{html.escape(text)}</span>' for text, kind in pieces)
