"""What docs/data.md shows is tried: each data section reads the files that stand beside it, in a working folder of its own."""

import re
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

from medibot.data.prepared import prepare
from medibot.recipe import load_recipe

TEXT = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
FILES = dict(re.findall(r"```\w+ (\S+\.\w+)\n(.*?)```", TEXT, re.S))
SECTIONS = re.findall(r"```yaml\n(data:.*?)```", TEXT, re.S)


@pytest.fixture
def files(workplace) -> None:
    for name, text in FILES.items():
        Path(name).write_text(text, encoding="utf-8")


@pytest.mark.parametrize("section", SECTIONS, ids=[f"section {number}" for number in range(len(SECTIONS))])
def test_a_data_section_of_the_documentation_reads_the_files_beside_it(files, make_model, make_tokenizer, section):
    written = yaml.safe_load(section)
    # A handful of rows cannot be shared out
    written["data"] = {"validation": 0, "test": 0} | {k: v for k, v in written["data"].items() if k != "test"}
    model = {"pretrained_model_name_or_path": str(make_model())}
    Path("mine.yaml").write_text(yaml.safe_dump({"model": model, "training": {}} | written))
    family = "thinking" if "thinking" in written["data"] else "smollm2"
    prepared = prepare(load_recipe("mine.yaml"), make_tokenizer(family), lambda _: None)
    assert prepared.load("train")
    assert not [line["rule"] for line in prepared.ledger if line["rule"].startswith("not read: messages")]


def test_the_documentation_has_files_and_sections_to_try():
    assert len(FILES) >= 9 and len(SECTIONS) >= 10
