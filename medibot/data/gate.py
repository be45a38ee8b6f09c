"""Check that the loss covers exactly the answers, by reading back the trainer's own dataset before step 1."""

import json
from collections import Counter
from collections.abc import Iterator
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

from datasets import Dataset
from transformers import PreTrainedTokenizerBase as Tokenizer

from medibot.errors import RecipeError

IGNORED = -100
NAMES = {
    "lost": "rows lost or added on the way into the trainer's dataset",
    "nothing": "rows with nothing to learn",
    "cut": "answers cut at max_length",
    "prefix": "rows whose prompt is not an exact prefix of the training text",
    "bos": "rows without exactly one BOS at the start",
    "stop": "answers whose last trained token does not stop generation",
    "control": "rows whose text holds control tokens",
    "thinking": "rows whose thinking the template does not write",
    "outside": "rows whose trained span is not exactly the answer",
}


class Skeleton(NamedTuple):
    """What a template writes around the texts of a chat: its token ids, and the text before and behind the thought.

    `between` is None where the template leaves the thought out.
    """

    ids: list[int]
    between: list[str] | None


class Audit:
    """What the loss covers in one split of the trainer's `dataset`, read back against the `conversations` that went in.

    `dataset` has the columns input_ids and labels, and seq_lengths where rows are packed. `stops` are the token ids that
    generation stops at. Every row is checked; `violations` maps a key of NAMES to the row indices at fault.
    """

    def __init__(
        self,
        dataset: Dataset,
        conversations: Dataset,
        tokenizer: Tokenizer,
        stops: list[int],
        limit: int | None,
        split: str = "train",
    ) -> None:
        self.dataset, self.tokenizer, self.stops, self.limit, self.split = dataset, tokenizer, stops, limit, split
        self.template_ids = partial(tokenizer.apply_chat_template, tokenize=True, return_dict=False)
        # Special tokens, and added tokens that the chat template writes
        self.controls = {
            number
            for number, token in tokenizer.added_tokens_decoder.items()
            if token.special or (token.content.strip() and token.content in tokenizer.chat_template)
        }
        self.skeletons: dict[str, Skeleton] = {}
        self.read = partial(tokenizer.decode, clean_up_tokenization_spaces=False)
        self.rows_in, self.rows_out = len(conversations), 0
        self.tokens = self.supervised = self.longest = 0
        self.violations: dict[str, list[int]] = {}
        # Packing and shuffle_dataset reorder rows: a row's conversation is found by its tokens, else by its place
        # One after another where several have the same tokens
        places: dict[int, list[int]] = {}
        for place in range(self.rows_in - 1, -1, -1):
            row = conversations[place]
            ids = self.template_ids(row["prompt"] + row["completion"], **row["chat_template_kwargs"])
            places.setdefault(hash(tuple(ids)), []).append(place)
        in_order = "seq_lengths" not in dataset.column_names and len(dataset) == self.rows_in
        for index, (ids, labels) in enumerate(spans(dataset)):
            self.rows_out += 1
            self.tokens += len(ids)
            self.longest = max(self.longest, len(ids))
            self.supervised += sum(label != IGNORED for label in labels)
            found = places.get(hash(tuple(ids)))
            place = found.pop() if found else index if in_order else None
            for key in dict.fromkeys(self.faults(ids, labels, None if place is None else conversations[place])):
                self.violations.setdefault(key, []).append(index)
        if self.rows_in != self.rows_out:
            self.violations["lost"] = list(range(*sorted((self.rows_in, self.rows_out))))

    def skeleton(self, row: dict[str, Any]) -> Skeleton:
        """Return what the template writes around a row's texts; rows differ in roles, and in which messages think."""
        chat = [
            {key: f"x{key}x" if text and key != "role" else text for key, text in message.items()}
            for message in row["prompt"] + row["completion"]
        ]
        kwargs = row["chat_template_kwargs"]
        kind = json.dumps([chat, kwargs])
        if kind not in self.skeletons:
            ids = self.template_ids(chat, **kwargs)
            prompt = self.template_ids(chat[:-1], add_generation_prompt=True, **kwargs)
            thought = chat[-1].get("reasoning_content") or ""
            between: list[str] | None = [""]
            if thought:
                around = self.read(ids[len(prompt) :]).partition("xcontentx")[0].split(thought)
                between = [text.strip() for text in around] if len(around) == 2 else None
            self.skeletons[kind] = Skeleton(ids, between)
        return self.skeletons[kind]

    def misread(self, said: str, message: dict[str, Any], between: list[str] | None) -> str | None:
        """Return the key of NAMES for what is not exactly `message` in the text `said`; None if all is.

        White space may differ where texts begin and end, since templates trim there, and nowhere else.
        """
        thought = message.get("reasoning_content")
        if between is None:
            return "thinking"
        for text in [between[0], thought, between[1]] if thought else []:
            rest = self.behind(said, text)
            if rest is None:
                return "thinking"
            said = rest
        return "outside" if self.behind(said, message["content"]) != "" else None

    def behind(self, said: str, text: str) -> str | None:
        """Return what `said` says behind `text`, or behind what the tokenizer makes of it; None if it is not there."""
        said = said.strip()
        if said.startswith(text.strip()):
            return said[len(text.strip()) :]
        ids = self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        folded = self.read(ids).strip()
        return said[len(folded) :] if said.startswith(folded) else None

    def faults(self, ids: list[int], labels: list[int], row: dict[str, Any] | None) -> Iterator[str]:
        """Yield the keys of NAMES under which a row of the trainer's is at fault; `row` is its conversation."""
        trained = [place for place, label in enumerate(labels) if label != IGNORED]
        if not trained:
            yield "nothing"
            return
        start, decode = trained[0], self.read
        # Templates end a turn with a newline behind the stop token
        if next((ids[place] for place in reversed(trained) if decode([ids[place]]).strip()), None) not in self.stops:
            if self.limit is not None and len(ids) >= self.limit:
                yield "cut"
                return
            yield "stop"
        if labels[start:] != ids[start:] or row is None:
            yield "outside"
        if row is None:
            return
        bos, (skeleton, between) = self.tokenizer.bos_token_id, self.skeleton(row)
        if bos is not None and ((ids[:1] == [bos]) != (skeleton[:1] == [bos]) or ids[:2] == [bos, bos]):
            yield "bos"
        prompt = self.template_ids(row["prompt"], add_generation_prompt=True, **row["chat_template_kwargs"])
        prefixed = ids[: len(prompt)] == prompt
        if not prefixed:
            yield "prefix"
        end = len(ids)
        while end > start and (ids[end - 1] in self.controls or not decode([ids[end - 1]]).strip()):
            end -= 1
        if wrong := self.misread(self.read(ids[start:end]), row["completion"][0], between):
            yield wrong
        if prefixed and start != len(prompt):
            yield "outside"
        found, usual = (Counter(token for token in part if token in self.controls) for part in (ids, skeleton))
        if found != usual:
            yield "control"

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
                ids, labels = next(islice(spans(self.dataset), rows[0], None))
                trained = [token for token, label in zip(ids, labels, strict=True) if label != IGNORED]
                ends = [trained] if len(trained) <= 24 else [trained[:12], trained[-12:]]
                covered = " … ".join(repr(self.read(end)) for end in ends)
                example = f"row {rows[0]}: " + (f"the loss covers {covered}" if trained else "every label is masked")
            faults.append(f"{len(rows):,} of {self.rows_out:,} {self.split}: {NAMES[key]} ({example})")
        if faults:
            raise RecipeError.of("loss mask", "; ".join(faults), "see the painted rows with: medibot inspect")


def spans(dataset: Dataset) -> Iterator[tuple[list[int], list[int]]]:
    """Yield input ids and labels of each row; of each row inside, where rows are packed."""
    packed = "seq_lengths" in dataset.column_names
    for row in dataset:
        start = 0
        for length in row["seq_lengths"] if packed else [len(row["input_ids"])]:
            yield row["input_ids"][start : start + length], row["labels"][start : start + length]
            start += length
