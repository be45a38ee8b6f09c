"""Check that the loss covers exactly the answers, by reading back the trainer's own dataset before step 1."""

import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase as Tokenizer

from medibot.errors import RecipeError
from medibot.model.tokenizer import SAMPLE_CHAT

IGNORED = -100
NAMES = {
    "lost": "rows lost or added on the way into the trainer's dataset",
    "nothing": "rows with nothing to learn",
    "cut": "answers cut at max_length",
    "prefix": "rows whose prompt is not an exact prefix of the training text",
    "bos": "rows without exactly one BOS at the start",
    "stop": "answers whose last trained token does not stop generation",
    "control": "rows whose text holds control tokens",
    "outside": "rows whose trained span is not exactly the answer",
}


@dataclass
class Audit:
    """Counts over one split of the trainer's dataset; `violations` maps a key of NAMES to the row indices at fault."""

    split: str
    rows_in: int
    rows_out: int = 0
    tokens: int = 0
    supervised: int = 0
    longest: int = 0
    violations: dict[str, list[int]] = field(default_factory=dict)

    def note(self, key: str, row: int, wrong: bool) -> None:
        """Count `row` once under `key`, however many checks it fails there."""
        if wrong and self.violations.get(key, [])[-1:] != [row]:
            self.violations.setdefault(key, []).append(row)

    def as_dict(self) -> dict[str, Any]:
        """Return the counts."""
        counts = {key: len(self.violations.get(key, [])) for key in NAMES}
        share = round(self.supervised / max(1, self.tokens), 4)
        return asdict(self) | {"violations": counts, "supervised_share": share}


class Checker:
    """Compare the trainer's rows of one split with the conversations that they were made from."""

    def __init__(
        self, audit: Audit, conversations: Dataset, tokenizer: Tokenizer, stops: list[int], limit: int | None
    ) -> None:
        self.audit, self.conversations, self.tokenizer = audit, conversations, tokenizer
        self.stops, self.limit = stops, limit
        # Special tokens, and added tokens that the chat template writes
        self.controls = {
            number
            for number, token in tokenizer.added_tokens_decoder.items()
            if token.special or (token.content.strip() and token.content in tokenizer.chat_template)
        }
        self.starts_with_bos = self.template_ids(SAMPLE_CHAT)[0] == tokenizer.bos_token_id
        # Packing and shuffle_dataset reorder rows: a row's conversation is found by its tokens, else by its place
        self.places = {
            hash(tuple(self.template_ids(row["prompt"] + row["completion"], **row["chat_template_kwargs"]))): place
            for place, row in enumerate(conversations)
        }
        self.skeletons: dict[tuple[str, ...], Counter[int]] = {}

    def template_ids(self, messages: list[dict[str, str]], **kwargs: Any) -> list[int]:
        """Return the token ids of a rendered conversation."""
        return self.tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **kwargs)["input_ids"]

    def count_controls(self, ids: list[int]) -> Counter[int]:
        """Return how often each control token is there."""
        return Counter(token for token in ids if token in self.controls)

    def is_blank(self, token: int) -> bool:
        """Tell whether a token is white space."""
        return not self.tokenizer.decode([token]).strip()

    def check(self, index: int, ids: list[int], labels: list[int], in_order: bool) -> None:
        """Check one row of the trainer's dataset."""
        audit = self.audit
        audit.rows_out += 1
        audit.tokens += len(ids)
        audit.longest = max(audit.longest, len(ids))
        trained = [place for place, label in enumerate(labels) if label != IGNORED]
        audit.supervised += len(trained)
        audit.note("nothing", index, not trained)
        if not trained:
            return
        # Templates end a turn with a newline behind the stop token
        last = next((ids[place] for place in reversed(trained) if not self.is_blank(ids[place])), ids[trained[-1]])
        cut = last not in self.stops and self.limit is not None and len(ids) >= self.limit
        audit.note("cut", index, cut)
        if cut:
            return
        audit.note("stop", index, last not in self.stops)
        contiguous = trained == list(range(trained[0], len(ids))) and all(labels[t] == ids[t] for t in trained)
        audit.note("outside", index, not contiguous)
        bos = self.tokenizer.bos_token_id
        one_bos = (ids[:1] == [bos]) == self.starts_with_bos and ids[:2] != [bos, bos]
        audit.note("bos", index, bos is not None and not one_bos)
        place = self.places.get(hash(tuple(ids)), index if in_order else None)
        audit.note("outside", index, place is None)
        if place is not None:
            self.compare(index, ids, trained[0], self.conversations[place])

    def compare(self, index: int, ids: list[int], start: int, row: dict[str, Any]) -> None:
        """Compare one row, whose loss begins at `start`, with its conversation."""
        audit, kwargs = self.audit, row["chat_template_kwargs"]
        prompt = self.template_ids(row["prompt"], add_generation_prompt=True, **kwargs)
        prefixed = ids[: len(prompt)] == prompt
        audit.note("prefix", index, not prefixed)
        end = len(ids)
        while end > start and (ids[end - 1] in self.controls or self.is_blank(ids[end - 1])):
            end -= 1
        # Up to what tokenizers fold: white space, and characters that are compositions of others
        texts = (self.tokenizer.decode(ids[start:end]), row["completion"][0]["content"])
        trained, answer = ("".join(unicodedata.normalize("NFKC", text).split()) for text in texts)
        audit.note("outside", index, trained != answer or (prefixed and start != len(prompt)))
        roles = tuple(message["role"] for message in row["prompt"])
        if roles not in self.skeletons:
            plain = [{"role": role, "content": "x"} for role in (*roles, "assistant")]
            self.skeletons[roles] = self.count_controls(self.template_ids(plain, **kwargs))
        audit.note("control", index, self.count_controls(ids) != self.skeletons[roles])


