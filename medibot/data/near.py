"""Find texts that are nearly the same, among millions, by the word 3-grams that they share."""

import itertools
import os
import tempfile
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

# Two answers are near with this Jaccard index of their word 3-grams
NEAR = 0.8
# The last bits of a hash, by which a table says that it is in no query; and an odd number that tells words' places apart
LAST_BITS, ODD = np.uint64((1 << 25) - 1), np.uint64(0x9E3779B97F4A7C15)
# Fewer bits where they only say about how often a hash occurs
FEW_BITS = np.uint64((1 << 21) - 1)
# Texts are compared that share so many 3-grams of those by which one is found: chance alone makes two share one
SHARED = 2
# So many texts are compared at once
BATCH = 1000


class Grams:
    """The word 3-grams of folded texts, in a temporary file: memory holds only where each text's begin.

    A 3-gram is 64 bits of hash: that any two of a billion are mistaken for each other has a chance of 3 %, that this
    decides about a text none worth a thought. A text of fewer than three words is one 3-gram of its own.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - it lives as long as this
        self.ends = array("q", [0])

    def add(self, texts: Sequence[str]) -> None:
        """Append texts."""
        words = [text.split() for text in texts]
        words = [found if len(found) > 2 else [*found, "", "", ""][:3] for found in words]
        ends = np.cumsum([len(found) for found in words], dtype=np.int64)
        hashes = np.fromiter(map(hash, itertools.chain.from_iterable(words)), np.int64).view(np.uint64)
        # What begins at the last two words of a text would reach into the next
        within = np.ones(len(hashes), dtype=bool)
        within[ends - 1] = within[ends - 2] = False
        grams = (hashes[:-2] * ODD + hashes[1:-1]) * ODD + hashes[2:]
        self.file.write(grams[within[:-2]].tobytes())
        self.ends.extend((self.ends[-1] + ends - 2 * np.arange(1, len(ends) + 1)).tolist())

    def read(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the 3-grams of the texts at these ascending places in one array, and where each text's begin and end."""
        self.file.flush()
        ends, breaks = np.frombuffer(self.ends, np.int64), np.flatnonzero(np.diff(places) != 1)
        # Neighbours are read at once
        firsts, lasts = places[np.append(0, breaks + 1)], places[np.append(breaks, -1)]
        runs = zip((8 * ends[firsts]).tolist(), (8 * ends[lasts + 1]).tolist(), strict=True)
        parts = [os.pread(self.file.fileno(), end - start, start) for start, end in runs]
        lengths = ends[places + 1] - ends[places]
        return np.frombuffer(b"".join(parts), np.uint64), np.append(0, np.cumsum(lengths))

    def distinct(self, place: int) -> np.ndarray:
        """Return the distinct 3-grams of a text, ascending."""
        start, end = self.ends[place], self.ends[place + 1]
        return sort_distinct(np.frombuffer(os.pread(self.file.fileno(), 8 * (end - start), 8 * start), np.uint64))

    def batches(self, places: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Yield (places, 3-grams, where each text's begin and end) of some texts at a time."""
        for start in range(0, len(places), BATCH):
            some = places[start : start + BATCH]
            yield some, *self.read(some)


def find_near_texts(queries: Iterable[str], references: Iterable[str], threshold: float = NEAR) -> set[str]:
    """Return the folded texts of `queries` that equal a reference or have a word 3-gram Jaccard of `threshold` with one."""
    texts, rest, grams = list(dict.fromkeys(queries)), iter(references), Grams()
    for batch in (texts, *iter(lambda: list(itertools.islice(rest, BATCH)), [])):
        if batch:
            grams.add(batch)
    places = np.arange(len(grams.ends) - 1)
    near = find_near(grams, places[: len(texts)], places[len(texts) :], threshold)
    return {texts[place] for place in np.flatnonzero(near)}


def find_near(grams: Grams, queries: np.ndarray, references: np.ndarray, threshold: float = NEAR) -> np.ndarray:
    """Return for each of the texts at `queries` whether one at `references` is near it; all places ascend.

    Exact, by the prefix filter of Chaudhuri, Ganti and Kaushik (ICDE 2006), lengthened as by Wang, Li and Feng (SIGMOD
    2012): a near text shares at least m = ceil(threshold * n) of n 3-grams, and so at least k of any n - m + k of them.
    """
    near = np.zeros(len(queries), dtype=bool)
    index, owners, sizes = index_rare(grams, queries, threshold)
    # Most 3-grams of most references are in no query
    known = np.zeros(int(LAST_BITS) + 1, dtype=bool)
    known[index & LAST_BITS] = True
    for _, flat, starts in grams.batches(references):
        places = np.flatnonzero(known[flat & LAST_BITS])
        first, last = (np.searchsorted(index, flat[places], side) for side in ("left", "right"))
        texts = np.repeat(np.searchsorted(starts, places, "right") - 1, last - first)
        pairs, shared = np.unique(texts * len(queries) + owners[ranges(first, last)], return_counts=True)
        texts, found = np.divmod(pairs, len(queries))
        candidates = (shared >= np.minimum(SHARED, least_shared(sizes[found], threshold))) & ~near[found]
        pairs = zip(texts[candidates].tolist(), found[candidates].tolist(), strict=True)
        for text, group in itertools.groupby(pairs, key=lambda pair: pair[0]):
            own = sort_distinct(flat[starts[text] : starts[text + 1]])
            for _, query in group:
                alike = threshold * max(len(own), sizes[query]) - 1e-9 <= min(len(own), sizes[query])
                if alike and not near[query]:
                    near[query] = jaccard(grams.distinct(queries[query]), own) >= threshold
    return near


def ranges(starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Return the numbers from each start to its end, one range after the other."""
    lengths = ends - starts
    return np.arange(lengths.sum()) + np.repeat(starts - np.cumsum(lengths) + lengths, lengths)


def least_shared(sizes: np.ndarray, threshold: float) -> np.ndarray:
    """Return how many of so many 3-grams a near text has, too."""
    # The margin keeps 0.7 * 10 = 7.000000000000001 from asking for eight
    return np.ceil(threshold * sizes - 1e-9).astype(np.int64)


def jaccard(one: np.ndarray, two: np.ndarray) -> float:
    """Return the Jaccard index of two sets, each as distinct numbers."""
    both = np.sort(np.concatenate([one, two]))
    shared = np.count_nonzero(both[1:] == both[:-1])
    return shared / (len(both) - shared)


def sort_distinct(grams: np.ndarray) -> np.ndarray:
    """Return the distinct numbers, ascending."""
    grams = np.sort(grams)
    return grams[np.append(True, grams[1:] != grams[:-1])]


def index_rare(grams: Grams, queries: np.ndarray, threshold: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the 3-grams by which a query is found, ascending, beside each whose it is, and how many every query has."""
    # The rarest ones: boilerplate would make every text a candidate. How rare need not be exact, any will do.
    counts = np.zeros(int(FEW_BITS) + 1, dtype=np.uint32)
    for _, flat, _ in grams.batches(queries):
        np.add.at(counts, (flat & FEW_BITS).astype(np.int64), np.uint32(1))
    kept, owners, all_sizes = [np.empty(0, np.uint64)], [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for number, (_, flat, starts) in enumerate(grams.batches(queries)):
        texts = np.repeat(np.arange(len(starts) - 1), np.diff(starts))
        order = np.lexsort((flat, texts))
        flat, texts = flat[order], texts[order]
        single = np.append(True, (flat[1:] != flat[:-1]) | (texts[1:] != texts[:-1]))
        flat, texts = flat[single], texts[single]
        sizes = np.bincount(texts, minlength=len(starts) - 1)
        rare = np.lexsort((counts[flat & FEW_BITS], texts))
        rank = np.arange(len(flat)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        rare = rare[rank < np.repeat(sizes - least_shared(sizes, threshold) + SHARED, sizes)]
        kept.append(flat[rare])
        owners.append(texts[rare] + number * BATCH)
        all_sizes.append(sizes)
    index, numbers = np.concatenate(kept), np.concatenate(owners)
    order = np.argsort(index)
    return index[order], numbers[order], np.concatenate(all_sizes)
