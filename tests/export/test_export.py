"""What leaves a run: merged weights that are the trained model, a GGUF file with its words, a template Ollama can read."""

import filecmp
import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import jinja2
import pytest
import torch
from conftest import FAMILIES, OVERRIDES, ROOT
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel

from medibot.errors import RecipeError
from medibot.export import gguf
from medibot.export import merge as merging
from medibot.export.card import write_cards
from medibot.export.gguf import CONVERTER, export_gguf, require_same_tokens
from medibot.export.merge import merge
from medibot.export.ollama import render_modelfile, take_apart
from medibot.export.probe import QUESTIONS, held_out_prompts, load_whole, logit_distance
from medibot.model.generation import generate_answers
from medibot.model.loading import load_tuned
from medibot.model.tokenizer import make_prompt, template_kwargs
from medibot.recipe import load_recipe
from medibot.run import open_run, read_json
from medibot.training.session import train

pytestmark = pytest.mark.slow
SMOLLM2 = ROOT / "models" / "SmolLM2-135M-Instruct"


def trained(folder: Path, weights: Path, name: str, *more: str):
    """A run of two steps at a rate that moves its answers, in `folder`."""
    chosen = f"model.pretrained_model_name_or_path={weights}"
    train(load_recipe("quickstart", [chosen, *OVERRIDES, *more], root=ROOT), name)
    return open_run(name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Outputs and cache of this module's runs."""
    made = tmp_path_factory.mktemp("export")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEDIBOT_OUTPUTS", str(made / "outputs"))
        patch.setenv("MEDIBOT_CACHE", str(made / "cache"))
        yield made


@pytest.fixture(scope="module")
def merged(folder, make_model):
    """A run trained on NF4 weights, merged."""
    # Without the penalty a random model says one token again and again
    more = ["training.learning_rate=0.1", "evaluation.generate.repetition_penalty=1.5"]
    run = trained(folder, make_model("smollm2"), "mine", *more)
    merge("mine")
    return run


def test_the_merge_that_is_kept_is_the_model_that_was_trained(merged):
    proof = read_json(merged.merged / "merge.json")
    base, dequantized = proof["modes"]["base"], proof["modes"]["dequantized"]
    assert proof["kept"] == "dequantized" and proof["questions"] == QUESTIONS
    assert dequantized["greedy_agreement"] == 1.0 and dequantized["max_logit_difference"] < 1e-3
    # What was left out of the stored 4-bit weights is more than the rounding of float32
    assert base["max_logit_difference"] > 100 * dequantized["max_logit_difference"]
    assert not list(merged.folder.glob(".merged-*"))


def test_merged_folder_has_the_runs_own_bytes_and_nothing_of_the_adapter(merged):
    names = {file.name for file in merged.merged.iterdir()}
    same = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"}
    assert same <= names
    for name in same:
        assert filecmp.cmp(merged.weights / name, merged.merged / name, shallow=False), name
    assert not any(name.startswith("adapter") or name.endswith(".bin") for name in names)
    assert "quantization_config" not in read_json(merged.merged / "config.json")


@pytest.mark.parametrize("what", ["merged", "model"])
def test_the_cards_own_lines_answer_without_medibot(what, merged, make_model):
    write_cards("mine")
    folder = merged.folder / what
    lines = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S)
    assert lines
    foreign = {"medibot"} if what == "model" else {"medibot", "peft", "bitsandbytes"}
    program = lines[1] + f"import sys\nassert not {foreign} & sys.modules.keys()\n"
    # A card names a local base without its folder
    base = folder / make_model("smollm2").name
    base.symlink_to(make_model("smollm2"))
    run = {"cwd": folder, "env": os.environ, "capture_output": True, "text": True, "timeout": 120}
    done = subprocess.run([sys.executable, "-c", program], **run)
    base.unlink()
    assert done.returncode == 0, done.stderr
    recipe = load_recipe(str(merged.recipe))
    tokenizer = AutoTokenizer.from_pretrained(merged.weights)
    weights = load_tuned(recipe, merged.weights, torch.float32)
    prompts = [make_prompt("What is anemia?", recipe.data.system, ())]
    config = GenerationConfig.from_pretrained(merged.weights)
    expected = next(generate_answers(weights, tokenizer, prompts, config, template_kwargs(recipe)))["text"]
    assert done.stdout.strip() == expected != ""


