"""Part what a model thinks from what it answers."""

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

from transformers import PreTrainedTokenizerBase

from medibot.model.tokenizer import SAMPLE_CHAT

# What opens and closes a trace. To tokenizers these are text or tokens that are not special: decoding keeps them
MARKS = OPEN, CLOSE = "<think>", "</think>"


def opens_thinking(tokenizer: PreTrainedTokenizerBase, template: dict[str, Any]) -> bool:
    """Return whether the generation prompt opens the trace, as DeepSeek's does, so that a text begins inside it."""
    rendering = {"add_generation_prompt": True, "return_dict": True} | template
    prompt = tokenizer.apply_chat_template(SAMPLE_CHAT[:1], **rendering)["input_ids"]
    return tokenizer.decode(prompt).rstrip().endswith(OPEN)


def split_thinking(text: str, opened: bool = False) -> tuple[str, str]:
    """Return (trace, answer) of a generated text; `opened`: the prompt has opened the trace already.

    Without a trace the answer is the text as it is, also where it speaks of the marks further on. A trace that nothing
    closes was cut: all of the text is trace. The white space that templates write around the marks is no part of either.
    """
    begun = text.lstrip()
    if begun.startswith(OPEN):
        text = begun.removeprefix(OPEN)
    elif not opened:
        return "", text
    trace, _, answer = text.partition(CLOSE)
    # Only line ends: the indentation of its first line belongs to the trace
    return trace.strip("\n"), answer.lstrip()


def stream_thinking(pieces: Iterable[str], opened: bool = False) -> Iterator[tuple[str, str]]:
    """Yield (trace, answer) in pieces; joined, they are what `split_thinking` returns of the whole text."""
    text, thought, said = "", 0, 0
    for piece in itertools.chain(pieces, [None]):
        text += piece or ""
        trace, answer = split_thinking(text if piece is None else settled(text), opened)
        if trace[thought:] or answer[said:]:
            yield trace[thought:], answer[said:]
        thought, said = len(trace), len(answer)


def settled(text: str) -> str:
    """Return a text that goes on, up to what may turn out to be a mark, or white space before one."""
    head, _, tail = text.rpartition("<")
    if any(mark.startswith(f"<{tail}") for mark in MARKS) and "<" in text:
        text = head
    return text if text.strip() else ""
