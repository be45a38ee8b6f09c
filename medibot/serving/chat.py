"""Talk with a run at the terminal: streaming, with the nearest training questions below each answer."""

import io
import re
import signal
import sys
from typing import Any

from rich.console import Console
from rich.text import Text

from medibot.errors import RecipeError
from medibot.serving.assistant import MODELS, Assistant, Decoding, Message, Reply
from medibot.serving.evidence import Evidence

HELP = """/base, /tuned, /both   who answers from here on: the base model, the tuned one, or both
/thinking              show what was thought before the last answers
/clear                 forget the conversation
/help                  show this
/quit                  end the chat (or Ctrl-D); Ctrl-C stops an answer"""
CUTS = {"length": " … [cut at {} tokens]", "cancelled": " … [stopped]", "stop": ""}


class Chat:
    """One conversation."""

    def __init__(self, assistant: Assistant, decoding: Decoding, who: tuple[str, ...] = ("tuned",)) -> None:
        self.assistant, self.decoding, self.who = assistant, decoding, who
        self.evidence = Evidence.of(assistant.run)
        # Each model goes on from its own answers; what it did not answer has the other model's answer
        self.messages: dict[str, list[Message]] = {which: [] for which in MODELS}
        # What was thought before the last answers
        self.traces: dict[str, str] = {}
        # What Ctrl-C ends: the answers being made, or the line being typed
        self.replies: dict[str, Reply] = {}
        self.prompting = False

    def interrupt(self, *_: Any) -> None:
        """Handle Ctrl-C, however often it comes: interrupt the prompt or stop the answers, and end nothing else."""
        if self.prompting:
            self.prompting = False
            raise KeyboardInterrupt
        for reply in self.replies.values():
            reply.cancel()

    def prompt(self) -> str:
        """Return what is typed: "/quit" for Ctrl-D, nothing for Ctrl-C."""
        try:
            self.prompting = True
            line = input("\n> ")
            self.prompting = False
            return line
        except EOFError:
            write("")
            return "/quit"
        except KeyboardInterrupt:
            write("\n/quit or Ctrl-D ends the chat")
            return ""

    def take(self, line: str) -> bool:
        """Answer a line or do what it commands; return False when the chat is over."""
        line = line.strip()
        if line in ("/base", "/tuned", "/both"):
            self.who = MODELS if line == "/both" else (line[1:],)
            write(f"from here on: {' and '.join(self.who)}")
        elif line == "/thinking":
            thought = [f"[{which}]\n{trace}" for which, trace in self.traces.items() if trace]
            write("\n".join(thought) or "nothing was thought before the last answers")
        elif line == "/clear":
            self.messages = {which: [] for which in MODELS}
            write("the conversation is forgotten")
        elif line.startswith("/") and line != "/quit":
            write(HELP if line == "/help" else f"unknown command {line}\n{HELP}")
        elif line and line != "/quit":
            try:
                self.ask(line)
            except RecipeError as error:
                write(str(error))
        return line != "/quit"

    def ask(self, question: str) -> None:
        """Print the answers as they are made, notices before and evidence below, and keep them."""
        user, ask = {"role": "user", "content": question}, self.assistant.reply
        self.replies = {which: ask([*self.messages[which], user], which, self.decoding) for which in self.who}
        if warning := self.assistant.notice(question):
            write(f"{warning}\n")
        if dropped := max(reply.dropped for reply in self.replies.values()):
            write(f"[the oldest {dropped} messages no longer fit the model's {self.assistant.window:,} tokens]")
        said, self.traces = {}, {}
        for which, reply in self.replies.items():
            if self.who != ("tuned",):
                write(f"[{which}]")
            self.traces[which], text = write_reply(reply)
            write(CUTS[reply.finish_reason].format(reply.completion_tokens))
            if text.strip():
                said[which] = {"role": "assistant", "content": text.strip()}
        asked = [message["content"] for message in [*self.messages["tuned"][-2:-1], user]]
        if not said:
            write("[no answer: this question is not kept in the conversation]")
        for which in MODELS if said else ():
            self.messages[which] += [user, said.get(which) or next(iter(said.values()))]
        if self.evidence:
            write("\n".join(["", *self.evidence.lines(asked)]))


def chat(run_name: str, decoding: Decoding) -> None:
    """Talk with a finished run until /quit or the end of the input: a terminal, or a pipe with a question a line."""
    conversation = Chat(Assistant(run_name), decoding)
    write(conversation.assistant.about)
    # Bytes that are not UTF-8 would end the chat
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    if sys.stdin.isatty():
        import readline

        readline.set_auto_history(True)
        write(f"\nChatting with {run_name}; nothing is logged. /help lists the commands.")
        # In a pipe Ctrl-C stops the program, as ever
        signal.signal(signal.SIGINT, conversation.interrupt)
    for line in iter(conversation.prompt, "/quit") if sys.stdin.isatty() else sys.stdin:
        if not conversation.take(line):
            return


def ask(run_name: str, question: str, max_new_tokens: int = 256) -> None:
    """Print the base model's and the tuned model's answer to one question, and the nearest training questions."""
    if not question.strip():
        raise RecipeError.of("Q", "the question is empty", 'write Q="What is anemia?"')
    conversation = Chat(Assistant(run_name), Decoding(max_new_tokens), MODELS)
    write(f"{conversation.assistant.about}\n\n{question}\n")
    conversation.ask(question)


def write_reply(reply: Reply) -> tuple[str, str]:
    """Print an answer as it is made, with one line for all that is thought before it; return (trace, answer)."""
    trace = text = ""
    for thought, said in reply.parts():
        trace += thought
        if thought:
            write_thinking(trace)
        if said and trace and not text:
            write_thinking(trace, over=True)
        text += said
        write(said, end="")
    if trace and not text:
        write_thinking(trace, over=True)
    return trace, text


def write_thinking(trace: str, over: bool = False) -> None:
    """Print how much is thought so far, on a terminal the next over the last; elsewhere only when it is `over`."""
    console = Console()
    if over or console.is_terminal:
        words = Text(f"thinking… ({len(trace.split()):,} words)", "dim")
        console.print(words, end="\n" if over else "\r")


def write(text: str, end: str = "\n") -> None:
    """Print at once, without control characters, which would drive the terminal."""
    print(re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "", text), end=end, flush=True)
