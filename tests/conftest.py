"""Tiny random models and tokenizers, built here: nothing in the tests asks a hub."""

import gc
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    import torch

    from medibot.planning.memory import Kept
    from medibot.recipe import Recipe

os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", WANDB_MODE="offline", WANDB_ERROR_REPORTING="false")
# What is tested is the same on a machine with a GPU
os.environ.update(HIP_VISIBLE_DEVICES="", CUDA_VISIBLE_DEVICES="")
# Each W&B run would list every installed package, in as many seconds as its training takes; `_` stands for "x_"
os.environ["WANDB__SAVE_REQUIREMENTS"] = "false"
# bitsandbytes wraps functions for torch's compiler, whose import takes a second of each process; nothing here compiles
os.environ["TORCHDYNAMO_DISABLE"] = "1"
# As the verbs themselves
gc.set_threshold(10_000)
ROOT = Path(__file__).resolve().parent.parent
SAMPLE = ROOT / "recipes" / "data" / "consumer_health.jsonl"

# Written for these tests in the style of the families: what matters is where each puts BOS, roles and stop tokens.
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# SmolLM2 puts in a system prompt of its own when none is given
SMOLLM2 = "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are helpful<|im_end|>\n{% endif %}" + CHATML
# Role markers are plain text, and each turn ends in the end token; Jinja would trim a bare newline behind a block tag
TINYLLAMA = (
    "{% for m in messages %}{% if m.role == 'user' %}<|user|>{% elif m.role == 'system' %}<|system|>{% else %}<|assistant|>"
    "{% endif %}{{ '\n' + m.content + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{{ '\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}"
    "<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
# No system role, and the end of turn is not the end of text
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}"
    "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
# The system message stands inside the first user turn
MISTRAL = (
    "{{ bos_token }}{% set system = messages[0].content + '\n\n' if messages[0].role == 'system' else '' %}"
    "{% for m in messages if m.role != 'system' %}{% if m.role == 'user' %}[INST] {{ system if loop.first else '' }}"
    "{{ m.content }} [/INST]{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
# Thinking stands before the last answer, and earlier turns are written without theirs, as Qwen3 does
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.reasoning_content and loop.last %}<think>\n"
    "{{ m.reasoning_content.strip('\n') }}\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# What each family ends an answer with
STOPS = {
    "smollm2": "<|im_end|>",
    "tinyllama": "</s>",
    "llama3": "<|eot_id|>",
    "qwen": "<|im_end|>",
    "gemma": "<end_of_turn>",
    "mistral": "</s>",
    "thinking": "<|im_end|>",
}
# family: (template, bos, eos, further special tokens)
FAMILIES = {
    "smollm2": (SMOLLM2, "<|im_start|>", "<|im_end|>", ["<|endoftext|>"]),
    "tinyllama": (TINYLLAMA, "<s>", "</s>", ["<unk>"]),
    "llama3": (
        LLAMA3,
        "<|begin_of_text|>",
        "<|eot_id|>",
        ["<|start_header_id|>", "<|end_header_id|>", "<|end_of_text|>"],
    ),
    "qwen": (CHATML, None, "<|im_end|>", ["<|im_start|>", "<|endoftext|>"]),
    "gemma": (GEMMA, "<bos>", "<eos>", ["<start_of_turn>", "<end_of_turn>"]),
    "mistral": (MISTRAL, "<s>", "</s>", ["[INST]", "[/INST]"]),
    "thinking": (THINKING, None, "<|im_end|>", ["<|im_start|>", "<|endoftext|>", "<think>", "</think>"]),
}


# Whole files go to a worker at a time: the longest first, or one worker ends long before the other
LONGEST = ["training/test_survival.py", "test_readme.py", "serving/test_server.py", "export/test_export.py"]
LONGEST += ["training/test_train.py", "test_wheel.py", "test_fuzz.py", "evaluation/test_sweep.py"]
LONGEST += ["planning/test_conflicts.py", "evaluation/test_evaluate.py", "data/test_gate.py", "test_cli.py"]
LONGEST += ["evaluation/test_compare.py", "evaluation/test_benchmark.py", "serving/test_chat.py", "test_tracking.py"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order the files as they shall start."""
    places = {ROOT / "tests" / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path, len(LONGEST)))


FROZEN = {"modules": 0}


@pytest.fixture(autouse=True)
def imports_are_no_garbage() -> None:
    """Each training collects garbage; what the libraries' imports left, a million objects, is not looked at again."""
    if len(sys.modules) > FROZEN["modules"] + 100:
        gc.collect()
        gc.freeze()
        FROZEN["modules"] = len(sys.modules)


@pytest.fixture(scope="session")
def bpe() -> str:
    """A byte-level BPE trained on the sample set, serialised; the families add their special tokens to it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    texts = [text for line in SAMPLE.read_text().splitlines() for text in json.loads(line).values() if text]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    )
    return tokenizer.to_str()


@pytest.fixture(scope="session")
def make_tokenizer(bpe: str) -> Callable:
    """make_tokenizer(family): a tokenizer with that family's template and control tokens."""

    def make(family: str):
        from tokenizers import Tokenizer
        from transformers import PreTrainedTokenizerFast

        template, bos, eos, others = FAMILIES[family]
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(bpe), bos_token=bos, eos_token=eos)
        tokenizer.add_special_tokens({"additional_special_tokens": others})
        tokenizer.chat_template = template
        return tokenizer

    return make


