"""Decide together what the processes of a training do: each may run on a machine with a disk of its own."""

import platform
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import uuid4

from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

from medibot.errors import Problem, RecipeError
from medibot.recipe import find_differences
from medibot.run import Run, checkpoint_step, locked


def from_first(read: Callable[[], Any]) -> Any:
    """Return what `read` returns in the first process, which alone calls it: others may not see the same disk."""
    return broadcast_object_list([read() if PartialState().is_main_process else None])[0]


@contextmanager
def together() -> Generator[None]:
    """Raise in every process the mistakes that any of them finds: the others would wait for it for ever.

    What is done within takes no part in collectives.
    """
    found: list[Problem] = []
    try:
        yield
    except RecipeError as error:
        found = list(error.problems)
    here = platform.node()
    told = gather_object([(here, problem) for problem in found])
    if told:
        named = [one if node == here else replace(one, what=f"{one.what} (on {node})") for node, one in told]
        raise RecipeError(list(dict.fromkeys(named)))


def require_same(parts: dict[str, Any]) -> None:
    """Raise RecipeError where a process would train on other data, weights or packages than the first."""
    first = from_first(lambda: parts)
    with together():
        if changed := find_differences(first, parts):
            key, was, now = changed[0]
            what = f"{key} is {was!r} in the first process and {now!r} in another"
            raise RecipeError.of("accelerate", what, "bring the same recipe, data, model and packages to each machine")


@contextmanager
def holding(run: Run) -> Generator[bool]:
    """Hold the run's folder on each disk; give whether this process is the one that keeps its machine's."""
    state = PartialState()
    with ExitStack() as held:
        with together():
            if state.is_main_process:
                held.enter_context(locked(run))
        # A name that no file system can have cached
        seen = run.folder.with_name(f".{run.name}.{from_first(lambda: uuid4().hex)}")
        if state.is_main_process:
            seen.touch()
        state.wait_for_everyone()
        keeps = state.is_main_process or (state.is_local_main_process and not seen.exists())
        state.wait_for_everyone()
        seen.unlink(missing_ok=True)
        with together():
            if keeps and not state.is_main_process:
                held.enter_context(locked(run))
        yield keeps


def common_checkpoint(run: Run) -> Path | None:
    """Return the newest checkpoint that is whole on every disk; None if none was made. Raises RecipeError for a loss."""
    steps = gather_object([{checkpoint_step(folder) for folder in run.whole_checkpoints()}])
    common = set.intersection(*steps)
    if not common and any(steps):
        what = "no checkpoint is whole on every machine"
        raise RecipeError.of(str(run.checkpoints), what, "copy it to each, or choose another RUN=name")
    return run.checkpoints / f"checkpoint-{max(common)}" if common else None
