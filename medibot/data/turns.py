"""Read the turns to learn from out of a source's rows: what was said before, what is asked, and the answer.

A conversation becomes one row for each assistant turn that is learned from, with all before it as its prompt. So every
template is masked alike and provably, and a turn is learned as it will be asked for: templates write earlier turns in
other ways than the last one (Qwen3 leaves their thinking out). The price is that a conversation's beginning is read
once a turn; the ledger says how many rows came of it.
"""

import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

from medibot.cleaning.ledger import LedgerLine, Tally
from medibot.cleaning.rules import Row
from medibot.data.columns import as_text, fill_template, kept_name, template_columns
from medibot.data.messages import Malformed, Message, as_messages, is_chat, join_turns, read_message
from medibot.data.sources import Source
from medibot.errors import RecipeError
from medibot.recipe import Recipe

THOUGHT = re.compile(r"\s*<think>(.*?)</think>\s*", re.DOTALL)


class Turns:
    """The turns of one source, read row by row, and what had to be changed or left out on the way.

    A turn has `row` (its index in the source), `prompt` and `completion` as text or None, and where there are any `part`
    (its number in the conversation), `system`, `history` (messages between the system's and the prompt) and `thinking`.
    The source's other columns stand beside them. `writes_thinking` tells whether the chat template writes thinking.
    """

    def __init__(self, recipe: Recipe, source: Source, writes_thinking: bool) -> None:
        self.recipe, self.source, self.section, self.thinks = recipe, source, source.section, writes_thinking
        texts = {"prompt": self.section.prompt, "completion": self.section.completion}
        self.templates = {
            name: (text, template_columns(recipe, f"{source.key}.{name}", text)) for name, text in texts.items() if text
        }
        system = self.section.system
        own = {"messages": self.section.messages, "thinking": self.section.thinking}
        own |= {} if isinstance(system, str | None) else {"system": system.column}
        self.needed = {name: columns for name, (_, columns) in self.templates.items()}
        self.needed |= {name: [column] for name, column in own.items() if column}
        # A column that is mapped whole is not kept a second time
        self.mapped = {text for text, columns in self.templates.values() if columns == [text]} | set(own.values())
        self.columns: dict[str, None] = {}
        self.unread_keys: Counter[str] = Counter()
        self.rows = self.turns = 0
        self.converted = Tally("values that are not text made text")
        self.merged, self.malformed = Tally("malformed conversations merged"), Tally("malformed conversations dropped")
        self.unanswered, self.skipped = Tally("last turns without an answer cut"), Tally("answers not learned from")
        self.thoughts = Tally(f"thinking {'told from' if writes_thinking else 'left in'} the answer")
        self.fault = ("", "")

    def __iter__(self) -> Iterator[Row]:
        for number, (place, row) in enumerate(self.source.read()):
            self.rows += 1
            self.columns |= dict.fromkeys(row)
            if number in (0, 999):
                self.require_columns(first=True)
            others = {kept_name(name): value for name, value in row.items() if name not in self.mapped}
            turns = self.read_row(number, place, row)
            self.turns += len(turns)
            for part, turn in enumerate(turns):
                yield {"row": number} | ({"part": part} if len(turns) > 1 else {}) | turn | others
            # Early, but with a count: there is seldom one alone
            if self.rows % 1000 == 0:
                self.refuse_malformed()
        self.require_columns()
        self.refuse_malformed()

    def require_columns(self, first: bool = False) -> None:
        """Raise RecipeError for a column that no row has had; after the `first` rows only where no row can do without."""
        for name, columns in self.needed.items():
            missing = [column for column in columns if column not in self.columns]
            if missing and not (first and (name in ("system", "thinking") or len(missing) < len(columns))):
                what = f"{self.section.path} has no column {missing[0]!r}"
                raise self.recipe.error(f"{self.source.key}.{name}", what, f"it has {', '.join(self.columns)}")

    def refuse_malformed(self) -> None:
        """Raise RecipeError where malformed conversations are an error, with their count and the first one's place."""
        if self.malformed.count and self.section.malformed == "error":
            what = f"{self.fault[1]} ({self.malformed.count:,} of {self.rows:,} conversations are malformed)"
            raise RecipeError.of(self.fault[0], what, f"mend it, or write {self.source.key}.malformed: drop or merge")

    def read_row(self, number: int, place: str, row: Row) -> list[Row]:
        """Return the turns of a row to learn from; none where its conversation is malformed."""
        written = self.section.system
        system = written if isinstance(written, str | None) else self.text(number, row, written.column)
        cells = {name: self.fill(number, row, name) for name in self.templates}
        if self.section.messages is None and not any(map(is_chat, cells.values())):
            thinking = self.text(number, row, self.section.thinking) if self.section.thinking else None
            return [self.finish(number, cells | {"thinking": thinking}, system)]
        try:
            messages, learned = self.read_messages(number, row, cells)
        except Malformed as fault:
            self.malformed.note(number, {"conversation": (fault, None)})
            self.fault = self.fault if self.fault[0] else (place, str(fault))
            return []
        own = messages[0]["content"] if messages[0]["role"] == "system" else None
        turns = []
        for at in learned:
            turn = {"prompt": messages[at - 1]["content"], "completion": messages[at]["content"]}
            before = messages[1 if own else 0 : at - 1]
            turn |= {"history": [{"role": m["role"], "content": m["content"]} for m in before]} if before else {}
            turns.append(self.finish(number, turn | {"thinking": messages[at]["thinking"]}, own or system))
        return turns

    def read_messages(self, number: int, row: Row, cells: dict[str, Any]) -> tuple[list[Message], list[int]]:
        """Return a row's regular messages, and the places of the answers to learn from."""
        # Of TRL's conversational prompt and completion only the latter is learned from
        parts = (
            [(row.get(self.section.messages), "")]
            if self.section.messages
            else zip(cells.values(), ("user", "assistant"), strict=True)
        )
        lists = [as_messages(cell, role) for cell, role in parts]
        given = [read_message(message, self.unread_keys) for messages in lists for message in messages]
        for message in given[: len(given) - len(lists[-1])]:
            message["learned"] = False
        messages, merged = join_turns(given, self.section.malformed == "merge")
        answers = [at for at, message in enumerate(messages) if message["role"] == "assistant"]
        if not answers:
            raise Malformed("it has no assistant turn")
        while messages[-1]["role"] == "user":
            self.unanswered.note(number, {"turn": (messages.pop()["content"], None)})
        learned = [at for at in answers if messages[at]["learned"]][-1 if self.section.turns == "last" else 0 :]
        for at in set(answers) - set(learned):
            self.skipped.note(number, {"turn": (messages[at]["content"], None)})
        if merged:
            self.merged.note(number, {"conversation": (merged, "joined or cut")})
        return messages, learned

    def finish(self, number: int, turn: Row, system: str | None) -> Row:
        """Return a turn with its system message, and with thinking that opens the answer in a place of its own."""
        answer, thinking = turn["completion"] or "", turn.pop("thinking") or ""
        if not thinking.strip() and (match := THOUGHT.match(answer)):
            # Where the template would drop it, it stays and is learned as text
            after = answer[match.end() :] if self.thinks else answer
            self.thoughts.note(number, {"completion": (answer, after)})
            turn, thinking = turn | {"completion": after}, match[1] if self.thinks else ""
        elif thinking.strip() and not self.thinks:
            what = "the model's chat template does not write reasoning_content"
            raise self.recipe.error(f"{self.source.key}.thinking", what, "take a reasoning model, or leave it out")
        return turn | ({"thinking": thinking} if thinking.strip() else {}) | ({"system": system} if system else {})

    def text(self, number: int, row: Row, column: str) -> str | None:
        """Return a row's value as text, counted where it was none."""
        value = row.get(column)
        text = as_text(value)
        if not isinstance(value, str | None):
            self.converted.note(number, {column: (value, text)})
        return text

    def fill(self, number: int, row: Row, name: str) -> Any:
        """Return a column, or a template filled with columns; None where all of them are empty."""
        template, columns = self.templates[name]
        if columns == [template]:
            return row.get(template) if is_chat(row.get(template)) else self.text(number, row, template)
        values = {column: self.text(number, row, column) or "" for column in columns}
        return fill_template(template, values) if any(map(str.strip, values.values())) else None

    def ledger(self, read: set[str]) -> list[LedgerLine]:
        """Return what was done, in lines that add up; `read` are the columns that something else reads."""
        lines = [tally.line(self.rows, changed=tally.count) for tally in (self.converted, self.merged) if tally.count]
        dropped, left = self.malformed.count, self.rows - self.malformed.count
        lines += [self.malformed.line(self.rows, dropped=dropped)] if dropped else []
        for tally in (self.unanswered, self.skipped):
            lines += [tally.line(left, changed=tally.count)] if tally.count else []
        if self.section.messages or self.turns != left:
            lines.append(Tally("one row for each answer").line(left, added=self.turns - left))
        lines += [self.thoughts.line(self.turns, changed=self.thoughts.count)] if self.thoughts.count else []
        used = {column for columns in self.needed.values() for column in columns}
        unread = [f"column {name!r}" for name in self.columns if name not in used and kept_name(name) not in read]
        unread += [f"messages' {name!r}" for name in self.unread_keys]
        return lines + [Tally(f"not read: {what}").line(self.turns) for what in unread]
