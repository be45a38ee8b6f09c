"""Measure the emergency classifier: cross-validated on its own table, and on one that it has never seen.

    .venv/bin/python benchmarks/emergencies.py --wrong

The threshold follows from the first table alone: the highest one that finds 95 % of its emergencies when each fifth is
classified by what was fitted on the others.
"""

import argparse
import random
import time
from pathlib import Path
from typing import NamedTuple

from sklearn.model_selection import StratifiedKFold

from medibot.serving.emergencies import RECALL, THRESHOLD, Classifier, Message, read_table

HELD_OUT = Path(__file__).resolve().parent.parent / "tests" / "serving" / "emergencies-held-out.txt"


class Figures(NamedTuple):
    """How a table comes out at the threshold; `suicide` is the share of found emergencies told apart rightly."""

    urgent: int
    harmless: int
    recall: float
    precision: float
    suicide: float
    wrong: list[str]


def cross_validated(messages: list[Message], between: bool = False) -> tuple[list[float], list[float]]:
    """Return (danger, suicide) of each message by a classifier that was fitted on the other four fifths.

    `between` puts each between two harmless ones of its own fifth, as somebody writes who has more to say.
    """
    danger, suicide, draw = [0.0] * len(messages), [0.0] * len(messages), random.Random(0)
    kinds = [message.urgent + message.suicide for message in messages]
    for fit, held in StratifiedKFold(5, shuffle=True, random_state=0).split(kinds, kinds):
        classifier = Classifier([messages[place] for place in fit])
        harmless = [messages[place].text for place in held if not messages[place].urgent]
        for place in held:
            first, last = draw.sample(harmless, 2) if between else ("", "")
            text = " ".join(f"{part.rstrip('.')}." for part in (first, messages[place].text, last) if part)
            danger[place], suicide[place] = classifier.probabilities(text if between else messages[place].text)
    return danger, suicide


def choose_threshold(messages: list[Message], danger: list[float]) -> float:
    """Return the highest threshold at which RECALL of the urgent messages are found."""
    urgent = sorted((p for p, message in zip(danger, messages, strict=True) if message.urgent), reverse=True)
    return urgent[-(-int(len(urgent) * RECALL * 1000) // 1000) - 1]


def figures(messages: list[Message], danger: list[float], suicide: list[float]) -> Figures:
    """Return what the probabilities come to at the threshold."""
    rows = list(zip(messages, danger, suicide, strict=True))
    found = [(message, s) for message, d, s in rows if d >= THRESHOLD]
    hits = [(message, s) for message, s in found if message.urgent]
    urgent = sum(message.urgent for message in messages)
    right = sum((s >= 0.5) == message.suicide for message, s in hits)
    wrong = [f"{'+' if m.urgent else '-'} {d:.2f} {m.text}" for m, d, _ in rows if (d >= THRESHOLD) != m.urgent]
    recall, precision = len(hits) / urgent, len(hits) / len(found)
    return Figures(urgent, len(messages) - urgent, recall, precision, right / len(hits), wrong)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--wrong", action="store_true", help="show what is missed and what is a false alarm")
    given = parser.parse_args()
    messages, held_out = read_table(), read_table(HELD_OUT)
    started = time.perf_counter()
    fitted = Classifier(messages)
    print(f"fitted in {time.perf_counter() - started:.2f} s on {len(messages)} messages")
    danger, suicide = cross_validated(messages)
    print(f"threshold for a recall of {RECALL:.0%}: {choose_threshold(messages, danger):.3f} (in use: {THRESHOLD})")
    unseen = zip(*(fitted.probabilities(message.text) for message in held_out), strict=True)
    for name, found in (
        ("cross-validated", figures(messages, danger, suicide)),
        ("the same between two harmless ones", figures(messages, *cross_validated(messages, between=True))),
        ("held out", figures(held_out, *map(list, unseen))),
    ):
        counts = f"{found.urgent} + {found.harmless} messages"
        rates = f"recall {found.recall:.3f}, precision {found.precision:.3f}, suicide told apart {found.suicide:.3f}"
        print(f"{name}: {counts}, {rates}")
        print("\n".join(f"  {line}" for line in found.wrong if given.wrong))


if __name__ == "__main__":
    main()
