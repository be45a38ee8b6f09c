"""The loss mask: what TRL's own trainer would learn from, and that the gate refuses everything else."""

import copy
import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import trl
from conftest import FAMILIES, SAMPLE, STOPS
from datasets import Dataset, concatenate_datasets
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from medibot.data.audited import audit_once, hash_rows
from medibot.data.gate import IGNORED, Audit, spans
from medibot.data.prepared import Prepared, prepare
from medibot.errors import RecipeError
from medibot.model.loading import make_tiny_model
from medibot.recipe import DataSection, EvaluationSection, Recipe
from medibot.run import Run
from medibot.training.inspection import paint
from medibot.training.trainer import audit_splits, build_trainer, sft_config

pytestmark = pytest.mark.slow

SYSTEM = "You answer health questions in plain words."
QWEN = (None, "<|im_end|>", ["<|im_start|>", "<|endoftext|>"], ["<think>", "</think>", "<tool_call>", "</tool_call>"])
LLAMA = ("<|begin_of_text|>", "<|eot_id|>", ["<|start_header_id|>", "<|end_header_id|>", "<|python_tag|>"], [])
GEMMA = ("<bos>", "<eos>", ["<start_of_turn>", "<end_of_turn>", "<start_of_image>"], [])
WIDE = "\N{FULLWIDTH VERTICAL LINE}"
DEEPSEEK = (
    f"<{WIDE}begin▁of▁sentence{WIDE}>",
    f"<{WIDE}end▁of▁sentence{WIDE}>",
    [],
    [f"<{WIDE}User{WIDE}>", f"<{WIDE}Assistant{WIDE}>", "<think>", "</think>"],
)
GLM = (None, "<|endoftext|>", ["[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>"], ["<think>", "</think>"])
HARMONY = ("<|startoftext|>", "<|return|>", ["<|start|>", "<|message|>", "<|channel|>", "<|end|>"], [])
PHI = ("<s>", "<|endoftext|>", ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"], [])
# A template stored in trl: bos, eos, special tokens, other added tokens; then the text that closes an answer
STORED = {
    "llama3": (LLAMA, "<|eot_id|>"),
    "llama3_1": (LLAMA, "<|eot_id|>"),
    "llama3_2": (LLAMA, "<|eot_id|>"),
    "qwen2_5": (QWEN, "<|im_end|>"),
    "qwen3_instruct_2507": (QWEN, "<|im_end|>"),
    "gemma": (GEMMA, "<end_of_turn>"),
    "gemma3": (GEMMA, "<end_of_turn>"),
    "phi3": (PHI, "<|end|>\n<|endoftext|>"),
}
NO_THINKING = {"enable_thinking": False}


@dataclass(frozen=True)
class Case:
    """A recipe's conversations, and the trainer that TRL made of them."""

    prepared: Prepared
    trainer: SFTTrainer

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.prepared.tokenizer

    @property
    def dataset(self) -> Dataset:
        return self.trainer.train_dataset

    @property
    def conversations(self) -> Dataset:
        return self.prepared.load("train")

    def audit(self, dataset: Dataset | None = None) -> Audit:
        stops, limit = self.prepared.generation.eos_token_id, self.trainer.args.max_length
        return Audit(dataset or self.dataset, self.conversations, self.tokenizer, stops, limit)

    def refusal(self, dataset: Dataset | None = None) -> tuple[Audit, str]:
        """The audit of `dataset` and the words with which the gate refuses it."""
        report = self.audit(dataset)
        with pytest.raises(RecipeError) as refused:
            report.refuse_faults()
        return report, str(refused.value)

    def trained_again(self, **training: Any) -> "Case":
        """The same conversations through TRL under other settings, as if the recipe's checks had let them pass."""
        recipe = self.prepared.recipe
        prepared = replace(self.prepared, recipe=replace(recipe, training=recipe.training | training))
        run = Run(recipe.path.parent / "outputs" / "again")
        return Case(prepared, build_trainer(prepared, run, tiny=True))

    def tampered(self, row: int, change: Callable[[list[int], list[int]], tuple[list[int], list[int]]]) -> Dataset:
        """The trainer's dataset with `change` applied to one row's input ids and labels."""

        def apply(columns: dict[str, list[int]], index: int) -> dict[str, list[int]]:
            ids, labels = columns["input_ids"], columns["labels"]
            ids, labels = change(ids, labels) if index == row else (ids, labels)
            return {"input_ids": ids, "labels": labels}

        return self.dataset.map(apply, with_indices=True)

    def supervised(self) -> list[str]:
        return [
            self.tokenizer.decode([i for i, label in zip(ids, labels, strict=True) if label != IGNORED])
            for ids, labels in spans(self.dataset)
        ]


@pytest.fixture
def make_case(workplace: Path) -> Callable[..., Case]:
    """make_case(tokenizer, rows): prepared by medibot.data and handed to TRL by medibot.train."""

    def make(
        tokenizer: PreTrainedTokenizerBase,
        rows: list[dict[str, str]],
        system: str | None = SYSTEM,
        template: dict[str, Any] | None = None,
        **training: Any,
    ) -> Case:
        prepared = make_inputs(workplace, tokenizer, rows, system, template or {}, training)
        return Case(
            prepared,
            build_trainer(prepared, Run(workplace / "outputs" / "r"), tiny=True),
        )

    return make


def make_inputs(
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[dict[str, str]],
    system: str | None,
    template: dict[str, Any],
    training: dict[str, Any],
) -> Prepared:
    tokenizer.save_pretrained(folder / "model")
    config = make_tiny_model(tokenizer).config
    config.eos_token_id = tokenizer.eos_token_id
    config.save_pretrained(folder / "model")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = Recipe(
        name="case",
        path=folder / "case.yaml",
        model={"pretrained_model_name_or_path": str(folder / "model")},
        data=DataSection(
            path="rows.jsonl",
            prompt="question",
            completion="answer",
            system=system,
            chat_template_kwargs=template,
            validation=0.0,
            test=0.0,
        ),
        training={"max_length": 2048, "activation_checkpointing": False} | training,
        evaluation=EvaluationSection(max_new_tokens=8),
        written={"data": {"system": system, "template": template}},
    )
    return prepare(recipe, progress=lambda _: None)


@pytest.fixture(scope="session")
def metaspace_tokenizer() -> PreTrainedTokenizerFast:
    """A SentencePiece-like tokenizer: spaces are ▁, unknown characters are spelled in bytes."""
    from tokenizers import Tokenizer, decoders, models, normalizers, trainers

    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    strip = decoders.Strip(" ", 1, 0)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip])
    letters = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=letters, show_progress=False, max_token_length=8)
    words = [word for row in sample_rows(40) for word in row["answer"].replace(" ", " ▁").split()]
    tokenizer.train_from_iterator(words, trainer)
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = state["added_tokens"][:3]
    rebuilt = Tokenizer.from_str(json.dumps(state))
    loaded = PreTrainedTokenizerFast(tokenizer_object=rebuilt, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    loaded.chat_template = FAMILIES["mistral"][0]
    return loaded


@pytest.fixture(scope="session")
def stored_tokenizer(bpe: str) -> Callable:
    """stored_tokenizer(name, tokens): a tokenizer with one of trl's stored templates and the tokens that it needs."""

    def make(name: str, tokens: tuple[str | None, str, list[str], list[str]]) -> PreTrainedTokenizerFast:
        from tokenizers import Tokenizer

        bos, eos, special, plain = tokens
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(bpe), bos_token=bos, eos_token=eos)
        tokenizer.add_special_tokens({"additional_special_tokens": special})
        tokenizer.add_tokens(plain)
        tokenizer.chat_template = (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text()
        return tokenizer

    return make


def sample_rows(count: int) -> list[dict[str, str]]:
    """Every so-many-th row of the sample set, so that short and long ones are there."""
    rows = [json.loads(line) for line in SAMPLE.read_text().splitlines()]
    rows = [{key: row[key] for key in ("question", "answer")} for row in rows if row["question"] and row["answer"]]
    unique = list({row["question"]: row for row in rows}.values())
    return unique[:: len(unique) // count][:count]


def assert_exact(case: Case, closing: str, lead: str = "") -> None:
    """The loss covers each answer with what closes it, and a `lead` that the model generates too; the gate agrees."""
    answers = [row["completion"][0]["content"] for row in case.conversations]
    taught = [text.removesuffix("\n").lstrip(" ") for text in case.supervised()]
    assert taught == [lead + answer + closing for answer in answers]
    report = case.audit()
    assert report.violations == {}
    report.refuse_faults()


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_covers_exactly_the_answer_and_its_stop_token(
    family: str, make_tokenizer: Callable, make_case: Callable
) -> None:
    rows = sample_rows(24)
    case = make_case(make_tokenizer(family), rows, system=None if family == "gemma" else SYSTEM)
    assert sorted(row["completion"][0]["content"] for row in case.conversations) == sorted(r["answer"] for r in rows)
    assert_exact(case, STOPS[family])


def test_a_template_without_system_role_refuses_the_system_message(workplace: Path, make_tokenizer: Callable) -> None:
    with pytest.raises(RecipeError) as refused:
        make_inputs(workplace, make_tokenizer("gemma"), sample_rows(4), SYSTEM, {}, {})
    assert refused.value.problems[0].key == "data.system"
    assert "System role not supported" in refused.value.problems[0].what


@pytest.mark.parametrize("name", STORED)
def test_loss_is_exact_under_stored_templates(name: str, stored_tokenizer: Callable, make_case: Callable) -> None:
    tokens, closing = STORED[name]
    assert_exact(
        make_case(stored_tokenizer(name, tokens), sample_rows(6), None if name == "gemma" else SYSTEM), closing
    )


@pytest.mark.parametrize("name", ["qwen3", "qwen3_6", "qwen3_8"])
def test_a_reasoning_model_learns_the_answer_alone_when_it_does_not_think(
    name: str, stored_tokenizer: Callable, make_case: Callable
) -> None:
    assert_exact(make_case(stored_tokenizer(name, QWEN), sample_rows(6), template=NO_THINKING), "<|im_end|>")


@pytest.mark.parametrize("name", ["qwen3", "qwen3_6", "qwen3_8"])
def test_a_reasoning_model_learns_to_answer_without_a_thought_from_where_it_really_begins(
    name: str, stored_tokenizer: Callable, make_case: Callable
) -> None:
    question = {"role": "user", "content": "What is gout?"}
    # The generation prompt of some opens the block itself
    prompt = stored_tokenizer(name, QWEN).apply_chat_template([question], tokenize=False, add_generation_prompt=True)
    block = "<think>\n\n</think>\n\n"
    opened = prompt.rpartition("<|im_start|>assistant\n")[2]
    assert block.startswith(opened)
    case = make_case(stored_tokenizer(name, QWEN), sample_rows(6))
    assert_exact(case, "<|im_end|>", block.removeprefix(opened))


def test_loss_is_exact_under_a_sentencepiece_tokenizer(metaspace_tokenizer: Any, make_case: Callable) -> None:
    assert_exact(make_case(metaspace_tokenizer, sample_rows(6)), "</s>")


# --- what the gate refuses --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "tokens", "template", "kinds"),
    [
        # The prompt ends in <think>, which the training text does not hold
        ("deepseek_r1_distill", DEEPSEEK, {}, {"prefix"}),
        ("deepseek_r1_distill", DEEPSEEK, NO_THINKING, {"prefix"}),
        # The answer is closed by nothing
        ("glm4moe", GLM, {}, {"stop"}),
        ("glm4moe", GLM, NO_THINKING, {"stop"}),
        # The name of the channel is part of the completion
        ("gptoss", HARMONY, {}, {"outside"}),
    ],
)
def test_a_template_that_would_teach_something_else_is_refused(
    name: str,
    tokens: Any,
    template: dict[str, Any],
    kinds: set[str],
    stored_tokenizer: Callable,
    make_case: Callable,
) -> None:
    case = make_case(stored_tokenizer(name, tokens), sample_rows(4), template=template)
    report, _ = case.refusal()
    assert report.violations == {kind: [0, 1, 2, 3] for kind in kinds}


def test_a_clean_dataset_is_counted_and_passes(make_tokenizer: Callable, make_case: Callable) -> None:
    case = make_case(make_tokenizer("llama3"), sample_rows(5))
    report = case.audit()
    chats = [row["prompt"] + row["completion"] for row in case.conversations]
    encoded = case.tokenizer.apply_chat_template(chats, tokenize=True, return_dict=True)["input_ids"]
    lengths = [len(ids) for ids in encoded]
    answers = [case.tokenizer.encode(chat[-1]["content"], add_special_tokens=False) for chat in chats]
    assert (report.rows_in, report.rows_out) == (5, 5)
    assert (report.tokens, report.longest) == (sum(lengths), max(lengths))
    assert report.supervised == sum(len(ids) + 1 for ids in answers)
    record = report.as_dict()
    assert set(record["violations"].values()) == {0}
    assert record["supervised_share"] == round(report.supervised / report.tokens, 4)


def add_bos(case: Case, ids: list[int], labels: list[int]) -> tuple[list[int], list[int]]:
    return [case.tokenizer.bos_token_id, *ids], [IGNORED, *labels]


def drop_bos(_case: Case, ids: list[int], labels: list[int]) -> tuple[list[int], list[int]]:
    return ids[1:], labels[1:]


def mask_all(_case: Case, ids: list[int], labels: list[int]) -> tuple[list[int], list[int]]:
    return ids, [IGNORED] * len(labels)


def drop_stop(_case: Case, ids: list[int], labels: list[int]) -> tuple[list[int], list[int]]:
    return ids[:-1], labels[:-1]


def mask_stop(_case: Case, ids: list[int], labels: list[int]) -> tuple[list[int], list[int]]:
    return ids, [*labels[:-1], IGNORED]


def change_prompt(case: Case, ids: list[int], labels: list[int]) -> tuple[list[int], list[int]]:
    return [*ids[:6], case.tokenizer.encode("z")[0], *ids[7:]], labels


def mask_first_of_answer(_case: Case, ids: list[int], labels: list[int]) -> tuple[list[int], list[int]]:
    first = next(place for place, label in enumerate(labels) if label != IGNORED)
    return ids, [*labels[:first], IGNORED, *labels[first + 1 :]]


def train_end_of_prompt(_case: Case, ids: list[int], labels: list[int]) -> tuple[list[int], list[int]]:
    first = next(place for place, label in enumerate(labels) if label != IGNORED)
    return ids, [*labels[: first - 1], ids[first - 1], *labels[first:]]


def teach_another_token(case: Case, ids: list[int], labels: list[int]) -> tuple[list[int], list[int]]:
    return ids, [*labels[:-3], case.tokenizer.encode("z")[0], *labels[-2:]]


def close_the_answer_early(_case: Case, ids: list[int], labels: list[int]) -> tuple[list[int], list[int]]:
    return [*ids[:-4], ids[-1], *ids[-3:]], [*labels[:-4], ids[-1], *labels[-3:]]


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (add_bos, "bos"),
        (drop_bos, "bos"),
        (mask_all, "nothing"),
        (drop_stop, "stop"),
        (mask_stop, "stop"),
        (change_prompt, "prefix"),
        (mask_first_of_answer, "outside"),
        (train_end_of_prompt, "outside"),
        (teach_another_token, "outside"),
        (close_the_answer_early, "control"),
    ],
)
def test_a_tampered_row_is_found_and_refused(
    change: Callable, kind: str, make_tokenizer: Callable, make_case: Callable
) -> None:
    case = make_case(make_tokenizer("llama3"), sample_rows(4))
    dataset = case.tampered(2, lambda ids, labels: change(case, ids, labels))
    report, words = case.refusal(dataset)
    assert set(map(tuple, report.violations.values())) == {(2,)}
    assert kind in report.violations
    assert report.as_dict()["violations"][kind] == 1
    assert "1 of 4 train" in words
    assert "row 2: " in words
    assert "medibot inspect" in words


