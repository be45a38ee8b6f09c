"""Packed 4-bit weights under real FSDP2, byte for byte, on two CPU processes."""

import json
import os
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from bitsandbytes.nn import Linear4bit
from conftest import ROOT
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from medibot.errors import RecipeError
from medibot.planning.conflicts import FLOATS, refuse_cast
from medibot.planning.hardware import Hardware
from medibot.recipe import load_recipe
from medibot.run import open_run
from medibot.training.session import train

pytestmark = pytest.mark.slow
STORAGE = "quantization.bnb_4bit_quant_storage"
BITS = "quantization={load_in_4bit: true, bnb_4bit_quant_type: nf4}"


def gather(rank: int, folder: str) -> None:
    """Make shards of one packed layer for each storage and precision, gather them, and count the bytes that changed."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    mesh, changed = init_device_mesh("cpu", (2,)), {}
    for storage, compute in product(FLOATS, FLOATS):
        torch.manual_seed(0)
        layer = Linear4bit(64, 64, bias=False, quant_type="nf4", quant_storage=getattr(torch, storage)).to("cpu")
        before = layer.weight.data.clone().view(torch.uint8)
        assert before.numel() == 64 * 64 / 2
        # As accelerate makes it of the Trainer's bf16 and fp16
        policy = MixedPrecisionPolicy(param_dtype=None if compute == "float32" else getattr(torch, compute))
        fully_shard(layer, mesh=mesh, mp_policy=policy)
        layer.unshard()
        after = layer.weight.data.view(torch.uint8)
        same = after.numel() == before.numel()
        changed[f"{storage} {compute}"] = (after != before).float().mean().item() if same else 1.0
    if rank == 0:
        Path(folder, "changed.json").write_text(json.dumps(changed))
    dist.destroy_process_group()


def is_refused(storage: str, compute: str) -> bool:
    recipe = load_recipe("quickstart", [BITS, f"{STORAGE}={storage}"], root=ROOT)
    try:
        refuse_cast(recipe, Hardware("FSDP2", 2), compute)
    except RecipeError as error:
        assert f"stored as {storage} would be cast to {compute}" in str(error)
        return True
    return False


def test_what_changes_packed_bytes_is_refused_and_what_is_stored_as_computed_is_not(tmp_path):
    mp.spawn(gather, (str(tmp_path),), nprocs=2)
    changed = json.loads((tmp_path / "changed.json").read_text())
    assert changed["bfloat16 float16"] > 0.9
    for pair, share in changed.items():
        storage, compute = pair.split()
        assert is_refused(storage, compute) == (storage != compute)
        assert not share or storage != compute, pair


def test_the_launched_process_refuses_what_auto_came_to(miniature, monkeypatch):
    recipe = miniature("quickstart", "tracking=null", BITS, f"{STORAGE}=bfloat16")
    # Nothing says the precision but the machine
    recipe = replace(recipe, model={key: value for key, value in recipe.model.items() if key != "dtype"})
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: False)
    with pytest.raises(RecipeError, match="stored as bfloat16 would be cast to float32"):
        train(recipe, "cast")
    assert not open_run("cast").folder.exists() and "WORLD_SIZE" not in os.environ
