"""Train recipes with real FSDP2 on CPU processes; started by accelerate launch with accelerate_configs/fsdp2.yaml.

    accelerate launch --config_file fsdp2.yaml --num_processes 2 tests/sharded.py JSON

JSON: {run name: overrides of the quickstart}. accelerate gives FSDP to accelerators only and trains plain data parallel
on CPUs in silence; the one gate that says so is opened here. Everything behind it is what a GPU would run, with gloo in
the place of nccl.
"""

import gc
import json
import os
import sys
from pathlib import Path

# As the verbs: imports leave no garbage
gc.set_threshold(10_000)

import torch.distributed as dist  # noqa: E402
from accelerate import state  # noqa: E402
from accelerate.utils import DistributedType  # noqa: E402

os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
state.PartialState._prepare_backend = lambda *_: ("gloo", DistributedType.MULTI_GPU)

from medibot.recipe import load_recipe  # noqa: E402
from medibot.training.session import train  # noqa: E402

dist.init_process_group("gloo")
for name, overrides in json.loads(sys.argv[1]).items():
    train(load_recipe("quickstart", overrides, root=Path(__file__).resolve().parents[2]), name)
    assert state.PartialState().distributed_type == DistributedType.FSDP
dist.destroy_process_group()