@pytest.fixture(scope="session")
def make_model(make_tokenizer: Callable, tmp_path_factory: pytest.TempPathFactory) -> Callable:
    """make_model(family): a folder with a two-layer random Llama (hidden 64), tokenizer and generation config."""
    made: dict[str, Path] = {}

    def make(family: str = "smollm2") -> Path:
        if family not in made:
            import torch
            from transformers import LlamaConfig, LlamaForCausalLM

            tokenizer = make_tokenizer(family)
            torch.manual_seed(0)
            config = LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=64,
                intermediate_size=128,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=2048,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                tie_word_embeddings=family == "smollm2",
            )
            folder = tmp_path_factory.mktemp("models") / family
            LlamaForCausalLM(config).save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            made[family] = folder
        return made[family]

    return make


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in, with outputs and cache of its own."""
    monkeypatch.setenv("MEDIBOT_OUTPUTS", str(tmp_path / "outputs"))
    monkeypatch.setenv("MEDIBOT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


# What a machine computes in by itself differs from one to the next, and figures are compared to the last digits
FLOAT32 = "model.dtype=float32"
# Small enough for seconds; everything else stays as the recipe says
MINIATURE = [
    FLOAT32,
    f"data.path={SAMPLE}",
    "data.limit={train: 8, validation: 4}",
    "data.too_long=drop",
    "training.max_steps=2",
    "training.per_device_train_batch_size=2",
    "training.per_device_eval_batch_size=2",
    "training.max_length=1024",
    "training.logging_steps=1",
    "evaluation.max_new_tokens=4",
]


def miniature_of(path: Path | str) -> list[str]:
    """Return MINIATURE with the sample set where a recipe reads MedQuAD; one of conversations has a sample of its own."""
    import yaml

    file = Path(path) if str(path).endswith(".yaml") else ROOT / "recipes" / f"{path}.yaml"
    data = yaml.safe_load(file.read_text())["data"]
    others = [override for override in MINIATURE if not override.startswith("data.path")]
    if "sources" in data:
        local = [one | ({"path": str(SAMPLE)} if "prompt" in one else {}) for one in data["sources"]]
        return [*others, f"data.sources={json.dumps(local)}"]
    return others if "messages" in data else MINIATURE


FOUR_STEPS = ["training.max_steps=4", "training.eval_steps=2", "training.save_steps=2"]


@pytest.fixture(scope="session")
def traced() -> dict[str, "Kept"]:
    """What a plan's trace of layers has found, by all that it depends on."""
    return {}


@pytest.fixture
def traced_once(traced, monkeypatch) -> None:
    """A plan traces the same layers over the same tokens once in a session, and not before each training anew."""
    from medibot.planning import plan

    trace = plan.trace

    def remembered(recipe: "Recipe", *sizes: object) -> "Kept":
        weights = plan.load_config(recipe).to_json_string()
        key = repr((weights, recipe.model, recipe.lora, recipe.quantization, sizes))
        if key not in traced:
            traced[key] = trace(recipe, *sizes)
        return traced[key]

    monkeypatch.setattr(plan, "trace", remembered)


@pytest.fixture(scope="session")
def prepared_once(make_model, tmp_path_factory) -> Path:
    """A cache with the rows of MINIATURE as the quickstart prepares them; copy, never change."""
    from medibot.data.prepared import prepare
    from medibot.recipe import load_recipe

    folder = tmp_path_factory.mktemp("prepared")
    weights = f"model.pretrained_model_name_or_path={make_model('smollm2')}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEDIBOT_CACHE", str(folder))
        prepare(load_recipe("quickstart", [weights, *MINIATURE], root=ROOT))
    return folder


@pytest.fixture
def miniature(make_model, workplace, prepared_once, traced_once):
    """miniature(path, *overrides): the recipe in miniature, on a tiny random model, in a working folder of its own."""
    from medibot.recipe import load_recipe

    shutil.copytree(prepared_once, workplace / "cache")

    def make(path: Path | str, *overrides: str) -> "Recipe":
        model = f"model.pretrained_model_name_or_path={make_model('smollm2')}"
        return load_recipe(str(path), [model, *miniature_of(path), *overrides], root=ROOT)

    return make


