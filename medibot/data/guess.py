"""Guess from rows which of their columns make a conversation: a `data` section to start from.

Names that everybody uses decide first, and statistics of the texts where no name does.
"""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import yaml

from medibot.cleaning.rules import Row
from medibot.data.messages import Malformed, as_messages, is_chat

# Rows that decide the shape; their columns' repeated values are counted in all rows
SAMPLE = 200
PROMPTS = ("question", "prompt", "instruction", "query", "patient", "user", "human", "problem", "input")
ANSWERS = ("completion", "answer", "response", "output", "doctor", "assistant", "reply", "solution", "target")
CHATS = ("messages", "conversations", "conversation", "chat", "dialogue", "dialog", "turns", "chosen")
SYSTEMS = ("system", "system_prompt", "system_message", "persona")
THOUGHTS = ("thinking", "reasoning", "reasoning_content", "thought", "cot", "complex_cot")
# What an instruction is about: Alpaca's name for it, and Dolly's
INPUTS = ("input", "context")
# Words of a column's name that say that rows with the same value are about the same thing, the best first
SAME = ("focus", "topic", "document", "url", "subject", "source", "category", "id")
# Two words, or one in a script that may need no spaces; no address, and no list written as text
PROSE = re.compile(r"(?!\s*(https?:|\[\{)).*(\S\s+\S|[^\x00-\x7f])", re.DOTALL)


@dataclass
class Guess:
    """A `data` section without its path, the columns that it reads, doubts by key, and columns for `evaluation.by`."""

    section: dict[str, Any]
    columns: list[str]
    doubts: dict[str, str] = field(default_factory=dict)
    by: list[str] = field(default_factory=list)
    spelling: str = ""

    def as_yaml(self, path: str) -> str:
        """Return the section as text to paste into a recipe, with its doubts as comments."""
        lines = ["data:"]
        for key, value in ({"path": path} | self.section).items():
            doubt = f"  # {self.doubts[key]}" if key in self.doubts else ""
            lines.append(f"  {key}: {write_value(value)}{doubt}")
        if self.by:
            lines += ["# evaluation:  # figures for each value of these columns", f"#   by: {write_value(self.by)}"]
        return "\n".join(lines)


