"""The answers to fixed questions while a recipe trains: computed as training computes, and left at a signal."""

import os
import signal

import pytest
import torch
from conftest import FOUR_STEPS, adapter, assert_same

from medibot.errors import Stopped
from medibot.model import generation
from medibot.run import open_run, read_lines
from medibot.training import record
from medibot.training.session import train

pytestmark = pytest.mark.slow
SETTINGS = [*FOUR_STEPS, "tracking=null", "quantization=null", "training.per_device_eval_batch_size=1"]
SETTINGS += ["evaluation.questions=['What is anemia?','What is gout?','Hi?']"]


def before_each(monkeypatch, call):
    """Call `call` with the number of the batch before each batch of questions."""
    batches = iter(range(1, 100))

    def answer(*given):
        call(next(batches))
        return generation.generate_answers(*given)

    monkeypatch.setattr(record, "generate_answers", answer)


# Three batches at the start, and after steps 2 and 4
@pytest.mark.parametrize(("batch", "step"), [(1, 0), (5, 2), (8, 4)], ids=["at the start", "inside", "at the end"])
def test_a_signal_is_obeyed_between_batches_and_no_answer_is_lost(batch, step, miniature, monkeypatch):
    asked = []

    def signal_at(number):
        asked.append(number)
        if number == batch:
            os.kill(os.getpid(), signal.SIGTERM)

    recipe = miniature("quickstart", *SETTINGS)
    train(recipe, "whole")
    with monkeypatch.context() as patch, pytest.raises(Stopped, match=f"stopped at step {step} of 4"):
        before_each(patch, signal_at)
        train(recipe, "stopped")
    assert asked[-1] == batch and open_run("stopped").record()["status"] == "stopped"
    train(recipe, "stopped")
    whole, stopped = (read_lines(open_run(name).answers) for name in ("whole", "stopped"))
    assert len(whole) == 9 and stopped == whole
    assert_same(adapter("stopped"), adapter("whole"))


def test_answers_are_computed_in_the_precision_of_training(miniature, monkeypatch):
    seen = []
    before_each(monkeypatch, lambda _: seen.append((torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"))))
    train(miniature("quickstart", *SETTINGS, "training.max_steps=1", "model.dtype=bfloat16"), "half")
    assert set(seen) == {(True, torch.bfloat16)}
    seen.clear()
    train(miniature("quickstart", *SETTINGS, "training.max_steps=1"), "float32")
    assert {enabled for enabled, _ in seen} == {False}
