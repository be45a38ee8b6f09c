"""Write a Modelfile that makes Ollama ask the model exactly as it was trained."""

import re
from typing import Any

import jinja2
from transformers import GenerationConfig, PreTrainedTokenizerBase

from medibot.errors import RecipeError
from medibot.recipe import Recipe

# Go's own braces stay; a Modelfile is no HTML
TEMPLATES = jinja2.Environment(
    loader=jinja2.PackageLoader("medibot"),
    block_start_string="[%", block_end_string="%]", variable_start_string="[[", variable_end_string="]]",
    comment_start_string="[#", comment_end_string="#]", trim_blocks=True,
)  # fmt: skip
# Contents that no template holds: the text around them in a rendered chat is the template's own
MARKS = [f"⟦{letter}⟧" for letter in "abcdef"]
# What the parts of a template are proven on
MESSAGES = [
    "Be careful.\nBe plain.",
    'Is "<5 %" of {them} anemia?\n- in short',
    "Yes.",
    "And why?",
    "Iron.",
    "Is\n\nall?",
]


def render_modelfile(
    file: str, tokenizer: PreTrainedTokenizerBase, config: GenerationConfig, recipe: Recipe, adds_bos: bool
) -> str:
    """Return the Modelfile of a GGUF `file`: template, system message, stop tokens, decoding as in evaluation.

    `adds_bos` says whether the file makes engines put the first token in themselves: the template must not, then.
    """
    parts = take_apart(tokenizer, recipe.data.chat_template_kwargs, recipe.data.common_system is not None)
    if adds_bos and tokenizer.bos_token:
        parts |= {name: parts[name].removeprefix(tokenizer.bos_token) for name in ("start_user", "start_system")}
    decoding = {"num_predict": config.max_new_tokens, "repeat_penalty": config.repetition_penalty or 1.0}
    decoding["temperature"] = (config.temperature or 1.0) if config.do_sample else 0
    stops = tokenizer.convert_ids_to_tokens(config.eos_token_id)
    values = {"file": file, "parts": parts, "system": recipe.data.common_system, "stops": stops, "decoding": decoding}
    return TEMPLATES.get_template("Modelfile.j2").render(values)


def take_apart(tokenizer: PreTrainedTokenizerBase, kwargs: dict[str, Any], system: bool) -> dict[str, str]:
    """Return the text that the chat template puts around the messages of users and assistants who take turns.

    A part is named by the roles that it stands between; `prompt` is where the model's answer begins. Marks are rendered
    in the place of messages and cut out again, and the parts are proven on other conversations. `kwargs` are the
    recipe's chat_template_kwargs. Raises RecipeError for a template that is more than such parts.
    """
    openings = [["start_user"], ["start_system", "system_user"]] if system else [["start_user"]]
    chats = [opening + ["user_assistant", "assistant_user"] * more for opening in openings for more in range(3)]
    parts = {"start_system": "", "system_user": ""}

    def render(names: list[str], contents: list[str]) -> str:
        roles = [name.partition("_")[2] for name in names]
        messages = [{"role": role, "content": text} for role, text in zip(roles, contents, strict=False)]
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **kwargs)

    try:
        for names in chats:
            text = render(names, MARKS)
            if re.findall("⟦.⟧", text) != MARKS[: len(names)]:
                raise ValueError("it does not render each message once, in order")
            parts |= zip([*names, "prompt"], re.split("⟦.⟧", text), strict=True)
        if re.search(r'\{\{|\}\}|"""', "".join(parts.values())):
            raise ValueError("it writes braces or quotes that a Modelfile cannot hold")
        for names in chats:
            turns = "".join(parts[name] + text for name, text in zip(names, MESSAGES, strict=False))
            if turns + parts["prompt"] != render(names, MESSAGES):
                raise ValueError(f"it renders {len(names)} messages otherwise than turn by turn")
    except (jinja2.TemplateError, ValueError) as error:
        remedy = "write the Modelfile by hand, or serve merged/ by vLLM or llama.cpp, which read the template itself"
        raise RecipeError.of("chat template", f"cannot be written for Ollama: {error}", remedy) from error
    return parts