def write_value(value: Any) -> str:
    """Return a value as YAML on one line; text that could be read as anything else is quoted."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {write_value(one)}" for key, one in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(write_value, value)) + "]"
    plain = re.fullmatch(r"[^\W\d][\w./-]*", str(value)) and str(value).lower() not in ("true", "false", "null")
    if plain or not isinstance(value, str):
        return str(value)
    return yaml.safe_dump(value, default_style='"', allow_unicode=True, width=1 << 30).strip()


def guess(rows: list[Row]) -> Guess | None:
    """Return a guess at the section of these rows; None where they give no reason for any."""
    # An empty name cannot be written in a recipe, and one with braces would be a template
    names = {name: None for row in rows[:SAMPLE] for name in row if name and not set(name) & {"{", "}"}}
    cells = {name: [row[name] for row in rows[:SAMPLE] if row.get(name) not in (None, "", [], {})] for name in names}
    cells = {name: values for name, values in cells.items() if values}
    chats = [name for name, values in cells.items() if 2 * sum(map(holds_chat, values)) > len(values)]
    found = guess_pair(cells)
    if chats and not (found and set(chats) & set(found.columns)):
        column = find_name(chats, CHATS) or chats[0]
        first = as_messages(next(value for value in cells[column] if holds_chat(value)), "")[0]
        found = Guess({"messages": column}, [column], spelling="ShareGPT" if "from" in first else "OpenAI")
    if found is None:
        return None
    plain = [name for name, values in cells.items() if all(map(is_plain, values))]
    if system := find_name(plain, SYSTEMS):
        found.section["system"] = {"column": system}
        found.columns.append(system)
    # Messages bring their own
    if (thinking := find_name(plain, THOUGHTS)) and not set(chats) & set(found.columns):
        found.section["thinking"] = thinking
        found.columns.append(thinking)
        found.doubts["thinking"] = "for a reasoning model; any other refuses it"
    guess_groups(rows, found, [name for name in cells if name not in found.columns])
    return found


def find_name(columns: Iterable[str], known: tuple[str, ...]) -> str | None:
    """Return the column that has the first of the known names, in capitals or not."""
    folded = {column.strip().casefold(): column for column in columns}
    return next((folded[name] for name in known if name in folded), None)


def holds_chat(value: Any) -> bool:
    """Tell whether a cell is a list of messages, or JSON of one."""
    try:
        return bool(as_messages(value, ""))
    except Malformed:
        return False


def guess_pair(cells: dict[str, list[Any]]) -> Guess | None:
    """Return the columns of questions and answers, by their names or else by their texts."""
    # TRL's prompt and completion may be messages; other lists and objects are no text
    whole = {name: values for name, values in cells.items() if any(is_chat(x) or is_plain(x) for x in values)}
    prompt, completion = find_name(whole, PROMPTS), find_name(whole, ANSWERS)
    known = {prompt, completion, find_name(cells, SYSTEMS), find_name(cells, THOUGHTS)}
    texts = [name for name, values in whole.items() if name not in known and is_prose(values)]
    texts.sort(key=lambda name: -sum(map(len, set(map(str, whole[name])))) / len(whole[name]))
    missing = [key for key, name in (("prompt", prompt), ("completion", completion)) if not name]
    if len(texts) < len(missing):
        return None
    if len(missing) == 2:
        completion, prompt = texts[:2]
        if share_asked(whole[completion]) > share_asked(whole[prompt]) + 0.3:
            completion, prompt = prompt, completion
    prompt, completion = prompt or texts[0], completion or texts[0]
    columns, more = [prompt, completion], find_name(whole, INPUTS)
    if prompt.strip().casefold() == "instruction" and more:
        columns, prompt = [prompt, more, completion], f"{{{prompt}}}\n\n{{{more}}}"
    return Guess({"prompt": prompt, "completion": completion}, columns, dict.fromkeys(missing, "a guess from its text"))


def is_plain(value: Any) -> bool:
    """Tell whether a value is neither a list nor an object."""
    return not isinstance(value, list | dict)


def is_prose(values: list[Any]) -> bool:
    """Tell whether most of a column's values are sentences, in any language, and not always the same ones."""
    texts = [value for value in values if isinstance(value, str) and PROSE.match(value)]
    return 2 * len(texts) > len(values) and 10 * len(set(texts)) > len(texts)


def share_asked(values: list[Any]) -> float:
    """Return the share of values that end in a question mark."""
    return sum(str(value).rstrip().endswith(("?", "\uff1f", "\u061f")) for value in values) / len(values)


def guess_groups(rows: list[Row], found: Guess, columns: list[str]) -> None:
    """Add the column whose equal values belong together, if there is one, and columns of few values."""
    ranked = []
    for column in columns:
        counts = Counter(
            str(row[column]) for row in rows if row.get(column) not in (None, "") and is_plain(row[column])
        )
        total, words = counts.total(), column.lower().split("_")
        place = next((place for place, word in enumerate(SAME) if word in words), len(SAME))
        # So few or such large groups could leave a split empty
        if (
            20 <= len(counts) < total
            and 5 * max(counts.values()) <= total
            and (place < len(SAME) or is_prose(list(counts)))
        ):
            ranked.append((place, column, len(counts)))
        elif 2 <= len(counts) <= 20 and total >= 10 * len(counts) and max(map(len, counts)) <= 60:
            found.by = [*found.by, column][:3]
    if ranked:
        _, column, count = min(ranked)
        found.section["group_by"] = [column]
        found.doubts["group_by"] = f"a guess: {count:,} values, each stays in one split"
