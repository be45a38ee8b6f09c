"""Write the table of accelerate_configs/README.md: which fine-tuning method goes with which config, and why not.

.venv/bin/python benchmarks/strategies.py
"""

from pathlib import Path
from typing import Any

from medibot.planning.conflicts import find_conflicts
from medibot.planning.hardware import read_hardware

CONFIGS = Path(__file__).resolve().parent.parent / "accelerate_configs"
START, END = "<!-- made by benchmarks/strategies.py -->", "<!-- end -->"
FOUR_BIT = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
# What a method says in the sections quantization and lora
METHODS: dict[str, tuple[dict[str, Any] | None, dict[str, Any] | None]] = {
    "LoRA": (None, {}),
    "DoRA": (None, {"use_dora": True}),
    "LoRA and whole modules": (None, {"modules_to_save": ["lm_head"]}),
    "QLoRA, 4-bit": (FOUR_BIT, {}),
    "QLoRA, 4-bit, float storage": (FOUR_BIT | {"bnb_4bit_quant_storage": "bfloat16"}, {}),
    "QLoRA, 8-bit": ({"load_in_8bit": True}, {}),
    "full": (None, None),
}


def evidence(mark: str, *methods: str) -> dict[str, str]:
    return dict.fromkeys(methods, mark)


EVIDENCE: dict[str, dict[str, str]] = {
    "cpu": evidence("tested", "LoRA", "DoRA", "QLoRA, 4-bit", "QLoRA, 4-bit, float storage", "full")
    | evidence("tried", "LoRA and whole modules", "QLoRA, 8-bit"),
    "cpu-2": evidence("tested", "LoRA") | evidence("tried", "full"),
    "single-gpu": {},
    "multi-gpu": evidence("on CPU", "LoRA") | evidence("tried", "full"),
    "multi-node": evidence("on CPU", "LoRA"),
    "fsdp2": evidence("on CPU", "LoRA", "QLoRA, 4-bit, float storage", "full") | evidence("tried", "DoRA"),
    "zero2": evidence("tried", "LoRA", "QLoRA, 4-bit", "QLoRA, 8-bit", "full"),
    "zero3": evidence("tried", "LoRA", "QLoRA, 4-bit", "full"),
}


def make_table() -> str:
    """Return the table, and the reason of every refusal below it."""
    hardware = [read_hardware(CONFIGS / f"{name}.yaml") for name in EVIDENCE]
    lines = ["| | " + " | ".join(EVIDENCE) + " |", "|---" * (len(EVIDENCE) + 1) + "|"]
    reasons = []
    for method, (quantization, lora) in METHODS.items():
        marks = []
        for one in hardware:
            found = list(find_conflicts(one, {}, quantization, lora, {}))
            reasons += [f"- {method} under {one.kind}: {what} ({remedy})" for _, what, remedy in found]
            marks.append("-" if found else EVIDENCE[one.name].get(method, "upstream"))
        lines.append(f"| {method} | " + " | ".join(marks) + " |")
    return "\n".join([*lines, "", *dict.fromkeys(reasons)])


def render(text: str) -> str:
    """Return the document with its table made anew."""
    before, _, rest = text.partition(START)
    return f"{before}{START}\n{make_table()}\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    file = CONFIGS / "README.md"
    file.write_text(render(file.read_text(encoding="utf-8")), encoding="utf-8")
