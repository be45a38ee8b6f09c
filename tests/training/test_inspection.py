"""`medibot inspect` end to end: what it prints, what its page holds, and where it refuses."""

import io
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SAMPLE
from rich.console import Console
from rich.text import Text

from medibot.errors import RecipeError
from medibot.recipe import load_recipe
from medibot.run import Run
from medibot.training.inspection import inspect_recipe
from medibot.training.trainer import require_backward, sft_config

pytestmark = pytest.mark.slow


def recipe(model, *overrides: str):
    overrides = (f"model.pretrained_model_name_or_path={model}", f"data.path={SAMPLE}", *overrides)
    return load_recipe("quickstart", overrides, root=ROOT)


@pytest.mark.parametrize("family", ["smollm2", "mistral"])
def test_terminal_shows_ledger_leaks_mask_and_three_rows(family, make_model, workplace):
    found = inspect_recipe(recipe(make_model(family), "training.max_length=1024"), row=3)
    shown = io.StringIO()
    Console(file=shown, width=80, markup=False).print(found)
    said = shown.getvalue()
    for text in ("Ledger", "Leak report", "Loss mask", "shortest", "median", "longest", "row 3"):
        assert text in said
    assert not (workplace / "outputs").exists()


def test_page_is_self_contained_and_paints_every_token(make_model, workplace):
    text = inspect_recipe(recipe(make_model(), "training.max_length=1024")).html()
    assert not re.search(r"(src|href)=", text)
    for kind in ("masked", "trained", "stop"):
        assert f'<span class="{kind}">' in text
    assert text.count('<span class="stop">&lt;|im_end|&gt;</span>') >= 3


def test_painted_rows_are_escaped_and_say_each_kind(make_model, workplace):
    found = inspect_recipe(recipe(make_model(), "training.max_length=1024"))
    found = replace(found, painted={"mine": [('[b] <b>&"', "masked"), ("fine", "trained"), ("</s>", "stop")]})
    assert (
        '<pre><span class="masked">[b] &lt;b&gt;&amp;&#34;</span><span class="trained">fine</span>'
        '<span class="stop">&lt;/s&gt;</span></pre>'
    ) in found.html()
    text = found.__rich__().renderables[-1]
    assert isinstance(text, Text) and text.plain == '[b] <b>&"fine</s>'
    assert len({str(span.style) for span in text.spans}) == 3


def test_examples_are_the_shortest_the_median_and_the_longest_row(make_model, workplace):
    found = inspect_recipe(recipe(make_model(), "training.max_length=1024"), row=3)
    lengths = sorted(found.prepared.load("train")["tokens"])
    titles = [re.fullmatch(r"(.+) \(row (\d+), (\d+) tokens\)", title) for title in found.painted]
    assert [title[1] for title in titles] == ["shortest", "median", "longest", "row 3"]
    assert [int(title[3]) for title in titles[:3]] == [lengths[0], lengths[len(lengths) // 2], lengths[-1]]
    assert titles[3][2] == "3"


def test_row_that_is_not_there_is_refused(make_model, workplace):
    with pytest.raises(RecipeError, match="the training split has rows 0 to"):
        inspect_recipe(recipe(make_model(), "training.max_length=1024"), row=10_000)


@pytest.fixture
def two_gpus(monkeypatch):
    """What torch says of a machine with two GPUs; to use one fails here."""
    answers = {"is_available": True, "device_count": 2, "get_device_name": "NVIDIA L4", "is_bf16_supported": True}
    for name, answer in (answers | {"set_device": None}).items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)


def test_no_gpu_is_used(make_model, workplace, two_gpus):
    found = inspect_recipe(recipe(make_model(), "training.max_length=1024"))
    assert len(found.painted) == 3 and found.prepared.precision.reason == "native on NVIDIA L4"


def test_a_training_in_one_process_takes_one_of_several_gpus(miniature, two_gpus):
    from medibot.data.prepared import prepare

    args = sft_config(prepare(miniature("quickstart", "model.dtype=null")), Run(Path("unused")))
    assert (args.device.type, args.n_gpu, args.bf16, args.train_batch_size) == ("cuda", 1, True, 2)


def test_flash_attention_trains_in_half_precision_alone(miniature):
    recipe = miniature("quickstart", "model.attn_implementation=flash_attention_2")
    with pytest.raises(RecipeError, match=r"computes in half precision alone, and model\.dtype is float32"):
        require_backward(recipe, torch.float32, cpu=False)
    require_backward(recipe, torch.bfloat16, cpu=False)