def audit_labels(
    dataset: Dataset,
    conversations: Dataset,
    tokenizer: Tokenizer,
    stops: list[int],
    max_length: int | None,
    split: str = "train",
) -> Audit:
    """Read the trainer's `dataset` (columns input_ids, labels; packed rows have seq_lengths) back against what went in.

    `stops` are the token ids that generation stops at. Every row is checked; nothing is sampled.
    """
    audit = Audit(split, rows_in=len(conversations))
    checker = Checker(audit, conversations, tokenizer, stops, max_length)
    in_order = "seq_lengths" not in dataset.column_names and len(dataset) == len(conversations)
    for index, (ids, labels) in enumerate(spans(dataset)):
        checker.check(index, ids, labels, in_order)
    for row in range(*sorted((audit.rows_in, audit.rows_out))):
        audit.note("lost", row, True)
    return audit


def spans(dataset: Dataset) -> Iterator[tuple[list[int], list[int]]]:
    """Yield input ids and labels of each row; of each row inside, where rows are packed."""
    packed = "seq_lengths" in dataset.column_names
    for row in dataset:
        start = 0
        for length in row["seq_lengths"] if packed else [len(row["input_ids"])]:
            yield row["input_ids"][start : start + length], row["labels"][start : start + length]
            start += length


def refuse_faults(audit: Audit, dataset: Dataset, tokenizer: Tokenizer) -> None:
    """Raise RecipeError for what would teach the wrong thing; each kind of fault with its count and an example."""
    faults = []
    for key, rows in audit.violations.items():
        example = f"{audit.rows_in:,} in, {audit.rows_out:,} out"
        if key != "lost":
            ids, labels = next(islice(spans(dataset), rows[0], None))
            trained = [token for token, label in zip(ids, labels, strict=True) if label != IGNORED]
            ends = [trained] if len(trained) <= 24 else [trained[:12], trained[-12:]]
            covered = " … ".join(repr(tokenizer.decode(end)) for end in ends)
            example = f"row {rows[0]}: " + (f"the loss covers {covered}" if trained else "every label is masked")
        faults.append(f"{len(rows):,} of {audit.rows_out:,} {audit.split}: {NAMES[key]} ({example})")
    if faults:
        raise RecipeError.of("loss mask", "; ".join(faults), "see the painted rows with: medibot inspect")
