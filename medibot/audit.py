"""What the loss really covers: the gate before step 1, read back from the trainer's own dataset, and the painted rows."""

import html
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from datasets import Dataset
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from medibot.model import MARKER, PROBE
from medibot.recipe import RecipeError

IGNORED = -100
STYLES = {"masked": "dim", "trained": "bold green", "stop": "bold white on red"}
NAMES = {
    "lost": "rows given to the trainer and not in its dataset",
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
        if wrong:
            self.violations.setdefault(key, []).append(row)

    def as_dict(self) -> dict[str, Any]:
        counts = {key: len(self.violations.get(key, [])) for key in NAMES}
        share = round(self.supervised / max(1, self.tokens), 4)
        return asdict(self) | {"violations": counts, "supervised_share": share}


def audit(
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
    packed = "seq_lengths" in dataset.column_names
    spans = unpacked(dataset) if packed else zip(dataset["input_ids"], dataset["labels"], strict=True)
    # Packing reorders rows, so only checks that need no partner are made on packed rows
    partners = [None] * len(conversations) if packed else conversations
    skeletons: dict[tuple[str, ...], Counter[int]] = {}
    controls = control_ids(tokenizer)
    for index, (ids, labels) in enumerate(spans):
        report.rows_out += 1
        report.tokens += len(ids)
        report.longest = max(report.longest, len(ids))
        trained = [place for place, label in enumerate(labels) if label != IGNORED]
        report.supervised += len(trained)
        report.note("nothing", index, not trained)
        if not trained:
            continue
        last = last_trained(ids, trained, tokenizer)
        report.note("stop", index, last not in stops)
        report.note("cut", index, max_length is not None and len(ids) >= max_length and last not in stops)
        contiguous = trained == list(range(trained[0], len(ids))) and all(labels[t] == ids[t] for t in trained)
        report.note("outside", index, not contiguous)
        report.note("bos", index, not one_bos(ids, tokenizer))
        if index < len(partners) and partners[index] is not None and len(dataset) == len(conversations):
            check_partner(report, index, ids, trained[0], partners[index], tokenizer, controls, skeletons)
    report.note("lost", report.rows_in - 1, report.rows_out != report.rows_in)
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
    report.note("prefix", index, start != len(prompt) or ids[:start] != prompt)
    text = tokenizer.decode(ids[start:], skip_special_tokens=True).strip()
    answer = row["completion"][0]["content"].strip()
    report.note("outside", index, not same_text(text, answer))
    roles = tuple(message["role"] for message in row["prompt"])
    if roles not in skeletons:
        plain = [{"role": role, "content": "x"} for role in (*roles, "assistant")]
        skeletons[roles] = Counter(i for i in template_ids(tokenizer, plain, **row["chat_template_kwargs"]) if i in controls)
    report.note("control", index, Counter(i for i in ids if i in controls) != skeletons[roles])


def same_text(trained: str, answer: str) -> bool:
    """Equal up to white space (tokenizers fold some) and a turn marker that is plain text in some templates."""
    return "".join(MARKER.sub("", trained).split()) == "".join(MARKER.sub("", answer).split())


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


def one_bos(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> bool:
    """Exactly one BOS at the start where the template writes one, none where it does not; never two in a row."""
    bos = tokenizer.bos_token_id
    if bos is None:
        return True
    expected = template_ids(tokenizer, PROBE)[:1] == [bos]
    return (ids[:1] == [bos]) == expected and ids[:2] != [bos, bos]


def unpacked(dataset: Dataset) -> Iterator[tuple[list[int], list[int]]]:
    for row in dataset:
        start = 0
        for length in row["seq_lengths"]:
            yield row["input_ids"][start : start + length], row["labels"][start : start + length]
            start += length


def gate(report: Audit, dataset: Dataset, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse to train on a dataset that would teach the wrong thing; each kind of fault with its count and an example."""
    faults = []
    for key, rows in report.violations.items():
        example = f"{report.rows_in} in, {report.rows_out} out"
        if key != "lost" and "seq_lengths" not in dataset.column_names:
            example = f"row {rows[0]}: {ending(dataset[rows[0]], tokenizer)}"
        faults.append(f"{len(rows):,} of {report.rows_out:,} {report.split}: {NAMES[key]} ({example})")
    if faults:
        raise RecipeError.of("loss mask", "; ".join(faults), "see the painted rows with: medibot inspect")


def ending(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> str:
    trained = [i for i, label in zip(row["input_ids"], row["labels"], strict=True) if label != IGNORED]
    return f"the loss ends in {tokenizer.decode(trained[-8:])!r}" if trained else "every label is masked"


# --- painted rows -----------------------------------------------------------------------------------------------------


def painted(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, stops: list[int]) -> list[tuple[str, str]]:
    """(text, masked | trained | stop) pieces of one trainer row, whole characters only.

    A character that several byte tokens spell is one piece, painted as its last token is.
    """
    pieces: list[tuple[str, str]] = []
    pending: list[int] = []
    for token, label in zip(row["input_ids"], row["labels"], strict=True):
        pending.append(token)
        text = tokenizer.decode(pending, clean_up_tokenization_spaces=False)
        if text.endswith("�") and len(pending) < 4:
            continue
        kind = "masked" if label == IGNORED else "stop" if token in stops else "trained"
        piece = tokenizer.convert_ids_to_tokens(token) if len(pending) == 1 else None
        # SentencePiece decodes a lone token without the space in front of it
        lead = " " if piece and piece.startswith("▁") and not text.startswith(" ") else ""
        pieces.append((lead + text, kind))
        pending = []
    return pieces


def examples(dataset: Dataset, row: int | None = None) -> dict[str, int]:
    """Which rows to paint: the shortest, the median and the longest, and `row` if asked for (an index in `dataset`)."""
    order = sorted(range(len(dataset)), key=lambda i: len(dataset[i]["input_ids"]))
    chosen = {"shortest": order[0], "median": order[len(order) // 2], "longest": order[-1]}
    return chosen | ({f"row {row}": row} if row is not None else {})


def paint_text(pieces: list[tuple[str, str]]) -> Text:
    return Text.assemble(*((text, STYLES[kind]) for text, kind in pieces))


def paint_html(pieces: list[tuple[str, str]]) -> str:
    """One row as HTML: a span a token, its class saying whether it is masked, trained or a stop token."""
    return "".join(f'<span class="{kind}">{html.escape(text)}</span>' for text, kind in pieces)
