"""End a training well: on a signal, and when the machine runs out of something."""

import os
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
from medibot.run import Run, disk_error, is_disk_error
from medibot.training.trainer import CountingTrainer

# A collective that lost a process, as gloo and nccl say it
PEER_LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited")


class Signals:
    """Take SIGTERM, SIGINT and SIGHUP as a request to stop at the next step; another a second later ends at once."""

    def __init__(self) -> None:
        self.received: float | None = None

    def __enter__(self) -> "Signals":
        numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
        # An ignored one stays so, as nohup wants it
        self.before = {
            number: signal.signal(number, self.note) for number in numbers if signal.getsignal(number) != signal.SIG_IGN
        }
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def note(self, number: int, _: Any) -> None:
        """Note the first signal; end the process at another one."""
        # Whoever signals a process group often reaches a process twice
        if self.received and time.monotonic() - self.received > 1:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.received = self.received or time.monotonic()


@contextmanager
def explained(run: Run, trainer: CountingTrainer, plan: Plan) -> Generator[None]:
    """Turn what a machine runs out of into a RecipeError: memory, disk, the right to write, another process."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        last = run.last_checkpoint()
        kept = f"{last.name} is whole" if last else "no checkpoint is whole yet"
        if isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error):
            rows, needed = trainer.args.per_device_train_batch_size, plan.memory()["peak"] / GB
            what = f"out of memory at {rows} rows of up to {plan.longest} tokens ({kept})"
            remedy = f"the plan was {needed:.1f} of {plan.device.capacity / GB:.1f} GB: {plan.advice()}"
            raise RecipeError.of("training", what, remedy) from error
        if is_disk_error(error):
            raise disk_error(run.folder, error, f"{kept}; make room: the same command then goes on") from error
        if PartialState().num_processes > 1 and any(words in str(error) for words in PEER_LOST):
            what = f"another process of this run ended, or cannot be reached ({kept})"
            raise RecipeError.of("accelerate", what, "what it said is above; the same command goes on") from error
        raise
