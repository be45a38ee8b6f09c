"""Answer conversations with a finished run, base model and tuned model, exactly as it was trained.

reply = Assistant("quickstart").reply([{"role": "user", "content": "What is anemia?"}], "tuned")
for piece in reply:
    print(piece, end="")
"""

import copy
import threading
from collections import deque
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
)

from medibot.errors import RecipeError
from medibot.model.loading import load_base, load_tuned, silence_upstream
from medibot.model.precision import choose_precision
from medibot.model.template import template_kwargs
from medibot.model.tokenizer import escape_markers, role_markers
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

    def __init__(self, run: Run | str) -> None:
        silence_upstream()
        self.run = find_finished_run(run) if isinstance(run, str) else run
        self.recipe = load_recipe(str(self.run.recipe))
        # The run's own copy of tokenizer and template, so that use cannot differ from training
        self.tokenizer = AutoTokenizer.from_pretrained(self.run.weights)
        self.config = GenerationConfig.from_pretrained(self.run.weights)
        dtype = choose_precision(self.recipe.model.get("dtype")).dtype
        tuned = load_tuned(self.recipe, self.run.weights, dtype)
        # An adapter's base is the same weights with the adapter off
        base = tuned if isinstance(tuned, PeftModel) else load_base(self.recipe, dtype).to(tuned.device).eval()
        self.weights: dict[str, PreTrainedModel | PeftModel] = {"base": base, "tuned": tuned}
        self.window: int = tuned.config.max_position_embeddings
        self.markers = role_markers(self.tokenizer)
        self.turns = Turns()

    @property
    def about(self) -> str:
        """Return what readers of answers are told first: what this is not, and what its data lacks."""
        return " ".join(filter(None, (NOTICE, self.recipe.evaluation.caveat)))

    def notice(self, message: str) -> str | None:
        """Return what comes before the answer to a message that describes an emergency; None without one."""
        return emergency_notice(message) if self.recipe.evaluation.emergency_notice else None

    def prompt_ids(self, messages: list[Message]) -> list[int]:
        """Return token ids of the conversation as training rendered it; control tokens in content are plain text."""
        if messages[0]["role"] != "system" and self.recipe.data.system:
            messages = [{"role": "system", "content": self.recipe.data.system}, *messages]
        safe = [message | {"content": escape_markers(message["content"], self.markers)} for message in messages]
        return self.tokenizer.apply_chat_template(
            safe, add_generation_prompt=True, tokenize=True, return_dict=True, **template_kwargs(self.recipe)
        )["input_ids"]

    def fit_window(self, messages: list[Message], max_new_tokens: int) -> tuple[list[int], int]:
        """Return (prompt ids, messages left out): the oldest turns go until prompt and answer fit the context window."""
        system = [message for message in messages[:1] if message["role"] == "system"]
        turns = messages[len(system) :]
        room = self.window - max_new_tokens
        for dropped in range(0, len(turns), 2):
            ids = self.prompt_ids([*system, *turns[dropped:]])
            if len(ids) <= room:
                return ids, dropped
        what = f"{len(ids):,} tokens, and {max(room, 0):,} of the model's {self.window:,} are left for them"
        raise RecipeError.of("message", what, "write less, or ask for a shorter answer")

    def reply(self, messages: list[Message], which: str = "tuned", decoding: Decoding = Decoding()) -> "Reply":
        """Start the answer of "base" or "tuned" to a conversation that ends with a user's message."""
        require_conversation(messages)
        ids, dropped = self.fit_window(messages, decoding.max_new_tokens)
        return Reply(self, ids, dropped, which, decoding)


