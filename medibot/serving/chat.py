"""A conversation with a run at the terminal: streaming, with what an answer can rest on below it; nothing is logged.

make chat RUN=quickstart
echo "What is anemia?" | medibot chat --run quickstart
"""

import io
import json
import queue
import re
import shutil
import signal
import sys
import textwrap
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.cells import set_cell_size

from medibot.errors import RecipeError
from medibot.run import find_finished_run
from medibot.serving.assistant import MODELS, Assistant, Decoding, Message, Reply
from medibot.serving.evidence import Evidence

HELP = """/base, /tuned, /both   who answers from here on: the base model, the tuned one, or both side by side
/system TEXT           another system message; without TEXT the run's own again
/retry                 another answer to the last question, sampled
/undo                  forget the last question and its answer
/evidence              the five nearest training questions to the last one, close or not
/save FILE.jsonl       write questions and answers in the columns of the run's data
/help                  this
/quit                  end (or Ctrl-D); Ctrl-C stops an answer"""


# Greedy decoding would give the same answer again
RETRY_TEMPERATURE = 0.7


# Characters that a column of two needs to be readable
NARROW = 30


@dataclass
class Turn:
    """A question and the answers that it got, by model."""

    question: str
    answers: dict[str, str]


class Chat:
    """One conversation; in `both` each model goes on from its own answers."""

    def __init__(self, speaker: Assistant, decoding: Decoding) -> None:
        self.speaker, self.decoding = speaker, decoding
        self.evidence = Evidence.of(speaker.run)
        self.turns: list[Turn] = []
        self.who: tuple[str, ...] = ("tuned",)
        self.system: str | None = None
        # What a Ctrl-C finds: the answers being made, or somebody who may be about to type
        self.replies: dict[str, Reply] = {}
        self.prompting = False

    def interrupt(self, *_: Any) -> None:
        """Ctrl-C, however often: interrupts the prompt, stops answers, and ends nothing else."""
        if self.prompting:
            self.prompting = False
            raise KeyboardInterrupt
        for reply in self.replies.values():
            reply.cancel()

    def messages(self, which: str, question: str) -> list[Message]:
        """The conversation as `which` had it; where it did not answer, the other's answer stands."""
        found = [{"role": "system", "content": self.system}] if self.system else []
        for turn in self.turns:
            answer = turn.answers.get(which) or next(iter(turn.answers.values()))
            found += [{"role": "user", "content": turn.question}, {"role": "assistant", "content": answer}]
        return [*found, {"role": "user", "content": question}]

    def take(self, line: str) -> bool:
        """Answer a line or do what it commands; False when the chat is over."""
        command, _, rest = line.strip().partition(" ")
        if command == "/quit":
            return False
        try:
            if command.startswith("/"):
                self.command(command[1:], rest.strip())
            elif command:
                self.ask(line.strip(), self.decoding)
        except RecipeError as error:
            say(str(error))
        return True

    def command(self, name: str, rest: str) -> None:
        if name in ("base", "tuned", "both"):
            self.who = MODELS if name == "both" else (name,)
            say(f"from here on: {' and '.join(self.who)}")
        elif name == "system":
            self.system = rest or None
            say(f"system message: {self.system or self.speaker.recipe.data.system or 'none'}")
        elif name == "save":
            self.save(rest)
        elif name in ("retry", "undo", "evidence") and not self.turns:
            say("nothing was asked yet")
        elif name == "retry":
            self.retry()
        elif name == "undo":
            say(f"forgotten: {self.turns.pop().question}")
        elif name == "evidence":
            self.show_evidence()
        else:
            say(HELP if name == "help" else f"no command /{name}\n{HELP}")

    def ask(self, question: str, decoding: Decoding) -> None:
        """Print the answers as they are made, with what stands before and below them; keep them."""
        self.replies = {}
        try:
            for which in self.who:
                self.replies[which] = self.speaker.reply(self.messages(which, question), which, decoding)
            self.introduce(question, self.replies)
            answers = self.show(self.replies)
        finally:
            # A thread that is still inside torch when Python ends would abort the process
            for reply in self.replies.values():
                reply.cancel()
                reply.thread.join()
        kept = {which: text for which, text in answers.items() if text}
        if not kept:
            say("[no answer: this question is not kept in the conversation]")
            return
        self.turns.append(Turn(question, kept))
        if self.evidence:
            say("\n".join(["", *self.evidence.lines(self.subject())]))

    def introduce(self, question: str, replies: dict[str, Reply]) -> None:
        warning = self.speaker.notice(question)
        if warning:
            say(f"{warning}\n")
        dropped = max(reply.dropped for reply in replies.values())
        if dropped:
            say(f"[the oldest {dropped} messages no longer fit the model's {self.speaker.window:,} tokens: left out]")

    def show(self, replies: dict[str, Reply]) -> dict[str, str]:
        """The whole answers, printed while they come."""
        width = (shutil.get_terminal_size().columns - 3) // 2
        if len(replies) > 1 and sys.stdout.isatty() and width >= NARROW:
            return side_by_side(replies, width)
        answers = {}
        for which, reply in replies.items():
            if len(self.who) > 1 or which == "base":
                say(f"[{which}]")
            answers[which] = ""
            for piece in reply:
                answers[which] += piece
                print(printable(piece), end="", flush=True)
            say(ending(reply))
        return {which: text.strip() for which, text in answers.items()}

    def subject(self) -> str:
        """What the last question is about, as far as evidence is concerned."""
        return self.evidence.about([turn.question for turn in self.turns]) if self.evidence else ""

    def show_evidence(self) -> None:
        if self.evidence is None:
            say("this run was trained before evidence was kept: train it anew")
            return
        for source in self.evidence.nearest(self.subject(), 5):
            say(f"{'close' if source.similarity >= self.evidence.threshold else '     '}  {source}")

    def retry(self) -> None:
        last, before = self.turns.pop(), len(self.turns)
        temperature = self.decoding.temperature or RETRY_TEMPERATURE
        try:
            self.ask(last.question, replace(self.decoding, temperature=temperature))
        finally:
            if len(self.turns) == before:
                self.turns.append(last)

    def save(self, name: str) -> None:
        """Write a row for each turn, the tuned model's answer where there is one; columns that a chat cannot know are null."""
        path, recipe = Path(name).expanduser(), self.speaker.recipe
        if path.suffix != ".jsonl":
            raise RecipeError.of("/save", "needs the name of a .jsonl file", "write /save chat.jsonl")
        unknown = [*recipe.data.group_by, *recipe.evaluation.by, *recipe.evaluation.evidence.values()]
        rows = [
            dict.fromkeys(unknown)
            | {recipe.data.prompt: turn.question}
            | {recipe.data.completion: turn.answers.get("tuned") or turn.answers["base"]}
            for turn in self.turns
        ]
        try:
            with path.open("x", encoding="utf-8") as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        except OSError as error:
            raise RecipeError.of(str(path), f"cannot be made: {error.strerror}", "name another file") from error
        say(f"{len(rows)} rows in {path}")


