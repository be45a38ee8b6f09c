"""The recipe's model: what is loaded, in which precision, what trains, and where an answer stops."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FAMILIES, ROOT, STOPS
from peft import PeftModel, get_peft_model
from transformers import AutoTokenizer, GenerationConfig, LlamaForCausalLM, PreTrainedModel

from medibot.errors import RecipeError
from medibot.model import loading
from medibot.model.generation import generate_answers, load_generation_config
from medibot.model.loading import identify_base, load_base, load_tuned, source_kwargs, weights_dtype
from medibot.model.precision import choose_precision, make_lora_config, make_quantization_config
from medibot.model.tokenizer import (
    end_of_turn_token,
    escape_markers,
    load_tokenizer,
    make_prompt,
    role_markers,
    tokenizer_fingerprint,
)
from medibot.recipe import DataSection, EvaluationSection, Recipe

pytestmark = pytest.mark.slow

KEY = "model.pretrained_model_name_or_path"
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
LINEAR = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
AS_TEXT = {"sanitize_control_tokens": True}


def recipe_of(folder: Path | str, generate: dict[str, Any] | None = None, **sections: Any) -> Recipe:
    """A recipe for the model in `folder`; `model` holds further keys of that section."""
    return Recipe(
        name="case",
        path=Path("case.yaml"),
        model={"pretrained_model_name_or_path": str(folder)} | sections.pop("model", {}),
        data=DataSection(path="rows.jsonl", prompt="question", completion="answer"),
        training=sections.pop("training", {}),
        evaluation=EvaluationSection(max_new_tokens=12, generate=generate or {}),
        **sections,
    )


@pytest.fixture
def copied(make_model: Callable, tmp_path: Path) -> Callable[..., Path]:
    """copied(family): a model folder of the test's own, to spoil."""

    def copy(family: str = "smollm2") -> Path:
        return Path(shutil.copytree(make_model(family), tmp_path / family))

    return copy


def refusal(act: Callable[[], Any]) -> str:
    """The words of the one problem with the model's name that `act` raises."""
    with pytest.raises(RecipeError) as refused:
        act()
    (problem,) = refused.value.problems
    assert problem.key == KEY
    assert problem.remedy
    return str(problem)