def test_merge_is_done_once_for_each_adapter(merged):
    before = read_json(merged.merged / "merge.json")
    again = merge("mine")
    assert not again.made_now and "merged already" in again.__rich__()
    file = merged.weights / "adapter_model.safetensors"
    kept = file.read_bytes()
    save_file({key: 2 * tensor for key, tensor in load_file(file).items()}, file, metadata={"format": "pt"})
    try:
        merge("mine")
        assert read_json(merged.merged / "merge.json")["adapter"] != before["adapter"]
    finally:
        file.write_bytes(kept)


def test_unfaithful_merge_is_refused_and_nothing_of_it_stays(merged, monkeypatch):
    monkeypatch.setattr(merging, "MOST_DIFFERENCE", 0.0)
    monkeypatch.setattr(merging, "hash_file", lambda _: "another")
    with pytest.raises(RecipeError, match=r"nearest merge \(dequantized\) .* use the adapter as it is"):
        merge("mine")
    assert not list(merged.folder.glob(".merged-*"))


def test_disk_that_fills_during_a_merge_is_said_in_a_line_and_nothing_of_it_stays(merged, monkeypatch):
    monkeypatch.setattr(merging, "hash_file", lambda _: "another")
    before, there = resource.getrlimit(resource.RLIMIT_FSIZE), sorted(merged.folder.rglob("*"))
    with (
        monkeypatch.context() as patch,
        pytest.raises(RecipeError, match=r"cannot be written, .* GB free: .*make room"),
    ):
        save = PreTrainedModel.save_pretrained

        def full(self, folder, **kwargs):
            # The limit that the system itself puts on a file's size, in force while weights are written
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
            try:
                return save(self, folder, **kwargs)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, before)

        patch.setattr(PreTrainedModel, "save_pretrained", full)
        merge("mine")
    assert sorted(merged.folder.rglob("*")) == there


def test_whole_weights_are_compared_on_the_gpu_if_there_is_one(make_model, monkeypatch):
    placed, load = [], AutoModelForCausalLM.from_pretrained

    def watched(folder, device_map=None, **kwargs):
        placed.append(device_map)
        return load(folder, **kwargs)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", watched)
    load_whole(make_model())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    load_whole(make_model())
    assert placed == [None, "auto"]


def test_distance_tells_what_differs():
    trained_logits = torch.tensor([[1.0, 2.0, 0.0], [3.0, 0.0, 0.0]])
    assert logit_distance(trained_logits, trained_logits.clone()) == {
        "greedy_agreement": 1.0,
        "max_logit_difference": 0.0,
        "mean_kl": 0.0,
    }
    found = logit_distance(trained_logits, torch.tensor([[2.5, 2.0, 0.0], [3.0, 0.0, 0.0]]))
    assert found["greedy_agreement"] == 0.5 and found["max_logit_difference"] == 1.5
    p, q = (row.softmax(0) for row in (trained_logits[0], torch.tensor([2.5, 2.0, 0.0])))
    assert found["mean_kl"] == pytest.approx(float((p * (p / q).log()).sum()) / 2, rel=1e-5)


def test_without_the_data_the_fixed_questions_are_asked(merged, capsys):
    tokenizer = AutoTokenizer.from_pretrained(merged.weights)
    gone = ["data.path=none.jsonl", 'evaluation.questions=["What is anemia?"]']
    asked, prompts = held_out_prompts(load_recipe(str(merged.recipe), gone), tokenizer)
    assert asked == "fixed questions" and [prompt[-1]["content"] for prompt in prompts] == ["What is anemia?"]
    assert "none.jsonl" in capsys.readouterr().out
    with pytest.raises(RecipeError, match=r"evaluation\.questions"):
        held_out_prompts(load_recipe(str(merged.recipe), gone[:1]), tokenizer)


