"""Choose the held-out rows that both models are asked, and tokenize them as for training."""

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import GenerationConfig, PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

from medibot.cleaning.rules import fold
from medibot.data.conversations import COLUMNS
from medibot.data.gate import Audit
from medibot.data.near import find_near_texts
from medibot.data.prepared import Prepared, prepare
from medibot.data.splitting import sha256
from medibot.errors import RecipeError
from medibot.model.loading import make_tiny_model
from medibot.model.thinking import split_thinking
from medibot.recipe import load_recipe
from medibot.run import Run

# A file that someone hands over is taken as it is: what cannot be asked or compared is left out, and counted
AS_IT_IS = ["data.clean=[drop_unanswered, drop_unasked]", "data.group_by=[]", "data.too_long=drop"]
AS_IT_IS += ["data.validation=0.0", "data.test=0.0", "training.load_best_model_at_end=false"]
AS_IT_IS += ["training.eval_strategy=no", "training.eval_on_start=false"]


@dataclass(frozen=True)
class Questions:
    """The rows that are asked: conversations, and their `input_ids` and `labels` as TRL makes them for training.

    There are `of` rows; `known` stand in the training split; `tokenizer` and `config` are the run's.
    """

    rows: Dataset
    tokens: Dataset
    of: int
    described: str
    known: list[int]
    tokenizer: PreTrainedTokenizerBase
    config: GenerationConfig

    @property
    def fingerprint(self) -> str:
        """Return a hash of what is asked and expected."""
        return sha256(json.dumps([[row["prompt"], row["completion"]] for row in self.rows]))

    def count_tokens(self, text: str) -> int:
        """Return how many tokens a text has."""
        return len(self.tokenizer(text, add_special_tokens=False)["input_ids"])


def held_out_file(run: Run, file: Path, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Return the rows of a file in the schema of the run's data, prepared as its own are."""
    if not file.is_file():
        raise RecipeError.of("DATA", f"{str(file)!r} not found", "give a .jsonl, .csv or .parquet file")
    written = load_recipe(str(run.recipe))
    overrides = [*AS_IT_IS, *(["data.limit=null"] if written.data.limit else [])]
    if written.data.sources:
        # Of several sources the first says what columns are
        first = {
            k: v for k, v in written.as_dict()["data"]["sources"][0].items() if k not in ("clean", "weight", "name")
        }
        overrides.append(f"data.sources={json.dumps([first | {'path': str(file)}])}")
    else:
        overrides.append(f"data.path={json.dumps(str(file))}")
    prepared = prepare(load_recipe(str(run.recipe), overrides), tokenizer)
    for line in prepared.ledger:
        if line["dropped"]:
            print(f"{file.name}: {line['dropped']} rows dropped by {line['rule']}")
    return prepared.load("train")


def choose_questions(
    prepared: Prepared, found: Dataset | None, most: int | None, described: str, train: Dataset | None = None
) -> Questions:
    """Return the rows to ask, chosen by a hash so that everybody asks the same, their labels proven as for training.

    With `train`, rows whose question, or nearly their answer, stands there are named.
    """
    if found is None:
        raise RecipeError.of("eval", "the recipe keeps no test split (data.test is 0)", "give DATA=file.jsonl")
    order = sorted(range(len(found)), key=lambda place: sha256(f"{question(found[place])}\0{found[place]['row']}"))
    rows = found.select(sorted(order[:most]))
    tokenizer, config = prepared.tokenizer, prepared.generation
    tokens = tokenize_rows(tokenizer, rows)
    Audit(tokens, rows, tokenizer, config.eos_token_id, None, "test").refuse_faults()
    known = []
    if train is not None:
        asked = {fold(whole_question(row)) for row in train}
        near = find_near_texts([fold(reference(row)) for row in rows], [fold(reference(row)) for row in train], 0.8)
        known = [row["row"] for row in rows if fold(whole_question(row)) in asked or fold(reference(row)) in near]
    return Questions(rows, tokens, len(found), described, known, tokenizer, config)


def tokenize_rows(tokenizer: PreTrainedTokenizerBase, rows: Dataset) -> Dataset:
    """Return `input_ids` and `labels` of each row by TRL's own preparation: what is scored is what was trained."""
    with tempfile.TemporaryDirectory() as folder:
        switches = {"report_to": "none", "bf16": False, "max_length": None, "disable_tqdm": True}
        args = SFTConfig(folder, use_cpu=True, activation_checkpointing=False, **switches)
        chosen, model = rows.select_columns(COLUMNS), make_tiny_model(tokenizer)
        return SFTTrainer(model, args=args, train_dataset=chosen, processing_class=tokenizer).train_dataset


def question(row: dict[str, Any]) -> str:
    """Return what a row asks."""
    return row["prompt"][-1]["content"]


def whole_question(row: dict[str, Any]) -> str:
    """Return what a row asks with the turns before it: alone, a later question such as "And then?" is no other's twin."""
    return " ".join(message["content"] for message in row["prompt"] if message["role"] != "system")


def reference(row: dict[str, Any]) -> str:
    """Return the answer that a row expects."""
    return part_reference(row)[1]


def part_reference(row: dict[str, Any]) -> tuple[str, str]:
    """Return (trace, answer) that a row expects; a trace stands in the answer where the template knows no thinking."""
    said = row["completion"][0]
    trace, answer = split_thinking(said["content"])
    if trace and answer:
        return trace, answer
    # As templates write it, and as traces of models are counted
    return (said.get("reasoning_content") or "").strip("\n"), said["content"]