def edit_json(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


# --- precision --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("written", [{}, {"dtype": "auto"}, {"dtype": "float16"}], ids=["absent", "auto", "float16"])
def test_weights_that_are_trained_whole_have_gradients_that_a_float16_gpu_can_unscale(written) -> None:
    """On a GPU without bfloat16 the Trainer scales the loss with this scaler, which refuses gradients in float16."""
    layer = torch.nn.Linear(4, 2).to(weights_dtype(recipe_of("m", model=written), torch.float16))
    optimizer, scaler = torch.optim.SGD(layer.parameters(), lr=1.0), torch.amp.GradScaler("cpu", init_scale=8)
    with torch.autocast("cpu", dtype=torch.float16):
        scaler.scale(layer(torch.ones(1, 4)).sum()).backward()
    scaler.unscale_(optimizer)
    assert torch.equal(layer.weight.grad, torch.ones(2, 4))


def test_weights_that_are_trained_whole_may_be_bfloat16_where_the_recipe_says_so() -> None:
    assert weights_dtype(recipe_of("m", model={"dtype": "bfloat16"}), torch.bfloat16) == torch.bfloat16
    assert weights_dtype(recipe_of("m", model={"dtype": "auto"}), torch.bfloat16) == torch.float32
    assert weights_dtype(recipe_of("m", lora={"r": 4}), torch.float16) == torch.float16


def test_precision_of_a_cpu_is_bfloat16_with_amx_and_float32_without() -> None:
    cpuinfo = Path("/proc/cpuinfo")
    amx = cpuinfo.is_file() and {"amx_tile", "amx_bf16"} <= set(cpuinfo.read_text().split())
    found = choose_precision()
    assert found.dtype == (torch.bfloat16 if amx else torch.float32)
    assert found.training == {"use_cpu": True, "bf16": amx, "fp16": False}
    assert choose_precision("auto") == found


@pytest.mark.parametrize("written", ["float32", "bfloat16", "float16"])
def test_a_written_dtype_wins(written: str) -> None:
    found = choose_precision(written)
    assert found.name == written
    assert found.dtype is getattr(torch, written)
    assert (found.training["bf16"], found.training["fp16"]) == (written == "bfloat16", written == "float16")
    assert "recipe" in found.reason


def test_apples_gpu_is_said_to_be_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    found = choose_precision()
    assert found.dtype == torch.float32 and "Apple's GPU (MPS) is not used" in found.reason
    assert found.training["use_cpu"]


# --- kernels ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "capability", "said"),
    [
        ({"use_kernels": True}, (9, 0), r"use_kernels: needs the package kernels, [\d.]+ or later \(.*\.\[gpu\]"),
        (
            {"attn_implementation": "org/attention"},
            (9, 0),
            r"attn_implementation: needs the package kernels.*\.\[gpu\]",
        ),
        ({"attn_implementation": "flash_attention_2"}, None, "needs a GPU of compute capability 8.0"),
        ({"attn_implementation": "kernels-community/flash-attn2"}, None, "needs a GPU of compute capability 8.0"),
        ({"attn_implementation": "flash_attention_2"}, (7, 5), "needs a GPU of compute capability 8.0"),
        (
            {"attn_implementation": "flash_attention_2"},
            (8, 0),
            r"FlashAttention2 .* installed.*\.\[gpu\].*leave it out",
        ),
        ({"attn_implementation": "flash_attention_4"}, (8, 9), "needs a GPU of compute capability 9.0"),
    ],
)
def test_kernels_that_cannot_run_here_are_one_line(
    written: dict[str, Any],
    capability: tuple[int, int] | None,
    said: str,
    make_model: Callable,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    with pytest.raises(RecipeError, match=said):
        load_base(recipe_of(make_model(), model=written), torch.bfloat16)


# --- tokenizer and stop tokens ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_stops_where_the_template_ends_a_turn(family: str, make_model: Callable) -> None:
    recipe = recipe_of(make_model(family), generate={"repetition_penalty": 1.3})
    tokenizer = load_tokenizer(recipe)
    end = end_of_turn_token(tokenizer)
    config = load_generation_config(recipe, tokenizer)
    assert tokenizer.decode([end]) == STOPS[family]
    assert set(config.eos_token_id) == {end, tokenizer.eos_token_id}
    assert config.pad_token_id == tokenizer.pad_token_id is not None
    assert (config.do_sample, config.temperature, config.top_p, config.top_k) == (False, None, None, None)
    assert (config.max_new_tokens, config.max_length) == (12, None)
    assert config.repetition_penalty == 1.3


def test_the_end_of_turn_is_the_token_behind_the_answer_where_a_template_writes_two(make_tokenizer: Callable) -> None:
    tokenizer = make_tokenizer("qwen")
    tokenizer.chat_template += "{% if not add_generation_prompt %}<|endoftext|>{% endif %}"
    assert tokenizer.decode([end_of_turn_token(tokenizer)]) == "<|im_end|>"


def test_a_template_that_closes_with_plain_text_has_no_end_of_turn(make_tokenizer: Callable) -> None:
    tokenizer = make_tokenizer("qwen")
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_end|>", "<|over|>")
    assert end_of_turn_token(tokenizer) is None


def test_stop_tokens_that_the_model_names_itself_are_kept_and_sampling_can_be_asked_for(copied: Callable) -> None:
    folder = copied("llama3")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    named = tokenizer.convert_tokens_to_ids("<|end_of_text|>")
    GenerationConfig(eos_token_id=[named], do_sample=True, temperature=0.6, top_p=0.9).save_pretrained(folder)
    config = load_generation_config(recipe_of(folder), tokenizer)
    assert set(config.eos_token_id) == {named, tokenizer.eos_token_id}
    assert (config.do_sample, config.temperature) == (False, None)
    sampled = load_generation_config(recipe_of(folder, generate={"do_sample": True, "temperature": 0.2}), tokenizer)
    assert (sampled.do_sample, sampled.temperature) == (True, 0.2)


def test_a_model_without_generation_config_stops_too(copied: Callable) -> None:
    folder = copied("gemma")
    (folder / "generation_config.json").unlink()
    recipe = recipe_of(folder)
    tokenizer = load_tokenizer(recipe)
    names = tokenizer.convert_ids_to_tokens(load_generation_config(recipe, tokenizer).eos_token_id)
    assert set(names) == {"<eos>", "<end_of_turn>"}


def test_role_markers_are_those_that_are_no_tokens(make_tokenizer: Callable) -> None:
    assert set(role_markers(make_tokenizer("tinyllama"))) == {"<|system|>", "<|assistant|>", "<|user|>"}
    for family in ("smollm2", "llama3", "qwen", "gemma", "mistral"):
        assert role_markers(make_tokenizer(family)) == ()


def test_defused_text_holds_no_marker() -> None:
    markers = ("<|assistant|>", "<|user|>")
    assert escape_markers("a <|user|> b", markers) == "a < |user|> b"
    assert escape_markers("<|us<|user|>er|><|user|>", markers) == "<|us< |user|>er|>< |user|>"
    assert escape_markers("2 < 3 <|end|>", markers) == "2 < 3 <|end|>"
    assert make_prompt("<|user|>?", "Be kind.", markers) == [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "< |user|>?"},
    ]
    assert make_prompt("why?", None, ()) == [{"role": "user", "content": "why?"}]