def losses(name: str) -> list[float]:
    from medibot.run import open_run, read_lines

    return [line["loss"] for line in read_lines(open_run(name).metrics) if "loss" in line]


def wandb_records(log: Path) -> str:
    """The records of an offline W&B run, a line of JSON each, by W&B's own reader: its file cuts them into blocks."""
    command = [str(Path(sys.executable).with_name("wandb")), "leet", "inspect", "--json", str(log)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def adapter(name: str) -> dict[str, "torch.Tensor"]:
    from safetensors.torch import load_file

    from medibot.run import open_run

    return load_file(open_run(name).weights / "adapter_model.safetensors")


def assert_same(a: dict[str, "torch.Tensor"], b: dict[str, "torch.Tensor"], tolerance: float = 0.0) -> None:
    import torch

    assert a.keys() == b.keys() and a
    for key in a:
        assert torch.allclose(a[key], b[key], rtol=0, atol=tolerance), key


OVERRIDES = [
    FLOAT32,
    f"data.path={SAMPLE}",
    "training.max_steps=2",
    "training.logging_steps=1",
    "training.learning_rate=0.01",
    "training.max_length=1024",
    "training.eval_strategy=no",
    "training.eval_on_start=false",
    "training.save_strategy=no",
    "evaluation.questions=[]",
    "evaluation.max_new_tokens=8",
    "tracking=null",
]


@pytest.fixture(scope="session")
def trained_once(make_model, tmp_path_factory) -> Callable:
    """trained_once(*overrides): a folder with outputs/run and its cache, trained once a session; copy, never change."""
    made: dict[tuple[str, ...], Path] = {}
    seen: list[Path] = []

    def make(*overrides: str) -> Path:
        from medibot.recipe import load_recipe
        from medibot.training.session import train

        if overrides not in made:
            folder = tmp_path_factory.mktemp("trained")
            # Most train on the rows of the one before
            if seen:
                shutil.copytree(seen[-1], folder / "cache")
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("MEDIBOT_OUTPUTS", str(folder / "outputs"))
                patch.setenv("MEDIBOT_CACHE", str(folder / "cache"))
                weights = f"model.pretrained_model_name_or_path={make_model('smollm2')}"
                train(load_recipe("quickstart", [weights, *OVERRIDES, *overrides], root=ROOT), "run")
            made[overrides] = folder
            seen.append(folder / "cache")
        return made[overrides]

    return make


@pytest.fixture
def trained(trained_once, workplace, traced_once):
    """trained(name, *overrides): a copy of a finished run in miniature, without W&B unless asked."""
    from medibot.run import open_run

    def make(name: str, *overrides: str):
        folder = trained_once(*overrides)
        shutil.copytree(folder / "outputs" / "run", workplace / "outputs" / name)
        shutil.copytree(folder / "cache", workplace / "cache", dirs_exist_ok=True)
        return open_run(name)

    return make


@pytest.fixture(scope="module")
def speaker(trained_once, tmp_path_factory):
    """A run trained for two steps at a rate that makes it differ from its base, loaded."""
    from medibot.run import open_run
    from medibot.serving.assistant import Assistant

    # Without the penalty a random model says the same token again and again
    more = ["quantization=null", "training.learning_rate=0.1", "evaluation.generate.repetition_penalty=1.5"]
    made, folder = trained_once(*more), tmp_path_factory.mktemp("chat")
    shutil.copytree(made / "outputs" / "run", folder / "outputs" / "talker")
    shutil.copytree(made / "cache", folder / "cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEDIBOT_OUTPUTS", str(folder / "outputs"))
        patch.setenv("MEDIBOT_CACHE", str(folder / "cache"))
        yield Assistant(open_run("talker"))


@pytest.fixture
def say(make_tokenizer: Callable, monkeypatch: pytest.MonkeyPatch) -> Callable:
    """say(tuned, base): from here on the models of family smollm2 generate these texts, whatever they are asked."""
    import torch
    from peft.tuners.tuners_utils import BaseTunerLayer
    from transformers import GenerationMixin, LogitsProcessor

    class Script(LogitsProcessor):
        """Allow a script's next token alone."""

        def __init__(self, ids: list[int]) -> None:
            self.left = iter(ids)

        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            scores = torch.full_like(scores, -torch.inf)
            scores[:, next(self.left)] = 0.0
            return scores

    tokenizer, listed = make_tokenizer("smollm2"), GenerationMixin._get_logits_processor

    def force(tuned: str, base: str | None = None) -> None:
        def processors(self, *args, **kwargs):
            off = any(isinstance(module, BaseTunerLayer) and module.disable_adapters for module in self.modules())
            text = base if off and base is not None else tuned
            ids = [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]
            found = listed(self, *args, **kwargs)
            found.append(Script(ids))
            return found

        monkeypatch.setattr(GenerationMixin, "_get_logits_processor", processors)

    return force
