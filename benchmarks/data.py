"""Time and memory of a row's path from its file to the gate, over a made-up set of rows for each number given.

.venv/bin/python benchmarks/data.py                                      # a million rows
.venv/bin/python benchmarks/data.py --rows 50000 100000 200000           # the curve
.venv/bin/python benchmarks/data.py --rows 100000 --until write          # without TRL's tokenising and the gate

Each set is prepared in a fresh process: its peak is all that it took. A stage's time is without the stages inside, and stands
with the processor's own: where others share the machine, only the latter can be compared.
"""

import argparse
import json
import multiprocessing
import os
import re
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

SAMPLE = Path("recipes/data/consumer_health.jsonl")
MODEL = Path("models/SmolLM2-135M-Instruct")
CHAT = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
RULES = "[normalise_whitespace, drop_unanswered, drop_unasked, drop_echoes, drop_short, drop_repetitive, drop_duplicates, {limit_repeated_answers: {copies: 1}}]"
RECIPE = """
model: {{pretrained_model_name_or_path: {model}}}
data:
  path: {rows}
  prompt: question
  completion: answer
  system: You answer health questions for the public in plain, careful words.
  clean: {rules}
  group_by: [topic]
  validation: 0.05
  test: 0.05
training: {{max_length: 1024}}
"""
# Stage -> where its function is looked up: module, and class or None, and name; those of STREAMS yield rows
STREAMS = {
    "read": ("turns", "Turns", "__iter__"),
    "clean": ("preparation", "Cleaning", "__call__"),
    "tokens": ("conversations", "Fitting", "__call__"),
}
STAGES = {
    "keep": ("rows", "Rows", "add"),
    "split": ("preparation", None, "split_pools"),
    "near search": ("splitting", None, "find_near"),
    "fingerprint": ("splitting", None, "split_fingerprint"),
}


