"""The recipes for cards that people have fill them, by the plan, with the sizes of their real models."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SAMPLE
from transformers import AutoTokenizer, Qwen3Config

from medibot.data.prepared import prepare
from medibot.model.precision import choose_precision, make_quantization_config
from medibot.planning.hardware import Hardware, find_device
from medibot.planning.plan import make_plan
from medibot.recipe import load_recipe

pytestmark = pytest.mark.slow

# hidden size, layers, heads, size of the feed-forward layer, one matrix for embedding and head: the models' config.json
SIZES = {
    "Qwen/Qwen3-4B-Instruct-2507": (2560, 36, 32, 9728, True),
    "Qwen/Qwen3-8B": (4096, 36, 32, 12288, False),
    "Qwen/Qwen3-14B": (5120, 40, 40, 17408, False),
    "Qwen/Qwen3-32B": (5120, 64, 64, 25600, False),
}
CARDS = {"qwen3-4b": "16GB", "t4": "T4", "qwen3-8b": "24GB", "qwen3-14b": "24GB", "qwen3-32b": "80GB"}


@pytest.fixture
def planned(make_model, workplace):
    """planned(recipe, card, *overrides): the plan with rows of nearly max_length tokens, and a config but no weights."""

    def plan(name: str, card: str, *overrides: str):
        model = load_recipe(name, root=ROOT).model["pretrained_model_name_or_path"]
        hidden, layers, heads, inner, tied = SIZES[model]
        folder = Path(model.replace("/", "-"))
        if not folder.is_dir():
            shutil.copytree(make_model("qwen"), folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
            sizes = {"num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": 8}
            sizes |= {"hidden_size": hidden, "intermediate_size": inner, "vocab_size": 151936, "head_dim": 128}
            Qwen3Config(**sizes, tie_word_embeddings=tied, eos_token_id=0).save_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        ids = tokenizer.encode(SAMPLE.read_text(), add_special_tokens=False)
        answers = [tokenizer.decode(ids[start : start + 930]) for start in range(0, 40 * 930, 930)]
        rows = [{"question": f"What is {n}?", "answer": answer} for n, answer in enumerate(answers)]
        Path("rows.json").write_text(json.dumps(rows))
        place = [f"model.pretrained_model_name_or_path=./{folder}", "data.path=rows.json"]
        bare = [
            "data.clean=[]",
            "data.group_by=[]",
            "data.validation=0.2",
            "data.test=0",
            "evaluation.by=[]",
            "evaluation.evidence={}",
            *overrides,
        ]
        recipe = load_recipe(name, [*place, *bare], root=ROOT)
        device = find_device(card, None)
        return make_plan(prepare(recipe, progress=lambda _: None), device, Hardware())

    return plan


@pytest.mark.parametrize(("recipe", "card"), CARDS.items())
def test_recipe_fills_its_card_and_leaves_a_share_of_it_free(recipe, card, planned):
    plan = planned(f"medquad-{recipe}", card)
    rows, accumulated = plan.rows, plan.recipe.training["gradient_accumulation_steps"]
    assert rows * accumulated == 16 and 950 < plan.longest <= 1024
    print(f"{recipe}: {rows} rows, {plan}")
    assert plan.memory(rows)["peak"] < 0.88 * plan.device.capacity
    # Twice as many would leave too little, or there are no more rows in a step; what a T4 shows as free is less than 16 GB
    assert accumulated == 1 or recipe == "t4" or plan.memory(2 * rows)["peak"] > 0.88 * plan.device.capacity


def test_eight_billion_parameters_fit_16_gb_in_the_micro_batches_that_the_recipe_names(planned):
    said = next(line for line in (ROOT / "recipes/medquad-qwen3-8b.yaml").read_text().splitlines() if "16 GB:" in line)
    overrides = said.partition('ARGS="')[2].rstrip('"').split()
    plan = planned("medquad-qwen3-8b", "16GB", *overrides)
    assert len(overrides) == 2 and plan.rows == 4 and plan.memory()["peak"] < 0.88 * plan.device.capacity


def test_float16_keeps_as_much_as_bfloat16(planned):
    bfloat, half = planned("medquad-t4", "16GB"), planned("medquad-t4", "T4")
    assert str(half.device.compute) == "torch.float16" != str(bfloat.device.compute)
    assert half.traced == bfloat.traced and half.memory()["peak"] == bfloat.memory()["peak"]


def test_a_t4_computes_in_float16_throughout(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation)
    recipe = load_recipe("medquad-t4", root=ROOT)
    precision = choose_precision(recipe.model.get("dtype"))
    assert (precision.dtype, precision.training["fp16"], precision.training["bf16"]) == (torch.float16, True, False)
    assert make_quantization_config(recipe, precision.dtype).bnb_4bit_compute_dtype == torch.float16
    assert "attn_implementation" not in recipe.model