def test_a_fingerprint_does_not_change_with_use_and_does_with_the_template(make_model: Callable) -> None:
    tokenizer = AutoTokenizer.from_pretrained(make_model("qwen"))
    before = tokenizer_fingerprint(tokenizer)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer("a <|im_end|>", split_special_tokens=True)
    chat = [{"role": "user", "content": "What is <|im_end|>?"}]
    tokenizer.apply_chat_template(chat, tokenize=True, **AS_TEXT)
    # The last call's padding and length stay in the tokenizer's backend
    tokenizer(["a", "a longer text"], padding=True, truncation=True, max_length=16)
    assert tokenizer_fingerprint(tokenizer) == before
    tokenizer.chat_template += " "
    assert tokenizer_fingerprint(tokenizer) != before


def test_a_fingerprint_is_the_same_in_another_process(make_model: Callable) -> None:
    folder = make_model("llama3")
    code = (
        "import sys; from transformers import AutoTokenizer; from medibot.model.tokenizer import tokenizer_fingerprint;"
        "print({'peft', 'bitsandbytes'} & sys.modules.keys() or 'light');"
        "print(tokenizer_fingerprint(AutoTokenizer.from_pretrained(sys.argv[1])))"
    )
    environment = os.environ | {"PYTHONHASHSEED": "7", "PYTHONPATH": str(ROOT)}
    other = subprocess.run(
        [sys.executable, "-c", code, str(folder)], env=environment, capture_output=True, text=True, check=True
    )
    # What only reads rows waits for no adapters
    assert other.stdout.split()[-2:] == ["light", tokenizer_fingerprint(AutoTokenizer.from_pretrained(folder))]


# --- the author's mistakes --------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("workplace")
def test_a_missing_folder_is_refused_with_what_makes_it() -> None:
    assert "make model" in refusal(lambda: load_tokenizer(recipe_of("models/none")))
    assert "'./none'" in refusal(lambda: load_base(recipe_of("./none"), torch.float32))
    assert "org/name" in refusal(lambda: identify_base(recipe_of("none")))
    assert "hub" in refusal(lambda: load_tokenizer(recipe_of("nobody/none")))


