"""The original notebook's procedure, as a run that `make eval` and `make compare` put beside MediBot's own.

    .venv/bin/python benchmarks/notebook.py lora             # after: make train … RUN=lora
    make eval RUN=lora-as-notebook ROWS=100                  # the ROWS that lora was asked
    make compare RUNS="lora lora-as-notebook"

What the notebook did, and this does: rows drawn from the raw file, so that two thirds of MedQuAD have no answer and the
model is taught to say "None"; a chat template written by hand, whose markers and end are plain text to most tokenizers;
every row padded to 1,000 tokens; labels that copy the input, so that the loss covers prompt and padding; rank 16 on q
and v, alpha 32, dropout 0.05, 2e-4 falling linearly, batches of 4, gradient checkpointing, the plain `Trainer`.

What it does not do, so that the comparison is fair: it draws no row that shares a topic, document or question with a
held-out one (the notebook's random split leaked them), and it takes no more rows and no more seconds of training steps
than the run it is named after, on the same machine with the same OMP_NUM_THREADS. `make eval` asks with the model's own
chat template, as any server would; what the reference answers cost under the hand-written prompt is printed at the end.
"""

import argparse
import dataclasses
import random
import tempfile
import time

import torch
from peft import LoraConfig, get_peft_model
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from medibot.data.prepared import Prepared, prepare
from medibot.data.sources import open_sources
from medibot.data.splitting import sha256
from medibot.evaluation.questions import choose_questions, question, reference
from medibot.evaluation.scores import likelihood
from medibot.model.loading import load_base
from medibot.recipe import load_recipe
from medibot.recipe.resolved import dump_resolved_recipe
from medibot.run import find_finished_run, open_run, read_json, read_lines
from medibot.training.record import count_parameters
from medibot.training.trainer import peak_memory

WIDTH, BATCH = 1000, 4
SYSTEM = "You are a helpful medical assistant."
# Not max_length: it decides which rows are held out, and those must be the ones that the other run was not trained on
AS_NOTEBOOK = [
    "quantization=null",
    "lora.r=16",
    "lora.lora_alpha=32",
    "lora.lora_dropout=0.05",
    "lora.target_modules=[q_proj, v_proj]",
    f"training.per_device_train_batch_size={BATCH}",
    "training.gradient_accumulation_steps=1",
    "training.learning_rate=2e-4",
    "training.lr_scheduler_type=linear",
    "training.warmup_steps=0",
    "training.activation_checkpointing=true",
    "tracking=null",
]


def written_by_hand(question: str, answer: str) -> tuple[str, str]:
    """(prompt, the rest), with markers that only TinyLlama's relatives know."""
    return f"<|system|>\n{SYSTEM}</s>\n<|user|>\n{question}</s>\n<|assistant|>\n", f"{answer}</s>"


def raw_rows(prepared: Prepared, count: int) -> list[tuple[str, str]]:
    """(question, answer or "None") of rows of the raw file that share nothing with a held-out row, drawn at random."""
    data = prepared.recipe.data
    rows = [row for _, row in open_sources(prepared.recipe)[0].read()]
    held = {row for split in ("validation", "test") for row in prepared.load(split)["row"]}
    keys = {(column, rows[row][column]) for row in held for column in data.group_by if rows[row][column]}
    free = [row for row in rows if not any((column, row[column]) in keys for column in data.group_by)]
    print(f"{len(rows):,} raw rows, {len(free):,} of them share nothing with a held-out row")
    drawn = random.Random(42).sample(free, min(count, len(free)))
    return [(row[data.prompt], str(row[data.completion])) for row in drawn]


