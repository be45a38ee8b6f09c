"""Answer conversations with a finished run, base model and tuned model, exactly as it was trained."""

import copy
import re
import threading
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from transformers import GenerationConfig, PreTrainedModel, StoppingCriteriaList, TextIteratorStreamer

from medibot.errors import RecipeError, explain_memory
from medibot.model.loading import load_base, load_tuned, silence_upstream
from medibot.model.precision import choose_precision
from medibot.model.thinking import opens_thinking, split_thinking, stream_thinking
from medibot.model.tokenizer import escape_markers, load_saved_tokenizer, role_markers, template_kwargs
from medibot.recipe import load_recipe
from medibot.run import Run, find_finished_run
from medibot.serving.emergencies import NOTICE, emergency_notice

Message = dict[str, str]
MODELS = ("base", "tuned")


@dataclass(frozen=True)
class Decoding:
    """How an answer is chosen; a temperature of None is what the run's generation config says, as in evaluation."""

    max_new_tokens: int = 256
    temperature: float | None = None
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int | None = None


class Assistant:
    """A finished run, loaded once, that any number of threads may ask."""

    @explain_memory("model", "end what else uses this memory; a run with a section quantization needs less")
    def __init__(self, run: Run | str) -> None:
        silence_upstream()
        self.run = find_finished_run(run) if isinstance(run, str) else run
        self.recipe = load_recipe(str(self.run.recipe))
        # What readers of answers are told first: what this is not, and what its data lacks
        self.about = " ".join(filter(None, (NOTICE, self.recipe.evaluation.caveat)))
        # The run's own copy of tokenizer and template, so that use cannot differ from training
        self.tokenizer = load_saved_tokenizer(self.run.weights)
        self.config = GenerationConfig.from_pretrained(self.run.weights)
        dtype = choose_precision(self.recipe.model.get("dtype")).dtype
        tuned = load_tuned(self.recipe, self.run.weights, dtype)
        # An adapter's base is the same weights with the adapter off
        base = tuned if isinstance(tuned, PeftModel) else load_base(self.recipe, dtype).to(tuned.device).eval()
        self.weights: dict[str, PreTrainedModel | PeftModel] = {"base": base, "tuned": tuned}
        self.window: int = tuned.config.max_position_embeddings
        self.markers = role_markers(self.tokenizer)
        self.opens_thinking = opens_thinking(self.tokenizer, template_kwargs(self.recipe))
        self.turns = Turns()
        # Upstream's tokenizer changes its own state while it reads control tokens as text
        self.tokenizing = threading.Lock()

    def notice(self, message: str) -> str | None:
        """Return what comes before the answer to a message that describes an emergency; None without one."""
        return emergency_notice(message) if self.recipe.evaluation.emergency_notice else None

    def prompt_ids(self, messages: list[Message]) -> list[int]:
        """Return token ids of the conversation as training rendered it; control tokens in content are plain text."""
        if messages[0]["role"] != "system" and self.recipe.data.common_system:
            messages = [{"role": "system", "content": self.recipe.data.common_system}, *messages]
        safe = [message | {"content": escape_markers(message["content"], self.markers)} for message in messages]
        rendering = {"add_generation_prompt": True, "return_dict": True} | template_kwargs(self.recipe)
        with self.tokenizing:
            return self.tokenizer.apply_chat_template(safe, **rendering)["input_ids"]

    def reply(
        self, messages: list[Message], which: str = "tuned", decoding: Decoding = Decoding(), whole: bool = False
    ) -> "Reply":
        """Return the answer of "base" or "tuned" to a conversation that ends with a user's message, not yet begun.

        The oldest turns are left out until prompt and answer fit the context window, unless the `whole` is wanted. What
        was thought before an earlier answer is left out, whatever the template would do with it.
        """
        messages = [without_thinking(message) for message in messages]
        roles = " ".join(message["role"] for message in messages)
        if not re.fullmatch(r"(system )?(user assistant )*user", roles):
            remedy = "a system message or none, then user and assistant in turn, the user last"
            raise RecipeError.of("messages", f"the roles are {roles or 'none'}", remedy)
        for place, message in enumerate(messages, start=1):
            if not message["content"].strip():
                raise RecipeError.of("messages", f"message {place} is empty", "write something")
        first, longest = int(messages[0]["role"] == "system"), decoding.max_new_tokens
        for dropped in range(0, 1 if whole else len(messages) - first, 2):
            ids = self.prompt_ids([*messages[:first], *messages[first + dropped :]])
            if len(ids) + longest <= self.window:
                return Reply(self, ids, which, decoding, dropped)
        what = f"{len(ids):,} tokens of messages and {longest:,} of answer exceed the model's {self.window:,}"
        raise TooLong.of("messages", what, "write less, or ask for a shorter answer")


class TooLong(RecipeError):
    """A conversation that does not fit the context window."""