def test_a_lost_row_is_counted(make_tokenizer: Callable, make_case: Callable) -> None:
    case = make_case(make_tokenizer("qwen"), sample_rows(5))
    report, words = case.refusal(case.dataset.select([0, 2, 4]))
    assert report.as_dict()["violations"]["lost"] == 2
    assert "5 in, 3 out" in words
    assert set(report.violations) == {"lost"}


def test_answers_that_trl_cuts_and_rows_that_it_drops_are_refused(
    make_tokenizer: Callable, make_case: Callable
) -> None:
    rows = [
        {"question": "What is a fever?", "answer": "A rise in temperature."},
        {"question": "What is a cough?", "answer": "Air pushed out of the lungs. " * 20},
        {"question": "What is a cold, and " + "how long is it there, and " * 20, "answer": "A week."},
    ]
    case = make_case(make_tokenizer("qwen"), rows).trained_again(max_length=100)
    report, words = case.refusal()
    assert report.violations == {"cut": [1], "lost": [2]}
    assert "answers cut at max_length (row 1: the loss covers 'Air pushed" in words
    assert "3 in, 2 out" in words


def test_loss_on_the_prompt_is_refused(make_tokenizer: Callable, make_case: Callable) -> None:
    case = make_case(make_tokenizer("qwen"), sample_rows(3)).trained_again(completion_only_loss=False)
    report, words = case.refusal()
    assert report.violations == {"outside": [0, 1, 2]}
    assert "3 of 3 train: rows whose trained span is not exactly the answer" in words
    assert "the loss covers '<|im_start|>system" in words


