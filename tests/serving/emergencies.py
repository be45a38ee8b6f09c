"""Recall and precision of the emergency rules on both tables: .venv/bin/python tests/emergencies.py"""

from pathlib import Path
from typing import NamedTuple

from medibot import care


class Figures(NamedTuple):
    """How the rules do on a table, and the lines that they get wrong."""

    urgent: int
    other: int
    recall: float
    precision: float
    wrong: list[str]


def lines(name: str) -> list[str]:
    """The messages of tests/<name>.txt, each behind "+ " (should be seen) or "- "."""
    text = (Path(__file__).parent / f"{name}.txt").read_text(encoding="utf-8")
    return [line for line in text.splitlines() if line[:2] in {"+ ", "- "}]


def figures(name: str) -> Figures:
    seen = {line: care.danger(line[2:]) is not None for line in lines(name)}
    urgent = [line for line in seen if line[0] == "+"]
    hits = sum(seen[line] for line in urgent)
    wrong = [line for line, found in seen.items() if found != (line[0] == "+")]
    return Figures(len(urgent), len(seen) - len(urgent), hits / len(urgent), hits / sum(seen.values()), wrong)


if __name__ == "__main__":
    for name in ("emergencies", "emergencies-held-out"):
        found = figures(name)
        print(
            f"{name}: {found.urgent} + {found.other} messages, recall {found.recall:.3f}, precision {found.precision:.3f}"
        )
        print("\n".join(f"  {line}" for line in found.wrong))
