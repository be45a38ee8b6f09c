"""Check that the loss covers exactly the answers, by reading back the trainer's own dataset before step 1."""

from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy
from datasets import Dataset
from numpy.typing import NDArray
from pyarrow import compute
from transformers import PreTrainedTokenizerBase

from medibot.data.conversations import COLUMNS
from medibot.data.rendering import BATCH, Renderer, Row, read_rows
from medibot.errors import RecipeError

IGNORED = -100
NAMES = {
    "lost": "rows lost or added on the way into the trainer's dataset",
    "nothing": "rows with nothing to learn",
    "cut": "answers cut at max_length",
    "prefix": "rows whose prompt is not an exact prefix of the training text",
    "bos": "rows without exactly one BOS at the start",
    "stop": "answers whose last trained token does not stop generation",
    "unwritten": "rows of whose messages the template leaves some out",
    "control": "rows whose text holds control tokens",
    "thinking": "rows whose thinking the template does not write",
    "outside": "rows whose trained span is not exactly the answer",
}
Ids = NDArray[numpy.int64]


class Audit:
    """What the loss covers in one split of the trainer's `dataset`, read back against the `conversations` that went in.

    `dataset` has the columns input_ids and labels, and seq_lengths where rows are packed. `stops` are the token ids that
    generation stops at. Every row is checked: its prompt token for token, its answer character for character, its labels
    one by one. `violations` maps a key of NAMES to the row indices at fault. With `record`, what an audit of the very same
    rows has found, nothing is read again.
    """

    def __init__(
        self,
        dataset: Dataset,
        conversations: Dataset,
        tokenizer: PreTrainedTokenizerBase,
        stops: list[int],
        limit: int | None,
        split: str = "train",
        record: dict[str, Any] | None = None,
    ) -> None:
        self.dataset, self.stops, self.limit, self.split = dataset, stops, limit, split
        self.conversations, self.renderer = conversations.select_columns(COLUMNS), Renderer(tokenizer)
        if record is not None:
            vars(self).update(record)
            return
        self.rows_in = len(conversations)
        # TRL keeps the order of rows, unless it packs or shuffles them: only then their tokens say which is which
        self.in_order = "seq_lengths" not in dataset.column_names and len(dataset) == self.rows_in
        self.places: Places | None = None
        if not (self.in_order and self.check_rows()):
            self.places = Places(self.renderer, self.conversations)
            self.check_rows()
        if self.rows_in != self.rows_out:
            self.violations["lost"] = list(range(*sorted((self.rows_in, self.rows_out))))

    def check_rows(self) -> bool:
        """Count the tokens of all rows and note their faults; return whether there are none.

        Rows that are taken to be in order are given up at the first fault: it may be that they are not.
        """
        self.rows_out = self.tokens = self.supervised = self.longest = 0
        self.violations: dict[str, list[int]] = {}
        rows = spans(self.dataset)
        while batch := list(islice(rows, BATCH)):
            self.check_batch(batch)
            if self.violations and not self.places:
                return False
        return not self.violations

    def check_batch(self, batch: list[tuple[Ids, Ids]]) -> None:
        """Do so for the rows that come next."""
        places: list[int | None] = []
        for index, (ids, _) in enumerate(batch, self.rows_out):
            own = index if self.in_order else None
            places.append(self.places.take(ids, own) if self.places else own)
        known = sorted({place for place in places if place is not None})
        rows = read_rows(self.conversations, known)
        prompts = self.renderer.encode(rows, [row["prompt"] for row in rows], prompt=True)
        inputs = dict(zip(known, zip(rows, prompts, strict=True), strict=True))
        said = self.renderer.read([self.answer(ids, labels) for ids, labels in batch])
        for (ids, labels), text, place in zip(batch, said, places, strict=True):
            row, prompt = (None, []) if place is None else inputs[place]
            for key in dict.fromkeys(self.faults(ids, labels, text, row, prompt)):
                self.violations.setdefault(key, []).append(self.rows_out)
            self.rows_out += 1
            self.tokens += len(ids)
            self.longest = max(self.longest, len(ids))
            self.supervised += int(numpy.count_nonzero(labels != IGNORED))

    def answer(self, ids: Ids, labels: Ids) -> list[int]:
        """Return the token ids from the first that is trained, without what closes the turn."""
        trained = numpy.flatnonzero(labels != IGNORED)
        said = ids[trained[0] :].tolist() if len(trained) else []
        while said and (said[-1] in self.renderer.controls or self.renderer.is_blank(said[-1])):
            said.pop()
        return said

    def faults(self, ids: Ids, labels: Ids, said: str, row: Row | None, prompt: list[int]) -> Iterator[str]:
        """Yield the keys of NAMES under which a row of the trainer's is at fault.

        `said` is the text that it teaches, `row` its conversation, and `prompt` the token ids of that one's prompt.
        """
        renderer, trained = self.renderer, labels != IGNORED
        if not trained.any():
            yield "nothing"
            return
        # Templates end a turn with a newline behind the stop token
        said_last = (int(token) for token in labels[trained][::-1] if not renderer.is_blank(int(token)))
        if next(said_last, None) not in self.stops:
            if self.limit is not None and len(ids) >= self.limit:
                yield "cut"
                return
            yield "stop"
        start = int(trained.argmax())
        if not numpy.array_equal(labels[start:], ids[start:]) or row is None:
            yield "outside"
        if row is None:
            return
        bos, skeleton = renderer.tokenizer.bos_token_id, renderer.skeleton(row)
        if bos is not None and (
            (ids[:1] == bos).any() != (skeleton.ids[:1] == [bos]) or ids[:2].tolist() == [bos, bos]
        ):
            yield "bos"
        if not skeleton.whole:
            yield "unwritten"
        prefixed = ids[: len(prompt)].tolist() == prompt
        if not prefixed:
            yield "prefix"
        if wrong := self.misread(said, row["completion"][0], skeleton.between):
            yield wrong
        if prefixed and start != len(prompt):
            yield "outside"
        controls, closing = renderer.controls_of(ids)
        if controls != skeleton.controls:
            yield "control"
        elif skeleton.closing and closing != skeleton.closing:
            yield "outside"

    def misread(self, said: str, message: dict[str, Any], between: list[str] | None) -> str | None:
        """Return the key of NAMES for what is not exactly `message` in the text `said`; None if all is.

        White space may differ where texts begin and end, since templates trim there, and nowhere else.
        """
        thought = message.get("reasoning_content")
        if between is None:
            return "thinking"
        for text in [between[0], thought, between[1]] if thought else between:
            rest = self.behind(said, text)
            if rest is None:
                return "thinking" if thought else "outside"
            said = rest
        return "outside" if self.behind(said, message["content"]) != "" else None

    def behind(self, said: str, text: str) -> str | None:
        """Return what `said` says behind `text`, or behind what the tokenizer makes of it; None if it is not there."""
        said = said.strip()
        if said.startswith(text.strip()):
            return said[len(text.strip()) :]
        folded = self.renderer.fold(text).strip()
        return said[len(folded) :] if said.startswith(folded) else None

    def as_dict(self) -> dict[str, Any]:
        """Return the counts."""
        counts = {key: vars(self)[key] for key in ("split", "rows_in", "rows_out", "tokens", "supervised", "longest")}
        violations = {key: len(self.violations.get(key, [])) for key in NAMES}
        return counts | {"violations": violations, "supervised_share": round(self.supervised / max(1, self.tokens), 4)}

    def refuse_faults(self) -> None:
        """Raise RecipeError for what would teach the wrong thing; each kind of fault with its count and an example."""
        faults = []
        for key, rows in self.violations.items():
            example = f"{self.rows_in:,} in, {self.rows_out:,} out"
            if key != "lost":
                _, labels = next(islice(spans(self.dataset), rows[0], None))
                trained = labels[labels != IGNORED].tolist()
                ends = [trained] if len(trained) <= 24 else [trained[:12], trained[-12:]]
                covered = " … ".join(map(repr, self.renderer.read(ends)))
                example = f"row {rows[0]}: " + (f"the loss covers {covered}" if trained else "every label is masked")
            faults.append(f"{len(rows):,} of {self.rows_out:,} {self.split}: {NAMES[key]} ({example})")
        remedy = "see the painted rows with: medibot inspect"
        if (
            self.violations.keys() & {"prefix", "outside"}
            and "enable_thinking" in self.renderer.tokenizer.chat_template
        ):
            remedy += "; or write data.chat_template_kwargs: {enable_thinking: false}"
        if faults:
            raise RecipeError.of("loss mask", "; ".join(faults), remedy)