class Clock(TrainerCallback):
    """Seconds and loss of each step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.losses: list[float] = []

    def on_step_begin(self, *_, **__) -> None:
        self.started = time.monotonic()

    def on_step_end(self, *_, **__) -> None:
        self.seconds.append(time.monotonic() - self.started)

    def on_log(self, args, state, control, logs, **_) -> None:
        if "loss" in logs:
            self.losses.append(logs["loss"])
            print(f"step {state.global_step}/{state.max_steps}  loss {logs['loss']:.4f}", flush=True)


def fit(prepared: Prepared, texts: list[str], steps: int):
    """(the adapted model, its Clock) after `steps` batches of the padded texts."""
    tokens = prepared.tokenizer(texts, padding="max_length", truncation=True, max_length=WIDTH, return_tensors="pt")
    columns = {"input_ids": tokens["input_ids"], "attention_mask": tokens["attention_mask"]}
    rows = [{key: value[place] for key, value in columns.items()} for place in range(len(texts))]
    rows = [row | {"labels": row["input_ids"].clone()} for row in rows]
    torch.manual_seed(0)
    weights = get_peft_model(load_base(prepared.recipe, prepared.precision.dtype), LoraConfig(**prepared.recipe.lora))
    weights.enable_input_require_grads()
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder,
            per_device_train_batch_size=BATCH,
            learning_rate=2e-4,
            max_steps=steps,
            logging_steps=1,
            gradient_checkpointing=True,
            gradient_checkpointing_kwargs={"use_reentrant": False},
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=0,
            **prepared.precision.training,
        )
        trainer = Trainer(weights, args, train_dataset=rows, callbacks=[clock])
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return weights, clock


def cost_under_own_prompt(prepared: Prepared, weights, test_rows: int) -> dict[str, float]:
    """Nats a token of the reference answers behind the hand-written prompt, without and with the adapter."""
    found = prepared.load("test")
    asked = choose_questions(prepared, found, test_rows, "test split")
    rows = []
    for row in asked.rows:
        prompt, rest = written_by_hand(question(row), reference(row))
        before, answer = (prepared.tokenizer(text)["input_ids"] for text in (prompt, rest))
        ids = (before + answer)[:WIDTH]
        rows.append({"input_ids": ids, "labels": ([-100] * len(before) + answer)[: len(ids)]})
    weights.eval()
    costs = {}
    for which in ("base", "tuned"):
        with weights.disable_adapter() if which == "base" else torch.inference_mode():
            scores = [score for row in rows for score in likelihood(weights, [row])]
        costs[which] = sum(score["nll"] for score in scores) / sum(score["tokens"] for score in scores)
    return costs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="a finished run: its model, data, split, number of rows and seconds")
    parser.add_argument("--steps", type=int, help="so many steps, whatever they take; default: the run's seconds")
    parser.add_argument("--test-rows", type=int, default=100, help="rows behind the figure that is printed at the end")
    given = parser.parse_args()
    like = find_finished_run(given.run)
    recipe = load_recipe(str(like.recipe))
    prepared = prepare(recipe)
    cost, seen = like.record()["summary"]["cost"], read_lines(like.metrics)[-1]["num_examples_seen"]
    as_notebook = load_recipe(str(like.recipe), AS_NOTEBOOK if recipe.lora else [*AS_NOTEBOOK, "lora.bias=none"])
    prepared = dataclasses.replace(prepared, recipe=as_notebook)
    drawn = raw_rows(prepared, seen)
    texts = ["".join(written_by_hand(*row)) for row in drawn]
    if given.steps:
        steps = given.steps
    else:
        _, clock = fit(prepared, texts, 2)
        steps = max(1, min(len(texts) // BATCH, round(cost["training_seconds"] / clock.seconds[-1])))
        print(f"{clock.seconds[-1]:.1f} s a step: {steps} steps in the {cost['training_seconds']:.0f} s of {like.name}")
    drawn, texts = drawn[: steps * BATCH], texts[: steps * BATCH]
    weights, clock = fit(prepared, texts, steps)

    this = open_run(f"{like.name}-as-notebook")
    this.folder.mkdir(parents=True, exist_ok=True)
    weights.save_pretrained(this.weights)
    prepared.tokenizer.save_pretrained(this.weights)
    prepared.generation.save_pretrained(this.weights)
    lengths = [len(ids) for ids in prepared.tokenizer([answer for _, answer in drawn if answer != "None"])["input_ids"]]
    empty = sum(answer == "None" for _, answer in drawn)
    # What can be learned from, as for every other run, and not the padding that this loss covers as well
    supervised, spent = sum(min(length, WIDTH) for length in lengths), sum(clock.seconds)
    this.metrics.unlink(missing_ok=True)
    for step, loss in enumerate(clock.losses, 1):
        elapsed = sum(clock.seconds[:step])
        line = {"step": step, "seconds": elapsed, "training_seconds": elapsed, "loss": loss}
        this.append(this.metrics, line | {"num_supervised_tokens_seen": supervised * step // steps})
    this.write("recipe.yaml", dump_resolved_recipe(as_notebook, {"procedure": "benchmarks/notebook.py"}))
    this.write("split.json", read_json(like.folder / "split.json"))
    parts = {"procedure": "benchmarks/notebook.py", "like": like.record()["fingerprint"], "steps": steps}
    trainable = count_parameters(weights)[0]
    cost = {
        "seconds": spent,
        "training_seconds": spent,
        "supervised_tokens": supervised,
        "supervised_tokens_per_second": round(supervised / spent, 2),
        "peak_memory_bytes": peak_memory(),
        "trainable_parameters": trainable,
        "weights_bytes": sum(file.stat().st_size for file in this.weights.glob("*.safetensors")),
    }
    key = sha256(repr(parts))
    summary = {"steps": steps, "cost": cost}
    this.write("run.json", {"status": "finished", "fingerprint": key, "parts": parts, "summary": summary})
    print(f"{len(drawn)} rows, {empty} of them without an answer; {supervised:,} answer tokens in {spent:.0f} s")
    print(f"written: {this.folder}; next: make eval RUN={this.name}")
    for which, value in cost_under_own_prompt(prepared, weights, given.test_rows).items():
        print(f"under the hand-written prompt, {which}: {value:.4f} nats a token of the reference answers")


if __name__ == "__main__":
    main()