class Reply:
    """One answer while it is made: iterating yields its text in pieces, `cancel` ends it; any thread may do either.

    Afterwards `completion_tokens` counts its tokens, the stop token included, and `finish_reason` says "stop" (ended by
    itself or at a stop text), "length" (cut at max_new_tokens) or "cancelled".
    """

    def __init__(self, assistant: Assistant, ids: list[int], dropped: int, which: str, decoding: Decoding) -> None:
        self.prompt_tokens, self.dropped = len(ids), dropped
        self.completion_tokens = 0
        self.finish_reason = "length"
        self.decoding = decoding
        self.stops = set(assistant.config.eos_token_id)
        self.failure: Exception | None = None
        self.cancelled = threading.Event()
        self.stream = CountingStreamer(assistant.tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.thread = threading.Thread(target=self.generate, args=(assistant, ids, which), daemon=True)
        self.thread.start()

    def cancel(self) -> None:
        """End the answer at its next token; `thread` can then be joined."""
        self.cancelled.set()

    def generate(self, assistant: Assistant, ids: list[int], which: str) -> None:
        """Generate in this thread, holding the model for a token at a time."""
        weights = assistant.weights[which]
        prompt = torch.tensor([ids], device=weights.device)
        turn = TurnTaking(assistant.turns, weights, which, self.decoding.seed, self.cancelled)
        try:
            with turn.held(), torch.inference_mode():
                weights.generate(
                    input_ids=prompt,
                    attention_mask=torch.ones_like(prompt),
                    generation_config=generation_config(assistant.config, self.decoding),
                    stopping_criteria=StoppingCriteriaList([turn]),
                    streamer=self.stream,
                )
        except Exception as error:  # whatever it is, it belongs to the thread that reads the answer
            self.failure = error
            self.stream.on_finalized_text("", stream_end=True)

    def __iter__(self) -> Iterator[str]:
        """Yield pieces of text; a piece that may begin a stop text is held back until it is known not to."""
        text, given, ended = "", 0, False
        held_back = max((len(stop) for stop in self.decoding.stop), default=1) - 1
        for piece in self.stream:
            text += piece
            ends = [place for place in (text.find(stop) for stop in self.decoding.stop) if place >= 0]
            if ends:
                ended, text = True, text[: min(ends)]
                self.cancel()
                break
            if len(text) - held_back > given:
                yield text[given : len(text) - held_back]
                given = len(text) - held_back
        if text[given:]:
            yield text[given:]
        # A thread that is still inside torch when Python ends would abort the process
        self.thread.join()
        if self.failure is not None:
            raise RuntimeError("the model failed while it answered") from self.failure
        self.completion_tokens = self.stream.tokens
        if ended or self.stream.last in self.stops:
            self.finish_reason = "stop"
        elif self.cancelled.is_set():
            self.finish_reason = "cancelled"


class CountingStreamer(TextIteratorStreamer):
    """Upstream's stream of text, which also counts the tokens and keeps the last one."""

    tokens = 0
    last: int | None = None

    def put(self, value: torch.Tensor) -> None:
        """Count a token, then pass it on."""
        if not self.next_tokens_are_prompt:
            self.tokens += value.numel()
            self.last = int(value.flatten()[-1])
        super().put(value)


class Turns:
    """A lock that threads get in the order in which they asked; a plain Lock would let one thread take it again."""

    def __init__(self) -> None:
        self.waiting: deque[threading.Event] = deque()
        self.guard = threading.Lock()
        self.held = False
        # The model that the weights were last set to be
        self.which: str | None = None

    def take(self) -> None:
        """Wait for the lock."""
        with self.guard:
            if not self.held:
                self.held = True
                return
            mine = threading.Event()
            self.waiting.append(mine)
        mine.wait()

    def give(self) -> None:
        """Hand the lock to the thread that has waited longest."""
        with self.guard:
            if self.waiting:
                self.waiting.popleft().set()
            else:
                self.held = False


class TurnTaking(StoppingCriteria):
    """Called by `generate` after each token: lets the next thread have the model, and ends a cancelled answer."""

    def __init__(
        self,
        turns: Turns,
        weights: PreTrainedModel | PeftModel,
        which: str,
        seed: int | None,
        cancelled: threading.Event,
    ) -> None:
        self.turns, self.weights, self.which, self.seed, self.cancelled = turns, weights, which, seed, cancelled
        self.random_state: list[torch.Tensor] | None = None

    @contextmanager
    def held(self) -> Generator[None]:
        """Hold the model for the body."""
        self.enter()
        try:
            yield
        finally:
            self.leave()

    def enter(self) -> None:
        """Take the model, switch its adapter, and go on with this answer's random numbers."""
        self.turns.take()
        if isinstance(self.weights, PeftModel) and self.turns.which != self.which:
            adapter = self.weights.base_model
            adapter.disable_adapter_layers() if self.which == "base" else adapter.enable_adapter_layers()
            self.turns.which = self.which
        # torch's generators belong to the process, and each answer must be repeatable by its seed
        if self.random_state is not None:
            torch.set_rng_state(self.random_state[0])
            torch.cuda.set_rng_state_all(self.random_state[1:])
        elif self.seed is not None:
            torch.manual_seed(self.seed)

    def leave(self) -> None:
        """Give the model to whoever waits."""
        self.random_state = [torch.get_rng_state(), *torch.cuda.get_rng_state_all()]
        self.turns.give()

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """Return whether to stop, for each row of the batch."""
        self.leave()
        self.enter()
        return torch.full((input_ids.shape[0],), self.cancelled.is_set(), device=input_ids.device)


def generation_config(config: GenerationConfig, decoding: Decoding) -> GenerationConfig:
    """Return the run's generation config with what was asked for; temperature 0 is greedy."""
    config = copy.deepcopy(config)
    config.max_new_tokens = decoding.max_new_tokens
    if decoding.temperature:
        config.update(do_sample=True, temperature=decoding.temperature, top_p=decoding.top_p, top_k=0)
    elif decoding.temperature is not None:
        config.update(do_sample=False, temperature=None, top_p=None, top_k=None)
    return config


def require_conversation(messages: list[Message]) -> None:
    """Raise RecipeError for anything but a system message or none, then user and assistant in turn, the user last."""
    roles = [message["role"] for message in messages]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    wanted = [("user", "assistant")[place % 2] for place in range(len(turns))]
    if turns != wanted or len(turns) % 2 == 0:
        remedy = "a system message or none, then user and assistant in turn, the user last"
        raise RecipeError.of("messages", f"the roles are {', '.join(roles) or 'none'}", remedy)
    for place, message in enumerate(messages, start=1):
        if not message["content"].strip():
            raise RecipeError.of("messages", f"message {place} is empty", "write something")