def write_rows(file: Path, rows: int) -> None:
    """Write made-up rows: 1 % without an answer, 2 % exact copies, 3 % near ones, five rows a topic."""
    draw = np.random.default_rng(0)
    # As frequent as in the sample set: made-up words are many more tokens than those that a tokenizer knows
    counts = Counter(word for line in SAMPLE.open() for word in json.loads(line)["answer"].lower().split())
    words, share = np.array(list(counts), dtype=object), np.array(list(counts.values())) / counts.total()
    last: list[str] = []
    with file.open("w", encoding="utf-8") as stream:
        for start in range(0, rows, 1000):
            drawn = words[draw.choice(len(words), 150_000, p=share)].reshape(1000, 150)
            kinds, lengths = draw.random(1000), draw.integers(60, 151, 1000)
            topics = draw.integers(0, max(1, rows // 5), 1000)
            for number in range(min(1000, rows - start)):
                answer = list(drawn[number, : lengths[number]])
                if kinds[number] < 0.05 and last:
                    # An exact copy, or one of whose words the fifth and the last differ
                    answer = last if kinds[number] < 0.02 else [*last[:4], answer[0], *last[5:-1], answer[1]]
                answer[8::12] = [word if word.endswith(".") else f"{word}." for word in answer[8::12]]
                last = answer
                topic = f"{words[topics[number] % len(words)]} {words[topics[number] // len(words)]}"
                text = "" if kinds[number] > 0.99 else " ".join(answer).capitalize()
                row = {
                    "question": f"What is {topic} {drawn[number, 0]}?",
                    "answer": text,
                    "topic": topic,
                    "url": f"u/{start}",
                }
                stream.write(json.dumps(row) + "\n")


def write_tokenizer(folder: Path, rows: Path) -> Path:
    """Return the sample model's folder, or that of a tokenizer trained here in its place."""
    if MODEL.exists():
        return MODEL.resolve()
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    tokenizer, special = Tokenizer(models.BPE()), ["<|im_start|>", "<|im_end|>"]
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=8000, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    with rows.open(encoding="utf-8") as lines:
        tokenizer.train_from_iterator((line for line, _ in zip(lines, range(5000), strict=False)), trainer)
    whole = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|im_start|>")
    whole.chat_template = CHAT
    whole.save_pretrained(folder / "model")
    LlamaConfig(vocab_size=len(whole)).save_pretrained(folder / "model")
    return folder / "model"


class Clock:
    """Seconds of each stage, passed and of the processor, those of a stage inside left out."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}
        self.inside = [[0.0, 0.0]]

    @contextmanager
    def timing(self, stage: str) -> Iterator[None]:
        """Add the time of what is done under it to the stage's."""
        start = time.perf_counter(), time.process_time()
        self.inside.append([0.0, 0.0])
        try:
            yield
        finally:
            whole = time.perf_counter() - start[0], time.process_time() - start[1]
            inner, seconds = self.inside.pop(), self.seconds.setdefault(stage, [0.0, 0.0])
            for place in (0, 1):
                seconds[place] += whole[place] - inner[place]
                self.inside[-1][place] += whole[place]

    def timed(self, stage: str, function: Any) -> Any:
        """Return the function with its time added to the stage's."""

        def run(*given: Any, **named: Any) -> Any:
            with self.timing(stage):
                return function(*given, **named)

        return run

    def streamed(self, stage: str, function: Any) -> Any:
        """Return a function that yields, with the time of each step added to the stage's."""

        def run(*given: Any) -> Any:
            rows, end = function(*given), object()
            while True:
                with self.timing(stage):
                    row = next(rows, end)
                if row is end:
                    return
                yield row

        return run


def measure(recipe: Path, cache: Path, until: str) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Return the seconds of each stage, and the peak memory in GB up to the end of preparing and of all."""
    os.environ["MEDIBOT_CACHE"] = str(cache)
    from medibot.data import conversations, preparation, prepared, rows, splitting, turns
    from medibot.recipe import load_recipe
    from medibot.run import Run
    from medibot.training.trainer import audit_splits, build_trainer

    clock = Clock()
    modules = {
        module.__name__.rpartition(".")[2]: module for module in (conversations, preparation, rows, splitting, turns)
    }
    for kinds, wrap in ((STREAMS, clock.streamed), (STAGES, clock.timed)):
        for stage, (module, owner, name) in kinds.items():
            place = vars(modules[module])[owner] if owner else modules[module]
            setattr(place, name, wrap(stage, vars(place)[name]))
    peaks = {"imported": peak()}
    # What is left of preparing is writing, next to hashing the file
    made = clock.timed("write", prepared.prepare)(load_recipe(str(recipe)))
    peaks["prepared"] = peak()
    if until == "gate":
        trainer = clock.timed("TRL's tokens", build_trainer)(made, Run(cache / "run"), tiny=True)
        clock.timed("gate", audit_splits)(trainer, made)
        peaks["gated"] = peak()
    return clock.seconds, peaks


def peak() -> float:
    """Return this process's highest resident memory so far, in GB."""
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1e6


def main() -> None:
    """Print one table: a column for each number of rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000_000])
    parser.add_argument("--until", choices=["write", "gate"], default="gate")
    asked = parser.parse_args()
    found = []
    for rows in asked.rows:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            write_rows(folder / "rows.jsonl", rows)
            model = write_tokenizer(folder, folder / "rows.jsonl")
            (folder / "made.yaml").write_text(RECIPE.format(model=model, rows=folder / "rows.jsonl", rules=RULES))
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:
                found.append(fresh.submit(measure, folder / "made.yaml", folder / "cache", asked.until).result())
    table = Table("stage", *(f"{rows:,} rows: s, CPU s (rows/s)" for rows in asked.rows))
    for stage in found[0][0]:
        cells = (
            (*seconds[stage], rows / seconds[stage][0]) for (seconds, _), rows in zip(found, asked.rows, strict=True)
        )
        table.add_row(stage, *(f"{passed:.1f}, {used:.1f} ({speed:,.0f})" for passed, used, speed in cells))
    for point in found[0][1]:
        table.add_row(f"peak, {point}", *(f"{peaks[point]:.2f} GB" for _, peaks in found))
    Console(width=40 + 30 * len(asked.rows)).print(table)


if __name__ == "__main__":
    main()
