"""`medibot inspect` end to end: what it prints, what its page holds, and where it refuses."""

import re

import pytest
from conftest import ROOT, SAMPLE

from medibot.errors import RecipeError
from medibot.recipe import load_recipe
from medibot.training.inspection import inspect_recipe


def recipe(model, *overrides: str):
    overrides = (f"model.pretrained_model_name_or_path={model}", f"data.path={SAMPLE}", *overrides)
    return load_recipe("quickstart", overrides, root=ROOT)


@pytest.mark.parametrize("family", ["smollm2", "mistral"])
def test_terminal_shows_ledger_leaks_mask_and_three_rows(family, make_model, workplace, capsys):
    inspect_recipe(recipe(make_model(family), "training.max_length=1024"), None, row=3)
    said = capsys.readouterr().out
    for text in ("Ledger", "Leak report", "Loss mask", "shortest", "median", "longest", "row 3"):
        assert text in said
    assert not (workplace / "outputs").exists()


def test_page_is_self_contained_and_paints_every_token(make_model, workplace):
    page = workplace / "page.html"
    inspect_recipe(recipe(make_model(), "training.max_length=1024"), page, row=None)
    text = page.read_text()
    assert not re.search(r"(src|href)=", text)
    for kind in ("masked", "trained", "stop"):
        assert f'<span class="{kind}">' in text
    assert text.count('<span class="stop">&lt;|im_end|&gt;</span>') >= 3


def test_row_that_is_not_there_is_refused(make_model, workplace):
    with pytest.raises(RecipeError, match="the training split has rows 0 to"):
        inspect_recipe(recipe(make_model(), "training.max_length=1024"), None, row=10_000)
