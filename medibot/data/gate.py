"""What the loss really covers, read back from the trainer's own dataset: the gate before step 1, and painted rows."""

import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from medibot.errors import RecipeError
from medibot.model.template import SAMPLE_CHAT

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
        counts = {key: len(self.violations.get(key, [])) for key in NAMES}
        share = round(self.supervised / max(1, self.tokens), 4)
        return asdict(self) | {"violations": counts, "supervised_share": share}


def audit_labels(
    dataset: Dataset,
    conversations: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    stops: list[int],
    max_length: int | None,
    split: str = "train",
) -> Audit:
    """Read the trainer's `dataset` (columns input_ids, labels; packed rows have seq_lengths) back against what went in.

    `stops` are the token ids that generation stops at. Every row is checked; nothing is sampled.
    """
    report = Audit(split, rows_in=len(conversations))
    in_order = "seq_lengths" not in dataset.column_names and len(dataset) == len(conversations)
    # Packing and shuffle_dataset reorder rows: a row's conversation is found by its tokens, else by its place
    made_from = {hash(tuple(chat_ids(tokenizer, row))): place for place, row in enumerate(conversations)}
    skeletons: dict[tuple[str, ...], Counter[int]] = {}
    controls = control_ids(tokenizer)
    bos = template_ids(tokenizer, SAMPLE_CHAT)[0] == tokenizer.bos_token_id
    for index, (ids, labels) in enumerate(spans(dataset)):
        report.rows_out += 1
        report.tokens += len(ids)
        report.longest = max(report.longest, len(ids))
        trained = [place for place, label in enumerate(labels) if label != IGNORED]
        report.supervised += len(trained)
        report.note("nothing", index, not trained)
        if not trained:
            continue
        stopped = last_trained(ids, trained, tokenizer) in stops
        cut = not stopped and max_length is not None and len(ids) >= max_length
        report.note("cut", index, cut)
        if cut:
            continue
        report.note("stop", index, not stopped)
        contiguous = trained == list(range(trained[0], len(ids))) and all(labels[t] == ids[t] for t in trained)
        report.note("outside", index, not contiguous)
        report.note("bos", index, not one_bos(ids, tokenizer, bos))
        place = made_from.get(hash(tuple(ids)), index if in_order else None)
        if place is None:
            report.note("outside", index, True)
        else:
            check_partner(report, index, ids, trained[0], conversations[place], tokenizer, controls, skeletons)
    for row in range(*sorted((report.rows_in, report.rows_out))):
        report.note("lost", row, True)
    return report


def check_partner(
    report: Audit,
    index: int,
    ids: list[int],
    start: int,
    row: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    controls: set[int],
    skeletons: dict[tuple[str, ...], Counter[int]],
) -> None:
    """Compare one trainer row with the conversation it was made from."""
    prompt = template_ids(tokenizer, row["prompt"], add_generation_prompt=True, **row["chat_template_kwargs"])
    prefixed = ids[: len(prompt)] == prompt
    report.note("prefix", index, not prefixed)
    end = len(ids)
    while end > start and (ids[end - 1] in controls or not tokenizer.decode([ids[end - 1]]).strip()):
        end -= 1
    exact = same_text(tokenizer.decode(ids[start:end]), row["completion"][0]["content"])
    report.note("outside", index, not exact or (prefixed and start != len(prompt)))
    roles = tuple(message["role"] for message in row["prompt"])
    if roles not in skeletons:
        plain = [{"role": role, "content": "x"} for role in (*roles, "assistant")]
        written = template_ids(tokenizer, plain, **row["chat_template_kwargs"])
        skeletons[roles] = Counter(i for i in written if i in controls)
    report.note("control", index, Counter(i for i in ids if i in controls) != skeletons[roles])


def same_text(trained: str, answer: str) -> bool:
    """Equal up to what tokenizers fold: white space, and characters that are compositions of others."""
    plain = ["".join(unicodedata.normalize("NFKC", text).split()) for text in (trained, answer)]
    return plain[0] == plain[1]


def chat_ids(tokenizer: PreTrainedTokenizerBase, row: dict[str, Any]) -> list[int]:
    return template_ids(tokenizer, row["prompt"] + row["completion"], **row["chat_template_kwargs"])


def template_ids(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], **kwargs: Any) -> list[int]:
    return tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **kwargs)["input_ids"]


def control_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Ids of special tokens, and of added tokens that the chat template writes."""
    return {
        number
        for number, token in tokenizer.added_tokens_decoder.items()
        if token.special or (token.content.strip() and token.content in tokenizer.chat_template)
    }


def last_trained(ids: list[int], trained: list[int], tokenizer: PreTrainedTokenizerBase) -> int:
    """The last supervised token that is not white space: templates end a turn with a newline behind the stop token."""
    for place in reversed(trained):
        if tokenizer.decode([ids[place]]).strip():
            return ids[place]
    return ids[trained[-1]]


def one_bos(ids: list[int], tokenizer: PreTrainedTokenizerBase, expected: bool) -> bool:
    """Exactly one BOS at the start where the template writes one, none where it does not; never two in a row."""
    bos = tokenizer.bos_token_id
    return bos is None or ((ids[:1] == [bos]) == expected and ids[:2] != [bos, bos])


def spans(dataset: Dataset) -> Iterator[tuple[list[int], list[int]]]:
    """Input ids and labels of each row; of each row inside, where rows are packed."""
    packed = "seq_lengths" in dataset.column_names
    for row in dataset:
        start = 0
        for length in row["seq_lengths"] if packed else [len(row["input_ids"])]:
            yield row["input_ids"][start : start + length], row["labels"][start : start + length]
            start += length


def refuse_faults(report: Audit, dataset: Dataset, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse to train on what would teach the wrong thing; each kind of fault with its count and an example."""
    faults = []
    for key, rows in report.violations.items():
        example = f"{report.rows_in:,} in, {report.rows_out:,} out"
        if key != "lost":
            example = f"row {rows[0]}: {describe_labels(*next(islice(spans(dataset), rows[0], None)), tokenizer)}"
        faults.append(f"{len(rows):,} of {report.rows_out:,} {report.split}: {NAMES[key]} ({example})")
    if faults:
        raise RecipeError.of("loss mask", "; ".join(faults), "see the painted rows with: medibot inspect")


def describe_labels(ids: list[int], labels: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """The two ends of what the loss covers."""
    trained = [i for i, label in zip(ids, labels, strict=True) if label != IGNORED]
    if len(trained) > 24:
        return f"the loss covers {tokenizer.decode(trained[:12])!r} … {tokenizer.decode(trained[-12:])!r}"
    return f"the loss covers {tokenizer.decode(trained)!r}" if trained else "every label is masked"
