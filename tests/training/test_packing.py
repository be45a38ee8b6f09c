"""Packed rows stand in one line: a model that lets one see another is refused before it trains."""

import pytest
import transformers
from transformers import AutoTokenizer

from medibot.errors import RecipeError
from medibot.run import open_run
from medibot.training.session import train

pytestmark = pytest.mark.slow
PACKED = {"bfd": ["training.packing=true"], "flat": ["training.padding_free=true", "training.max_length=null"]}
SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
# Each ignores where a row begins: by its attention, by its state, by a convolution that needs a kernel for it
LEAKING = {
    "Bloom": {"hidden_size": 64, "n_layer": 2, "n_head": 4},
    "Mamba": {"hidden_size": 64, "num_hidden_layers": 2, "state_size": 8},
    "Lfm2": SMALL | {"intermediate_size": 64, "num_key_value_heads": 2, "layer_types": ["conv", "full_attention"]},
}


@pytest.fixture
def base(make_model, workplace):
    """base(kind): a folder with a random model of that architecture, its tokenizer that of family smollm2."""

    def make(kind: str) -> str:
        tokenizer = AutoTokenizer.from_pretrained(make_model())
        ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
        config = getattr(transformers, f"{kind}Config")(vocab_size=len(tokenizer), **ids, **LEAKING[kind])
        getattr(transformers, f"{kind}ForCausalLM")(config).save_pretrained(kind)
        tokenizer.save_pretrained(kind)
        return f"model.pretrained_model_name_or_path=./{kind}"

    return make


@pytest.mark.parametrize("way", PACKED)
def test_rows_that_stand_in_one_line_train_where_the_model_keeps_them_apart(way, miniature):
    train(miniature("quickstart", "quantization=null", "evaluation.questions=[]", *PACKED[way]), "mini")
    assert open_run("mini").record()["summary"]["steps"] == 2


@pytest.mark.parametrize("kind", LEAKING)
def test_a_model_that_lets_packed_rows_see_each_other_is_refused(kind, base, miniature):
    plain = [base(kind), "quantization=null", f"lora.target_modules={'[in_proj]' if kind == 'Mamba' else 'all-linear'}"]
    with pytest.raises(RecipeError, match=r"training\.packing.*group_by_length") as caught:
        train(miniature("quickstart", *plain, *PACKED["bfd"]), "mini", anyway=True)
    assert "\n" not in str(caught.value) and not open_run("mini").folder.exists()
