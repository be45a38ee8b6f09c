"""The run's chat template as Ollama reads it: a Modelfile that asks the model exactly as it was trained."""

import dataclasses
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jinja2
from transformers import GenerationConfig, PreTrainedTokenizerBase

from medibot.errors import RecipeError

Message = dict[str, str]


# Contents that no template holds: what stands around them in a rendered chat is the template's own text
MARKS = ("⟦system⟧", "⟦first⟧", "⟦reply⟧", "⟦second⟧")


# Go's text/template over Ollama's Messages; `first` and `later` are left out behind a system message
GO = (
    '{{{{ $before := "" }}}}{{{{ range .Messages }}}}'
    '{{{{ if eq .Role "system" }}}}{system}{{{{ .Content }}}}{after_system}'
    '{{{{ else if eq .Role "user" }}}}'
    '{{{{ if eq $before "" }}}}{first}{{{{ else if eq $before "assistant" }}}}{later}{{{{ end }}}}{{{{ .Content }}}}'
    '{{{{ else if eq .Role "assistant" }}}}{answer}{{{{ .Content }}}}{{{{ end }}}}'
    "{{{{ $before = .Role }}}}{{{{ end }}}}{prompt}"
)


@dataclass(frozen=True)
class Pieces:
    """The text that a chat template puts around the messages of a conversation in which user and assistant take turns.

    `system` stands before the system message and `after_system` between it and the user's; `first` before a user's
    message with no system message; `answer` between a user's and the assistant's; `later` between that and the user's
    next; `prompt` behind the last one, where the model's answer begins.
    """

    first: str
    answer: str
    later: str
    prompt: str
    system: str = ""
    after_system: str = ""

    def render(self, messages: list[Message]) -> str:
        """The conversation as the Go template renders it."""
        text, before = "", ""
        for message in messages:
            opening = {
                ("", "system"): self.system,
                ("system", "user"): self.after_system,
                ("", "user"): self.first,
                ("assistant", "user"): self.later,
                ("user", "assistant"): self.answer,
            }[before, message["role"]]
            text += opening + message["content"]
            before = message["role"]
        return text + self.prompt

    def go(self) -> str:
        """The same as a Go template."""
        return GO.format(**dataclasses.asdict(self))


def pieces_of(tokenizer: PreTrainedTokenizerBase, kwargs: dict[str, Any], system: bool) -> Pieces:
    """The tokenizer's chat template taken apart, and proven on other conversations.

    Marks are rendered in the place of messages and cut out again. `kwargs` are the recipe's chat_template_kwargs, `system`
    says whether the run has a system message. A template that is no such pieces is refused with a RecipeError.
    """

    def render(messages: list[Message]) -> str:
        try:
            return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **kwargs)
        except jinja2.TemplateError as error:
            raise inexpressible(f"it refuses a conversation: {error}") from error

    roles = ("system", "user", "assistant", "user")
    chat = [{"role": role, "content": mark} for role, mark in zip(roles, MARKS, strict=True)]
    first, answer, later, prompt = cut(render(chat[1:]), MARKS[1:])
    found = Pieces(first, answer, later, prompt)
    if system:
        opening, after = cut(render(chat), MARKS)[:2]
        found = dataclasses.replace(found, system=opening, after_system=after)
    if re.search(r'\{\{|\}\}|"""', "".join(dataclasses.astuple(found))):
        raise inexpressible("it writes braces or quotes that a Modelfile cannot hold")
    prove(found, render, system)
    return found


def cut(text: str, marks: tuple[str, ...]) -> list[str]:
    """The text before, between and behind the marks, each of which must stand there once and in order."""
    parts = re.split("|".join(map(re.escape, marks)), text)
    if re.findall("|".join(map(re.escape, marks)), text) != list(marks):
        raise inexpressible("it does not render each message once, in order")
    return parts


def prove(pieces: Pieces, render: Callable[[list[Message]], str], system: bool) -> None:
    """Refuse pieces that render any of several conversations otherwise than the template itself."""
    turns = [
        {"role": "user", "content": 'What is "anemia"?\n- in short'},
        {"role": "assistant", "content": "Too few red blood cells: <5 % of {them}."},
        {"role": "user", "content": "And why?"},
        {"role": "assistant", "content": "Iron."},
        {"role": "user", "content": "Is that\n\nall?"},
    ]
    opening = [{"role": "system", "content": "Be careful.\nBe plain."}]
    for length in (1, 3, 5):
        for chat in (turns[:length], *([opening + turns[:length]] if system else [])):
            if pieces.render(chat) != render(chat):
                raise inexpressible(f"it renders {len(chat)} messages otherwise than turn by turn")


def inexpressible(why: str) -> RecipeError:
    remedy = (
        "write the Modelfile by hand, or serve the merged folder by vLLM or llama.cpp, which read the template itself"
    )
    return RecipeError.of("chat template", f"cannot be written for Ollama: {why}", remedy)


def modelfile(
    file: str,
    pieces: Pieces,
    system: str | None,
    tokenizer: PreTrainedTokenizerBase,
    config: GenerationConfig,
    adds_bos: bool,
) -> str:
    """The Modelfile of a GGUF `file`: template, the run's system message, its stop tokens, decoding as it was evaluated.

    `adds_bos` says whether the file makes engines put the first token in themselves: the template must not, then.
    """
    if adds_bos and tokenizer.bos_token:
        bare = {name: getattr(pieces, name).removeprefix(tokenizer.bos_token) for name in ("first", "system")}
        pieces = dataclasses.replace(pieces, **bare)
    stops = tokenizer.convert_ids_to_tokens(config.eos_token_id)
    decoding = {"num_predict": config.max_new_tokens, "repeat_penalty": config.repetition_penalty or 1.0}
    decoding["temperature"] = (config.temperature or 1.0) if config.do_sample else 0
    lines = [f"FROM ./{file}", f'TEMPLATE """{pieces.go()}"""']
    lines += [f'SYSTEM """{system}"""'] if system else []
    lines += [f'PARAMETER stop "{stop}"' for stop in stops]
    lines += [f"PARAMETER {name} {value}" for name, value in decoding.items()]
    return "\n".join(lines)