def test_an_answer_whose_end_token_generation_does_not_know_is_refused(
    make_tokenizer: Callable, make_case: Callable
) -> None:
    case = make_case(make_tokenizer("gemma"), sample_rows(3), system=None)
    report = Audit(case.dataset, case.conversations, case.tokenizer, [case.tokenizer.eos_token_id], 2048)
    assert report.violations == {"stop": [0, 1, 2]}


def test_rows_in_another_order_are_found_by_their_tokens(make_tokenizer: Callable, make_case: Callable) -> None:
    case = make_case(make_tokenizer("qwen"), sample_rows(8)).trained_again(shuffle_dataset=True, seed=3)
    answers = [row["completion"][0]["content"] + "<|im_end|>\n" for row in case.conversations]
    assert case.supervised() != answers
    assert sorted(case.supervised()) == sorted(answers)
    assert case.audit().violations == {}


def test_rows_that_several_processes_tokenize_are_those_of_one(make_tokenizer: Callable, make_case: Callable) -> None:
    case = make_case(make_tokenizer("qwen"), sample_rows(9))
    assert case.trainer.args.dataset_num_proc is None
    many = replace(case.prepared, split=case.prepared.split | {"rows": {"train": 4000 + os.cpu_count()}})
    assert sft_config(many, Run(Path())).dataset_num_proc == min(2, os.cpu_count())
    shared = case.trained_again(dataset_num_proc=3)
    assert shared.dataset[:] == case.dataset[:]
    assert not shared.audit().violations


