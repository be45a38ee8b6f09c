"""The saved folder alone gives other programs the token ids that training saw, whatever the family of the template."""

import json
from pathlib import Path

import pytest
import trl
from conftest import FAMILIES, STOPS
from transformers import AutoTokenizer, GenerationConfig

from medibot.data.gate import IGNORED
from medibot.data.prepared import prepare
from medibot.errors import RecipeError
from medibot.model.loading import make_tiny_model
from medibot.model.tokenizer import load_saved_tokenizer, save_tokenizer
from medibot.recipe import Recipe, load_recipe
from medibot.run import Run
from medibot.training.trainer import build_trainer

pytestmark = pytest.mark.slow

ROWS = [{"q": f"What is illness {n}?", "a": f"It is\n  illness {n}."} for n in range(8)]
# Quotes, braces, a line break and letters beyond ASCII: what a literal in a template must keep
SYSTEM = 'Say it\'s "plain", {{ not }} {% raw %} [bold], é 😀.\nSee a doctor.\\n'
RECIPE = """\
model: {pretrained_model_name_or_path: model}
data: {path: rows.json, prompt: q, completion: a, validation: 0, test: 0}
training: {max_length: 512, activation_checkpointing: false, load_best_model_at_end: false, eval_strategy: "no"}
"""
# The models' own templates, as TRL keeps them, on the control tokens of a family; those of conftest beside them
OWN = {
    "qwen2_5": "qwen",
    "qwen3": "thinking",
    "qwen3_instruct_2507": "qwen",
    "llama3": "llama3",
    "llama3_2": "llama3",
    "gemma": "gemma",
    "gemma3": "gemma",
}
TEMPLATES = [*OWN, *(f"{name} (tests)" for name in FAMILIES)]
TRL = Path(trl.__file__).parent / "chat_templates"


def tokenizer_of(template: str, make_tokenizer):
    """A tokenizer with that template, and what its model ends an answer with."""
    family = OWN.get(template) or template.removesuffix(" (tests)")
    tokenizer = make_tokenizer(family)
    if template in OWN:
        tokenizer.chat_template = (TRL / f"{template}.jinja").read_text()
    return tokenizer, STOPS[family]


def recipe_on(tokenizer, stop: str, *overrides: str) -> Recipe:
    """A recipe over ROWS in the working folder, with that tokenizer."""
    Path("rows.json").write_text(json.dumps(ROWS))
    Path("mine.yaml").write_text(RECIPE)
    tokenizer.save_pretrained("model")
    config = make_tiny_model(tokenizer).config
    config.eos_token_id = tokenizer.convert_tokens_to_ids(stop)
    config.save_pretrained("model")
    return load_recipe("mine.yaml", [*overrides])


@pytest.mark.parametrize("with_system", [False, True], ids=["plain", "system"])
@pytest.mark.parametrize("template", TEMPLATES)
def test_bare_template_of_the_saved_folder_gives_the_ids_of_training(template, with_system, make_tokenizer, workplace):
    tokenizer, stop = tokenizer_of(template, make_tokenizer)
    settings = ["data.chat_template_kwargs={enable_thinking: false}"] if with_system else []
    # Gemma's first template knows no system role: training refuses data.system there
    if with_system and not template.startswith("gemma ") and template != "gemma":
        settings.append(f"data.system={json.dumps(SYSTEM, ensure_ascii=False)}")
    recipe = recipe_on(tokenizer, stop, *settings)
    prepared = prepare(recipe, progress=lambda _: None)
    trainer = build_trainer(prepared, Run(Path("outputs/r")), tiny=True)
    save_tokenizer(prepared.tokenizer, recipe, Path("saved"))
    prepared.generation.save_pretrained("saved")
    saved = AutoTokenizer.from_pretrained("saved")
    questions = prepared.load("train")["prompt"]
    for row, prompt in zip(trainer.train_dataset, questions, strict=True):
        begun = next(place for place, label in enumerate(row["labels"]) if label != IGNORED)
        trained = row["input_ids"][:begun]
        bare = saved.apply_chat_template(prompt[-1:], add_generation_prompt=True, return_dict=False)
        assert bare == trained
    print(f"{template:22} {'system' if with_system else 'plain':7} {len(bare):3} ids, equal: {bare[:6]} … {bare[-3:]}")
    # A system message of its own stands in the place of the default, and an argument that is given as well
    own = [{"role": "system", "content": "Be brief."}, *prompt[-1:]]
    if not template.startswith("gemma ") and template != "gemma":
        given = {"enable_thinking": True, "return_dict": False}
        wanted = prepared.tokenizer.apply_chat_template(own, **given)
        assert saved.apply_chat_template(own, **given) == wanted
    # What MediBot itself renders with is the template of training, and engines find it in both places
    assert load_saved_tokenizer(Path("saved")).chat_template == prepared.tokenizer.chat_template
    config = json.loads(Path("saved/tokenizer_config.json").read_text())
    assert config["chat_template"] == saved.chat_template == Path("saved/chat_template.jinja").read_text()
    assert saved.convert_tokens_to_ids(stop) in GenerationConfig.from_pretrained("saved").eos_token_id
    backend = json.loads(Path("saved/tokenizer.json").read_text())
    assert backend["padding"] is None and backend["truncation"] is None


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("data.system=Say <|im_end|> never.", r"data\.system"),
        ("data.chat_template_kwargs={enable-thinking: false}", r"data\.chat_template_kwargs"),
        ("data.chat_template_kwargs={tools: [{name: look}]}", r"data\.chat_template_kwargs"),
    ],
)
def test_what_a_template_cannot_bring_is_refused_before_training(override, key, make_tokenizer, workplace):
    tokenizer, stop = tokenizer_of("qwen2_5", make_tokenizer)
    with pytest.raises(RecipeError, match=rf"{key}.* does not render as in training") as caught:
        prepare(recipe_on(tokenizer, stop, override), progress=lambda _: None)
    assert "\n" not in str(caught.value)


def test_base_that_was_trained_here_keeps_its_defaults_under_those_of_the_next_training(make_tokenizer, workplace):
    tokenizer, stop = tokenizer_of("qwen3", make_tokenizer)
    first = recipe_on(tokenizer, stop, "data.system=First.", "data.chat_template_kwargs={enable_thinking: false}")
    save_tokenizer(tokenizer, first, Path("first"))
    base = AutoTokenizer.from_pretrained("first")
    asked = {"add_generation_prompt": True, "return_dict": False}
    question = [{"role": "user", "content": "What is anemia?"}]
    for overrides, system in ([], "First."), (["data.system=Second."], "Second."):
        save_tokenizer(base, recipe_on(base, stop, *overrides), Path("second"))
        own = load_saved_tokenizer(Path("second"))
        assert own.chat_template == base.chat_template
        told = [{"role": "system", "content": system}, *question]
        wanted = tokenizer.apply_chat_template(told, enable_thinking=False, **asked)
        assert AutoTokenizer.from_pretrained("second").apply_chat_template(question, **asked) == wanted