class Reply:
    """One answer: iterating makes it and yields its text in pieces; `cancel` ends it, from any thread.

    The text is all that the model says; `parts` tells what it thinks from what it answers.
    Afterwards `completion_tokens` counts its tokens, the stop token included, and `finish_reason` says "stop" (ended by
    itself or at a stop text), "length" (cut at max_new_tokens) or "cancelled". `dropped` messages were left out.
    """

    def __init__(self, assistant: Assistant, ids: list[int], which: str, decoding: Decoding, dropped: int = 0) -> None:
        self.assistant, self.ids, self.which, self.decoding, self.dropped = assistant, ids, which, decoding, dropped
        self.prompt_tokens, self.completion_tokens = len(ids), 0
        self.finish_reason = "length"
        self.failure: Exception | None = None
        self.cancelled = threading.Event()
        self.random_state: list[torch.Tensor] | None = None
        self.stream = TextIteratorStreamer(assistant.tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.thread = threading.Thread(target=self.generate, daemon=True)

    def cancel(self) -> None:
        """End the answer at its next token."""
        self.cancelled.set()

    def __iter__(self) -> Generator[str]:
        """Yield pieces of text; a piece that may begin a stop text is held back until it is known not to."""
        text, sent, ends = "", 0, []
        held = max((len(stop) for stop in self.decoding.stop), default=1) - 1
        self.thread.start()
        try:
            for piece in self.stream:
                text += piece
                ends = [text.index(stop) for stop in self.decoding.stop if stop in text]
                ready = min(ends, default=len(text) - held)
                if ready > sent:
                    yield text[sent:ready]
                    sent = ready
                if ends:
                    break
            if text[sent:] and not ends:
                yield text[sent:]
        finally:
            # Also for whoever stops reading: a thread still inside torch when Python ends would abort the process
            self.cancel()
            self.thread.join()
        if self.failure is not None:
            with explain_memory("messages", "write less, ask for a shorter answer, or end what else uses this memory"):
                raise RuntimeError("the model failed while it answered") from self.failure
        if ends:
            self.finish_reason = "stop"

    def parts(self) -> Iterator[tuple[str, str]]:
        """Make the answer, and yield (trace, answer) in pieces."""
        return stream_thinking(self, self.assistant.opens_thinking)

    def generate(self) -> None:
        """Generate in this thread, holding the model for a token at a time."""
        weights = self.assistant.weights[self.which]
        try:
            self.take_model()
            with torch.inference_mode():
                prompt = torch.tensor([self.ids], device=weights.device)
                weights.generate(
                    input_ids=prompt,
                    attention_mask=torch.ones_like(prompt),
                    generation_config=generation_config(self.assistant.config, self.decoding),
                    stopping_criteria=StoppingCriteriaList([self.after_token]),
                    streamer=self.stream,
                )
        except Exception as error:  # whatever it is, it belongs to the thread that reads the answer
            self.failure = error
            self.stream.on_finalized_text("", stream_end=True)
        finally:
            self.assistant.turns.give()

    def after_token(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """Let the next thread have the model, then return whether to stop, [1]; called by upstream's `generate`."""
        self.random_state = [torch.get_rng_state(), *torch.cuda.get_rng_state_all()]
        self.assistant.turns.give()
        self.take_model()
        self.completion_tokens, stop = input_ids.shape[1] - self.prompt_tokens, self.cancelled.is_set()
        if int(input_ids[0, -1]) in self.assistant.config.eos_token_id:
            self.finish_reason = "stop"
        elif stop:
            self.finish_reason = "cancelled"
        return torch.tensor([stop], device=input_ids.device)

    def take_model(self) -> None:
        """Wait for the model, switch its adapter, and go on with this answer's random numbers."""
        turns, weights = self.assistant.turns, self.assistant.weights[self.which]
        turns.take()
        if isinstance(weights, PeftModel) and turns.which != self.which:
            adapter = weights.base_model
            adapter.disable_adapter_layers() if self.which == "base" else adapter.enable_adapter_layers()
            turns.which = self.which
        # torch's generators belong to the process, and each answer must be repeatable by its seed
        if self.random_state is not None:
            torch.set_rng_state(self.random_state[0])
            torch.cuda.set_rng_state_all(self.random_state[1:])
        elif self.decoding.seed is not None:
            torch.manual_seed(self.decoding.seed)


class Turns:
    """A lock that threads get in the order in which they asked; a plain Lock would let one thread take it again."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.asked = self.given = 0
        # The model that the weights were last set to be
        self.which: str | None = None

    def take(self) -> None:
        """Wait for the lock."""
        with self.changed:
            ticket = self.asked
            self.asked += 1
            self.changed.wait_for(lambda: self.given == ticket)

    def give(self) -> None:
        """Hand the lock to the thread that has waited longest."""
        with self.changed:
            self.given += 1
            self.changed.notify_all()


def without_thinking(message: Message) -> Message:
    """Return a message without the trace that an assistant's may begin with."""
    if message["role"] != "assistant":
        return message
    return message | {"content": split_thinking(message["content"])[1]}


def generation_config(config: GenerationConfig, decoding: Decoding) -> GenerationConfig:
    """Return the run's generation config with what was asked for; temperature 0 is greedy."""
    config = copy.deepcopy(config)
    config.max_new_tokens = decoding.max_new_tokens
    if decoding.temperature:
        config.update(do_sample=True, temperature=decoding.temperature, top_p=decoding.top_p, top_k=0)
    elif decoding.temperature is not None:
        config.update(do_sample=False, temperature=None, top_p=None, top_k=None)
    return config
