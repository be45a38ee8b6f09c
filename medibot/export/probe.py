"""Ask a model held-out questions and measure how far another one is from it."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from medibot.data.prepared import prepare
from medibot.errors import RecipeError
from medibot.model.tokenizer import load_saved_tokenizer, make_prompt, role_markers, template_kwargs
from medibot.recipe import Recipe

# Questions, and tokens of each greedy answer
QUESTIONS, TOKENS = 16, 32


def load_whole(folder: Path, **kwargs: Any) -> PreTrainedModel:
    """Load whole weights to compare them: on the GPUs if there are any, and beside them what does not fit."""
    device = {"device_map": "auto"} if torch.cuda.is_available() else {}
    return AutoModelForCausalLM.from_pretrained(folder, **device, **kwargs)


class Probe:
    """Held-out prompts with a model's own greedy answers, both as token ids, and its logits over the answers.

    `about` is what a proof says about the questions.
    """

    @torch.inference_mode()
    def __init__(self, model: PreTrainedModel, recipe: Recipe, weights: Path) -> None:
        """Let `model` answer; the folder `weights` holds its tokenizer and stop tokens."""
        tokenizer, config = load_saved_tokenizer(weights), GenerationConfig.from_pretrained(weights)
        asked, prompts = held_out_prompts(recipe, tokenizer)
        rendering = {"add_generation_prompt": True, "return_dict": True, "return_tensors": "pt", "padding": True}
        rendering |= template_kwargs(recipe)
        batch = tokenizer.apply_chat_template(prompts, tokenizer_kwargs={"padding_side": "left"}, **rendering)
        # Without the run's repetition penalty and minimum lengths: they would hide what the weights say
        ends = {"eos_token_id": config.eos_token_id, "pad_token_id": config.pad_token_id}
        greedy = GenerationConfig(max_new_tokens=TOKENS, do_sample=False, **ends)
        output = model.generate(**batch.to(model.device), generation_config=greedy)
        self.sequences = []
        for ids, mask in zip(output.tolist(), batch["attention_mask"], strict=True):
            prompt, answer = ids[len(mask) - int(mask.sum()) : len(mask)], ids[len(mask) :]
            end = next((place for place, token in enumerate(answer, start=1) if token in config.eos_token_id), None)
            self.sequences.append((prompt, answer[:end]))
        self.logits = self.answer_logits(model)
        self.about = {"asked": asked, "questions": len(self.sequences), "tokens": len(self.logits)}

    @torch.inference_mode()
    def answer_logits(self, model: PreTrainedModel) -> torch.Tensor:
        """Return the logits behind each answer token, float32 [tokens, vocabulary]; unpadded: no batch changes them."""
        rows = []
        for prompt, answer in self.sequences:
            ids = torch.tensor([prompt + answer], device=model.device)
            rows.append(model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float().cpu())
        return torch.cat(rows)

    def compare(self, model: PreTrainedModel) -> dict[str, float]:
        """Return how far `model` is from the one that answered."""
        return logit_distance(self.logits, self.answer_logits(model))


def held_out_prompts(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> tuple[str, list[list[dict[str, str]]]]:
    """Return (source, prompts): of the validation split, or the fixed questions where the data cannot be read.

    The test split stays closed: which merge is kept is a choice.
    """
    try:
        if rows := prepare(recipe, progress=lambda _: None).load("validation"):
            return "validation split", rows[:QUESTIONS]["prompt"]
    except RecipeError as error:
        print(f"warning: asking the recipe's fixed questions, because the run's data cannot be read: {error}")
    questions, markers = recipe.evaluation.questions, role_markers(tokenizer)
    if not questions:
        remedy = "bring back the data, or write evaluation.questions in the run's recipe.yaml"
        raise RecipeError.of("merge", "no validation split and no fixed question to prove a merge with", remedy)
    return "fixed questions", [make_prompt(text, recipe.data.common_system, markers) for text in questions]


def logit_distance(trained: torch.Tensor, other: torch.Tensor) -> dict[str, float]:
    """Compare two models' logits, both [tokens, vocabulary], over the same answers.

    `greedy_agreement` is the share of tokens for which both choose the same, `max_logit_difference` the largest of all,
    `mean_kl` the Kullback-Leibler divergence in nats a token.
    """
    logs = (other.log_softmax(-1), trained.log_softmax(-1))
    return {
        "greedy_agreement": (trained.argmax(-1) == other.argmax(-1)).float().mean().item(),
        "max_logit_difference": (trained - other).abs().max().item(),
        "mean_kl": torch.nn.functional.kl_div(*logs, log_target=True, reduction="batchmean").item(),
    }
