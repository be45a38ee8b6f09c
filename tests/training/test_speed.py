"""The benchmark of speed counts what it says; the contestants themselves take minutes and run by hand."""

import sys

import pyarrow.parquet
import pytest
import torch
from conftest import ROOT, SAMPLE
from torch.utils.flop_counter import FlopCounterMode

from medibot.data.prepared import prepare
from medibot.model.tokenizer import load_tokenizer
from medibot.recipe import load_recipe
from medibot.run import open_run
from medibot.training.trainer import build_trainer

sys.path.insert(0, str(ROOT / "benchmarks"))
import speed

pytestmark = pytest.mark.slow


def test_needed_flop_are_those_of_the_products_of_a_step(miniature):
    rows = "training.per_device_train_batch_size=1"
    prepared = prepare(miniature("quickstart", "quantization=null", "data.limit={train: 1}", rows))
    trainer = build_trainer(prepared, open_run("flop"))
    row = trainer.train_dataset[0]
    supervised = sum(label != -100 for label in row["labels"])
    with FlopCounterMode(display=False) as counter:
        trainer.training_step(trainer.model, trainer.data_collator([row]), torch.tensor(supervised))
    products = [torch.ops.aten.mm, torch.ops.aten.addmm]
    done = sum(counter.get_flop_counts()["Global"].get(product, 0) for product in products)
    needed = speed.needed(prepared, len(row["input_ids"]), supervised)
    assert 0.9 < needed / done < 1.1


def test_copies_of_the_data_are_no_duplicates(workplace, make_model):
    speed.multiply(str(SAMPLE), 3, workplace / "x3.parquet")
    rows = pyarrow.parquet.read_table(workplace / "x3.parquet").num_rows
    own = [f"data.path={workplace / 'x3.parquet'}", f"model.pretrained_model_name_or_path={make_model()}"]
    recipe = load_recipe(str(ROOT / "recipes" / "quickstart.yaml"), [*own, "data.too_long=drop"])
    prepared = prepare(recipe, load_tokenizer(recipe), progress=lambda _: None)
    assert prepared.ledger[0]["rows_in"] == rows
    kept = sum(prepared.split["rows"].values())
    assert kept > 0.7 * rows


def test_the_report_says_how_far_the_goals_are(capsys):
    fast, slow = ({"rows": 8, "seconds": took, "peak_bytes": 2e9} for took in (2.0, 8.0))
    result = {"gemm_gflops": {"a": 50.0, "b": 100.0}, "machine": {"threads": 1, "load_before": 3.0}, "rows": 8}
    result |= {"supervised": 800, "needed_flop": 1e11, "contestants": {"medibot": fast, "trl": slow}}
    speed.report(result | {"preparation": [], "startup": {"--help": 0.25}})
    said = capsys.readouterr().out
    assert "4.00x (goal 3.0)" in said and "The machine was busy" in said
    assert fast["share_of_gemm_peak"] == pytest.approx(0.5) and fast["supervised_tokens_per_second"] == 400
