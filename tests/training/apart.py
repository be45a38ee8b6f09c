"""Train on a machine that shares no disk with the other; started once for each of two ranks, gloo between them.

    RANK=0 WORLD_SIZE=2 LOCAL_RANK=0 … python tests/training/apart.py JSON

JSON: {"outputs": one folder a rank, "overrides": of the quickstart}. Prints a line of JSON for each training: what it
came to.
"""

import json
import os
import shutil
import signal
import sys
from pathlib import Path

from medibot.errors import RecipeError, Stopped
from medibot.model import generation
from medibot.recipe import load_recipe
from medibot.run import open_run
from medibot.training import record, session
from medibot.training.record import Record

ROOT, RANK = Path(__file__).resolve().parents[2], int(os.environ["RANK"])
GIVEN = json.loads(sys.argv[1])
os.environ["MEDIBOT_OUTPUTS"] = GIVEN["outputs"][RANK]
os.environ["MEDIBOT_CACHE"] = GIVEN["outputs"][RANK] + "-cache"
ASKED: list[int] = []


class Signalled(Record):
    """A record whose second machine is signalled when a step begins."""

    def on_step_begin(self, args, state, *rest, **kwargs):
        if state.global_step == 3 and RANK:
            os.kill(os.getpid(), signal.SIGTERM)
        super().on_step_begin(args, state, *rest, **kwargs)


def count_prompts(model, tokenizer, prompts, *rest):
    """Count what this process is asked."""
    ASKED.append(len(prompts))
    return generation.generate_answers(model, tokenizer, prompts, *rest)


def train(name: str, *more: str, signalled: bool = False) -> None:
    session.Record = Signalled if signalled else Record
    try:
        session.train(load_recipe("quickstart", [*GIVEN["overrides"], *more], root=ROOT), name)
        came_to = "finished"
    except (RecipeError, Stopped) as error:
        came_to = str(error)
    print("RESULT", json.dumps([name, came_to, ASKED]), flush=True)
    ASKED.clear()


record.generate_answers = count_prompts
train("stopped", signalled=True)
train("stopped")
train("stopped")
train("other", *(["data.limit={train: 6}"] if RANK else []))
train("wrong", *(["data.path=none.jsonl"] if RANK else []))
os.environ["ACCELERATE_USE_FSDP"] = "true"
train("shards")
del os.environ["ACCELERATE_USE_FSDP"]
train("lost", signalled=True)
if RANK:
    shutil.rmtree(open_run("lost").checkpoints)
train("lost")
