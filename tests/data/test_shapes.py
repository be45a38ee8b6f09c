"""Miniature recipes of each shape for each family of templates: prepared, tokenized by TRL, and proven by the gate."""

import json
from pathlib import Path

import pytest
from conftest import STOPS

from medibot.data.gate import IGNORED
from medibot.data.prepared import prepare
from medibot.model.loading import make_tiny_model
from medibot.recipe import load_recipe
from medibot.run import Run
from medibot.training.trainer import audit_splits, build_trainer

pytestmark = pytest.mark.slow

ALPACA = [
    {
        "instruction": f"Name illness {n}.",
        "input": f"It has sign {n}." if n % 2 else "",
        "output": f"It is illness {n}.",
    }
    for n in range(12)
]
SHAREGPT = [
    {
        "conversations": [
            {"from": ("human", "gpt")[at % 2], "value": f"Turn {at} of talk {n}."} for at in range(2 * (1 + n % 3))
        ]
    }
    for n in range(12)
]
THINKING = [
    {
        "question": f"Is {n} °C a fever?",
        "answer": f"<think>\nFever  begins at 38.\n\n  {n} < 38?</think>\n\nAsk {n} times.",
    }
    for n in range(30, 42)
]
PLAIN = [
    {"question": f"What is illness {n}?", "answer": f"def illness():\n    return {n}\n\n\n# end"} for n in range(12)
]
SHAPES = {
    "alpaca": '  path: alpaca.json\n  prompt: "{instruction}\\n\\n{input}"\n  completion: output\n',
    "sharegpt": "  path: sharegpt.json\n  messages: conversations\n",
    "thinking": "  path: thinking.json\n  prompt: question\n  completion: answer\n",
    "mixed": """\
  sources:
    - {path: plain.json, prompt: question, completion: answer}
    - {path: sharegpt.json, messages: conversations}
    - {path: alpaca.json, prompt: "{instruction}", completion: output}
""",
}
RECIPE = """\
model:
  pretrained_model_name_or_path: model
data:
SHAPE  validation: 0.2
  test: 0
  seed: 2
training:
  max_length: 512
  activation_checkpointing: false
"""
# ChatML with a system prompt of its own, Llama 3, Zephyr, Gemma without a system role, Mistral, Qwen3 with thinking
FAMILIES = ["smollm2", "llama3", "tinyllama", "gemma", "mistral", "thinking"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_loss_covers_each_shapes_answers_in_each_family(shape, family, make_tokenizer, workplace):
    for name, rows in (("alpaca", ALPACA), ("sharegpt", SHAREGPT), ("thinking", THINKING), ("plain", PLAIN)):
        Path(f"{name}.json").write_text(json.dumps(rows))
    tokenizer = make_tokenizer(family)
    tokenizer.save_pretrained("model")
    config = make_tiny_model(tokenizer).config
    config.eos_token_id = tokenizer.convert_tokens_to_ids(STOPS[family])
    config.save_pretrained("model")
    Path("mine.yaml").write_text(RECIPE.replace("SHAPE", SHAPES[shape]))
    prepared = prepare(load_recipe("mine.yaml"), progress=lambda _: None)
    trainer = build_trainer(prepared, Run(Path("outputs/r")), tiny=True)
    for audit in audit_splits(trainer, prepared):
        audit.refuse_faults()
        assert audit.rows_in == audit.rows_out > 0
    learned = {
        trainer.processing_class.decode([label for label in row["labels"] if label != IGNORED])
        for split in (trainer.train_dataset, trainer.eval_dataset)
        for row in split
    }
    whole = {
        "alpaca": lambda: {row["output"] for row in ALPACA},
        "sharegpt": lambda: {
            turn["value"] for row in SHAREGPT for turn in row["conversations"] if turn["from"] == "gpt"
        },
        "thinking": lambda: {f"Ask {n} times." for n in range(30, 42)},
        "mixed": lambda: {row["answer"] for row in PLAIN} | {row["output"] for row in ALPACA},
    }[shape]()
    # Each answer is learned once to its stop token, whatever else a source adds to the mix
    for answer in whole:
        ended = [text for text in learned if text.rstrip().removesuffix(STOPS[family]).endswith(answer)]
        assert ended and all(text.rstrip().endswith(STOPS[family]) for text in ended), answer
    trace = "Fever  begins at 38.\n\n  30 < 38?"
    assert shape != "thinking" or any(trace in text for text in learned)
