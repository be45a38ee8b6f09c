"""Rules that fit any question-answering data.

A function whose first parameter is `row` or `rows` is a rule: the former takes one row and returns it, a changed copy, or
None to drop it; the latter takes all rows as they stream by, and yields what it leaves of them in their order.
"""

import hashlib
import itertools
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator
from functools import lru_cache
from typing import Any

Row = dict[str, Any]
# What `fold` does to ASCII, where most texts end: several times faster than the search for words
ASCII_FOLDED = {code: chr(code).lower() if chr(code).isalnum() else " " for code in range(128)}


# A row's text is compared by several rules on its way
@lru_cache(maxsize=2048)
def fold(text: str) -> str:
    """`text` without differences of case, Unicode form, punctuation and white space: equal when the words are equal."""
    if text.isascii():
        return " ".join(text.translate(ASCII_FOLDED).split())
    return " ".join(re.findall(r"[^\W_]+", unicodedata.normalize("NFKC", text).casefold()))


def asked(old: Row) -> str:
    """Return all that a row asks, by its words: the question with what was said before it."""
    return fold(" ".join([*(turn["content"] for turn in old.get("history", [])), old["prompt"] or ""]))


def with_text(old: Row, column: str, text: str) -> Row:
    """The row itself when `text` already stands in `column`, else a copy that holds it."""
    return old if text == (old[column] or "") else {**old, column: text}


def drop_unanswered(row: Row) -> Row | None:
    """Drop rows without an answer: missing, blank, or the word that some exports write for a missing value."""
    return None if (row["completion"] or "").strip().lower() in ("", "null", "none", "nan") else row


def drop_unasked(row: Row) -> Row | None:
    """Drop rows without a question."""
    return row if fold(row["prompt"] or "") else None


def normalise_whitespace(row: Row) -> Row:
    """Leave one space between words, none at the ends of lines, at most one blank line; the question on one line."""
    answer = (row["completion"] or "").replace("\r\n", "\n")
    # Most answers have nothing but lone spaces, which is told much faster than mended
    if " ".join(answer.split()) != answer:
        answer = re.sub(r"[^\S\n]{2,}|[^\S\n ]", " ", answer)
        answer = re.sub(r"\n{3,}", "\n\n", "\n".join(line.strip(" ") for line in answer.split("\n"))).strip()
    return with_text(with_text(row, "completion", answer), "prompt", " ".join((row["prompt"] or "").split()))


def drop_echoes(row: Row) -> Row | None:
    """Drop answers that only repeat the question, in its own words or as one other question."""
    answer = (row["completion"] or "").strip()
    echo = re.fullmatch(r"[^?.!]+\?", answer) or (answer and fold(answer) == fold(row["prompt"] or ""))
    return None if echo else row


def drop_short(row: Row, min_words: int = 5) -> Row | None:
    """Drop answers of fewer than `min_words` words."""
    return row if len((row["completion"] or "").split()) >= min_words else None


def drop_longer_than(row: Row, max_words: int) -> Row | None:
    """Drop answers of more than `max_words` words, which a short context would cut in the middle of a sentence."""
    return row if len((row["completion"] or "").split()) <= max_words else None


def drop_repetitive(row: Row, window: int = 8, share: float = 0.25) -> Row | None:
    """Drop answers of whose runs of `window` words a part of at least `share` stood there before."""
    words = fold(row["completion"] or "").split()
    # Where a window stood before, so did its first two words: counting those acquits most answers
    pairs = list(itertools.pairwise(words))
    if window > 1 and len(pairs) - len(set(pairs)) < share * (len(words) - window + 1):
        return row
    windows = list(zip(*(words[start:] for start in range(window)), strict=False))
    repeats = len(windows) - len(set(windows))
    return None if repeats and repeats >= share * len(windows) else row


def drop_duplicates(rows: Iterable[Row]) -> Iterator[Row]:
    """Keep the first row of each pair of question and answer, compared by their words."""
    return first_copies(lambda row: digest(f"{asked(row)}\0{fold(row['completion'] or '')}"), rows)


def drop_repeated_questions(rows: Iterable[Row], per: str | None = None) -> Iterator[Row]:
    """Keep the first row of each question; with `per`, of each question in each value of that column."""
    return first_copies(lambda row: (digest(asked(row)), row.get(per) if per else None), rows)


def limit_repeated_answers(rows: Iterable[Row], copies: int = 3) -> Iterator[Row]:
    """Keep the first `copies` rows of each answer, so that boilerplate is not learnt hundreds of times."""
    return first_copies(lambda row: digest(fold(row["completion"] or "")), rows, copies)


def digest(text: str) -> bytes:
    """Return 16 bytes in the place of a text: to tell a million apart takes no room for them."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def first_copies(key: Callable[[Row], Hashable], rows: Iterable[Row], copies: int = 1) -> Iterator[Row]:
    """Yield the first `copies` rows of each key, in their order."""
    seen: Counter[Hashable] = Counter()
    for row in rows:
        found = key(row)
        seen[found] += 1
        if seen[found] <= copies:
            yield row