def test_a_tokenizer_without_template_is_refused_unless_a_file_is_named(copied: Callable, tmp_path: Path) -> None:
    folder = copied()
    (folder / "chat_template.jinja").unlink()
    assert "training.chat_template_path" in refusal(lambda: load_tokenizer(recipe_of(folder)))
    file = tmp_path / "own.jinja"
    file.write_text(FAMILIES["qwen"][0])
    training = {"chat_template_path": str(file)}
    assert load_tokenizer(recipe_of(folder, training=training)).chat_template == FAMILIES["qwen"][0]
    with pytest.raises(RecipeError) as refused:
        load_tokenizer(recipe_of(folder, training={"chat_template_path": "none.jinja"}))
    assert refused.value.problems[0].key == "training.chat_template_path"


def test_a_tokenizer_without_end_token_is_refused(copied: Callable) -> None:
    folder = copied()
    edit_json(folder / "tokenizer_config.json", eos_token=None)
    assert "no end token" in refusal(lambda: load_tokenizer(recipe_of(folder)))


def test_weights_that_are_not_safetensors_are_refused(copied: Callable) -> None:
    folder = copied()
    weights = LlamaForCausalLM.from_pretrained(folder).state_dict()
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    words = refusal(lambda: load_base(recipe_of(folder), torch.float32))
    assert "no safetensors weights" in words
    assert "convert" in words


