"""Find the training questions nearest to a question, with their sources: what an answer can rest on.

The similarity is the share of a topic's TF-IDF weight (squared, character n-grams of 3 to 5 within words) that the
question holds; without a column of topics the training question takes the topic's place. The cosine of whole questions
separates a little better in the lab, but falls with each word that people add. The threshold is measured on the
validation split, whose topics training never sees; `tests/serving/asked.py` tries it in people's own words.
"""

import re
from typing import Any

import numpy
from datasets import Dataset
from scipy.sparse import csr_matrix
from sklearn.feature_extraction.text import HashingVectorizer, TfidfTransformer
from sklearn.metrics import roc_curve
from sklearn.pipeline import make_pipeline

from medibot.data.columns import kept_name
from medibot.data.prepared import Prepared
from medibot.recipe import Recipe
from medibot.run import Run, read_json

FILE = "evidence.json"
NO_MATCH = "Nothing close in the training data: be careful with this answer."
CLOSE = "Nearest in the training data (1.00: your question names all of its topic):"
# "How is it treated?" asks about what was asked before; a question on something new must not borrow its sources
POINTS_BACK = re.compile(r"\b(?:it|its|they|them|their|this|that|these|those)\b")
# What a recipe may name a column for: `evaluation.evidence`
COLUMNS = ("topic", "source", "document", "url")


class Evidence:
    """The `rows` of one run, a question and what the recipe names of COLUMNS; from `threshold` on one is close."""

    def __init__(self, rows: list[dict[str, Any]], threshold: float = 1.0) -> None:
        self.rows, self.threshold = rows, threshold
        # Hashed, so that what was never seen counts as rare instead of being left out
        self.counts = HashingVectorizer(
            analyzer="char_wb", ngram_range=(3, 5), alternate_sign=False, norm=None, preprocessor=normalize
        )
        self.vectors = make_pipeline(self.counts, TfidfTransformer(sublinear_tf=True))
        self.questions = self.vectors.fit_transform([row["question"] for row in rows])
        self.topics = self.topic_weights(rows)

    @classmethod
    def of(cls, run: Run) -> "Evidence | None":
        """Load that of a finished run; None for one that was trained before there was any."""
        record = read_json(run.folder / FILE) if (run.folder / FILE).is_file() else None
        return cls(record["rows"], record["threshold"]) if record else None

    def topic_weights(self, rows: list[dict[str, Any]]) -> csr_matrix:
        """Return the squared TF-IDF weights of each row's topic, which sum to one: [n-grams, rows]."""
        return self.vectors.transform([row["topic"] or row["question"] for row in rows]).power(2).T.tocsr()

    def shares(self, question: str, topics: csr_matrix) -> numpy.ndarray:
        """Return how much of each topic's weight a question holds, from 0 to 1."""
        held = self.counts.transform([question])
        held.data[:] = 1
        return (held @ topics).toarray()[0]

    def find(self, asked: list[str], count: int = 3) -> dict[str, Any]:
        """Return whether anything is `close`, what is `said` of it, and `sources`: the close ones, or the nearest.

        Of the questions of a conversation the last counts, with the one before it where it points back and alone is
        not close.
        """
        shares = self.shares(asked[-1], self.topics)
        cosines = (self.vectors.transform(asked[-1:]) @ self.questions.T).toarray()[0]
        # Which of a topic's questions it is, and which of two topics that are both named in full, the whole wording says
        order = numpy.lexsort((-(shares + cosines), shares < self.threshold))[:count]
        near = shares.round(3)
        close = [row for row in order if near[row] >= self.threshold]
        if not close and len(asked) > 1 and POINTS_BACK.search(asked[-1].lower()):
            return self.find([" ".join(asked[-2:])])
        sources = [self.rows[row] | {"similarity": float(near[row]), "row": int(row)} for row in close or order[:1]]
        return {"close": bool(close), "said": CLOSE if close else NO_MATCH, "sources": sources}

    def lines(self, asked: list[str]) -> list[str]:
        """Return what is shown under an answer."""
        found = self.find(asked)
        lines = [found["said"]]
        for source in found["sources"]:
            names = [source["topic"] and f"topic: {source['topic']}", *(source[name] for name in COLUMNS[1:])]
            where = "; ".join(filter(None, names)) or f"row {source['row']}"
            lines.append(f"  {source['similarity']:.2f}  {source['question']}  ({where})")
        return lines


