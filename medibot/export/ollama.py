"""Write a Modelfile that makes Ollama ask the model exactly as it was trained."""

import dataclasses
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jinja2
from transformers import GenerationConfig, PreTrainedTokenizerBase

from medibot.errors import RecipeError

Message = dict[str, str]
# Contents that no template holds: the text around them in a rendered chat is the template's own
MARKS = ("⟦system⟧", "⟦first⟧", "⟦reply⟧", "⟦second⟧")
# Go's own braces stay; a Modelfile is no HTML
TEMPLATES = jinja2.Environment(
    loader=jinja2.PackageLoader("medibot"),
    block_start_string="[%", block_end_string="%]", variable_start_string="[[", variable_end_string="]]",
    comment_start_string="[#", comment_end_string="#]", trim_blocks=True,
)  # fmt: skip


@dataclass(frozen=True)
class Parts:
    """The text that a chat template puts around the messages of a conversation in which user and assistant take turns.

    `system` comes before the system message and `after_system` between it and the user's; `first` before a user's
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
        """Return the conversation as the Go template renders it."""
        openings = {
            ("", "system"): self.system,
            ("system", "user"): self.after_system,
            ("", "user"): self.first,
            ("assistant", "user"): self.later,
            ("user", "assistant"): self.answer,
        }
        roles = ["", *(message["role"] for message in messages)]
        turns = zip(roles, messages, strict=False)
        return "".join(openings[before, turn["role"]] + turn["content"] for before, turn in turns) + self.prompt

    def as_go(self) -> str:
        """Return the same as a Go template over Ollama's Messages."""
        return TEMPLATES.get_template("ollama.go.j2").render(dataclasses.asdict(self))


def take_apart(tokenizer: PreTrainedTokenizerBase, kwargs: dict[str, Any], system: bool) -> Parts:
    """Take the tokenizer's chat template apart, and prove the parts on other conversations.

    Marks are rendered in the place of messages and cut out again. `kwargs` are the recipe's chat_template_kwargs,
    `system` says whether the run has a system message. Raises RecipeError for a template that is no such parts.
    """

    def render(messages: list[Message]) -> str:
        try:
            return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **kwargs)
        except jinja2.TemplateError as error:
            raise inexpressible(f"it refuses a conversation: {error}") from error

    roles = ("system", "user", "assistant", "user")
    chat = [{"role": role, "content": mark} for role, mark in zip(roles, MARKS, strict=True)]
    parts = Parts(*split_at(render(chat[1:]), MARKS[1:]))
    if system:
        opening, after, *_ = split_at(render(chat), MARKS)
        parts = dataclasses.replace(parts, system=opening, after_system=after)
    if re.search(r'\{\{|\}\}|"""', "".join(dataclasses.astuple(parts))):
        raise inexpressible("it writes braces or quotes that a Modelfile cannot hold")
    prove(parts, render, system)
    return parts


def split_at(text: str, marks: tuple[str, ...]) -> list[str]:
    """Split `text` at the marks; each must be there once, in order."""
    pattern = "|".join(map(re.escape, marks))
    if re.findall(pattern, text) != list(marks):
        raise inexpressible("it does not render each message once, in order")
    return re.split(pattern, text)


def prove(parts: Parts, render: Callable[[list[Message]], str], system: bool) -> None:
    """Raise RecipeError for parts that render any of several conversations otherwise than the template itself."""
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
            if parts.render(chat) != render(chat):
                raise inexpressible(f"it renders {len(chat)} messages otherwise than turn by turn")


def inexpressible(why: str) -> RecipeError:
    """Return the error for a chat template that is more than text around messages."""
    remedy = "write the Modelfile by hand, or serve merged/ by vLLM or llama.cpp, which read the template itself"
    return RecipeError.of("chat template", f"cannot be written for Ollama: {why}", remedy)


def render_modelfile(
    file: str,
    parts: Parts,
    system: str | None,
    tokenizer: PreTrainedTokenizerBase,
    config: GenerationConfig,
    adds_bos: bool,
) -> str:
    """Return the Modelfile of a GGUF `file`: template, system message, stop tokens, decoding as in evaluation.

    `adds_bos` says whether the file makes engines put the first token in themselves: the template must not, then.
    """
    if adds_bos and tokenizer.bos_token:
        first, opening = (text.removeprefix(tokenizer.bos_token) for text in (parts.first, parts.system))
        parts = dataclasses.replace(parts, first=first, system=opening)
    decoding = {"num_predict": config.max_new_tokens, "repeat_penalty": config.repetition_penalty or 1.0}
    decoding["temperature"] = (config.temperature or 1.0) if config.do_sample else 0
    stops = tokenizer.convert_ids_to_tokens(config.eos_token_id)
    values = {"file": file, "template": parts.as_go(), "system": system, "stops": stops, "decoding": decoding}
    return TEMPLATES.get_template("Modelfile.j2").render(values)