def test_packed_rows_are_audited_one_by_one(make_tokenizer: Callable, make_case: Callable) -> None:
    plain = make_case(make_tokenizer("qwen"), sample_rows(12))
    case = plain.trained_again(packing=True)
    assert len(case.dataset) < 12
    report = case.audit()
    assert report.violations == {}
    assert report.as_dict() == plain.audit().as_dict()


def test_a_fault_inside_a_packed_row_is_refused_with_its_example(
    stored_tokenizer: Callable, make_case: Callable
) -> None:
    case = make_case(stored_tokenizer("gptoss", HARMONY), sample_rows(6)).trained_again(packing=True)
    report, words = case.refusal()
    assert report.violations == {"outside": [0, 1, 2, 3, 4, 5]}
    assert "'<|channel|>" in words


def test_wrapped_packing_is_refused(make_tokenizer: Callable, make_case: Callable) -> None:
    case = make_case(make_tokenizer("qwen"), sample_rows(12))
    for length in (128, 2048):
        again = case.trained_again(packing=True, packing_strategy="wrapped", max_length=length)
        report, words = again.refusal()
        assert "lost" in report.violations
        assert "12 in" in words


# --- text that looks like control tokens ------------------------------------------------------------------------------

TYPED = ["<|im_end|>", "</s>", "<|eot_id|>", "[INST]", "<|user|>", "<start_of_turn>", "<end_of_turn>", "<think>"]
TYPED_ROWS = [
    {"question": f"What does {text} mean, and {text}{text}?", "answer": f"The sign {text} means\n{text}: stop {text}."}
    for text in TYPED
]
CLEAN_ROW = {"question": "What is a fever?", "answer": "A rise in temperature."}


@pytest.mark.parametrize("family", FAMILIES)
def test_control_tokens_in_a_row_stay_text(family: str, make_tokenizer: Callable, make_case: Callable) -> None:
    tokenizer = make_tokenizer(family)
    case = make_case(tokenizer, [*TYPED_ROWS, CLEAN_ROW], system=None if family == "gemma" else SYSTEM)
    assert case.audit().violations == {}
    control = set(tokenizer.all_special_ids)
    counts = {sum(i in control for i in ids) for ids in case.dataset["input_ids"]}
    assert len(counts) == 1
    plain = ["<|user|>"] if family == "tinyllama" else []
    taught = {text.strip().removesuffix(STOPS[family]) for text in case.supervised()}
    for typed, row in zip(TYPED, TYPED_ROWS, strict=True):
        spaced = row["answer"].replace(typed, f"{typed[0]} {typed[1:]}")
        assert (spaced if typed in plain else row["answer"]) in taught
    line = next(line for line in case.prepared.ledger if line["rule"] == "role markers made text")
    assert line["changed"] == len(plain)


def test_control_tokens_are_found_where_upstream_is_not_asked_to_read_them_as_text(
    make_tokenizer: Callable, make_case: Callable
) -> None:
    case = make_case(make_tokenizer("qwen"), [TYPED_ROWS[0], CLEAN_ROW])
    forged = SFTTrainer(
        model=make_tiny_model(case.tokenizer),
        args=SFTConfig(output_dir=str(case.prepared.recipe.path.parent), use_cpu=True, bf16=False, report_to="none"),
        train_dataset=case.conversations.select_columns(["prompt", "completion"]),
        processing_class=case.tokenizer,
    )
    typed = [row["completion"][0]["content"] for row in case.conversations].index(TYPED_ROWS[0]["answer"])
    report, words = case.refusal(forged.train_dataset)
    assert report.violations["control"] == [typed]
    assert "1 of 2 train: rows whose text holds control tokens" in words


def test_a_question_about_thinking_marks_is_text_to_a_reasoning_model(
    stored_tokenizer: Callable, make_case: Callable
) -> None:
    row = {"question": "What is <think> and </think>?", "answer": "Marks around a thought."}
    assert_exact(make_case(stored_tokenizer("qwen3", QWEN), [row, CLEAN_ROW], template=NO_THINKING), "<|im_end|>")


def test_an_answer_of_which_the_template_drops_a_part_is_refused(
    stored_tokenizer: Callable, make_case: Callable
) -> None:
    row = {"question": "What closes a thought?", "answer": "The mark </think> does."}
    case = make_case(stored_tokenizer("qwen3", QWEN), [row, CLEAN_ROW], template=NO_THINKING)
    report, words = case.refusal()
    # What is left differs in white space alone
    assert report.violations == {"prefix": [0], "outside": [0]}
    assert "1 of 2 train" in words


def test_letters_that_a_tokenizer_composes_are_still_the_answer(bpe: str, make_case: Callable) -> None:
    tokenizer = composing_tokenizer(bpe)
    row = {"question": "What is it called?", "answer": "Me\u0301nie\u0300re's disease."}
    case = make_case(tokenizer, [row, CLEAN_ROW])
    assert any("M\u00e9ni\u00e8re" in text for text in case.supervised())
    assert case.audit().violations == {}


# --- several turns ----------------------------------------------------------------------------------------------------

WORDS = ["fever", "cough", "rash", "cramp"]
THINKS = {"reasoning_content": "The word is plain.\n\nSay it briefly."}


def make_turns(turns: int, system: str | None, thinks: dict[str, str]) -> dict[str, Any]:
    """A prepared row of so many turns; its last answer alone has a thought."""
    chat = [{"role": "system", "content": system}] if system else []
    for word in WORDS[:turns]:
        chat.append({"role": "user", "content": f"What is a {word}?"})
        chat.append({"role": "assistant", "content": f"A {word} is a sign: see a doctor."})
    return {"prompt": chat[:-1], "completion": [chat[-1] | thinks], "chat_template_kwargs": KWARGS}


