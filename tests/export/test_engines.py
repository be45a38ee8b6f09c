"""The lines by which other programs serve a run: what each reads, what vLLM refuses in an adapter."""

import re
from pathlib import Path

import pytest
from conftest import ROOT

from medibot.export.engines import serving_lines
from medibot.recipe import load_recipe
from medibot.run import Run


def lines_of(recipe: str, *overrides: str) -> dict[str, str]:
    return serving_lines(Run(Path("outputs") / recipe), load_recipe(recipe, overrides, root=ROOT))


def test_the_documentation_shows_the_lines_that_a_training_prints():
    shown = re.search(r"```sh\n(.*?)```", (ROOT / "docs" / "serving.md").read_text(encoding="utf-8"), re.S)
    written = [f"{line}  # {program}" for program, line in lines_of("medquad-qwen3-14b").items()]
    assert shown and shown[1].splitlines() == written


def test_vllm_gets_base_adapter_template_and_stop_tokens():
    line = lines_of("medquad-qlora", "lora.r=24", "model.revision=abc")["vLLM"]
    assert line.startswith("vllm serve TinyLlama/TinyLlama-1.1B-Chat-v1.0 ") and " --revision abc " in line
    folder = "outputs/medquad-qlora/model"
    for said in (
        "--quantization bitsandbytes",
        f"--enable-lora --lora-modules medquad-qlora={folder}",
        "--max-lora-rank 32",
        f"--chat-template {folder}/chat_template.jinja",
        f"--generation-config {folder}",
    ):
        assert said in line
    plain = lines_of("medquad-lora")["vLLM"]
    assert "--quantization" not in plain and "--max-lora-rank" not in plain


@pytest.mark.parametrize(
    "override", ["lora.use_dora=true", "lora.modules_to_save=[lm_head]", "lora.bias=all", "lora.rank_pattern={q: 600}"]
)
def test_an_adapter_that_vllm_refuses_is_served_merged(override):
    line = lines_of("medquad-lora", override)["vLLM"]
    assert line.startswith("make merge RUN=medquad-lora && vllm serve outputs/medquad-lora/merged ")
    assert "lora-modules" not in line


def test_whole_weights_are_served_as_they_are_and_nothing_is_merged():
    lines = lines_of("medquad-full")
    assert lines["vLLM"].startswith("vllm serve outputs/medquad-full/model ")
    assert (
        "make merge" not in "".join(lines.values())
        and '"$(realpath outputs/medquad-full/model):/model"' in lines["TGI"]
    )


def test_llama_cpp_is_told_the_arguments_of_training():
    assert (
        """--jinja --chat-template-kwargs '{"enable_thinking": false}'""" in lines_of("medquad-qwen3-14b")["llama.cpp"]
    )
    assert "kwargs" not in lines_of("medquad-lora")["llama.cpp"]
