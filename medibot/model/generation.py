"""Answer prompts in batches, decoding as the run says."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from medibot.model.loading import call_loader, model_path, source_kwargs
from medibot.model.tokenizer import end_of_turn_token
from medibot.recipe import Recipe

if TYPE_CHECKING:
    from peft import PeftModel


def load_generation_config(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
    """Return the model's generation config, stopping at the template's end of turn too, padding as the tokenizer does.

    Adapters are saved without one upstream, and several chat models name only the end of text: neither would ever stop.
    """
    try:
        config = GenerationConfig.from_pretrained(model_path(recipe), **source_kwargs(recipe))
    except OSError:
        config = GenerationConfig.from_model_config(call_loader(recipe, "config", AutoConfig.from_pretrained))
    known = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    stops = [token for token in {*known, tokenizer.eos_token_id, end_of_turn_token(tokenizer)} if token is not None]
    config.update(do_sample=False, temperature=None, top_p=None, top_k=None)
    config.update(eos_token_id=sorted(stops), pad_token_id=tokenizer.pad_token_id, **recipe.evaluation.generate)
    config.update(max_new_tokens=recipe.evaluation.max_new_tokens, max_length=None)
    return config


# Not inference_mode: FSDP2 keeps the buffers that it gathers weights in, and training could not write into them
@torch.no_grad()
def generate_answers(
    model: "PreTrainedModel | PeftModel",
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[dict[str, str]]],
    config: GenerationConfig,
    template: dict[str, Any],
    batch_size: int = 8,
    sharded: bool = False,
) -> Iterator[dict[str, Any]]:
    """Yield `text`, `tokens` and `stopped` (ended by itself) for each prompt, a list of chat messages.

    Prompts go through the chat template as in training (`template`: see template_kwargs), left-padded in batches. Where
    the weights are `sharded`, a process goes on until the others have their answers, too.
    """
    was_training, stops = model.training, set(config.eos_token_id)
    rendering = {"add_generation_prompt": True, "return_dict": True, "return_tensors": "pt", "padding": True} | template
    model.eval()
    try:
        for start in range(0, len(prompts), batch_size):
            chats = list(prompts[start : start + batch_size])
            batch = tokenizer.apply_chat_template(chats, tokenizer_kwargs={"padding_side": "left"}, **rendering)
            options = {"generation_config": config, "tokenizer": tokenizer, "synced_gpus": sharded}
            output = model.generate(**batch.to(model.device), **options)
            for ids in output[:, batch["input_ids"].shape[1] :].tolist():
                end = next((place for place, token in enumerate(ids) if token in stops), None)
                text = tokenizer.decode(ids[:end], skip_special_tokens=True).strip()
                yield {"text": text, "tokens": len(ids[:end]), "stopped": end is not None}
    finally:
        model.train(was_training)
