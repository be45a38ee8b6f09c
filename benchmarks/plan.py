"""Planned against measured peak memory of the quickstart's model on this CPU: three methods by three batch x length shapes.

.venv/bin/python benchmarks/plan.py                                            # minutes
.venv/bin/python benchmarks/plan.py --only full training.max_steps=5           # one method, further overrides

Each training is a process of its own: two steps, with an evaluation before and after, on rows of random words that are
all nearly as long as the shape says.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer

from medibot.run import Run, read_json

MODEL, SAMPLE = "models/SmolLM2-135M-Instruct", Path("recipes/data/consumer_health.jsonl")
METHODS = {
    "LoRA, float32": ["quantization=null"],
    "LoRA on NF4": [],
    "full": ["quantization=null", "lora=null", "training.learning_rate=2e-5"],
}
SHAPES = [(1, 256), (4, 256), (2, 512)]
# Tokens of a row beside its answer: system prompt, question and the template's own
AROUND = 60
SHORT = [
    "data.limit={train: 12, validation: 4}",
    "data.group_by=[question]",
    "data.too_long=drop",
    "training.max_steps=2",
    "training.eval_steps=2",
    "training.save_steps=2",
    "training.logging_steps=1",
    "evaluation.questions=[]",
    "evaluation.by=null",
    "evaluation.evidence=null",
    "tracking=null",
]


def write_rows(file: Path, length: int) -> None:
    """Sixty rows of random words, each some `length` tokens long with all that stands around it."""
    rng, tokenizer = random.Random(length), AutoTokenizer.from_pretrained(MODEL)
    words = [word for line in SAMPLE.open() for word in json.loads(line)["answer"].split()]
    with file.open("w") as stream:
        for number in range(60):
            ids = tokenizer(" ".join(rng.choices(words, k=length)))["input_ids"]
            row = {"question": f"Row {number}?", "answer": tokenizer.decode(ids[: length - AROUND])}
            stream.write(json.dumps(row) + "\n")


def measure(method: str, rows: int, length: int, overrides: list[str], folder: Path) -> tuple[dict[str, float], int]:
    """Train in a process of its own; what its run says of memory, and the longest row's tokens."""
    data = folder / f"rows-{length}.jsonl"
    if not data.exists():
        write_rows(data, length)
    shape = [f"data.path={data}", f"training.per_device_train_batch_size={rows}", f"training.max_length={length}"]
    words = ["-m", "medibot", "train", "quickstart", *SHORT, *METHODS[method], *shape, *overrides, "--run", "measured"]
    run = Run(folder / "measured")
    shutil.rmtree(run.folder, ignore_errors=True)
    environment = os.environ | {"MEDIBOT_OUTPUTS": str(folder), "MEDIBOT_CACHE": str(folder / "cache")}
    subprocess.run([sys.executable, *words], env=environment, check=True, stdout=subprocess.DEVNULL)
    return run.record()["summary"]["memory"], read_json(run.folder / "plan.json")["lengths"]["longest"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="Methods whose name begins so.")
    parser.add_argument("overrides", nargs="*")
    asked = parser.parse_args()
    table = Table("method", "rows x longest", "planned MB", "measured MB", "planned / measured")
    worst = 0.0
    with tempfile.TemporaryDirectory() as folder:
        for method in [method for method in METHODS if method.startswith(asked.only)]:
            for rows, length in SHAPES:
                memory, longest = measure(method, rows, length, asked.overrides, Path(folder))
                planned, measured, ratio = memory.values()
                worst = max(worst, abs(ratio - 1))
                cells = (method, f"{rows} x {longest}", f"{planned / 1e6:.0f}", f"{measured / 1e6:.0f}", f"{ratio:.3f}")
                table.add_row(*cells)
                print(*cells, sep="\t", flush=True)
    Console().print(table)
    print(f"furthest off: {worst:.1%}")


if __name__ == "__main__":
    main()