KWARGS = {"sanitize_control_tokens": True}
TURNS = [1, 3, 2, 1, 2, 3]


@dataclass(frozen=True)
class Chats:
    """Conversations as they are handed to TRL, and the rows that it made of them."""

    tokenizer: PreTrainedTokenizerBase
    conversations: Dataset
    dataset: Dataset

    def audit(self, dataset: Dataset | None = None) -> Audit:
        return Audit(dataset or self.dataset, self.conversations, self.tokenizer, stop_ids(self.tokenizer), 2048)

    def taught(self) -> list[str]:
        return [
            self.tokenizer.decode([i for i, label in zip(ids, labels, strict=True) if label != IGNORED])
            for ids, labels in spans(self.dataset)
        ]

    def tampered(self, row: int, change: Callable[[list[int], list[int]], list[int]]) -> Dataset:
        """The trainer's dataset with other labels in one row."""

        def apply(columns: dict[str, list[int]], index: int) -> dict[str, list[int]]:
            return {"labels": change(columns["input_ids"], columns["labels"])} if index == row else columns

        return self.dataset.map(apply, with_indices=True)


def stop_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The end token, and the end of turn of a family that has another."""
    names = {"<end_of_turn>", "<|im_end|>", "<|eot_id|>"}
    ends = [number for number, token in tokenizer.added_tokens_decoder.items() if token.content in names]
    return [tokenizer.eos_token_id, *ends]


def make_chats(tokenizer: PreTrainedTokenizerBase, rows: list[dict[str, Any]], folder: Path, **more: Any) -> Chats:
    tokenizer.pad_token = tokenizer.eos_token
    conversations = Dataset.from_list(rows)
    switches = {"use_cpu": True, "bf16": False, "report_to": "none", "max_length": 2048} | more
    trainer = SFTTrainer(
        model=make_tiny_model(tokenizer),
        args=SFTConfig(output_dir=str(folder), **switches),
        train_dataset=conversations,
        processing_class=tokenizer,
    )
    return Chats(tokenizer, conversations, trainer.train_dataset)


@pytest.fixture(params=[*FAMILIES, "qwen3"])
def chats(
    request: pytest.FixtureRequest, make_tokenizer: Callable, stored_tokenizer: Callable, tmp_path: Path
) -> Chats:
    """Rows of one, two and three turns under each family's template; those of Qwen3 think."""
    thinking = request.param == "qwen3"
    tokenizer = stored_tokenizer("qwen3", QWEN) if thinking else make_tokenizer(request.param)
    system = None if request.param == "gemma" else SYSTEM
    return make_chats(tokenizer, [make_turns(n, system, THINKS if thinking else {}) for n in TURNS], tmp_path)


def test_the_loss_covers_the_last_answer_alone_in_rows_of_several_turns(chats: Chats) -> None:
    closing = chats.tokenizer.decode([stop_ids(chats.tokenizer)[-1]])
    for turns, row, text in zip(TURNS, chats.conversations, chats.taught(), strict=True):
        answer = row["completion"][0]
        assert answer["content"] == f"A {WORDS[turns - 1]} is a sign: see a doctor."
        thought = f"<think>\n{answer['reasoning_content']}\n</think>\n\n" if "reasoning_content" in answer else ""
        assert text.strip() == thought + answer["content"] + closing
    report = chats.audit()
    assert report.violations == {}
    assert report.rows_out == len(TURNS)


def labelled(ids: list[int], labels: list[int], first: int, last: int) -> list[int]:
    """Labels with loss on the tokens from `first` up to `last` too."""
    return [*labels[:first], *ids[first:last], *labels[last:]]


def place_of(chats: Chats, ids: list[int], text: str) -> slice:
    """Where the tokens that spell `text` stand for the first time."""
    spelled = [chats.tokenizer.decode(ids[:end]) for end in range(len(ids) + 1)]
    at = spelled[-1].index(text)
    first = next(end for end, written in enumerate(spelled) if len(written) > at) - 1
    return slice(first, next(end for end, written in enumerate(spelled) if len(written) >= at + len(text)))


def train_earlier_answer(chats: Chats, ids: list[int], labels: list[int]) -> list[int]:
    span = place_of(chats, ids, "A fever is a sign")
    return labelled(ids, labels, span.start, span.stop)


def train_user_turn(chats: Chats, ids: list[int], labels: list[int]) -> list[int]:
    span = place_of(chats, ids, "What is a cough?")
    return labelled(ids, labels, span.start, span.stop)


def mask(labels: list[int], place: int) -> list[int]:
    return [*labels[:place], IGNORED, *labels[place + 1 :]]


def mask_the_stop(chats: Chats, ids: list[int], labels: list[int]) -> list[int]:
    stops = stop_ids(chats.tokenizer)
    return mask(labels, max(place for place, token in enumerate(ids) if token in stops))


def mask_one_of_the_answer(chats: Chats, ids: list[int], labels: list[int]) -> list[int]:
    return mask(labels, place_of(chats, ids, "rash is a sign").stop - 1)


def mask_the_first(_chats: Chats, _ids: list[int], labels: list[int]) -> list[int]:
    return mask(labels, next(place for place, label in enumerate(labels) if label != IGNORED))


@pytest.mark.parametrize(
    "change", [train_earlier_answer, train_user_turn, mask_the_stop, mask_one_of_the_answer, mask_the_first]
)
def test_a_row_of_three_turns_with_other_labels_is_refused(change: Callable, chats: Chats) -> None:
    dataset = chats.tampered(1, lambda ids, labels: change(chats, ids, labels))
    assert dataset[1]["labels"] != chats.dataset[1]["labels"]
    report = chats.audit(dataset)
    assert set(map(tuple, report.violations.values())) == {(1,)}
    assert "outside" in report.violations
    with pytest.raises(RecipeError, match="rows whose trained span is not exactly the answer"):
        report.refuse_faults()


# --- every character counts -------------------------------------------------------------------------------------------

CODE = "Do it so:\n\n\n```python\nif fever:\n    rest(days=2)  # two spaces\n\tdrink()\n```\n\n  - or else\u00a0wait "
ODD = "\n First:  two spaces.\n\n\n\tThen a tab, \u00a0and   three. \n"
QUESTION = [{"role": "user", "content": "What is to be done?"}]


