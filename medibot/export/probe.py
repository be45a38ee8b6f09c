"""Ask a model held-out questions and measure how far another one is from it."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from medibot.data.prepared import prepare
from medibot.errors import RecipeError
from medibot.model.template import template_kwargs
from medibot.model.tokenizer import make_prompt, role_markers
from medibot.recipe import Recipe

# Questions, and tokens of each greedy answer
QUESTIONS, TOKENS = 16, 32

# (prompt, answer) as token ids
Sequence = tuple[list[int], list[int]]


@dataclass(frozen=True)
class Probe:
    """Held-out prompts with a model's own greedy answers, and its logits over them.

    `logits` is float32, one row for each answer token of all questions, one column for each token of the vocabulary.
    """

    asked: str
    sequences: list[Sequence]
    logits: torch.Tensor

    def as_dict(self) -> dict[str, Any]:
        """Return what a proof says about the questions."""
        return {"asked": self.asked, "questions": len(self.sequences), "tokens": len(self.logits)}

    def distance(self, model: PreTrainedModel) -> dict[str, float]:
        """Return how far `model` is from the one that answered."""
        return logit_distance(self.logits, answer_logits(model, self.sequences))


@torch.inference_mode()
def make_probe(model: PreTrainedModel, recipe: Recipe, tokenizer: Tokenizer, config: GenerationConfig) -> Probe:
    """Let `model` answer the run's held-out questions greedily, TOKENS at most; `config` names its stop tokens."""
    asked, prompts = held_out_prompts(recipe, tokenizer)
    rendering: dict[str, Any] = {
        "add_generation_prompt": True,
        "return_dict": True,
        "return_tensors": "pt",
        "padding": True,
    }
    rendering |= {"tokenizer_kwargs": {"padding_side": "left"}} | template_kwargs(recipe)
    batch = tokenizer.apply_chat_template(prompts, **rendering).to(model.device)
    stops = {"eos_token_id": config.eos_token_id, "pad_token_id": config.pad_token_id}
    # Without the run's repetition penalty and minimum lengths: they would hide what the weights say
    greedy = GenerationConfig(do_sample=False, max_new_tokens=TOKENS, **stops)
    output = model.generate(**batch, generation_config=greedy)[:, batch["input_ids"].shape[1] :].tolist()
    sequences = []
    for ids, mask, answer in zip(batch["input_ids"], batch["attention_mask"], output, strict=True):
        end = next((place for place, token in enumerate(answer, start=1) if token in config.eos_token_id), None)
        sequences.append((ids[mask.bool()].tolist(), answer[:end]))
    return Probe(asked, sequences, answer_logits(model, sequences))


def held_out_prompts(recipe: Recipe, tokenizer: Tokenizer) -> tuple[str, list[list[dict[str, str]]]]:
    """Return (source, prompts): of the validation split, or the fixed questions where the data cannot be read.

    The test split stays closed: which merge is kept is a choice.
    """
    try:
        rows = prepare(recipe, progress=lambda _: None).load("validation")
    except RecipeError as error:
        print(f"warning: asking the recipe's fixed questions, because the run's data cannot be read: {error}")
        rows = None
    if rows is not None:
        return "validation split", rows.select(range(min(QUESTIONS, len(rows))))["prompt"][:]
    questions = recipe.evaluation.questions
    if not questions:
        remedy = "bring back the data, or write evaluation.questions in the run's recipe.yaml"
        raise RecipeError.of("merge", "no validation split and no fixed question to prove a merge with", remedy)
    markers = role_markers(tokenizer)
    return "fixed questions", [make_prompt(text, recipe.data.system, markers) for text in questions]


@torch.inference_mode()
def answer_logits(model: PreTrainedModel, sequences: list[Sequence]) -> torch.Tensor:
    """Return the logits behind every answer token, float32 [tokens, vocabulary]; unpadded, so no batch changes them."""
    rows = []
    for prompt, answer in sequences:
        ids = torch.tensor([prompt + answer], device=model.device)
        rows.append(model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float().cpu())
    return torch.cat(rows)


def logit_distance(trained: torch.Tensor, other: torch.Tensor) -> dict[str, float]:
    """Compare two models' logits, both [tokens, vocabulary], over the same answers.

    `greedy_agreement` is the share of tokens for which both choose the same, `max_logit_difference` the largest of all,
    `mean_kl` the Kullback-Leibler divergence in nats a token.
    """
    divergence = torch.nn.functional.kl_div(
        other.log_softmax(-1), trained.log_softmax(-1), log_target=True, reduction="batchmean"
    )
    return {
        "greedy_agreement": (trained.argmax(-1) == other.argmax(-1)).float().mean().item(),
        "max_logit_difference": (trained - other).abs().max().item(),
        "mean_kl": divergence.item(),
    }
