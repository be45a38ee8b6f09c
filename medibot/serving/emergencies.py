"""Tell people in danger where to call, before a model answers them.

A linear classifier decides, fitted on emergencies.txt when it is first asked and measured by `benchmarks/emergencies.py`:
a safety net with holes. That it stays silent does not mean that nothing is wrong.
"""

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

NOTICE = (
    "Not a medical device and no diagnosis: general health information that can be wrong or out of date. "
    "Ask a professional; in an emergency, call for help."
)
EMERGENCY = (
    "This may be an emergency. Do not wait for an answer here: call your emergency number now "
    "(112 in Europe and on most mobile phones, 911 in North America, 999 in the UK, 000 in Australia)."
)
CRISIS = (
    "If you or someone near you may come to harm, call your emergency number now, or talk to someone: "
    "988 in the US and Canada, 116 123 in the UK and Ireland, or findahelpline.com for other countries. You are not alone."
)
TABLE = Path(__file__).with_name("emergencies.txt")
# The highest probability that finds RECALL of the emergencies of five held-out folds of the table; a test recomputes it
RECALL, THRESHOLD = 0.95, 0.37


@dataclass(frozen=True)
class Message:
    """One line of a table: its text, whether somebody is in danger now, and the section that it is in."""

    text: str
    urgent: bool
    section: str

    @property
    def suicide(self) -> bool:
        """Tell whether the danger is suicide or self-harm, which has helplines of its own."""
        return self.urgent and self.section in ("mind", "suicide and self-harm", "suicidal intent")


def read_table(file: Path = TABLE) -> list[Message]:
    """Read a table: sections begin with "# ", messages with "+ " (danger) or "- " (none)."""
    messages, section = [], ""
    for line in file.read_text(encoding="utf-8").splitlines():
        if line.startswith("# "):
            section = line[2:]
        elif line[:2] in {"+ ", "- "}:
            messages.append(Message(line[2:], line[0] == "+", section))
    return messages


def normalize(text: str) -> str:
    """Fold case, apostrophes and white space, and mark one or two words: mostly the name of a thing to read about."""
    text = " ".join(text.lower().replace("\u2019", "'").split())
    return text if len(re.findall(r"[\w']+", text)) > 2 else f"{text} twowords"


class Classifier:
    """TF-IDF of words (1-2) and of characters within words (2-5), and logistic regressions for danger and suicide."""

    def __init__(self, messages: list[Message]) -> None:
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_union

        shared: dict[str, Any] = {"sublinear_tf": True, "min_df": 2}
        self.features = make_union(
            TfidfVectorizer(ngram_range=(1, 2), token_pattern=r"[\w']+", **shared),
            TfidfVectorizer(ngram_range=(2, 5), analyzer="char_wb", **shared),
        )
        found = self.features.fit_transform([normalize(message.text) for message in messages])
        urgent = [message.urgent for message in messages]
        self.danger = LogisticRegression(C=10, solver="liblinear").fit(found, urgent)
        kinds = [message.suicide for message in messages if message.urgent]
        self.suicide = LogisticRegression(C=10, solver="liblinear", class_weight="balanced").fit(found[urgent], kinds)

    def probabilities(self, text: str) -> tuple[float, float]:
        """Return the probability of danger, and of suicide if there is danger.

        Each is the mean of the whole message's and its most urgent sentence's: the whole alone misses a danger
        between harmless sentences, and a sentence alone lacks its context.
        """
        parts = [normalize(part) for part in (text, *re.split(r"(?<=[.?!])\s+|\n+", text.strip()))]
        found = self.features.transform(parts)
        danger, suicide = (model.predict_proba(found)[:, 1] for model in (self.danger, self.suicide))
        urgent = 1 + danger[1:].argmax()
        return float(danger[0] + danger[urgent]) / 2, float(suicide[0] + suicide[urgent]) / 2


@cache
def fitted() -> Classifier:
    """Return the classifier of the whole table; fitting takes a quarter of a second."""
    return Classifier(read_table())


def emergency_notice(message: str) -> str | None:
    """Return what comes before the model's answer to somebody who is in danger now; None where no danger is found."""
    danger, suicide = fitted().probabilities(message)
    notice = CRISIS if suicide >= 0.5 else EMERGENCY
    return notice if danger >= THRESHOLD else None