def make_row(answer: str, thought: str | None = None) -> dict[str, Any]:
    message = {"role": "assistant", "content": answer} | ({"reasoning_content": thought} if thought else {})
    return {"prompt": QUESTION, "completion": [message], "chat_template_kwargs": KWARGS}


PLAIN_ROW, THINKING_ROW = make_row("Drink water."), make_row("Drink water.", "Water helps.")


def composing_tokenizer(bpe: str) -> PreTrainedTokenizerFast:
    """A tokenizer that reads what can be one character as one."""
    from tokenizers import Tokenizer, normalizers

    backend = Tokenizer.from_str(bpe)
    backend.normalizer = normalizers.NFC()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    tokenizer.chat_template = FAMILIES["qwen"][0]
    return tokenizer


@pytest.fixture(params=[*FAMILIES, "metaspace", "composing"])
def any_tokenizer(
    request: pytest.FixtureRequest, make_tokenizer: Callable, metaspace_tokenizer: Any, bpe: str
) -> PreTrainedTokenizerBase:
    if request.param == "metaspace":
        return metaspace_tokenizer
    return composing_tokenizer(bpe) if request.param == "composing" else make_tokenizer(request.param)


@pytest.fixture
def thinker(stored_tokenizer: Callable) -> PreTrainedTokenizerBase:
    return stored_tokenizer("qwen3", QWEN)


def test_an_answer_keeps_its_indentation_blank_lines_and_spaces(
    any_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    rows = [make_row(CODE), make_row("Me\u0301nie\u0300re's  disease."), PLAIN_ROW]
    chats = make_chats(any_tokenizer, rows, tmp_path)
    assert CODE.strip() in chats.taught()[0]
    assert chats.audit().violations == {}


def swapped(text: str, other: str) -> tuple[str, str]:
    assert other != text
    return text, other


CHANGES = [
    swapped(CODE, CODE.replace("  # two", " # two")),
    swapped(CODE, CODE.replace("    rest", "   rest")),
    swapped(CODE, CODE.replace("\tdrink", " drink")),
    swapped(CODE, CODE.replace("\n\n\n", "\n\n")),
    swapped(CODE, CODE.replace("\u00a0", " ")),
    swapped("Take 5 µg.", "Take 5 μg."),
    swapped("A ﬁne day, a\u0308 and 1\u2044 2.", "A fine day, a\u0308 and 1\u2044 2."),
]


@pytest.mark.parametrize(("written", "taught"), CHANGES)
def test_an_answer_of_which_one_character_became_another_is_refused(
    written: str, taught: str, any_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    right = make_chats(any_tokenizer, [PLAIN_ROW, make_row(written)], tmp_path)
    wrong = make_chats(any_tokenizer, [PLAIN_ROW, make_row(taught)], tmp_path)
    assert right.audit().violations == {}
    report = right.audit(wrong.dataset)
    assert report.violations == {"outside": [1]}


@pytest.mark.parametrize("answer", [CODE, "Drink water."])
def test_a_thought_keeps_its_white_space(answer: str, thinker: Any, tmp_path: Path) -> None:
    chats = make_chats(thinker, [make_row(answer, ODD), THINKING_ROW], tmp_path)
    assert chats.taught()[0].startswith(f"<think>\n{ODD.strip(chr(10))}\n</think>\n\n{answer}")
    assert chats.audit().violations == {}


@pytest.mark.parametrize(
    ("answer", "thought", "kind"),
    [
        (CODE, ODD.replace(":  two", ": two"), "thinking"),
        (CODE, ODD.replace("\n\n\n", "\n\n"), "thinking"),
        (CODE, ODD.strip() + "\nAnd more.", "thinking"),
        (CODE, "And more.\n" + ODD.strip(), "thinking"),
        (CODE, ODD.strip() + "\n</think>\n\nAnd more.", "outside"),
        (CODE.replace("  # two", " # two"), ODD, "outside"),
    ],
)
def test_a_thought_or_an_answer_behind_it_that_became_another_is_refused(
    answer: str, thought: str, kind: str, thinker: Any, tmp_path: Path
) -> None:
    right = make_chats(thinker, [THINKING_ROW, make_row(CODE, ODD)], tmp_path)
    wrong = make_chats(thinker, [THINKING_ROW, make_row(answer, thought)], tmp_path)
    report = right.audit(wrong.dataset)
    assert kind in report.violations
    assert set(map(tuple, report.violations.values())) == {(1,)}


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "thinking"])
def test_a_thought_that_a_template_leaves_out_is_refused(family: str, make_tokenizer: Callable, tmp_path: Path) -> None:
    chats = make_chats(make_tokenizer(family), [PLAIN_ROW, THINKING_ROW], tmp_path)
    report = chats.audit()
    assert report.violations == {"thinking": [1]}
    with pytest.raises(RecipeError, match="1 of 2 train: rows whose thinking the template does not write"):
        report.refuse_faults()


@pytest.mark.parametrize(
    "change",
    ["reasoning_content | replace('  ', ' ')", "reasoning_content | truncate(20)", "reasoning_content | lower"],
)
def test_a_thought_that_a_template_changes_is_refused(change: str, thinker: Any, tmp_path: Path) -> None:
    written = "reasoning_content.strip('\\n')"
    assert written in thinker.chat_template
    thinker.chat_template = thinker.chat_template.replace(written, change)
    chats = make_chats(thinker, [make_row("Drink water.", "it rains"), make_row(CODE, ODD)], tmp_path)
    assert chats.audit().violations == {"thinking": [1]}


def test_an_answer_without_a_thought_is_learned_with_its_empty_block_beside_those_with_one(
    thinker: Any, tmp_path: Path
) -> None:
    chats = make_chats(thinker, [THINKING_ROW, PLAIN_ROW], tmp_path)
    assert chats.taught()[1].startswith("<think>\n\n</think>\n\nDrink water.") and chats.audit().violations == {}
    # A block that is not empty is none
    wrong = make_chats(thinker, [THINKING_ROW, make_row("Drink water.", "Rain.")], tmp_path)
    assert chats.audit(wrong.dataset).violations == {"outside": [1]}


