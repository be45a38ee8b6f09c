"""Score one answer against its reference."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics.chrf import CHRF as ChrF

from medibot.recipe.files import read_data

# A unit's spellings, as a regular expression, and its symbol
UNITS: dict[str, str] = read_data(__file__, "units.yaml")
WRITTEN = r"(?<![\w.,-])(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?![.,]?\d)"
NUMBER, LIST_MARKER = re.compile(WRITTEN), re.compile(r"^\s*\d+[.)](?=\s)", re.MULTILINE)
UNIT = rf"({'|'.join(f'(?:{names})' for names in UNITS)})(?:\s?/\s?(dl|ml|l|kg|day))?(?![a-z])"
DOSE = re.compile(rf"({WRITTEN})[\s-]?{UNIT}", re.IGNORECASE)
ROUGE_L, CHRF = RougeScorer(["rougeL"]), ChrF(word_order=2)
# Its signature counts references, which it knows only after a first score
CHRF.corpus_score(["a"], [["a"]])
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Metric:
    """`numerator` and `denominator` name keys of a row's scores; without a denominator it is a mean over rows.

    The value on some rows is the ratio of the two sums, or its exponential. A ratio of scale "log_distance" is best at
    1: it is compared by the absolute value of its logarithm. Where neither more nor less is better, values only differ.
    """

    name: str
    label: str
    numerator: str
    better: Literal["lower", "higher", "neither"]
    definition: str
    denominator: str | None = None
    scale: Literal["ratio", "exp", "log_distance"] = "ratio"

    @property
    def counts_tokens(self) -> bool:
        """Return whether the value depends on what a tokenizer calls a token."""
        return not {"tokens", "thinking_tokens"}.isdisjoint((self.numerator, self.denominator))


MEASURES = tuple(
    Metric(name, **said | {"definition": said["definition"].format(chrf=CHRF.get_signature())})
    for name, said in read_data(__file__, "metrics.yaml").items()
)
# The last is thinking tokens
METRICS = MEASURES[:-1]


def choose_metrics(lines: Sequence[Row]) -> tuple[Metric, ...]:
    """Return what these lines of rows.jsonl are measured by: their thinking too, where anything thinks."""
    return MEASURES if "reference_thinking" in lines[0] else METRICS


def name_references(lines: Sequence[Row]) -> str:
    """Return in words what the likelihood is of."""
    thought = any(line.get("reference_thinking") for line in lines)
    return f"reference answers{' with their thinking' if thought else ''}"


def score_answer(answer: str, reference: str) -> dict[str, float]:
    """Return the scores of one generated answer that need no model; see METRICS for what each is."""
    return {
        "rouge_l": ROUGE_L.score(reference, answer)["rougeL"].fmeasure,
        "chrf": CHRF.sentence_score(answer, [reference]).score,
        "answer_words": len(answer.split()),
        "reference_words": len(reference.split()),
        "repetition": repetition(answer),
        "foreign_numbers": len(numbers(answer) - numbers(reference)),
        "foreign_doses": len(doses(answer) - doses(reference)),
    }


def repetition(text: str) -> float:
    """Return the share of word 4-grams that were in the text before."""
    words = text.lower().split()
    grams = list(zip(words, words[1:], words[2:], words[3:], strict=False))
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def numbers(text: str) -> set[float]:
    """Return the different numbers of a text, as values."""
    return {float(number.replace(",", "")) for number in NUMBER.findall(LIST_MARKER.sub("", text))}


def doses(text: str) -> set[tuple[float, str]]:
    """Return the different (number, unit) pairs of a text, spelled-out units under their symbols."""
    found = set()
    for number, unit, per in DOSE.findall(text):
        symbol = next(short for names, short in UNITS.items() if re.fullmatch(names, unit, re.IGNORECASE))
        found.add((float(number.replace(",", "")), f"{symbol}/{per.lower()}" if per else symbol))
    return found