@pytest.fixture(scope="module")
def whole(folder):
    """A full fine-tune of a tiny model with a real tokenizer, which the converter knows, and its GGUF file."""
    if not SMOLLM2.is_dir():
        pytest.skip("no models/SmolLM2-135M-Instruct here: run make model")
    from transformers import LlamaConfig, LlamaForCausalLM

    subprocess.run(["make", "-o", ".venv/.ready", ".cache/gguf/.ready"], cwd=ROOT, check=True, capture_output=True)
    base = folder / "tiny"
    shutil.copytree(SMOLLM2, base, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    LlamaForCausalLM(
        LlamaConfig(vocab_size=49152, num_key_value_heads=2, tie_word_embeddings=True, **sizes, **ids)
    ).save_pretrained(base)
    shutil.copyfile(SMOLLM2 / "generation_config.json", base / "generation_config.json")
    run = trained(folder, base, "whole", "lora=null", "quantization=null")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf, "CONVERTER", ROOT / CONVERTER)
        export_gguf("whole")
    return run


@pytest.fixture(scope="module")
def fields(whole):
    from gguf import GGUFReader

    reader = GGUFReader(whole.gguf / "whole.gguf")
    return {name: field.contents() for name, field in reader.fields.items()}


def test_full_fine_tune_has_nothing_to_merge(whole):
    done = merge("whole")
    assert done.folder == whole.weights and not whole.merged.exists()
    assert "nothing to merge" in done.__rich__()


def test_disk_that_fills_during_the_conversion_is_said_in_a_line_and_nothing_of_it_stays(whole, monkeypatch):
    monkeypatch.setattr(gguf, "CONVERTER", ROOT / CONVERTER)
    before, there = resource.getrlimit(resource.RLIMIT_FSIZE), sorted(whole.folder.rglob("*"))
    run_command = subprocess.run

    def full(*args, **kwargs):
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
        try:
            return run_command(*args, **kwargs)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    with monkeypatch.context() as patch, pytest.raises(RecipeError, match="File too large"):
        patch.setattr(subprocess, "run", full)
        export_gguf("whole")
    assert sorted(whole.folder.rglob("*")) == there


def test_gguf_file_holds_tokens_template_stops_and_answers(whole, fields):
    proof = read_json(whole.gguf / "gguf.json")
    assert proof["greedy_agreement"] == 1.0 and proof["tokens"] >= proof["questions"] == QUESTIONS
    tokenizer = AutoTokenizer.from_pretrained(whole.weights)
    assert fields["tokenizer.chat_template"] == tokenizer.chat_template
    text = (whole.gguf / "Modelfile").read_text()
    assert text.startswith("FROM ./whole.gguf\n") and 'PARAMETER stop "<|im_end|>"' in text
    assert f'SYSTEM """{load_recipe(str(whole.recipe)).data.system}"""' in text
    assert {file.name for file in whole.gguf.iterdir()} == {"whole.gguf", "Modelfile", "gguf.json"}


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("tokens", lambda tokens: [*tokens[:9], "<other>", *tokens[10:]], "token 9 of the file"),
        ("tokens", lambda tokens: tokens[:-1], "token 49151 of the file"),
        ("chat_template", lambda text: text + " ", "chat template is not"),
        ("eos", lambda _: 0, r"answers end in '<\|im_end\|>', and the file stops at <\|endoftext\|>"),
    ],
)
def test_gguf_file_with_other_words_is_refused(whole, fields, key, value, said):
    names = {"tokens": "tokenizer.ggml.tokens", "eos": "tokenizer.ggml.eos_token_id"}
    name = names.get(key, f"tokenizer.{key}")
    tokenizer, config = AutoTokenizer.from_pretrained(whole.weights), GenerationConfig.from_pretrained(whole.weights)
    require_same_tokens(fields, tokenizer, config)
    with pytest.raises(RecipeError, match=said):
        require_same_tokens(fields | {name: value(fields[name])}, tokenizer, config)