def test_a_refused_template_that_knows_thinking_names_the_setting(
    stored_tokenizer: Callable, make_case: Callable
) -> None:
    tokenizer = stored_tokenizer("qwen3", QWEN)
    opening = "\\n<think>\\n' + reasoning_content"
    assert opening in tokenizer.chat_template
    tokenizer.chat_template = tokenizer.chat_template.replace(opening, opening.replace("<think>", "<think>Well. "))
    case = make_case(tokenizer, sample_rows(2))
    report, words = case.refusal()
    assert report.violations == {"outside": [0, 1]}
    assert "data.chat_template_kwargs: {enable_thinking: false}" in words


# --- every row --------------------------------------------------------------------------------------------------------


def renamed(chats: Chats, change: Callable[[list[int], list[int]], tuple[list[int], list[int]]]) -> Dataset:
    """The trainer's dataset with other tokens in its second row."""

    def apply(columns: dict[str, list[int]], index: int) -> dict[str, list[int]]:
        ids, labels = columns["input_ids"], columns["labels"]
        ids, labels = change(ids, labels) if index == 1 else (ids, labels)
        return {"input_ids": ids, "labels": labels}

    return chats.dataset.map(apply, with_indices=True)


@pytest.mark.parametrize(
    ("left_out", "faulty"),
    [("messages | rejectattr('role', 'equalto', 'system')", [0, 1, 2, 3, 4, 5]), ("messages[-3:]", [1, 2, 4, 5])],
)
def test_a_template_that_leaves_messages_out_is_refused(
    left_out: str, faulty: list[int], make_tokenizer: Callable, tmp_path: Path
) -> None:
    tokenizer = make_tokenizer("qwen")
    tokenizer.chat_template = tokenizer.chat_template.replace("in messages", f"in {left_out}")
    # One message fewer stands in a prompt: its last three begin in the same place with the answer or without
    tokenizer.chat_template = tokenizer.chat_template.replace("[-3:]", "[-(2 if add_generation_prompt else 3):]")
    report = make_chats(tokenizer, [make_turns(turns, SYSTEM, {}) for turns in TURNS], tmp_path).audit()
    assert report.violations == {"unwritten": faulty}
    with pytest.raises(RecipeError, match="rows of whose messages the template leaves some out"):
        report.refuse_faults()


def test_a_row_that_stands_in_the_place_of_another_is_refused(chats: Chats) -> None:
    order = [0, 1, 1, 3, 4, 5]
    assert set(chats.audit(chats.dataset.select([5, 4, 3, 2, 1, 0])).violations) == set()
    report = chats.audit(chats.dataset.select(order))
    # The third of three equal rows, where two conversations are equal
    assert report.violations == {"outside": [5]}


def test_conversations_with_the_same_tokens_answer_for_a_row_each(make_tokenizer: Callable, tmp_path: Path) -> None:
    rows = [PLAIN_ROW, make_row("Rest."), PLAIN_ROW, PLAIN_ROW]
    chats = make_chats(make_tokenizer("qwen"), rows, tmp_path)
    assert chats.audit(chats.dataset.select([3, 2, 1, 0])).violations == {}
    assert chats.audit(chats.dataset.select([1, 1, 2, 3])).violations == {"outside": [1]}


def test_what_is_trained_behind_the_stop_token_is_refused(chats: Chats) -> None:
    newline = chats.tokenizer.encode("\n\n", add_special_tokens=False)
    dataset = renamed(chats, lambda ids, labels: (ids + newline, labels + newline))
    assert chats.audit(dataset).violations == {"outside": [1]}


def test_tokens_that_no_length_counts_are_refused(make_tokenizer: Callable, make_case: Callable) -> None:
    case = make_case(make_tokenizer("qwen"), sample_rows(12)).trained_again(packing=True)
    shorter = case.dataset.map(lambda row: {"seq_lengths": row["seq_lengths"][:-1]})
    more = case.dataset.map(lambda row: {"input_ids": [*row["input_ids"], 5], "labels": [*row["labels"], 5]})
    assert case.audit(shorter).rows_out == 12
    assert case.audit(shorter).violations == {}
    assert "lost" in case.audit(more).violations
    cut = case.dataset.map(lambda row: {"seq_lengths": [*row["seq_lengths"][:-1], row["seq_lengths"][-1] - 1]})
    assert set(case.audit(cut).violations) >= {"lost", "outside"}


