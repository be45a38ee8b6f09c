"""The two ways in which a command ends early: an author's mistake, and a signal."""

import re
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

# As torch, CUDA's libraries, numpy and the system say that memory ran out
OUT_OF_MEMORY = re.compile(r"out of memory|(can't|cannot|unable to) allocate|ALLOC(ATION)?_FAILED", re.IGNORECASE)


class Place(NamedTuple):
    """Where something was written: a file's line and column, or an override (its own text, line 0, its number)."""

    file: str
    line: int
    column: int


@dataclass(frozen=True)
class Problem:
    """One mistake of an author: where, what, and what to write instead."""

    file: str
    line: int
    column: int
    key: str
    what: str
    remedy: str = ""

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}:{self.column}" if self.line else self.file
        text = ": ".join(part for part in (place, shorten(self.key), shorten(self.what)) if part)
        text += f" ({self.remedy})" if self.remedy else ""
        # A key may hold anything, and this goes to a terminal as one line
        return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def shorten(text: str, most: int = 600) -> str:
    """Return `text`, or its beginning: a value that someone pasted must not fill the screen."""
    return text if len(text) <= most else f"{text[: most - 30]}… ({len(text):,} characters)"


class RecipeError(Exception):
    """The author's mistakes, one a line; never a defect of MediBot."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__(self.problems)

    def __str__(self) -> str:
        return "\n".join(str(problem) for problem in self.problems)

    @classmethod
    def of(cls, subject: str, what: str, remedy: str = "") -> "RecipeError":
        """Make a mistake that has no place in a file: `data.path: no such file (…)`."""
        return cls([Problem("", 0, 0, subject, what, remedy)])


class Stopped(Exception):
    """A signal ended the training at a step boundary, and the checkpoint of that step is whole."""


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether a device's or the machine's memory ran out, here or in what caused this error."""
    causes = (error, error.__cause__) if error.__cause__ else (error,)
    return any(isinstance(cause, MemoryError) or OUT_OF_MEMORY.search(str(cause)) for cause in causes)


@contextmanager
def explain_memory(subject: str, remedy: str) -> Generator[None]:
    """Turn memory that runs out into a RecipeError, which says what to do; also a function's decorator."""
    try:
        yield
    except Exception as error:  # upstream says it by many types
        if isinstance(error, RecipeError) or not is_out_of_memory(error):
            raise
        said = shorten(one_line(error.__cause__ or error), 200)
        raise RecipeError.of(subject, f"out of memory: {said}", remedy) from error


def one_line(error: BaseException) -> str:
    """Return an exception's text as one line."""
    return " ".join(str(error).split())