class Places:
    """Find the conversation that a row of tokens was made from: packing and shuffle_dataset reorder rows."""

    def __init__(self, renderer: Renderer, conversations: Dataset) -> None:
        hashes = numpy.empty(len(conversations), numpy.int64)
        for first in range(0, len(hashes), BATCH):
            rows = read_rows(conversations, range(first, min(first + BATCH, len(hashes))))
            chats = [row["prompt"] + row["completion"] for row in rows]
            for at, ids in enumerate(renderer.encode(rows, chats), first):
                hashes[at] = hash(numpy.array(ids, numpy.int64).tobytes())
        self.order = numpy.argsort(hashes, kind="stable")
        self.hashes, self.taken = hashes[self.order], numpy.zeros(len(hashes), bool)
        self.passed: dict[int, int] = {}

    def take(self, ids: Ids, own: int | None) -> int | None:
        """Return the place of a conversation with exactly these tokens, or `own` if there is none; each only once."""
        number = hash(ids.tobytes())
        first, end = (int(numpy.searchsorted(self.hashes, number, side)) for side in ("left", "right"))
        at = self.passed.get(first, first)
        while at < end and self.taken[self.order[at]]:
            at += 1
        self.passed[first] = at
        place = own if first == end else int(self.order[at]) if at < end else None
        if place is None or self.taken[place]:
            return None
        self.taken[place] = True
        return place


def spans(dataset: Dataset) -> Iterator[tuple[Ids, Ids]]:
    """Yield input ids and labels of each row; of each row inside, where rows are packed, and of what is left over."""
    packed = "seq_lengths" in dataset.column_names
    columns = ["input_ids", "labels", *(["seq_lengths"] if packed else [])]
    # Packed rows are as long as max_length
    for table in dataset.select_columns(columns).with_format("arrow").iter(BATCH // 10 if packed else BATCH):
        ids, labels, *lengths = (split_lists(table[name]) for name in columns)
        if not packed:
            yield from zip(ids, labels, strict=True)
            continue
        for row_ids, row_labels, row_lengths in zip(ids, labels, *lengths, strict=True):
            ends = numpy.cumsum(row_lengths)
            pieces = [numpy.split(part, ends) for part in (row_ids, row_labels)]
            yield from (piece for piece in zip(*pieces, strict=True) if len(piece[0]) or len(piece[1]))


def split_lists(column: Any) -> list[Ids]:
    """Return the lists of an Arrow column."""
    ends = numpy.cumsum(compute.list_value_length(column).to_numpy())
    return numpy.split(compute.list_flatten(column).to_numpy().astype(numpy.int64), ends[:-1])