@pytest.mark.parametrize("size", [1, 2, 5])
def test_every_batch_is_checked(size: int, chats: Chats, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("medibot.data.gate.BATCH", size)
    whole = chats.audit()
    assert whole.violations == {}
    assert whole.tokens == sum(map(len, chats.dataset["input_ids"]))
    for row in range(len(TURNS)):
        dataset = chats.tampered(row, lambda ids, labels: mask_the_first(chats, ids, labels))
        assert set(map(tuple, chats.audit(dataset).violations.values())) == {(row,)}


def test_rows_are_read_through_slices_and_indices(chats: Chats) -> None:
    twice = concatenate_datasets([chats.dataset, chats.dataset])
    for view in (twice.select(range(6, 12)), twice.select([0, 7, 2, 9, 4, 11])):
        assert chats.audit(view).violations == {}
        assert chats.audit(view).tokens == sum(map(len, chats.dataset["input_ids"]))


# --- once per content -------------------------------------------------------------------------------------------------


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of rows that the gate really checks, batch by batch."""
    checked: list[int] = []
    check = Audit.check_batch

    def counted(audit: Audit, batch: list[Any]) -> None:
        checked.append(len(batch))
        check(audit, batch)

    monkeypatch.setattr(Audit, "check_batch", counted)
    return checked


def test_the_same_rows_are_checked_once(make_tokenizer: Callable, make_case: Callable, reads: list[int]) -> None:
    case = make_case(make_tokenizer("qwen"), sample_rows(8))
    (first,), (second,) = (audit_splits(case.trainer, case.prepared) for _ in range(2))
    assert reads == [8]
    assert second.as_dict() == first.as_dict() == case.audit().as_dict()
    second.refuse_faults()


def test_the_same_rows_behind_slices_and_indices_are_the_same(make_tokenizer: Callable, make_case: Callable) -> None:
    rows = make_case(make_tokenizer("qwen"), sample_rows(8)).dataset
    key = hash_rows(rows)
    twice = concatenate_datasets([rows, rows])
    assert hash_rows(twice.select(range(8, 16))) == hash_rows(twice.select([0, 9, 2, 11, 4, 5, 14, 7])) == key
    assert hash_rows(twice.select([1, 0, *range(2, 8)])) != key
    assert hash_rows(twice.select(range(7))) != key
    assert hash_rows(rows.map(lambda row: {"seq_lengths": [len(row["input_ids"])]})) != key


@pytest.mark.parametrize("column", ["input_ids", "labels"])
@pytest.mark.parametrize("place", [0, 5, -1])
def test_a_record_excuses_no_other_rows(
    column: str, place: int, make_tokenizer: Callable, make_case: Callable, reads: list[int]
) -> None:
    case = make_case(make_tokenizer("qwen"), sample_rows(4))
    audit_splits(case.trainer, case.prepared)

    def apply(row: dict[str, list[int]], index: int) -> dict[str, list[int]]:
        if index == 2:
            row[column][place] = 7
        return row

    case.trainer.train_dataset = case.dataset.map(apply, with_indices=True)
    for _ in range(2):
        (audit,) = audit_splits(case.trainer, case.prepared)
        assert set(map(tuple, audit.violations.values())) == {(2,)}
        with pytest.raises(RecipeError, match="row 2: the loss covers"):
            audit.refuse_faults()
    # Once for the rows as they were; in their order, and by their tokens, for those that were tampered with
    assert reads == [4, 4, 4]


def test_a_record_holds_for_its_limit_its_stops_and_its_split_alone(
    make_tokenizer: Callable, make_case: Callable, reads: list[int]
) -> None:
    case = make_case(make_tokenizer("qwen"), sample_rows(4))
    rows, prepared = case.dataset, case.prepared
    audit_once(prepared, "train", rows, 2048)
    audit_once(prepared, "train", rows, 1024)
    other = copy.deepcopy(prepared.generation)
    other.eos_token_id = [5]
    audit = audit_once(replace(prepared, generation=other), "train", rows, 2048)
    assert audit.violations == {"stop": [0, 1, 2, 3]}
    audit_once(replace(prepared, fingerprint="another"), "train", rows, 2048)
    assert reads == [4, 4, 4, 4, 4]


def test_a_record_of_an_older_gate_or_a_torn_one_proves_nothing(
    make_tokenizer: Callable, make_case: Callable, reads: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make_case(make_tokenizer("qwen"), sample_rows(4))
    audit_splits(case.trainer, case.prepared)
    (record,) = case.prepared.folder.glob("gate-*.json")
    for text in (record.read_text()[:-9], "{}", json.dumps(json.loads(record.read_text()) | {"key": "another"})):
        record.write_text(text)
        audit_splits(case.trainer, case.prepared)
    assert reads == [4] * 4
    monkeypatch.setattr("medibot.data.audited.GATE", 0)
    audit_splits(case.trainer, case.prepared)
    assert reads == [4] * 5
    assert [path.name for path in case.prepared.folder.glob("*.partial")] == []


def test_who_comes_while_the_rows_are_checked_waits_and_reads(
    make_tokenizer: Callable, make_case: Callable, reads: list[int]
) -> None:
    case = make_case(make_tokenizer("qwen"), sample_rows(8))
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda _: audit_once(case.prepared, "train", case.dataset, 2048).as_dict(), range(4)))
    assert reads == [8]
    assert found == [found[0]] * 4


# --- painted rows -----------------------------------------------------------------------------------------------------

COLOURFUL = {
    "question": "Is Ménière's disease 🤢 rare?",
    "answer": "It is rare 👩‍⚕️: naïve tests say 0.2 ‰ 🩺\N{REPLACEMENT CHARACTER}",
}


def painted_row(case: Case, row: int) -> list[tuple[str, str]]:
    return paint(case.dataset[row], case.tokenizer, case.prepared.generation.eos_token_id)


def check_painted(case: Case, index: int) -> None:
    """Pieces spell the decoded row, and each kind the decoded tokens of that kind."""
    row, pieces = case.dataset[index], painted_row(case, index)
    assert "".join(text for text, _ in pieces) == case.tokenizer.decode(row["input_ids"])
    stops = case.prepared.generation.eos_token_id
    masked = "".join(text for text, kind in pieces if kind == "masked")
    start = next(place for place, label in enumerate(row["labels"]) if label != IGNORED)
    assert masked == case.tokenizer.decode(row["input_ids"][:start])
    ends = [case.tokenizer.decode([i]) for i in row["input_ids"][start:] if i in stops]
    assert [text for text, kind in pieces if kind == "stop"] == ends
    assert len(ends) == 1


@pytest.mark.parametrize("family", ["smollm2", "tinyllama", "llama3"])
def test_painted_pieces_spell_the_row(family: str, make_tokenizer: Callable, make_case: Callable) -> None:
    case = make_case(make_tokenizer(family), [COLOURFUL, *sample_rows(2)])
    for index in range(3):
        check_painted(case, index)
    colourful = next(i for i in range(3) if "👩" in case.supervised()[i])
    texts = [text for text, _ in painted_row(case, colourful)]
    for character in "éè🤢👩⚕ï‰🩺":
        assert any(character in text for text in texts)
    assert sum("\N{REPLACEMENT CHARACTER}" in text for text in texts) == 1


def test_painted_pieces_keep_the_spaces_of_sentencepiece(metaspace_tokenizer: Any, make_case: Callable) -> None:
    case = make_case(metaspace_tokenizer, [COLOURFUL, *sample_rows(2)])
    for index in range(3):
        check_painted(case, index)
    assert any(text.startswith(" ") for text, _ in painted_row(case, 1))


def test_a_row_that_ends_inside_a_character_is_painted_whole(make_tokenizer: Callable) -> None:
    tokenizer = make_tokenizer("qwen")
    ids = tokenizer.encode("well 🩺")[:-1]
    pieces = paint({"input_ids": ids, "labels": ids}, tokenizer, [tokenizer.eos_token_id])
    assert "".join(text for text, _ in pieces) == tokenizer.decode(ids)