def normalize(text: str) -> str:
    """Return `text` in lower case, without apostrophes, punctuation as space."""
    return re.sub(r"[\W_]+", " ", re.sub(r"['\u2019]", "", text.lower()))


def require_columns(recipe: Recipe, train: Dataset) -> None:
    """Raise RecipeError where the recipe names a column for evidence that its data does not have."""
    for name, column in recipe.evaluation.evidence.items():
        if kept_name(column) not in train.column_names:
            what = f"{recipe.data.described} has no column {column!r}"
            raise recipe.error(f"evaluation.evidence.{name}", what, f"it has {', '.join(train.column_names)}")


def build_evidence(recipe: Recipe, prepared: Prepared) -> dict[str, Any]:
    """Return the content of `evidence.json`: training questions with sources, the threshold, what it was measured on."""
    train, validation = prepared.load("train"), prepared.load("validation")
    rows, groups = read_questions(recipe, train)
    asked, own = read_questions(recipe, validation or train)
    asked, own = asked[:1000], own[:1000]
    evidence = Evidence(rows)
    topics = evidence.topic_weights(asked)
    # Each question's highest similarity to training rows of other groups, and to others of its own group. Nothing was
    # trained on for the former, and for the latter something was: what lies between tells them apart
    highest = numpy.full((2, len(asked)), -1.0)
    for place, row in enumerate(asked):
        others, mates = groups != own[place], own == own[place]
        mates[place] = False
        highest[0, place] = evidence.shares(row["question"], evidence.topics).max(initial=-1, where=others)
        highest[1, place] = evidence.shares(row["question"], topics).max(initial=-1, where=mates)
    unseen, seen = (found[found >= 0] for found in highest)
    # No group has a second question: what 9 of 10 questions on unseen topics stay below
    threshold = round(float(numpy.quantile(unseen, 0.9)), 3) if len(unseen) else 1.0
    if len(seen) and len(unseen):
        # The best by Youden's index (Cancer 3(1), 1950), the share of `seen` not below it less that of `unseen`; or
        # rather the lowest within one standard error of it, for people misspell
        labels = numpy.repeat([1, 0], [len(seen), len(unseen)])
        # Rounded down, so that the question at the threshold stays close
        scores = numpy.floor(numpy.concatenate([seen, unseen]) * 1000) / 1000
        wrong, caught, candidates = roc_curve(labels, scores, drop_intermediate=False)
        gain, error = caught - wrong, (caught * (1 - caught) / len(seen) + wrong * (1 - wrong) / len(unseen)) ** 0.5
        threshold = float(candidates[gain >= gain.max() - error[gain.argmax()]].min())
    measured = {
        "split": "validation" if validation else "train",
        "unseen_topics": len(unseen),
        "unseen_below": round(float((unseen < threshold).mean()), 3) if len(unseen) else None,
        "seen_topics": len(seen),
        "seen_close": round(float((seen >= threshold).mean()), 3) if len(seen) else None,
    }
    return {"threshold": threshold, "measured": measured, "rows": rows}


def read_questions(recipe: Recipe, split: Dataset) -> tuple[list[dict[str, Any]], numpy.ndarray]:
    """Return (question and sources of each row, its group of the split)."""
    named = {name: kept_name(column) for name, column in recipe.evaluation.evidence.items()}
    rows = []
    for row in split.select_columns(["prompt", "group", *named.values()]):
        sources = {name: row[named[name]] if name in named else None for name in COLUMNS}
        rows.append({"question": row["prompt"][-1]["content"]} | sources)
    return rows, numpy.array(split["group"])
