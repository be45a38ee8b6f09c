"""TODO."""

import os
import shutil
import signal
import time
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import PartialState
from safetensors import SafetensorError

from medibot.errors import RecipeError
from medibot.planning.hardware import GB
from medibot.planning.plan import Plan
from medibot.run import Run, is_disk_error
from medibot.training.trainer import CountingTrainer


class Signals:
    """SIGTERM, SIGINT and SIGHUP ask for a stop at the next step boundary; another one a second later ends at once."""

    def __init__(self) -> None:
        self.received: float | None = None

    def __enter__(self) -> "Signals":
        self.before = {number: signal.signal(number, self.note) for number in SIGNALS if is_handled(number)}
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def note(self, number: int, _: Any) -> None:
        # Whoever signals a process group often reaches a process twice
        if self.received and time.monotonic() - self.received > 1:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.received = self.received or time.monotonic()


SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def is_handled(number: int) -> bool:
    """Whether the signal is not ignored, as nohup ignores SIGHUP."""
    return signal.getsignal(number) != signal.SIG_IGN


@contextmanager
def explained(this: Run, trainer: CountingTrainer, planned: Plan) -> Generator[None]:
    """What a machine runs out of, in one line: memory, disk, or the right to write."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        last = this.last_checkpoint()
        kept = f"{last.name} is whole" if last else "no checkpoint is whole yet"
        if out_of_memory(error):
            rows, needed = trainer.args.per_device_train_batch_size, planned.memory()["peak"] / GB
            what = f"out of memory at {rows} rows of up to {planned.longest} tokens ({kept})"
            remedy = f"the plan was {needed:.1f} of {planned.device.capacity / GB:.1f} GB: {planned.advice()}"
            raise RecipeError.of("training", what, remedy) from error
        if is_disk_error(error):
            free = shutil.disk_usage(this.folder).free
            why = " ".join(str(error).split())
            what = f"cannot be written, {free / 1e9:.1f} GB free: {why} ({kept})"
            raise RecipeError.of(str(this.folder), what, "make room; the same command then goes on") from error
        if PartialState().num_processes > 1 and peer_lost(error):
            what = f"another process of this run ended, or cannot be reached ({kept})"
            raise RecipeError.of("accelerate", what, "what it said stands above; the same command goes on") from error
        raise


def out_of_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def peer_lost(error: Exception) -> bool:
    """A collective that lost a process, as gloo and nccl say it."""
    said = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited")
    return any(words in str(error) for words in said)