def chat(run_name: str, decoding: Decoding) -> None:
    """Talk with a finished run until /quit or the end of the input."""
    interactive = sys.stdin.isatty()
    speaker = Assistant(find_finished_run(run_name))
    say(speaker.about)
    if interactive:
        say(f"\nChatting with {run_name}; nothing is logged. /help says what else there is.")
    conversation = Chat(speaker, decoding)
    # Bytes that are no UTF-8 would end the chat
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    # In a pipe Ctrl-C stops the program, as ever
    before = signal.signal(signal.SIGINT, conversation.interrupt) if interactive else None
    try:
        for line in typed(conversation) if interactive else sys.stdin:
            if not conversation.take(line):
                return
    finally:
        if interactive:
            signal.signal(signal.SIGINT, before)


def typed(conversation: Chat) -> Iterator[str]:
    """What is typed, with editing and this session's history."""
    import readline

    readline.set_auto_history(True)
    while True:
        try:
            conversation.prompting = True
            line = input("\n> ")
            conversation.prompting = False
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print("\n/quit or Ctrl-D ends the chat")
        else:
            yield line


def side_by_side(replies: dict[str, Reply], width: int) -> dict[str, str]:
    """Print two answers in columns, a line of both as soon as both have it."""
    pieces: queue.Queue[tuple[str, str | None]] = queue.Queue()

    def feed(which: str) -> None:
        try:
            for piece in replies[which]:
                pieces.put((which, piece))
        finally:
            pieces.put((which, None))

    for which in replies:
        threading.Thread(target=feed, args=(which,), daemon=True).start()
    texts, growing, shown = dict.fromkeys(replies, ""), set(replies), 0
    say(columns([f"[{which}]" for which in replies], width))
    while growing:
        which, piece = pieces.get()
        texts[which] += piece if piece is not None else ending(replies[which])
        growing -= {which} if piece is None else set()
        found = {which: wrapped(printable(text), width) for which, text in texts.items()}
        # The last line of an answer that grows may still change
        ready = min((len(found[which]) - 1 for which in growing), default=max(map(len, found.values())))
        for row in range(shown, ready):
            say(columns([(*lines[row : row + 1], "")[0] for lines in found.values()], width))
        shown = max(shown, ready)
    if any(reply.failure for reply in replies.values()):
        raise RuntimeError("the model failed while it answered")
    return {which: text.removesuffix(ending(replies[which])).strip() for which, text in texts.items()}


def wrapped(text: str, width: int) -> list[str]:
    return [line for part in text.split("\n") for line in textwrap.wrap(part, width) or [""]]


def columns(cells: list[str], width: int) -> str:
    return " | ".join(set_cell_size(cell, width) for cell in cells).rstrip()


def ending(reply: Reply) -> str:
    """What stands behind an answer that did not end by itself."""
    cut = f" … [cut at {reply.completion_tokens} tokens]"
    return {"length": cut, "cancelled": " … [stopped]"}.get(reply.finish_reason, "")


def printable(text: str) -> str:
    """Without control characters, which would drive the terminal."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "", text)


def say(text: str) -> None:
    print(printable(text), flush=True)