def test_code_in_a_model_folder_runs_only_if_the_recipe_says_so(
    copied: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    # Somebody at the terminal who would agree to everything
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    folder, ran = copied(), tmp_path / "ran"
    (folder / "own.py").write_text(
        f"from pathlib import Path\nPath({str(ran)!r}).touch()\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
        "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    code = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    edit_json(folder / "config.json", model_type="own", auto_map=code)
    assert source_kwargs(recipe_of(folder))["trust_remote_code"] is False
    assert "trust_remote_code" in refusal(lambda: load_base(recipe_of(folder), torch.float32))
    assert not ran.exists()
    loaded = load_base(recipe_of(folder, model={"trust_remote_code": True}), torch.float32)
    assert type(loaded).__name__ == "OwnModel"
    assert ran.exists()


def test_the_base_is_identified_by_every_byte_of_its_files(copied: Callable) -> None:
    folder = copied()
    recipe = recipe_of(folder)
    before = identify_base(recipe)
    assert {"model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja"} <= set(before)
    assert identify_base(recipe) == before
    weights = folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    after = identify_base(recipe)
    assert {name for name in before if before[name] != after[name]} == {"model.safetensors"}


# --- quantization and LoRA --------------------------------------------------------------------------------------------


def test_quantized_weights_compute_in_the_machines_dtype_unless_the_recipe_says_otherwise() -> None:
    assert make_quantization_config(recipe_of("m"), torch.bfloat16) is None
    config = make_quantization_config(recipe_of("m", quantization=NF4), torch.bfloat16)
    assert config.bnb_4bit_compute_dtype == torch.bfloat16
    assert (config.bnb_4bit_quant_type, config.bnb_4bit_use_double_quant) == ("nf4", True)
    written = NF4 | {"bnb_4bit_compute_dtype": "float32"}
    config = make_quantization_config(recipe_of("m", quantization=written), torch.bfloat16)
    assert config.bnb_4bit_compute_dtype == torch.float32


def with_adapters(recipe: Recipe, weights: PreTrainedModel) -> PeftModel:
    torch.manual_seed(1)
    tuned = get_peft_model(weights, make_lora_config(recipe))
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return tuned


def silent_adapters(tuned: PeftModel) -> list[str]:
    """Names of the trainable parameters that a training step gives no gradient."""
    tuned.train()
    tuned.zero_grad()
    ids = torch.arange(3, 35).unsqueeze(0)
    tuned(input_ids=ids, labels=ids).loss.backward()
    trainable = [(name, p.grad) for name, p in tuned.named_parameters() if p.requires_grad]
    assert trainable
    return [name for name, gradient in trainable if gradient is None or not gradient.abs().sum()]


def evaluate(tuned: PeftModel) -> None:
    tuned.eval()
    with torch.no_grad():
        tuned(input_ids=torch.arange(3, 35).unsqueeze(0))


@pytest.fixture
def qlora(make_model: Callable) -> Recipe:
    return recipe_of(make_model(), quantization=NF4, lora={"r": 4, "target_modules": "all-linear"})


def test_4bit_layers_are_loaded_and_train(qlora: Recipe) -> None:
    from bitsandbytes.nn import Linear4bit, Params4bit

    weights = load_base(qlora, torch.float32)
    layers = [module for module in weights.modules() if isinstance(module, Linear4bit)]
    assert len(layers) == 2 * len(LINEAR)
    assert all(isinstance(layer.weight, Params4bit) and layer.weight.dtype == torch.uint8 for layer in layers)
    assert all(layer.weight.quant_state.nested and layer.weight.quant_type == "nf4" for layer in layers)
    tuned = with_adapters(qlora, weights)
    optimizer = torch.optim.SGD([p for p in tuned.parameters() if p.requires_grad], lr=0.1)
    ids = torch.arange(3, 35).unsqueeze(0)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = tuned(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > losses[1] > losses[2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_adapter_still_learns_the_same_after_an_evaluation(dtype: torch.dtype, qlora: Recipe) -> None:
    tuned = with_adapters(qlora, load_base(qlora, dtype))
    assert silent_adapters(tuned) == []
    before = {name: p.grad.clone() for name, p in tuned.named_parameters() if p.requires_grad}
    evaluate(tuned)
    assert silent_adapters(tuned) == []
    for name, parameter in tuned.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, before[name])


def test_without_that_care_bitsandbytes_packs_the_weights_and_adapters_fall_silent(
    qlora: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bitsandbytes.functional import has_avx512bf16

    if not has_avx512bf16():
        pytest.skip("bitsandbytes packs only on a CPU with AVX512-BF16")
    monkeypatch.setattr(loading, "keep_4bit_trainable", lambda _: None)
    # Fresh adapters, so that no gradient can go round a packed layer by way of its adapter: lora_B is zero
    tuned = get_peft_model(load_base(qlora, torch.bfloat16), make_lora_config(qlora))
    assert not [name for name in silent_adapters(tuned) if "lora_B" in name]
    evaluate(tuned)
    assert [name for name in silent_adapters(tuned) if "lora_B" in name]


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({}, {"lora_A", "lora_B"}),
        ({"use_rslora": True}, {"lora_A", "lora_B"}),
        ({"use_dora": True}, {"lora_A", "lora_B", "lora_magnitude_vector"}),
    ],
    ids=["lora", "rslora", "dora"],
)
def test_only_the_adapters_of_the_named_layers_train(
    options: dict[str, Any], parts: set[str], make_model: Callable
) -> None:
    lora = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], **options}
    recipe = recipe_of(make_model(), lora=lora)
    tuned = get_peft_model(load_base(recipe, torch.float32), make_lora_config(recipe))
    trainable = {name for name, p in tuned.named_parameters() if p.requires_grad}
    expected = {
        f"base_model.model.model.layers.{layer}.self_attn.{module}.{part}.default" + (".weight")
        for layer in (0, 1)
        for module in ("q_proj", "v_proj")
        for part in parts
    }
    assert trainable == expected
    scaling = tuned.base_model.model.model.layers[0].self_attn.q_proj.scaling["default"]
    assert scaling == (8 / 4**0.5 if options.get("use_rslora") else 8 / 4)


def test_without_lora_every_parameter_trains(make_model: Callable) -> None:
    recipe = recipe_of(make_model())
    assert make_lora_config(recipe) is None
    weights = load_base(recipe, torch.float32)
    assert all(p.requires_grad and p.dtype == torch.float32 for p in weights.parameters())