def test_tokenizer_that_the_converter_does_not_know_is_one_line(merged, whole, monkeypatch):
    monkeypatch.setattr(gguf, "CONVERTER", ROOT / CONVERTER)
    with pytest.raises(RecipeError, match="converter cannot turn") as caught:
        export_gguf("mine")
    assert "\n" not in str(caught.value) and not merged.gguf.exists()
    assert not list(merged.folder.glob(".gguf*"))


def test_missing_converter_says_how_to_get_it(merged, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError, match="make export-gguf"):
        export_gguf("mine")


def rendered_as_go(template: str, messages: list[dict[str, str]]) -> str:
    """What Go's text/template makes of it, by way of Jinja: each action has one counterpart there."""
    blocks: list[str] = []

    def counterpart(found: re.Match[str]) -> str:
        action = found[1].strip()
        test = (
            re.sub(r'eq (\S+) ("\w*")', r"\1 == \2", action).replace("$before", "ns.before").replace(".Role", "m.role")
        )
        if action.startswith(("if ", "range ")):
            blocks.append(action.split()[0])
        if action.startswith("range "):
            return "{% for m in messages %}"
        if action == "end":
            return {"if": "{% endif %}", "range": "{% endfor %}"}[blocks.pop()]
        others = {
            '$before := ""': "{% set ns = namespace(before='') %}",
            "$before = .Role": "{% set ns.before = m.role %}",
        }
        others |= {".Content": "{{ m.content }}"}
        return others.get(action) or "{% " + test.replace("else if", "elif") + " %}"

    return jinja2.Template(re.sub(r"\{\{(.*?)\}\}", counterpart, template), keep_trailing_newline=True).render(
        messages=messages
    )


STOPPING = GenerationConfig(eos_token_id=[0], max_new_tokens=9)
TURNS = [
    {"role": role, "content": text}
    for role, text in [
        ("user", 'Is "5 < 6" {so}?'),
        ("assistant", "Yes."),
        ("user", "Why?\n\n- say"),
        ("assistant", "It is."),
    ]
]


@pytest.mark.parametrize("family", FAMILIES)
def test_ollama_renders_conversations_as_the_chat_template_does(family, make_tokenizer):
    tokenizer = make_tokenizer(family)
    for system in (True, False) if family != "gemma" else (False,):
        recipe = load_recipe("quickstart", [f"data.system={'Be plain.' if system else 'null'}"], root=ROOT)
        go = render_modelfile("x.gguf", tokenizer, STOPPING, recipe, False).split('"""')[1]
        opening = [{"role": "system", "content": "Be plain."}] if system else []
        for length in (1, 3):
            chat = opening + TURNS[:length]
            wanted = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
            assert rendered_as_go(go, chat) == wanted


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{% for m in messages %}<{{ loop.index }}>{{ m.content }}{% endfor %}", "turn by turn"),
        ("{% for m in messages %}{{ m.content | upper }}{% endfor %}", "each message once"),
        ("{{ messages[-1].content }}", "each message once"),
        ("{% for m in messages %}{{ '{{' }}{{ m.content }}{% endfor %}", "braces"),
        ("{{ raise_exception('no') }}", "cannot be written for Ollama: no"),
    ],
)
def test_template_that_ollama_cannot_express_is_refused(template, said, make_tokenizer):
    tokenizer = make_tokenizer("qwen")
    tokenizer.chat_template = template
    with pytest.raises(RecipeError, match=said):
        take_apart(tokenizer, {}, False)


def test_modelfile_leaves_the_first_token_to_the_engine_that_adds_it(make_tokenizer):
    tokenizer = make_tokenizer("llama3")
    recipe = load_recipe("quickstart", root=ROOT)
    config = GenerationConfig(eos_token_id=tokenizer.convert_tokens_to_ids(["<|eot_id|>"]), max_new_tokens=9)
    adding, leaving = (render_modelfile("x.gguf", tokenizer, config, recipe, adds) for adds in (True, False))
    assert "<|begin_of_text|>" not in adding and leaving.count("<|begin_of_text|>") == 2
    assert 'PARAMETER stop "<|eot_id|>"' in adding and "PARAMETER num_predict 9" in adding
    assert "PARAMETER temperature 0" in adding