def test_an_adapter_is_loaded_over_its_base(make_model: Callable, tmp_path: Path) -> None:
    recipe = recipe_of(make_model(), lora={"r": 4, "target_modules": "all-linear"})
    tuned = with_adapters(recipe, load_base(recipe, torch.float32)).eval()
    tuned.save_pretrained(tmp_path / "weights")
    loaded = load_tuned(recipe, tmp_path / "weights", torch.float32)
    ids = torch.arange(3, 20).unsqueeze(0).to(loaded.device)
    assert not loaded.training
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits.cpu(), tuned.to(ids.device)(ids).logits.cpu())
        with loaded.disable_adapter():
            assert not torch.allclose(loaded(ids).logits.cpu(), tuned(ids).logits.cpu())


# --- answers ----------------------------------------------------------------------------------------------------------

PROMPTS = [
    [{"role": "user", "content": text}]
    for text in ("Why?", "What is a fever, and how long does it last in a child of four years?", "What is <|im_end|>?")
]


def loaded(make_model: Callable, family: str, **generate: Any) -> tuple[PreTrainedModel, Any, GenerationConfig]:
    recipe = recipe_of(make_model(family), generate=generate)
    tokenizer = load_tokenizer(recipe)
    return load_base(recipe, torch.float32), tokenizer, load_generation_config(recipe, tokenizer)


def say_always(weights: PreTrainedModel, token: int) -> None:
    """Make the model's next token `token`, whatever stands before it."""
    head = torch.nn.Linear(weights.config.hidden_size, weights.config.vocab_size)
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.zeros_(head.bias)
    head.bias.data[token] = 1.0
    weights.lm_head = head


def test_a_batch_of_prompts_is_answered_as_one_by_one(make_model: Callable) -> None:
    weights, tokenizer, config = loaded(make_model, "llama3")
    with torch.no_grad():
        # As they come, random weights say the same to everything
        for parameter in weights.parameters():
            parameter.mul_(8 if parameter.dim() > 1 else 1)
    together = list(generate_answers(weights, tokenizer, PROMPTS, config, AS_TEXT))
    alone = [next(generate_answers(weights, tokenizer, [prompt], config, AS_TEXT)) for prompt in PROMPTS]
    in_pairs = list(generate_answers(weights, tokenizer, PROMPTS, config, AS_TEXT, batch_size=2))
    assert together == alone == in_pairs
    assert len({got["text"] for got in together}) == len(PROMPTS)


def test_the_mode_of_the_model_is_given_back(make_model: Callable) -> None:
    weights, tokenizer, config = loaded(make_model, "smollm2")
    for mode in (True, False):
        weights.train(mode)
        answers = generate_answers(weights, tokenizer, PROMPTS, config, AS_TEXT, batch_size=1)
        next(answers)
        assert not weights.training
        answers.close()
        assert weights.training is mode
        list(generate_answers(weights, tokenizer, PROMPTS[:1], config, AS_TEXT))
        assert weights.training is mode


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_stops_at_the_end_of_turn(family: str, make_model: Callable) -> None:
    weights, tokenizer, config = loaded(make_model, family)
    say_always(weights, end_of_turn_token(tokenizer))
    assert (
        list(generate_answers(weights, tokenizer, PROMPTS[:2], config, AS_TEXT))
        == [{"text": "", "tokens": 0, "stopped": True}] * 2
    )
    say_always(weights, tokenizer.encode("A")[0])
    (got,) = generate_answers(weights, tokenizer, PROMPTS[:1], config, AS_TEXT)
    assert got == {"text": "A" * 12, "tokens": 12, "stopped": False}


def test_a_stop_string_of_the_recipe_ends_an_answer(make_model: Callable) -> None:
    weights, tokenizer, config = loaded(make_model, "qwen", stop_strings=["AAA"])
    say_always(weights, tokenizer.encode("A")[0])
    (got,) = generate_answers(weights, tokenizer, PROMPTS[:1], config, AS_TEXT)
    assert got["text"] == "AAA"
